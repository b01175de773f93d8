"""The table of the losses: one line for each. Everything that lists losses goes over it.

`jasper_fast.losses.NAME` computes the loss of that name. A configuration has its weight in ``weights.NAME``, and the
log has its value in the column NAME. Nothing here imports torch or pydantic.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

TEMPERATURE = 0.05  # of the neighbourhood loss, by default


@dataclass(frozen=True)
class Loss:
    """One line of the table.

    Args:
        name: the module below `jasper_fast.losses`, the field of ``weights``, and the column of the log.
        weight: the default weight. A loss without one is logged only in stages that give it a weight.
        min_rows: the smallest number of texts from which the loss learns.
        description: its description in docs/config.md, in a few words.
        equal_widths: whether the loss compares each embedding with the teacher's, which needs equal widths. Otherwise
            it compares the texts of a batch with each other.
        unit_rows: whether ``compute`` gets rows of unit length. Otherwise it gets embeddings of any length.
    """

    name: str
    weight: float
    min_rows: int
    description: str
    equal_widths: bool = False
    unit_rows: bool = True

    @property
    def title(self) -> str:
        """Its name in prose."""
        return self.name.replace("_", " ")


LOSSES = (
    Loss("cosine", 10.0, 1, "distance to the teacher's embedding; needs equal widths", equal_widths=True),
    Loss("similarity", 200.0, 2, "difference of the similarity matrices", unit_rows=False),
    Loss("relative_similarity", 20.0, 3, "order of the similarities of all pairs"),
    Loss("neighbourhood", 0.0, 3, "order of each text's nearest neighbours", unit_rows=False),
)
# Vision and ranking stages add these. They compare images with captions, or queries with documents.
CONTRASTIVE = Loss("contrastive", 0.0, 2, "captions against images, in both directions; queries against documents")
LISTWISE = Loss("listwise", 0.0, 1, "distribution over the candidates of a query")
LOGGED_LOSSES = (*LOSSES, CONTRASTIVE, LISTWISE)  # all columns of losses in the log, in their order


def titles(losses: Sequence[Loss]) -> str:
    """List losses in prose: "a, b or c"."""
    *first, last = [loss.title for loss in losses]
    return f"{', '.join(first)} or {last}" if first else last
