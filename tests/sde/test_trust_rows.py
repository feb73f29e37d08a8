"""Measured trust on the bench: every row and number as the theory says, and mistakes in the code turn them."""

from __future__ import annotations

import math

import pytest
import torch

from pgpo.sde import trust
from pgpo.sde.problem import FEEDBACK, PHI_2, Bandit
from pgpo.sde.verify import ETAS, measure


@pytest.mark.parametrize("row", trust.trust_rows(), ids=lambda row: f"{row.chain} | {row.equation}")
def test_order_is_that_of_the_theory(row) -> None:  # type: ignore[no-untyped-def]
    outcome = measure(row, ETAS)
    assert outcome.agrees, outcome.verdict


def test_wrong_versions_are_among_the_rows() -> None:
    """A bench that accepts everything shows nothing."""
    rejected = [row for row in trust.trust_rows() if row.claimed is None]
    assert len(rejected) == 6 and {measure(row, ETAS).verdict for row in rejected} == {"rejected"}


def test_numbers_are_those_of_the_theory() -> None:
    assert [fact for fact in trust.trust_facts() if not fact.holds] == []


def test_planted_mistakes_turn_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """K read the wrong way round, K of a renormalised top 2, and a K that forgets the tokens that became unlikely."""
    real = trust.kl_moved

    def kept(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        top, index = before.topk(2, -1)
        return real(top.log_softmax(-1), after.gather(-1, index).log_softmax(-1))

    def increased(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        return (before.exp() * (before - after)).clamp_min(0).sum(-1)

    for wrong in (lambda before, after: real(after, before), kept, increased):
        monkeypatch.setattr(trust, "kl_moved", wrong)
        rows = [row for row in trust.trust_rows() if row.claimed is not None]
        assert not all(measure(row, ETAS).agrees for row in rows)


def test_planted_mistakes_turn_the_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher that reads the student before its step; a metric without centring."""
    right = trust.loop_radius

    def reads_the_old_student(forget: float, copy: float, rate: float) -> float:
        matrix = torch.tensor([[1 - forget, copy], [rate, 1 - rate]], dtype=torch.float64)
        return float(torch.linalg.eigvals(matrix).abs().max())

    monkeypatch.setattr(trust, "loop_radius", reads_the_old_student)
    assert not all(fact.holds for fact in trust.bandit_loop())
    monkeypatch.setattr(trust, "loop_radius", right)

    def uncentred(bandit: Bandit, theta: torch.Tensor, u: torch.Tensor, order: int) -> torch.Tensor:
        along = torch.einsum("xvd,md->mxv", bandit.phi, u)
        return (trust.log_policy(bandit, theta).exp() * along**order).sum(-1).mean(-1)

    monkeypatch.setattr(trust, "cumulant", uncentred)
    assert not all(fact.holds for fact in trust.best_step())


def test_determinant_says_where_the_loop_is_stable() -> None:
    """det(M - 1) = rate eta (f - c), by hand at one place, and its sign against the radius at many."""
    for forget, copy, rate in ((0.2, 0.3, 0.05), (0.3, 0.2, 0.01), (0.1, 0.11, 0.5), (0.05, 0.049, 0.001)):
        matrix = torch.tensor([[1 - forget, copy], [rate * (1 - forget), 1 - rate + rate * copy]], dtype=torch.float64)
        determinant = float(torch.linalg.det(matrix - torch.eye(2, dtype=torch.float64)))
        assert determinant == pytest.approx(rate * (forget - copy), rel=1e-9)
        assert (trust.loop_radius(forget, copy, rate) < 1) == (copy < forget)


def test_the_bandit_has_both_kinds_of_fixed_point() -> None:
    values = {fact.name: fact.value for fact in trust.bandit_loop()}
    assert values["c > f: c / f"] > 1.05 and values["c < f: c / f"] < 0.95
    slow, fast = (math.log(2) / math.log(values[f"c > f, teacher rate {rate}"]) for rate in ("0.01", "0.05"))
    assert 3 < slow / fast < 5  # a slower teacher delays, and does not cure


def test_steps_have_the_length_and_the_cosine_asked_for() -> None:
    bandit, way = Bandit(PHI_2, FEEDBACK, 0.5), torch.tensor([[1.0, 0.3]] * 3, dtype=torch.float64)
    step = trust._step(bandit, way, 0.7, 0.6)
    uu, vv, both = (trust.cumulant(bandit, trust.STATES, u, 2) for u in (way, step, way + step))
    assert (vv / uu).sqrt().tolist() == pytest.approx([0.7] * 3)
    assert ((both - uu - vv) / 2 / (uu * vv).sqrt()).tolist() == pytest.approx([0.6] * 3)
