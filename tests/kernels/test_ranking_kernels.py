"""The kernels of the ranking losses against float64 references, as `test_kernels` does for the pair losses."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.losses import info_nce_loss, listwise, listwise_loss, reference
from jasper_fast.ops.dispatch import gradient_dtype
from jasper_fast.ops.fingerprints import row_fingerprints

pytest.importorskip("triton", reason="Triton is not installed: pip install -r requirements-ci.txt (no GPU needed)")

from jasper_fast.kernels import info_nce, strips  # noqa: E402
from tests.helpers.mips_kernels import GPU, _poisoned_memory  # noqa: E402, F401

DEVICE = "cuda" if GPU else "cpu"
on_gpu = pytest.mark.gpu
FLOATS = ["float32", "float16", pytest.param("bfloat16", marks=on_gpu)]
# Q, M, D, E, K: single rows, less than a tile, odd, several steps of columns and of candidates.
SHAPES = [(1, 1, 5, 3, 1), (2, 3, 3, 7, 2), (3, 11, 17, 9, 18)]
LARGE = [
    pytest.param(shape, marks=on_gpu, id=f"for-gpu-{shape[0]}")
    for shape in ((1000, 3001, 384, 100, 33), (2049, 8192, 1024, 768, 16))
]


class Case:
    """Random arguments of both losses, on the device."""

    def __init__(self, shape: tuple[int, ...], dtype: str, teacher: bool = True) -> None:
        count, documents, width, teacher_width, k = shape
        self.queries, self.documents = vectors(count, width, dtype, 3.0), vectors(documents, width, dtype)
        self.candidates = torch.randint(-1, documents, (count, k)).to(DEVICE)
        self.scores = torch.randn(count, k).to(DEVICE)
        self.positives = torch.randint(documents, (count,)).to(DEVICE)
        sides = [vectors(rows, teacher_width, dtype) for rows in (count, documents)]
        self.teacher = sides if teacher else []

    def contrast(self, wanted: bool = True, temperature: float = 0.05, margin: float = 0.1):
        numbers = row_fingerprints(self.teacher[1] if self.teacher else self.documents)
        arguments = (self.queries, self.documents, self.positives, numbers, temperature, self.teacher, margin)
        return info_nce.info_nce(*arguments, wanted, wanted)

    def listwise(self, wanted: bool = True, temperature: float = 0.05):
        arguments = (self.queries, self.documents, self.candidates, self.scores, temperature, 0.1)
        return listwise._listwise_triton(*arguments, wanted, wanted)

    def expected(self, name: str, temperature: float = 0.05):
        """Return the reference's loss and gradients in float64."""
        sides = [side.detach().double().requires_grad_() for side in (self.queries, self.documents)]
        if name == "listwise":
            options = {"temperature": temperature, "teacher_temperature": 0.1}
            value = reference.listwise_loss(*sides, self.candidates, self.scores.double(), **options)
        else:
            teacher = dict(zip(("teacher_queries", "teacher_documents"), self.teacher, strict=False))
            options = {key: side.double() for key, side in teacher.items()}
            value = reference.info_nce_loss(*sides, self.positives, temperature=temperature, margin=0.1, **options)
        value.backward()
        return value.detach(), *(side.grad for side in sides)


def vectors(count: int, width: int, dtype: str, scale: float = 1.0) -> torch.Tensor:
    return (scale * torch.randn(count, width)).to(getattr(torch, dtype)).to(DEVICE)


def check(case: Case, found, expected, bound: float = 1e-5) -> None:
    (loss, *gradients), (value, *wanted) = found, expected
    assert loss.shape == (1,) and loss.dtype == torch.float32
    assert abs(loss[0] - value) <= bound * max(float(value), 1.0)
    rounding = {torch.bfloat16: 2**-7}
    for own, true, side in zip(gradients, wanted, (case.queries, case.documents), strict=True):
        assert own.shape == side.shape and own.dtype == gradient_dtype(side)
        allowed = bound + rounding.get(side.dtype, 0.0)
        assert (own.double() - true).norm() <= allowed * true.norm() + 1e-6 / len(case.queries)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("teacher", [False, True])
def test_info_nce(shape, dtype, teacher):
    case = Case(shape, dtype, teacher)
    found = case.contrast()
    check(case, found, case.expected("info_nce"))
    loss, *none = case.contrast(wanted=False)
    assert torch.equal(loss, found[0]) and not any(gradient.numel() for gradient in none)


@pytest.mark.parametrize("shape", SHAPES + LARGE)
@pytest.mark.parametrize("dtype", FLOATS)
def test_listwise(shape, dtype):
    case = Case(shape, dtype)
    found = case.listwise()
    check(case, found, case.expected("listwise"))
    loss, *none = case.listwise(wanted=False)
    assert torch.equal(loss, found[0]) and not any(gradient.numel() for gradient in none)


def test_several_blocks_of_columns(monkeypatch):
    monkeypatch.setattr(info_nce, "COLUMNS", 16)
    case = Case((9, 40, 5, 3, 1), "float32")
    check(case, case.contrast(), case.expected("info_nce"))


@pytest.mark.parametrize("name", ["contrast", "listwise"])
def test_row_blocks_layouts_and_mixed_dtypes(name, monkeypatch):
    case = Case((20, 9, 17, 5, 3), "float32")
    whole = getattr(case, name)()
    monkeypatch.setattr(strips, "WORKSPACE", 0)  # the lowest strips
    if not GPU:
        monkeypatch.setattr(strips, "STEP", 16)
    case.queries, case.documents = case.queries.T.contiguous().T, torch.stack([case.documents] * 2, dim=2)[:, :, 0]
    case.teacher = [side.T.contiguous().T for side in case.teacher]
    case.candidates = case.candidates.T.contiguous().T
    torch.testing.assert_close(getattr(case, name)(), whole, rtol=1e-4, atol=1e-6)
    for side in ("queries", "documents"):
        case = Case((3, 5, 17, 5, 3), "float32")
        setattr(case, side, getattr(case, side).half())
        case.teacher[0] = case.teacher[0].half()
        check(case, getattr(case, name)(), case.expected("info_nce" if name == "contrast" else name))


@pytest.mark.parametrize("name", ["contrast", "listwise"])
def test_huge_tiny_zero_and_broken_rows(name):
    case = Case((8, 8, 6, 9, 4), "float32", teacher=False)
    case.candidates = torch.stack([torch.arange(8).roll(i) for i in range(4)], dim=1).to(DEVICE)
    plain, scales = getattr(case, name)(), torch.logspace(-25, 25, 8).to(DEVICE)[:, None]
    kept = case.queries, case.documents
    case.queries, case.documents = kept[0] * scales, kept[1] * scales
    loss, *gradients = getattr(case, name)()
    torch.testing.assert_close(loss, plain[0], rtol=1e-5, atol=0)
    for own, true in zip(gradients, plain[1:], strict=True):
        torch.testing.assert_close(own * scales, true, rtol=1e-4, atol=1e-6)
    case.queries, case.documents = (side.clone() for side in kept)
    case.queries[3] = case.documents[4] = 0.0
    loss, *gradients = getattr(case, name)()
    assert loss.isfinite() and all(gradient.isfinite().all() for gradient in gradients)
    assert not gradients[0][3].any() and not gradients[1][4].any()
    for broken in (float("nan"), float("inf")):
        for side in range(2):
            case.queries, case.documents = (rows.clone() for rows in kept)
            (case.queries, case.documents)[side][5, 2] = broken
            loss, *gradients = getattr(case, name)()
            assert loss.isnan() and all(gradient[5].isnan().all() for gradient in gradients)


def test_a_teacher_that_is_not_a_number_spoils_info_nce():
    for side in range(2):
        case = Case((6, 7, 5, 4, 2), "float32")
        case.teacher[side][5, 1] = float("nan")
        loss, of_queries, of_documents = case.contrast()
        assert loss.isnan() and of_queries[5].isnan().all() and of_documents.isnan().all()


def test_duplicates_and_queries_without_negatives():
    case = Case((3, 5, 7, 4, 2), "float32", teacher=False)
    case.documents[[1, 3]] = case.documents[0].clone()
    case.positives = torch.tensor([0, 1, 2]).to(DEVICE)
    check(case, case.contrast(), case.expected("info_nce"))
    case.documents[:] = case.documents[0].clone()
    loss, *gradients = case.contrast()
    assert loss == 0 and not any(gradient.any() for gradient in gradients)


def test_indices_outside_the_documents_give_nan():
    for outside in (-1, 5):
        case = Case((3, 5, 7, 4, 2), "float32")
        case.positives[1] = outside
        loss, of_queries, _ = case.contrast()
        assert loss.isnan() and of_queries[1].isnan().all() and of_queries[0].isfinite().all()
    for outside in (-2, 5):
        case = Case((3, 5, 7, 4, 3), "float32")
        case.candidates[:] = torch.tensor([[0, 1, 2], [3, outside, -1], [-1, 4, -1]])
        case.documents[4] = float("nan")  # the only candidate of its query does not count
        loss, of_queries, of_documents = case.listwise()
        assert loss.isnan() and of_queries[1].isnan().all() and of_queries[[0, 2]].isfinite().all()
        assert of_documents[:3].isfinite().all() and of_documents[3].isnan().all()


# From here on a GPU is needed: what an interpreter cannot show.


@on_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_repeated_runs_are_identical_and_never_wait(dtype):
    case = Case((1000, 5000, 256, 128, 16), dtype)
    for call in (case.contrast, case.listwise):
        first = call()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            again = [call() for _ in range(3)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert all(torch.equal(a, b) for run in again for a, b in zip(first, run, strict=True))


@on_gpu
def test_memory_stays_bounded():
    queries, documents = vectors(20000, 256, "bfloat16"), vectors(40000, 256, "bfloat16")
    candidates, scores = torch.randint(40000, (20000, 64), device=DEVICE), torch.randn(20000, 64, device=DEVICE)
    for loss, most in (
        (lambda q, d: info_nce_loss(q, d, candidates[:, 0], teacher_queries=q, teacher_documents=d), 2**29),
        (lambda q, d: listwise_loss(q, d, candidates, scores), 2**28),
    ):
        leaves = [side.clone().requires_grad_() for side in (queries, documents)]
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(*leaves).backward()
        torch.cuda.synchronize()
        # One Q x M matrix in bfloat16 would be 1.6 GB, and the gathered candidates 0.65 GB.
        assert torch.cuda.max_memory_allocated() - before < most
