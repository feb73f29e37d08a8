"""All that waits for a GPU, in one command of nine minutes at most: `make gpu-day`, or, without a virtual environment,

    PYTHONPATH=src python3 benchmarks/gpu_day.py [--out FOLDER] [--only PART ...]
    PYTHONPATH=src python3 benchmarks/gpu_day.py --rehearse       every part on a CPU, with tiny sizes

What is worth most comes first. Each part is a process of its own with a limit of its own; what it has found is in
FOLDER/PART.json from the moment it is found, and what it printed in FOLDER/PART.log. A part that fails or takes too
long is recorded as such, and the next one starts; the exit status is then 1. A missed aim is no failure: its JSON says
"reached": false. Nothing is downloaded: models have random weights.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from pgpo.errors import UserError
from pgpo.provenance import environment

GIB = 2**30
MINUTES = 9.0
LEAST = 15.0  # seconds; with fewer left, no part is started
ENOUGH = 1800.0  # seconds, the limit of a rehearsed part: it must end, and the machine may be busy


class Day:
    """What a part is given, and where it writes.

    Attributes:
        rehearse: tiny sizes, on a CPU.
    """

    def __init__(self, path: Path, rehearse: bool, limit: float) -> None:
        self.path, self.rehearse = path, rehearse
        self._end = time.monotonic() + limit
        self._limit = limit
        self.device = torch.device("cpu" if rehearse else "cuda")
        self.found: dict[str, Any] = {}
        self.aims: dict[str, Any] = {}

    def add(self, name: str, value: Any) -> None:
        """Record a finding now."""
        self.found[name] = value
        self.write("running")

    def aim(self, name: str, value: float, most: float | None = None, least: float | None = None) -> None:
        """Record a finding that has an aim, which a rehearsal says nothing of."""
        reached = None if self.rehearse else (most is None or value <= most) and (least is None or value >= least)
        self.aims[name] = {"value": value, "most": most, "least": least, "reached": reached}
        self.write("running")

    def write(self, status: str, **more: Any) -> None:
        save(self.path, {"status": status, **more, "aims": self.aims, "found": self.found})

    def seconds(self, function: Callable[[], Any], repeats: int = 7) -> tuple[float, float]:
        """(median, first) wall seconds of a call; the first one compiles and is not in the median."""
        every = []
        for _ in range(1 + (1 if self.rehearse else repeats)):
            self.settle()
            start = time.perf_counter()
            function()
            self.settle()
            every.append(time.perf_counter() - start)
        return statistics.median(every[1:]), every[0]

    def spent(self) -> float:
        """Share of the part's limit."""
        return 1 - (self._end - time.monotonic()) / self._limit

    def settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak(self, function: Callable[[], Any]) -> float | None:
        """GiB that torch allocates at most during a call, besides what is there before; None on a CPU."""
        if self.device.type != "cuda":
            function()
            return None
        self.settle()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        self.settle()
        return (torch.cuda.max_memory_allocated() - before) / GIB


def save(path: Path, document: dict[str, Any]) -> None:
    """As a whole or not at all: a part may be killed at any moment."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    new.replace(path)


def gap(a: Tensor, b: Tensor) -> float:
    """|a - b| / |b|, in fp64."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


# Parts --------------------------------------------------------------------------------------------------------------

# pytest's -k, in turn: each compiles dozens of kernels.
FIRST_TESTS = ("whole_head_on_a_gpu", "nan_on_a_gpu", "kernels_on_a_gpu and bfloat16", "31_logits_on_a_gpu")


def kernels(day: Day) -> None:
    """The Triton kernels against the functions that define them, values and gradients: bf16, nan, 2^31 logits."""
    _gpu_tests(day, *FIRST_TESTS)


def kernels_rest(day: Day) -> None:
    """The same in the other dtypes."""
    _gpu_tests(day, "on_a_gpu" + "".join(f" and not ({words})" for words in FIRST_TESTS))


def _gpu_tests(day: Day, *selections: str) -> None:
    """Raises AssertionError, when all have run, if one of them has not passed."""
    import pytest

    class Recorder:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or report.outcome != "passed":
                text = "" if report.passed else str(report.longrepr)[-3000:]
                outcome = {"outcome": report.outcome, "seconds": report.duration, "text": text}
                day.add(report.nodeid.split("::")[-1], outcome)

    file = ROOT / "tests/unit/test_triton_kernels.py"
    words = ["-o", "addopts=", "-p", "no:cacheprovider", "--rootdir", str(ROOT), "-q", str(file)]
    failures = [k for k in selections if pytest.main([*words, "-k", k], plugins=[Recorder()]) != pytest.ExitCode.OK]
    outcomes = [test["outcome"] for test in day.found.values()]
    wanted = "skipped" if day.rehearse else "passed"
    if failures or set(outcomes) != {wanted}:
        counts = {outcome: outcomes.count(outcome) for outcome in sorted(set(outcomes))}
        raise AssertionError(f"not all tests have {wanted}: {counts}; pytest failed at {failures}")


def packing(day: Day) -> None:
    """Packed rows by flex and flash attention against padded rows by sdpa in fp32: hidden states and gradients."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from pgpo.forward.open_model import open_forward
    from pgpo.forward.passes import Passes

    wide, layers = (32, 2) if day.rehearse else (256, 4)
    config = Qwen3Config(
        vocab_size=512, hidden_size=wide, intermediate_size=3 * wide, num_hidden_layers=layers, head_dim=wide // 4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, initializer_range=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    plain = Qwen3ForCausalLM(config).to(day.device)
    lengths = [(3, 5), (7, 2), (4, 9)] if day.rehearse else [(100, 150), (311, 64), (17, 500), (200, 1)]
    prompts, completions = ([torch.randint(2, 512, (pair[which],)).tolist() for pair in lengths] for which in (0, 1))
    direction = torch.randn(sum(map(len, completions)), wide).to(day.device)

    def states(attention: str, dtype: torch.dtype, pack: bool) -> tuple[Tensor, Tensor]:
        """Hidden states of the completions, and the gradient of their sum along `direction`."""
        model = Qwen3ForCausalLM(config).to(day.device)
        model.load_state_dict(plain.state_dict())
        model.to(dtype).set_attn_implementation(attention)
        open_forward(model)
        passes = Passes(model, 0, day.device, pack)
        hidden = passes.forward(model, prompts, completions, lambda hidden, head: hidden)
        (hidden.float() * direction).sum().backward()
        gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
        return hidden.detach(), torch.cat(gradients)

    exact, exact_slope = states("sdpa", torch.float32, pack=False)
    dtype = torch.float32 if day.rehearse else torch.bfloat16
    ways = [("sdpa", False), ("sdpa", True), ("flex_attention", True), ("flash_attention_2", True)]
    if day.rehearse:  # flex has no backward on a CPU, and compiles for a minute; its values: tests/unit/test_passes.py
        ways.remove(("flex_attention", True))
    errors: dict[str, tuple[float, float]] = {}
    failed = []
    for attention, pack in ways:
        name = f"{attention}, {'packed' if pack else 'padded'}"
        try:
            hidden, slope = states(attention, dtype, pack)
        except ImportError as error:
            day.add(name, f"not installed: {str(error).splitlines()[0]}")
            continue
        except Exception:  # the other one may work
            failed.append(name)
            day.add(name, traceback.format_exc()[-3000:])
            continue
        errors[name] = gap(hidden, exact), gap(slope, exact_slope)
        day.add(name, dict(zip(("hidden", "gradient"), errors[name], strict=True)))
    # Rows that saw one another would differ by the size of the states; bf16's own rounding is what padded sdpa shows.
    own = errors["sdpa, padded"]
    far = [name for name, pair in errors.items() if any(e > 3 * o + 1e-5 for e, o in zip(pair, own, strict=True))]
    if failed or far:
        raise AssertionError(f"failed: {failed}; too far from fp32: {far}")


def precision(day: Day) -> None:
    """Autocast in bf16 and fp16, and the gradient scaler with a multiplier: the head, and the trainer."""
    from pgpo.core import dense_distillation_head, fused_distillation_head, modulate

    rows, hidden, vocabulary = (24, 16, 97) if day.rehearse else (1000, 512, 50_021)
    torch.manual_seed(0)
    student = torch.nn.Linear(hidden, vocabulary, bias=False, device=day.device)
    teacher = torch.nn.Linear(hidden, vocabulary, bias=False, device=day.device)
    torch.nn.init.normal_(student.weight, std=2 / hidden**0.5)
    teacher.weight.data.copy_(student.weight + 0.3 * torch.randn_like(student.weight) / hidden**0.5)
    h = torch.randn(rows, hidden, device=day.device, requires_grad=True)
    labels = torch.randint(vocabulary, (rows,), device=day.device)
    share = torch.full((rows,), 1 / rows, device=day.device)

    def loss(head: Callable[..., Any]) -> Tensor:
        out = head(h, student.weight, h.detach(), teacher.weight.detach(), labels, share)
        return out.loss

    def gradients(scale: float = 1.0) -> list[Tensor]:
        assert h.grad is not None and student.weight.grad is not None
        return [h.grad.clone() / scale, student.weight.grad.clone() / scale]

    loss(dense_distillation_head).backward()
    exact = gradients()
    for dtype in (torch.bfloat16, torch.float16):
        for scale in (1.0, 2.0**12):
            h.grad = student.weight.grad = None
            with torch.autocast(day.device.type, dtype):
                value = loss(fused_distillation_head)
            (value * scale).backward()
            errors = [gap(x, y) for x, y in zip(gradients(scale), exact, strict=True)]
            day.add(f"autocast {dtype}, loss times {scale:g}", {"gradients": errors})
            # fp16 without a scale loses small gradients: told, not judged
            if dtype == torch.bfloat16 or scale > 1:
                assert max(errors) < 0.1, errors

    optimizer = torch.optim.AdamW([student.weight], lr=1e-3)
    handle = modulate(optimizer)
    scaler = torch.amp.GradScaler(day.device.type, init_scale=2.0**12)
    moved: list[float] = []
    for factor in (1.0, math.inf, 1.0):
        before = student.weight.detach().clone()
        optimizer.zero_grad()
        h.grad = None
        with torch.autocast(day.device.type, torch.float16):
            value = loss(fused_distillation_head)
        scaler.scale(value * factor).backward()
        handle.arm(1.5)
        scaler.step(optimizer)
        scaler.update()
        moved.append(float((student.weight.detach() - before).norm()))
    day.add("gradient scaler: how far three steps moved, the second one overflows", moved)
    assert moved[0] > 0 and moved[1] == 0 and moved[2] > 0, moved
    assert optimizer.param_groups[0]["lr"] == 1e-3

    from one_step import Steps, quiet

    for name in ("bf16",) if day.rehearse else ("bf16", "fp16"):
        with quiet() as folder:
            steps = Steps("ours", _small(), day.device, folder, precision=name)
            found = steps(2)
            logs = [log for log in steps.trainer.state.log_history if "divergence" in log]
        day.add(f"trainer, {name}", {"divergence": logs[-1]["divergence"], "seconds": found[-1]["seconds"]})
        assert math.isfinite(logs[-1]["divergence"]) and len(found) == 2


def _small() -> Any:
    from one_step import Shape, Work

    return Work(Shape(32, 64, 2, 4, 2, 8), 128, completions=8, group=4, longest=12, prompt=10)


def _matmul_rate(day: Day, n: int, dtype: torch.dtype) -> float:
    """FLOP per second of a product of two random n x n matrices."""
    a, b = (torch.randn(n, n, device=day.device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / day.seconds(lambda: a @ b, 20)[0]


def head(day: Day) -> None:
    """The fused head at Qwen3-8B's sizes, eager, compiled and by Triton: its share of the matmul rate measured here."""
    from pgpo.core import _head_kernels, dense_distillation_head, fused_distillation_head

    tokens, hidden, vocabulary, cube = (24, 16, 97, 32) if day.rehearse else (8192, 4096, 151_936, 8192)
    dtype = torch.float32 if day.rehearse else torch.bfloat16  # a CPU rounds bf16 logits, a GPU does not
    rate = _matmul_rate(day, cube, dtype)
    day.add("matmul rate, TFLOP/s", rate / 1e12)

    torch.manual_seed(0)
    weight = torch.randn(vocabulary, hidden, device=day.device, dtype=dtype) * (2 / hidden**0.5)
    labels = torch.randint(vocabulary, (tokens,), device=day.device)
    states = torch.randn(tokens, hidden, device=day.device) + 4 * weight[labels]
    student = states.to(dtype).requires_grad_()
    teacher = (states + 0.2 * torch.randn_like(states)).to(dtype)
    weight.requires_grad_()
    share = torch.full((tokens,), 1 / tokens, device=day.device)
    flops = 8 * tokens * vocabulary * hidden

    def call(compiled: bool | None, rows: slice = slice(None)) -> Any:
        student.grad = weight.grad = None
        out = fused_distillation_head(
            student[rows], weight, teacher[rows], weight.detach(), labels[rows], share[rows], compiled=compiled
        )
        out.loss.backward()  # type: ignore[union-attr]
        return out

    few = slice(0, 16 if day.rehearse else 256)
    wide_states = student[few].detach().float().requires_grad_()
    wide_weight = weight.detach().float().requires_grad_()
    true = dense_distillation_head(
        wide_states, wide_weight, teacher[few].float(), wide_weight.detach(), labels[few], share[few]
    )
    true.loss.backward()  # type: ignore[union-attr]

    ways: dict[str, bool | None] = {"eager": False}
    if not day.rehearse:
        ways |= {"compiled": True, "triton": None}
    best = math.inf
    for name, compiled in ways.items():
        os.environ["PGPO_TRITON"] = "1" if name == "triton" else "0"
        if name == "triton" and not _head_kernels._has_triton(day.device):
            day.add(name, "Triton is not installed")
            continue
        try:
            out = call(compiled, few)
            errors = {
                "divergence": gap(out.divergence, true.divergence),
                "entropy": gap(out.student_entropy, true.student_entropy),
                "d hidden": gap(student.grad[few], wide_states.grad),
                "d weight": gap(weight.grad, wide_weight.grad),
            }
            seconds, first = day.seconds(lambda c=compiled: call(c))  # type: ignore[misc]
            student.grad = weight.grad = None  # else what they hold is no part of the peak
            peak = day.peak(lambda c=compiled: call(c))  # type: ignore[misc]
        except Exception:
            day.add(name, traceback.format_exc()[-3000:])
            if name == "eager":
                raise
            continue
        gone = sorted(_head_kernels._failed)
        rates = {"seconds": seconds, "first call": first, "share of the matmul rate": flops / seconds / rate}
        day.add(name, {**rates, "peak GiB": peak, "errors to fp32": errors, "ways given up": gone})
        if max(errors.values()) > 0.02:  # ours: bf16 gradients of logits are good to 0.004
            raise AssertionError(f"{name}: {errors}")
        if not gone:
            best = min(best, seconds)
    day.aim("share of the matmul rate", flops / best / rate, least=0.70)
    del true, wide_states, wide_weight
    day.add("TRL's SDPO loss on full logits", _trl_loss(day, student, teacher, weight, labels))


def _trl_loss(day: Day, student: Tensor, teacher: Tensor, weight: Tensor, labels: Tensor) -> Any:
    """Seconds and GiB of what SDPOTrainer computes of the same states, with both entropies; or why there are none."""
    try:
        from trl.experimental.sdpo.loss_utils import compute_full_logit_self_distillation_loss
        from trl.trainer.utils import entropy_from_logits, selective_log_softmax
    except ImportError as error:
        return f"not installed: {error}"

    def call(rows: slice) -> None:
        student.grad = weight.grad = None
        zs = (student[rows] @ weight.t()).float()
        with torch.no_grad():
            zt = (teacher[rows] @ weight.t()).float()
        loss = compute_full_logit_self_distillation_loss(zs, zt, distillation_alpha=0.5).mean()
        selective_log_softmax(zs, labels[rows])
        with torch.no_grad():
            entropy_from_logits(zs), entropy_from_logits(zt)
        loss.backward()

    tokens = len(labels)
    while tokens:
        rows = slice(0, tokens)
        try:
            seconds, _ = day.seconds(lambda r=rows: call(r), 3)  # type: ignore[misc]
            return {"tokens": tokens, "seconds": seconds, "peak GiB": day.peak(lambda r=rows: call(r))}  # type: ignore[misc]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tokens //= 2
    return "does not fit at all"


def update_8b(day: Day) -> None:
    """An update of a model of Qwen3-8B's shape, all weights in bf16, at 8,192 tokens: does it fit, as planned?"""
    import plan_accuracy as plans

    case = plans.Case(
        "8B", H=4096, I=12_288, layers=36, heads=32, kv=8, d=128, tied=False, P=512, L=512, questions=1, group=8,
        budget=8192, dtype="bfloat16", autocast=True, checkpointing=True, device=day.device.type,
    )  # fmt: skip
    if day.rehearse:
        case = replace(case, V=2000, H=64, I=128, layers=2, heads=4, kv=2, d=16, P=16, L=24, group=4, budget=160)
    else:
        room = torch.cuda.mem_get_info()[0]
        day.add("free GiB", room / GIB)
        for teacher in ("ema", "frozen", "live"):  # the first that the plan lets in
            case = replace(case, teacher=teacher)
            if plans.predicted(case)["peak"] < 0.97 * room:
                break
    planned = plans.predicted(case)
    day.add("teacher", case.teacher)
    day.add("planned GiB", {name: value / GIB for name, value in planned.items()})
    if day.rehearse:
        found = plans.allocated(case)["peak"]
    else:
        with plans._quiet() as folder:
            start = time.perf_counter()
            trainer = plans._trainer(case, folder)
            trainer.args.logging_steps, trainer.args.max_steps = 1, 3
            day.settle()
            day.add("seconds to build", time.perf_counter() - start)
            trainer.train()
            found = torch.cuda.max_memory_allocated()
            logs = [log for log in trainer.state.log_history if "update_seconds" in log]
        tokens = case.group * case.questions * (case.P + case.L)
        day.add("reserved GiB", torch.cuda.max_memory_reserved() / GIB)
        day.add("update seconds, per step", [log["update_seconds"] for log in logs])
        day.add("update tokens per second", tokens / logs[-1]["update_seconds"])
    day.add("peak GiB", found / GIB)
    day.aim("plan over measured, apart from 1", abs(planned["peak"] / found - 1), most=0.15)


def whole_step(day: Day) -> None:
    """A step with sampling of a model of SmolLM2-135M's shape, 4 x 8 completions of at most 64 tokens: ours, TRL's."""
    from one_step import SIDES, SMOLLM2_135M, SMOLLM2_VOCABULARY, Steps, Work, quiet

    work = _small() if day.rehearse else Work(SMOLLM2_135M, SMOLLM2_VOCABULARY, completions=32, prompt=120)
    every: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with quiet() as folder:
        precision = None if day.rehearse else "bf16"
        sides = {side: Steps(side, work, day.device, folder, precision=precision) for side in SIDES}
        for steps in sides.values():
            steps(1 if day.rehearse else 2)  # compiles
        for i in range(1 if day.rehearse else 9):
            if i and day.spent() > 0.85:
                break
            for side in SIDES if i % 2 == 0 else SIDES[::-1]:
                every[side] += sides[side](1)
            for side, found in every.items():
                names = found[0]["seconds"]
                day.add(
                    side,
                    {
                        "steps": len(found),
                        "seconds": {n: statistics.median(step["seconds"][n] for step in found) for n in names},
                        "peak GiB": {n: step["peak"][n] / GIB for step in found[-1:] for n in step["peak"]},
                        "tokens": statistics.mean(step["tokens"] for step in found),
                    },
                )
            pairs = zip(*([step["seconds"]["step"] for step in every[side]] for side in SIDES), strict=True)
            ratios = [a / b for a, b in pairs]
            day.add("ratios", ratios)
            day.aim("whole step, ours / TRL's", statistics.median(ratios), most=0.45)


def sampling(day: Day) -> None:
    """The sampler over generate() and over paged generation: 8 x 8 completions (log-normal) behind prompts of 200."""
    import numpy as np
    import sampler
    from one_step import SMOLLM2_135M, SMOLLM2_VOCABULARY, Work, quiet, random_model

    work = Work(SMOLLM2_135M, SMOLLM2_VOCABULARY, longest=128)
    work = _small() if day.rehearse else work
    groups, length = (2, 12) if day.rehearse else (8, 200)
    with quiet() as folder:
        model = random_model(work, day.device, folder).eval()
    rng = np.random.default_rng(1)
    questions = [rng.integers(2, work.vocabulary, int(n)).tolist() for n in rng.integers(length, length + 9, groups)]
    prompts = [question for question in questions for _ in range(work.group)]
    pad, eos = sampler.PAD, sampler.EOS

    def case(**options: Any) -> sampler.Case:
        return sampler.Case(model, prompts, sampler.config(work.longest, **options))

    greedy = case(eos_token_id=eos)
    greedy.config.do_sample = False
    ours, theirs = greedy.ours(), greedy.generate()[:, max(map(len, prompts)) :].tolist()
    equal = [row == other[: len(row)] and set(other[len(row) :]) <= {pad} for row, other in zip(ours, theirs)]
    day.add("greedy, fp32: share of completions that equal generate()'s", statistics.mean(equal))
    assert statistics.mean(equal) > 0.5, equal  # a tie may fall either way where rounding differs

    if not day.rehearse:
        model.to(torch.bfloat16)
    drawn = case(eos_token_id=eos)
    ratios = []
    for i in range(2 if day.rehearse else 8):
        if i > 1 and day.spent() > 0.6:
            break
        pair = [(0, drawn.ours), (1, drawn.generate)]
        seconds = [0.0, 0.0]
        for which, call in pair if i % 2 else pair[::-1]:
            day.settle()
            start = time.perf_counter()
            call()
            day.settle()
            seconds[which] = time.perf_counter() - start
        if i:  # the first one warms up
            ratios.append(seconds[0] / seconds[1])
            day.add("seconds, the last pair", seconds)
            day.add("ratios", ratios)
            day.aim("sampler / generate()", statistics.median(ratios), most=0.5)
    if day.rehearse:
        return  # on a CPU paged generation takes minutes
    del model._get_logits_processor  # paged generation takes none of ours: all completions have the same length
    even = case(eos_token_id=None)
    even.config.max_new_tokens = work.longest // 2
    for name, function in (("paged", even.paged), ("sampler, same lengths", even.ours)):
        try:
            day.add(f"seconds, {name}", day.seconds(function, 3)[0])
        except Exception:
            day.add(f"seconds, {name}", traceback.format_exc()[-2000:])


# All parts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    run: Callable[[Day], None]
    seconds: float  # its limit


PARTS = {
    "kernels": Part(kernels, 110),
    "packing": Part(packing, 50),
    "precision": Part(precision, 45),
    "head": Part(head, 85),
    "update_8b": Part(update_8b, 95),
    "whole_step": Part(whole_step, 75),
    "sampling": Part(sampling, 60),
    "kernels_rest": Part(kernels_rest, 90),
}


def _in_child(part: Part, path: Path, rehearse: bool, limit: float) -> None:
    """A part in this process, which leads a group of its own so that it can be ended with all that it started."""
    os.setsid()
    log = os.open(path.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1), os.dup2(log, 2)
    os.chdir(ROOT)
    sys.path[:0] = [str(Path(__file__).parent), str(ROOT)]  # the other benchmarks; tests/ as a package
    if rehearse:
        torch.set_num_threads(1)
    day = Day(path, rehearse, limit)
    day.write("running")
    try:
        part.run(day)
    except BaseException:
        traceback.print_exc()
        day.write("failed", error=traceback.format_exc()[-4000:])
        os._exit(1)  # whatever else runs in this process
    day.write("done")
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(0)


def run(parts: dict[str, Part], folder: Path, rehearse: bool, minutes: float) -> bool:
    """All parts in turn; whether all are done. FOLDER/PART.json says of each what became of it."""
    # A fresh process per part where there is a GPU (CUDA does not survive a fork); a rehearsal imports once.
    context: Any = multiprocessing.get_context("fork" if rehearse else "spawn")
    until = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    machine = {**environment(), "device": "cpu" if rehearse else _gpu()}
    all_done = True
    for name, part in parts.items():
        path = folder / f"{name}.json"
        path.unlink(missing_ok=True)
        left = until - time.monotonic()
        limit = min(part.seconds, left)
        start = time.monotonic()
        document: dict[str, Any] = {"status": "left out", "error": f"{left:.0f} s were left"}
        if left >= LEAST:
            process = context.Process(target=_in_child, args=(part, path, rehearse, limit))
            process.start()
            process.join(limit)
            late = process.is_alive()
            if late:
                _end(process)
            document = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
            if late:
                document |= {"status": "timed out", "error": f"not done after {limit:.0f} s; what it found is here"}
            elif document.get("status") not in ("done", "failed"):
                document |= {"status": "failed", "error": f"died with exit status {process.exitcode}; see {name}.log"}
        took = time.monotonic() - start
        save(path, {"part": name, **document, "seconds": took, "limit": limit, "rehearsed": rehearse, **machine})
        all_done &= document["status"] == "done"
        missed = [aim for aim, value in document.get("aims", {}).items() if value["reached"] is False]
        why = document.get("error", "").strip().splitlines()[-1:]
        words = [*why, *(f"aim missed: {aim} {document['aims'][aim]['value']:.3g}" for aim in missed)]
        print(f"{name}: {document['status']} in {took:.0f} s{''.join(f'; {word}' for word in words)}", flush=True)
    return all_done


def _end(process: Any) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it has no group yet
        process.kill()
    process.join()


def _gpu() -> str:
    """Name, memory and driver, without a CUDA context in this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"


def _need_gpu() -> None:
    # asked in another process: this one keeps no CUDA context beside the parts'
    words = [sys.executable, "-c", "import torch; assert torch.cuda.is_available()"]
    if subprocess.run(words, capture_output=True).returncode:
        raise UserError("torch sees no CUDA GPU here; run this where there is one, or add --rehearse for a CPU.")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all parts together")
    parser.add_argument("--out", type=Path, help="folder of the JSON files (benchmarks/results/gpu-day)")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parent))
    parts = {name: part for name, part in PARTS.items() if arguments.only is None or name in arguments.only}
    folder, minutes = arguments.out, arguments.minutes
    if arguments.rehearse:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        import one_step  # noqa: F401  (once, for all parts)

        parts = {name: replace(part, seconds=ENOUGH) for name, part in parts.items()}
        minutes = math.inf
        folder = folder or Path(tempfile.mkdtemp(prefix="gpu-day-"))
    else:
        _need_gpu()
    folder = (folder or ROOT / "benchmarks/results/gpu-day").resolve()
    done = run(parts, folder, arguments.rehearse, minutes)
    print(f"JSON and logs: {folder}")
    return 0 if done else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
