"""Forward passes that end in hidden states: no [tokens, vocabulary], little padding, shared prompts run once.

    open_forward(model)    model(..., finish=f) returns f(hidden states, head) instead of logits
    layout                 rows of unequal length -> one padded batch, one packed row without padding, or rows of joined
                           siblings: a prompt, and behind it completions that do not see one another
    student_pass           hidden states of the completion tokens, with gradient, handed to the loss inside the forward
    teacher_states         the same for the teacher, without gradient; a prompt that several rows share is run once and
                           its keys and values serve all their completions

The head is applied inside the wrapped model's own forward, and there inside the head's own, because that is where DDP
and FSDP hold whole parameters.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from pgpo.core import HeadOutput
from pgpo.teacher import Teacher
from pgpo.train import batching
from pgpo.train.batching import Limits

_JOINED_CHECK = 24  # ours: tokens of the prompt and of each completion
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "attention_chunk_size", "attention_types")
_CACHED = 4  # ours: a cached token takes at most a quarter of the memory of one that goes through the model

_FIRST_FORWARD = "_pgpo_first_forward"  # attribute of a model: the forward that its instance had, or None

T = TypeVar("T")
Tokens = Sequence[int]


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


@dataclass(frozen=True)
class States:
    """Hidden states that predict completion tokens, row after row [N, H], and the head that turns them into logits.

    head None: `hidden` are the logits [N, V] themselves.
    """

    hidden: Tensor
    head: Head | None

    def __getitem__(self, index: Tensor) -> States:
        return States(self.hidden[index], self.head)


# The model's own forward --------------------------------------------------------------------------------------------


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
        return f"{type(inner).__name__} is no transformers model"
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


# Layout -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inputs:
    """A batch for the model, and where in it the completion tokens are predicted.

    Attributes:
        ids, positions: [B, L].
        mask: [B, 1, L, L], True where a token may look; or None where causal attention needs none: padding only
            behind, or a packed row, whose borders are where positions start again.
        keep: [N] places in the flattened [B * L] that predict the completion tokens, row after row.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    keep: Tensor

    def to(self, device: torch.device) -> Inputs:
        moved = [None if t is None else t.to(device) for t in (self.ids, self.positions, self.mask, self.keep)]
        return Inputs(*moved)  # type: ignore[arg-type]


def padded(prompts: Sequence[Tokens], completions: Sequence[Tokens], pad: int) -> Inputs:
    """Every row from its first token on, padded at its end, where causal attention does not look: no mask."""
    rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    keep: list[int] = []
    for i, completion in enumerate(completions):
        end = i * width + len(rows[i])
        keep.extend(range(end - len(completion), end))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    return Inputs(ids, torch.arange(width).expand(len(rows), -1), None, torch.tensor(keep))


def packed(prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Inputs:
    """All rows behind one another in a single row; positions start again at every border."""
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        keep.extend(range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) - 1 + len(completion)))
        ids += [*prompt, *completion[:-1]]
        positions += range(len(prompt) + len(completion) - 1)
    return Inputs(torch.tensor([ids]), torch.tensor([positions]), None, torch.tensor(keep))


def joined(prompts: Sequence[Tokens], completions: Sequence[Tokens], counts: Sequence[int], pad: int) -> Inputs:
    """Rows of siblings: a prompt, then `counts[row]` completions, each of which sees the prompt and itself alone.

    The prompt's last token predicts the first of every completion.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, and whose tokens they are: 0 the prompt
    places: list[list[int]] = []  # of a completion, in its row
    start = 0
    for count in counts:
        prompt = prompts[start]
        ids, positions, owners = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, completion in enumerate(completions[start : start + count], 1):
            places.append([len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)])
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            owners += [k] * (len(completion) - 1)
        rows.append((ids, positions, owners))
        start += count
    width = max(len(ids) for ids, _, _ in rows)

    def filled(part: int, value: int) -> Tensor:
        return torch.tensor([[*row[part], *[value] * (width - len(row[part]))] for row in rows])

    owner = filled(2, -1).unsqueeze(1)  # padding sees the prompt and itself: no row of the mask is empty
    mask = ((owner.transpose(1, 2) == owner) | (owner == 0)).tril_().unsqueeze(1)
    offsets = [i * width for i, count in enumerate(counts) for _ in range(count)]
    keep = [offset + k for offset, mine in zip(offsets, places, strict=True) for k in mine]
    return Inputs(filled(0, pad), filled(1, 0), mask, torch.tensor(keep))


# Passes -------------------------------------------------------------------------------------------------------------


class Passes:
    """Forward passes of one trainer.

    Args:
        model: the student, unwrapped; its `open_forward` is used unless `whole_logits`.
        pad: the tokenizer's pad token.
        device: of the model.
        pack: one packed row instead of a padded batch; needs an attention that keeps packed rows apart.
        whole_logits: hand the model's own logits to `finish`, with None for the head: for models whose logits are no
            plain head on the last hidden state.
    """

    def __init__(
        self, model: nn.Module, pad: int, device: torch.device, pack: bool = False, whole_logits: bool = False
    ) -> None:
        self.pad, self.device, self.pack, self.whole_logits = pad, device, pack, whole_logits
        self._takes_positions = "position_ids" in inspect.signature(type(causal_lm(model)).forward).parameters

    def layout(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], counts: Sequence[int] | None = None
    ) -> Inputs:
        if counts is not None and max(counts) > 1:
            return joined(prompts, completions, counts, self.pad).to(self.device)
        inputs = packed(prompts, completions) if self.pack else padded(prompts, completions, self.pad)
        return inputs.to(self.device)

    def run(
        self,
        model: nn.Module,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        finish: Callable[[Tensor, Head | None], T],
        counts: Sequence[int] | None = None,
    ) -> T:
        """finish(hidden [N, H] of the completion tokens, head), called inside the model's forward.

        counts: so many completions in turn, of one prompt, share a row; None = one each.
        """
        inputs = self.layout(prompts, completions, counts)
        extra: dict[str, Any] = {"use_cache": False}
        if inputs.mask is not None:
            extra["attention_mask"] = self._attention_mask(model, inputs.mask)
        if self._takes_positions:
            extra["position_ids"] = inputs.positions
        if self.whole_logits:
            logits = model(input_ids=inputs.ids, **extra).logits
            return finish(logits.flatten(0, 1)[inputs.keep], None)

        def end(hidden: Tensor, head: Head) -> Any:
            result = finish(hidden.flatten(0, 1)[inputs.keep], head)
            return (result.loss, result) if isinstance(result, HeadOutput) else result

        result: Any = model(input_ids=inputs.ids, finish=end, **extra)
        if isinstance(result, tuple):  # DeepSpeed's hooks look for tensors in tuples, and wrap them
            loss, output = result
            result = replace(output, loss=loss)
        return result

    @torch.no_grad()
    def join_error(self, model: nn.Module, vocabulary: int) -> float:
        """Largest difference between hidden states of joined completions and apart, over their largest size: for
        layers that do not heed the mask. Tokens differ, since equal ones would hide who looks where."""
        ids = [i % vocabulary for i in range(3 * _JOINED_CHECK)]
        prompts = [ids[:_JOINED_CHECK]] * 2
        completions = [ids[_JOINED_CHECK : 2 * _JOINED_CHECK], ids[2 * _JOINED_CHECK :]]
        together, apart = (
            self.run(model, prompts, completions, lambda hidden, head: hidden, counts).float()
            for counts in ([2], [1, 1])
        )
        return float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6))

    def _attention_mask(self, model: nn.Module, seen: Tensor) -> Tensor:
        """As attention adds it to the scores: of a mask of booleans sdpa would make and keep one per layer."""
        dtype = next(model.parameters()).dtype
        return torch.zeros_like(seen, dtype=dtype).masked_fill_(~seen, torch.finfo(dtype).min)

    def teacher(
        self,
        teacher: Teacher,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        limits: Limits | None = None,
        join: bool = False,
    ) -> States:
        """The teacher's states of all rows, in their order, without gradient.

        Args:
            limits: of a run; given, prompts that several rows share are run once. None = one padded run of all rows.
            join: let siblings share a row, where that is cheaper than to let them share keys and values.
        """

        def forward(module: nn.Module) -> States:
            if limits is None:
                return self.run(module, prompts, completions, States)
            return self._in_parts(module, prompts, completions, limits, join)

        return combined(teacher.outputs(forward))

    def _in_parts(
        self, module: nn.Module, prompts: Sequence[Tokens], completions: Sequence[Tokens], limits: Limits, join: bool
    ) -> States:
        lengths = [len(completion) for completion in completions]
        # Rows alone with their prompt go along, unless they can be packed.
        carriers = {rows[0]: rows[1:] for rows in batching.siblings(prompts, lengths) if len(rows) > 1 or not self.pack}
        if not any(carriers.values()):
            carriers = {}
        found: dict[int, Tensor] = {}
        head: Head | None = None
        if join and carriers:
            plan, cost = batching.join(prompts, lengths, limits)
            if cost < batching.shared_cost(prompts, lengths, limits, carriers):
                carriers = {}
                for bundles in plan:
                    head, hidden = self._states(module, prompts, completions, bundles)
                    found |= hidden
        first = list(carriers)
        for part in batching.split([(len(prompts[i]), lengths[i]) for i in first], limits):
            mine = {first[i]: carriers[first[i]] for i in part}
            hidden, head, complete = self._shared(module, mine, prompts, completions, limits)
            found |= hidden
            if not complete:
                break
        rest = [i for i in range(len(prompts)) if i not in found]
        alone = replace(limits, packed=self.pack)
        for part in batching.split([(len(prompts[i]), lengths[i]) for i in rest], alone):
            head, hidden = self._states(module, prompts, completions, [[rest[i]] for i in part])
            found |= hidden
        return States(torch.cat([found[i] for i in range(len(prompts))]), head)

    def _states(
        self,
        module: nn.Module,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        bundles: Sequence[Sequence[int]],
    ) -> tuple[Head | None, dict[int, Tensor]]:
        """Head and hidden states of rows that go through the model together."""
        rows = [i for bundle in bundles for i in bundle]
        counts = [len(bundle) for bundle in bundles]
        states = self.run(module, [prompts[i] for i in rows], [completions[i] for i in rows], States, counts)
        lengths = [len(completions[i]) for i in rows]
        return states.head, dict(zip(rows, states.hidden.split(lengths), strict=True))

    def _shared(
        self,
        module: nn.Module,
        carriers: Mapping[int, Sequence[int]],
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        limits: Limits,
    ) -> tuple[dict[int, Tensor], Head, bool]:
        """Hidden states of the carriers, run from the start, and of their followers, run behind the carrier's prompt;
        False and no followers if the model's cache cannot be cut."""
        start = padded([prompts[i] for i in carriers], [completions[i] for i in carriers], self.pad).to(self.device)
        cache = DynamicCache(config=causal_lm(module).config)
        hidden, head = module(
            input_ids=start.ids,
            position_ids=start.positions,
            past_key_values=cache,
            use_cache=True,
            finish=lambda hidden, head: (hidden.flatten(0, 1)[start.keep], head),
        )
        found = dict(zip(carriers, hidden.split([len(completions[i]) for i in carriers]), strict=True))
        if not _whole_cache(cache, start.ids.shape[1]):
            return found, head, False
        place = {j: k for k, i in enumerate(carriers) for j in carriers[i]}
        found |= {j: found[i][:1] for i in carriers for j in carriers[i]}  # predicts the first token
        longer = [j for j in place if len(completions[j]) > 1]
        sizes = [(-(-len(prompts[j]) // _CACHED), len(completions[j]) - 1) for j in longer]
        for part in batching.split(sizes, limits):
            mine = [longer[j] for j in part]
            index = torch.tensor([place[j] for j in mine], device=self.device)
            lengths = torch.tensor([len(prompts[j]) for j in mine], device=self.device).unsqueeze(1)
            prefix = max(len(prompts[j]) for j in mine)
            tails = [completions[j][:-1] for j in mine]
            ids, seen = (t.to(self.device) for t in _padded_right(tails, self.pad))
            cut = DynamicCache(
                [(layer.keys[index, :, :prefix], layer.values[index, :, :prefix]) for layer in cache.layers]
            )
            hidden = module(
                input_ids=ids,
                attention_mask=torch.cat([torch.arange(prefix, device=self.device) < lengths, seen], 1),
                position_ids=lengths + torch.arange(ids.shape[1], device=self.device),
                past_key_values=cut,
                use_cache=True,
                finish=lambda hidden, head: hidden,
            )
            for j, tail, states in zip(mine, tails, hidden, strict=True):
                found[j] = torch.cat([found[j], states[: len(tail)]])
        return found, head, True


def combined(outputs: Sequence[tuple[float, States]]) -> States:
    """One head for a weighted sum of logits: sum_i share_i (h_i W_i^T) = [share_i h_i] [W_i]^T, side by side."""
    if len(outputs) == 1:
        return outputs[0][1]
    shares, states = zip(*outputs, strict=True)
    if states[0].head is None:
        return States(sum(share * s.hidden for share, s in zip(shares, states, strict=True)), None)
    heads = [s.head for s in states]
    if any(h.softcap is not None for h in heads):
        raise ValueError("a mixture of soft-capped logits has no head of its own")
    biases = [share * h.bias for share, h in zip(shares, heads, strict=True) if h.bias is not None]
    return States(
        torch.cat([share * s.hidden for share, s in zip(shares, states, strict=True)], 1),
        Head(
            torch.cat([h.weight for h in heads], 1),
            sum(biases[1:], biases[0]) if biases else None,
            heads[0].scale,
        ),
    )


def _whole_cache(cache: DynamicCache, width: int) -> bool:
    """Whether every layer holds plain keys and values of all tokens."""
    return all(type(layer) is DynamicLayer and layer.get_seq_length() == width for layer in cache.layers)


def _padded_right(rows: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, longest]."""
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    return torch.tensor(ids), torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
