"""When the teacher of kind "gated" is renewed: a rule on numbers of the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

SMOOTHING = 0.8  # as the collapse guard's signals (alarms.py)
TAIL = 1.25  # ours, not fitted: a tail a quarter longer


class RefreshCondition:
    """Holds once the reward has risen and completions have not grown long since the teacher was last renewed.

    Consolidation-gated teacher refresh (arXiv 2606.03532) renews the teacher on joint evidence of a better reward and a
    safe tail of lengths, after a period in which it stands still (`teacher_sync_steps`). The smoothing and the two
    comparisons are ours:

        s <- .8 s + .2 x      of the batch's mean reward, and of the 95th percentile of its lengths
        holds: s_reward > s_reward then, and s_tail <= 1.25 s_tail then

    "Then" is the last renewal, before the first one the first batch. So the rewards at renewals only rise.
    """

    def __init__(self) -> None:
        self.reward: float | None = None  # smoothed
        self.tail: float | None = None
        self.then: list[float] | None = None  # reward and tail at the last renewal

    def observe(self, metrics: Mapping[str, Any]) -> None:
        """Add `reward` and `length_tail` [tokens] of a step; a step without them, or with a nan, changes nothing."""
        reward, tail = metrics.get("reward"), metrics.get("length_tail")
        if reward is None or tail is None or not math.isfinite(reward + tail):
            return
        self.reward, self.tail = _smoothed(self.reward, reward), _smoothed(self.tail, tail)
        if self.then is None:
            self.renewed()

    @property
    def holds(self) -> bool:
        if self.then is None or self.reward is None or self.tail is None:
            return False
        return self.reward > self.then[0] and self.tail <= TAIL * self.then[1]

    def renewed(self) -> None:
        """The teacher is the student of now."""
        assert self.reward is not None and self.tail is not None
        self.then = [self.reward, self.tail]

    def state_dict(self) -> dict[str, Any]:
        """Plain JSON, exact."""
        return {"reward": self.reward, "tail": self.tail, "then": self.then}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.reward, self.tail = state["reward"], state["tail"]
        self.then = None if state["then"] is None else list(state["then"])


def _smoothed(before: float | None, value: float) -> float:
    return value if before is None else SMOOTHING * before + (1 - SMOOTHING) * value
