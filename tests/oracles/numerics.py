"""The formulas of the method, one distribution at a time, in 40-digit arithmetic.

Slow and plain on purpose: no logarithm tricks, no vectorisation, no autograd. Derivatives are central differences; in
40 digits they are right to far more digits than the float64 results that they are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mpmath as mp  # type: ignore[import-untyped]

mp.mp.dps = 40
# Truncation error of a central difference ~ step^2 = 1e-28, rounding error ~ 1e-40 / step = 1e-26.
_STEP = mp.mpf(10) ** -14

Distribution = list[mp.mpf]


def probabilities(logits: Sequence[float], temperature: float = 1.0) -> Distribution:
    """softmax(logits / temperature); a logit of -inf has probability 0."""
    weights = [mp.exp(mp.mpf(z) / mp.mpf(temperature)) for z in logits]
    total = mp.fsum(weights)
    return [w / total for w in weights]


def entropy_of(p: Distribution) -> mp.mpf:
    """-sum p ln p, with 0 ln 0 = 0, nats."""
    return -mp.fsum(x * mp.log(x) for x in p if x > 0)


def entropy(logits: Sequence[float], temperature: float = 1.0) -> mp.mpf:
    return entropy_of(probabilities(logits, temperature))


def kl(p: Distribution, q: Distribution) -> mp.mpf:
    """sum p ln(p / q), with 0 ln(0 / q) = 0; infinite where p > 0 = q."""
    if any(x > 0 and y == 0 for x, y in zip(p, q, strict=True)):
        return mp.inf
    return mp.fsum(x * mp.log(x / y) for x, y in zip(p, q, strict=True) if x > 0)


def jsd(student: Distribution, teacher: Distribution, beta: float) -> mp.mpf:
    """(1-b) KL(student || m) + b KL(teacher || m) with m = (1-b) student + b teacher."""
    b = mp.mpf(beta)
    mixture = [(1 - b) * s + b * t for s, t in zip(student, teacher, strict=True)]
    return (1 - b) * kl(student, mixture) + b * kl(teacher, mixture)


def top_k(student: Distribution, teacher: Distribution, k: int, tail: bool) -> tuple[Distribution, Distribution]:
    """Both on the student's k most likely tokens: with one bucket for the rest, or renormalised."""
    kept = sorted(range(len(student)), key=lambda v: -student[v])[:k]

    def restrict(p: Distribution) -> Distribution:
        head = [p[v] for v in kept]
        if tail:
            return [*head, mp.fsum(p[v] for v in range(len(p)) if v not in kept)]
        return [x / mp.fsum(head) for x in head]

    return restrict(student), restrict(teacher)


def divergence(
    student_logits: Sequence[float],
    teacher_logits: Sequence[float],
    kind: str,
    beta: float = 0.5,
    k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
) -> mp.mpf:
    student, teacher = probabilities(student_logits, temperature), probabilities(teacher_logits, temperature)
    if k is not None and k < len(student):
        student, teacher = top_k(student, teacher, k, tail)
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        return kl(teacher, student)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        return kl(student, teacher)
    assert kind == "jsd"
    return jsd(student, teacher, beta)


def gradient(f: Callable[[list[mp.mpf]], mp.mpf], x: Sequence[float]) -> list[float]:
    """Central differences of f at x."""
    point = [mp.mpf(value) for value in x]

    def shifted(i: int, step: mp.mpf) -> list[mp.mpf]:
        return [value + step if j == i else value for j, value in enumerate(point)]

    return [float((f(shifted(i, _STEP)) - f(shifted(i, -_STEP))) / (2 * _STEP)) for i in range(len(point))]


Rows = Sequence[Sequence[float]]


def information(
    student: Rows, teacher: Rows, hinted: Sequence[bool], unhinted: int = 0, denominator: str = "all"
) -> float:
    """Eq. 8 from the token entropies of each completion (lists of any length, no padding).

    I = (1 / n) sum over hinted i of [mean_t student_it - mean_t teacher_it]; an empty completion has a gap of 0;
    n counts every sample ("all", `unhinted` more of them included) or the hinted ones.
    """
    gap = mp.mpf(0)
    for s, t, has_hint in zip(student, teacher, hinted, strict=True):
        if has_hint and len(s) > 0:
            gap += mp.fsum(map(mp.mpf, s)) / len(s) - mp.fsum(map(mp.mpf, t)) / len(t)
    n = len(student) + unhinted if denominator == "all" else sum(hinted)
    return float(gap / n) if n else 0.0


def rho(information: float, alpha: float, rho_max: float, rho_min: float = 0.0) -> float:
    """Eq. 9 with a floor."""
    return float(max(mp.mpf(rho_min), min(mp.exp(mp.mpf(alpha) * mp.mpf(information)), mp.mpf(rho_max))))


def smooth_rho(information: float, alpha: float, rho_max: float, width: float) -> float:
    """(exp(-alpha I / w) + rho_max^(-1/w))^(-w)."""
    exponent, w = mp.mpf(alpha) * mp.mpf(information), mp.mpf(width)
    return float((mp.exp(-exponent / w) + mp.mpf(rho_max) ** (-1 / w)) ** (-w))
