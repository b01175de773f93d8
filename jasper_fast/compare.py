"""Compare runs side by side, or two models by their embeddings.

python -m jasper_fast.compare runs/try-1 runs/try-2
python -m jasper_fast.compare my-model/golden.json http://localhost:8000/v1/embeddings
python -m jasper_fast.compare my-model my-model/onnx/model_int8.onnx --accept int8

Runs are compared by settings, scores, seconds and sizes. Unfinished ones show their steps so far, and runs that differ
only in their seed also get a mean ± standard deviation.

A model is a folder, a file (.onnx, .xml of OpenVINO, or .gguf), an endpoint (OpenAI-style /v1/embeddings, or /embed of
TEI) or a golden.json. The result says whether both give the same embeddings, and if not, why. The exit status is 0 if
they do, 1 if they differ, and 2 if a model cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jasper_fast.config.diff import leaves
from jasper_fast.config.yaml import NOT_YAML, parse_yaml
from jasper_fast.drift.comparison import MIN_COSINE, Options, compare_models
from jasper_fast.drift.endpoint import EndpointOptions
from jasper_fast.drift.findings import FIXES
from jasper_fast.drift.report import report_text
from jasper_fast.evaluation.score import STUDENT, TEACHER
from jasper_fast.exporting.golden import ROLES
from jasper_fast.training.plan import PLAN
from jasper_fast.utils.command_line import positive_int
from jasper_fast.utils.errors import JasperError, run_cli

NEUTRAL = ("log", "checkpoint", "parallel", "name")  # fields that do not change the numbers
ABSENT = "–"


@dataclass(frozen=True)
class ComparedRun:
    """A run as data.

    Args:
        name: the folder as it was given.
        settings: values of the configuration by dotted key. Those of a finished run have the steps and batch sizes that
            were taken.
        status: "finished", or how far the run is.
        numbers: scores as fractions, seconds and sizes, by label.
    """

    name: str
    settings: dict[str, Any]
    status: str
    numbers: dict[str, float]


def main(argv: list[str]) -> int:
    """Compare runs or two models from the command line, and return the exit status.

    Args:
        argv: command-line arguments.

    Returns:
        1 for two models with different embeddings, and 0 otherwise.

    Raises:
        JasperError: a folder has neither a run nor a model, or a file or an endpoint gives no embeddings.
    """
    arguments = _parser().parse_args(argv)
    names = arguments.models
    if len(names) < 2:
        raise JasperError(f"compare: got one run or model ({names[0]}), expected at least two. Fix: name another one")
    runs = [(Path(name) / "config.yaml").is_file() for name in names]
    if not all(runs):
        _check_two_models(names, runs)
        return _compare_models(arguments)
    content = compare([read_run(Path(path)) for path in names])
    print(json.dumps(content, indent=1, ensure_ascii=False) if arguments.json else comparison_text(content))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jasper-fast compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="RUN_OR_MODEL", help="folders of runs, or exactly two models")
    parser.add_argument("--json", action="store_true", help="print the comparison as JSON")
    models = parser.add_argument_group("two models")
    models.add_argument(
        "--texts", type=Path, metavar="FILE", help="texts to embed, one a line (default: built-in ones)"
    )
    models.add_argument("--role", choices=ROLES, help="compare only embeddings of this role")
    models.add_argument("--dimensions", type=positive_int, metavar="N", help="width at which both are compared")
    models.add_argument(
        "--min-cosine",
        type=_cosine,
        default=MIN_COSINE,
        metavar="X",
        help="smallest equal cosine (default: %(default)s)",
    )
    models.add_argument(
        "--accept", type=_kinds, default=(), metavar="KIND,…", help=f"differences to accept: {', '.join(FIXES)}"
    )
    models.add_argument("--model", metavar="NAME", help="model to request from an OpenAI-style endpoint")
    models.add_argument(
        "--send-prompts", action="store_true", help="put the model's prompts before texts for an endpoint"
    )
    models.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help="seconds a request (default: 60)")
    models.add_argument("--key-variable", metavar="NAME", help="environment variable with the key of an endpoint")
    models.add_argument("--trust-remote-code", action="store_true", help="run code from a model; only if you trust it")
    return parser


def _check_two_models(names: Sequence[str], runs: Sequence[bool]) -> None:
    """Reject more than two models, and a run without a model next to something that is no run."""
    other = names[runs.index(False)]
    problem = f"{other} is not the folder of a run (it has no config.yaml)"
    if len(names) > 2:
        raise JasperError(
            f"{problem}, and only two models are compared (got {len(names)}). Fix: give runs such as runs/NAME, or two "
            "models"
        )
    for name, run in zip(names, runs, strict=True):
        if run and not (Path(name) / "model").is_dir():
            raise JasperError(f"{problem}, and the run {name} has no model yet. Fix: give two runs, or finish the run")


def _compare_models(arguments: argparse.Namespace) -> int:
    key = None
    if arguments.key_variable is not None:
        key = os.environ.get(arguments.key_variable)
        if not key:
            raise JasperError(f"--key-variable: {arguments.key_variable} is not set. Fix: export it with the key")
    endpoint = EndpointOptions(arguments.model, timeout=arguments.timeout, key=key)
    names = ("texts", "role", "dimensions", "min_cosine", "accept", "send_prompts", "trust_remote_code")
    options = Options(endpoint=endpoint, **{name: getattr(arguments, name) for name in names})
    first, second = arguments.models
    comparison = compare_models(first, second, options)
    print(json.dumps(comparison.as_dict(), indent=1, ensure_ascii=False) if arguments.json else report_text(comparison))
    return 0 if comparison.same else 1


def _cosine(text: str) -> float:
    return _number_between(text, 0, 1)


def _seconds(text: str) -> float:
    return _number_between(text, 0, 86400)


def _number_between(text: str, low: float, high: float) -> float:
    """Parse a number above ``low`` and up to ``high``, as an argparse type."""
    try:
        number = float(text)
    except ValueError:
        number = low
    if not low < number <= high:
        raise argparse.ArgumentTypeError(f"expected a number above {low:g}, at most {high:g} (got {text!r})")
    return number


def _kinds(text: str) -> list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    unknown = [kind for kind in kinds if kind not in FIXES]
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown kind {unknown[0]!r} (expected some of {', '.join(FIXES)})")
    return kinds


def read_run(folder: Path) -> ComparedRun:
    """Read a run, finished or not.

    Args:
        folder: the folder of the run.

    Raises:
        JasperError: it has no configuration, or a file is damaged.
    """
    config = _read(folder / "config.yaml", parse_yaml)
    if config is None:
        raise JasperError(f"{folder} is not the folder of a run (it has no config.yaml). Fix: give e.g. runs/NAME")
    results = _read(folder / "results.json", json.loads)
    for name, content in (("config.yaml", config), ("results.json", results)):
        if content is not None and not isinstance(content, Mapping):
            raise JasperError(
                f"{folder / name} is damaged (got {type(content).__name__}, expected fields). Fix: restore the file, "
                "or leave this run out"
            )
    config = _as_planned(config, _read(folder / PLAN, json.loads))
    steps = sum(stage.get("steps") or 0 for stage in config.get("stages", []))
    logged = _step_lines(folder / "log.jsonl")
    status = f"unfinished: {max(logged, default=0)} of {steps} steps"
    if results is not None:
        early = results.get("finished_early")
        status = f"finished early, after step {early['step']} of {early['steps']}" if early else "finished"
        config = _as_taken(config, [*logged.values()])
    settings = {key: value for key, value in leaves(dict(config)) if key.split(".")[0] not in NEUTRAL}
    return ComparedRun(str(folder), settings, status, _numbers(results or {}, folder))


def compare(runs: Sequence[ComparedRun]) -> dict[str, Any]:
    """Compare runs.

    Args:
        runs: two or more runs.

    Returns:
        ``runs``, their ``status``, the ``settings`` that differ and all ``numbers``, each as a list with one entry per
        run. If only seeds differ, ``seeds`` has the mean and the standard deviation of each number. ``note`` warns if
        ``minutes`` gave the runs different steps, so that another difference cannot explain the numbers alone.
    """
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    settings = {key: [run.settings.get(key, ABSENT) for run in runs] for key in keys}
    different = {key: values for key, values in settings.items() if any(value != values[0] for value in values)}
    labels = dict.fromkeys(label for run in runs for label in run.numbers)
    numbers = {label: [run.numbers.get(label) for run in runs] for label in labels}
    content: dict[str, Any] = {
        "runs": [run.name for run in runs],
        "status": [run.status for run in runs],
        "settings": different,
        "numbers": numbers,
    }
    steps = [key for key in different if key.startswith("stages.") and key.endswith(".steps")]
    if steps and any(run.settings.get("minutes") is not None for run in runs):
        content["note"] = (
            f"minutes set other steps in each run ({', '.join(steps)}), so the numbers differ for that reason too. "
            "Fix: to compare one setting, set minutes to null and give each stage its steps"
        )
    if set(different) == {"seed"}:
        known = {label: [value for value in values if value is not None] for label, values in numbers.items()}
        content["seeds"] = {
            label: {"mean": statistics.mean(values), "sd": statistics.stdev(values)}
            for label, values in known.items()
            if len(values) > 1
        }
    return content


def comparison_text(content: Mapping[str, Any]) -> str:
    """Return a comparison as a table.

    Args:
        content: the result of :func:`compare`.
    """
    count, seeds = len(content["runs"]), content.get("seeds", {})
    head = ["", *(str(number) for number in range(1, count + 1)), *(["mean ± sd"] if seeds else [])]
    rows = [[key, *map(_setting, values), *([""] if seeds else [])] for key, values in content["settings"].items()]
    table = [head, *(rows or [["(no setting differs)", *[""] * (len(head) - 1)]])]
    for label, values in content["numbers"].items():
        spread = seeds.get(label)
        last = [f"{_number(label, spread['mean'])} ± {_number(label, spread['sd'])}" if spread else ""] if seeds else []
        table.append([label, *(ABSENT if value is None else _number(label, value) for value in values), *last])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"{place}  {run}: {content['status'][place - 1]}" for place, run in enumerate(content["runs"], 1)]
    for row in table:
        cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    if content["numbers"]:
        lines.append("Scores are in per cent.")
    if content.get("note"):
        lines.append(f"note: {content['note']}")
    return "\n".join(lines)


def _numbers(results: Mapping[str, Any], folder: Path) -> dict[str, float]:
    """Return scores, then seconds and sizes. Reports of older versions lack some."""
    numbers: dict[str, float] = {}
    for model in (TEACHER, STUDENT):
        for row in results.get("rows", []):
            if row["model"] == model:
                numbers |= {f"{key} {model} @{row['width']}": score for key, score in row["scores"].items()}
    label_free = results.get("label_free") or {}
    for row in label_free.get("rows", []):
        if row["model"] in (TEACHER, STUDENT) and "precision" not in row:
            for key, name in (("overlap", "neighbours"), ("spearman", "Spearman"), ("ndcg", "nDCG@10")):
                if key in row:
                    numbers[f"held-out {name} {row['model']} @{row['width']}"] = row[key]
    if label_free:
        numbers["held-out documents"] = label_free["documents"]  # runs with others are not comparable in these rows
    facts = results.get("facts", {})
    seconds = facts.get("seconds")
    for key, value in (seconds if isinstance(seconds, Mapping) else {"in all": seconds}).items():
        if value is not None:
            numbers[f"seconds, {key}"] = value
    for key, label in (("student_parameters", "student parameters"), ("texts", "training texts")):
        if key in facts:
            numbers[label] = facts[key]
    speed = (facts.get("encoding") or {}).get("student_texts_per_s")
    if speed is not None:
        numbers["student texts/s"] = speed
    weights = sum(file.stat().st_size for file in (folder / "model").rglob("*.safetensors"))
    return numbers | ({"model MB": weights / 1e6} if weights else {})


def _number(label: str, value: float) -> str:
    if " @" in label:
        return f"{100 * value:.2f}"
    return f"{value:,.1f}".removesuffix(".0")


def _setting(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"…{text[-39:]}"


def _step_lines(log: Path) -> dict[int, dict[str, Any]]:
    """Return the lines of a log by step. A killed run may have cut the last line, and a resumed one repeats steps."""
    lines = dict[int, dict[str, Any]]()
    for text in log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []:
        with suppress(ValueError, AttributeError):
            line = json.loads(text)
            if line.get("event") == "step":
                lines[int(line["step"])] = line
    return lines


def _as_planned(config: Mapping[str, Any], plan: Any) -> Mapping[str, Any]:
    """Return a configuration with the steps of the run's plan, which `minutes` sets."""
    stages = config.get("stages", [])
    planned = plan.get("steps") if isinstance(plan, Mapping) else None
    if not isinstance(planned, list) or len(planned) != len(stages):
        return config
    return {**config, "stages": [{**stage, "steps": n} for stage, n in zip(stages, planned, strict=True)]}


def _as_taken(config: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return a configuration with the steps and batch sizes of the log, which `minutes` and few texts change."""
    if not any("stage" in line for line in lines):
        return config
    stages = []
    for stage in config.get("stages", []):
        done = [line for line in lines if line.get("stage") == stage["name"]]
        taken = {"steps": len(done)}
        if done and done[0].get("seconds") and done[0].get("texts_per_s"):
            taken["batch_size"] = round(done[0]["texts_per_s"] * done[0]["seconds"])
        stages.append({**stage, **taken})
    return {**config, "stages": stages}


def _read(path: Path, parse: Any) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except NOT_YAML as error:  # broken JSON is a ValueError
        raise JasperError(f"{path} is damaged ({error}). Fix: restore the file, or leave this run out") from None


if __name__ == "__main__":
    run_cli(main)
