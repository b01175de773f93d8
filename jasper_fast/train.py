"""Distil teachers into a student, stage by stage, and leave a model that stock sentence-transformers loads.

    python -m jasper_fast.train                                  the embedded recipe, no model hub needed
    python -m jasper_fast.train --config my.yaml                 a file of your own, or the name of a shipped recipe
    python -m jasper_fast.train --stages.0.lr 1e-4 --seed 1      any field by its dotted name
    python -m jasper_fast.train --print-config | --dry-run       what would be done

The same command again goes on where the last one stopped. The same from Python: ``jasper_fast.train(config)``.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from jasper_fast.batches import Batch, Teachers, batch_plan, check_sizes, pooled_states, stage_batches
from jasper_fast.checkpoint import Checkpoint, Position, latest_checkpoint, save_checkpoint
from jasper_fast.config import (
    Config,
    StageConfig,
    config_difference,
    dump_config,
    load_config,
    parse_overrides,
    recipe_names,
)
from jasper_fast.encode import pick_device
from jasper_fast.errors import JasperError, run_cli
from jasper_fast.log import RunLog, check_trackers, memory_gb
from jasper_fast.losses import JasperLossOutput
from jasper_fast.model import Student
from jasper_fast.pretrained import check_max_length
from jasper_fast.run_folder import RunFolder, existing_difference, open_run, what_decides
from jasper_fast.stages import (
    StageLoss,
    frozen_digest,
    learning_rate,
    make_optimizer,
    set_trained,
    trained_names,
)
from jasper_fast.step import dropout_factors, take_gradients


class Stopped(JasperError):
    """A signal asked the run to stop; a checkpoint was saved."""


@dataclass
class Work:
    """What every step of a run needs at hand."""

    config: Config
    folder: RunFolder
    device: torch.device
    student: Student
    texts: Any  # datasets.Dataset with columns text, role
    teachers: Teachers
    log: RunLog
    stop: Callable[[], bool]


def train(
    config: Config | Mapping[str, Any] | str | Path | None = None,
    *,
    out: str | Path | None = None,
    overrides: Sequence[tuple[str, Any]] = (),
) -> Path:
    """Run a recipe from wherever it stands to its end.

    Args:
        config: a Config, a mapping, a YAML file, a recipe name, or None for the embedded recipe.
        out: the run's folder; default ``runs/NAME``.
        overrides: (dotted key, value) pairs applied to the configuration.

    Returns:
        The run's folder: ``model/`` (sentence-transformers), ``report.md``, ``results.json``, ``log.jsonl``.

    Raises:
        ConfigError: every problem of the configuration at once.
        JasperError: anything else that a user can mend, before the long work where it can be known.
    """
    if not isinstance(config, Config) or overrides:
        config = load_config(config.model_dump(mode="json") if isinstance(config, Config) else config, overrides)
    with open_run(Path(out) if out is not None else Path("runs") / config.name, config) as folder:
        if folder.finished:
            print(f"{folder.path} is finished: see {folder.path / 'report.md'}; use --out DIR for a new run")
        else:
            _run(config, folder)
    return folder.path


def _run(config: Config, folder: RunFolder) -> None:
    from jasper_fast.data import prepare_texts, texts_fingerprint
    from jasper_fast.finish import finish
    from jasper_fast.teach import ensure_teachers
    from jasper_fast.teachers import describe_teacher
    from jasper_fast.vectors import describe_vectors

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise JasperError("training by several processes is not there yet; start one process without torchrun")
    check_trackers(config.log)
    for teacher in config.teachers:  # a misspelt teacher is an error now, not after the texts were built
        describe_teacher(teacher) if teacher.model is not None else describe_vectors(teacher)
    device = pick_device()
    student = build_student(config)
    _check_stages(config, student)
    texts, transductive = prepare_texts(config)
    check_sizes(config, len(texts))
    teachers = ensure_teachers(config, texts)
    _check_losses(config, teachers.width)
    student.to(device)

    checkpoint = latest_checkpoint(folder.checkpoints)
    facts = {"teachers": teachers.fingerprint, "texts": texts_fingerprint(texts), "config": what_decides(config)}
    position = _resume(checkpoint, student, facts)
    _drop_pooled(config, folder, position)
    total = sum(stage.steps for stage in config.stages)
    log = RunLog(folder.path, config, total, position.step)
    if position.step:
        log.say(f"going on from step {position.step} of {total}")
    try:
        with stop_on_signal() as stop:
            work = Work(config, folder, device, student, texts, teachers, log, stop)
            for index in range(position.stage, len(config.stages)):
                train_stage(work, index, position, checkpoint, facts)
                position = Position(position.step + config.stages[index].steps - position.stage_step, index + 1, 0)
    finally:
        log.close()
    finish(config, folder, student, build_student(config), teachers, texts, transductive, device)


def train_stage(work: Work, index: int, start: Position, checkpoint: Checkpoint | None, facts: dict[str, Any]) -> None:
    """Train one stage from ``start.stage_step`` to its end.

    Raises:
        Stopped: a signal asked for it; a checkpoint was saved first.
        JasperError: the loss or the gradient is not finite (before the update), or a frozen weight changed.
    """
    config, stage, student, log = work.config, work.config.stages[index], work.student, work.log
    names = trained_names(student, stage)
    set_trained(student, names)
    student.train()
    student.set_gradient_checkpointing(stage.gradient_checkpointing)
    optimizer = make_optimizer(student, stage)
    loss_of = StageLoss(stage, student.widths[0])
    frozen = frozen_digest(student)

    started = time.perf_counter()
    plan = batch_plan(config, index, len(work.texts), work.teachers, log.say)
    log.event("plan", stage=stage.name, seconds=time.perf_counter() - started)
    pooled = None
    if not any(name.startswith("encoder.") for name in names):  # frozen for the whole stage: pool each text once
        log.bar.set_description(f"{stage.name}: pooling once")
        folder = work.folder.path / "pooled" / stage.name
        started = time.perf_counter()
        pooled = pooled_states(
            folder, student, stage, plan, work.texts, facts["texts"], work.device, config.precision, _counter(work)
        )
        log.event("pooling", stage=stage.name, texts=len(pooled.rows), seconds=time.perf_counter() - started)
    torch.manual_seed(config.seed * 1000 + index)  # dropout: the same in every run of this seed
    if start.stage == index and start.stage_step and checkpoint is not None:
        checkpoint.load_state(optimizer)
    log.say(_describe(student, stage, names, start))

    batches = stage_batches(stage, start.stage_step, plan, work.texts, work.teachers, student, pooled)
    clock = time.perf_counter()
    for step, batch in batches:
        lr = learning_rate(stage, step)
        for group in optimizer.param_groups:
            group["lr"] = lr
        keep = dropout_factors(
            config.student.vector_dropout,
            (config.seed, index, step),
            slice(None),
            stage.batch_size,
            student.hidden_size,
            work.device,
        )
        output = take_gradients(student, batch, stage, loss_of, work.device, config.precision, keep)
        norm = gradient_norm(student, stage.clip)
        done = Position(start.step - start.stage_step + step + 1, index, step + 1)
        check_finite(stage, done, output, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        last = done.stage_step == stage.steps
        log.step(stage.name, _record(done, output, norm, lr, stage, batch, seconds, work.device), last)
        stopping = work.stop()
        if last:
            _check_frozen(student, stage, frozen)
            done = Position(done.step, index + 1, 0)
        if last or stopping or done.stage_step % config.checkpoint.every == 0:
            save_checkpoint(
                work.folder.checkpoints, done, student, None if last else optimizer, facts, config.checkpoint.keep
            )
        if last and pooled is not None:
            pooled.discard()
        if stopping and not (last and index == len(config.stages) - 1):
            raise Stopped(f"stopped after step {done.step} as asked; the same command goes on from here")


def gradient_norm(student: Student, clip: float | None) -> float:
    """The norm of the gradient over everything that trains, clipped to ``clip`` where given."""
    trained = [p for p in student.parameters() if p.grad is not None]
    return float(torch.nn.utils.clip_grad_norm_(trained, clip if clip is not None else math.inf))


def check_finite(stage: StageConfig, done: Position, output: JasperLossOutput, norm: float) -> None:
    """Stop before an update that would spoil the weights, naming step and loss part."""
    parts = {name: float(value.detach()) for name, value in output._asdict().items()}
    bad = [name for name, value in parts.items() if not math.isfinite(value) and name != "loss"]
    if bad or not math.isfinite(parts["loss"]) or not math.isfinite(norm):
        what = f"loss part {', '.join(bad)}" if bad else "the gradient" if math.isfinite(parts["loss"]) else "the loss"
        raise JasperError(
            f"stage {stage.name!r}, step {done.stage_step} (step {done.step} of the run): {what} is not finite; "
            "nothing was updated and the last checkpoint is sound. Lower the stage's lr or set clip, and start the "
            "command again with another --out"
        )


def build_student(config: Config) -> Student:
    """The student before training; its new heads depend on the seed alone."""
    torch.manual_seed(config.seed)
    return Student.build(config.student)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGINT or SIGTERM asked to stop; a second signal stops at once."""
    asked: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)
        print("\nstopping after this step (once more to stop at once)", flush=True)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals are somebody else's
        yield lambda: False
        return
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _resume(checkpoint: Checkpoint | None, student: Student, facts: dict[str, Any]) -> Position:
    if checkpoint is None:
        return Position(0, 0, 0)
    changed = "; ".join(config_difference(checkpoint.facts, facts))
    if changed:
        raise JasperError(
            f"{checkpoint.path} was trained on other texts, teacher vectors or settings ({changed}). Restore them, or "
            "use --out DIR for a new run"
        )
    checkpoint.load_model(student)
    return checkpoint.position


def _check_stages(config: Config, student: Student) -> None:
    """Impossible stages are errors now, not hours later."""
    for stage in config.stages:
        set_trained(student, trained_names(student, stage))
        check_max_length(student.encoder, stage.max_length or student.max_length)
        student.set_gradient_checkpointing(stage.gradient_checkpointing)
        student.set_gradient_checkpointing(False)


def _check_losses(config: Config, target: int) -> None:
    """Refuse heads that no loss of their stage reaches: a cosine term needs vectors of equal width.

    Args:
        target: width of the teachers' vectors.
    """
    widest = config.student.heads[0]
    for stage in config.stages:
        for width in stage.heads:
            weights = stage.weights if width == widest else stage.narrow_weights or stage.weights
            against = widest if stage.narrow_target == "self" and width != widest else target
            others = weights.similarity or weights.relative_similarity or weights.neighbourhood
            if not others and width != against:
                raise JasperError(
                    f"stage {stage.name!r} would leave its head {width} untrained: it has only a cosine loss, which "
                    f"needs equal widths, and what teaches it is {against} wide; add narrow_weights with a "
                    "similarity or neighbourhood loss, or leave the head out"
                )


def _drop_pooled(config: Config, folder: RunFolder, position: Position) -> None:
    """Delete pooled states that a killed run left behind for stages that are over."""
    kept = {stage.name for stage in config.stages[position.stage :]}
    for path in (folder.path / "pooled").glob("*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _check_frozen(student: Student, stage: StageConfig, before: str) -> None:
    if frozen_digest(student) != before:
        raise JasperError(f"stage {stage.name!r}: a frozen weight changed; this is a bug, please report it")


def _counter(work: Work) -> Callable[[int], None]:
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        work.log.bar.set_postfix_str(f"{done} texts pooled")
        if work.stop():
            raise Stopped(f"stopped after pooling {done} texts as asked; the same command goes on from here")

    return count


def _describe(student: Student, stage: StageConfig, names: list[str], start: Position) -> str:
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    where = f", from its step {start.stage_step}" if start.stage_step else ""
    return (
        f"stage {stage.name}: trains {trained:,} of {total:,} parameters ({len(names)} tensors), heads {stage.heads}, "
        f"{stage.steps} steps of {stage.batch_size}{where}"
    )


def _record(
    done: Position,
    output: JasperLossOutput,
    norm: float,
    lr: float,
    stage: StageConfig,
    batch: Batch,
    seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    parts = {name: float(value.detach()) for name, value in output._asdict().items()}
    if not (stage.weights.neighbourhood or (stage.narrow_weights and stage.narrow_weights.neighbourhood)):
        parts.pop("neighbourhood", None)
    return {
        "step": done.step,
        "stage_step": done.stage_step,
        **parts,
        "grad_norm": norm,
        "lr": lr,
        "seconds": seconds,
        "texts_per_s": stage.batch_size / seconds,
        "tokens_per_s": batch.tokens / seconds,
        "padding": 1.0 - batch.tokens / batch.padded if batch.padded else 0.0,
        "data_wait": min(1.0, batch.wait / seconds),
        "memory_gb": memory_gb(device),
    }


def describe_plan(config: Config, folder: Path) -> str:
    """What a run would do, stage by stage, with every parameter that trains; builds the student, trains nothing."""
    student = build_student(config)
    lines = [f"run {config.name} in {folder}; student {config.student.model}, heads {config.student.heads}"]
    for stage in config.stages:
        names = trained_names(student, stage)
        set_trained(student, names)
        lines.append(_describe(student, stage, names, Position(0, 0, 0)))
        lines += [f"    {name}" for name in names]
    difference = existing_difference(folder, config)
    if difference:
        lines.append("this folder was started with another configuration: " + "; ".join(difference))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jasper_fast.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", metavar="FILE|RECIPE", help="a YAML file or a shipped recipe")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default runs/RECIPE)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and leave")
    options, rest = parser.parse_known_args(argv)
    config = load_config(options.config, parse_overrides(rest))
    out = Path(options.out) if options.out else Path("runs") / config.name
    if options.print_config:
        print(dump_config(config), end="")
    elif options.dry_run:
        print(describe_plan(config, out))
    else:
        try:
            train(config, out=out)
        except Stopped as stopped:
            print(stopped)
            return 130
    return 0


if __name__ == "__main__":
    run_cli(main)
