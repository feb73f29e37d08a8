"""Measured trust: the budget by value, the length of the step by what it guarantees, the lagged form, resume."""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pgpo.core import (
    FixedBudget,
    KLAdaptiveRate,
    LaggedRate,
    MeasuredTrust,
    StepLength,
    TrustBudget,
    Verdict,
    divergence,
    expected_size,
    kl_moved,
    kl_per_divergence,
    trust_budget,
)
from pgpo.core.trust import BUDGETS
from tests.oracles import trust as oracle

Curve = Callable[[float], float]
exponents = st.floats(0.5, 2.0)
few = settings(derandomize=True, deadline=None, max_examples=100)


def history(seed: int, steps: int = 30, quiet: float = 0.1) -> list[oracle.Signals]:
    """Signals as of a run: both shrink, the information also below 0, and a few batches have no teacher."""
    dice = random.Random(seed)
    return [
        (
            None if dice.random() < quiet else 0.1 * 0.95**k * math.exp(dice.gauss(0, 0.3)),
            0.4 * 0.9**k + dice.gauss(0, 0.02),
            None if k == 0 else dice.gauss(0.06, 0.05),
        )
        for k in range(steps)
    ]


def power(size: float, exponent: float) -> Curve:
    return lambda rho: size * rho**exponent


def search(length: StepLength, budget: float, moved: Curve, size: float | None = None) -> tuple[float, int]:
    """The accepted rho of one step, and the number of measurements."""
    rho, count = length.propose(budget, size), 0
    while True:
        verdict, count = length.observe(rho, moved(rho)), count + 1
        rho = verdict.rho
        if verdict.accepted:
            return rho, count


# The budget -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "agreement"), itertools.product(BUDGETS, [True, False]))
def test_budget_equals_the_oracle_at_every_step(kind: str, agreement: bool) -> None:
    """Red for a biased average, a wrong warm-up, the batch's I in place of the mean, a factor squared twice."""
    signals = history(seed=len(kind))
    budget = TrustBudget(0.1, 0.5, 3.0, kind, agreement)
    for k, batch in enumerate(signals):
        expected = oracle.budget(signals[: k + 1], kind, 0.1, 0.5, 3.0, 4.0, agreement)
        assert budget.add(*batch) == pytest.approx(expected, rel=1e-12)


def test_first_budget_is_the_divergence_itself() -> None:
    """first_fraction .5 with the Jensen-Shannon divergence: move no further than the teacher asks."""
    assert TrustBudget(budget="divergence", first_fraction=0.5).add(0.07) == pytest.approx(0.07)


def test_the_k_th_step_may_move_the_policy_by_its_share_of_the_divergence() -> None:
    """The default: B = D / k until lambda has come down to the fraction, at step 25."""
    budget = TrustBudget(budget="divergence", agreement=False)
    assert [budget.add(0.06) for _ in range(30)] == pytest.approx([0.06 / min(k, 25) for k in range(1, 31)])


def test_a_late_step_may_take_a_tenth_of_the_way() -> None:
    budget = TrustBudget(budget="divergence", fraction=0.1, first_fraction=0.1)
    assert [budget.add(0.07) for _ in range(3)] == pytest.approx([0.0028] * 3)


def test_a_useless_information_slows_the_learning_and_does_not_stop_it() -> None:
    """Red without the floor, and for an "auto" that takes a negative start as its measure."""
    plain, informed, auto = (TrustBudget(budget=b, first_fraction=0.1, agreement=False) for b in reversed(BUDGETS))
    for _ in range(30):
        d, i, a = (b.add(0.05, -0.03) for b in (plain, informed, auto))
    assert i == pytest.approx(0.01 * d) and a == d


def test_auto_throttles_where_the_run_has_lost_its_information() -> None:
    """I / D falls from 5 to 1.25, a quarter: a quarter of the length, a sixteenth of the nats."""
    auto = TrustBudget(budget="auto", first_fraction=0.1, agreement=False)
    healthy = [auto.add(0.02, 0.1) for _ in range(12)]
    assert healthy == pytest.approx([healthy[0]] * 12)
    for _ in range(300):
        late = auto.add(0.02, 0.025)
    assert late == pytest.approx(healthy[0] / 16, rel=1e-6)


def test_a_batch_without_a_teacher() -> None:
    """At first it allows nothing, later what the batches before it did. The clock of `settle` stands still."""
    budget = TrustBudget(budget="divergence", agreement=False)
    assert budget.add(None) == 0.0
    first = budget.add(0.02)
    assert budget.add(None) == first
    assert budget.add(0.02) == pytest.approx(first / 2)


def test_a_teacher_that_agrees_allows_nothing() -> None:
    for kind in BUDGETS:
        assert TrustBudget(budget=kind).add(0.0, 0.0) == 0.0


@pytest.mark.parametrize(
    ("kind", "signals", "sentence"),
    [
        ("auto", (math.nan, 0.1, 0.0), "the divergence is nan"),
        ("auto", (-1e-3, 0.1, 0.0), "the divergence is -0.001"),
        ("divergence", (0.1, math.inf, 0.0), "the information is inf"),
        ("auto", (0.1, 0.1, math.nan), "the cosine is nan"),
        ("information", (0.1, None, 0.0), "needs the information"),
    ],
)
def test_a_bad_signal_is_refused_and_forgotten(kind: str, signals: Any, sentence: str) -> None:
    budget = TrustBudget(budget=kind)
    budget.add(0.02, 0.1, 0.05)
    before = copy.deepcopy(budget.state_dict())
    with pytest.raises(ValueError, match=sentence):
        budget.add(*signals)
    assert budget.state_dict() == before


@pytest.mark.parametrize(
    ("setting", "value"),
    [("budget", "kl"), ("fraction", 0.0), ("fraction", 0.6), ("first_fraction", 2.1), ("settle", 0.0),
     ("kl_per_divergence", 0.0), ("floor", 0.0), ("warmup", 0), ("tolerance", 1.0), ("probes", 0)],
)  # fmt: skip
def test_a_setting_out_of_range(setting: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{value}"):
        MeasuredTrust(**{setting: value})


@pytest.mark.parametrize(
    ("kind", "beta"), [("jsd", 0.5), ("jsd", 0.2), ("jsd", 1.0), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
)
def test_near_policies_have_this_ratio_of_kl_and_divergence(kind: str, beta: float) -> None:
    """Red for 2 in place of 4, and for a JSD weight that is ignored."""
    torch.manual_seed(0)
    student = torch.randn(6, 9, dtype=torch.float64)
    teacher = student + 1e-4 * torch.randn_like(student)
    kl = kl_moved(student.log_softmax(-1), teacher.log_softmax(-1)).mean()
    ratio = float(kl / divergence(student, teacher, kind, beta).mean())
    assert ratio == pytest.approx(kl_per_divergence(kind, beta), rel=1e-3)


# The length of the step -----------------------------------------------------------------------------------------------


@few
@given(st.floats(1e-6, 1e6), exponents, st.lists(st.floats(0.2, 5), min_size=1, max_size=12), st.floats(1e-9, 1.0))
def test_the_budget_is_kept_whatever_the_exponent(size: float, p: float, noise: list[float], budget: float) -> None:
    """Red for a rho that is predicted and not measured: K / B of the whole step is up to 10^6 here."""
    length = StepLength()
    for factor in noise:
        moved = power(size * factor * budget, p)
        rho, count = search(length, budget, moved)
        assert 0 <= rho <= 1 and 1 <= count <= length.probes
        assert moved(rho) <= 1.5 * budget * (1 + 1e-12)


@pytest.mark.parametrize("p", [0.5, 1.0, 1.5, 2.0])
def test_the_longest_step_is_found_from_any_start(p: float) -> None:
    """Within a factor 1.5^(1/p) of bisection's, and after the first steps with one measurement each."""
    length = StepLength()
    curve = power(300, p)
    counts = []
    for _ in range(6):
        rho, count = search(length, 1.0, curve)
        counts.append(count)
    assert rho == pytest.approx(oracle.longest_step(curve, 1.0), rel=1.5 ** (1 / p) - 1)
    assert counts[2:] == [1, 1, 1, 1]


def test_a_step_that_saturates_the_policy_is_brought_back() -> None:
    """As measured on a pretrained model: exponent .5 where the step is far too long, 2 where it is short."""

    def curve(rho: float) -> float:
        return 500 * math.log1p((100 * rho) ** 2) / math.log1p(1e4)

    length = StepLength()
    results = [search(length, 1.0, curve) for _ in range(5)]
    assert all(curve(rho) <= 1.5 for rho, _ in results)
    assert curve(results[-1][0]) > 0.4 and results[-1][1] == 1


def test_about_one_measurement_per_step_where_steps_vary_as_in_the_lab() -> None:
    """sd of log K: 1.6 in the lab, .6 given its expected size. Red if the size is ignored (1.9 measurements)."""
    dice, length, count, steps = random.Random(1), StepLength(), 0, 400
    for _ in range(steps):
        size, surprise = math.exp(dice.gauss(0, 1.6)), math.exp(dice.gauss(0, 0.6))
        count += search(length, 0.01, lambda rho, k=size * surprise: k * rho**2, size)[1]
    assert count / steps < 1.5


def test_the_exponent_is_learned_from_steps_measured_twice() -> None:
    """Half the way from 2 to the measured 1."""
    length = StepLength()
    search(length, 1.0, power(50, 1.0))
    assert length.exponent == pytest.approx(1.5)


def test_an_odd_first_step_is_forgotten_at_once() -> None:
    """Adam's first step goes 100 times further than its slope says (measured). Red for a level that only drifts."""
    length = StepLength()
    search(length, 1.0, power(1e4, 2.0))
    assert [search(length, 1.0, power(1e2, 2.0))[1] for _ in range(3)] == [2, 1, 1]


def test_short_steps_pass_whole_with_one_measurement() -> None:
    length = StepLength()
    for _ in range(5):
        assert search(length, 1.0, lambda rho: 0.01 * rho**2) == (1.0, 1)


def test_too_short_a_step_is_measured_again_once() -> None:
    """100 times below the budget: once more, ten times further at exponent 2, then it is taken."""
    length = StepLength()
    assert length.propose(1.0) == 1.0
    shorter = length.observe(1.0, 10_000.0).rho
    assert shorter == pytest.approx(0.01)
    verdict = length.observe(shorter, 0.01)  # exponent 3 between the two, beyond what the model believes
    assert not verdict.accepted and verdict.rho == pytest.approx(0.1)
    assert length.observe(verdict.rho, 0.02) == Verdict(True, verdict.rho)


def test_a_second_look_too_far_returns_to_what_was_measured() -> None:
    """Red for a step taken at a rho whose K was never measured."""
    length = StepLength()
    length.propose(1.0)
    first = length.observe(1.0, 100.0).rho
    second = length.observe(first, 0.05).rho
    assert length.observe(second, 50.0) == Verdict(True, first)
    assert (length.moved, length.count) == (0.05, 3)


def test_no_rho_within_the_budget_undoes_the_step() -> None:
    length = StepLength(probes=3)
    rho, count = search(length, 1.0, lambda rho: 7.0)
    assert (rho, count, length.moved, length.count) == (0.0, 3, 0.0, 3)
    rho, count = search(StepLength(), 1.0, lambda rho: math.inf)
    assert (rho, count) == (0.0, 6)


def test_nothing_allowed_and_nothing_moved() -> None:
    length = StepLength()
    assert length.propose(0.0) == 0.0
    assert length.observe(0.0, 0.0) == Verdict(True, 0.0)
    assert search(length, 1.0, lambda rho: 0.0) == (1.0, 1)  # K = 0: no gradient, or a warm-up from rate 0
    assert search(length, 1.0, lambda rho: -1e-9) == (1.0, 1)  # rounding of a divergence
    assert search(StepLength(), 1.0, lambda rho: 1e4 if rho == 1 else -1e-9) == (pytest.approx(0.1), 3)
    assert length.state_dict()["level"] is None


def test_a_length_too_short_to_move_anything_is_forgotten() -> None:
    """Red if rounding to K = 0 keeps the step at that length for good."""
    length = StepLength()
    search(length, 1e-9, power(1.0, 2.0))
    search(length, 1e-9, lambda rho: 0.0 if rho < 1e-2 else 1e-12)
    assert search(length, 1e-9, lambda rho: 1e-10 * rho**2) == (1.0, 1)


@few
@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), exponents)
def test_the_length_knows_no_unit(nats: float, unit: float, p: float) -> None:
    """Nats times anything, sizes in any unit: the same rho."""
    one, other = StepLength(), StepLength()
    for k in range(5):
        size = 1 + k % 3
        rho, count = search(one, 1.0, power(40 * size, p), size)
        scaled, same = search(other, nats, power(nats * 40 * size, p), unit * size)
        assert (scaled, same) == (pytest.approx(rho, rel=1e-6), count)


def test_what_is_not_a_measurement_is_refused() -> None:
    length = StepLength()
    length.propose(1.0)
    with pytest.raises(ValueError, match="K is nan"):
        length.observe(1.0, math.nan)
    with pytest.raises(ValueError, match=r"asked for at 1\.0"):
        length.observe(0.5, 0.1)
    with pytest.raises(ValueError, match="budget is inf"):
        length.propose(math.inf)
    with pytest.raises(ValueError, match="size is 0"):
        length.propose(1.0, 0.0)


def test_expected_size_by_hand() -> None:
    assert expected_size(0.02, 0.01) == pytest.approx(0.04)
    assert expected_size(-0.02, 0.01) is expected_size(0.02, 0.0) is None


# Both, on a policy ----------------------------------------------------------------------------------------------------


def test_a_policy_moves_no_further_than_the_teacher_asks_at_any_rate() -> None:
    """Softmax policies, gradient descent with rates over four decades: the budget is kept at every step, and it learns.

    Red if rho multiplies K in place of the step, or is applied to the wrong end.
    """
    torch.manual_seed(0)
    teacher = 2 * torch.randn(8, 6, dtype=torch.float64)
    finals = []
    for rate in (1e2, 1e4, 1e6):
        theta = torch.zeros(8, 6, dtype=torch.float64)
        trust = MeasuredTrust(budget="divergence", agreement=False, first_fraction=0.5)
        start = float(divergence(theta, teacher).mean())
        for _ in range(60):
            leaf = theta.clone().requires_grad_()
            loss = divergence(leaf, teacher).mean()
            (gradient,) = torch.autograd.grad(loss, leaf)
            step, before = -rate * gradient, theta.log_softmax(-1)
            rho = trust.propose(loss.item(), slope=-float((gradient * step).sum()))
            while True:
                moved = float(kl_moved(before, (theta + rho * step).log_softmax(-1)).mean())
                verdict = trust.observe(rho, moved)
                rho = verdict.rho
                if verdict.accepted:
                    break
            assert float(kl_moved(before, (theta + rho * step).log_softmax(-1)).mean()) <= 1.5 * trust.budget + 1e-12
            theta = theta + rho * step
        finals.append(float(divergence(theta, teacher).mean()) / start)
    assert max(finals) < 0.1


def test_the_teacher_follows_no_faster_than_the_student_moved() -> None:
    trust = MeasuredTrust(budget="divergence")
    assert trust.teacher_rate(0.05) == 0.05
    rho = trust.propose(0.01)
    trust.observe(rho, 0.01)
    assert trust.teacher_rate(0.05) == 0.05
    rho = trust.propose(0.01)
    rho = trust.observe(rho, 1.0).rho
    assert trust.observe(rho, trust.budget).accepted and 0 < rho < 1
    assert trust.teacher_rate(0.05) == pytest.approx(0.05 * rho)
    assert MeasuredTrust(clock=False).teacher_rate(0.05) == 0.05


def test_an_assumed_step_has_the_predicted_length_and_teaches_nothing() -> None:
    """Red if it changes the model, or leaves the teacher's clock at the step before."""
    trust = MeasuredTrust(budget="divergence", agreement=False)
    trust.propose(0.01, slope=0.01)
    with pytest.raises(RuntimeError, match="before any measurement"):
        trust.assume()
    rho = trust.observe(1.0, 100 * trust.budget).rho
    trust.observe(rho, trust.budget)
    model = trust.length.state_dict()
    rho = trust.propose(0.01, slope=0.02)  # twice the slope, half the budget: K four times, rho 1/10 / sqrt(8)
    assert trust.assume() == rho == pytest.approx(0.1 / math.sqrt(8))
    assert trust.teacher_rate(0.05) == 0.05 * rho and trust.length.count == 0
    assert {**trust.length.state_dict(), "size": None} == {**model, "size": None}
    assert MeasuredTrust().propose(None) == MeasuredTrust().length.propose(0.0) == 0.0


def test_resume_is_the_uninterrupted_run() -> None:
    """Every step alike after a round trip through JSON, at every possible step. Red if any state is left out."""
    signals = history(seed=5, steps=24)

    def step(trust: MeasuredTrust, k: int) -> float:
        rho = trust.propose(*signals[k], slope=0.01 * (1 + k % 4))
        while True:
            verdict = trust.observe(rho, 3 * (1 + k % 4) * rho**1.7)
            rho = verdict.rho
            if verdict.accepted:
                return rho

    whole = MeasuredTrust()
    saved, rhos = [], []
    for k in range(24):
        saved.append(json.dumps(whole.state_dict()))
        rhos.append(step(whole, k))
    assert any(d is None for d, _, _ in signals)  # such a step takes over the size of the one before
    for k in range(24):
        again = MeasuredTrust()
        again.load_state_dict(json.loads(saved[k]))
        assert [step(again, j) for j in range(k, 24)] == rhos[k:]


# The lagged form ------------------------------------------------------------------------------------------------------


def test_lagged_factor_by_hand_and_within_its_bounds() -> None:
    rate = LaggedRate()
    assert rate.observe(0.01, 0.02) == pytest.approx(0.5**0.15)
    assert (
        rate.observe(0.0, 0.1) == rate.observe(0.0, 0.0) == pytest.approx(0.5**0.15)
    )  # nothing asked: nothing learned
    assert LaggedRate(high=100.0).observe(0.01, 0.0) == 10.0  # too short to be measured, as a tiny rate in bf16
    assert KLAdaptiveRate().observe(0.01, 0.0) == 1.0  # rsl_rl asks for K > 0
    for moved, bound in ((1e-9, 10.0), (1e9, 0.02), (math.inf, 0.02)):
        for _ in range(40):
            rate.observe(0.01, moved)
        assert rate.factor == bound
    rate.observe(0.0, 0.01)
    assert rate.factor == 0.02
    with pytest.raises(ValueError, match="K is nan"):
        rate.observe(0.01, math.nan)
    with pytest.raises(ValueError, match="budget is nan"):
        rate.observe(math.nan, 0.01)
    again = LaggedRate()
    again.load_state_dict(json.loads(json.dumps(rate.state_dict())))
    assert again.factor == rate.factor


@few
@given(st.floats(-6, 6), exponents)
def test_lagged_rate_settles_where_the_budget_is_spent(distance: float, p: float) -> None:
    """From any rate within its bounds: K of rate m is m^p e^distance. Red for the inverted ratio, which runs away."""
    rate, budget = LaggedRate(), 1.0
    for _ in range(200):
        rate.observe(budget, math.exp(distance) * rate.factor**p)
    target = math.exp(-distance / p)
    assert rate.factor == pytest.approx(min(max(target, 0.02), 10.0), rel=1e-3)


def test_lagged_factor_stays_below_what_the_schedule_allows() -> None:
    rate = LaggedRate()
    assert rate.observe(1.0, 1e-6, most=1.0) == 1.0
    assert rate.observe(1.0, 2.0, most=1.0) == pytest.approx(0.5**0.15)
    assert rate.observe(1.0, 1e-6) > 1.0
    assert rate.observe(1.0, 0.5, most=1.0) == 1.0


def test_the_robot_learning_rate_by_hand() -> None:
    """Fixed factors outside [B / 2, 2 B], between .01 and 10 times the start."""
    rate = KLAdaptiveRate()
    for moved, factor in ((2.1, 1 / 1.5), (1.9, 1 / 1.5), (0.51, 1 / 1.5), (0.49, 1.0), (math.inf, 1 / 1.5)):
        assert rate.observe(1.0, moved) == pytest.approx(factor)
    for moved, bound in ((1e-9, 10.0), (1e9, 0.01)):
        for _ in range(40):
            rate.observe(1.0, moved)
        assert rate.factor == bound


def test_a_fixed_budget_looks_at_nothing() -> None:
    trust = MeasuredTrust(budget="fixed", nats=0.003)
    trust.propose(0.5, 2.0, 0.3)
    assert trust.budget == 0.003
    trust.load_state_dict(json.loads(json.dumps(trust.state_dict())))
    assert trust_budget("fixed", 0.003).add(None) == 0.003
    for bad in ({"budget": "fixed"}, {"nats": 0.1}, {"budget": "auto", "nats": 0.1}):
        with pytest.raises(ValueError, match="give both or neither"):
            trust_budget(**bad)
    for nats in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="fixed budget must be"):
            FixedBudget(nats)


@pytest.mark.parametrize("bad", [{"gain": 0.0}, {"gain": 0.6}, {"low": 0.0}, {"low": 2.0}, {"high": 0.5}])
def test_lagged_settings_out_of_range(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must"):
        LaggedRate(**bad)


def test_a_warm_up_leaves_lambda_where_it_starts() -> None:
    """B after four steps of a warm-up is that of a first step, and falls from there as without one."""
    plain, warmed = (TrustBudget(budget="divergence", agreement=False) for _ in range(2))
    first = [warmed.add(0.2, warming_up=True) for _ in range(4)]
    assert first == pytest.approx([4 * 0.25 * 0.2] * 4)
    assert [warmed.add(0.2) for _ in range(30)] == pytest.approx([plain.add(0.2) for _ in range(30)])
    again = TrustBudget(budget="divergence", agreement=False)
    again.load_state_dict(json.loads(json.dumps(warmed.state_dict())))
    assert again.share == warmed.share == pytest.approx(0.1)


def test_the_information_of_a_warm_up_is_a_reference_like_any_other() -> None:
    """Only lambda waits: red if "auto" compares with the first steps after a warm-up."""
    law = TrustBudget(agreement=False, warmup=3)
    for information in (1.0, 1.0, 1.0):
        law.add(0.2, information, warming_up=True)
    assert law.reference == pytest.approx(5.0)
