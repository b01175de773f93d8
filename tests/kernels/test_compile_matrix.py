"""Every Triton kernel compiles for three generations of GPUs without spills, in a separate process."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench.kernels import compile_matrix, forms

triton = pytest.importorskip(
    "triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)"
)

import triton.language as tl  # noqa: E402

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
    found, versions = (json.loads((ROOT / file).read_text()) for file in (compile_matrix.OUT, compile_matrix.VERSIONS))
    assert (ROOT / compile_matrix.TABLE).read_text() == compile_matrix.table(found, versions)
    assert not [fault for entry in found["forms"] for fault in entry["faults"]]


def test_other_versions_compile_all_forms_within_their_limits():
    versions = json.loads((ROOT / compile_matrix.VERSIONS).read_text())
    committed = json.loads((ROOT / compile_matrix.OUT).read_text())
    assert {version[:3] for version in versions} | {committed["triton"][:3]} == set(compile_matrix.STACK)
    for version, found in versions.items():
        assert not found["errors"] and found["compilations"] == len(committed["forms"]) and found["whole"], version
        allowed = compile_matrix.allowed_stack(version)
        for kind, stack in found["stack"].items():
            assert max(stack.values()) <= allowed.get(kind, 0), (version, kind)


def test_the_stack_of_kinds_is_the_largest_of_their_forms():
    names = ("kind", "sm", "stack")
    forms = [dict(zip(names, v, strict=True)) for v in (("a", 80, 8), ("a", 80, 24), ("a", 90, 0), ("b", 90, 16))]
    found = compile_matrix.stack_of_kinds({"whole": True, "forms": [*forms, {"kind": "b", "sm": 80, "error": "x"}]})
    stack = {"a": {"sm_80": 24}, "b": {"sm_90": 16}}
    assert found == {"whole": True, "compilations": 5, "errors": 1, "stack": stack}


def test_the_committed_result_has_these_forms():
    found = json.loads((ROOT / compile_matrix.OUT).read_text())
    there = {(entry["kernel"], entry["form"], entry["sm"]) for entry in found["forms"]}
    wanted = [(f.name, f.label, sm, f.quick) for f in forms.record() for sm in f.architectures]
    assert len(set(wanted)) == len(wanted), "two forms of one kernel share a label"
    expected = {(*names, sm) for *names, sm, quick in wanted if quick or found["whole"]}
    assert there == expected, "run: python -m bench compile_matrix"


def test_every_kernel_is_launched():
    """Each kernel of each module, also one that was added since."""
    modules = [importlib.import_module(f"jasper_fast.kernels.{path.stem}") for path in (ROOT / "kernels").glob("*.py")]
    kernels = {name for module in modules for name in vars(module) if name.endswith("_kernel")}
    assert len(kernels) > 15 and kernels == {form.name for form in forms.record()}


def test_launches_are_recorded_as_triton_specializes_them():
    @triton.jit
    def kernel(X, Y, Z, one, sixteen, other, far, real, BLOCK: tl.constexpr):
        pass

    x, y = torch.empty(32, dtype=torch.bfloat16), torch.empty(32, dtype=torch.int64)[1:]
    values = (x, y, None, 1, 48, -3, 2**40, 1.0)
    types, constants, options = forms.specialized(kernel, values, {"BLOCK": 64, "num_warps": 8})
    assert types == {
        "X": "*bf16:16", "Y": "*i64", "sixteen": "i32:16", "other": "i32", "far": "i64:16", "real": "fp32"
    }  # fmt: skip
    assert constants == {"Z": None, "one": 1, "BLOCK": 64} and options == {"num_warps": 8}


PRODUCTS = forms.Form("", SimpleNamespace(fn=SimpleNamespace(__name__="pair_scores_kernel")), {}, {}, {}, False)


@pytest.mark.parametrize(
    "result, words",
    [
        ({"stack": 16, "shared": 0, "tensor_cores": ["wgmma"]}, "16 bytes of stack, allowed 8"),
        ({"stack": 8, "shared": 300_000, "tensor_cores": ["wgmma"]}, "300000 bytes of shared memory"),
        ({"stack": 8, "shared": 0, "tensor_cores": ["mma.sync"]}, "no wgmma"),
        ({"error": "CompilationError: x"}, "CompilationError"),
    ],
)
def test_faults_are_found(result, words, monkeypatch):
    monkeypatch.setattr(compile_matrix, "STACK", {"3.6": {"pair_scores_kernel": 8}, "3.8": {"pair_scores_kernel": 400}})
    for version in ("3.6.0", "3.7.1", "3.5.0"):
        (fault,) = compile_matrix.judge(PRODUCTS, 90, result, version)
        assert words in fault


def test_the_allowed_stack_is_that_of_the_nearest_older_version(monkeypatch):
    stack = {"3.6": {"scan": 1}, "3.9": {"scan": 2}, "3.10": {"scan": 3}}
    monkeypatch.setattr(compile_matrix, "STACK", stack)
    versions = {"3.5.1": 1, "3.6.0": 1, "3.8.0": 1, "3.9.2": 2, "3.10.0": 3, "3.11.0+git": 3, "4.0.0": 3}
    assert {version: compile_matrix.allowed_stack(version)["scan"] for version in versions} == versions


def test_the_similarity_forms_table_is_drawn_from_the_committed_result():
    from bench.losses import forms as similarity_forms

    found = json.loads((ROOT / similarity_forms.OUT).read_text())
    assert (ROOT / similarity_forms.TABLE).read_text() == similarity_forms.table(found)
