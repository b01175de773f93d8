"""The kernels' own tests on an emulated GPU: the code that Triton compiles for sm_80 and sm_90, run on CPU tensors.

Other tests interpret the kernels, so each group runs in a separate process. See tests/kernels/ptx.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

ROOT = Path(__file__).parents[2]
LOSSES, RELATIVE = "tests/kernels/test_kernels.py", "tests/kernels/test_relative_similarity_kernels.py"
RANKING = "tests/kernels/test_ranking_kernels.py"
SEARCH, RERANK = "tests/mips/test_mips_cuda.py", "tests/mips/test_mips_rerank.py"
CHUNKS = "tests/mips/test_mips_chunks.py"
# These need CUDA itself, the speed of a GPU, or its memory.
NOT_EMULATED = (
    "on_a_gpu or graph or graphs or host_waits or identical or no_worse or stays_bounded or another_than or alone or "
    "autocast or millions or tf32_that or drawn or two_gpus or waited or streamed or breaks_off or same_bits or "
    "for-gpu"
)


def emulate(capability: int, file: str, chosen: str) -> str:
    """Run chosen tests of a file on an emulated GPU, and return what pytest printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"EMULATED_GPU": str(capability), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "tests.kernels.ptx.plugin", "-p", "no:xdist"]
    command += ["-q", "-m", "", file, "-k", chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    return done.stdout


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tests.kernels.ptx.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# Capability, file, tests, and the kernels that they must launch.
PAIRS = "difference divergence reciprocal_norms l2_normalize_backward"
RANKINGS = "gathered_cosines weighted_sums contrast"
COUNTS = "pair_scores digit_counts distribute leaf unpack histogram coefficients"
SMALL = [
    (
        90,
        LOSSES,
        "test_similarity and shape2 or test_neighbourhood and shape2 and 05 or common and shape0 or weights "
        "or in_place or only_neighbour and bfloat16 or cancellation_of and bfloat16",
        PAIRS,
    ),
    (
        90,
        RELATIVE,
        "dominance and 129 or many_passes or ends_of_runs or pairs_of and 65 or tie and not gpu or exact_op and True "
        "or rounded_once or binned_op and 3",
        COUNTS,
    ),
    (
        90,
        SEARCH,
        "one_by_one and (3-bfloat16-True or 150-int8-True or 20-float32-False)",
        "scan rescore",
    ),
    (
        90,
        RERANK,
        "two_pieces and normal and bfloat16 and 3 or thresholds and 65 or rounded_and_bounded and 17 "
        "or earlier_results",
        "operands thresholds select rescore_kept rank",
    ),
    (90, CHUNKS, "duplicated or repaired and few", "operands thresholds scan select rescore_kept rank"),
    (90, RANKING, "test_info_nce and shape2 and float32 or test_listwise and shape2 and float16", RANKINGS),
    (80, LOSSES, "test_similarity and tile and shape2", "difference reciprocal_norms"),
    (80, RELATIVE, "many_passes or pairs_of and 65 or binned_op and 3", COUNTS),
    (80, SEARCH, "one_by_one and (3-bfloat16-False or 20-int8-False)", "scan rescore"),
]
EVERYTHING = [
    (capability, file, f"not ({NOT_EMULATED})", kernels)
    for capability in (80, 90)
    for file, kernels in (
        (LOSSES, PAIRS),
        (RANKING, RANKINGS),
        (RELATIVE, COUNTS),
        (SEARCH, "scan rescore"),
        (RERANK, "operands thresholds select rescore_kept rank"),
        (CHUNKS, "scan"),
    )
]


@pytest.mark.parametrize("cases", [SMALL, EVERYTHING])
def test_every_kernel_is_emulated(cases):
    from bench.kernels import forms

    emulated = {f"{name}_kernel" for capability, _, _, kernels in cases for name in kernels.split() if capability == 90}
    assert emulated == {form.name for form in forms.record()}


@pytest.mark.slow
@pytest.mark.parametrize("capability, file, chosen, kernels", SMALL)
def test_compiled_for_a_gpu(capability, file, chosen, kernels):
    launched(emulate(capability, file, chosen), kernels)


@pytest.mark.soak
@pytest.mark.parametrize("capability, file, chosen, kernels", EVERYTHING)
def test_all_tests_compiled_for_a_gpu(capability, file, chosen, kernels):
    launched(emulate(capability, file, chosen), kernels)


def launched(output: str, kernels: str) -> None:
    """Check that each kernel ran, so that a renamed test does not leave it out."""
    ran = set(re.findall(r"^(\w+)_kernel: \d+ launches", output, flags=re.M))
    assert ran >= set(kernels.split()), output[-3000:]


@pytest.mark.slow
def test_planted_faults_are_noticed():
    """A removed barrier, wait, mask or rounding makes a kernel fault, or changes its result."""
    done = run("mutants", "--quick")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_planted_overflow_is_noticed():
    done = run("full_size", "pair_scores", "planted")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 2 and "outside of every tensor" in done.stdout


@pytest.mark.soak
def test_addresses_at_full_size():
    done = run("full_size")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.soak
def test_most_mutants_are_noticed():
    done = run("mutants")
    assert done.returncode == 0, done.stdout + done.stderr
    noticed, total = map(int, re.findall(r"^(\d+) of (\d+) mutants noticed", done.stdout, flags=re.M)[0])
    assert noticed >= 0.7 * total, done.stdout
