"""Distil teachers into a student, stage by stage, and leave a model that stock sentence-transformers loads.

    python -m jasper_fast.train                                  the embedded recipe, no model hub needed
    python -m jasper_fast.train --config my.yaml                 a file of your own, or the name of a shipped recipe
    python -m jasper_fast.train --stages.0.lr 1e-4 --seed 1      any field by its dotted name
    python -m jasper_fast.train --print-config | --dry-run       what would be done
    torchrun --standalone --nproc-per-node gpu -m jasper_fast.train …    the same on every GPU (docs/scale.md)

The same command again goes on where the last one stopped. The same from Python: ``jasper_fast.train(config)``.
"""

from __future__ import annotations

import argparse
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from jasper_fast.average import take_average
from jasper_fast.batches import Batch, Teachers, batch_plan, pooled_states, stage_batches
from jasper_fast.checkpoint import Checkpoint, Position, Saver, latest_checkpoint
from jasper_fast.checks import bad_texts, check_frozen, is_finite, not_finite
from jasper_fast.command_line import Once
from jasper_fast.config import (
    Config,
    StageConfig,
    config_difference,
    dump_config,
    load_arguments,
    load_config,
    recipe_names,
)
from jasper_fast.encode import pick_device
from jasper_fast.env import code_digest
from jasper_fast.errors import JasperError, run_cli
from jasper_fast.files import check_place
from jasper_fast.image_data import Images
from jasper_fast.log import RunLog, SilentLog, Tracker, memory_gb, start_trackers
from jasper_fast.losses import AnyOutput
from jasper_fast.model import Student
from jasper_fast.output import tolerant_output
from jasper_fast.prepare import build_student, check_disk, describe_plan, describe_stage, prepare
from jasper_fast.ranks import Ranks, join_ranks
from jasper_fast.run_folder import RunFolder, open_run, stored_difference, what_decides
from jasper_fast.sharding import collect, is_sharded, load_weights, shard, whole
from jasper_fast.stages import StageLoss, frozen_digest, learning_rate, make_optimizer, set_trained, trained_names
from jasper_fast.starts import PRINCIPAL_ROWS, start_at_principal_axes
from jasper_fast.step import (
    Shares,
    dropout_factors,
    graph_bytes_per_token,
    is_out_of_memory,
    memory_advice,
    take_gradients,
)
from jasper_fast.telemetry import Telemetry
from jasper_fast.vision_batches import caption_plan, caption_targets, vision_batches
from jasper_fast.vision_loss import VisionLoss


class Stopped(JasperError):
    """A signal asked the run to stop; a checkpoint was saved."""


@dataclass
class Work:
    """What every step of a run needs at hand."""

    config: Config
    folder: RunFolder
    device: torch.device
    ranks: Ranks
    student: Student
    texts: Any  # datasets.Dataset with columns text, role
    images: Images | None  # for vision stages
    teachers: Teachers
    log: RunLog
    saver: Saver
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
    path = Path(out) if out is not None else Path("runs") / config.name
    # The first rank holds the run's folder, and its trackers, until the end.
    with tolerant_output(), leave_on_sigterm(), ExitStack() as held:
        with join_ranks(config.parallel.timeout) as ranks:
            given = config.model_dump(mode="json", exclude={"log"})
            ranks.agree({**given, "code": code_digest(), "torch": torch.__version__, "out": str(path)})
            folder = ranks.lead(lambda: held.enter_context(open_run(path, config)))
            if ranks.lead(lambda: folder.finished):
                if ranks.first:
                    print(f"{path} is finished: see {path / 'report.md'}; use --out DIR for a new run")
                return path
            finish = _run(config, folder, ranks, held)
        if ranks.first:
            finish()  # alone: the other ranks have left
    return path


def _run(config: Config, folder: RunFolder, ranks: Ranks, held: ExitStack) -> Callable[[], None]:
    """Train; returns what is left to do for one process, from the export to the report."""
    from jasper_fast.cache import joined_fingerprint
    from jasper_fast.data import texts_fingerprint
    from jasper_fast.finish import finish
    from jasper_fast.teach import ensure_teachers, teacher_caches

    began = time.perf_counter()
    device = pick_device()
    prepared = prepare(config, ranks.world)
    student, texts, transductive, images, kept = prepared
    checkpoint = ranks.lead(lambda: latest_checkpoint(folder.checkpoints))
    begin = checkpoint.position.stage if checkpoint is not None else 0
    ranks.lead(lambda: check_disk(config, folder.path, prepared, begin))
    facts: dict[str, Any] = {
        "teachers": joined_fingerprint(teacher_caches(config, texts)),
        "texts": texts_fingerprint(texts),
        "config": what_decides(config),
    }
    if images is not None:
        facts["images"] = images.fingerprint
    if config.losses.scope == "local":
        facts["ranks"] = ranks.world  # it decides what a loss compares
    ranks.agree(facts)
    _check_unchanged(checkpoint, facts, config)
    trackers: list[Tracker] = []  # begun before the long work: they may want a login
    ranks.lead(lambda: trackers.extend(held.enter_context(start_trackers(folder.path, config))))
    teachers = ensure_teachers(config, texts, progress=ranks.first, student=student)
    if config.parallel.mode == "fsdp" and ranks.world > 1:
        shard(student, device, ranks.world)
    else:
        student.to(device)

    position = _resume(checkpoint, student)
    if ranks.first:
        _drop_pooled(config, folder, position)
    total = sum(stage.steps for stage in config.stages)
    log = RunLog(folder.path, config, total, position.step, trackers) if ranks.first else SilentLog()
    log.event("preparation", seconds=time.perf_counter() - began)
    if position.step:
        log.say(f"going on from step {position.step} of {total}")
    saver = Saver(folder.checkpoints, config.checkpoint.keep, ranks.first)
    try:
        with stop_on_signal() as stop:
            work = Work(config, folder, device, ranks, student, texts, images, teachers, log, saver, stop)
            for index in range(position.stage, len(config.stages)):
                train_stage(work, index, position, checkpoint, facts)
                position = Position(position.step + config.stages[index].steps - position.stage_step, index + 1, 0)
    finally:
        try:
            saver.close()
        finally:
            log.close()
    trained = _together(config, student, ranks)
    pictures = None if images is None or kept is None else (images, kept)
    return lambda: finish(
        config, folder, trained, build_student(config), teachers, texts, transductive, device, pictures
    )


def train_stage(work: Work, index: int, start: Position, checkpoint: Checkpoint | None, facts: dict[str, Any]) -> None:
    """Train one stage from ``start.stage_step`` to its end.

    Raises:
        Stopped: a signal asked for it; a checkpoint was saved first.
        JasperError: the loss or the gradient is not finite (before the update), a frozen weight changed, memory did
            not suffice, or a rank was lost.
    """
    config, stage, student, log, ranks = work.config, work.config.stages[index], work.student, work.log, work.ranks
    images: Any = work.images
    names = trained_names(student, stage)
    set_trained(student, names)
    student.train()
    student.set_gradient_checkpointing(stage.gradient_checkpointing)
    optimizer = make_optimizer(student, stage)
    together = config.losses.scope == "global"
    mine, counts = ranks.rows(stage.batch_size), ranks.counts(stage.batch_size)
    shared = (ranks.group, counts) if together else (None, None)
    frozen = frozen_digest(student)

    started = time.perf_counter()
    for turn in ("first", "others"):  # the first rank finds neighbours, the others find what it found
        if ranks.first == (turn == "first"):
            source = work.texts if stage.vision is None else images
            plan = batch_plan(config, index, source, work.teachers, log.say)
        ranks.gather(None)
    log.event("plan", stage=stage.name, seconds=time.perf_counter() - started)
    pooled = None
    folder = work.folder.path / "pooled" / stage.name
    started = time.perf_counter()
    with memory_advice(student, None, stage, work.device, config.precision):
        if stage.vision is not None:
            log.bar.set_description(f"{stage.name}: pooling captions once")
            captions = caption_plan(images, plan, config.seed, index)
            targets = caption_targets(
                folder, student, stage, images, captions, work.device, config.precision, _counter(work), ranks
            )
            pooled = targets.states
            told_from = targets.every(images) if stage.vision.among == "all" else None
        elif not any(name.startswith("encoder.") for name in names):  # frozen for the whole stage: pool each text once
            log.bar.set_description(f"{stage.name}: pooling once")
            pooled = pooled_states(
                folder,
                student,
                stage,
                plan,
                work.texts,
                facts["texts"],
                work.device,
                config.precision,
                _counter(work),
                ranks,
            )
    if pooled is not None:
        log.event("pooling", stage=stage.name, texts=len(pooled.rows), seconds=time.perf_counter() - started)
    if pooled is not None and stage.narrow_start == "principal" and not (start.stage == index and start.stage_step):
        start_at_principal_axes(student, stage, pooled.read(pooled.rows[:PRINCIPAL_ROWS]), config.seed)
    torch.manual_seed(config.seed * 1000 + index)  # what an encoder of its own kind may draw
    if start.stage == index and start.stage_step and checkpoint is not None:
        checkpoint.load_state(optimizer)
    log.say(describe_stage(student, stage, names, start.stage_step))

    if stage.vision is not None:
        seeds = (config.seed, index)
        batches = vision_batches(stage, seeds, start.stage_step, plan, images, targets, student, ranks, together)
        loss_of: Any = VisionLoss(stage, shared[0], shared[1], told_from)
    else:
        loss_of = StageLoss(stage, student.widths[0], *shared)
        batches = stage_batches(stage, start.stage_step, plan, work.texts, work.teachers, student, pooled, ranks)
    telemetry, unread, clock = Telemetry(work.device), 0, time.perf_counter()
    for step, batch in batches:
        done = Position(start.step - start.stage_step + step + 1, index, step + 1)
        ranks.meet(f"stage {stage.name!r}, step {done.stage_step}")
        if step == start.stage_step:
            _measure(work, stage, batch)
        lr, shares = learning_rate(stage, step), Shares(work.device)
        for group in optimizer.param_groups:
            group["lr"] = lr
        keep = dropout_factors(
            config.student.vector_dropout,
            (config.seed, index, step),
            mine,
            stage.batch_size,
            student.hidden_size,
            work.device,
        )
        advice = partial(memory_advice, student, batch, stage, work.device, config.precision)
        with ranks.watch(f"stage {stage.name!r}, step {done.stage_step}"), advice():
            output, vectors = take_gradients(
                student, batch, stage, loss_of, work.device, config.precision, keep, shares
            )
            with shares.part("communication"):
                ranks.average_gradients(student.parameters())
            with shares.part("optimiser"):
                norm = gradient_norm(student, stage.clip)
                numbers = _read(output, norm)
            with shares.part("communication"):
                numbers, tokens, padded, stopping, bad = _exchange(ranks, numbers, batch, work.stop())
        if bad:
            spoilt = bad_texts(vectors, batch.teacher.to(work.device))
            raise not_finite(stage, done.stage_step, done.step, numbers, batch, spoilt, ranks)
        with advice(), shares.part("optimiser"):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del output, vectors

        seconds, clock = time.perf_counter() - clock, time.perf_counter()
        last = done.stage_step == stage.steps
        unread += counts[ranks.rank]  # texts since the GPU's last reading
        reading: dict[str, float] = {}
        if last or done.stage_step % config.log.every == 0:
            reading, unread = telemetry.read(unread), 0
        speed = {
            "seconds": seconds,
            "texts_per_s": stage.batch_size / seconds,
            "tokens_per_s": tokens / seconds,
            "padding": 1.0 - tokens / padded if padded else 0.0,
            "data_wait": min(1.0, batch.wait / seconds),
            "memory_gb": memory_gb(work.device),
            **shares.of(seconds),
            **reading,
        }
        log.step(stage.name, {"step": done.step, "stage_step": done.stage_step, **numbers, "lr": lr, **speed}, last)
        if last:
            take_average(optimizer)
            check_frozen(student, stage, frozen)
            done = Position(done.step, index + 1, 0)
        if last or stopping or done.stage_step % config.checkpoint.every == 0:
            work.saver.save(done, student, None if last else optimizer, facts)
        if last and pooled is not None:
            work.saver.wait()  # what the pooled states were for is safe
            pooled.discard()
        if stopping and not (last and index == len(config.stages) - 1):
            ranks.lead(work.saver.wait)  # one that left before would have the others ended while they write
            raise Stopped(f"stopped after step {done.step} as asked; the same command goes on from here")


def gradient_norm(student: Student, clip: float | None) -> torch.Tensor:
    """The norm of the gradient over everything that trains, clipped to ``clip`` where given; a scalar tensor."""
    trained = [p for p in student.parameters() if p.grad is not None]
    return whole(torch.nn.utils.clip_grad_norm_(trained, clip if clip is not None else math.inf))


def _read(output: AnyOutput, norm: torch.Tensor) -> dict[str, float]:
    """The step's numbers on the host, in a single read."""
    scalars = {**output._asdict(), "grad_norm": norm}
    return dict(zip(scalars, torch.stack([v.detach().double() for v in scalars.values()]).tolist(), strict=True))


def _exchange(
    ranks: Ranks, numbers: dict[str, float], batch: Batch, stop: bool
) -> tuple[dict[str, float], float, float, bool, bool]:
    """What all ranks must know before the update: mean losses, tokens, whether to stop, whether a number is none."""
    finite = is_finite(numbers)
    sent = [not finite, stop, batch.tokens, batch.padded, *(numbers.values() if finite else [0.0] * len(numbers))]
    bad, stopping, tokens, padded, *sums = ranks.add([float(value) for value in sent])
    if not bad:
        numbers = dict(zip(numbers, (total / ranks.world for total in sums), strict=True))
    return numbers, tokens, padded, bool(stopping), bool(bad)


def _measure(work: Work, stage: StageConfig, batch: Batch) -> None:
    """Log what the graph of one text holds, and what checkpointing saves of it and costs, where that is asked for.

    What does not fit is left out.
    """
    if batch.texts is None or stage.vision is not None or is_sharded(work.student):
        return
    student = work.student
    ids: Any = batch.texts.token_ids[0][0]  # the longest one
    facts: dict[str, float] = {
        "passes": len(batch.texts.token_ids),
        "tokens_of_a_pass": max(len(part) * max(map(len, part)) for part in batch.texts.token_ids),
    }

    def measure(fact: str) -> None:
        try:
            facts[fact] = graph_bytes_per_token(student, ids, work.device, work.config.precision)
        except (RuntimeError, MemoryError) as error:  # what is spared may be what would not fit
            if not is_out_of_memory(error):
                raise

    measure("graph_bytes_per_token")
    if stage.gradient_checkpointing:
        student.set_gradient_checkpointing(False)
        measure("graph_bytes_per_token_without_checkpointing")
        facts["layers_computed_twice"] = student.set_gradient_checkpointing(stage.gradient_checkpointing)
    work.log.event("activations", stage=stage.name, encoded_twice=stage.gradient_caching, **facts)


def _together(config: Config, student: Student, ranks: Ranks) -> Student:
    """The trained student, on the first rank in one piece."""
    if not is_sharded(student):
        return student
    weights = collect(student.state_dict(), ranks.first)
    if ranks.first:
        student = build_student(config)
        load_weights(student, weights)
    return student


@contextmanager
def leave_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does; while steps are taken :func:`stop_on_signal` does more."""
    try:
        old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    except ValueError:  # not the main thread: signals are somebody else's
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


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


def _check_unchanged(checkpoint: Checkpoint | None, facts: dict[str, Any], config: Config) -> None:
    """Reject texts, teachers or settings that differ from the checkpoint's, before the teachers' work.

    Raises:
        JasperError: something differs, or the checkpoint's settings are of a version that this one does not understand.
    """
    if checkpoint is None:
        return
    before, now = ({key: fact for key, fact in of.items() if key != "config"} for of in (checkpoint.facts, facts))
    settings = stored_difference(checkpoint.facts.get("config"), config, f"{checkpoint.path} (its settings)")
    changed = "; ".join(config_difference(before, now) + settings)
    if changed:
        raise JasperError(
            f"{checkpoint.path} was trained on other texts, teacher vectors or settings ({changed}). Fix: restore "
            "them, or use --out DIR for a new run"
        )


def _resume(checkpoint: Checkpoint | None, student: Student) -> Position:
    if checkpoint is None:
        return Position(0, 0, 0)
    checkpoint.load_model(student)
    return checkpoint.position


def _drop_pooled(config: Config, folder: RunFolder, position: Position) -> None:
    """Delete pooled states that a killed run left behind for stages that are over."""
    kept = {stage.name for stage in config.stages[position.stage :]}
    for path in (folder.path / "pooled").glob("*"):
        if path.name not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _counter(work: Work) -> Callable[[int], None]:
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        work.log.bar.set_postfix_str(f"{done} texts pooled")
        if work.stop():
            raise Stopped(f"stopped after pooling {done} texts as asked; the same command goes on from here")

    return count


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m jasper_fast.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"recipes: {', '.join(recipe_names())}",
    )
    parser.add_argument("--config", metavar="FILE|RECIPE", action=Once, help="a YAML file or a shipped recipe")
    parser.add_argument("--out", metavar="DIR", action=Once, help="the run's folder (default runs/RECIPE)")
    parser.add_argument("--print-config", action="store_true", help="print the resolved configuration and leave")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan and leave")
    options, rest = parser.parse_known_args(argv)
    config = load_arguments(options.config, rest, ("config", "out", "print-config", "dry-run"))
    out = Path(options.out) if options.out is not None else Path("runs") / config.name
    if options.print_config:
        print(dump_config(config), end="")
    elif options.dry_run:
        check_place(out)
        print(describe_plan(config, out))
    else:
        try:
            train(config, out=out)
        except Stopped as stopped:
            print(stopped)
            return 130
    return 0


if __name__ == "__main__":
    run_cli(main, resumes=True)
