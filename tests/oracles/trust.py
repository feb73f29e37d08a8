"""Measured trust from its formulas, over the whole history at once: no running state."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Signals = tuple[float | None, float, float | None]  # divergence, information, cosine of one batch


def running_mean(values: Sequence[float], decay: float = 0.9) -> float:
    weights = [decay ** (len(values) - 1 - i) for i in range(len(values))]
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def budget(
    history: Sequence[Signals],
    kind: str,
    fraction: float,
    first: float,
    settle: float,
    kl_per_divergence: float,
    agreement: bool,
    floor: float = 0.1,
    warmup: int = 10,
) -> float:
    """B after the last batch of `history`."""
    taught = [(d, i) for d, i, _ in history if d is not None]
    if not taught:
        return 0.0
    d, i = (running_mean([pair[n] for pair in taught]) for n in (0, 1))
    share = max(fraction, first / math.sqrt(1 + (len(taught) - 1) / settle))
    cosines = [c for _, _, c in history if c is not None]
    a = 1.0
    if agreement and len(cosines) > 5:
        a = min(max(running_mean(cosines) / 0.1, 0.1), 1.0)
    s = 1.0
    if kind == "information":
        s = i / (kl_per_divergence * d) if d else 0.0
    elif kind == "auto" and len(taught) >= warmup:
        start_d, start_i = (running_mean([pair[n] for pair in taught[:warmup]]) for n in (0, 1))
        reference = start_i / start_d if start_d else 0.0
        if reference * 4 / kl_per_divergence >= 1:
            s = (i / d if d else 0.0) / reference
    s = 1.0 if kind == "divergence" else min(max(s, floor), 1.0)
    return (share * a * s) ** 2 * kl_per_divergence * d


def longest_step(moved: Callable[[float], float], budget: float) -> float:
    """The largest rho in [0, 1] with K(rho) <= budget, by bisection of a K that grows with rho."""
    if moved(1.0) <= budget:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) <= budget else (low, middle)
    return low
