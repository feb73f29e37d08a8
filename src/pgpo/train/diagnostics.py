"""Warnings when a run has nothing to learn from, as in TRL's SDPOTrainer."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from pgpo.core.signals import Average
from pgpo.settings.config import PGPOConfig
from pgpo.train.user_functions import CONTEXT_COLUMN

_IN_A_ROW = 3  # ours: steps without signal after which a warning says so


# Ours: further than the teacher asks. Measured in the lab (docs/LOG.md): at most .6 where a run is healthy.
_FAR = 1.0
_FARTHEST = 1e3  # ours: one step into nothing finite must not ring for good


class Diagnostics:
    """Counts generations in a row that teach nothing. say: gets the sentences."""

    def __init__(self, config: PGPOConfig, say: Callable[[str], object]) -> None:
        self.config, self.say = config, say
        self._length = Average(0.8)  # log K / D varies by a factor of 5 between neighbouring steps
        self._counts = {"flat": 0, "inactive": 0, "far": 0}

    def flat(self, step: int, rewards: Sequence[float]) -> None:
        """Rewards that are all alike. rewards: of all ranks, nan where there is none."""
        found = [r for r in rewards if not math.isnan(r)]
        value = f"{found[0]:g}" if found else "None"
        self._warn(
            "flat",
            step,
            not found or statistics.pstdev(found) <= self.config.diagnostics_flat_tolerance,
            f"all {len(found)} rewards were {value}, so no completion is better than another; look at the "
            "reward function and at how hard the questions are.",
        )

    def inactive(self, step: int, rewards: Sequence[float], active: int) -> None:
        """active: completions with a teacher."""
        best = max((r for r in rewards if not math.isnan(r)), default=math.nan)
        self._warn(
            "inactive",
            step,
            active == 0,
            f"no completion had a teacher, so that nothing was learned (largest reward {best:g}, "
            f"success_threshold = {self.config.success_threshold:g}); take a lower temperature, easier questions, a "
            f"lower threshold or more num_generations, give feedback_funcs or a column {CONTEXT_COLUMN!r}, or use "
            "objective='grpo', for which rewards need only differ.",
        )

    def far(self, step: int, ratio: float) -> None:
        """ratio: K / D, how far a step that was measured moved the policy against how far the teacher asks."""
        if ratio > 0:
            self._length.add(math.log(min(ratio, _FARTHEST)))
        mean = 0.0 if self._length.value is None else math.exp(self._length.value)
        self._warn(
            "far",
            step,
            mean > _FAR,
            f"steps move the policy {mean:.1f} times as far as the teacher asks (KL to the policy before the step over "
            "the divergence to the teacher); lower the learning rate, or set trust='measured'.",
            "measured steps",
        )

    def _warn(self, kind: str, step: int, degenerate: bool, text: str, counted: str = "steps") -> None:
        """Warn at the third step in a row (sooner if the interval is shorter), then after every interval."""
        count = self._counts[kind] = self._counts[kind] + 1 if degenerate else 0
        interval = self.config.diagnostics_warning_interval
        first = min(_IN_A_ROW, interval)
        if interval > 0 and count >= first and (count - first) % interval == 0:
            self.say(f"at step {step}, for {count} {counted} in a row: {text}")
