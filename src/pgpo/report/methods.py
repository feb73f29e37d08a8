"""From runs to what a reader compares: methods, their numbers with intervals, collapses, curves over seeds."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.intervals import paired_difference, student_t
from pgpo.report.sources import Array, RunCurves, StudySource, number, numbers
from pgpo.runlog import LoggedRun
from pgpo.study_files import (
    AUC,
    FINAL,
    FINAL_VALIDATION,
    INITIAL,
    MEAN_RHO,
    NEGATIVE_INFORMATION_SHARE,
    PEAK,
    SECONDS_PER_STEP,
    SELECTED,
    area,
    multipliers,
    narrowed,
    narrowing,
)
from pgpo.study_files import collapsed as is_collapsed

SMOOTHING_SHARE = 0.05  # ours: the window of the smoothed line as a share of the run
POINTS = 100  # ours: a chart of signals is 300 px wide; a point every 3 px draws the same line

MOST_NAMED = 3  # runs that lost diversity, each with its numbers

ACCURACIES = (INITIAL, PEAK, FINAL_VALIDATION, FINAL, SELECTED, AUC)  # shares: their intervals end at 0 and 1
MEASURES = (*ACCURACIES, MEAN_RHO, NEGATIVE_INFORMATION_SHARE, SECONDS_PER_STEP)

# Settings that may differ between runs of one method: seed, output and logging.
_NOT_METHOD = (
    *("seed", "data_seed", "output_dir", "overwrite", "arguments", "run_name", "run_id", "project", "disable_tqdm"),
)
_NOT_METHOD_PREFIXES = (
    *("logging_", "log_", "save_", "hub_", "report_to", "push_to_hub", "trackio_"),
    *("samples_per_", "resume_from"),
)


@dataclass(frozen=True)
class PairedDifference:
    """Difference in final accuracy from another method, on paired runs and questions, with its 95 % interval.

    detectable: the minimum detectable effect; nan in summaries that do not have it.
    """

    value: float
    low: float
    high: float
    runs: float
    questions: float
    detectable: float = math.nan


@dataclass(frozen=True)
class MethodResult:
    """One method of a comparison in numbers.

    Attributes:
        values: measure -> one value per run; nan where a run has none.
        bounds: measure -> 95 % interval over questions, of a method with one run.
        collapsed: one per run.
        failed: seeds of the runs that failed.
        versus: other method -> difference from it.
        reference: a published accuracy, nan without one.
    """

    method: str
    seeds: list[str]
    values: dict[str, Array]
    collapsed: list[bool]
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    versus: dict[str, PairedDifference] = field(default_factory=dict)
    reference: float = math.nan

    def known(self, measure: str) -> Array:
        """The finite values of a measure."""
        values = self.values.get(measure, np.empty(0))
        return values[np.isfinite(values)]

    def mean(self, measure: str) -> float:
        known = self.known(measure)
        return float(known.mean()) if len(known) else math.nan

    def sd(self, measure: str) -> float:
        """Standard deviation over runs; nan for one run."""
        known = self.known(measure)
        return float(known.std(ddof=1)) if len(known) > 1 else math.nan

    def interval(self, measure: str) -> tuple[float, float] | None:
        """95 %: Student's t over the runs, or over questions where there is one run."""
        known = self.known(measure)
        if len(known) > 1:
            half = student_t(len(known) - 1) * self.sd(measure) / math.sqrt(len(known))
            low, high = self.mean(measure) - half, self.mean(measure) + half
            return (max(0.0, low), min(1.0, high)) if measure in ACCURACIES else (low, high)
        return self.bounds.get(measure)


@dataclass(frozen=True)
class Comparison:
    """Methods that can be compared: the same task, model and budget.

    `split` is the split whose accuracy is evaluated during training, None where there is none.
    """

    name: str
    runs: list[RunCurves]
    results: list[MethodResult]
    split: str | None

    @property
    def methods(self) -> list[str]:
        return [result.method for result in self.results]

    @property
    def outcome(self) -> str:
        """The measure of the final accuracy: on the test split if a method has it, else the end of the curve."""
        return FINAL if any(len(result.known(FINAL)) for result in self.results) else FINAL_VALIDATION


# Runs ------------------------------------------------------------------------------------------------------------


def comparison_of_runs(runs: Sequence[LoggedRun], name: str) -> Comparison:
    """The runs, grouped into methods: those whose configurations differ in nothing but the seed."""
    labels = method_labels([run.config for run in runs], [run.name for run in runs])
    curves = [RunCurves.of_run(run, label) for run, label in zip(runs, labels)]
    split = curve_split(curves)
    groups = [[run for run in curves if run.method == label] for label in dict.fromkeys(labels)]
    results = [_result(group, split, _difference(group, groups[0])) for group in groups]
    return Comparison(name, curves, results, split)


def _difference(runs: Sequence[RunCurves], reference: Sequence[RunCurves]) -> dict[str, PairedDifference]:
    """Test accuracy less that of the reference, paired by seed and by question; of two runs whatever their seeds.

    None without test records, without a common seed, or where the questions are not the same.
    """
    if runs[0].method == reference[0].method:
        return {}
    of_reference = {run.seed: run for run in reference}
    pairs = [(run, of_reference[run.seed]) for run in runs if run.seed in of_reference]
    if not pairs and len(runs) == len(reference) == 1:
        pairs = [(runs[0], reference[0])]
    questions = list(pairs[0][0].scores) if pairs else []
    if not questions or any(run.scores.keys() != set(questions) for pair in pairs for run in pair):
        return {}
    table = np.array([[run.scores[q][0] - other.scores[q][0] for q in questions] for run, other in pairs])
    found = paired_difference(table, [pairs[0][0].scores[q][1] for q in questions])
    return {
        reference[0].method: PairedDifference(
            found.value, found.low, found.high, len(pairs), len(questions), found.detectable
        )
    }


def narrowed_runs(comparison: Comparison) -> list[str]:
    """Sentences about the runs that lost diversity: pass@k fell while avg@k rose; one for all if they are many."""
    curves = {run.name: evaluated(run, comparison.split) for run in comparison.runs}
    lost = {name: lines for name, lines in curves.items() if len(lines) > 1 and narrowed(lines[0], lines[-1])}
    if len(lost) <= MOST_NAMED:
        return [f"{name}: {narrowing(lines[0], lines[-1])}" for name, lines in lost.items()]
    named = ", ".join(list(lost)[:MOST_NAMED])
    return [
        f"In {len(lost)} of {len(curves)} runs pass@k fell while avg@k rose: fewer questions are solved at all, in "
        f"{named} and {len(lost) - MOST_NAMED} more."
    ]


def method_labels(configs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    """One label per run: the objective, and as many of the settings that differ as tell the methods apart.

    A run without a setting on which all others agree comes from another version of pgpo, not from another method.
    """
    values: dict[str, set[str]] = {}
    for config in configs:
        for name, value in config.items():
            values.setdefault(name, set()).add(_frozen(value))
    agreed = {name for name, found in values.items() if len(found) == 1 and name != "objective"}
    told = [_shaping(config, agreed if config.get("objective") else set()) for config in configs]
    keys = [_frozen(settings) for settings in told]
    groups = dict(zip(keys, told))
    labels = {key: objective_label(configs[keys.index(key)]) for key in groups}
    for label in set(labels.values()):
        clash = [key for key in groups if labels[key] == label]
        if len(clash) > 1:
            parts = _telling([groups[key] for key in clash])
            for key in clash:
                written = [label, *(f"{name} {short(groups[key].get(name))}" for name in parts)]
                labels[key] = ", ".join(part for part in written if part)
    counts = Counter(labels.values())
    for key, label in labels.items():
        if counts[label] > 1 or not label:
            name = names[keys.index(key)]
            labels[key] = f"{label} ({name})" if label else name
    return [labels[key] for key in keys]


def _telling(configs: Sequence[Mapping[str, Any]], most: int = 3) -> list[str]:
    """The first settings, at most `most`, each of which distinguishes further configurations."""
    chosen: list[str] = []
    apart = 1
    for name in differing(configs):
        distinct = len({_frozen([config.get(other) for other in (*chosen, name)]) for config in configs})
        if distinct > apart and len(chosen) < most:
            chosen, apart = [*chosen, name], distinct
    return chosen


def _shaping(config: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """The settings that distinguish methods."""
    return {
        name: value
        for name, value in config.items()
        if name not in left_out and name not in _NOT_METHOD and not name.startswith(_NOT_METHOD_PREFIXES)
    }


def objective_label(config: Mapping[str, Any]) -> str:
    objective, alpha = str(config.get("objective") or "").upper(), number(config.get("alpha"))
    label = f"{objective} α = {alpha:g}" if objective == "PGPO" and math.isfinite(alpha) else objective
    return f"{label}, measured trust" if config.get("trust") == "measured" else label


def differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names whose value is not the same in all of them, in order of appearance."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({_frozen(config.get(name)) for config in configs}) > 1]


def short(value: object, limit: int = 40) -> str:
    """The value of a setting, as text of at most `limit` characters."""
    if isinstance(value, float):
        text = f"{value:g}"
    elif value is None or isinstance(value, (str, int)):
        text = "none" if value is None else str(value)
    else:
        text = _frozen(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def curve_split(runs: Sequence[RunCurves]) -> str | None:
    """The split that is evaluated most often (the first of equals), None without evaluations."""
    counts: dict[str, int] = {}
    for run in runs:
        for split in splits(run):
            counts[split] = max(counts.get(split, 0), len(evaluated(run, split)))
    return max(counts, key=lambda split: counts[split], default=None)


def splits(run: RunCurves) -> list[str]:
    return list(dict.fromkeys(split_of(line) for line in run.evaluations))


def split_of(line: Mapping[str, Any]) -> str:
    return str(line.get(runlog.SPLIT) or "held-out")


def evaluated(run: RunCurves, split: str | None) -> list[dict[str, Any]]:
    """The evaluations on a split by step; of two at one step the last."""
    lines = {line[runlog.STEP]: line for line in run.evaluations if split_of(line) == split}
    return [lines[step] for step in sorted(lines)]


def accuracy(lines: Sequence[Mapping[str, Any]]) -> tuple[Array, Array]:
    """Steps and avg@k of evaluations."""
    return numbers([line[runlog.STEP] for line in lines]), numbers([line[runlog.AVG_AT_K] for line in lines])


def _result(
    runs: Sequence[RunCurves], split: str | None, versus: dict[str, PairedDifference] | None = None
) -> MethodResult:
    measured = [_measures(run, split) for run in runs]
    values = {name: np.array([values[name] for values in measured], dtype=np.float64) for name in MEASURES}
    collapsed = [is_collapsed(accuracy(evaluated(run, split))[1].tolist()) for run in runs]
    bounds = _question_bounds(runs[0], split) if len(runs) == 1 else {}
    seeds = [run.seed or run.name for run in runs]
    return MethodResult(runs[0].method, seeds, values, collapsed, bounds, versus=versus or {})


def _measures(run: RunCurves, split: str | None) -> dict[str, float]:
    """The numbers of one run; nan where it has none."""
    steps, values = accuracy(evaluated(run, split))
    test = _test_line(run, split)
    information, seconds = (_finite(run.series.get(name)) for name in (runlog.INFORMATION, runlog.STEP_SECONDS))
    rho = _finite(np.array(multipliers(run.series), dtype=np.float64))
    return {
        INITIAL: values[0] if len(values) and steps[0] == 0 else math.nan,
        PEAK: values.max() if len(values) else math.nan,
        FINAL_VALIDATION: values[-1] if len(values) else math.nan,
        FINAL: number(test[runlog.AVG_AT_K]) if test else math.nan,
        SELECTED: math.nan,
        AUC: area(steps.tolist(), values.tolist()) if len(steps) > 1 else math.nan,
        MEAN_RHO: rho.mean() if len(rho) else math.nan,
        NEGATIVE_INFORMATION_SHARE: (information < 0).mean() if len(information) else math.nan,
        SECONDS_PER_STEP: float(np.median(seconds)) if len(seconds) else math.nan,
    }


def _test_line(run: RunCurves, split: str | None) -> dict[str, Any] | None:
    """The last evaluation on the test split, where that is not the curve and comes after training."""
    lines = evaluated(run, "test") if split != "test" else []
    return lines[-1] if lines and lines[-1][runlog.STEP] > 0 else None


def _question_bounds(run: RunCurves, split: str | None) -> dict[str, tuple[float, float]]:
    lines = evaluated(run, split)
    found: dict[str, Any] = {FINAL: _test_line(run, split)}
    if lines:
        values = accuracy(lines)[1]
        found |= {FINAL_VALIDATION: lines[-1], PEAK: lines[int(values.argmax())]}
        found |= {INITIAL: lines[0]} if lines[0][runlog.STEP] == 0 else {}
    bounds = {
        name: (number(line.get(runlog.AVG_AT_K + runlog.LOW)), number(line.get(runlog.AVG_AT_K + runlog.HIGH)))
        for name, line in found.items()
        if line is not None
    }
    return {name: pair for name, pair in bounds.items() if all(map(math.isfinite, pair))}


def _finite(values: Array | None) -> Array:
    return values[np.isfinite(values)] if values is not None else np.empty(0)


def _frozen(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


# Studies ---------------------------------------------------------------------------------------------------------


def comparisons_of_study(study: StudySource) -> list[Comparison]:
    """One comparison per setting of the summary, in its order."""
    document = study.summary.get("study")
    reference = document.get("reference") if isinstance(document, dict) else None
    comparisons = []
    for name, body in study.summary["settings"].items():
        methods = body.get("methods") if isinstance(body, dict) else None
        published = reference.get(name) if isinstance(reference, dict) else None
        published = published if isinstance(published, dict) else {}
        results = [
            _summarized_result(str(method), values, number(published.get(method)))
            for method, values in (methods if isinstance(methods, dict) else {}).items()
            if isinstance(values, dict)
        ]
        runs = [run for run in study.runs.get(name, []) if run.method in {result.method for result in results}]
        comparisons.append(Comparison(str(name), runs, results, curve_split(runs)))
    return comparisons


def _summarized_result(method: str, values: Mapping[str, Any], reference: float) -> MethodResult:
    versus = values.get("versus")
    seeds, failed = values.get("seeds"), values.get("failed")
    collapsed = values.get("collapsed")
    return MethodResult(
        method=method,
        seeds=[str(seed) for seed in seeds] if isinstance(seeds, list) else [],
        values={name: numbers(values.get(name)) for name in MEASURES},
        collapsed=[bool(value) for value in collapsed] if isinstance(collapsed, list) else [],
        failed=[_seed(entry) for entry in failed] if isinstance(failed, list) else [],
        versus={
            str(other): PairedDifference(
                value=number(found.get("value")),
                low=number(found.get("low")),
                high=number(found.get("high")),
                runs=number(found.get("runs")),
                questions=number(found.get("questions")),
                detectable=number(found.get("detectable")),
            )
            for other, found in (versus if isinstance(versus, dict) else {}).items()
            if isinstance(found, dict) and math.isfinite(number(found.get("value")))
        },
        reference=reference,
    )


def _seed(entry: object) -> str:
    """A failed run is listed as {"seed", "error"}, or as its seed alone."""
    return str(entry.get("seed") if isinstance(entry, dict) else entry)


# Curves ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """One line of a chart: x [n] steps, y [n]; band [n] each or None; raw: steps and values before smoothing."""

    method: str
    label: str
    x: Array
    y: Array
    low: Array | None = None
    high: Array | None = None
    raw: tuple[Array, Array] | None = None
    dashed: bool = False
    runs: int = 1


def accuracy_curve(runs: Sequence[RunCurves], split: str | None) -> Curve | None:
    """Mean avg@k of the runs of a method with the range over runs, or of one run with its interval over questions."""
    lines = [evaluated(run, split) for run in runs]
    lines = [of_run for of_run in lines if of_run]
    if not lines:
        return None
    steps, table = _table([accuracy(of_run) for of_run in lines])
    if len(lines) == 1:
        low, high = (
            numbers([line.get(runlog.AVG_AT_K + end) for line in lines[0]]) for end in (runlog.LOW, runlog.HIGH)
        )
    else:
        low, high = _extremes(table)
    return Curve(runs[0].method, runs[0].method, steps, _mean(table), low, high, runs=len(lines))


def metric_curve(
    runs: Sequence[RunCurves], name: str, label: str, log: bool = False, dashed: bool = False, points: int = POINTS
) -> Curve | None:
    """A metric of the runs of a method, smoothed; over several runs their mean and range; at most `points` points.

    `log` takes means of the logarithm (the line is a geometric mean) and leaves out what has none.
    """
    found = [(run.steps, run.series[name]) for run in runs if name in run.series]
    if log:
        found = [(steps, np.log(np.where(values > 0, values, np.nan))) for steps, values in found]
    found = [(steps, values) for steps, values in found if np.isfinite(values).any()]
    if not found:
        return None
    steps, raw = _table(found)
    raw[~np.isfinite(raw)] = np.nan
    smoothed = np.stack([smooth(values) for values in raw])
    x, y = _thinned(steps, _mean(smoothed), points)
    low, high = None, None
    if len(found) > 1:
        low, high = (_thinned(steps, edge, points)[1] for edge in _extremes(smoothed))
    spikes = _spikes(steps, _mean(raw), points)
    if log:
        y, low, high = np.exp(y), None if low is None else np.exp(low), None if high is None else np.exp(high)
        spikes = spikes[0], np.exp(spikes[1])
    return Curve(runs[0].method, label, x, y, low, high, raw=spikes, dashed=dashed, runs=len(found))


def smooth(values: Array) -> Array:
    """Centered mean over SMOOTHING_SHARE of the values, over fewer at the ends; nan is left out, not spread."""
    window = np.ones(2 * round(len(values) * SMOOTHING_SHARE / 2) + 1)
    known = np.isfinite(values)
    counts = np.convolve(known, window, mode="same")
    sums = np.convolve(np.where(known, values, 0.0), window, mode="same")
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def _table(series: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Steps [n] of any of the runs and values [runs, n], nan where a run has none."""
    steps = np.unique(np.concatenate([of_run for of_run, _ in series]))
    table = np.full((len(series), len(steps)), np.nan)
    for row, (of_run, values) in zip(table, series):
        row[np.searchsorted(steps, of_run)] = values
    return steps, table


def _mean(table: Array) -> Array:
    """[n] mean over the runs that have a value; nan where none has."""
    known = np.isfinite(table)
    return np.where(known.any(0), np.where(known, table, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)


def _extremes(table: Array) -> tuple[Array, Array]:
    """[n] smallest and largest value over the runs that have one."""
    known = np.isfinite(table)
    low, high = np.where(known, table, np.inf).min(0), np.where(known, table, -np.inf).max(0)
    return np.where(known.any(0), low, np.nan), np.where(known.any(0), high, np.nan)


def _bins(count: int, most: int) -> list[npt.NDArray[np.int64]]:
    return [part for part in np.array_split(np.arange(count), most) if len(part)]


def _thinned(steps: Array, values: Array, points: int) -> tuple[Array, Array]:
    """At most `points` points: the mean of each bin of steps, nan where a bin has no value."""
    if len(steps) <= points:
        return steps, values
    starts = [part[0] for part in _bins(len(steps), points)]
    sizes = np.diff([*starts, len(steps)])
    known = np.isfinite(values)
    counts = np.add.reduceat(known.astype(np.float64), starts)
    sums = np.add.reduceat(np.where(known, values, 0.0), starts)
    return np.add.reduceat(steps, starts) / sizes, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _spikes(steps: Array, values: Array, points: int) -> tuple[Array, Array]:
    """As `_thinned`, but each bin keeps its smallest and its largest value, so that no spike is lost."""
    if len(steps) <= 2 * points:
        return steps, values
    kept: list[int] = []
    for part in _bins(len(steps), points):
        known = part[np.isfinite(values[part])]
        if len(known):
            kept += sorted({int(known[values[known].argmin()]), int(known[values[known].argmax()])})
    return steps[kept], values[kept]
