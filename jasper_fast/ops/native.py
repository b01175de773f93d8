"""The compiled extension, ``jasper_fast._C``: loaded on import where it was built.

``JASPER_FAST_NO_EXTENSION=1`` in the environment keeps it from being loaded.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor


def _load_extension() -> tuple[Path | None, str | None]:
    if os.environ.get("JASPER_FAST_NO_EXTENSION") == "1":
        return None, "JASPER_FAST_NO_EXTENSION=1 is set"
    folder = Path(__file__).resolve().parent
    found = sorted(folder.glob("_C*.so"))
    if not found:
        return None, "it was not built: pip install --no-build-isolation -e . in an environment with torch and g++"
    try:
        torch.ops.load_library(str(found[0]))
    except (OSError, RuntimeError) as error:
        return None, f"{found[0].name} does not load ({error}); rebuild it: pip install --no-build-isolation -e ."
    return found[0], None


_PATH, _ERROR = _load_extension()


def extension_path() -> Path | None:
    """Where the compiled extension in use lies, or None."""
    return _PATH


def extension_error() -> str | None:
    """Why the compiled extension is not in use, or None when it is."""
    return _ERROR


def native(tensor: Tensor) -> bool:
    """Whether the compiled extension takes this tensor."""
    return _PATH is not None and tensor.device.type == "cpu" and tensor.dtype == torch.float32
