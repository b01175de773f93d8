"""Types that the sections of a configuration share: numbers with their limits, and the section itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag


def number(value: Any) -> Any:
    """Accept a number, also as text, but not true for 1.0."""
    if isinstance(value, bool):
        raise ValueError("expected a number")
    return value


Number = Annotated[float, BeforeValidator(number)]
PositiveInt = Annotated[int, Field(gt=0, le=10**12, strict=True)]  # the range that libraries take
Width = Annotated[int, Field(gt=0, le=10**6, strict=True)]  # of a head: a layer of that width must fit memory
Seed = Annotated[int, Field(ge=0, le=10**9, strict=True)]  # what is made of it with stage and step fits 64 bits
Positive = Annotated[float, Field(gt=0.0), BeforeValidator(number)]
NotNegative = Annotated[float, Field(ge=0.0), BeforeValidator(number)]
Share = Annotated[float, Field(ge=0.0, le=1.0), BeforeValidator(number)]
Part = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(number)]  # never the whole
# One number, or one for each width. An error is about the form that was given, not about both.
ByHead = Annotated[
    Annotated[Positive, Tag("one-number")] | Annotated[dict[Annotated[int, Field(gt=0)], Positive], Tag("by-head")],
    Discriminator(lambda given: "by-head" if isinstance(given, dict) else "one-number"),
]


class Section(BaseModel):
    """A section of the YAML file.

    A run resumes under a newer version, whose fields its stored configuration lacks. So the default of a new field must
    mean "as before this field". Otherwise old runs would continue in another way than they began, unnoticed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
