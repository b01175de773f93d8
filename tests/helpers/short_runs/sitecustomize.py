"""Shorten every run of the processes that have this folder in PYTHONPATH: few steps, short texts, smaller batches.

Python imports this module at its start. It changes the results of the configuration loader. Less is measured
for plan and report, and docstrings are those of the standard library. Everything else is as in any run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from jasper_fast.config import load
from jasper_fast.config.run import Config

STEPS, TEXTS, BATCH, MINUTES = 2, 160, 128, 0.001  # at most
TOKENS = 32  # per text
SECONDS = 0.2  # to learn a projection, and to measure the speed of encoding


def shorten(config: Config) -> Config:
    """Return a configuration with smaller numbers in the fields that decide how long a run takes."""
    tree = config.model_dump(mode="json")
    tree["data"]["limit"] = _at_most(TEXTS, tree["data"]["limit"])
    for part in (*tree["data"]["sources"], *tree["evaluate"]):
        part["limit"] = _at_most(TEXTS, part["limit"])
    if tree["minutes"] is not None:
        tree["minutes"] = MINUTES
    for model in (tree["student"], *tree["teachers"]):
        model["max_length"] = _at_most(TOKENS, model["max_length"])
    for stage in tree["stages"]:
        stage["batch_size"] = _at_most(BATCH, stage["batch_size"])
        stage["steps"] = _at_most(STEPS, stage["steps"])
        if stage["minutes"] is not None:
            stage["minutes"] = MINUTES
        if stage["texts"] is not None:
            stage["texts"] = _at_most(TEXTS, stage["texts"])
    return Config.model_validate(tree).with_notes(config.notes)


def _at_most(largest: int, value: int | None) -> int:
    return largest if value is None else min(largest, value)


def _shortened(function: Callable[..., Config]) -> Callable[..., Config]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **options: Any) -> Config:
        from jasper_fast.data import docstrings
        from jasper_fast.training import encoding, measure  # slow to import, and not needed by all commands

        docstrings.PACKAGES = ()
        encoding.LONG_ENOUGH = SECONDS
        measure.STEPS = STEPS
        if "adapt" in sys.argv:
            from jasper_fast.adaptation import steps, student

            steps.SECONDS = SECONDS
            command = sys.modules["jasper_fast.adapt"]
            command.first_training = lambda request: shorten(student.first_training(request))
        return shorten(function(*arguments, **options))

    return wrapper


load.load_config = _shortened(load.load_config)
load.load_arguments = _shortened(load.load_arguments)
