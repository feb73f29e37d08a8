"""Chain and SDE as operators on functions, without sampling.

    chain   (P u)(x) = sum_B p_B(x) u(x + eta H_B(x))          E_x g(theta_k) = (P^k g)(x)
    SDE     A u = b . grad u + (1/2) C : hess u                E_x g(X_{k eta}) = (exp(eta A)^k g)(x)

Functions live on a Chebyshev tensor grid (Trefethen, Spectral Methods in MATLAB, ch. 6): P interpolates, A
differentiates. No boundary condition is imposed: on a box where the drift points inward and the noise is small the
solution is smooth up to the boundary, and both operators are exact on polynomials when b and H are affine.
Everything is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

# An expectation of g is at most max |g|; rounding and extrapolation at the corners of the box add a little (ours).
BLOW_UP = 50.0


class Unresolved(ArithmeticError):
    """The grid does not resolve this problem: a blow-up, or two grids that disagree."""


@dataclass(frozen=True)
class Grid:
    """Chebyshev tensor grid: n[i] + 1 nodes on center[i] + [-radius[i], radius[i]] in dimension i.

    Attributes:
        n: polynomial degree per dimension.
        radius: half width per dimension.
        center: middle of the box per dimension, default the origin.
    """

    n: tuple[int, ...]
    radius: tuple[float, ...]
    center: tuple[float, ...] = ()

    @property
    def dim(self) -> int:
        return len(self.n)

    @cached_property
    def axes(self) -> list[Tensor]:
        """Nodes per dimension, [n_i + 1] each, descending."""
        center = self.center or (0.0,) * self.dim
        return [c + r * chebyshev_nodes(n) for n, r, c in zip(self.n, self.radius, center, strict=True)]

    @cached_property
    def nodes(self) -> Tensor:
        """All nodes, [M, d]; the last dimension varies fastest."""
        return torch.cartesian_prod(*self.axes).reshape(-1, self.dim)

    @cached_property
    def gradient(self) -> Tensor:
        """Differentiation matrices d/dx_i, [d, M, M]."""
        matrices = []
        for i, axis in enumerate(self.axes):
            factors = [torch.eye(len(a), dtype=torch.float64) for a in self.axes]
            factors[i] = differentiation_matrix(axis)
            product = factors[0]
            for factor in factors[1:]:
                product = torch.kron(product, factor)
            matrices.append(product)
        return torch.stack(matrices)

    def rows(self, points: Tensor) -> Tensor:
        """Interpolation rows: rows(points [..., d]) @ u [M] = u(points), [..., M]."""
        product: Tensor | None = None
        for i, axis in enumerate(self.axes):
            factor = interpolation_rows(axis, points[..., i])
            product = factor if product is None else (product.unsqueeze(-1) * factor.unsqueeze(-2)).flatten(-2)
        assert product is not None
        return product

    def derivative(self, field: Tensor) -> Tensor:
        """Jacobian of a vector field [M, c] at the nodes: J[m, c, i] = d field_c / dx_i."""
        return torch.einsum("imn,nc->mci", self.gradient, field)


def chebyshev_nodes(n: int) -> Tensor:
    """cos(j pi / n), j = 0..n."""
    return torch.cos(torch.arange(n + 1, dtype=torch.float64) * (math.pi / n))


def barycentric_weights(n: int) -> Tensor:
    """(-1)^j, halved at the ends: weights of the n + 1 Chebyshev nodes (Berrut & Trefethen 2004, Eq. 5.4)."""
    weights = torch.ones(n + 1, dtype=torch.float64)
    weights[1::2] = -1.0
    weights[0] /= 2
    weights[-1] /= 2
    return weights


def interpolation_rows(axis: Tensor, x: Tensor) -> Tensor:
    """Barycentric interpolation from the Chebyshev nodes `axis` [n + 1] to x [...]; returns [..., n + 1]."""
    difference = x.unsqueeze(-1) - axis
    hit = difference == 0
    quotient = barycentric_weights(len(axis) - 1) / difference.masked_fill(hit, 1.0)
    rows = quotient / quotient.sum(-1, keepdim=True)
    return torch.where(hit.any(-1, keepdim=True), hit.to(torch.float64), rows)


def differentiation_matrix(axis: Tensor) -> Tensor:
    """Derivative at the Chebyshev nodes `axis` [n + 1] of their interpolant; rows sum to zero exactly."""
    weights = barycentric_weights(len(axis) - 1)
    difference = axis[:, None] - axis[None, :] + torch.eye(len(axis), dtype=torch.float64)
    matrix = (weights[None, :] / weights[:, None]) / difference
    matrix.fill_diagonal_(0.0)
    return matrix - torch.diag(matrix.sum(1))


def chain_operator(grid: Grid, probability: Tensor, target: Tensor) -> Tensor:
    """P [M, M] of the chain that moves node m to target[m, B] [M, B, d] with probability[m, B] [M, B]."""
    operator: Tensor = torch.einsum("mb,mbn->mn", probability, grid.rows(target))
    return operator


def generator(grid: Grid, drift: Tensor, covariance: Tensor) -> Tensor:
    """A = b . grad + (1/2) C : hess, [M, M]; drift b [M, d], covariance per unit time C [M, d, d]."""
    matrix = torch.einsum("mi,imn->mn", drift, grid.gradient)
    for i in range(grid.dim):
        for j in range(grid.dim):
            if covariance[:, i, j].any():
                matrix = matrix + 0.5 * covariance[:, i, j, None] * (grid.gradient[i] @ grid.gradient[j])
    return matrix


def sde_operator(grid: Grid, drift: Tensor, covariance: Tensor, eta: float) -> Tensor:
    """exp(eta A), [M, M]: the SDE over one step of length eta."""
    return torch.linalg.matrix_exp(eta * generator(grid, drift, covariance))


def evolve(operator: Tensor, initial: Tensor, steps: int, read: Tensor) -> Tensor:
    """read @ operator^k @ initial for k = 0..steps.

    Args:
        operator: [M, M].
        initial: test functions at the nodes, [M, G].
        steps: number of applications.
        read: interpolation rows of the starting points, [X, M].

    Returns:
        [steps + 1, X, G].

    Raises:
        Unresolved: the values leave BLOW_UP * max |initial| or are not finite.
    """
    # read P^(i n + j) u_0 = (read P^j)(P^n)^i u_0: about 2 sqrt(steps) products instead of `steps`.
    stride = 1 if operator.is_sparse else 2 ** (steps.bit_length() // 2)
    giant = operator if stride == 1 else torch.linalg.matrix_power(operator, stride)
    rows, columns = [read], [initial]
    for _ in range(stride - 1):
        rows.append(rows[-1] @ operator)
    for _ in range(steps // stride):
        columns.append(giant @ columns[-1])
    u = torch.stack(columns)
    curve = torch.einsum("jxm,img->ijxg", torch.stack(rows), u).flatten(0, 1)[: steps + 1]
    largest = max(float(u.abs().max()), float(curve.abs().max()))
    if not largest <= BLOW_UP * float(initial.abs().max()):
        raise Unresolved(f"|u| grew to {largest:.1e} within {steps} steps")
    return curve


def stationary(operator: Tensor, functions: Tensor, read: Tensor, doublings: int = 30) -> Tensor:
    """lim_k read @ operator^k @ functions by repeated squaring (2^doublings steps): stationary expectations, [X, G]."""
    power = operator
    for _ in range(doublings):
        power = power @ power
        power = power / power.sum(1, keepdim=True)  # a Markov operator preserves constants; rounding would grow
    return read @ (power @ functions)


def multisets(size: int, draws: int) -> tuple[list[Sequence[int]], Tensor]:
    """Batches of `draws` items out of `size`, order ignored: the multisets [K] and their multinomial counts [K]."""
    from itertools import combinations_with_replacement

    sets = list(combinations_with_replacement(range(size), draws))
    counts = [math.factorial(draws) // math.prod(math.factorial(s.count(i)) for i in set(s)) for s in sets]
    return [list(s) for s in sets], torch.tensor(counts, dtype=torch.float64)
