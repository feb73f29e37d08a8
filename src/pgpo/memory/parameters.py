"""What stays in memory from step to step: parameters, optimizer, teacher. And the gradients."""

from __future__ import annotations

from pgpo.memory.shapes import FP32, ModelShape, TrainingSetting

# Elements, DeepSpeed 0.19's default of reduce_bucket_size (runtime/zero/config.py), which the recipes keep.
REDUCE_BUCKET = 5 * 10**8


def adapter_parameters(model: ModelShape, setting: TrainingSetting) -> int:
    """r (in + out) for every adapted matrix (LoRA, arXiv 2106.09685, section 4.1); 0 without LoRA."""
    if setting.lora is None:
        return 0
    return model.layers * sum(setting.lora * sum(model.matrices[name]) for name in set(setting.lora_targets))


def trained_parameters(model: ModelShape, setting: TrainingSetting) -> int:
    return model.parameters if setting.full else adapter_parameters(model, setting)


def static(model: ModelShape, setting: TrainingSetting) -> dict[str, float]:
    """Bytes that stay from step to step.

        parameters       P w, and 4 per adapter parameter
        optimizer        AdamW: two moments in the parameter's dtype (torch.optim.AdamW); SGD without momentum: none
        teacher          ema, frozen: a second model P w, or with LoRA a second adapter; live: none (teacher/weights.py)
        teacher average  ema of a bf16 model: fp32 shadows of what trains (teacher/weights.py, `_masters`)
        buckets          DDP copies gradients for the exchange (torch: gradient_as_bucket_view=False, accelerate's
                         default)

    FSDP2 divides all of them by the GPUs (train/sharding.py). ZeRO divides the optimizer, stage 3 the parameters too,
    not the teacher; it adds

        fp32 weights     of what trains, divided, beside parameters of any dtype: zero/stage_1_and_2.py's
                         single_partition_of_fp32_groups, stage3.py's fp32_partitioned_groups_flat (which compares a
                         device with its name, so that fp32 parameters are copied too)
        reduce bucket    stage 3 keeps it from the start, in fp32 (`settle`: communication_data_type)
    """
    s = setting
    adapters = adapter_parameters(model, s)
    base = s.stream if s.zero else s.trained_bytes if s.full else s.parameter_bytes
    trained = gradients(model, s)
    result = {
        "parameters": (model.parameters * base + adapters * s.adapter_bytes) / (s.gpus if s.gathers_layers else 1),
        "optimizer": (2 if s.optimizer == "adamw" else 0) * trained,
    }
    if s.zero:
        result["fp32 weights (ZeRO)"] = trained
    if s.zero == 3:
        result["reduce bucket (ZeRO)"] = REDUCE_BUCKET * FP32
    if s.distills and s.teacher != "live":
        width = (s.stream if s.zero else s.parameter_bytes) if s.full else s.adapter_bytes
        copies = trained_parameters(model, s) / (s.gpus if s.fsdp else 1)
        result["teacher"] = copies * width
        if s.teacher == "ema" and width < FP32:
            result["teacher average"] = copies * FP32
    if s.gpus > 1 and not (s.fsdp or s.zero):
        result["gradient buckets (DDP)"] = trained
    return result


def gradients(model: ModelShape, setting: TrainingSetting) -> float:
    """Bytes of all gradients of one GPU, in the dtype of what the optimizer steps."""
    return trained_parameters(model, setting) * setting.trained_bytes / setting.shards


def stored_bytes(setting: TrainingSetting) -> int:
    """Per element of what trains, where it meets activations under ZeRO."""
    return setting.stream if setting.full else setting.adapter_bytes
