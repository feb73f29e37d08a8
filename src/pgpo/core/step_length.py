"""How much of a step to keep, so that a costly measure of its length stays near a budget (measured trust, ours)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .signals import check, check_finite

# Of K in rho on a pretrained model, from a step that saturates the policy to a short one (measured: .5 to 1.9).
_EXPONENTS = (0.5, 2.0)
_FAR = 0.1  # ours: one move further than 10 times is made only where two measurements say so


def expected_size(slope: float, divergence: float) -> float | None:
    """slope^2 / D, to which K of the whole step is proportional; None where that says nothing.

    slope = -<gradient of D, before any clipping> . (theta_new - theta_old), in nats: what the step takes off the
    batch's own D at first order. A step of length lambda at cosine c to the way takes off 2 lambda c D and moves the
    policy by a multiple of lambda^2 D, so K ~ slope^2 / (c^2 D). Fitted in the lab: K ~ slope^2.01 D^-.94.
    """
    return slope**2 / divergence if slope > 0 and divergence > 0 else None


@dataclass(frozen=True)
class Verdict:
    """What to do at `rho`: keep the step there (accepted), or measure K there and `observe` it."""

    accepted: bool
    rho: float


class StepLength:
    """rho in [0, 1] with K(rho) near a budget, for a K that costs a forward pass and grows with rho.

    Model: K(rho) = e^level * size * rho^p. The level is remembered from earlier steps, so that a step's first
    measurement is usually its last. p is learned from steps that were measured twice: 2 for short steps, less where
    the policy saturates. Whatever the model says, an accepted rho > 0 has a MEASURED K <= tolerance * budget. If no
    measurement does, rho is 0: the step is undone.

    Too short a step is safe, and is measured again once at most, where K is below budget / tolerance^2.

    Args:
        tolerance: > 1; ours: 1.5.
        probes: measurements per step at most; ours: 6, enough for a first step 10^5 times too long.
        memory: weight of the newest step in the level; ours, measured: .3. A level wrong by more than a factor of 10,
            as after Adam's first step, is replaced.

    Attributes:
        moved: K at the last accepted rho, nats; nan if it was assumed.
        count: measurements of the last step.
    """

    def __init__(self, tolerance: float = 1.5, probes: int = 6, memory: float = 0.3) -> None:
        check(1 < tolerance < math.inf, f"tolerance is {tolerance!r}; it must be > 1 (1.5 accepts K up to 1.5 B).")
        check(probes >= 1, f"probes is {probes!r}; a step needs at least one measurement.")
        check(0 < memory <= 1, f"memory is {memory!r}; the weight of the newest step must lie in (0, 1].")
        self.tolerance, self.probes, self.memory = tolerance, probes, memory
        self.exponent = 2.0  # of short steps
        self.level: float | None = None
        self.size = 1.0
        self.moved, self.count = 0.0, 0
        self._budget, self._asked = 0.0, math.nan
        self._seen: list[tuple[float, float]] = []  # rho, K of this step

    def propose(self, budget: float, size: float | None = None) -> float:
        """Where to measure this step first; 0 where nothing may move.

        Args:
            budget: nats, >= 0.
            size: what K of the whole step should be proportional to, in any unit: see `expected_size`. None: as in
                the step before.

        Raises:
            ValueError: a budget that is not a finite number >= 0, or a size not > 0.
        """
        check_finite("the budget", budget, at_least=0)
        if size is not None:
            check(0 < size < math.inf, f"size is {size!r}; it must be a finite number > 0.")
            self.size = size
        self._budget, self._seen = budget, []
        if budget == 0 or self.level is None:
            self._asked = 1.0 if budget else 0.0
        else:
            self._asked = math.exp(min(0.0, (math.log(budget / self.size) - self.level) / self.exponent))
        return self._asked

    def observe(self, rho: float, moved: float) -> Verdict:
        """K at the rho that was asked for: accepted, or where to measure next.

        Args:
            rho: as returned by `propose` or by the last verdict.
            moved: nats; inf is a step too long, a negative value is rounding.

        Raises:
            ValueError: moved is nan, or rho is not what was asked for.
        """
        check(not math.isnan(moved), "K is nan: the probe's log-probabilities are not finite after the step.")
        check(rho == self._asked, f"K was measured at rho = {rho!r}, but asked for at {self._asked!r}.")
        moved = max(moved, 0.0) if rho > 0 else 0.0
        self._seen.append((rho, moved))
        short = [r for r, k in self._seen if k <= self.tolerance * self._budget]
        if moved > self.tolerance * self._budget:
            # What was measured to be within the budget is good enough; nothing was, and no probe is left: undo.
            done = bool(short) or len(self._seen) == self.probes
            return self._accept(max(short, default=0.0)) if done else self._ask(self._shorter())
        room = moved < self._budget / self.tolerance**2 and rho < 1
        if room and len(short) == 1 and len(self._seen) < self.probes:
            return self._ask(self._longer())
        return self._accept(rho)

    def assume(self) -> float:
        """The proposed rho, taken without measuring: for a probe every n-th step. The budget is aimed at, not kept.

        Raises:
            RuntimeError: no step was measured yet, so that the proposal means nothing.
        """
        if self.level is None and self._budget > 0:
            raise RuntimeError("assume() before any measurement: observe() K of a first step.")
        self.count, self.moved = 0, math.nan
        return self._asked

    def state_dict(self) -> dict[str, Any]:
        return {"exponent": self.exponent, "level": self.level, "size": self.size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.exponent, self.level, self.size = state["exponent"], state["level"], state["size"]

    def _ask(self, rho: float) -> Verdict:
        self._asked = rho
        return Verdict(False, rho)

    def _accept(self, rho: float) -> Verdict:
        self._learn()
        self._asked, self.count, self.moved = math.nan, len(self._seen), dict(self._seen).get(rho, 0.0)
        return Verdict(True, rho)

    def _shorter(self) -> float:
        rho, moved = self._seen[-1]
        if moved == math.inf:
            return rho * _FAR
        shrink = (self._budget / moved) ** (1 / self._local_exponent())
        return rho * max(shrink, _FAR**2)

    def _longer(self) -> float:
        rho, moved = self._seen[-1]
        grow = (self._budget / moved) ** (1 / self._local_exponent()) if moved else math.inf
        return min(1.0, rho * min(grow, 1 / _FAR))

    def _local_exponent(self) -> float:
        """Of the last two measurements of this step, if there are two."""
        points = [(math.log(r), math.log(k)) for r, k in self._seen[-2:] if 0 < k < math.inf]
        if len(points) < 2 or points[0][0] == points[1][0]:
            return self.exponent
        slope = (points[1][1] - points[0][1]) / (points[1][0] - points[0][0])
        return min(max(slope, _EXPONENTS[0]), _EXPONENTS[1])

    def _learn(self) -> None:
        rho, moved = min(self._seen, key=lambda point: abs(_log(point[1]) - _log(self._budget)))
        if moved == 0 and rho < 1:
            self.level = None  # so short that nothing moved: begin anew
        if not (rho > 0 and 0 < moved < math.inf):
            return
        if len(self._seen) > 1:
            self.exponent += 0.5 * (self._local_exponent() - self.exponent)
        level = math.log(moved / self.size) - self.exponent * math.log(rho)
        if self.level is not None and abs(level - self.level) < math.log(1 / _FAR):
            level = self.level + self.memory * (level - self.level)
        self.level = level


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf
