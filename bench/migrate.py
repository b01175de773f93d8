"""Search the index of one model with the mapped questions of another, on open sets with judgements.

    python -m bench migrate --into-model bge-small-en --sets DATA/cranfield DATA/cisi --pairs 200 400 1000 --folder work

It pairs documents and fits maps as ``jasper-fast adapt --into`` does, in both directions. The last number of pairs is
also tried with an index of int8 codes, and with one of bits. Judgements are used for the final scores only. Embeddings
are kept in ``--folder``, so that the command can resume.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench.adapt import TEACHER, Embeddings, Text, documents_file, spaced
from bench.common.environment import environment
from jasper_fast.adaptation.migrate import MapFit, fit_map, usable_pairs
from jasper_fast.adaptation.migration.maps import mapped
from jasper_fast.adaptation.migration.old_index import OldIndex
from jasper_fast.adaptation.migration.opening import open_old_index
from jasper_fast.adaptation.migration.pairs import draw_pairs
from jasper_fast.config.data import EvalConfig, SourceConfig
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.held_out import held_out_document
from jasper_fast.data.text_sources import read_source
from jasper_fast.evaluation.metrics import score_embeddings
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.names import public_name

FLOATS, INT8, BITS = "float32", "int8", "bits"
FORMS = (FLOATS, INT8, BITS)
CASE = ("new", "old", "set", "form", "pairs")  # fields that tell the cases of the summary apart


def short_name(model: str) -> str:
    """Return the name of a model without owner and folders."""
    return public_name(model).rsplit("/")[-1]


def write_index(vectors: np.ndarray, form: str, folder: Path) -> OldIndex:
    """Write an index as other programs do, and open it as the migration does.

    Args:
        vectors: (n, width) float32 unit rows.
        form: "float32", "int8" with one scale for all coordinates, or "bits", eight signs a byte.
        folder: folder of the file.
    """
    rows: np.ndarray = vectors
    if form == INT8:
        rows = np.round(vectors * (127 / np.abs(vectors).max())).astype(np.int8)
    if form == BITS:
        rows = np.packbits(vectors > 0, axis=1)
    file = folder / f"index-{form}.npy"
    np.save(file, rows)
    return open_old_index(str(file))


def titles(source: SourceConfig) -> list[Text]:
    """Return the titles or first sentences of documents, which choose the map."""
    found = (held_out_document(cells, join=True).query for cells in read_source(source))
    return [(spaced(text), "query") for text in found if text]


def fitted(source: SourceConfig, index: OldIndex, new: Embeddings, pairs: int, draw: int) -> MapFit:
    """Draw pairs and choose a map, from documents and index alone."""
    both, _ = usable_pairs(draw_pairs(source, index, pairs, draw), index)
    documents = new.of([(spaced(text), "document") for text in both.pairs.texts])
    asked = np.zeros_like(documents)
    owners = [number for number, question in enumerate(both.pairs.questions) if question]
    asked[owners] = new.of([(spaced(both.pairs.questions[number]), "query") for number in owners])
    return fit_map(replace(both, new=documents, asked=asked), index, draw)


def judged(
    evalset: RetrievalSet,
    source: SourceConfig,
    models: tuple[Embeddings, Embeddings],
    pairs: Sequence[int],
    draws: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Score the new model's questions in the old model's index.

    Args:
        evalset: judged questions.
        source: the documents of the set.
        models: new model and old model.
        pairs: numbers of pairs. Codes are tried with the last one.
        draws: number of draws of the pairs.
        folder: folder for the index.

    Returns:
        A row for each form of index, number of pairs and draw.

    Raises:
        JasperError: the new model finds no relevant document in its own index.
    """
    new, old = models
    queries = new.of([(spaced(text), "query") for text in evalset.queries])
    texts = [(spaced(text), "document") for text in evalset.documents]

    def ndcg(asked: np.ndarray, searched: np.ndarray) -> float:
        return float(score_embeddings(evalset, {"queries": asked, "documents": searched})["nDCG@10"])

    own, rows = ndcg(queries, new.of(texts)), []
    if not own:
        raise JasperError(
            f"{evalset.name}: {short_name(new.model)} finds no relevant document (expected nDCG@10 above 0, to compare "
            "with). Fix: give a set that it can search"
        )
    for form in FORMS:
        index = write_index(old.of(texts), form, folder)
        searched = index.read(np.arange(index.rows))
        for number in pairs if form == FLOATS else pairs[-1:]:
            for draw in range(draws):
                fit = fitted(source, index, new, number, draw)
                score = ndcg(mapped(queries, fit.matrix), searched)
                row = {"set": evalset.name, "form": form, "pairs": number, "draw": draw, "map": fit.table.best.name}
                row |= {"own": own, "ndcg": score, "kept": score / own, "predicted": fit.table.best.kept}
                rows.append(row | {"own_row": fit.table.best.own_row, "usable": fit.table.usable})
    return rows


def run(
    model: str,
    others: Sequence[str],
    sets: Sequence[str],
    folder: Path,
    pairs: Sequence[int],
    draws: int,
    max_length: int | None = None,
) -> list[dict[str, Any]]:
    """Return a row for each direction, set, form of index, number of pairs and draw."""
    evalsets = load_evals([EvalConfig(path=path) for path in sets])
    sources = [documents_file(path, folder, 0, None).model_copy(update={"join": True}) for path in sets]
    embeddings = {name: Embeddings(name, folder, max_length) for name in (model, *others)}
    for one in embeddings.values():
        for evalset, source in zip(evalsets, sources, strict=True):
            assert isinstance(evalset, RetrievalSet)
            texts = [(spaced(text), "query") for text in evalset.queries]
            texts += [(spaced(text), "document") for text in evalset.documents]
            one.add([*texts, *titles(source)])
    rows = []
    for new, old in [pair for other in others for pair in ((model, other), (other, model))]:
        for evalset, source in zip(evalsets, sources, strict=True):
            assert isinstance(evalset, RetrievalSet)
            about = {"new": short_name(new), "old": short_name(old)}
            scored = judged(evalset, source, (embeddings[new], embeddings[old]), pairs, draws, folder)
            rows += [about | row for row in scored]
            print(json.dumps(about | {"set": evalset.name, "own": scored[0]["own"]}), flush=True)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return mean and standard deviation over draws of each case, in per cent."""
    means = []
    for case in dict.fromkeys(tuple(row[name] for name in CASE) for row in rows):
        chosen = [row for row in rows if tuple(row[name] for name in CASE) == case]
        line = dict(zip(CASE, case, strict=True)) | {"draws": len(chosen)}
        for name in ("kept", "predicted"):
            values = [row[name] for row in chosen if row[name] is not None]
            line[name] = _percent(values) if values else None
        means.append(line)
    return means


def _percent(values: Sequence[float]) -> list[float]:
    deviation = np.std(values, ddof=1) if len(values) > 1 else 0.0
    return [round(100 * float(np.mean(values)), 1), round(100 * float(deviation), 1)]


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of docs/migrate.md: a row for each direction and set.

    Args:
        summary: result of :func:`summary`.
    """
    cases = {tuple(row[name] for name in CASE): row for row in summary}
    pairs = sorted({row["pairs"] for row in summary})
    most = pairs[-1]
    heads = [*(f"{number:,} pairs" for number in pairs), *(f"{form} index" for form in (INT8, BITS)), "predicted"]
    lines = [
        f"| new model → old index | set | {' | '.join(heads)} |",
        "| --- | --- |" + " ---: |" * len(heads),
    ]
    last = None
    for new, old, name in dict.fromkeys(case[:3] for case in cases):
        floats = [_cell(cases[new, old, name, FLOATS, number]["kept"]) for number in pairs]
        floats[-1] = f"**{floats[-1]}**"
        codes = [_cell(cases[new, old, name, form, most]["kept"]) for form in (INT8, BITS)]
        direction = f"{new} → {old}"
        shown = direction if direction != last else ""
        cells = [shown, name, *floats, *codes, _cell(cases[new, old, name, FLOATS, most]["predicted"])]
        lines.append(f"| {' | '.join(cells)} |")
        last = direction
    return "\n".join(lines)


def _cell(value: Sequence[float] | None) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation else "")


def main(argv: list[str]) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench migrate", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=TEACHER, help="first model (default: %(default)s)")
    parser.add_argument("--into-model", nargs="+", required=True, metavar="M", help="others, each in both directions")
    parser.add_argument("--sets", nargs="+", required=True, metavar="FOLDER", help="BEIR folders")
    parser.add_argument("--pairs", nargs="+", type=int, default=[1000], help="numbers of pairs (default: 1000)")
    parser.add_argument("--draws", type=int, default=3, help="draws of the pairs (default: 3)")
    parser.add_argument("--max-length", type=int, help="tokens that the models read (default: their own limits)")
    parser.add_argument("--folder", required=True, type=Path, help="folder for embeddings, so that the command resumes")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    rows = run(
        options.model,
        options.into_model,
        options.sets,
        options.folder,
        sorted(options.pairs),
        options.draws,
        options.max_length,
    )
    means = summary(rows)
    print(table(means))
    if options.json:
        result = {"environment": environment(), "max_length": options.max_length, "summary": means, "rows": rows}
        write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return 0
