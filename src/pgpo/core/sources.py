"""Whose information scales a step. With rho from the same batch E[rho g] is not E[rho] E[g] (docs/THEOREM.md).

    same_batch   g_k is scaled by rho(I_k)                                     the paper's Eq. 9
    lagged       g_k is scaled by rho(I_{k-1}); the first step by 1            EarlierInformation
    cross_fit    two half-batches: rho(I_B) g_A + rho(I_A) g_B                 CrossFit

In the last two the multiplier is independent of the gradient it scales (lagged: given the parameters), so that the
mean step is E[rho] times the mean gradient. Both are ours; the paper knows the first alone.
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
        weight: of the newest of them, in (0, 1]; 1 = the previous step alone.

    Raises:
        ValueError: weight outside (0, 1].
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not 0 < weight <= 1:
            raise ValueError(f"weight is {weight!r}; the newest step's share must lie in (0, 1].")
        self.weight = float(weight)
        self.value: float | None = None

    def exchange(self, information: float) -> float | None:
        """The average over the steps before this one (nats; None at the first), then remember this one's.

        Raises:
            ValueError: information is not finite; nothing is remembered then.
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

    The two losses are the halves' parts of the batch's loss: their gradients g_A + g_B add up to the plain one.
    Adam normalises its gradient, so the common size of the step goes through `modulate` and only the balance of the
    halves into the gradient:

        .grad = (rho_B g_A + rho_A g_B) / m,   m = (rho_A + rho_B) / 2,   step multiplier m

    With SGD the step is lr * (rho_B g_A + rho_A g_B). With rho_A = rho_B it is the plain step, bit for bit.
    Holds one copy of the gradient. Gradient clipping belongs between `combine` and the step.

    Args:
        parameters: those that the optimizer steps.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        self._first: list[Tensor | None] | None = None

    def stash(self) -> None:
        """Put half A's gradients aside; `.grad` is None afterwards.

        Raises:
            RuntimeError: half A is stashed already.
        """
        if self._first is not None:
            raise RuntimeError("stash() twice: combine() or discard() the half that was put aside before.")
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
            raise RuntimeError("combine() without stash(): run half A's backward and put it aside first.")
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
        """Forget half A, as after an exception. Idempotent."""
        self._first = None
