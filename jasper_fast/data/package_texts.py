"""Texts that installed packages carry as data files, which are read without importing the packages."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from jasper_fast.utils.errors import JasperError


def read_package_file(source: str, distribution: str, package: str, file: str) -> str:
    """Return the content of a package's data file.

    Args:
        source: name of the built-in source, for messages.
        distribution: name of the package for pip.
        package: name of the package for Python.
        file: path in the package.

    Raises:
        JasperError: the package is missing, or the file cannot be read.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise unusable(source, f"the package {distribution}, which has the texts, is missing")
    try:
        return (Path(spec.submodule_search_locations[0]) / file).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        raise unusable(source, f"{package}/{file} cannot be read: {error}") from error


def unusable(source: str, problem: str) -> JasperError:
    """Return the error of a built-in source whose package is missing or has another form."""
    return JasperError(f'{source}: {problem}. Fix: in a clone of the repository, run `pip install -e ".[demo]"`')
