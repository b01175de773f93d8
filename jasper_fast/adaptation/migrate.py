"""Map a new model's questions into an existing index, which stays as it is.

The old index gives the embeddings of its documents, and the new model encodes some of the same documents. A linear map
from the new model's space into the old one is fitted to these pairs, and chosen on pairs that were held out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jasper_fast._version import __version__
from jasper_fast.adaptation.embeddings import own_length
from jasper_fast.adaptation.migration.maps import LEAST_OWN, Corpus, HeldOut, MapTable, candidate_maps, compare_maps
from jasper_fast.adaptation.migration.old_index import MOST_ROWS, OldIndex, lengths_note, usable_rows
from jasper_fast.adaptation.migration.opening import open_old_index
from jasper_fast.adaptation.migration.order import check_order
from jasper_fast.adaptation.migration.pairs import BY_POSITION, Pairs, draw_pairs
from jasper_fast.adaptation.migration.report import advice, card_scores, pairs_lines, render, table_lines, usage
from jasper_fast.config.data import SourceConfig
from jasper_fast.config.load import load_config
from jasper_fast.config.models import TeacherConfig
from jasper_fast.data.text import text_digest
from jasper_fast.data.text_sources import report_ignored
from jasper_fast.exporting.adapted import export_symmetric
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import load_model, normalise
from jasper_fast.models.folder import MIGRATION_FILE, write_json
from jasper_fast.models.hub import model_revision, resolve_model
from jasper_fast.models.sentence_transformer import check_embeds, roles_differ
from jasper_fast.reporting.model_card import adapted_facts
from jasper_fast.reporting.tables import aligned
from jasper_fast.teachers.label import ensure_teachers
from jasper_fast.teachers.reduction import spread_rows
from jasper_fast.utils.atomic import check_output_path, publish_dir, write_text
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import public_name

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

PAIRS = 5000  # default of the largest number of pairs
FEWEST_PAIRS = 20
HELD_OUT_SHARE, MOST_HELD_OUT = 5, 500  # one pair in five is held out, up to this number
CORPUS_ROWS = 100_000  # rows of the old index that questions are compared with
QUESTIONS, REPORT, RESULTS = "questions", "report.md", "results.json"
NO_LIMIT = 10**6  # tokens, for a model that reads texts of any length


@dataclass(frozen=True)
class Embeddings:
    """Both embeddings of the pairs.

    Args:
        pairs: the documents and their rows.
        old: (n, d) float32, rows of the old index as stored.
        new: (n, h) float32 unit rows, the new model's embeddings of the documents.
        asked: (n, h) float32 unit rows, of their titles or first sentences. A row of zeros: no title.
    """

    pairs: Pairs
    old: np.ndarray
    new: np.ndarray
    asked: np.ndarray


@dataclass(frozen=True)
class MapFit:
    """A map into an old index, and what it was chosen on.

    Args:
        matrix: (h, d) map, fitted to all pairs.
        table: scores of the candidates on the held-out pairs.
        held: the held-out pairs.
        fitted: number of the other pairs.
        corpus_rows: number of rows of the old index that questions were compared with.
    """

    matrix: np.ndarray
    table: MapTable
    held: HeldOut
    fitted: int
    corpus_rows: int


def migrate(
    documents: str | Path,
    old: str | Path,
    model: str,
    out: str | Path,
    *,
    columns: Sequence[str] = ("text",),
    id_column: str | None = None,
    split: str = "train",
    pairs: int = PAIRS,
    cache: str | Path = "cache",
    seed: int = 0,
    force: bool = False,
    replace: bool = False,
    trust_remote_code: bool = False,
    progress: bool = True,
) -> Path:
    """Write a model whose questions search an existing index of another model.

    The quality is printed before anything is written at ``out``. A map that does not find the documents' own rows is
    refused, as are rows in another order than the documents.

    Args:
        documents: text source with documents of the index. It may have others, and lack some.
        old: existing index: .parquet, .jsonl or .npy file, folder of them, FAISS index, ``FlatIPIndex``, or text index.
        model: new model: run folder, path, name, or ``package:import_name/folder``.
        out: new folder, with the model ``questions``, ``report.md`` and ``results.json``.
        columns: columns to join to one document.
        id_column: column with the ids of the index. None matches by text, or by position if the index has no texts.
        split: split of a ``datasets`` name.
        pairs: largest number of documents to encode with the new model, drawn at random.
        cache: folder of the new model's embeddings. An interrupted call resumes from it.
        seed: seed of the draw.
        force: write the model in spite of a bad map or order, and print a warning instead.
        replace: replace the migration at ``out``. By default, an existing folder is an error.
        trust_remote_code: permission to run the new model's code.
        progress: show the progress of encoding on stderr.

    Returns:
        ``out``.

    Raises:
        JasperError: an argument, source, index or model cannot be used, or too few documents have a row. Also if the
            rows are in another order, or the best map does not find the documents' own rows.

    Example:
        >>> migrate("docs.jsonl", "old.parquet", "runs/mine", "migrated", id_column="id")  # doctest: +SKIP
    """
    out = Path(out).expanduser()
    _check_out(out, replace)
    source = SourceConfig(path=str(documents), columns=list(columns), split=split, id_column=id_column, join=True)
    report_ignored(source)
    loaded = _new_model(model, trust_remote_code)
    index = open_old_index(str(old))
    lines = [f"{index.name}: {index.kind}, {index.rows:,} rows of width {index.width:,}"]
    drawn = draw_pairs(source, index, pairs, seed)
    both, skipped = usable_pairs(drawn, index)
    lines += pairs_lines(both.pairs, skipped)
    lines += [f"note: {note}" for note in _notes(index)]
    _say(lines)
    _check_number(len(both.pairs.texts), drawn.counts)
    encoder = TeacherConfig(model=model, max_length=own_length(loaded) or NO_LIMIT, trust_remote_code=trust_remote_code)
    both = _encode(both, source, encoder, cache, progress)
    if drawn.key == BY_POSITION:
        lines += _say([check_order(index.name, both.pairs.texts, both.old, both.new, force)])
    fit = fit_map(both, index, seed)
    table, held = fit.table, fit.held
    lines += _say(table_lines(table, len(held.documents), len(held.questions), fit.corpus_rows, index))
    lines += _say(advice(table, fit.fitted, both.new.shape[1], index))
    if not table.usable:
        lines += _say([_refuse(table, index, force)])
    facts = _facts(source, index, model, both, fit)
    with publish_dir(out, replace=replace) as folder:
        card = adapted_facts(
            model,
            Path(index.name).name,
            name=out.name,
            sources=[public_name(source.path)],
            documents=len(both.new),
            held_out=len(held.documents),
            chosen=table.best.name,
            scores=card_scores(table),
            into={"kind": index.kind, "rows": index.rows, "width": index.width},
        )
        export_symmetric(
            loaded, {index.width: fit.matrix}, folder / QUESTIONS, card=card, trust_remote_code=trust_remote_code
        )
        if index.model is not None:  # `search ask` then accepts the model for this index
            write_json(folder / QUESTIONS / MIGRATION_FILE, {"index_model": index.model})
        write_text(folder / REPORT, render(out.name, lines, usage(out / QUESTIONS, index)))
        write_text(folder / RESULTS, json.dumps(facts, indent=1) + "\n")
    _say(usage(out / QUESTIONS, index))
    return out


def _say(lines: Sequence[str]) -> list[str]:
    """Print lines, tables in columns, and return them as they are, for the report."""
    print("\n".join(aligned(lines)), flush=True)
    return list(lines)


def _check_out(out: Path, replace: bool) -> None:
    check_output_path(out)
    if not out.exists():
        return
    if not (out / QUESTIONS).is_dir():
        raise JasperError(f"{out}: exists and is no migration. Fix: choose another --out, or remove it")
    if not replace:
        raise JasperError(f"{out}: exists, a migration. Fix: add --replace, or choose another --out")


def _new_model(model: str, trust_remote_code: bool) -> SentenceTransformer:
    check_embeds(resolve_model(model), model)
    loaded = load_model(model, trust_remote_code=trust_remote_code)
    if roles_differ(loaded):
        raise JasperError(
            f"{model}: it encodes questions and documents with different modules (expected the same ones, because the "
            "map is fitted to documents). Fix: give the model of its questions, such as DIR/symmetric"
        )
    return loaded


def usable_pairs(pairs: Pairs, index: OldIndex) -> tuple[Embeddings, int]:
    """Read the rows of the pairs, and leave out those that are not finite or are zero.

    Args:
        pairs: documents with their rows.
        index: the old index.

    Returns:
        The usable pairs, still without the new model's embeddings, and the number of those left out.
    """
    old = index.read(pairs.rows)
    good = np.flatnonzero(usable_rows(old))
    kept = Pairs(
        [pairs.texts[i] for i in good], [pairs.questions[i] for i in good], pairs.rows[good], pairs.key, pairs.counts
    )
    return Embeddings(kept, old[good], np.empty((0, 0)), np.empty((0, 0))), len(old) - len(good)


def _notes(index: OldIndex) -> list[str]:
    """Return what the index lost, and what its lengths mean."""
    sample = index.read(spread_rows(index.rows, MOST_ROWS))
    good = usable_rows(sample)
    if not good.any():
        raise JasperError(f"{index.name}: no row is finite and not zero. Fix: give the vectors of the index")
    bad = len(sample) - int(good.sum())
    found = [f"{bad:,} of {len(sample):,} rows are zero, NaN or infinite, and are left out"] if bad else []
    lengths = np.linalg.norm(sample[good].astype(np.float64), axis=1)
    note = None if index.codes else lengths_note(lengths, index.metric)
    return [*index.notes, *found, *([note] if note else [])]


def _check_number(number: int, counts: dict[str, int]) -> None:
    if number < FEWEST_PAIRS:
        raise JasperError(
            f"too few pairs of a document and a usable row (got {number}, expected at least {FEWEST_PAIRS}; there are "
            f"{counts['documents']:,} documents and {counts['rows']:,} rows). Fix: give more documents of the index"
        )


def _encode(
    both: Embeddings, source: SourceConfig, encoder: TeacherConfig, cache: str | Path, progress: bool
) -> Embeddings:
    """Return the pairs with the new model's embeddings, read from the cache where it has them."""
    from datasets import Dataset

    asked = [number for number, question in enumerate(both.pairs.questions) if question]
    texts = [*both.pairs.texts, *(both.pairs.questions[number] for number in asked)]
    roles = ["document"] * len(both.pairs.texts) + ["query"] * len(asked)
    digests = [text_digest(text, role) for text, role in zip(texts, roles, strict=True)]
    config = load_config(
        None, [("data.sources", [source.model_dump(mode="json", exclude_defaults=True)]), ("data.cache", str(cache))]
    )
    alone = config.model_copy(update={"teachers": [encoder], "stages": []})
    dataset = Dataset.from_dict({"text": texts, "role": roles, "digest": digests})
    vectors = ensure_teachers(alone, dataset, progress, alone=True).read(np.arange(len(texts))).numpy()
    count = len(both.pairs.texts)
    questions = np.zeros((count, vectors.shape[1]), np.float32)
    questions[asked] = vectors[count:]
    return Embeddings(both.pairs, both.old, vectors[:count], questions)


def fit_map(both: Embeddings, index: OldIndex, seed: int) -> MapFit:
    """Choose a map on held-out pairs, and fit it to all pairs.

    Args:
        both: both embeddings of the pairs.
        index: the old index.
        seed: seed of the draw of the held-out pairs.
    """
    held, fitted, corpus_rows = _split(both, index, seed)
    statistics = _statistics(both, fitted)
    table = compare_maps(statistics, held)
    matrix = dict(candidate_maps(_statistics(both, np.arange(len(both.new)))))[table.best.name]
    return MapFit(matrix, table, held, statistics.count, corpus_rows)


def _statistics(both: Embeddings, chosen: np.ndarray) -> PairStatistics:
    statistics = PairStatistics(both.new.shape[1], both.old.shape[1])
    statistics.add(both.new[chosen], normalise(both.old[chosen]))
    return statistics


def _split(both: Embeddings, index: OldIndex, seed: int) -> tuple[HeldOut, np.ndarray, int]:
    """Hold out pairs. Return the numbers of the other pairs and the number of rows in the corpus too."""
    count, generator = len(both.new), np.random.default_rng([seed, 1])
    order = generator.permutation(count)
    held, fitted = np.split(order, [min(count // HELD_OUT_SHARE, MOST_HELD_OUT)])
    others = np.setdiff1d(np.arange(index.rows), both.pairs.rows[held])
    if len(others) > CORPUS_ROWS:
        others = np.sort(generator.choice(others, CORPUS_ROWS, replace=False))
    rest = index.read(others)
    corpus = np.concatenate([both.old[held], rest[usable_rows(rest)]])
    scale = float(np.linalg.norm(corpus.astype(np.float64), axis=1).mean())
    owners = np.flatnonzero((both.asked[held] != 0).any(axis=1))
    return (
        HeldOut(
            both.new[held],
            both.asked[held[owners]],
            owners,
            held[owners],
            Corpus(corpus / np.float32(scale), index.metric),
            Corpus(both.old / np.float32(scale), index.metric),
            both.new,
        ),
        fitted,
        len(corpus),
    )


def _refuse(table: MapTable, index: OldIndex, force: bool) -> str:
    """Refuse a map that does not find the documents' own rows, or return a warning."""
    best = table.best
    problem = (
        f"the best map finds {best.overlap:.1%} of the ten nearest rows (chance: {table.chance:.1%}), and the own row "
        f"of {best.own_row:.0%} of the documents (expected at least {LEAST_OWN:.0%}). The rows belong to other "
        "documents, or the pairs are too few"
    )
    if force:
        return f"WARNING: {problem}. The model is written because of --force"
    raise JasperError(f"{index.name}: {problem}. Fix: check ids, columns and order, or give more documents")


def _facts(source: SourceConfig, index: OldIndex, model: str, both: Embeddings, fit: MapFit) -> dict[str, Any]:
    """Return the content of results.json."""
    held = {"documents": len(fit.held.documents), "questions": len(fit.held.questions), "rows": fit.corpus_rows}
    return {
        "jasper_fast": __version__,
        "migration": {
            "documents": public_name(source.path),
            "index": {"name": Path(index.name).name, "kind": index.kind, "rows": index.rows, "width": index.width},
            "model": {"name": public_name(model), "revision": model_revision(model)},
            "matched_by": both.pairs.key,
            "counts": both.pairs.counts,
            "pairs": len(both.new),
            "fitted": fit.fitted,
            "held_out": held,
            **fit.table.as_json(),
        },
    }
