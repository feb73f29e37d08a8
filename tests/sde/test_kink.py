"""Counterexample K1: its chain against every path, its orders."""

from __future__ import annotations

import pytest
import torch

from pgpo.core import ExponentialLaw
from pgpo.sde.kink import chain_curve, equation_curve, information, kinked_law
from pgpo.sde.orders import measure
from pgpo.sde.verify import ETAS

F64 = torch.float64


def test_chain_equals_all_paths() -> None:
    """16 steps at eta = 1/8: 65536 paths."""
    eta, y, total = 0.125, torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64)
    for _ in range(16):
        rho = 2.0 * y.exp().clamp(max=1.0)
        total = (total + eta * rho).repeat_interleave(2)
        sign = torch.tensor([1.0, -1.0], dtype=F64).repeat(len(y))
        y = (y.repeat_interleave(2)) - eta * rho.repeat_interleave(2) * (y.repeat_interleave(2) + sign)
    value = float(chain_curve(ExponentialLaw(1.0, 2.0), 1200)(eta)[-1])
    assert value == pytest.approx(float(total.mean()), abs=2e-6)


def test_the_cap_is_reached_exactly_at_the_minimum() -> None:
    law = ExponentialLaw(1.0, 2.0)
    assert law(float(information(torch.tensor(0.0, dtype=F64)))) == 2.0
    assert law(float(information(torch.tensor(-1e-3, dtype=F64)))) < 2.0


def test_deficit_of_the_equation_at_the_kink() -> None:
    """From Y_0 = 0, for small t: E rho = 2 - 2 E[Y_-] with E[Y_-] = sd / sqrt(2 pi), sd = 2 sqrt(eta t)."""
    eta, steps = 2.0**-10, 16
    value = float(equation_curve(ExponentialLaw(1.0, 2.0), "rho^2 Sigma")(eta)[steps])
    time = steps * eta
    deficit = 2 * 2 * eta**0.5 / (2 * torch.pi) ** 0.5 * time**1.5 / 1.5
    assert 2 * time - value == pytest.approx(deficit, rel=0.05)


@pytest.mark.parametrize("row", kinked_law(), ids=lambda r: f"{r.chain}: {r.equation}")
def test_orders(row) -> None:  # type: ignore[no-untyped-def]
    assert measure(row, ETAS).measured == row.true
