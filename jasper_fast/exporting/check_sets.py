"""Texts that exports are compared on: texts of mixed length, evaluation sets, and documents without judgements."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path

from jasper_fast.config.data import EvalConfig, SourceConfig
from jasper_fast.config.load import stored_config
from jasper_fast.config.yaml import NOT_YAML, parse_yaml
from jasper_fast.data.eval_files import subsample
from jasper_fast.data.eval_loaders import DOCSTRINGS, load_eval
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.held_out import FILE, held_out_document, read_held_out
from jasper_fast.data.judgements import SUFFIXES
from jasper_fast.data.listing import user_path
from jasper_fast.data.rows import with_compressed
from jasper_fast.data.text_sources import read_source
from jasper_fast.evaluation.label_free import HeldOut
from jasper_fast.exporting.parity import PROBES
from jasper_fast.utils.errors import JasperError

QUERIES, DOCUMENTS = 500, 2000  # largest numbers of a set: enough for an error of about 0.3 points
FEWEST_QUESTIONS = 10
WORDS = tuple(str(PROBES["a sentence"]).split())
LENGTHS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233)  # words
MIXED = 48  # texts that a set adds to those of mixed length
JUDGED, LABEL_FREE = "judged", "title or first sentence → rest of the document"


@dataclass(frozen=True)
class CheckSet:
    """A retrieval set that exports are compared on.

    Args:
        evalset: queries, documents and what is relevant.
        kind: ``JUDGED`` or ``LABEL_FREE``.
        documents: number of documents before some were left out.
    """

    evalset: RetrievalSet
    kind: str
    documents: int


def mixed_texts(checks: Sequence[CheckSet] = ()) -> list[str]:
    """Return texts from one word to more than the maximum length, in several scripts.

    Args:
        checks: sets that add texts of theirs, spread over their lengths.
    """
    texts = [" ".join(islice(cycle(WORDS), start, start + count)) for start, count in enumerate(LENGTHS)]
    for check in checks:
        own = sorted({*check.evalset.queries, *check.evalset.documents}, key=lambda text: (len(text), text))
        step = max(1, len(own) // MIXED)
        texts += own[::step][:MIXED]
    return [*dict.fromkeys([*PROBES.values(), *texts])]


def load_checks(paths: Sequence[str], columns: Sequence[str] = ("text",)) -> list[CheckSet]:
    """Read evaluation sets, and files of documents without judgements.

    Of a document with a title, the title is the query. Of another one with at least three sentences, the first one is.

    Args:
        paths: each a retrieval set (a BEIR folder, one of its ``qrels`` files, or ``docstrings``), or a file of
            documents in any text format.
        columns: columns of the documents, the title first.

    Raises:
        JasperError: a path is missing or malformed, is a set without retrieval, or has too few questions.
    """
    checks = [_documents(path, columns) if _holds_documents(path) else _judged(path) for path in paths]
    names = [check.evalset.name for check in checks]
    if double := sorted({name for name in names if names.count(name) > 1}):
        raise JasperError(f"--check: two sets are called {double[0]!r}. Fix: give each once, or rename one")
    return checks


def checks_of(paths: Sequence[str], columns: Sequence[str], source: str | Path) -> list[CheckSet]:
    """Return the sets of ``--check``, else the held-out documents of the run, else nothing.

    Args:
        paths: arguments of ``--check``. Empty: none were given.
        columns: columns of documents, the title first.
        source: model to export, or its run.

    Raises:
        JasperError: as in ``load_checks``.
    """
    if paths:
        return load_checks(paths, columns)
    held_out = held_out_check(source)
    return [held_out] if held_out else []


def held_out_check(source: str | Path) -> CheckSet | None:
    """Return the held-out documents of a run, if its text cache is still there.

    Args:
        source: run folder, the model folder in it, or the folder of an adapted model that has its run in ``student``.
    """
    folder = Path(source)
    places = (folder, folder.parent, folder / "student", folder.parent / "student")
    file = next((at / "config.yaml" for at in places if (at / "config.yaml").is_file()), None)
    if file is None:
        return None
    try:
        config = stored_config(parse_yaml(file.read_text(encoding="utf-8")), str(file))
    except (JasperError, OSError, *NOT_YAML):  # a configuration of something else
        return None
    wanted = json.loads(config.data.model_dump_json(exclude={"cache", "cache_dtype", "seed"}))
    for facts in sorted(Path(config.data.cache).expanduser().glob("texts-*/texts.json")):
        settings = json.loads(facts.read_text(encoding="utf-8")).get("settings", {})
        stored = settings.get("data", {})
        for one in (wanted, stored):
            one["sources"] = [{**row, "id_column": None} for row in one.get("sources", [])]
        if stored == wanted and settings.get("seed") == config.data.seed and (facts.parent / FILE).is_file():
            questions = HeldOut.of(read_held_out(facts.parent)[:]).questions
            if questions is not None and len(questions.queries) >= FEWEST_QUESTIONS:
                return _label_free(replace(questions, name="held-out documents"))
    return None


def _holds_documents(path: str) -> bool:
    file = user_path(path)
    judgements = file.parent.name == "qrels" and file.name.lower().endswith(SUFFIXES)
    return file.is_file() and not judgements and not file.name.lower().endswith(with_compressed(".tsv"))


def _judged(path: str) -> CheckSet:
    evalset = load_eval(EvalConfig(path=path, limit=QUERIES))
    if not isinstance(evalset, RetrievalSet):
        raise JasperError(
            f"--check {path}: a set of kind {evalset.kind!r} has no retrieval (expected queries, documents and "
            "judgements). Fix: give a BEIR folder, or a file of documents"
        )
    kind = LABEL_FREE if path == DOCSTRINGS else JUDGED
    return CheckSet(fewer_documents(evalset, DOCUMENTS), kind, len(evalset.documents))


def _documents(path: str, columns: Sequence[str]) -> CheckSet:
    source = SourceConfig(path=path, columns=list(columns))
    rows = [held_out_document(cells, source.join) for cells in read_source(source)]
    held = HeldOut.of({name: [getattr(row, name) for row in rows] for name in ("text", "query", "body")})
    found = len(held.questions.queries) if held.questions else 0
    if held.questions is None or found < FEWEST_QUESTIONS:
        raise JasperError(
            f"--check {path}: too few documents have a title or three sentences (got {found} of {len(held.texts)}, "
            f"expected {FEWEST_QUESTIONS}). Fix: name a title column, as in --columns title,text, or give an "
            "evaluation set"
        )
    return _label_free(replace(held.questions, name=user_path(path).name.split(".")[0]))


def _label_free(questions: RetrievalSet) -> CheckSet:
    chosen = subsample(questions.queries, QUERIES)
    queries, relevant = [questions.queries[i] for i in chosen], [questions.relevant[i] for i in chosen]
    fewer = replace(questions, queries=queries, relevant=relevant)
    return CheckSet(fewer_documents(fewer, DOCUMENTS), LABEL_FREE, len(questions.documents))


def fewer_documents(evalset: RetrievalSet, most: int | None) -> RetrievalSet:
    """Return a set with fewer documents, or more than ``most`` if more are judged. Its queries stay.

    Args:
        evalset: retrieval set.
        most: largest number of documents. None: all.
    """
    count = len(evalset.documents)
    if most is None or count <= most:
        return evalset
    kept = {at for grades in evalset.relevant for at in grades if at < count}
    kept |= {at for at in evalset.self_matches if at >= 0}
    others = [at for at in range(count) if at not in kept]
    drawn = subsample([evalset.documents[at] for at in others], max(0, most - len(kept)))
    chosen = sorted(kept | {others[at] for at in drawn})
    # A judged document that the corpus lacks keeps a position after the last one.
    places = {old: new for new, old in enumerate([*chosen, *range(count, max(count, len(evalset.ids)))])}
    absent = {at for grades in evalset.relevant for at in grades if at not in places}
    places |= {old: len(places) + new for new, old in enumerate(sorted(absent))}
    ids = [evalset.ids[old] for old in places if old < len(evalset.ids)]
    return replace(
        evalset,
        documents=[evalset.documents[at] for at in chosen],
        relevant=[{places[at]: grade for at, grade in grades.items()} for grades in evalset.relevant],
        self_matches=[places[at] if at >= 0 else -1 for at in evalset.self_matches],
        ids=ids if len(ids) == len(places) else [],
    )
