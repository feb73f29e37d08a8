"""The theorem's drifts and diffusions, and the equations built from them.

    chain    theta' = theta + eta H_B,   H_B = -rho(I_B) g_B,   b = E[H_B | theta],   S = Cov(H_B | theta)

    order 1  dX = b dt                          + sqrt(eta) D^(1/2) dW       any smooth D >= 0
    order 2  dX = [b - (eta/2) (Db) b] dt       + sqrt(eta) S^(1/2) dW

The proof is in docs/THEOREM.md. Fields live at the nodes of a grid: vectors [M, d], matrices [M, d, d].
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .problem import SampleLaw
from .transfer import Grid, sde_operator


@dataclass(frozen=True)
class Equation:
    """dX = (b0 + eta b1) dt + eta^(p/2) D^(1/2) dW.

    Attributes:
        b0: leading drift, [M, d].
        diffusion: D, [M, d, d].
        b1: drift at order eta, [M, d], or None.
        noise_power: p; 1 for the mini-batch noise of SGD, 0 for a diffusion written without sqrt(eta).
    """

    b0: Tensor
    diffusion: Tensor
    b1: Tensor | None = None
    noise_power: int = 1

    def operator(self, grid: Grid, eta: float) -> Tensor:
        """The semigroup over one step, exp(eta A), [M, M]."""
        drift = self.b0 if self.b1 is None else self.b0 + eta * self.b1
        return sde_operator(grid, drift, eta**self.noise_power * self.diffusion, eta)

    def without_sqrt_eta(self) -> Equation:
        """The literal reading: D^(1/2) dW without sqrt(eta)."""
        return replace(self, noise_power=0)

    def without_noise(self) -> Equation:
        """The ODE with the same drift."""
        return replace(self, diffusion=torch.zeros_like(self.diffusion))


@dataclass(frozen=True)
class Fields:
    """Drifts and diffusions of PGPO at every node, exact by enumeration of the batch.

    Attributes:
        law: the law of one batch.
        rho: its multiplier, [M, B].
        rho_of_mean: rho(E[I]), [M].
    """

    law: SampleLaw
    rho: Tensor
    rho_of_mean: Tensor

    @property
    def grad_loss(self) -> Tensor:
        """grad L = E[g]."""
        return self.law.mean(self.law.gradient)

    @property
    def exact_drift(self) -> Tensor:
        """b = -E[rho g] = -(E[rho] grad L + Cov(rho, g))."""
        return -self.law.mean(self.rho.unsqueeze(-1) * self.law.gradient)

    @property
    def naive_drift(self) -> Tensor:
        """-rho(E[I]) grad L: the drift of the paper's SDE."""
        return -self.rho_of_mean.unsqueeze(-1) * self.grad_loss

    @property
    def product_drift(self) -> Tensor:
        """-E[rho] E[g]: the drift of a learning-rate schedule, without the same-batch covariance."""
        return -self.law.mean(self.rho).unsqueeze(-1) * self.grad_loss

    @property
    def rho_gradient_covariance(self) -> Tensor:
        """Cov(rho, g), [M, d]: what a rho from the same batch subtracts from the drift."""
        return -self.exact_drift + self.product_drift

    @property
    def unchanged_diffusion(self) -> Tensor:
        """Sigma = Cov(g)."""
        return self.law.covariance(self.law.gradient)

    @property
    def exact_diffusion(self) -> Tensor:
        """S = Cov(rho g)."""
        return self.law.covariance(self.rho.unsqueeze(-1) * self.law.gradient)


def milstein_correction(grid: Grid, b: Tensor) -> Tensor:
    """b1 = -(1/2) (Db) b, the order-2 drift."""
    return -0.5 * torch.einsum("mij,mj->mi", grid.derivative(b), b)


def gradient_correction(grid: Grid, b: Tensor) -> Tensor:
    """b1 = -(1/4) grad |b|^2 = -(1/2) (Db)^T b: equals `milstein_correction` only where b is curl-free."""
    return -0.25 * grid.derivative((b * b).sum(-1, keepdim=True)).squeeze(1)


def order_two(grid: Grid, b: Tensor, diffusion: Tensor) -> Equation:
    """dX = [b - (eta/2)(Db) b] dt + sqrt(eta) D^(1/2) dW."""
    return Equation(b, diffusion, milstein_correction(grid, b))


def with_ema_teacher(b: Tensor, diffusion: Tensor, theta: Tensor, theta_bar: Tensor, kappa: float) -> Equation:
    """Order 1 on the augmented state (theta, theta_bar), for theta_bar' = (1 - kappa eta) theta_bar + kappa eta theta'.

    dtheta = b dt + sqrt(eta) S^(1/2) dW,   dtheta_bar = kappa (theta - theta_bar) dt.   One-dimensional theta.
    """
    augmented = torch.zeros(len(b), 2, 2, dtype=torch.float64)
    augmented[:, 0, 0] = diffusion[:, 0, 0]
    return Equation(torch.cat([b, kappa * (theta - theta_bar)], 1), augmented)


def ema_correction(grid: Grid, b0: Tensor, kappa: float) -> Tensor:
    """b1 = -(1/2)(DB)B + (0, kappa b), B = (b, kappa (theta - theta_bar)).

    The last term is needed because the average reads the NEW theta.
    """
    new_theta = torch.stack([torch.zeros_like(b0[:, 0]), kappa * b0[:, 0]], 1)
    return milstein_correction(grid, b0) + new_theta
