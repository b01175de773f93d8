"""``train --dry-run``: check everything that a run would reject, and describe what it would do and cost."""

from __future__ import annotations

from pathlib import Path

from jasper_fast.config.run import Config
from jasper_fast.models.student import Student
from jasper_fast.training.data import TrainingData
from jasper_fast.training.measure import measure_costs
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.plan import Plan, describe_costs, make_plan, read_plan
from jasper_fast.training.preflight import (
    check_disk,
    check_stages,
    check_start,
    checkpoint_bytes,
    fit_small_data,
    prepare,
)
from jasper_fast.training.run.folder import RESULTS, RunFolder, existing_difference, keep_older_meaning
from jasper_fast.training.run.run import Run
from jasper_fast.training.stages.base import build_stages, describe_stage
from jasper_fast.utils.atomic import free_bytes
from jasper_fast.utils.device import pick_device, total_memory
from jasper_fast.utils.errors import JasperError


def describe_plan(config: Config, folder: Path, verbose: bool = False) -> str:
    """Describe what a run would do and cost, stage by stage. A few steps are measured for it.

    Args:
        config: the run's configuration.
        folder: the folder of the run.
        verbose: whether to name every trained parameter.

    Raises:
        JasperError: a run would reject the configuration before its first step.
    """
    from jasper_fast.teachers.label import check_targets

    config = keep_older_meaning(folder, config)
    if difference := existing_difference(folder, config):
        raise JasperError(
            f"{folder} was started with another configuration:\n  - "
            + "\n  - ".join(difference)
            + "\nFix: use the old one to resume, or --out DIR for a new run"
        )
    student, data = prepare(config)
    config = fit_small_data(config, data)
    check_disk(config, folder, student, data)
    check_targets(config, data.texts, student)
    if folder.is_dir():
        check_start(Run(config, pick_device(), folder=RunFolder(folder)), student, data)
    plan = read_plan(folder, config, data) or make_plan(config, measure_costs(config, student, data))
    config = plan.apply(config)
    check_stages(config, student, 1)
    check_disk(config, folder, student, data)
    images = f" and {len(data.images):,} images" if data.images is not None else ""
    lines = [
        f"run {config.name} in {folder}; student {config.student.model}, heads {config.student.heads}; "
        f"{len(data.texts):,} texts{images} to train on"
    ]
    lines.append(data.texts_line)
    lines += config.notes
    if data.transductive:
        sets = ", ".join(data.transductive)
        lines.append(f"some texts of {sets} are among the training texts: scores there will be transductive")
    for stage in build_stages(config, data):
        names = stage.trained_names(student, stage.config)
        set_trained(student, names)
        lines += [describe_stage(student, stage.config), *stage.lines()]
        lines += [f"    {name}" for name in names] if verbose else []
    sets = ", ".join(source.path for source in config.evaluate)
    lines.append(f"evaluation: {sets}" if sets else "evaluation: no set with labels; only quality without labels")
    lines += [f"plan: {plan.line()}", *describe_costs(plan, config.stages), *plan.notes]
    if (folder / RESULTS).exists():
        lines.append(f"{folder} is finished: train would only say so. Use --out DIR for a new run")
    return "\n".join([*lines, *_room(config, folder, student, data, plan)])


def _room(config: Config, folder: Path, student: Student, data: TrainingData, plan: Plan) -> list[str]:
    """Return the memory and disk that a run needs, next to what is available."""
    device = pick_device()
    written = checkpoint_bytes(config, folder, student, data)
    cache = Path(config.data.cache).expanduser()
    free, free_for_cache = (f"{free_bytes(path) / 1e9:.1f} GB free" for path in (folder, cache))
    return [
        f"memory: {plan.costs.memory / 1e9:.1f} GB at peak while this was measured; "
        f"{total_memory(device) / 1e9:.1f} GB on this {'GPU' if device.type == 'cuda' else 'machine'}",
        f"disk: {written / 1e9:.2f} GB for checkpoints and pooled states in {folder} ({free}), "
        f"{plan.costs.teacher_bytes / 1e9:.2f} GB for teacher embeddings in {cache} ({free_for_cache})",
    ]
