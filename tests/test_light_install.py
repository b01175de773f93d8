"""With torch, numpy and safetensors alone, losses, search and maps of arrays work, and commands say what is missing."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from jasper_fast.utils.packages import TRAIN

ROOT = Path(__file__).parents[1]
BLOCK = """
import sys
from importlib.machinery import PathFinder
class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in %r else PathFinder.find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = Without
"""
USE = """
import torch, jasper_fast
out = jasper_fast.losses.JasperLoss()({8: torch.randn(6, 8, requires_grad=True)}, torch.randn(6, 8))
out.loss.backward()
index = jasper_fast.mips.FlatIPIndex(8, dtype="float32")
index.add(torch.eye(8), ids=range(1, 9))
index.save("index")
assert jasper_fast.mips.FlatIPIndex.load("index").search(torch.eye(8), 1)[1].flatten().tolist() == list(range(1, 9))
from jasper_fast.fitting import PairStatistics, learned_axes, ridge_map
pairs = PairStatistics(8, 8)
pairs.add(torch.eye(8).numpy(), torch.eye(8).numpy())
assert abs(ridge_map(pairs, 1.0).trace() - 4) < 1e-9
assert learned_axes(torch.randn(20, 8).numpy(), torch.eye(8)[:, :2].numpy(), steps=2).shape == (8, 2)
assert dir(jasper_fast) == sorted(jasper_fast.__all__)
try:
    jasper_fast.train("x.yaml")
except Exception as error:
    print(type(error).__name__, error)
"""


def run(arguments: list[str], folder: Path, blocked: tuple[str, ...] = (), **environment: str):
    (folder / "sitecustomize.py").write_text(BLOCK % ([name.partition(".")[0] for name in blocked],))
    paths = os.pathsep.join([str(folder), str(ROOT)])
    inside = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=inside, capture_output=True, text=True)


def test_losses_search_and_maps_work_without_the_packages_for_training(tmp_path):
    done = run(["-c", USE], tmp_path, TRAIN)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("JasperError this needs the packages for training (missing: transformers, ")


COMMANDS = (["jasper_fast.search", "ask", "i"], ["jasper_fast.train"], ["jasper_fast", "export", "x"])


@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_commands_name_the_missing_packages_and_the_fix(arguments, tmp_path):
    done = run(["-m", *arguments], tmp_path, ("datasets", "ruamel.yaml"))
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == (
        "error: this needs the packages for training (missing: datasets, ruamel.yaml). "
        'Fix: in a clone of the repository, run `pip install -e ".[train]"`\n'
    )


def test_the_extra_train_has_the_packages_that_are_checked():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {Requirement(line).name.replace("-", "_").lower() for line in extras["train"]}
    spelled = {"sklearn": "scikit_learn", "pytrec_eval": "pytrec_eval_terrier"}
    assert {spelled.get(name, name) for name in TRAIN} == names - {"nvidia_ml_py"}


LOSS = """
import torch
from jasper_fast.losses import relative_similarity_loss
from jasper_fast.mips import topk
from jasper_fast.ops import native
native._PATH, native._ERROR = None, "it was not built"
x = torch.randn(8, 4)
for _ in range(2):
    relative_similarity_loss(x, x)
    topk(x, x, 2)
"""


@pytest.mark.parametrize(("switch", "warnings"), [("0", 1), ("1", 0)])
def test_a_missing_extension_is_reported_once_at_first_use(switch, warnings, tmp_path):
    done = run(["-c", LOSS], tmp_path, JASPER_FAST_NO_EXTENSION=switch)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ExtensionWarning: losses and searches on this CPU are slower") == warnings
    assert done.stderr.count("To silence this warning, set JASPER_FAST_NO_EXTENSION=1") == warnings


IMPORT_ALL = """
import importlib, pkgutil, jasper_fast
for module in pkgutil.walk_packages(jasper_fast.__path__, "jasper_fast."):
    if not module.name.startswith(("jasper_fast.kernels.", "jasper_fast._C", "jasper_fast.__main__")):
        importlib.import_module(module.name)
"""


def optional_packages() -> tuple[str, ...]:
    """Return the names to import of Triton, and of all extras but those of the README's installation."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    installed = {Requirement(line).name for extra in ("train", "demo") for line in extras[extra]}
    # sentence-transformers imports accelerate if its metadata are there, as they are here.
    others = {Requirement(line).name for lines in extras.values() for line in lines} - installed - {"accelerate"}
    return ("triton", *sorted(name.replace("-", "_") for name in others - {"jasper_fast", "setuptools", "wheel"}))


def test_every_module_can_be_imported_without_optional_packages(tmp_path):
    done = run(["-W", "ignore", "-c", IMPORT_ALL], tmp_path, optional_packages())
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["losses", "losses.similarity", "ops.cost", "mips", "adapt", "train", "env"])
def test_a_module_imported_first_needs_no_triton(module, tmp_path):
    """Each in its own process: a submodule that another module has imported hides what a package's hook does."""
    package, _, name = f"jasper_fast.{module}".rpartition(".")
    done = run(["-W", "error::DeprecationWarning", "-c", f"from {package} import {name}"], tmp_path, ("triton",))
    assert done.returncode == 0, done.stderr
