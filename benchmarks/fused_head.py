"""Time and memory of the fused head, forward and backward, against the paths that it replaces.

    fused_head_over_trl_chunked   TRL's chunked divergence, entropy and log-probability (trl.kernels)
    fused_head_over_trl_sdpo      TRL's SDPO loss on full logits: JSD, importance ratio; plus the two entropies of PGPO
    fused_head_over_matmuls       the four matmuls of the same chunks alone: what nothing can be faster than

A head of H = 1024 and V = 151,936 in bf16, N tokens, JSD with beta 0.5. All make the same numbers: a weighted sum of
the divergences with its gradients for hidden states and weight, both entropies, the student's log-probabilities.
Logits of the full-logits path are cast to fp32, TRL's default under mixed precision. TRL's kernels are made for CUDA;
on a CPU they run their torch fallback, whose matmuls are fp32.

Memory: peak of resident memory during one call minus what was resident before, the weight gradient included, each in a
process of its own in which freed memory goes back to the system.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from paired import RESULTS, measure, report
from torch import Tensor
from trl.experimental.sdpo.loss_utils import (
    apply_importance_sampling_clipping,
    compute_full_logit_self_distillation_loss,
)
from trl.kernels.chunked_divergence import VOCAB_CHUNK_SIZE, ChunkedDivergenceFunction
from trl.kernels.chunked_logprob import ChunkedLogProbFunction
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from pgpo.core import HeadOutput, fused_distillation_head
from pgpo.core._head_chunks import default_chunk_size

TIMING = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "-1",
}  # freed tensors are reused, as with a GPU's allocator
MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # freed tensors go back to the system
HIDDEN, VOCABULARY = 1024, 151_936
CLIP = 2.0


class Case:
    """N tokens of a student and a teacher that differ a little; a few tokens stand out, as in a trained model."""

    def __init__(self, tokens: int) -> None:
        torch.manual_seed(0)
        weight = torch.randn(VOCABULARY, HIDDEN).mul_(2 / HIDDEN**0.5)
        hidden = torch.randn(tokens, HIDDEN)
        self.labels = torch.randint(VOCABULARY, (tokens,))
        hidden += weight[self.labels] * 4  # a logit of about 16 more for the label: entropies of 1 to 2 nats
        self.student_weight = weight.bfloat16().requires_grad_()
        self.teacher_weight = weight.bfloat16()
        del weight
        self.student_hidden = hidden.bfloat16().requires_grad_()
        self.teacher_hidden = (hidden + 0.2 * torch.randn(tokens, HIDDEN)).bfloat16()
        self.mask = torch.ones(tokens)
        self.old_logprobs = torch.full((tokens,), -1.0)

    def clear(self) -> None:
        self.student_hidden.grad = self.student_weight.grad = None

    def ours(self) -> None:
        self.clear()

        def weights(chunk: HeadOutput, rows: slice) -> Tensor:
            assert chunk.student_logprob is not None
            ratio = (chunk.student_logprob - self.old_logprobs[rows]).clamp(-20, 20).exp().clamp(max=CLIP)
            return ratio * self.mask[rows] / len(self.mask)

        out = fused_distillation_head(
            self.student_hidden, self.student_weight, self.teacher_hidden, self.teacher_weight, self.labels, weights
        )
        assert out.loss is not None
        out.loss.backward()

    def trl_chunked(self) -> None:
        self.clear()
        value, _student_entropy = ChunkedDivergenceFunction.apply(
            self.student_hidden, self.student_weight, None, self.teacher_hidden, self.teacher_weight, None, 0.5
        )
        none = self.labels.new_zeros(len(self.labels))
        with torch.no_grad():
            logprob = ChunkedLogProbFunction.apply(
                self.student_hidden, self.student_weight, None, self.labels, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ()
            )[0]
            _teacher_entropy = ChunkedLogProbFunction.apply(
                self.teacher_hidden, self.teacher_weight, None, none, 1.0, VOCAB_CHUNK_SIZE, None, 1.0, ("entropy",)
            )[1]
        value = apply_importance_sampling_clipping(value, logprob, self.old_logprobs, CLIP)
        ((value * self.mask).sum() / self.mask.sum()).backward()

    def trl_sdpo(self) -> None:
        self.clear()
        self._trl_sdpo_loss().backward()

    def _trl_sdpo_loss(self) -> Tensor:
        """What SDPOTrainer computes; its logits are out of scope when backward starts, as they are there."""
        student = (self.student_hidden @ self.student_weight.t()).float() / 1.0  # _forward_logits divides always
        with torch.no_grad():
            teacher = (self.teacher_hidden @ self.teacher_weight.t()).float() / 1.0
        value = compute_full_logit_self_distillation_loss(student, teacher, distillation_alpha=0.5)
        logprob = selective_log_softmax(student, self.labels)
        value = apply_importance_sampling_clipping(value, logprob, self.old_logprobs, CLIP)
        with torch.no_grad():
            entropy_from_logits(student), entropy_from_logits(teacher)
        loss = (value * self.mask).sum(-1) / self.mask.sum(-1).clamp(min=1.0)
        return loss.mean()

    @torch.no_grad()
    def matmuls(self) -> None:
        """Both logits, d hidden and d weight, in the chunks of the fused head."""
        self.clear()
        rows = len(self.mask)
        step = math.ceil(rows / math.ceil(rows / default_chunk_size(self.student_hidden, self.student_weight)))
        weight_gradient = torch.empty_like(self.student_weight)
        hidden_gradient = torch.empty_like(self.student_hidden)
        zs, zt = (torch.empty(step, VOCABULARY, dtype=torch.bfloat16) for _ in range(2))
        for i in range(0, rows, step):
            part = slice(i, min(i + step, rows))
            n = part.stop - i
            torch.mm(self.student_hidden[part], self.student_weight.t(), out=zs[:n])
            torch.mm(self.teacher_hidden[part], self.teacher_weight.t(), out=zt[:n])
            hidden_gradient[part] = zs[:n] @ self.student_weight
            weight_gradient.addmm_(zs[:n].t(), self.student_hidden[part], beta=1.0 if i else 0.0)


PATHS: dict[str, Callable[[Case], None]] = {
    "ours": Case.ours,
    "trl_chunked": Case.trl_chunked,
    "trl_sdpo": Case.trl_sdpo,
    "matmuls": Case.matmuls,
}


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak_of_this_process(path: str, tokens: int) -> float:
    """MiB that one call needs besides its inputs."""
    run = PATHS[path]
    warm = Case(8)
    run(warm)  # compiles; loads libraries
    del warm
    case = Case(tokens)
    before = _kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run(case)
    return (_kilobytes("VmHWM") - before) / 1024


def peak(path: str, tokens: int) -> float:
    environment = {k: v for k, v in os.environ.items() if k not in TIMING}
    done = subprocess.run(
        [sys.executable, __file__, "--peak", path, "--tokens", str(tokens)],
        env={**environment, **MEMORY, "OMP_NUM_THREADS": "1"},
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def memory() -> bool:
    """Peaks at 256, 512 and 1024 tokens; limits at 512 and for growth."""
    paths = ("ours", "trl_chunked", "trl_sdpo")
    peaks: dict[str, dict[int, float]] = {name: {n: peak(name, n) for n in (256, 512)} for name in paths}
    peaks["ours"][1024] = peak("ours", 1024)
    ours = peaks["ours"]
    ratios: dict[str, tuple[float, float]] = {
        "over_trl_chunked": (ours[512] / peaks["trl_chunked"][512], 1.0),
        "over_trl_sdpo": (ours[512] / peaks["trl_sdpo"][512], 0.1),
        "growth_256_to_1024": (ours[1024] / ours[256], 1.05),
    }
    for name, values in peaks.items():
        print(f"peak MiB of {name}: " + ", ".join(f"N={n} {value:.0f}" for n, value in values.items()))
    for name, (ratio, limit) in ratios.items():
        print(f"fused_head_memory {name}: {ratio:.3f}, limit {limit:g}: {'' if ratio <= limit else 'NOT '}reached")
    document = {
        "question": "peak MiB besides inputs, weight gradient (bf16, 297 MiB) included",
        "peak_mib": peaks,
        "ratios": {name: {"ratio": r, "limit": limit, "reached": r <= limit} for name, (r, limit) in ratios.items()},
        "torch": torch.__version__,
    }
    (RESULTS / "fused_head_memory.json").write_text(json.dumps(document, indent=2) + "\n")
    return all(ratio <= limit for ratio, limit in ratios.values())


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--only", choices=["trl_chunked", "trl_sdpo", "matmuls", "memory"])
    parser.add_argument("--peak", choices=list(PATHS), help="print the peak of one call (used by this script)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak:
        print(peak_of_this_process(arguments.peak, arguments.tokens))
        return
    if "MALLOC_MMAP_MAX_" not in os.environ:  # glibc reads it at start
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **TIMING, "OMP_NUM_THREADS": "1"})
    case, n = Case(arguments.tokens), arguments.tokens
    suffix = "" if n == 256 else f"_{n}"
    comparisons: dict[str, tuple[str, float, Callable[[], Any]]] = {
        "trl_chunked": ("TRL's chunked kernels", 0.6, case.trl_chunked),
        "trl_sdpo": ("TRL's SDPO loss on full logits", 0.65, case.trl_sdpo),
        "matmuls": ("its four matmuls alone", 1.15, case.matmuls),
    }
    for name, (words, limit, other) in comparisons.items():
        if arguments.only in (None, name):
            result = measure(case.ours, other, max(1, arguments.pairs))
            report(f"fused_head_over_{name}{suffix}", f"{n} tokens: fused head / {words}", limit, result)
    if arguments.only in (None, "memory"):
        memory()


if __name__ == "__main__":
    main()
