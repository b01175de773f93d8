"""The exact relative similarity loss: integer counts, what follows from them, the native op against its fallback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jasper_fast.losses import reference, relative_exact, relative_similarity_loss
from jasper_fast.losses.neighbourhood import neighbourhood_op
from jasper_fast.losses.similarity import similarity_op
from jasper_fast.ops import native

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

needs_extension = pytest.mark.skipif(
    native.extension_path() is None and os.environ.get("JASPER_FAST_NO_EXTENSION") == "1",
    reason="the extension is turned off",
)


def counts(student: torch.Tensor, teacher: torch.Tensor, margin: float, ties: str):
    gradient, low, dot = relative_exact.pair_counts(student[None], teacher, margin, ties == "exclude")
    return gradient[0], int(low), float(dot)


def fallback_counts(student: torch.Tensor, teacher: torch.Tensor, margin: float, ties: str):
    gradient, low, dot = relative_exact.count_pairs(student[None], teacher, margin, ties == "exclude")
    return gradient[0], int(low), float(dot)


def counts_of_some(student: torch.Tensor, teacher: torch.Tensor, margin: float, ties: str, rows: torch.Tensor):
    """up - low of a few pairs by brute force."""
    threshold, index = student - margin, torch.arange(len(student))
    below, above = teacher < teacher[rows, None], teacher > teacher[rows, None]  # (rows, P)
    if ties == "label":
        tied = teacher == teacher[rows, None]
        below, above = below | (tied & (index < rows[:, None])), above | (tied & (index > rows[:, None]))
    up = (above & (student[rows, None] > threshold)).sum(dim=1)
    return up - (below & (student > threshold[rows, None])).sum(dim=1)


def scores(seed: int, pairs: int, levels: int | None) -> torch.Tensor:
    values = torch.randn(pairs, generator=torch.Generator().manual_seed(seed)) * 0.2
    return values if levels is None else (values * levels).round() / levels


SPECIAL = st.sampled_from([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, -1e-45, 3e38, -3e38])
NUMBERS = st.one_of(st.floats(-1, 1, width=32), st.sampled_from([-0.5, 0.0, 0.25, 0.265, 0.28]), SPECIAL)
PAIRS = st.lists(st.tuples(NUMBERS, NUMBERS), min_size=0, max_size=80)
MARGINS = st.sampled_from([0.015, 0.0, -0.1, 0.25, 1e30])


def finite_dot(gradient: torch.Tensor, student: torch.Tensor) -> float:
    return float(torch.where(gradient == 0, 0.0, gradient * student.double()).sum())


@settings(max_examples=150, deadline=None)
@given(PAIRS, MARGINS, st.sampled_from(["exclude", "label"]))
def test_counts_equal_brute_force_bit_for_bit(pairs, margin, ties):
    student = torch.tensor([pair[0] for pair in pairs], dtype=torch.float32)
    teacher = torch.tensor([pair[1] for pair in pairs], dtype=torch.float32)
    missing = student.isnan() | teacher.isnan()
    # A pair without a number is in no term: NaN compares false, and in the label order it has no place either.
    hidden_student, hidden_teacher = student.masked_fill(missing, torch.nan), teacher.masked_fill(missing, torch.nan)
    up, low = reference.pair_counts(hidden_student, hidden_teacher, margin, ties)
    assert up.sum() == low.sum()
    for count in (counts, fallback_counts):
        gradient, low_sum, dot = count(student, teacher, margin, ties)
        assert torch.equal(gradient.long(), up - low)
        assert low_sum == low.sum()
        if missing.any():
            assert dot != dot
        elif not student.isinf().any():
            assert dot == pytest.approx(finite_dot(gradient, student), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("ties", ["exclude", "label"])
@pytest.mark.parametrize("levels", [None, 200, 1])
def test_counts_over_many_buckets(levels, ties):
    """More than one bucket of teacher positions; with one level, groups of ties larger than a bucket."""
    student, teacher = scores(1, 40_000, None if levels is None else 300), scores(2, 40_000, levels)
    if levels == 1:
        teacher[10_000:35_000] = 7.0
    gradient, low, dot = counts(student, teacher, 0.015, ties)
    torch_gradient, torch_low, torch_dot = fallback_counts(student, teacher, 0.015, ties)
    assert torch.equal(gradient, torch_gradient)
    assert low == torch_low
    assert dot == pytest.approx(torch_dot, rel=1e-12)
    rows = torch.arange(0, 40_000, 401)
    assert torch.equal(gradient[rows].long(), counts_of_some(student, teacher, 0.015, ties, rows))


@pytest.mark.parametrize("ties", ["exclude", "label"])
def test_counts_of_more_pairs_than_32_bits_hold(monkeypatch, ties):
    student, teacher = scores(1, 500, 300), scores(2, 500, 20)
    wanted = counts(student, teacher, 0.015, ties)
    monkeypatch.setattr(relative_exact, "MAX_PLACES", 0)
    found = fallback_counts(student, teacher, 0.015, ties)
    assert torch.equal(found[0], wanted[0]) and found[0].dtype == torch.int32
    assert found[1:] == (wanted[1], pytest.approx(wanted[2], rel=1e-12))


def test_counts_do_not_depend_on_the_number_of_threads_or_heads():
    teacher, students = scores(3, 300_000, 5000), torch.stack([scores(seed, 300_000, None) for seed in (4, 5)])
    students[1, 7] = torch.nan  # its own teacher order must not leak into the other head
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(relative_exact.pair_counts(students, teacher, 0.015, True))
    torch.set_num_threads(before)
    for result in results[1:]:
        for left, right in zip(results[0], result, strict=True):
            torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
    alone = relative_exact.pair_counts(students[:1], teacher, 0.015, True)
    assert torch.equal(alone[0][0], results[0][0][0])
    wanted = fallback_counts(students[0], teacher, 0.015, "exclude")
    assert torch.equal(wanted[0], results[0][0][0])
    assert wanted[1] == results[0][1][0]


@needs_extension
def test_extension_is_in_use():
    assert native.extension_path() is not None, native.extension_error()
    assert native.extension_error() is None


def test_without_the_extension_the_loss_is_the_same():
    code = """
import torch
from jasper_fast import losses
from jasper_fast.ops import native
assert native.extension_path() is None and "JASPER_FAST_NO_EXTENSION" in native.extension_error()
torch.manual_seed(0)
student, teacher = torch.randn(40, 24, requires_grad=True), torch.randn(40, 16)
loss = losses.relative_similarity_loss(student, teacher)
loss.backward()
print(loss.item(), student.grad.abs().sum().item())
"""
    environment = {**os.environ, "JASPER_FAST_NO_EXTENSION": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    torch.manual_seed(0)
    student, teacher = torch.randn(40, 24, requires_grad=True), torch.randn(40, 16)
    loss = relative_similarity_loss(student, teacher)
    loss.backward()
    value, size = map(float, run.stdout.split())
    assert value == pytest.approx(loss.item(), rel=1e-6)
    assert size == pytest.approx(student.grad.abs().sum().item(), rel=1e-5)


@pytest.mark.skipif(native.extension_path() is None, reason="the compiled extension is not built")
def test_the_kernels_for_any_processor_count_the_same():
    program = (
        "from tests.losses import test_relative_similarity as t\n"
        "t.test_counts_equal_brute_force_bit_for_bit()\n"
        "for levels in (None, 200, 1):\n"
        "    for ties in ('exclude', 'label'):\n"
        "        t.test_counts_over_many_buckets(levels, ties)\n"
        "t.test_counts_do_not_depend_on_the_number_of_threads_or_heads()\n"
    )
    root = Path(__file__).parents[2]
    environment = os.environ | {"JASPER_FAST_ISA": "generic", "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("ties", ["exclude", "label"])
def test_gradient_given_the_counts(ties):
    """(G + G') S of the integer counts against float64 autograd with the active terms held fixed."""
    student, teacher = torch.randn(48, 20), torch.randn(48, 20)
    unit = torch.nn.functional.normalize(student)
    target = torch.nn.functional.normalize(teacher)
    loss, gradients = relative_exact.relative_similarity([unit], target, 0.015, ties == "exclude", True)
    up, low = reference.pair_counts(
        relative_exact.pack_pairs(unit @ unit.T), relative_exact.pack_pairs(target @ target.T), 0.015, ties
    )
    exact = unit.double().requires_grad_()
    i, j = torch.triu_indices(48, 48, offset=1)
    x = (exact @ exact.T)[i, j]
    terms = len(x) * (len(x) - 1) / 2
    wanted = ((up - low) * x).sum() / terms + 0.015 * low.sum().double() / terms
    wanted.backward()
    assert (gradients[0] - exact.grad).norm() <= 1e-6 * exact.grad.norm()
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-6)


@pytest.mark.parametrize("ties", ["exclude", "label"])
@pytest.mark.parametrize("width", [3, 40])
def test_end_to_end_against_the_published_formulation(ties, width):
    student, teacher = torch.randn(56, width, requires_grad=True), torch.randn(56, 12)
    teacher[5] = teacher[9]  # duplicates: whole rows of tied pairs
    loss = relative_similarity_loss(student, teacher, ties=ties)
    loss.backward()
    exact = student.detach().double().requires_grad_()
    if ties == "exclude":
        wanted = reference.relative_similarity_loss(exact, teacher.double(), ties=ties)
    else:  # which pairs tie must be read off the same float32 scores
        unit = torch.nn.functional.normalize(teacher)
        x = reference.pair_scores(exact)
        wanted = reference.relative_similarity_of_scores(
            x, relative_exact.pack_pairs(unit @ unit.T).double(), 0.015, ties
        )
    wanted.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-5)
    assert (student.grad - exact.grad).norm() <= 3e-4 * exact.grad.norm()


@pytest.mark.parametrize("method", ["exact", "reference"])
@pytest.mark.parametrize("ties", ["exclude", "label"])
def test_gradcheck(method, ties):
    student, teacher = (
        torch.randn(7, 5, dtype=torch.float64, requires_grad=True),
        torch.randn(7, 4, dtype=torch.float64),
    )
    assert torch.autograd.gradcheck(
        lambda s: relative_similarity_loss(s, teacher, ties=ties, method=method), student, atol=1e-6
    )


def test_large_batch_sums_need_64_bits():
    """Every term active: sum(low) is N, far beyond 32 bits, and every count is its pair's rank from either end."""
    pairs = 400 * 399 // 2
    order = torch.arange(pairs, dtype=torch.float32)
    gradient, low, dot = counts(-order, order, 0.015, "exclude")
    terms = pairs * (pairs - 1) // 2
    assert low == terms > 2**31
    assert torch.equal(gradient.long(), pairs - 1 - 2 * torch.arange(pairs))
    assert dot == float((gradient.double() * -order.double()).sum())


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows_for_two_pairs(rows):
    student = torch.randn(rows, 4, requires_grad=True)
    loss = relative_similarity_loss(student, torch.randn(rows, 4))
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(student.grad, torch.zeros(rows, 4))


def test_three_rows_by_hand():
    """Pairs (0, 1), (0, 2), (1, 2) with student cosines 1, 0, 0 and teacher cosines 0, 1, 0."""
    student = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    # Teacher order puts only (0, 2) above: relu(1 - 0 + m) against (0, 1) and relu(0 - 0 + m) against (1, 2).
    assert relative_similarity_loss(student, teacher, margin=0.5).item() == pytest.approx((1.5 + 0.5) / 3)
    # With label order (0, 1) comes before (1, 2) too: relu(1 - 0 + m).
    assert relative_similarity_loss(student, teacher, margin=0.5, ties="label").item() == pytest.approx(3.5 / 3)


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_reaches_loss_and_gradient(side, value):
    student, teacher = torch.randn(12, 6), torch.randn(12, 6)
    (student if side == "student" else teacher)[3, 2] = value
    student.requires_grad_()
    loss = relative_similarity_loss(student, teacher)
    loss.backward()
    assert loss.isnan()
    assert student.grad.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    students, teacher = [torch.randn(10, w, dtype=dtype) for w in (8, 4)], torch.randn(10, 6, dtype=dtype)
    torch.library.opcheck(
        relative_exact.pair_counts, (torch.randn(2, 45, dtype=dtype), torch.randn(45, dtype=dtype), 0.015, True)
    )
    for gradient in (True, False):
        torch.library.opcheck(relative_exact.registered_relative_similarity, (students, teacher, 0.015, True, gradient))
        torch.library.opcheck(neighbourhood_op, (students, teacher, 0.05, gradient))
        torch.library.opcheck(similarity_op, (students, teacher, "tile", gradient, gradient))


def test_too_many_rows_are_refused_from_their_shape():
    rows = torch.empty(65_537, 1, device="meta")
    with pytest.raises(ValueError, match="65536"):
        relative_similarity_loss(rows, rows)
