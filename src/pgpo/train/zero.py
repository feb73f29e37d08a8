"""DeepSpeed's ZeRO stages 2 and 3, where they differ from a plain optimizer.

Each rank holds 1/N of gradient and optimizer, in stage 3 also of the student's weights; the teacher is whole on each.

accelerate steps DeepSpeed's engine inside `backward()`, before rho is known. Here `backward` only accumulates, and
`step` waits for the optimizer's call, as with any other optimizer. The engine clips by its own `gradient_clipping`,
which transformers sets to max_grad_norm.
"""

from __future__ import annotations

import math
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def zero_problem(model: nn.Module, accelerator: Any, args: Any) -> str | None:
    """Why a run cannot be trained under these settings of DeepSpeed, and the remedy, in one sentence; or None."""
    plugin = accelerator.state.deepspeed_plugin
    settings = plugin.hf_ds_config
    if plugin.zero_stage not in (2, 3):
        return (
            f"DeepSpeed's ZeRO stage {plugin.zero_stage} is not supported; use stage 2 or 3, or FSDP2, which shards "
            "the teacher too (recipes/accelerate/fsdp2.yaml)."
        )
    if any(hasattr(parameter, "ds_tensor") for parameter in model.parameters()):
        return "DeepSpeed has sharded the model before a teacher could be copied; set zero3_init_flag: false."
    if settings.is_offload():
        return "DeepSpeed's offloading is not tested with a teacher; set offload_optimizer_device: none."
    for section in ("optimizer", "scheduler"):
        if section in settings.config:
            return f"DeepSpeed's configuration has its own {section}; remove it, so that pgpo's arguments apply."
    if args.fp16:
        return "DeepSpeed's own loss scaling does not know of skipped rhos; set fp16: false and bf16: true."
    if plugin.zero_stage == 3 and args.distills:
        if args.teacher == "trust_region":
            return "teacher='trust_region' needs two whole heads at once, which ZeRO-3 shards; use stage 2 or FSDP2."
        if hasattr(model, "peft_config") and args.teacher != "live":
            return "a teacher's adapter inside a model that ZeRO-3 has sharded is not supported; use stage 2 or FSDP2."
    if args.load_best_model_at_end:
        return "load_best_model_at_end is not tested with DeepSpeed; set it to false and load the checkpoint by name."
    if args.adaptive_clip is not None:
        return "adaptive_clip is set, but DeepSpeed clips by itself, at gradient_clipping; leave it out, or use FSDP2."
    if args.information_source == "cross_fit":
        return "information_source='cross_fit' keeps two gradients apart, but DeepSpeed sums them; use DDP or FSDP2."
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
    if settings.is_zero3():  # checkpoints that others can read
        settings.config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
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


def cuts_weights(accelerator: Any) -> bool:
    """Whether ranks gather weights layer by layer (stage 3), so that all must run the same forwards."""
    plugin = accelerator.state.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


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
    optimizer = engine.optimizer
    stage2 = hasattr(optimizer, "scaled_global_norm")
    parts = [float(part) for part in ([optimizer.scaled_global_norm()] if stage2 else optimizer._get_norm_groups())]
    return math.hypot(*parts) if all(part >= 0 for part in parts) else math.nan  # -1 stands for nan and inf


def discard(engine: Any) -> None:
    """Skip the step, and report it as DeepSpeed reports an overflow, so that neither schedule nor teacher moves."""
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
