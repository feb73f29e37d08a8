"""Measured trust on the bench: what K estimates, when a step brings the student nearer, when the teacher runs away.

    rows     K / eta^2 against u F u / 2; D after a step against 1 - 2 lambda c + lambda^2; both with wrong versions
    facts    the best step and the longest useful one; the linear loop of student and teacher; the same on the bandit

Here a row's "chain" is what the package measures (`kl_moved`, `divergence`, the real torch step) at learning rate or
distance eta, and its "equation" the limit; the order is that of the difference in eta.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pgpo.core import divergence, expected_size, kl_moved

from .experiments import DECAY, Claim
from .facts import Fact
from .problem import FEEDBACK, PHI_1, PHI_2, Bandit, TorchStep

STATES = torch.tensor([[-0.7, 0.4], [1.0, -0.6], [0.2, 1.1]], dtype=torch.float64)
# Relative length and cosine of the rows' step: below 2 c, and far from c (ours).
LENGTH, COSINE = 0.7, 0.6


def trust_rows() -> list[Claim]:
    """Rows of both kinds; exact, so that they need no second grid."""
    return [*_moved_rows(), *_contraction_rows()]


def trust_facts() -> list[Fact]:
    return [*best_step(), *slope_size(), *linear_loop(), *bandit_loop()]


# K in the limit of a short step ---------------------------------------------------------------------------------------


def log_policy(bandit: Bandit, theta: Tensor) -> Tensor:
    """log pi(. | x) of every prompt, theta [M, d] -> [M, prompts, V]."""
    return torch.log_softmax(torch.einsum("xvd,md->mxv", bandit.phi, theta), -1)


def cumulant(bandit: Bandit, theta: Tensor, u: Tensor, order: int) -> Tensor:
    """Second (u F u) or third cumulant of the score along u [M, d], mean over prompts; [M]."""
    along = torch.einsum("xvd,md->mxv", bandit.phi, u)
    pi = log_policy(bandit, theta).exp()
    centred = along - (pi * along).sum(-1, keepdim=True)
    return (pi * centred**order).sum(-1).mean(-1)


def _moved_rows() -> list[Claim]:
    """The policy moved by one torch step on one sample, at the states above; [1, states, 1] for every eta."""
    name = "measured trust: K / eta^2 of a step eta u"
    bandit = Bandit(PHI_2, FEEDBACK, DECAY)
    u = TorchStep(bandit, None).displacement(STATES, torch.zeros_like(STATES))[:, 0]
    fisher, third = (cumulant(bandit, STATES, u, order) for order in (2, 3))
    before = log_policy(bandit, STATES)

    def measured(distance: Callable[[Tensor, Tensor], Tensor]) -> Callable[[float], Tensor]:
        return lambda eta: (distance(before, log_policy(bandit, STATES + eta * u)).mean(-1) / eta**2)[None, :, None]

    def limit(value: Callable[[float], Tensor]) -> Callable[[float], Tensor]:
        return lambda eta: value(eta)[None, :, None]

    forward, backward = measured(kl_moved), measured(lambda p, q: kl_moved(q, p))
    jensen = measured(lambda p, q: 4 * divergence(q, p, "jsd", 0.5))
    half = limit(lambda eta: fisher / 2)
    with_third = limit(lambda eta: fisher / 2 + eta * third / 6)
    return [
        Claim(name, "KL(before || after)", "u F u / 2", 1, 1, forward, half),
        Claim(name, "KL(before || after)", "u F u", None, 0, forward, limit(lambda eta: fisher)),
        Claim(name, "KL(before || after)", "|u|^2 / 2", None, 0, forward, limit(lambda eta: (u**2).sum(-1) / 2)),
        Claim(name, "KL(before || after)", "u F u / 2 + eta kappa_3 / 6", 2, 2, forward, with_third),
        Claim(name, "KL(after || before)", "u F u / 2", 1, 1, backward, half),
        Claim(name, "KL(after || before)", "u F u / 2 + eta kappa_3 / 6", None, 1, backward, with_third),
        Claim(name, "4 JSD(before, after)", "u F u / 2", 1, 1, jensen, half),
        Claim(name, "4 JSD(before, after)", "u F u / 8: 4 forgotten", None, 0, jensen, limit(lambda eta: fisher / 8)),
    ]


# Nearer to the teacher ------------------------------------------------------------------------------------------------


def _contraction_rows() -> list[Claim]:
    """A teacher at distance eta, a step of relative length LENGTH at Fisher cosine COSINE to the way."""
    name = "measured trust: D after a step / D before, teacher at distance eta"
    bandit = Bandit(PHI_2, FEEDBACK, DECAY)
    way = torch.tensor([[1.0, 0.3], [-0.4, 1.0], [0.8, -0.7]], dtype=torch.float64)
    step = _step(bandit, way, LENGTH, COSINE)
    plain = (way * step).sum(-1) / way.norm(dim=-1) / step.norm(dim=-1)
    ratio = step.norm(dim=-1) / way.norm(dim=-1)

    def chain(eta: float) -> Tensor:
        student, teacher = (log_policy(bandit, STATES + eta * move) for move in (step, way))
        start = log_policy(bandit, STATES)
        after, before = (divergence(p, teacher, "reverse_kl").mean(-1) for p in (student, start))
        return (after / before)[None, :, None]

    def formula(value: Tensor | float) -> Callable[[float], Tensor]:
        return lambda eta: torch.as_tensor(value, dtype=torch.float64).expand(len(STATES))[None, :, None]

    return [
        Claim(name, name, "1 - 2 lambda c + lambda^2", 1, 1, chain, formula(1 - 2 * LENGTH * COSINE + LENGTH**2)),
        Claim(name, name, "1 - 2 lambda c: no price of the length", None, 0, chain, formula(1 - 2 * LENGTH * COSINE)),
        Claim(
            name, name, "lambda, c in parameters, not in F", None, 0, chain, formula(1 - 2 * ratio * plain + ratio**2)
        ),
    ]


def _step(bandit: Bandit, way: Tensor, length: float, cosine: float) -> Tensor:
    """A step of this length relative to `way` [M, 2] and at this cosine to it, both in the Fisher metric at STATES."""
    basis = torch.eye(2, dtype=torch.float64)
    metric = torch.zeros(len(STATES), 2, 2, dtype=torch.float64)
    for i in range(2):
        for j in range(2):
            plus, minus = (cumulant(bandit, STATES, (basis[i] + s * basis[j]).expand_as(STATES), 2) for s in (1, -1))
            metric[:, i, j] = (plus - minus) / 4

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("mi,mij,mj->m", a, metric, b).unsqueeze(-1)

    aside = torch.stack([-way[:, 1], way[:, 0]], 1)
    aside = aside - inner(aside, way) / inner(way, way) * way
    aside = aside * (inner(way, way) / inner(aside, aside)).sqrt()
    return length * (cosine * way + math.sqrt(1 - cosine**2) * aside)


def best_step(distance: float = 1e-3) -> list[Fact]:
    """The lambda that brings the student nearest, and the one that no longer does, read off the policies themselves."""
    table = f"measured trust: relative length lambda, cosine {COSINE:g}, teacher at distance {distance:g}"
    bandit = Bandit(PHI_2, FEEDBACK, DECAY)
    way = torch.tensor([[1.0, 0.3]], dtype=torch.float64).expand_as(STATES)
    unit = _step(bandit, way, 1.0, COSINE)
    teacher = log_policy(bandit, STATES + distance * way)

    def left(length: float) -> float:
        student = log_policy(bandit, STATES + distance * length * unit)
        return float(divergence(student, teacher, "reverse_kl").mean(-1)[0])

    return [
        Fact(table, "nearest at lambda = c", _minimum(left, 0.0, 2.0), COSINE, 1e-2),
        Fact(
            table, "as far as before at lambda = 2 c", _root(lambda x: left(x) - left(0.0), 0.5, 2.0), 2 * COSINE, 1e-2
        ),
    ]


def slope_size(distance: float = 1e-3) -> list[Fact]:
    """The cosine that slope, K and D give, from one step each: slope / sqrt(K D), D the Jensen-Shannon divergence."""
    table = "measured trust: cosine from slope / sqrt(K D)"
    bandit = Bandit(PHI_2, FEEDBACK, DECAY)
    way = torch.tensor([[1.0, 0.3]], dtype=torch.float64).expand_as(STATES)
    facts = []
    for length in (0.05, 0.2):
        step = distance * _step(bandit, way, length, COSINE)
        theta = STATES.clone().requires_grad_()
        logits = torch.einsum("xvd,md->mxv", bandit.phi, theta)
        each = divergence(logits, log_policy(bandit, STATES + distance * way), "jsd").mean(-1)
        (gradient,) = torch.autograd.grad(each.sum(), theta)
        size = expected_size(-float((gradient * step).sum(-1)[0]), each[0].item())
        moved = kl_moved(log_policy(bandit, STATES), log_policy(bandit, STATES + step)).mean(-1)[0].item()
        assert size is not None
        facts.append(Fact(table, f"lambda = {length:g}", math.sqrt(size / moved), COSINE, 1e-3))
    return facts


def _minimum(f: Callable[[float], float], low: float, high: float) -> float:
    """Of a convex function, by thirds."""
    for _ in range(60):
        third = (high - low) / 3
        low, high = (low, high - third) if f(low + third) < f(high - third) else (low + third, high)
    return (low + high) / 2


def _root(f: Callable[[float], float], low: float, high: float) -> float:
    """Of an increasing function, by bisection."""
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if f(middle) > 0 else (middle, high)
    return (low + high) / 2


# The teacher that follows ---------------------------------------------------------------------------------------------

RATES = (0.05, 0.01, 0.001)


def loop_radius(forget: float, copy: float, rate: float) -> float:
    """Spectral radius of x' = (1 - forget) x + copy y, y' = (1 - rate) y + rate x'."""
    matrix = torch.tensor([[1 - forget, copy], [rate * (1 - forget), 1 - rate + rate * copy]], dtype=torch.float64)
    return float(torch.linalg.eigvals(matrix).abs().max())


def anchored_radius(forget: float, copy: float, rate: float, tau: float) -> float:
    """The same for a teacher drawn to tau x' + (1 - tau) * start: y' = (1 - rate) y + rate tau x'."""
    matrix = torch.tensor(
        [[1 - forget, copy], [rate * tau * (1 - forget), 1 - rate + rate * tau * copy]], dtype=torch.float64
    )
    return float(torch.linalg.eigvals(matrix).abs().max())


def linear_loop() -> list[Fact]:
    """x, y: deviations of student and teacher in the skill that the teacher needs; forget = eta f, copy = eta c."""
    table = "linear loop of student and averaged teacher, eta f = 0.2"
    facts = []
    for rate, steps in zip(RATES, (35.645, 147.102, 1394.938), strict=True):
        x = y = 1.0
        trace = []
        for _ in range(4000):
            x = 0.8 * x + 0.3 * y
            y += rate * (x - y)
            trace.append(math.log(x))
        doubling = math.log(2) / (trace[-1] - trace[-2])
        facts.append(Fact(table, f"c / f = 1.5, teacher rate {rate:g}: steps to double", doubling, steps, 1e-2))
    stable = max(loop_radius(0.2, 0.2 * 0.99, rate) for rate in RATES)
    unstable = min(loop_radius(0.2, 0.2 * 1.01, rate) for rate in RATES)
    anchored = [anchored_radius(0.2, 0.3, rate, tau) for rate in RATES for tau in (0.6, 0.7)]
    return [
        *facts,
        Fact(table, "c / f = .99: stable at every teacher rate", float(stable < 1), 1.0),
        Fact(table, "c / f = 1.01: unstable at every teacher rate", float(unstable > 1), 1.0),
        Fact(table, "anchored teacher, c / f = 1.5: stable at tau = .6", float(max(anchored[::2]) < 1), 1.0),
        Fact(table, "anchored teacher, c / f = 1.5: unstable at tau = .7", float(min(anchored[1::2]) > 1), 1.0),
    ]


def bandit_loop(eta: float = 1.0) -> list[Fact]:
    """The bandit's mean step with its averaged teacher, near its two fixed points: growth per step by simulation.

    At theta = theta_bar the mean step is the pull of the feedback. It vanishes at two places; c = db/dtheta_bar is the
    Fisher information at both, f = -db/dtheta, and c < f at one of them only.
    """
    table = f"bandit with averaged teacher, learning rate {eta:g}: growth per step near a fixed point"
    bandit = Bandit(PHI_1, FEEDBACK, 0.0)

    def drift(theta: float, bar: float) -> float:
        state, mean = (torch.tensor([[v]], dtype=torch.float64) for v in (theta, bar))
        law = bandit.sample_law(state, mean)
        return -float(law.mean(law.gradient)[0, 0])

    facts = []
    for kind, low, high, sign in (("c > f", -2.0, 0.0, 1), ("c < f", -4.0, -2.0, -1)):
        fixed = _root(lambda t, s=sign: s * drift(t, t), low, high)  # type: ignore[misc]
        h = 1e-5
        f = -(drift(fixed + h, fixed) - drift(fixed - h, fixed)) / (2 * h)
        c = (drift(fixed, fixed + h) - drift(fixed, fixed - h)) / (2 * h)
        facts.append(Fact(table, f"{kind}: c / f", c / f))
        for rate in (0.05, 0.01):
            theta = bar = fixed + 1e-6
            trace = []
            for _ in range(600):
                theta += eta * drift(theta, bar)
                bar += rate * (theta - bar)
                trace.append(abs(bar - fixed))
            growth = (trace[-1] / trace[-101]) ** 0.01
            facts.append(
                Fact(table, f"{kind}, teacher rate {rate:g}", growth, loop_radius(eta * f, eta * c, rate), 1e-5)
            )
    return facts
