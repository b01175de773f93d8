"""Queries of a ranking stage: made from the training documents, or read from a file with candidates and grades."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jasper_fast.config.rank import GRADES, MADE, RankStageConfig
from jasper_fast.config.run import Config
from jasper_fast.data.held_out import HeldOutDocument, HeldOutTexts
from jasper_fast.data.made_queries import KINDS, make_queries
from jasper_fast.data.query_files import GivenQuery, read_queries
from jasper_fast.data.text import normal_form, text_digest
from jasper_fast.training.data import TrainingData
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import content_digest, settings_digest

KEPT = 4  # results kept in memory, since a run needs them several times before it trains
GIVEN = "given"  # kind of a query that was not made

Barred = Callable[[str], bool]  # True: the text is one that the run is evaluated on

_kept: dict[str, RankQueries] = {}


@dataclass(frozen=True)
class RankQueries:
    """Queries, and documents that are not among the training texts.

    Rows count the n training texts first. The stage's own texts follow: its Q queries, then further documents.

    Args:
        texts: the own texts, a dataset with columns ``text``, ``role`` and ``digest``.
        trained: number n of training texts.
        documents: (N,) int64, ascending. Training texts that candidates are mined from.
        sources: (Q,) int64, the document that each query was made from. -1: none.
        barred: (Q,) int64, a training text that is no candidate: it is, or contains, the query. -1: none.
        listed: (Q, L) int64, the candidates that a file lists, the best grade first. -1: there are no more.
        grades: (Q, L) float32. NaN: no grade.
        line: number of queries by kind, and what was left out.
    """

    texts: Any
    trained: int
    documents: np.ndarray
    sources: np.ndarray
    barred: np.ndarray
    listed: np.ndarray
    grades: np.ndarray
    line: str

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def fingerprint(self) -> str:
        """The identity of queries, candidates and grades, next to that of the training texts."""
        arrays = (self.documents, self.sources, self.barred, self.listed, self.grades)
        return content_digest(["".join(self.texts["digest"][:]), *(array.tobytes() for array in arrays)])

    def read(self, trained: Any, rows: np.ndarray) -> tuple[list[str], list[str]]:
        """Return texts and their roles.

        Args:
            trained: the training texts, a dataset.
            rows: (B,) int64, in any order.
        """
        texts, roles = [""] * len(rows), [""] * len(rows)
        own = rows >= self.trained
        for of, places, numbers in (
            (trained, np.flatnonzero(~own), rows[~own]),
            (self.texts, np.flatnonzero(own), rows[own] - self.trained),
        ):
            if len(places):
                chosen = of[numbers.tolist()]
                for place, text, role in zip(places.tolist(), chosen["text"], chosen["role"], strict=True):
                    texts[place], roles[place] = text, role
        return texts, roles


def ranking_queries(config: Config, index: int, data: TrainingData) -> RankQueries:
    """Return the queries of a ranking stage, without held-out documents and evaluation texts.

    Args:
        config: the run's configuration.
        index: the position of the stage.
        data: the training data.

    Raises:
        JasperError: a file of queries cannot be used, or there are no queries or too few documents.
    """
    stage = config.stages[index]
    assert stage.rank is not None
    key = settings_digest(
        {
            "rank": stage.rank.model_dump(mode="json"),
            "texts": [data.fingerprint, stage.texts],
            "held out": _held_out_digest(data),
            "evaluate": [source.model_dump(mode="json") for source in config.evaluate],
            "seed": config.seed,
            "file": _stamp(stage.rank.queries),
        },
        size=16,
    )
    if key not in _kept:
        while len(_kept) >= KEPT:
            del _kept[next(iter(_kept))]
        _kept[key] = _build(config, stage.name, stage.rank, stage.texts, data)
    return _kept[key]


def _held_out_digest(data: TrainingData) -> str:
    return content_digest(data.held_out_texts["digest"][:] if data.held_out_texts is not None else [])


def _stamp(queries: str) -> Any:
    file = Path(queries).expanduser()
    if queries == MADE or not file.is_file():
        return None
    facts = file.stat()
    return [facts.st_size, facts.st_mtime_ns]


def _build(config: Config, name: str, rank: RankStageConfig, most: int | None, data: TrainingData) -> RankQueries:
    trained = len(data.texts)
    columns = data.texts.select(range(min(trained, most or trained)))[:]
    documents = np.array([row for row, role in enumerate(columns["role"]) if role == "document"], np.int64)
    if len(documents) < 2:
        raise JasperError(
            f"stage {name!r}: {len(documents)} training documents (expected 2 or more to rank). Fix: give more texts, "
            "or raise the stage's texts"
        )
    barred = _evaluated_texts(config, data)
    texts = _OwnTexts(trained)
    if rank.queries == MADE:
        found = _made(rank, config.seed, columns, documents, barred, texts)
    else:
        found = _given(rank, config.seed, columns, barred, texts)
    if not found.rows:
        raise JasperError(
            f"stage {name!r}: no query ({found.line()}). Fix: give longer texts, or set rank.queries to a file of "
            "queries"
        )
    return found.queries(texts, documents)


class _OwnTexts:
    """The stage's own texts: queries and further documents, each once.

    Args:
        trained: number of training texts.
    """

    def __init__(self, trained: int) -> None:
        self.trained = trained
        self.queries: list[str] = []
        self.documents: dict[str, int] = {}  # text -> place among the further documents

    def document(self, text: str) -> int:
        """Return a negative number for a further document, which `row` turns into its row."""
        return -2 - self.documents.setdefault(text, len(self.documents))

    def row(self, number: int) -> int:
        """Return the row of a document, once all queries are known."""
        return self.trained + len(self.queries) + (-2 - number) if number < -1 else number

    def dataset(self) -> Any:
        """Return the queries and then the documents as a dataset."""
        from datasets import Dataset

        texts = [*self.queries, *self.documents]
        roles = ["query"] * len(self.queries) + ["document"] * len(self.documents)
        digests = [text_digest(text, role) for text, role in zip(texts, roles, strict=True)]
        return Dataset.from_dict({"text": texts, "role": roles, "digest": digests})


class _Found:
    """Queries with their sources and candidates, one by one."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, int, list[int], list[float]]] = []  # source, barred, candidates, grades
        self.kinds: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()

    def add(
        self, kind: str, source: int, barred: int, listed: Sequence[int] = (), grades: Sequence[float] = ()
    ) -> None:
        self.kinds[kind] += 1
        self.rows.append((source, barred, list(listed), list(grades)))

    def line(self) -> str:
        """Describe the queries by kind, and what was left out."""
        kinds = ", ".join(f"{self.kinds[kind]:,} {kind}" for kind in (*KINDS, GIVEN) if self.kinds[kind])
        total = f"{len(self.rows):,} queries" + (f" ({kinds})" if kinds else "")
        return "; ".join([total, *(f"left out: {count:,} {what}" for what, count in self.left_out.items() if count)])

    def queries(self, texts: _OwnTexts, documents: np.ndarray) -> RankQueries:
        """Return the queries as arrays."""
        longest = max(len(listed) for *_, listed, _ in self.rows)
        listed = np.full((len(self.rows), longest), -1, np.int64)
        grades = np.full((len(self.rows), longest), np.nan, np.float32)
        for place, (_, _, rows, given) in enumerate(self.rows):
            listed[place, : len(rows)] = [texts.row(row) for row in rows]
            grades[place, : len(given)] = given
        sources = np.array([texts.row(source) for source, *_ in self.rows], np.int64)
        barred = np.array([row for _, row, *_ in self.rows], np.int64)
        return RankQueries(texts.dataset(), texts.trained, documents, sources, barred, listed, grades, self.line())


def _made(
    rank: RankStageConfig, seed: int, columns: Any, documents: np.ndarray, barred: Barred, texts: _OwnTexts
) -> _Found:
    """Take the training texts that are queries, and make queries from the others."""
    found = _Found()
    own = [text for text, role in zip(columns["text"], columns["role"], strict=True) if role == "query"]
    own = own[: rank.limit]  # training texts are in random order
    limit = None if rank.limit is None else rank.limit - len(own)
    made = make_queries([columns["text"][row] for row in documents.tolist()], seed, limit) if limit != 0 else []
    for text in own:
        texts.queries.append(text)
        found.add(GIVEN, -1, -1)
    for query in made:
        if barred(query.text) or (query.body is not None and barred(query.body)):
            found.left_out["evaluation texts"] += 1
            continue
        row = int(documents[query.document])
        texts.queries.append(query.text)
        if query.body is not None:
            found.add(query.kind, texts.document(query.body), row)
        elif query.kind == "text":
            found.add(query.kind, -1, row)
        else:
            found.add(query.kind, row, -1)
    return found


def _given(rank: RankStageConfig, seed: int, columns: Any, barred: Barred, texts: _OwnTexts) -> _Found:
    """Read queries and their candidates from a file."""
    found, graded = _Found(), rank.targets == GRADES
    given = read_queries(rank.queries, graded)
    if rank.limit is not None and rank.limit < len(given):
        chosen = np.random.default_rng(seed).permutation(len(given))[: rank.limit]
        found.left_out["beyond the limit"] += len(given) - rank.limit
        given = [given[place] for place in sorted(chosen.tolist())]
    pairs = zip(columns["text"], columns["role"], strict=True)
    trained = {text: row for row, (text, role) in enumerate(pairs) if role == "document"}
    for query in given:
        if barred(query.text):
            found.left_out["evaluation texts"] += 1
            continue
        listed, grades = _listed(query, rank.candidates, barred, found)
        if graded and not listed:
            found.left_out["queries without grades"] += 1
            continue
        texts.queries.append(query.text)
        own = trained.get(query.text, -1)
        rows = [trained[text] if text in trained else texts.document(text) for text in listed]
        found.add(GIVEN, -1, own, rows, grades)
    return found


def _listed(query: GivenQuery, most: int, barred: Barred, found: _Found) -> tuple[list[str], list[float]]:
    """Return at most ``most`` candidates of a query that may be trained on, the best grade first, and their grades."""
    grades = query.grades if query.grades is not None else [float("nan")] * len(query.candidates)
    pairs = [pair for pair in zip(query.candidates, grades, strict=True) if not barred(pair[0])]
    found.left_out["candidates that are evaluation texts"] += len(query.candidates) - len(pairs)
    if query.grades is not None:
        pairs.sort(key=lambda pair: -pair[1])
    found.left_out[f"candidates beyond {most} of a query"] += max(0, len(pairs) - most)
    return [text for text, _ in pairs[:most]], [grade for _, grade in pairs[:most]]


def _evaluated_texts(config: Config, data: TrainingData) -> Barred:
    """Return a function that recognizes texts of evaluation sets, and held-out documents and parts of them."""
    from jasper_fast.data.eval_loaders import load_evals

    forms = {normal_form(text) for evalset in load_evals(config.evaluate) for text in evalset.held_out_texts()}
    rows = data.held_out_texts[:] if data.held_out_texts is not None else {"text": [], "query": [], "body": []}
    held_out = HeldOutTexts(
        HeldOutDocument(text, query, body)
        for text, query, body in zip(rows["text"], rows["query"], rows["body"], strict=True)
    )
    return lambda text: normal_form(text) in forms or text in held_out
