"""The packages that training needs. Losses and search of arrays (``jasper_fast.mips``) work without them."""

from __future__ import annotations

import importlib.util
import sys

from jasper_fast.utils.errors import JasperError

# Names to import, in the order of the extra `train` in pyproject.toml.
TRAIN = (
    *("transformers", "sentence_transformers", "datasets", "tokenizers", "huggingface_hub", "filelock", "pydantic"),
    *("pytrec_eval", "scipy", "sklearn", "pyarrow", "ruamel.yaml", "tqdm"),
)
LIGHT_COMMANDS = ("__main__", "env")  # check nothing, or later


def require_training() -> None:
    """Check that the packages of the extra ``train`` are installed.

    Raises:
        JasperError: some are missing. The message names them and the fix.
    """
    missing = [name for name in TRAIN if not _installed(name)]
    if missing:
        raise JasperError(
            f"this needs the packages for training (missing: {', '.join(missing)}). "
            'Fix: in a clone of the repository, run `pip install -e ".[train]"`'
        )


def check_started_module() -> None:
    """Check the packages of ``python -m jasper_fast.NAME`` before that module imports them. Exit if some are missing.

    Python imports the package first, and ``sys.argv[0]`` is "-m" only then.
    """
    if sys.argv[:1] != ["-m"] or "-m" not in sys.orig_argv:
        return
    name = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    if not name.startswith("jasper_fast.") or name.split(".")[1] in LIGHT_COMMANDS:
        return
    try:
        require_training()
    except JasperError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ModuleNotFoundError, ValueError):  # the parent package is missing, or is not a real module
        return name in sys.modules
