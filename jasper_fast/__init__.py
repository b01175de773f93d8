"""Distil text-embedding models: several teachers into one small student, many vector widths, one command.

``jasper_fast.train(config)`` and ``python -m jasper_fast.train`` are the same thing; ``jasper_fast.losses`` holds the
losses, ``jasper_fast.mips`` exact search. All are imported on first use, so that ``import jasper_fast`` stays light.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jasper_fast import losses, mips, pictures, sentence_transformers
    from jasper_fast.train import train

__version__ = "0.1.0"
__all__ = ["__version__", "losses", "mips", "pictures", "sentence_transformers", "train"]

_LAZY = ("losses", "mips", "pictures", "sentence_transformers", "train")


class _CallableModule(ModuleType):
    """A module that runs its function of the same name when called."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return vars(self)[self.__name__.rpartition(".")[2]](*args, **kwargs)


class _Package(ModuleType):
    """This package. ``jasper_fast.train`` is at once the command's module and the function.

    Importing a submodule sets it as an attribute here, whoever imports it and in whatever order; that is the one place
    where the module can be made callable for all of them.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "train" and isinstance(value, ModuleType):
            value.__class__ = _CallableModule
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
