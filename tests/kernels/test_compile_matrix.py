"""Every Triton kernel compiles for three generations of GPUs without spills, in a separate process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.kernels import compile_matrix

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")


ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    # Here kernels are interpreted; what is compiled must be decorated without that.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile_matrix", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_representative_forms_compile():
    done = run("--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_every_form_compiles():
    done = run("--kernel", "_")  # every name has one; the committed table is left alone
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_table_is_drawn_from_the_committed_result():
    found = json.loads((ROOT / compile_matrix.OUT).read_text())
    assert (ROOT / compile_matrix.TABLE).read_text() == compile_matrix.table(found)
    assert not [fault for entry in found["forms"] for fault in entry["faults"]]


def test_the_committed_result_has_these_forms():
    from jasper_fast.kernels import registry

    found = json.loads((ROOT / compile_matrix.OUT).read_text())
    there = {(entry["kernel"], entry["form"], entry["sm"]) for entry in found["forms"]}
    forms = list(registry.forms())
    wanted = [(f.kernel.__name__, f.label, sm, f.quick) for f in forms for sm in f.architectures]
    assert len(set(wanted)) == len(wanted), "two forms of one kernel share a label"
    expected = {(*names, sm) for *names, sm, quick in wanted if quick or found["whole"]}
    assert there == expected, "run: python -m bench compile_matrix"


@pytest.mark.parametrize(
    "result, words",
    [
        ({"stack": 16, "shared": 0, "tensor_cores": ["wgmma"]}, "16 bytes of stack, allowed 8"),
        ({"stack": 8, "shared": 300_000, "tensor_cores": ["wgmma"]}, "300000 bytes of shared memory"),
        ({"stack": 8, "shared": 0, "tensor_cores": ["mma.sync"]}, "no wgmma"),
        ({"error": "CompilationError: x"}, "CompilationError"),
    ],
)
def test_faults_are_found(result, words):
    form = SimpleNamespace(stack={90: 8}, spills=False, tensor_cores=True)
    (fault,) = compile_matrix.judge(form, 90, result)
    assert words in fault


def test_the_similarity_forms_table_is_drawn_from_the_committed_result():
    from bench.losses import forms as similarity_forms

    found = json.loads((ROOT / similarity_forms.OUT).read_text())
    assert (ROOT / similarity_forms.TABLE).read_text() == similarity_forms.table(found)
