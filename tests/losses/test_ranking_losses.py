"""The losses over queries and documents: against their references, at the edges, and what they promise."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from jasper_fast.losses import info_nce, info_nce_loss, listwise, listwise_loss, reference
from jasper_fast.ops import row_blocks
from jasper_fast.ops.fingerprints import row_fingerprints

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

NAMES = ("listwise", "info_nce", "info_nce with a teacher")
every_loss = pytest.mark.parametrize("name", NAMES)


class Case:
    """Random embeddings with the other arguments of each loss."""

    def __init__(self, queries: int, documents: int, width: int, candidates: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.queries, self.documents = random(queries, width), random(documents, width)
        self.candidates = torch.randint(-1, documents, (queries, candidates), generator=generator)
        self.scores = random(queries, candidates)
        self.positives = torch.randint(documents, (queries,), generator=generator)
        self.teacher = {"teacher_queries": random(queries, 4), "teacher_documents": random(documents, 4)}

    def call(self, name: str, *, slow: bool = False, **options: float):
        """Return the loss of queries and documents, or its reference."""
        if name == "listwise":
            loss = reference.listwise_loss if slow else listwise_loss
            return lambda q, d: loss(q, d, self.candidates, self.scores, **options)
        teacher = self.teacher if name == "info_nce with a teacher" else {}
        teacher = {key: value.double() for key, value in teacher.items()} if slow else teacher
        loss = reference.info_nce_loss if slow else info_nce_loss
        return lambda q, d: loss(q, d, self.positives, **teacher, **options)

    def compare(self, name: str, bound: float = 2e-5, **options: float) -> None:
        """Compare the loss and both gradients with the reference in float64."""
        value, *gradients = self.gradients(name, **options)
        wanted, *expected = with_gradients(
            self.call(name, slow=True, **options), self.queries.double(), self.documents.double()
        )
        assert abs(value - wanted) <= bound * (1 + wanted)
        for rows, own, true in zip((self.queries, self.documents), gradients, expected, strict=True):
            length = rows.double().norm(dim=1, keepdim=True)  # the shorter, the larger the gradient and its error
            torch.testing.assert_close(own.double() * length, true * length, rtol=1e-4, atol=bound)

    def gradients(self, name: str, **options: float) -> list[torch.Tensor]:
        """Return the loss and both gradients."""
        return with_gradients(self.call(name, **options), self.queries, self.documents)


def with_gradients(loss, *inputs: torch.Tensor) -> list[torch.Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


@every_loss
def test_gradcheck(name):
    case = Case(4, 6, 5, 4)
    inputs = [side.double().requires_grad_() for side in (case.queries, case.documents)]
    assert torch.autograd.gradcheck(case.call(name, temperature=0.2), inputs, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 9),
    documents=st.integers(1, 20),
    width=st.integers(1, 20),
    candidates=st.integers(1, 9),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 2.0**-100, 2.0**100]),  # exact: the reference sees the same embeddings
    duplicates=st.booleans(),
    zero=st.booleans(),
    columns=st.booleans(),
    margin=st.sampled_from([0.0, 0.3, -0.3]),
)
def test_against_the_references(queries, documents, width, candidates, seed, scale, duplicates, zero, columns, margin):
    case = Case(queries, documents, width, candidates, seed)
    case.queries *= scale
    if duplicates:
        half = documents - documents // 2
        case.documents[documents // 2 :] = case.documents[:half].clone()
        case.teacher["teacher_documents"][documents // 2 :] = case.teacher["teacher_documents"][:half].clone()
        case.scores[:] = case.scores[:, :1]  # ties
    if zero:
        case.queries[0] = case.documents[-1] = 0.0
    if columns:
        case.queries, case.documents = case.queries.T.contiguous().T, case.documents.T.contiguous().T
    for name in NAMES:
        case.compare(name, **({} if name == "listwise" else {"margin": margin}))


@every_loss
def test_accuracy_is_that_of_float32(name):
    """Of blocks with several rows of queries, and no worse than plain autograd in float32."""
    case = Case(70, 150, 64, 20)
    value, *ours = case.gradients(name)
    plain, *theirs = with_gradients(lambda q, d: case.call(name, slow=True)(q, d).float(), case.queries, case.documents)
    wanted, *expected = with_gradients(case.call(name, slow=True), case.queries.double(), case.documents.double())
    assert abs(value - wanted) <= 2 * abs(plain - wanted) + 1e-6 * wanted
    for own, other, true in zip(ours, theirs, expected, strict=True):
        assert (own - true).norm() <= 2 * (other - true).norm() + 1e-6 * true.norm()


@every_loss
def test_blocks_do_not_change_the_result(name, monkeypatch):
    case = Case(50, 30, 12, 6)
    whole = case.gradients(name)
    monkeypatch.setattr(row_blocks, "WORKSPACE", 30 * 16)
    assert len(row_blocks.row_blocks(50, 30)) == 4
    torch.testing.assert_close(case.gradients(name), whole)


@every_loss
def test_half_precision_and_autocast_compute_in_float32(name):
    case = Case(12, 20, 16, 5)
    plain = case.gradients(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = case.gradients(name)
    assert all(torch.equal(a, b) for a, b in zip(inside, plain, strict=True))
    for dtype in (torch.bfloat16, torch.float16):
        halves = [side.to(dtype) for side in (case.queries, case.documents)]
        value, *gradients = with_gradients(case.call(name), *halves)
        wanted, *expected = with_gradients(case.call(name), *(half.float() for half in halves))
        assert value.dtype == torch.float32 and torch.equal(value, wanted)
        assert all(torch.equal(own, true.to(dtype)) for own, true in zip(gradients, expected, strict=True))


@every_loss
@pytest.mark.parametrize("side", ["queries", "documents"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_goes_through(name, side, value):
    case = Case(6, 8, 5, 4)
    case.candidates[2] = torch.tensor([2, 3, 4, 1])
    getattr(case, side)[2, 1] = value
    loss, of_queries, of_documents = case.gradients(name)
    assert loss.isnan() and of_queries[2].isnan().all() and of_documents[2].isnan().all()


@pytest.mark.parametrize("side", ["teacher_queries", "teacher_documents"])
def test_a_teacher_that_is_not_a_number_spoils_info_nce(side):
    case = Case(6, 8, 5, 4)
    case.teacher[side][2, 1] = torch.nan
    loss, of_queries, of_documents = case.gradients("info_nce with a teacher")
    assert loss.isnan() and of_queries[2].isnan().all() and of_documents.isnan().all()


@every_loss
def test_zero_rows_get_no_gradient(name):
    case = Case(5, 7, 6, 7)
    case.queries[1] = case.documents[case.positives[0]] = 0.0
    value, of_queries, of_documents = case.gradients(name)
    assert value.isfinite() and of_queries.isfinite().all() and of_documents.isfinite().all()
    assert not of_queries[1].any() and not of_documents[case.positives[0]].any()


@every_loss
def test_only_the_wanted_gradients_are_computed(name):
    case = Case(5, 7, 6, 4)
    value, of_queries, of_documents = case.gradients(name)
    leaf = case.queries.clone().requires_grad_()
    (3.0 * case.call(name)(leaf, case.documents)).expand(4).sum().backward()
    torch.testing.assert_close(leaf.grad, 12.0 * of_queries)
    leaf = case.documents.clone().requires_grad_()
    case.call(name)(case.queries, leaf).backward()
    assert torch.equal(leaf.grad, of_documents)
    with torch.no_grad():
        assert torch.equal(case.call(name)(case.queries, leaf), value)
    assert not case.call(name)(case.queries, case.documents).requires_grad


@every_loss
def test_queries_may_be_documents(name):
    """One tensor on both sides gets the sum of both gradients."""
    case = Case(6, 6, 5, 4)
    loss = case.call(name)
    _, both = with_gradients(lambda rows: loss(rows, rows), case.queries)
    _, left, right = with_gradients(loss, case.queries, case.queries)
    torch.testing.assert_close(both, left + right)


@every_loss
def test_compiles_without_graph_breaks(name):
    case = Case(5, 7, 6, 4)
    compiled = torch.compile(case.call(name), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(with_gradients(compiled, case.queries, case.documents), case.gradients(name))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_operators_keep_to_their_fakes(dtype, wanted):
    case = Case(5, 7, 6, 4)
    sides = case.queries.to(dtype), case.documents.T.contiguous().T
    torch.library.opcheck(listwise.listwise_op, (*sides, case.candidates, case.scores, 0.05, 0.1, *wanted))
    for teacher in ((None, None), tuple(case.teacher.values())):
        torch.library.opcheck(info_nce.info_nce_op, (*sides, case.positives, 0.05, *teacher, 0.1, *wanted))


# The listwise loss.


def test_queries_with_fewer_than_two_candidates_add_nothing():
    case = Case(4, 7, 6, 3)
    case.candidates[:] = torch.tensor([[0, 1, 2], [3, -1, -1], [-1, -1, -1], [4, -1, 5]])
    case.scores[case.candidates == -1] = torch.nan  # not read
    case.documents[3] = case.documents[6] = torch.nan  # in no list of two
    value, of_queries, of_documents = case.gradients("listwise")
    alone = [listwise_loss(case.queries[i : i + 1], case.documents[:6], c[None], s[None]) for i, c, s in (
        (0, case.candidates[0], case.scores[0]), (3, case.candidates[3, ::2], case.scores[3, ::2])
    )]  # fmt: skip
    torch.testing.assert_close(value, sum(alone) / 4)
    assert of_queries[[0, 3]].any(dim=1).all() and not of_queries[[1, 2]].any()
    assert of_documents[[0, 1, 2, 4, 5]].any(dim=1).all()


@pytest.mark.parametrize("candidates", [torch.full((3, 4), -1), torch.zeros(3, 1, dtype=torch.int64)])
def test_without_candidates_to_compare_the_loss_is_zero(candidates):
    value, *gradients = with_gradients(
        lambda q, d: listwise_loss(q, d, candidates, torch.randn(candidates.shape)),
        torch.randn(3, 5),
        torch.randn(4, 5),
    )
    assert value == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_extreme_scores(dtype):
    """Scores near the dtype's limits and -inf give probabilities of 0, never NaN."""
    case = Case(3, 6, 5, 4)
    most = torch.finfo(dtype).max
    case.candidates[:] = torch.tensor([[0, 1, 2, 3], [3, 4, 5, -1], [1, 2, 4, 5]])
    case.scores = torch.tensor(
        [[most, -most, 0, 1], [-torch.inf, 0.0, 0.0, 0.0], [most, most, most, -most]], dtype=dtype
    )
    value, *gradients = case.gradients("listwise")
    assert value.dtype == torch.float32 and value.isfinite()
    case.scores = torch.tensor([[1, 0, 0, 0], [0, 0.5, 0.5, 0], [1 / 3, 1 / 3, 1 / 3, 0]]).log()
    wanted = case.gradients("listwise", teacher_temperature=1.0)
    torch.testing.assert_close([value, *gradients], wanted, rtol=1e-5, atol=1e-6)


def test_scores_that_are_not_a_number_go_through():
    for bad in (torch.nan, torch.inf):
        case = Case(3, 6, 5, 4)
        case.candidates[1] = torch.arange(4)
        case.scores[1, 2] = bad
        value, of_queries, _ = case.gradients("listwise")
        assert value.isnan() and of_queries[1].isnan().all()


def test_a_candidate_given_twice_counts_twice():
    case = Case(2, 6, 5, 4)
    case.candidates[:] = torch.tensor([[0, 1, 1, 2], [3, 3, 3, 3]])
    case.compare("listwise")
    case.scores[1] = 0.5
    assert listwise_loss(case.queries[1:], case.documents, case.candidates[1:], case.scores[1:]).abs() < 1e-6


def test_listwise_gradients_are_the_same_in_every_run():
    case = Case(40, 10, 16, 9)
    first = case.gradients("listwise")
    assert all(torch.equal(a, b) for a, b in zip(first, case.gradients("listwise"), strict=True))


# InfoNCE.


def test_false_negatives_are_left_out():
    queries, documents = torch.randn(1, 5), torch.randn(4, 5)
    teacher_queries = torch.tensor([[1.0, 0.0]])
    teacher_documents = torch.tensor([[0.8, 0.6], [0.9, 0.43589], [0.6, 0.8], [0.0, 1.0]])  # cosines 0.8, 0.9, 0.6, 0
    for margin, left in ((0.0, [0, 2, 3]), (0.3, [0, 3]), (0.9, [0]), (-0.2, [0, 1, 2, 3])):
        positives = torch.tensor([0])
        found = info_nce_loss(
            queries,
            documents,
            positives,
            teacher_queries=teacher_queries,
            teacher_documents=teacher_documents,
            margin=margin,
        )
        torch.testing.assert_close(found, info_nce_loss(queries, documents[left], positives))
    assert info_nce_loss(queries, documents[:1], positives) == 0  # no negatives


def test_duplicates_of_the_positive_are_no_negatives():
    queries, documents, positives = torch.randn(2, 5), torch.randn(6, 5), torch.tensor([1, 0])
    once = info_nce_loss(queries, documents, positives)
    doubled = torch.cat([documents, documents[:2]])
    twice = torch.stack(
        [
            info_nce_loss(queries[:1], torch.cat([documents, documents[:1]]), positives[:1]),
            info_nce_loss(queries[1:], torch.cat([documents, documents[1:2]]), positives[1:]),
        ]
    ).mean()
    value, _, gradient = with_gradients(lambda q, d: info_nce_loss(q, d, positives), queries, doubled)
    torch.testing.assert_close(value, twice)  # each query's own duplicate is left out, the other's counts
    assert value > once and gradient[6:].any()
    # A teacher's rows decide if they are given: there, only the first document is a duplicate.
    teacher_documents = torch.eye(8)
    teacher_documents[6] = teacher_documents[0]
    teacher = {"teacher_queries": torch.eye(8)[:2] * 0.0, "teacher_documents": teacher_documents}
    value = info_nce_loss(queries, doubled, positives, **teacher)
    logits = torch.nn.functional.normalize(queries) @ torch.nn.functional.normalize(doubled).T / 0.05
    logits[1, 6] = -torch.inf
    torch.testing.assert_close(value, torch.nn.functional.cross_entropy(logits, positives))


def test_a_well_recognized_positive_keeps_the_digits_of_its_loss():
    """In float32, the logarithm of the whole sum would give 0."""
    queries, documents = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.1, 0.1], [-0.9, 0.1]])

    def loss(function):
        return lambda q, d: function(q, d, torch.tensor([0]), temperature=0.08)

    value, *gradients = with_gradients(loss(info_nce_loss), queries, documents)
    wanted, *expected = with_gradients(loss(reference.info_nce_loss), queries.double(), documents.double())
    assert 1e-12 < wanted < 1e-9
    for own, true in zip([value, *gradients], [wanted, *expected], strict=True):
        torch.testing.assert_close(own.double(), true, rtol=1e-3, atol=1e-14)


def test_memory_does_not_grow_with_the_queries_times_the_documents():
    """Neither in the forward nor in the backward pass: no tensor is larger than a block."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            nonlocal largest
            out = function(*arguments, **(options or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return out

    rows = 6000
    queries, documents = torch.randn(rows, 4), torch.randn(rows, 4)
    numbers = row_fingerprints(documents)
    arguments = (queries, documents, torch.arange(rows), numbers, 0.05, [queries, documents], 0.0, True, True)
    with Watch():
        info_nce._info_nce_torch(*arguments)
    assert rows * 512 < largest <= 4 * row_blocks.WORKSPACE  # one Q x M matrix would have 144 MB


def test_fingerprints_are_equal_for_equal_rows_alone():
    assert len(row_fingerprints(torch.empty(3, 0)).unique()) == 1 and row_fingerprints(torch.empty(0, 4)).shape == (0,)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        signs = torch.cartesian_prod(*[torch.tensor([1.0, -1.0])] * 12).to(dtype)  # rows of few distinct values
        assert len(row_fingerprints(signs).unique()) == len(signs)
        rows = torch.randn(3, 5, dtype=dtype)
        assert torch.equal(row_fingerprints(rows), row_fingerprints(rows.T.contiguous().T))
    zeros = torch.tensor([[0.0, 1.0], [-0.0, 1.0], [1.0, 0.0]])
    first, second, third = row_fingerprints(zeros)
    assert first == second != third


# Arguments.


def test_numbers_of_numpy_are_numbers():
    case = Case(4, 6, 5, 3)
    for name in NAMES:
        plain = case.call(name, temperature=0.5)(case.queries, case.documents)
        assert case.call(name, temperature=np.float32(0.5))(case.queries, case.documents) == plain


@pytest.mark.parametrize("candidate", [-2, 6])
def test_indices_outside_the_documents_are_rejected(candidate):
    case = Case(4, 6, 5, 3)
    case.candidates[1, 2] = case.positives[1] = candidate
    with pytest.raises(IndexError, match=f"candidates: expected rows from -1 to 5, got {candidate}. Fix:"):
        case.gradients("listwise")
    with pytest.raises(IndexError, match=f"positives: expected rows from 0 to 5, got {candidate}. Fix:"):
        case.gradients("info_nce")


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, **options)


INDICES = torch.zeros(4, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: listwise_loss(ones(4, 3), ones(5, 2), INDICES, ones(4, 2)), ValueError, "width 3 and documents 2"),
        (lambda: listwise_loss(ones(3, 3), ones(5, 3), INDICES, ones(4, 2)), ValueError, "4 rows and queries 3"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES.int(), ones(4, 2)), TypeError, "got torch.int32"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES[:, 0], ones(4, 2)), ValueError, r"shape \(Q, K\)"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES[:, :0], ones(4, 2)), ValueError, r"got \(4, 0\)"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES, ones(4, 3)), ValueError, r"shape \(4, 2\), got"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES, INDICES), TypeError, r"Fix: convert with .float"),
        (lambda: listwise_loss(ones(4, 3), ones(5, 3), [[0, 1]], ones(4, 2)), TypeError, "got list"),
        (lambda: listwise_loss(ones(0, 3), ones(5, 3), INDICES, ones(4, 2)), ValueError, r"got \(0, 3\)"),
        (
            lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES, ones(4, 2), teacher_temperature=0),
            ValueError,
            "teacher_temperature: expected a number > 0, got 0",
        ),
        (
            lambda: listwise_loss(ones(4, 3), ones(5, 3), INDICES, ones(4, 2, device="meta")),
            ValueError,
            "scores and candidates: expected one device",
        ),
        (lambda: info_nce_loss(ones(4, 3), ones(5, 3), INDICES), ValueError, r"shape \(Q,\) with Q >= 1"),
        (lambda: info_nce_loss(ones(4, 3), ones(5, 3), INDICES[:, 0], margin=torch.inf), ValueError, "margin"),
        (
            lambda: info_nce_loss(ones(4, 3), ones(5, 3), INDICES[:, 0], teacher_queries=ones(4, 2)),
            ValueError,
            "teacher_documents: expected embeddings, got None",
        ),
        (
            lambda: info_nce_loss(
                ones(4, 3), ones(5, 3), INDICES[:, 0], teacher_queries=ones(4, 2), teacher_documents=ones(4, 2)
            ),
            ValueError,
            "teacher_documents have 4 rows and documents 5",
        ),
    ],
)
def test_wrong_arguments_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()
