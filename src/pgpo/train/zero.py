"""DeepSpeed's ZeRO stage 2, as far as it differs from a plain optimizer: each rank holds 1/N of gradient and Adam.

accelerate steps DeepSpeed's engine inside `backward()`, before rho is known. Here `backward` only adds up, and `step`
waits until the optimizer is called, as for any other optimizer. The engine clips by its own `gradient_clipping`, which
transformers sets to max_grad_norm.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def zero_problem(accelerator: Any, args: Any) -> str | None:
    """Why a run cannot be trained under these settings of DeepSpeed, and the remedy, in one sentence; or None."""
    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.hf_ds_config
    if plugin.zero_stage != 2:
        return (
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported, because the teacher is not sharded with it; "
            "use stage 2, or FSDP2, which shards both (recipes/accelerate/fsdp2.yaml)."
        )
    if settings.is_offload():
        return "DeepSpeed's offloading was never tried with a teacher; set offload_optimizer_device: none."
    for section in ("optimizer", "scheduler"):
        if section in settings.config:
            return f"DeepSpeed's configuration has its own {section}; remove it, and pgpo's arguments hold."
    if args.fp16:
        return "DeepSpeed's own loss scaling does not know of skipped rhos; set fp16: false and bf16: true."
    if args.information_source == "cross_fit":
        return "information_source='cross_fit' holds two gradients apart, which DeepSpeed adds up; use DDP or FSDP2."
    return None


def settle(model: nn.Module, accelerator: Any, batch_size: int) -> None:
    """Complete DeepSpeed's settings before the teacher is copied from the model.

    With bf16 it adds gradients up in bf16, over micro-batches and over ranks; here in fp32, as under FSDP2. It also
    rounds the model and takes it to its device when training begins; here at once, so that student and teacher begin
    with the same weights in the same place. And it counts samples: batch_size per rank, whatever they are split into.
    """
    model.to(accelerator.device)
    settings = accelerator.state.deepspeed_plugin.hf_ds_config
    settings.config["gradient_accumulation_steps"] = 1
    settings.config["train_micro_batch_size_per_gpu"] = batch_size
    settings.config["train_batch_size"] = batch_size * accelerator.num_processes
    if settings.is_true("bf16.enabled"):
        settings.config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        settings.config.setdefault("communication_data_type", "fp32")
        model.to(torch.bfloat16)


def inner_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """The torch optimizer that DeepSpeed's own steps, once for each of its parameter groups."""
    inner: torch.optim.Optimizer = optimizer.optimizer
    return inner


def backward(engine: Any, loss: Tensor, last: bool) -> None:
    """Add a micro-batch's gradient; `last` of the step: the sum is then complete, and averaged over ranks."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(loss, scale_wrt_gas=False)


def step(engine: Any) -> None:
    """Clip and update; without a gradient nothing moves, as in torch."""
    if _holds_gradient(engine):
        engine.step()


def gradient_norm(engine: Any) -> float:
    """Norm of the step's gradient over all ranks, before clipping; nan if it is not finite. Every rank calls it."""
    if not _holds_gradient(engine):
        return 0.0
    norm = float(engine.optimizer.scaled_global_norm())
    return norm if norm >= 0 else math.nan  # -1 stands for nan and inf


def discard(engine: Any) -> None:
    """Leave the step out, told as DeepSpeed tells of an overflow: neither schedule nor teacher move on."""
    optimizer = engine.optimizer
    optimizer.zero_grad()
    for group in optimizer.averaged_gradients:
        optimizer.averaged_gradients[group] = None
    optimizer.overflow = True


def require_inert(checkpoint: Path, ranks: int) -> None:
    """DeepSpeed unpickles its checkpoints; refuse one that names anything but tensors and its own plain classes.

    Raises pickle.UnpicklingError with the name, or ValueError if it is not of DeepSpeed with so many ranks.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    parts = list(checkpoint.rglob("zero_pp_rank_*_optim_states.pt"))
    if len(parts) != ranks:
        written = f"by {len(parts)} ranks" if parts else "without DeepSpeed"
        raise ValueError(f"it was written {written}, this run has {ranks} and ZeRO-2")
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        for file in checkpoint.rglob("*.pt"):
            try:
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                named = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise pickle.UnpicklingError(f"{file.name} names {named[1] if named else 'code'}") from None


def _holds_gradient(engine: Any) -> bool:
    return any(part is not None for part in engine.optimizer.averaged_gradients.values())
