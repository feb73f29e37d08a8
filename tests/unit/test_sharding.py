"""Which settings of FSDP can hold a teacher, and what mixed precision rounds. On two ranks: tests/distributed/."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy

from pgpo.train.sharding import keep_precision, sharding_problem


def accelerator(version=2, offload=None, policy=None):
    plugin = SimpleNamespace(
        fsdp_version=version, cpu_offload=offload or OffloadPolicy(), mixed_precision_policy=policy
    )
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (dict(version=1), "set fsdp_version: 2"),
        (dict(offload=CPUOffloadPolicy(pin_memory=False)), "set fsdp_offload_params: false"),
    ],
)
def test_what_holds_no_teacher_is_named_with_its_remedy(settings, remedy):
    problem = sharding_problem(accelerator(**settings))
    assert remedy in problem and problem.count(".") == 1


def test_plain_fsdp2_has_no_problem():
    assert sharding_problem(accelerator()) is None


def test_weights_are_rounded_for_the_layers_but_neither_gradient_sums_nor_outputs():
    half = accelerator(policy=MixedPrecisionPolicy(*[torch.bfloat16] * 3))  # accelerate's choice for bf16
    keep_precision(half)
    assert half.state.fsdp_plugin.mixed_precision_policy == MixedPrecisionPolicy(torch.bfloat16, torch.float32, None)
    full = accelerator()
    keep_precision(full)
    assert full.state.fsdp_plugin.mixed_precision_policy is None
