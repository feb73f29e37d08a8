"""The sampler (pgpo.forward.sampling) over transformers' generate, over minimal.py's sampler and over paged generation.

    lab        0.12 M parameters, V = 217: the lab's base model on its own questions
    32k        Qwen3 of 11.5 M parameters, V = 32,768, random weights: prompts of 200 tokens, completions of 64

8 completions of each of 8 (32k: 4) questions, temperature 1, fp32, one thread. With random weights a completion ends
where its first token says: lengths log-normal with sigma 0.6 (mean as above, at most four times that), the same law in
every path, by a logits processor that all are handed. Each draws its own random numbers, so lengths differ from call to
call.

`--paged` compares with transformers' continuous batching (`generate_batch`, which TRL's use_transformers_paged calls).
It is handed no processor: there, no completion ends before the mean length, and each path samples that many tokens.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
import transformers
from paired import measure, report, reuse_memory
from transformers import AutoModelForCausalLM, GenerationConfig, LogitsProcessor, Qwen3Config, Qwen3ForCausalLM

from pgpo import minimal
from pgpo.forward import sampling
from pgpo.tasks import lab_world, load_task

GROUPS, GROUP = 8, 8
PAD, EOS = 0, 1


class EndsAsTheFirstTokenSays(LogitsProcessor):
    """The end token where, and only where, a completion has the length that belongs to its first token."""

    supports_continuous_batching = False

    def __init__(self, prompt: int, vocabulary: int, mean: int, most: int) -> None:
        rng = np.random.default_rng(0)
        lengths = rng.lognormal(np.log(mean) - 0.6**2 / 2, 0.6, vocabulary).round().clip(2, most)
        self.prompt, self.lengths = prompt, torch.tensor(lengths)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, EOS] = -torch.inf
        written = input_ids.shape[1] - self.prompt
        if written:
            self.lengths = self.lengths.to(input_ids.device)
            ends = self.lengths[input_ids[:, self.prompt]] == written + 1
            scores[ends] = -torch.inf
            scores[ends, EOS] = 0
        return scores


def ends_by_first_token(model: Any, vocabulary: int, mean: int, most: int) -> None:
    """Hand the processor to every call of the model's `generate`."""
    plain = model._get_logits_processor

    def processors(*args: Any, **kwargs: Any) -> Any:
        found = plain(*args, **kwargs)
        found.append(EndsAsTheFirstTokenSays(kwargs["input_ids_seq_length"], vocabulary, mean, most))
        return found

    model._get_logits_processor = processors
    sampling._BY_ROW.add(EndsAsTheFirstTokenSays)


@dataclass
class Case:
    model: Any
    prompts: list[list[int]]
    config: GenerationConfig
    calls: int = 0

    def ours(self) -> list[list[int]]:
        self.calls += 1
        streams = sampling.Streams(("benchmark", self.calls), range(len(self.prompts)))
        return sampling.sample(self.model, self.prompts, self.config, streams)

    def generate(self) -> Any:
        ids, mask = (t.to(self.model.device) for t in sampling.left_padded(self.prompts, PAD))
        with torch.no_grad():
            return self.model.generate(input_ids=ids, attention_mask=mask, generation_config=self.config)

    def paged(self) -> Any:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        width = max(map(len, self.prompts)) + self.config.max_new_tokens
        # No larger than these completions need: by default it takes most of the memory, and minutes to touch it.
        blocks = len(self.prompts) * -(-width // 32)
        pages = ContinuousBatchingConfig(page_size=32, num_blocks=blocks, max_batch_tokens=2048, use_cuda_graph=False)
        with torch.no_grad():
            return self.model.generate_batch(
                self.prompts, generation_config=self.config, continuous_batching_config=pages, progress_bar=False
            )


def config(most: int, **options: Any) -> GenerationConfig:
    return GenerationConfig(do_sample=True, top_k=0, max_new_tokens=most, pad_token_id=PAD, **options)


def lab() -> tuple[Case, Callable[[], Any]]:
    """Ours and generate's case, and minimal.py's sampler on the same weights."""
    path, task = lab_world.checkpoint_path("plain"), load_task("lab_world")
    words, settings = minimal.Words(path), minimal.Settings()
    prompts = [words.prompt(row["prompt"]) for row in task.train[:GROUPS] for _ in range(GROUP)]
    plain = minimal.load_model(path)
    model = AutoModelForCausalLM.from_pretrained(path).eval()
    case = Case(model, prompts, config(settings.max_new_tokens, eos_token_id=words.end))
    return case, lambda: minimal.sample(plain, prompts, settings, words.end)


def wide(ends: bool) -> Case:
    """11.5 million parameters."""
    torch.manual_seed(0)
    shape = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=4, head_dim=64, num_attention_heads=4)
    words = dict(vocab_size=32_768, pad_token_id=PAD, eos_token_id=EOS, bos_token_id=None, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(Qwen3Config(**shape, **words, num_key_value_heads=2, initializer_range=0.1)).eval()
    rng = np.random.default_rng(1)
    questions = [rng.integers(2, 32_768, int(n)).tolist() for n in rng.integers(160, 241, GROUPS // 2)]
    prompts = [question for question in questions for _ in range(GROUP)]
    if not ends:
        return Case(model, prompts, config(64, eos_token_id=None))
    ends_by_first_token(model, 32_768, mean=64, most=256)
    return Case(model, prompts, config(256, eos_token_id=EOS))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--paged", action="store_true")
    args = parser.parse_args()
    pairs = max(7, args.pairs)
    reuse_memory()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    small, plain = lab()
    if args.paged:
        same = wide(ends=False)
        for name, case in (("lab", small), ("32k", same)):
            result = measure(case.ours, case.paged, pairs)
            report(f"sampling_{name}_over_paged", f"{name}: sampler / paged generation", 1.0, result)
        return
    what = f"{len(small.prompts)} lab completions: sampler"
    report("sampling_lab", f"{what} / generate", 1.0, measure(small.ours, small.generate, pairs))
    report("sampling_lab_over_minimal", f"{what} / minimal.py's", 1.1, measure(small.ours, plain, pairs))
    large = wide(ends=True)
    what = f"11.5M, {len(large.prompts)} completions of 64 (log-normal) behind prompts of 200: sampler"
    report("sampling_32k", f"{what} / generate", 0.5, measure(large.ours, large.generate, pairs))


if __name__ == "__main__":
    main()
