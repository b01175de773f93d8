"""Arms of ``python -m bench ablation --full-width``. Each differs from the base in one thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from jasper_fast.config.run import Config

BASE = "base"
SHARE = 0.5  # of the documents that are cut into pieces, in the arm with texts at full length

Overrides = list[tuple[str, Any]]


@dataclass(frozen=True)
class FullWidthArm:
    """One arm.

    Args:
        name: unique name.
        question: what it answers.
        change: function from the base's configuration to the one override of this arm. None: the arm is made of
            finished runs, or a configuration has nothing to change.
        made: what is made of finished runs. "soup": the mean of the weights of two runs with other seeds, each with
            half of the budget. "soup of full runs": each with all of it. "last layer" and "three layers": the base's
            run with a closed-form head on the states of that many layers, concatenated.
    """

    name: str
    question: str
    change: Callable[[Config], Overrides] | None = None
    made: Literal["", "soup", "soup of full runs", "last layer", "three layers"] = ""

    def overrides(self, config: Config) -> Overrides | None:
        """Return the overrides of the base's configuration. None: the arm does not apply to it."""
        if self.change is None:
            return []
        return self.change(config) or None


def of_stage(field: str, value: Any) -> Callable[[Config], Overrides]:
    """Return a change of one field of the last stage, none if the base has that value."""

    def change(config: Config) -> Overrides:
        last = len(config.stages) - 1
        same = getattr(config.stages[last], field) == value
        return [] if same else [(f"stages.{last}.{field}", value)]

    return change


def of_questions(factor: int) -> Callable[[Config], Overrides]:
    """Return a change of the limit of the source of questions: that many times as many, 0 for no questions."""

    def change(config: Config) -> Overrides:
        sources = config.data.sources
        asked = [i for i, source in enumerate(sources) if source.role == "query" and source.limit]
        if len(asked) != 1 or len(sources) < 2:
            return []
        (index,) = asked
        if not factor:
            rest = [source.model_dump(mode="json") for i, source in enumerate(sources) if i != index]
            return [("data.sources", rest)]
        return [(f"data.sources.{index}.limit", factor * (sources[index].limit or 0))]

    return change


def _full_length(config: Config) -> Overrides:
    return [("data.cut_share", SHARE)] if config.data.cut_share > SHARE else []


def _refit(config: Config) -> Overrides:
    return [] if config.refit or not config.data.held_out else [("refit", True)]


FULL_WIDTH_ARMS = [
    FullWidthArm(BASE, "The base"),
    FullWidthArm("cyclic", "Does a cyclic learning rate help (LEAF)", of_stage("schedule", "cyclic")),
    FullWidthArm("average 0.99", "Does a moving average of the weights help", of_stage("average", 0.99)),
    FullWidthArm("muon", "Muon against AdamW", of_stage("optimizer", "muon")),
    FullWidthArm("batch 16", "Smaller batches", of_stage("batch_size", 16)),
    FullWidthArm("batch 64", "Larger batches", of_stage("batch_size", 64)),
    FullWidthArm("no questions", "What question-like texts are worth", of_questions(0)),
    FullWidthArm("three times the questions", "Do more question-like texts help", of_questions(3)),
    FullWidthArm("half at full length", "Do more texts at full length help", _full_length),
    FullWidthArm(
        "neighbour batches", "Does matching the embeddings of hard negatives help", of_stage("batches", "neighbours")
    ),
    FullWidthArm("refit", "Does a closed-form head help, where held-out documents choose it", _refit),
    FullWidthArm("closed-form head", "Does a closed-form head help", made="last layer"),
    FullWidthArm(
        "closed-form head on three layers", "Do the states of three layers help, concatenated", made="three layers"
    ),
    FullWidthArm("soup of two, half the budget each", "A soup at the same cost", made="soup"),
    FullWidthArm("soup of two, twice the cost", "A soup of two whole runs", made="soup of full runs"),
]
