"""`generate` callables for `evaluate`: a transformers model in this process, or vLLM."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pgpo.errors import UserError, reason
from pgpo.evaluate.run import Messages
from pgpo.forward import sampling
from pgpo.visible import opens_thinking

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE = 0.6  # validation sampling of the paper
TOP_P = 0.95  # validation sampling of the paper
# Options of transformers and of vLLM that shape the distribution: an evaluation has its own. All others, such as stops,
# lengths, and words that are forbidden or forced, hold in training and in evaluation.
SAMPLING = frozenset(
    (
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "encoder_repetition_penalty", "presence_penalty", "frequency_penalty"),
        *("guidance_scale", "penalty_alpha", "dola_layers", "num_beams", "num_beam_groups", "diversity_penalty"),
        *("length_penalty", "early_stopping", "use_beam_search", "num_return_sequences", "n", "best_of", "seed"),
        *("watermarking", "watermarking_config"),
    )
)
# Of transformers' options, what a runner sets itself, or what changes the form of what `generate` returns.
_OWN = frozenset(
    (
        *("max_length", "max_new_tokens", "pad_token_id", "eos_token_id", "use_cache", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "transformers_version"),
    )
)


def shared_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """What training and evaluation have in common of generation options: all that is set and no sampling."""
    return {name: value for name, value in options.items() if value is not None and name not in SAMPLING}


def evaluation(seed: int) -> tuple[int | str, ...]:
    """Names the random numbers of held-out completions: a model scores the same in training and in `pgpo eval`."""
    return "evaluation", seed


def render_prompt(processing_class: Any, prompt: Any, **template: Any) -> list[int]:
    """Token ids of a prompt, ready for generation: plain text, or messages by the chat template with its options."""
    if isinstance(prompt, str):
        return list(processing_class(text=prompt)["input_ids"])
    encoded = processing_class.apply_chat_template(
        conversation=prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **template
    )
    return list(encoded["input_ids"])


def answer_text(completion: Any) -> str:
    """What a user sees of a completion, a text or a list of messages."""
    return completion if isinstance(completion, str) else str(completion[-1].get("content") or "")


class TransformersRunner:
    """Samples with pgpo.forward.sampling, or with `model.generate`, and leaves a model in training unchanged.

    The distribution follows the settings given here; sampling options of the model's own generation_config (top_k,
    penalties) are ignored. Its stops and its forbidden words hold. Restored afterwards: the RNG streams of the
    CPU and of the model's CUDA devices, the train/eval mode of each module, the generation_config. The
    KV cache is used even where training switched it off.

    The same seed gives the same completions for the same prompts and k, whatever the batch_size. (With `generate`
    another batch_size draws its random numbers in another order and gives other completions of the same distribution.)
    `model` is the bare model, not a DDP wrapper, with its parameters whole on this rank, or, with `generate`, sharded
    by FSDP2 if all ranks make equally many calls of as many batches (ZeRO-3 shards: use vLLM).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_new_tokens: int,
        batch_size: int = 256,  # as many as one training step of the paper samples
        chat_template_kwargs: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        rendered: bool = False,
        progress: Callable[[int, int], None] | None = None,
        sampler: str = "auto",
        max_tokens: int | None = None,
        say: Callable[[str], Any] = warnings.warn,
    ) -> None:
        """temperature 0 is greedy; batch_size counts sequences, that is prompts x k.

        `chat_template_kwargs`: for example {"enable_thinking": False} for Qwen3. `generation`: options of
        transformers' GenerationConfig that training uses (eos_token_id, stop_strings, suppress_tokens, ...); those of
        `SAMPLING` among them are left out. `rendered`: only `sample` is called, so no chat template is needed.
        `progress(done, total)` is called after each batch, in sequences. `sampler`: "generate" is transformers' own,
        "auto" only where ours cannot serve the model, which `say` is told. `max_tokens`: in a batch of ours, prompts
        and the longest possible completions; a single sequence may exceed it. Raises UserError for a tokenizer without
        chat template, or without both pad and eos token, and for settings out of range.
        """
        if not rendered and not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template; set tokenizer.chat_template or take"
                " that of an instruction-tuned model."
            )
        if tokenizer.pad_token_id is None and tokenizer.eos_token_id is None:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no pad token and no eos token; set tokenizer.eos_token."
            )
        _check_sampling(temperature, top_p, max_new_tokens)
        if batch_size < 1:
            raise UserError(f"batch_size = {batch_size} sequences is too small; set it to 1 or more.")
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.top_p = top_p
        self.max_new_tokens = max_new_tokens
        self.batch_size = batch_size
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.generation = dict(generation or {})
        self.progress = progress
        self.sampler = sampler
        self.max_tokens = max_tokens
        self.say = say

    def __call__(self, prompts: list[Messages], k: int, seed: int) -> list[list[str]]:
        """k completion texts per prompt, without special tokens."""
        encoded = [render_prompt(self.tokenizer, prompt, **self.chat_template_kwargs) for prompt in prompts]
        sampled = self.sample([ids for ids in encoded for _ in range(k)], seed)
        texts = [self.text(prompts[i // k], encoded[i // k], ids) for i, ids in enumerate(sampled)]
        return [texts[prompt * k : (prompt + 1) * k] for prompt in range(len(prompts))]

    def sample(self, prompts: list[list[int]], seed: int, streams: sampling.Streams | None = None) -> list[list[int]]:
        """Token ids of one completion per prompt (token ids too), each with the stop token that ended it, if any.

        streams: random numbers that `generate` does not take; None = by the seed and the place in the list.
        """
        if self.sampler == "auto":
            try:
                return self._sample(prompts, streams or sampling.Streams(evaluation(seed), range(len(prompts))))
            except sampling.Unsupported as problem:
                self.say(str(problem))
        return self._generate(prompts, seed)

    def _sample(self, prompts: list[list[int]], streams: sampling.Streams) -> list[list[int]]:
        config = self._config()
        with sampling.ready(self.model, config):  # no gap is filled by the model's own
            return sampling.sample(
                self.model,
                prompts,
                config,
                streams,
                tokenizer=self.tokenizer,
                most_tokens=self.max_tokens,
                most_rows=self.batch_size,
                progress=self.progress,
            )

    def _generate(self, prompts: list[list[int]], seed: int) -> list[list[int]]:
        found: list[list[int]] = [[]] * len(prompts)
        config, done = self._config(), 0
        with torch.no_grad(), _isolated_rng(self.model, seed), sampling.ready(self.model, config):
            for batch in sampling.batches(prompts, self.max_new_tokens, most_rows=self.batch_size):
                completions = self._complete([prompts[sequence] for sequence in batch], config)
                for sequence, ids in zip(batch, completions, strict=True):
                    found[sequence] = ids
                done += len(batch)
                if self.progress:
                    self.progress(done, len(prompts))
        return found

    def text(self, prompt: Messages, prompt_ids: list[int], ids: list[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return _text(self.tokenizer, prompt, prompt_ids, ids, self.stopped(ids))

    def stopped(self, ids: list[int]) -> bool:
        """Whether a stop token ended a completion."""
        return ids[-1:] != [] and ids[-1] in (self._config().eos_token_id or [])

    def opens_thinking(self, messages: Messages) -> bool:
        """Whether the rendered prompt ends inside a thinking block, as behind a template's `<think>`."""
        if isinstance(messages, str):
            return opens_thinking(messages)
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
        )
        return opens_thinking(str(text))

    def _config(self) -> GenerationConfig:
        from transformers import GenerationConfig

        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        own = self.model.generation_config.to_dict()
        stops: set[int] = set()
        for ids in (eos, own["eos_token_id"], self.generation.get("eos_token_id")):
            stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        shared = shared_options(own) | shared_options(self.generation)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            **{name: value for name, value in shared.items() if name not in _OWN and not name.startswith("_")},
            max_new_tokens=self.max_new_tokens,
            pad_token_id=eos if pad is None else pad,
            eos_token_id=sorted(stops) or None,
            use_cache=True,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )

    def _complete(self, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
        ids, mask = sampling.left_padded(prompts, config.pad_token_id)
        device = self.model.device
        strings = {"tokenizer": self.tokenizer} if config.stop_strings else {}
        output = self.model.generate(input_ids=ids.to(device), attention_mask=mask.to(device), **strings)
        return [trimmed(row, config.eos_token_id or [], config) for row in output[:, ids.shape[1] :].tolist()]


def trimmed(ids: list[int], stops: Sequence[int], config: GenerationConfig) -> list[int]:
    """A row of what `generate` returned, without the padding behind its end."""
    end = next((place + 1 for place, token in enumerate(ids) if token in stops), len(ids))
    if end == len(ids) and config.stop_strings:  # a row that a string ended has no stop token
        while end > 1 and ids[end - 1] == config.pad_token_id:
            end -= 1
    return ids[:end]


def _text(tokenizer: Any, prompt: Any, prompt_ids: list[int], ids: list[int], stopped: bool) -> str:
    """The answer in sampled ids, as reward functions get it in training: TRL parses what has a response template."""
    form = "response_template" if hasattr(tokenizer, "response_template") else "response_schema"  # before 5.13
    if not isinstance(prompt, str) and getattr(tokenizer, form, None) is not None:
        from trl.chat_template_utils import parse_response

        return str(parse_response(tokenizer, ids, prefix=prompt_ids)["content"])
    return str(tokenizer.decode(ids[:-1] if stopped else ids, skip_special_tokens=True))


class VLLMRunner:
    """Samples with vLLM, the engine of the paper, from a model or LoRA adapters, on disk or on the hub."""

    def __init__(
        self,
        model_path: str,
        *,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_new_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        generation: Mapping[str, Any] | None = None,
        progress: bool = False,
        **engine_options: Any,
    ) -> None:
        """`engine_options` go to `vllm.LLM`: max_model_len, gpu_memory_utilization, tensor_parallel_size, ...

        `generation`: options of vLLM's SamplingParams that training uses (stop, bad_words, ...), without `SAMPLING`.
        `progress`: show vLLM's own bar.

        Raises UserError when vLLM is not installed, for settings out of range, and for what vLLM refuses.
        """
        _check_sampling(temperature, top_p, max_new_tokens)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                "The vLLM runner needs vLLM, which is not installed; run: pip install 'pgpo[vllm]'"
            ) from error
        self._new_parameters = SamplingParams
        base, adapters, lora = model_path, {}, None
        file = Path(model_path) / "adapter_config.json"
        if file.is_file() and not (file.parent / "config.json").exists():
            from vllm.lora.request import LoRARequest

            config = json.loads(file.read_text(encoding="utf-8"))
            base = config["base_model_name_or_path"]
            adapters = {"tokenizer": model_path, "enable_lora": True, "max_lora_rank": max(8, config["r"])}
            lora = LoRARequest("adapters", 1, model_path)
        try:
            self._engine = LLM(model=base, **(adapters | engine_options))
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"vLLM cannot serve the model {model_path!r} ({type(error).__name__}: {reason(error)}); look at its "
                "options and at the memory that they leave."
            ) from error
        self._sampling = {
            **shared_options(generation or {}),
            **{"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens},
        }
        if isinstance(form := self._sampling.get("structured_outputs"), Mapping):  # as TRL takes it
            from vllm.sampling_params import StructuredOutputsParams

            self._sampling["structured_outputs"] = StructuredOutputsParams(**form)
        self._options = {"use_tqdm": progress, "lora_request": lora}
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def opens_thinking(self, messages: Messages) -> bool:
        """Whether the rendered prompt ends inside a thinking block, as behind a template's `<think>`."""
        text = self._engine.get_tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self._chat_template_kwargs
        )
        return opens_thinking(str(text))

    def __call__(self, prompts: list[Messages], k: int, seed: int) -> list[list[str]]:
        """k completion texts per prompt, decoded as in training: vLLM's own keep the space before the first word."""
        # vLLM seeds completion i of a request with seed + i. One seed for all prompts would give completion i of
        # every question the same random numbers: an error shared by all, which no interval by question would see.
        parameters = [
            self._new_parameters(n=k, seed=_request_seed(seed, prompt), **self._sampling)
            for prompt in range(len(prompts))
        ]
        if isinstance(prompts[0], str):
            outputs = self._engine.generate(prompts, parameters, **self._options)
        else:
            outputs = self._engine.chat(
                prompts, parameters, chat_template_kwargs=self._chat_template_kwargs, **self._options
            )
        tokenizer = self._engine.get_tokenizer()
        return [
            [
                _text(tokenizer, prompt, output.prompt_token_ids, list(completion.token_ids), _by_token(completion))
                for completion in output.outputs
            ]
            for prompt, output in zip(prompts, outputs, strict=True)
        ]


def _request_seed(seed: int, prompt: int) -> int:
    """Far from that of any other seed and prompt, since vLLM counts on from it."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {prompt}".encode(), digest_size=7).digest(), "little")


def _by_token(completion: Any) -> bool:
    """Whether a stop token ended a completion of vLLM, and not a string or its length."""
    return completion.finish_reason == "stop" and not isinstance(completion.stop_reason, str)


def _check_sampling(temperature: float, top_p: float, max_new_tokens: int) -> None:
    if not temperature >= 0:
        raise UserError(f"temperature = {temperature} cannot be sampled at; set 0 (greedy) or more.")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p = {top_p} is not a share of the probability; set it in (0, 1].")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens} leaves no room for an answer; set it to 1 or more.")


@contextmanager
def _isolated_rng(model: PreTrainedModel, seed: int) -> Iterator[None]:
    """Seeds the generators that sampling draws from, and gives the caller's state back.

    Only those of the CPU and of the model's devices: torch.manual_seed would reseed the unsaved ones as well.
    """
    devices = sorted({parameter.device.index for parameter in model.parameters() if parameter.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices, device_type="cuda"):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
