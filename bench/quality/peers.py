"""Distillation quality at equal training time: ours against sentence-transformers' losses, PCA and truncation.

    python -m bench distil --seeds 0 1 2
    python -m bench distil --together 2       two arms at the same time, each on half of the cores
    python -m bench distil --page             only write the page again from the results

Every arm starts from the same student, with the same layers and head width. It trains on the same texts and teacher
embeddings, in fp32, on the same machine, in a separate process. A peer trains for as many seconds as ours took with
that seed. These include our neighbour graph and pooling. Teacher embeddings are shared, and their time counts for no
arm.

The peers' learning rate is searched with the first seed and their cosine loss. The best of ``--peer-lr`` has the
highest mean over the sets that our settings were chosen on (``--tuned-on``). The other sets take no part in any choice.
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
from threading import Event
from typing import Any

import torch

from bench.common.arms import known_settings, result_file
from bench.common.environment import code, environment
from bench.quality.peers_page import OURS, of_sets, table, write_page
from jasper_fast.config.load import load_config
from jasper_fast.config.run import Config
from jasper_fast.teachers.model import prompts_of
from jasper_fast.utils.atomic import write_atomic
from jasper_fast.utils.errors import JasperError

PEERS = ("st-mse", "st-cosine", "st-mse-matryoshka", "st-cosine-matryoshka")
SEARCHED = "st-cosine"  # its learning rate is searched and used for all peers, as AdamW ignores a loss's scale
HERE = Path(__file__).parents[1]
RESULTS, PAGE = HERE / "results" / "distil.json", HERE.parent / "docs" / "peers.md"
WARMUP = 0.1  # fraction of the training time
PCA_TEXTS = 5000


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
    config = load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")])
    if options.one:
        if options.cores:
            os.sched_setaffinity(0, options.cores)
        run_arm(Job(options.one[0], int(options.one[1]), float(options.one[2])), config, options)
        return 0
    if options.together > 1 and not hasattr(os, "sched_setaffinity"):
        parser.error("--together needs CPU affinity, which this system lacks. Fix: leave it out")
    prepare(config)
    runner = Runner(argv, config, options)
    searched = runner.search()
    jobs = [Job(arm, seed, searched["lr"] if arm != OURS else 0.0) for seed in options.seeds for arm in options.arms]
    runner.run(jobs)
    runs: dict[str, list[Any]] = {arm: [] for arm in options.arms}
    for job in jobs:
        runs[job.arm].append(json.loads(job.result(Path(options.work)).read_text()))
    results = {
        "environment": environment()
        | {"seeds": options.seeds, "threads": runner.threads, "together": options.together}
        | {"config": config.model_dump(mode="json")},
        "tuned_on": options.tuned_on,
        "search": searched,
        "arms": runs,
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    write_page(results, Path(options.page_out))
    print(table(results))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench distil", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--config",
        default=str(HERE / "recipes" / "minilm-peers.yaml"),
        help="configuration of ours (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of every arm (default: 0 1 2)")
    parser.add_argument("--arms", nargs="+", default=[OURS, *PEERS], choices=[OURS, *PEERS], help="default: all")
    parser.add_argument("--work", default="runs/bench-distil", help="folder of runs and of single arms' results")
    parser.add_argument("--out", default=str(RESULTS), help="JSON to write (default: %(default)s)")
    parser.add_argument("--page-out", default=str(PAGE), help="page to write (default: %(default)s)")
    parser.add_argument("--page", action="store_true", help="only write the page again from the results")
    parser.add_argument(
        "--peer-lr", type=float, nargs="+", default=[2e-4, 4e-4, 8e-4], help="learning rates to choose from"
    )
    parser.add_argument("--peer-batch", type=int, default=32, help="batch size of a peer (default: %(default)s)")
    parser.add_argument(
        "--tuned-on",
        nargs="+",
        default=["stsb", "sick", "cranfield", "cisi"],
        metavar="SET",
        help="evaluation sets for choosing settings",
    )
    parser.add_argument("--seconds", type=float, help="training seconds of a peer (default: as ours took)")
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
        if options.together > 1:
            all_cores = sorted(os.sched_getaffinity(0))
            self.threads = len(all_cores) // options.together
            if not self.threads:
                raise JasperError(f"--together: {options.together} arms on {len(all_cores)} cores. Fix: lower it")
            for i in range(options.together):
                self.cores.put(all_cores[i * self.threads : (i + 1) * self.threads])
        else:
            self.cores.put([])

    def search(self) -> dict[str, Any]:
        """Run ours, then search the peers' learning rate. Return the arm, the best rate, and the mean score by rate."""
        options = self.options
        arm = next((a for a in (SEARCHED, *options.arms) if a in options.arms and a != OURS), SEARCHED)
        rates = options.peer_lr if len(options.peer_lr) > 1 and arm in options.arms else []
        jobs = [Job(arm, options.seeds[0], lr) for lr in rates]
        self.run([*(Job(OURS, seed) for seed in options.seeds if OURS in options.arms), *jobs])
        means = [self._tuned_mean(job) for job in jobs]
        best = rates[means.index(max(means))] if rates else options.peer_lr[0]
        return {"arm": arm, "lr": best, "means": dict(zip((f"{lr:g}" for lr in rates), means, strict=True))}

    def _tuned_mean(self, job: Job) -> float:
        rows = json.loads(job.result(Path(self.options.work)).read_text())["rows"]
        (row,) = [r for r in rows if r["model"] == job.arm and r["width"] == self.config.student.heads[0]]
        return mean(of_sets(row["scores"], self.options.tuned_on).values())

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
            stored = known_settings(job.result(Path(self.options.work)))
            if stored is not None and stored == settings_of(job, self.config, self.options):
                return 0
            print(f"=== {job.arm}, seed {job.seed}" + (f", learning rate {job.lr:g}" if job.lr else ""), flush=True)
            command = [sys.executable, "-m", "bench", "distil", *self.argv]
            command += ["--one", job.arm, str(job.seed), repr(job.lr)]
            command += ["--cores", *map(str, cores)] if cores else []
            threads = {"OMP_NUM_THREADS": str(len(cores))} if cores else {}
            return subprocess.run(command, check=False, env=os.environ | threads).returncode
        finally:
            self.cores.put(cores)
            if job.arm == OURS:
                self.ended[job.seed].set()


def settings_of(job: Job, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Return the settings that a stored result must match to be reused. A peer's exclude our stages."""
    if job.arm == OURS:
        return {"config": _decided(config, exclude={"seed"})}
    shared = _decided(config, include={"student", "teachers", "data", "evaluate", "precision"})
    seconds = options.seconds or seconds_of_ours(Path(options.work), job.seed)
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
        seconds, rows = train_ours(config, work / f"{job.arm}-seed{job.seed}")
    else:
        texts = prepare_texts(config).texts
        teachers = ensure_teachers(config, texts)
        budget = outcome["settings"]["seconds"]
        seconds, steps, encoder = train_peer(job, config, texts, teachers, budget, options)
        outcome |= {"steps": steps}
        rows = score_peer(job.arm, config, encoder, texts)
    file = job.result(work)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, json.dumps(outcome | {"seconds": seconds, "rows": rows}, indent=1) + "\n")


def seconds_of_ours(work: Path, seed: int) -> float:
    """Return the training seconds of ours with a seed.

    Raises:
        JasperError: ours has no result for the seed.
    """
    file = Job(OURS, seed).result(work)
    if not file.exists():
        raise JasperError(
            f"{file} is missing, and a peer trains as long as {OURS}. Fix: run that arm first, or give --seconds"
        )
    return json.loads(file.read_text())["seconds"]


def train_ours(config: Config, out: Path) -> tuple[float, list[dict[str, Any]]]:
    """Train our recipe. Return its seconds and its result rows, including teacher and floors.

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
    texts = prepare_texts(config).texts
    teachers = ensure_teachers(config, texts)
    started = time.perf_counter()
    for stage in config.stages:
        if stage.batches == "neighbours":
            n = min(len(texts), stage.texts or len(texts))
            neighbour_graph(lambda rows: teachers.read(rows).numpy(), n, stage.neighbours)
    seconds += time.perf_counter() - started
    rows = json.loads((run / "results.json").read_text())["rows"]
    return seconds, [row | ({"model": OURS} if row["model"] == "student" else {}) for row in rows]


def train_peer(
    job: Job, config: Config, texts: Any, teachers: Any, seconds: float, options: Any
) -> tuple[float, int, Any]:
    """Train a peer with sentence-transformers' trainer for ``seconds`` of wall time. Return seconds, steps, encoder."""
    from jasper_fast.models.embedder import model_encoder

    trainer = peer_trainer(job, config, peer_dataset(texts, teachers), options)
    clock = by_the_clock(seconds, job.lr)
    trainer.add_callback(clock)
    trainer.train()
    model = trainer.model.eval()
    widths = config.student.heads if job.arm.endswith("matryoshka") else config.student.heads[:1]
    return clock.spent, trainer.state.global_step, model_encoder(model, widths)


def score_peer(arm: str, config: Config, encoder: Any, texts: Any) -> list[dict[str, Any]]:
    """Return a peer's result rows. Peers without narrow heads are reduced by their PCA and by truncation."""
    from jasper_fast.data.eval_loaders import load_evals
    from jasper_fast.evaluation.score import PCA, TEACHER, TRUNCATED, score_rows, teacher_floors

    evalsets = load_evals(config.evaluate)
    if arm.endswith("matryoshka"):
        return score_rows(evalsets, {arm: encoder})
    some = texts[: config.stages[-1].texts or PCA_TEXTS]  # as many as our narrow heads train on
    vectors = encoder(some["text"], "document")[config.student.heads[0]]
    floors = teacher_floors(vectors, config.student.heads)
    names = {TEACHER: arm, PCA: f"{arm} + PCA", TRUNCATED: f"{arm} + truncation"}
    rows = score_rows(evalsets, {TEACHER: encoder}, floors)  # floors are computed for the model with the teacher's name
    return [row | {"model": names[row["model"]]} for row in rows]


def peer_dataset(texts: Any, teachers: Any) -> Any:
    """Return a dataset with ``text`` and ``label`` (teacher embedding), for sentence-transformers' distillation."""
    import numpy as np
    from datasets import Dataset

    vectors = teachers.read(np.arange(len(texts))).numpy()
    return Dataset.from_dict({"text": texts["text"][:], "label": list(vectors)}).with_format("torch", ["label"], True)


def peer_trainer(job: Job, config: Config, data: Any, options: Any) -> Any:
    """Set up the trainer as in its documentation, on the same student: encoder, mean pooling, one Dense."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    model = peer_student(config)
    loss: Any = losses.EmbedDistillLoss(model, distance_metric="mse" if "mse" in job.arm else "cosine")
    if job.arm.endswith("matryoshka"):
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=config.student.heads)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(job.result(Path(options.work)).with_suffix("")),
        max_steps=10**9,  # by_the_clock ends training
        per_device_train_batch_size=options.peer_batch,
        learning_rate=job.lr,
        lr_scheduler_type="constant",  # by_the_clock sets the rate
        seed=config.seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
    )
    assert isinstance(model, SentenceTransformer)
    return SentenceTransformerTrainer(model=model, args=arguments, train_dataset=data, loss=loss)


def peer_student(config: Config) -> Any:
    """Return our untrained encoder with mean pooling, an identity Dense, and normalisation.

    The identity is the best start, because the student's last layer is its teacher's. Without normalisation, MSE would
    spend its time on the length of the embeddings.
    """
    import tempfile

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    from jasper_fast.models.student import Student

    torch.manual_seed(config.seed)
    student = Student.build(config.student)
    with tempfile.TemporaryDirectory() as folder:
        student.encoder.save_pretrained(folder)
        student.tokenizer.save_pretrained(folder)
        transformer = Transformer(folder, max_seq_length=config.student.max_length)
    widest, hidden = config.student.heads[0], student.hidden_size
    dense = Dense(
        hidden,
        widest,
        activation_function=torch.nn.Identity(),
        init_weight=torch.eye(widest, hidden),
        init_bias=torch.zeros(widest),
    )
    return SentenceTransformer(modules=[transformer, Pooling(hidden, "mean"), dense, Normalize()], device=str(pick()))


def pick() -> torch.device:
    """Return the best device of this machine."""
    from jasper_fast.utils.device import pick_device

    return pick_device()


def by_the_clock(seconds: float, lr: float) -> Any:
    """Return a trainer callback with warm-up and linear decay over wall time instead of steps.

    The schedule ends when the time ends, for any length of batches. Start-up does not count.
    """
    from transformers import TrainerCallback

    class ByTheClock(TrainerCallback):
        spent = 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.start = time.perf_counter()

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
            done = (time.perf_counter() - self.start) / seconds
            for group in optimizer.param_groups:
                group["lr"] = lr * max(0.0, min(done / WARMUP, (1 - done) / (1 - WARMUP)))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.spent = time.perf_counter() - self.start
            control.should_training_stop = self.spent >= seconds

    return ByTheClock()
