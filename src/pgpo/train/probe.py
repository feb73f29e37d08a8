"""How far a step moved the policy: K = mean-token KL(before || after), on a few of the step's own completions.

One random completion per question, of all ranks together at most `trust_tokens` tokens. Which ones depends on seed and
step alone: not on the number of ranks or micro-batches, and no other random number is drawn for it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeVar

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

T = TypeVar("T")


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

    Args:
        rows: {place in the batch: tokens of it}; empty on a rank that only takes part.
    """

    def __init__(self, forwards: Forwards, batch: Batch, rows: dict[int, int]) -> None:
        self.forwards, engine = forwards, forwards.engine
        samples = [_cut(s, tokens) for s, tokens in zip(student_samples(batch, list(rows)), rows.values())]
        parts = batching.split([s.student_size for s in samples], forwards.limits())
        self._parts = [[samples[i] for i in part] for part in parts]
        rounds = int(engine.max(len(parts))) if engine.gathers_layers else 0
        self._idle = [[idle_sample(batch)]] * (rounds - len(parts))  # ranks gather layers together
        self._before = self._each([self._keep] * len(parts))

    def moved(self) -> float:
        """K of the weights as they are now, nats; inf where they give nothing finite."""
        found = self._each([partial(self._moved, before) for before in self._before])
        values = torch.cat(found) if found else torch.zeros(0, device=self.forwards.engine.device)
        return token_mean(values, reduce=self.forwards.engine.reduce)

    def _each(self, finishes: Sequence[Callable[[States], T]]) -> list[T]:
        """What each makes of the states of its part's own tokens."""
        with profile.part("probe"):
            found = [self._run(part, finish) for part, finish in zip(self._parts, finishes, strict=True)]
            for part in self._idle:
                self._run(part, lambda states: None)
            reshard(self.forwards.model)
        return found

    def _run(self, samples: Sequence[Sample], finish: Callable[[States], T]) -> T:
        forwards, places, found = self.forwards, own_places(samples), list[T]()

        def end(hidden: Tensor, head: Head | None) -> Tensor:
            found.append(finish(States(hidden, head).at(places)))
            return hidden[:1]

        def forward(model: nn.Module) -> Tensor:
            return forwards.passes.forward(model, [s.prompt for s in samples], [s.completion for s in samples], end)

        with forwards.engine.autocast():
            frozen(forwards.model, forward)
        return found[0]

    def _keep(self, states: States) -> _Before:
        parts = [_kept(log_probs) for log_probs in self._log_probs(states)]
        tokens = [part.tokens for part in parts if part.tokens is not None]
        return _Before(torch.cat([part.log_probs for part in parts]), torch.cat(tokens) if tokens else None)

    def _moved(self, before: _Before, states: States) -> Tensor:
        """[N] nats."""
        start, found = 0, []
        for log_probs in self._log_probs(states):
            rows = slice(start, start := start + len(log_probs))
            if before.tokens is not None:
                log_probs = log_probs.gather(-1, before.tokens[rows])
            kept = "all" if before.tokens is None else "top"
            found.append(kl_moved(before.log_probs[rows], log_probs, kept).nan_to_num(nan=torch.inf, posinf=torch.inf))
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
