"""The teacher's forwards of one group with prefix sharing, over the same as TRL runs them.

Eight completions, log-normal lengths (mean 300, sigma 0.6), after teacher prompts of 600 tokens: seven rows share one,
the first right completion has its own, as in SDPO. Prefix sharing: one forward per prompt, completions attend to its
keys and values, rows of like length go together, by the trainer's own plan and its default budget. Otherwise: eight
rows padded to the longest prompt and completion. Both end in hidden states. Qwen3 of 4 layers, hidden size 384, fp32,
no gradient. Lengths are drawn anew for every pair.
"""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from paired import measure, pairs_from_command_line, report, reuse_memory
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen3Config, Qwen3ForCausalLM

from pgpo.forward import batching
from pgpo.forward.batching import Limits
from pgpo.forward.open_model import open_forward
from pgpo.forward.passes import Passes, States
from pgpo.settings.config import PGPOConfig
from pgpo.teacher import Teacher

ROWS, PREFIX, COMPLETION, VOCABULARY = 8, 600, 300, 4096


class Case:
    def __init__(self) -> None:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=384,
            intermediate_size=1152,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=8192,
            initializer_range=0.1,
        )
        self.teacher = Teacher(Qwen3ForCausalLM(config), "frozen")
        assert self.teacher.module is not None
        open_forward(self.teacher.module)
        self.passes = Passes(self.teacher.module, 0, torch.device("cpu"))
        costs = batching.costs(self.teacher.module, "cpu")
        self.limits = Limits(PGPOConfig.max_tokens_per_microbatch or math.inf, math.inf, *costs)
        self.rng = np.random.default_rng(0)
        self.tokens = 0  # that went through the model since it was last set to 0
        self.teacher.module.register_forward_pre_hook(self.count, with_kwargs=True)
        self.logits: dict[str, Tensor] = {}
        self.difference = self.spread = 0.0
        self.token_ratios: list[float] = []
        self.draw()

    def count(self, module: Any, args: Any, kwargs: Any) -> None:
        self.tokens += kwargs["input_ids"].numel()

    def draw(self) -> None:
        """Another group."""
        lengths = self.rng.lognormal(np.log(COMPLETION) - 0.6**2 / 2, 0.6, ROWS).round().clip(2).astype(int)
        prompts = self.rng.integers(VOCABULARY, size=(2, PREFIX)).tolist()
        first = self.rng.integers(ROWS)  # the first right completion
        self.prompts = [prompts[int(i == first)] for i in range(ROWS)]
        self.completions = [self.rng.integers(VOCABULARY, size=n).tolist() for n in lengths]
        self.done: dict[str, tuple[States, int]] = {}

    def shared(self) -> States:
        return self.passes.teacher(self.teacher, self.prompts, self.completions, self.limits, True)

    @torch.no_grad()
    def unshared(self) -> States:
        """Prompts, padded left (they are equally long), and completions, padded right, as TRL puts them together."""
        prompts, completions = ([torch.tensor(row) for row in rows] for rows in (self.prompts, self.completions))
        ids = torch.cat([torch.stack(prompts), pad_sequence(completions, True)], 1)
        seen = pad_sequence([torch.ones(PREFIX + len(row), dtype=torch.long) for row in completions], True)
        keep = torch.zeros_like(seen).bool()
        keep[:, PREFIX - 1 : -1] = seen[:, PREFIX:].bool()  # the places that predict the completions
        assert self.teacher.module is not None
        states: States = self.teacher.module(
            input_ids=ids, attention_mask=seen, use_cache=False, finish=lambda hidden, head: States(hidden[keep], head)
        )
        return states

    def timed(self, way: str) -> Callable[[], float]:
        def run() -> float:
            self.tokens = 0
            start = time.process_time()
            states = getattr(self, way)()
            seconds = time.process_time() - start
            self.done[way] = states, self.tokens
            if len(self.done) == 2:
                self.compare()
                self.draw()
            return seconds

        return run

    @torch.no_grad()
    def compare(self) -> None:
        (a, tokens_a), (b, tokens_b) = self.done["shared"], self.done["unshared"]
        assert a.head is not None and b.head is not None
        logits = b.head.logits(b.hidden)
        self.difference = max(self.difference, float((a.head.logits(a.hidden) - logits).abs().max()))
        self.spread = float(logits.std())
        self.token_ratios.append(tokens_a / tokens_b)


def main() -> None:
    pairs = pairs_from_command_line(15)
    reuse_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    case = Case()
    result = measure(case.timed("shared"), case.timed("unshared"), pairs)
    ratio = statistics.median(case.token_ratios)
    print(f"tokens through the model: {ratio:.3f}; logits differ by at most {case.difference:.2g} of {case.spread:.2g}")
    report(
        "teacher_pass",
        "teacher pass over 8 rows, prompts 600, completions 300: shared prompts / padded rows",
        0.35,
        {
            **result,
            "token_ratio_median": ratio,
            "largest_logit_difference": case.difference,
            "logit_deviation": case.spread,
        },
    )


if __name__ == "__main__":
    main()
