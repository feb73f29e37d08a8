"""How far a step moved the policy: K = mean-token KL(before || after), on a few of the step's own completions.

One random completion per question, of all ranks together at most `trust_tokens` tokens. Which ones depends on seed and
step alone: not on the number of ranks or micro-batches, and no other random number is drawn for it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgpo.core import kl_moved, token_mean
from pgpo.forward import batching
from pgpo.forward.open_model import Head
from pgpo.forward.passes import States
from pgpo.teacher.weights import frozen, reshard
from pgpo.train import profile
from pgpo.train.forwards import Forwards
from pgpo.train.rows import Sample, idle_sample, own_places, student_samples
from pgpo.train.seam import Batch

# Ours: so many of a token's most likely successors are kept from before the step, all others as one; of a vocabulary no
# larger, every one. K is then too small by what moved among the others (top-20: a thousandth, docs/LOG.md).
KEPT_TOKENS = 256
_CHUNK_LOGITS = 2**24  # ours: logits in fp32 at a time, 64 MiB


class Candidate(NamedTuple):
    """A completion of some rank: its place in the rollout of all ranks, its question, and its own tokens."""

    row: int
    question: int
    tokens: int


def chosen(candidates: Sequence[Candidate], seed: int, step: int, most: int) -> dict[int, int]:
    """{row: tokens of it to probe}: one completion per question, in random order until `most` tokens are reached."""
    dice = random.Random(f"{seed} {step}")
    drawn = sorted((dice.random(), candidate) for candidate in sorted(candidates))
    found: dict[int, int] = {}
    questions: set[int] = set()
    for _, candidate in drawn:
        if candidate.question not in questions and most > 0:
            questions.add(candidate.question)
            found[candidate.row] = min(candidate.tokens, most)
            most -= found[candidate.row]
    return found


class _Before(NamedTuple):
    """Of N tokens: log-probabilities [N, V], or [N, k] of the tokens [N, k] most likely then."""

    log_probs: Tensor
    tokens: Tensor | None


class Probe:
    """The policy before a step, on this rank's rows to probe. Every rank makes one and asks as often.

    Of a row that the loss has a forward for, the policy before comes from there (`see`); of the others from a forward
    of their own. In half precision all have one: what two layouts of a batch round apart is no motion.

    Args:
        rows: {place in the batch: tokens of it}; empty on a rank that only takes part.
    """

    def __init__(self, forwards: Forwards, batch: Batch, rows: dict[int, int]) -> None:
        self.forwards, self.batch = forwards, batch
        self._tokens = {int(batch["row"][place]): tokens for place, tokens in rows.items()}
        self._places = {int(batch["row"][place]): place for place in rows}
        self._before: dict[int, _Before] = {}

    @torch.no_grad()
    def see(self, samples: Sequence[Sample], states: States) -> None:
        """The student's states of the samples' own tokens, sample after sample, before the step."""
        start = 0
        for sample in samples:
            end = start + len(sample.labels)
            if (tokens := self._tokens.get(sample.index)) is not None and self.forwards.repeats_itself:
                self._before[sample.index] = self._keep(states[torch.arange(start, min(end, start + tokens))])
            start = end

    def begin(self) -> None:
        """Before the step, after the loss."""
        self._each([row for row in self._tokens if row not in self._before], self._remember)

    def moved(self) -> float:
        """K of the weights as they are now, nats; inf where they give nothing finite."""
        found: list[Tensor] = []
        self._each(list(self._tokens), lambda rows, states: found.append(self._moved(rows, states)))
        values = torch.cat(found) if found else torch.zeros(0, device=self.forwards.engine.device)
        return token_mean(values, reduce=self.forwards.engine.reduce)

    def _each(self, rows: Sequence[int], finish: Callable[[list[int], States], object]) -> None:
        """The states of the rows' own tokens, a few rows at a time; as many forwards on every rank."""
        engine = self.forwards.engine
        samples = student_samples(self.batch, [self._places[row] for row in rows])
        samples = [_cut(sample, self._tokens[row]) for sample, row in zip(samples, rows, strict=True)]
        parts = batching.split([s.student_size for s in samples], self.forwards.limits())
        rounds = int(engine.max(len(parts))) if engine.gathers_layers else 0
        with profile.part("probe"):
            for part in parts:
                self._run([samples[i] for i in part], partial(finish, [rows[i] for i in part]))
            for _ in range(rounds - len(parts)):  # ranks gather layers together
                self._run([idle_sample(self.batch)], lambda states: None)
            reshard(self.forwards.model)

    def _run(self, samples: Sequence[Sample], finish: Callable[[States], object]) -> None:
        forwards, places = self.forwards, own_places(samples)

        def end(hidden: Tensor, head: Head | None) -> Tensor:
            finish(States(hidden, head).at(places))
            return hidden[:1]

        def forward(model: nn.Module) -> Tensor:
            return forwards.passes.forward(model, [s.prompt for s in samples], [s.completion for s in samples], end)

        with forwards.engine.autocast():
            frozen(forwards.model, forward)

    def _remember(self, rows: list[int], states: States) -> None:
        ends = list(itertools.accumulate(self._tokens[row] for row in rows))
        for row, end in zip(rows, ends, strict=True):
            self._before[row] = self._keep(states[torch.arange(end - self._tokens[row], end)])

    def _keep(self, states: States) -> _Before:
        parts = [_kept(log_probs) for log_probs in self._log_probs(states)]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return _Before(torch.cat([part.log_probs for part in parts]), torch.cat(tokens) if tokens else None)

    def _moved(self, rows: list[int], states: States) -> Tensor:
        """[N] nats."""
        known = [self._before[row] for row in rows]
        before = _Before(
            torch.cat([part.log_probs for part in known]),
            None if known[0].tokens is None else torch.cat([part.tokens for part in known if part.tokens is not None]),
        )
        start, found = 0, []
        for log_probs in self._log_probs(states):
            chunk = slice(start, start := start + len(log_probs))
            if before.tokens is not None:
                log_probs = log_probs.gather(-1, before.tokens[chunk])
            kept = "all" if before.tokens is None else "top"
            found.append(kl_moved(before.log_probs[chunk], log_probs, kept).nan_to_num(nan=torch.inf, posinf=torch.inf))
        return torch.cat(found)

    def _log_probs(self, states: States) -> Iterator[Tensor]:
        """[rows, V] at the sampling temperature, a few rows at a time; in fp32 where the head's weight is."""
        hidden, head = states.hidden, states.head
        width = hidden.shape[-1] if head is None else len(head.weight)
        for part in hidden.split(max(1, _CHUNK_LOGITS // width)):
            with torch.autocast(hidden.device.type, enabled=False):
                logits = part if head is None else head.logits(part.to(head.weight.dtype))
            yield torch.log_softmax(logits.float() / self.forwards.args.temperature, -1)


def _kept(log_probs: Tensor) -> _Before:
    return _Before(log_probs, None) if log_probs.shape[-1] <= KEPT_TOKENS else _Before(*log_probs.topk(KEPT_TOKENS, -1))


def _cut(sample: Sample, tokens: int) -> Sample:
    """The sample up to so many of its own tokens."""
    own = None if sample.own is None else sample.own[:tokens]
    return replace(sample, completion=sample.completion[: tokens if own is None else own[-1] + 1], own=own)
