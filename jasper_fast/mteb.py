"""A trained model as ``mteb.evaluate`` wants it: one width, prompts by the role that the benchmark names.

import mteb
from jasper_fast.mteb import load
results = mteb.evaluate(load("runs/minilm-docstrings", width=128), mteb.get_tasks(["SciFact"]))
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast.encoders import flat_model, load_model
from jasper_fast.errors import JasperError
from jasper_fast.models import resolve_model
from jasper_fast.stock import model_batching

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
    """A model that ``mteb.evaluate`` runs on.

    Args:
        model: run folder, model folder, name, or ``package:import_name/folder``.
        width: which head; None takes the widest.
        max_length: tokens; None keeps the model's own.
        device: as torch names it; None takes the best there is.
        trust_remote_code: whether code that the model brings may run.

    Returns:
        mteb's own wrapper. Its name ends with the width, so that mteb keeps the results of every width apart.

    Raises:
        JasperError: mteb is not installed, the model or width is missing, or its embeddings depend on padding.
    """
    try:
        from mteb.models import SentenceTransformerEncoderWrapper
    except ModuleNotFoundError as error:
        raise JasperError(f"{error.name} is not installed; type `pip install mteb`") from None

    loaded = load_model(str(model), max_length, device, trust_remote_code=trust_remote_code)
    if model_batching(loaded, str(model)) != "padded":
        raise JasperError(
            f"{model}: its embeddings depend on padding, and mteb pads its batches. Fix: score it with "
            "`python -m jasper_fast.evaluate`, which encodes one length at a time"
        )
    flat = flat_model(loaded, width)
    wrapper = SentenceTransformerEncoderWrapper(flat)
    path = Path(resolve_model(str(model)))
    folder = path.resolve() if path.exists() else path
    stem = folder.parent.name if folder.name == "model" else folder.name  # a run is known by its own name
    own = flat.get_embedding_dimension()
    update = {"name": f"jasper_fast/{stem}-{own}", "embed_dim": own}
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=update)
    return wrapper
