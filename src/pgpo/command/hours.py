"""How long a step and an evaluation take on a CPU, said before they begin: the paper's batch is for eight GPUs."""

from __future__ import annotations

import time
from typing import Any

import torch

# FLOPs per parameter and token (arXiv 2001.08361, section 2.1); a backward without gradients of weights takes half.
_FORWARD, _BACKWARD = 2, 4
_LONG = 0.5  # ours: hours from which a user wants to know beforehand
_SIDE = 1024  # ours: of the matrices that are multiplied to measure the CPU


def warning(model: Any, args: Any, adapts: bool, evaluated: int) -> str | None:
    """A sentence with the hours that full-length completions take, or None where nothing takes long.

    Args:
        args: a PGPOConfig.
        adapts: adapters are trained, not the weights themselves.
        evaluated: questions that are evaluated before the first step.
    """
    length = args.max_completion_length
    # Sampling, the student's forward and backward, the teacher's forward.
    flops = 2 * _FORWARD + _BACKWARD / (2 if adapts else 1)
    flops += _FORWARD * (args.gradient_checkpointing + args.distills)
    rate = flops_per_second()
    hours = model.num_parameters() * length / rate / 3600
    step = hours * flops * args.prompts_per_step * args.num_generations
    first = hours * _FORWARD * evaluated * args.eval_k
    if max(step, first) < _LONG:
        return None
    return (
        f"completions of {length} tokens take this CPU about {step:.1f} h per step of {args.prompts_per_step} x "
        f"{args.num_generations}, and {first:.1f} h in the first evaluation of {evaluated} questions x {args.eval_k} "
        f"(at {rate / 1e9:.0f} GFLOP/s on {torch.get_num_threads()} thread(s), measured; OMP_NUM_THREADS sets them): "
        "lower --max_completion_length, --prompts_per_step, --eval_k, --test_rows and --eval_rows."
    )


def flops_per_second() -> float:
    """Of a product of matrices in fp32, the best of three."""
    a, b = torch.rand(_SIDE, _SIDE), torch.rand(_SIDE, _SIDE)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return float(2 * _SIDE**3 / min(seconds))
