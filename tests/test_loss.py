import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byol_pytorch.loss import regression_loss


def reference(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """2 - 2 cos, row by row, from the definition of the cosine."""
    rows = [
        2 - 2 * (p * z).sum() / math.sqrt((p * p).sum() * (z * z).sum())
        for p, z in zip(prediction.detach(), target.detach(), strict=True)
    ]
    return torch.stack(rows).mean()


@given(st.integers(1, 9), st.integers(2, 33), st.integers(0, 2**31))
def test_loss_is_the_mean_of_two_minus_two_cosines(batch, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    p, z = torch.randn(2, batch, dim, generator=generator, dtype=torch.float64)
    assert regression_loss(p, z).item() == pytest.approx(reference(p, z).item(), abs=2e-5)


def test_loss_runs_from_zero_for_equal_to_four_for_opposite_directions():
    x = torch.randn(5, 7)
    assert regression_loss(x, 3 * x).item() == pytest.approx(0, abs=1e-6)
    assert regression_loss(x, -2 * x).item() == pytest.approx(4, abs=1e-5)
    assert regression_loss(x, x).item() >= 0


def test_gradient_equals_the_analytic_one_in_float64():
    p, z = torch.randn(2, 6, 5, dtype=torch.float64)
    p.requires_grad_()
    regression_loss(p, z).backward()
    norm_p, norm_z = p.detach().norm(dim=1, keepdim=True), z.norm(dim=1, keepdim=True)
    unit_p, unit_z = p.detach() / norm_p, z / norm_z
    cosine = (unit_p * unit_z).sum(1, keepdim=True)
    expected = -2 / 6 * (unit_z - cosine * unit_p) / norm_p
    torch.testing.assert_close(p.grad, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loss_is_float32_under_autocast_and_for_narrow_inputs(dtype):
    p, z = torch.randn(2, 64, 256)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = regression_loss(p.to(dtype), z.to(dtype))
    assert loss.dtype == torch.float32
    expected = reference(p.to(dtype).double(), z.to(dtype).double()).item()
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_zero_vectors_give_a_finite_loss_and_gradient():
    p = torch.zeros(3, 4, requires_grad=True)
    loss = regression_loss(p, torch.randn(3, 4))
    loss.backward()
    assert loss.isfinite()
    assert p.grad.isfinite().all()
