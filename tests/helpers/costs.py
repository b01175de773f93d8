"""Costs of a run that no clock decides."""

from __future__ import annotations

from jasper_fast.config.run import Config
from jasper_fast.training.plan import Costs, StageCost


def fixed_costs(config: Config, *_: object) -> Costs:
    """Return costs in place of measured ones: 0.1 s for each step of any stage, and 10 s for the evaluation."""
    stages = tuple(StageCost(stage.name, 0.1, stage.batch_size, 160) for stage in config.stages)
    return Costs(stages, evaluation=10.0, evaluated=36)
