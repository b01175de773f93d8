"""Distillation quality at equal minutes: ours against sentence-transformers' own losses, PCA and truncation.

    python -m bench distil --peer-lr 4e-4 --peer-batch 32 --seeds 0 1 2
    python -m bench distil --page                     only write the page again from the results

Every arm starts from the same student (same layers, same head width) and trains on the same texts and teacher vectors
in fp32 on the same machine, and gets as many seconds of training as ours took for that seed, its neighbour graph and
pooling included (teacher vectors are shared and counted for nobody). Arms run one after another, each in a process of
its own.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench._arms import known_settings, result_file
from bench._distil_page import OURS, table, write_page
from bench._environment import environment
from jasper_fast.config import Config, load_config
from jasper_fast.errors import JasperError
from jasper_fast.files import write_atomic

PEERS = ("st-mse", "st-cosine", "st-mse-matryoshka", "st-cosine-matryoshka")
HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "distil.json", HERE.parent / "docs" / "peers.md"
WARMUP = 0.1  # of the time


def main(argv: list[str]) -> int:
    """Run the arms that have no result yet, then print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench distil", description=__doc__.splitlines()[0])
    parser.add_argument("--config", default=str(HERE / "recipes" / "minilm-peers.yaml"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=[OURS, *PEERS], choices=[OURS, *PEERS])
    parser.add_argument("--work", default="runs/bench-distil", help="runs and the results of single arms")
    parser.add_argument("--out", default=str(RESULTS))
    parser.add_argument("--page-out", default=str(PAGE))
    parser.add_argument("--page", action="store_true", help="only write the page from the results")
    parser.add_argument("--peer-lr", type=float, default=1e-4, help="sentence-transformers' learning rate")
    parser.add_argument("--peer-batch", type=int, default=64)
    parser.add_argument("--seconds", type=float, help="training seconds of a peer; default: what ours took")
    parser.add_argument("--one", nargs=2, metavar=("ARM", "SEED"), help=argparse.SUPPRESS)  # a child process
    options, rest = parser.parse_known_args(argv)
    from jasper_fast.config_text import parse_overrides

    if options.page:
        write_page(json.loads(Path(options.out).read_text()), Path(options.page_out))
        return 0
    config = load_config(options.config, [*parse_overrides(rest), ("precision", "fp32")])
    work = Path(options.work)
    if options.one:
        arm, seed = options.one[0], int(options.one[1])
        run_arm(arm, config.model_copy(update={"seed": seed}), seed, work, options)
        return 0
    for seed in options.seeds:
        for arm in options.arms:
            if settings_of(arm, config, options) != known_settings(result_file(work, arm, seed)):
                print(f"=== {arm}, seed {seed}", flush=True)
                command = [sys.executable, "-m", "bench", "distil", *argv, "--one", arm, str(seed)]
                if subprocess.run(command, check=False).returncode:
                    raise JasperError(f"arm {arm} with seed {seed} failed; the same command goes on from there")
    found = {arm: [json.loads(result_file(work, arm, s).read_text()) for s in options.seeds] for arm in options.arms}
    results = {
        "environment": environment()
        | {"seeds": options.seeds, "threads": torch.get_num_threads(), "config": config.model_dump(mode="json")},
        "arms": found,
    }
    write_atomic(options.out, json.dumps(results, indent=1) + "\n")
    write_page(results, Path(options.page_out))
    print(table(results))
    return 0


def settings_of(arm: str, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """What a stored result must agree with to be used again; our stages are nothing to a peer."""
    if arm == OURS:
        return {"config": config.model_dump(mode="json", exclude={"seed"})}
    shared = config.model_dump(mode="json", include={"student", "teachers", "data", "evaluate", "precision"})
    return {"config": shared, "lr": options.peer_lr, "batch": options.peer_batch, "seconds": options.seconds}


def run_arm(arm: str, config: Config, seed: int, work: Path, options: argparse.Namespace) -> None:
    """Train one arm with one seed and write its scores. All arms and seeds share texts and teacher vectors."""
    from jasper_fast.data import prepare_texts
    from jasper_fast.teach import ensure_teachers

    outcome: dict[str, Any] = {"arm": arm, "seed": seed, "settings": settings_of(arm, config, options)}
    if arm == OURS:
        seconds, rows = train_ours(config, work / f"{arm}-seed{seed}")
    else:
        texts, _ = prepare_texts(config)
        teachers = ensure_teachers(config, texts)
        budget = options.seconds or seconds_of_ours(work, seed)
        seconds, steps, encoder = train_peer(arm, config, texts, teachers, budget, options)
        outcome |= {"steps": steps}
        rows = score_peer(arm, config, encoder, teachers)
    write_atomic(
        result_file(work, arm, seed), json.dumps(outcome | {"seconds": seconds, "rows": rows}, indent=1) + "\n"
    )


def seconds_of_ours(work: Path, seed: int) -> float:
    file = result_file(work, OURS, seed)
    if not file.exists():
        raise JasperError(f"a peer gets the seconds that {OURS} took: run that arm first, or give --seconds")
    return json.loads(file.read_text())["seconds"]


def train_ours(config: Config, out: Path) -> tuple[float, list[dict[str, Any]]]:
    """Our recipe; seconds are those of its log (steps and pooling), rows are its results (teacher and floors too)."""
    from jasper_fast.train import train

    for graph in Path(config.data.cache).glob("neighbours-*"):
        shutil.rmtree(graph)  # every seed builds it, so every seed is charged for it
    run = train(config, out=out)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    seconds = sum(line["seconds"] for line in lines if line["event"] in ("step", "pooling", "plan"))
    rows = json.loads((run / "results.json").read_text())["rows"]
    return seconds, [row | ({"model": OURS} if row["model"] == "student" else {}) for row in rows]


def train_peer(
    arm: str, config: Config, texts: Any, teachers: Any, seconds: float, options: Any
) -> tuple[float, int, Any]:
    """Sentence-transformers' trainer with its own distillation loss for ``seconds`` of wall time."""
    from jasper_fast.encoders import model_encoder

    trainer = peer_trainer(arm, config, peer_dataset(config, texts, teachers), options)
    clock = by_the_clock(seconds, options.peer_lr)
    trainer.add_callback(clock)
    trainer.train()
    model = trainer.model.eval()
    widths = config.student.heads if arm.endswith("matryoshka") else config.student.heads[:1]
    return clock.spent, trainer.state.global_step, model_encoder(model, widths)


def score_peer(arm: str, config: Config, encoder: Any, teachers: Any) -> list[dict[str, Any]]:
    """A peer's rows; one without narrow heads is made narrow by PCA (of the teacher's vectors) and by truncation."""
    import numpy as np

    from jasper_fast.evaluate import PCA, PCA_ROWS, TEACHER, TRUNCATED, load_evals, score_rows, teacher_floors

    evalsets = load_evals(config.evaluate)
    if arm.endswith("matryoshka"):
        return score_rows(evalsets, {arm: encoder})
    vectors = teachers.read(np.arange(min(len(teachers), PCA_ROWS))).numpy()
    floors = teacher_floors(vectors, config.student.heads)
    names = {TEACHER: arm, PCA: f"{arm} + PCA", TRUNCATED: f"{arm} + truncation"}
    rows = score_rows(evalsets, {TEACHER: encoder}, floors)  # floors are taken of whatever has the teacher's name
    return [row | {"model": names[row["model"]]} for row in rows]


def peer_dataset(config: Config, texts: Any, teachers: Any) -> Any:
    """Columns ``text`` and ``label`` (the teacher's vector), as sentence-transformers' distillation wants them."""
    import numpy as np
    from datasets import Dataset

    vectors = teachers.read(np.arange(len(texts))).numpy()
    return Dataset.from_dict({"text": texts["text"][:], "label": list(vectors)}).with_format("torch", ["label"], True)


def peer_trainer(arm: str, config: Config, data: Any, options: Any) -> Any:
    """The trainer as its documentation sets it up, on the same student: encoder layers, mean pooling, one Dense."""
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer import losses

    model = peer_student(config)
    loss: Any = losses.EmbedDistillLoss(model, distance_metric="mse" if "mse" in arm else "cosine")
    if arm.endswith("matryoshka"):
        loss = losses.MatryoshkaLoss(model, loss, matryoshka_dims=config.student.heads)
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(Path(options.work) / "peer"),
        max_steps=10**9,  # the clock ends it
        per_device_train_batch_size=options.peer_batch,
        learning_rate=options.peer_lr,
        lr_scheduler_type="constant",  # set by the clock
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
    """Our student's encoder before training, with mean pooling, a Dense that starts as the identity, and unit length.

    The identity is the kindest start for a student whose last layer is its teacher's; without unit length, which the
    teacher's vectors have, MSE would spend its minutes on the length.
    """
    import tempfile

    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    from jasper_fast.model import Student

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
    from jasper_fast.encode import pick_device

    return pick_device()


def by_the_clock(seconds: float, lr: float) -> Any:
    """A trainer callback: the usual warm-up and linear decay, over the time that is given instead of over steps.

    So a peer ends its schedule and its minutes together, however long its batches are; start-up is not charged.
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
