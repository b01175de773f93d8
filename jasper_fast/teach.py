"""Cache the teacher embeddings of a run's training texts.

    python -m jasper_fast.teach [--config FILE|RECIPE] [--key.sub value …]
    python -m jasper_fast.teach … --texts texts.parquet                    # only write the texts, to embed elsewhere
    torchrun --standalone --nproc-per-node gpu -m jasper_fast.teach …      # split the shards between processes

Rerun the same command to resume. Embeddings are reused from the caches of other datasets with the same teacher.
Training runs this step by itself if embeddings are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jasper_fast._renamed import old_names
from jasper_fast.config.load import load_arguments
from jasper_fast.data.prepare import prepare_texts
from jasper_fast.distributed.ranks import join_ranks
from jasper_fast.teachers.label import check_teachers, ensure_teachers, write_texts
from jasper_fast.utils.atomic import check_file
from jasper_fast.utils.command_line import StoreOnce
from jasper_fast.utils.errors import JasperError, run_cli

__getattr__ = old_names(__name__)


def main(argv: list[str]) -> int:
    """Build the training texts of a configuration and cache the embeddings of all its teachers."""
    parser = argparse.ArgumentParser(prog="python -m jasper_fast.teach", description=main.__doc__)
    parser.add_argument(
        "--config", action=StoreOnce, help="YAML file or name of a recipe (default: the embedded recipe)"
    )
    parser.add_argument(
        "--texts",
        metavar="FILE.parquet",
        action=StoreOnce,
        help="only write the training texts to this file, in the row order of precomputed embeddings",
    )
    args, rest = parser.parse_known_args(argv)
    config = load_arguments(args.config, rest, ("config", "texts"))
    if args.texts is None:
        check_teachers(config)
    elif not args.texts.endswith(".parquet"):
        raise JasperError(f"--texts: not a parquet file (got {args.texts!r}). Fix: give a name that ends with .parquet")
    else:
        check_file(args.texts)
    with join_ranks(config.parallel.timeout) as ranks:
        prepared = prepare_texts(config)
        texts = prepared.texts
        if ranks.is_main:
            print(f"{len(texts)} training texts ({config.data.cache})")
            for name in prepared.transductive:
                print(f"texts of the evaluation set {name} are among them. Its scores will be transductive")
        if args.texts is not None:
            ranks.on_main(lambda: write_texts(texts, Path(args.texts)))
            if ranks.is_main:
                print(f"{args.texts}: written. Next: add a column `vector`, and set teachers: [{{vectors: FILE}}]")
            return 0
        vectors = ensure_teachers(config, texts)
    if ranks.is_main:
        print(f"{len(vectors)} target embeddings of width {' + '.join(map(str, vectors.widths))} are ready")
    return 0


if __name__ == "__main__":
    run_cli(main, resumes=True)
