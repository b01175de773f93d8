"""Relevance judgements (qrels) as BEIR, TREC and others publish them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from jasper_fast.errors import JasperError
from jasper_fast.row_reader import packed, read_lines, read_rows, unpacked_name

ENDINGS = packed(".tsv", ".txt", ".jsonl", ".qrels", ".qrel")
NEEDED = "give query-id, corpus-id and score"
MAX_GRADE = 1_000_000  # trec_eval keeps a counter for every grade up to the highest
QUERY = {"query-id", "query_id", "queryid", "qid", "query", "topic", "topic-id", "topic_id"}
DOCUMENT = {"corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "docno", "did", "pid", "document-id", "document_id"}
DOCUMENT |= {"passage-id", "passage_id", "document", "doc"}
GRADE = {"score", "relevance", "relevancy", "rel", "grade", "label", "judgement", "judgment", "rating"}

Judgements = dict[str, dict[str, int]]  # grade by query id and document id


def read_judgements(file: Path) -> Judgements:
    """Read the grade of every judged pair; the last judgement of a pair counts, as in BEIR.

    Args:
        file: query id, document id and grade with tabs between, with a header or without; or the four columns of TREC,
            with the iteration second; or JSONL with such columns. Cells are separated by white space where the first
            line has no tab.

    Raises:
        JasperError: the file is empty or cannot be read, or a line has other columns or no whole number as grade.
    """
    judged: Judgements = {}
    for where, (query, document, grade) in _json_rows(file) if _is_json(file) else _table_rows(file):
        judged.setdefault(query, {})[document] = _grade(grade, where)
    return judged


def _is_json(file: Path) -> bool:
    return unpacked_name(file).endswith(".jsonl")


def _json_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    for where, row in read_rows(file):
        columns = _named_columns(list(row))
        if columns is None:
            raise JasperError(f"{where}: not a judgement (got {', '.join(row)}). Fix: {NEEDED}")
        values = list(row.values())
        if any(values[column] is None for column in columns):
            raise JasperError(f"{where}: a judgement without an id or a grade. Fix: {NEEDED}")
        yield where, [str(values[column]).strip() for column in columns]


def _table_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    lines = ((number, line) for number, line in read_lines(file) if line.strip())
    first = next(lines, None)
    if first is None:
        raise JasperError(f"{file}: the file is empty. Fix: give a file with a judgement per line")
    tabs = "\t" in first[1].strip()
    header = _cells(first[1], tabs)
    columns = _named_columns(header)
    if columns is None and sum(not known.isdisjoint(map(str.lower, header)) for known in (QUERY, DOCUMENT, GRADE)) > 1:
        raise JasperError(f"{file}, line {first[0]}: unknown columns (got {', '.join(header)}). Fix: {NEEDED}")
    columns = columns or {3: (0, 1, 2), 4: (0, 2, 3)}.get(len(header))
    for number, line in lines if _is_header(header, columns) else chain([first], lines):
        cells, where = _cells(line, tabs), f"{file}, line {number}"
        if len(cells) != len(header) or columns is None:
            between = "tabs" if tabs else "white space"
            raise JasperError(
                f"{where}: not a judgement (got {line.strip()!r}, expected {between} between its cells). Fix: {NEEDED}"
            )
        yield where, [cells[column] for column in columns]


def _cells(line: str, tabs: bool) -> list[str]:
    if not tabs:
        return line.split()
    cells = next(csv.reader([line.rstrip()], delimiter="\t")) if '"' in line else line.rstrip().split("\t")
    return [cell.strip() for cell in cells]


def _named_columns(header: Sequence[str]) -> tuple[int, int, int] | None:
    """Find query id, document id and grade by their usual names; None if one is missing."""
    names = [cell.lower() for cell in header]
    found = [at for known in (QUERY, DOCUMENT, GRADE) for at, name in enumerate(names) if name in known]
    return (found[0], found[1], found[2]) if len(found) == 3 else None


def _is_header(cells: Sequence[str], columns: tuple[int, int, int] | None) -> bool:
    if columns is None:
        return False
    try:
        float(cells[columns[2]])
    except ValueError:
        return True
    return False


def _grade(cell: str, where: str) -> int:
    try:
        grade = float(cell)
    except ValueError:
        grade = 0.5
    if not grade.is_integer() or abs(grade) > MAX_GRADE:
        raise JasperError(
            f"{where}: not a grade (got {cell!r}, expected a whole number up to {MAX_GRADE:,}). Fix: correct the line"
        )
    return int(grade)
