"""A vLLM for the default suite: an engine with weights of its own, which TRL's code fills, and which it samples from.

TRL's VLLMGeneration and pgpo's VLLMRunner are the real ones. `install` puts the engine below both, and notes at each
call of TRL's `generate` how far the policy of the engine is from that of the model in training.
"""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.generation import vllm_generation

ENGINE_OPTIONS = {
    *("model", "dtype", "trust_remote_code", "max_model_len", "gpu_memory_utilization", "tensor_parallel_size"),
    *("max_num_seqs", "enable_sleep_mode", "model_impl", "distributed_executor_backend", "seed", "quantization"),
    *("max_num_batched_tokens", "logprobs_mode", "enforce_eager", "tokenizer", "enable_lora", "max_lora_rank"),
}


@dataclass
class SamplingParams:
    """Those that the tests set; a name that vLLM does not know is a TypeError there as here."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int = 16
    logprobs: int | None = None
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    structured_outputs: Any = None


@dataclass
class StructuredOutputsParams:
    regex: str | None = None
    choice: list[str] | None = None


@dataclass
class Log:
    """What happened below TRL.

    Attributes:
        engines: in the order in which they were made.
        distances: per call of TRL's `generate`, the largest difference of a log-probability between model and engine.
    """

    engines: list[Engine] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.engines[-1]


class Engine:
    """vllm.LLM as TRL's colocate mode and pgpo's runner use it.

    Attributes:
        syncs: how often its weights were renewed.
        asked: the sampling parameters of each request.
        adapters: folders that requests named; they change nothing here.
    """

    def __init__(self, model: str, **options: Any) -> None:
        if unknown := options.keys() - ENGINE_OPTIONS:
            raise TypeError(f"EngineArgs.__init__() got an unexpected keyword argument {min(unknown)!r}")
        self.options = {"model": model, **options}
        dtype = options.get("dtype", "auto")
        self.model = AutoModelForCausalLM.from_pretrained(
            model, dtype=dtype if dtype == "auto" else getattr(torch, dtype)
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.generator = torch.Generator().manual_seed(0)
        self.syncs, self.asked, self.adapters = 0, [], set()
        runner = types.SimpleNamespace(model=types.SimpleNamespace(load_weights=self._load))
        executor = types.SimpleNamespace(driver_worker=types.SimpleNamespace(model_runner=runner))
        config = types.SimpleNamespace(max_model_len=options.get("max_model_len") or 128)
        self.llm_engine = types.SimpleNamespace(model_executor=executor, model_config=config)

    def _load(self, weights: list[tuple[str, torch.Tensor]]) -> None:
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in weights:
                own[name].copy_(value)

    def reset_prefix_cache(self) -> None:
        self.syncs += 1  # which ends each of TRL's

    def get_tokenizer(self) -> Any:
        return self.tokenizer

    def chat(
        self, messages: list[Any], parameters: Any, use_tqdm: bool, chat_template_kwargs: dict, lora_request: Any
    ) -> list[Any]:
        prompts = [
            self.tokenizer.apply_chat_template(m, add_generation_prompt=True, return_dict=True, **chat_template_kwargs)
            for m in messages
        ]
        return self.generate(
            [{"prompt_token_ids": p["input_ids"]} for p in prompts], parameters, use_tqdm, lora_request
        )

    def generate(self, prompts: list[Any], sampling_params: Any, use_tqdm: bool, lora_request: Any = None) -> list[Any]:
        self.adapters |= set() if lora_request is None else {lora_request}
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        self.asked += [vars(p) | {"prompt": prompt} for p, prompt in zip(each, prompts, strict=True)]
        return [
            types.SimpleNamespace(
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[self._sample(prompt["prompt_token_ids"], p) for _ in range(p.n)],
            )
            for prompt, p in zip(prompts, each, strict=True)
        ]

    @torch.no_grad()
    def _sample(self, prompt: list[int], p: SamplingParams) -> Any:
        """By temperature and the end of the text alone."""
        ids, logprobs, end = list(prompt), [], self.tokenizer.eos_token_id
        while len(ids) - len(prompt) < p.max_tokens and (len(ids) == len(prompt) or ids[-1] != end):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            policy = torch.log_softmax(logits / max(p.temperature, 1e-4), -1)
            ids.append(int(torch.multinomial(policy.exp(), 1, generator=self.generator)))
            logprobs.append({ids[-1]: types.SimpleNamespace(rank=1, logprob=float(policy[ids[-1]]))})
        new = ids[len(prompt) :]
        reason = "stop" if new[-1] == end else "length"
        return types.SimpleNamespace(token_ids=new, logprobs=logprobs, finish_reason=reason, stop_reason=None)


@torch.no_grad()
def distance(model: Any, engine: Engine, prompt: list[int]) -> float:
    """Largest difference between the next tokens' log-probabilities in training's model and in the engine's."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    one, other = (m(torch.tensor([prompt])).logits.float().log_softmax(-1) for m in (model, engine.model))
    for module, mode in training:
        module.training = mode
    return float((one - other).abs().max())


def install(monkeypatch: Any) -> Log:
    """Let TRL and pgpo find this vLLM."""
    log = Log()

    class LLM(Engine):
        def __init__(self, model: str, **options: Any) -> None:
            super().__init__(model, **options)
            log.engines.append(self)

    module = types.ModuleType("vllm")
    parameters = types.ModuleType("vllm.sampling_params")
    module.LLM, module.SamplingParams = LLM, SamplingParams  # type: ignore[attr-defined]
    module.sampling_params = parameters  # type: ignore[attr-defined]
    parameters.StructuredOutputsParams = StructuredOutputsParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setitem(sys.modules, "vllm.sampling_params", parameters)
    lora, request = types.ModuleType("vllm.lora"), types.ModuleType("vllm.lora.request")
    request.LoRARequest = lambda name, number, path: path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm.lora", lora)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", request)
    for name, value in (("LLM", LLM), ("SamplingParams", SamplingParams)):
        monkeypatch.setattr(vllm_generation, name, value, raising=False)
    monkeypatch.setattr(vllm_generation, "StructuredOutputsParams", StructuredOutputsParams, raising=False)
    monkeypatch.setattr(vllm_generation, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_generation, "ensure_master_addr_port", lambda: None)
    # TRL sets the variables of a launcher there, with which the next trainer of this process opens a process group.
    monkeypatch.setattr(vllm_generation, "os", types.SimpleNamespace(environ={}))
    plain = vllm_generation.VLLMGeneration.generate

    def generate(self: Any, prompts: list[list[int]], *arguments: Any, **options: Any) -> Any:
        log.distances.append(distance(self.model, self.llm, prompts[0]))
        return plain(self, prompts, *arguments, **options)

    monkeypatch.setattr(vllm_generation.VLLMGeneration, "generate", generate)
    return log
