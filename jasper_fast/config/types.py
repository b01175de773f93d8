"""Types common to the sections of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def reject_bool(value: Any) -> Any:
    """Reject booleans, which pydantic would read as 0 or 1. Numbers as text are accepted."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(reject_bool)]
PositiveInt = Annotated[int, Field(gt=0, le=10**12, strict=True)]  # upper bound: accepted by all libraries
Width = Annotated[int, Field(gt=0, le=10**6, strict=True)]  # upper bound: a head's weights fit in memory
Seed = Annotated[int, Field(ge=0, le=10**9, strict=True)]  # upper bound: fits 64 bits with stage and step
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(reject_bool)]
NotNegative = Annotated[float, Field(ge=0.0), BeforeValidator(reject_bool)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(reject_bool)]
FractionBelowOne = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(reject_bool)]
# A number of layers, or all of them. The discriminator limits error messages to the given form.
LayerCount = Annotated[
    Annotated[int, Field(ge=0, strict=True), Tag("layer-count")] | Annotated[Literal["all"], Tag("all-layers")],
    Discriminator(lambda value: "all-layers" if isinstance(value, str) else "layer-count"),
]
# One number, or one per width. The discriminator limits error messages to the given form.
ByHead = Annotated[
    Annotated[Positive, Tag("one-number")] | Annotated[dict[Annotated[int, Field(gt=0)], Positive], Tag("by-head")],
    Discriminator(lambda value: "by-head" if isinstance(value, dict) else "one-number"),
]


class Section(BaseModel):
    """Base class of all sections of the YAML file.

    The stored configuration of a run may lack the fields of a newer version. The default of a new field must therefore
    keep the behaviour of older versions. Otherwise a resumed run would change silently.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
