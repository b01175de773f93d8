"""The plan of a run: what each part costs, and the steps that a budget of minutes allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.evaluation.advice import MIN_STEPS
from jasper_fast.training.data import TrainingData
from jasper_fast.training.run.folder import result_settings
from jasper_fast.training.run.progress import Phase, Progress, duration
from jasper_fast.training.sample import sample_size
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.fingerprint import settings_digest

PLAN = "plan.json"  # the file in the run's folder
ADDED = ("optimizer", "cycles", "rank")  # fields of a stage that plans of older versions lack


@dataclass(frozen=True)
class StageCost:
    """Measured speed of a stage.

    Args:
        name: the name of the stage.
        step: seconds per optimizer step.
        batch: texts or images per step.
        available: texts or images that the stage draws from.
        row: seconds per pooled text of a frozen encoder.
        rows: largest number of texts to pool. 0: the encoder trains.
        setup: seconds before the first step, without pooling.
        query: seconds to embed, mine and score the candidates of a query of a ranking stage.
        queries: number of such queries. 0: the stage ranks nothing.
        pairs: pairs that a cross-encoder scores for a query. 0: none does.
    """

    name: str
    step: float
    batch: int
    available: int
    row: float = 0.0
    rows: int = 0
    setup: float = 0.0
    query: float = 0.0
    queries: int = 0
    pairs: int = 0

    def pooled(self, steps: int) -> int:
        """Return the number of texts that are pooled for a number of steps."""
        return min(self.rows, steps * self.batch)

    def ranked(self, steps: int) -> int:
        """Return the number of queries that get candidates and scores for a number of steps."""
        return min(self.queries, steps * self.batch)

    def seconds(self, steps: int) -> float:
        """Return the seconds of the whole stage."""
        return self.setup + self.row * self.pooled(steps) + self.query * self.ranked(steps) + self.step * steps


@dataclass(frozen=True)
class Costs:
    """Measured costs of a run.

    Args:
        stages: the speed of each stage.
        teacher: seconds to compute the teacher embeddings that the cache lacks.
        missing: number of these embeddings.
        evaluation: seconds to encode and score what is evaluated.
        evaluated: texts that are encoded for the evaluation, by model and set counted once each.
        texts: number of training texts.
        most_sampled: largest number of training texts that are encoded for the refit of the heads and for PCA.
        encode: seconds per text that the student encodes without gradients.
        export: seconds to write and check the model.
        memory: peak memory in bytes while this was measured.
        teacher_bytes: bytes of the missing teacher embeddings.
    """

    stages: tuple[StageCost, ...]
    teacher: float = 0.0
    missing: int = 0
    evaluation: float = 0.0
    evaluated: int = 0
    texts: int = 0
    most_sampled: int = 0
    encode: float = 0.0
    export: float = 0.0
    memory: int = 0
    teacher_bytes: int = 0


@dataclass(frozen=True)
class Plan:
    """Steps and seconds of a run.

    Args:
        costs: what was measured.
        steps: the steps of each stage.
        notes: remarks about the budget.
    """

    costs: Costs
    steps: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def training(self) -> float:
        """Seconds of all stages, with pooling."""
        return sum(cost.seconds(steps) for cost, steps in zip(self.costs.stages, self.steps, strict=True))

    @property
    def evaluation(self) -> float:
        """Seconds from the last step to the report."""
        return self.costs.evaluation + self.costs.encode * self.sampled + self.costs.export

    @property
    def sampled(self) -> int:
        """Number of training texts that are encoded after the last step."""
        stages = zip(self.costs.stages, self.steps, strict=True)
        trained = sum(cost.batch * steps for cost, steps in stages if not cost.rows)
        return sample_size(self.costs.texts, self.costs.most_sampled, trained)

    @property
    def seconds(self) -> dict[str, float]:
        """Planned seconds by part, and in all."""
        parts = {"teacher": self.costs.teacher, "training": self.training, "evaluation": self.evaluation}
        return {**parts, "in all": sum(parts.values())}

    def progress(self) -> Progress:
        """Return the phases after the teacher embeddings, for the progress bar."""
        phases = []
        for cost, steps in zip(self.costs.stages, self.steps, strict=True):
            if cost.rows:
                rows = cost.pooled(steps)
                phases.append(Phase(f"{cost.name}: pooling", rows, cost.setup + cost.row * rows))
            elif cost.queries:
                queries = cost.ranked(steps)
                phases.append(Phase(f"{cost.name}: scoring", queries * max(1, cost.pairs), cost.query * queries))
            phases.append(Phase(cost.name, steps, cost.step * steps + (0.0 if cost.rows else cost.setup)))
        return Progress([*phases, Phase("evaluation", 1, self.evaluation)])

    def line(self) -> str:
        """Return the time of the run in a line: ``about 11 minutes: 2 minutes teacher, …``."""
        parts = self.seconds
        total = parts.pop("in all")
        listed = ", ".join(f"{duration(seconds)} {part}" for part, seconds in parts.items() if seconds >= 0.5)
        return f"about {duration(total)}: {listed}"

    def apply(self, config: Config) -> Config:
        """Return the configuration with the planned steps."""
        stages = [
            stage.model_copy(update={"steps": steps}) for stage, steps in zip(config.stages, self.steps, strict=True)
        ]
        return config.model_copy(update={"stages": stages})


def make_plan(config: Config, costs: Costs) -> Plan:
    """Return the plan of a configuration with measured costs.

    ``stages.N.minutes`` sets the steps of its stage. ``minutes`` scales the steps of all other stages by one factor.
    """
    steps, notes = [stage.steps for stage in config.stages], []
    pairs = list(zip(config.stages, costs.stages, strict=True))
    for index, (stage, cost) in enumerate(pairs):
        if stage.minutes is not None:
            steps[index] = _largest(cost.seconds, 60.0 * stage.minutes)
    if config.minutes is not None:
        free = [index for index, stage in enumerate(config.stages) if stage.minutes is None]
        fixed = sum(cost.seconds(n) for (stage, cost), n in zip(pairs, steps, strict=True) if stage.minutes is not None)
        unscaled = sum(steps[index] for index in free)

        def scaled(total: int) -> dict[int, int]:
            return {index: max(1, round(config.stages[index].steps * total / unscaled)) for index in free}

        def seconds(total: int) -> float:
            return fixed + sum(costs.stages[index].seconds(n) for index, n in scaled(total).items())

        total = _largest(seconds, 60.0 * config.minutes)
        for index, n in scaled(total).items():
            steps[index] = n
        notes.append(f"minutes {config.minutes:g}: {total / unscaled:.3g} times the steps of the configuration")
    plan = Plan(costs, tuple(steps))
    return replace(plan, notes=(*notes, *_overruns(config, plan), *_few_steps(config, plan)))


def _largest(seconds: Callable[[int], float], budget: float) -> int:
    """Return the largest number of 1 or more whose cost is within the budget, or 1. The cost must not fall."""
    low, high = 1, 2
    while seconds(high) <= budget and high < 10**12:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if seconds(middle) <= budget else (low, middle)
    return low


def _overruns(config: Config, plan: Plan) -> list[str]:
    """Report budgets that are too small for one step of each stage."""
    notes = []
    for stage, cost, steps in zip(config.stages, plan.costs.stages, plan.steps, strict=True):
        if stage.minutes is not None and cost.seconds(steps) > 60.0 * stage.minutes:
            notes.append(
                f"stage {stage.name!r}: {stage.minutes:g} minutes are too few for one step, so it takes one step in "
                f"{duration(cost.seconds(steps))}"
            )
    if config.minutes is not None and plan.training > 60.0 * config.minutes:
        notes.append(
            f"minutes {config.minutes:g} are too few for one step of each stage and its pooling: training takes "
            f"{duration(plan.training)}"
        )
    return notes


def _few_steps(config: Config, plan: Plan) -> list[str]:
    """Report stages of the encoder in which ``minutes`` leaves too few steps to learn much."""
    few = [
        f"{stage.name} {steps}"
        for stage, steps in zip(config.stages, plan.steps, strict=True)
        if stage.last_layers and stage.minutes is None and steps < MIN_STEPS <= stage.steps
    ]
    if config.minutes is None or not few:
        return []
    return [
        f"minutes {config.minutes:g} leave few steps ({', '.join(few)}), so the student will learn little. Fix: raise "
        "minutes, or lower max_length"
    ]


def has_minutes(config: Config) -> bool:
    """Return whether a budget sets the steps of a stage."""
    return config.minutes is not None or any(stage.minutes is not None for stage in config.stages)


def write_plan(folder: Path, config: Config, data: TrainingData, plan: Plan) -> None:
    """Write the plan into the run's folder, whole or not at all."""
    content = {"key": _key(config, data), "seconds": plan.seconds, **asdict(plan)}
    write_atomic(folder / PLAN, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_plan(folder: Path, config: Config, data: TrainingData) -> Plan | None:
    """Return the stored plan, or None if it is missing or belongs to another configuration or other texts."""
    try:
        content: dict[str, Any] = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        if content["key"] != _key(config, data):
            return None
        costs = content["costs"]
        stages = tuple(StageCost(**stage) for stage in costs.pop("stages"))
        return Plan(Costs(stages, **costs), tuple(content["steps"]), tuple(content["notes"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(config: Config, data: TrainingData) -> str:
    settings = result_settings(config)
    del settings["refit"]  # it changes no step, and plans of older versions lack it
    for stage in settings["stages"]:
        for name in ADDED:
            if stage[name] == StageConfig.model_fields[name].default:
                del stage[name]
    return settings_digest([settings, data.fingerprint], size=16)


def describe_costs(plan: Plan, stages: list[StageConfig]) -> list[str]:
    """Return a line for each part of the plan: seconds, passes, texts."""
    costs = plan.costs
    teacher = f"{costs.missing:,} embeddings to compute" if costs.missing else "no embedding to compute"
    lines = [f"  teacher      {duration(costs.teacher):>12}  {teacher}"]
    for stage, cost, steps in zip(stages, costs.stages, plan.steps, strict=True):
        pooled = f"; {cost.pooled(steps):,} texts pooled" if cost.rows else ""
        if cost.queries:
            ranked = cost.ranked(steps)
            pooled = f"; candidates and scores of {ranked:,} queries in {duration(cost.query * ranked)}"
        passes = steps * cost.batch / max(1, cost.available)
        lines.append(
            f"  {stage.name:12} {duration(cost.seconds(steps)):>12}  {steps:,} steps of {cost.batch}, {passes:.1f} "
            f"passes over {cost.available:,}{pooled}"
        )
    what = f"{costs.evaluated:,} texts to encode" if costs.evaluated else "nothing to encode"
    what += f" and {plan.sampled:,} training texts" if plan.sampled else ""
    lines.append(f"  evaluation   {duration(plan.evaluation):>12}  {what}, with export and report")
    lines.append(f"  in all       {duration(plan.seconds['in all']):>12}  of it training {duration(plan.training)}")
    return lines
