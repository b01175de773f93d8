"""Checkpoints that are whole or absent: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir, sha256, sweep_unfinished
from jasper_fast.sharding import collect, load_optimizer, load_weights

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
        if content is not None:
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
    content = snapshot(model, optimizer)
    assert content is not None
    return publish(folder, position, content, facts, keep)


class Snapshot(NamedTuple):
    """What a checkpoint holds, in host memory of its own."""

    weights: dict[str, Tensor]
    state: dict[str, Any]  # of the optimiser and of the random number generators


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None, first: bool = True) -> Snapshot | None:
    """A copy of everything as it is now. All ranks of a sharded model call it; ``first`` alone gets it."""
    weights = collect(model.state_dict(), first)  # tied ones come apart, as safetensors wants it
    state = collect(optimizer.state_dict(), first) if optimizer is not None else None
    return Snapshot(weights, {"optimizer": state, "rng": _rng_state()}) if first else None


def publish(folder: Path, position: Position, content: Snapshot, facts: dict[str, Any], keep: int) -> Path:
    """Write a snapshot as ``folder/step-XXXXXXXX``, whole or not at all. See :func:`save_checkpoint`.

    Raises:
        JasperError: the disk is full, or the folder was removed, and once more when it had been made again.
    """
    path = folder / f"step-{position.step:08d}"
    removed: FileNotFoundError | None = None
    while not path.exists():
        try:
            _write(path, position, content, facts)
        except FileNotFoundError as error:
            if removed is not None:
                raise JasperError(
                    f"{folder} was removed, and removed again, while a checkpoint was written there ({error}); leave "
                    "it alone while the run is at work, or use another --out"
                ) from error
            removed = error
    for old in _published(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _write(path: Path, position: Position, content: Snapshot, facts: dict[str, Any]) -> None:
    with publish_dir(path) as temporary:
        save_file(content.weights, temporary / WEIGHTS)
        _save_state(content.state, temporary / STATE)
        files = {name: sha256(temporary / name) for name in (WEIGHTS, STATE)}
        manifest = {"position": asdict(position), "facts": facts, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _save_state(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        watched: Any = _Watched(file)
        torch.save(state, watched)
        if watched.error is not None:
            raise watched.error


class _Watched:
    """A file that keeps the error of a full disk for whoever opened it: torch.save would make another one of it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, part: Any) -> int:
        if self.error is None:
            try:
                self.file.write(part)
            except OSError as error:
                self.error = error
        return len(part)

    def flush(self) -> None:
        pass  # closing the file does


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
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True, mmap=True)
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
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
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
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, _, _ = dict(manifest["files"]), dict(manifest["facts"]), Position(**manifest["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if sha256(path / name) != digest:
            return f"{name} is not what was written"
    return None


def _rng_state() -> dict[str, Any]:
    """The generators that this process draws from: the CPU's and its own GPU's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
