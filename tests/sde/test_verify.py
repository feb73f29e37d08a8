"""Verdicts: the theorem's rows pass, the must-fail set is rejected, planted mistakes are caught."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pgpo.core import ExponentialLaw
from pgpo.errors import UserError
from pgpo.sde import experiments, problem, theorem, verify
from pgpo.sde.experiments import (
    DEFAULT_LAW,
    Claim,
    ema_teacher,
    one_dimensional,
    remedies,
    smooth_cap,
    two_dimensional,
)
from pgpo.sde.orders import Outcome, expansion, fit_slope, measure, read_order
from pgpo.sde.theorem import Equation, Fields, milstein_correction
from pgpo.sde.verify import ETAS, QUICK_ETAS

SHARED, SAME = "rho batch-independent", "rho from the same batch"
PLANE, EMA = "two dimensions, rho batch-independent", "EMA teacher, kappa = 1"


def line_rows() -> list[Claim]:
    return one_dimensional(DEFAULT_LAW)


def plane_rows() -> list[Claim]:
    return two_dimensional(DEFAULT_LAW, 14)


def ema_rows() -> list[Claim]:
    return ema_teacher(DEFAULT_LAW, 14)


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, str, str], Outcome]:
    found = [measure(row, ETAS) for row in [*line_rows(), *remedies(DEFAULT_LAW), *smooth_cap()]]
    found += [measure(row, QUICK_ETAS) for row in [*plane_rows(), *ema_rows()]]
    return {(o.row.section, o.row.chain, o.row.equation): o for o in found}


def test_every_row_has_the_order_of_the_theorem(outcomes: dict[tuple[str, str, str], Outcome]) -> None:
    wrong = {key: (o.row.true, o.last_slope, o.a0, o.a1) for key, o in outcomes.items() if not o.agrees}
    assert wrong == {}


MUST_FAIL = {
    (SHARED, "rho dropped"): 0,
    (SAME, "paper (ii) with sqrt(eta): -rho(EI) grad L"): 0,
    (SAME, "-E[rho] E[g]"): 0,
    (SAME, "paper (ii) literal: no sqrt(eta)"): 0,
    (SHARED, "paper (ii) literal: no sqrt(eta)"): 0,
    ("vanilla SGD", "paper (i) literal: Sigma^1/2, no sqrt(eta)"): 0,
    (SAME, "order-2 drift, Sigma unchanged"): 1,
    (SAME, "variance, Sigma unchanged"): 1,
    (PLANE, "'order 2' with (eta/4) grad|b|^2"): 1,
    (EMA, "teacher frozen"): 0,
    (EMA, "teacher = student at once"): 0,
    (EMA, "order 2 without kappa b"): 1,
}


@pytest.mark.parametrize("key", MUST_FAIL, ids=lambda k: f"{k[0]}: {k[1]}")
def test_wrong_equations_are_rejected(key: tuple[str, str], outcomes: dict[tuple[str, str, str], Outcome]) -> None:
    outcome = outcomes[key[0], key[0], key[1]]
    assert outcome.verdict in ("rejected", f"refuted: order {MUST_FAIL[key]}")
    assert outcome.a0 > 1e-2 if MUST_FAIL[key] == 0 else outcome.a1 > 1e-2  # three decades above the threshold


def _flat_covariance(self: Fields) -> torch.Tensor:
    return self.law.covariance(self.law.gradient)


def _wrong_entropy(logits: torch.Tensor) -> torch.Tensor:
    return 1.05 * REAL_ENTROPY(logits)


REAL_ENTROPY = problem.token_entropy
REAL_OPERATOR = Equation.operator


class _Deaf:
    """A modulation handle that scales nothing."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def arm(self, rho: float) -> None:
        pass


def _only(rows: Callable[[], list[Claim]], equation: str) -> Claim:
    return next(r for r in rows() if r.equation == equation and r.section != "vanilla SGD")


# name -> (object, attribute, wrong value, rows, equation whose verdict must turn)
MUTANTS = {
    "the optimizer ignores rho": (problem, "modulate", _Deaf, line_rows, "THEOREM order 1: -E[rho g], Cov(rho g)"),
    "entropy off by 5 %": (problem, "token_entropy", _wrong_entropy, line_rows, "rho^2 Sigma"),
    "Cov(rho, g) forgotten": (
        Fields, "exact_drift", Fields.product_drift, line_rows, "THEOREM order 1: -E[rho g], Cov(rho g)",
    ),
    "Cov(g) for Cov(rho g)": (
        Fields, "exact_diffusion", property(_flat_covariance), line_rows,
        "THEOREM order 2: b - (eta/2)(Db)b, Cov(rho g)",
    ),
    "variance with Cov(g)": (
        Fields, "exact_diffusion", property(_flat_covariance), line_rows, "variance, Cov(rho g)",
    ),
    "correction with the wrong sign": (
        theorem, "milstein_correction", lambda grid, b: -milstein_correction(grid, b), line_rows,
        "THEOREM order 2: b - (eta/2)(Db)b, Cov(rho g)",
    ),
    "correction transposed": (
        theorem, "milstein_correction", theorem.gradient_correction, plane_rows, "order 2 with (eta/2)(Db)b",
    ),
    "sqrt(eta) forgotten": (
        Equation, "operator", lambda self, grid, eta: REAL_OPERATOR(self.without_sqrt_eta(), grid, eta), line_rows,
        "THEOREM order 1: -E[rho g], Cov(rho g)",
    ),
    "kappa b forgotten": (
        experiments, "ema_correction", lambda grid, b0, kappa: milstein_correction(grid, b0), ema_rows,
        "order 2 on (theta, theta_bar)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_turns_a_verdict(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong, rows, equation = MUTANTS[name]
    monkeypatch.setattr(owner, attribute, wrong)
    assert not measure(_only(rows, equation), QUICK_ETAS).agrees


def test_a_planted_mistake_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Fields, "exact_drift", Fields.product_drift)
    assert verify.main(quick=True) == 1
    assert "DIFFERS from the theorem" in capsys.readouterr().out


def test_a_kink_on_the_grid_is_unresolved_not_a_verdict() -> None:
    law = ExponentialLaw(1.0, 1.2)
    key = "THEOREM order 2: b - (eta/2)(Db)b, Cov(rho g)"
    row, check = (next(r for r in one_dimensional(law, *grid) if r.equation == key) for grid in ((40, 4.0), (56, 4.0)))
    outcome = measure(row, QUICK_ETAS, check)
    assert not outcome.agrees
    assert outcome.verdict.startswith("UNRESOLVED") and "smooth" in outcome.verdict


def test_slope_and_interval_by_hand() -> None:
    assert fit_slope([1.0, 0.5, 0.25], [3.0, 0.75, 0.1875]) == pytest.approx((2.0, 0.0), abs=1e-12)
    # y = x + residuals (1, -2, 1) at x = -1, 0, 1: slope 1, s^2 = 6 / 1, Sxx = 2, t(1) = 12.706
    slope, interval = fit_slope([math.exp(v) for v in (-1, 0, 1)], [math.exp(v) for v in (0, -2, 2)])
    assert (slope, interval) == pytest.approx((1.0, 12.706 * math.sqrt(3.0)), rel=1e-12)


def test_expansion_recovers_a_polynomial() -> None:
    etas = torch.tensor(ETAS, dtype=torch.float64)
    signed = torch.stack([0.3 - 2 * etas + 5 * etas**3, etas**2], 1)
    found = expansion(ETAS, signed)
    assert found[0].tolist() == pytest.approx([0.3, 0.0], abs=1e-11)
    assert found[1].tolist() == pytest.approx([-2.0, 0.0], abs=1e-9)


@pytest.mark.parametrize(
    ("fine", "last", "a0", "a1", "order"),
    [
        (1.0, 1.0, 1e-9, 0.1, 1),
        (2.0, 2.0, 1e-9, 1e-6, 2),
        (0.0, 0.0, 0.1, 0.1, 0),
        (0.45, 0.47, 1e-2, 1.0, 0.5),
        (1.0, 1.0, 1e-3, 0.1, None),  # a floor hides below the slope
        (2.0, 2.0, 1e-9, 1e-2, None),
        (1.3, 1.0, 1e-9, 0.1, None),  # not yet asymptotic
        (1.0, 1.2, 1e-9, 0.1, None),
    ],
)
def test_both_criteria_must_agree(fine: float, last: float, a0: float, a1: float, order: float | None) -> None:
    assert read_order(fine, last, a0, a1) == order


def test_main_writes_json_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record, picture = tmp_path / "sde.json", tmp_path / "sde.png"
    assert verify.main(record, picture, quick=True) == 0
    data = json.loads(record.read_text())
    assert data["passed"] and len(data["rows"]) == len(line_rows())
    row = next(r for r in data["rows"] if r["equation"] == "paper (ii) with sqrt(eta): -rho(EI) grad L")
    assert (row["claimed_order"], row["true_order"], row["measured_order"]) == (1, 0, 0)
    assert row["verdict"] == "refuted: order 0" and len(row["errors"]) == len(row["etas"])
    assert picture.read_bytes()[:4] == b"\x89PNG"
    assert "verdicts agree with the theorem" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("no_colon", "module:Name"),
        ("no_such_module_xyz:Law", "cannot be imported"),
        ("pgpo.core:NoSuchLaw", "has no 'NoSuchLaw'"),
        ("pgpo.core:InformationMeter", "failed|not callable"),
        ("math:pi", "not callable"),
        ("pgpo.sde.problem:Bandit", "needs arguments"),
        ("math:log", "failed|finite"),
    ],
)
def test_a_bad_law_is_one_sentence(name: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        verify.main(law=name, quick=True)


def test_a_constant_law_is_refused() -> None:
    with pytest.raises(UserError, match="always"):
        verify.main(law=lambda information: 1.0, quick=True)


def test_an_output_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        verify.main(tmp_path / "missing" / "x.json", quick=True)


def test_a_law_of_the_user_goes_through_the_same_checks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_module.py").write_text("import math\n\ndef Gentle(i):\n    return 1 + 0.5 * math.tanh(i)\n")
    monkeypatch.chdir(tmp_path)
    assert verify.main(law="my_module:Gentle", quick=True) == 0
    assert "Gentle" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_command() -> None:
    assert verify.main() == 0
