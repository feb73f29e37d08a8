"""Further numbers: the engine against closed forms, the stationary noise floor, the batch-size sweep.

Every fact is a value and, where one exists, the closed form that it must equal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo.core import modulate

from .experiments import DECAY, HORIZON, batch_fields, fixed_teacher, line
from .problem import FEEDBACK, PHI_1, Bandit, Law, SampleLaw, TorchStep, apply_law
from .theorem import Equation, Fields, milstein_correction
from .transfer import Grid, chain_operator, evolve, multisets, stationary


@dataclass(frozen=True)
class Fact:
    """One number.

    Attributes:
        table: heading.
        name: what it is.
        value: computed here.
        expected: what it must equal, or None.
        tolerance: largest |value - expected| accepted.
    """

    table: str
    name: str
    value: float
    expected: float | None = None
    tolerance: float = 1e-9

    @property
    def holds(self) -> bool:
        return self.expected is None or abs(self.value - self.expected) <= self.tolerance


def all_facts(law: Law) -> list[Fact]:
    return [
        *engine(law),
        *noise_floor(),
        *language_floor(law),
        *batch_size(law),
        *weight_decay(),
    ]


def engine(law: Law) -> list[Fact]:
    """Check the tools on problems with closed forms."""
    table = "engine"
    grid, eta = Grid((6,), (4.0,)), 0.125
    x = grid.nodes
    ou = Equation(-x, torch.ones(len(x), 1, 1, dtype=torch.float64)).operator(grid, eta)
    start = torch.tensor([[1.0]], dtype=torch.float64)
    steps = round(HORIZON / eta)
    mean, square = evolve(ou, torch.cat([x, x**2], 1), steps, grid.rows(start))[-1, 0].tolist()
    decay = math.exp(-HORIZON)

    bandit = Bandit(PHI_1, FEEDBACK, DECAY)
    theta = line(20, 4.0).grid.nodes
    fields = batch_fields(bandit, law, theta, fixed_teacher(theta))
    closed = -fields.rho.unsqueeze(-1) * fields.law.gradient
    gaps = [
        float((TorchStep(bandit, law, lr=lr).displacement(theta, fixed_teacher(theta)) - closed).abs().max())
        for lr in (1.0, 0.125)
    ]
    return [
        Fact(table, "Ornstein-Uhlenbeck E X_T", mean, decay, 1e-12),
        Fact(table, "Ornstein-Uhlenbeck E X_T^2", square, decay**2 + eta / 2 * (1 - decay**2), 1e-12),
        Fact(table, "torch step - closed form, lr 1", gaps[0], 0.0, 1e-12),
        Fact(table, "torch step - closed form, lr 1/8", gaps[1], 0.0, 1e-12),
    ]


def _stationary_moments(grid: Grid, operator: Tensor) -> tuple[float, float]:
    """Mean and variance of the first coordinate in the stationary law."""
    theta = grid.nodes[:, 0]
    read = grid.rows(torch.zeros(1, grid.dim, dtype=torch.float64))
    mean, square = stationary(operator, torch.stack([theta, theta**2], 1), read)[0].tolist()
    return mean, square - mean**2


def noise_floor() -> list[Fact]:
    """Stationary Var/eta on the quadratic L = x^2/2, gradient noise +-1, constant rho = c, eta = 1/16.

    Here PGPO is SGD at learning rate c eta. Chain, SDEs and larger batches are compared with closed forms.
    """
    eta, grid = 2.0**-4, Grid((4,), (4.0,))
    x = grid.nodes
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    half = torch.full((len(x), 2), 0.5, dtype=torch.float64)
    one = torch.ones(len(x), 1, 1, dtype=torch.float64)

    def chain(rate: float, noise: float) -> float:
        target = (1 - eta * rate) * x.unsqueeze(1) - eta * rate * noise * signs[None, :, None]
        return _stationary_moments(grid, chain_operator(grid, half, target))[1] / eta

    def sde(c: float, variance: float, power: int = 1) -> float:
        equation = Equation(-c * x, variance * one, noise_power=power)
        return _stationary_moments(grid, equation.operator(grid, eta))[1] / eta

    facts = []
    for c in (1.0, 2.0, 3.0):
        table = f"noise floor Var/eta, quadratic, rho = {c:g}"
        sgd = c / (2 - eta * c)
        facts += [
            Fact(table, "PGPO = SGD at rho * lr", chain(c, 1.0), sgd),
            Fact(table, "SDE, rho^2 Sigma", sde(c, c**2), c / 2),
            Fact(table, "paper (ii) with sqrt(eta)", sde(c, 1.0), 1 / (2 * c)),
            Fact(table, "paper (ii) literal", sde(c, 1.0, power=0), 1 / (2 * c * eta)),
            Fact(table, "true viscosity, rho Sigma", sde(c, c), 0.5),
            Fact(table, "PGPO with batch * rho", chain(c, c**-0.5), sgd / c),
            Fact(table, "PGPO with batch * rho^2", chain(c, 1 / c), sgd / c**2),
        ]
    return facts


def language_floor(law: Law) -> list[Fact]:
    """Stationary law of the language problem at eta = 2^-7, and how a same-batch rho moves its fixed point."""
    table, eta = "stationary law, language problem, eta = 2^-7", 2.0**-7
    bandit, grid = Bandit(PHI_1, FEEDBACK, DECAY), line(40, 4.0).grid
    theta = grid.nodes
    bar = fixed_teacher(theta)
    sample = bandit.sample_law(theta, bar)
    here = theta.unsqueeze(1)

    def moments(target: Tensor, probability: Tensor = sample.probability) -> tuple[float, float]:
        mean, variance = _stationary_moments(grid, chain_operator(grid, probability, target))
        return mean, variance / eta

    def sgd(factor: float) -> tuple[float, float]:
        return moments(here + factor * eta * TorchStep(bandit, None, lr=factor * eta).displacement(theta, bar))

    def sde(b: Tensor, diffusion: Tensor) -> tuple[float, float]:
        operator = Equation(b, diffusion, milstein_correction(grid, b)).operator(grid, eta)
        mean, variance = _stationary_moments(grid, operator)
        return mean, variance / eta

    constant = TorchStep(bandit, lambda _: 2.0).displacement(theta, bar)
    coin = torch.cat([here - eta * rho * sample.gradient for rho in (1.0, 3.0)], 1)
    same_batch = batch_fields(bandit, law, theta, bar)
    grad, sigma = sample.mean(sample.gradient), sample.covariance(sample.gradient)
    doubled = sgd(2.0)
    pgpo = moments(here + eta * TorchStep(bandit, law).displacement(theta, bar))

    # L = theta^2/2, g = theta -+ 1 with probability 1/2, rho_i = exp(alpha I_i): for every eta the mean is a tanh.
    small, rhos = Grid((4,), (4.0,)), torch.tensor([math.exp(0.5), math.exp(-0.2)], dtype=torch.float64)
    x = small.nodes.unsqueeze(1)
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)[None, :, None]
    half = torch.full((len(small.nodes), 2), 0.5, dtype=torch.float64)
    two_point = chain_operator(small, half, x - eta * rhos[None, :, None] * (x - signs))

    tilt = "fixed point moved by Cov(rho, g)"
    return [
        Fact(table, "Var/eta, SGD", sgd(1.0)[1]),
        Fact(table, "Var/eta, PGPO rho = 2", moments(here + eta * constant)[1], doubled[1]),
        Fact(table, "Var/eta, SGD at 2 lr", doubled[1]),
        Fact(table, "Var/eta, SDE order 2, rho^2 Sigma", sde(-2 * grad, 4 * sigma)[1]),
        Fact(table, "Var/eta, SDE order 2, Sigma unchanged", sde(-2 * grad, sigma)[1]),
        Fact(table, "Var/eta, rho in {1, 3} by a fair coin", moments(coin, sample.probability.repeat(1, 2) / 2)[1]),
        Fact(table, "Var/eta, SGD at lr E[rho^2]/E[rho] = 2.5 lr", sgd(2.5)[1]),
        Fact(tilt, "stationary mean, SGD", sgd(1.0)[0]),
        Fact(tilt, "stationary mean, PGPO, same-batch rho", pgpo[0]),
        Fact(tilt, "stationary mean, THEOREM order 2", sde(same_batch.exact_drift, same_batch.exact_diffusion)[0]),
        Fact(tilt, "stationary mean, -rho(EI) grad L", sde(same_batch.naive_drift, sigma)[0]),
        Fact(tilt, "two-point example, tanh(alpha (I1 - I2)/2)", _stationary_moments(small, two_point)[0],
             math.tanh(0.35)),
    ]  # fmt: skip


def prompt_law(bandit: Bandit, theta: Tensor) -> SampleLaw:
    """One sample = one prompt with the exact token expectation of its gradient."""
    sample = bandit.sample_law(theta, fixed_teacher(theta))
    shape = (len(theta), bandit.phi.shape[0], bandit.phi.shape[1])
    weight = sample.probability.reshape(shape)
    gradient = (weight.unsqueeze(-1) * sample.gradient.reshape(*shape, -1)).sum(2) / weight.sum(2).unsqueeze(-1)
    return SampleLaw(weight.sum(2), gradient, sample.information.reshape(shape)[..., 0])


def batch_law(single: SampleLaw, size: int) -> SampleLaw:
    """Batches of `size` independent samples, as multisets."""
    sets, counts = multisets(single.probability.shape[1], size)
    index = torch.tensor(sets)
    return SampleLaw(
        counts * single.probability[:, index].prod(-1),
        single.gradient[:, index].mean(2),
        single.information[:, index].mean(-1),
    )


def delta_drift(single: SampleLaw, law: Law, size: int, step: float = 1e-3) -> Tensor:
    """-rho(EI) grad L with both O(1/m) terms: rho' Cov(I, g)/m and rho'' Var(I) grad L/(2m).

    Derivatives of the law by central differences.
    """
    mean = single.mean(single.information)
    middle, up, down = (apply_law(law, mean + shift) for shift in (0.0, step, -step))
    slope, bend = (up - down) / (2 * step), (up - 2 * middle + down) / step**2
    centred = single.information - mean.unsqueeze(1)
    grad = single.mean(single.gradient)
    covariance = single.mean(centred.unsqueeze(-1) * single.gradient)
    spread = single.mean(centred**2)
    rho = middle + bend * spread / (2 * size)
    return -(rho.unsqueeze(-1) * grad + slope.unsqueeze(-1) * covariance / size)


def batch_size(law: Law) -> list[Fact]:
    """Error at eta -> 0 of drifts that ignore the same-batch covariance, against the batch size m."""
    bandit, bench = Bandit(PHI_1, FEEDBACK, DECAY), line(28, 3.0)
    single = prompt_law(bandit, bench.grid.nodes)
    read, facts = bench.grid.rows(bench.starts), []

    def limit(error: Callable[[float], Tensor]) -> float:
        """a0 of a0 + a1 eta + a2 eta^2 by Richardson extrapolation."""
        fine, middle, coarse = error(2.0**-7), error(2.0**-6), error(2.0**-5)
        return float(((8 * fine - 6 * middle + coarse) / 3).abs().max())

    def endpoint(operator: Tensor, eta: float) -> Tensor:
        return evolve(operator, bench.functions, round(HORIZON / eta), read)[-1]

    sizes = (1, 2, 4, 8, 16, 32)
    biases: dict[str, list[float]] = {"-rho(EI) grad L": [], "both 1/m terms added": []}
    for size in sizes:
        batch = batch_law(single, size)
        rho = apply_law(law, batch.information)
        fields = Fields(batch, rho, apply_law(law, batch.mean(batch.information)))
        h = -rho.unsqueeze(-1) * batch.gradient
        chains = {
            eta: endpoint(chain_operator(bench.grid, batch.probability, bench.grid.nodes.unsqueeze(1) + eta * h), eta)
            for eta in (2.0**-5, 2.0**-6, 2.0**-7)
        }
        for name, drift in (
            ("-rho(EI) grad L", fields.naive_drift),
            ("both 1/m terms added", delta_drift(single, law, size)),
        ):
            equation = Equation(drift, fields.exact_diffusion)
            biases[name].append(
                limit(lambda eta, e=equation, c=chains: c[eta] - endpoint(e.operator(bench.grid, eta), eta))  # type: ignore[misc]
            )
    for name, values in biases.items():
        table = f"error at eta -> 0 against batch size m: {name}"
        facts += [Fact(table, f"m = {size}", value) for size, value in zip(sizes, values, strict=True)]
        facts.append(Fact(table, "slope in m, last pair", math.log2(values[-1] / values[-2])))
    return facts


def weight_decay() -> list[Fact]:
    """A weight of 1 after 1000 AdamW steps without gradient: lr 1e-3, decay 0.1, rho = 2."""
    table, lr, decay, steps = "decoupled weight decay, 1000 AdamW steps, rho = 2", 1e-3, 0.1, 1000

    def left(rho: float, mode: str) -> float:
        weight = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        optimizer = torch.optim.AdamW([weight], lr=lr, weight_decay=decay)
        handle = modulate(optimizer, weight_decay=mode)
        weight.grad = torch.zeros_like(weight)
        for _ in range(steps):
            handle.arm(rho)
            optimizer.step()
        return weight.item()

    plain = (1 - lr * decay) ** steps
    return [
        Fact(table, "unmodulated", left(1.0, "scaled"), plain),
        Fact(table, 'weight_decay="scaled"', left(2.0, "scaled"), (1 - 2 * lr * decay) ** steps),
        Fact(table, 'weight_decay="fixed"', left(2.0, "fixed"), plain),
    ]
