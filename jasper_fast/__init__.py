"""Distil text-embedding models: several teachers into one small student with embeddings of several widths.

``jasper_fast.train(config)`` does the same as ``python -m jasper_fast.train``, and ``jasper_fast.adapt(documents,
out=…)`` the same as ``python -m jasper_fast.adapt``. The losses are in ``jasper_fast.losses``, and exact search is in
``jasper_fast.mips``. Submodules are imported on first use, so that ``import jasper_fast`` is fast.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from jasper_fast import _renamed
from jasper_fast._version import __version__
from jasper_fast.utils.packages import check_started_module, require_training

if TYPE_CHECKING:
    from jasper_fast import losses, mips, pictures, sentence_transformers
    from jasper_fast.adapt import adapt
    from jasper_fast.train import train

__all__ = ["__version__", "adapt", "losses", "mips", "pictures", "sentence_transformers", "train"]

_LAZY = ("adapt", "losses", "mips", "pictures", "sentence_transformers", "train")
_NEED_TRAINING = ("adapt", "pictures", "train")
_CALLABLE = ("adapt", "train")  # modules that call their function of the same name


class _CallableModule(ModuleType):
    """Module that calls its function of the same name when it is called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _Package(ModuleType):
    """Type of this package, in which ``jasper_fast.train`` and ``jasper_fast.adapt`` are modules and functions.

    Python sets each imported submodule as an attribute of the package. This is the only place that sees such a
    module before all its users, so it is made callable here.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CALLABLE and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
_renamed.install()
check_started_module()


def __getattr__(name: str) -> Any:
    if name in _NEED_TRAINING:
        require_training()
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
