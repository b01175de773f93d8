"""The sections of a configuration about losses. The weights come from the table, `jasper_fast.config.losses`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, create_model, model_validator

from jasper_fast.config.losses import LOSSES, Loss
from jasper_fast.config.types import NotNegative, Section

_fields: Any = {loss.name: (NotNegative, Field(loss.weight, description=loss.description)) for loss in LOSSES}
_Weights: Any = create_model("_Weights", __base__=Section, **_fields)


class LossWeights(_Weights):
    """Weights of the losses. 0 leaves a loss out. The defaults are the paper's, which has no ``neighbourhood`` loss."""

    @model_validator(mode="after")
    def _at_least_one(self) -> LossWeights:
        if not self.weighted():
            raise ValueError("every loss has weight 0: nothing would be learnt")
        return self

    def weighted(self) -> list[Loss]:
        """Return the losses with a weight above 0, in the table's order."""
        return [loss for loss in LOSSES if getattr(self, loss.name)]

    def has_gradient(self, texts: int) -> bool:
        """Return True if any weighted loss learns from a batch of ``texts`` texts."""
        return any(texts >= loss.min_rows for loss in self.weighted())

    def compares_texts(self, texts: int) -> bool:
        """Return True if a loss that compares texts with each other learns from a batch of ``texts`` texts."""
        return any(texts >= loss.min_rows for loss in self.weighted() if not loss.equal_widths)


class LossesConfig(Section):
    """Scope of the losses when several processes train."""

    scope: Literal["global", "local"] = "global"  # global: all ranks' texts; local: each rank's, as in the paper
