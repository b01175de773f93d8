"""Several processes train as one would: same losses and gradients, one fate."""

from __future__ import annotations

import json
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from jasper_fast.config.models import StudentConfig
from jasper_fast.config.stage import StageConfig
from jasper_fast.distributed.fsdp import full_tensor, is_sharded, shard
from jasper_fast.distributed.gather import split_rows
from jasper_fast.distributed.ranks import Ranks, join_ranks
from jasper_fast.models.micro_batches import MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.ops.native import code_digest
from jasper_fast.training.data import Batch
from jasper_fast.training.parameters import set_trained
from jasper_fast.training.stages.base import trained_names
from jasper_fast.training.stages.losses import StageLoss
from jasper_fast.training.step import dropout_mask, take_gradients
from jasper_fast.utils.errors import JasperError
from tests.helpers.ranks import end, start
from tests.helpers.runs import die_half_way_through, settings, write_data

CPU = torch.device("cpu")
ROWS = 23  # 12 + 11, 6 + 6 + 6 + 5
NONE = {"cosine": 0.0, "similarity": 0.0, "relative_similarity": 0.0}
EVERY = {"cosine": 10.0, "similarity": 200.0, "relative_similarity": 20.0, "neighbourhood": 1.0}
CASES = {
    "cosine": {"weights": NONE | {"cosine": 10.0}, "heads": [24]},
    "similarity": {"weights": NONE | {"similarity": 200.0}},
    "relative similarity": {"weights": NONE | {"relative_similarity": 20.0}},
    "neighbourhood": {"weights": NONE | {"neighbourhood": 1.0}},
    "stage 1": {"weights": EVERY, "train": ["heads.24.*"], "heads": [24]},
    "stage 2": {"weights": EVERY, "train": ["heads.24.*"], "last_layers": 1, "heads": [24]},
    "stage 3": {"weights": EVERY, "gradient_caching": True},
    "own target": {"weights": EVERY, "narrow_target": "self", "gradient_checkpointing": True},
    "codes": {"weights": EVERY, "codes": ["int8", "ubinary"]},
    "prefix heads": {"weights": EVERY},
}


def stage(**given) -> StageConfig:
    base = {"name": "s", "train": ["*"], "heads": [24, 8], "batch_size": ROWS, "steps": 1, "lr": 1e-3, "micro_batch": 5}
    return StageConfig.model_validate(base | given)


def build(model: str, dtype: torch.dtype, heads: str = "independent") -> Student:
    torch.manual_seed(3)
    config = StudentConfig(model=model, heads=[24, 8], head_type=heads, max_length=32, vector_dropout=0.2)
    return Student.build(config).to(dtype).train()


def gradients(student: Student, config: StageConfig, ranks: Ranks, texts: list[str], scope: str = "global") -> dict:
    """Losses and whole gradients of one step over all ranks."""
    student.zero_grad()
    student.set_gradient_checkpointing(False)
    set_trained(student, trained_names(student, config))
    student.set_gradient_checkpointing(config.gradient_checkpointing)
    dtype = next(student.parameters()).dtype
    generator = torch.Generator().manual_seed(5)
    teacher = torch.nn.functional.normalize(torch.randn(ROWS, 24, dtype=dtype, generator=generator), dim=1)
    mine, counts = ranks.rows(ROWS), ranks.counts(ROWS)
    passes = min(-(-counts[0] // config.micro_batch), counts[-1]) if is_sharded(student) else None
    micro = MicroBatches.of(student.tokenize(texts[mine]), config.micro_batch, None, passes)
    batch = Batch(np.arange(ROWS)[mine], teacher[mine], micro, None, 0, 0, 0.0)
    group, rows = (ranks.group, counts) if scope == "global" else (None, None)
    mask = dropout_mask(0.2, (0, 0, 0), mine, ROWS, student.hidden_size, CPU)
    output, _ = take_gradients(student, batch, config, StageLoss(config, 24, group, rows), CPU, "fp32", mask)
    ranks.average_gradients(student.parameters())
    found = {name: full_tensor(p.grad) for name, p in student.named_parameters() if p.grad is not None}
    return {"losses": [part.detach() for part in output._asdict().values()], "gradients": found}


def every_case(model: str, texts: list[str], out: str) -> None:
    """All cases in one process group; rank 0 keeps what it found."""
    found = {}
    with join_ranks(60.0) as ranks:
        for dtype in (torch.float64, torch.float32):
            for mode in ("ddp", "fsdp") if ranks.world > 1 else ("ddp",):
                students = {heads: build(model, dtype, heads) for heads in ("independent", "prefix")}
                for student in students.values():
                    if mode == "fsdp":
                        shard(student, CPU, ranks.world)
                for name, case in CASES.items():
                    if dtype == torch.float32 and name not in ("stage 3", "own target"):
                        continue  # the same code; each loss by itself is compared in float64
                    student = students["prefix" if name == "prefix heads" else "independent"]
                    found[name, mode, dtype] = gradients(student, stage(**case), ranks, texts)
            found["local", "ddp", dtype] = gradients(build(model, dtype), stage(weights=EVERY), ranks, texts, "local")
        every = ranks.all_gather_object([float(x) for x in found["stage 3", "ddp", torch.float64]["losses"]])
        assert all(other == every[0] for other in every)  # every rank knows the same loss
        if ranks.is_main:
            torch.save(found, out)


@pytest.mark.slow
def test_the_same_loss_and_gradient_on_one_two_and_four_processes(tiny_bert, tiny_texts, tmp_path):
    texts = tiny_texts[:ROWS]
    every_case(str(tiny_bert), texts, str(tmp_path / "1"))
    alone = torch.load(tmp_path / "1")
    for world in (2, 4):
        out = tmp_path / str(world)
        assert end(start(world, every_case, str(tiny_bert), texts, str(out))) == [0] * world
        for (name, mode, dtype), found in torch.load(out).items():
            if name == "local":
                expected = mean_over_parts(str(tiny_bert), texts, dtype, world)
            else:
                expected = alone[name, "ddp", dtype]
                assert_close(found["losses"], expected["losses"], dtype)
            assert found["gradients"].keys() == expected["gradients"].keys(), (name, mode)
            largest = max(float(g.abs().max()) for g in expected["gradients"].values())
            assert largest > 0
            for key, gradient in expected["gradients"].items():
                difference = float((found["gradients"][key] - gradient).abs().max())
                assert difference <= tolerance(dtype) * largest, (world, name, mode, dtype, key, difference / largest)


def tolerance(dtype: torch.dtype) -> float:
    return 1e-10 if dtype == torch.float64 else 1e-5


def assert_close(found, expected, dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance(dtype), atol=tolerance(dtype))


def mean_over_parts(model: str, texts: list[str], dtype: torch.dtype, world: int) -> dict:
    """Compute scope "local" in one process: the loss of each rank, and the mean of their gradients."""
    parts = []
    for rank in range(world):
        student = build(model, dtype)
        part = Ranks(rank, world)  # its rows, and nobody to talk to
        part.average_gradients([])
        parts.append(own_gradients(student, part, texts))
    return {"gradients": {key: sum(part[key] for part in parts) / world for key in parts[0]}}


def own_gradients(student: Student, part: Ranks, texts: list[str]) -> dict:
    class Apart(Ranks):
        def average_gradients(self, parameters):
            pass

    return gradients(student, stage(weights=EVERY), Apart(part.rank, part.world), texts, "local")["gradients"]


def test_rows_are_shared_out_whole():
    for total in (1, 2, 3, 23, 64):
        for world in (1, 2, 3, 4):
            counts = split_rows(total, world)
            assert sum(counts) == total and max(counts) - min(counts) <= 1
            rows = [np.arange(total)[Ranks(rank, world).rows(total)] for rank in range(world)]
            assert np.array_equal(np.concatenate(rows), np.arange(total))


# Whole runs.


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_bert, tiny_texts):
    """A run of three stages, and its end when one process does it."""
    folder = tmp_path_factory.mktemp("ranks")
    write_data(folder, tiny_texts)
    tree = settings(folder, tiny_bert)
    for part in tree["stages"]:
        part["batch_size"], part["steps"] = 12, 4
    tree["stages"][0] |= {"train": ["heads.32.*", "heads.8.*"], "heads": [32, 8], "narrow_start": "principal"}
    tree["evaluate"] = []
    tree["data"]["held_out"] = 0
    assert end(start(1, run_as_rank, tree, str(folder / "alone"))) == [0]
    return folder, tree


def run_as_rank(tree: dict, out: str, before=None) -> None:
    """Run one rank from start to end, and write its last message to a file."""
    from jasper_fast.train import Stopped, train

    said = Path(f"{out}-said-{os.environ['RANK']}")
    if before is not None:
        before()
    try:
        train(tree, out=out)
    except Stopped as stopped:
        said.write_text(str(stopped))
    except JasperError as error:
        said.write_text(str(error))
        raise SystemExit(3) from None


def said(out: Path, rank: int) -> str:
    path = Path(f"{out}-said-{rank}")
    return path.read_text() if path.exists() else ""


def weights(out: Path) -> dict[str, torch.Tensor]:
    newest = sorted((out / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000012"
    return load_file(newest / "model.safetensors")


def steps(out: Path) -> list[dict]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [record for record in records if record["event"] == "step"]


def assert_same_end(out: Path, alone: Path) -> None:
    ours, theirs = weights(out), weights(alone)
    for name, expected in theirs.items():
        if name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding, which Adam makes a step of
            continue
        torch.testing.assert_close(ours[name], expected, rtol=0, atol=2e-4, msg=name)
    a, b = steps(out), steps(alone)
    assert [r["step"] for r in a] == [r["step"] for r in b]
    assert [r["loss"] for r in a] == pytest.approx([r["loss"] for r in b], rel=1e-3)


def stop_at_step_six() -> None:
    """Ask rank 1 alone to stop in the middle of the second stage."""
    import jasper_fast.training.stages.base as module

    honest = module.learning_rate

    def watch(stage, step):
        if stage.name == "two" and step == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return honest(stage, step)

    module.learning_rate = watch


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "others"), [("ddp", (1, 4)), ("fsdp", (1,))])
def test_a_checkpoint_of_two_ranks_goes_on_with_other_numbers_of_them(run, tmp_path, mode, others):
    import shutil

    folder, tree = run
    # What is sharded must be so again at a stage's end, whether or not something was saved meanwhile.
    tree = tree | {"parallel": {"mode": mode}, "checkpoint": {"every": 2 if mode == "ddp" else 1000}}
    out = tmp_path / "two"
    assert end(start(2, run_as_rank, tree, str(out), stop_at_step_six)) == [0, 0]
    assert "stopped after step 6" in said(out, 0) and "stopped after step 6" in said(out, 1)
    assert sorted(p.name for p in (out / "checkpoints").iterdir())[-1] == "step-00000006"
    for world in others:
        copy = tmp_path / f"on-{world}"
        shutil.copytree(out, copy)
        assert end(start(world, run_as_rank, tree, str(copy))) == [0] * world, said(copy, 0)
        assert_same_end(copy, folder / "alone")
        assert (copy / "results.json").is_file() and (copy / "model" / "modules.json").is_file()


def other_seed() -> None:
    """Rank 1 was started with another configuration, and with other code."""
    import jasper_fast.train as module
    import jasper_fast.training.run.run as run_module

    if os.environ["RANK"] == "1":
        run_module.code_digest = lambda: "other"
        load = module.load_config
        other = [("seed", 7), ("checkpoint.every", 3)]
        module.load_config = lambda source, overrides=(), out=None: load(source, [*overrides, *other], out)


def test_ranks_that_differ_are_refused_with_the_difference(run, tmp_path):
    _, tree = run
    out = tmp_path / "differ"
    assert end(start(2, run_as_rank, tree, str(out), other_seed)) == [3, 3]
    for rank in (0, 1):
        assert "rank 1: seed: 0 -> 7" in said(out, rank) and "rank 1: code:" in said(out, rank)
        assert "rank 1: checkpoint.every: 2 -> 3" in said(out, rank)  # saving is done together
    assert not out.exists()


def test_kernels_and_the_compiled_extension_are_of_the_code(monkeypatch):
    from jasper_fast.ops.native import extension_path

    read, honest = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path.name) or honest(path))
    code_digest()
    assert {"ranks.py", "strips.py", "pair_losses.py", "search.py"} <= set(read)
    assert extension_path() is None or read[-1] == extension_path().name


def fall_silent() -> None:
    """Rank 1 stays away from the third step on, alive."""
    _at_step_three(lambda: time.sleep(60))


def fall_silent_after_the_gradients() -> None:
    """Rank 1 stays away from the third exchange of losses, alive."""
    import jasper_fast.training.loop as module

    detect_lost_ranks_quickly()
    honest, calls = module.reduce_report, []

    def trap(*given):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            time.sleep(60)
        return honest(*given)

    module.reduce_report = trap


def die() -> None:
    """Rank 1 is killed in the third step."""
    _at_step_three(lambda: os.kill(os.getpid(), signal.SIGKILL))


def _at_step_three(what) -> None:
    import jasper_fast.training.stages.base as module

    detect_lost_ranks_quickly()
    honest = module.learning_rate

    def trap(stage, step):
        if step == 2 and os.environ["RANK"] == "1":
            what()
        return honest(stage, step)

    module.learning_rate = trap


@pytest.mark.slow
def test_a_rank_that_dies_ends_the_run_and_the_same_command_goes_on(run, tmp_path):
    folder, tree = run
    out = tmp_path / "dies"
    assert end(start(2, run_as_rank, tree, str(out), die)) == [3, -signal.SIGKILL]
    assert "rank 1 ended or did not arrive" in said(out, 0), said(out, 0)
    assert end(start(2, run_as_rank, tree, str(out))) == [0, 0], said(out, 0)
    assert_same_end(out, folder / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("where", [fall_silent, fall_silent_after_the_gradients])
def test_a_rank_that_hangs_is_named(run, tmp_path, where):
    _, tree = run
    out = tmp_path / "hangs"
    processes = start(2, run_as_rank, tree | {"parallel": {"timeout": 3.0}}, str(out), where)
    processes[0].join(60)
    assert processes[0].exitcode == 3
    assert "rank 1 ended or did not arrive within 3 s" in said(out, 0), said(out, 0)
    processes[1].kill()
    processes[1].join()


def exchange(out: str, how: str, when: str) -> None:
    """Run four exchanges and lose rank 1 in the third. Each rank writes its last message to a file."""
    from torch import distributed

    fail = {
        "an error": lambda: torch.ones(2) @ torch.ones(3),
        "killed": lambda: os.kill(os.getpid(), signal.SIGKILL),
        "hanging": lambda: time.sleep(60),
    }[how]
    with join_ranks(3.0 if how == "hanging" else 60.0) as ranks:
        try:
            for step in range(4):
                lost = step == 2 and ranks.rank == 1
                if lost and when == "before":
                    fail()
                if step == 2 and ranks.rank == 3 and how == "hanging":
                    time.sleep(1.0)  # late, but it comes
                ranks.barrier(f"step {step}")
                with ranks.name_lost_ranks(f"step {step}"):
                    if lost and when == "meanwhile":
                        fail()
                    distributed.all_reduce(torch.ones(1000), group=ranks.group)
        except Exception as error:
            Path(f"{out}-said-{ranks.rank}").write_text(f"{type(error).__name__}: {error}")
            raise SystemExit(3) from None


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "when"),
    [("an error", "meanwhile"), ("killed", "meanwhile"), ("killed", "before"), ("hanging", "before")],
)
def test_of_four_ranks_the_lost_one_alone_is_named(tmp_path, how, when):
    out = tmp_path / "out"
    processes = start(4, exchange, str(out), how, when)
    lost = processes.pop(1)
    assert end(processes) == [3, 3, 3]
    lost.kill()
    lost.join()
    if how == "an error":  # its error is reported unchanged, without other ranks
        assert said(out, 1).startswith("RuntimeError: ") and "size" in said(out, 1) and "rank" not in said(out, 1)
    assert said(out, 0).startswith("JasperError: step 2: rank 1 ended or did not arrive within"), said(out, 0)
    gone = "rank 0, which holds the store of all ranks, ended"  # without torchrun it may have ended by then
    for told in (said(out, 2), said(out, 3)):
        assert "rank 1 ended or did not arrive" in told or gone in told, told


def spoil_a_text() -> None:
    """Rank 1's vectors are not numbers in the third step."""
    import jasper_fast.training.loop as module

    honest, calls = module.take_gradients, []

    def spoil(student, batch, *rest):
        calls.append(1)
        if len(calls) == 3 and os.environ["RANK"] == "1":
            batch.pooled[2] = torch.nan
        return honest(student, batch, *rest)

    module.take_gradients = spoil


def test_numbers_that_are_none_name_the_rank_and_the_text(run, tmp_path):
    _, tree = run
    out = tmp_path / "nan"
    assert end(start(2, run_as_rank, tree, str(out), spoil_a_text)) == [3, 3]
    for rank in (0, 1):
        assert "stage 'one', step 3" in said(out, rank) and "loss part" in said(out, rank)
        assert "rank 1: the embeddings of training texts" in said(out, rank)
    assert [p.name for p in sorted((out / "checkpoints").iterdir())] == ["step-00000002"]


def test_more_processes_than_texts_are_refused(run, tmp_path):
    _, tree = run
    one = dict(tree["stages"][0], batch_size=1)
    out = tmp_path / "many"
    assert end(start(2, run_as_rank, tree | {"stages": [one, *tree["stages"][1:]]}, str(out))) == [3, 3]
    assert "a batch of 1 texts cannot be shared by 2 processes" in said(out, 0)


# What takes minutes.


def die_in_a_save(moment: str) -> None:
    """Kill the writing process while a checkpoint has its temporary name.

    Half of a file is written then, or not all files are on the disk.
    """
    import jasper_fast.utils.atomic as module

    detect_lost_ranks_quickly()
    if moment != "sync":
        die_half_way_through(moment)
        return
    honest = module._sync

    def trap(path):
        if any(part.startswith(f"{module.TEMPORARY}step-") for part in path.parts):
            os.kill(os.getpid(), signal.SIGKILL)
        honest(path)

    module._sync = trap


def detect_lost_ranks_quickly() -> None:
    import jasper_fast.distributed.ranks

    jasper_fast.distributed.ranks.LIVENESS_WAIT = 0.5


@pytest.mark.soak
def test_twenty_kills_of_one_of_two_ranks_end_bit_identical(run, tmp_path):
    """15 at random moments of a random rank, 5 during a save; the others end by themselves each time."""
    _, tree = run
    tree = tree | {"stages": [dict(part, steps=40) for part in tree["stages"]], "parallel": {"timeout": 20.0}}
    undisturbed, out = tmp_path / "undisturbed", tmp_path / "killed"
    assert end(start(2, run_as_rank, tree, str(undisturbed))) == [0, 0]
    chance = np.random.default_rng(0)
    struck = saves = attempts = 0
    while struck < 15 or saves < 5:
        attempts += 1
        assert attempts < 60 and not (out / "results.json").exists(), (struck, saves)
        if saves < 5 and attempts % 4 == 0:
            moment = ("model.safetensors", "state.pt", "sync")[saves % 3]
            codes = end(start(2, run_as_rank, tree, str(out), partial(die_in_a_save, moment)))
            saves += codes[0] == -signal.SIGKILL
            continue
        processes = start(2, run_as_rank, tree, str(out), detect_lost_ranks_quickly)
        victim = processes[int(chance.integers(2))]
        victim.join(float(chance.uniform(0.05, 1.2)))
        if victim.is_alive():
            victim.kill()
            struck += 1
        end(processes)
    assert end(start(2, run_as_rank, tree, str(out))) == [0, 0], said(out, 0)
    ours, theirs = (load_file(p / "checkpoints" / "step-00000120" / "model.safetensors") for p in (out, undisturbed))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert [r["loss"] for r in steps(out)] == [r["loss"] for r in steps(undisturbed)]
    assert not list((out / "checkpoints").glob(".unfinished-*"))


@pytest.mark.soak
def test_torchrun_trains_and_goes_on(run, tmp_path):
    """The command that the documentation names."""
    import subprocess
    import sys

    from jasper_fast.config.yaml import dump_yaml

    folder, tree = run
    (tmp_path / "tiny.yaml").write_text(dump_yaml(tree))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "jasper_fast.train", "--config", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for expected in ("model:", "is finished"):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and expected in done.stdout, done.stdout + done.stderr
    assert_same_end(tmp_path / "out", folder / "alone")


@pytest.mark.soak
def test_a_batch_of_8192_takes_the_memory_of_a_small_one():
    from bench.train.cpu import memory

    assert memory(8192, 256)["ratio"] < 1.3
