"""Measured trust (ours): a step moves the policy no further than the teacher's correction is worth.

    K(rho) = mean-token KL(before || after) of theta_old + rho (theta_new - theta_old)     nats, measured on a few rows
    B      = lambda^2 times the teacher's correction                                       nats
    step   : rho in [0, 1] with K(rho) near B, never above `tolerance` B

For policies at a small distance u, KL = u F u / 2 with the Fisher information F. So sqrt(K / KL to the teacher) is the
length of the step relative to the way to the teacher, and lambda bounds it (docs/THEOREM.md, "Measured trust").

    TrustBudget     a batch's divergence, information and gradient cosine -> B
    FixedBudget     B is a constant: TRPO's bound, a baseline
    StepLength      finds rho, with about one measurement per step (step_length.py)
    MeasuredTrust   budget and length: propose() -> measure K -> observe() -> ...
    LaggedRate      no undo: K of this step sets the learning rate of the next
    KLAdaptiveRate  the same in fixed factors, as in robot-learning libraries: a baseline

K and the cosine come from signals.py. "Ours, measured" means chosen in the lab world (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .divergence import check_divergence
from .signals import Agreement, Average, check, check_finite
from .step_length import StepLength, Verdict, expected_size

BUDGETS = ("auto", "information", "divergence")  # of TrustBudget


def kl_per_divergence(kind: str, beta: float = 0.5) -> float:
    """KL between two near policies in units of their divergence: 1 / (beta (1 - beta)) for Jensen-Shannon, else 1."""
    check_divergence(kind, beta, None)
    return 1 / (beta * (1 - beta)) if kind == "jsd" and 0 < beta < 1 else 1.0


class TrustBudget:
    """How far a step may move the policy, in nats of what the teacher knows.

        B = (lambda_k a s)^2 * kl_per_divergence * D
        lambda_k = max(fraction, first_fraction / sqrt(1 + k / settle))       k steps before this one, warm-up excepted
        a = Agreement, or 1

        budget         s, in [floor, 1]
        "divergence"   1
        "information"  I / (kl_per_divergence * D)
        "auto"         (I / D) / (that of the first `warmup` steps); 1 until then, and for good if that was below 1:
                       such a teacher is not surer than the student where the two differ, and its I is no measure

    D and I are running means (.9) of the batches' divergence (mean over tokens) and information.

    Args:
        fraction: length of a late step relative to the way to the teacher; ours, measured: .1.
        first_fraction: of the first step. Ours: .5, which is B = D for the Jensen-Shannon divergence: no further than
            the teacher asks.
        settle: steps after which lambda has fallen to first_fraction / sqrt(2). Ours, measured: 1, so that step k may
            move the policy by D / k until lambda is down at `fraction`. 3 and 10 cost accuracy in the lab (one seed);
            a lambda of .1 from the start is slow on a pretrained model.
        budget: "auto", "information" or "divergence".
        agreement: shorten steps while successive gradients disagree.
        kl_per_divergence: see the function of this name.
        floor: what a useless I leaves of a step; ours: .1, so that learning slows down and does not stop.
        warmup: ours, measured: 10.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        fraction: float = 0.1,
        first_fraction: float = 0.5,
        settle: float = 1.0,
        budget: str = "auto",
        agreement: bool = True,
        kl_per_divergence: float = 4.0,
        floor: float = 0.1,
        warmup: int = 10,
    ) -> None:
        check(budget in BUDGETS, f"budget is {budget!r}; choose one of {', '.join(BUDGETS)}.")
        check(0 < fraction <= 2, f"fraction is {fraction!r}; it must lie in (0, 2]: no step over 2 brings one nearer.")
        check(
            fraction <= first_fraction <= 2,
            f"first_fraction is {first_fraction!r}; it must lie in [fraction, 2], here [{fraction!r}, 2].",
        )
        check(0 < settle < math.inf, f"settle is {settle!r}; it must be a number of steps > 0.")
        check(0 < kl_per_divergence < math.inf, f"kl_per_divergence is {kl_per_divergence!r}; it must be > 0.")
        check(0 < floor <= 1, f"floor is {floor!r}; it must lie in (0, 1].")
        check(warmup >= 1, f"warmup is {warmup!r}; it must be at least one step.")
        self.fraction, self.first_fraction, self.settle = fraction, first_fraction, settle
        self.budget, self.kl_per_divergence, self.floor, self.warmup = budget, kl_per_divergence, floor, warmup
        self.agreement = Agreement() if agreement else None
        self.divergence, self.information = Average(), Average()
        self.steps = self.waited = 0  # with a teacher; of these, in the warm-up
        self.reference: float | None = None  # I / D of the first `warmup` steps

    def add(
        self,
        divergence: float | None,
        information: float | None = None,
        cosine: float | None = None,
        warming_up: bool = False,
    ) -> float:
        """A batch's signals -> B in nats.

        Args:
            divergence: None if no sample has a teacher. Then the means stand as they are; before the first batch that
                has one, B is 0: who asks for nothing gets nothing.
            information: I_k in nats; needed unless budget="divergence".
            cosine: for Agreement; None where there is none.
            warming_up: the schedule still raises the rate. Such a step is short by itself, and lambda does not fall.

        Raises:
            ValueError: a value that is not finite, a divergence < 0, or no information. Nothing is remembered then.
        """
        needed = divergence is not None and self.budget != "divergence"
        check(information is not None or not needed, f"budget={self.budget!r} needs the information of every batch.")
        for name, value, least in (
            ("the divergence", divergence, 0.0),
            ("the information", information, -math.inf),
            ("the cosine", cosine, -math.inf),
        ):
            if value is not None:
                check_finite(name, value, least)
        if self.agreement is not None:
            self.agreement.add(cosine)
        if divergence is not None:
            self.divergence.add(divergence)
            self.information.add(information or 0.0)
            self.steps += 1
            self.waited += warming_up
            if self.steps == self.warmup:
                self.reference = self._ratio()
        if self.divergence.value is None:
            return 0.0
        agreed = 1.0 if self.agreement is None else self.agreement.value
        return (self.share * agreed * self.throttle) ** 2 * self.kl_per_divergence * self.divergence.value

    @property
    def share(self) -> float:
        """lambda of the step whose batch came last."""
        k = max(self.steps - self.waited - 1, 0)
        return max(self.fraction, self.first_fraction / math.sqrt(1 + k / self.settle))

    @property
    def throttle(self) -> float:
        """s: below 1 where the teacher's information has fallen."""
        if self.budget == "divergence":
            return 1.0
        reference: float | None = self.kl_per_divergence
        if self.budget == "auto":
            reference = self.reference
            if reference is None or reference * 4 / self.kl_per_divergence < 1:  # in units of a Jensen-Shannon one
                return 1.0
        assert reference is not None
        return min(max(self._ratio() / reference, self.floor), 1.0)

    def _ratio(self) -> float:
        """I / D; 0 where the teacher is the student."""
        divergence, information = self.divergence.value, self.information.value
        return information / divergence if divergence and information is not None else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {
            "steps": self.steps,
            "waited": self.waited,
            "reference": self.reference,
            "divergence": self.divergence.state_dict(),
            "information": self.information.state_dict(),
            "agreement": None if self.agreement is None else self.agreement.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps, self.waited = state["steps"], state.get("waited", 0)  # states before it was counted
        self.reference = state["reference"]
        self.divergence.load_state_dict(state["divergence"])
        self.information.load_state_dict(state["information"])
        if self.agreement is not None and state["agreement"] is not None:
            self.agreement.load_state_dict(state["agreement"])


class FixedBudget:
    """B is always the same: the constraint of TRPO (Schulman et al. 2015), which knows nothing of the teacher.

    Args:
        nats: B, > 0.

    Raises:
        ValueError: nats is not a finite number > 0.
    """

    agreement = None

    def __init__(self, nats: float) -> None:
        check(0 < nats < math.inf, f"nats is {nats!r}; a fixed budget must be a finite number > 0.")
        self.nats = nats

    def add(self, *signals: Any, **more: Any) -> float:
        """B. The signals are not looked at."""
        return self.nats

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


def trust_budget(budget: str = "auto", nats: float | None = None, **settings: Any) -> TrustBudget | FixedBudget:
    """FixedBudget(nats) for budget="fixed", else TrustBudget(budget=budget, **settings).

    Raises:
        ValueError: a value outside its range; nats without budget="fixed", or the other way round.
    """
    check((budget == "fixed") == (nats is not None), f"nats is {nats!r} and budget {budget!r}; give both or neither.")
    return TrustBudget(budget=budget, **settings) if nats is None else FixedBudget(nats, **settings)


class MeasuredTrust:
    """The undo form: after the optimizer's step, keep the part rho of it that moves the policy by the budget.

        rho = trust.propose(divergence, information, cosine, slope)
        while True:
            ...                                   # theta at rho; K there, by kl_moved
            verdict = trust.observe(rho, K)
            rho = verdict.rho
            if verdict.accepted:
                break
        ...                                       # theta at rho; the optimizer's moments stay as they are

    At rho = 0 the step is undone and K is 0 without measuring. To measure every n-th step alone, take `assume()` in the
    others (n = 5 lost little in the lab, up to eight times the healthy rate; one seed).

    Args:
        tolerance, probes: see StepLength.
        clock: the averaged teacher follows with rate * rho, see `teacher_rate` (ours, measured).
        budget_settings: see `trust_budget`.

    Attributes:
        budget: B of this step, nats.
        rho: the last accepted one.
        length.moved, length.count: its K, and how many measurements it took.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, tolerance: float = 1.5, probes: int = 6, clock: bool = True, **budget_settings: Any) -> None:
        self.correction = trust_budget(**budget_settings)
        self.length = StepLength(tolerance, probes)
        self.clock, self.budget, self.rho = clock, 0.0, 1.0

    def propose(
        self,
        divergence: float | None,
        information: float | None = None,
        cosine: float | None = None,
        slope: float | None = None,
        scale: float = 1.0,
        warming_up: bool = False,
    ) -> float:
        """Where to measure this step first. Arguments and errors of TrustBudget.add; slope as in
        `expected_size`.

        scale: what else multiplies the step (rho, a guard), and so the budget by its square.
        """
        check(slope is None or math.isfinite(slope), f"slope is {slope!r}; it must be a finite number of nats.")
        self.budget = self.correction.add(divergence, information, cosine, warming_up) * scale**2
        size = None if slope is None or divergence is None else expected_size(slope, divergence)
        return self.length.propose(self.budget, size)

    def observe(self, rho: float, moved: float) -> Verdict:
        """K at rho -> keep it, or measure elsewhere. Arguments and errors of StepLength.observe."""
        verdict = self.length.observe(rho, moved)
        if verdict.accepted:
            self.rho = verdict.rho
        return verdict

    def assume(self) -> float:
        """The proposed rho, unmeasured: see StepLength.assume."""
        self.rho = self.length.assume()
        return self.rho

    def teacher_rate(self, rate: float) -> float:
        """By how much the averaged teacher follows after this step: no faster than the student moved."""
        return rate * self.rho if self.clock else rate

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; taken between two steps."""
        return {"rho": self.rho, "correction": self.correction.state_dict(), "length": self.length.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rho = state["rho"]
        self.correction.load_state_dict(state["correction"])
        self.length.load_state_dict(state["length"])


class LaggedRate:
    """The form without undo: the next step's learning rate is lr * factor.

        factor <- clip(factor clip((B / K)^gain, .1, 10), low, high)

    Args:
        gain: ours, measured: .15.
        low, high: ours, measured: .02 and 10.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, gain: float = 0.15, low: float = 0.02, high: float = 10.0) -> None:
        check(0 < gain <= 0.5, f"gain is {gain!r}; it must lie in (0, 0.5]: K grows with the square of the rate.")
        check(0 < low <= 1 <= high < math.inf, f"low and high are {low!r} and {high!r}; 1 must lie between them.")
        self.gain, self.low, self.high, self.factor = gain, low, high, 1.0

    def observe(self, budget: float, moved: float, most: float = math.inf) -> float:
        """The factor after a step that moved the policy by K nats at this budget.

        Args:
            most: the factor may not rise above it; 1 while the schedule itself raises the rate, whose short steps
                say nothing about the rate to come.

        A step that moved nothing measurable, as a tiny one in bf16, was too short. Where nothing was asked for, a step
        tells nothing. Raises ValueError for a nan, and for a budget that is not a finite number >= 0.
        """
        check_finite("the budget", budget, at_least=0)
        check(not math.isnan(moved), "K is nan: the probe's log-probabilities are not finite after the step.")
        if budget > 0:
            ratio = budget / moved if moved > 0 else math.inf
            high = max(min(self.high, most), self.low)
            self.factor = min(max(self.factor * self._change(ratio), self.low), high)
        return self.factor

    def _change(self, ratio: float) -> float:
        """What the factor is multiplied by at B / K; .1 to 10."""
        return min(max(ratio**self.gain, 0.1), 10.0)

    def state_dict(self) -> dict[str, float]:
        return {"factor": self.factor}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.factor = state["factor"]


class KLAdaptiveRate(LaggedRate):
    """The adaptive schedule of robot-learning libraries (rsl_rl, rl_games): fixed factors around a fixed target.

        K > 2 B: factor <- factor / 1.5;   K < B / 2: factor <- 1.5 factor

    Their rates lie between 1e-5 and 1e-2 around a start of 1e-3, hence low and high.
    """

    def __init__(self) -> None:
        super().__init__(low=0.01, high=10.0)

    def _change(self, ratio: float) -> float:
        return 1 / 1.5 if ratio < 0.5 else 1.5 if 2 < ratio < math.inf else 1.0
