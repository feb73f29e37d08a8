"""`generate` callables for `evaluate`: a transformers model in this process, or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from pgpo.errors import UserError
from pgpo.evaluate.run import Messages
from pgpo.visible import opens_thinking

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

TEMPERATURE = 0.6  # validation sampling of the paper
TOP_P = 0.95  # validation sampling of the paper


class TransformersRunner:
    """Samples with `model.generate`, and leaves no trace on a model in training.

    Only the settings given here shape the sampling: the model's own generation_config (top_k, penalties) is
    set aside, except that its eos tokens end a completion too. Restored afterwards: the RNG streams of the
    CPU and of the model's CUDA devices, the train/eval mode of each module, the generation_config. The
    key-value cache is used even where training switched it off.

    The same seed gives the same completions for the same prompts, k and batch_size; another batch_size draws
    its random numbers in another order and gives other completions of the same distribution. `model` is the
    bare model, not a DDP wrapper, with its parameters whole on this rank, or sharded by FSDP2 if all ranks make
    equally many calls of as many batches (ZeRO-3 shards: use vLLM).
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
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """temperature 0 is greedy; batch_size counts sequences, that is prompts x k.

        `chat_template_kwargs`: for example {"enable_thinking": False} for Qwen3. `progress(done, total)` is
        called after each batch, in sequences. Raises UserError for a tokenizer without chat template, or
        without both pad and eos token, and for settings out of range.
        """
        if not tokenizer.chat_template:
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
        self.progress = progress

    def __call__(self, prompts: list[Messages], k: int, seed: int) -> list[list[str]]:
        """k completion texts per prompt, without special tokens."""
        encoded = [self._encode(messages) for messages in prompts]
        # Similar lengths share a batch: little padding. The longest go first: if memory runs out, then at once.
        order = sorted(range(len(prompts) * k), key=lambda sequence: -len(encoded[sequence // k]))
        texts = [""] * len(order)
        config = self._config()
        with torch.no_grad(), _isolated_rng(self.model, seed), _ready_to_generate(self.model, config):
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                completions = self._complete([encoded[sequence // k] for sequence in batch], config)
                for sequence, text in zip(batch, completions, strict=True):
                    texts[sequence] = text
                if self.progress:
                    self.progress(start + len(batch), len(order))
        return [texts[prompt * k : (prompt + 1) * k] for prompt in range(len(prompts))]

    def opens_thinking(self, messages: Messages) -> bool:
        """Whether the rendered prompt ends inside a thinking block, as behind a template's `<think>`."""
        return opens_thinking(self._render(messages))

    def _render(self, messages: Messages) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=False, **self.chat_template_kwargs
            )
        )

    def _encode(self, messages: Messages) -> list[int]:
        # The template has the special tokens already.
        return list(self.tokenizer(self._render(messages), add_special_tokens=False)["input_ids"])

    def _config(self) -> GenerationConfig:
        from transformers import GenerationConfig

        pad, eos = self.tokenizer.pad_token_id, self.tokenizer.eos_token_id
        stops: set[int] = set()
        for ids in (eos, self.model.generation_config.eos_token_id):
            stops.update([] if ids is None else [ids] if isinstance(ids, int) else ids)
        sampling = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            pad_token_id=eos if pad is None else pad,
            eos_token_id=sorted(stops) or None,
            use_cache=True,
            **(sampling if self.temperature > 0 else {"do_sample": False}),
        )

    def _complete(self, prompts: list[list[int]], config: GenerationConfig) -> list[str]:
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), config.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, width - len(prompt) :] = 1
        device = self.model.device
        output = self.model.generate(input_ids=input_ids.to(device), attention_mask=attention_mask.to(device))
        return [self._decode(row, config.eos_token_id or []) for row in output[:, width:].tolist()]

    def _decode(self, tokens: list[int], stops: list[int]) -> str:
        end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens))
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))


class VLLMRunner:
    """Samples with vLLM, the engine of the paper, from a model on disk or on the hub.

    The test suite does not run it: it covers only what happens without vLLM.
    """

    def __init__(
        self,
        model_path: str,
        *,
        temperature: float = TEMPERATURE,
        top_p: float = TOP_P,
        max_new_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **engine_options: Any,
    ) -> None:
        """`engine_options` go to `vllm.LLM`: max_model_len, gpu_memory_utilization, tensor_parallel_size, ...

        Raises UserError when vLLM is not installed, and for settings out of range.
        """
        _check_sampling(temperature, top_p, max_new_tokens)
        try:
            from vllm import LLM, SamplingParams
        except ImportError as error:
            raise UserError(
                "The vLLM runner needs vLLM, which is not installed; run: pip install 'pgpo[vllm]'"
            ) from error
        self._new_parameters = SamplingParams
        self._engine = LLM(model=model_path, **engine_options)
        self._sampling = {"temperature": temperature, "top_p": top_p, "max_tokens": max_new_tokens}
        self._chat_template_kwargs = dict(chat_template_kwargs or {})

    def opens_thinking(self, messages: Messages) -> bool:
        """Whether the rendered prompt ends inside a thinking block, as behind a template's `<think>`."""
        text = self._engine.get_tokenizer().apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **self._chat_template_kwargs
        )
        return opens_thinking(str(text))

    def __call__(self, prompts: list[Messages], k: int, seed: int) -> list[list[str]]:
        """k completion texts per prompt."""
        # vLLM seeds completion i of a request with seed + i. One seed for all prompts would give completion i of
        # every question the same random numbers: an error shared by all, which no interval by question would see.
        parameters = [
            self._new_parameters(n=k, seed=seed + k * prompt, **self._sampling) for prompt in range(len(prompts))
        ]
        outputs = self._engine.chat(
            prompts, parameters, use_tqdm=False, chat_template_kwargs=self._chat_template_kwargs
        )
        return [[completion.text for completion in output.outputs] for output in outputs]


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


@contextmanager
def _ready_to_generate(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Eval mode, and our generation_config in place of the model's own, which `generate` fills gaps from."""
    modes = [(module, module.training) for module in model.modules()]
    # In a PEFT model it is the inner model that holds it.
    own_configs = [
        (module, vars(module)["generation_config"]) for module, _ in modes if "generation_config" in vars(module)
    ]
    model.eval()
    for module, _ in own_configs:
        module.generation_config = config
    try:
        yield
    finally:
        for module, own_config in own_configs:
            module.generation_config = own_config
        for module, training in modes:
            module.training = training
