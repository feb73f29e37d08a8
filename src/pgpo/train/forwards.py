"""Which samples share a forward, and the teacher's forwards: `forward/` under the configuration of a run."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from pgpo.forward import batching
from pgpo.forward.batching import Bundle, Limits
from pgpo.forward.open_model import causal_lm, head_error, head_problem, joins, open_forward, release_forward
from pgpo.forward.passes import Passes, States
from pgpo.settings.config import PGPOConfig
from pgpo.teacher import Teacher
from pgpo.teacher.weights import release_adapter
from pgpo.train import profile
from pgpo.train.engine import Engine
from pgpo.train.gate import torch_optimizer
from pgpo.train.rows import Sample, own_places
from pgpo.train.seam import Batch

_LOGGER = logging.getLogger(__name__)
HELD = 8  # ours: teacher states are held for so many micro-batches of tokens; 2 H bytes each in half precision
_CHECKED_TOKENS = 32  # ours
_HEAD_TOLERANCE = 0.02  # ours: of the largest logit; bf16 rounds to 0.004, another formula misses by far more


@dataclass(frozen=True)
class MicroBatch:
    """Samples of one forward of the student, `counts` of them in turn in a row of the batch."""

    samples: list[Sample]
    counts: list[int]
    places: list[int]  # of the samples in their block


Block = tuple[list[Sample], list[MicroBatch]]
"""Samples whose teacher states are held at the same time, and their micro-batches."""


class Forwards:
    """Student's and teacher's forwards of one trainer.

    Args:
        model: the student, unwrapped.
        pad: the tokenizer's pad token.
    """

    def __init__(self, model: nn.Module, teacher: Teacher, args: PGPOConfig, engine: Engine, pad: int) -> None:
        self.model, self.teacher, self.args, self.engine = model, teacher, args, engine
        config = self._config
        problem = "torch_compile wraps its forward" if args.torch_compile else head_problem(model)
        if problem is None and args.teacher == "trust_region" and getattr(config, "final_logit_softcapping", None):
            problem = "its logits are soft-capped, and teacher='trust_region' mixes logits"
        if problem is None:  # student and teacher end in hidden states
            open_forward(model)
            if teacher.module is not None:
                open_forward(teacher.module)
        elif args.fused_head:
            _LOGGER.warning("the loss holds all logits, because %s", problem)
        pack = args.packing
        if pack is None:
            attention = str(config._attn_implementation)
            pack = args.device.type == "cuda" and ("flash" in attention or "flex" in attention)
        self._checked = problem is not None
        self._joinable = joins(model)  # until the first update shows otherwise
        if args.join_siblings and (engine.gathers_layers or problem is not None or not self._joinable):
            _LOGGER.warning(
                "join_siblings has no effect: it needs sdpa or eager attention to all tokens, a plain head, and no "
                "FSDP or ZeRO-3"
            )
        self.passes = Passes(model, pad, engine.device, pack, problem is not None)

    @property
    def _config(self) -> Any:
        config: Any = self.model.config
        return config.get_text_config()

    @property
    def shares_prompts(self) -> bool:
        return self.args.share_teacher_prompts and not self.engine.gathers_layers and not self.passes.whole_logits

    @property
    def joins(self) -> bool:
        asked = self.args.join_siblings
        if asked is None:
            sdpa = self._config._attn_implementation == "sdpa"  # eager keeps all scores
            asked = self.engine.device.type == "cpu" and sdpa and not self.passes.pack
        return asked and self.shares_prompts and self._joinable

    @cached_property
    def repeats_itself(self) -> bool:
        """Whether two forwards of a sample agree to fp32's rounding, in a batch of any layout, trained or not."""
        noise = bool(self.args.neftune_noise_alpha) or bool(self.args.tf32)
        half = self.args.bf16 or self.args.fp16 or any(p.dtype.itemsize < 4 for p in self.model.parameters())
        modules = any(m.p > 0 for m in self.model.modules() if isinstance(m, nn.Dropout))
        random = ("drop", "jitter", "noise")
        settings = any(
            isinstance(v, float) and v > 0 and any(word in k for word in random)
            for k, v in self._config.to_dict().items()
        )
        return not (noise or half or modules or settings)

    def check(self, model: nn.Module, batch: Batch) -> None:
        """Once, before the first update: the head on the hidden states must give the model's own logits, and joined
        completions must not see one another.

        Args:
            model: as the step calls it, wrapped.
        """
        if self._checked:
            return
        self._checked = True
        ids = batch["prompt_ids"][:1][batch["prompt_mask"][:1].bool()][:_CHECKED_TOKENS].unsqueeze(0)
        training = model.training
        model.eval()
        error = self.engine.max(head_error(model, ids))
        if error < _HEAD_TOLERANCE and self.joins:
            leak, why = math.inf, "joined, they see one another"
            try:
                leak = self.passes.join_error(model, self._config.vocab_size)
            except torch.OutOfMemoryError:
                raise
            except Exception as refusal:  # whatever a model says that takes no mask of four dimensions
                why = str(refusal)
            self._joinable = self.engine.max(leak) < _HEAD_TOLERANCE
            if not self._joinable:
                _LOGGER.warning("completions of one prompt stay apart: %s", why)
        model.train(training)
        if not error < _HEAD_TOLERANCE:
            _LOGGER.warning("the loss holds all logits: the head on the last hidden state differs by %.2g", error)
            self.passes.whole_logits = True

    # Which samples share a forward ----------------------------------------------------------------------------------

    def schedule(self, samples: list[Sample]) -> list[Block]:
        """With prefix sharing, a block is as many samples as teacher states may be held for. The samples of one teacher
        prompt stay together, and the student's micro-batches need no room for the teacher's longer prompts. Otherwise,
        as under FSDP, where every rank must run the same forwards, a block is a micro-batch."""
        limits = self.limits()
        if not self.shares_prompts:
            parts = batching.split([s.size for s in samples], limits)
            blocks = [[samples[i] for i in part] for part in parts]
            return [(block, [_micro_batch(block, [[i] for i in range(len(block))])]) for block in blocks]
        limit = HELD * (self.args.max_tokens_per_microbatch or math.inf)
        blocks = [[]]
        held = 0
        ordered = sorted(samples, key=lambda s: s.teacher_prompt)
        for _, siblings in itertools.groupby(ordered, lambda s: s.teacher_prompt):
            more = list(siblings)
            size = sum(len(s.completion) for s in more)
            if blocks[-1] and held + size > limit:
                blocks.append([])
                held = 0
            blocks[-1] += more
            held += size
        return [
            (block, [_micro_batch(block, bundles) for bundles in self.bundles(block, limits)])
            for block in blocks
            if block
        ]

    def bundles(self, samples: list[Sample], limits: Limits) -> list[list[Bundle]]:
        """The student's micro-batches: siblings joined where that is cheaper."""
        if self.joins:
            padded = replace(limits, packed=False)
            parts, _ = batching.join([s.prompt for s in samples], [len(s.completion) for s in samples], padded)
            if any(len(bundle) > 1 for part in parts for bundle in part):
                return parts
        return [[[i] for i in part] for part in batching.split([s.student_size for s in samples], limits)]

    def limits(self, teacher: bool = False) -> Limits:
        """What a forward may hold and costs. teacher: its forwards have no loss, and are packed by `Passes.teacher`.

        A forward ends before its padding costs more than another one, except under FSDP, where every forward gathers
        the parameters.
        """
        forward_cost, pair_cost = self._costs
        return Limits(
            budget=self.args.max_tokens_per_microbatch or math.inf,
            most=self.args.micro_batch_size or math.inf,
            forward_cost=math.inf if self.engine.gathers_layers else forward_cost,
            pair_cost=pair_cost,
            packed=self.passes.pack and not teacher,
        )

    @cached_property
    def _costs(self) -> tuple[float, float]:
        return batching.costs(causal_lm(self.model), self.engine.device.type)

    # The teacher ----------------------------------------------------------------------------------------------------

    def with_teacher(self, blocks: list[Block]) -> Iterator[tuple[MicroBatch, States]]:
        """Micro-batches in turn, with the teacher's states of their tokens that count."""
        for block, micro_batches in blocks:
            states = self.teacher_states(block)
            ends = list(itertools.accumulate(len(s.labels) for s in block))
            for part in micro_batches:
                index = torch.cat([torch.arange(ends[i] - len(block[i].labels), ends[i]) for i in part.places])
                yield part, states[index.to(states.hidden.device)]

    def teacher_states(self, samples: list[Sample], join: bool = True) -> States:
        """Of the tokens that count, sample after sample."""
        with profile.part("teacher"), self.engine.autocast():
            states = self.passes.teacher(
                self.teacher,
                [s.teacher_prompt for s in samples],
                [s.completion for s in samples],
                self.limits(teacher=True) if self.shares_prompts else None,
                join and self.joins,
            )
        return states.at(own_places(samples))


def _micro_batch(block: list[Sample], bundles: list[Bundle]) -> MicroBatch:
    places = [i for bundle in bundles for i in bundle]
    return MicroBatch([block[i] for i in places], [len(bundle) for bundle in bundles], places)


def release(model: Any, optimizers: Any) -> None:
    """Undo an earlier trainer's changes of a model object, and of an optimizer that the user passed."""
    if isinstance(model, nn.Module):
        release_forward(model)
        release_adapter(model)
    if optimizers and optimizers[0] is not None:
        handle = getattr(torch_optimizer(optimizers[0]), "_pgpo_handle", None)
        if handle is not None:
            handle.remove()
