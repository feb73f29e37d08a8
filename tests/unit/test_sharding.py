"""Which settings of FSDP and DeepSpeed hold a teacher, what mixed precision rounds. On ranks: tests/distributed/."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy
from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

from pgpo.train.sharding import keep_precision, sharding_problem
from pgpo.train.zero import zero_problem


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


@pytest.mark.parametrize("stage", [2, 3])
def test_accelerate_launches_zero(stage, monkeypatch):
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import DeepSpeedPlugin
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    path = Path(__file__).parents[2] / f"recipes/accelerate/zero{stage}.yaml"
    parsed = launch_command_parser().parse_args(["--config_file", str(path), "x.py"])
    arguments, defaults, _ = _validate_launch_command(parsed)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)  # launch_command does it
    _, environment = prepare_deepspeed_cmd_env(arguments)
    assert (environment["ACCELERATE_USE_DEEPSPEED"], environment["ACCELERATE_MIXED_PRECISION"]) == ("true", "bf16")
    for variable, value in environment.items():
        if variable.startswith("ACCELERATE_"):
            monkeypatch.setenv(variable, value)
    plugin = DeepSpeedPlugin()
    assert plugin.zero_stage == stage and plugin.deepspeed_config["gradient_clipping"] == "auto"  # max_grad_norm
    given = SimpleNamespace(
        fp16=False,
        load_best_model_at_end=False,
        adaptive_clip=None,
        information_source="same_batch",
        teacher="ema",
        distills=True,
    )
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    model = torch.nn.Linear(1, 1)
    assert zero_problem(model, accelerator, given) is None
    model.weight.ds_tensor = torch.zeros(1)  # as DeepSpeed leaves a parameter that it has cut up
    assert "zero3_init_flag: false" in zero_problem(model, accelerator, given)


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_zero2", "ddp"])
def test_accelerate_launches_the_shipped_configurations(name, monkeypatch):
    """As `accelerate launch --config_file` reads them, up to the plugin that its environment makes."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils import FullyShardedDataParallelPlugin
    from accelerate.utils.launch import prepare_multi_gpu_env

    path = Path(__file__).parents[2] / f"recipes/accelerate/{name}.yaml"
    arguments, *_ = _validate_launch_command(launch_command_parser().parse_args(["--config_file", str(path), "x.py"]))
    environment = prepare_multi_gpu_env(arguments)
    assert (arguments.num_processes, environment["ACCELERATE_MIXED_PRECISION"]) == (8, "bf16")
    assert environment.get("ACCELERATE_USE_FSDP") == (None if name == "ddp" else "true")
    if name == "ddp":
        return
    for variable, value in environment.items():
        if variable.startswith("FSDP_"):
            monkeypatch.setenv(variable, value)
    plugin = FullyShardedDataParallelPlugin()
    assert sharding_problem(SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))) is None
    assert plugin.reshard_after_forward is (name == "fsdp2") and plugin.cpu_ram_efficient_loading
    assert plugin.auto_wrap_policy is transformer_auto_wrap_policy and not plugin.activation_checkpointing
    assert plugin.state_dict_type.name == "FULL_STATE_DICT"
