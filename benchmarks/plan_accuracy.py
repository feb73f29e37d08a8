"""Predicted against measured memory of a training step, on small models and a CPU.

Each case trains two steps with PGPOTrainer in processes of their own; the second step, from rollout to teacher update,
is measured:

    allocated   bytes that torch's CPU allocator has handed out at one time, from its own events (torch.profiler): free
                of the system's noise, the counterpart of torch.cuda.max_memory_allocated. This one is compared.
    resident    VmHWM of that step less VmRSS before the model is made, in a process in which freed memory goes back to
                the system (MALLOC_MMAP_THRESHOLD_) and which has run a step with another model before, so that
                libraries and compiled code are loaded. Told beside it.

No constant of the plan is fitted. Terms that it lacked at first (torch's fp32 copy in scatter_ on a CPU, values cached
in the keys' dtype, the prompt cache of the run before) were found on other shapes than CASES (H = 256 with V = 32,000
and H = 128 with V = 2,000). HELD_OUT were chosen afterwards; all were within the limit at the first attempt (0.94 to
1.07), and the largest gap showed one more term (the teacher's logits of a lone chunk are freed early), added since.
Rollouts are given, and the generation that the plan foresees is then left out of its peak (the measured one is of the
whole step); in the cases "rollout" the model samples.
"""

from __future__ import annotations

import argparse
import bisect
import contextlib
import gc
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1", "CI": "true", "HF_HUB_OFFLINE": "1"}
RESULTS = Path(__file__).parent / "results"
MIB = 2**20
LIMIT = 0.15


@dataclass(frozen=True)
class Case:
    """A model and a run. Prompts have P or P - 1 tokens, completions L or L - 1, teacher prompts P + L + 6 at most."""

    name: str
    kind: str = "qwen3"
    V: int = 151_936
    H: int = 128
    I: int = 384  # noqa: E741
    layers: int = 6
    heads: int = 4
    kv: int = 2
    d: int = 32
    tied: bool = True
    P: int = 64
    L: int = 192
    questions: int = 2
    group: int = 4
    budget: int = 1024
    objective: str = "pgpo"
    teacher: str = "ema"
    dtype: str = "float32"
    autocast: bool = False
    checkpointing: bool = False
    fused: bool = True
    attention: str = "sdpa"
    joined: bool = False  # a CPU's default is True; CUDA's, for which most plans are made, is not
    optimizer: str = "adamw"
    lora: int | None = None
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = 0.0
    trust: str = "off"  # the form, where trust is measured
    samples: bool = False
    memory: int | None = None  # MiB; the budget is then the largest that the plan allows
    held_out: bool = False
    device: str = "cpu"


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = [
    Case("qwen3 21M, V 151,936", budget=512),
    Case("same, budget 1024"),
    Case("same, budget 2048", budget=2048),
    Case("same, budget 1024, checkpointing", checkpointing=True),
    Case("same, all logits, budget 512", fused=False, budget=512),
    Case("same, live teacher, bf16 autocast", teacher="live", autocast=True),
    Case(
        "llama 62M, V 128,256, bf16, checkpointing", kind="llama", V=128_256, H=384, I=1024, layers=8, heads=6, d=64,
        dtype="bfloat16", autocast=True, checkpointing=True, budget=2048,
    ),
    Case(
        "llama 52M, V 32,000, bf16 autocast", kind="llama", V=32_000, H=576, I=1536, layers=10, heads=9, kv=3, d=64,
        autocast=True, budget=1024,
    ),
    Case(
        "qwen3 29M, LoRA 16 everywhere, bf16, checkpointing", V=50_000, H=320, I=960, layers=10, heads=5, kv=1, d=64,
        lora=16, targets=ALL, dropout=0.05, dtype="bfloat16", autocast=True, checkpointing=True, budget=4096, group=8,
    ),
    Case(
        "qwen3 29M, LoRA 8, fp32", V=50_000, H=320, I=960, layers=10, heads=5, kv=1, d=64, lora=8, dropout=0.05,
    ),
    Case(
        "qwen2 37M, eager attention, long rows", kind="qwen2", V=65_536, H=448, I=1344, layers=4, heads=7, kv=1, d=64,
        P=100, L=412, attention="eager", questions=1, budget=1024,
    ),
    Case(
        "mistral 37M, untied, frozen teacher, SGD", kind="mistral", V=40_000, H=384, I=1152, layers=4, heads=6, d=64,
        tied=False, teacher="frozen", optimizer="sgd",
    ),
    Case("qwen3 21M, GRPO", objective="grpo"),
    Case(
        "qwen3 6M, 24 layers, long teacher prompts", V=6_000, H=128, I=384, layers=24, heads=8, kv=8, d=16, P=900, L=60,
        questions=4, group=8, budget=960, lora=8, checkpointing=True,
    ),
    Case(
        "qwen3 11M, rollout", V=30_000, H=192, I=576, layers=12, heads=6, kv=6, P=40, L=160, questions=16, group=8,
        teacher="live", lora=8, checkpointing=True, budget=400, samples=True,
    ),
]  # fmt: skip
# Chosen when the plan and the cases above were done, for what those leave out.
HELD_OUT = [
    Case("llama 29M untied, bf16, no checkpointing", kind="llama", V=32_000, H=320, I=864, layers=6, heads=5, kv=5,
         d=64, tied=False, dtype="bfloat16", autocast=True, budget=768),
    Case("llama 18M untied, largest budget for 500 MiB", kind="llama", V=24_000, H=320, I=864, layers=3, heads=5, kv=5,
         d=64, tied=False, P=16, L=32, questions=16, group=8, memory=500),
    Case("qwen3 40M, one row longer than the budget", H=256, I=768, layers=2, P=30, L=90, budget=100),
    Case("qwen3 13M untied, bf16 without autocast, frozen", V=20_000, H=256, I=768, tied=False, dtype="bfloat16",
         teacher="frozen", layers=5, heads=4, kv=2, d=64, budget=2048),
    Case("llama 8M, long rows, small vocabulary", kind="llama", V=5_000, H=256, I=704, layers=8, heads=8, kv=2, d=32,
         P=100, L=924, questions=2, group=2, budget=1024),
    Case("llama 22M, GRPO, LoRA 16, bf16, checkpointing", kind="llama", V=32_000, H=384, I=1024, layers=6, heads=6,
         kv=2, d=64, objective="grpo", lora=16, targets=ALL, dropout=0.05, dtype="bfloat16", autocast=True,
         checkpointing=True, budget=1024),
    Case("llama 22M, GRPO, bf16 autocast, checkpointing", kind="llama", V=32_000, H=384, I=1024, layers=6, heads=6,
         kv=2, d=64, objective="grpo", autocast=True, checkpointing=True, budget=1024),
    Case("qwen3 15M, SDPO, checkpointing, long rows", V=40_000, H=256, I=768, layers=6, heads=4, kv=2, d=64, P=150,
         L=874, group=4, objective="sdpo", autocast=True, checkpointing=True, budget=4096),
    Case("llama 22M untied, LoRA 8, all logits, live", kind="llama", V=24_000, H=320, I=864, layers=6, heads=5, kv=5,
         d=64, tied=False, lora=8, fused=False, teacher="live", autocast=True, budget=1024),
    Case("qwen3 22M, everything in one micro-batch", V=60_000, H=256, I=768, layers=6, heads=4, kv=2, d=64, budget=8192,
         checkpointing=True),
    Case("qwen3 9M, eager attention, bf16, GRPO", V=20_000, H=256, I=768, layers=4, heads=8, kv=2, d=32, P=56, L=200,
         objective="grpo", attention="eager", dtype="bfloat16", autocast=True, budget=1024),
    Case("llama 3M, 16 layers, long prompts, rollout", kind="llama", V=3_000, H=128, I=352, layers=16, heads=8, kv=8,
         d=16, P=500, L=60, questions=2, group=8, budget=560, objective="grpo", checkpointing=True, samples=True),
]  # fmt: skip
# The shape of SmolLM2-135M, as `make lm` trains it: siblings share a row, as on any CPU.
CASES += [
    Case("SmolLM2 135M, siblings joined", kind="llama", V=49_152, H=576, I=1536, layers=30, heads=9, kv=3, d=64, P=60,
         L=12, questions=4, group=8, budget=16_384, joined=True),
    Case("SmolLM2 135M, joined, LoRA 8, bf16, checkpointing", kind="llama", V=49_152, H=576, I=1536, layers=30,
         heads=9, kv=3, d=64, P=60, L=12, questions=4, group=8, budget=16_384, joined=True, lora=8, dropout=0.05,
         dtype="bfloat16", autocast=True, checkpointing=True),
    Case("qwen3 21M, siblings joined", questions=2, group=4, L=48, budget=1024, joined=True),
]  # fmt: skip
# Measured trust: the step is the peak where little else is held, as with long rows in small micro-batches.
CASES += [
    Case("qwen3 21M, trust undo, checkpointing", trust="undo", checkpointing=True, budget=512),
    Case("qwen3 21M, trust lagged, checkpointing", trust="lagged", checkpointing=True, budget=512),
    Case("llama 47M untied, trust undo, probe at the peak", kind="llama", V=40_000, H=512, I=1408, layers=2, heads=8,
         kv=4, d=64, tied=False, trust="undo", checkpointing=True, questions=8, group=2, budget=256),
    Case("qwen3 29M, trust undo, LoRA 8", V=50_000, H=320, I=960, layers=10, heads=5, kv=1, d=64, lora=8, dropout=0.05,
         trust="undo"),
    Case("llama 29M, trust lagged, bf16", kind="llama", V=32_000, H=320, I=864, layers=6, heads=5, kv=5, d=64,
         trust="lagged", dtype="bfloat16", autocast=True, checkpointing=True, budget=768),
]  # fmt: skip
ALL_CASES = CASES + [replace(case, held_out=True) for case in HELD_OUT]


# One run ------------------------------------------------------------------------------------------------------------


def _config(case: Case) -> Any:
    import transformers

    names = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama", "mistral": "Mistral"}
    shape = dict(
        vocab_size=case.V, hidden_size=case.H, intermediate_size=case.I, num_hidden_layers=case.layers,
        num_attention_heads=case.heads, num_key_value_heads=case.kv, max_position_embeddings=4096,
        tie_word_embeddings=case.tied, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        attn_implementation=case.attention,
    )  # fmt: skip
    if case.kind != "qwen2":
        shape["head_dim"] = case.d
    if case.kind == "mistral":
        shape["sliding_window"] = None
    return getattr(transformers, f"{names[case.kind]}Config")(**shape)


def _model(case: Case) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(case.device):
        return AutoModelForCausalLM.from_config(_config(case), dtype=getattr(torch, case.dtype))


def _tokenizer(words: int) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(words - 2))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def _trainer(case: Case, folder: str) -> Any:
    from datasets import Dataset

    from pgpo import PGPOConfig, PGPOTrainer

    tokenizer = _tokenizer(case.V if case.samples else 100)
    questions = [" ".join(f"w{(i * 7 + j) % 90}" for j in range(case.P - i % 2)) for i in range(4 * case.questions)]

    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        completions = [[2 + (i * 5 + j * 3) % 90 for j in range(case.L - 1 - i % 2)] + [1] for i in range(len(prompts))]
        return {
            "prompt_ids": [trainer.render(p) for p in prompts],
            "completion_ids": completions,
            "logprobs": [[0.0] * len(c) for c in completions],
        }

    def reward(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        return [float(i % 2 == 0) for i in range(len(prompts))]

    peft_config = None
    if case.lora is not None:
        from peft import LoraConfig

        peft_config = LoraConfig(
            r=case.lora, target_modules=list(case.targets), lora_dropout=case.dropout, task_type="CAUSAL_LM"
        )
    config = PGPOConfig(
        output_dir=folder, objective=case.objective, teacher=case.teacher, prompts_per_step=case.questions,
        num_generations=case.group, max_completion_length=case.L, max_prompt_length=case.P,
        max_tokens_per_microbatch=case.budget, join_siblings=case.joined,
        fused_head=case.fused, bf16=case.autocast,
        gradient_checkpointing=case.checkpointing, optim="sgd" if case.optimizer == "sgd" else "adamw_torch_fused",
        max_steps=2, warmup_steps=0, save_strategy="no", use_cpu=case.device == "cpu", disable_tqdm=True,
        shuffle_dataset=False, report_to="none", logging_steps=10, dataloader_pin_memory=False,
        trust="off" if case.trust == "off" else "measured", trust_form="undo" if case.trust == "off" else case.trust,
        generation_kwargs={"min_new_tokens": case.L} if case.samples else None,
    )  # fmt: skip
    return PGPOTrainer(
        _model(case), reward, config, Dataset.from_list([{"prompt": q} for q in questions]),
        processing_class=tokenizer, rollout_func=None if case.samples else rollout, peft_config=peft_config,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[str]:
    """A folder, and nothing on the terminal."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield folder


def _watch(trainer: Any, spans: list[tuple[str, int, int]], before_rollout: Any = None) -> None:
    """Note when the moments of a step begin and end, in nanoseconds."""

    def wrap(holder: Any, name: str, moment: str) -> None:
        plain = getattr(holder, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if moment == "rollout" and before_rollout is not None:
                before_rollout()
            start = time.time_ns()
            try:
                return plain(*args, **kwargs)
            finally:
                spans.append((moment, start, time.time_ns()))

        setattr(holder, name, timed)

    wrap(trainer, "_prepare_inputs", "rollout")
    if trainer.distills:
        wrap(trainer.distillation.forwards, "teacher_states", "teacher")
        wrap(trainer.distillation, "_loss", "loss")
    wrap(trainer, "grpo_loss", "loss")
    wrap(trainer, "grpo_scores", "loss")
    wrap(trainer.accelerator, "backward", "backward")


def allocated(case: Case) -> dict[str, float]:
    """Peak bytes of torch's CPU allocator in the second step, and in each moment of it."""
    from torch.profiler import ProfilerActivity, profile

    spans: list[tuple[str, int, int]] = []
    gc.collect()  # what is freed later would count as negative
    with _quiet() as folder, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        trainer = _trainer(case, folder)
        _watch(trainer, spans)
        trainer.train()
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    times, curve, total = [], [], 0
    for when, size in changes:
        total += size
        times.append(when)
        curve.append(total)

    def highest(start: int, end: int) -> float:
        first, last = bisect.bisect_left(times, start), bisect.bisect_right(times, end)
        return float(max(curve[max(first - 1, 0) : last]))

    second = [start for moment, start, _ in spans if moment == "rollout"][1]
    peaks: dict[str, float] = {"peak": highest(second, times[-1])}
    for moment, start, end in spans:
        if start >= second:
            peaks[moment] = max(peaks.get(moment, 0.0), highest(start, end))
    return peaks


def resident(case: Case) -> dict[str, float]:
    """VmHWM of the second step less VmRSS before the model is made, in bytes."""
    small = Case("warm", case.kind, case.V, 32, 64, 1, 2, 1, 16, P=4, L=6, budget=64, dtype=case.dtype,
                 autocast=case.autocast, objective=case.objective, fused=case.fused)  # fmt: skip
    with _quiet() as folder:
        _trainer(small, folder).train()
        gc.collect()
        before = _kilobytes("VmRSS")

        def forget() -> None:
            Path("/proc/self/clear_refs").write_text("5")

        trainer = _trainer(case, folder)
        _watch(trainer, [], forget)
        trainer.train()
        return {"peak": (_kilobytes("VmHWM") - before) * 1024.0}


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


# Comparison ---------------------------------------------------------------------------------------------------------


def _planned(case: Case) -> tuple[Any, Any]:
    """ModelShape and Setting of a case."""
    from pgpo.memory.shapes import TrainingSetting, read_model

    with tempfile.TemporaryDirectory() as folder:
        _config(case).save_pretrained(folder)
        model = read_model(folder)
    setting = TrainingSetting(
        max_completion_length=case.L, max_prompt_length=case.P, teacher_prompt_length=case.P + case.L + 6,
        prompts_per_step=case.questions, num_generations=case.group, objective=case.objective, teacher=case.teacher,
        lora=case.lora, lora_targets=case.targets, lora_dropout=case.dropout > 0,
        parameter_bytes=4 if case.dtype == "float32" else 2, autocast=case.autocast, optimizer=case.optimizer,
        fused_head=case.fused, gradient_checkpointing=case.checkpointing, attention=case.attention,
        join_siblings=case.joined, device=case.device,
        trust="off" if case.trust == "off" else "measured", trust_form="undo" if case.trust == "off" else case.trust,
    )  # fmt: skip
    return model, setting


def with_budget(case: Case) -> Case:
    """The case with its token budget, where that follows from a memory."""
    from pgpo.memory.command import largest_budget
    from pgpo.memory.moments import PROCESS

    if case.memory is None:
        return case
    budget = largest_budget(*_planned(case), case.memory * MIB + PROCESS)
    if budget is None:
        raise RuntimeError(f"{case.name}: not even one row fits")
    return replace(case, budget=budget)


def predicted(case: Case) -> dict[str, float]:
    """What `pgpo plan` says of the case, in bytes, without the process itself, which no allocator sees. Where the
    rollout is given, nothing is generated, and the planned generation is left out."""
    from pgpo.memory.moments import Step

    moments = Step(*_planned(case), case.budget).moments()
    sums = {
        name: sum(size for item, size in items.items() if item != "process")
        for name, items in moments.items()
        if name != "rollout" or case.samples
    }
    return {"peak": max(sums.values()), **sums}


def _in_process(case: Case, what: str) -> dict[str, float]:
    environment = {**os.environ, **MEMORY}
    words = [sys.executable, __file__, "--one", case.name, "--measure", what]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measured(case: Case) -> dict[str, dict[str, float]]:
    """Bytes, each way of measuring in a process of its own."""
    ways = ("allocated", "resident")
    with ThreadPoolExecutor(len(ways)) as pool:  # each thread waits for its process
        return dict(zip(ways, pool.map(partial(_in_process, case), ways), strict=True))


def compare(case: Case, found: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Predicted over measured, kept and printed; `case` with its budget."""
    plan, torch_, system = predicted(case), found["allocated"], found["resident"]
    ratio = plan["peak"] / torch_["peak"]
    line = {
        "case": asdict(case),
        "predicted_mib": {k: round(v / MIB, 2) for k, v in plan.items()},
        "allocated_mib": {k: round(v / MIB, 2) for k, v in torch_.items()},
        "resident_mib": round(system["peak"] / MIB, 2),
        "predicted_over_allocated": round(ratio, 4),
        "predicted_over_resident": round(plan["peak"] / system["peak"], 4),
        "within_limit": abs(ratio - 1) <= LIMIT,
    }
    print(
        f"{case.name:52s} predicted {plan['peak'] / MIB:7.0f} MiB, allocated {torch_['peak'] / MIB:7.0f} "
        f"({ratio:.3f}), resident {system['peak'] / MIB:7.0f} ({line['predicted_over_resident']:.3f})"
        f"{'' if line['within_limit'] else '  MISS'}",
        flush=True,
    )
    return line


def keep(lines: list[dict[str, Any]]) -> None:
    """Write the results file."""
    from paired import _cpu

    from pgpo.provenance import environment

    document = {
        "question": "peak of a training step: pgpo plan / torch's CPU allocator",
        "limit": LIMIT,
        "reached": all(line["within_limit"] for line in lines),
        "ratio_min": min(line["predicted_over_allocated"] for line in lines),
        "ratio_max": max(line["predicted_over_allocated"] for line in lines),
        "cases": lines,
        "machine": {**environment(), "cpu": _cpu(), "system": platform.platform()},
    }
    (RESULTS / "plan_accuracy.json").write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", help="part of the names of the cases to run; nothing is written then")
    parser.add_argument("--one", help="measure one case here (used by this script)")
    parser.add_argument("--measure", choices=("allocated", "resident"))
    arguments = parser.parse_args()
    if arguments.one:
        case = with_budget(next(c for c in ALL_CASES if c.name == arguments.one))
        result = {"allocated": allocated, "resident": resident}[arguments.measure](case)
        print(json.dumps(result))
        return
    cases = [with_budget(case) for case in ALL_CASES if arguments.only is None or arguments.only in case.name]
    lines = [compare(case, measured(case)) for case in cases]
    missed = [line for line in lines if not line["within_limit"]]
    print(f"{len(lines) - len(missed)} of {len(lines)} within {LIMIT:.0%} of what torch allocated")
    if arguments.only is None:
        keep(lines)


if __name__ == "__main__":
    main()
