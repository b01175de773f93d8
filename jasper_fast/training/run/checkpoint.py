"""Checkpoints, complete or absent: everything a run needs to resume as if it had never stopped."""

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

from jasper_fast.distributed.fsdp import collect, load_optimizer, load_weights
from jasper_fast.utils.atomic import publish_dir, sweep_unfinished
from jasper_fast.utils.errors import JasperError
from jasper_fast.utils.fingerprint import file_sha256

WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


@dataclass(frozen=True)
class Position:
    """The progress of a run.

    Args:
        step: steps done, over all stages.
        stage: the index of the stage.
        stage_step: steps done of the stage.
    """

    step: int
    stage: int
    stage_step: int

    def at(self, stage_step: int) -> Position:
        """Return the position after ``stage_step`` steps of the same stage."""
        return Position(self.step - self.stage_step + stage_step, self.stage, stage_step)

    def after(self, steps: int) -> Position:
        """Return the position at the start of the next stage, if this stage has ``steps`` steps."""
        return Position(self.step - self.stage_step + steps, self.stage + 1, 0)


class Saver:
    """Saver of checkpoints, which copies the state at once and writes it in the background.

    Args:
        folder: the folder of checkpoints.
        keep: the number of checkpoints that remain.
        is_main: whether this rank writes. The others only give their parts of sharded tensors.
    """

    def __init__(self, folder: Path, keep: int, is_main: bool = True) -> None:
        self.folder, self.keep, self.is_main = folder, keep, is_main
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None

    def save(
        self, position: Position, model: nn.Module, optimizer: torch.optim.Optimizer | None, facts: dict[str, Any]
    ) -> None:
        """Copy the state and start to write it. All ranks must call it.

        Args:
            position: the progress of the run.
            model: the student.
            optimizer: the optimizer. None: the end of a stage.
            facts: what must be equal when the run resumes (fingerprints, digests), as JSON values.

        Raises:
            JasperError: the previous checkpoint could not be written.
        """
        self.wait()
        content = snapshot(model, optimizer, self.is_main)
        if content is not None:
            self._writing = self._worker.submit(publish, self.folder, position, content, facts, self.keep)

    def wait(self) -> None:
        """Wait until the last checkpoint is published.

        Raises:
            JasperError: it could not be written. Earlier checkpoints are untouched.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait for the last checkpoint, and end the thread that writes."""
        try:
            self.wait()
        finally:
            self._worker.shutdown()


class Snapshot(NamedTuple):
    """The content of a checkpoint, copied to host memory."""

    weights: dict[str, Tensor]
    state: dict[str, Any]  # of the optimizer and of the random number generators


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None, is_main: bool = True) -> Snapshot | None:
    """Return a copy of the present state, on the main rank alone. All ranks of a sharded model must call it."""
    weights = collect(model.state_dict(), is_main)  # tied ones come apart, as safetensors wants it
    state = collect(optimizer.state_dict(), is_main) if optimizer is not None else None
    return Snapshot(weights, {"optimizer": state, "rng": _rng_state()}) if is_main else None


def publish(folder: Path, position: Position, content: Snapshot, facts: dict[str, Any], keep: int) -> Path:
    """Write a snapshot as ``folder/step-XXXXXXXX``, and delete the oldest checkpoints beyond ``keep``.

    Args:
        folder: the folder of checkpoints.
        position: the progress of the run.
        content: the snapshot.
        facts: what must be equal when the run resumes (fingerprints, digests), as JSON values.
        keep: the number of checkpoints that remain.

    Raises:
        JasperError: the disk is full, or the folder was removed twice. Earlier checkpoints are untouched.
    """
    path = folder / f"step-{position.step:08d}"
    removed: FileNotFoundError | None = None
    while not path.exists():
        try:
            _write(path, position, content, facts)
        except FileNotFoundError as error:
            if removed is not None:
                raise JasperError(
                    f"{folder} was removed, and removed again, while a checkpoint was written there ({error}). Fix: "
                    "leave it alone while the run is at work, or use another --out"
                ) from error
            removed = error
    for old in _published(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return path


def _write(path: Path, position: Position, content: Snapshot, facts: dict[str, Any]) -> None:
    with publish_dir(path) as temporary:
        save_file(content.weights, temporary / WEIGHTS)
        _save_state(content.state, temporary / STATE)
        files = {name: file_sha256(temporary / name) for name in (WEIGHTS, STATE)}
        manifest = {"position": asdict(position), "facts": facts, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _save_state(state: dict[str, Any], path: Path) -> None:
    with open(path, "wb") as file:
        checked: Any = _CheckedFile(file)
        torch.save(state, checked)
        if checked.error is not None:
            raise checked.error


class _CheckedFile:
    """A file that keeps the error of a full disk, which torch.save would replace by another one."""

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
    """A checkpoint whose files agree with their manifest.

    Args:
        path: its folder.
        position: the progress of the run.
        facts: what must be equal when the run resumes.
    """

    path: Path
    position: Position
    facts: dict[str, Any]

    def load_model(self, model: nn.Module) -> None:
        """Load the weights into ``model``."""
        load_weights(model, load_file(self.path / WEIGHTS))

    def load_state(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore the optimizer, if there is one, and the random number generators."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True, mmap=True)
        if optimizer is not None and state["optimizer"] is not None:
            load_optimizer(optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"]["cpu"])
        if torch.cuda.is_available() and state["rng"]["cuda"] is not None:
            torch.cuda.set_rng_state(state["rng"]["cuda"])


def latest_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the newest complete checkpoint. None if there are no checkpoints.

    Damaged checkpoints are reported and deleted.

    Args:
        folder: the folder of checkpoints.

    Raises:
        JasperError: all checkpoints are damaged.
    """
    if not folder.exists():
        return None
    sweep_unfinished(folder)
    damaged: dict[Path, str] = {}
    for path in reversed(_published(folder)):
        problem = _find_damage(path)
        if problem is None:
            for bad, reason in damaged.items():  # their steps will be saved again under the same names
                print(f"checkpoint {bad.name} is damaged ({reason}); going back to {path.name}")
                shutil.rmtree(bad, ignore_errors=True)
            manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            return Checkpoint(path, Position(**manifest["position"]), manifest["facts"])
        damaged[path] = problem
    if damaged:
        reasons = "; ".join(f"{path.name}: {reason}" for path, reason in damaged.items())
        raise JasperError(f"no checkpoint in {folder} is whole ({reasons}). Fix: start again with another --out")
    return None


def delete_spare(folder: Path) -> None:
    """Delete all checkpoints but the newest. A finished run does not go back to them.

    Args:
        folder: the folder of the run's checkpoints.
    """
    for path in _published(folder)[:-1]:
        shutil.rmtree(path, ignore_errors=True)


def _published(folder: Path) -> list[Path]:
    return sorted(folder.glob("step-" + "[0-9]" * 8))


def _find_damage(path: Path) -> str | None:
    """Return the problem of a checkpoint, or None if it is complete."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files, _, _ = dict(manifest["files"]), dict(manifest["facts"]), Position(**manifest["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error!r}"
    for name, digest in files.items():
        if not (path / name).is_file():
            return f"{name} is missing"
        if file_sha256(path / name) != digest:
            return f"{name} is not what was written"
    return None


def _rng_state() -> dict[str, Any]:
    """Return the states of the generators that this process draws from: the CPU's and its GPU's."""
    return {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
