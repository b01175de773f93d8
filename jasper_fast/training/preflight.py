"""What a run needs before its first step. Whatever can be known to be wrong by then is an error here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from jasper_fast.batches import check_sizes
from jasper_fast.checks import check_stages
from jasper_fast.config import Config, StageConfig
from jasper_fast.errors import Problems
from jasper_fast.files import check_room, check_writable
from jasper_fast.log import check_trackers
from jasper_fast.model import Student
from jasper_fast.run_folder import existing_difference
from jasper_fast.stages import set_trained, trained_names

if TYPE_CHECKING:
    from datasets import Dataset

    from jasper_fast.image_data import Images


class Prepared(NamedTuple):
    """Everything but the teachers' vectors."""

    student: Student
    texts: Dataset
    transductive: list[str]  # evaluation sets of which some text is among them
    images: Images | None
    kept: Images | None  # held out


def prepare(config: Config, ranks: int = 1) -> Prepared:
    """Check trackers, the cache's folder, teachers, stages and sources, then read pictures and texts.

    Raises:
        JasperError: something is missing, unreadable or impossible; all of it that can be known before the texts.
    """
    from jasper_fast.data import prepare_texts
    from jasper_fast.image_data import prepare_images
    from jasper_fast.teach import check_teachers

    problems = Problems()
    with problems:
        check_trackers(config.log)
    with problems:
        check_writable(Path(config.data.cache).expanduser())
    with problems:
        check_teachers(config)
    with problems:
        student = build_student(config)
        check_stages(config, student, ranks)
    with problems:
        check_sources(config)
    problems.tell()
    images, kept = prepare_images(config) if config.images is not None else (None, None)
    texts, transductive = prepare_texts(config)
    check_sizes(config, texts, len(images) if images is not None else 0)
    return Prepared(student, texts, transductive, images, kept)


def build_student(config: Config) -> Student:
    """The student before training; its new heads depend on the seed alone."""
    torch.manual_seed(config.seed)
    return Student.build(config.student)


def check_sources(config: Config) -> None:
    """Read every evaluation set, and the beginning of every source: pictures are copied before a text is read.

    What lies on the hub is left alone where it may be in the cache already: without a network a run must go on.

    Raises:
        JasperError: every set and source that cannot be read.
    """
    from jasper_fast.evalsets import load_evals
    from jasper_fast.image_data import images_built, try_images
    from jasper_fast.sources import is_local, try_source

    problems, to_build = Problems(), False
    with problems:
        load_evals(config.evaluate)
    with problems:
        to_build = config.images is not None and not images_built(config.images, config.data.cache)
    for source in config.data.sources:
        if to_build or is_local(source):
            with problems:
                try_source(source)
    for pictures in config.images.sources if config.images is not None and to_build else []:
        with problems:
            try_images(pictures)
    problems.tell()


def check_disk(config: Config, folder: Path, prepared: Prepared, first: int = 0) -> None:
    """Refuse a run whose checkpoints, and pooled states of frozen encoders, will not fit on the disk.

    Args:
        folder: of the run; what it holds already is not asked for again.
        first: the stage that the run begins with, or goes on with.

    Raises:
        JasperError: how many bytes are needed, and how many are free.
    """
    student = prepared.student
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters()}
    trained = pooled = 0
    for stage in config.stages[first:]:
        names = trained_names(student, stage)
        trained = max(trained, sum(sizes[name] for name in names))
        if stage.vision is None:
            there = min(len(prepared.texts), stage.texts or len(prepared.texts))
        else:
            there = int(prepared.images.starts[-1]) if prepared.images is not None else 0  # captions
        if stage.vision is not None or not any(name.startswith("encoder.") for name in names):
            pooled = max(pooled, min(there, stage.steps * stage.batch_size))
    # The newest checkpoint is written before the oldest goes; an optimiser keeps two numbers for each that trains.
    numbers = (config.checkpoint.keep + 1) * (sum(sizes.values()) + 2 * trained) + pooled * student.hidden_size
    written = sum(
        file.stat().st_size
        for part in ("checkpoints", "pooled")
        for file in (folder / part).rglob("*")
        if file.is_file()
    )
    check_room(folder, 4 * numbers - written, "checkpoints and pooled states", "or use another --out")


def describe_stage(student: Student, stage: StageConfig, names: list[str], done: int = 0) -> str:
    """A line about a stage whose parameters are set to train: what, how much, how long; ``done`` of its steps are."""
    trained = sum(p.numel() for p in student.parameters() if p.requires_grad)
    total = sum(p.numel() for p in student.parameters())
    where = f", from its step {done}" if done else ""
    return (
        f"stage {stage.name}: trains {trained:,} of {total:,} parameters ({len(names)} tensors), heads {stage.heads}, "
        f"{stage.steps} steps of {stage.batch_size}{where}"
    )


def describe_plan(config: Config, folder: Path) -> str:
    """Describe what a run would do, stage by stage, with every parameter that trains.

    Raises:
        JasperError: what a run would reject before its first step. Teachers are loaded for it, one at a time.
    """
    from jasper_fast.teach import check_targets

    prepared = prepare(config)
    check_disk(config, folder, prepared)
    student, texts, transductive, images, _ = prepared
    check_targets(config, texts, student)
    pictures = f" and {len(images):,} pictures" if images is not None else ""
    lines = [
        f"run {config.name} in {folder}; student {config.student.model}, heads {config.student.heads}; "
        f"{len(texts):,} texts{pictures} to train on"
    ]
    if transductive:
        lines.append(f"some texts of {', '.join(transductive)} are among them: scores there will be transductive")
    for stage in config.stages:
        names = trained_names(student, stage)
        set_trained(student, names)
        lines.append(describe_stage(student, stage, names))
        lines += [f"    {name}" for name in names]
    difference = existing_difference(folder, config)
    if difference:
        lines.append("this folder was started with another configuration: " + "; ".join(difference))
    return "\n".join(lines)
