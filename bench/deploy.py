"""Measure every exported file of some models: embeddings, retrieval, speed and size.

    python -m bench deploy runs/minilm-docstrings my-adapted --sets DATA/cranfield DATA/cisi DATA/vaswani --folder work

For each model, form and width, it exports the files that this machine can open, and compares them with PyTorch. Times
are medians of interleaved turns, so their ratios are comparable. Exports are kept in ``--folder``, and reused.
``--small-mb 10 --vocabulary texts.jsonl`` measures an export of at most that size in place of the forms.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.common.environment import environment
from bench.common.measure import medians
from jasper_fast import export
from jasper_fast.config.data import EvalConfig
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.data.eval_sets import RetrievalSet
from jasper_fast.exporting.check_sets import JUDGED, CheckSet, fewer_documents
from jasper_fast.exporting.quality import QUESTION, compare_runtimes, source_encoder
from jasper_fast.exporting.runtimes import GGUF, PYTORCH, Runtime, open_runtimes
from jasper_fast.exporting.shrink import MB
from jasper_fast.exporting.token_table import folder_bytes
from jasper_fast.models.folder import FACTS_FILE, model_folder, read_json
from jasper_fast.models.heads import routes_of
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

FLAT, PREFIX, SMALL = "flat", "prefix", "small"
FORMS = (FLAT, PREFIX)  # a student without a head is given as a model, and "flat" is then its headless form
FILES = ("onnx", "int8", "openvino", "gguf")
BATCH = 32  # documents of a batch


def judged_sets(paths: Sequence[str], queries: int | None, documents: int | None) -> list[CheckSet]:
    """Read BEIR folders.

    Args:
        paths: the folders.
        queries: largest number of queries of a set. None: all.
        documents: largest number of documents of a set. None: all.

    Raises:
        JasperError: a set is missing or is no retrieval set.
    """
    checks = []
    for evalset in load_evals([EvalConfig(path=path, limit=queries) for path in paths]):
        if not isinstance(evalset, RetrievalSet):
            raise JasperError(f"--sets: {evalset.name} has no retrieval (got {evalset.kind}). Fix: give BEIR folders")
        checks.append(CheckSet(fewer_documents(evalset, documents), JUDGED, len(evalset.documents)))
    return checks


def exported(source: Path, form: str, width: int, options: argparse.Namespace) -> Path:
    """Export a model in one form, unless the folder for exports has this one already.

    Args:
        source: model folder.
        form: form of the export: "flat", "prefix" or "small".
        width: width of the embeddings. The form "prefix" has the widest.
        options: parsed arguments of the command.
    """
    size = f"{SMALL}{options.small_mb:g}" if form == SMALL else form
    out = options.folder / "-".join([*source.resolve().parts[-2:], size, str(width)])
    if not out.is_dir():
        chosen = ["--form", form] if form == PREFIX else ["--width", str(width)]
        if form == SMALL:
            texts = [argument for path in options.vocabulary for argument in ("--vocabulary", path)]
            chosen += ["--max-mb", str(options.small_mb), "--allow-loss", *texts]  # the loss is measured here
        else:
            chosen += [f"--{name}" for name in options.files]
        export.main([str(source), *chosen, "--out", str(out)])
    return out


def speeds(runtimes: Sequence[Runtime], documents: list[str], repeats: int) -> list[dict[str, float]]:
    """Measure one question and a batch in all runtimes alternately, with the ratio to PyTorch.

    Args:
        runtimes: opened files of one model, with PyTorch.
        documents: texts of the batch.
        repeats: turns of each runtime.
    """
    question = medians([lambda r=r: r.encode([QUESTION], "query") for r in runtimes], repeats)  # type: ignore[misc]
    batch = medians([lambda r=r: r.encode(documents, "document") for r in runtimes], repeats)  # type: ignore[misc]
    base = next(at for at, runtime in enumerate(runtimes) if runtime.name == PYTORCH)
    return [
        {
            "question_ms": 1e3 * one,
            "question_ratio": question[base] / one,
            "batch_per_s": len(documents) / many,
            "batch_ratio": batch[base] / many,
        }
        for one, many in zip(question, batch, strict=True)
    ]


def measure(model: str, form: str, widths: Sequence[int], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each width and runtime of a form of a model.

    Args:
        model: run folder, or folder of a model.
        form: "flat", "prefix" or "small".
        widths: widths, the widest first. "prefix" has all in one export.
        options: parsed arguments of the command.
    """
    source = model_folder(model)
    checks = judged_sets(options.sets, options.queries, options.documents)
    texts = [text for check in checks for text in check.evalset.documents[:BATCH]][:BATCH] or [QUESTION] * BATCH
    rows = []
    for group in [list(widths)] if form == PREFIX else [[width] for width in widths]:
        folder = exported(source, form, group[0], options)
        threads = options.threads or torch.get_num_threads()
        runtimes = open_runtimes(folder, threads=threads)
        timed, facts = runtimes, {}
        if form == SMALL:
            timed = [*open_runtimes(exported(source, FLAT, group[0], options), [PYTORCH], threads=threads), *runtimes]
            facts = {"folder_mb": folder_bytes(folder) / MB, "steps": read_json(folder / FACTS_FILE)["shrunk"]}
        encode = source_encoder(source, group[0])
        content = compare_runtimes(encode, folder, runtimes, group, form=form, checks=checks, shrunk=form == SMALL)
        times = speeds(timed, texts, options.repeats)[len(timed) - len(runtimes) :]
        by_name = dict(zip([one.name for one in runtimes], times, strict=True))
        for row in content["rows"]:
            kept = {key: value for key, value in row.items() if not key.startswith("limit_")}
            if row["runtime"] == GGUF:
                kept["check"] = read_json(folder / FACTS_FILE)["gguf"]  # with the tokens of PyTorch
            rows.append({"model": Path(model).name, "form": form, **kept, **by_name[row["runtime"]], **facts})
            print(line(rows[-1]), flush=True)
    return rows


def line(row: Mapping[str, Any]) -> str:
    """Return a row as a line of the Markdown table."""
    lost = f"{100 * row['lost']:.2f} ± {100 * row['lost_error']:.2f}" if "lost" in row else ""
    cells = [row["model"], row["form"], row["width"], row["runtime"], f"{row['mb']:.1f}"]
    cells += [f"{row['cosine_mean']:.5f}", f"{row['cosine_min']:.5f}"]
    cells += [f"{100 * row['ndcg']:.2f}" if "ndcg" in row else "", lost]
    cells += [f"{row['question_ms']:.1f} ({row['question_ratio']:.2f} ×)"]
    cells += [f"{row['batch_per_s']:.0f} ({row['batch_ratio']:.2f} ×)"]
    return f"| {' | '.join(map(str, cells))} |"


def head() -> str:
    """Return the head of the table."""
    names = ["model", "form", "width", "runtime", "MB", "cosine", "lowest", "nDCG@10", "lost, %"]
    names += ["one question, ms", "texts/s in a batch"]
    return f"| {' | '.join(names)} |\n| {' | '.join(['---'] * len(names))} |"


def main(argv: list[str]) -> int:
    """Run the benchmark and print its table."""
    parser = argparse.ArgumentParser(prog="python -m bench deploy", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", help="run folders, or folders of models")
    parser.add_argument("--sets", nargs="*", default=[], metavar="FOLDER", help="BEIR folders")
    parser.add_argument("--folder", required=True, type=Path, help="folder for exports, so that they are reused")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[FLAT], help="forms (default: flat)")
    parser.add_argument("--small-mb", type=float, metavar="MB", help="measure exports of at most this size instead")
    parser.add_argument("--vocabulary", nargs="+", default=[], metavar="TEXTS", help="texts for --small-mb")
    parser.add_argument("--widths", nargs="+", type=int, help="widths (default: all of the model)")
    parser.add_argument("--files", nargs="*", choices=FILES, default=["onnx", "int8"], help="graphs to add")
    parser.add_argument("--queries", type=int, help="largest number of queries of a set (default: all)")
    parser.add_argument("--documents", type=int, help="largest number of documents of a set (default: all)")
    parser.add_argument("--repeats", type=int, default=9, help="turns of each timing (default: 9)")
    parser.add_argument("--threads", type=int, help="threads of every runtime (default: those of torch)")
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(argv)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(head())
    rows: list[dict[str, Any]] = []
    for model in options.models:
        widths = sorted(options.widths or routes_of(model_folder(model)), reverse=True)
        for form in options.forms if options.small_mb is None else [SMALL]:
            rows += measure(model, form, widths, options)
    if options.json:
        settings = {key: getattr(options, key) for key in ("queries", "documents", "repeats", "threads")}
        settings |= {key: [Path(path).name for path in getattr(options, key)] for key in ("sets", "vocabulary")}
        settings["small_mb"] = options.small_mb
        result = {"environment": environment(), "settings": settings, "rows": rows}
        write_atomic(options.json, json.dumps(result, indent=1) + "\n")
    return 0
