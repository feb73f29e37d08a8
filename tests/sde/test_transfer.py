"""The engine against closed forms and brute force: everything else is measured with it."""

from __future__ import annotations

import math

import pytest
import torch

from pgpo.core import ExponentialLaw
from pgpo.sde.experiments import batch_fields, fixed_teacher
from pgpo.sde.problem import FEEDBACK, PHI_1, Bandit
from pgpo.sde.theorem import Equation
from pgpo.sde.transfer import Grid, Unresolved, chain_operator, evolve, multisets, sde_operator, stationary

F64 = torch.float64


def test_interpolation_and_derivatives_are_exact_on_polynomials_of_an_off_center_box() -> None:
    grid = Grid((5, 4), (2.0, 3.0), center=(1.0, -0.5))
    x, y = grid.nodes.unbind(1)
    u = x**5 - 2 * x**2 * y**3 + y
    points = torch.tensor([[0.3, 0.7], [2.9, -3.4], [1.0, -0.5]], dtype=F64)  # the last one is a node
    px, py = points.unbind(1)
    torch.testing.assert_close(grid.rows(points) @ u, px**5 - 2 * px**2 * py**3 + py, rtol=0, atol=1e-11)
    torch.testing.assert_close(grid.gradient[0] @ u, 5 * x**4 - 4 * x * y**3, rtol=0, atol=1e-9)
    torch.testing.assert_close(grid.gradient[1] @ u, -6 * x**2 * y**2 + 1, rtol=0, atol=1e-9)


def test_jacobian_has_components_in_rows_and_directions_in_columns() -> None:
    grid = Grid((3, 3), (1.0, 1.0))
    x, y = grid.nodes.unbind(1)
    jacobian = grid.derivative(torch.stack([x * y, 3 * x], 1))
    torch.testing.assert_close(jacobian[:, 0], torch.stack([y, x], 1), rtol=0, atol=1e-12)
    torch.testing.assert_close(jacobian[:, 1, 1], torch.zeros_like(x), rtol=0, atol=1e-12)


def test_sde_with_state_dependent_noise_against_moment_equations() -> None:
    """dX = -X dt + sqrt(1 + X^2) dW: E X = x e^-t, (E X^2)' = -E X^2 + 1, so E X^2 = 1 + (x^2 - 1) e^-t."""
    grid = Grid((3,), (2.0,))
    x = grid.nodes
    operator = sde_operator(grid, -x, (1 + x**2).unsqueeze(-1), 0.25)
    curve = evolve(operator, torch.cat([x, x**2], 1), 8, grid.rows(torch.tensor([[1.5]], dtype=F64)))
    decay = math.exp(-2.0)
    assert curve[-1, 0].tolist() == pytest.approx([1.5 * decay, 1 + (1.5**2 - 1) * decay], abs=1e-12)


def test_correlated_noise_in_two_dimensions_reaches_the_cross_moment() -> None:
    """dX = -X dt + dW with Cov = [[1, .5], [.5, 2]]: Cov X_t = Cov (1 - e^-2t)/2."""
    grid = Grid((3, 3), (2.0, 2.0))
    x = grid.nodes
    cov = torch.tensor([[1.0, 0.5], [0.5, 2.0]], dtype=F64).expand(len(x), 2, 2)
    operator = sde_operator(grid, -x, cov, 0.5)
    start = torch.tensor([[0.4, -0.3]], dtype=F64)
    u = torch.stack([x[:, 0] * x[:, 1], x[:, 1] ** 2], 1)
    value = evolve(operator, u, 2, grid.rows(start))[-1, 0].tolist()
    decay, spread = math.exp(-2.0), (1 - math.exp(-2.0)) / 2
    assert value == pytest.approx([-0.12 * decay + 0.5 * spread, 0.09 * decay + 2.0 * spread], abs=1e-12)


def _tree(steps: int, eta: float, start: float) -> list[float]:
    """E g(theta_k) by walking every path of mini-batches of the language problem."""
    bandit, law = Bandit(PHI_1, FEEDBACK, 0.5), ExponentialLaw(1.0, 6.0)
    theta, weight = torch.tensor([[start]], dtype=F64), torch.ones(1, dtype=F64)
    for _ in range(steps):
        f = batch_fields(bandit, law, theta, fixed_teacher(theta))
        theta = (theta.unsqueeze(1) - eta * f.rho.unsqueeze(-1) * f.law.gradient).flatten(0, 1)
        weight = (weight.unsqueeze(1) * f.law.probability).flatten()
    values = theta[:, 0]
    return [float((weight * g).sum()) for g in (values, values**2, values.cos())]


@pytest.mark.parametrize("steps", [3, pytest.param(5, marks=pytest.mark.slow)])  # 3375 and 759375 leaves
def test_chain_operator_equals_the_full_tree(steps: int) -> None:
    bandit, law, grid = Bandit(PHI_1, FEEDBACK, 0.5), ExponentialLaw(1.0, 6.0), Grid((40,), (4.0,))
    theta = grid.nodes
    f = batch_fields(bandit, law, theta, fixed_teacher(theta))
    operator = chain_operator(
        grid, f.law.probability, theta.unsqueeze(1) - 0.125 * f.rho.unsqueeze(-1) * f.law.gradient
    )
    x = theta[:, 0]
    u = torch.stack([x, x**2, x.cos()], 1)
    value = evolve(operator, u, steps, grid.rows(torch.tensor([[1.0]], dtype=F64)))[-1, 0].tolist()
    assert value == pytest.approx(_tree(steps, 0.125, 1.0), abs=1e-8)


@pytest.mark.parametrize("steps", [0, 1, 7, 64])
def test_evolve_gives_every_step_as_repeated_application_does(steps: int) -> None:
    generator = torch.Generator().manual_seed(0)
    operator = torch.softmax(torch.randn(5, 5, dtype=F64, generator=generator), 1)
    u, read = torch.randn(5, 2, dtype=F64, generator=generator), torch.eye(5, dtype=F64)[:3]
    expected, state = [], u
    for _ in range(steps + 1):
        expected.append(read @ state)
        state = operator @ state
    torch.testing.assert_close(evolve(operator, u, steps, read), torch.stack(expected), rtol=1e-12, atol=1e-12)


def test_a_growing_operator_is_unresolved_not_a_number() -> None:
    with pytest.raises(Unresolved, match="grew"):
        evolve(2 * torch.eye(3, dtype=F64), torch.ones(3, 1, dtype=F64), 40, torch.eye(3, dtype=F64))
    with pytest.raises(Unresolved):
        evolve(torch.full((3, 3), math.nan, dtype=F64), torch.ones(3, 1, dtype=F64), 2, torch.eye(3, dtype=F64))


def test_stationary_variance_of_an_autoregression() -> None:
    """x' = x/2 + 1 +- 1: mean 2, variance 1 / (1 - 1/4)."""
    grid = Grid((4,), (5.0,))
    x = grid.nodes
    target = 0.5 * x.unsqueeze(1) + torch.tensor([2.0, 0.0], dtype=F64)[None, :, None]
    operator = chain_operator(grid, torch.full((5, 2), 0.5, dtype=F64), target)
    mean, square = stationary(operator, torch.cat([x, x**2], 1), grid.rows(torch.zeros(1, 1, dtype=F64)))[0].tolist()
    assert (mean, square - mean**2) == pytest.approx((2.0, 4 / 3), abs=1e-10)


def test_multisets_carry_multinomial_counts() -> None:
    sets, counts = multisets(3, 2)
    assert dict(zip(map(tuple, sets), counts.tolist())) == {
        (0, 0): 1, (0, 1): 2, (0, 2): 2, (1, 1): 1, (1, 2): 2, (2, 2): 1,
    }  # fmt: skip


def test_noise_power_is_the_exponent_of_eta_in_the_variance() -> None:
    """One step from 0 with b = 0: E X^2 = eta * eta^p."""
    grid = Grid((3,), (1.0,))
    x, read = grid.nodes, grid.rows(torch.zeros(1, 1, dtype=F64))
    equation = Equation(torch.zeros_like(x), torch.ones(4, 1, 1, dtype=F64))
    for chosen, expected in ((equation, 0.01), (equation.without_sqrt_eta(), 0.1), (equation.without_noise(), 0.0)):
        value = float(read @ chosen.operator(grid, 0.1) @ x[:, 0] ** 2)
        assert value == pytest.approx(expected, abs=1e-14)
