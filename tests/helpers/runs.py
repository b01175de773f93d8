"""Small runs that several tests start."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import torch
from safetensors.torch import load_file


def die_half_way_through(name: str) -> None:
    """Kill this process at the next checkpoint, when half of the file ``name`` is written."""
    import jasper_fast.training.run.checkpoint as module

    writer = {"model.safetensors": "save_file", "state.pt": "_save_state"}[name]
    honest = getattr(module, writer)

    def trap(content, path):
        honest(content, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(module, writer, trap)


def write_data(folder: Path, texts: list[str]) -> None:
    """Write training texts, and a similarity set of other sentences."""
    with open(folder / "texts.jsonl", "w") as file:
        for text in texts[:160]:
            file.write(json.dumps({"text": text}) + "\n")
    lines = [f"{i % 5}.0\t{texts[160 + i]}\t{texts[199 - i]}" for i in range(18)]
    (folder / "pairs.tsv").write_text("score\tsentence1\tsentence2\n" + "\n".join(lines) + "\n")


def settings(folder: Path, bert: Path) -> dict:
    """Return the configuration of a run of three stages that takes a second or two."""
    return {
        "name": "tiny",
        "student": {
            "model": str(bert),
            "layers": [0, 2],
            "heads": [32, 16, 8],
            "max_length": 32,
            "vector_dropout": 0.1,
        },
        "teachers": [{"model": str(bert), "max_length": 32}],
        "data": {"sources": [{"path": str(folder / "texts.jsonl")}], "cache": str(folder / "cache")},
        "evaluate": [{"path": str(folder / "pairs.tsv")}],
        "stages": [
            {"name": "one", "train": ["heads.32.*"], "heads": [32], "batch_size": 16, "steps": 6, "lr": 1e-2},
            {
                "name": "two",
                "train": ["heads.32.*"],
                "last_layers": 1,
                "heads": [32],
                "batch_size": 16,
                "steps": 6,
                "lr": 1e-3,
                "gradient_checkpointing": True,
                "average": 0.7,
            },
            {
                "name": "three",
                "train": ["*"],
                "heads": [32, 16, 8],
                "batch_size": 16,
                "steps": 8,
                "lr": 1e-3,
                "average": 0.8,
                "narrow_target": "self",
                "batches": "neighbours",
                "neighbours": 4,
                "micro_batch": 5,
                "narrow_weights": {"similarity": 200.0, "neighbourhood": 1.0},
            },
        ],
        "log": {"every": 2},
        "checkpoint": {"every": 2},
    }


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert newest.name == "step-00000020"
    return load_file(newest / "model.safetensors")


def assert_same_run(run: Path, alone: Path) -> None:
    """Check that both runs have the same weights bit for bit, and the same log with every step once."""
    ours, expected = final_weights(run), final_weights(alone)
    assert ours.keys() == expected.keys()
    for name in expected:
        assert torch.equal(ours[name], expected[name]), name
    assert losses_in(run) == losses_in(alone)


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses_in(run: Path) -> list[tuple]:
    keep = ("step", "loss", "cosine", "similarity", "relative_similarity", "grad_norm", "lr")
    return [tuple(r.get(k) for k in keep) for r in records(run) if r["event"] == "step"]


def run_in_child(tree: dict, out: str) -> None:
    """Entry point of a process that will be killed."""
    torch.set_num_threads(1)
    from jasper_fast.train import Stopped, train

    try:
        train(tree, out=out)
    except Stopped as stopped:
        Path(out, "said").write_text(str(stopped))
