"""Adapter of a trained model for ``mteb.evaluate``: one width, with the prompts for queries and documents.

import mteb
from jasper_fast.mteb import load
results = mteb.evaluate(load("runs/minilm-docstrings", width=128), mteb.get_tasks(["SciFact"]))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast.models.embedder import flat_model, load_model
from jasper_fast.models.hub import FORMS, resolve_model
from jasper_fast.models.sentence_transformer import model_batching
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from mteb.models import SentenceTransformerEncoderWrapper


def load(
    model: str | Path,
    width: int | None = None,
    *,
    max_length: int | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
) -> SentenceTransformerEncoderWrapper:
    """Load a model for ``mteb.evaluate``.

    Args:
        model: run folder, model folder, folder of an adapted model, hub name, or ``package:import_name/folder``. An
            asymmetric model can only be evaluated on retrieval tasks, which tell queries from documents.
        width: width of the embeddings. None: the widest.
        max_length: largest number of tokens per text. None: the model's.
        device: torch device, such as "cpu" or "cuda:1". None: the best available.
        trust_remote_code: permission to run code from the model. Default: False.

    Returns:
        mteb's wrapper. Its model name ends with the width, so mteb stores the results of each width separately.

    Raises:
        JasperError: mteb is not installed, the model or the width is missing, or the embeddings depend on padding.

    Example:
        >>> import mteb  # doctest: +SKIP
        >>> model = load("runs/minilm-docstrings", width=128)  # doctest: +SKIP
        >>> mteb.evaluate(model, mteb.get_tasks(["SciFact"]))  # doctest: +SKIP
    """
    try:
        from mteb.models import SentenceTransformerEncoderWrapper
    except ModuleNotFoundError as error:
        raise JasperError(f"{error.name} is not installed. Fix: `pip install mteb`") from None

    loaded = load_model(str(model), max_length, device, trust_remote_code=trust_remote_code)
    if model_batching(loaded, str(model)) != "padded":
        raise JasperError(
            f"{model}: its embeddings depend on padding, and mteb pads its batches. Fix: evaluate it with "
            "`jasper-fast evaluate`, which encodes one length at a time"
        )
    flat = flat_model(loaded, width)
    wrapper = SentenceTransformerEncoderWrapper(flat)
    path = Path(resolve_model(str(model)))
    folder = path.resolve() if path.exists() else path
    stem = folder.parent.name if folder.name == "model" else folder.name  # the model of a run gets the name of the run
    if folder.name in FORMS:
        stem = f"{folder.parent.name}-{folder.name}"
    dimension = flat.get_embedding_dimension()
    update = {"name": f"jasper_fast/{stem}-{dimension}", "embed_dim": dimension}
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=update)
    return wrapper
