"""Checks before the first step: everything that can be known to be wrong by then is an error here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.config.run import Config
from jasper_fast.models.student import Student, build_student
from jasper_fast.training.data import TrainingData
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.run.folder import CHECKPOINTS, POOLED, existing_difference, result_settings
from jasper_fast.training.run.trackers import check_trackers
from jasper_fast.training.sampler import rows_up_to
from jasper_fast.training.stages.base import build_stages, describe_stage, trained_names
from jasper_fast.utils.atomic import check_disk_space, check_writable
from jasper_fast.utils.errors import JasperError, Problems

if TYPE_CHECKING:
    from jasper_fast.training.run.run import Run


def prepare(config: Config, ranks: int = 1) -> tuple[Student, TrainingData]:
    """Check the configuration against models, sources and folders, then read images and texts.

    Args:
        config: the run's configuration.
        ranks: the number of processes.

    Returns:
        the untrained student, and the training data.

    Raises:
        JasperError: something is missing, unreadable or impossible. All that is known before the texts is listed.
    """
    from jasper_fast.data.image_dataset import prepare_images
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import check_teachers

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
    problems.raise_all()
    images, held_out = prepare_images(config) if config.images is not None else (None, None)
    texts, transductive = prepare_texts(config)
    data = TrainingData(texts, tuple(transductive), images, held_out)
    check_sizes(config, data)
    return student, data


def check_stages(config: Config, student: Student, ranks: int) -> None:
    """Check every stage against the student and the number of ranks.

    Raises:
        JasperError: the problems of all stages.
    """
    problems = Problems()
    for stage in build_stages(config):
        problems += [problem for problem in stage.problems(student, ranks) if problem not in problems]
    problems.raise_all()


def check_sources(config: Config) -> None:
    """Read every evaluation set, and the beginning of every source, since images are copied before texts are read.

    Sources on the hub are left out if they may be in the cache: a run must resume without a network.

    Raises:
        JasperError: every set and source that cannot be read.
    """
    from jasper_fast.data.eval_loaders import load_evals
    from jasper_fast.data.image_dataset import check_images, images_cached
    from jasper_fast.data.text_sources import check_source, is_local

    problems, to_build = Problems(), False
    with problems:
        load_evals(config.evaluate)
    with problems:
        to_build = config.images is not None and not images_cached(config.images, config.data.cache)
    for source in config.data.sources:
        if to_build or is_local(source):
            with problems:
                check_source(source)
    for image_source in config.images.sources if config.images is not None and to_build else []:
        with problems:
            check_images(image_source)
    problems.raise_all()


def check_sizes(config: Config, data: TrainingData) -> None:
    """Check that no batch is larger than what its stage draws from.

    Raises:
        JasperError: one is. The message lists every such stage.
    """
    small = []
    for stage in build_stages(config, data):
        source, unit = stage.source()
        settings, available = stage.config, min(len(source), stage.config.texts or len(source))
        if settings.max_chars is not None:
            available = len(rows_up_to(source, available, settings.max_chars))
            unit = f"{unit} of up to {settings.max_chars} characters"
        narrow = [width for width in settings.heads if width != max(config.student.heads)]
        if available < settings.batch_size:
            small.append(f"stage {settings.name!r}: a batch of {settings.batch_size} from {available} {unit}")
        elif settings.narrow_start == "principal" and available < max(narrow, default=0):
            small.append(f"stage {settings.name!r}: {max(narrow)} principal axes from {available} {unit}")
    if small:
        raise JasperError(
            f"too little to train on ({'; '.join(small)}). Fix: give more, or lower batch_size, or leave narrow_start "
            "out"
        )


def check_start(run: Run, student: Student, data: TrainingData) -> None:
    """Find the checkpoint to resume from, and check the disk and that nothing changed since.

    Raises:
        JasperError: checkpoints will not fit on the disk, all checkpoints are damaged, or texts, teachers or settings
            differ between ranks or from the checkpoint's.
    """
    start = run.find_checkpoint()
    run.ranks.on_main(lambda: check_disk(run.config, run.path, student, data, start.stage))
    run.check_unchanged(_facts(run.config, data, run.ranks.world))


def _facts(config: Config, data: TrainingData, ranks: int) -> dict[str, Any]:
    """Return fingerprints of all that changes the numbers of a run."""
    from jasper_fast.teachers.cache import joined_fingerprint
    from jasper_fast.teachers.label import teacher_caches

    facts: dict[str, Any] = {
        "teachers": joined_fingerprint(teacher_caches(config, data.texts)),
        "texts": data.fingerprint,
        "config": result_settings(config),
    }
    if data.images is not None:
        facts["images"] = data.images.fingerprint
    if config.losses.scope == "local":
        facts["ranks"] = ranks  # decides what a loss compares
    return facts


def check_disk(config: Config, folder: Path, student: Student, data: TrainingData, first: int = 0) -> None:
    """Check that checkpoints, and pooled states of frozen encoders, fit on the disk.

    Args:
        config: the run's configuration.
        folder: the folder of the run. Files that it already has are not counted again.
        student: the student.
        data: the training data.
        first: the index of the stage that the run starts or resumes with.

    Raises:
        JasperError: too few bytes are free. The message has both numbers.
    """
    sizes = {name: parameter.numel() for name, parameter in student.named_parameters()}
    trained = pooled = 0
    for stage in build_stages(config, data)[first:]:
        trained = max(trained, sum(sizes[name] for name in stage.trained_names(student, stage.config)))
        pooled = max(pooled, stage.pooled_rows(student))
    # The newest checkpoint is written before the oldest is deleted; AdamW has two numbers per trained parameter.
    numbers = (config.checkpoint.keep + 1) * (sum(sizes.values()) + 2 * trained) + pooled * student.hidden_size
    written = sum(
        file.stat().st_size for part in (CHECKPOINTS, POOLED) for file in (folder / part).rglob("*") if file.is_file()
    )
    check_disk_space(folder, 4 * numbers - written, "checkpoints and pooled states", "or use another --out")


def describe_plan(config: Config, folder: Path) -> str:
    """Describe what a run would do, stage by stage, with every trained parameter. Teachers are loaded for it.

    Raises:
        JasperError: a run would reject the configuration before its first step.
    """
    from jasper_fast.teachers.label import check_targets

    student, data = prepare(config)
    check_disk(config, folder, student, data)
    check_targets(config, data.texts, student)
    images = f" and {len(data.images):,} images" if data.images is not None else ""
    lines = [
        f"run {config.name} in {folder}; student {config.student.model}, heads {config.student.heads}; "
        f"{len(data.texts):,} texts{images} to train on"
    ]
    if data.transductive:
        sets = ", ".join(data.transductive)
        lines.append(f"some texts of {sets} are among the training texts: scores there will be transductive")
    for stage in config.stages:
        names = trained_names(student, stage)
        set_trained(student, names)
        lines.append(describe_stage(student, stage))
        lines += [f"    {name}" for name in names]
    difference = existing_difference(folder, config)
    if difference:
        lines.append("this folder was started with another configuration: " + "; ".join(difference))
    return "\n".join(lines)
