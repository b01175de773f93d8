"""Checkpoints that are whole or absent: everything a run needs to go on as if it had never stopped."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import nn

from jasper_fast.errors import JasperError
from jasper_fast.files import publish_dir, sha256, sweep_unfinished

WEIGHTS, STATE, MANIFEST = "model.safetensors", "state.pt", "manifest.json"


@dataclass(frozen=True)
class Position:
    """How far a run is. ``step`` counts over all stages; ``stage_step`` within the stage; both are steps done."""

    step: int
    stage: int
    stage_step: int


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
    path = folder / f"step-{position.step:08d}"
    if path.exists():
        return path
    with publish_dir(path) as temporary:
        with open(temporary / WEIGHTS, "wb") as file:  # through Python's own files, so that a full disk is an OSError
            file.write(save(_own_storage(model.state_dict())))
        state = io.BytesIO()
        torch.save({"optimizer": optimizer.state_dict() if optimizer is not None else None, "rng": _rng_state()}, state)
        with open(temporary / STATE, "wb") as file:
            file.write(state.getbuffer())
        files = {name: sha256(temporary / name) for name in (WEIGHTS, STATE)}
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
        model.load_state_dict(load_file(self.path / WEIGHTS), strict=True)

    def load_state(self, optimizer: torch.optim.Optimizer | None) -> None:
        """Restore the optimiser, where there is one, and the random number generators."""
        state = torch.load(self.path / STATE, map_location="cpu", weights_only=True)
        if optimizer is not None and state["optimizer"] is not None:
            optimizer.load_state_dict(state["optimizer"])
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
        files, _ = manifest["files"], Position(**manifest["position"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read: {error}"
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
