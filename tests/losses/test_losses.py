"""The public losses against their slow references, and what they promise about inputs, gradients and errors."""

from __future__ import annotations

import os
import socket

import numpy as np
import pytest
import torch

from jasper_fast.losses import (
    CombinedLoss,
    JasperLoss,
    combined,
    cosine_loss,
    neighbourhood,
    neighbourhood_loss,
    reference,
    relative_exact,
    relative_similarity_loss,
    similarity,
    similarity_loss,
)
from jasper_fast.ops import cost, row_blocks
from jasper_fast.ops.normalize import l2_normalize

pytest.importorskip("hypothesis")

from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

LOSSES = {
    "cosine": (cosine_loss, reference.cosine_loss),
    "tile": (lambda s, t: similarity_loss(s, t, method="tile"), reference.similarity_loss),
    "feature": (lambda s, t: similarity_loss(s, t, method="feature"), reference.similarity_loss),
    "auto": (similarity_loss, reference.similarity_loss),
    "relative": (relative_similarity_loss, reference.relative_similarity_loss),
    "neighbourhood": (neighbourhood_loss, reference.neighbourhood_loss),
}
TEACHER_LEARNS = ("cosine", "tile", "feature", "auto")
every_loss = pytest.mark.parametrize("name", LOSSES)


def gradients(loss, *inputs: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    value = loss(*leaves)
    value.backward()
    return value.detach(), [leaf.grad for leaf in leaves]


@every_loss
def test_gradcheck(name):
    student, teacher = torch.randn(2, 7, 5, dtype=torch.float64)
    student.requires_grad_()
    if name in TEACHER_LEARNS:
        teacher.requires_grad_()
    assert torch.autograd.gradcheck(LOSSES[name][0], (student, teacher), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 40),
    width=st.integers(1, 20),
    teacher_width=st.integers(1, 20),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([1.0, 2.0**-100, 2.0**100]),  # exact: the references see the same vectors
    duplicates=st.booleans(),
    zero=st.booleans(),
    columns=st.booleans(),
)
def test_against_the_references(rows, width, teacher_width, seed, scale, duplicates, zero, columns):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(rows, width, generator=generator)
    if duplicates:
        student[rows // 2 :] = student[: rows - rows // 2].clone()
    if zero:
        student[0] = 0.0
    if columns:
        student = student.T.contiguous().T  # not contiguous
    teacher = torch.randn(rows, 2 * teacher_width, generator=generator)[:, ::2]
    for name, (loss, slow) in LOSSES.items():
        target = teacher
        if name == "cosine":
            if teacher_width < width:
                continue
            target = teacher[:, :width]
        value, (gradient, _) = gradients(loss, student * scale, target)
        wanted, (wanted_gradient, _) = gradients(slow, student.double(), target.double())
        if wanted_gradient is None:
            wanted_gradient = torch.zeros_like(student).double()
        if name == "relative" and (duplicates or zero or min(width, teacher_width) < 3):
            continue  # scores that tie in exact arithmetic do not in float32: test_relative_similarity.py has these
        torch.testing.assert_close(value.double(), wanted, rtol=2e-5, atol=2e-6)
        if not (name == "relative" and rows < 8):
            short = student.double().norm(dim=1, keepdim=True).clamp(max=1.0)  # the shorter, the larger the error
            pairs = rows * (rows - 1) / 2
            on_threshold = (
                2 / (pairs * (pairs - 1) / 2) if name == "relative" else 0.0
            )  # which float32 may see otherwise
            torch.testing.assert_close(
                gradient.double() * scale * short, wanted_gradient * short, rtol=2e-3, atol=2e-5 + on_threshold
            )
        if zero:
            assert not gradient[0].any()


@pytest.mark.parametrize("width, teacher_width", [(256, 256), (64, 384), (16, 8)])
def test_similarity_accuracy(width, teacher_width):
    """Gradient error relative to 4/B^2 (|S S'S| + |T T'S|): 1e-6 tile, 1e-5 feature. Strips of several heights."""
    rows = 700
    student, teacher = torch.randn(rows, width), torch.randn(rows, teacher_width)
    wanted, (wanted_gradient, wanted_teacher) = gradients(reference.similarity_loss, student.double(), teacher.double())
    s, t = (reference.normalise(x.double()) for x in (student, teacher))
    size = 4 / rows**2 * ((s @ (s.T @ s)).norm() + (t @ (t.T @ s)).norm())
    size /= student.norm(dim=1).max()  # the references' gradients are those of the rows before normalisation
    for method, bound in (("tile", 1e-6), ("feature", 1e-5)):
        value, (gradient, teacher_gradient) = gradients(
            lambda a, b, m=method: similarity_loss(a, b, method=m), student, teacher
        )
        assert (gradient - wanted_gradient).norm() <= bound * size
        assert (teacher_gradient - wanted_teacher).norm() <= 1e-4 * wanted_teacher.norm()
        assert value.item() == pytest.approx(wanted.item(), rel=10 * bound)


def test_strips_do_not_change_the_result(monkeypatch):
    student, teacher = torch.randn(90, 12), torch.randn(90, 20)
    whole = [gradients(LOSSES[name][0], student, teacher) for name in ("tile", "neighbourhood")]
    monkeypatch.setattr(row_blocks, "WORKSPACE", 90 * 16)
    assert len(row_blocks.row_blocks(90)) == 6
    cut = [gradients(LOSSES[name][0], student, teacher) for name in ("tile", "neighbourhood")]
    torch.testing.assert_close(cut, whole)


def test_auto_leaves_the_feature_form_when_it_cancels(monkeypatch):
    assert cost.feature_form_is_cheaper(400, 16, 16, False)
    assert not cost.feature_form_is_cheaper(400, 384, 384, False)
    teacher = torch.nn.functional.normalize(torch.randn(400, 16))
    near = torch.nn.functional.normalize(teacher + 1e-4 * torch.randn(400, 16))
    far = torch.nn.functional.normalize(torch.randn(400, 16))

    def value(student: torch.Tensor, method: str) -> float:
        return similarity.similarity_op([student], teacher, method, False, False)[0].item()

    assert value(near, "auto") == value(near, "tile") != value(near, "feature")
    expected = value(far, "feature")
    monkeypatch.setattr(similarity, "_similarity_tile", None)  # must not be needed
    assert value(far, "auto") == expected


@every_loss
def test_half_precision_and_autocast_compute_in_float32(name):
    loss = LOSSES[name][0]
    student, teacher = torch.randn(2, 24, 16)
    for dtype in (torch.bfloat16, torch.float16):
        value, (gradient, _) = gradients(loss, student.to(dtype), teacher.to(dtype))
        wanted, (wanted_gradient, _) = gradients(loss, student.to(dtype).float(), teacher.to(dtype).float())
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        assert torch.equal(value, wanted)
        assert torch.equal(gradient, wanted_gradient.to(dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, (inside_gradient, _) = gradients(loss, student, teacher)
    outside, (outside_gradient, _) = gradients(loss, student, teacher)
    assert torch.equal(inside, outside)
    assert torch.equal(inside_gradient, outside_gradient)


@every_loss
def test_teacher_gradients(name):
    _, (_, teacher_gradient) = gradients(LOSSES[name][0], *torch.randn(2, 9, 6))
    assert (teacher_gradient is not None) == (name in TEACHER_LEARNS)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_goes_through(name, value):
    student, teacher = torch.randn(2, 12, 6)
    student[3, 2] = value
    loss, (gradient, _) = gradients(LOSSES[name][0], student, teacher)
    assert loss.isnan()
    assert gradient[3].isnan().any()


@every_loss
def test_expanded_incoming_gradient_and_no_gradient(name):
    loss = LOSSES[name][0]
    student, teacher = torch.randn(2, 10, 6)
    value, (gradient, _) = gradients(loss, student, teacher)
    leaf = student.clone().requires_grad_()
    (3.0 * loss(leaf, teacher)).expand(4).sum().backward()
    torch.testing.assert_close(leaf.grad, 12.0 * gradient)
    with torch.no_grad():
        assert torch.equal(loss(leaf, teacher), value)
    assert not loss(student, teacher).requires_grad


@pytest.mark.parametrize("rows", [1, 2, 3])
@every_loss
def test_smallest_batches(name, rows):
    value, (gradient, _) = gradients(LOSSES[name][0], *torch.randn(2, rows, 4))
    assert value.isfinite() and gradient.isfinite().all()
    if name == "relative" and rows < 3 or name == "neighbourhood" and rows < 2:
        assert value == 0


def test_several_heads_share_a_teacher():
    teacher = torch.randn(20, 16)
    heads = {width: torch.randn(20, width) for width in (16, 8, 4)}
    for reduction, share in (("sum", 1.0), ("mean", 1 / 3)):
        leaves = {width: head.clone().requires_grad_() for width, head in heads.items()}
        output = JasperLoss(reduction=reduction, neighbourhood=2.0)(leaves, teacher)
        singles = {
            "cosine": cosine_loss(heads[16], teacher),
            "similarity": sum(similarity_loss(head, teacher) for head in heads.values()),
            "relative_similarity": sum(relative_similarity_loss(head, teacher) for head in heads.values()),
            "neighbourhood": sum(neighbourhood_loss(head, teacher) for head in heads.values()),
        }
        for name, value in singles.items():
            torch.testing.assert_close(getattr(output, name), share * value)
        weights = dict(zip(singles, (10.0, 200.0, 20.0, 2.0), strict=True))
        torch.testing.assert_close(output.loss, share * sum(weights[name] * singles[name] for name in singles))
        output.loss.backward()
        alone, (gradient, _) = gradients(lambda s, t: JasperLoss(neighbourhood=2.0)(s, t).loss, heads[8], teacher)
        torch.testing.assert_close(leaves[8].grad, share * gradient)


@pytest.mark.parametrize("weights", [(10.0, 200.0, 20.0), (1.0, 0.0, 0.0), (0.0, 0.0, 0.0)])
def test_value_and_grad_is_what_backward_gives(weights):
    """Also without a graph, for heads that no weighted loss reaches, and for a single tensor."""
    teacher = torch.randn(20, 16)
    heads = {width: torch.randn(20, width) for width in (16, 8)}
    module = JasperLoss(weights, neighbourhood=weights[1] / 100)
    leaves = {width: head.clone().requires_grad_() for width, head in heads.items()}
    expected = module(leaves, teacher)
    if expected.loss.requires_grad:
        expected.loss.backward()
    with torch.no_grad():
        output, found = module.value_and_grad(heads, teacher.clone().requires_grad_())
    assert not any(part.requires_grad for part in output)
    torch.testing.assert_close(tuple(output), tuple(part.detach() for part in expected))
    for width, leaf in leaves.items():
        torch.testing.assert_close(found[width], torch.zeros_like(leaf) if leaf.grad is None else leaf.grad)
    _, single = module.value_and_grad(heads[8].bfloat16(), teacher)
    assert list(single) == [8] and single[8].dtype == torch.bfloat16


def test_a_gradient_cached_in_pieces_is_the_whole_one():
    encoder = torch.nn.Linear(12, 6)
    texts, teacher = torch.randn(32, 12), torch.randn(32, 6)
    module = JasperLoss()
    module(encoder(texts), teacher).loss.backward()
    whole = encoder.weight.grad.clone()
    encoder.zero_grad()
    with torch.no_grad():
        vectors = torch.cat([encoder(piece) for piece in texts.split(8)])
    _, gradients = module.value_and_grad(vectors, teacher)
    for piece, gradient in zip(texts.split(8), gradients[6].split(8), strict=True):
        encoder(piece).backward(gradient)
    torch.testing.assert_close(encoder.weight.grad, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_fused_ops_keep_to_their_fakes(dtype):
    students = [torch.randn(12, 6, dtype=dtype), torch.randn(12, 9, dtype=dtype).T.contiguous().T]
    teacher = torch.randn(12, 5)
    for gradient in (True, False):
        torch.library.opcheck(neighbourhood.neighbourhood_op, (students, teacher, 0.05, gradient))
        for method in ("tile", "feature", "auto"):
            torch.library.opcheck(similarity.similarity_op, (students, teacher, method, gradient, gradient))


def test_teacher_that_is_a_head_is_a_constant():
    head, narrow = torch.randn(12, 8, requires_grad=True), torch.randn(12, 4, requires_grad=True)
    JasperLoss(weights=(0, 1, 0))({4: narrow}, head).loss.backward()
    assert head.grad.any()
    head.grad = None
    JasperLoss(weights=(0, 1, 0))({8: head, 4: narrow}, head).loss.backward()
    assert head.grad.abs().max() < 1e-6  # its own target: only rounding is left


def test_weight_zero_is_not_computed(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("computed a loss of weight 0")

    monkeypatch.setattr(similarity, "similarity_op", refuse)
    monkeypatch.setattr(relative_exact, "relative_similarity", refuse)
    monkeypatch.setattr(neighbourhood, "neighbourhood_op", refuse)
    student, teacher = torch.randn(2, 8, 4)
    output = JasperLoss(weights=(2.0, 0.0, 0.0))(student, teacher)
    torch.testing.assert_close(output.loss, 2.0 * cosine_loss(student, teacher))
    assert output.similarity == output.relative_similarity == 0
    loss, *parts = output
    assert len(parts) == 3 and loss == output.loss


@every_loss
def test_compiles_without_graph_breaks(name):
    loss = torch.compile(LOSSES[name][0], backend="aot_eager", fullgraph=True)
    student, teacher = torch.randn(2, 10, 6)
    torch.testing.assert_close(gradients(loss, student, teacher), gradients(LOSSES[name][0], student, teacher))


def test_module_compiles_with_several_heads():
    module = JasperLoss(neighbourhood=1.0, reduction="mean")
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    first, second, teacher = torch.randn(10, 6), torch.randn(10, 4), torch.randn(10, 6)

    def through(module):
        return gradients(lambda a, b: module({6: a, 4: b}, teacher).loss, first, second)

    torch.testing.assert_close(through(compiled), through(module))


def ones(*shape: int, **options) -> torch.Tensor:
    return torch.ones(*shape, **options)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: cosine_loss(ones(4, 3), ones(4, 2)), ValueError, "equal widths"),
        (lambda: similarity_loss(ones(4, 3), ones(5, 3)), ValueError, "4 rows and teacher 5"),
        (lambda: similarity_loss(ones(0, 3), ones(0, 3)), ValueError, r"B, D >= 1, got \(0, 3\)"),
        (lambda: similarity_loss(ones(3), ones(3)), ValueError, "expected shape"),
        (lambda: similarity_loss(ones(4, 3), ones(4, 3).int()), TypeError, r"got torch.int32. Fix: convert"),
        (lambda: similarity_loss([[1.0]], ones(1, 1)), TypeError, "expected a tensor"),
        (lambda: similarity_loss(ones(4, 3), ones(4, 3, device="meta")), ValueError, r"\.to\(device\)"),
        (lambda: similarity_loss(ones(4, 3), ones(4, 3), method="fast"), ValueError, "'tile', 'feature'"),
        (lambda: relative_similarity_loss(ones(4, 3), ones(4, 3), ties="x"), ValueError, "'exclude', 'label'"),
        (lambda: relative_similarity_loss(ones(4, 3), ones(4, 3), margin=float("nan")), ValueError, "finite"),
        (lambda: relative_similarity_loss(ones(4, 3), ones(4, 3), margin=ones(1)), TypeError, "a number"),
        (lambda: neighbourhood_loss(ones(4, 3), ones(4, 3), temperature=0.0), ValueError, "> 0"),
        (lambda: JasperLoss(weights=(1.0, 2.0)), ValueError, "three"),
        (lambda: JasperLoss(weights=5), ValueError, "three"),
        (lambda: JasperLoss(weights=(1.0, -2.0, 0.0)), ValueError, r"weights\[1\]"),
        (lambda: JasperLoss(reduction="max"), ValueError, "'sum', 'mean'"),
        (lambda: JasperLoss()({}, ones(4, 3)), ValueError, "at least one head"),
        (lambda: JasperLoss()({2: ones(4, 3)}, ones(4, 3)), ValueError, r"student\[2\]"),
    ],
)
def test_wrong_arguments_say_what_was_expected(call, error, words):
    with pytest.raises(error, match=words):
        call()


def run_rank(rank: int, port: int, path: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    students, teacher = global_batch()
    rows = slice(rank * 8, rank * 8 + 8)
    leaves = {width: student[rows].clone().requires_grad_() for width, student in students.items()}
    module = JasperLoss(neighbourhood=1.0, group=torch.distributed.group.WORLD)
    output = module(leaves, teacher[rows])
    output.loss.backward()
    torch.save((tuple(output), {width: leaf.grad for width, leaf in leaves.items()}), f"{path}/{rank}.pt")
    torch.distributed.destroy_process_group()


def global_batch() -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = (12, 6, 12)
    wide, narrow, teacher = (torch.randn(16, width, generator=generator) for width in shapes)
    return {12: wide, 6: narrow}, teacher


@pytest.mark.slow
def test_group_makes_the_losses_global(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, (port, str(tmp_path)), nprocs=2)
    students, teacher = global_batch()
    leaves = {width: student.requires_grad_() for width, student in students.items()}
    whole = JasperLoss(neighbourhood=1.0)(leaves, teacher)
    whole.loss.backward()
    for rank in range(2):
        parts, own = torch.load(f"{tmp_path}/{rank}.pt")
        torch.testing.assert_close(parts, tuple(part.detach() for part in whole))
        for width, leaf in leaves.items():
            # Averaging over the two ranks halves it: then it is the global gradient of these rows.
            torch.testing.assert_close(own[width] / 2, leaf.grad[rank * 8 : rank * 8 + 8])


def test_huge_and_tiny_rows_have_unit_length():
    rows = torch.tensor([[3e38, 3e38], [1e-40, 0.0], [0.0, 0.0], [3.0, 4.0]])
    unit, _ = l2_normalize(rows, torch.float32)
    torch.testing.assert_close(unit.norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    torch.testing.assert_close(unit[3], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("scale", [1e25, 1e-30])
@pytest.mark.parametrize("loss", [similarity_loss, relative_similarity_loss])
def test_the_reference_takes_rows_of_any_length(loss, scale):
    """In float32, whose squares hold neither."""
    student, teacher = torch.randn(2, 12, 6)

    def slow(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return loss(s, t, method="reference")

    value, (gradient, _) = gradients(slow, student * scale, teacher / scale)
    wanted, (wanted_gradient, _) = gradients(slow, student, teacher)
    torch.testing.assert_close(value, wanted, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.double() * scale, wanted_gradient.double(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("ties", ["exclude", "label"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["exact", "binned", "reference"])
def test_a_teacher_that_is_not_a_number_spoils_relative_similarity_on_every_path(method, value, ties):
    student, teacher = torch.randn(2, 12, 6)
    teacher[3, 2] = value

    def loss(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return relative_similarity_loss(s, t, ties=ties, method=method)

    spoilt, (gradient, _) = gradients(loss, student, teacher)
    assert spoilt.isnan() and gradient.isnan().all()
    assert loss(student[2:4], teacher[2:4]) == 0  # two rows are one pair, which no other is compared with


def test_numbers_of_numpy_are_numbers():
    student, teacher = torch.randn(2, 12, 6)
    for method in ("exact", "reference"):
        wanted = relative_similarity_loss(student, teacher, margin=0.25, method=method)
        assert relative_similarity_loss(student, teacher, margin=np.float32(0.25), method=method) == wanted
    wanted = neighbourhood_loss(student, teacher, temperature=0.5)
    assert neighbourhood_loss(student, teacher, temperature=np.float32(0.5)) == wanted
    module = JasperLoss(
        np.array([1.0, 2, 3]), np.float64(0.25), neighbourhood=np.int64(1), temperature={6: np.float32(0.5)}
    )
    same = JasperLoss((1.0, 2.0, 3.0), 0.25, neighbourhood=1.0, temperature={6: 0.5})
    assert module(student, teacher) == same(student, teacher)
    with pytest.raises(ValueError, match="margin: expected a finite number, got inf"):
        relative_similarity_loss(student, teacher, margin=np.float32("inf"))
    with pytest.raises(TypeError, match="margin: expected a number, got bool"):
        relative_similarity_loss(student, teacher, margin=True)


def test_rows_of_ranks_need_their_group():
    with pytest.raises(ValueError, match=r"rows: .* without the group .*leave out rows=\[2, 1\]"):
        JasperLoss(rows=[2, 1])


def test_only_heads_with_a_cosine_term_are_copied(monkeypatch):
    copied = []
    plain = combined.normalize
    monkeypatch.setattr(
        combined, "normalize", lambda rows, dtype: (copied.append(rows.shape[1]), plain(rows, dtype))[1]
    )
    teacher = torch.randn(20, 16)
    heads = {width: torch.randn(20, width) for width in (16, 8, 4)}
    output = JasperLoss((10.0, 200.0, 0.0))(heads, teacher)
    assert copied == [16, 16]  # the head's and the teacher's
    torch.testing.assert_close(output.cosine, cosine_loss(heads[16], teacher))
    copied.clear()
    assert JasperLoss((10.0, 200.0, 0.0))({8: heads[8]}, teacher).cosine == 0 and not copied


def test_each_head_may_have_its_own_temperature():
    teacher = torch.randn(20, 12)
    heads = {width: torch.randn(20, width, requires_grad=True) for width in (8, 5, 3)}
    temperatures = {8: 0.05, 5: 0.2, 3: 0.05}
    loss = JasperLoss((0.0, 0.0, 0.0), neighbourhood=2.0, temperature=temperatures)(heads, teacher)
    apart = sum(neighbourhood_loss(heads[w], teacher, temperature=t) for w, t in temperatures.items())
    torch.testing.assert_close(loss.loss, 2 * apart)
    for got, wanted in zip(
        torch.autograd.grad(loss.loss, list(heads.values())),
        torch.autograd.grad(2 * apart, list(heads.values())),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)
    with pytest.raises(ValueError, match="none for the head of width 3"):
        JasperLoss(neighbourhood=1.0, temperature={8: 0.1, 5: 0.1})(heads, teacher)
    with pytest.raises(ValueError, match="temperature: expected a number > 0, got 0"):
        JasperLoss(neighbourhood=1.0, temperature={8: 0.1, 5: 0})


def test_the_feature_form_of_one_row_is_no_less_than_zero():
    """Its sums cancel there: what is left over may have either sign."""
    for seed in range(20):
        torch.manual_seed(seed)
        assert similarity_loss(torch.randn(1, 5), torch.randn(1, 3), method="feature") >= 0.0


@pytest.mark.parametrize(
    ("weights", "error", "message"),
    [
        ({"cosin": 1.0}, ValueError, "no loss is called 'cosin' .expected cosine, "),
        ({"cosine": -1.0}, ValueError, "expected a number >= 0, got -1.0"),
        ({"cosine": float("nan")}, ValueError, "expected a finite number"),
        ({"cosine": "1"}, TypeError, "expected a number, got str"),
    ],
)
def test_combined_losses_check_their_weights(weights, error, message):
    with pytest.raises(error, match=message):
        CombinedLoss(weights)
