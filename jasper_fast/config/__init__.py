"""Configuration: one module per YAML section, with the rules of the section next to its fields. Imports no torch.

The names below are imported on first use, so that the table of losses does not need pydantic.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from jasper_fast._renamed import old_names

if TYPE_CHECKING:
    from jasper_fast.config.data import DataConfig, EvalConfig, ImagesConfig, ImageSourceConfig, SourceConfig  # noqa: F401
    from jasper_fast.config.diff import config_difference  # noqa: F401
    from jasper_fast.config.load import dump_config, load_arguments, load_config, recipe_names, stored_config  # noqa: F401
    from jasper_fast.config.loss_weights import LossesConfig, LossWeights  # noqa: F401
    from jasper_fast.config.models import Prompts, StudentConfig, TeacherConfig, TeacherPrompts, VisionConfig  # noqa: F401
    from jasper_fast.config.run import CheckpointConfig, Config, LogConfig, ParallelConfig  # noqa: F401
    from jasper_fast.config.stage import AugmentConfig, StageConfig, VisionStageConfig  # noqa: F401

_NAMES = {
    "data": ("DataConfig", "EvalConfig", "ImageSourceConfig", "ImagesConfig", "SourceConfig"),
    "diff": ("config_difference",),
    "load": ("dump_config", "load_arguments", "load_config", "recipe_names", "stored_config"),
    "loss_weights": ("LossWeights", "LossesConfig"),
    "models": ("Prompts", "StudentConfig", "TeacherConfig", "TeacherPrompts", "VisionConfig"),
    "run": ("CheckpointConfig", "Config", "LogConfig", "ParallelConfig"),
    "stage": ("AugmentConfig", "StageConfig", "VisionStageConfig"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_old_name = old_names(__name__, stacklevel=4)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return _old_name(name)
