"""The processes of a run: collectives, and how a micro-batch's gradient is exchanged."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from pgpo.core.information import sum_dtype
from pgpo.train import profile, zero


class Engine:
    """The part of accelerate's Accelerator that a step needs. Every rank must call each collective.

    Args:
        accelerator: of the trainer.
        sharded: FSDP shards the student.
        deepspeed: DeepSpeed trains the student.
    """

    def __init__(self, accelerator: Any, sharded: bool, deepspeed: bool) -> None:
        self.accelerator, self.sharded, self.deepspeed = accelerator, sharded, deepspeed

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def ranks(self) -> int:
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        return int(self.accelerator.process_index)

    # Collectives ----------------------------------------------------------------------------------------------------

    def reduce(self, values: Tensor) -> Tensor:
        """Sum over ranks, on the CPU."""
        values = values.to(sum_dtype(self.device)) if values.dtype == torch.float64 else values
        return self.accelerator.reduce(values.to(self.device), "sum").cpu()

    def sum(self, value: float) -> float:
        return self.reduce(torch.tensor([float(value)], dtype=torch.float64)).item()

    def max(self, value: float) -> float:
        local = torch.tensor([float(value)], device=self.device)
        return self.accelerator.gather(local).max().item()

    def on_any_rank(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return self.max(flag) > 0

    def gather_objects(self, local: list[Any]) -> list[Any]:
        """The ranks' lists, one after the other in rank order."""
        if self.ranks == 1:
            return local
        from accelerate.utils import gather_object

        return gather_object(local)

    def gather_rows(self, rows: Tensor, filler: float = 0) -> Tensor:
        """[B] or [B, T] of each rank -> [ranks * B, longest T], in rank order."""
        if self.ranks == 1:
            return rows
        if rows.dim() > 1:
            rows = self.accelerator.pad_across_processes(rows, dim=1, pad_index=filler)
        return self.accelerator.gather(rows.contiguous())

    # Forward and backward -------------------------------------------------------------------------------------------

    @property
    def gathers_layers(self) -> bool:
        """Whether layers run collectives in their forward, so that every rank must run the same forwards."""
        return self.sharded or zero.cuts_weights(self.accelerator)

    def exchange(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Context of forward and backward of a micro-batch: ranks exchange gradients in the last one only, but under
        FSDP in each, since an unreduced gradient is whole on every rank. DeepSpeed is told by `zero.backward`."""
        own_way = self.sharded or self.deepspeed
        return contextlib.nullcontext() if last or own_way else self.accelerator.no_sync(model)

    def backward(self, model: nn.Module, loss: Tensor, last: bool) -> None:
        """Backward of a micro-batch, the `last` of the step or not."""
        with profile.part("backward"):
            if self.deepspeed:
                zero.backward(model, loss, last)
            else:
                self.accelerator.backward(loss)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For a forward of the teacher. The prepared student autocasts in its own; under FSDP the weights of both
        are cast instead."""
        return contextlib.nullcontext() if self.sharded else self.accelerator.autocast()

    def same_random_numbers(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, a repeated forward draws the same random numbers (dropout); afterwards the generator is as before."""
        return torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
