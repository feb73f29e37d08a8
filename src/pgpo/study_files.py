"""The folder of a study: one schema for `pgpo study`, which writes it, and `pgpo report`, which reads it.

    records.jsonl.gz   one line per finished run, all that tables and figures need; a run in it is done:
                       {"setting", "method", "seed", "status": "ok" | "failed", "error", "flags", "arguments", "commit",
                        "test_k", "environment", "steps", "metrics", "evaluations", "test_scores", "selected_step",
                        "selected_test_scores", "seconds_per_step", "seconds"}; a failed run has those up to "test_k"
    summary.json       {"schema": 1, "name", "study": the YAML file, "environment", "alarms",
                        "settings": {setting: {"methods": {method: {measure: one value per seed, ...}}}}}
    tables.md          the same for people
    runs/, bases/      run directories and rebuilt base models; worker-N.log

A study crosses settings (tasks), methods and seeds. Two curves are kept apart: the validation curve gives peak, area
and collapse and selects a step; test questions give the accuracies that are reported.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgpo import runlog
from pgpo.errors import UserError

SCHEMA = 1

RECORDS_FILE = "records.jsonl.gz"
SUMMARY_FILE = "summary.json"
TABLES_FILE = "tables.md"
RUNS_FOLDER = "runs"
BASES_FOLDER = "bases"

# Measures of a method in summary.json, one value per seed.
INITIAL = "initial"  # validation accuracy before training
PEAK = "peak"  # best of the validation curve
FINAL_VALIDATION = "final_validation"  # its end
AUC = "auc"  # its area
FINAL = "final"  # test accuracy after the last step
SELECTED = "selected"  # test accuracy at the step that the validation curve selects
MEAN_RHO = "mean_rho"  # of what multiplied the learning rate: rho, and with measured trust the part that it kept
NEGATIVE_INFORMATION_SHARE = "negative_information_share"
SECONDS_PER_STEP = "seconds_per_step"

COLLAPSE = 0.10  # ours: a run has collapsed if its curve ends more than this below its own peak
ENOUGH_RUNS = 2  # one pair of runs tells nothing of the noise of seeds; tables mark its interval


def run_name(setting: object, method: object, seed: object) -> str:
    """Name of a run, and of its folder under runs/."""
    return f"{setting}/{method}/seed-{seed}"


# Records --------------------------------------------------------------------------------------------------------------


def read_records(path: Path) -> dict[str, dict[str, Any]]:
    """Run name -> record; none where there is no file yet. Raises UserError for a file that is damaged."""
    if not path.exists():
        return {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            records = [json.loads(line) for line in file]
        return {run_name(r["setting"], r["method"], r["seed"]): r for r in records}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"the records {path} cannot be read ({reason}); restore the file, or move it away.") from error


def readable_records(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The records that can be read, and a sentence for each reason why some cannot."""
    records: list[dict[str, Any]] = []
    problems: list[str] = []
    odd = 0
    try:
        with gzip.open(path, "rb") as file:
            for line in file:
                try:
                    record = json.loads(line)
                except ValueError:
                    record = None
                if isinstance(record, dict) and "setting" in record and "method" in record:
                    records.append(record)
                else:
                    odd += 1
    except FileNotFoundError:
        problems.append(f"{path.parent} has no {path.name}: its tables are shown without curves.")
    except (OSError, EOFError, zlib.error):
        problems.append(f"{path} is damaged: the {len(records)} runs before the damage are drawn.")
    if odd:
        problems.append(f"{path} has {odd} lines that are not records; they are ignored.")
    return records, problems


def write_records(path: Path, records: Mapping[str, dict[str, Any]]) -> None:
    """All records, in one step: a reader or a crash sees the old file or the new one."""
    text = "".join(json.dumps(r, separators=(",", ":"), allow_nan=False) + "\n" for r in records.values())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def multipliers(metrics: Mapping[str, Any]) -> list[float]:
    """What multiplied the learning rate in each step of a record that has a rho: rho, times the part that trust kept.

    Args:
        metrics: of a record, or of a run: name -> one value per step.
    """
    rho = metrics.get(runlog.RHO, [])
    kept = metrics.get(runlog.TRUST_RHO, [1.0] * len(rho))
    return [r * (1.0 if k is None or k != k else k) for r, k in zip(rho, kept, strict=True) if r is not None]


# Summary --------------------------------------------------------------------------------------------------------------


def read_summary(path: Path) -> dict[str, Any]:
    """summary.json. Raises UserError for one that is missing, damaged, or of another schema version."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"it has no {path.name}; let `pgpo study` write its tables first.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; let `pgpo study` write it again.") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("settings"), dict):
        raise UserError(f'{path} has no "settings"; let `pgpo study` write it again.')
    if summary.get("schema") != SCHEMA:
        raise UserError(
            f"{path} has schema version {summary.get('schema')}, this pgpo reads version {SCHEMA};"
            " use the pgpo version that wrote it."
        )
    return summary


# Accuracy curves ------------------------------------------------------------------------------------------------------


def accuracy_curve(
    evaluations: Sequence[Mapping[str, Any]], split: str = runlog.VALIDATION
) -> tuple[list[int], list[float]]:
    """Steps and avg@k of the evaluations on a split, in the order of the steps."""
    points = sorted((line[runlog.STEP], line[runlog.AVG_AT_K]) for line in evaluations if line[runlog.SPLIT] == split)
    return [step for step, _ in points], [value for _, value in points]


def selected_step(steps: Sequence[int], values: Sequence[float]) -> int:
    """The step that an accuracy curve selects: its maximum, the first of equals."""
    return steps[values.index(max(values))]


def area(steps: Sequence[float], values: Sequence[float]) -> float:
    """Mean height of a curve between its first and last step (trapezoids); one point is its own mean."""
    if len(steps) == 1:
        return values[0]
    total = sum((b - a) * (x + y) / 2 for a, b, x, y in zip(steps, steps[1:], values, values[1:], strict=False))
    return total / (steps[-1] - steps[0])


def collapsed(values: Sequence[float]) -> bool:
    """Whether an accuracy curve ends more than COLLAPSE below its peak; one without points does not."""
    return len(values) > 0 and values[-1] < max(values) - COLLAPSE


_PASS = runlog.PASS_AT_K


def narrowed(first: Mapping[str, Any], line: Mapping[str, Any]) -> bool:
    """Whether completions lost diversity between two evaluations: avg@k rose, and pass@k fell below its first interval.

    Measured on the validation curves of results/lab-study, SDPO and PGPO: so at the end in 70 of 163 collapsed runs
    and in 12 of 413 others; before a decline is seen in 64 of 343.
    """
    passed, bound = line.get(_PASS), first.get(_PASS + runlog.LOW)
    if not (isinstance(passed, float) and isinstance(bound, float) and isinstance(first.get(_PASS), float)):
        return False
    return bool(line[runlog.AVG_AT_K] > first[runlog.AVG_AT_K]) and passed < bound


def narrowing(first: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    """The sentence about it."""
    k = line.get(runlog.K, "k")
    passed, average = (f"{first[name]:.3f} to {line[name]:.3f}" for name in (_PASS, runlog.AVG_AT_K))
    return f"pass@{k} fell from {passed} while avg@{k} rose from {average}: fewer questions are solved at all."
