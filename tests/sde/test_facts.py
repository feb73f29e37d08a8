"""The noise floor, the tilted fixed point, the batch-size sweep."""

from __future__ import annotations

import pytest

from pgpo.sde.experiments import DEFAULT_LAW
from pgpo.sde.facts import batch_size, engine, language_floor, noise_floor, weight_decay


def _values(facts) -> dict[str, float]:  # type: ignore[no-untyped-def]
    return {f"{f.table}: {f.name}": f.value for f in facts}


def test_facts_with_a_closed_form_hold() -> None:
    wrong = [f for f in (*engine(DEFAULT_LAW), *noise_floor(), *weight_decay()) if not f.holds]
    assert wrong == []


def test_noise_floor_is_that_of_a_larger_learning_rate_and_the_paper_has_the_opposite_sign() -> None:
    """Numbers worked out by hand: c / (2 - c/16) and 1/(2c)."""
    values = _values(noise_floor())
    floor = "noise floor Var/eta, quadratic, rho = 3: "
    assert values[floor + "PGPO = SGD at rho * lr"] == pytest.approx(3 / (2 - 3 / 16), abs=1e-10)
    assert values[floor + "paper (ii) with sqrt(eta)"] == pytest.approx(1 / 6, abs=1e-10)
    assert values[floor + "true viscosity, rho Sigma"] == pytest.approx(0.5, abs=1e-10)


def test_language_problem_floor_and_tilt() -> None:
    facts = {f.name: f for f in language_floor(DEFAULT_LAW)}
    assert all(f.holds for f in facts.values())
    floor = {name: f.value for name, f in facts.items()}
    coin, right = floor["Var/eta, rho in {1, 3} by a fair coin"], floor["Var/eta, SGD at lr E[rho^2]/E[rho] = 2.5 lr"]
    assert coin == pytest.approx(right, rel=1e-3)
    assert abs(coin - floor["Var/eta, SGD at 2 lr"]) > 0.05  # not lr * E[rho]
    pgpo = floor["stationary mean, PGPO, same-batch rho"]
    assert floor["stationary mean, THEOREM order 2"] == pytest.approx(pgpo, abs=1e-5)
    assert pgpo - floor["stationary mean, -rho(EI) grad L"] > 0.05


def test_missing_covariance_is_one_over_the_batch_and_both_terms_mend_it() -> None:
    values = _values(batch_size(DEFAULT_LAW))
    table = "error at eta -> 0 against batch size m: "
    assert values[table + "-rho(EI) grad L: slope in m, last pair"] == pytest.approx(-1, abs=0.05)
    assert values[table + "both 1/m terms added: slope in m, last pair"] == pytest.approx(-2, abs=0.05)
