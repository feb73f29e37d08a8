"""Which batch's information scales a step. With rho from the same batch E[rho g] is not E[rho] E[g] (docs/THEOREM.md).

    same_batch   g_k is scaled by rho(I_k)                                     the paper's Eq. 9
    lagged       g_k is scaled by rho(I_{k-1}); the first step by 1            EarlierInformation
    cross_fit    two half-batches: rho(I_B) g_A + rho(I_A) g_B                 CrossFit

In the last two the multiplier is independent of the gradient it scales (lagged: given the parameters), so the mean
step is E[rho] times the mean gradient. Both are ours; the paper has only the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class EarlierInformation:
    """Exponential average of the information of earlier steps.

    Args:
        weight: weight of the newest step, in (0, 1]; 1 = the previous step only.

    Raises:
        ValueError: weight outside (0, 1].
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight is {weight!r}; the newest step's share must lie in (0, 1].")
        self.weight = float(weight)
        self.value: float | None = None

    def exchange(self, information: float) -> float | None:
        """Return the average over the earlier steps (nats; None at the first step), then add this step's information.

        Raises:
            ValueError: information is not finite; the average stays unchanged.
        """
        if not math.isfinite(information):
            raise ValueError(f"information is {information!r}; an average needs a finite entropy gap in nats.")
        earlier = self.value
        self.value = information if earlier is None else earlier + self.weight * (information - earlier)
        return earlier

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. Raises ValueError if it was written with another weight."""
        if state.get("weight") != self.weight:
            raise ValueError(f"the saved average has weight {state.get('weight')!r}, this one {self.weight!r}.")
        self.value = state["value"]


class CrossFit:
    """Gradient of two half-batches, each scaled by the other's multiplier.

        (loss of half A).backward();  halves.stash()
        (loss of half B).backward();  rho = halves.combine(rho_a, rho_b)
        handle.arm(rho);  optimizer.step()

    The two losses are the halves' parts of the batch's loss, so g_A + g_B is the plain gradient. Adam normalises its
    gradient, so only the ratio of the two multipliers goes into the gradient; their mean goes through `modulate`:

        .grad = (rho_B g_A + rho_A g_B) / m,   m = (rho_A + rho_B) / 2,   step multiplier m

    With SGD the step is lr * (rho_B g_A + rho_A g_B). With rho_A = rho_B .grad is the plain gradient, bit for bit.
    The class holds one copy of the gradient. Clip gradients between `combine` and the step.

    Args:
        parameters: the optimizer's parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._first: list[Tensor | None] | None = None

    def stash(self) -> None:
        """Move half A's gradients out of `.grad`, which is None afterwards.

        Raises:
            RuntimeError: half A is stashed already.
        """
        if self._first is not None:
            raise RuntimeError("stash() was called twice: call combine() or discard() on the first half before.")
        self._first = [p.grad for p in self.parameters]
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def combine(self, rho_a: float, rho_b: float) -> float:
        """Leave the balanced gradient in `.grad` and return the step multiplier m = (rho_a + rho_b) / 2.

        Raises:
            RuntimeError: nothing was stashed.
            ValueError: a multiplier that is not a finite number >= 0; the gradients stay as they are.
        """
        if self._first is None:
            raise RuntimeError("combine() without stash(): run half A's backward and call stash() first.")
        for name, rho in (("rho_a", rho_a), ("rho_b", rho_b)):
            if not (math.isfinite(rho) and rho >= 0):
                raise ValueError(f"{name} is {rho!r}; a step multiplier must be a finite number >= 0.")
        mean = (rho_a + rho_b) / 2
        weight_a, weight_b = (rho_b / mean, rho_a / mean) if mean > 0 else (1.0, 1.0)
        for p, first in zip(self.parameters, self._first, strict=True):
            if p.grad is not None and weight_b != 1.0:
                p.grad.mul_(weight_b)
            if first is None:
                continue
            if weight_a != 1.0:
                first.mul_(weight_a)
            p.grad = first if p.grad is None else p.grad.add_(first)
        self._first = None
        return mean

    def discard(self) -> None:
        """Drop half A, for example after an exception. Idempotent."""
        self._first = None
