"""Weights and adapters that a run refuses, because training or its checkpoint would be wrong.

Beyond these, `teacher/weights.py` refuses what a second adapter cannot mirror, unless the teacher is the student.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

# LoRA initializations that change the base model by random numbers, or by what it was prepared with. No checkpoint
# holds either, so the adapter would be put on another base.
_UNREPEATABLE = ("pissa_niter", "corda", "lora_ga", "loftq")
# LoRA options that need a term in the loss, or the prompt and its completion in one piece.
_NOT_DISTILLED = ("alora_invocation_tokens", "monteclora_config", "kasa_config")


def adapter_problem(model: Any, distills: bool) -> str | None:
    """Why this model's adapter cannot be trained or saved, as a sentence; None if it can, or if it has none.

    distills: forwards of student and teacher end in hidden states, prompt and completions apart (forward/passes.py).
    """
    for config in getattr(model, "peft_config", {}).values():
        if problem := _problem(model, config, distills):
            return problem
    return None


def precision_problem(model: nn.Module) -> str | None:
    """Why this model's weights cannot be trained in their precision, as a sentence.

    The smallest number of fp16 is 6e-8: AdamW's epsilon of 1e-8 is 0 in it, and so is the square of a gradient below
    2e-4, which then moves its weight without bound. (bf16 has the exponents of fp32.)
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype == torch.float16:
            return (
                f"the weight {name} is fp16, in which squares of gradients and AdamW's epsilon are 0, so that steps "
                "have no bound; load the model with dtype='float32' (fp16=True or bf16=True then halves the matmuls) "
                "or dtype='bfloat16'."
            )
    return None


def _problem(model: Any, config: Any, distills: bool) -> str | None:
    start = str(getattr(config, "init_lora_weights", ""))
    if start.startswith(_UNREPEATABLE):
        return (
            f"init_lora_weights={start!r} changes the base model in a way that no checkpoint holds, so the saved "
            "adapter would fit no base; use 'pissa', 'olora', 'gaussian' or True."
        )
    if _adapts_tied_embedding(model):
        return (
            "LoRA on the embedding, whose weight is also the head's, cannot be merged into one model; list the "
            "embedding in modules_to_save, or some of its tokens in trainable_token_indices, instead of target_modules."
        )
    if getattr(config, "use_dora", False) and _on_cpu_in_4_bits(model):
        return "use_dora on a 4-bit model needs a GPU (bitsandbytes repacks the weights on a CPU); leave it off."
    if not distills:
        return None
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind == "ADALORA":
        return f"the adapter type {kind} is not supported with self-distillation; use LoRA, or objective='grpo'."
    for name in _NOT_DISTILLED:
        if getattr(config, name, None):
            return f"the LoRA option {name} is not supported with self-distillation; leave it at None."
    return None


def _adapts_tied_embedding(model: Any) -> bool:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or not len(getattr(embedding, "lora_embedding_A", ())):
        return False
    return getattr(embedding.base_layer, "weight", None) is getattr(head, "weight", embedding)


def _on_cpu_in_4_bits(model: nn.Module) -> bool:
    return bool(getattr(model, "is_loaded_in_4bit", False)) and next(model.parameters()).device.type == "cpu"
