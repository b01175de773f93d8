"""What a benchmark's figures depend on; every committed result carries it."""

from __future__ import annotations

import subprocess
from typing import Any

from jasper_fast import env, extension


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs, threads, the commit, and whether the compiled extension is in use; no paths."""
    found = env.environment()
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        **{key: found[key] for key in ("python", "libraries", "cpu", "gpus")},
        "extension": extension.extension_error() or "in use",
    }
