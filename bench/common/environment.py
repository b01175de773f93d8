"""Environment of a benchmark run, stored in every committed result."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jasper_fast import env
from jasper_fast.ops import native
from jasper_fast.utils.fingerprint import content_digest


def environment() -> dict[str, Any]:
    """Return versions, processor, GPUs, threads, commit, code digest and the extension's state, without local paths."""
    machine = env.environment()
    return {
        "commit": commit(),
        "digest": native.code_digest(),  # also identifies copies without a git history
        **{key: machine[key] for key in ("python", "libraries", "cpu", "gpus")},
        "extension": native.extension_error() or "in use",
    }


def commit() -> str | None:
    """Return the short commit of the current checkout, or None without one."""
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def code(files: Iterable[Path]) -> dict[str, str | None]:
    """Return the commit, and a digest of the package and of the benchmark's files."""
    parts = [native.code_digest(), *(file.read_bytes() for file in files)]
    return {"commit": commit(), "digest": content_digest(parts, size=8)}
