"""Fixed cost of a forward, in token equivalents: the constants of `pgpo.forward.batching`.

CPU time of a forward of B rows of W tokens, for B W from 16 to 2048, and the line a + b B W through it (least squares
of the relative errors); a / b is the fixed cost in tokens. The two models of update_step.py; the median of 9 each.

    forward    with a KV cache, as for the teacher's prompts
    behind     the second half of the rows with the KV cache of the first
    update     the student's forward, fused head, and backward
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers
from paired import RESULTS, reuse_memory
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from update_step import SCALES, build

from pgpo.core import HeadOutput, fused_distillation_head
from pgpo.forward import batching
from pgpo.forward.open_model import Head, open_forward
from pgpo.forward.passes import Passes, States

SHAPES = [(1, 16), (4, 32), (8, 32), (16, 32), (32, 32), (64, 32), (8, 64), (16, 64), (32, 64), (8, 128), (16, 128)]


def milliseconds(function: Callable[[], object]) -> float:
    function()
    seconds = []
    for _ in range(9):
        start = time.process_time()
        function()
        seconds.append(time.process_time() - start)
    return 1e3 * statistics.median(seconds)


def line(tokens: list[int], times: list[float]) -> dict[str, float]:
    columns = np.stack([np.ones(len(tokens)), np.array(tokens)], 1) / np.array(times)[:, None]
    (fixed, token), *_ = np.linalg.lstsq(columns, np.ones(len(times)), rcond=None)
    return {"forward_ms": float(fixed), "token_us": float(1e3 * token), "forward_cost_tokens": float(fixed / token)}


def measure(name: str) -> dict[str, object]:
    scale = SCALES[name]
    with tempfile.TemporaryDirectory() as folder:
        build(scale, Path(folder))
        student, teacher = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    teacher.eval()
    for model in (student, teacher):
        open_forward(model)
    passes, rng = Passes(student, 0, torch.device("cpu")), np.random.default_rng(0)
    tokens: dict[str, list[int]] = {"forward": [], "behind": [], "update": []}
    times: dict[str, list[float]] = {"forward": [], "behind": [], "update": []}
    for rows, width in SHAPES:
        half = width // 2
        prompts, completions = (rng.integers(5, scale.vocabulary, (rows, half)).tolist() for _ in range(2))
        labels = torch.tensor(completions).flatten()
        weights = torch.full((len(labels),), 1 / len(labels))
        whole, first, second = (torch.tensor(x) for x in (np.hstack([prompts, completions]), prompts, completions))
        kept = DynamicCache(config=teacher.config)
        with torch.no_grad():
            teacher(input_ids=first, past_key_values=kept, use_cache=True, finish=lambda h, head: h)
            states = passes.forward(teacher, prompts, completions, States)
        assert states.head is not None
        hidden, weight = states.hidden, states.head.weight

        @torch.no_grad()
        def forward(ids: torch.Tensor = whole) -> None:
            cache = DynamicCache(config=teacher.config)
            teacher(input_ids=ids, past_key_values=cache, use_cache=True, finish=lambda h, head: h)

        @torch.no_grad()
        def behind(ids: torch.Tensor = second, kept: DynamicCache = kept, half: int = half) -> None:
            cache = DynamicCache([(layer.keys.clone(), layer.values.clone()) for layer in kept.layers])
            teacher(
                input_ids=ids,
                attention_mask=torch.ones(len(ids), 2 * half, dtype=torch.bool),
                position_ids=torch.arange(half, 2 * half).expand(len(ids), -1),
                past_key_values=cache,
                use_cache=True,
                finish=lambda h, head: h,
            )

        def update(
            given: tuple[list[list[int]], list[list[int]]] = (prompts, completions),
            teachers: tuple[torch.Tensor, torch.Tensor] = (hidden, weight),
            targets: tuple[torch.Tensor, torch.Tensor] = (labels, weights),
        ) -> None:
            def finish(h: torch.Tensor, head: Head | None) -> HeadOutput:
                assert head is not None
                return fused_distillation_head(h, head.weight, *teachers, *targets)

            loss = passes.forward(student, *given, finish).loss
            assert loss is not None
            loss.backward()
            student.zero_grad()

        for what, function, count in (
            ("forward", forward, rows * width),
            ("behind", behind, rows * half),
            ("update", update, rows * width),
        ):
            tokens[what].append(count)
            times[what].append(milliseconds(function))
    return {
        **{what: line(tokens[what], times[what]) for what in tokens},
        "used": batching.costs(student, "cpu")[0],
    }


def main() -> None:
    reuse_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    found = {name: measure(name) for name in SCALES}
    for name, values in found.items():
        for what, fit in values.items():
            print(name, what, fit)
    (RESULTS / "forward_cost.json").write_text(
        json.dumps({"models": found, "torch": torch.__version__}, indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
