"""Training texts of one sentence: 7,000 short facts about people, animals, history and everyday life.

The package randfacts carries them under the MIT licence. Docstrings and articles have few sentences of this kind. With
them, a student keeps more of its teacher's scores of similarity.
"""

from __future__ import annotations

from jasper_fast.data.package_texts import read_package_file, unusable

DISTRIBUTION, PACKAGE, FILE = "randfacts", "randfacts", "safe.txt"


def training_rows() -> list[tuple[str]]:
    """Return the facts as rows of one text, in the order of the package.

    Raises:
        JasperError: the package is missing, or it has another form.
    """
    content = read_package_file("facts", DISTRIBUTION, PACKAGE, FILE)
    rows = [(fact,) for line in content.splitlines() if (fact := " ".join(line.split()))]
    if not rows:
        raise unusable("facts", f"{PACKAGE}/{FILE} has another form: it has no lines")
    return rows
