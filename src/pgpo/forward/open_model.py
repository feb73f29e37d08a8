"""A model whose forward ends in hidden states: `model(..., finish=f)` returns f(hidden states, head) instead of logits.

f runs inside the wrapped model's own forward, and there inside the head module's own, because that is where DDP and
FSDP hold whole parameters. Whether the logits of a model are that head on its last hidden state is checked:
`head_problem` by its parts, `head_error` by its values.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "attention_types")

_FIRST_FORWARD = "_pgpo_first_forward"  # attribute of a model: the forward that its instance had, or None

T = TypeVar("T")


@dataclass(frozen=True)
class Head:
    """logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap); without softcap, the argument itself.

    Attributes:
        weight: [V, H].
        bias: [V] or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., V]."""
        logits = self.scale * nn.functional.linear(hidden, self.weight, self.bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def open_forward(model: nn.Module) -> None:
    """Let `model(..., finish=f)` return f(hidden [B, L, H], Head); without `finish` nothing changes. Idempotent.

    Patches the causal language model itself (below PEFT), on the instance, so that every wrapper's hooks still run. The
    mark is on the forward, not on the model, for a copy of the model may have lost its forward.
    """
    inner = causal_lm(model)
    if getattr(inner.forward, "opened", False):
        return
    plain = inner.forward

    @functools.wraps(type(inner).forward)  # generate() checks its arguments against this signature
    def forward(self: Any, *args: Any, finish: Callable[[Tensor, Head], T] | None = None, **kwargs: Any) -> Any:
        if finish is None:
            return plain(*args, **kwargs)
        # Backbone and head are looked up at each call: FSDP and PEFT replace them.
        return _at_head(self, self.base_model(*args, **kwargs).last_hidden_state, finish)

    forward.opened = True  # type: ignore[attr-defined]
    inner.forward = types.MethodType(forward, inner)


def release_forward(model: nn.Module) -> None:
    """Give a model that another trainer had (its own, TRL's and accelerate's forwards on it) the forward that it came
    with. Called before a trainer takes the model; the first call notes what to give back."""
    for module in {id(m): m for m in (model, causal_lm(model))}.values():
        if not hasattr(module, _FIRST_FORWARD):
            setattr(module, _FIRST_FORWARD, (vars(module).get("forward"),))
            continue
        (forward,) = getattr(module, _FIRST_FORWARD)
        vars(module).pop("forward", None)
        vars(module).pop("_original_forward", None)  # accelerate's
        if forward is not None:
            module.forward = forward


def causal_lm(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # PEFT leaves peft_config on the base


def head_problem(model: nn.Module) -> str | None:
    """Why the logits of this model are no plain head on its last hidden state, as far as its parts tell; or None."""
    inner = causal_lm(model)
    if not hasattr(inner, "get_output_embeddings") or not hasattr(inner, "base_model"):
        return f"{type(inner).__name__} is not a transformers model"
    head = inner.get_output_embeddings()
    if head is None:
        return f"{type(inner).__name__} has no output embeddings"
    if hasattr(head, "lora_A"):
        return "LoRA adapts its head"
    weight = getattr(head, "weight", None)
    if weight is None or weight.dim() != 2 or not weight.is_floating_point():
        return f"its head {type(head).__name__} has no plain weight"
    if "position_ids" not in inspect.signature(type(inner).forward).parameters:
        return "its forward takes no position_ids"
    return None


def head_error(model: nn.Module, ids: Tensor) -> float:
    """Largest difference between the model's own logits and the head on its hidden states, over their largest size."""
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits.float()
        ours = model(input_ids=ids, use_cache=False, finish=lambda hidden, head: head.logits(hidden)).float()
    return float((own - ours).abs().max() / own.abs().max().clamp_min(1e-6))


def joins(model: nn.Module) -> bool:
    """Whether a mask [B, 1, L, L] can keep siblings apart: attention to all tokens, by sdpa or eager."""
    config = causal_lm(model).config.get_text_config()
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # a window, by the names that it has in transformers, counts places in the row
        kinds = ["windowed" for name in _WINDOWS if getattr(config, name, None) is not None]
    return config._attn_implementation in ("sdpa", "eager") and all(kind == "full_attention" for kind in kinds)


def _at_head(model: Any, hidden: Tensor, finish: Callable[[Tensor, Head], T]) -> T:
    """finish(hidden, head) in place of the head module's forward: FSDP holds the weight whole there, and reduces its
    gradient, whatever unit the head is in."""
    module, config = model.get_output_embeddings(), model.config.get_text_config()

    def forward(hidden: Tensor) -> T:
        return finish(hidden, Head(module.weight, getattr(module, "bias", None), _scale(config), _softcap(config)))

    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        result: T = module(hidden)
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
    return result


def _scale(config: Any) -> float:
    """Factor on the logits: Cohere multiplies by logit_scale, Falcon-H1 by lm_head_multiplier, Granite divides by
    logits_scaling. A model that does something else fails `head_error`."""
    for name in ("logit_scale", "lm_head_multiplier"):
        if (value := getattr(config, name, None)) is not None:
            return float(value)
    scaling = getattr(config, "logits_scaling", None)
    return 1.0 if scaling is None else 1.0 / float(scaling)


def _softcap(config: Any) -> float | None:
    value = getattr(config, "final_logit_softcapping", None)
    return None if value is None else float(value)
