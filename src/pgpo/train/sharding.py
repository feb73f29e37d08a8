"""FSDP2 (accelerate's `fsdp_version: 2`, torch's `fully_shard`): the teacher is sharded as the student is.

Each rank holds 1/N of the student, its gradient and optimizer state, and of the teacher and its fp32 average. Layers
are gathered for the moment they run in; the teacher's average follows shard by shard.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn


def sharding_problem(accelerator: Any) -> str | None:
    """Why a teacher cannot be sharded with these settings of FSDP, and the remedy, in one sentence; or None."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        return "FSDP1 cannot shard a teacher; set fsdp_version: 2 in accelerate's configuration."
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        return "FSDP's CPU offload is not tested with a teacher; set fsdp_offload_params: false."
    return None


def shard(module: nn.Module, accelerator: Any) -> None:
    """Shard a teacher in place by the function, and with the wrapping policy, that will shard the student.

    A teacher has no backward, so the unit with its head keeps its gathered weights until `teacher.weights.reshard`: the
    loss uses them after the teacher's forward has returned.
    """
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model

    fsdp2_prepare_model(accelerator, module)
    head = module.get_output_embeddings()  # type: ignore[operator]
    if hasattr(head, "set_reshard_after_forward"):
        head.set_reshard_after_forward(False, recurse=False)


def keep_precision(accelerator: Any) -> None:
    """Under mixed precision accelerate also rounds gradients before they are summed over ranks, and what a forward
    returns. Here the sums are fp32 (as in SDPO's framework, verl), and so are losses and entropies."""
    plugin = accelerator.state.fsdp_plugin
    if plugin.mixed_precision_policy is not None:
        policy = plugin.mixed_precision_policy
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)


def local(tensor: Any) -> Tensor:
    """What this rank holds of a tensor, sharded or not; without gradient."""
    held: Tensor = tensor.detach()
    return held.to_local() if hasattr(held, "to_local") else held
