"""Promises of every loss in the table, each through the combined loss that training uses."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.config.losses import LOSSES
from jasper_fast.losses import CombinedLoss
from tests.helpers.loss_table import SLOW

every_loss = pytest.mark.parametrize("loss", LOSSES, ids=[loss.name for loss in LOSSES])


def value_and_gradient(call, student, teacher):
    leaf = student.clone().requires_grad_()
    value = call(leaf, teacher)
    value.backward()
    return value.detach(), leaf.grad


def fast(loss, student, teacher):
    return value_and_gradient(lambda s, t: CombinedLoss({loss.name: 1.0})(s, t).parts[loss.name], student, teacher)


def slow(loss, student, teacher):
    return value_and_gradient(SLOW[loss.name], student.double(), teacher.double())


def batch(loss, rows, width=12):
    generator = torch.Generator().manual_seed(rows)
    student, teacher = torch.randn(2, rows, width, generator=generator)
    return student, teacher if loss.equal_widths else teacher[:, : width - 3]


def test_every_loss_has_a_slow_form():
    assert list(SLOW) == [loss.name for loss in LOSSES]


@every_loss
@pytest.mark.parametrize("rows", [8, 33])
def test_the_slow_form_in_float64_gives_the_same(loss, rows):
    student, teacher = batch(loss, rows)
    (value, gradient), (expected, expected_gradient) = fast(loss, student, teacher), slow(loss, student, teacher)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-3, atol=1e-5)


@every_loss
def test_the_gradient_is_that_of_differences(loss):
    student, teacher = (side.double() for side in batch(loss, 6, 5))
    student.requires_grad_()
    module = CombinedLoss({loss.name: 1.0})
    assert torch.autograd.gradcheck(lambda s: module(s, teacher).loss, student, atol=1e-6)


@every_loss
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_smallest_batches(loss, rows):
    student, teacher = batch(loss, rows)
    (value, gradient), (expected, _) = fast(loss, student, teacher), slow(loss, student, teacher)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()
    if rows < loss.min_rows:  # it cannot learn from so few
        torch.testing.assert_close(gradient, torch.zeros_like(gradient))


@every_loss
def test_zero_rows_get_no_gradient(loss):
    student, teacher = batch(loss, 9)
    student[4] = teacher[7] = 0.0
    value, gradient = fast(loss, student, teacher)
    assert value.isfinite() and gradient.isfinite().all() and not gradient[4].any()


@every_loss
def test_nan_reaches_the_loss_and_its_gradient(loss):
    student, teacher = batch(loss, 9)
    student[4, 1] = torch.nan
    value, gradient = fast(loss, student, teacher)
    assert value.isnan() and gradient[4].isnan().any()


@every_loss
def test_heads_of_other_widths_share_the_teacher(loss):
    student, teacher = batch(loss, 9)
    heads = {12: student, 7: student[:, :7]}
    alone = [CombinedLoss({loss.name: 2.0})({width: head}, teacher).loss for width, head in heads.items()]
    torch.testing.assert_close(CombinedLoss({loss.name: 2.0})(heads, teacher).loss, sum(alone))
    assert (alone[1] == 0) == loss.equal_widths
