"""The compiled extension, ``jasper_fast._C``. It is loaded on import if it was built.

``JASPER_FAST_NO_EXTENSION=1`` in the environment turns it off. Without the extension, the first loss or search on a CPU
that would use it gives an ``ExtensionWarning``, unless that variable is set.
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

from jasper_fast.utils import fingerprint

SWITCH = "JASPER_FAST_NO_EXTENSION"


class ExtensionWarning(UserWarning):
    """The compiled extension is not in use, so that losses and searches on a CPU are slower."""


def _load_extension() -> tuple[Path | None, str | None]:
    if os.environ.get(SWITCH) == "1":
        return None, f"{SWITCH}=1 is set"
    folder = Path(__file__).resolve().parents[1]
    built = sorted(folder.glob("_C*.so"))
    if not built:
        return None, (
            "it was not built. Fix: with g++, torch, setuptools and wheel installed, run "
            "`pip install --no-build-isolation -e .` in a clone"
        )
    try:
        torch.ops.load_library(str(built[0]))
    except (OSError, RuntimeError) as error:
        return (
            None,
            f"{built[0].name} does not load ({error}). Fix: run `pip install --no-build-isolation -e .` again",
        )
    return built[0], None


_PATH, _ERROR = _load_extension()
_warned = os.environ.get(SWITCH) == "1"  # a user's choice needs no warning


def extension_path() -> Path | None:
    """Return the path of the compiled extension in use, or None."""
    return _PATH


def extension_error() -> str | None:
    """Return the reason why the compiled extension is not in use, or None if it is."""
    return _ERROR


def in_use(tensor: Tensor) -> bool:
    """Return True if the compiled extension is in use for a tensor's device. Warn once where it is missing."""
    if tensor.device.type != "cpu":
        return False
    if _PATH is None and not torch.compiler.is_compiling():
        _warn_once()
    return _PATH is not None


def native(tensor: Tensor) -> bool:
    """Return True if the compiled extension takes this tensor: float32 on a CPU."""
    return tensor.dtype == torch.float32 and in_use(tensor)


def _warn_once() -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"losses and searches on this CPU are slower without the compiled extension of jasper_fast: {_ERROR}. "
            f"To silence this warning, set {SWITCH}=1",
            ExtensionWarning,
            stacklevel=2,
        )


def code_digest() -> str:
    """Return a digest of this package's sources, the kernels included, and of the compiled extension in use."""
    return fingerprint.code_digest(Path(__file__).resolve().parents[1], extension_path())
