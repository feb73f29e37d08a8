"""Measure the order of weak approximation by two criteria, both on noise-free numbers.

    slope     log error = order * log eta, over 2^-3..2^-8 (with a t-interval, which measures curvature, not noise),
              over 2^-5..2^-10 (within 0.2 of the order) and over the finest pair (within 0.1; 0.2 for a half order)
    expansion signed error at T = a0 + a1 eta + ...; order >= 1 iff a0 = 0, order >= 2 iff a0 = a1 = 0

Guards: the same row on another grid must give the same error to 1 %; a row whose values blow up is reported as
unresolved, without a verdict.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pgpo.intervals import student_t

from .experiments import Claim
from .transfer import Unresolved

GUARD_ETAS = (2.0**-4, 2.0**-7)

# Wrong equations give a0 >= 5e-2 and a1 >= 1e-2, right ones a0 <= 1e-6 and a1 <= 5e-5 (ours, from the tables).
ZERO_A0, ZERO_A1 = 1e-5, 1e-4
LAST_BAND, FINE_BAND = 0.1, 0.2
GUARD_TOLERANCE = 0.01
ROUNDING = 1e-10  # errors below this are floating-point noise, where relative agreement means nothing


@dataclass(frozen=True)
class Outcome:
    """The measurement of a row.

    Attributes:
        row: chain and equation compared.
        etas: learning rates, descending.
        errors: max over k, start and test function of |difference|, one per eta.
        slope: log-log slope over the coarser part of the range.
        interval: half width of its 95 % t-interval.
        fine_slope: slope over the finer part.
        last_slope: slope of the finest pair.
        a0: largest |a0| over starts and test functions.
        a1: largest |a1|.
        measured: the measured order, or None if the two criteria disagree.
        trouble: why the row could not be resolved, or "".
    """

    row: Claim
    etas: tuple[float, ...]
    errors: tuple[float, ...]
    slope: float
    interval: float
    fine_slope: float
    last_slope: float
    a0: float
    a1: float
    measured: float | None
    trouble: str = ""

    @property
    def agrees(self) -> bool:
        """Whether the measured order is the theorem's."""
        return not self.trouble and self.measured == self.row.true

    @property
    def verdict(self) -> str:
        if self.trouble:
            return f"UNRESOLVED: {self.trouble}"
        if self.measured is None:
            return "UNCLEAR: slopes and expansion disagree; is the law smooth?"
        if not self.agrees:
            return f"DIFFERS from the theorem: order {self.measured:g}"
        claimed = self.row.claimed
        if claimed is None:
            return "rejected"
        if self.row.true < claimed:
            return f"refuted: order {self.row.true:g}"
        return "holds" if self.row.true == claimed else f"holds (order {self.row.true:g} here)"


def measure(row: Claim, etas: tuple[float, ...], check: Claim | None = None) -> Outcome:
    """Measure a row on all etas; `check` is the same row on another grid."""
    try:
        differences = [difference(row, eta) for eta in etas]
        errors = tuple(float(d.abs().max()) for d in differences)
        trouble = "" if check is None else _disagreement(row, check)
    except Unresolved as problem:
        nan = math.nan
        return Outcome(
            row, etas, (nan,) * len(etas), nan, nan, nan, nan, nan, nan, None, f"{problem}; is the law smooth?"
        )
    coefficients = expansion(etas, torch.stack([d[-1] for d in differences]))
    a0, a1 = (float(coefficients[i].abs().max()) for i in (0, 1))
    slope, interval = fit_slope(etas[:-2], errors[:-2])
    fine_slope, _ = fit_slope(etas[2:], errors[2:])
    last_slope, _ = fit_slope(etas[-2:], errors[-2:])
    measured = read_order(fine_slope, last_slope, a0, a1)
    return Outcome(row, etas, errors, slope, interval, fine_slope, last_slope, a0, a1, measured, trouble)


def difference(row: Claim, eta: float) -> Tensor:
    """Chain minus equation at every step, start and test function, [T/eta + 1, X, G]."""
    left, right = row.left(eta), row.right(eta)
    if row.moment == "variance":
        left, right = (side[..., 1:2] - side[..., 0:1] ** 2 for side in (left, right))
    return left - right


def fit_slope(etas: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of log error on log eta, and the half width of its 95 % t-interval."""
    x = [math.log(eta) for eta in etas]
    y = [math.log(max(error, 1e-300)) for error in errors]
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sxx
    if n < 3:
        return slope, math.inf
    residual = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, round(student_t(n - 2), 3) * math.sqrt(residual / (n - 2) / sxx)


def expansion(etas: Sequence[float], signed: Tensor) -> Tensor:
    """Coefficients of the polynomial in eta through the signed errors [E, ...]; [E, ...], a0 first."""
    scaled = torch.tensor(etas, dtype=torch.float64) / etas[0]
    powers = torch.arange(len(etas), dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(scaled.unsqueeze(1) ** powers, signed.flatten(1))
    coefficients = coefficients / etas[0] ** powers.unsqueeze(1)
    return coefficients.reshape(signed.shape)


def read_order(fine_slope: float, last_slope: float, a0: float, a1: float) -> float | None:
    """The order on which slopes and expansion agree, in halves; None if they do not."""
    order = round(2 * last_slope) / 2
    # A half order has no expansion in whole powers of eta, and its slope converges more slowly: the next term is
    # smaller by sqrt(eta) only.
    half = order != round(order)
    if abs(last_slope - order) >= (FINE_BAND if half else LAST_BAND) or abs(fine_slope - order) >= FINE_BAND:
        return None
    by_expansion = 0 if a0 > ZERO_A0 else 1 if a1 > ZERO_A1 else 2
    return order if half or order == by_expansion else None


def _disagreement(row: Claim, check: Claim) -> str:
    for eta in GUARD_ETAS:
        here, there = (float(difference(r, eta).abs().max()) for r in (row, check))
        if abs(here - there) > GUARD_TOLERANCE * here + ROUNDING:
            return f"errors {here:.4g} and {there:.4g} on two grids at eta = {eta:g}; is the law smooth?"
    return ""
