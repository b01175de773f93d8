"""Checkpoints that are whole or absent: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir, sha256, sweep_unfinished
from jasper_fast.sharding import load_optimizer, load_weights, whole

WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


@dataclass(frozen=True)
class Position:
    """How far a run is. ``step`` counts over all stages; ``stage_step`` within the stage; both are steps done."""

    step: int
    stage: int
    stage_step: int


class Saver:
    """Saves checkpoints while training goes on: what is saved is copied at once, and written meanwhile.

    Args:
        folder: where they go.
        keep: how many remain.
        first: whether this is the rank that writes; the others only give their parts of what is sharded.
    """

    def __init__(self, folder: Path, keep: int, first: bool = True) -> None:
        self.folder, self.keep, self.first = folder, keep, first
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer | None, facts: dict[str, Any]
    ) -> None:
        """Copy everything and begin to write it; all ranks must call it alike.

        Raises:
            JasperError: writing the one before failed.
        """
        self.wait()
        content = snapshot(model, optimizer, self.first)
        if self.first:
            self._writing = self._worker.submit(publish, self.folder, position, content, facts, self.keep)

    def wait(self) -> None:
        """Until what was saved is published.

        Raises:
            JasperError: it could not be written; earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait, and be done."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()


def save_checkpoint(
    folder: Path,
    position: Position,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    facts: dict[str, Any],
    keep: int,
) -> Path:
    """Publish ``folder/step-XXXXXXXX`` and drop the oldest beyond ``keep``.

    Args:
        facts: what must agree when the run goes on (fingerprints, digests); must be JSON.

    Raises:
        JasperError: the disk is full; earlier checkpoints are untouched.
    """
    return publish(folder, position, snapshot(model, optimizer), facts, keep)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None, first: bool = True) -> dict[str, bytes]:
    """The files of a checkpoint, as they are now. All ranks of a sharded model call it; ``first`` gets the files."""
    weights, state = whole(model.state_dict()), whole(optimizer.state_dict()) if optimizer is not None else None
    if not first:
        return {}
    buffer = io.BytesIO()
    torch.save({"optimizer": state, "rng": _rng_state()}, buffer)
    return {WEIGHTS: save(_own_storage(weights)), STATE: buffer.getvalue()}


def publish(folder: Path, position: Position, content: dict[str, bytes], facts: dict[str, Any], keep: int) -> Path:
    """Write a snapshot as ``folder/step-XXXXXXXX``, whole or not at all. See :func:`save_checkpoint`."""
    path = folder / f"step-{position.step:08d}"
    if path.exists():
        return path
    with publish_dir(path) as temporary:
        for name, blob in content.items():
            with open(temporary / name, "wb") as file:  # Python's own files: a full disk is an OSError
                file.write(blob)
        files = {name: sha256(temporary / name) for name in content}
        manifest = {"position": asdict(position), "facts": facts, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for old in _published(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files agree with their manifest."""

    path: Path
    position: Position
    facts: dict[str, Any]

    def load_model(self, model: nn.Module) -> None:
        """Put the weights into ``model``."""
        load_weights(model, load_file(self.path / WEIGHTS))

    def load_state(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore the optimiser, where there is one, and the random number generators."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        if optimizer is not None and state["optimizer"] is not None:
            load_optimizer(optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if torch.cuda.is_available() and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def latest_checkpoint(folder: Path, say: Any = print) -> Checkpoint | None:
    """The newest checkpoint that is whole; a damaged one is named and passed over.

    Raises:
        JasperError: there are checkpoints and none is whole.
    """
    if not folder.exists():
        return None
    sweep_unfinished(folder)
    damaged: dict[Path, str] = {}
    for path in reversed(_published(folder)):
        problem = _damage(path)
        if problem is None:
            for bad, reason in damaged.items():  # their steps will be saved anew under the same names
                say(f"checkpoint {bad.name} is damaged ({reason}); going back to {path.name}")
                shutil.rmtree(bad, ignore_errors=True)
            manifest = json.loads((path / MANIFEST).read_text())
            return Checkpoint(path, Position(**manifest["position"]), manifest["facts"])
        damaged[path] = problem
    if damaged:
        told = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise JasperError(f"no checkpoint in {folder} is whole ({told}); start again with another --out")
    return None


def _published(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def _damage(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files, _, _ = dict(manifest["files"]), dict(manifest["facts"]), Position(**manifest["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what was written"
    return None


def _own_storage(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights on the CPU, each with memory of its own: tied ones share it, which safetensors refuses."""
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}


def _rng_state() -> dict[str, Any]:
    """The generators that this process draws from: the CPU's and its own GPU's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
