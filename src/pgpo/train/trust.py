"""Measured trust in the trainer: what of an optimizer step is kept, and at what rate the next one goes.

    prepare   before the loss: which rows are probed; the loss's own forwards show the policy on them
    watch     before the step: the policy on the other rows, the weights, the gradient's cosine
    settle    right after it, inside the gate: K is measured, and the form acts (core/trust.py)

The step that is measured is the one that the optimizer made: scaled by rho_k and the guard, clipped, weight decay
included. Its moments are left as they are.

    undo         theta <- theta_old + rho (theta_new - theta_old); holds a copy of what trains, from `watch` to `settle`
    lagged       the next step's rate is multiplied; holds nothing, undoes nothing
    auto         the same from a tiny rate to any: learning_rate="auto"
    kl_adaptive  the same in fixed factors: a baseline
    watch        trust is off: every n-th step is measured and left as it is
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgpo.core import (
    FixedBudget,
    KLAdaptiveRate,
    LaggedRate,
    MeasuredTrust,
    TrustBudget,
    gradient_cosine,
    kl_per_divergence,
    trust_budget,
)
from pgpo.settings.config import PGPOConfig
from pgpo.train.engine import Engine
from pgpo.train.forwards import Forwards
from pgpo.train.gate import torch_optimizer
from pgpo.train.probe import Candidate, Probe, chosen
from pgpo.train.rows import loss_mask
from pgpo.train.seam import Batch
from pgpo.train.sharding import local

_MOMENTS = ("exp_avg", "momentum_buffer")  # torch's names of the first moment: Adam's family, SGD's and Muon's


class Step:
    """An optimizer step between `watch` and `settle`.

    Args:
        undo: whether its weights may be moved back.
        agreement: whether the gradient is compared with the earlier ones.

    Attributes:
        divergence, information: of the batch, nats; no divergence without a teacher.
        cosine: of the gradient with the optimizer's first moment, if it has one.
        warming_up: whether the schedule still raises the rate.
    """

    warming_up = False
    scale = 1.0  # what else multiplies it: rho, and the guard

    def __init__(self, optimizer: Any, engine: Engine, probe: Probe, undo: bool, agreement: bool) -> None:
        self.engine, self.probe = engine, probe
        self.divergence: float | None = None
        self.information = 0.0
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        self.cosine: float | None = None
        if agreement:
            moments = ((p, optimizer.state.get(p, {}).get(name)) for p in moving for name in _MOMENTS)
            pairs = [(local(p.grad), local(moment)) for p, moment in moments if moment is not None]
            self.cosine = gradient_cosine(pairs, engine.reduce)
        self.rho = 1.0  # of the weights as they are
        self._moving: list[Tensor] = moving if undo else []
        self._old = [local(p).clone() for p in self._moving]

    @torch.no_grad()
    def slope(self, clipped: float) -> float | None:
        """What the step takes off the batch's divergence at first order, nats: -<gradient before clipping, step>.

        clipped: what clipping has multiplied the gradient by.
        """
        pairs = zip(self._moving, self._old, strict=True)
        parts = [((local(p) - old).float() * local(p.grad).float()).sum().to(self.engine.device) for p, old in pairs]
        here = -float(torch.stack(parts).sum()) if parts else 0.0
        total = self.engine.sum(here) / (1 if self.engine.sharded else self.engine.ranks) / clipped
        return total if math.isfinite(total) else None

    @torch.no_grad()
    def move(self, rho: float) -> None:
        """theta_old + rho (theta_new - theta_old). Exact for 0; else from where the weights are, to rounding."""
        if rho == self.rho:
            return
        weights = [local(p) for p in self._moving]
        if rho == 0:  # new weights that are not finite go, too
            torch._foreach_copy_(weights, self._old)
        elif weights:
            torch._foreach_sub_(weights, self._old)
            torch._foreach_mul_(weights, rho / self.rho)
            torch._foreach_add_(weights, self._old)
        self.rho = rho

    def moved(self, rho: float) -> float:
        """K at rho, nats."""
        self.move(rho)
        return self.probe.moved() if rho > 0 else 0.0


class Undo:
    """Keeps the part of a step that moves the policy by the budget; the averaged teacher follows by as much."""

    undo = True
    factor = 1.0

    def __init__(self, args: PGPOConfig) -> None:
        clock = args.trust_clock and args.teacher == "ema"  # a periodic or gated teacher is a copy: it has no rate
        self.law = MeasuredTrust(args.trust_tolerance, clock=clock, **_budget(args))
        self.correction = self.law.correction
        self._clock = [0.0, 0]  # sum of rho since the teacher has followed, and its steps

    def settle(self, step: Step, slope: float | None) -> dict[str, float]:
        """The numbers to log."""
        whole = None
        signals = step.divergence, step.information, step.cosine
        rho = self.law.propose(*signals, slope, step.scale, step.warming_up)
        while True:
            moved = step.moved(rho)
            whole = moved if rho == 1 else whole
            verdict = self.law.observe(rho, moved)
            rho = verdict.rho
            if verdict.accepted:
                break
        step.move(rho)
        self._clock = [self._clock[0] + rho, self._clock[1] + 1]
        values = {"trust_rho": rho, "trust_moved": self.law.length.moved, "trust_budget": self.law.budget}
        return values | _measurements(self.law.length.count, whole, step.divergence, self.correction)

    def teacher_rate(self, rate: float) -> float:
        """Of the average that follows now: rate * rho, of several steps their mean."""
        (total, steps), self._clock = self._clock, [0.0, 0]
        return rate * total / steps if self.law.clock and steps else rate

    def state_dict(self) -> dict[str, Any]:
        return {"form": "undo", "law": self.law.state_dict(), "clock": self._clock}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.law.load_state_dict(state["law"])
        self._clock = state["clock"]


class Lagged:
    """Leaves the step; the next one's rate is multiplied by `factor`, also above 1."""

    undo = False

    def __init__(self, rate: Callable[[], LaggedRate], args: PGPOConfig) -> None:
        self.name, self.correction, self.rate = args.trust_form, trust_budget(**_budget(args)), rate()

    @property
    def factor(self) -> float:
        return self.rate.factor

    def settle(self, step: Step, slope: float | None) -> dict[str, float]:
        signals = step.divergence, step.information, step.cosine
        budget = self.correction.add(*signals, step.warming_up) * step.scale**2
        used, moved = self.factor, step.moved(1.0)
        self.rate.observe(budget, moved, most=1.0 if step.warming_up else math.inf)
        values = {"trust_rho": used, "trust_moved": moved, "trust_budget": budget}
        return values | _measurements(1, moved, step.divergence, self.correction)

    def teacher_rate(self, rate: float) -> float:
        return rate  # the step was not shortened

    def state_dict(self) -> dict[str, Any]:
        return {"form": self.name, "correction": self.correction.state_dict(), "rate": self.rate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.correction.load_state_dict(state["correction"])
        self.rate.load_state_dict(state["rate"])


class Watch:
    """Leaves every step and every rate as they are: trust is off."""

    undo = False
    factor = 1.0
    correction = None

    def __init__(self, args: PGPOConfig) -> None:
        pass

    def settle(self, step: Step, slope: float | None) -> dict[str, float]:
        moved = step.moved(1.0)
        return {"trust_moved": moved} | ({"trust_ratio": moved / step.divergence} if step.divergence else {})

    def teacher_rate(self, rate: float) -> float:
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"form": "off"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        pass


FORMS: dict[str, Callable[[PGPOConfig], Undo | Lagged]] = {
    "undo": Undo,
    "lagged": partial(Lagged, LaggedRate),
    "auto": partial(Lagged, partial(LaggedRate, high=1e7)),  # from AUTO_RATE to 1: as good as unbounded
    "kl_adaptive": partial(Lagged, KLAdaptiveRate),
}


class Trust:
    """Measured trust of one trainer. Every rank must call `watch`; all take the same decision."""

    def __init__(self, trainer: Any, forwards: Forwards) -> None:
        self.trainer, self.args, self.engine, self.forwards = trainer, trainer.args, trainer.engine, forwards
        self.off = self.args.trust == "off"
        self._probe: Probe | None = None  # of the step at work
        self._settled = 0
        self.form = Watch(self.args) if self.off else FORMS[self.args.trust_form](self.args)

    def prepare(self, batch: Batch) -> None:
        """Before the loss of a step. With trust off every `diagnostics_step_interval`-th step is measured, from the
        first one on."""
        state = self.trainer.state
        due = not self.off
        if self.off and not self._warming_up:  # short steps say nothing about the rate to come
            due = state.global_step % self.args.diagnostics_step_interval == 0
        self._probe = Probe(self.forwards, batch, self._rows(batch)) if due else None
        self.trainer.distillation.observer = None if self._probe is None else self._probe.see

    @property
    def _warming_up(self) -> bool:
        state = self.trainer.state
        return bool(state.global_step + 1 < self.args.get_warmup_steps(state.max_steps))

    def watch(self, divergence: float | None, information: float, rho: float) -> None:
        """When the gradient is complete: have the optimizer's next step settled, unless it is left out.

        divergence: mean over the batch's active tokens, nats; None if there are none.
        """
        probe, correction = self._probe, self.form.correction
        unknown = isinstance(correction, TrustBudget) and correction.divergence.value is None
        if probe is None or (divergence is None and unknown):  # before the first teacher there is nothing to compare
            return
        probe.begin()
        agreement = self.form.correction is not None and self.form.correction.agreement is not None
        step = Step(torch_optimizer(self.trainer.optimizer), self.engine, probe, self.form.undo, agreement)
        step.divergence, step.information = None if divergence is None else max(divergence, 0.0), information
        guard = self.trainer.guard
        step.warming_up, step.scale = self._warming_up, rho * (1.0 if guard is None else guard.step_factor)
        self.trainer.gate.settle(partial(self._settle, step), acts=not self.off)

    def _settle(self, step: Step) -> None:
        values = self.form.settle(step, self._slope(step))
        self._settled += 1
        if self._settled == 2 and "agreement" in values and step.cosine is None:
            self.trainer.say(
                "trust_agreement has no effect here: this optimizer shows no first moment to compare gradients with."
            )
        if self.off:  # in units of the Jensen-Shannon divergence
            unit = kl_per_divergence(self.args.divergence, self.args.divergence_beta) / 4
            self.trainer.diagnostics.far(self.trainer.state.global_step + 1, values.get("trust_ratio", 0.0) / unit)
        for name, value in values.items():
            self.trainer.record(name, value)
        self.trainer.rescale_recorded("effective_lr", step.rho)

    def _slope(self, step: Step) -> float | None:
        """Where the gradient is that of the divergence alone."""
        a = self.args
        others = a.follows_rewards or a.rehearse_weight or a.sample_weights != "equal"
        if not self.form.undo or others or a.information_source == "cross_fit":
            return None
        return step.slope(self.trainer.clip_factor)

    def _rows(self, batch: Batch) -> dict[int, int]:
        """{place in the batch: tokens to probe} of this rank."""
        trainer, args = self.trainer, self.args
        first, group = trainer.last_rollout.local.start, trainer.num_generations
        counts, rows = loss_mask(batch).sum(1).tolist(), [first + row for row in batch["row"].tolist()]
        mine = [Candidate(row, row // group, count) for row, count in zip(rows, counts, strict=True) if count]
        found = chosen(self.engine.gather_objects(mine), args.seed, trainer.state.global_step, args.trust_tokens)
        return {place: found[row] for place, row in enumerate(rows) if row in found}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises ValueError if it is of the other form."""
        if state["form"] != self.args.trust_form:
            raise ValueError(f"the saved trust_form is {state['form']!r}, this run's {self.args.trust_form!r}")
        self.form.load_state_dict(state)


def _budget(args: PGPOConfig) -> dict[str, Any]:
    """Arguments of `trust_budget`."""
    if args.trust_nats is not None:
        return {"budget": args.trust_budget, "nats": args.trust_nats}
    values = {"budget": args.trust_budget, "fraction": args.trust_fraction, "agreement": args.trust_agreement}
    values["first_fraction"] = max(TrustBudget().first_fraction, args.trust_fraction)
    return values | {"kl_per_divergence": kl_per_divergence(args.divergence, args.divergence_beta)}


def _measurements(
    probes: int, whole: float | None, divergence: float | None, correction: TrustBudget | FixedBudget
) -> dict[str, float]:
    """What both forms log. whole: K of the whole step, if it was measured."""
    values = {"probes": float(probes)}
    if whole is not None and divergence:
        values["trust_ratio"] = whole / divergence
    if correction.agreement is not None:
        values["agreement"] = correction.agreement.value
    return values
