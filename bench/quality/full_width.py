"""``python -m bench ablation --full-width``: what helps the encoder at full width, at equal cost.

    python -m bench ablation --full-width --minutes 10            all arms, three seeds; the same command resumes
    python -m bench ablation --full-width --steps 300             equal steps instead of equal minutes
    python -m bench ablation --full-width --arms base cyclic      only these arms

Each arm differs from the base in one thing. Results are written after every arm. The sets of the configuration choose,
so give the arms that were chosen to other sets before you claim anything.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch

from bench.common.arms import known_settings, result_file
from bench.common.environment import environment
from bench.quality.full_width_arms import BASE, FULL_WIDTH_ARMS, FullWidthArm
from bench.quality.full_width_page import table, write_page
from bench.quality.model_making import Encoder, closed_form_head, soup
from jasper_fast.config.load import load_config
from jasper_fast.config.run import Config
from jasper_fast.data.eval_loaders import load_evals
from jasper_fast.evaluation.score import STUDENT, TEACHER, score_rows
from jasper_fast.models.embedder import load_model, model_encoder
from jasper_fast.utils.atomic import write_atomic

HERE = Path(__file__).parents[1]
RESULTS, PAGE = HERE / "results" / "full-width.json", HERE.parent / "docs" / "full-width.md"
OTHER_SEED = 1000  # is added to the seed of a soup's second run
FITTED = 20_000  # texts of a closed-form head


def main(argv: list[str]) -> int:
    """Run the arms that have no result yet, then write results and page, and print the table."""
    from jasper_fast.config.overrides import parse_overrides

    options, rest = _parser().parse_known_args(argv)
    if not options.page:
        config = load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")])
        budget = f"steps-{options.steps}" if options.steps else f"minutes-{options.minutes:g}"
        options.work = str(Path(options.work) / budget)  # arms of each budget are kept apart
        run(with_budget(config, options.minutes, options.steps), options)
    results = json.loads(Path(options.out).read_text())
    write_page(results, Path(options.page_out))
    print(table(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    names = [arm.name for arm in FULL_WIDTH_ARMS]
    parser = argparse.ArgumentParser(
        prog="python -m bench ablation --full-width", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--config", default=str(HERE / "recipes" / "minilm-full-width.yaml"), help="default: %(default)s"
    )
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=10.0, help="training minutes of an arm (default: 10)")
    budget.add_argument("--steps", type=int, help="optimizer steps of an arm instead, where the machine is busy")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=names, choices=names, metavar="ARM", help="; ".join(names))
    parser.add_argument("--work", default="runs/bench-full-width", help="folder of runs and of single results")
    parser.add_argument("--out", default=str(RESULTS), help="JSON to write (default: %(default)s)")
    parser.add_argument("--page-out", default=str(PAGE), help="page to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="only write the page again from the results")
    return parser


def with_budget(config: Config, minutes: float, steps: int | None, share: float = 1.0) -> Config:
    """Return the configuration whose last stage has a fraction of the minutes, or of the steps if these are given."""
    last = len(config.stages) - 1
    some = {"steps": max(1, round(share * steps))} if steps else {"steps": 0, "minutes": share * minutes}
    stage = {**config.stages[last].model_dump(mode="json"), "minutes": None, **some}
    tree = config.model_dump(mode="json")
    tree["stages"][last] = stage
    return load_config(tree)


def run(config: Config, options: argparse.Namespace) -> None:
    """Run the arms without a result for these settings, and write the results after each."""
    outcomes: list[dict[str, Any]] = []
    arms = [arm for arm in FULL_WIDTH_ARMS if arm.name in options.arms]
    for seed in options.seeds:
        for arm in arms:
            overrides = arm.overrides(config)
            if overrides is None:
                print(f"{arm.name}: left out, the configuration has nothing to change for it", flush=True)
                continue
            changed = load_config(config.model_dump(mode="json"), [*overrides, ("seed", seed)])
            settings = {"arm": arm.name, "made": arm.made, "config": changed.model_dump(mode="json")}
            file = result_file(Path(options.work), _slug(arm.name), seed)
            if known_settings(file) != settings:
                outcome = run_arm(arm, changed, options)
                whole = {"settings": settings, "arm": arm.name, "budget": "equal", "seed": seed} | outcome
                write_atomic(file, json.dumps(whole, indent=1) + "\n")
                print(f"{arm.name}, seed {seed}: {outcome['steps']} steps, {outcome['seconds']:.0f} s", flush=True)
            outcomes.append(json.loads(file.read_text()))
            write_results(config, outcomes, options)


def write_results(config: Config, outcomes: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the results of the arms so far."""
    evalsets = load_evals(config.evaluate)
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "config": config.model_dump(mode="json"),
        "budgets": {"steps": options.steps} if options.steps else {"minutes": options.minutes},
        "seeds": sorted({one["seed"] for one in outcomes}),
        "widths": config.student.heads[:1],
        "sets": [{"name": e.name, "kind": e.kind, "metric": e.metrics[0]} for e in evalsets],
        "runs": [{key: value for key, value in one.items() if key != "settings"} for one in outcomes],
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")


def run_arm(arm: FullWidthArm, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Train or make an arm and score it.

    Returns:
        The seconds, steps and texts of training, rows of scores, and the teacher's scores.
    """
    work = Path(options.work)
    if not arm.made:
        folder = work / f"{_slug(arm.name)}-seed{config.seed}"
        outcome = train_run(config, folder)
        if arm.name != BASE:  # others are not needed again
            shutil.rmtree(folder)
        return outcome
    if arm.made in ("soup", "soup of full runs"):
        return run_soup(arm, config, options)
    folder = work / f"{BASE}-seed{config.seed}"
    outcome = train_run(config, folder)
    encode = fitted_encoder(config, folder / "model", 1 if arm.made == "last layer" else 3)
    return outcome | {"rows": score(config, encode)}


def run_soup(arm: FullWidthArm, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Train two runs with other seeds, average their weights, and score the average."""
    work, share = Path(options.work), 0.5 if arm.made == "soup" else 1.0
    parts, folders = [], []
    for seed in (config.seed, config.seed + OTHER_SEED):
        part = with_budget(config, options.minutes, options.steps, share)
        part = load_config(part.model_dump(mode="json"), [("seed", seed)])
        folders.append(work / (f"{BASE}-seed{seed}" if share == 1.0 else f"half-seed{seed}"))
        parts.append(train_run(part, folders[-1]))
    made = work / f"{_slug(arm.name)}-seed{config.seed}"
    shutil.rmtree(made, ignore_errors=True)
    soup([folder / "model" for folder in folders], made)
    model = load_model(str(made), config.student.max_length, trust_remote_code=config.student.trust_remote_code)
    rows = score(config, model_encoder(model, config.student.heads[:1]))
    for folder in (made, *(folder for folder in folders if share != 1.0)):
        shutil.rmtree(folder)
    sums = {key: sum(part[key] for part in parts) for key in ("seconds", "steps", "texts")}
    return sums | {"rows": rows, "teacher": parts[0]["teacher"]}


def train_run(config: Config, folder: Path) -> dict[str, Any]:
    """Train a run unless it is finished, and return its seconds, steps, texts and scores.

    A folder of a run with other settings is deleted first.
    """
    from jasper_fast.train import train
    from jasper_fast.training.run.folder import existing_difference

    if folder.exists() and (difference := existing_difference(folder, config)):
        print(f"{folder} is trained again, since its settings differ ({'; '.join(difference)})", flush=True)
        shutil.rmtree(folder)
    path = train(config, out=folder)
    shutil.rmtree(path / "checkpoints", ignore_errors=True)  # of a finished run
    rows = json.loads((path / "results.json").read_text())["rows"]
    lines = [json.loads(line) for line in (path / "log.jsonl").read_text().splitlines()]
    stage = config.stages[-1]
    steps = [line for line in lines if line["event"] == "step" and line["stage"] == stage.name]
    own = [
        row for row in rows if row["width"] == config.student.heads[0] and row.get("precision", "float32") == "float32"
    ]
    return {
        "seconds": sum(line["seconds"] for line in steps),
        "steps": len(steps),
        "texts": len(steps) * stage.batch_size,
        "rows": [_row(row["width"], row["scores"]) for row in own if row["model"] == STUDENT],
        "teacher": next((row["scores"] for row in rows if row["model"] == TEACHER), {}),
    }


def fitted_encoder(config: Config, model: Path, layers: int) -> Encoder:
    """Return the encoder of a run with a closed-form head on the states of its last layers."""
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import ensure_teachers

    texts = prepare_texts(config).texts
    some = texts[:FITTED]
    teacher = ensure_teachers(config, texts).read(torch.arange(len(some["text"])).numpy()).numpy()
    return closed_form_head(model, layers, some["text"], some["role"], teacher, config.student.max_length)


def score(config: Config, encode: Encoder) -> list[dict[str, Any]]:
    """Return the rows of scores of an encoder at full width."""
    return [_row(row["width"], row["scores"]) for row in score_rows(load_evals(config.evaluate), {STUDENT: encode})]


def _row(width: int, scores: dict[str, float]) -> dict[str, Any]:
    return {"width": width, "precision": "float32", "scores": scores}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower())
