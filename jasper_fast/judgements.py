"""Relevance judgements (qrels) as BEIR, TREC and others publish them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from jasper_fast.errors import JasperError
from jasper_fast.row_reader import packed, read_lines

ENDINGS = packed(".tsv", ".txt", ".qrels", ".qrel")
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
            with the iteration second. Cells are separated by white space where the first line has no tab.

    Raises:
        JasperError: the file is empty or cannot be read, or a line has other columns or no whole number as grade.
    """
    lines = ((number, line) for number, line in read_lines(file) if line.strip())
    first = next(lines, None)
    if first is None:
        raise JasperError(f"{file}: the file is empty. Fix: give a file with a judgement per line")
    tabs = "\t" in first[1].strip()
    width = len(header := _cells(first[1], tabs))
    columns = _columns(header)
    judged: Judgements = {}
    for number, line in lines if _is_header(header, columns) else chain([first], lines):
        cells = _cells(line, tabs)
        if len(cells) != width or columns is None:
            raise JasperError(
                f"{file}, line {number}: not a judgement (got {line.strip()!r}, expected "
                f"{'tabs' if tabs else 'white space'} between query-id, corpus-id and score). Fix: correct the line"
            )
        query, document, grade = (cells[column] for column in columns)
        judged.setdefault(query, {})[document] = _grade(grade, f"{file}, line {number}")
    return judged


def _cells(line: str, tabs: bool) -> list[str]:
    if not tabs:
        return line.split()
    cells = next(csv.reader([line.rstrip()], delimiter="\t")) if '"' in line else line.rstrip().split("\t")
    return [cell.strip() for cell in cells]


def _columns(header: Sequence[str]) -> tuple[int, int, int] | None:
    """Find query id, document id and grade by the header's names, else by their usual places."""
    names = [cell.lower() for cell in header]
    named = [next((at for at, name in enumerate(names) if name in known), None) for known in (QUERY, DOCUMENT, GRADE)]
    query, document, grade = named
    if query is not None and document is not None and grade is not None:
        return query, document, grade
    return {3: (0, 1, 2), 4: (0, 2, 3)}.get(len(header))


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
