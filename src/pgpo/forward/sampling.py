"""Completions from a transformers model in this process, faster than its own `generate`.

A prompt goes through the model once, whatever the number of its completions; a completion that has ended leaves the
batch; the KV cache grows in place; and every completion has random numbers of its own, so that what it becomes does not
depend on its neighbours, on their order, or on how many processes share the work (beyond rounding).

All else is transformers': `generate` prepares positions, KV cache, logits processors and stopping criteria, and calls
the loop over tokens that is below (`custom_generate`). What this loop cannot serve is `Unsupported`.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer
from transformers.generation import logits_process
from transformers.generation.configuration_utils import GenerationMode

from pgpo.core.information import sum_dtype

Tokens = Sequence[int]
# Ours: tokens by which a full KV cache grows. It is copied then, and holds that much too much at most.
_ROOM = 128
# Ours: ended completions leave when they are more than this share of the batch (docs/PERFORMANCE.md).
_ENDED = 1 / 8

# Processors that treat every row by itself, whichever rows there are ...
_BY_ROW = {
    getattr(logits_process, name, None)
    for name in (
        *("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper", "TopHLogitsWarper", "MinPLogitsWarper"),
        *("TypicalLogitsWarper", "EpsilonLogitsWarper", "EtaLogitsWarper", "RepetitionPenaltyLogitsProcessor"),
        *("EncoderRepetitionPenaltyLogitsProcessor", "NoRepeatNGramLogitsProcessor", "SequenceBiasLogitsProcessor"),
        *("NoBadWordsLogitsProcessor", "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor"),
        *("SuppressTokensLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "ForcedBOSTokenLogitsProcessor"),
        *("ForcedEOSTokenLogitsProcessor", "InfNanRemoveLogitsProcessor", "ExponentialDecayLengthPenalty"),
        "LogitNormalization",
    )
}
# ... and what some of them know of each row, as a tensor.
_ROW_STATE = ("prompt_ignore_length", "encoder_input_ids")
_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # of a KV cache, whose rows can be selected


class Unsupported(Exception):
    """Why the loop here cannot sample from a model with a generation config."""

    def __str__(self) -> str:
        return f"completions come from transformers' generate(), which is slower: {super().__str__()}."


@dataclass(frozen=True)
class Streams:
    """A stream of random numbers for each completion, told by names alone (Philox, Salmon et al. 2011).

    Attributes:
        call: names of what is sampled, such as (seed of the run, step).
        rows: N names, one per completion, such as its place among those of all ranks.
    """

    call: tuple[int | str, ...]
    rows: Sequence[int]

    def uniform(self, rows: Sequence[int], count: int) -> Tensor:
        """[rows, count] in [0, 1), float64."""
        return torch.from_numpy(np.stack([self._generator(row).random(count) for row in rows]))

    def _generator(self, row: int) -> np.random.Generator:
        name = repr((*self.call, self.rows[row])).encode()
        key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
        return np.random.Generator(np.random.Philox(key=key))


def sample(
    model: Any,
    prompts: Sequence[Tokens],
    config: GenerationConfig,
    streams: Streams,
    *,
    tokenizer: Any = None,
    most_tokens: int | None = None,
    most_rows: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[list[int]]:
    """A completion per prompt: at most `max_new_tokens` token ids, with the one that ended it.

    Args:
        model: its parameters whole on this rank. Its mode and its generation_config are as before afterwards.
        prompts: N times token ids; equal ones are computed once.
        config: what to sample; gaps are filled by the model's own, as in `generate`.
        streams: of N rows.
        tokenizer: needed with stop_strings.
        most_tokens, most_rows: of a batch, with the longest possible completions; None = no limit. A single row may
            exceed the tokens.
        progress: called with (finished, all) after each batch.

    Raises:
        Unsupported: before anything is computed.
        RuntimeError: the logits hold nan or inf; in torch's words.
    """
    own = next(m.generation_config for m in model.modules() if "generation_config" in vars(m))
    config = filled(config, own)
    config.use_cache = True  # training may have switched it off
    if config.get_generation_mode() not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise Unsupported(f"it searches ({config.get_generation_mode().value})")
    stops = StoppingCriteriaList()
    if config.stop_strings:  # generate() keeps the tokenizer from a loop that is not its own
        stops.append(StopStringCriteria(tokenizer, config.stop_strings))
        config.stop_strings = None
    found: list[list[int]] = [[]] * len(prompts)
    done = 0
    with torch.no_grad(), ready(model, config):
        for rows in batches(prompts, config.max_new_tokens, most_tokens, most_rows):
            distinct: dict[tuple[int, ...], int] = {}
            loop = _Loop([distinct.setdefault(tuple(prompts[i]), len(distinct)) for i in rows], rows, streams)
            ids, mask = left_padded(list(distinct), config.pad_token_id)
            completions = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=config,
                stopping_criteria=stops,
                custom_generate=loop,
            )
            for i, tokens in zip(rows, completions, strict=True):
                found[i] = tokens
            done += len(rows)
            if progress is not None:
                progress(done, len(prompts))
    return found


def batches(
    prompts: Sequence[Tokens], longest: int, most_tokens: int | None = None, most_rows: int | None = None
) -> list[list[int]]:
    """Rows that are sampled together. Longest prompts first: similar ones share a batch, and if memory runs out, then
    at once."""
    tokens, most = most_tokens or math.inf, most_rows or math.inf
    parts: list[list[int]] = []
    for i in sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), list(prompts[i]))):
        rows = len(parts[-1]) + 1 if parts else 0
        if not parts or rows > most or rows * (len(prompts[parts[-1][0]]) + longest) > tokens:
            parts.append([])
        parts[-1].append(i)
    return parts


def left_padded(prompts: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [N, longest]."""
    width = max(map(len, prompts))
    ids = torch.tensor([[*[pad] * (width - len(p)), *p] for p in prompts])
    return ids, torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])


def filled(config: GenerationConfig, own: GenerationConfig) -> GenerationConfig:
    """A copy, its gaps filled by the model's own config."""
    given = {name: value for name, value in config.to_dict().items() if value is not None}
    return GenerationConfig.from_dict({**own.to_dict(), **given})


@contextlib.contextmanager
def ready(model: nn.Module, config: GenerationConfig) -> Iterator[None]:
    """Eval mode, and a generation_config in place of the model's own, from which `generate` fills gaps."""
    modes = [(module, module.training) for module in model.modules()]
    # In a PEFT model it is the inner model that holds it.
    own = [(module, vars(module)["generation_config"]) for module, _ in modes if "generation_config" in vars(module)]
    model.eval()
    for module, _ in own:
        module.generation_config = config
    try:
        yield
    finally:
        for module, before in own:
            module.generation_config = before
        for module, training in modes:
            module.training = training


def drawn(scores: Tensor, random: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens [N] from softmax(scores [N, V]) by inversion, for random numbers [N] in [0, 1), never one of probability
    0; and whether some row has no distribution (nan or inf)."""
    summed = scores.softmax(-1).cumsum(-1, dtype=sum_dtype(scores.device))
    total = summed[:, -1:]  # 1 but for rounding
    random = random.clamp(max=1 - torch.finfo(summed.dtype).eps / 2)  # fp64 just below 1 becomes 1 in fp32
    tokens = torch.searchsorted(summed, random.unsqueeze(-1) * total, right=True).squeeze(-1)
    return tokens, ~total.isfinite().all()


class _Loop:
    """The loop over tokens that `generate` calls, with the model below PEFT.

    Args:
        prompts: for each completion, the row of its prompt in `input_ids`.
        rows: for each completion, its row in `streams`.
    """

    def __init__(self, prompts: Sequence[int], rows: Sequence[int], streams: Streams) -> None:
        self.prompts, self.rows, self.streams = prompts, rows, streams

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> list[list[int]]:
        _check(model, logits_processor, inputs)
        width = input_ids.shape[1]
        most = generation_config.max_length - width
        batch = _Batch(model, input_ids, most, logits_processor, inputs)
        batch.expand(torch.tensor(self.prompts, device=input_ids.device))
        random = None
        if generation_config.do_sample:
            device = input_ids.device
            random = self.streams.uniform(self.rows, most).to(sum_dtype(device)).to(device)
        found: list[list[int]] = [[]] * len(self.rows)
        who = list(range(len(self.rows)))  # the completion of each row
        lengths = [0] * len(who)  # of the rows that have ended
        for step in range(most):
            if step:
                batch.forward(model)
            scores = logits_processor(batch.ids, batch.logits)
            broken = torch.zeros((), dtype=torch.bool, device=scores.device)
            if random is None:
                tokens = scores.argmax(-1)
            else:
                tokens, broken = drawn(scores, random[:, step])
            batch.append(tokens)
            # One look at the device per token.
            *ended, bad = torch.cat([stopping_criteria(batch.ids, None), broken.unsqueeze(0)]).tolist()
            if bad:
                raise RuntimeError("probability tensor contains either `inf`, `nan` or element < 0")
            lengths = [n or (step + 1) * end for n, end in zip(lengths, ended, strict=True)]
            live = [row for row, n in enumerate(lengths) if not n]
            if live and len(live) >= (1 - _ENDED) * len(lengths):
                continue
            for row, tokens in enumerate(batch.ids[:, width:].tolist()):
                found[who[row]] = tokens[: lengths[row]]
            if not live:
                break
            kept = dense(live)
            batch.keep(kept)
            random = None if random is None else random[kept]
            who, lengths = [who[row] for row in kept], [0] * len(kept)
        return found


def _check(model: Any, processors: LogitsProcessorList, inputs: dict[str, Any]) -> None:
    """Raises Unsupported."""
    for processor in processors:
        if type(processor) not in _BY_ROW:
            raise Unsupported(f"{type(processor).__name__} is not known to treat each row by itself")
    if type(model).prepare_inputs_for_generation is not GenerationMixin.prepare_inputs_for_generation:
        raise Unsupported(f"{type(model).__name__} prepares its inputs in its own way")
    cache: Any = inputs.get("past_key_values")
    if type(cache) is not DynamicCache or cache.offloading or not all(type(each) in _LAYERS for each in cache.layers):
        raise Unsupported(f"the KV cache of {type(model).__name__} ({cache}) cannot drop rows")
    if unknown := inputs.keys() - {"past_key_values", "attention_mask", "position_ids", "use_cache", "logits_to_keep"}:
        raise Unsupported(f"{type(model).__name__} takes {', '.join(sorted(unknown))}")
    if inputs.get("position_ids") is None:
        raise Unsupported(f"{type(model).__name__} takes no position_ids")


class _Batch:
    """The rows that are sampled now: their tokens so far, KV cache, and next logits.

    Args:
        input_ids: [N, L] prompts, padded on the left.
        most: tokens of a completion.
        inputs: the model's beside them, as `generate` prepared them.
    """

    def __init__(
        self, model: Any, input_ids: Tensor, most: int, processors: LogitsProcessorList, inputs: dict[str, Any]
    ) -> None:
        with _dense_head_input(model):
            outputs = model(
                **model.prepare_inputs_for_generation(input_ids, is_first_iteration=True, **inputs), return_dict=True
            )
        self.logits = outputs.logits[:, -1].float()
        self.cache, self.processors, self.length = outputs.past_key_values, processors, input_ids.shape[1]
        self._ids, self._most = nn.functional.pad(input_ids, (0, most)), most
        self._mask: Tensor | None = None  # no prompt is padded
        if (mask := inputs.get("attention_mask")) is not None:
            mask = nn.functional.pad(mask, (0, most), value=1)
            self._mask = mask.bool()[:, None, None] if _takes_mask_of_keys(model, self.cache) else mask
        self._positions = inputs["position_ids"].expand(len(input_ids), -1)[:, -1:]

    @property
    def ids(self) -> Tensor:
        """[N, L]"""
        return self._ids[:, : self.length]

    def append(self, tokens: Tensor) -> None:
        self._ids[:, self.length] = tokens
        self.length += 1

    def forward(self, model: Any) -> None:
        """The logits behind the latest tokens."""
        self._positions = self._positions + 1
        outputs = model(
            input_ids=self._ids[:, self.length - 1 : self.length].contiguous(),
            attention_mask=None if self._mask is None else self._mask[..., : self.length],
            position_ids=self._positions,
            past_key_values=self.cache,
            use_cache=True,
            return_dict=True,
        )
        self.logits = outputs.logits[:, -1].float()

    def expand(self, rows: Tensor) -> None:
        """Make row i a copy of row rows[i]."""
        self.logits = self.logits[rows]
        self.cache.layers = [
            _Roomy(layer, rows, self._most) if type(layer) is DynamicLayer else _selected(layer, rows)
            for layer in self.cache.layers
        ]
        self._select(rows)

    def keep(self, rows: list[int]) -> None:
        """Make row i what row rows[i] is, in the order of `dense`."""
        index = torch.tensor(rows, device=self._ids.device)
        for layer in self.cache.layers:
            layer.batch_select_indices(index)
        self._select(index)

    def _select(self, rows: Tensor) -> None:
        self._ids, self._positions = self._ids[rows], self._positions[rows]
        self._mask = None if self._mask is None else self._mask[rows]
        for processor in self.processors:
            for name in _ROW_STATE:
                if isinstance(value := getattr(processor, name, None), Tensor):
                    setattr(processor, name, value[rows])


@contextlib.contextmanager
def _dense_head_input(model: Any) -> Iterator[None]:
    """The head reads the last position of each prompt as a slice, which is not contiguous: torch then copies the head's
    weight for each prompt on a CPU. Measured with [49152, 576] and 64 prompts: 14.5 s and 3.5 GB in bf16 against .03 s,
    .72 s against .08 s in fp32."""
    head = model.get_output_embeddings()
    if head is None:
        yield
        return
    hook = head.register_forward_pre_hook(lambda module, args: (args[0].contiguous(), *args[1:]) if args else None)
    try:
        yield
    finally:
        hook.remove()


def dense(live: Sequence[int]) -> list[int]:
    """Rows that are left, in an order in which the first ones stay where they are: the last fill the holes."""
    here = set(live)
    last = [row for row in live if row >= len(live)]
    return [row if row in here else last.pop() for row in range(len(live))]


class _Roomy(DynamicLayer):
    """Keys and values in tensors with room: a token is written in place, and rows that leave are overwritten.

    transformers' layer copies all of them for every token.

    Args:
        layer: of the prompts.
        rows: [N] the prompt of each row.
        most: tokens of a completion.
    """

    def __init__(self, layer: DynamicLayer, rows: Tensor, most: int) -> None:
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self._step = min(_ROOM, most)
        self._room = [self._with_room(states[rows]) for states in (layer.keys, layer.values)]
        self._show(len(rows), layer.keys.shape[-2])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, start = self.keys.shape[0], self.keys.shape[-2]
        end = start + key_states.shape[-2]
        if end > self._room[0].shape[-2]:
            for i, states in enumerate((self.keys, self.values)):
                self._room[i] = self._with_room(states)
        for room, states in zip(self._room, (key_states, value_states), strict=True):
            room[:rows, :, start:end] = states
        self._show(rows, end)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """In the order of `dense`: those who move come from behind the last."""
        count, length = len(indices), self.keys.shape[-2]
        moved = (indices >= count).nonzero().squeeze(-1)
        for room in self._room:
            room[moved, :, :length] = room[indices[moved], :, :length]
        self._show(count, length)

    def _show(self, rows: int, length: int) -> None:
        self.keys, self.values = (room[:rows, :, :length] for room in self._room)

    def _with_room(self, states: Tensor) -> Tensor:
        *sizes, length, width = states.shape
        room = states.new_empty(*sizes, length + self._step, width)
        room[:, :, :length] = states
        return room


def _takes_mask_of_keys(model: Any, cache: DynamicCache) -> bool:
    """Whether a mask [N, 1, 1, L] of the keys that one query sees can be handed to all layers as it is. Made from
    [N, L] in each forward, it costs as much as a small layer."""
    config = model.config.get_text_config()
    whole = all(type(layer) is DynamicLayer for layer in cache.layers) and not getattr(config, "alibi", False)
    return whole and config._attn_implementation == "sdpa"


def _selected(layer: Any, rows: Tensor) -> Any:
    layer.batch_select_indices(rows)
    return layer
