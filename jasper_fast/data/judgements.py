"""Read relevance judgements (qrels) in the formats of BEIR, TREC and others."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path

from jasper_fast.data.rows import read_lines, read_rows, uncompressed_name, with_compressed
from jasper_fast.utils.errors import JasperError

SUFFIXES = with_compressed(".tsv", ".txt", ".jsonl", ".qrels", ".qrel")
COLUMNS_FIX = "give query-id, corpus-id and score"  # the advice in error messages
MAX_GRADE = 1_000_000  # trec_eval allocates a counter for every grade up to the highest
QUERY = {"query-id", "query_id", "queryid", "qid", "query", "topic", "topic-id", "topic_id"}
DOCUMENT = {"corpus-id", "corpus_id", "doc-id", "doc_id", "docid", "docno", "did", "pid", "document-id", "document_id"}
DOCUMENT |= {"passage-id", "passage_id", "document", "doc"}
GRADE = {"score", "relevance", "relevancy", "rel", "grade", "label", "judgement", "judgment", "rating"}

Judgements = dict[str, dict[str, int]]  # grade by query id and document id


def read_judgements(file: Path) -> Judgements:
    """Read the grades of all judged pairs of a query and a document.

    If a pair is judged several times, the last judgement counts, as in BEIR.

    Args:
        file: the qrels file, in one of three formats. A table has query id, document id and grade, with or without a
            header. The TREC format has four columns, the second being the iteration. JSONL has named columns. The cells
            of a table are separated by tabs, or by white space if the first line has no tab.

    Returns:
        The grade by query id and document id.

    Raises:
        JasperError: the file is empty or unreadable, a line has other columns, or a grade is not a whole number.
    """
    judgements: Judgements = {}
    for where, (query, document, grade) in _json_rows(file) if _is_json(file) else _table_rows(file):
        judgements.setdefault(query, {})[document] = _grade(grade, where)
    return judgements


def _is_json(file: Path) -> bool:
    return uncompressed_name(file).endswith(".jsonl")


def _json_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    for where, row in read_rows(file):
        columns = _columns_by_name(list(row))
        if columns is None:
            raise JasperError(f"{where}: not a judgement (got {', '.join(row)}). Fix: {COLUMNS_FIX}")
        values = list(row.values())
        if any(values[column] is None for column in columns):
            raise JasperError(f"{where}: a judgement with a null id or grade. Fix: {COLUMNS_FIX}")
        yield where, [str(values[column]).strip() for column in columns]


def _table_rows(file: Path) -> Iterator[tuple[str, list[str]]]:
    lines = ((number, line) for number, line in read_lines(file) if line.strip())
    first = next(lines, None)
    if first is None:
        raise JasperError(f"{file}: the file is empty. Fix: write one judgement per line")
    tabs = "\t" in first[1].strip()
    header = _cells(first[1], tabs)
    columns = _columns_by_name(header)
    if columns is None and sum(not names.isdisjoint(map(str.lower, header)) for names in (QUERY, DOCUMENT, GRADE)) > 1:
        raise JasperError(f"{file}, line {first[0]}: unknown columns (got {', '.join(header)}). Fix: {COLUMNS_FIX}")
    columns = columns or {3: (0, 1, 2), 4: (0, 2, 3)}.get(len(header))
    for number, line in lines if _is_header(header, columns) else chain([first], lines):
        cells, where = _cells(line, tabs), f"{file}, line {number}"
        if len(cells) != len(header) or columns is None:
            count, separator = len(header) if columns else "3 or 4", "tabs" if tabs else "white space"
            raise JasperError(
                f"{where}: not a judgement (got {line.strip()!r}, expected {count} cells separated by {separator}). "
                f"Fix: {COLUMNS_FIX}"
            )
        yield where, [cells[column] for column in columns]


def _cells(line: str, tabs: bool) -> list[str]:
    if not tabs:
        return line.split()
    cells = next(csv.reader([line.rstrip()], delimiter="\t")) if '"' in line else line.rstrip().split("\t")
    return [cell.strip() for cell in cells]


def _columns_by_name(header: Sequence[str]) -> tuple[int, int, int] | None:
    """Find the columns of query id, document id and grade by their usual names. Return None if one is missing."""
    cells = [cell.lower() for cell in header]
    columns = [column for names in (QUERY, DOCUMENT, GRADE) for column, cell in enumerate(cells) if cell in names]
    return (columns[0], columns[1], columns[2]) if len(columns) == 3 else None


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
