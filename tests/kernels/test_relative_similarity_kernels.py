"""The Triton kernels of the relative similarity losses: interpreted here, compiled in test_compile_matrix.py."""

from __future__ import annotations

import random

import pytest
import torch

from jasper_fast.losses import relative_binned, relative_exact
from jasper_fast.ops import products

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

import triton  # noqa: E402

from jasper_fast.kernels import dominance_counts, pairs  # noqa: E402
from tests.helpers.pair_counts import DEVICE, EQUAL, MARGINS, SPECIAL, count_as_on_the_cpu  # noqa: E402


def brute_force(place: torch.Tensor, x: torch.Tensor, margin: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return up and low by place, from scores in any order."""
    scores = torch.empty_like(x)
    scores[place.long()] = x
    active = (scores[:, None] > (scores - margin)[None, :]).triu(1)
    return active.sum(dim=1), active.sum(dim=0)


@pytest.mark.parametrize("places", [1, 2, 127, 128, 129, 600])
def test_dominance_counts_as_brute_force_does(places):
    x = torch.randn(places).sort().values
    x[places // 3 : places // 2] = x[places // 3]
    place = torch.randperm(places).int()
    events = relative_exact.merged(x.to(DEVICE), place.to(DEVICE), 0.3)
    up, low = dominance_counts.dominance(events)
    wanted_up, wanted_low = brute_force(place, x, 0.3)
    assert torch.equal(up.cpu().long(), wanted_up)
    assert torch.equal(low.cpu().long(), wanted_low)


def test_many_passes_with_small_leaves(monkeypatch):
    """Few pairs take the passes of millions, with the smallest leaves and blocks that keep nodes aligned."""
    for name, value in (("LEAF_BITS", 3), ("LEAF", 8), ("BLOCK", 64)):
        monkeypatch.setattr(dominance_counts, name, value)
    x, place = torch.randn(200).sort().values, torch.randperm(200).int()
    up, low = dominance_counts.dominance(relative_exact.merged(x.to(DEVICE), place.to(DEVICE), 0.1))
    wanted_up, wanted_low = brute_force(place, x, 0.1)
    assert torch.equal(up.cpu().long(), wanted_up)
    assert torch.equal(low.cpu().long(), wanted_low)


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(40))
def test_counts_of_drawn_scores(seed):
    """Cases of test_kernel_properties.py without hypothesis, which a GPU machine may lack, and more."""
    draw = random.Random(seed)

    def number() -> float:
        return draw.choice((draw.uniform(-1, 1), draw.choice(EQUAL), draw.choice(EQUAL + SPECIAL)))

    values = [(number(), number()) for _ in range(draw.choice((1, 2, 30, 200, 256, 257, 3000)))]
    count_as_on_the_cpu(values, draw.choice(MARGINS), draw.random() < 0.5)


@pytest.mark.parametrize("exclude_ties", [True, False])
def test_counts_of_float64_scores(exclude_ties):
    """Differences that float32 would lose decide."""
    draw = random.Random(0)
    values = [(draw.choice(EQUAL) + draw.uniform(0, 1e-12), draw.choice(EQUAL)) for _ in range(300)]
    count_as_on_the_cpu(values, 0.015, exclude_ties, torch.float64)


def test_ends_of_runs_longer_than_a_block():
    """The counts inside groups of equal teacher scores are subtracted completely."""
    teacher = torch.cat((torch.zeros(1500), torch.ones(700)))
    student = torch.cat((torch.arange(1500.0).flip(0), torch.full((700,), 5.0)))
    place = torch.arange(2200)
    up, low = brute_force(place, student, 0.5)
    up[:1500] -= (student[:1500, None] > student[None, 1500:] - 0.5).sum(dim=1)
    low[1500:] -= (student[:1500, None] > student[None, 1500:] - 0.5).sum(dim=0)
    up, low = up.int().to(DEVICE), low.int().to(DEVICE)
    relative_exact.subtract_ties(up, low, teacher.to(DEVICE), student.to(DEVICE), 0.5)
    assert not up.any()
    assert not low.any()


@pytest.mark.parametrize("rows, width", [(1, 5), (2, 1), (3, 17), (65, 8), (130, 33)])
def test_pairs_of_a_matrix(rows, width):
    x = torch.nn.functional.normalize(unit(rows, width) + unit(1, width)).to(DEVICE)
    i, j = torch.triu_indices(rows, rows, offset=1, device=DEVICE)
    exact = (x.double() @ x.double().T)[i, j]
    torch.testing.assert_close(pairs.pair_scores(x).double(), exact, rtol=0, atol=3e-7)
    counts = torch.randint(-99, 99, (len(i),), dtype=torch.int32, device=DEVICE)
    wanted = torch.zeros(rows, rows, device=DEVICE)
    wanted[i, j] = wanted[j, i] = counts * 0.5
    assert torch.equal(pairs.unpack_pairs(counts, rows, 0.5), wanted)


def test_scores_of_equal_rows_tie():
    """Five rows have 15 cosines, in either order of a pair and in any tile."""
    scores = pairs.pair_scores(unit(5, 40)[torch.randint(0, 5, (140,))].to(DEVICE))
    if DEVICE == "cpu" and triton.knobs.runtime.interpret:  # NumPy rounds equal rows by their position
        scores = (scores * 2**20).round()
    assert len(scores.unique()) <= 15


@pytest.fixture
def kernels(monkeypatch):
    """Let the ops take the kernels for float32 on any device."""

    def uses(vectors: list[torch.Tensor]) -> bool:
        return vectors[-1].dtype in (torch.float32, torch.int32, torch.float16)

    monkeypatch.setattr(relative_exact, "uses_triton", uses)
    monkeypatch.setattr(relative_binned, "uses_triton", uses)
    monkeypatch.setattr(relative_exact, "native", lambda tensor: False)
    monkeypatch.setattr(relative_exact, "extension_path", lambda: None)


def unit(rows: int, width: int) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(rows, width))


@pytest.mark.parametrize("exclude_ties", [True, False])
def test_exact_op(request, exclude_ties):
    teacher = unit(24, 9)
    if DEVICE == "cuda":  # the interpreter multiplies with NumPy, which rounds equal rows by their position
        teacher[3] = teacher[8]
    students = [torch.nn.functional.normalize(teacher + 0.3 * torch.randn(24, 9)), unit(24, 5)]
    wanted_losses, wanted = relative_exact.relative_similarity(students, teacher, 0.015, exclude_ties, True)
    request.getfixturevalue("kernels")
    on_device = [s.to(DEVICE) for s in students]
    losses, gradients = relative_exact.relative_similarity(on_device, teacher.to(DEVICE), 0.015, exclude_ties, True)
    torch.testing.assert_close(losses.cpu(), wanted_losses, rtol=1e-5, atol=0)
    for own, other in zip(gradients, wanted, strict=True):
        assert (own.cpu() - other).norm() <= 3e-4 * other.norm()


@pytest.mark.parametrize("rows", [3, 50])
def test_binned_op(request, monkeypatch, rows):
    """Two heads of odd widths, and row blocks that end inside tiles.

    Rows have float16's 11 bits, so that both sides have the same scores. A table of three pairs is so steep inside a
    fine bin that the last bit of a score changes the gradient by a hundredth.
    """
    monkeypatch.setattr(relative_binned, "BLOCK_SCORES", {"cpu": 45 * rows})
    monkeypatch.setattr(relative_binned, "DEVICE_BLOCK_SCORES", 45 * rows)
    teacher = unit(rows, 33).half().float()
    students = [torch.nn.functional.normalize(teacher + 0.1 * torch.randn(rows, 33)), unit(rows, 7)]
    students = [student.half().float() for student in students]
    wanted_losses, wanted = relative_binned.relative_similarity(students, teacher, 0.015, True, 64)
    request.getfixturevalue("kernels")
    losses, gradients = relative_binned.relative_similarity(
        [s.to(DEVICE) for s in students], teacher.to(DEVICE), 0.015, True, 64
    )
    tolerance = 2e-2 if rows == 3 else 1e-3
    torch.testing.assert_close(losses.cpu(), wanted_losses, rtol=tolerance, atol=0)
    for own, other in zip(gradients, wanted, strict=True):
        assert (own.cpu() - other).norm() <= tolerance * other.norm()


def test_binned_scores_are_rounded_once():
    """Errors of the scores are small and have no sign. Operands that are cut off would shrink all cosines by 7e-4."""
    from jasper_fast.kernels import relative_similarity_binned as kernels

    rows = torch.nn.functional.normalize(unit(40, 300) + unit(1, 300))
    scores = kernels.scores(kernels.rounded(rows.to(DEVICE)), 0, 40).cpu().double()
    exact = rows.double() @ rows.double().T
    upper = torch.ones(40, 40).triu(1) == 1
    error = ((scores - exact) / exact)[upper]
    assert error.abs().max() <= 2e-4
    assert error.mean().abs() <= 1e-5


@pytest.mark.parametrize("set_by", ["older", "newer"])
def test_products_are_in_full_float32(monkeypatch, set_by):
    """The library may be set to multiply in TF32. It multiplies in float32 for a moment, and then as before."""
    matmul, plain, seen = torch.backends.cuda.matmul, torch.addmm, []

    def spy(*arguments, **options):
        seen.append(matmul.fp32_precision)
        return plain(*arguments, **options)

    monkeypatch.setattr(torch, "addmm", spy)
    products.multiply(torch.ones(2, 3), torch.ones(3, 2))
    assert seen.pop() in ("none", "ieee")
    try:
        if set_by == "older":
            torch.set_float32_matmul_precision("medium")
        else:
            matmul.fp32_precision = "tf32"
        products.multiply(torch.ones(2, 3), torch.ones(3, 2))
        assert seen == ["ieee"] and matmul.fp32_precision == "tf32"
        assert set_by == "newer" or torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def clustered(rows: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    teacher = torch.randn(50, width)[torch.randint(0, 50, (rows,))] + 1.5 * torch.randn(rows, width)
    student = teacher + 0.5 * torch.randn(rows, width)
    return tuple(torch.nn.functional.normalize(x).to(DEVICE) for x in (student, teacher))


@pytest.mark.gpu
@pytest.mark.parametrize("levels", [None, 300])
@pytest.mark.parametrize("exclude_ties", [True, False])
def test_millions_of_pairs_on_a_gpu(levels, exclude_ties):
    x, t = torch.randn(2, 3_000_000) * 0.2
    if levels:
        x, t = ((v * levels).round() / levels for v in (x, t))
    wanted = relative_exact.pair_counts(x[None], t, 0.015, exclude_ties)
    for _ in range(2):
        found = relative_exact.pair_counts(x[None].cuda(), t.cuda(), 0.015, exclude_ties)
        assert torch.equal(found[0].cpu(), wanted[0])
        assert torch.equal(found[1].cpu(), wanted[1])


@pytest.mark.gpu
def test_binned_against_exact_on_a_gpu():
    student, teacher = clustered(4096, 256)
    (loss,), (exact,) = relative_exact.relative_similarity([student], teacher, 0.015, True, True)
    (own,), (gradient,) = relative_binned.relative_similarity([student], teacher, 0.015, True)
    assert abs(own - loss) <= 3e-3 * loss
    assert (gradient - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "binned"])
def test_captured_in_a_graph(method):
    student, teacher = clustered(512, 64)

    def run() -> list[torch.Tensor]:
        if method == "binned":
            return relative_binned.relative_similarity([student], teacher, 0.015, True)[1]
        return relative_exact.relative_similarity([student], teacher, 0.015, True, True)[1]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        wanted = run()[0].clone()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        (found,) = run()
    found.fill_(torch.nan)
    graph.replay()
    assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["exact", "binned"])
def test_tf32_that_cublas_may_use_changes_nothing(method):
    student, teacher = clustered(700, 128)

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        if method == "binned":
            return relative_binned.relative_similarity([student], teacher, 0.015, True)
        return relative_exact.relative_similarity([student], teacher, 0.015, True, True)

    (loss,), (gradient,) = run()
    torch.set_float32_matmul_precision("high")
    try:
        (other,), (other_gradient,) = run()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert abs(other - loss) <= 1e-6 * loss
    assert (other_gradient - gradient).norm() <= 1e-6 * gradient.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [3, 17, 20, 23, 24, 700])
def test_equal_rows_tie_on_a_gpu(rows):
    """Five embeddings have 15 cosines in either order of a pair, and the counts are the CPU's."""
    teacher = unit(5, 128).cuda()[torch.randint(0, 5, (rows,), device="cuda")]
    scores, target = (pairs.pair_scores(v) for v in (unit(rows, 128).cuda(), teacher))
    assert len(target.unique()) <= 15
    found = relative_exact.pair_counts(scores[None], target, 0.015, True)
    wanted = relative_exact.pair_counts(scores[None].cpu(), target.cpu(), 0.015, True)
    assert torch.equal(found[0].cpu(), wanted[0]) and torch.equal(found[1].cpu(), wanted[1])
