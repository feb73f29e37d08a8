"""Measured trust in the trainer: what of an optimizer step is kept, and at what rate the next one goes.

    watch     before the step: the policy on the rows to probe, the weights, the gradient's cosine
    settle    right after it, inside the gate: K is measured, and the form acts (core/trust.py)

The step that is measured is the one that the optimizer made: scaled by rho_k and the guard, clipped, weight decay
included. Its moments are left as they are.

    undo      theta <- theta_old + rho (theta_new - theta_old); holds a copy of what trains, from `watch` to `settle`
    lagged    the next step's rate is multiplied; holds nothing, undoes nothing
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pgpo.core import LaggedRate, MeasuredTrust, TrustBudget, gradient_cosine, kl_per_divergence
from pgpo.teacher.weights import reshard
from pgpo.train.config import PGPOConfig
from pgpo.train.engine import Engine
from pgpo.train.forwards import Forwards
from pgpo.train.gate import torch_optimizer
from pgpo.train.probe import Candidate, Probe, chosen
from pgpo.train.rows import own_samples
from pgpo.train.seam import Batch

_MOMENTS = ("exp_avg", "momentum_buffer")  # torch's names of the first moment: Adam's family, SGD's and Muon's


class Step:
    """An optimizer step between `watch` and `settle`.

    Args:
        optimizer: the torch optimizer.
        undo: whether its weights may be moved back.
        signals: divergence (None without a teacher) and information of the batch, nats.
    """

    def __init__(
        self, optimizer: Any, engine: Engine, probe: Probe, undo: bool, signals: tuple[float | None, float]
    ) -> None:
        self.engine, self.probe = engine, probe
        self.divergence, self.information = signals
        moving = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        moments = ((p, optimizer.state.get(p, {}).get(name)) for p in moving for name in _MOMENTS)
        pairs = [(_local(p.grad), _local(moment)) for p, moment in moments if moment is not None]
        self.cosine = gradient_cosine(pairs, engine.reduce)
        self.rho = 1.0  # of the weights as they are
        self._moving: list[Tensor] = moving if undo else []
        self._old = [_local(p).clone() for p in self._moving]

    @torch.no_grad()
    def slope(self, clipped: float) -> float | None:
        """What the step takes off the batch's divergence at first order, nats: -<gradient before clipping, step>.

        clipped: what clipping has multiplied the gradient by.
        """
        total = sum(
            float((_local(p.grad).float() * (_local(p) - old).float()).sum()) for p, old in zip(self._moving, self._old)
        )
        total = -self.engine.sum(total) / (1 if self.engine.sharded else self.engine.ranks) / clipped
        return total if math.isfinite(total) else None

    @torch.no_grad()
    def move(self, rho: float) -> None:
        """theta_old + rho (theta_new - theta_old). Exact for 0; else from where the weights are, to rounding."""
        if rho == self.rho:
            return
        weights = [_local(p) for p in self._moving]
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
        self.law = MeasuredTrust(args.trust_tolerance, **_budget(args))
        self.correction = self.law.correction
        self._clock = [0.0, 0]  # sum of rho since the teacher has followed, and its steps

    def settle(self, step: Step, slope: float | None) -> dict[str, float]:
        """The numbers to log."""
        rho, whole = self.law.propose(step.divergence, step.information, step.cosine, slope), None
        while True:
            moved = step.moved(rho)
            whole = moved if rho == 1 else whole
            verdict = self.law.observe(rho, moved)
            rho = verdict.rho
            if verdict.accepted:
                break
        step.move(rho)
        self._clock = [self._clock[0] + rho, self._clock[1] + 1]
        length = self.law.length
        values = {"trust_rho": rho, "trust_moved": length.moved, "trust_budget": self.law.budget}
        return values | {"probes": float(length.count)} | _ratio(whole, step.divergence)

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

    def __init__(self, args: PGPOConfig) -> None:
        self.correction, self.rate = TrustBudget(**_budget(args)), LaggedRate()

    @property
    def factor(self) -> float:
        return self.rate.factor

    def settle(self, step: Step, slope: float | None) -> dict[str, float]:
        budget = self.correction.add(step.divergence, step.information, step.cosine)
        used, moved = self.factor, step.moved(1.0)
        self.rate.observe(budget, moved)
        values = {"trust_rho": used, "trust_moved": moved, "trust_budget": budget, "probes": 1.0}
        return values | _ratio(moved, step.divergence)

    def teacher_rate(self, rate: float) -> float:
        return rate

    def state_dict(self) -> dict[str, Any]:
        return {"form": "lagged", "correction": self.correction.state_dict(), "rate": self.rate.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.correction.load_state_dict(state["correction"])
        self.rate.load_state_dict(state["rate"])


FORMS: dict[str, type[Undo] | type[Lagged]] = {"undo": Undo, "lagged": Lagged}


class Trust:
    """Measured trust of one trainer. Every rank must call `watch`; all take the same decision."""

    def __init__(self, trainer: Any, forwards: Forwards) -> None:
        self.trainer, self.args, self.engine, self.forwards = trainer, trainer.args, trainer.engine, forwards
        self.form = FORMS[self.args.trust_form](self.args)
        self.teacher_rate, self.state_dict = self.form.teacher_rate, self.form.state_dict

    @property
    def factor(self) -> float:
        """What the step at work is multiplied by beforehand."""
        return self.form.factor

    def watch(self, batch: Batch, divergence: float | None, information: float) -> None:
        """When the gradient is complete: have the optimizer's next step settled, unless it is left out.

        divergence: mean over the batch's active tokens, nats; None if there are none.
        """
        probe = Probe(self.forwards, batch, self._rows(batch))
        reshard(self.forwards.model)
        signals = (None if divergence is None else max(divergence, 0.0), information)
        step = Step(torch_optimizer(self.trainer.optimizer), self.engine, probe, self.form.undo, signals)
        self.trainer.gate.settle(partial(self._settle, step))

    def _settle(self, step: Step) -> None:
        values = self.form.settle(step, self._slope(step))
        agreement = self.form.correction.agreement
        for name, value in (values | {"agreement": 1.0 if agreement is None else agreement.value}).items():
            self.trainer.record(name, value)
        self.trainer.rescale_recorded("effective_lr", step.rho)

    def _slope(self, step: Step) -> float | None:
        """Where the gradient is that of the divergence alone."""
        if not self.form.undo or self.args.follows_rewards or self.args.information_source == "cross_fit":
            return None
        norm, most = self.trainer.step_metrics().get("grad_norm"), self.args.max_grad_norm
        return step.slope(min(1.0, most / (norm + 1e-6)) if norm and most else 1.0)  # as torch clips

    def _rows(self, batch: Batch) -> dict[int, int]:
        """{place in the batch: tokens to probe} of this rank."""
        first, group = self.trainer.last_rollout.local.start, self.trainer.num_generations
        mine = {first + int(batch["row"][i]): (i, sample) for i, sample in own_samples(batch).items()}
        candidates = [Candidate(row, row // group, len(sample.labels)) for row, (_, sample) in mine.items()]
        rows = chosen(
            self.engine.gather_objects(candidates),
            self.args.seed,
            self.trainer.state.global_step,
            self.args.trust_tokens,
        )
        return {mine[row][0]: tokens for row, tokens in rows.items() if row in mine}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises ValueError if it is of the other form."""
        if state["form"] != self.args.trust_form:
            raise ValueError(f"the saved trust_form is {state['form']!r}, this run's {self.args.trust_form!r}")
        self.form.load_state_dict(state)


def _budget(args: PGPOConfig) -> dict[str, Any]:
    """Settings of TrustBudget."""
    kind = kl_per_divergence(args.divergence, args.divergence_beta)
    first = max(TrustBudget().first_fraction, args.trust_fraction)
    return dict(fraction=args.trust_fraction, first_fraction=first, budget=args.trust_budget, kl_per_divergence=kind)


def _ratio(moved: float | None, divergence: float | None) -> dict[str, float]:
    """K of the whole step in units of the divergence, where both are known."""
    return {"trust_ratio": moved / divergence} if moved is not None and divergence else {}


def _local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor that FSDP has sharded."""
    return tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()
