"""Multiplier laws: Eq. 9 by value, its bounds, its extremes."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgpo.core import ExponentialLaw, SmoothExponentialLaw, linear_schedule
from tests.oracles import numerics as oracle

gaps = st.floats(-20, 20)
any_gaps = st.one_of(gaps, st.floats(allow_nan=False, allow_infinity=False))
alphas = st.floats(0, 10)
caps = st.floats(1, 50)
floors = st.floats(0, 1)


@pytest.mark.parametrize(
    ("alpha", "information", "expected"),
    [
        (1.0, math.log(1.5), 1.5),
        (0.5, math.log(2.25), 1.5),  # exp(I / 2) = sqrt(2.25)
        (1.5, math.log(0.25), 0.125),  # a negative gap slows down: 0.25 ** 1.5
        (1.0, math.log(2.0), 2.0),  # exactly at the cap
        (1.0, 5.0, 2.0),  # above it
    ],
)
def test_formula_by_hand(alpha: float, information: float, expected: float) -> None:
    assert ExponentialLaw(alpha=alpha)(information) == pytest.approx(expected, rel=1e-15)


def test_defaults_are_the_documented_ones() -> None:
    assert ExponentialLaw() == ExponentialLaw(alpha=1.0, rho_max=2.0, rho_min=0.0)


@given(gaps, alphas, caps, floors)
def test_equals_the_oracle_and_stays_inside_its_bounds(
    information: float, alpha: float, rho_max: float, rho_min: float
) -> None:
    rho = ExponentialLaw(alpha, rho_max, rho_min)(information)
    assert rho_min <= rho <= rho_max
    assert rho == pytest.approx(oracle.rho(information, alpha, rho_max, rho_min), rel=1e-13)


@given(caps, st.integers(-3, 3))
@example(rho_max=2.0, ulps=-1)
def test_no_rounding_error_carries_rho_over_the_cap(rho_max: float, ulps: int) -> None:
    information = math.log(rho_max)
    for _ in range(abs(ulps)):
        information = math.nextafter(information, math.copysign(math.inf, ulps))
    assert ExponentialLaw(rho_max=rho_max)(information) <= rho_max


@given(any_gaps, any_gaps, st.floats(0, 100), st.floats(1, 1e6), floors)
def test_more_information_never_means_a_smaller_step(
    a: float, b: float, alpha: float, rho_max: float, rho_min: float
) -> None:
    law = ExponentialLaw(alpha, rho_max, rho_min)
    assert rho_min <= law(min(a, b)) <= law(max(a, b)) <= rho_max


@given(gaps, caps, floors)
def test_rho_is_exactly_one_without_sensitivity_or_without_a_gap(gap: float, rho_max: float, rho_min: float) -> None:
    assert ExponentialLaw(alpha=0.0, rho_max=rho_max, rho_min=rho_min)(gap) == 1.0
    assert ExponentialLaw(alpha=1.0, rho_max=rho_max, rho_min=rho_min)(0.0) == 1.0


@pytest.mark.parametrize(("information", "expected"), [(1e308, 2.0), (-1e308, 0.25), (710.0, 2.0), (-746.0, 0.25)])
def test_extreme_gaps_neither_overflow_nor_leave_the_bounds(information: float, expected: float) -> None:
    assert ExponentialLaw(alpha=100.0, rho_max=2.0, rho_min=0.25)(information) == expected


@pytest.mark.parametrize("information", [math.nan, math.inf, -math.inf])
def test_non_finite_information_is_an_error(information: float) -> None:
    # min(exp(nan), 2) is nan or 2 depending on the order of the arguments: it must not get that far
    for law in (ExponentialLaw(), SmoothExponentialLaw(), SmoothExponentialLaw(alpha=0.0)):
        with pytest.raises(ValueError, match="finite"):
            law(information)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(["alpha"], [-0.1, math.nan, math.inf]),
        *itertools.product(["rho_max"], [0.99, 0.0, -1.0, math.nan, math.inf]),
        *itertools.product(["rho_min"], [-0.1, 1.1, math.nan]),
    ],
)
def test_out_of_range_parameters_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        ExponentialLaw(**{field: value})


widths = st.floats(0.01, 2)
smooth_caps = st.floats(1.01, 50)


@given(gaps, alphas.filter(bool), smooth_caps, widths)
def test_smooth_law_equals_the_oracle_below_both_branches(
    information: float, alpha: float, rho_max: float, width: float
) -> None:
    rho = SmoothExponentialLaw(alpha, rho_max, width)(information)
    assert rho == pytest.approx(oracle.smooth_rho(information, alpha, rho_max, width), rel=1e-12)
    sharp = ExponentialLaw(alpha, rho_max)(information)
    assert 2**-width * sharp * (1 - 1e-14) <= rho <= sharp * (1 + 1e-14)


def test_smooth_law_by_hand() -> None:
    # w = 1: 1 / (exp(-I) + 1 / rho_max), harmonic
    law = SmoothExponentialLaw(alpha=1.0, rho_max=2.0, width=1.0)
    assert law(math.log(2.0)) == pytest.approx(1.0, rel=1e-15)  # where the branches meet: 2 ** -w of them
    assert law(0.0) == pytest.approx(2 / 3, rel=1e-15)
    assert abs(SmoothExponentialLaw()(0.0) - 1) < 1e-4  # as documented
    assert SmoothExponentialLaw() == SmoothExponentialLaw(alpha=1.0, rho_max=2.0, width=0.1)


@given(any_gaps, any_gaps, st.floats(0, 100), st.floats(1.01, 1e6), st.just(0.1) | widths)
def test_smooth_law_is_monotone_and_keeps_to_its_bounds(
    a: float, b: float, alpha: float, rho_max: float, width: float
) -> None:
    law = SmoothExponentialLaw(alpha, rho_max, width)
    low, high = law(min(a, b)), law(max(a, b))
    assert 0 <= low <= high * (1 + 1e-12) and high <= rho_max * (1 + 1e-12)
    assert low <= ExponentialLaw(alpha, rho_max)(min(a, b)) * (1 + 1e-9)


def test_smooth_law_has_no_kink_at_the_cap() -> None:
    """One-sided slopes at the cap differ by rho_max for the sharp law, by O(step) for the smooth one."""
    step, cap = 1e-5, math.log(2.0)

    def slopes(law: ExponentialLaw | SmoothExponentialLaw) -> tuple[float, float]:
        return (law(cap) - law(cap - step)) / step, (law(cap + step) - law(cap)) / step

    left, right = slopes(ExponentialLaw())
    assert left - right == pytest.approx(2.0, abs=1e-4)
    left, right = slopes(SmoothExponentialLaw())
    assert left - right == pytest.approx(0.0, abs=1e-3)


@pytest.mark.parametrize(("information", "expected"), [(1e308, 2.0), (-1e308, 0.0), (20.0, 2.0), (-746.0, 0.0)])
def test_smooth_law_at_extreme_gaps(information: float, expected: float) -> None:
    assert SmoothExponentialLaw(alpha=100.0, width=0.01)(information) == expected


@given(gaps)
def test_smooth_law_without_sensitivity_is_exactly_one(gap: float) -> None:
    assert SmoothExponentialLaw(alpha=0.0)(gap) == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *itertools.product(["alpha"], [-0.1, math.nan, math.inf]),
        *itertools.product(["rho_max"], [1.0, 0.5, math.nan, math.inf]),
        *itertools.product(["width"], [0.0, -0.1, math.nan, math.inf]),
    ],
)
def test_smooth_law_names_out_of_range_parameters(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        SmoothExponentialLaw(**{field: value})


def test_linear_schedule_by_hand() -> None:
    alpha = linear_schedule(0.5, 1.5, steps=4)
    assert [alpha(step) for step in (-1, 0, 1, 2, 4, 5, 1000)] == [0.5, 0.5, 0.75, 1.0, 1.5, 1.5, 1.5]


def test_a_schedule_over_no_steps_is_an_error() -> None:
    with pytest.raises(ValueError, match="steps is 0"):
        linear_schedule(0.0, 1.0, steps=0)
