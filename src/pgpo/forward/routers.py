"""The load-balancing loss of a mixture of experts, over a batch that goes through the model in parts.

Switch Transformer (arXiv 2101.03961), eq. 4 to 6, as transformers and TRL compute it over all layers together:

    loss = E sum_e f_e P_e     f_e: share of the tokens that chose expert e, without gradient
                               P_e: mean probability that the routers give it

A product of two means is not the mean of the parts' products. But f has no gradient, so each part needs, beside its own
probabilities, only the f of the whole batch: `Load.loss`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Load:
    """What the routers of all layers did with some tokens; loads add up.

    Attributes:
        chosen: [E] tokens that chose each expert.
        probability: [E] sum of the probabilities that each expert got; carries the gradient.
        tokens: [] tokens, counted once per layer.
    """

    chosen: Tensor
    probability: Tensor
    tokens: Tensor

    def __add__(self, other: Load) -> Load:
        return Load(self.chosen + other.chosen, self.probability + other.probability, self.tokens + other.tokens)

    def loss(self, whole: Load | None = None) -> Tensor:
        """This part's share of the loss of the `whole` batch (None = itself): over all parts, shares sum to the loss
        and their gradients to its gradient."""
        whole = whole or self
        tokens = whole.tokens.clamp_min(1)
        return len(self.chosen) * (whole.chosen / tokens * (self.probability / tokens)).sum()


def load(router_logits: Sequence[Tensor], top_k: int, weights: Tensor | None = None) -> Load:
    """Load of one forward.

    Args:
        router_logits: per layer [..., E], N tokens each.
        weights: N in any shape: how often a token counts, 0 = padding; None = each once.
    """
    first = router_logits[0]
    experts, device = first.shape[-1], first.device
    flat = torch.ones(first.numel() // experts, device=device) if weights is None else weights.reshape(-1).to(device)
    flat = flat.float()
    chosen, probability = torch.zeros(2, experts, device=device).unbind()
    for logits in router_logits:
        shares = logits.to(device).reshape(-1, experts).softmax(-1)
        picked = shares.topk(top_k, -1).indices.reshape(-1)
        chosen = chosen.scatter_add(0, picked, flat.repeat_interleave(top_k))
        probability = probability + (shares.float() * flat.unsqueeze(-1)).sum(0)
    return Load(chosen, probability, flat.sum() * len(router_logits))


@contextlib.contextmanager
def watched(model: Any, loads: list[Load], weights: Tensor | None = None) -> Iterator[None]:
    """Append the load of every forward of a transformers model to `loads`. Call it with output_router_logits=True.

    weights: as in `load`; None = by the forward's attention_mask.
    """
    top_k = model.config.get_text_config().num_experts_per_tok

    def watch(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        loads.append(load(output.router_logits, top_k, kwargs.get("attention_mask") if weights is None else weights))

    handle = model.base_model.register_forward_hook(watch, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def router_problem(model: Any) -> str | None:
    """Why the router loss of this transformers model cannot be computed, or None."""
    config = model.config.get_text_config()
    for name in ("num_experts", "num_experts_per_tok"):
        if getattr(config, name, None) is None:
            return (
                f"{type(model).__name__} has routers, but its config has no {name}, which their loss needs; set "
                "router_aux_loss_coef=0."
            )
    return None


def of_all_ranks(loads: Sequence[Load], model: Any, reduce: Callable[[Tensor], Tensor]) -> Load:
    """Sum over parts and ranks, without gradient; a rank without any part gives an empty list.

    reduce: sums a tensor over ranks.
    """
    experts, device = model.config.get_text_config().num_experts, next(model.parameters()).device
    flat = torch.zeros(2 * experts + 1, dtype=torch.float64)
    for each in loads:
        flat += torch.cat([each.chosen, each.probability.detach(), each.tokens.reshape(1)]).cpu()
    chosen, probability, tokens = reduce(flat).float().to(device).split([experts, experts, 1])
    return Load(chosen, probability, tokens.squeeze())
