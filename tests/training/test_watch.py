"""Monitoring of a run: loss spikes, full disks, insufficient memory, and readings of the GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
import types
import weakref
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch

from jasper_fast.config.load import load_config
from jasper_fast.config.losses import LOGGED_LOSSES
from jasper_fast.config.models import StudentConfig
from jasper_fast.config.stage import StageConfig
from jasper_fast.models.micro_batches import MicroBatches
from jasper_fast.models.student import Student
from jasper_fast.training.data import Batch
from jasper_fast.training.memory import graph_bytes_per_token, memory_advice, out_of_memory, saved_bytes
from jasper_fast.training.run.gpu_monitor import GpuMonitor
from jasper_fast.training.run.log import LINE_WIDTH, SPIKE_WINDOW, RunLog, step_line
from jasper_fast.training.run.trackers import score_curves, start_trackers
from jasper_fast.utils.errors import JasperError
from tests.helpers.runs import settings, write_data

CPU = torch.device("cpu")


@pytest.fixture
def log(tmp_path):
    log = RunLog(tmp_path, load_config(None), 100, 0)
    yield log
    log.close()


ROWS = [
    {"model": "teacher", "width": 32, "scores": {"pairs/Spearman": 0.75}},
    {"model": "student", "width": 32, "scores": {"pairs/Spearman": 0.5}},
    {"model": "student", "width": 16, "scores": {"pairs/Spearman": 0.25}},
]


def record(step: int, loss: float) -> dict:
    numbers = {"grad_norm": 1.0, "lr": 0.1, "texts_per_s": 1.0, "tokens_per_s": 1.0, "padding": 0.0}
    return {"step": step, "stage_step": step, "loss": loss, "data_wait": 0.0, "memory_gb": 0.1, **numbers}


def test_a_jump_of_the_loss_is_marked(log, capsys):
    for step in range(1, SPIKE_WINDOW + 1):
        log.step("one", record(step, 2.0 + step % 3), False)
    log.step("one", record(SPIKE_WINDOW + 1, 5.0), False)  # not far from usual
    log.step("one", record(SPIKE_WINDOW + 2, 30.0), False)
    log.step("two", record(SPIKE_WINDOW + 3, 900.0), False)  # another stage, another loss
    lines = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [line["step"] for line in lines if "spike" in line] == [SPIKE_WINDOW + 2]
    assert lines[SPIKE_WINDOW + 1]["spike"] == pytest.approx(10.0)
    assert "10.0 times its recent median" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "given", "shown", "hidden"),
    [
        ("head", {"tokens_per_s": 0.0, "padding": 0.0}, "head 7/100  loss 3.5  1 texts/s  lr 1.0e-01", "tokens/s"),
        ("head", {"cosine": 0.0, "similarity": 0.00513}, "  similarity 0.00513  ", "cosine"),
        ("head", {"data_wait": 0.1}, "0.1 GB", "data wait"),
        ("head", {"data_wait": 0.55}, "data wait 55 %", "padding"),
        ("head", {"tokens_per_s": 828.0}, "828 tokens/s", "padding"),
        ("n" * 150, {}, "n" * 99 + "…", "loss"),
        (
            "a-long-name-of-a-stage",
            {part.name: 123456.0 for part in LOGGED_LOSSES} | {"tokens_per_s": 1e9},
            "cosine 1.23e+05  similarity 1.23e+05",
            "contrastive",
        ),
    ],
)
def test_a_line_shows_what_was_measured_and_fits(stage, given, shown, hidden):
    line = step_line(stage, record(7, 3.5) | given, 100)
    assert shown in line and hidden not in line and len(line) <= LINE_WIDTH


def test_fast_steps_print_few_lines_and_log_all(tmp_path, capsys, monkeypatch):
    log = RunLog(tmp_path, load_config(None), 100, 0)
    clock = iter(0.1 * step for step in range(10**6))  # each look at the clock takes 0.1 s
    monkeypatch.setattr("jasper_fast.training.run.log.time", types.SimpleNamespace(monotonic=lambda: next(clock)))
    for step in range(1, 1001):
        log.step("head", record(step, 2.0), step == 1000)
    log.close()
    printed = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().out.splitlines()]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1000
    assert printed[0] == 10 and printed[-1] == 1000 and 3 <= len(printed) < 10


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is always full")
def test_a_full_disk_ends_the_log_with_an_error_that_tells(log):
    log.file.close()
    log.file = open("/dev/full", "w")  # noqa: SIM115 - closed by the log
    with pytest.raises(JasperError, match="the disk is full"):
        log.event("step", loss=1.0)


def test_tensorboard_shows_each_step_once_however_often_a_run_goes_on(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config(None, [("log.trackers", ["tensorboard"])])
    for start, losses in ((1, [1.0, 2.0, 3.0, 4.0]), (3, [30.0, 40.0, 50.0])):  # stopped at 4, resumed from 2
        with start_trackers(tmp_path, config, start - 1) as trackers:
            log = RunLog(tmp_path, config, 10, start - 1, trackers)
            for step, loss in enumerate(losses, start):
                log.step("head" if step < 4 else "distil", record(step, loss), True)
            log.close()
    with start_trackers(tmp_path, config, 5) as (tracker,):  # stopped during the evaluation, and resumed
        tracker.log(score_curves(ROWS, "student"), 5)
    shown = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in shown.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
        (4, 40.0),
        (5, 50.0),
    ]
    assert [e.value for e in shown.Scalars("train/stage")] == [0, 0, 0, 1, 1]
    assert [(e.step, round(e.value, 3)) for e in shown.Scalars("eval/pairs/Spearman@16")] == [(5, 0.25)]
    tags = set(shown.Tags()["scalars"])
    assert {"train/grad_norm", "train/lr", "eval/pairs/Spearman@32"} <= tags
    assert {tag.split("/")[0] for tag in tags} == {"train", "eval"}


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_run_that_goes_on_is_the_same_run_for_trackers(name, tmp_path, monkeypatch):
    """With the tracker's package replaced, since none of both is here."""
    begun, told = [], []
    package = types.SimpleNamespace(
        init=lambda **given: begun.append(given),
        log=lambda values, step: told.append((step, values)),
        finish=lambda: told.append("finished"),
    )
    monkeypatch.setitem(sys.modules, name, package)
    config = load_config(None, [("log.trackers", [name])])
    for folder in ("one", "one", "two"):
        with start_trackers(tmp_path / folder, config) as (tracker,):
            tracker.log({"s/loss": 0.5}, 3)
    first, again, other = [{key: given.get(key) for key in ("name", "id", "project", "resume")} for given in begun]
    assert first == again != other and first["project"] == "jasper_fast" and first["resume"] == "allow"
    if name == "wandb":  # known by its id; the others by the name
        assert first["name"] == config.name and len(first["id"]) >= 8
    else:
        assert first["name"].startswith(config.name) and "id" not in begun[0]
    assert told == [(3, {"s/loss": 0.5}), "finished"] * 3


def test_a_tracker_without_login_is_told_before_teaching(tiny_bert, tiny_texts, tmp_path, monkeypatch):
    from jasper_fast.train import train

    class Error(Exception):
        pass

    def init(**_):
        raise Error("no API key")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init, Error=Error))
    monkeypatch.setattr("jasper_fast.training.run.trackers.find_spec", lambda name: name)
    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    with pytest.raises(JasperError, match=r"wandb: no API key\nFix: type `wandb login`"):
        train(tree, out=tmp_path / "out", overrides=[("log.trackers", ["tensorboard", "wandb"])])
    assert not list((tmp_path / "cache").glob("teacher-*"))


def stage(**given) -> StageConfig:
    base = {"name": "s", "train": ["*"], "heads": [8], "batch_size": 8, "steps": 1, "lr": 1e-3, "micro_batch": 4}
    return StageConfig.model_validate(base | given)


def student(model: Path) -> Student:
    return Student.build(StudentConfig(model=str(model), heads=[8], max_length=32)).train()


def test_what_a_graph_holds_is_measured(tiny_bert):
    model = student(tiny_bert)
    ids = [[2, 9, 8, 7, 3]] * 4
    before = torch.get_rng_state()
    one, two = saved_bytes(model, ids, CPU, "fp32"), saved_bytes(model, ids * 2, CPU, "fp32")
    assert torch.equal(before, torch.get_rng_state())
    assert one > 4 * 5 * 32 * 4 * 3 and 1.7 * one < two < 2.1 * one  # at least the layers' outputs; it grows with texts
    model.set_gradient_checkpointing(True)
    assert saved_bytes(model, ids, CPU, "fp32") < 0.5 * one


def test_casts_of_weights_are_of_no_token(tiny_bert):
    """A text's graph holds every weight once more under autocast, however short it is."""
    model = student(tiny_bert)
    ids = [2, 9, 8, 7, 3]
    told = graph_bytes_per_token(model, ids, CPU, "bf16")
    assert told < 0.7 * saved_bytes(model, [ids], CPU, "bf16") / len(ids)
    assert told == pytest.approx(graph_bytes_per_token(model, ids * 4, CPU, "bf16"), rel=0.5)


def batch_of_eight() -> Batch:
    micro = MicroBatches.of([[2, 9, 8, 3]] * 8, 4)
    return Batch(np.arange(8), torch.randn(8, 8), micro, None, 32, 32, 0.0)


def test_out_of_memory_says_what_would_fit(tiny_bert):
    model, batch = student(tiny_bert), batch_of_eight()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")
    told = str(out_of_memory(error, model, batch, stage(), CPU, "fp32"))
    assert "CUDA out of memory" in told and "kB per token was measured" in told
    assert "gradient_caching: true" in told and "gradient_checkpointing: true" in told and "micro_tokens: 8" in told
    told = str(out_of_memory(error, model, batch, stage(gradient_caching=True), CPU, "fp32"))
    assert "gradient_caching: true (" not in told
    told = str(out_of_memory(error, model, None, stage(), CPU, "fp32"))
    assert "CUDA out of memory) while 32 texts at a time are pooled" in told and "(now 32 tokens)" in told


def test_nothing_is_measured_with_a_sharded_student(tiny_bert, monkeypatch):
    """Its layers come together over all ranks, and the others are not measuring."""
    monkeypatch.setattr("jasper_fast.training.memory.is_sharded", lambda model: True)
    monkeypatch.setattr("jasper_fast.training.memory.saved_bytes", None)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried")
    told = str(out_of_memory(error, student(tiny_bert), batch_of_eight(), stage(), CPU, "fp32"))
    assert "measured" not in told and "micro_tokens:" not in told and "a smaller micro_batch" in told


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."), "CUDA out of memory"),
        (
            RuntimeError(
                "[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you tried 9 bytes. Error"
            ),
            "DefaultCPUAllocator: can't allocate memory: you tried 9 bytes",
        ),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_did_not_fit_is_freed_before_it_is_measured(tiny_bert, monkeypatch, error, says):
    class Graph:
        pass

    alive = []

    def fail():
        graph = Graph()
        alive.append(weakref.ref(graph))
        raise error

    def measure(*_):
        assert alive[0]() is None
        return 400.0

    monkeypatch.setattr("jasper_fast.training.memory.graph_bytes_per_token", measure)
    with (
        pytest.raises(JasperError, match=re.escape(f"out of memory ({says}); a graph of 0 kB per token was measured")),
        memory_advice(student(tiny_bert), batch_of_eight(), stage(), CPU, "fp32"),
    ):
        fail()


def test_other_errors_are_no_want_of_memory(tiny_bert):
    with pytest.raises(RuntimeError, match="size"), memory_advice(student(tiny_bert), None, stage(), CPU, "fp32"):
        torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize("what", ["step", "pooling", "measuring"])
def test_out_of_memory_anywhere_in_a_stage_tells(what, monkeypatch, tiny_bert, tiny_texts, tmp_path):
    import jasper_fast.train as module

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    if what == "step":
        monkeypatch.setattr(torch.optim.AdamW, "step", fail)
    elif what == "pooling":
        tree["stages"][0] |= {"last_layers": 0, "gradient_checkpointing": False}
        monkeypatch.setattr("jasper_fast.training.stages.text.pooled_states", fail)
    else:
        monkeypatch.setattr("jasper_fast.training.memory.graph_bytes_per_token", fail)
        run = module.train(tree, out=tmp_path / "out")
        (told,) = [line for line in (run / "log.jsonl").read_text().splitlines() if '"activations"' in line]
        assert "graph_bytes" not in told and "layers_computed_twice" in told
        return
    with pytest.raises(JasperError, match="stage 'two': out of memory"):
        module.train(tree, out=tmp_path / "out")


def test_out_of_memory_in_a_run_is_an_error_that_tells(monkeypatch, tiny_bert, tiny_texts, tmp_path):
    import jasper_fast.train as module

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")

    monkeypatch.setattr("jasper_fast.training.loop.take_gradients", fail)
    with pytest.raises(JasperError, match="stage 'two': out of memory"):
        module.train(one_stage(tmp_path, tiny_bert, tiny_texts), out=tmp_path / "out")


def one_stage(folder: Path, bert: Path, texts: list[str]) -> dict:
    write_data(folder, texts)
    tree = settings(folder, bert)
    tree["evaluate"], tree["stages"] = [], tree["stages"][1:2]
    tree["student"]["heads"] = [32]
    return tree


def test_the_log_tells_what_checkpointing_saves_and_costs(tiny_bert, tiny_texts, tmp_path):
    from jasper_fast.train import train

    train(one_stage(tmp_path, tiny_bert, tiny_texts), out=tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    (told,) = [line for line in lines if line["event"] == "activations"]
    assert told["layers_computed_twice"] == 1 and told["passes"] >= 1
    assert 0 < told["graph_bytes_per_token"] < told["graph_bytes_per_token_without_checkpointing"]
    step = next(line for line in lines if line["event"] == "step")
    assert 0 < step["share_encoder"] < 1 and 0 < step["share_optimiser"] < 1 and "share_communication" in step


def test_telemetry_reads_the_gpu_that_trains(monkeypatch):
    """With NVML and torch's view of a GPU replaced, since there is none here."""
    energy = iter([1_000_000, 3_000_000, 3_500_000])  # millijoules

    class NVMLError(Exception):
        pass

    def unsupported(handle):
        raise NVMLError

    nvml = types.SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetUtilizationRates=lambda handle: types.SimpleNamespace(gpu=73),
        nvmlDeviceGetMemoryInfo=lambda handle: types.SimpleNamespace(used=5_000_000_000),
        nvmlDeviceGetPowerUsage=unsupported,
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: next(energy),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="abc"))
    telemetry = GpuMonitor(torch.device("cuda:0"))
    found = telemetry.read(500)
    assert found == {"gpu_utilisation": 0.73, "gpu_memory_gb": 5.0, "joules_per_1000_texts": pytest.approx(4000.0)}
    assert telemetry.read(1000)["joules_per_1000_texts"] == pytest.approx(500.0)
    assert GpuMonitor(CPU).read(10) == {}


def test_energy_is_of_the_texts_since_the_last_reading(tiny_bert, tiny_texts, tmp_path, monkeypatch):
    """The last reading of a stage covers fewer texts than the readings between two lines of the log."""
    import jasper_fast.train as module

    read = []

    class Readings:
        def __init__(self, device):
            pass

        def read(self, texts):
            read.append(texts)
            return {"joules_per_1000_texts": 7.0}

    monkeypatch.setattr("jasper_fast.training.loop.GpuMonitor", Readings)
    tree = one_stage(tmp_path, tiny_bert, tiny_texts) | {"log": {"every": 4}}
    module.train(tree, out=tmp_path / "out")
    assert read == [4 * 16, 2 * 16]


@pytest.mark.parametrize("moment", ["ensure_teachers", "finalize"])
def test_sigterm_before_and_after_the_steps_ends_as_ctrl_c_does(tiny_bert, tiny_texts, tmp_path, monkeypatch, moment):
    from jasper_fast.train import train

    def ask(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    module = {"ensure_teachers": "jasper_fast.teachers.label", "finalize": "jasper_fast.training.finish"}[moment]
    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(f"{module}.{moment}", ask)
        with pytest.raises(KeyboardInterrupt):
            train(tree, out=tmp_path / "out")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (train(tree, out=tmp_path / "out") / "results.json").is_file()


def test_a_clock_that_jumps_back_spoils_no_line(tiny_bert, tiny_texts, tmp_path, monkeypatch):
    from jasper_fast.train import train

    now = iter(range(2_000_000_000, 0, -60))  # every look at the clock is a minute earlier
    for clock in ("time.time", "tqdm.std.time"):
        monkeypatch.setattr(clock, lambda: float(next(now)))
    run = train(one_stage(tmp_path, tiny_bert, tiny_texts), out=tmp_path / "out")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if line["event"] == "step"]
    assert len(steps) == 6 and all(0 < line["seconds"] < 60 and line["texts_per_s"] > 0 for line in steps)
    assert all(0 <= line["data_wait"] <= 1 for line in steps)


def test_a_dry_run_finds_a_teacher_that_is_missing(tiny_bert, tiny_texts, tmp_path):
    from jasper_fast.training.dry_run import describe_plan

    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    tree["teachers"] = [{"model": str(tmp_path / "absent")}]
    with pytest.raises(JasperError, match="there is no such folder"):
        describe_plan(load_config(tree), tmp_path / "out")


def test_a_dry_run_reads_the_texts(tiny_bert, tiny_texts, tmp_path):
    from jasper_fast.training.dry_run import describe_plan

    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    assert " texts to train on" in describe_plan(load_config(tree), tmp_path / "out")
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "a text"}\n{"text": null}\n')
    tree["data"]["sources"] = [{"path": str(file)}]
    with pytest.raises(JasperError, match="line 2: column 'text' is null"):
        describe_plan(load_config(tree), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_that_cannot_be_written_is_told_with_the_rest_before_the_texts(tiny_bert, tiny_texts, tmp_path):
    from jasper_fast.training.preflight import prepare

    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    tree["data"]["cache"] = tree["data"]["sources"][0]["path"]
    with pytest.raises(JasperError, match=r"could not write .*texts.jsonl: a file is where a folder should be"):
        prepare(load_config(tree))
    tree["teachers"] = [{"model": str(tmp_path / "absent")}]
    with pytest.raises(JasperError, match=r"(?s)could not write .*there is no such folder"):
        prepare(load_config(tree))


def test_a_disk_too_small_for_a_run_is_told_before_teaching(tiny_bert, tiny_texts, tmp_path, monkeypatch):
    from jasper_fast.train import train
    from jasper_fast.training.preflight import check_disk, prepare
    from jasper_fast.training.stages.base import trained_names

    def leave(free):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: namedtuple("usage", "free")(free))

    tree = one_stage(tmp_path, tiny_bert, tiny_texts)
    frozen = {**tree["stages"][0], "name": "frozen", "steps": 6, "batch_size": 16}
    frozen |= {"last_layers": 0, "gradient_checkpointing": False}
    tree["stages"] = [frozen, *tree["stages"]]
    config = load_config(tree)
    (model, data), folder = prepare(config), tmp_path / "out"
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    trained = sum(sizes[name] for name in trained_names(model, config.stages[1]))
    needed = 4 * (3 * (sum(sizes.values()) + 2 * trained) + 6 * 16 * 32)
    leave(needed)
    check_disk(config, folder, model, data)
    leave(needed - 1)
    with pytest.raises(JasperError, match="out: checkpoints and pooled states need .* or use another --out"):
        train(tree, out=folder)
    assert not list((tmp_path / "cache").glob("teacher-*"))
    leave(needed - 4 * 6 * 16 * 32)
    check_disk(config, folder, model, data, first=1)  # the frozen stage is over
    (folder / "pooled" / "frozen").mkdir(parents=True)
    (folder / "pooled" / "frozen" / "000000.npy").write_bytes(bytes(4 * 6 * 16 * 32))
    check_disk(config, folder, model, data)  # what it needs is there
