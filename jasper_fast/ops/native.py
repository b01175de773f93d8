"""The compiled extension, ``jasper_fast._C``. It is loaded on import if it was built.

``JASPER_FAST_NO_EXTENSION=1`` in the environment turns it off.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from jasper_fast.utils import fingerprint


def _load_extension() -> tuple[Path | None, str | None]:
    if os.environ.get("JASPER_FAST_NO_EXTENSION") == "1":
        return None, "JASPER_FAST_NO_EXTENSION=1 is set"
    folder = Path(__file__).resolve().parents[1]
    built = sorted(folder.glob("_C*.so"))
    if not built:
        return None, "it was not built: pip install --no-build-isolation -e . in an environment with torch and g++"
    try:
        torch.ops.load_library(str(built[0]))
    except (OSError, RuntimeError) as error:
        return None, f"{built[0].name} does not load ({error}); rebuild it: pip install --no-build-isolation -e ."
    return built[0], None


_PATH, _ERROR = _load_extension()


def extension_path() -> Path | None:
    """Return the path of the compiled extension in use, or None."""
    return _PATH


def extension_error() -> str | None:
    """Return the reason why the compiled extension is not in use, or None if it is."""
    return _ERROR


def native(tensor: Tensor) -> bool:
    """Return True if the compiled extension takes this tensor: float32 on a CPU."""
    return _PATH is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32


def code_digest() -> str:
    """Return a digest of this package's sources, the kernels included, and of the compiled extension in use."""
    return fingerprint.code_digest(Path(__file__).resolve().parents[1], extension_path())
