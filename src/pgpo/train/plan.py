"""`pgpo plan`: memory per GPU of a training step, from the model's config alone. No weights are read.

A step has five moments; each has its own peak, and the largest is the step's:

    rollout    generation with transformers (keys and values, logits of one token), or vLLM's fixed share
    teacher    the teacher's states of a block of completions, its prompts' keys and values
    loss       the student's forward up to and including the heads: everything autograd has saved, one chunk of logits
    backward   the same without the chunk, plus what the first layer to be differentiated needs
    step       gradients, optimizer, teacher average

Every number is counted from the code that runs, none is fitted: transformers' Llama block (`layer_activations`),
core/fused_head.py (`Step._head`), passes.py and trainer.py (`Step.teacher`), teacher/weights.py (`static`), torch's
autograd and AdamW, DeepSpeed 0.19 with what train/zero.py sets (`Step._zero`). benchmarks/plan_accuracy.py compares
them with measured peaks.

Assumptions: every prompt and completion is as long as allowed; a micro-batch is full; every completion has a teacher;
two or more micro-batches have passed, so that gradients lie in memory, if there are two or more. Not planned: the copy
of the gradient that information_source='cross_fit' holds, guard snapshots, a divergence over the full vocabulary with
fused_head=False, join_siblings (off on CUDA: its rows hold more completion tokens within a budget, and have a mask).

Symbols in docstrings: N positions of a micro-batch, H hidden size, Q = heads * head size, K the same of keys, I
intermediate size, V vocabulary; w bytes of a parameter, c of a matmul (2 under autocast), always in bytes per element.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

from pgpo.errors import UserError
from pgpo.runlog import write_atomically
from pgpo.train.batching import positions

GIB = 2**30
# Decoder blocks whose saved tensors tests/unit/test_plan.py compares with autograd's, byte by byte.
BLOCKS = ("llama", "mistral", "qwen2", "qwen3")
HELD, CACHED = 8, 4  # trainer._HELD, passes._CACHED
BUCKET = 2**26  # teacher.weights._BUCKET
CHUNK_LOGITS = {"cpu": 20_000_000, "cuda": 160_000_000}  # core.fused_head
COMPILE_FROM, EAGER_LOGITS = 2**15, 2**18  # core.fused_head, on a CPU
TRL_TILE = (4096, 32768)  # trl.kernels.chunked_logprob: tokens and vocabulary of one tile
# Elements, DeepSpeed 0.19's defaults (runtime/zero/config.py), which the recipes leave as they are: reduce_bucket_size,
# sub_group_size, stage3_max_live_parameters.
REDUCE_BUCKET, SUB_GROUP, MAX_LIVE = 5 * 10**8, 10**9, 10**9
FP32, FP64 = 4, 8
# Ours, not measured: CUDA context, libraries and NCCL's buffers, and the allocator's fragmentation.
RESERVE = GIB
RESERVE_SHARE = 0.05
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
MOST_CHANGES = 3  # that are advised together
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class ModelShape:
    """What the memory of a decoder depends on.

    Attributes:
        positions: longest sequence; None: nothing limits it.
        tied: the head is the embedding.
        head_norms: queries and keys are normalised per head (Qwen3).
        expandable: every layer attends to the whole prefix, so that a prompt's cache can be shared.
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
class Setting:
    """What a run is; defaults are PGPOConfig's.

    Attributes:
        lora: rank, or None to train all parameters.
        lora_targets: names of the adapted matrices (PEFT's default for these models: q_proj, v_proj).
        lora_dropout: whether the adapters' dropout is on (TRL's default rate is 0.05).
        parameter_bytes: 4 (float32) or 2 (bfloat16); adapters are fp32 always (PEFT's autocast_adapter_dtype).
        autocast: matmuls in bfloat16 (`bf16`, the trainer's default).
        attention: "sdpa", "flash" or "eager".
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
    lora: int | None = None
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    lora_dropout: bool = True
    parameter_bytes: int = 4
    autocast: bool = True
    optimizer: str = "adamw"
    fused_head: bool = True
    gradient_checkpointing: bool = True
    attention: str = "sdpa"
    vllm_share: float | None = None
    fsdp: bool = False
    zero: int | None = None
    device: str = "cuda"

    @property
    def distills(self) -> bool:
        return self.objective != "grpo"

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
    def packed(self) -> bool:
        """PGPOConfig.packing: by default with flash attention on CUDA."""
        return self.attention == "flash" and self.device == "cuda"


# Reading ------------------------------------------------------------------------------------------------------------


def read_model(source: str) -> ModelShape:
    """Shapes and exact parameter count of a model folder or hub id: its config, instantiated without memory.

    Raises:
        UserError: no such folder, no or a broken config, an architecture whose blocks are not known here.
    """
    folder = Path(source)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"the folder {source} has no config.json; give a model's folder or a hub id.")
    elif not _HUB_ID.fullmatch(source):
        raise UserError(f"there is no model folder {source}; give one with a config.json, or a hub id.")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"the config of {source!r} cannot be read ({type(error).__name__}: {reason}); give a folder with a "
            "config.json, or a hub id."
        ) from error
    kind = str(config.model_type)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{source} is an encoder-decoder ({kind}); the trainer needs a decoder-only language model.")
    if kind not in BLOCKS:
        raise UserError(f"{source} is a {kind} model, whose blocks are not known here; known: {', '.join(BLOCKS)}.")
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(f"{source} is quantized, which is not planned here; give the model it was made from.")
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config)
        block = model.base_model.layers[0]
    except Exception as error:
        reason = " ".join(str(error).split())[:200].rstrip(".")
        raise UserError(
            f"no model can be made from the config of {source!r} ({type(error).__name__}: {reason}); mend it."
        ) from error
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


def _attends_to_all(config: Any) -> bool:
    types = getattr(config, "layer_types", None)
    if types is not None:
        return all(kind == "full_attention" for kind in types)
    return getattr(config, "sliding_window", None) is None


def check(model: ModelShape, setting: Setting) -> None:
    """Raise UserError for a setting that is wrong, or that the trainer refuses."""
    s = setting
    for name in (
        "gpus",
        "max_completion_length",
        "max_prompt_length",
        "teacher_prompt_length",
        "prompts_per_step",
        "num_generations",
    ):
        if getattr(s, name) < 1:
            raise UserError(f"{name} is {getattr(s, name)}; it must be at least 1.")
    if s.lora is not None and s.lora < 1:
        raise UserError(f"the LoRA rank is {s.lora}; it must be at least 1.")
    if unknown := [name for name in s.lora_targets if name not in MATRICES]:
        raise UserError(f"{unknown[0]!r} is no matrix of these models; choose among {', '.join(MATRICES)}.")
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


def fitted(model: ModelShape, setting: Setting) -> Setting:
    """The setting with teacher prompts as long as the trainer lets them be: the model's positions less a completion."""
    if not setting.distills or model.positions is None:
        return setting
    room = model.positions - setting.max_completion_length
    return replace(setting, teacher_prompt_length=min(setting.teacher_prompt_length, room))


# What does not depend on the micro-batch ----------------------------------------------------------------------------


def adapter_parameters(model: ModelShape, setting: Setting) -> int:
    """r (in + out) for every adapted matrix (LoRA, arXiv 2106.09685, section 4.1); 0 without LoRA."""
    if setting.lora is None:
        return 0
    return model.layers * sum(setting.lora * sum(model.matrices[name]) for name in set(setting.lora_targets))


def trained_parameters(model: ModelShape, setting: Setting) -> int:
    return model.parameters if setting.full else adapter_parameters(model, setting)


def static(model: ModelShape, setting: Setting) -> dict[str, float]:
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


def _stored_bytes(setting: Setting) -> int:
    """Per element of what trains, where it meets activations under ZeRO."""
    return setting.stream if setting.full else setting.adapter_bytes


def gradients(model: ModelShape, setting: Setting) -> float:
    """Bytes of all gradients of one GPU, in the dtype of what the optimizer steps."""
    return trained_parameters(model, setting) * setting.trained_bytes / setting.shards


# What autograd saves ------------------------------------------------------------------------------------------------


def layer_activations(model: ModelShape, setting: Setting, width: int, masked: bool) -> float:
    """Bytes per position that one block's forward leaves for its backward (transformers' Llama and Qwen3 blocks).

    A norm over D keeps its input and 1/rms in fp32, and what it multiplies by its weight:  4 D + 4 + w D.
        Two norms over H; Qwen3 also over Q and K, of the matmuls' dtype.
    A matrix keeps its input, c D. Autocast casts an fp32 input once per matrix: three times before q, k, v and twice
        before gate, up. A frozen matrix keeps nothing but itself; its adapter keeps its input and its r values.
    sdpa and flash (arXiv 2205.14135): query, key, value, output, and 4 per head for the log-normaliser. A mask, needed
        as soon as rows differ in length, costs c times the width, and keys and values repeated for every query head.
    eager: the softmax in fp32, and a bf16 copy: (4 + c) heads * width.
    SwiGLU: gate, silu(gate), up and their product, c I each. Residual sums keep nothing.

    Args:
        width: tokens of the longest row, for what grows with its square.
        masked: whether the micro-batch has a mask.
    """
    s, m = setting, model
    h, q, k, c = m.hidden, m.queries, m.keys, s.matmul
    eager = s.attention == "eager"

    def norm(size: int, heads: int, precision: int) -> int:
        return FP32 * size + FP32 * heads + (precision * size if s.full else 0)

    total: float = 2 * norm(h, 1, s.stream)
    total += _inputs(s, h, s.stream, ("q_proj", "k_proj", "v_proj"))
    if m.head_norms:
        total += norm(q, m.heads, c) + norm(k, m.kv_heads, c)
    repeated = m.heads > m.kv_heads and (eager or (masked and s.attention == "sdpa"))
    total += c * q + 2 * c * (q if repeated else k)
    after = _inputs(s, q, c, ("o_proj",))
    if eager:
        total += m.heads * width * (FP32 + (c if c < FP32 else 0)) + after
    else:
        total += c * q + FP32 * m.heads + (c * width if masked and s.attention == "sdpa" else 0)
        # what the attention keeps as its output is what o_proj keeps as its input
        shared = s.full or ("o_proj" in s.lora_targets and _shares_input(s, c))
        total += after - (c * q if shared else 0)
    total += _inputs(s, h, s.stream, ("gate_proj", "up_proj"))
    total += 3 * c * m.intermediate + _inputs(s, m.intermediate, c, ("down_proj",))
    return total


def _inputs(setting: Setting, size: int, precision: int, names: tuple[str, ...]) -> int:
    """Bytes per position that matrices keep of a common input of `size` elements of `precision` bytes."""
    s = setting
    if s.full:
        return s.matmul * size * (1 if precision == s.matmul else len(names))
    adapted = [name for name in names if name in s.lora_targets]
    copies = min(1, len(adapted)) if _shares_input(s, precision) else len(adapted)
    noise = (1 if s.device == "cuda" else FP32) if s.lora_dropout else 0  # CUDA keeps a mask, a CPU the factors
    return _adapter_precision(s) * size * copies + noise * size * len(adapted) + _adapter_values(s, names)


def _adapter_values(setting: Setting, names: tuple[str, ...]) -> int:
    rank = setting.lora or 0
    return sum(_adapter_precision(setting) * rank for name in names if name in setting.lora_targets)


def _adapter_precision(setting: Setting) -> int:
    """PEFT runs adapters in their own dtype, fp32, unless autocast makes it bf16."""
    return 2 if setting.autocast else FP32


def _shares_input(setting: Setting, precision: int) -> bool:
    """Whether an adapter keeps its input as it is: no dropout, no cast."""
    return not setting.lora_dropout and not setting.autocast and precision == FP32


def last_activations(model: ModelShape, setting: Setting) -> float:
    """Bytes per position outside the blocks: last norm, cosines and sines, token ids; and the last hidden state."""
    s = setting
    norm = FP32 * model.hidden + FP32 + (s.stream * model.hidden if s.full else 0)
    return norm + s.stream * model.hidden + 2 * s.stream * model.head_dim + 8


# One step -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """Memory of one GPU over a training step with a token budget. Items are in bytes."""

    model: ModelShape
    setting: Setting
    budget: int  # max_tokens_per_microbatch

    @property
    def rows(self) -> int:
        """Completions of one GPU."""
        return self.setting.prompts_per_step * self.setting.num_generations // self.setting.gpus

    @property
    def row(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.setting.max_prompt_length + self.setting.max_completion_length

    @property
    def teacher_row(self) -> int:
        return self.setting.teacher_prompt_length + self.setting.max_completion_length

    @property
    def shares(self) -> bool:
        """Teacher prompts are run once (trainer._shares_prompts; passes._whole_cache)."""
        return not self.setting.gathers_layers and self.model.expandable

    @property
    def fitting(self) -> int:
        """Rows of full length in a micro-batch; one row may exceed the budget (batching.split)."""
        slot = self.row
        if self.setting.distills and (self.setting.fsdp or not self.shares):
            slot = max(slot, self.teacher_row)
        return max(1, min(self.rows, self.budget // slot))

    @property
    def positions(self) -> int:
        """N: a full micro-batch."""
        return min(max(self.budget, self.row), self.rows * self.row)

    @property
    def completions(self) -> int:
        """Completion tokens among them."""
        return math.ceil(self.positions * self.setting.max_completion_length / self.row)

    @property
    def several(self) -> bool:
        """More than one micro-batch, so that gradients lie in memory during the later ones."""
        return self.rows > self.fitting

    @property
    def masked(self) -> bool:
        """Only TRL pads prompts on their left; rows padded behind need no mask (passes.padded)."""
        return self.fitting > 1 and not self.setting.distills

    @property
    def held(self) -> int:
        """Completion tokens whose teacher states are held: _HELD budgets, but whole groups (trainer._schedule)."""
        everything = self.rows * self.setting.max_completion_length
        if not self.shares:
            return min(self.completions, everything)
        group = self.setting.num_generations * self.setting.max_completion_length
        return min(everything, max(HELD * self.budget, group))

    @property
    def blocks(self) -> int:
        return math.ceil(self.rows * self.setting.max_completion_length / self.held)

    # Moments --------------------------------------------------------------------------------------------------------

    def moments(self, memory: float = 0.0) -> dict[str, dict[str, float]]:
        """{moment: {item: bytes}}; `memory` is what vLLM's share is a part of."""
        s = self.setting
        always = static(self.model, s)
        if s.vllm_share is not None:
            always["vLLM"] = s.vllm_share * memory
        found: dict[str, dict[str, float]] = {"rollout": self.rollout()}
        if s.distills:
            found["teacher"] = self.teacher()
        found |= {"loss": self.loss(), "backward": self.backward(), "step": self.step()}
        for name, own in found.items():
            if s.zero:
                self._zero(name, own)
            items = always | {item: size + always.get(item, 0) for item, size in own.items()}
            if s.device == "cuda":
                items["reserve"] = RESERVE + RESERVE_SHARE * sum(v for k, v in items.items() if k != "vLLM")
            found[name] = items
        return found

    def rollout(self) -> dict[str, float]:
        """transformers' generate on all rows at once (DynamicCache, sampling without top-k or top-p).

        Keys and values, 2 w K per layer and token, one layer twice while it grows; or the prompts' forward. Logits of
        one token per row: as computed, in fp32, copied, as probabilities, and multinomial's noise.
        With vLLM, TRL's log-probabilities of what it sampled, a micro-batch at a time.
        """
        s, m = self.setting, self.model
        if s.vllm_share is None:
            per_token = m.layers * self._cache()
            prompts = self.rows * s.max_prompt_length
            first = per_token * prompts + self._forward(prompts, prompts, s.max_prompt_length, self.rows > 1)
            last = (per_token + self._cache()) * self.rows * self.row
            last += self.rows * m.vocabulary * (s.matmul + 4 * FP32)
            items = {"generation": max(first, last)}
        else:
            n = self.positions
            items = {"log-probabilities": max(self._forward(n, n, self.row, self.fitting > 1), self._tile(12))}
        return items | self._cast_weights(every=s.full) | self._gathered(reduced=False)

    def teacher(self) -> dict[str, float]:
        """A teacher pass in the last block: gradients and the block before are still there (trainer._with_teacher).

        States: w H per completion token held, twice while they are put together.
        Shared prompts: keys and values of the prompts, each with its longest completion, of the copies (twice while
            they are handed over, beside those of the run before), and of the completions behind them.
        Other prompts: a plain forward of prompts and completions within the budget.
        """
        s, m = self.setting, self.model
        states = float(self.held * m.hidden * s.stream)
        tokens = min(max(self.budget, self.teacher_row), self.rows * self.teacher_row)
        passes = [states, self._forward(tokens, tokens, self.teacher_row, masked=False)]
        if self.shares:
            prompt, completion = s.teacher_prompt_length, s.max_completion_length
            groups = math.ceil(self.held / (s.num_generations * completion))
            first = min(max(self.budget, self.teacher_row), 2 * groups * self.teacher_row)
            rows = self.budget // (math.ceil(prompt / CACHED) + completion)
            # The longest row of a prompt carries it, and a demonstration's own row reads another prompt.
            sharing = max(1, math.ceil(self.held / completion) - 2 * groups)
            rows = max(1, min(rows, sharing))
            cache = m.layers * self._cache()
            passes.append(cache * first + self._forward(first, first, self.teacher_row, masked=False))
            kept = cache * first
            keys, more = rows * self.teacher_row, min(rows, sharing - rows)
            passes += [kept + 2 * cache * rows * prompt, kept + cache * (keys + 2 * more * prompt)]
            passes.append(kept + cache * keys + self._forward(rows * completion, keys, self.teacher_row, masked=True))
        items = {"teacher states": states * (2 if self.blocks > 1 else 1), "teacher pass": max(passes)}
        if self.blocks > 1:
            items["gradients"] = gradients(m, s)
        # autocast keeps what it casts of parameters that train only
        return items | self._cast_weights(every=s.full and s.teacher == "live") | self._gathered(reduced=False)

    def loss(self) -> dict[str, float]:
        """The end of the student's forward, where the heads run."""
        items = self._saved() | self._states() | self._head()
        if self.several:
            items["gradients"] = gradients(self.model, self.setting)
        every = self.setting.full or not self.setting.gradient_checkpointing
        # kept by autocast until the forward ends, and of frozen weights by autograd
        return items | self._cast_weights(every) | self._gathered()

    def backward(self) -> dict[str, float]:
        """The largest of three times in the backward pass.

        Heads: all logits only (log-probabilities, their gradient and the logits', 3 [N, V] in fp32), and TRL's kernel,
            which adds up the gradients of head and states in fp32.
        First block: its saved tensors (made anew with checkpointing), the gradient of the stream w H, and in the MLP
            the gradients of silu(gate), up and their product, c I each, less the product itself; with eager attention
            the gradients of two matrices of scores, after the MLP's are gone. A tied head's gradient waits for the end.
        End: all gradients, and V H for the embedding beside the waiting one.
        """
        s, m, n = self.setting, self.model, self.positions
        c, w = s.matmul, s.stream
        total = gradients(m, s)
        head = float(w * m.head) if s.full else 0.0
        during = self._states() | ({"gradients": total} if self.several else {})
        casts = self._cast_weights(not s.gradient_checkpointing)
        heads: dict[str, float] = {}
        if not s.distills:
            sums = FP32 * (m.head * s.full + m.hidden * self.completions)
            rounded = head if w < FP32 and s.device == "cuda" else 0.0
            heads = self._saved() | during | casts | {"head gradient": sums + rounded, "logits": self._tile(29)}
        elif not s.fused_head:
            heads = self._saved() | during | casts | {"logits": 3.0 * FP32 * m.vocabulary * self.completions}

        mlp = (2 if s.full or "down_proj" in s.lora_targets else 3) * c * m.intermediate
        if s.attention == "eager":
            mlp = max(mlp, 2 * FP32 * m.heads * (self.row - 1) - 4 * c * m.intermediate)
        again = layer_activations(m, s, self.row - 1, self.masked) if s.gradient_checkpointing else 0.0
        block = {
            "block in backward": n * (w * m.hidden + mlp + again) + c * m.largest * s.full,
            "head gradient": head if m.tied or not self.several else 0.0,
        }
        end = {
            "gradients": total,
            "block in backward": float(n * w * m.hidden),
            "head gradient": head * (m.tied + 1 if self.several else m.tied),
        }
        times = (heads, self._saved() | during | casts | block, self._states() | end)
        return max(times, key=lambda items: sum(items.values())) | self._gathered()

    def step(self) -> dict[str, float]:
        """Fused AdamW works in place. SGD adds the weight decay in a copy of the gradients: of all on CUDA, where torch
        steps them together, else of the largest. The teacher's average takes an fp32 copy of a bf16 student in buckets.
        """
        s, m = self.setting, self.model
        items = {"gradients": gradients(m, s)}
        if s.optimizer == "sgd":
            together = s.device == "cuda" or not s.full or s.zero is not None  # one flat tensor under ZeRO
            items["optimizer"] = items["gradients"] if together else float(s.parameter_bytes * max(m.head, m.largest))
        if "teacher average" in static(m, s):
            items["teacher average"] = float(min(trained_parameters(m, s), max(BUCKET, m.head)) * FP32)
        return items

    # Parts ----------------------------------------------------------------------------------------------------------

    def _cache(self) -> float:
        """Bytes of keys and values per token and layer; DynamicCache raises values to the keys' dtype, w."""
        return 2.0 * self.model.keys * self.setting.stream

    def _forward(self, queries: int, keys: int, width: int, masked: bool) -> float:
        """Bytes alive in a block's forward without gradient: stream and norm w H each, and the larger of

        MLP         silu(gate), up and their product, c I each
        attention   query and output; keys and values repeated for masked rows, and cast; mask; eager: two fp32
                    matrices of scores
        """
        s, m = self.setting, self.model
        c, w = s.matmul, s.stream
        cast = c if w != c else 0
        mlp = queries * (3 * c * m.intermediate + cast * m.hidden)
        grows = m.heads > m.kv_heads and (s.attention == "eager" or (masked and s.attention == "sdpa"))
        per_key = 2 * (m.queries * w if grows else 0) + 2 * cast * (m.queries if grows else m.keys)
        attention = float(queries * m.queries * (w + cast + c) + keys * per_key)
        if s.attention == "eager":
            attention += queries * width * m.heads * 2 * FP32
        elif masked and s.attention == "sdpa":
            attention += queries * width * (1 + c)
        return queries * 2 * w * m.hidden + max(mlp, attention)

    def _saved(self) -> dict[str, float]:
        """What autograd holds of the student's forward; with checkpointing the blocks' inputs and masks."""
        s, m, n = self.setting, self.model, self.positions
        width = self.row - 1
        if s.gradient_checkpointing:
            mask = (s.stream if s.attention == "eager" else 1) * width if self.masked and s.attention != "flash" else 0
            blocks = float(n * (m.layers * s.stream * m.hidden + mask))
        else:
            blocks = float(n * m.layers * layer_activations(m, s, width, self.masked))
        return {"activations": blocks + n * last_activations(m, s)}

    def _states(self) -> dict[str, float]:
        """Teacher states: of the block, and the micro-batch's copy."""
        s, m = self.setting, self.model
        if not s.distills:
            return {}
        held = self.held + (self.completions if self.shares else 0)
        return {"teacher states": float(held * m.hidden * s.stream)}

    def _head(self) -> dict[str, float]:
        """Heads of student and teacher.

        Fused (core/fused_head.py): two buffers of a chunk's logits, on CUDA in fp32 and a third in the matmul's dtype
        (of a lone chunk the teacher's is gone when the weight's gradient comes: the larger of the two counts);
        the student's kept states and their gradient, w H each; the weight's gradient, in fp32 where it is added up in
        fp32, and rounded; under autocast bf16 copies of both heads and both states.
        All logits: both sides in fp32, and in the entropy log-probabilities, probabilities, the two masked and
        multiplied: 6 [N, V] in fp32.
        GRPO: one tile of TRL's kernel.
        """
        s, m = self.setting, self.model
        tokens, c, w = self.completions, s.matmul, s.stream
        kept = float(w * m.hidden * tokens)
        if not s.distills:
            return {"logits": self._tile(12), "head states": kept}
        casts = 0.0 if w == c else 2.0 * c * (tokens * m.hidden + m.head)
        if not s.fused_head:
            return {"logits": 6.0 * FP32 * m.vocabulary * tokens, "head states": kept, "head in bf16": casts}
        wide = s.device == "cuda" and c == 2
        chunk = max(1, CHUNK_LOGITS[s.device] // m.vocabulary)
        if s.full and tokens <= min(2 * chunk, m.hidden):
            chunk *= 2  # core.fused_head._default_chunk_size
        chunks = math.ceil(tokens / chunk)
        step = math.ceil(tokens / chunks)
        gradient = 0
        if s.full:
            gradient = (FP32 if wide or c != w else w) * m.head + (w * m.head if wide and w < FP32 else 0)
        temporary = 0
        if s.device == "cpu":  # torch's scatter_ into bf16 works in an fp32 copy; without a compiler, six of a few rows
            eager = 6 * FP32 * min(EAGER_LOGITS, step * m.vocabulary) if m.vocabulary < COMPILE_FROM else 0
            temporary = max(eager, FP32 * step * m.vocabulary if c == 2 else 0)
        student, teacher = (step * m.vocabulary * width for width in ((FP32 + 2, FP32) if wide else (c, c)))
        while_both = teacher + temporary
        if chunks == 1:  # they are gone when the weight's gradient is made
            while_both = max(0, while_both - gradient)
        return {
            "logits": float(student + while_both),
            "head states": 2 * kept,
            "head gradient": float(gradient),
            "head in bf16": casts,
        }

    def _cast_weights(self, every: bool) -> dict[str, float]:
        """Autocast's bf16 copies of fp32 matrices: of all blocks, or of one."""
        if not (self.setting.autocast and self.setting.stream == FP32):
            return {}
        return {"weights in bf16 (autocast)": 2.0 * self.model.block * (self.model.layers if every else 1)}

    def _tile(self, temporaries: int) -> float:
        """TRL's tile of logits; on a CPU its positions are not compacted and fp32 temporaries go with it."""
        s, m = self.setting, self.model
        n, more = (self.completions, 0) if s.device == "cuda" else (self.positions, temporaries)
        return float(min(n, TRL_TILE[0]) * min(m.vocabulary, TRL_TILE[1]) * (s.matmul + more))

    def _gathered(self, reduced: bool = True) -> dict[str, float]:
        """FSDP2, not measured: embedding and head whole from forward to backward, and the teacher's; three blocks (the
        one that runs and two ahead); `reduced`: gradients of a block and of the head, whole, and in fp32 to be summed.
        """
        s, m = self.setting, self.model
        if not s.fsdp:
            return {}
        heads = m.head * (1 if m.tied else 2) * (2 if "teacher" in static(m, s) and s.full else 1)
        whole = s.stream * (heads + 3 * m.block)
        if reduced and s.full:
            whole += (m.block + m.head) * (s.stream + FP32)
        return {"gathered (FSDP)": float(whole)}

    def _zero(self, moment: str, items: dict[str, float]) -> None:
        """Add what DeepSpeed holds for a moment, from runtime/zero/ of its source.

        Gradients   this GPU's part of the fp32 sum: stage 2 makes it in the first backward
                    (_build_compact_grad_partition_buffer), stage 3 at the start (grad_partitions_flat_buffer). Stage 2
                    without bf16 holds the part of one micro-batch beside the sum, and copies it flat for the step.
        Reducing    stage 2: a bucket in the parameters' dtype (setup_buckets), in the backward alone, its slices put
                    together and in fp32 (allreduce_bucket). Stage 3: the bucket's slices put together
                    (reduce_scatter_coalesced). A tensor larger than the bucket goes by itself.
        Step        the norm takes an fp64 copy of one tensor's part (get_grad_norm_direct); stage 3 then copies the
                    gradients, a sub-group at a time (_prepare_fp32_grad_for_sub_group). Or what the teacher's average
                    takes, if that is more: when it follows, stage 2 holds gradients no more.
        Gathered    stage 3: at most stage3_max_live_parameters, or a larger head; everything for transformers'
                    generation (TRL: ds3_gather_for_generation), for TRL's merge of adapters for vLLM, and for the
                    teacher's average, whose tensors are gathered one by one but held until all are there
                    (teacher/weights.py, `update`). Norms, which stay whole, are not counted.
        """
        s, m = self.setting, self.model
        trained, part, stored = trained_parameters(m, s), gradients(m, s), _stored_bytes(s)
        largest = min(trained, max(m.head, m.largest))
        if s.zero == 3 or moment == "backward":
            items.setdefault("gradients", part)
        if moment in ("backward", "step") and s.zero == 2 and stored == FP32:
            items["gradients"] += part
        if moment == "backward":
            reduced = max(min(REDUCE_BUCKET, trained), largest)
            together = stored + (FP32 if stored < FP32 else 0) if s.zero == 2 else FP32
            items["reduce bucket (ZeRO)"] = float(reduced * together + (REDUCE_BUCKET * stored if s.zero == 2 else 0))
        everything = float(s.stream * m.parameters)
        live = min(everything, float(s.stream * max(MAX_LIVE, m.head)))
        if moment == "step":
            norm = FP64 * (largest / s.gpus if s.zero == 3 else min(largest, trained / s.gpus))
            copy = FP32 * min(SUB_GROUP, trained / s.gpus) if s.zero == 3 else 0.0
            update: dict[str, float] = {"norm, flat gradients (ZeRO)": max(norm, copy)}
            average: dict[str, float] = {"teacher average": items.pop("teacher average", 0.0)}
            if s.zero == 2:
                update["gradients"] = items.pop("gradients")
            elif s.distills and s.teacher == "ema":
                average["gathered (ZeRO)"] = float(s.stream * max(m.head, m.largest))  # one parameter at a time
            items.update(update if sum(update.values()) > sum(average.values()) else average)
        elif s.zero == 3:
            whole = moment == "rollout" and (s.vllm_share is None or not s.full)
            unused = moment == "teacher" and s.teacher != "live"
            items["gathered (ZeRO)"] = 0.0 if unused else everything if whole else live


# Answers ------------------------------------------------------------------------------------------------------------


def peak(step: Step, memory: float = 0.0) -> tuple[str, float]:
    """The moment with the largest sum, and that sum in bytes."""
    sums = {name: sum(items.values()) for name, items in step.moments(memory).items()}
    moment = max(sums, key=lambda name: sums[name])
    return moment, sums[moment]


def largest_budget(model: ModelShape, setting: Setting, memory: float) -> int | None:
    """Largest max_tokens_per_microbatch whose peak fits `memory` bytes, at most all rows; None if not even one row."""

    def fits(budget: int) -> bool:
        return peak(Step(model, setting, budget), memory)[1] <= memory

    one = Step(model, setting, 1)  # every row alone
    low, high = 1, one.rows * one.row
    if not fits(low):
        return None
    if fits(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def advice(model: ModelShape, setting: Setting, memory: float) -> str:
    """One sentence: changes with which one completion of full length fits, or that none was found.

    First those that leave the method as it is, on these GPUs, then on more of them; where there are none on these, also
    departures: adapters, the student as its own teacher, shorter completions.
    """

    def fits(changed: Setting) -> bool:
        try:
            check(model, changed)
        except UserError:
            return False
        return peak(Step(model, fitted(model, changed), 1), memory)[1] <= memory

    def search(start: Setting, options: dict[str, dict[str, Any]], wanted: frozenset[str] = frozenset()) -> list[str]:
        """Up to three of the smallest sets of changes that fit, each with one of `wanted` if there are any; "" where
        none is needed."""
        useful = [words for words, values in options.items() if replace(start, **values) != start]
        for size in range(MOST_CHANGES + 1):
            found = []
            for chosen in combinations(useful, size):
                if wanted and not wanted & set(chosen):
                    continue
                changed = replace(start, **{k: v for words in chosen for k, v in options[words].items()})
                if fits(changed):
                    found.append(" ".join(chosen))
            if found:
                return found[:3]
        return []

    same: dict[str, dict[str, Any]] = {
        "--gradient-checkpointing": {"gradient_checkpointing": True},
        "--fused-head": {"fused_head": True},
        "--vllm-share 0.3": {"vllm_share": 0.3},
        "--attention flash": {"attention": "flash"},
        "--fsdp" + (f" instead of --zero {setting.zero}" if setting.zero else ""): {"fsdp": True, "zero": None},
        "--zero 3": {"zero": 3},
        "--zero 2": {"zero": 2},
        "--dtype bfloat16": {"parameter_bytes": 2},
    }
    if found := search(setting, same):
        return f"it fits with {', or with '.join(found)}."
    more = (n for n in (2, 4, 8, 16, 32) if n > setting.gpus)
    found = next(([f"--gpus {n} {f[0]}".rstrip()] for n in more if (f := search(replace(setting, gpus=n), same))), [])
    others: dict[str, dict[str, Any]] = {"--lora 16": {"lora": 16}, "--teacher live": {"teacher": "live"}}
    departures = search(setting, same | others, frozenset(others))
    lengths = (setting.max_completion_length // 2**i for i in range(1, setting.max_completion_length.bit_length()))
    shorter = next((n for n in lengths if fits(replace(setting, max_completion_length=n))), None)
    if shorter is not None:
        departures.append(f"--max-completion-length {shorter}")
    ways = [", or with ".join(found)] if found else []
    if departures:
        ways.append("another setting than the paper's: " + ", or with ".join(departures))
    if not ways:
        return "none of the changes tried is enough: take a smaller model, or GPUs with more memory."
    return f"it fits with {', or with '.join(ways)}."


@dataclass(frozen=True)
class Plan:
    """The answers of `pgpo plan`, in bytes and tokens.

    Attributes:
        setting: with teacher prompts as `fitted` has them.
        moments: {moment: {item: bytes}} at `budget`.
        largest_budget: largest max_tokens_per_microbatch that fits; None: one completion of full length does not.
        advice: what to change, where it does not.
    """

    model: ModelShape
    setting: Setting
    memory: float
    budget: int
    moments: dict[str, dict[str, float]]
    peak_moment: str
    peak: float
    largest_budget: int | None
    advice: str | None


def plan(model: ModelShape, setting: Setting, memory: float, budget: int = 16384) -> Plan:
    """Peak at a token budget (by default PGPOConfig's), the largest budget, and what to change if nothing fits.

    Args:
        memory: bytes per GPU.

    Raises:
        UserError: a value outside its range, or a setting that the trainer refuses.
    """
    if not (math.isfinite(memory) and memory > 0):
        raise UserError(f"memory is {memory / GIB:g} GiB per GPU; it must be a positive number.")
    if budget < 1:
        raise UserError(f"max_tokens_per_microbatch is {budget}; it must be at least 1.")
    check(model, setting)
    step = Step(model, fitted(model, setting), budget)
    moment, size = peak(step, memory)
    largest = largest_budget(model, step.setting, memory)
    hint = advice(model, setting, memory) if largest is None else None
    return Plan(model, step.setting, memory, budget, step.moments(memory), moment, size, largest, hint)


def main(source: str, setting: Setting, memory: float, budget: int, json_out: Path | None) -> int:
    """`pgpo plan`: the table, the answers, and the JSON file. Exit status 0 whether it fits or not.

    Args:
        memory: GiB per GPU.
    """
    if json_out is not None and not json_out.parent.is_dir():
        raise UserError(f"there is no folder {json_out.parent} for {json_out.name}; make it first.")
    result = plan(read_model(source), setting, memory * GIB, budget)
    if json_out is not None:
        write_atomically(json_out, json.dumps(asdict(result), indent=2) + "\n")
    _print(result)
    shortened = result.setting.teacher_prompt_length
    if shortened < setting.teacher_prompt_length:
        print(
            f"teacher prompts are shortened to {shortened} tokens: the model has {result.model.positions} positions, "
            f"of which a completion may take {setting.max_completion_length}"
        )
    return 0


def _print(result: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    m, s = result.model, result.setting
    unit, name = (GIB, "GiB") if result.peak >= GIB else (2**20, "MiB")
    table = Table(
        box=box.SIMPLE_HEAD, title=f"{m.name}: {m.parameters:,} parameters; {name} per GPU", title_justify="left"
    )
    table.add_column("")
    for moment in result.moments:
        table.add_column(moment, justify="right")
    columns = list(result.moments.values())
    for item in dict.fromkeys(name for items in columns for name, size in items.items() if size):
        table.add_row(item, *(f"{items[item] / unit:.2f}" if items.get(item) else "" for items in columns))
    table.add_section()
    table.add_row("sum", *(f"{sum(items.values()) / unit:.2f}" for items in columns))
    console = Console()
    console.print(table)
    verdict = "fits" if result.peak <= result.memory else "does not fit"
    lines = [
        f"peak {result.peak / unit:.2f} {name} ({result.peak_moment}) at max_tokens_per_microbatch = {result.budget}: "
        f"{verdict} in {result.memory / unit:g} {name}",
    ]
    row = f"a prompt of {s.max_prompt_length} and a completion of {s.max_completion_length} tokens"
    if result.largest_budget is None:
        lines.append(f"{row} do not fit: {result.advice}")
    else:
        lines.append(f"{row} fit; largest max_tokens_per_microbatch: {result.largest_budget}")
    console.print("\n".join(lines), highlight=False, soft_wrap=True)
