"""The rows: a chain, an equation claimed to approximate it, the claimed order and the theorem's order.

A curve maps eta to E_x g(state after k steps) for k = 0..T/eta, every start x and every test function g,
[T/eta + 1, X, G]. The first two test functions are theta and theta^2 (variance rows use them).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pgpo.core import ExponentialLaw, SmoothExponentialLaw

from .problem import FEEDBACK, PHI_1, PHI_2, Bandit, Law, SampleLaw, TorchStep, apply_law
from .theorem import (
    Equation,
    Fields,
    ema_correction,
    gradient_correction,
    milstein_correction,
    order_two,
    with_ema_teacher,
)
from .transfer import Grid, chain_operator, evolve

Curve = Callable[[float], Tensor]

HORIZON = 2.0
# alpha: the paper's middle value. Cap 6.0 (ours): above exp(alpha * I) on every box, so that rho is smooth; separate
# rows test the kink of the cap.
DEFAULT_LAW = ExponentialLaw(alpha=1.0, rho_max=6.0)
DECAY = 0.5
TEACHER = 0.5  # weights of the fixed teacher, every component
KAPPA = 1.0  # EMA rate per unit time: theta_bar closes kappa * eta of the gap per step
BETA = 0.5  # momentum


@dataclass(frozen=True)
class Claim:
    """A row of the table: an equation claimed to approximate a chain to some order.

    Attributes:
        section: heading of the table.
        chain: name of the chain.
        equation: name of the equation.
        claimed: claimed order; None for an equation that nobody claims and that must fail.
        true: order by the theorem.
        left: curve of the chain.
        right: curve of the equation.
        moment: "mean" compares E g, "variance" compares Var theta.
    """

    section: str
    chain: str
    equation: str
    claimed: float | None
    true: float
    left: Curve
    right: Curve
    moment: str = "mean"


def observables(theta: Tensor) -> Tensor:
    """theta, theta^2, cos theta of the first component [M]; [M, 3]."""
    return torch.stack([theta, theta**2, theta.cos()], 1)


def curve(grid: Grid, starts: Tensor, functions: Tensor, operator: Callable[[float], Tensor]) -> Curve:
    """The curve of a one-step operator eta -> [M, M]; starts [X, d], functions [M, G]."""
    read = grid.rows(starts)

    @cache
    def values(eta: float) -> Tensor:
        return evolve(operator(eta), functions, round(HORIZON / eta), read)

    return values


@dataclass(frozen=True)
class Bench:
    """A grid, starting points and test functions, from which it makes curves of chains and equations."""

    grid: Grid
    starts: Tensor
    functions: Tensor

    def chain(self, probability: Tensor, displacement: Tensor) -> Curve:
        """theta' = theta + eta H_B."""
        return self.moving(probability, lambda eta: self.grid.nodes.unsqueeze(1) + eta * displacement)

    def moving(self, probability: Tensor, target: Callable[[float], Tensor]) -> Curve:
        """Any chain: state m moves to target(eta)[m, B]."""
        return curve(
            self.grid, self.starts, self.functions, lambda eta: chain_operator(self.grid, probability, target(eta))
        )

    def equation(self, equation: Equation) -> Curve:
        return curve(self.grid, self.starts, self.functions, lambda eta: equation.operator(self.grid, eta))


def line(degree: int, radius: float) -> Bench:
    """One dimension."""
    grid = Grid((degree,), (radius,))
    starts = torch.tensor([[-0.7], [1.0]], dtype=torch.float64)
    return Bench(grid, starts, observables(grid.nodes[:, 0]))


def plane(
    degree: tuple[int, int], radius: tuple[float, float], starts: list[list[float]], **box: tuple[float, float]
) -> Bench:
    """Two dimensions, test functions of the first coordinate."""
    grid = Grid(degree, radius, **box)
    return Bench(grid, torch.tensor(starts, dtype=torch.float64), observables(grid.nodes[:, 0]))


def fixed_teacher(theta: Tensor) -> Tensor:
    return torch.full_like(theta, TEACHER)


def batch_fields(bandit: Bandit, law: Law, theta: Tensor, theta_bar: Tensor) -> Fields:
    """rho from the same one-sample batch, as in the method."""
    sample = bandit.sample_law(theta, theta_bar)
    return Fields(sample, apply_law(law, sample.information), apply_law(law, sample.mean(sample.information)))


def shared_fields(bandit: Bandit, law: Law, theta: Tensor, theta_bar: Tensor) -> Fields:
    """rho from all prompts: a function of the state, independent of the batch."""
    sample = bandit.sample_law(theta, theta_bar)
    rho = apply_law(law, sample.mean(sample.information))
    return Fields(sample, rho.unsqueeze(1).expand_as(sample.information), rho)


def one_dimensional(
    law: Law, degree: int = 40, radius: float = 4.0, wild: tuple[int, float] = (20, 3.0)
) -> list[Claim]:
    """Vanilla SGD and PGPO with batch-independent and same-batch rho. `wild` is the grid of O(1) noise."""
    bandit = Bandit(PHI_1, FEEDBACK, DECAY)
    return [
        *_vanilla(bandit, line(degree, radius), line(*wild)),
        *_shared(bandit, law, line(degree, radius), line(*wild)),
        *_same_batch(bandit, law, line(degree, radius), line(*wild)),
        *_self_teacher(bandit, law, line(degree, radius)),
    ]


def _vanilla(bandit: Bandit, bench: Bench, wild: Bench) -> list[Claim]:
    name = "vanilla SGD"

    def parts(bench: Bench) -> tuple[Curve, Tensor, Tensor]:
        theta = bench.grid.nodes
        sample = bandit.sample_law(theta, fixed_teacher(theta))
        step = TorchStep(bandit, None)
        chain = bench.chain(sample.probability, step.displacement(theta, fixed_teacher(theta)))
        return chain, -sample.mean(sample.gradient), sample.covariance(sample.gradient)

    chain, b, sigma = parts(bench)
    wild_chain, wild_b, wild_sigma = parts(wild)
    literal = Equation(wild_b, wild_sigma).without_sqrt_eta()
    first = Equation(b, sigma)
    return [
        Claim(name, name, "paper (i) literal: Sigma^1/2, no sqrt(eta)", 1, 0, wild_chain, wild.equation(literal)),
        Claim(name, name, "paper (i) with sqrt(eta)", 1, 1, chain, bench.equation(first)),
        Claim(name, name, "noise-free ODE", 1, 1, chain, bench.equation(first.without_noise())),
        Claim(
            name, name, "order 2: b - (eta/2)(Db)b, Sigma", 2, 2, chain, bench.equation(order_two(bench.grid, b, sigma))
        ),
    ]


def _shared(bandit: Bandit, law: Law, bench: Bench, wild: Bench) -> list[Claim]:
    name = "rho batch-independent"

    def parts(bench: Bench) -> tuple[Tensor, Tensor, Fields]:
        theta = bench.grid.nodes
        fields = shared_fields(bandit, law, theta, fixed_teacher(theta))
        return (
            fields.law.probability,
            TorchStep(bandit, law, scope="all").displacement(theta, fixed_teacher(theta)),
            fields,
        )

    p, h, f = parts(bench)
    wild_p, wild_h, wild_f = parts(wild)
    chain, wild_chain = bench.chain(p, h), wild.chain(wild_p, wild_h)
    b, sigma, s, grid = f.exact_drift, f.unchanged_diffusion, f.exact_diffusion, bench.grid
    wild_b, wild_sigma, wild_s = wild_f.exact_drift, wild_f.unchanged_diffusion, wild_f.exact_diffusion

    # Reading (b): the noise of one step is O(eta^-1/2), so that the diffusion is leading order. The mini-batch's own
    # noise is skewed, which costs half an order: eta^(3/2) E[noise^3] u_xxx / 6 per step. A fair sign of the same
    # variance has no third moment.
    here, mean = wild.grid.nodes.unsqueeze(1), wild_b.unsqueeze(1)
    skewed = wild.moving(wild_p, lambda eta: here + eta * mean + eta**0.5 * (wild_h - mean))
    size = wild_s[:, :, 0].sqrt()
    signs = torch.stack([size, -size], 1)
    even = wild.moving(torch.full_like(signs[..., 0], 0.5), lambda eta: here + eta * mean + eta**0.5 * signs)
    literal = wild.equation(Equation(wild_b, wild_sigma).without_sqrt_eta())
    modulated = wild.equation(Equation(wild_b, wild_s).without_sqrt_eta())
    unchanged = bench.equation(Equation(b, sigma))
    exact = bench.equation(Equation(b, s))
    return [
        Claim(name, name, "paper (ii) literal: no sqrt(eta)", 1, 0, wild_chain, literal),
        Claim(name, name, "paper (ii) with sqrt(eta), Sigma unchanged", 1, 1, chain, unchanged),
        Claim(name, name, "rho^2 Sigma", 1, 1, chain, exact),
        Claim(name, name, "rho dropped", None, 0, chain, bench.equation(Equation(-f.grad_loss, sigma))),
        Claim(name, name, "order 2, rho^2 Sigma", 2, 2, chain, bench.equation(order_two(grid, b, s))),
        Claim(name, name, "order-2 drift, Sigma unchanged", 2, 1, chain, bench.equation(order_two(grid, b, sigma))),
        Claim(name, name, "variance, Sigma unchanged", 2, 1, chain, unchanged, "variance"),
        Claim(name, name, "variance, rho^2 Sigma", 2, 2, chain, exact, "variance"),
        Claim(name, "noise of size eta^-1/2", "paper (ii) literal", 1, 0, skewed, literal),
        Claim(name, "noise of size eta^-1/2", "rho^2 Sigma", 1, 0.5, skewed, modulated),
        Claim(name, "the same, symmetric noise", "paper (ii) literal", 1, 0, even, literal),
        Claim(name, "the same, symmetric noise", "rho^2 Sigma", 1, 1, even, modulated),
    ]


def _same_batch(bandit: Bandit, law: Law, bench: Bench, wild: Bench) -> list[Claim]:
    name = "rho from the same batch"

    def parts(bench: Bench) -> tuple[Curve, Fields]:
        theta = bench.grid.nodes
        fields = batch_fields(bandit, law, theta, fixed_teacher(theta))
        h = TorchStep(bandit, law).displacement(theta, fixed_teacher(theta))
        return bench.chain(fields.law.probability, h), fields

    chain, f = parts(bench)
    wild_chain, wild_f = parts(wild)
    literal = Equation(wild_f.naive_drift, wild_f.unchanged_diffusion).without_sqrt_eta()
    b, sigma, s, grid = f.exact_drift, f.unchanged_diffusion, f.exact_diffusion, bench.grid
    unchanged, exact = bench.equation(Equation(b, sigma)), bench.equation(Equation(b, s))
    return [
        Claim(name, name, "paper (ii) literal: no sqrt(eta)", 1, 0, wild_chain, wild.equation(literal)),
        Claim(
            name,
            name,
            "paper (ii) with sqrt(eta): -rho(EI) grad L",
            1,
            0,
            chain,
            bench.equation(Equation(f.naive_drift, sigma)),
        ),
        Claim(name, name, "-E[rho] E[g]", 1, 0, chain, bench.equation(Equation(f.product_drift, s))),
        Claim(name, name, "-E[rho g], Sigma unchanged", 1, 1, chain, unchanged),
        Claim(name, name, "-E[rho g], noise-free", 1, 1, chain, bench.equation(Equation(b, s).without_noise())),
        Claim(name, name, "THEOREM order 1: -E[rho g], Cov(rho g)", 1, 1, chain, exact),
        Claim(
            name,
            name,
            "THEOREM order 2: b - (eta/2)(Db)b, Cov(rho g)",
            2,
            2,
            chain,
            bench.equation(order_two(grid, b, s)),
        ),
        Claim(name, name, "order-2 drift, Sigma unchanged", 2, 1, chain, bench.equation(order_two(grid, b, sigma))),
        Claim(name, name, "variance, Sigma unchanged", 2, 1, chain, unchanged, "variance"),
        Claim(name, name, "variance, Cov(rho g)", 2, 2, chain, exact, "variance"),
    ]


def _self_teacher(bandit: Bandit, law: Law, bench: Bench) -> list[Claim]:
    name = "self-teacher theta_bar = theta"
    theta = bench.grid.nodes
    f = batch_fields(bandit, law, theta, theta)
    chain = bench.chain(f.law.probability, TorchStep(bandit, law).displacement(theta, theta))
    b, s = f.exact_drift, f.exact_diffusion
    naive = Equation(f.naive_drift, f.unchanged_diffusion)
    return [
        Claim(name, name, "-rho(EI) grad L", 1, 0, chain, bench.equation(naive)),
        Claim(name, name, "-E[rho g], Cov(rho g)", 1, 1, chain, bench.equation(Equation(b, s))),
        Claim(name, name, "order 2", 2, 2, chain, bench.equation(order_two(bench.grid, b, s))),
    ]


def two_dimensional(law: Law, degree: int = 18, radius: float = 2.0) -> list[Claim]:
    """theta in R^2: rho grad L has curl, so (eta/4) grad |b|^2 is not (eta/2)(Db)b."""
    name = "two dimensions, rho batch-independent"
    bandit = Bandit(PHI_2, FEEDBACK, DECAY)
    bench = plane((degree, degree), (radius, radius), [[0.3, -1.3], [1.0, -0.9]])
    theta = bench.grid.nodes
    f = shared_fields(bandit, law, theta, fixed_teacher(theta))
    chain = bench.chain(
        f.law.probability, TorchStep(bandit, law, scope="all").displacement(theta, fixed_teacher(theta))
    )
    b, s, grid = f.exact_drift, f.exact_diffusion, bench.grid
    return [
        Claim(name, name, "order 1, rho^2 Sigma", 1, 1, chain, bench.equation(Equation(b, s))),
        Claim(name, name, "order 2 with (eta/2)(Db)b", 2, 2, chain, bench.equation(order_two(grid, b, s))),
        Claim(name, name, "'order 2' with (eta/4) grad|b|^2", 2, 1, chain,
            bench.equation(Equation(b, s, gradient_correction(grid, b)))),
    ]  # fmt: skip


def ema_teacher(law: Law, degree: int = 18, radius: float = 2.0) -> list[Claim]:
    """State (theta, theta_bar), theta_bar' = (1 - kappa eta) theta_bar + kappa eta theta'."""
    name = "EMA teacher, kappa = 1"
    bandit = Bandit(PHI_1, FEEDBACK, DECAY)
    bench = plane((degree, degree), (radius, radius), [[-0.7, 0.6], [1.0, -0.5]])
    theta, theta_bar = bench.grid.nodes[:, :1], bench.grid.nodes[:, 1:]
    f = batch_fields(bandit, law, theta, theta_bar)
    h = TorchStep(bandit, law).displacement(theta, theta_bar)

    def target(eta: float) -> Tensor:
        moved = theta.unsqueeze(1) + eta * h
        return torch.cat([moved, theta_bar.unsqueeze(1) + KAPPA * eta * (moved - theta_bar.unsqueeze(1))], -1)

    chain = bench.moving(f.law.probability, target)
    first = with_ema_teacher(f.exact_drift, f.exact_diffusion, theta, theta_bar, KAPPA)
    frozen = with_ema_teacher(f.exact_drift, f.exact_diffusion, theta, theta_bar, 0.0)
    live = batch_fields(bandit, law, theta, theta)
    instant = with_ema_teacher(live.exact_drift, live.exact_diffusion, theta, theta_bar, KAPPA)
    ema, plain = ema_correction(bench.grid, first.b0, KAPPA), milstein_correction(bench.grid, first.b0)
    return [
        Claim(name, name, "teacher frozen", None, 0, chain, bench.equation(frozen)),
        Claim(name, name, "teacher = student at once", None, 0, chain, bench.equation(instant)),
        Claim(name, name, "order 1 on (theta, theta_bar)", 1, 1, chain, bench.equation(first)),
        Claim(name, name, "order 2 on (theta, theta_bar)", 2, 2, chain,
            bench.equation(Equation(first.b0, first.diffusion, ema))),
        Claim(name, name, "order 2 without kappa b", 2, 1, chain,
            bench.equation(Equation(first.b0, first.diffusion, plain))),
    ]  # fmt: skip


def remedies(law: Law, degree: int = 28, radius: float = 3.0, fast_degree: int = 16) -> list[Claim]:
    """The remedies that the theory suggests (cross-fitting, lagged information), and momentum."""
    bandit = Bandit(PHI_1, FEEDBACK, DECAY)
    bench = line(degree, radius)
    theta = bench.grid.nodes
    f = batch_fields(bandit, law, theta, fixed_teacher(theta))
    return [
        *_cross_fit(bandit, law, bench, f),
        *_lagged(bandit, law, bench, f, (degree, fast_degree), radius),
        *_momentum(bandit, law, bench, f, (degree, fast_degree - 4), radius),
    ]


def cross_fit_displacement(law: SampleLaw, rho: Tensor) -> tuple[Tensor, Tensor]:
    """H = -(1/2)[rho(I_A) g_B + rho(I_B) g_A] for half-batches A, B of one sample; (probability, H), [M, B^2(, d)].

    The closed form of what `pgpo.core.CrossFit` does; A is the first index.
    """
    probability = (law.probability[:, :, None] * law.probability[:, None, :]).flatten(1)
    crossed = rho[:, :, None, None] * law.gradient[:, None, :, :]
    return probability, -0.5 * (crossed + crossed.transpose(1, 2)).flatten(1, 2)


def _cross_fit(bandit: Bandit, law: Law, bench: Bench, f: Fields) -> list[Claim]:
    name = "remedy: cross-fitting"
    theta = bench.grid.nodes
    probability, h = cross_fit_displacement(f.law, f.rho)
    real = TorchStep(bandit, law, scope="cross_fit").displacement(theta, fixed_teacher(theta))
    chain = bench.chain(probability, real)
    pairs = SampleLaw(probability, h, torch.zeros_like(probability))
    b, s = f.product_drift, pairs.covariance(h)
    crossed = "rho of one half-batch on the other"
    return [
        Claim(name, crossed, "-E[rho] grad L", 1, 1, chain, bench.equation(Equation(b, s))),
        Claim(name, crossed, "order 2", 2, 2, chain, bench.equation(order_two(bench.grid, b, s))),
        Claim(name, "rho of one half-batch on the other", "-E[rho g]", None, 0, chain,
            bench.equation(Equation(f.exact_drift, s))),
    ]  # fmt: skip


def _lagged(bandit: Bandit, law: Law, bench: Bench, f: Fields, degree: tuple[int, int], radius: float) -> list[Claim]:
    """State (theta, r), r = information of the last batch: theta' = theta - eta rho(r) g_B, r' = I_B(theta)."""
    name = "remedy: lagged information"
    low, high = float(f.law.information.min()), float(f.law.information.max())
    wide = plane(degree, (radius, 0.55 * (high - low)), [[-0.7, 0.0], [1.0, 0.0]], center=(0.0, (low + high) / 2))
    theta, last = wide.grid.nodes[:, :1], wide.grid.nodes[:, 1]
    sample = bandit.sample_law(theta, fixed_teacher(theta))
    step, remembered = TorchStep(bandit, law, scope="lagged").lagged(theta, fixed_teacher(theta), last)

    def target(eta: float) -> Tensor:
        return torch.cat([theta.unsqueeze(1) + eta * step, remembered.unsqueeze(-1)], -1)

    chain = wide.moving(sample.probability, target)
    s = f.exact_diffusion
    return [
        Claim(name, "rho of the previous batch", "-E[rho] grad L", 1, 1, chain,
            bench.equation(Equation(f.product_drift, s))),
        Claim(name, "rho of the previous batch", "-E[rho g]", None, 0, chain,
            bench.equation(Equation(f.exact_drift, s))),
    ]  # fmt: skip


def _momentum(bandit: Bandit, law: Law, bench: Bench, f: Fields, degree: tuple[int, int], radius: float) -> list[Claim]:
    """State (theta, m): m' = beta m + (1 - beta) g_B, theta' = theta - eta rho_B m' (rho on the final update)."""
    name = "momentum 0.5, rho on the final update"
    low, high = float(f.law.gradient.min()), float(f.law.gradient.max())
    wide = plane(degree, (radius, 0.5 * (high - low)), [[-0.7, 0.0], [1.0, 0.0]], center=(0.0, (low + high) / 2))
    theta, m = wide.grid.nodes[:, :1], wide.grid.nodes[:, 1:]
    sample = bandit.sample_law(theta, fixed_teacher(theta))
    rho = apply_law(law, sample.information)
    moved = BETA * m.unsqueeze(1) + (1 - BETA) * sample.gradient

    def target(eta: float) -> Tensor:
        return torch.cat([theta.unsqueeze(1) - eta * rho.unsqueeze(-1) * moved, moved], -1)

    chain = wide.moving(sample.probability, target)
    s = f.exact_diffusion
    shrunk = f.product_drift - (1 - BETA) * f.rho_gradient_covariance
    return [
        Claim(name, name, "-rho(EI) grad L", 1, 0, chain, bench.equation(Equation(f.naive_drift, s))),
        Claim(name, name, "-E[rho g]", None, 0, chain, bench.equation(Equation(f.exact_drift, s))),
        Claim(name, name, "-(E[rho] grad L + (1-beta) Cov(rho,g))", 1, 1, chain, bench.equation(Equation(shrunk, s))),
    ]


def smooth_cap(degree: int = 56, radius: float = 3.0) -> list[Claim]:
    """SmoothExponentialLaw with a cap that acts inside the box: capped, and smooth as the theorem needs."""
    name = "remedy: smooth cap"
    law = SmoothExponentialLaw(alpha=1.0, rho_max=1.5)
    bandit = Bandit(PHI_1, FEEDBACK, DECAY)
    bench = line(degree, radius)
    theta = bench.grid.nodes
    f = batch_fields(bandit, law, theta, fixed_teacher(theta))
    chain = bench.chain(f.law.probability, TorchStep(bandit, law).displacement(theta, fixed_teacher(theta)))
    b, s = f.exact_drift, f.exact_diffusion
    return [
        Claim(name, "smooth cap at 1.5", "-E[rho g], Cov(rho g)", 1, 1, chain, bench.equation(Equation(b, s))),
        Claim(name, "smooth cap at 1.5", "order 2", 2, 2, chain, bench.equation(order_two(bench.grid, b, s))),
    ]
