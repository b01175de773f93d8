"""Read queries from a file, with the candidates and grades that it has."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from jasper_fast.data.rows import SUFFIXES, SUPPORTED_FILES, check_text, read_rows, uncompressed_name
from jasper_fast.utils.errors import JasperError

QUERY, CANDIDATES, GRADES = "query", "candidates", "grades"  # columns


class GivenQuery(NamedTuple):
    """A query of a file.

    Attributes:
        text: the query.
        candidates: texts of documents. Empty: none are listed.
        grades: a grade for each candidate, where a larger one is better. None: the file has no grades.
    """

    text: str
    candidates: tuple[str, ...] = ()
    grades: tuple[float, ...] | None = None


def read_queries(path: str | Path, graded: bool = False) -> list[GivenQuery]:
    """Return the queries of a file, in its order. Rows of the same query are joined.

    Args:
        path: a .jsonl, .csv, .tsv, .parquet or .txt file, possibly compressed. Its column ``query`` has the text.
            ``candidates`` has the text of a document, or a list of them, and ``grades`` as many numbers. A .txt file
            has a query per line.
        graded: whether every candidate needs a grade.

    Raises:
        JasperError: the file cannot be read, a row is malformed, or there is no query.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise JasperError(f"{file}: no such file of queries. Fix: correct `queries`, or set it to made")
    if not file.name.lower().endswith(SUFFIXES):
        raise JasperError(f"{file}: not a file of queries (expected {SUPPORTED_FILES}). Fix: convert it")
    plain = uncompressed_name(file).endswith(".txt")
    found: dict[str, list[tuple[str, float | None]]] = {}
    for where, cells in read_rows(file, [QUERY] if plain else None):
        query = _query(cells, where)
        candidates, grades = _candidates(cells, where), _grades(cells, where)
        if grades is not None and len(grades) != len(candidates):
            raise JasperError(
                f"{where}: {len(candidates)} candidates and {len(grades)} grades (expected one for each). Fix: correct "
                "the row"
            )
        if graded and candidates and grades is None:
            raise JasperError(f"{where}: candidates without `grades`, which `targets: grades` needs. Fix: add them")
        pairs = found.setdefault(query, [])
        known = {text for text, _ in pairs}
        of_row: list[float | None] = [None] * len(candidates) if grades is None else [*grades]
        for text, grade in zip(candidates, of_row, strict=True):
            if text in known:
                raise JasperError(f"{where}: a candidate is listed twice ({text[:60]!r}). Fix: list it once")
            known.add(text)
            pairs.append((text, grade))
    if not found:
        raise JasperError(f"{file}: no query. Fix: give a file with a query per row")
    if graded and not any(found.values()):
        raise JasperError(f"{file}: no query has candidates with grades. Fix: add them, or set targets to teacher")
    return [_given(query, pairs) for query, pairs in found.items()]


def _given(query: str, pairs: list[tuple[str, float | None]]) -> GivenQuery:
    grades = tuple(grade for _, grade in pairs if grade is not None)
    return GivenQuery(query, tuple(text for text, _ in pairs), grades if pairs and len(grades) == len(pairs) else None)


def _query(cells: dict[str, Any], where: str) -> str:
    if QUERY not in cells:
        present = ", ".join(map(str, cells)) or "none"
        raise JasperError(f"{where}: no column `{QUERY}` (got columns: {present}). Fix: give the queries that name")
    return _text(cells[QUERY], QUERY, where)


def _candidates(cells: dict[str, Any], where: str) -> list[str]:
    value = cells.get(CANDIDATES)
    if value is None or value == "":
        return []
    return [_text(text, CANDIDATES, where) for text in (value if isinstance(value, list) else [value])]


def _text(value: Any, column: str, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise JasperError(f"{where}: `{column}` is not a text (got {value!r:.60}). Fix: give a text that is not empty")
    return check_text(value.strip(), where)


def _grades(cells: dict[str, Any], where: str) -> list[float] | None:
    value = cells.get(GRADES)
    if value is None or value == "":
        return None
    grades = []
    for grade in value if isinstance(value, list) else [value]:
        try:
            number = math.nan if isinstance(grade, bool) else float(grade)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise JasperError(f"{where}: a grade is not a finite number (got {grade!r}). Fix: give numbers")
        grades.append(number)
    return grades
