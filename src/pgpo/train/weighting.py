"""How much each sample learns from its teacher: `sample_weights`, one entry per rule."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Rule = Callable[[Sequence[bool], int], list[float]]


def equal(right: Sequence[bool], group: int) -> list[float]:
    """1 each (SDPO)."""
    return [1.0] * len(right)


def pass_rate(right: Sequence[bool], group: int) -> list[float]:
    """sqrt(p (1 - p)) with p the share of right completions of the sample's question (SC-SDPO, arXiv 2605.27765): most
    where half of them are right, nothing where all or none are."""
    shares = [sum(right[i - i % group : i - i % group + group]) / group for i in range(len(right))]
    return [math.sqrt(p * (1 - p)) for p in shares]


RULES: dict[str, Rule] = {"equal": equal, "pass_rate": pass_rate}


def weigh(rule: str, hinted: Sequence[bool], right: Sequence[bool], group: int) -> list[float]:
    """The weights of all ranks' samples, with mean 1 over those that learn; 0: it learns nothing, as without a teacher.

    Args:
        hinted: samples with a teacher; the others get 0.
        right: right completions, group after group.
        group: completions of a question.
    """
    weights = [w if has else 0.0 for w, has in zip(RULES[rule](right, group), hinted, strict=True)]
    learning = [w for w in weights if w > 0]
    return [w * len(learning) / math.fsum(learning) for w in weights] if learning else weights
