"""What measured trust (trust.py) looks at: how far a step moved the policy, and whether gradients agree.

    kl_moved         KL(before || after) per token: from all tokens, the most likely ones, or the sampled ones
    token_mean       its mean over a probe's tokens and all ranks
    gradient_cosine  of a gradient with Adam's memory of the earlier ones
    Agreement        running mean of that cosine -> a factor in (0, 1]
    AdaptiveClip     gradient norm clip at a multiple of its own running mean

"Ours, measured" means chosen in the lab world (docs/LOG.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .divergence import _append_tail, divergence_of_log_probs
from .information import sum_dtype

KEPT = ("all", "top", "sampled")

Reduce = Callable[[Tensor], Tensor]


def kl_moved(before: Tensor, after: Tensor, kept: str = "all") -> Tensor:
    """KL(before || after) at every position, from log-probabilities at the sampling temperature.

    kept       before, after                                         error against "all"
    "all"      [..., V] of every token                               none: the definition
    "top"      [..., k] of the k tokens most likely BEFORE           never above it: the other tokens count as one
    "sampled"  [...] of the completion's tokens, drawn from BEFORE   none on average, but one draw per position

    "sampled" is (r - 1) - log r with r = after / before. E_before[r - 1] = 0 leaves the mean alone, and no single draw
    is negative. It is unbiased only for tokens drawn from `before` itself, at its temperature.

    Returns:
        [...] nats, >= 0, fp32 (fp64 for fp64); inf where `after` rules out what `before` allows. No gradient.

    Raises:
        ValueError: unknown kind, or shapes that differ.
    """
    if kept not in KEPT:
        raise ValueError(f"kept is {kept!r}; choose one of {', '.join(KEPT)}.")
    if before.shape != after.shape:
        raise ValueError(f"before and after must have one shape; got {tuple(before.shape)} and {tuple(after.shape)}.")
    before, after = (x.detach() if x.dtype == torch.float64 else x.detach().float() for x in (before, after))
    if kept == "sampled":
        log_ratio = after - before
        return torch.expm1(log_ratio) - log_ratio
    if kept == "top":
        before, after = _append_tail(before), _append_tail(after)
    return divergence_of_log_probs(before, after, "reverse_kl", 0.0).clamp_min(0)


def token_mean(values: Tensor, mask: Tensor | None = None, reduce: Reduce | None = None) -> float:
    """Mean of values over the positions where mask is non-zero, over all ranks; 0.0 if there are none.

    Args:
        values: [...]; what lies outside the mask is ignored, whatever it is.
        mask: [...], or None for everywhere.
        reduce: sums a [2] tensor over ranks. Every rank must call it.
    """
    mask = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
    dtype = sum_dtype(values.device)
    sums = torch.stack([torch.where(mask, values.to(dtype), 0.0).sum(), mask.sum().to(dtype)])
    total, count = (sums if reduce is None else reduce(sums)).tolist()
    return total / count if count else 0.0


def gradient_cosine(pairs: Iterable[tuple[Tensor, Tensor]], reduce: Reduce | None = None) -> float | None:
    """Cosine of the gradient with the first moment BEFORE the step, over all parameters; None if either is zero.

    Args:
        pairs: (gradient, moment) of every parameter, or of this rank's shards.
        reduce: sums a [3] tensor over the ranks that hold different shards. Every rank must call it.
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for gradient, moment in pairs:
        g, m = gradient.detach().flatten().float(), moment.detach().flatten().float()
        sums += torch.stack([g @ m, g @ g, m @ m]).to(sums)
    dot, gg, mm = (sums if reduce is None else reduce(sums)).tolist()
    return dot / math.sqrt(gg) / math.sqrt(mm) if gg > 0 and mm > 0 else None


class Average:
    """Exponential average, without the bias of its start; `value` is None before the first number."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay, self.total, self.weight = decay, 0.0, 0.0

    def add(self, value: float) -> None:
        self.total = self.decay * self.total + (1 - self.decay) * value
        self.weight = self.decay * self.weight + (1 - self.decay)

    @property
    def value(self) -> float | None:
        return self.total / self.weight if self.weight else None

    def state_dict(self) -> dict[str, float]:
        return {"total": self.total, "weight": self.weight}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.total, self.weight = state["total"], state["weight"]


class Agreement:
    """Do successive gradients point one way? a = clip(mean cosine / unit, floor, 1); 1 in the first steps.

    Args:
        unit: cosine that counts as full agreement; ours, measured: .1.
        floor: ours, measured: .1.
        warmup: cosines before the first verdict; ours: 5.
        decay: of the running mean; ours: .9, the decay of Adam's first moment.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, unit: float = 0.1, floor: float = 0.1, warmup: int = 5, decay: float = 0.9) -> None:
        check(unit > 0, f"unit is {unit!r}; the cosine of full agreement must be > 0.")
        check(0 < floor <= 1, f"floor is {floor!r}; it must lie in (0, 1].")
        self.unit, self.floor, self.warmup = unit, floor, warmup
        self.steps, self.average = 0, Average(decay)

    def add(self, cosine: float | None) -> None:
        """A step's cosine; None where it has none. Raises ValueError if it is not finite."""
        if cosine is not None:
            check_finite("the cosine", cosine)
            self.steps += 1
            self.average.add(cosine)

    @property
    def value(self) -> float:
        """a."""
        mean = self.average.value
        if mean is None or self.steps <= self.warmup:
            return 1.0
        return min(max(mean / self.unit, self.floor), 1.0)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": self.average.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]
        self.average.load_state_dict(state["average"])


class AdaptiveClip:
    """Gradient norm clip at `ratio` times its own running mean: one odd batch must not fill Adam's memory.

        l = ratio gbar;   g <- g min(1, l / |g|);   gbar <- decay gbar + (1 - decay) min(|g|, l);   gbar = |g| at first

    Args:
        ratio: ours, measured: 2.
        decay: ours, measured: .95.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, ratio: float = 2.0, decay: float = 0.95) -> None:
        check(ratio >= 1, f"ratio is {ratio!r}; a limit below the mean norm (1) would shrink every gradient.")
        check(0 <= decay < 1, f"decay is {decay!r}; it must lie in [0, 1).")
        self.ratio, self.decay, self.mean = ratio, decay, 0.0

    def __call__(self, norm: float) -> float:
        """The factor in (0, 1] for a gradient of this norm. A zero gradient (no teacher) leaves the mean alone.

        Raises:
            ValueError: the norm is not a finite number >= 0; nothing is remembered then.
        """
        check_finite("the gradient norm", norm, at_least=0)
        if norm == 0:
            return 1.0
        if self.mean == 0:
            self.mean = norm
        kept = min(norm, self.ratio * self.mean)
        self.mean = self.decay * self.mean + (1 - self.decay) * kept
        return kept / norm

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.mean}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self.mean = state["mean"]


def check(holds: bool, sentence: str) -> None:
    """Raise ValueError(sentence) unless it holds."""
    if not holds:
        raise ValueError(sentence)


def check_finite(name: str, value: float, at_least: float = -math.inf) -> None:
    """Raise ValueError unless value is a finite number, at_least or more."""
    bound = "" if at_least == -math.inf else f" >= {at_least:g}"
    check(math.isfinite(value) and value >= at_least, f"{name} is {value!r}; it must be a finite number{bound}.")
