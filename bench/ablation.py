"""``python -m bench ablation``: what each loss, batch, target and head is worth for narrow vectors.

    python -m bench ablation                          all arms, three seeds; the same command again goes on
    python -m bench ablation --groups losses batch    only these questions
    python -m bench ablation --page                   only draw the page again from the results

One encoder is distilled at full width first and then frozen; its pooled states are kept, so that an arm, which trains
narrow heads, takes seconds. Every arm is trained twice: for equally many seconds, and on
equally many texts. The encoder arms, which compare losses at full width, train it anew on equally many texts.
What is asked for is trained; results and page have everything that is known of the same encoder, budgets and arms.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench._ablation_arms import ARMS, ENCODER_ARMS, Arm
from bench._ablation_page import write_page
from bench._ablation_world import World, prepare
from bench._arms import known_settings, result_file
from bench._environment import environment
from jasper_fast.codes import PRECISIONS
from jasper_fast.config import Config, StageConfig, load_config
from jasper_fast.config_overrides import parse_overrides
from jasper_fast.encoders import normalise
from jasper_fast.files import write_atomic
from jasper_fast.metrics import score_codes
from jasper_fast.training.neighbours import cached_graph
from jasper_fast.sampler import BatchPlan
from jasper_fast.training.sampler import neighbour_batches, random_batches
from jasper_fast.stages import StageLoss
from jasper_fast.training.head_init import principal_heads

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "ablation.json", HERE.parent / "docs" / "ablation.md"
WARMUP, CLIP = 0.05, 1.0
ENCODER = "encoder"  # the group of arms that train it


def main(argv: list[str]) -> int:
    """Run the arms that have no result yet, then write results and page."""
    groups = [*dict.fromkeys(arm.group for arm in ARMS), ENCODER]
    parser = argparse.ArgumentParser(prog="python -m bench ablation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(HERE / "recipes" / "minilm-ablation.yaml"),
        help="default: %(default)s, on public sets in ../shared/data; ablation-docstrings.yaml beside it needs nothing "
        "but the installed packages",
    )
    parser.add_argument("--encoder", help="a finished run's folder instead of training the configuration's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groups", nargs="+", default=groups, choices=groups)
    parser.add_argument("--widths", type=int, nargs="+", default=[128, 64, 32], help="of the narrow heads")
    parser.add_argument("--seconds", type=float, default=8.0, help="of training, for an arm's first run")
    parser.add_argument("--texts", type=int, default=131_072, help="texts of its second run, repeats counted")
    parser.add_argument("--work", default="runs/bench-ablation", help="the encoder and the results of single arms")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--page-out", default=str(PAGE))
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    options, rest = parser.parse_known_args(argv)
    if not options.page:
        config = load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")])
        run(config, options)
    write_page(json.loads(Path(options.out).read_text()), Path(options.page_out))
    print(f"written to {options.out} and {options.page_out}")
    return 0


def run(config: Config, options: argparse.Namespace) -> None:
    """Every arm asked for with every seed, each kept as soon as it is done; then all that are known in one file."""
    work = Path(options.work)
    world = prepare(config, options.encoder, work)
    budgets: list[tuple[str, float]] = [("seconds", options.seconds), ("texts", options.texts)]
    found: list[dict[str, Any]] = []
    for seed in _seeds(work, options.seeds):
        for arm in ARMS:
            if arm.searched and world.texts == len(world.states):
                continue  # nothing is searched, or the teacher cannot read it
            asked = seed in options.seeds and arm.group in options.groups
            for budget, amount in budgets:
                settings = {
                    "arm": asdict(arm) | {"stage": arm.settings(world.width, options.widths).model_dump(mode="json")},
                    "world": world.identity,
                    budget: amount,
                }
                file = result_file(work, f"{arm.name} by {budget}", seed)
                if settings != known_settings(file):
                    if not asked:
                        continue
                    outcome = run_arm(world, arm, options.widths, seed, budget, amount)
                    outcome |= {"group": arm.group, "arm": arm.name, "budget": budget, "seed": seed}
                    write_atomic(file, json.dumps({"settings": settings} | outcome, indent=1) + "\n")
                    print(f"{arm.name}, seed {seed}, {outcome['steps']} steps, {outcome['seconds']:.1f} s", flush=True)
                found.append(json.loads(file.read_text()))
        asked = seed in options.seeds and ENCODER in options.groups
        found += list(run_encoder_arms(config, seed, work, asked))
    results = {
        "environment": environment() | {"threads": torch.get_num_threads()},
        "config": config.model_dump(mode="json"),
        "budgets": dict(budgets),
        "seeds": sorted({one["seed"] for one in found}),
        "widths": [world.width, *options.widths],
        "facts": world.facts,
        "sets": [{"name": e.name, "kind": e.kind, "metric": e.metrics[0]} for e, _ in world.evals],
        "floors": world.floors(options.widths),
        "runs": [{key: value for key, value in one.items() if key != "settings"} for one in found],
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")


def run_arm(world: World, arm: Arm, widths: list[int], seed: int, budget: str, amount: float) -> dict[str, Any]:
    """Train and score one arm.

    Returns:
        seconds, steps and texts of training; rows of scores by width and precision.
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
    """The heads' (weight, bias) by width after so many seconds or texts, and what was spent.

    The learning rate rises and falls over the budget, whichever it is counted in.
    """
    torch.manual_seed(seed)
    teachers, texts = world.teachers[arm.teachers], _texts(world, arm)
    if arm.heads != "independent":
        linears = {world.width: world.widest_head()}
    else:
        linears = {width: nn.Linear(world.states.shape[1], width) for width in stage.heads}
    if arm.start == "principal":
        widest = world.widest_head()
        axes = principal_heads(world.states[:texts], widest.weight.detach(), widest.bias.detach(), stage.heads, seed)
        for width, (weight, bias) in axes.items():
            linears[width].load_state_dict({"weight": weight, "bias": bias})
    parameters = [p for linear in linears.values() for p in linear.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=stage.lr, weight_decay=stage.weight_decay, fused=True)
    loss_of, plan = StageLoss(stage, world.width), _plan(world, arm, stage, seed)
    steps, start, done = 0, time.perf_counter(), 0.0
    while done < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = stage.lr * min((done + 1e-3) / WARMUP, (1 - done) / (1 - WARMUP))
        rows = plan(steps)
        states = world.states[rows]
        vectors = {width: linear(states) for width, linear in linears.items()}
        if arm.heads == "prefix":
            vectors = {width: vectors[world.width][:, :width] for width in stage.heads}
        loss_of(vectors, teachers.read(rows)).loss.backward()
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        spent = time.perf_counter() - start
        done = (spent if budget == "seconds" else steps * stage.batch_size) / amount
    trained = {width: linears[width if width in linears else world.width] for width in stage.heads}
    heads = {w: (head.weight.detach()[:w], head.bias.detach()[:w]) for w, head in trained.items()}
    return heads, {"seconds": time.perf_counter() - start, "steps": steps, "texts": steps * stage.batch_size}


def run_encoder_arms(config: Config, seed: int, work: Path, asked: bool) -> Iterator[dict[str, Any]]:
    """The configuration's run with other losses in its last stage, at full width; unless asked for, what has ended."""
    from jasper_fast.evaluate import STUDENT
    from jasper_fast.training.run.folder import RunFolder, existing_difference
    from jasper_fast.train import train

    last = len(config.stages) - 1
    for name, weights in ENCODER_ARMS.items():
        folder = work / f"{name.replace(': ', '-').replace(' ', '-')}-seed{seed}"
        overrides = [("seed", seed), (f"stages.{last}.weights", weights)]
        own = load_config(config.model_dump(mode="json"), overrides)
        if not asked and (not RunFolder(folder).finished or existing_difference(folder, own)):
            continue
        run = train(own, out=folder)
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


def _seeds(work: Path, asked: list[int]) -> list[int]:
    """Those asked for, and those that something is known of."""
    known = (path.name.removesuffix(".json").rpartition("-seed")[2] for path in work.glob("*-seed*"))
    return sorted({*asked, *(int(seed) for seed in known if seed.isdigit())})


def _texts(world: World, arm: Arm) -> int:
    return len(world.states) if arm.searched else world.texts


def _plan(world: World, arm: Arm, stage: StageConfig, seed: int) -> BatchPlan:
    n = _texts(world, arm)
    if stage.batches == "random":
        return random_batches(n, stage.batch_size, seed, 0)
    teachers = world.teachers["one" if arm.teachers == "own" else arm.teachers]  # neighbours are the teachers' in a run
    graph = cached_graph(world.cache, teachers, n, stage.neighbours, print)
    return neighbour_batches(graph, stage.batch_size, seed, 0, stage.random_share)
