"""Drifts and diffusions by name, against examples worked out by hand."""

from __future__ import annotations

import torch

from pgpo.sde.problem import SampleLaw
from pgpo.sde.theorem import Fields, ema_correction, gradient_correction, milstein_correction, with_ema_teacher
from pgpo.sde.transfer import Grid

F64 = torch.float64


def test_fields_of_two_equally_likely_batches() -> None:
    """g = (1, -1/2), rho = (2, 1): rho g = (2, -1/2)."""
    half = torch.full((1, 2), 0.5, dtype=F64)
    law = SampleLaw(half, torch.tensor([[[1.0], [-0.5]]], dtype=F64), torch.zeros(1, 2, dtype=F64))
    f = Fields(law, torch.tensor([[2.0, 1.0]], dtype=F64), torch.tensor([1.2], dtype=F64))
    assert f.grad_loss.item() == 0.25
    assert f.exact_drift.item() == -0.75
    assert f.naive_drift.item() == -1.2 * 0.25
    assert f.product_drift.item() == -1.5 * 0.25
    assert f.rho_gradient_covariance.item() == 0.75 - 0.375
    assert f.unchanged_diffusion.item() == 0.75**2
    assert f.exact_diffusion.item() == 1.25**2


def test_corrections_differ_in_sign_on_a_rotation() -> None:
    """b = (y, -x): (Db)b = -(x, y), while grad |b|^2 = 2 (x, y)."""
    grid = Grid((4, 4), (1.0, 1.0))
    x, y = grid.nodes.unbind(1)
    b = torch.stack([y, -x], 1)
    torch.testing.assert_close(milstein_correction(grid, b), grid.nodes / 2, rtol=0, atol=1e-12)
    torch.testing.assert_close(gradient_correction(grid, b), -grid.nodes / 2, rtol=0, atol=1e-12)


def test_corrections_agree_on_a_gradient() -> None:
    """b = -grad(x^2 y): Db is symmetric."""
    grid = Grid((6, 6), (1.0, 1.0))
    x, y = grid.nodes.unbind(1)
    b = -torch.stack([2 * x * y, x**2], 1)
    torch.testing.assert_close(milstein_correction(grid, b), gradient_correction(grid, b), rtol=0, atol=1e-11)


def test_ema_equation_by_hand() -> None:
    """b = -theta, kappa = 2: B = (-x, 2(x - y)), (DB)B = (x, -2x - 4(x - y)), plus (0, kappa b) = (0, -2x)."""
    grid = Grid((3, 3), (1.0, 1.0))
    x, y = grid.nodes.unbind(1)
    s = torch.full((len(x), 1, 1), 0.7, dtype=F64)
    equation = with_ema_teacher(-x.unsqueeze(1), s, x.unsqueeze(1), y.unsqueeze(1), 2.0)
    torch.testing.assert_close(equation.b0, torch.stack([-x, 2 * (x - y)], 1))
    assert equation.diffusion[0].tolist() == [[0.7, 0.0], [0.0, 0.0]]
    expected = torch.stack([-x / 2, x + 2 * (x - y) - 2 * x], 1)
    torch.testing.assert_close(ema_correction(grid, equation.b0, 2.0), expected, rtol=0, atol=1e-12)
