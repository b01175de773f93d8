"""Distil teachers into a student, stage by stage, and write a model that sentence-transformers loads.

    python -m jasper_fast.train                                  the embedded recipe, without a model hub
    python -m jasper_fast.train --texts docs.jsonl --columns title,text    your documents; --teacher NAME: another one
    python -m jasper_fast.train --config my.yaml                 your own file, or the name of a shipped recipe
    python -m jasper_fast.train --stages.distil.lr 1e-4          any field by its dotted name (docs/config.md)
    python -m jasper_fast.train --print-config | --dry-run       what would be done
    python -m jasper_fast.train --finish                         export and evaluate what a stopped run has learned
    python -m jasper_fast.train --list                           the shipped recipes, and what they need
    torchrun --standalone --nproc-per-node gpu -m jasper_fast.train …    the same on every GPU (docs/scale.md)

The same command resumes after an interruption. From Python, call ``jasper_fast.train(config)``.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jasper_fast._renamed import old_names
from jasper_fast.config.load import describe_recipes, dump_config, load_arguments, load_config, recipe_names
from jasper_fast.config.overrides import ALIASES
from jasper_fast.config.run import Config
from jasper_fast.models.student import Student
from jasper_fast.training.data import Teachers, TrainingData
from jasper_fast.training.dry_run import describe_plan
from jasper_fast.training.early import check_can_finish, load_average
from jasper_fast.training.loop import train_stage
from jasper_fast.training.preflight import prepare, start
from jasper_fast.training.run.run import Run
from jasper_fast.training.run.signals import Stopped
from jasper_fast.training.stages.base import build_stage
from jasper_fast.utils.atomic import check_output_path
from jasper_fast.utils.command_line import StoreOnce
from jasper_fast.utils.errors import run_cli

__getattr__ = old_names(__name__)

__all__ = ["Stopped", "label_texts", "main", "train"]


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
    finish: bool = False,
) -> Path:
    """Run a recipe from its start, or from its last checkpoint, to its end.

    Args:
        config: a Config, a mapping, a YAML file or a recipe name. None: the embedded recipe.
        out: the run's folder. None: ``runs/NAME``.
        overrides: (dotted key, value) pairs applied to the configuration.
        finish: whether to train no more: export, evaluate and report what the last checkpoint has.

    Returns:
        the run's folder: ``model/`` (sentence-transformers), ``report.md``, ``results.json``, ``log.jsonl``.

    Raises:
        ConfigError: every problem of the configuration at once.
        Stopped: a signal asked to stop. A checkpoint was saved first.
        JasperError: anything else that a user can fix, before the long work if it can be known by then.

    Example:
        >>> folder = train("minilm-docstrings", out="runs/try-1", overrides=[("stages.distil.lr", 3e-4)])
        >>> SentenceTransformer(str(folder / "model")).encode(["a text"])
    """
    from jasper_fast.training.finish import finalize

    if not isinstance(config, Config) or overrides:
        config = load_config(config.model_dump(mode="json") if isinstance(config, Config) else config, overrides, out)
    if finish:
        check_can_finish(Path(out) if out is not None else Path("runs") / config.name)
    with Run.open(config, out) as run:  # folder lock, ranks, signals
        if run.is_finished():
            return run.report_finished()
        student, data = run.phases.call("texts", prepare, run.config, run.ranks.world)  # checked, then read
        start(run, student, data)  # rejects a changed configuration, texts or teachers; plans the steps
        config = run.config
        labels = run.phases.call("teacher", label_texts, run, student, data)
        with run.resume(student) as position:  # checkpoint, log
            run.log_texts(data, position)
            if finish:
                load_average(run, student, position)
            for index in range(position.stage, position.stage if finish else len(config.stages)):
                train_stage(run, student, build_stage(config, index, data, labels), position)
                position = position.after(config.stages[index].steps)
        finalize(run, student, data, labels, position)  # export, evaluate, report
    return run.path


def label_texts(run: Run, student: Student, data: TrainingData) -> Teachers:
    """Return the teachers' embeddings of the training texts, and compute those that the cache does not have.

    Args:
        run: the run.
        student: the untrained student, by which the order of precomputed embeddings is checked.
        data: the training data.

    Raises:
        JasperError: a teacher cannot be used.
    """
    from jasper_fast.teachers.label import ensure_teachers

    return ensure_teachers(run.config, data.texts, progress=run.ranks.is_main, student=student)


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="jasper-fast train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", metavar="FILE|RECIPE", action=StoreOnce, help="a YAML file or a shipped recipe")
    parser.add_argument("--out", metavar="DIR", action=StoreOnce, help="the run's folder (default runs/RECIPE)")
    shown = "print the resolved configuration with a comment for each field, and leave"
    parser.add_argument("--print-config", action="store_true", help=shown)
    once = parser.add_mutually_exclusive_group()  # a dry run plans training, and --finish trains no more
    once.add_argument("--dry-run", action="store_true", help="check everything, print the plan and leave")
    once.add_argument("--finish", action="store_true", help="train no more; export and evaluate the last checkpoint")
    parser.add_argument("-v", "--verbose", action="store_true", help="with --dry-run: name every trained parameter")
    parser.add_argument("--list", action="store_true", help="describe the shipped recipes and leave")
    options, rest = parser.parse_known_args(argv)
    names = ("config", "out", "print-config", "dry-run", "verbose", "finish", "list", *ALIASES)
    config = load_arguments(options.config, rest, names, options.out)
    out = Path(options.out) if options.out is not None else Path("runs") / config.name
    if options.list:
        print(describe_recipes())
    elif options.print_config:
        print(dump_config(config, comments=True), end="")
    elif options.dry_run:
        check_output_path(out)
        print(describe_plan(config, out, options.verbose))
    else:
        try:
            train(config, out=out, finish=options.finish)
        except Stopped as stopped:
            print(stopped)
            return 130
    return 0


if __name__ == "__main__":
    run_cli(main, resumes=True)
