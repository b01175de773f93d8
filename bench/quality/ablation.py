"""``python -m bench ablation``: measure the effect of each loss, batch, target and head on narrow embeddings.

    python -m bench ablation                          all arms, three seeds; the same command resumes
    python -m bench ablation --groups losses batch    only these questions
    python -m bench ablation --page                   only write the page again from the results
    python -m bench ablation --full-width --minutes 10    other arms, which train the encoder: see full_width.py

One encoder is distilled at full width first and then frozen. Its pooled states are kept, so training the narrow heads
of an arm takes seconds. Every arm is trained twice: for equally many seconds, and on equally many texts. The encoder
arms compare losses at full width, so they train the encoder again, on equally many texts. Only the selected groups and
seeds are trained. Results and page have all stored results of the same encoder, budgets and arms.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.common.arms import known_settings, result_file
from bench.common.environment import environment
from bench.quality.ablation_arms import ARMS, ENCODER_ARMS, Arm
from bench.quality.ablation_page import write_page
from bench.quality.ablation_setup import World, prepare
from jasper_fast.config.load import load_config
from jasper_fast.config.overrides import parse_overrides
from jasper_fast.config.run import Config
from jasper_fast.config.stage import StageConfig
from jasper_fast.evaluation.metrics import score_codes
from jasper_fast.losses import AnyOutput
from jasper_fast.models.embedder import normalise
from jasper_fast.models.quantization import PRECISIONS
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch
from jasper_fast.training.head_init import principal_heads
from jasper_fast.training.loop import train_stage
from jasper_fast.training.neighbours import cached_graph
from jasper_fast.training.run.checkpoint import Position
from jasper_fast.training.run.run import Run
from jasper_fast.training.sampler import BatchPlan, neighbour_batches, random_batches
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.utils.atomic import write_atomic

HERE = Path(__file__).parents[1]
RESULTS, PAGE = HERE / "results" / "ablation.json", HERE.parent / "docs" / "ablation.md"
WARMUP, CLIP = 0.05, 1.0
ENCODER = "encoder"  # group of the arms that train the encoder


def main(argv: list[str]) -> int:
    """Run the arms that have no result yet, then write results and page."""
    if "--full-width" in argv:
        from bench.quality import full_width

        return full_width.main([argument for argument in argv if argument != "--full-width"])
    groups = [*dict.fromkeys(arm.group for arm in ARMS), ENCODER]
    parser = argparse.ArgumentParser(prog="python -m bench ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(HERE / "recipes" / "minilm-ablation.yaml"),
        help="default: %(default)s, on public sets in ../shared/data; ablation-docstrings.yaml next to it needs only "
        "the installed packages",
    )
    parser.add_argument("--encoder", help="folder of a finished run, instead of training the encoder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groups", nargs="+", default=groups, choices=groups)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 32], help="widths of the narrow heads")
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds of training in an arm's first run")
    parser.add_argument("--texts", type=int, default=131_072, help="texts of its second run, including repeats")
    parser.add_argument("--work", default="runs/bench-ablation", help="folder of the encoder and of single results")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--page-out", default=str(PAGE))
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--full-width", action="store_true", help="other arms, with other options (add --help)")
    options, rest = parser.parse_known_args(argv)
    if not options.page:
        config = load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")])
        run(config, options)
    write_page(json.loads(Path(options.out).read_text()), Path(options.page_out))
    print(f"written to {options.out} and {options.page_out}")
    return 0


def run(config: Config, options: argparse.Namespace) -> None:
    """Run the selected arms and seeds, and store each result at once. Then write all stored results to one file."""
    work = Path(options.work)
    world = prepare(config, options.encoder, work)
    budgets: list[tuple[str, float]] = [("seconds", options.seconds), ("texts", options.texts)]
    outcomes: list[dict[str, Any]] = []
    for seed in _seeds(work, options.seeds):
        for arm in ARMS:
            if arm.searched and world.texts == len(world.states):
                continue  # no retrieval set, or a teacher that cannot encode its documents
            selected = seed in options.seeds and arm.group in options.groups
            for budget, amount in budgets:
                settings = {
                    "arm": asdict(arm) | {"stage": arm.settings(world.width, options.widths).model_dump(mode="json")},
                    "world": world.identity,
                    budget: amount,
                }
                file = result_file(work, f"{arm.name} by {budget}", seed)
                if settings != known_settings(file):
                    if not selected:
                        continue
                    outcome = run_arm(world, arm, options.widths, seed, budget, amount)
                    outcome |= {"group": arm.group, "arm": arm.name, "budget": budget, "seed": seed}
                    write_atomic(file, json.dumps({"settings": settings} | outcome, indent=1) + "\n")
                    print(f"{arm.name}, seed {seed}, {outcome['steps']} steps, {outcome['seconds']:.1f} s", flush=True)
                outcomes.append(json.loads(file.read_text()))
        selected = seed in options.seeds and ENCODER in options.groups
        outcomes += list(run_encoder_arms(config, seed, work, selected))
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "config": config.model_dump(mode="json"),
        "budgets": dict(budgets),
        "seeds": sorted({one["seed"] for one in outcomes}),
        "widths": [world.width, *options.widths],
        "facts": world.facts,
        "sets": [{"name": e.name, "kind": e.kind, "metric": e.metrics[0]} for e, _ in world.evals],
        "floors": world.floors(options.widths),
        "runs": [{key: value for key, value in one.items() if key != "settings"} for one in outcomes],
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")


def run_arm(world: World, arm: Arm, widths: list[int], seed: int, budget: str, amount: float) -> dict[str, Any]:
    """Train and score one arm.

    Returns:
        The seconds, steps and texts of training, and rows of scores by width and precision.
    """
    stage = arm.settings(world.width, widths)
    heads, spent = train_heads(world, arm, stage, seed, budget, amount)
    rows = []
    for width, (weight, bias) in heads.items():
        for precision in PRECISIONS if arm.codes else PRECISIONS[:1]:
            scores = {}
            for evalset, states in world.evals:
                vectors = {name: normalise((s @ weight.T + bias).numpy()) for name, s in states.items()}
                for metric, value in score_codes(evalset, vectors, precision).items():
                    scores[f"{evalset.name}/{metric}"] = value
            rows.append({"width": width, "precision": precision, "scores": scores})
    return spent | {"rows": rows}


def train_heads(
    world: World, arm: Arm, stage: StageConfig, seed: int, budget: str, amount: float
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, float]]:
    """Return the heads' (weight, bias) by width after the budget, and the seconds, steps and texts of training."""
    torch.manual_seed(seed)
    heads = FrozenStudent(world, arm, stage, seed)
    timed = BudgetStage(world, arm, stage, seed, budget, amount)
    student: Any = heads
    train_stage(Run.local(world.config, torch.device("cpu")), student, timed, Position(0, 0, 0))
    return heads.maps(stage.heads), timed.spent


class FrozenStudent(nn.Module):
    """The heads of an arm on the pooled states of a frozen encoder, with the interface of a student.

    Args:
        world: the states and the widest head.
        arm: arm with the kind of heads and their initialization.
        stage: stage with the widths.
        seed: seed of the principal axes.
    """

    def __init__(self, world: World, arm: Arm, stage: StageConfig, seed: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(vector_dropout=0.0)
        self.hidden_size, self.width, self.prefix = world.states.shape[1], world.width, arm.heads == "prefix"
        if arm.heads != "independent":
            linears = {world.width: world.widest_head()}
        else:
            linears = {width: nn.Linear(self.hidden_size, width) for width in stage.heads}
        if arm.start == "principal":
            states, widest = world.states[: _texts(world, arm)], world.widest_head()
            axes = principal_heads(states, widest.weight.detach(), widest.bias.detach(), stage.heads, seed)
            for width, (weight, bias) in axes.items():
                linears[width].load_state_dict({"weight": weight, "bias": bias})
        self.linears = nn.ModuleDict({str(width): linear for width, linear in linears.items()})

    def project(self, states: Tensor, widths: list[int], dropout: Tensor | None = None) -> dict[int, Tensor]:
        """Return the heads' embeddings, {width: (B, width)}."""
        embeddings = {int(width): linear(states) for width, linear in self.linears.items()}
        return {width: embeddings[self.width][:, :width] for width in widths} if self.prefix else embeddings

    def maps(self, widths: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the heads' (weight, bias) by width."""
        linears: dict[int, Any] = {int(width): linear for width, linear in self.linears.items()}
        chosen = {width: linears[width if width in linears else self.width] for width in widths}
        return {w: (head.weight.detach()[:w], head.bias.detach()[:w]) for w, head in chosen.items()}


class BudgetStage:
    """A stage that ends after a budget of seconds or texts. The learning rate rises and falls over that budget.

    Args:
        world: states and teachers.
        arm: arm with the choice of teachers and texts.
        stage: settings of the stage. ``steps`` is not used.
        seed: seed of the batches.
        budget: "seconds" or "texts".
        amount: number of seconds or texts.
    """

    def __init__(self, world: World, arm: Arm, stage: StageConfig, seed: int, budget: str, amount: float) -> None:
        self.config, self.index = stage.model_copy(update={"steps": sys.maxsize, "clip": CLIP}), 0
        self.loss: Callable[..., AnyOutput] = StageLoss(stage, world.width)
        self.spent: dict[str, float] = {}
        self._world, self._teachers, self._plan = world, world.teachers[arm.teachers], _plan(world, arm, stage, seed)
        self._budget, self._amount, self._done = budget, amount, 0.0

    def problems(self, student: Student, ranks: int) -> list[str]:
        """Return nothing: arms are checked when they are defined."""
        return []

    def begin(self, run: Run, student: Student, start: Position) -> torch.optim.Optimizer:
        """Return AdamW over all heads, which decays biases too."""
        settings: dict[str, Any] = {"lr": self.config.lr, "weight_decay": self.config.weight_decay, "fused": True}
        return torch.optim.AdamW(student.parameters(), **settings)

    def learning_rate(self, step: int) -> float:
        """Return the learning rate for the part of the budget that is spent."""
        return self.config.lr * min((self._done + 1e-3) / WARMUP, (1 - self._done) / (1 - WARMUP))

    def batches(self, first_step: int) -> Iterator[tuple[int, Batch]]:
        """Yield (step, batch) until the budget is spent."""
        step, started = first_step, time.perf_counter()
        while self._done < 1.0:
            rows = self._plan(step)
            yield step, Batch(rows, self._teachers.read(rows), None, self._world.states[rows], 0, 0, 0.0)
            step += 1
            self.spent = {
                "seconds": time.perf_counter() - started,
                "steps": step,
                "texts": step * self.config.batch_size,
            }
            self._done = self.spent[self._budget] / self._amount

    def end(self, run: Run) -> None:
        """Do nothing."""


def run_encoder_arms(config: Config, seed: int, work: Path, selected: bool) -> Iterator[dict[str, Any]]:
    """Train the configuration with other losses in its last stage, at full width, and yield the results.

    Without ``selected`` it yields only the results of finished runs.
    """
    from jasper_fast.evaluation.score import STUDENT
    from jasper_fast.train import train
    from jasper_fast.training.run.folder import RunFolder, existing_difference

    last = len(config.stages) - 1
    for name, weights in ENCODER_ARMS.items():
        folder = work / f"{name.replace(': ', '-').replace(' ', '-')}-seed{seed}"
        overrides = [("seed", seed), (f"stages.{last}.weights", weights)]
        changed = load_config(config.model_dump(mode="json"), overrides)
        if not selected and (not RunFolder(folder).finished or existing_difference(folder, changed)):
            continue
        run = train(changed, out=folder)
        rows = json.loads((run / "results.json").read_text())["rows"]
        lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
        steps = [line for line in lines if line["event"] == "step" and line["stage"] == config.stages[last].name]
        yield {
            "group": ENCODER,
            "arm": name,
            "budget": "texts",
            "seed": seed,
            "seconds": sum(line["seconds"] for line in steps),
            "steps": len(steps),
            "texts": len(steps) * config.stages[last].batch_size,
            "rows": [
                {"width": row["width"], "precision": "float32", "scores": row["scores"]}
                for row in rows
                if row["model"] == STUDENT
            ],
        }


def _seeds(work: Path, selected: list[int]) -> list[int]:
    """Return the selected seeds and those with stored results."""
    stored = (path.name.removesuffix(".json").rpartition("-seed")[2] for path in work.glob("*-seed*"))
    return sorted({*selected, *(int(seed) for seed in stored if seed.isdigit())})


def _texts(world: World, arm: Arm) -> int:
    return len(world.states) if arm.searched else world.texts


def _plan(world: World, arm: Arm, stage: StageConfig, seed: int) -> BatchPlan:
    n = _texts(world, arm)
    if stage.batches == "random":
        return random_batches(n, stage.batch_size, seed, 0)
    teachers = world.teachers["one" if arm.teachers == "own" else arm.teachers]  # neighbours are the teachers' in a run
    graph = cached_graph(world.cache, teachers, n, stage.neighbours, print)
    return neighbour_batches(graph, stage.batch_size, seed, 0, stage.random_share)
