"""The optimizer's next step: plain, scaled by rho, or left out; then settled. Nothing else replaces its `step()`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from pgpo.core.stepping import require_linear, scaled_rates
from pgpo.errors import UserError
from pgpo.train import zero


class StepGate:
    """Replaces `step()` of accelerate's optimizer wrapper, and under DeepSpeed steps its engine.

    Every training step decides what the next `optimizer.step()` does: the plain step by default, an update multiplied
    by rho after `scale(rho)`, nothing after `leave_out()`. `settle(callback)` acts on what it has done, before anything
    else sees it. That step consumes the decision.

    Args:
        weight_decay: "scaled" or "fixed", as in `pgpo.core.stepping`.

    Attributes:
        steps: scaled steps so far.
        last_rho: multiplier of the last one.
    """

    def __init__(self, weight_decay: str) -> None:
        self.weight_decay = weight_decay
        self.steps = 0
        self.last_rho: float | None = None
        self._rho: float | None = None
        self._left_out = False
        self._settle: Callable[[], None] | None = None
        self._wrapper: Any = None
        self._engine: Any = None
        self._linear = False

    def open(self, wrapper: Any, engine: Any = None) -> None:
        """Take over the wrapper's `step()`; again for the new wrapper that another `train()` makes."""
        if self._wrapper is wrapper:
            return
        self._wrapper, self._engine, self._linear = wrapper, engine, False
        plain = wrapper.step

        @functools.wraps(plain)  # keeps the scheduler's attributes
        def step(*args: Any, **kwargs: Any) -> None:
            rho, left_out, settle = self._rho, self._left_out, self._settle
            self._rho, self._left_out, self._settle = None, False, None
            wrapper._is_overflow = left_out
            if left_out:
                self._discard()
                return
            with contextlib.nullcontext() if rho is None else self._scaled(rho):
                plain(*args, **kwargs)
                if engine is not None:
                    zero.step(engine)
            if rho is not None and not wrapper.step_was_skipped:
                self.steps, self.last_rho = self.steps + 1, rho
            if settle is not None and not wrapper.step_was_skipped:
                settle()

        wrapper.step = step

    def scale(self, rho: float) -> None:
        """Multiply the next update by rho. Raises UserError if the optimizer's update is not linear in its rate."""
        self._require_linear()
        self._rho = rho

    def settle(self, callback: Callable[[], None], acts: bool = True) -> None:
        """Call it right after the next update, if there is one.

        acts: it changes weights or rates. Then raises as `scale` does: an optimizer that is not linear may hold weights
            of its own, which would not follow.
        """
        if acts:
            self._require_linear()
        self._settle = callback

    def leave_out(self) -> None:
        """Skip the next step, and report it as accelerate reports a step that a gradient scaler skips, so that neither
        schedule nor teacher moves. (accelerate itself misses what a scaler skips within a fused optimizer.)"""
        self._left_out = True

    def state_dict(self) -> dict[str, Any] | None:
        """{"steps", "last_rho"}, or None before the first scaled step."""
        return None if self.last_rho is None else {"steps": self.steps, "last_rho": self.last_rho}

    def load_state_dict(self, state: Mapping[str, Any] | None) -> None:
        """Restore `state_dict()`. Raises KeyError if it is another state."""
        if state is not None:
            self.steps, self.last_rho = int(state["steps"]), state["last_rho"]

    @property
    def _optimizer(self) -> torch.optim.Optimizer:
        """The one whose learning rates make the update."""
        optimizer = torch_optimizer(self._wrapper)
        return optimizer if self._engine is None else zero.inner_optimizer(optimizer)

    def _require_linear(self) -> None:
        if not self._linear:
            with _explained():
                require_linear(self._optimizer)
            self._linear = True

    @contextlib.contextmanager
    def _scaled(self, rho: float) -> Any:
        with _explained(), scaled_rates(self._optimizer, rho, self.weight_decay):
            yield

    def _discard(self) -> None:
        if self._engine is not None:
            zero.discard(self._engine)
        if self._wrapper.scaler is not None:
            self._wrapper.scaler.update()  # clipping has unscaled its gradients


def torch_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    inner = optimizer
    while hasattr(inner, "accelerator_state"):
        inner = inner.optimizer
    return inner


def scale_gradients(optimizer: Any, factor: float) -> None:
    torch._foreach_mul_(
        [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None], factor
    )


@contextlib.contextmanager
def _explained() -> Any:
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from error
