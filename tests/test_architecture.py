"""The rules that keep the tree readable: one import direction, short modules, one loop, every package listed."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jasper_fast"
MODULES = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
LONGEST_MODULE, LONGEST_LOOP = 400, 60  # lines


def functions(file):
    return [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)]


def test_import_contracts():
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as run; run()"]
    checked = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout[-4000:] + checked.stderr[-2000:]


def test_the_contracts_see_every_module():
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    assert "jasper_fast.kernels" in contracts["root_packages"]  # it has no __init__.py
    layers = next(contract for contract in contracts["contracts"] if contract["type"] == "layers")
    assert layers["exhaustive"] is True
    assert contracts["exclude_type_checking_imports"] is False


@pytest.mark.parametrize("file", MODULES, ids=lambda file: str(file.relative_to(ROOT)))
def test_modules_are_short(file):
    assert len(file.read_text().splitlines()) <= LONGEST_MODULE


def test_the_loop_is_one_short_function():
    (loop,) = (node for file in MODULES for node in functions(file) if node.name == "train_stage")
    assert loop.end_lineno - loop.lineno + 1 <= LONGEST_LOOP
    assert len((PACKAGE / "train.py").read_text().splitlines()) < 150


def test_only_stages_ask_which_kind_they_are():
    """Text and vision stages are two classes behind one protocol."""
    asking = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        if "kernels" not in file.parts and re.search(r"(?<!assert )\bstage\.vision is", file.read_text())
    }
    assert asking <= {"config/stage.py", "config/run.py", "training/stages/base.py"}


def test_the_configuration_is_light():
    command = "import sys, jasper_fast.config; print(*(m for m in ('torch', 'transformers') if m in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not loaded.stdout.strip()
