"""Runs and studies with MADE-UP numbers, for tests of the report alone. Nothing here was measured."""

from __future__ import annotations

import gzip
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgpo.runlog import RunLog

HOSTILE = [
    "</script><script>window.hacked = 1</script>",
    '<img src=x onerror="window.hacked = 2">',
    "\u202egnihtyreve esrever\u202c \u2066isolate",
    '"><svg onload=window.hacked=3>',
    "{{constructor}} ${1} `tick` \u2028line \u2029paragraph \x00 nul \ud800 half",
    "<!-- comment --> ]]> &lt;b&gt; &amp; '\"",
]
METHODS = ("pgpo", "sdpo", "sdpo_matched", "frozen", "grpo")


def accuracy_at(step: int, steps: int, top: float, falls: bool) -> float:
    rise = top - (top - 0.5) * math.exp(-6 * step / steps)
    return rise - (0.35 * max(0.0, step / steps - 0.6) / 0.4 if falls else 0.0)


def metrics_at(step: int, steps: int, rng: random.Random, alpha: float) -> dict[str, float]:
    information = 0.15 * math.exp(-3 * step / steps) + rng.gauss(0.01, 0.02)
    student = 0.1 + 0.5 * math.exp(-4 * step / steps) + rng.gauss(0, 0.01)
    return {
        "information": information,
        "rho": min(math.exp(alpha * information), 2.0),
        "student_entropy": student,
        "teacher_entropy": student - information,
        "divergence": abs(0.05 * math.exp(-2 * step / steps) + rng.gauss(0, 0.004)),
        "reward": accuracy_at(step, steps, 0.85, False) + rng.gauss(0, 0.05),
        "completion_length": 14 + rng.gauss(0, 0.6),
        "length_tail": 18 + rng.gauss(0, 0.6),
        "grad_norm": math.exp(rng.gauss(-1, 0.4)),
        "active_share": 0.9,
        "step_seconds": 0.2 + rng.random() / 50,
    }


def write_run(
    directory: Path,
    objective: str = "pgpo",
    seed: int = 0,
    steps: int = 40,
    every: int = 10,
    falls: bool = False,
    samples: Sequence[dict[str, Any]] = (),
    **config: Any,
) -> Path:
    """A run directory; `falls` makes it collapse; `config` adds settings."""
    rng = random.Random(ascii(f"{objective} {seed}"))
    settings = {"task": "lab_world", "objective": objective, "alpha": 1.0, "rho_max": 2.0, "seed": seed} | config
    with RunLog.create(directory, settings, {"device": "made up"}) as log:
        for step in range(0, steps + 1, every):
            value = accuracy_at(step, steps, 0.85, falls) + rng.gauss(0, 0.01)
            log.evaluation(step, {"split": "validation", "k": 16, "questions": 64} | _estimate(value))
        for step in (0, steps):
            value = accuracy_at(step, steps, 0.83, falls)
            log.evaluation(step, {"split": "test", "k": 16, "questions": 128} | _estimate(value))
        for step in range(1, steps + 1):
            log.metrics(step, metrics_at(step, steps, rng, 1.0 if objective == "pgpo" else 0.0))
            log.samples(step, samples or [{"prompt": f"question {step}", "completion": "answer", "reward": 1.0}])
    return directory


def _estimate(value: float) -> dict[str, float]:
    return {"avg_at_k": value, "avg_at_k_low": value - 0.05, "avg_at_k_high": value + 0.05}


def write_study(
    directory: Path,
    settings: Sequence[str] = ("plain", "style"),
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = tuple(range(8)),
    steps: int = 100,
    reference: bool = True,
    failed: bool = True,
) -> Path:
    """A study folder as `pgpo study` leaves it; sdpo collapses in the odd seeds of every second setting."""
    directory.mkdir(parents=True)
    rng = random.Random(1)
    lines: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    for place, setting in enumerate(settings):
        summary[setting] = {"methods": {}}
        for index, method in enumerate(methods):
            runs = [
                _record(
                    setting, method, seed, steps, falls=method == "sdpo" and place % 2 == 1 and seed % 2 == 1, rng=rng
                )
                for seed in seeds
            ]
            lines += runs
            curves = [[line["avg_at_k"] for line in run["evaluations"]] for run in runs]
            summary[setting]["methods"][method] = {
                "seeds": list(seeds),
                "failed": [],
                "initial": curves[0][0],
                "peak": [max(curve) for curve in curves],
                "final": [curve[-1] - 0.02 + rng.gauss(0, 0.01) for curve in curves],
                "final_validation": [curve[-1] for curve in curves],
                "selected": [max(curve) - 0.03 for curve in curves],
                "auc": [sum(curve) / len(curve) for curve in curves],
                "collapsed": [curve[-1] < max(curve) - 0.1 for curve in curves],
                "mean_rho": [1 + 0.05 * (method == "pgpo") for _ in runs],
                "negative_information_share": [rng.random() / 5 for _ in runs],
                "seconds_per_step": [0.2 + rng.random() / 20 for _ in runs],
                "versus": {
                    other: {
                        "value": (delta := rng.gauss(0, 0.02)),
                        "low": delta - 0.03,
                        "high": delta + 0.03,
                        "runs": len(seeds),
                        "questions": 256,
                    }
                    for other in ("sdpo", "sdpo_matched")
                    if other != method and other in methods
                },
            }
            if failed and index == 0 and place == 0:
                lines.append(
                    {
                        "setting": setting,
                        "method": method,
                        "seed": 99,
                        "status": "failed",
                        "error": "ArithmeticError: rho",
                    }
                )
                summary[setting]["methods"][method]["failed"] = [99]
    document: dict[str, Any] = {
        "name": "made-up",
        "seeds": list(seeds),
        "common": {"task": "lab_world", "max_steps": steps},
        "settings": {setting: {"variant": setting} for setting in settings},
        "methods": {method: {"objective": method} for method in methods},
    }
    if reference:
        document["reference"] = {setting: {"pgpo": 0.81, "sdpo": 0.79} for setting in settings}
    whole = {
        "schema": 1,
        "name": "made-up",
        "study": document,
        "environment": {"python": "3.11", "packages": {"torch": "2.13"}, "device": "made up", "git_commit": "a" * 40},
        "settings": summary,
    }
    (directory / "summary.json").write_text(json.dumps(whole), encoding="utf-8")
    with gzip.open(directory / "records.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return directory


def _record(setting: str, method: str, seed: int, steps: int, falls: bool, rng: random.Random) -> dict[str, Any]:
    logged = [metrics_at(step, steps, rng, 1.0 if method == "pgpo" else 0.0) for step in range(1, steps + 1)]
    top = 0.8 + 0.02 * (sum(map(ord, method)) % 5) + rng.gauss(0, 0.015)
    evaluations = [
        {"step": step, "split": "validation", "k": 16, "questions": 128}
        | _estimate(accuracy_at(step, steps, top, falls) + rng.gauss(0, 0.008))
        for step in range(0, steps + 1, max(1, steps // 10))
    ]
    return {
        "setting": setting,
        "method": method,
        "seed": seed,
        "status": "ok",
        "error": None,
        "arguments": {
            "objective": method,
            "learning_rate": 1e-3 * (1 + 0.01 * seed * (method == "sdpo_matched")),
            "seed": seed,
        },
        "commit": "a" * 40,
        "steps": list(range(1, steps + 1)),
        "metrics": {name: [round(line[name], 5) for line in logged] for name in logged[0] if name != "step_seconds"},
        "evaluations": evaluations,
        "test_scores": {f"q{i}": 0.5 for i in range(4)},
        "test_k": 16,
        "seconds_per_step": 0.2,
    }
