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
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported; use stage 2, or FSDP2 in place of 3, "
            "which shards the teacher too (recipes/accelerate/fsdp2.yaml)."
        )
    if settings.is_offload():
        return "DeepSpeed's offloading was never tried with a teacher; set offload_optimizer_device: none."
    for section in ("optimizer", "scheduler"):
        if section in settings.config:
            return f"DeepSpeed's configuration has its own {section}; remove it, and pgpo's arguments hold."
    if args.fp16:
        return "DeepSpeed's own loss scaling does not know of skipped rhos; set fp16: false and bf16: true."
    if args.load_best_model_at_end:
        return "load_best_model_at_end was never tried with DeepSpeed; set it to false and load the checkpoint by name."
    if args.information_source == "cross_fit":
        return "information_source='cross_fit' holds two gradients apart, which DeepSpeed adds up; use DDP or FSDP2."
    return None


def settle(model: nn.Module, accelerator: Any, batch_size: int, max_grad_norm: float) -> None:
    """Complete DeepSpeed's settings before the teacher is copied from the model.

    With bf16 it adds gradients up in bf16, over micro-batches and over ranks; here in fp32, as under FSDP2. It also
    rounds the parameters (not the buffers) and takes the model to its device when training begins; here at once, so
    that student and teacher begin with the same weights in the same place. And it counts samples: batch_size per rank,
    whatever they are split into.
    """
    model.to(accelerator.device)
    settings = accelerator.state.deepspeed_plugin.hf_ds_config
    settings.config["gradient_accumulation_steps"] = 1
    settings.config["train_micro_batch_size_per_gpu"] = batch_size
    settings.config["train_batch_size"] = batch_size * accelerator.num_processes
    settings.config.setdefault("gradient_clipping", max_grad_norm)
    if settings.is_true("bf16.enabled"):
        settings.config.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
        settings.config.setdefault("communication_data_type", "fp32")
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


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
    engine.optimizer.overflow = False  # of a step that was left out before
    if _holds_gradient(engine):
        engine.step()


def gradient_norm(engine: Any) -> float:
    """Norm of the step's gradient over all ranks, before clipping; nan if it is not finite. Every rank calls it."""
    if not _holds_gradient(engine):
        return 0.0
    norm = float(engine.optimizer.scaled_global_norm())
    return norm if norm >= 0 else math.nan  # some versions say -1 for nan and inf, others inf


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

    latest = checkpoint / "latest"
    tag = latest.read_text(encoding="utf-8").strip() if latest.exists() else ""
    if not re.fullmatch(r"global_step\d+", tag) or (checkpoint / tag).is_symlink():
        raise ValueError("it holds no state of DeepSpeed's")
    parts = list((checkpoint / tag).glob("*zero_pp_rank_*_optim_states.pt"))  # bf16_zero_... in half precision
    if len(parts) != ranks:
        raise ValueError(f"it was written by {len(parts)} ranks, this run has {ranks}")
    with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
        for file in sorted((checkpoint / tag).iterdir()):
            try:
                torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            except pickle.UnpicklingError as error:
                named = re.search(r"GLOBAL ([\w.]+)", str(error))
                raise pickle.UnpicklingError(f"{file.name} names {named[1] if named else 'code'}") from None


def _holds_gradient(engine: Any) -> bool:
    return any(part is not None for part in engine.optimizer.averaged_gradients.values())
