"""Scale one optimizer step by rho (PGPO, arXiv 2606.03620, Eq. 9 and its Adam form).

    SGD:   theta <- theta - eta * rho_k * g_k
    Adam:  theta <- theta - eta * rho_k * h_k       h_k the update direction; the moments never see rho

For every optimizer whose update is linear in its learning rate this is the same as multiplying the learning rate for
that one step. (Scaling the loss or the gradient is NOT the method: Adam normalises it away.)

    modulate            the fast twin: lr * rho inside `step()`, restored right after, also if the step raises, so that
                        no scheduler sees it
    scaled_rates        the same as a context manager, around a step that you call yourself
    modulate_reference  the slow twin: the plain step, then theta_old + rho * (theta_new - theta_old)

Decoupled weight decay is part of the update that lr multiplies. "scaled" (default) scales it too, so that PGPO is
exactly a learning-rate schedule; "fixed" divides it by rho, so that only the gradient term is scaled.
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

# Measured: one step at rho * lr equals rho times the step at lr to 1e-12 relative, state untouched by lr.
_LINEAR = {
    "SGD", "Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad", "Adamax", "Adadelta", "Adafactor", "SparseAdam",
    "Muon",
}  # fmt: skip
# ASGD averages with an lr-dependent weight, Rprop keeps its own step sizes, LBFGS searches along lr, and
# schedule-free optimizers weight their average by lr.
_NOT_LINEAR = {"ASGD", "Rprop", "LBFGS", "AdamWScheduleFree", "SGDScheduleFree", "RAdamScheduleFree"}


def modulate(optimizer: Optimizer, weight_decay: str = "scaled", stepper: Any = None) -> Modulation:
    """Let `handle.arm(rho)` scale the optimizer's next step by rho.

        handle = modulate(optimizer)
        loss.backward()
        handle.arm(rho)
        optimizer.step()

    Args:
        optimizer: a torch optimizer whose update is linear in lr: SGD (momentum, Nesterov), Adam, AdamW (for-loop,
            foreach, fused), NAdam, RAdam, RMSprop, Adagrad, Adamax, Adadelta, Adafactor, Muon, SparseAdam. An
            unknown class is accepted with a warning.
        weight_decay: "scaled" or "fixed" (module docstring); "fixed" acts on groups with decoupled decay. Coupled
            L2 decay enters the gradient and cannot be compensated.
        stepper: the object whose `step()` makes the whole update, if that is not the optimizer itself. DeepSpeed's
            ZeRO optimizer calls the torch optimizer inside it once per parameter group:
            modulate(engine.optimizer.optimizer, stepper=engine.optimizer).

    Returns:
        A handle: `arm(rho)` before every `step()`, `remove()` to undo, `state_dict()` / `load_state_dict()`.

    Raises:
        ValueError: the optimizer's update is not linear in lr, it is modulated already, or weight_decay is unknown.
    """
    return Modulation(optimizer, weight_decay, stepper)


def modulate_reference(optimizer: Optimizer) -> ReferenceModulation:
    """The slow twin of `modulate`: plain step, then theta_old + rho * (theta_new - theta_old).

    It holds a copy of every parameter during the step and loses small updates in half precision. Tests compare
    `modulate` with it. Use it where the update is not linear in lr.

    Raises:
        ValueError: the optimizer is modulated already.
    """
    return ReferenceModulation(optimizer)


def require_linear(optimizer: Optimizer) -> None:
    """Raise ValueError unless `scaled_rates` scales this optimizer's update; warn where its class is unknown."""
    names = [cls.__name__ for cls in type(optimizer).__mro__]
    refused = next((name for name in names if name in _NOT_LINEAR), None)
    if refused is not None:
        raise ValueError(
            f"{refused} cannot be modulated: its update is not linear in the learning rate; use SGD, AdamW or "
            "another optimizer that is, or modulate_reference(optimizer)."
        )
    if not any(name in _LINEAR for name in names):
        warnings.warn(
            f"{names[0]} is not known to pgpo: modulation is exact only if its update is linear in lr.", stacklevel=4
        )
    if any(group["lr"] is None for group in optimizer.param_groups):
        raise ValueError(f"{names[0]} runs without a learning rate, so there is nothing to scale; set lr.")


@contextlib.contextmanager
def scaled_rates(optimizer: Optimizer, rho: float, weight_decay: str = "scaled") -> Iterator[None]:
    """Multiply every learning rate by rho inside the block; restore it afterwards, also after an error.

    Args:
        optimizer: a torch optimizer that `require_linear` accepts.
        rho: finite, >= 0.
        weight_decay: "scaled" or "fixed" (module docstring).

    Raises:
        ValueError: rho is 0 with weight_decay="fixed", or Adafactor caps the step below lr * rho.
    """
    groups = optimizer.param_groups
    compensated = [weight_decay == "fixed" and _is_decoupled(optimizer, group) for group in groups]
    if rho == 0 and any(compensated):
        raise ValueError("rho is 0 and weight_decay='fixed': decay / rho is undefined; set rho_min > 0.")
    for group in groups:
        _check_adafactor(optimizer, group, rho)
    saved = [(group, group["lr"], group.get("weight_decay")) for group in groups]
    try:
        for group, compensate in zip(groups, compensated, strict=True):
            group["lr"] = group["lr"] * rho  # out of place: a tensor lr must be restored as the same object
            if compensate:
                group["weight_decay"] = group["weight_decay"] / rho
        yield
    finally:
        for group, lr, decay in saved:
            group["lr"] = lr
            if decay is not None:
                group["weight_decay"] = decay


class _Handle:
    """The protocol arm(rho) -> step() of both twins. A step without a fresh rho raises before any update."""

    def __init__(self, optimizer: Optimizer, stepper: Any = None) -> None:
        if getattr(optimizer, "_pgpo_handle", None) is not None:
            raise ValueError(
                f"this {type(optimizer).__name__} is modulated already; call remove() on its handle first."
            )
        self.optimizer = optimizer
        self.stepper: Any = optimizer if stepper is None else stepper
        self.steps = 0
        self.last_rho: float | None = None
        self._armed: float | None = None
        self._depth = 0  # a step() that calls super().step() runs the hooks twice
        self._hooks: list[Any] = []
        self._removed = False
        try:
            if stepper is None:
                self._hooks = [
                    optimizer.register_step_pre_hook(self._before_step),
                    optimizer.register_step_post_hook(self._after_step),
                ]
        except AttributeError:  # a wrapper that never ran torch's constructor, such as accelerate's or DeepSpeed's
            raise ValueError(
                f"this {type(optimizer).__name__} has no step hooks; modulate the torch optimizer inside the wrapper "
                "(usually wrapper.optimizer)."
            ) from None
        optimizer._pgpo_handle = self  # type: ignore[attr-defined]
        self._restore_after_errors()

    def _restore_after_errors(self) -> None:
        """Wrap step(): torch calls no post-hook after a step() that raises, and a stepper has no hooks at all. Where
        another wrapper has kept torch's own step() (accelerate with fp16), the next `arm` or `remove` restores."""
        stepper: Any = self.stepper
        hooked = stepper is self.optimizer
        plain = stepper.step  # an attribute of the instance where a scheduler has wrapped it

        @functools.wraps(plain)
        def step(stepper: Any, *args: Any, **kwargs: Any) -> Any:
            try:
                if hooked or self._removed:  # another wrapper may still hold this step
                    return plain(*args, **kwargs)
                self._before_step(self.optimizer, args, kwargs)
                result = plain(*args, **kwargs)
                self._after_step(self.optimizer, args, kwargs)
                return result
            finally:
                self._reset()

        # A bound method: a scheduler created later reads its __func__.
        self._step: Any = types.MethodType(step, stepper)
        self._plain = vars(stepper).get("step")
        stepper.step = self._step

    def arm(self, rho: float) -> None:
        """Set the multiplier of the next step.

        Arming again before a step replaces the value (a gradient scaler may have skipped the step).

        Raises:
            ValueError: rho is not a finite number >= 0; then no rho is armed.
            RuntimeError: the handle was removed, so that rho would have no effect.
        """
        if self._removed:
            raise RuntimeError("this handle was removed from its optimizer; call modulate(optimizer) for a new one.")
        self._reset()  # see _restore_after_errors
        value = float(rho)
        if not (math.isfinite(value) and value >= 0):
            self._armed = None
            raise ValueError(f"rho is {value!r}; a step multiplier must be a finite number >= 0.")
        self._armed = value

    def remove(self) -> None:
        """Restore the plain optimizer: its learning rates, no hooks. Idempotent."""
        self._reset()
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._removed = [], True
        if vars(self.stepper).get("step") is self._step:  # else another wrapper holds it
            del self.stepper.step
            if self._plain is not None:
                self.stepper.step = self._plain
        if getattr(self.optimizer, "_pgpo_handle", None) is self:
            del self.optimizer._pgpo_handle

    def state_dict(self) -> dict[str, Any]:
        """{"steps", "last_rho"}; the optimizer's own state is not part of it."""
        return {"steps": self.steps, "last_rho": self.last_rho}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()` and drop an armed rho. Raises ValueError if a key is missing."""
        missing = {"steps", "last_rho"} - state.keys()
        if missing:
            raise ValueError(f"modulation state lacks {sorted(missing)}; it was not written by state_dict().")
        self.steps, self.last_rho = int(state["steps"]), state["last_rho"]
        self._armed = None

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._depth == 0:
            if self._armed is None:
                raise RuntimeError(
                    "optimizer.step() without a fresh rho: call handle.arm(rho) before every step "
                    "(each rho is for one step), or handle.remove() for plain steps."
                )
            self._apply(self._armed)
        self._depth += 1

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._depth -= 1
        if self._depth > 0:
            return
        assert self._armed is not None
        self._finish(self._armed)
        self.steps, self.last_rho, self._armed = self.steps + 1, self._armed, None

    def _reset(self) -> None:
        """Undo the changes of a step that raised."""
        self._undo()
        self._depth = 0

    def _apply(self, rho: float) -> None:
        raise NotImplementedError

    def _finish(self, rho: float) -> None:
        raise NotImplementedError

    def _undo(self) -> None:
        raise NotImplementedError


class Modulation(_Handle):
    """Fast twin; make one with `modulate(optimizer)`."""

    def __init__(self, optimizer: Optimizer, weight_decay: str = "scaled", stepper: Any = None) -> None:
        if weight_decay not in ("scaled", "fixed"):
            raise ValueError(f"weight_decay is {weight_decay!r}; choose 'scaled' (with lr) or 'fixed' (over rho).")
        require_linear(optimizer)
        self.weight_decay = weight_decay
        self._scaled = contextlib.ExitStack()
        super().__init__(optimizer, stepper)

    def _apply(self, rho: float) -> None:
        self._undo()
        self._scaled.enter_context(scaled_rates(self.optimizer, rho, self.weight_decay))

    def _finish(self, rho: float) -> None:
        self._undo()

    def _undo(self) -> None:
        self._scaled.close()


class ReferenceModulation(_Handle):
    """Slow twin; make one with `modulate_reference(optimizer)`."""

    def __init__(self, optimizer: Optimizer) -> None:
        self._snapshot: list[tuple[Tensor, Tensor]] = []
        super().__init__(optimizer)

    def _apply(self, rho: float) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._snapshot = [(p, p.detach().clone()) for p in parameters]

    @torch.no_grad()
    def _finish(self, rho: float) -> None:
        for parameter, old in self._snapshot:
            parameter.copy_(old + rho * (parameter - old) if rho != 1.0 else parameter)
        self._snapshot = []

    def _undo(self) -> None:
        self._snapshot = []


def _is_decoupled(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether weight decay acts as theta * (1 - lr * decay), not through the gradient."""
    if "decoupled_weight_decay" in group:  # Adam family: a flag per group (True for AdamW)
        return bool(group["decoupled_weight_decay"])
    return any(cls.__name__ in ("AdamW", "Adafactor", "Muon") for cls in type(optimizer).__mro__)


def _check_adafactor(optimizer: Optimizer, group: dict[str, Any], rho: float) -> None:
    """Refuse a capped step: torch's Adafactor uses min(lr, 1/sqrt(t)), so past t = 1/lr^2 rho has no effect."""
    if not isinstance(optimizer, torch.optim.Adafactor) or rho == 1.0:
        return
    steps = [float(state["step"]) for p in group["params"] if "step" in (state := optimizer.state.get(p, {}))]
    limit = 1 / math.sqrt(max(steps, default=0.0) + 1)
    lr = float(group["lr"])
    if max(lr, lr * rho) > limit:
        raise ValueError(
            f"Adafactor caps its step size at 1/sqrt(t) = {limit:.3g}, below lr * rho = {lr * rho:.3g}, so rho would "
            "not act in full; lower lr, or use modulate_reference(optimizer)."
        )
