"""The self-distillation loss of an optimizer batch, and its gradient: schedule -> loss -> sums.

    loss = sum over active tokens of weight * D(student, teacher) / GLOBAL number of active tokens

(PGPO Eq. 2, SDPO's token mean), plus the routers' loss of a mixture of experts, which enters once per step, plus
hint rehearsal (rehearsal.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgpo.core import CrossFit, HeadOutput, Information, InformationMeter
from pgpo.core.information import sum_dtype
from pgpo.forward import routers
from pgpo.forward.open_model import Head
from pgpo.forward.passes import States
from pgpo.forward.routers import Load
from pgpo.settings.config import PGPOConfig
from pgpo.teacher.weights import reshard
from pgpo.train import profile
from pgpo.train.engine import Engine
from pgpo.train.forwards import Block, Forwards, MicroBatch
from pgpo.train.heads import compare
from pgpo.train.host import Host
from pgpo.train.rehearsal import Rehearsal
from pgpo.train.rows import Sample, Sums, demonstrations, idle_sample, own_places
from pgpo.train.seam import Batch

_DEMONSTRATIONS = 8  # ours: at most so many demonstrations are watched per rank and step
_NO_SUMS = len(Sums.__annotations__)


class TokenDetail(NamedTuple):
    """One completion token of a watched sample: divergence and log-probabilities in nats."""

    token: int
    divergence: float
    student_logprob: float
    teacher_logprob: float


@dataclass(frozen=True)
class Distilled:
    """Results of an optimizer batch beside its gradient.

    Attributes:
        sums: `Sums` of this rank, as a tensor.
        tokens: active tokens of all ranks.
        halves: the gradient of the first half-batch, with cross-fitting.
        finite: this rank's part is finite.
    """

    sums: Tensor
    tokens: float
    halves: CrossFit | None
    finite: bool


class Distillation:
    """Forward and backward of student and teacher.

    Args:
        meters: one per half-batch; filled anew in every step.
        router_coefficient: weight of the routers' loss; None for a model without routers that it balances.
    """

    def __init__(
        self,
        args: PGPOConfig,
        engine: Engine,
        forwards: Forwards,
        meters: Sequence[InformationMeter],
        host: Host,
        router_coefficient: float | None,
    ) -> None:
        self.args, self.engine, self.forwards, self.meters, self.host = args, engine, forwards, meters, host
        self.router_coefficient = router_coefficient
        self.details: dict[int, list[TokenDetail]] = {}  # of the rows in host.watched
        # Sees the student's states of each micro-batch's own tokens, with gradient, inside the forward.
        self.observer: Callable[[Sequence[Sample], States], object] | None = None
        self.rehearsal: Rehearsal | None = None

    def backward(self, model: nn.Module, batch: Batch, samples: list[Sample]) -> Distilled:
        """The gradient of distillation_weight times the loss, summed over ranks.

        Args:
            samples: the active ones of this rank.
        """
        engine, more_to_come = self.engine, self.args.follows_rewards
        tokens = engine.sum(sum(len(s.labels) for s in samples))
        sums = torch.zeros(_NO_SUMS, dtype=sum_dtype(engine.device), device=engine.device)
        self.details = {}
        self.forwards.check(model, batch)
        reshard(model)
        halves = CrossFit(model.parameters()) if len(self.meters) == 2 else None
        load = self._load_of_step(model, batch, samples) if self.router_coefficient is not None else None
        if self.rehearsal is not None:
            sums[0] += self.rehearsal.backward(model, batch, samples)
        for half, meter in enumerate(self.meters):
            mine = [s for s in samples if halves is None or s.half == half]
            total = len(batch["half"]) if halves is None else int((batch["half"] == half).sum())
            meter.reset()
            meter.add_unhinted(total - len(mine))
            blocks = self.forwards.schedule(mine)
            micro_batches = self.forwards.with_teacher(blocks)
            rounds = self._rounds(blocks)
            for i in range(rounds):
                part, states = next(micro_batches, (None, None))
                idle = part is None
                part = part or MicroBatch([idle_sample(batch)], [1], [0])
                last = i == rounds - 1 and not more_to_come
                with engine.exchange(model, last):
                    states = states or self.forwards.teacher_states(part.samples)
                    with profile.part("student"):
                        loss, stats = self._loss(model, part, states, tokens, idle, load, meter)
                    # Ranks average their gradients; the loss is a sum over ranks divided by the global token count.
                    engine.backward(model, loss * (self.args.distillation_weight * engine.ranks), last)
                sums += stats
            if halves is not None and half == 0:
                halves.stash()
        return Distilled(sums, tokens, halves, bool(sums.isfinite().all()))

    @torch.no_grad()
    def measure(self, model: nn.Module, samples: list[Sample], unhinted: int) -> tuple[Information, Sums, int]:
        """What `backward` measures, of one process and without a gradient: entropies, sums and their number of tokens.

        Args:
            unhinted: samples beside these, without a teacher.
        """
        tokens, sums, meter = sum(len(s.labels) for s in samples), torch.zeros(_NO_SUMS), self.meters[0]
        meter.reset()
        meter.add_unhinted(unhinted)
        for part, states in self.forwards.with_teacher(self.forwards.schedule(samples)):
            with self.engine.autocast():
                sums = sums + self._loss(model, part, states, tokens, False, None, meter)[1].cpu()
        return meter.summary(), Sums(*sums.tolist()), tokens

    def _rounds(self, blocks: list[Block]) -> int:
        """Every rank runs the same number of forwards and backwards, since these contain collectives."""
        rounds = int(self.engine.max(sum(len(parts) for _, parts in blocks)))
        return max(rounds, 1) if self.args.fp16 else rounds  # a gradient scaler needs gradients in every step

    @torch.no_grad()
    def demonstration_logprob(self, batch: Batch, shown: Mapping[int, list[int]]) -> float | None:
        """Mean log-probability per token that the teacher gives to demonstrations shown in its own prompt, nats, over
        all ranks; None if there are none.

        Args:
            shown: {row of a demonstration: the teacher's prompt that shows it}.
        """
        samples = demonstrations(batch, dict(shown), _DEMONSTRATIONS)
        idle = not samples
        if idle:  # the other ranks may run a forward with collectives
            samples = [idle_sample(batch)]
        states = self.forwards.teacher_states(samples, join=False)  # not yet checked before the first update
        labels = self._labels(samples)
        output = compare(self.args, states, states, labels, torch.zeros(len(labels), device=labels.device))
        assert output.teacher_logprob is not None
        total_logprob = output.teacher_logprob.to(sum_dtype(labels.device)).sum()
        sums = torch.tensor([total_logprob, len(labels)], dtype=torch.float64)
        total, tokens = self.engine.reduce(sums * (not idle)).tolist()
        return total / tokens if tokens else None

    # A micro-batch --------------------------------------------------------------------------------------------------

    def _loss(
        self,
        model: nn.Module,
        part: MicroBatch,
        teacher: States,
        tokens: float,
        idle: bool,
        load: Load | None,
        meter: InformationMeter,
    ) -> tuple[Tensor, Tensor]:
        """Its share of the global mean, and its `Sums` as a tensor.

        Args:
            load: of the whole step's routers; None = this is the whole step.
        """
        samples = part.samples
        labels = self._labels(samples)
        weights = self._token_weights(samples, 0.0 if idle else 1 / tokens)
        places = own_places(samples)
        loads: list[Load] | None = None if self.router_coefficient is None else []

        def end(hidden: Tensor, head: Head | None) -> HeadOutput:
            states = States(hidden, head).at(places)
            if self.observer is not None and not idle:
                self.observer(samples, states)
            return compare(self.args, states, teacher, labels, weights)

        output: HeadOutput = self.forwards.passes.forward(
            model,
            [s.prompt for s in samples],
            [s.completion for s in samples],
            end,
            part.counts,
            loads,
        )
        assert output.loss is not None and output.student_logprob is not None and output.teacher_logprob is not None
        loss, router_loss = output.loss, torch.zeros((), device=labels.device)
        if loads:  # an idle rank needs the same backward: ZeRO-3 compares what the ranks run
            router_loss = loads[0].loss(load) * (not idle)
            loss = loss + (self.router_coefficient or 0.0) * router_loss
        if idle:
            return loss, torch.zeros(_NO_SUMS, dtype=sum_dtype(labels.device), device=labels.device)
        _measure(meter, samples, output)
        self._keep_details(samples, output)
        gap = output.student_logprob.detach() - output.teacher_logprob
        wrong = torch.tensor([not s.solved for s in samples for _ in s.labels], device=labels.device)
        stats = [loss.detach(), output.divergence, gap, torch.where(wrong, gap, 0.0), wrong, router_loss.detach()]
        return loss, torch.stack([t.to(sum_dtype(t.device)).sum() for t in stats])

    def _token_weights(self, samples: list[Sample], share: float) -> Tensor | Callable[[HeadOutput, slice], Tensor]:
        """share * clipped ratio to the rollout policy (SDPO) * vLLM's correction, for every token."""
        device = self.engine.device
        fixed = torch.full((sum(len(s.labels) for s in samples),), share, device=device)
        if samples[0].weight is not None:
            ratios = [s.weight.expand(len(s.labels)) for s in samples]  # type: ignore[union-attr]
            fixed = fixed * torch.cat(ratios).to(device)
        clip = self.args.importance_clip
        if clip is None or samples[0].rollout_logprobs is None:
            return fixed
        old = torch.cat([s.rollout_logprobs for s in samples]).to(device)  # type: ignore[misc]

        def weigh(chunk: HeadOutput, part: slice) -> Tensor:
            assert chunk.student_logprob is not None
            return (chunk.student_logprob - old[part]).exp().clamp_max(clip) * fixed[part]

        return weigh

    def _labels(self, samples: list[Sample]) -> Tensor:
        """The tokens that count [N], sample after sample."""
        return torch.tensor([t for s in samples for t in s.labels], device=self.engine.device)

    def _keep_details(self, samples: list[Sample], output: HeadOutput) -> None:
        start = 0
        for sample in samples:
            end = start + len(sample.labels)
            if sample.index in self.host.watched:
                columns = (output.divergence, output.student_logprob, output.teacher_logprob)
                values = torch.stack([t[start:end].detach().float() for t in columns], 1).tolist()  # type: ignore[index]
                self.details[sample.index] = [TokenDetail(t, *v) for t, v in zip(sample.labels, values)]
            start = end

    # Routers of a mixture of experts --------------------------------------------------------------------------------

    def _load_of_step(self, model: nn.Module, batch: Batch, samples: list[Sample]) -> Load | None:
        """The router load of the whole step on all ranks, from forwards without gradient; None if the step is a single
        forward, whose own load it is."""
        work = [part for _, parts in self.forwards.schedule(samples) for part in parts]
        rounds = int(self.engine.max(len(work)))
        if rounds <= 1 == self.engine.ranks and len(self.meters) == 1:
            return None
        loads: list[Load] = []
        passes = self.forwards.passes
        with torch.no_grad(), self.engine.same_random_numbers():
            for k in range(rounds):
                part = work[k] if k < len(work) else MicroBatch([idle_sample(batch)], [1], [0])
                prompts, written = [s.prompt for s in part.samples], [s.completion for s in part.samples]
                found: list[Load] = []
                passes.forward(model, prompts, written, lambda hidden, head: hidden[:1], part.counts, found)
                if k < len(work):
                    loads += found
        return routers.of_all_ranks(loads, self.forwards.model, self.engine.reduce)


def _measure(meter: InformationMeter, samples: list[Sample], output: HeadOutput) -> None:
    """Add the entropies of the samples' tokens."""
    lengths = torch.tensor([len(s.labels) for s in samples])
    mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).to(output.student_entropy.device)

    def grid(values: Tensor) -> Tensor:
        return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)

    meter.add(grid(output.student_entropy), grid(output.teacher_entropy), mask)
