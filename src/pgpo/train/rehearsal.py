"""Hint rehearsal (ours): the student stays a good reader of hints, so that a teacher that follows it does, too.

    L = L_distillation + w * mean over rows of mean over t of KL( pi_T(. | x, h, y_<t) || pi_S(. | x, h, y_<t) )

Student and teacher read the SAME hinted prompt; the teacher is detached. Rows: a share of the active samples of all
ranks, at least one, drawn anew in every step. KL over the whole vocabulary, at the temperature of the loss, whatever
`divergence` is.

An averaged teacher takes over weights in which the hinted behaviour is not trained, and forgets how to use the hint.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pgpo.core import HeadOutput
from pgpo.core.information import sum_dtype
from pgpo.forward.open_model import Head
from pgpo.forward.passes import States
from pgpo.train import profile
from pgpo.train.forwards import Forwards, MicroBatch
from pgpo.train.heads import compare
from pgpo.train.rows import Sample, idle_sample, own_places
from pgpo.train.seam import Batch


class Rehearsal:
    """Rehearsal of one trainer. Every rank must call `backward`."""

    def __init__(self, trainer: Any, forwards: Forwards) -> None:
        self.trainer, self.args, self.engine, self.forwards = trainer, trainer.args, trainer.engine, forwards

    def backward(self, model: nn.Module, batch: Batch, samples: Sequence[Sample]) -> Tensor:
        """Add the gradient of distillation_weight * w * KL; more of the step's gradient must follow.

        Args:
            samples: this rank's active ones.

        Returns:
            This rank's part of w * KL, nats, fp64: summed over ranks it is the whole.
        """
        args, engine, forwards = self.args, self.engine, self.forwards
        mine, rows = self.chosen(samples)
        blocks = forwards.schedule([replace(sample, prompt=sample.teacher_prompt) for sample in mine])
        micro_batches = forwards.with_teacher(blocks)
        total = torch.zeros((), dtype=sum_dtype(engine.device), device=engine.device)
        for _ in range(int(engine.max(sum(len(parts) for _, parts in blocks)))):
            part, states = next(micro_batches, (None, None))
            idle = part is None
            part = part or MicroBatch([idle_sample(batch)], [1], [0])
            with engine.exchange(model, last=False):
                states = states or forwards.teacher_states(part.samples)
                with profile.part("student"):
                    loss = self._loss(model, part, states, 0.0 if idle else args.rehearse_weight / rows)
                # Ranks average their gradients; the loss is a sum over ranks.
                engine.backward(model, loss * (args.distillation_weight * engine.ranks), last=False)
            total += loss.detach()
        if rows:
            self.trainer.record("rehearsal_kl", engine.sum(float(total)) / args.rehearse_weight)
        return total

    def chosen(self, samples: Sequence[Sample]) -> tuple[list[Sample], int]:
        """Those of this rank's samples that are rehearsed, and how many all ranks rehearse. Follows from seed, step and
        the places of the active samples in the rollout of all ranks: no other random number is drawn."""
        first = self.trainer.last_rollout.local.start
        active = sorted(self.engine.gather_objects([first + sample.index for sample in samples]))
        if not active:
            return [], 0
        dice = random.Random(f"rehearsal {self.args.seed} {self.trainer.state.global_step}")
        found = set(dice.sample(active, max(1, round(self.args.rehearse_fraction * len(active)))))
        return [sample for sample in samples if first + sample.index in found], len(found)

    def _loss(self, model: nn.Module, part: MicroBatch, teacher: States, share: float) -> Tensor:
        """share: of a row; its tokens have equal parts of it."""
        samples, device = part.samples, self.engine.device
        labels = torch.tensor([t for s in samples for t in s.labels], device=device)
        weights = torch.tensor([share / len(s.labels) for s in samples for _ in s.labels], device=device)
        places = own_places(samples)

        def end(hidden: Tensor, head: Head | None) -> HeadOutput:
            states = States(hidden, head).at(places)
            return compare(self.args, states, teacher, labels, weights, kind="forward_kl", top_k=None)

        prompts, written = [s.prompt for s in samples], [s.completion for s in samples]
        output = self.forwards.passes.forward(model, prompts, written, end, part.counts)
        assert output.loss is not None
        return output.loss
