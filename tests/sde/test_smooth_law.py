"""SmoothExponentialLaw: the limits of min(exp, cap), without its kink."""

from __future__ import annotations

import itertools
import math

import pytest

from pgpo.core import ExponentialLaw, SmoothExponentialLaw

SHARP, SMOOTH = ExponentialLaw(1.3, 2.5), SmoothExponentialLaw(1.3, 2.5, width=0.1)
KNEE = math.log(2.5) / 1.3


def test_formula() -> None:
    for information in (-2.0, 0.0, 0.5, KNEE, 1.4):
        direct = (math.exp(-1.3 * information / 0.1) + 2.5 ** (-1 / 0.1)) ** -0.1
        assert SMOOTH(information) == pytest.approx(direct, rel=1e-13)


def test_limits_and_order() -> None:
    assert SMOOTH(-3.0) == pytest.approx(SHARP(-3.0), rel=1e-15)
    assert SMOOTH(1e6) == 2.5 and SMOOTH(-1e6) == 0.0  # no overflow at any gap
    assert SMOOTH(KNEE) == pytest.approx(2.5 * 2**-0.1, rel=1e-14)
    values = [SMOOTH(i / 50) for i in range(-100, 100)]
    assert all(a < b for a, b in itertools.pairwise(values))
    assert all(v <= SHARP(i / 50) for i, v in zip(range(-100, 100), values))


def test_no_kink_at_the_cap() -> None:
    """The one-sided slopes at the knee agree; those of min(exp, cap) differ by alpha * rho_max."""
    h = 1e-6

    def jump(law) -> float:  # type: ignore[no-untyped-def]
        return (law(KNEE + h) - 2 * law(KNEE) + law(KNEE - h)) / h

    assert abs(jump(SMOOTH)) < 1e-3
    assert jump(SHARP) == pytest.approx(-1.3 * 2.5, rel=1e-4)


def test_alpha_zero_is_exactly_one_and_zero_information_nearly() -> None:
    assert SmoothExponentialLaw(alpha=0.0)(0.7) == 1.0
    assert 1 - 1e-4 < SmoothExponentialLaw()(0.0) < 1.0


@pytest.mark.parametrize("bad", [{"alpha": -1.0}, {"rho_max": 1.0}, {"width": 0.0}, {"width": math.inf}])
def test_bad_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SmoothExponentialLaw(**bad)


def test_information_must_be_finite() -> None:
    with pytest.raises(ValueError, match="finite"):
        SMOOTH(math.nan)
