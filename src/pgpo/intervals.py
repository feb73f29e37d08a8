"""Student's t, for the intervals of the report and of the SDE laboratory."""

from __future__ import annotations

import math

LEVEL = 0.95


def student_t(freedom: int, level: float = LEVEL) -> float:
    """The t with P(|T| < t) = level for whole degrees of freedom, by bisection on the distribution function.

    The latter is the finite series of Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        odd = freedom % 2 == 1
        term = cosine if odd else 1.0
        total = 0.0 if freedom == 1 else term
        for j in range(3 if odd else 2, freedom - 1, 2):
            term *= cosine**2 * ((j - 1) / j)
            total += term
        return 2 / math.pi * (angle + sine * total) if odd else sine * total

    low, high = 0.0, 1e4
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return high
