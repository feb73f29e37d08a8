"""The runs and studies that `pgpo report` was given, as arrays. What cannot be read is skipped with a message.

run directory    runlog.read_run
study folder     study_files: summary.json (tables) and records.jsonl.gz (curves)
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.files import NON_FINITE, read_lines
from pgpo.runlog import LoggedRun
from pgpo.study_files import RECORDS_FILE, SUMMARY_FILE, read_summary, readable_records, run_name

Array = npt.NDArray[np.float64]

LARGEST = 1e100
LARGEST_STEP = 2**53  # the largest count that a float and a browser hold exactly


@dataclass(frozen=True)
class RunCurves:
    """The curves of one run.

    Attributes:
        name: of the run, for readers.
        method: label of its method; runs of one method differ in their seed alone.
        seed: as text.
        steps: [n] optimizer steps, rising.
        series: metric name -> [n] values, nan where a step has none.
        evaluations: lines of evaluations.jsonl.
        scores: question -> mean reward, and its stem, of the last test evaluation of a run; empty without one.
    """

    name: str
    method: str
    seed: str
    steps: Array
    series: dict[str, Array]
    evaluations: list[dict[str, Any]]
    scores: dict[str, tuple[float, str]] = field(default_factory=dict)

    @classmethod
    def of_run(cls, run: LoggedRun, method: str) -> RunCurves:
        lines = {line[runlog.STEP]: line for line in run.metrics if abs(line[runlog.STEP]) <= LARGEST_STEP}
        steps = sorted(lines)  # of a step with two lines the last one counts
        names = dict.fromkeys(name for line in lines.values() for name in line if name != runlog.STEP)
        return cls(
            name=run.name,
            method=method,
            seed=str(run.config.get("seed", "")),
            steps=np.array(steps, dtype=np.float64),
            series={name: numbers(lines[step].get(name) for step in steps) for name in names},
            evaluations=_evaluations(run.evaluations),
            scores=_scores(run.directory / runlog.TEST_RECORDS_FILE),
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> RunCurves:
        steps = numbers(record.get("steps"))
        if not np.all(np.diff(steps, prepend=-np.inf) > 0):  # also false for nan
            steps = np.empty(0)
        metrics = record.get("metrics")
        series = {str(k): numbers(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {}
        evaluations = record.get("evaluations")
        return cls(
            name=run_name(record["setting"], record["method"], record.get("seed")),
            method=str(record["method"]),
            seed=str(record.get("seed", "")),
            steps=steps,
            # Only a series with a value for every step can be placed on the step axis.
            series={name: values for name, values in series.items() if len(values) == len(steps)},
            evaluations=_evaluations(evaluations if isinstance(evaluations, list) else []),
        )


@dataclass(frozen=True)
class StudySource:
    """A study folder: summary.json as it is, the curves of every finished run by setting, the failed runs."""

    directory: Path
    summary: dict[str, Any]
    runs: dict[str, list[RunCurves]]
    records: list[dict[str, Any]] = field(repr=False)  # without their series and evaluations

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.directory.resolve().name)


def read_sources(paths: Sequence[Path]) -> tuple[list[LoggedRun], list[StudySource]]:
    """The runs and studies at the paths, in order; the others are skipped, with one line on stderr each.

    Skipped are folders that cannot be read, runs without metrics, and runs whose task or domain differs from that of
    the first. Raises UserError when nothing is left.
    """
    runs: list[LoggedRun] = []
    studies: list[StudySource] = []
    seen: set[Path] = set()
    for path in paths:
        try:
            if path.resolve() in seen:
                raise UserError("it is given twice.")
            seen.add(path.resolve())
            if (path / SUMMARY_FILE).exists() or (path / RECORDS_FILE).exists():
                studies.append(_read_study(path))
            else:
                run = _read_run(path)
                if runs and _task(run) != _task(runs[0]):
                    raise UserError(
                        f"its task is {' '.join(_task(run))}, that of {runs[0].directory} is"
                        f" {' '.join(_task(runs[0]))}; report them separately."
                    )
                runs.append(run)
        except UserError as error:
            _warn(f"skipped {path}: {error}")
        except OSError as error:
            _warn(f"skipped {path}: it cannot be read ({error.strerror}).")
    if not runs and not studies:
        raise UserError("there is nothing to report; give at least one run directory or study folder that can be read.")
    return runs, studies


def number(value: object) -> float:
    """The value as a float: nan for what is no number, infinity beyond LARGEST; "NaN" and "Infinity" are numbers."""
    if isinstance(value, str):
        return NON_FINITE.get(value, math.nan)
    if not isinstance(value, (int, float)):
        return math.nan
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def numbers(values: object) -> Array:
    """[n] floats, one per item of a list; a number is a list of one, anything else an empty list."""
    if isinstance(values, (int, float)):
        values = [values]
    items = values if isinstance(values, Iterable) and not isinstance(values, (str, Mapping)) else []
    return np.array([number(value) for value in items], dtype=np.float64)


def _read_run(path: Path) -> LoggedRun:
    try:
        run = runlog.read_run(path)
    except KeyError as error:
        raise UserError(f"{path / runlog.CONFIG_FILE} has no {error}; restore it from a copy.") from error
    if not isinstance(run.config, dict):
        raise UserError(f"the config in {path / runlog.CONFIG_FILE} is not a JSON object; restore it from a copy.")
    if not run.metrics:
        raise UserError(f"it has no line in {runlog.METRICS_FILE}; let the run finish a step first.")
    for name in runlog.LOG_FILES:
        file = path / name
        if file.exists() and (end := file.read_bytes().rpartition(b"\n")[2]) and not _is_json(end):
            _warn(f"the last line of {file} is truncated and is ignored.")
    return run


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _task(run: LoggedRun) -> tuple[str, ...]:
    """Task and domain, as words."""
    named = (run.config.get(name) for name in ("task", "domain"))
    return tuple(str(value) for value in named if value is not None) or ("not named",)


def _evaluations(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """The lines with a whole number as step and a finite accuracy."""
    return [
        line
        for line in lines
        if isinstance(line, dict)
        and isinstance(line.get(runlog.STEP), int)
        and abs(line[runlog.STEP]) <= LARGEST_STEP
        and math.isfinite(number(line.get(runlog.AVG_AT_K)))
    ]


def _scores(path: Path) -> dict[str, tuple[float, str]]:
    if not path.exists():
        return {}
    rewards: dict[str, list[float]] = {}
    stems: dict[str, str] = {}
    try:
        for line in read_lines(path):
            question = str(line["question_id"])
            rewards.setdefault(question, []).append(number(line["reward"]))
            stems[question] = str(line.get("stem") or question)
    except (UserError, KeyError, OSError):
        _warn(f"{path} cannot be read; its run is compared with none.")
        return {}
    found = {question: (float(np.mean(values)), stems[question]) for question, values in rewards.items()}
    return found if all(math.isfinite(score) for score, _ in found.values()) else {}


def _read_study(path: Path) -> StudySource:
    summary = read_summary(path / SUMMARY_FILE)
    runs: dict[str, list[RunCurves]] = {}
    records = []
    found, problems = readable_records(path / RECORDS_FILE)
    for problem in problems:
        _warn(problem)
    for record in found:
        setting = str(record.get("setting"))
        if record.get("status") == "ok":
            runs.setdefault(setting, []).append(RunCurves.of_record(record))
        records.append({k: v for k, v in record.items() if k not in ("metrics", "evaluations", "steps", "test_scores")})
    return StudySource(path, summary, runs, records)


def _warn(text: str) -> None:
    print(f"pgpo: {' '.join(text.split())}", file=sys.stderr)
