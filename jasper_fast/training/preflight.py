"""Checks before the first step: everything that can be known to be wrong by then is an error here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.evaluation.label_free import MIN_DOCUMENTS
from jasper_fast.models.lengths import describe_lengths
from jasper_fast.models.student import Student, build_student
from jasper_fast.training.data import TrainingData
from jasper_fast.training.measure import measure_costs
from jasper_fast.training.plan import PLAN, Plan, has_minutes, make_plan, read_plan, write_plan
from jasper_fast.training.run.folder import (
    CHECKPOINTS,
    POOLED,
    result_settings,
)
from jasper_fast.training.run.run import Run
from jasper_fast.training.run.trackers import check_trackers
from jasper_fast.training.stages.base import build_stages
from jasper_fast.utils.atomic import check_disk_space, check_writable
from jasper_fast.utils.errors import JasperError, Problems

if TYPE_CHECKING:
    from jasper_fast.data.prepare import PreparedTexts


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
    images, held_out_images = prepare_images(config) if config.images is not None else (None, None)
    prepared = prepare_texts(config)
    data = TrainingData(
        prepared.texts,
        tuple(prepared.transductive),
        images,
        held_out_images,
        prepared.held_out,
        prepared.counts,
        _texts_line(config, prepared, student),
    )
    check_sizes(fit_small_data(config, data), data)
    return student, data


def _texts_line(config: Config, prepared: PreparedTexts, student: Student) -> str:
    longest = max(stage.max_length or student.max_length for stage in config.stages)
    keys = ["stages.*.max_length" if any(stage.max_length for stage in config.stages) else "student.max_length"]
    if any(teacher.max_length is not None and teacher.max_length <= longest for teacher in config.teachers):
        keys.append("teachers.*.max_length")
    return prepared.counts.line(describe_lengths(prepared.texts, prepared.held_out, student, longest, keys))


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


def fit_small_data(config: Config, data: TrainingData) -> Config:
    """Return the configuration with smaller batches for the stages that adapt to few texts (``small_data: adapt``).

    Notes of the configuration say what was changed, and if too few documents are held out.
    """
    stages, notes = [], []
    for built in build_stages(config, data):
        stage, available = built.config, built.available()
        changes = _small_data_changes(stage, available, config.student.heads[0]) if available else {}
        if changes:
            values = ", ".join(f"{key} {getattr(stage, key)} -> {value}" for key, value in changes.items())
            notes.append(f"stage {stage.name!r}: {values}, since there are {available:,} {built.source()[1]}")
        stages.append(stage.model_copy(update=changes))
    notes += _few_held_out(config, data)
    return config.model_copy(update={"stages": stages}).with_notes(notes) if notes else config


def _few_held_out(config: Config, data: TrainingData) -> list[str]:
    """Say that too few documents are held out to score the student without labels, unless none should be."""
    if data.held_out_texts is None or not config.data.held_out or len(data.held_out_texts) >= MIN_DOCUMENTS:
        return []
    return [
        f"quality without labels will not be measured: {len(data.held_out_texts)} documents are held out, and it needs "
        f"{MIN_DOCUMENTS}. At most a tenth is held out, so give {10 * MIN_DOCUMENTS} documents or more"
    ]


def _small_data_changes(stage: StageConfig, available: int, widest: int) -> dict[str, Any]:
    """Return the settings with which a stage can train on few texts.

    A batch of neighbours has at most half of the texts, since near-duplicates cannot fill it.

    Args:
        stage: the stage's settings.
        available: number of texts that its batches are drawn from, at least 1.
        widest: width of the student's widest head.
    """
    changes: dict[str, Any] = {}
    if stage.small_data == "error":
        return changes
    size = min(stage.batch_size, available)
    if stage.batches == "neighbours" and available < 2 * stage.batch_size:
        half = min(stage.batch_size, available // 2) // stage.neighbours * stage.neighbours
        if round((1.0 - stage.random_share) * half) >= stage.neighbours:
            size = half
        else:
            changes["batches"] = "random"
    if size != stage.batch_size:
        changes["batch_size"] = size
    if stage.narrow_start == "principal" and available < max((w for w in stage.heads if w != widest), default=0):
        changes["narrow_start"] = "as_is"
    return changes


def check_sizes(config: Config, data: TrainingData) -> None:
    """Check that no batch is larger than what its stage draws from.

    Raises:
        JasperError: one is. The message lists every such stage.
    """
    small = []
    for stage in build_stages(config, data):
        unit, settings, available = stage.source()[1], stage.config, stage.available()
        if settings.max_chars is not None:
            unit = f"{unit} of up to {settings.max_chars} characters"
        narrow = [width for width in settings.heads if width != max(config.student.heads)]
        if available < settings.batch_size:
            small.append(f"stage {settings.name!r}: a batch of {settings.batch_size} from {available} {unit}")
        elif settings.narrow_start == "principal" and available < max(narrow, default=0):
            small.append(f"stage {settings.name!r}: {max(narrow)} principal axes from {available} {unit}")
    if small:
        counts = f"\n{data.counts.line()}" if data.counts is not None else ""
        raise JasperError(
            f"too little to train on ({'; '.join(small)}). Fix: give more, or lower batch_size, or leave "
            f"narrow_start out{counts}"
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
    facts |= {f"stage {stage.config.name}": own for stage in build_stages(config, data) if (own := stage.facts())}
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
    needed = checkpoint_bytes(config, folder, student, data, first)
    check_disk_space(folder, needed, "checkpoints and pooled states", "or use another --out")


def checkpoint_bytes(config: Config, folder: Path, student: Student, data: TrainingData, first: int = 0) -> int:
    """Return the bytes that checkpoints and pooled states still need on the disk. See :func:`check_disk`."""
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
    return max(0, 4 * numbers - written)


def start(run: Run, student: Student, data: TrainingData) -> None:
    """Fit the configuration to the texts, check the run's folder, and plan the time.

    Args:
        run: the run. Its configuration gets smaller default batches for few texts, and the planned steps.
        student: the untrained student.
        data: the training data.

    Raises:
        JasperError: as in :func:`check_start` and :func:`plan_run`, a tracker does not start, or precomputed embeddings
            do not fit the texts.
    """
    from jasper_fast.teachers.label import check_targets

    run.config = fit_small_data(run.config, data)
    check_start(run, student, data)
    run.start_trackers()
    run.print("\n".join([data.texts_line, *run.config.notes]))
    if any(teacher.vectors is not None for teacher in run.config.teachers):  # before speeds are measured
        run.ranks.on_main(lambda: check_targets(run.config, data.texts, student, progress=False))
    with run.phases.measure("plan"):
        plan_run(run, student, data)


def plan_run(run: Run, student: Student, data: TrainingData) -> None:
    """Measure the plan of a run at its first start, and read it when the run resumes. Rank 0's plan holds for all.

    Args:
        run: the run after :func:`check_start`. Its configuration gets the planned steps.
        student: the untrained student, which stays as it is.
        data: the training data.

    Raises:
        JasperError: the steps of a run with ``minutes`` are lost or cannot be measured, or a planned stage is
            impossible.
    """
    plan = run.ranks.on_main(lambda: _stored_or_measured(run, student, data))
    if plan is None:
        return
    if has_minutes(run.config):
        run.config = plan.apply(run.config)
        check_stages(run.config, student, run.ranks.world)
        first = run.checkpoint.position.stage if run.checkpoint is not None else 0
        run.ranks.on_main(lambda: check_disk(run.config, run.path, student, data, first))
    run.progress, run.planned_seconds = plan.progress(), plan.seconds
    if run.ranks.is_main:
        print("\n".join([f"plan: {plan.line()}", *plan.notes]), flush=True)


def _stored_or_measured(run: Run, student: Student, data: TrainingData) -> Plan | None:
    """Return the plan of the run's folder, or measure it and write it there. None: it cannot be measured."""
    stored = read_plan(run.path, run.config, data)
    if stored is not None:
        return stored
    by_time = has_minutes(run.config)
    if run.checkpoint is not None and by_time:
        raise JasperError(
            f"{run.path / PLAN}: it has the steps of this run, and is missing or of another run. Fix: restore it, or "
            "use --out DIR for a new run"
        )
    if run.config.parallel.mode == "fsdp" and run.ranks.world > 1:  # one rank may not hold the whole student
        if by_time:
            raise JasperError("minutes cannot be measured with parallel.mode: fsdp. Fix: give steps instead of minutes")
        return None
    plan = make_plan(run.config, measure_costs(run.config, student, data, run.ranks.world))
    write_plan(run.path, run.config, data, plan)
    return plan
