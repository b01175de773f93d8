"""Replace parts of a teacher's model: its pooling, and its Dense head."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jasper_fast.models.hub import CANNOT_LOAD
from jasper_fast.utils.errors import JasperError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

POOLINGS = {
    "mean": "mean",
    "cls": "cls",
    "last": "lasttoken",
}  # name in a configuration -> name in sentence-transformers


def set_pooling(model: SentenceTransformer, mode: str, name: str) -> None:
    """Replace the model's pooling.

    Args:
        model: sentence-transformers model.
        mode: name of a pooling in sentence-transformers.
        name: model, for messages.

    Raises:
        JasperError: the model has no pooling, or the new one has another width.
    """
    from sentence_transformers.sentence_transformer.modules import Pooling

    for position, module in enumerate(model):
        if isinstance(module, Pooling):
            pooling = Pooling(module.embedding_dimension, mode, include_prompt=module.include_prompt)
            if pooling.pooling_output_dimension != module.pooling_output_dimension:
                raise JasperError(
                    f"{name}: pooling {mode!r} does not fit the next layer (got a width of "
                    f"{pooling.pooling_output_dimension}, expected {module.pooling_output_dimension} from several "
                    "joined vectors). Fix: set `pooling: auto`"
                )
            model[position] = pooling
            return
    raise JasperError(f"{name}: the model has no pooling layer to change. Fix: set `pooling: auto` for this teacher")


def set_dense(model: SentenceTransformer, where: str, folder: str, revision: str) -> None:
    """Replace the model's Dense head by another one from its files, such as Stella's ``2_Dense_8192``.

    Args:
        model: sentence-transformers model with one Dense module.
        where: folder or hub name of the model.
        folder: folder of the other head among the model's files.
        revision: commit on the hub, or ``sha256:…`` of a folder.

    Raises:
        JasperError: the model has no such head, or not exactly one Dense module.
    """
    from sentence_transformers.sentence_transformer.modules import Dense

    positions = [position for position, module in enumerate(model) if isinstance(module, Dense)]
    if len(positions) != 1:
        raise JasperError(
            f"{where}: `dense: {folder}` needs a model with one Dense module (got {len(positions)}). Fix: omit `dense`"
        )
    hub_revision = None if revision.startswith("sha256:") else revision
    try:
        head = Dense.load(where, subfolder=folder, revision=hub_revision)
    except CANNOT_LOAD as error:
        raise JasperError(
            f"{where}: no Dense head in a folder {folder!r}. Fix: choose a folder of the model's files for `dense`"
        ) from error
    (position,) = positions
    if head.in_features != model[position].in_features:
        raise JasperError(
            f"{where}: the head {folder!r} has another input width than the model's head (got {head.in_features}, "
            f"expected {model[position].in_features}). Fix: choose another head for `dense`"
        )
    model[position] = head.to(model.device)
