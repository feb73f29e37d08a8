"""Counterexample K1: a cap with its kink where training stays costs the SDE half an order.

    L(x, y) = x + y^2 / 2, noise +-s in y only, rho = min(exp(alpha I), rho_max), I = log(rho_max)/alpha + y

The cap is reached exactly at y = 0, the minimum in y. rho depends on the state only, is bounded and Lipschitz: the
paper's hypotheses hold, and the test function g = x is linear. Yet E[x_T] - x_0 = -int E rho(y) dt depends on the
spread of y through the kink: E rho(y) = rho_max - c sd(y), sd(y) ~ sqrt(eta), so a wrong diffusion costs order 1/2.

A Chebyshev grid cannot resolve a kink. The chain is computed on a fine grid, uniform in asinh(y) (cubic
interpolation), the SDE on two Chebyshev panels joined at y = 0, where its solution is twice differentiable.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from pgpo.core import ExponentialLaw, SmoothExponentialLaw

from .experiments import HORIZON, Claim, Curve
from .problem import Law, apply_law
from .transfer import chebyshev_nodes, differentiation_matrix, evolve

NOISE = 1.0  # s; |y| <= s is invariant, and the chain's grid is slightly wider
FINE = 0.02  # y = FINE sinh(s), s uniform: nodes are densest at the kink
ALPHA, RHO_MAX = 1.0, 2.0  # the package's defaults


def information(y: Tensor) -> Tensor:
    """I = log(rho_max)/alpha + y: the cap is reached at y = 0."""
    return math.log(RHO_MAX) / ALPHA + y


def chain_curve(law: Law, points: int) -> Curve:
    """eta -> eta sum_{j<k} E rho(y_j) from y_0 = 0, k = 0..T/eta; [T/eta + 1, 1, 1]."""
    end = math.asinh(1.2 * NOISE / FINE)
    s = torch.linspace(-end, end, 2 * (points // 2) + 1, dtype=torch.float64)  # odd: y = 0 is a node
    y = FINE * s.sinh()
    rho = apply_law(law, information(y))

    @cache
    def values(eta: float) -> Tensor:
        moved = [y - eta * rho * (y + sign * NOISE) for sign in (1.0, -1.0)]
        step = [_cubic_rows(s, (target / FINE).asinh()) for target in moved]
        operator = _sum_operator(0.5 * (step[0] + step[1]), eta * rho)
        return evolve(operator, _unit(len(y)), round(HORIZON / eta), _read(len(y), len(y) // 2))

    return values


def equation_curve(law: Law, factor: str, degree: int = 64, half: float = 2.0) -> Curve:
    """eta -> int_0^{k eta} E rho(Y) dt for dY = -rho(Y) Y dt + sqrt(eta) D^(1/2) dW, Y_0 = 0.

    factor: "rho^2 Sigma", "Sigma" or "none" names D. Without noise Y stays at 0, and the integral is rho(0) k eta.
    """
    if factor == "none":
        rate = law(float(information(torch.tensor(0.0, dtype=torch.float64))))
        return lambda eta: rate * eta * torch.arange(round(HORIZON / eta) + 1, dtype=torch.float64).reshape(-1, 1, 1)
    right = half / 2 * (chebyshev_nodes(degree) + 1)
    left = right.flip(0).neg()  # also descending; both panels share y = 0
    y = torch.cat([right[:-1], left])  # the shared node once, at index `degree`
    rho = apply_law(law, information(y))
    d_right, d_left = differentiation_matrix(right), differentiation_matrix(left)
    first = torch.zeros(len(y), len(y), dtype=torch.float64)
    second = torch.zeros_like(first)
    for rows, matrix in ((slice(0, degree + 1), d_right), (slice(degree, len(y)), d_left)):
        first[rows, rows] = matrix
        second[rows, rows] = matrix @ matrix
    # C^1 at y = 0: (d_right u)(0) = (d_left u)(0) gives u(0) from the other nodes.
    jump = torch.zeros(len(y), dtype=torch.float64)
    jump[: degree + 1] += d_right[-1]
    jump[degree:] -= d_left[0]
    free = [i for i in range(len(y)) if i != degree]
    extend = torch.zeros(len(y), len(free), dtype=torch.float64)
    extend[free] = torch.eye(len(free), dtype=torch.float64)
    extend[degree] = -jump[free] / jump[degree]
    # Without noise at the two ends, far in the tail, no boundary condition is needed.
    covariance = NOISE**2 * {"rho^2 Sigma": rho**2, "Sigma": torch.ones_like(rho)}[factor]
    covariance[0] = covariance[-1] = 0.0

    @cache
    def values(eta: float) -> Tensor:
        full = (-rho * y).unsqueeze(1) * first + 0.5 * eta * covariance.unsqueeze(1) * second
        inner = full[free] @ extend
        augmented = torch.zeros(len(free) + 1, len(free) + 1, dtype=torch.float64)
        augmented[:-1, :-1], augmented[:-1, -1] = inner, rho[free]
        read = torch.zeros(1, len(free) + 1, dtype=torch.float64)
        read[0, :-1] = extend[degree]
        operator = torch.linalg.matrix_exp(eta * augmented)
        return evolve(operator, _unit(len(free)), round(HORIZON / eta), read)

    return values


def kinked_law(points: int = 1200, degree: int = 64) -> list[Claim]:
    """K1 with the sharp cap and with the smooth cap."""
    rows = []
    for section, law, orders in (
        ("counterexample K1: training dwells at the cap", ExponentialLaw(ALPHA, RHO_MAX), (0.5, 1.5, 0.5)),
        ("K1 with the smooth cap", SmoothExponentialLaw(ALPHA, RHO_MAX), (1, 2, 1)),
    ):
        chain = chain_curve(law, points)
        for factor, equation, true in zip(
            ("Sigma", "rho^2 Sigma", "none"),
            ("paper (ii) with sqrt(eta), Sigma unchanged", "rho^2 Sigma", "noise-free ODE"),
            orders,
            strict=True,
        ):
            rows.append(
                Claim(section, type(law).__name__, equation, 1, true, chain, equation_curve(law, factor, degree))
            )
    return rows


def _unit(size: int) -> Tensor:
    """The zero function and, last, the constant 1 that drives the integral, [size + 1, 1]."""
    unit = torch.zeros(size + 1, 1, dtype=torch.float64)
    unit[-1] = 1.0
    return unit


def _read(size: int, index: int) -> Tensor:
    read = torch.zeros(1, size + 1, dtype=torch.float64)
    read[0, index] = 1.0
    return read


def _sum_operator(operator: Tensor, source: Tensor) -> Tensor:
    """w -> operator w + source, as one (sparse) linear map on (w, 1)."""
    size = len(source)
    full = torch.zeros(size + 1, size + 1, dtype=torch.float64)
    full[:-1, :-1], full[:-1, -1], full[-1, -1] = operator, source, 1.0
    return full.to_sparse()


def _cubic_rows(axis: Tensor, x: Tensor) -> Tensor:
    """Four-point Lagrange interpolation on a uniform axis, [len(x), len(axis)]."""
    step = float(axis[1] - axis[0])
    left = ((x - axis[0]) / step).floor().long().clamp(1, len(axis) - 3) - 1
    t = (x - axis[left]) / step
    weights = torch.stack(
        [
            -(t - 1) * (t - 2) * (t - 3) / 6,
            t * (t - 2) * (t - 3) / 2,
            -t * (t - 1) * (t - 3) / 2,
            t * (t - 1) * (t - 2) / 6,
        ],
        1,
    )
    rows = torch.zeros(len(x), len(axis), dtype=torch.float64)
    return rows.scatter_(1, left[:, None] + torch.arange(4), weights)
