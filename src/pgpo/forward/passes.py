"""The forwards of student and teacher, which end in hidden states: no [tokens, vocabulary], little padding.

Passes.forward    hidden states of the completion tokens, handed to the loss inside the model's forward
Passes.teacher    the teacher's, without gradient. A prompt of several rows is computed once (prefix sharing): its
                  completions are joined behind it in one row, or read its KV cache.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from pgpo.core import HeadOutput
from pgpo.forward import batching, routers
from pgpo.forward.batching import Limits
from pgpo.forward.layout import Inputs, Tokens, joined, packed, padded, padded_with_mask
from pgpo.forward.open_model import Head, causal_lm
from pgpo.forward.routers import Load
from pgpo.teacher import Teacher

_JOINED_CHECK = 24  # ours: tokens of the prompt and of each completion in `join_error`
_CACHED = 4  # ours: a token in the KV cache takes at most a quarter of the memory of one in the forward

T = TypeVar("T")


@dataclass(frozen=True)
class States:
    """Hidden states that predict completion tokens, row after row [N, H], and the head that turns them into logits.

    head None: `hidden` are the logits [N, V] themselves.
    """

    hidden: Tensor
    head: Head | None

    def __getitem__(self, index: Tensor) -> States:
        return States(self.hidden[index], self.head)

    def at(self, index: Tensor | None) -> States:
        """Those of some tokens; None = all."""
        return self if index is None else self[index.to(self.hidden.device)]


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
        self._student = model
        self._takes_positions = "position_ids" in inspect.signature(type(causal_lm(model)).forward).parameters

    def layout(
        self, prompts: Sequence[Tokens], completions: Sequence[Tokens], counts: Sequence[int] | None = None
    ) -> Inputs:
        if counts is not None and max(counts) > 1:
            return joined(prompts, completions, counts, self.pad).to(self.device)
        inputs = packed(prompts, completions) if self.pack else padded(prompts, completions, self.pad)
        return inputs.to(self.device)

    def forward(
        self,
        model: nn.Module,
        prompts: Sequence[Tokens],
        completions: Sequence[Tokens],
        finish: Callable[[Tensor, Head | None], T],
        counts: Sequence[int] | None = None,
        loads: list[Load] | None = None,
    ) -> T:
        """One forward: finish(hidden [N, H] of the completion tokens, head), called inside the model's own.

        Args:
            counts: completions of each row of the batch, in turn; those of a row have one prompt. None = one each.
            loads: gets the load of the student's routers, in which a joined prompt counts once per completion; None
                for a model without routers, and for the teacher.
        """
        inputs = self.layout(prompts, completions, counts)
        extra: dict[str, Any] = {"use_cache": False}
        if inputs.mask is not None:
            extra["attention_mask"] = self._attention_mask(model, inputs.mask)
        if self._takes_positions:
            extra["position_ids"] = inputs.positions
        if loads is None:
            return self._forward(model, inputs, extra, finish)
        with routers.watched(causal_lm(self._student), loads, inputs.serves):
            return self._forward(model, inputs, {**extra, "output_router_logits": True}, finish)

    def _forward(
        self, model: nn.Module, inputs: Inputs, extra: dict[str, Any], finish: Callable[[Tensor, Head | None], T]
    ) -> T:
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
        """Largest difference between hidden states of completions joined and apart, relative to the largest state: it
        shows layers that ignore the mask. The tokens differ, since equal ones would hide which of them is attended."""
        ids = [i % vocabulary for i in range(3 * _JOINED_CHECK)]
        prompts = [ids[:_JOINED_CHECK]] * 2
        completions = [ids[_JOINED_CHECK : 2 * _JOINED_CHECK], ids[2 * _JOINED_CHECK :]]
        together, apart = (
            self.forward(model, prompts, completions, lambda hidden, head: hidden, counts).float()
            for counts in ([2], [1, 1])
        )
        return float((together - apart).abs().max() / apart.abs().max().clamp_min(1e-6))

    def _attention_mask(self, model: nn.Module, seen: Tensor) -> Tensor:
        """In the form that attention adds to its scores: sdpa would make and keep one per layer of a boolean mask."""
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
            limits: of a forward, with prefix sharing. None = one forward of all rows, nothing shared.
            join: let siblings share a row, where that is cheaper than a KV cache.
        """

        def states(module: nn.Module) -> States:
            if limits is None:
                return self.forward(module, prompts, completions, States)
            return self._in_parts(module, prompts, completions, limits, join)

        return combined(teacher.outputs(states))

    def _in_parts(
        self, module: nn.Module, prompts: Sequence[Tokens], completions: Sequence[Tokens], limits: Limits, join: bool
    ) -> States:
        lengths = [len(completion) for completion in completions]
        # A carrier computes its prompt, and its followers read that part of its KV cache. Rows without siblings go
        # along as carriers without followers, unless they can be packed.
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
        """Head and hidden states of rows that share a forward."""
        rows = [i for bundle in bundles for i in bundle]
        counts = [len(bundle) for bundle in bundles]
        states = self.forward(module, [prompts[i] for i in rows], [completions[i] for i in rows], States, counts)
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
        """Hidden states of the carriers, and of their followers by the carriers' KV cache; False and no followers if
        the model's cache cannot be cut."""
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
            tails = [completions[j][:-1] for j in mine]
            lengths = [len(prompts[j]) for j in mine]
            hidden = self._behind(module, cache, [place[j] for j in mine], lengths, tails)
            for j, tail, states in zip(mine, tails, hidden, strict=True):
                found[j] = torch.cat([found[j], states[: len(tail)]])
        return found, head, True

    def _behind(
        self, module: nn.Module, cache: DynamicCache, rows: list[int], prefixes: list[int], tails: list[Tokens]
    ) -> Tensor:
        """Hidden states of `tails`, right-padded, each behind the first tokens, `prefixes` many, of a row of a KV
        cache."""
        index = torch.tensor(rows, device=self.device)
        lengths = torch.tensor(prefixes, device=self.device).unsqueeze(1)
        prefix = max(prefixes)
        ids, seen = (t.to(self.device) for t in padded_with_mask(tails, self.pad))
        cut = DynamicCache([(layer.keys[index, :, :prefix], layer.values[index, :, :prefix]) for layer in cache.layers])
        hidden: Tensor = module(
            input_ids=ids,
            attention_mask=torch.cat([torch.arange(prefix, device=self.device) < lengths, seen], 1),
            position_ids=lengths + torch.arange(ids.shape[1], device=self.device),
            past_key_values=cut,
            use_cache=True,
            finish=lambda hidden, head: hidden,
        )
        return hidden


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
    """Whether every layer's KV cache holds all tokens."""
    return all(type(layer) is DynamicLayer and layer.get_seq_length() == width for layer in cache.layers)
