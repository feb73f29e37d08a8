"""95 % intervals of means over questions and over runs, for the evaluator, the report and both laboratories.

Which interval, and what it covers at 20 to 200 questions: benchmarks/interval_coverage.py, docs/EVALUATION.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEVEL = 0.95
POWER = 0.80  # Cohen 1988, Statistical Power Analysis for the Behavioral Sciences, 2.4

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """A mean difference with its 95 % interval, and the minimum detectable effect of the comparison."""

    value: float
    low: float
    high: float
    detectable: float


@functools.cache
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


def wilson(mean: Any, count: Any, t: float) -> tuple[Any, Any]:
    """Ends of Wilson's interval for a share `mean` of `count` independent units; numbers, or arrays of one shape.

    Wilson 1927, JASA 22. `count` may be an effective number and t a quantile of Student's t, as for shares from
    clustered surveys (Franco et al. 2019, Journal of Survey Statistics and Methodology 7).
    """
    shrink = 1 + t**2 / count
    middle = (mean + t**2 / (2 * count)) / shrink
    half = t / shrink * np.sqrt(mean * (1 - mean) / count + t**2 / (4 * count**2))
    return middle - half, middle + half


def variance_of_mean(values: Array, clusters: Sequence[Hashable] | None = None) -> tuple[float, int]:
    """Squared standard error of the mean of [n] values, and the number of clusters C; nan for one cluster.

    Delete-one-cluster jackknife: (C - 1) / C * sum over clusters of (mean without it - mean)^2, which is
    variance / n where each value is a cluster of its own. It errs to the wide side where clusters differ in size
    (MacKinnon, Nielsen and Webb 2023, Journal of Econometrics 232, CV3).
    """
    names = range(len(values)) if clusters is None else clusters
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    index = [places[name] for name in names]
    count = len(places)
    if count == 1:
        return math.nan, 1
    sums, sizes = (np.bincount(index, weights=weights) for weights in (values, np.ones(len(values))))
    without = (sums.sum() - sums) / (len(values) - sizes)
    return float((count - 1) / count * np.sum((without - values.mean()) ** 2)), count


def mean_interval(values: Array, clusters: Sequence[Hashable] | None = None) -> tuple[float, float]:
    """95 % interval of the mean of [n] independent values, or of clusters of them; nan ends for one cluster.

    Values within [0, 1]: Wilson's for as many units as would have this standard error, with Student's t for C - 1
    degrees of freedom; where all are 0 or all 1, for C units. Other values: mean +- t * standard error.
    """
    mean = float(values.mean())
    variance, count = variance_of_mean(values, clusters)
    if count == 1:
        return math.nan, math.nan
    t = student_t(count - 1)
    if values.min() < 0.0 or values.max() > 1.0:
        half = t * math.sqrt(variance)
        return mean - half, mean + half
    spread = mean * (1 - mean)
    low, high = wilson(mean, spread / variance if spread > 0 and variance > 0 else count, t)
    return min(mean, max(0.0, float(low))), max(mean, min(1.0, float(high)))  # rounding apart they hold the mean


def paired_difference(differences: Array, clusters: Sequence[Hashable] | None = None) -> Paired:
    """Mean of differences [runs, questions] with its 95 % interval; nan ends for one question or one cluster of them.

    One run: Student's t over the questions. Several: runs and questions are crossed random effects, the variance of
    the mean is that of runs plus that of questions less that of the residual (Cornfield and Tukey 1956, Annals of
    Mathematical Statistics 27), never below the larger of the first two, with Satterthwaite's degrees of freedom,
    rounded down. Differences that are all 0 leave the uncertainty of as many questions without an event:
    t^2 / (C + t^2), as in Wilson's interval.

    `detectable` is the minimum detectable effect: the true difference that such a comparison tells from 0 in 80 % of
    the cases, (t_.975 + t_.80) * standard error (Bloom 1995, Evaluation Review 19). The standard error is itself
    estimated, so that with few units the power is lower: .65 at 4, .72 at 8, .76 at 16 (simulated in the tests).
    """
    runs, questions = differences.shape
    mean = float(differences.mean())
    by_question = differences.mean(axis=0)
    variance, count = variance_of_mean(by_question, clusters)
    if count == 1:
        return Paired(mean, math.nan, math.nan, math.nan)
    freedom = count - 1
    if runs > 1:
        by_run = differences.mean(axis=1)
        residuals = differences - by_run[:, None] - by_question + mean
        rest = float(np.sum(residuals**2)) / ((runs - 1) * (questions - 1) * runs * questions)
        of_runs, of_questions = variance_of_mean(by_run)[0], variance
        both = of_runs + of_questions - rest
        terms = of_runs**2 / (runs - 1) + of_questions**2 / freedom + rest**2 / ((runs - 1) * (questions - 1))
        freedom = max(1, int(both**2 / terms)) if both > 0 and terms > 0 else min(runs - 1, freedom)
        variance = max(both, of_runs, of_questions)
    t = student_t(freedom)
    half = t * math.sqrt(variance) if np.any(differences != 0.0) else t**2 / (count + t**2)
    return Paired(mean, mean - half, mean + half, half * (1 + student_t(freedom, 2 * POWER - 1) / t))
