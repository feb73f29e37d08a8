"""Paired timing: two callables run alternately (A B, B A, ...), the ratio of each pair, its median.

Shared machines drift; a ratio within a pair does not. Results are kept as JSON with the machine and the versions.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pgpo.provenance import environment

RESULTS = Path(__file__).parent / "results"


def measure(a: Callable[[], Any], b: Callable[[], Any], pairs: int, warmup: int = 1) -> dict[str, Any]:
    """CPU seconds of this process for a and b over `pairs` alternating pairs, and the ratio a / b of each pair.

    A callable that returns a float has measured itself (in CPU seconds) and is taken at its word.
    """
    for _ in range(warmup):
        a(), b()
    seconds: dict[str, list[float]] = {"a": [], "b": []}
    for i in range(pairs):
        order = (("a", a), ("b", b)) if i % 2 == 0 else (("b", b), ("a", a))
        for name, function in order:
            start = time.process_time()
            own = function()
            seconds[name].append(own if isinstance(own, float) else time.process_time() - start)
    ratios = [x / y for x, y in zip(seconds["a"], seconds["b"], strict=True)]
    return {
        "pairs": pairs,
        "ratio_median": statistics.median(ratios),
        "ratio_median_95": _median_interval(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "a_seconds_median": statistics.median(seconds["a"]),
        "b_seconds_median": statistics.median(seconds["b"]),
        "ratios": ratios,
    }


def _median_interval(values: list[float]) -> tuple[float, float]:
    """95 % interval of the median by order statistics (all values, if they are few)."""
    n = len(values)
    k = max(0, math.floor(n / 2 - 1.96 * math.sqrt(n) / 2) - 1)
    return sorted(values)[k], sorted(values)[n - 1 - k]


def report(name: str, question: str, limit: float, result: dict[str, Any]) -> bool:
    """Print one line, keep the JSON, and say whether the ratio is within the limit."""
    reached = result["ratio_median"] <= limit
    RESULTS.mkdir(exist_ok=True)
    machine = {**environment(), "cpu": _cpu(), "cores": os.cpu_count(), "measured": "CPU seconds, 1 thread"}
    document = {"question": question, "limit": limit, "reached": reached, **result, "machine": machine}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=2) + "\n")
    low, high = result["ratio_min"], result["ratio_max"]
    print(f"{name}: {question}: ratio {result['ratio_median']:.4f} [{low:.4f}, {high:.4f}]", end=" ")
    print(f"over {result['pairs']} pairs, limit {limit:g}: {'reached' if reached else 'NOT reached'}")
    return reached


def reuse_memory() -> None:
    """Start the script anew so that freed tensors are reused, as with a GPU's allocator: otherwise the path with the
    larger tensors also pays page faults."""
    tuning = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "-1", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(name) != value for name, value in tuning.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **tuning})


def pairs_from_command_line(default: int) -> int:
    """--pairs N, at least 7."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=default)
    return max(7, parser.parse_args().pairs)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
