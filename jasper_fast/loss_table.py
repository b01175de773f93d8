"""The table of the losses: one line for each. Everything that lists losses goes over it.

`jasper_fast.losses.NAME` computes the loss of that name. A configuration has its weight in ``weights.NAME``, and the
log has its value in the column NAME. Nothing here imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from jasper_fast.config_types import NotNegative, Section

TEMPERATURE = 0.05


@dataclass(frozen=True)
class Loss:
    """One line of the table.

    Args:
        name: the module below `jasper_fast.losses`, the field of ``weights``, and the column of the log.
        weight: the default weight. A loss without one is logged only in stages that give it a weight.
        rows: the smallest number of texts from which the loss learns.
        meaning: its description in docs/config.md, in a few words.
        equal_widths: whether the loss compares each embedding with the teacher's, which needs equal widths. Otherwise
            it compares the texts of a batch with each other.
        unit_rows: whether ``compute`` gets rows of unit length. Otherwise it gets embeddings of any length.
    """

    name: str
    weight: float
    rows: int
    meaning: str
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
# A vision stage adds this one. It compares images with captions, so it is in no other stage.
CONTRASTIVE = Loss("contrastive", 0.0, 2, "captions against images, in both directions")
PARTS = (*LOSSES, CONTRASTIVE)  # all columns of losses in the log, in their order

_fields: Any = {loss.name: (NotNegative, Field(loss.weight, description=loss.meaning)) for loss in LOSSES}
_Weights: Any = create_model("_Weights", __base__=Section, **_fields)


class LossWeights(_Weights):
    """Weights of the losses. 0 leaves a loss out. The defaults are the paper's, which has no ``neighbourhood`` loss."""

    @model_validator(mode="after")
    def _some(self) -> LossWeights:
        if not self.weighted():
            raise ValueError("every loss has weight 0: nothing would be learnt")
        return self

    def weighted(self) -> list[Loss]:
        """Return the losses with a weight above 0, in the table's order."""
        return [loss for loss in LOSSES if getattr(self, loss.name)]

    def learns(self, texts: int) -> bool:
        """Return True if any weighted loss learns from a batch of so many texts."""
        return any(texts >= loss.rows for loss in self.weighted())

    def compares(self, texts: int) -> bool:
        """Return True if a loss that compares texts with each other learns from a batch of so many."""
        return any(texts >= loss.rows for loss in self.weighted() if not loss.equal_widths)


class LossesConfig(Section):
    """Scope of the losses when several processes train."""

    scope: Literal["global", "local"] = "global"  # global: all ranks' texts; local: each rank's, as in the paper


def titles(losses: list[Loss]) -> str:
    """List losses in prose: "a, b or c"."""
    *first, last = [loss.title for loss in losses]
    return f"{', '.join(first)} or {last}" if first else last
