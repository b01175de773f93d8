"""The binned relative similarity loss against the exact one, its tables against brute force, its fallback."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.losses import JasperLoss, relative_binned, relative_exact, relative_similarity_loss


def batch(rows: int, noise: float, width: int = 48, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Clustered teacher vectors and a student that is a noisy copy of them."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(20, width, generator=generator)
    chosen = torch.randint(0, 20, (rows,), generator=generator)
    teacher = centres[chosen] + 1.5 * torch.randn(rows, width, generator=generator)
    return teacher + noise * torch.randn(rows, width, generator=generator), teacher


def loss_and_gradient(student: torch.Tensor, teacher: torch.Tensor, **options) -> tuple[float, torch.Tensor]:
    leaf = student.clone().requires_grad_()
    loss = relative_similarity_loss(leaf, teacher, **options)
    loss.backward()
    return float(loss.detach()), leaf.grad


@pytest.mark.parametrize("noise, bound", [(3.0, 5e-3), (1.0, 5e-3), (0.3, 5e-3), (0.1, 5e-3), (0.0, 2e-2)])
def test_against_the_exact_loss(noise, bound):
    """Down to a student that has learnt all there is, where the gradient is the difference of nearly equal counts."""
    student, teacher = batch(512, noise)
    wanted, exact = loss_and_gradient(student, teacher, method="exact")
    loss, gradient = loss_and_gradient(student, teacher, method="binned")
    assert loss == pytest.approx(wanted, rel=3e-3)
    assert (gradient - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("margin", [0.0, -0.02, 1e-5, 0.1, 3.0])
def test_any_margin(margin):
    student, teacher = batch(300, 1.0)
    wanted, exact = loss_and_gradient(student, teacher, method="exact", margin=margin)
    loss, gradient = loss_and_gradient(student, teacher, method="binned", margin=margin)
    assert loss == pytest.approx(wanted, rel=3e-3)
    assert (gradient - exact).norm() <= 5e-3 * exact.norm()


def test_more_bins_are_more_exact():
    student, teacher = (x / x.norm(dim=1, keepdim=True) for x in batch(512, 0.5))
    _, (exact,) = relative_exact.relative_similarity([student], teacher, 0.015, True, True)
    errors = []
    for bins in (32, 128, 512):
        _, (gradient,) = relative_binned.relative_similarity([student], teacher, 0.015, True, bins)
        errors.append(float((gradient - exact).norm() / exact.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_tables_are_exact_at_their_nodes():
    """Scores in the middle of bins and a margin of whole bins: every count is known at once."""
    generator = torch.Generator().manual_seed(0)
    bins, pairs, steps = 16, 400, 3
    x, t = torch.randint(0, bins, (2, pairs), generator=generator)
    counts = torch.zeros(bins, bins, dtype=torch.int32)
    counts.view(-1).index_add_(0, t * bins + x, torch.ones(pairs, dtype=torch.int32))
    fine = torch.zeros(relative_binned.FINE, dtype=torch.int32)
    fine.index_add_(0, x * (relative_binned.FINE // bins) + 5, torch.ones(pairs, dtype=torch.int32))
    tables = relative_binned._tables(counts, fine, torch.zeros(relative_binned.FINE + 1), torch.tensor(float(steps)))
    for i in range(bins + 1):
        for j in range(bins + 1):
            above = int(((t < i) & (x >= j + steps)).sum())
            over = int(((t >= i) & (x < j - steps)).sum())
            assert tables.nodes[i, j] == above - over
    for j in range(bins + 1):
        wanted = int((x < j + steps).sum()) + int((x < j - steps).sum())
        assert tables.own[j * relative_binned.FINE // bins] == wanted


def test_heads_share_a_teacher_but_nothing_else():
    student, teacher = (x / x.norm(dim=1, keepdim=True) for x in batch(90, 0.7))
    other = torch.nn.functional.normalize(student[:, :7])
    together = relative_binned.relative_similarity([student, other], teacher, 0.015, True)
    for h, head in enumerate((student, other)):
        losses, (gradient,) = relative_binned.relative_similarity([head], teacher, 0.015, True)
        assert torch.equal(losses[0], together[0][h])
        assert torch.equal(gradient, together[1][h])


def test_the_gradient_can_be_left_out():
    student, teacher = batch(64, 0.5)
    with torch.no_grad():
        alone = relative_similarity_loss(student, teacher, method="binned")
    assert float(alone) == loss_and_gradient(student, teacher, method="binned")[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 37, 130])
def test_the_fallback_is_the_same(monkeypatch, rows, dtype):
    student, teacher = (x.to(dtype) for x in batch(rows, 0.5, width=5))
    loss, gradient = loss_and_gradient(student, teacher, method="binned")
    monkeypatch.setattr(relative_binned, "native", lambda tensor: False)
    other, other_gradient = loss_and_gradient(student, teacher, method="binned")
    assert loss == pytest.approx(other, rel=1e-5)
    assert (gradient - other_gradient).norm() <= 1e-4 * gradient.norm()


def test_strips_and_threads_change_nothing_but_rounding(monkeypatch):
    student, teacher = batch(200, 0.5)
    loss, gradient = loss_and_gradient(student, teacher, method="binned")
    threads = torch.get_num_threads()
    monkeypatch.setattr(relative_binned, "BLOCK_SCORES", {"cpu": 200 * 16})
    torch.set_num_threads(3)
    try:
        other, other_gradient = loss_and_gradient(student, teacher, method="binned")
    finally:
        torch.set_num_threads(threads)
    assert loss == pytest.approx(other, rel=1e-5)
    assert (gradient - other_gradient).norm() <= 1e-4 * gradient.norm()


@pytest.mark.parametrize("rows", [1, 2])
def test_too_few_rows_for_two_pairs(rows):
    loss, gradient = loss_and_gradient(*batch(rows, 0.5), method="binned")
    assert loss == 0.0
    assert not gradient.any()


@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("native", [True, False])
def test_what_is_not_a_number_reaches_loss_and_gradient(monkeypatch, side, value, native):
    if not native:
        monkeypatch.setattr(relative_binned, "native", lambda tensor: False)
    student, teacher = batch(20, 0.5)
    (student if side == "student" else teacher)[3, 2] = value
    loss, gradient = loss_and_gradient(student, teacher, method="binned")
    assert loss != loss
    assert gradient.isnan().any()


def test_equal_rows_and_zero_rows():
    """One score for all pairs leaves no range; a zero row gets no gradient."""
    student, teacher = batch(40, 0.5)
    student[7] = 0.0
    loss, gradient = loss_and_gradient(student, teacher[:1].expand(40, -1), method="binned")
    assert 0.0 <= loss < 10.0
    assert gradient.isfinite().all()
    assert not gradient[7].any()


def test_large_batches_take_it(monkeypatch):
    assert not relative_binned.preferred(4096, 3)
    assert relative_binned.preferred(32768, 1)
    student, teacher = batch(60, 0.5)
    wanted = relative_similarity_loss(student, teacher, method="binned")
    monkeypatch.setattr(relative_binned, "EXACT_MEMORY", 1000)
    assert torch.equal(relative_similarity_loss(student, teacher), wanted)
    assert torch.equal(JasperLoss((0.0, 0.0, 1.0))(student, teacher).loss, wanted)


def test_compiled_without_a_break():
    student, teacher = batch(40, 0.5)
    compiled = torch.compile(relative_similarity_loss, fullgraph=True, backend="aot_eager")
    leaf = student.clone().requires_grad_()
    compiled(leaf, teacher, method="binned").sum().backward()
    assert torch.equal(leaf.grad, loss_and_gradient(student, teacher, method="binned")[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_opcheck(dtype):
    student, teacher = torch.randn(2, 12, 6, dtype=dtype)
    for gradient in (True, False):
        torch.library.opcheck(
            relative_binned.relative_similarity, ([student, student[:, :3]], teacher, 0.015, gradient, 64)
        )
