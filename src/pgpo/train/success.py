"""Which reward says that a completion is a right solution."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pgpo.errors import UserError

SUM = "sum"  # the weighted sum of all rewards decides
ALL = "all"  # every function that applies must agree, so the smallest reward decides
RULES = (ALL, SUM)


@dataclass
class Success:
    """A completion is right if its deciding reward is at least the threshold; no deciding reward, not right.

    Args:
        decides: name of the reward function whose own reward, without its weight, decides; "sum" or "all" (a function
            of that name comes first); None: nothing does.
        threshold: the smallest reward of a right solution.
    """

    decides: str | None
    threshold: float
    _warned: bool = field(default=False, init=False)

    def of(self, rewards: Tensor, weights: Tensor, names: Sequence[str]) -> list[float] | None:
        """Deciding reward of each completion, nan where there is none; None if nothing decides.

        Args:
            rewards: [N, functions], nan where a function does not apply.
            weights: [functions].
            names: of the functions.
        """
        if self.decides is None:
            return None
        if self.decides in names:
            return rewards[:, list(names).index(self.decides)].tolist()
        if self.decides == SUM:
            return weighted_sum(rewards, weights).tolist()
        smallest = rewards.nan_to_num(nan=math.inf, posinf=math.inf).amin(dim=1)
        return smallest.masked_fill(rewards.isnan().all(dim=1), math.nan).tolist()

    def right(self, reward: float) -> bool:
        return reward >= self.threshold

    def warn_once(self, rewards: Sequence[float], say: Callable[[str], object]) -> None:
        """Rewards in percent, or penalties, make a threshold between 0 and 1 mean something else than meant."""
        strange = next((r for r in rewards if not math.isnan(r) and not 0 <= r <= 1), None)
        if strange is None or self._warned or self.decides in (None, SUM) or not 0 < self.threshold <= 1:
            return
        self._warned = True
        say(
            f"the reward that decides on success ({self.decides!r}) gave {strange:g}, outside [0, 1], while every "
            f"reward from success_threshold = {self.threshold:g} counts as a right solution; scale the rewards, or set "
            "the threshold."
        )


def weighted_sum(rewards: Tensor, weights: Tensor) -> Tensor:
    """[N] of [N, functions] and [functions]: TRL's reward, nan where no function applies."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    total[rewards.isnan().all(dim=1)] = torch.nan
    return total


def deciding(given: str | None, names: Sequence[str], needed: bool) -> str | None:
    """Which reward function, or rule over several, decides on success.

    Args:
        given: `success_reward`, or None for the only function.
        names: of the reward functions.
        needed: whether somebody must decide (self-distillation shows right solutions).

    Raises:
        UserError: an unknown or ambiguous name, or several functions and no name.
    """
    known = ", ".join(dict.fromkeys(names))
    if given is None:
        if len(names) == 1 or not needed:
            return names[0] if len(names) == 1 else None
        raise UserError(
            f"there are {len(names)} reward functions ({known}), and the sum of their rewards does not tell which "
            f"completions are right solutions to learn from; set success_reward to the name of the one that does, to "
            f"{ALL!r} (each must reach success_threshold) or to {SUM!r} (their weighted sum must)."
        )
    if given not in names:
        if given in RULES:
            return given
        raise UserError(
            f"success_reward is {given!r}, but the reward functions are {known}; name one of them, or set {ALL!r} or "
            f"{SUM!r}."
        )
    if list(names).count(given) > 1:
        raise UserError(
            f"success_reward is {given!r}, the name of {list(names).count(given)} reward functions; give them names of "
            "their own."
        )
    return given
