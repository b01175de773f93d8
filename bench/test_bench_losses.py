"""``pytest bench/``: forward and backward of the losses, for pytest-benchmark."""

import pytest
import torch

from jasper_fast.losses import JasperLoss, neighbourhood_loss, relative_similarity_loss, similarity_loss

LOSSES = {
    "tile": lambda s, t: similarity_loss(s, t, method="tile"),
    "feature": lambda s, t: similarity_loss(s, t, method="feature"),
    "relative_similarity": relative_similarity_loss,
    "neighbourhood": neighbourhood_loss,
    "all": lambda s, t: JasperLoss()(s, t).loss,
}


@pytest.mark.parametrize("rows", [128, 512])
@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark, name, rows):
    student, teacher = torch.randn(rows, 384, requires_grad=True), torch.randn(rows, 384)

    def step() -> torch.Tensor:
        student.grad = None
        LOSSES[name](student, teacher).backward()
        return student.grad

    assert benchmark(step).isfinite().all()
