"""Cache the teacher embeddings of a run's training texts.

    python -m jasper_fast.teach [--config FILE|RECIPE] [--key.sub value …]
    python -m jasper_fast.teach … --texts texts.jsonl                      # only write the texts, to embed elsewhere
    python -m jasper_fast.teach … --missing missing.jsonl                  # the same, for texts without an embedding
    torchrun --standalone --nproc-per-node gpu -m jasper_fast.teach …      # split the shards between processes

Rerun the same command to resume. Embeddings are reused from the caches of other datasets with the same teacher.
Training runs this step by itself if embeddings are missing.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jasper_fast._renamed import old_names
from jasper_fast.config.load import load_arguments
from jasper_fast.config.run import Config
from jasper_fast.data.prepare import prepare_texts
from jasper_fast.distributed.ranks import join_ranks
from jasper_fast.teachers.label import check_teachers, ensure_teachers
from jasper_fast.teachers.text_files import check_format, missing_texts, write_texts
from jasper_fast.utils.atomic import check_file
from jasper_fast.utils.command_line import StoreOnce
from jasper_fast.utils.errors import JasperError, run_cli

if TYPE_CHECKING:
    from datasets import Dataset

__getattr__ = old_names(__name__)


def main(argv: list[str]) -> int:
    """Build the training texts of a configuration and cache the embeddings of all its teachers."""
    parser = argparse.ArgumentParser(prog="jasper-fast teach", description=main.__doc__)
    parser.add_argument(
        "--config", action=StoreOnce, help="YAML file or name of a recipe (default: the embedded recipe)"
    )
    parser.add_argument(
        "--texts",
        metavar="FILE",
        action=StoreOnce,
        help="only write the training texts to this .jsonl or .parquet file; the teachers need not exist yet",
    )
    parser.add_argument(
        "--missing",
        metavar="FILE",
        action=StoreOnce,
        help="only write the training texts that lack a precomputed embedding to this .jsonl or .parquet file",
    )
    args, rest = parser.parse_known_args(argv)
    config = load_arguments(args.config, rest, ("config", "texts", "missing"))
    if args.texts is not None and args.missing is not None:
        raise JasperError("--texts and --missing cannot be used together. Fix: give one of them")
    option, file = ("--missing", args.missing) if args.missing is not None else ("--texts", args.texts)
    if file is None:
        check_teachers(config)
    else:
        check_format(option, file)
        check_file(file)
    with join_ranks(config.parallel.timeout) as ranks:
        prepared = prepare_texts(config)
        texts = prepared.texts
        if ranks.is_main:
            print(f"{len(texts)} training texts ({config.data.cache})")
            for name in prepared.transductive:
                print(f"texts of the evaluation set {name} are among them. Its scores will be transductive")
        if file is not None:
            ranks.on_main(lambda: _write(config, texts, Path(file), missing=option == "--missing"))
            return 0
        vectors = ensure_teachers(config, texts)
    if ranks.is_main:
        print(f"{len(vectors)} target embeddings of width {' + '.join(map(str, vectors.widths))} are ready")
    return 0


def _write(config: Config, texts: Dataset, file: Path, *, missing: bool) -> None:
    """Write all training texts, or those without an embedding, and print what to do with the file."""
    chosen = missing_texts(texts, config) if missing else texts
    if not len(chosen):
        print("every training text has an embedding; no file was written")
        return
    write_texts(chosen, file, config)
    names = [teacher.vectors for teacher in config.teachers if teacher.vectors is not None]
    print(f"{len(chosen)} texts written to {file.resolve()}")
    if names and names[0].lower().endswith(".npy"):  # rows without columns
        print(f"Next: embed the column `text`, and save row i for text i with numpy.save as {names[0]}.")
        print("Keep the order of the texts. A .jsonl or .parquet file with a column `text` or `digest` may have any.")
        return
    print("Next: embed the column `text`, and add the result to each row as a column `embedding`.")
    if missing:
        print(
            f"Then put the new file beside the old one in a folder, and set `vectors` to the folder (now {names[0]})."
        )
    else:
        print(f"Then save the rows as {names[0] if names else 'FILE, and set teachers: [{vectors: FILE}]'}.")


if __name__ == "__main__":
    run_cli(main, resumes=True)
