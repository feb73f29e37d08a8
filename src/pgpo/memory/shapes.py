"""What the memory of a training step depends on: the shape of the model, read from its config, and the setting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgpo.errors import UserError, reason
from pgpo.forward.batching import positions
from pgpo.hub import is_hub_id, require_model

# Decoder blocks whose saved tensors tests/unit/test_memory.py compares with autograd's, to the byte.
BLOCKS = ("llama", "mistral", "qwen2", "qwen3")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TRUST_FORMS = ("undo", "lagged", "auto", "kl_adaptive")  # PGPOConfig's
GIB = 2**30
FP32, FP64 = 4, 8  # bytes


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a decoder depends on.

    Attributes:
        positions: longest sequence; None: nothing limits it.
        tied: the head is the embedding.
        head_norms: queries and keys are normalised per head (Qwen3).
        expandable: every layer attends to the whole prefix, so that a prompt's KV cache can be shared.
        parameters: of the whole model, counted once.
        matrices: {name: (in, out)} of one block.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int | None
    tied: bool
    head_norms: bool
    expandable: bool
    parameters: int
    matrices: dict[str, tuple[int, int]]

    @property
    def queries(self) -> int:
        """Q."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """K."""
        return self.kv_heads * self.head_dim

    @property
    def block(self) -> int:
        """Elements of one block's matrices."""
        return sum(a * b for a, b in self.matrices.values())

    @property
    def head(self) -> int:
        """Elements of the head, V H."""
        return self.vocabulary * self.hidden

    @property
    def largest(self) -> int:
        """Elements of a block's largest matrix."""
        return max(a * b for a, b in self.matrices.values())


@dataclass(frozen=True)
class TrainingSetting:
    """What memory depends on besides the model; defaults are PGPOConfig's.

    Attributes:
        trust: "off" or "measured".
        trust_form: "undo", which holds a copy of what trains, or one of the forms that leave the step as it is.
        trust_tokens: completion tokens measured per step, on all GPUs together.
        lora: rank, or None to train all parameters.
        lora_targets: names of the adapted matrices (PEFT's default for these models: q_proj, v_proj).
        lora_dropout: whether the adapters' dropout is on (TRL's default rate is 0.05).
        parameter_bytes: 4 (float32) or 2 (bfloat16); adapters are fp32 always (PEFT's autocast_adapter_dtype).
        autocast: matmuls in bfloat16 (`bf16`, the trainer's default).
        attention: "sdpa", "flash" or "eager".
        join_siblings: completions of one prompt share a row where that is cheaper; None: as the trainer, on a CPU only.
        vllm_share: part of the memory that vLLM keeps (vllm_gpu_memory_utilization); None = transformers generates.
        fsdp: parameters, gradients and optimizer state are sharded (FSDP2).
        zero: DeepSpeed's stage, 2 or 3; None without it. The teacher is whole on each GPU.
        device: "cuda" or "cpu".
    """

    gpus: int = 1
    max_completion_length: int = 8192
    max_prompt_length: int = 2048
    teacher_prompt_length: int = 10240
    prompts_per_step: int = 32
    num_generations: int = 8
    objective: str = "pgpo"
    teacher: str = "ema"
    trust: str = "off"
    trust_form: str = "undo"
    trust_tokens: int = 4096
    lora: int | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    lora_dropout: bool = True
    parameter_bytes: int = 4
    autocast: bool = True
    optimizer: str = "adamw"
    fused_head: bool = True
    gradient_checkpointing: bool = True
    attention: str = "sdpa"
    join_siblings: bool | None = None
    vllm_share: float | None = None
    fsdp: bool = False
    zero: int | None = None
    device: str = "cuda"

    @property
    def distills(self) -> bool:
        return self.objective != "grpo"

    @property
    def undoes(self) -> bool:
        return self.trust != "off" and self.trust_form == "undo"

    @property
    def full(self) -> bool:
        """Whether the base parameters train."""
        return self.lora is None

    @property
    def matmul(self) -> int:
        """c."""
        return 2 if self.autocast else self.parameter_bytes

    @property
    def stream(self) -> int:
        """w where parameters meet activations; also of the residual stream and of every norm's output.

        transformers: the embedding's dtype, and type promotion keeps it. FSDP2's mixed precision gathers in bf16;
        DeepSpeed's rounds the parameters, and nothing autocasts (train/zero.py, `settle`).
        """
        return self.matmul if self.fsdp or self.zero else self.parameter_bytes

    @property
    def adapter_bytes(self) -> int:
        """Per element of an adapter: fp32 (PEFT's autocast_adapter_dtype), but `settle` rounds it too."""
        return self.stream if self.zero and self.autocast else FP32

    @property
    def trained_bytes(self) -> int:
        """Per element of what the optimizer steps; accelerate raises it to fp32 under FSDP2 with mixed precision, and
        DeepSpeed keeps fp32 weights beside the others."""
        return self.parameter_bytes if self.full and not (self.zero or (self.fsdp and self.autocast)) else FP32

    @property
    def shards(self) -> int:
        """Of gradients and optimizer."""
        return self.gpus if self.fsdp or self.zero else 1

    @property
    def gathers_layers(self) -> bool:
        """Weights are sharded too, and gathered layer by layer (SeamTrainer.gathers_layers)."""
        return self.fsdp or self.zero == 3

    @property
    def joins(self) -> bool:
        """Whether siblings may share a row (Forwards.joins), where the model lets them."""
        asked = self.device == "cpu" and self.attention == "sdpa" if self.join_siblings is None else self.join_siblings
        return asked and self.distills and not self.gathers_layers and self.attention in ("sdpa", "eager")

    @property
    def packed(self) -> bool:
        """PGPOConfig.packing by default: with flash attention on CUDA. (Flex packs too, and is not planned.)"""
        return self.attention == "flash" and self.device == "cuda"


def read_model(source: str) -> ModelShape:
    """Shapes and exact parameter count of a model folder or hub id, from its config, instantiated without memory.

    Raises:
        UserError: no such folder, no or a broken config, an architecture whose blocks are not known here.
    """
    config = _config(source)
    model, block = _skeleton(source, config)
    import torch

    matrices = {
        name.split(".")[-1]: (part.in_features, part.out_features)
        for name, part in block.named_modules()
        if isinstance(part, torch.nn.Linear)
    }
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelShape(
        name=source,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=head_dim,
        vocabulary=config.vocab_size,
        positions=positions(config),
        tied=model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        head_norms=hasattr(block.self_attn, "q_norm"),
        expandable=_attends_to_all(config),
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=matrices,
    )


def _config(source: str) -> Any:
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"the folder {source} has no config.json; give a model's folder or a hub id.")
    elif not is_hub_id(source):
        raise UserError(f"there is no model folder {source}; give one with a config.json, or a hub id.")
    else:
        require_model(source)
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise UserError(
            f"the config of {source!r} cannot be read ({type(error).__name__}: {reason(error, 200)}); give "
            "a folder with a config.json, or a hub id."
        ) from error
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{source} is an encoder-decoder ({kind}); the trainer needs a decoder-only language model.")
    if kind not in BLOCKS:
        raise UserError(
            f"{source} is a {kind} model, whose blocks the planner does not know; known: {', '.join(BLOCKS)}."
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source} is quantized, which the planner does not support; give the unquantized model.")
    return config


def _skeleton(source: str, config: Any) -> tuple[Any, Any]:
    """The model without memory, and its first block."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        return model, model.base_model.layers[0]
    except Exception as error:
        raise UserError(
            f"no model can be made from the config of {source!r} ({type(error).__name__}: {reason(error, 200)}); "
            "correct it."
        ) from error


def _attends_to_all(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return all(kind == "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is None


def check(model: ModelShape, setting: TrainingSetting) -> None:
    """Raise UserError for a setting that is wrong, or that the trainer refuses."""
    s = setting
    for name in (
        "gpus",
        "max_completion_length",
        "max_prompt_length",
        "teacher_prompt_length",
        "prompts_per_step",
        "num_generations",
        "trust_tokens",
    ):
        if getattr(s, name) < 1:
            raise UserError(f"{name} is {getattr(s, name)}; it must be at least 1.")
    if s.lora is not None and s.lora < 1:
        raise UserError(f"the LoRA rank is {s.lora}; it must be at least 1.")
    if unknown := [name for name in s.lora_targets if name not in MATRICES]:
        raise UserError(f"{unknown[0]!r} is not a matrix of these models; choose among {', '.join(MATRICES)}.")
    if s.vllm_share is not None and not 0 < s.vllm_share < 1:
        raise UserError(f"the vLLM share is {s.vllm_share}; it is a part of the GPU's memory, in (0, 1).")
    if (s.prompts_per_step * s.num_generations) % s.gpus:
        raise UserError(
            f"prompts_per_step * num_generations = {s.prompts_per_step * s.num_generations} completions do not divide "
            f"evenly by {s.gpus} GPUs; change prompts_per_step."
        )
    if model.positions is not None and s.max_prompt_length + s.max_completion_length > model.positions:
        raise UserError(
            f"a prompt of {s.max_prompt_length} tokens and a completion of {s.max_completion_length} are longer than "
            f"the {model.positions} positions of {model.name}; lower max_completion_length or max_prompt_length."
        )
    if s.trust not in ("off", "measured"):
        raise UserError(f"trust is {s.trust!r}; choose off or measured.")
    if s.trust != "off" and not s.distills:
        raise UserError("trust is measured against a teacher, and objective='grpo' has none; choose another objective.")
    if s.trust_form not in TRUST_FORMS:
        raise UserError(f"trust_form is {s.trust_form!r}; choose one of {', '.join(TRUST_FORMS)}.")
    if s.undoes and (s.zero or s.trained_bytes != FP32):
        raise UserError(
            "trust_form='undo' moves fp32 weights back after a step: not those of bf16, nor under ZeRO; choose float32 "
            "or FSDP, or trust_form='lagged'."
        )
    if s.fsdp and s.gpus == 1:
        raise UserError("FSDP shards over several GPUs, but gpus is 1; give more, or leave FSDP out.")
    if s.zero is None:
        return
    if s.zero not in (2, 3):
        raise UserError(f"DeepSpeed's ZeRO stage {s.zero} is not supported; choose 2 or 3, or FSDP.")
    if s.fsdp:
        raise UserError("FSDP and ZeRO both shard the same tensors; choose one.")
    if s.gpus == 1:
        raise UserError("ZeRO shards over several GPUs, but gpus is 1; give more, or leave ZeRO out.")
    if s.zero == 3 and s.lora is not None and s.distills and s.teacher != "live":
        raise UserError("LoRA with a teacher of its own is not trained under ZeRO-3; choose stage 2 or FSDP.")


def fitted(model: ModelShape, setting: TrainingSetting) -> TrainingSetting:
    """The setting with teacher prompts as long as the trainer lets them be: the model's positions less a completion."""
    if not setting.distills or model.positions is None:
        return setting
    room = model.positions - setting.max_completion_length
    return replace(setting, teacher_prompt_length=min(setting.teacher_prompt_length, room))
