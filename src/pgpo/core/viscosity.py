"""Multiplier laws: information I_k -> step multiplier rho_k (PGPO, arXiv 2606.03620, Eq. 9).

    rho_k = min(exp(alpha * I_k), rho_max)

The paper's picture: parameters move through a viscous fluid, and an informative correction lowers the viscosity.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ExponentialLaw:
    """rho = max(rho_min, min(exp(alpha * I), rho_max)), Eq. 9 with an optional floor.

    Args:
        alpha: sensitivity per nat, >= 0. The paper runs 0.5, 1.0 and 1.5. alpha = 0 gives rho = 1 exactly.
        rho_max: cap, >= 1. The paper gives no number; 2.0 is ours: it lets no single step exceed twice the
            learning rate.
        rho_min: floor in [0, 1]. The paper's text says rho >= 1, its formula does not (an entropy gap can be
            negative); 0.0 keeps the formula, 1.0 the text.

    Raises:
        ValueError: a value outside its range.
    """

    alpha: float = 1.0
    rho_max: float = 2.0
    rho_min: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is {self.alpha!r}; it must be a number >= 0 (the paper uses 0.5, 1.0 and 1.5).")
        if not (math.isfinite(self.rho_max) and self.rho_max >= 1):
            raise ValueError(f"rho_max is {self.rho_max!r}; it must be a number >= 1 (1 = no speed-up).")
        if not (0 <= self.rho_min <= 1):
            raise ValueError(f"rho_min is {self.rho_min!r}; it must lie in [0, 1] (1 = never slower than the base).")

    def __call__(self, information: float) -> float:
        """rho for I in nats. Raises ValueError if I is not finite."""
        if not math.isfinite(information):
            raise ValueError(f"information is {information!r}; rho needs a finite entropy gap in nats.")
        exponent = self.alpha * information
        # Compare exponents, so that exp cannot overflow.
        rho = self.rho_max if exponent >= math.log(self.rho_max) else math.exp(exponent)
        return max(self.rho_min, rho)


@dataclass(frozen=True)
class SmoothExponentialLaw:
    """rho = (exp(-alpha * I / w) + rho_max^(-1/w))^(-w): Eq. 9 with a C-infinity cap (ours).

    Its exponent is the soft minimum of alpha * I and log rho_max. The weak-approximation theorem needs a smooth law:
    the kink of min(exp, cap) costs the SDE half an order where training stays at the cap (docs/THEOREM.md).
    The limits are ExponentialLaw's: exp(alpha * I) far below the cap, rho_max far above it. The law increases and
    stays below both; the gap is largest where they meet, a factor 2^-w. At I = 0 rho is (1 + rho_max^(-1/w))^-w,
    within 1e-4 of 1 at the defaults.

    Args:
        alpha: sensitivity per nat, >= 0; 0 gives rho = 1 exactly.
        rho_max: cap, > 1.
        width: w > 0, width of the knee in nats of alpha * I; 0.1 is ours. Its limit 0 is ExponentialLaw.

    Raises:
        ValueError: a value outside its range.
    """

    alpha: float = 1.0
    rho_max: float = 2.0
    width: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha is {self.alpha!r}; it must be a number >= 0 (the paper uses 0.5, 1.0 and 1.5).")
        if not (math.isfinite(self.rho_max) and self.rho_max > 1):
            raise ValueError(f"rho_max is {self.rho_max!r}; a smooth cap must be a number > 1.")
        if not (math.isfinite(self.width) and self.width > 0):
            raise ValueError(f"width is {self.width!r}; it must be a number > 0 (use ExponentialLaw for a sharp cap).")

    def __call__(self, information: float) -> float:
        """rho for I in nats. Raises ValueError if I is not finite."""
        if not math.isfinite(information):
            raise ValueError(f"information is {information!r}; rho needs a finite entropy gap in nats.")
        if self.alpha == 0:
            return 1.0
        exponent, cap = self.alpha * information, math.log(self.rho_max)
        # Start the soft minimum from the smaller term, so that exp cannot overflow.
        knee = self.width * math.log1p(math.exp(-abs(cap - exponent) / self.width))
        return math.exp(min(exponent, cap) - knee)


def linear_schedule(start: float, end: float, steps: int) -> Callable[[int], float]:
    """alpha(step): `start` at step 0, `end` from `steps` on, linear between.

    The paper leaves adaptive alpha to future work; this is the simplest schedule. Raises ValueError if steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}; a schedule needs at least one step.")
    return lambda step: start + (end - start) * min(max(step, 0) / steps, 1.0)
