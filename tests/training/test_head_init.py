"""Narrow heads begin as the principal axes of the widest, turned."""

from __future__ import annotations

import pytest
import torch

from jasper_fast.training.head_init import principal_heads


def test_inner_products_are_those_of_principal_components():
    states, weight, bias = torch.randn(200, 12), torch.randn(10, 12), torch.randn(10)
    vectors = (states @ weight.T + bias).double()
    vectors = vectors / vectors.norm(dim=1).mean()
    centred = vectors - vectors.mean(dim=0)
    _, _, axes = torch.linalg.svd(centred, full_matrices=False)
    heads = principal_heads(states, weight, bias, [6, 3], seed=0)
    for width, (narrow, shift) in heads.items():
        assert narrow.shape == (width, 12) and shift.shape == (width,) and narrow.dtype == torch.float32
        got = (states @ narrow.T + shift).double()
        wanted = centred @ axes[:width].T
        torch.testing.assert_close(got @ got.T, wanted @ wanted.T, atol=1e-5, rtol=1e-4)
        assert got.var(dim=0).max() < wanted.var(dim=0).max()  # turned: no coordinate holds most
    other = principal_heads(states, weight, bias, [3], seed=1)[3][0]
    assert not torch.allclose(other, heads[3][0])


@pytest.mark.parametrize("widths", [[10], [5], []])
def test_no_axes_that_are_not_there(widths):
    with pytest.raises(ValueError, match="no principal axes from"):
        principal_heads(torch.randn(4, 12), torch.randn(10, 12), torch.randn(10), widths, 0)
