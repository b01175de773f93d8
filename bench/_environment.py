"""What a benchmark's figures depend on; every committed result carries it."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jasper_fast import env
from jasper_fast.ops import native


def environment() -> dict[str, Any]:
    """Versions, processor, GPUs, threads, commit and digest of the code, whether the extension is in use; no paths."""
    found = env.environment()
    return {
        "commit": commit(),
        "digest": env.code_digest(),  # a copy without its git history has no commit
        **{key: found[key] for key in ("python", "libraries", "cpu", "gpus")},
        "extension": native.extension_error() or "in use",
    }


def commit() -> str | None:
    """Of the checkout that this process runs in; None where there is none."""
    told = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return told.stdout.strip() or None


def code(files: Iterable[Path]) -> dict[str, str | None]:
    """What code a figure comes from: the commit, and a digest of the package and of the benchmark's own files."""
    digest = hashlib.blake2b(env.code_digest().encode(), digest_size=8)
    for file in files:
        digest.update(file.read_bytes())
    return {"commit": commit(), "digest": digest.hexdigest()}
