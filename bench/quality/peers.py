"""Distillation quality at equal training time: ours against current peers, PCA and truncation.

    python -m bench distil --seeds 0 1 2
    python -m bench distil --seconds 180      train every arm for about 180 seconds
    python -m bench distil --together 2       two arms at the same time, each on half of the cores
    python -m bench distil --page             only write the page again from the results

Every arm has the same student to start from, with the same layers and head width. It trains on the same texts and
teacher embeddings, in fp32, on the same machine, in a separate process. A peer trains for as many seconds as ours took
with that seed. These include our neighbour graph and pooling. Teacher embeddings are shared, and their time counts for
no arm. ``bench/quality/peer_arms.py`` has the peers. Those whose package is missing are left out, with a line that says
so.

The learning rates of the peers are searched with the first seed, one for each family of peers. The best of a peer's own
rate and ``--peer-lr`` has the highest mean over ``--tuned-on``. The sets of ``KEPT_ASIDE`` take no part in any choice.
Results are written after every arm. The same command resumes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from statistics import mean
from threading import Event, Lock
from typing import Any

import torch

from bench.common.arms import known_settings, result_file
from bench.common.environment import code, environment
from bench.quality.peer_arms import INSTALL, PEERS, Training, missing, score_peer
from bench.quality.peers_page import OURS, not_ahead, of_sets, table, write_page
from jasper_fast.config.load import load_config
from jasper_fast.config.run import Config
from jasper_fast.teachers.model import prompts_of
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

KEPT_ASIDE = ("cranfield", "cisi", "vaswani", "stsb", "sick", "clinc150")  # judge on these, and choose nothing on them
TUNED_ON = ("liveqa_med", "pubmedqa")  # choices may use these
HERE = Path(__file__).parents[1]
RESULTS, PAGE = HERE / "results" / "distil.json", HERE.parent / "docs" / "peers.md"


@dataclass(frozen=True)
class Job:
    """One arm with one seed. ``lr`` is for peers only, as our recipe has its learning rates."""

    arm: str
    seed: int
    lr: float = 0.0

    def result(self, work: Path) -> Path:
        """Return the result file of this job."""
        return result_file(work / f"lr-{self.lr:g}" if self.lr else work, self.arm, self.seed)


def main(argv: list[str]) -> int:
    """Run the arms without a result, then write results and page, and print the table."""
    from jasper_fast.config.overrides import parse_overrides

    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if options.page:
        write_page(json.loads(Path(options.out).read_text()), Path(options.page_out))
        return 0
    config = selected(load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")]), options)
    if options.one:
        if options.cores:
            os.sched_setaffinity(0, options.cores)
        run_arm(Job(options.one[0], int(options.one[1]), float(options.one[2])), config, options)
        return 0
    if options.together > 1 and not hasattr(os, "sched_setaffinity"):
        parser.error("--together needs CPU affinity, which this system lacks. Fix: leave it out")
    options.arms = installed(options.arms)
    prepare(config)
    runner = Runner(argv, config, options)
    runner.search()
    runner.run(jobs_of(options, runner.searches))
    results = runner.write()
    write_page(results, Path(options.page_out))
    print(table(results))
    print(not_ahead(results))
    return 0


def selected(config: Config, options: argparse.Namespace) -> Config:
    """Return the configuration with the sets and the seconds of the options.

    Raises:
        JasperError: a set is not in the configuration, or one that is kept aside would choose learning rates.
    """
    if aside := [name for name in options.tuned_on if name in KEPT_ASIDE]:
        raise JasperError(f"--tuned-on: {', '.join(aside)} are kept aside from every choice. Fix: name other sets")
    if options.sets:
        from jasper_fast.data.eval_loaders import load_evals

        names = {evalset.name: one for one, evalset in zip(config.evaluate, load_evals(config.evaluate), strict=True)}
        if unknown := [name for name in options.sets if name not in names]:
            raise JasperError(f"--sets: got {', '.join(unknown)}, expected some of {', '.join(names)}. Fix: name these")
        config = config.model_copy(update={"evaluate": [names[name] for name in options.sets]})
    return config.model_copy(update={"minutes": options.seconds / 60}) if options.seconds else config


def installed(arms: list[str]) -> list[str]:
    """Return the arms whose packages are installed, and print the others."""
    for arm in arms:
        if absent := missing(arm):
            print(f"{arm} is left out: {', '.join(absent)} not installed. Fix: {INSTALL}", flush=True)
    return [arm for arm in arms if not missing(arm)]


def jobs_of(options: argparse.Namespace, searches: Sequence[dict[str, Any]]) -> list[Job]:
    """Return the jobs of all arms whose learning rate is known, seed by seed."""
    rates = {arm: search["lr"] for search in searches for arm in search["arms"]}
    ready = [arm for arm in options.arms if arm == OURS or PEERS[arm].fixed or arm in rates]
    return [Job(arm, seed, rates.get(arm, 0.0)) for seed in options.seeds for arm in ready]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench distil", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(HERE / "recipes" / "minilm-peers.yaml"),
        help="configuration of ours (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every arm (default: 0 1 2)")
    parser.add_argument("--arms", nargs="+", default=[OURS, *PEERS], choices=[OURS, *PEERS], help="default: all")
    parser.add_argument("--sets", nargs="+", metavar="SET", help="evaluation sets, by name (default: all)")
    parser.add_argument("--work", default="runs/bench-distil", help="folder of runs and of single arms' results")
    parser.add_argument("--out", default=str(RESULTS), help="JSON to write (default: %(default)s)")
    parser.add_argument("--page-out", default=str(PAGE), help="page to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="only write the page again from the results")
    parser.add_argument(
        "--peer-lr",
        type=float,
        nargs="+",
        default=[2e-4, 4e-4, 8e-4],
        help="learning rates to choose from, besides a peer's own",
    )
    parser.add_argument("--peer-batch", type=int, default=32, help="batch size of a peer (default: %(default)s)")
    parser.add_argument(
        "--tuned-on",
        nargs="+",
        default=list(TUNED_ON),
        metavar="SET",
        help="evaluation sets for choosing the peers' learning rates (default: %(default)s)",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        help="training seconds of every arm; a peer never gets fewer than ours took (default: the recipe's steps)",
    )
    parser.add_argument("--together", type=int, default=1, help="arms at the same time, each on a part of the cores")
    parser.add_argument("--one", nargs=3, metavar=("ARM", "SEED", "LR"), help=argparse.SUPPRESS)  # a child process
    parser.add_argument("--cores", type=int, nargs="+", help=argparse.SUPPRESS)  # a child's
    return parser


def prepare(config: Config) -> None:
    """Prepare texts, teacher embeddings and neighbour graph for all arms, on all cores."""
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import ensure_teachers
    from jasper_fast.training.sampler import batch_plan

    texts = prepare_texts(config).texts
    teachers = ensure_teachers(config, texts)
    for index in range(len(config.stages)):
        batch_plan(config, index, texts, teachers, print)


class Runner:
    """Runner of jobs in separate processes, ``options.together`` at a time."""

    def __init__(self, argv: list[str], config: Config, options: argparse.Namespace) -> None:
        self.argv, self.config, self.options = argv, config, options
        self.cores: SimpleQueue[list[int]] = SimpleQueue()
        self.threads = torch.get_num_threads()
        self._lock = Lock()
        self.searches: list[dict[str, Any]] = []
        if options.together > 1:
            all_cores = sorted(os.sched_getaffinity(0))
            self.threads = len(all_cores) // options.together
            if not self.threads:
                raise JasperError(f"--together: {options.together} arms on {len(all_cores)} cores. Fix: lower it")
            for i in range(options.together):
                self.cores.put(all_cores[i * self.threads : (i + 1) * self.threads])
        else:
            self.cores.put([])

    def write(self) -> dict[str, Any]:
        """Write and return the results, with every arm that has one for these settings."""
        options = self.options
        runs: dict[str, list[Any]] = {}
        for job in jobs_of(options, self.searches):
            if is_known(job, self.config, options):
                runs.setdefault(job.arm, []).append(json.loads(job.result(Path(options.work)).read_text()))
        facts = {"seeds": options.seeds, "threads": self.threads, "together": options.together}
        results = {
            "environment": environment() | facts | {"config": self.config.model_dump(mode="json")},
            "kept_aside": list(KEPT_ASIDE),
            "tuned_on": options.tuned_on,
            "search": self.searches,
            "arms": runs,
        }
        write_atomic(options.out, json.dumps(results, indent=1) + "\n")
        return results

    def search(self) -> None:
        """Run ours, then search the learning rate of each family of peers.

        A search has its family's arms, the arm that was searched with, the best rate, and the mean score by rate.
        """
        options = self.options
        self.run([Job(OURS, seed) for seed in options.seeds if OURS in options.arms])
        chosen = [arm for arm in options.arms if arm != OURS and not PEERS[arm].fixed]
        for family in dict.fromkeys(PEERS[arm].family for arm in chosen):
            arms = [arm for arm in chosen if PEERS[arm].family == family]
            arm = next((arm for arm in arms if PEERS[arm].searched), arms[0])
            rates = PEERS[arm].rates(options.peer_lr)
            jobs = [Job(arm, options.seeds[0], lr) for lr in rates] if len(rates) > 1 else []
            self.run(jobs)
            means = [self._tuned_mean(job) for job in jobs]
            best = rates[means.index(max(means))] if means else rates[0]
            by_rate = {f"{job.lr:g}": score for job, score in zip(jobs, means, strict=True)}
            self.searches.append({"arms": arms, "arm": arm, "lr": best, "means": by_rate})

    def _tuned_mean(self, job: Job) -> float:
        rows = json.loads(job.result(Path(self.options.work)).read_text())["rows"]
        (row,) = [r for r in rows if r["model"] == job.arm and r["width"] == self.config.student.heads[0]]
        scores = of_sets(row["scores"], self.options.tuned_on)
        if not scores:
            raise JasperError(
                f"--tuned-on: got {', '.join(self.options.tuned_on)}, expected some of the evaluated sets. Fix: name "
                "evaluated sets, or give one --peer-lr"
            )
        return mean(scores.values())

    def run(self, jobs: Sequence[Job]) -> None:
        """Run the jobs without a result for these settings, in order. A peer waits for ours of the same seed."""
        self.ended = {job.seed: Event() for job in jobs if job.arm == OURS}
        with ThreadPoolExecutor(self.options.together) as pool:
            codes = list(pool.map(self._child, jobs))
        failed = [f"{job.arm} with seed {job.seed}" for job, code in zip(jobs, codes, strict=True) if code]
        if failed:
            raise JasperError(f"failed: {', '.join(failed)}. Fix: run the same command again, which resumes there")

    def _child(self, job: Job) -> int:
        if job.arm != OURS and not self.options.seconds and job.seed in self.ended:
            self.ended[job.seed].wait()
        cores = self.cores.get()
        try:
            if is_known(job, self.config, self.options):
                return 0
            print(f"=== {job.arm}, seed {job.seed}" + (f", learning rate {job.lr:g}" if job.lr else ""), flush=True)
            command = [sys.executable, "-m", "bench", "distil", *self.argv]
            command += ["--one", job.arm, str(job.seed), repr(job.lr)]
            command += ["--cores", *map(str, cores)] if cores else []
            threads = {"OMP_NUM_THREADS": str(len(cores))} if cores else {}
            status = subprocess.run(command, check=False, env=os.environ | threads).returncode
            with self._lock:
                self.write()
            return status
        finally:
            self.cores.put(cores)
            if job.arm == OURS:
                self.ended[job.seed].set()


def is_known(job: Job, config: Config, options: argparse.Namespace) -> bool:
    """Return whether a job has a result for these settings."""
    stored = known_settings(job.result(Path(options.work)))
    return stored is not None and stored == settings_of(job, config, options)


def settings_of(job: Job, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a stored result must match to be reused. A peer's exclude our stages."""
    if job.arm == OURS:
        return {"config": _decided(config, exclude={"seed"})}
    shared = _decided(config, include={"student", "teachers", "data", "evaluate", "precision"})
    if PEERS[job.arm].fixed:
        return {"config": shared}
    seconds = max(options.seconds or 0.0, seconds_of_ours(Path(options.work), job.seed, options))
    return {"config": shared, "lr": job.lr, "batch": options.peer_batch, "seconds": seconds}


def _decided(config: Config, **which: set[str]) -> dict[str, Any]:
    """Return sections of a configuration as plain values, with the resolved prompts of its teachers."""
    tree = config.model_dump(mode="json", **which)
    for values, teacher in zip(tree["teachers"], config.teachers, strict=True):
        values["prompts"] = prompts_of(teacher)
    return tree


def run_arm(job: Job, config: Config, options: argparse.Namespace) -> None:
    """Train one arm with one seed and write its scores. All arms and seeds share texts and teacher embeddings."""
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import ensure_teachers

    work = Path(options.work)
    outcome: dict[str, Any] = {"arm": job.arm, "seed": job.seed, "settings": settings_of(job, config, options)}
    outcome["code"] = code([Path(__file__)])  # only recorded: results of other code are reused
    config = config.model_copy(update={"seed": job.seed})
    if job.arm == OURS:
        seconds, steps, rows = train_ours(config, work / f"{job.arm}-seed{job.seed}")
        outcome |= {"steps": sum(steps), "stage_steps": steps}
    else:
        texts = prepare_texts(config).texts
        budget, batch = outcome["settings"].get("seconds", 0.0), outcome["settings"].get("batch", 0)
        training = Training(job.arm, config, texts, ensure_teachers(config, texts), budget, job.lr, batch)
        trained = PEERS[job.arm].train(training)
        seconds, rows = trained.seconds, score_peer(job.arm, config, trained.encode, texts)
        outcome |= {"steps": trained.steps}
    file = job.result(work)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(outcome | {"seconds": seconds, "rows": rows}, indent=1) + "\n")


def seconds_of_ours(work: Path, seed: int, options: argparse.Namespace) -> float:
    """Return the training seconds of ours with a seed, 0 if it has no result and ``--seconds`` is given.

    Raises:
        JasperError: ours has no result for the seed, and no seconds are given.
    """
    file = Job(OURS, seed).result(work)
    if file.exists():
        return json.loads(file.read_text())["seconds"]
    if options.seconds:
        return 0.0
    raise JasperError(
        f"{file} is missing, and a peer trains as long as {OURS}. Fix: run that arm first, or give --seconds"
    )


def train_ours(config: Config, out: Path) -> tuple[float, list[int], list[dict[str, Any]]]:
    """Train our recipe. Return its seconds, the steps of its stages, and its rows, including teacher and floors.

    The seconds are those of the log (steps and pooling), and those of building the neighbour graphs again. The arms
    share these graphs, so the log has no time for them.
    """
    from jasper_fast.data.prepare import prepare_texts
    from jasper_fast.teachers.label import ensure_teachers
    from jasper_fast.train import train
    from jasper_fast.training.neighbours import neighbour_graph

    run = train(config, out=out)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines if line["event"] in ("step", "pooling", "plan"))
    stages = [line["stage"] for line in lines if line["event"] == "step"]
    texts = prepare_texts(config).texts
    teachers = ensure_teachers(config, texts)
    started = time.perf_counter()
    for stage in config.stages:
        if stage.batches == "neighbours":
            n = min(len(texts), stage.texts or len(texts))
            neighbour_graph(lambda rows: teachers.read(rows).numpy(), n, stage.neighbours)
    seconds += time.perf_counter() - started
    rows = json.loads((run / "results.json").read_text())["rows"]
    steps = [stages.count(stage.name) for stage in config.stages]
    return seconds, steps, [row | ({"model": OURS} if row["model"] == "student" else {}) for row in rows]
