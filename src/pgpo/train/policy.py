"""TRL's own policy loss of an optimizer batch, and its gradient, in parts that fit the memory.

The loss always sees the whole batch of all ranks: the current part's rows with gradient, all others detached. So sums,
means, quantiles and TRL's metrics do not depend on the split, and the parts' gradients add up to that of the whole.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from pgpo.forward import batching, routers
from pgpo.forward.batching import Limits
from pgpo.forward.routers import Load
from pgpo.train import profile
from pgpo.train.rows import select
from pgpo.train.seam import Batch, Scores, SeamTrainer


class PolicyGradient(NamedTuple):
    """The loss, and whether this rank's part of it is finite."""

    loss: float
    finite: bool


class PolicyLoss:
    """Args: seam: gives TRL's loss, and the model's forwards as TRL runs them."""

    def __init__(self, seam: SeamTrainer) -> None:
        self.seam = seam

    @property
    def limits(self) -> Limits:
        """What a forward may hold; its padding, on both sides, is TRL's."""
        args = self.seam.args
        return Limits(args.max_tokens_per_microbatch or math.inf, args.micro_batch_size or math.inf, apart=True)

    def backward(self, model: nn.Module, batch: Batch, share: float = 1.0) -> PolicyGradient:
        """The gradient of `share` times the loss."""
        seam, engine = self.seam, self.seam.engine
        sizes = list(zip(batch["prompt_mask"].sum(1).tolist(), batch["completion_mask"].sum(1).tolist()))
        # Image tensors are not indexed by row, so such a batch stays whole.
        parts = [list(range(len(sizes)))] if "num_images" in batch else batching.split(sizes, self.limits)
        rounds = int(engine.max(len(parts)))
        if rounds > 1 or engine.ranks > 1:
            return self._in_parts(model, batch, parts, rounds, share)
        with engine.exchange(model, last=True):
            with profile.part("student"):
                loss = seam.grpo_loss(model, batch)
            engine.backward(model, loss * share, last=True)
        return PolicyGradient(loss.item(), bool(loss.isfinite()))

    def _in_parts(
        self, model: nn.Module, batch: Batch, parts: list[list[int]], rounds: int, share: float
    ) -> PolicyGradient:
        seam, engine = self.seam, self.seam.engine
        whole, first = seam.grpo_batch(batch), engine.rank * len(batch["completion_ids"])
        scores, load = Scores.unknown(whole), None
        if seam.couples_rows:
            with torch.no_grad(), engine.same_random_numbers():
                scores, load = self._scores_of_all(model, batch, parts, rounds)
        local = Scores.unknown(batch)
        for k in range(rounds):
            idle, last = k >= len(parts), k == rounds - 1
            index = torch.tensor(parts[0 if idle else k], device=engine.device)
            with engine.exchange(model, last):
                with profile.part("student"):
                    found, own = seam.grpo_scores(model, select(batch, index.tolist()))
                    router_loss = None if own is None else own.loss(load)
                    loss = seam.grpo_loss_of(whole, scores.placed(first + index, found), router_loss)
                # Ranks average their gradients.
                engine.backward(model, loss * (0 if idle else share * engine.ranks), last)
            if not idle:
                local = local.placed(index, found.detached())
        total = seam.grpo_loss_of(whole, self._of_all_ranks(local), None if load is None else load.loss(), record=True)
        return PolicyGradient(total.item(), _finite(local, batch))

    def _scores_of_all(
        self, model: nn.Module, batch: Batch, parts: list[list[int]], rounds: int
    ) -> tuple[Scores, Load | None]:
        """Of all ranks, from forwards without gradient."""
        seam, engine = self.seam, self.seam.engine
        local = Scores.unknown(batch)
        loads: list[Load] = []
        for k in range(rounds):
            index = parts[min(k, len(parts) - 1)]
            found, load = seam.grpo_scores(model, select(batch, index))
            if k < len(parts):
                local = local.placed(torch.tensor(index, device=engine.device), found)
                loads += [] if load is None else [load]
        load_of_all = routers.of_all_ranks(loads, seam.model, engine.reduce) if loads else None
        return self._of_all_ranks(local), load_of_all

    def _of_all_ranks(self, scores: Scores) -> Scores:
        gather = self.seam.engine.gather_rows
        return Scores(gather(scores.logps), gather(scores.entropies))


def _finite(scores: Scores, batch: Batch) -> bool:
    tensors: list[Tensor | None] = [
        scores.logps,
        scores.entropies,
        batch["advantages"],
        batch.get("importance_sampling_ratio"),
    ]
    return all(bool(t.isfinite().all()) for t in tensors if t is not None)
