"""The quality gate: every file of an export is opened in its own runtime and compared with its source.

An exact file must give the same embeddings. A file with reduced weights may lose a little retrieval, see ``LIMITS``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jasper_fast.evaluation.metrics import ndcg_by_query
from jasper_fast.exporting.check_sets import CheckSet, mixed_texts
from jasper_fast.exporting.onnx import INT8_COSINE
from jasper_fast.exporting.runtimes import GGUF, INT8, ONNX, OPENVINO, PYTORCH, Runtime
from jasper_fast.fitting.agreement import Reference
from jasper_fast.models.embedder import load_model, model_encoder, normalise
from jasper_fast.models.folder import write_json
from jasper_fast.models.sentence_transformer import ROLES
from jasper_fast.reporting.exports import QUALITY_FILE, loss_line, quality_sources, quality_table
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.hardware import cpu_name

FORMAT = 1
LENGTH_TOLERANCE = 1e-3  # of the length of an embedding, which is 1
LARGEST_ERROR = 0.02  # a standard error above this excuses no loss: the set is too small to judge
BATCH = 32  # documents of a batch whose speed is measured
QUESTION_TURNS, BATCH_TURNS = 7, 3  # of which the median time is taken
QUESTION = "how do I reverse a list?"

Encode = Callable[[list[str], str], np.ndarray]
Embeddings = dict[str, np.ndarray]  # (n, D) float32 unit rows by group


@dataclass(frozen=True)
class Limit:
    """Limits of a file.

    Args:
        cosine: smallest cosine of any text with PyTorch, and of PyTorch with the source. None: any.
        lost: largest fraction of the source's nDCG@10 that may be lost. A loss within its standard error passes too, if
            that error is at most ``LARGEST_ERROR``.
    """

    cosine: float | None
    lost: float


EXACT = Limit(0.9999, 0.001)  # float32 in another library
LIMITS = {  # by runtime
    PYTORCH: EXACT,
    ONNX: EXACT,
    OPENVINO: EXACT,
    GGUF: Limit(0.999, 0.002),  # llama.cpp multiplies in float16
    INT8: Limit(INT8_COSINE, 0.005),
}
SHRUNK = Limit(None, 0.02)  # a smaller vocabulary or smaller weights: compared with the model before


def measure_quality(
    source: str | Path | Encode,
    folder: Path,
    runtimes: Sequence[Runtime],
    *,
    widths: Sequence[int],
    form: str = "flat",
    checks: Sequence[CheckSet] = (),
    shrunk: bool = False,
    allow_loss: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Compare every file of an unpublished export with its source, print the table, and refuse an export that loses.

    ``quality.json`` gets the table too. The embeddings of PyTorch are compared with the source, and the others with
    PyTorch. In the form ``prefix``, PyTorch is compared after the best rotation, because only inner products are kept.
    A narrower prefix is compared with the same prefix of PyTorch.

    Args:
        source: model that was exported, or its encode function, from texts and a role to (n, D) unit rows.
        folder: unpublished export. If it has two encoders, in ``query`` and ``document``, join their runtimes.
        runtimes: its files, as from ``open_runtimes`` with the threads of torch, the exact ones first.
        widths: widths of the embeddings, widest first. Narrower ones are prefixes, normalised again.
        form: form of the export, for the table.
        checks: sets to measure retrieval on, as from ``load_checks``. Empty: only embeddings are compared.
        shrunk: True if the vocabulary or the weights were reduced, so that PyTorch differs from the source.
        allow_loss: True to accept an export beyond its limits. The table says so.
        trust_remote_code: permission to run code from the source.

    Returns:
        The content of ``quality.json``: ``form``, ``texts`` (number of compared texts), ``sets``, ``cpu``, ``threads``,
        ``rows``, ``beyond`` (reasons to refuse it) and ``allowed``. A row has ``runtime``, ``file``, ``width``, ``mb``,
        ``question_ms``, ``batch_per_s``, ``cosine_mean``, ``cosine_min``, ``limit_cosine`` and ``limit_lost``. With
        sets it also has the fractions ``neighbours``, ``ndcg``, ``lost`` and ``lost_error``.

    Raises:
        JasperError: a file is beyond its limits and ``allow_loss`` is False, or it returns NaN or a wrong shape.
    """
    encode = source if callable(source) else source_encoder(source, widths[0], trust_remote_code)
    content = compare_runtimes(encode, folder, runtimes, widths, form=form, checks=checks, shrunk=shrunk)
    content["allowed"] = bool(content["beyond"]) and allow_loss
    write_json(folder / QUALITY_FILE, content)
    print("\n".join(quality_lines(content)))
    if content["beyond"] and not allow_loss:
        raise JasperError(
            f"the export is worse than its limits: {'; '.join(content['beyond'])}. Nothing was published. Fix: export "
            "without that file, or accept the loss with --allow-loss"
        )
    return content


def compare_runtimes(
    source: Encode,
    folder: Path,
    runtimes: Sequence[Runtime],
    widths: Sequence[int],
    *,
    form: str = "flat",
    checks: Sequence[CheckSet] = (),
    shrunk: bool = False,
) -> dict[str, Any]:
    """Compare files with the embeddings of their source, without refusing any.

    Args:
        source: function from texts and a role to (n, D) unit rows of the source, at ``widths[0]``.
        folder: the export. Its files give the sizes.
        runtimes: the files, the exact ones first.
        widths: widths of the embeddings, widest first.
        form: form of the export. "prefix": the embeddings of the source may be rotated.
        checks: retrieval sets.
        shrunk: True if PyTorch may differ from the source.

    Returns:
        The content of ``quality.json``, without ``allowed``.
    """
    texts = mixed_texts(checks)
    places = [folder / role for role in ROLES if (folder / role).is_dir()] or [folder]
    wanted = _embed(source, texts, checks)
    rows: list[dict[str, Any]] = []
    base: Embeddings | None = None  # of PyTorch, or of the first file without it
    for runtime in runtimes:
        found = _embed(runtime.encode, texts, checks)
        _check_rows(runtime, found, widths[0])
        size = sum(file_megabytes(place, runtime.name, runtime.file) for place in places)
        facts = {"runtime": runtime.name, "file": runtime.file, "mb": size}
        facts |= _speed(runtime.encode, texts, checks)
        compared = base is not None
        aligned = _rotated(wanted, found) if form == "prefix" and not compared else wanted
        for width in widths:
            full = width == widths[0]
            own, reference = _cut(found, width), _cut(base or found, width)
            row: dict[str, Any] = {
                "width": width,
                **facts,
                **_cosines(own, reference if compared or not full else aligned),
            }
            row |= _retrieval(checks, own, wanted if full else reference)
            limit = limit_of(runtime.name, shrunk, compared)
            row |= {"limit_cosine": limit.cosine, "limit_lost": limit.lost}
            rows.append(row)
        base = base or found
    return {
        "format": FORMAT,
        "form": form,
        "texts": len(texts),
        "sets": [_described(check) for check in checks],
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "beyond": [reason for row in rows for reason in _beyond(row)],
    }


def join_roles(queries: Sequence[Runtime], documents: Sequence[Runtime]) -> list[Runtime]:
    """Return the runtimes of two folders, one of which encodes queries and the other one documents.

    Args:
        queries: opened files of the folder for queries.
        documents: opened files of the folder for documents. A runtime that only one folder has is left out.
    """
    others = {one.name: one for one in documents}

    def joined(query: Runtime, document: Runtime) -> Runtime:
        return replace(query, encode=lambda texts, role: (query if role == "query" else document).encode(texts, role))

    return [joined(one, others[one.name]) for one in queries if one.name in others]


def limit_of(runtime: str, shrunk: bool, compared: bool = True) -> Limit:
    """Return the limits of a file.

    Args:
        runtime: name of the runtime.
        shrunk: True if the vocabulary or the weights were reduced.
        compared: True if the file is compared with another file of the same folder, False for the first file.
    """
    limit = LIMITS.get(runtime, EXACT)
    if not shrunk:
        return limit
    return Limit(limit.cosine if compared else SHRUNK.cosine, SHRUNK.lost + (limit.lost if limit != EXACT else 0))


def file_megabytes(folder: Path, runtime: str, file: str) -> float:
    """Return the megabytes of a runtime's files: all weights of PyTorch, or a graph with its external weights.

    Args:
        folder: exported folder.
        runtime: name of the runtime.
        file: its file in the folder.
    """
    path = folder / file
    graph = [path, path.with_name(path.name + ".data"), path.with_suffix(".bin")]
    files = folder.rglob("*.safetensors") if runtime == PYTORCH else iter(graph)
    return round(sum(one.stat().st_size for one in files if one.is_file()) / 1e6, 2)


def quality_lines(content: Mapping[str, Any]) -> list[str]:
    """Format the table of ``quality.json`` as lines of text, with the sets and what is beyond the limits."""
    table = quality_table(content)
    spans = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(span) for cell, span in zip(line, spans, strict=True)).rstrip() for line in table]
    lines.append(quality_sources(content))
    if not content["sets"]:
        lines.append("Retrieval was not measured. Fix: add --check SET_OR_DOCUMENTS")
    if loss := loss_line(content):
        lines.append(loss)
    return lines


def source_encoder(source: str | Path, width: int, trust_remote_code: bool = False) -> Encode:
    """Return the encode function of a model at one width, from texts and a role to (n, width) float32 unit rows.

    Args:
        source: model folder.
        width: one of its widths.
        trust_remote_code: permission to run code from the model.
    """
    encode = model_encoder(load_model(str(source), device="cpu", trust_remote_code=trust_remote_code), [width])
    return lambda texts, role: encode(texts, role)[width]


def _embed(encode: Encode, texts: list[str], checks: Sequence[CheckSet]) -> Embeddings:
    """Embed the mixed texts by role, and the queries and documents of each set."""
    rows = {role: encode(texts, role) for role in ROLES}
    for check in checks:
        for group, (members, role) in check.evalset.groups().items():
            rows[f"{check.evalset.name}/{group}"] = encode(members, role)
    return rows


def _check_rows(runtime: Runtime, rows: Embeddings, width: int) -> None:
    """Raise if embeddings have a wrong width or length, or NaN."""
    for vectors in rows.values():
        bad = int((~np.isfinite(vectors).all(axis=1)).sum())
        if bad or vectors.shape[1] != width:
            raise JasperError(
                f"{runtime.file} in {runtime.name}: wrong embeddings (got a width of {vectors.shape[1]} and {bad} rows "
                f"with NaN or infinity, expected {width} and 0). Nothing was published. Fix: export without this file"
            )
        lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
        if not np.abs(lengths - 1).max() <= LENGTH_TOLERANCE:
            raise JasperError(
                f"{runtime.file} in {runtime.name}: embeddings are not normalised (got lengths from "
                f"{lengths.min():.3f} to {lengths.max():.3f}, expected 1). Nothing was published. Fix: export without "
                "this file"
            )


def _cut(rows: Embeddings, width: int) -> Embeddings:
    """Return the first coordinates of all rows, normalised again."""
    return {name: normalise(vectors[:, :width]) for name, vectors in rows.items()}


def _rotated(rows: Embeddings, target: Embeddings) -> Embeddings:
    """Rotate the embeddings of the mixed texts to those of another model, as near as an orthogonal matrix can.

    The result equals the target if and only if all inner products do.
    """
    own, other = (np.concatenate([part[role] for role in ROLES]).astype(np.float64) for part in (rows, target))
    left, _, right = np.linalg.svd(own.T @ other, full_matrices=False)
    return {role: normalise(rows[role].astype(np.float64) @ (left @ right)) for role in ROLES}


def _cosines(rows: Embeddings, reference: Embeddings) -> dict[str, float]:
    """Return the mean and the lowest cosine of the mixed texts, in both roles."""
    values = np.concatenate([np.einsum("nd,nd->n", rows[r], reference[r], dtype=np.float64) for r in ROLES])
    return {"cosine_mean": float(values.mean()), "cosine_min": float(values.min())}


def _retrieval(checks: Sequence[CheckSet], rows: Embeddings, reference: Embeddings) -> dict[str, float]:
    """Compare retrieval with the reference: means over the sets, and the standard error of the mean loss."""
    if not checks:
        return {}
    kept, scores, lost, errors = [], [], [], []
    for check in checks:
        own, other = (
            {group: part[f"{check.evalset.name}/{group}"] for group in ("queries", "documents")}
            for part in (rows, reference)
        )
        agreement = Reference(other["queries"], other["documents"]).measure(own["queries"], own["documents"])
        kept.append(float(agreement.overlap.mean()))
        after, before = ndcg_by_query(check.evalset, own), ndcg_by_query(check.evalset, other)
        scores.append(float(after.mean()))
        difference, whole = before - after, max(float(before.mean()), 1e-9)
        lost.append(float(difference.mean()) / whole)
        errors.append(float(difference.std(ddof=1)) / np.sqrt(len(difference)) / whole if len(difference) > 1 else 1.0)
    return {
        "neighbours": float(np.mean(kept)),
        "ndcg": float(np.mean(scores)),
        "lost": float(np.mean(lost)),
        "lost_error": float(np.sqrt(np.square(errors).sum())) / len(errors),
    }


def _beyond(row: Mapping[str, Any]) -> list[str]:
    """Return the reasons to refuse a file. NaN is beyond every limit."""
    where = f"{row['runtime']} at width {row['width']}"
    reasons = []
    if row["limit_cosine"] is not None and not row["cosine_min"] >= row["limit_cosine"]:
        reasons.append(f"{where} has a cosine of {row['cosine_min']:.5f} (expected at least {row['limit_cosine']})")
    if "lost" in row:
        certain = row["lost_error"] <= LARGEST_ERROR
        if not row["lost"] <= max(row["limit_lost"], row["lost_error"] if certain else 0.0):
            excuse = "its standard error" if certain else "a set with more questions"
            reasons.append(
                f"{where} loses {100 * row['lost']:.2f} ± {100 * row['lost_error']:.2f} % of retrieval (expected at "
                f"most {100 * row['limit_lost']:g} %, or {excuse})"
            )
    return reasons


def _described(check: CheckSet) -> dict[str, Any]:
    sizes = check.evalset.sizes()
    return {"name": check.evalset.name, "kind": check.kind, **sizes, "of": check.documents}


def _speed(encode: Encode, texts: Sequence[str], checks: Sequence[CheckSet]) -> dict[str, float]:
    """Measure the milliseconds of one question and the documents a second of a batch, as medians of a few turns."""
    documents = [*(text for check in checks for text in check.evalset.documents[:BATCH]), *texts][:BATCH]

    def median(members: list[str], role: str, turns: int) -> float:
        encode(members, role)
        times = []
        for _ in range(turns):
            begin = time.perf_counter()
            encode(members, role)
            times.append(time.perf_counter() - begin)
        return statistics.median(times)

    question, batch = median([QUESTION], "query", QUESTION_TURNS), median(documents, "document", BATCH_TURNS)
    return {"question_ms": 1e3 * question, "batch_per_s": len(documents) / batch}
