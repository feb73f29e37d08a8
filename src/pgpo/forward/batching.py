"""Which rows share a forward: micro-batches within a token budget, and siblings joined behind one prompt.

The cost model, in token equivalents: a forward of B rows padded to W tokens costs forward_cost + B W (1 + pair_cost W),
a fixed cost, the matrices, and attention. It decides where padding costs more than another forward, and whether
completions of one prompt are cheaper joined in a row (the prompt is computed once and less is padded, but attention
computes the masked pairs too) than each in a row of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Bundle = list[int]  # completions of one prompt that share a row

# Fixed cost of a forward, in token equivalents: 1 / (first + second * parameters per layer). CPU: fitted to 190 for 49
# thousand and 44 for 0.79 million per layer (docs/PERFORMANCE.md). Elsewhere estimated from kernel launches.
_FORWARD_COST = {"cpu": (0.0041, 2.4e-8)}
_FORWARD_COST_ELSEWHERE = (1 / 1024, 0.0)
# Ours: the longest joined row, unless a prompt with one completion is longer; a bound because the mask is [B, W, W].
_WIDEST = 2048
_POSITIONS = ("max_position_embeddings", "n_positions")  # transformers' names of a model's positions


@dataclass(frozen=True)
class Limits:
    """What a forward may hold, and what it costs in token equivalents.

    Attributes:
        budget: tokens per forward, padding included; a single row may exceed it.
        most: completions per forward.
        forward_cost: fixed cost of a forward.
        pair_cost: of a query and a key, masked or not.
        packed: the rows are packed, without padding.
        apart: prompts are padded on the left and completions on the right (TRL's GRPO).
    """

    budget: float = math.inf
    most: float = math.inf
    forward_cost: float = math.inf
    pair_cost: float = 0.0
    packed: bool = False
    apart: bool = False


def costs(model: Any, device: str) -> tuple[float, float]:
    """(forward_cost, pair_cost) of a transformers model on a device of this type.

    A pair takes 4 heads * head_dim operations per layer, a token 2 per parameter.
    """
    config = model.config.get_text_config()
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    count = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if id(p) not in embeddings)
    heads = getattr(config, "num_attention_heads", 0)  # none: a model without attention
    head_dim = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return costs_of(count, getattr(config, "num_hidden_layers", 1), heads * head_dim, device)


def costs_of(parameters: int, layers: int, queries: int, device: str) -> tuple[float, float]:
    """`costs` from sizes alone: parameters without embeddings, and heads * head_dim."""
    per_layer = max(parameters, 1) / layers
    first, second = _FORWARD_COST.get(device, _FORWARD_COST_ELSEWHERE)
    return 1 / (first + second * per_layer), 2 * queries / per_layer


def positions(config: Any) -> int | None:
    """Longest sequence that a transformers model with this config was made for; None where nothing limits it (Mamba,
    ALiBi)."""
    config = config.get_text_config()
    if getattr(config, "alibi", False):
        return None
    found = (getattr(config, name, None) for name in _POSITIONS)
    return next((value for value in found if isinstance(value, int) and value > 0), None)


def split(
    sizes: Sequence[tuple[int, int]], limits: Limits, completions: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of rows that share a forward, longest first.

    A part ends before it exceeds a limit, and before its padding costs more than another forward.

    Args:
        sizes: (prompt, completion) tokens per row.
        completions: how many completions a row has; None = one each.
    """
    parts: list[list[int]] = []
    prompt = completion = width = total = held = 0
    for i in sorted(range(len(sizes)), key=lambda i: -sum(sizes[i])):
        size, count = sum(sizes[i]), 1 if completions is None else completions[i]
        longest = max(width, size)
        if limits.apart:
            longest = max(prompt, sizes[i][0]) + max(completion, sizes[i][1])
        filled = total + size
        needed = filled if limits.packed else (len(parts[-1]) + 1 if parts else 1) * longest
        full = held + count > limits.most or needed > limits.budget
        if not parts or full or needed - filled > limits.forward_cost:
            parts.append([])
            prompt = completion = width = total = held = 0
        parts[-1].append(i)
        prompt, completion = max(prompt, sizes[i][0]), max(completion, sizes[i][1])
        width = max(width, size)
        total += size
        held += count
    return parts


def forward_cost(rows: int, width: int, limits: Limits, seen: float = 0.0, share: float = 1.0) -> float:
    """Cost of a forward of `rows` rows of `width` tokens, in token equivalents; a token attends to `share` of its row,
    and to `seen` tokens more."""
    return limits.forward_cost + rows * width * (1 + limits.pair_cost * (seen + share * width))


def siblings(prompts: Sequence[Sequence[int]], lengths: Sequence[int]) -> list[list[int]]:
    """Rows of each prompt, longest completion first."""
    found: dict[tuple[int, ...], list[int]] = {}
    for i in sorted(range(len(prompts)), key=lambda i: -lengths[i]):
        found.setdefault(tuple(prompts[i]), []).append(i)
    return list(found.values())


def join(prompts: Sequence[Sequence[int]], lengths: Sequence[int], limits: Limits) -> tuple[list[list[Bundle]], float]:
    """Micro-batches of bundles, and their cost in token equivalents; the cheapest of a few widths.

    A width too small for two completions joins none, so that rows stay apart where that is cheaper.

    Args:
        prompts: token ids per completion; equal ones are joined.
        lengths: tokens per completion.
    """
    if not prompts:
        return [], 0.0
    groups = siblings(prompts, lengths)
    longest = max(len(p) + n for p, n in zip(prompts, lengths, strict=True))
    whole = max(len(prompts[g[0]]) + sum(lengths[i] for i in g) for g in groups)
    widest = min(whole, limits.budget, max(longest, _WIDEST))
    widths = [0.0, *(longest * f for f in (1, 1.5, 2, 3) if longest * f < widest), widest]
    return min((_bundled(groups, prompts, lengths, width, limits) for width in widths), key=lambda found: found[1])


def _bundled(
    groups: Sequence[Sequence[int]],
    prompts: Sequence[Sequence[int]],
    lengths: Sequence[int],
    width: float,
    limits: Limits,
) -> tuple[list[list[Bundle]], float]:
    """Bundles of at most `width` tokens (first fit, longest first; one completion may exceed it), and their cost."""
    bundles: list[Bundle] = []
    filled: list[int] = []
    for group in groups:
        first = len(bundles)
        for i in group:
            for k in range(first, len(bundles)):
                if filled[k] + lengths[i] <= width and len(bundles[k]) < limits.most:
                    bundles[k].append(i)
                    filled[k] += lengths[i]
                    break
            else:
                bundles.append([i])
                filled.append(len(prompts[i]) + lengths[i])
    parts = split([(0, n) for n in filled], limits, [len(b) for b in bundles])
    # Without a mask, causal attention skips what is behind a token: half of the row.
    cost = sum(
        forward_cost(len(p), filled[p[0]], limits, share=1.0 if any(len(bundles[k]) > 1 for k in p) else 0.5)
        for p in parts
    )
    return [[bundles[k] for k in part] for part in parts], cost


def shared_cost(
    prompts: Sequence[Sequence[int]], lengths: Sequence[int], limits: Limits, carriers: Mapping[int, Sequence[int]]
) -> float:
    """Cost in token equivalents of prefix sharing: each carrier with its prompt, then its followers by its KV cache."""
    cost = 0.0
    first = list(carriers)
    sizes = [(len(prompts[i]), lengths[i]) for i in first]
    for part in split(sizes, limits):
        cost += forward_cost(len(part), sum(sizes[part[0]]), limits, share=0.5)
    rest = [j for followers in carriers.values() for j in followers if lengths[j] > 1]
    for part in split([(0, lengths[j] - 1) for j in rest], limits):
        mine = [rest[k] for k in part]
        seen = max(len(prompts[j]) for j in mine)
        cost += forward_cost(len(mine), lengths[mine[0]] - 1, limits, seen)
    return cost
