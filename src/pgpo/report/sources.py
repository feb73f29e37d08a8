"""What `pgpo report` is given, read: runs and studies, as arrays. What cannot be read is named and left out.

run directory    runlog.read_run, and alarms.jsonl where the guard was on
study folder     summary.json (tables) and records.jsonl.gz (curves), as written by `pgpo study`
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.errors import UserError

Array = npt.NDArray[np.float64]

ALARMS_FILE = "alarms.jsonl"
SUMMARY_FILE = "summary.json"
RECORDS_FILE = "records.jsonl.gz"
STUDY_SCHEMA = 1
LARGEST = 1e100
LARGEST_STEP = 2**53  # the largest count that a float and a browser hold exactly


@dataclass(frozen=True)
class Track:
    """One run as the charts need it.

    Attributes:
        name: what a reader calls the run.
        method: label of its method; runs of one method differ in their seed alone.
        seed: as text.
        steps: [n] optimizer steps, rising.
        series: metric name -> [n] values, nan where a step has none.
        evaluations: lines of evaluations.jsonl.
    """

    name: str
    method: str
    seed: str
    steps: Array
    series: dict[str, Array]
    evaluations: list[dict[str, Any]]


@dataclass(frozen=True)
class RunSource:
    """A run directory and the alarms of its guard (empty without one)."""

    run: runlog.Run
    alarms: list[dict[str, Any]]

    @property
    def name(self) -> str:
        return self.run.directory.resolve().name

    def track(self, method: str) -> Track:
        lines = {line[runlog.STEP]: line for line in self.run.metrics if abs(line[runlog.STEP]) <= LARGEST_STEP}
        steps = sorted(lines)  # a step that stands twice counts once, as it was written last
        names = dict.fromkeys(name for line in lines.values() for name in line if name != runlog.STEP)
        return Track(
            name=self.name,
            method=method,
            seed=str(self.run.config.get("seed", "")),
            steps=np.array(steps, dtype=np.float64),
            series={name: numbers(lines[step].get(name) for step in steps) for name in names},
            evaluations=_evaluations(self.run.evaluations),
        )


@dataclass(frozen=True)
class StudySource:
    """A study folder: summary.json as it is, one track per finished run of each setting, the failed runs."""

    directory: Path
    summary: dict[str, Any]
    tracks: dict[str, list[Track]]
    records: list[dict[str, Any]] = field(repr=False)  # without their series and evaluations

    @property
    def name(self) -> str:
        return str(self.summary.get("name") or self.directory.resolve().name)


def read_sources(paths: Sequence[Path]) -> tuple[list[RunSource], list[StudySource]]:
    """The runs and studies among the paths, in order; the others are told on stderr, one line each, and left out.

    Left out are folders that cannot be read, runs without metrics, and runs whose task or domain is not that of the
    first. Raises UserError when nothing is left.
    """
    runs: list[RunSource] = []
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
                        f"its task is {' '.join(_task(run))}, that of {runs[0].run.directory} is"
                        f" {' '.join(_task(runs[0]))}; report them apart."
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
    """A float; nan for what is none, infinity for what no axis can hold. runlog's names of non-finite numbers count."""
    if isinstance(value, str):
        return runlog.NON_FINITE.get(value, math.nan)
    if not isinstance(value, (int, float)):
        return math.nan
    if abs(value) > LARGEST:
        return math.inf if value > 0 else -math.inf
    return float(value)


def numbers(values: object) -> Array:
    """[n] floats, one per item; a single number is a list of one, anything else is empty."""
    if isinstance(values, (int, float)):
        values = [values]
    items = values if isinstance(values, Iterable) and not isinstance(values, (str, Mapping)) else []
    return np.array([number(value) for value in items], dtype=np.float64)


def _read_run(path: Path) -> RunSource:
    try:
        run = runlog.read_run(path)
    except KeyError as error:
        raise UserError(f"{path / runlog.CONFIG_FILE} has no {error}; restore it from a copy.") from error
    if not isinstance(run.config, dict):
        raise UserError(f"the config in {path / runlog.CONFIG_FILE} is not a JSON object; restore it from a copy.")
    if not run.metrics:
        raise UserError(f"it has no line in {runlog.METRICS_FILE}; let the run finish a step first.")
    for name in (runlog.METRICS_FILE, runlog.EVALUATIONS_FILE, runlog.SAMPLES_FILE, ALARMS_FILE):
        file = path / name
        if file.exists() and (end := file.read_bytes().rpartition(b"\n")[2]) and not _is_json(end):
            _warn(f"the last line of {file} is cut and is left out.")
    alarms = path / ALARMS_FILE
    return RunSource(run, runlog.read_lines(alarms, unfinished_end=True) if alarms.exists() else [])


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line.decode("utf-8")), dict)
    except ValueError:
        return False


def _task(run: RunSource) -> tuple[str, ...]:
    """Task and domain, as words."""
    named = (run.run.config.get(name) for name in ("task", "domain"))
    return tuple(str(value) for value in named if value is not None) or ("not named",)


def _evaluations(lines: Iterable[Any]) -> list[dict[str, Any]]:
    """The lines that have a whole step and an accuracy."""
    return [
        line
        for line in lines
        if isinstance(line, dict)
        and isinstance(line.get(runlog.STEP), int)
        and abs(line[runlog.STEP]) <= LARGEST_STEP
        and math.isfinite(number(line.get(runlog.AVG_AT_K)))
    ]


def _read_study(path: Path) -> StudySource:
    summary = _summary(path / SUMMARY_FILE)
    tracks: dict[str, list[Track]] = {}
    records = []
    for record in _records(path / RECORDS_FILE):
        setting = str(record.get("setting"))
        if record.get("status") == "ok":
            tracks.setdefault(setting, []).append(_record_track(record))
        records.append({k: v for k, v in record.items() if k not in ("metrics", "evaluations", "steps", "test_scores")})
    return StudySource(path, summary, tracks, records)


def _summary(path: Path) -> dict[str, Any]:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"it has no {path.name}; let `pgpo study` write its tables first.") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; let `pgpo study` write it again.") from error
    if not isinstance(summary, dict) or not isinstance(summary.get("settings"), dict):
        raise UserError(f'{path} has no "settings"; let `pgpo study` write it again.')
    if summary.get("schema") != STUDY_SCHEMA:
        raise UserError(
            f"{path} has schema version {summary.get('schema')}, this pgpo reads version {STUDY_SCHEMA};"
            " use the pgpo version that wrote it."
        )
    return summary


def _records(path: Path) -> list[dict[str, Any]]:
    """The records that can be read; a file that is missing or cut costs curves, not the tables."""
    records: list[dict[str, Any]] = []
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
        _warn(f"{path.parent} has no {path.name}: its tables are shown without curves.")
    except (OSError, EOFError, zlib.error):
        _warn(f"{path} is damaged: the {len(records)} runs before the damage are drawn.")
    if odd:
        _warn(f"{path} has {odd} lines that are no records; they are left out.")
    return records


def _record_track(record: Mapping[str, Any]) -> Track:
    steps = numbers(record.get("steps"))
    if not np.all(np.diff(steps, prepend=-np.inf) > 0):  # also false for nan
        steps = np.empty(0)
    metrics = record.get("metrics")
    series = {str(k): numbers(v) for k, v in metrics.items()} if isinstance(metrics, dict) else {}
    evaluations = record.get("evaluations")
    return Track(
        name=f"{record['setting']}/{record['method']}/seed-{record.get('seed')}",
        method=str(record["method"]),
        seed=str(record.get("seed", "")),
        steps=steps,
        # Only a series with a value for every step can be placed on the step axis.
        series={name: values for name, values in series.items() if len(values) == len(steps)},
        evaluations=_evaluations(evaluations if isinstance(evaluations, list) else []),
    )


def _warn(text: str) -> None:
    print(f"pgpo: {' '.join(text.split())}", file=sys.stderr)
