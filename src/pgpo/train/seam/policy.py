"""TRL's policy loss of a batch whose forwards are run in parts, by any number of ranks."""

from __future__ import annotations

import collections
import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOTrainer

from pgpo.forward.open_model import causal_lm
from pgpo.forward.routers import Load, watched
from pgpo.train.seam.held_out import HeldOutSeam
from pgpo.train.seam.rollouts import Batch

_TIE = 1e-5  # ours: nats; entropies of equal tokens from two fp32 forwards differ by 1e-6
# State of TRL's adaptive entropy coefficient, which its loss moves on.
_CONTROLLER = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")
# What TRL's GRPO loss reads of every row, and what it takes for nothing behind a row's end.
_LOSS_INPUTS = {
    "prompt_ids": 0,
    "prompt_mask": 0,
    "completion_ids": 0,
    "completion_mask": 0,
    "tool_mask": 1,
    "advantages": 0,
    "old_per_token_logps": 0,
    "ref_per_token_logps": 0,
    "sampling_per_token_logps": 0,
    "importance_sampling_ratio": 1,
}


@dataclass(frozen=True)
class Scores:
    """Log-probabilities of the completion tokens of some rows and entropies at their places, [B, T], in nats."""

    logps: Tensor
    entropies: Tensor

    @classmethod
    def unknown(cls, batch: Batch) -> Scores:
        """Before any forward: such that no importance ratio overflows."""
        nothing = torch.zeros(batch["completion_ids"].shape, device=batch["completion_ids"].device)
        return cls(batch.get("old_per_token_logps", nothing).float(), nothing)

    def placed(self, rows: Tensor, part: Scores) -> Scores:
        """These with those of the `part` [len(rows), <= T] in its rows, gradient included."""

        def place(whole: Tensor, some: Tensor) -> Tensor:
            wide = nn.functional.pad(some, (0, whole.shape[1] - some.shape[1]))
            return whole.index_copy(0, rows, wide.to(whole.dtype))

        return Scores(place(self.logps, part.logps), place(self.entropies, part.entropies))

    def detached(self) -> Scores:
        return Scores(self.logps.detach(), self.entropies.detach())


class _OneProcess:
    """An accelerator as TRL's loss sees it where the batch of all ranks lies before it: nobody to ask."""

    num_processes = 1

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self.accelerator, name)

    def gather(self, tensor: Tensor) -> Tensor:
        return tensor

    gather_for_metrics = gather

    def reduce(self, tensor: Tensor, reduction: str) -> Tensor:
        return tensor

    def pad_across_processes(self, tensor: Tensor, dim: int, pad_index: float) -> Tensor:
        return tensor


class PolicySeam(HeldOutSeam):
    """`HeldOutSeam` with TRL's loss taken apart: the forwards, and what the loss makes of them. Subclass it."""

    def grpo_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """TRL's GRPO loss of a batch of padded tensors, with its metrics, in one forward."""
        return self._compute_loss(model, batch)

    def grpo_scores(self, model: nn.Module, batch: Batch) -> tuple[Scores, Load | None]:
        """What TRL's GRPO loss takes from the model's forward over some rows, and the load of its routers, if it has
        any that the loss balances."""
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        taken = inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters
        options = {name: batch[name] for name in taken if name in batch}  # images
        options |= dict(compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)
        loads: list[Load] = []
        with watched(causal_lm(self.model), loads) if self.aux_loss_enabled else contextlib.nullcontext():
            width = batch["completion_ids"].shape[1]
            logps, entropies, _ = self._get_per_token_logps_and_entropies(model, ids, mask, width, **options)
        return Scores(logps, entropies), sum(loads[1:], loads[0]) if loads else None

    def grpo_loss_of(self, batch: Batch, scores: Scores, router_loss: Tensor | None, record: bool = False) -> Tensor:
        """TRL's GRPO loss of a batch whose forwards have been run, as one process computes it that holds the batch.

        record: let TRL write its metrics and move its entropy controller on.
        """
        kept = {name: getattr(self, name) for name in ("accelerator", "_metrics", *_CONTROLLER)}
        self.accelerator: Any = _OneProcess(kept["accelerator"])
        if not record:
            self._metrics: Any = {mode: collections.defaultdict(list) for mode in kept["_metrics"]}
        self._forwarded = (scores.logps, scores.entropies, router_loss)
        try:
            return self._compute_loss(self.model, batch)
        finally:
            self._forwarded = None
            for name, value in kept.items():
                if not record or name == "accelerator":
                    setattr(self, name, value)

    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """TRL's tokens of high entropy. Siblings begin with equal entropies, between which rounding must not choose
        where they come from several forwards."""
        chosen: Tensor = super().get_high_entropy_mask(entropies, mask, threshold)
        if self._forwarded is None or not chosen.any():
            return chosen
        return mask.bool() & (entropies >= entropies[chosen].min() - _TIE)

    @property
    def couples_rows(self) -> bool:
        """Whether the gradient of a row in TRL's GRPO loss depends on forwards of other rows: the quantile of the
        entropies does, and the load of the routers."""
        return bool(self.top_entropy_quantile < 1.0 or self.aux_loss_enabled)

    def grpo_batch(self, batch: Batch) -> Batch:
        """What TRL's GRPO loss reads of the rows of all ranks, in rank order."""
        found = {
            name: self.engine.gather_rows(batch[name], filler) for name, filler in _LOSS_INPUTS.items() if name in batch
        }
        return found | {"num_items_in_batch": batch["num_items_in_batch"]}

    def _get_per_token_logps_and_entropies(self, model: nn.Module, input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._forwarded is not None:
            return self._forwarded
        # TRL passes the whole optimizer batch as one forward; keep to the micro-batch limits.
        rows = input_ids.shape[0]
        limits = [self.args.micro_batch_size or rows]
        if self.args.max_tokens_per_microbatch:
            limits.append(max(1, self.args.max_tokens_per_microbatch // input_ids.shape[1]))
        kwargs["batch_size"] = min(kwargs.get("batch_size") or rows, rows, *limits)
        return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)
