"""``report.md`` of a run: scores of student and teacher, training by stage, plots and facts."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from jasper_fast.config.yaml import NOT_YAML, parse_yaml
from jasper_fast.models.hub import resolve_model
from jasper_fast.reporting.contact_sheet import SHEET
from jasper_fast.reporting.quality import headline, markdown, quality_sections
from jasper_fast.reporting.tables import scores_markdown
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

MAX_LISTED = 20  # entries of a list that the report prints
NO_PLOTS = (
    "The plots are missing because matplotlib is not installed. Fix: `pip install matplotlib`, then write the report "
    "again."
)


def write_report(run_dir: str | Path, results: Mapping[str, Any] | None = None) -> Path:
    """Write ``report.md`` and ``plots/*.png`` from a run's config.yaml, log.jsonl and results.json.

    Args:
        run_dir: run folder. The size of the model in its ``model`` folder is reported if there is one.
        results: content of results.json. None: read the file.

    Returns:
        Path of report.md.

    Raises:
        JasperError: one of the files is missing or damaged.
    """
    folder = Path(run_dir)
    config = _read(folder / "config.yaml", parse_yaml)
    if results is None:
        results = dict(_read(folder / "results.json", json.loads))
    steps = step_lines(_read(folder / "log.jsonl", str.splitlines))
    images = _plots(folder / "plots", steps, results)
    sections = [
        f"# Report of the run {config['name']}",
        *headline(results),
        _early(results),
        *quality_sections(results, images),
        _images(results, folder),
        _stages(config, steps),
        _phases(results),
        _gpu(config, steps),
        images.get("losses", ""),
        images.get("missing", ""),
        _facts(config, results, folder),
    ]
    path = folder / "report.md"
    write_atomic(path, "\n\n".join(section for section in sections if section) + "\n")
    return path


def _early(results: Mapping[str, Any]) -> str:
    """Return a warning if the run was finished before its last step."""
    line = results.get("early_line")
    return f"**This run was {line}.**" if line else ""


def _images(results: Mapping[str, Any], folder: Path) -> str:
    """Return the section on retrieval between images and captions, with the contact sheet."""
    scores = results.get("pictures")
    if not scores:
        return ""
    parts = [
        "## Images and captions",
        f"Retrieval between {scores['pictures']} held-out images and their {scores['captions']} captions. None of them "
        "was used in training. Recall is in per cent.\n\n"
        "- *floor*: ridge regression from pixels and their spectrum (32 × 32) to caption embeddings.\n"
        "- *reference*: each image is represented by the mean embedding of its other captions. The caption that is the "
        "query or the target is excluded. Only images with several captions count, and without them there are no "
        "figures. A student can beat the reference, because it sees the image.",
        scores_markdown(scores),
    ]
    if (folder / "plots" / SHEET).is_file():
        parts.append(f"![Captions and the images they retrieve](plots/{SHEET})")
    return "\n\n".join(parts)


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JasperError(
            f"{path} is missing, and a report needs a finished run. Fix: give the folder of a finished run"
        ) from None
    except NOT_YAML as error:  # broken JSON is a ValueError
        raise JasperError(f"{path} is damaged ({error}). Fix: restore the file, or run the training again") from None


def step_lines(lines: Sequence[str]) -> list[dict[str, Any]]:
    """Return the step lines of a log in order. If a resumed run repeated a step, its later line is used.

    Args:
        lines: lines of log.jsonl.
    """
    records = [json.loads(line) for line in lines if line.strip()]
    last = {record["step"]: record for record in records if record.get("event") == "step"}
    return [last[step] for step in sorted(last)]


def _plots(folder: Path, steps: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> dict[str, str]:
    """Draw the plots that the data is enough for, and return Markdown by plot name."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return {"missing": NO_PLOTS}
    from jasper_fast.reporting import plots

    drawings: dict[str, tuple[str, Any]] = {}
    if steps:
        drawings["losses"] = ("Loss curves", lambda file: plots.plot_losses(steps, file))
    if results.get("label_free", {}).get("rows"):
        drawings["label_free"] = ("Neighbours", lambda file: plots.plot_label_free(results["label_free"], file))
    if results.get("rows"):
        drawings["sets"] = ("Student against teacher", lambda file: plots.plot_sets(results, file))
        drawings["widths"] = ("Quality against width", lambda file: plots.plot_widths(results, file))
    markdown = {}
    for name, (title, draw) in drawings.items():
        content = io.BytesIO()
        draw(content)
        write_atomic(folder / f"{name}.png", content.getvalue())
        markdown[name] = f"![{title}](plots/{name}.png)"
    return markdown


def _stages(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    table = [["stage", "trains", "heads", "losses", "batch", "rate", "steps", "minutes", "texts/s", "loss"]]
    for stage in config["stages"]:
        done = [line for line in steps if line["stage"] == stage["name"]]
        trains = [f"`{glob}`" for glob in stage["train"]]
        if stage["last_layers"]:
            trains.append("all layers" if stage["last_layers"] == "all" else f"last {stage['last_layers']} layers")
        losses = _weights(stage["weights"])
        if stage.get("narrow_weights"):
            losses += f"; narrow heads: {_weights(stage['narrow_weights'])}"
        if contrastive := (stage.get("vision") or {}).get("contrastive"):
            losses += f", {contrastive:g} contrastive"
        if rank := stage.get("rank"):
            losses += "".join(f", {rank[name]:g} {name}" for name in ("listwise", "contrastive") if rank[name])
        batch = stage["batch_size"]  # as configured; few texts make it smaller, and `minutes` change the steps
        if done and "seconds" in done[0]:
            batch = round(done[0]["texts_per_s"] * done[0]["seconds"])
        seconds = sum(batch / line["texts_per_s"] for line in done if line["texts_per_s"] > 0)
        speed = f"{len(done) * batch / seconds:.0f}" if seconds else ""
        loss = f"{done[0]['loss']:.3f} → {done[-1]['loss']:.3f}" if done else ""
        heads = ", ".join(map(str, stage["heads"]))
        numbers = [
            str(batch),
            f"{stage['lr']:g}",
            str(len(done) or stage["steps"]),
            f"{seconds / 60:.1f}",
            speed,
            loss,
        ]
        table.append([stage["name"], ", ".join(trains), heads, losses, *numbers])
    return "## Training\n\n" + markdown(table, 4)


def _phases(results: Mapping[str, Any]) -> str:
    """Return a table of the time by phase, empty if it was not recorded."""
    seconds = results.get("facts", {}).get("phases")
    if not seconds:
        return ""
    total = sum(seconds.values()) or 1.0
    table = [["phase", "seconds", "of all"]]
    table += [[name, f"{spent:.1f}", f"{100 * spent / total:.0f} %"] for name, spent in seconds.items()]
    return "### Where the time went\n\n" + markdown(table, 1)


def _gpu(config: Mapping[str, Any], steps: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of the first rank's GPU readings by stage, empty if none were logged."""
    columns = {
        "gpu_utilisation": ("utilisation", lambda values: f"{100 * mean(values):.0f} %"),
        "gpu_memory_gb": ("memory", lambda values: f"{max(values):.1f} GB"),
        "gpu_watts": ("power", lambda values: f"{mean(values):.0f} W"),
        "joules_per_1000_texts": ("energy per 1,000 texts", lambda values: f"{mean(values):,.0f} J"),
    }
    table = [["stage", *(title for title, _ in columns.values())]]
    for stage in config["stages"]:
        lines = [line for line in steps if line["stage"] == stage["name"]]
        read = {key: [line[key] for line in lines if key in line] for key in columns}
        if any(read.values()):
            cells = [show(read[key]) if read[key] else "–" for key, (_, show) in columns.items()]
            table.append([stage["name"], *cells])
    if len(table) == 1:
        return ""
    text = (
        "Means over the lines of the log. Memory is the largest value. Energy is per 1,000 texts of the batches that "
        "this GPU worked on."
    )
    return f"### The first rank's GPU\n\n{text}\n\n" + markdown(table, 1)


def _weights(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{weight:g} {name.replace('_', ' ')}" for name, weight in weights.items() if weight)


def _facts(config: Mapping[str, Any], results: Mapping[str, Any], folder: Path) -> str:
    student, data = config["student"], config["data"]
    layers = student["layers"]
    selection = {int: f"its first {layers} layers", list: f"its layers {layers}"}.get(type(layers), "all layers")
    lines = [
        f"- student: `{student['model']}`, {selection}, at most {student['max_length']} tokens{_size(folder / 'model')}"
    ]
    for teacher in config["teachers"]:
        if teacher["model"] is None:
            lines.append(f"- teacher: embeddings from `{teacher['vectors']}`")
        else:
            size = _size(Path(resolve_model(teacher["model"])))
            lines.append(f"- teacher: `{teacher['model']}`, at most {teacher['max_length']} tokens{size}")
    lines.append("- sources: " + ", ".join(f"`{source['path']}`" for source in data["sources"]))
    facts = dict(results.get("facts", {}))
    if texts_line := facts.pop("texts_line", ""):
        lines.append(f"- {texts_line}")
        facts.pop("texts", None)  # the line has the number
    lines += [f"- {line}" for line in facts.pop("stage_lines", [])]
    lines.append(f"- seed: {config['seed']}")
    facts.pop("phases", None)  # they have a table
    if encoding := facts.pop("encoding", None):
        lines += _speed(encoding)
    if results.get("rows") or encoding:
        lines += _bytes(student["heads"])
    lines += [f"- {key.replace('_', ' ')}: {_plain(value)}" for key, value in facts.items()]
    return "## Facts\n\n" + "\n".join(lines)


def _speed(encoding: Mapping[str, Any]) -> list[str]:
    student, teacher = encoding["student_texts_per_s"], encoding["teacher_texts_per_s"]
    of_teacher = f", the teacher {teacher:,.0f} ({student / teacher:.1f} times as fast)" if teacher else ""
    return [
        f"- encoding speed on this machine: the student {student:,.0f} texts/s{of_teacher}, measured on "
        f"{encoding['texts']} documents of {encoding['mean_tokens']:.0f} tokens on average, in fp32"
    ]


def _bytes(widths: Sequence[int]) -> list[str]:
    """Return a line on the size of an embedding: float32 has 4 bytes a number, int8 has 1, and ubinary has a bit."""
    sizes = "; ".join(f"{width} wide: {4 * width:,} / {width:,} / {-(-width // 8):,}" for width in widths)
    return [f"- bytes per embedding (float32 / int8 / ubinary): {sizes}"]


def _size(folder: Path) -> str:
    """Return the number of parameters and the bytes of a model folder's weights, empty if it has none."""
    from safetensors import safe_open

    files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    if not files:
        return ""
    parameters = 0
    for file in files:
        with safe_open(file, "np") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a dict
                size = 1
                for side in weights.get_slice(name).get_shape():
                    size *= side
                parameters += size
    return f"; {parameters / 1e6:.1f} M parameters, {sum(file.stat().st_size for file in files) / 1e6:.1f} MB"


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.1f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, list):
        rest = len(value) - MAX_LISTED
        return "; ".join(
            [*map(_plain, value[:MAX_LISTED]), *([f"and {rest} more (results.json has them)"] if rest > 0 else [])]
        )
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
