"""Would the collapse guard have warned in time? An offline study over the records of runs without a guard.

Definitions (the fall of 5 points and the horizon of 15 steps come from the prototype study in the lab):

    decline   the first evaluation whose validation avg@k is at least .05 below the best of the run so far
    label     of an evaluation t before the decline: 1 if the decline comes within 15 steps (t < decline <= t + 15),
              else 0; an evaluation without a decline and without 15 more observed steps has no label
    score     "rise": how much worse than its own running best the smoothed signal is at t; "excess": rise minus that
              of the reference run (frozen teacher) with the same seed at the same step. Early and late steps differ in
              healthy runs too, hence the first row of every table is the step number alone
    alarm     as online (signals.CollapseGuard); the limit is the worst of the healthy reference runs of the OTHER seeds
              times 1.05
    lead      decline minus alarm, in steps; negative if the decline was seen first
    false     an alarm in a run without decline, reference or watched
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.alarms import SIGNALS, WARMUP, CollapseGuard, WatchedMetric, calibrate, excesses
from pgpo.errors import UserError
from pgpo.study_files import accuracy_curve, run_name

FALL = 0.05
HORIZON = 15
RESAMPLES = 1000  # ours: an end of the 95 % interval then has a standard error of 2 % of its width
STEP_BASELINE = "step number"
_TOLERANCE = 1e-9  # an accuracy of .70 lies .05 below .75, in floats too

Points = list[tuple[float, bool]]  # score and label


@dataclass(frozen=True)
class Course:
    """A run as the study sees it: metrics by step, the validation curve, and its decline (a step) if it has one."""

    seed: int
    lines: list[dict[str, Any]]
    evaluated: list[int]
    accuracy: list[float]
    decline: int | None

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Course:
        """From a line of records.jsonl.gz.

        Raises UserError when a metric has not one value (or null) per step, since it cannot be placed in time then.
        """
        steps = record["steps"]
        for name, values in record["metrics"].items():
            if len(values) != len(steps):
                run = run_name(record["setting"], record["method"], record["seed"])
                raise UserError(
                    f"the record {run} has {len(values)} values of {name} for {len(steps)} steps; write null for "
                    "a step without one."
                )
        lines = [{runlog.STEP: step} | {n: v[i] for n, v in record["metrics"].items()} for i, step in enumerate(steps)]
        evaluated, accuracy = accuracy_curve(record["evaluations"])
        return cls(record["seed"], lines, evaluated, accuracy, decline_step(evaluated, accuracy))

    def label(self, step: int) -> bool | None:
        """Of the evaluation at `step`; None where it has none."""
        if self.decline is None:
            return None if step + HORIZON > self.evaluated[-1] else False
        return None if step >= self.decline else self.decline <= step + HORIZON


def decline_step(steps: Sequence[int], accuracy: Sequence[float], fall: float = FALL) -> int | None:
    """Step of the first evaluation that lies at least `fall` below the best so far; None if there is none."""
    best = -math.inf
    for step, value in zip(steps, accuracy, strict=True):
        best = max(best, value)
        if best - value >= fall - _TOLERANCE:
            return step
    return None


def alarm_study(
    records: Sequence[Mapping[str, Any]],
    setting: str,
    watched: str,
    reference: str,
    warmup: int = WARMUP,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """How well each signal foretells the declines of one method.

    Args:
        records: lines of a study's records.jsonl.gz.
        setting, watched, reference: which runs; the reference has a frozen teacher.
        warmup: as the guard's.
        resamples: bootstrap samples of seeds.

    Returns:
        JSON-able: {"setting", "watched", "reference", "seeds", "declines": {seed: step}, "healthy": {"reference": n,
        "watched": n}, "left_out": {"failed": n, "reference_declined": [seed, ...]}, "signals": {name: {
            "roc_rise", "roc_excess": {"value", "low", "high", "points", "positives"} or None without both labels,
            "limit": median over the seeds, or None where healthy runs give no scale,
            "leads": {seed of a declining run: steps, None if there is no alarm},
            "median_lead" (over alarms), "in_time": leads > 0, "missed": without alarm,
            "false_alarms": {"reference": n, "watched": n}}}}; the step number has its ROC area alone.

    Raises:
        UserError: no watched run.

    Fewer than two healthy reference runs give no limits: then there are ROC areas alone.
    """
    chosen = [r for r in records if r["setting"] == setting and r["method"] in (watched, reference)]
    trained = [r for r in chosen if r["status"] == "ok" and r["steps"]]
    runs = [Course.of(r) for r in trained if r["method"] == watched]
    references = [Course.of(r) for r in trained if r["method"] == reference]
    healthy = [c for c in references if c.decline is None]
    if not runs:
        raise UserError(f"the records have no finished run of {setting}/{watched}; run it first.")
    seeds = sorted({c.seed for c in (*runs, *healthy)})
    limits: dict[int, dict[str, float]] = {seed: {} for seed in seeds}
    if len(healthy) >= 2:
        limits = {seed: calibrate([c.lines for c in healthy if c.seed != seed], warmup) for seed in seeds}
    result: dict[str, Any] = {
        "setting": setting,
        "watched": watched,
        "reference": reference,
        "seeds": sorted(c.seed for c in runs),
        "declines": {c.seed: c.decline for c in runs if c.decline is not None},
        "healthy": {"reference": len(healthy), "watched": sum(c.decline is None for c in runs)},
        "left_out": {
            "failed": sum(r["status"] != "ok" for r in chosen),
            "reference_declined": [c.seed for c in references if c.decline is not None],
        },
        "signals": {STEP_BASELINE: {"roc_rise": _roc([_by_step(c, warmup) for c in runs], resamples)}},
    }
    for name, signal in SIGNALS.items():
        if any(signal.read(line) is not None for c in runs for line in c.lines):
            own_limits = {seed: limits[seed].get(name) for seed in seeds}
            result["signals"][name] = _judged(signal, runs, references, own_limits, warmup, resamples)
    return result


def _judged(
    signal: WatchedMetric,
    runs: Sequence[Course],
    references: Sequence[Course],
    limits: Mapping[int, float | None],
    warmup: int,
    resamples: int,
) -> dict[str, Any]:
    """One entry of `alarm_study`'s signals; limits: of each seed, None without a scale."""
    healthy = [c for c in references if c.decline is None]
    # A run's first alarm, None without one.
    alarms = {c.seed: first_alarm(c, signal.name, limits[c.seed], warmup) for c in runs}
    leads = {
        c.seed: None if (alarm := alarms[c.seed]) is None else c.decline - alarm for c in runs if c.decline is not None
    }
    found = [lead for lead in leads.values() if lead is not None]
    known = [limit for limit in limits.values() if limit is not None]
    of_reference = {c.seed: c for c in references}
    pairs = [(c, of_reference[c.seed]) for c in runs if c.seed in of_reference]
    return {
        "roc_rise": _roc([_rise(c, signal, warmup) for c in runs], resamples),
        "roc_excess": _roc([_excess(c, r, signal, warmup) for c, r in pairs], resamples),
        "limit": statistics.median(known) if known else None,
        "leads": leads,
        "median_lead": statistics.median(found) if found else None,
        "in_time": sum(lead > 0 for lead in found),
        "missed": len(leads) - len(found),
        "false_alarms": {
            "reference": sum(first_alarm(c, signal.name, limits[c.seed], warmup) is not None for c in healthy),
            "watched": sum(alarms[c.seed] is not None for c in runs if c.decline is None),
        },
    }


def first_alarm(course: Course, signal: str, limit: float | None, warmup: int = WARMUP) -> int | None:
    """Step at which the guard would have raised its first alarm; None if never, or if there is no limit."""
    if limit is None:
        return None
    guard = CollapseGuard({signal: limit}, warmup)
    return next((line[runlog.STEP] for line in course.lines if guard.update(line[runlog.STEP], line)), None)


def alarm_table(result: Mapping[str, Any]) -> str:
    """The study of `alarm_study` as Markdown: a sentence on the runs, and one row per signal."""
    declines, healthy, left_out = result["declines"], result["healthy"], result["left_out"]
    seen = ", ".join(f"seed {seed}: {step}" for seed, step in declines.items()) or "none"
    text = (
        f"{result['setting']}: {len(declines)} of {len(result['seeds'])} runs of {result['watched']} decline (step at "
        f"which it is seen: {seen}); "
    )
    if healthy["reference"] < 2:
        text += f"no limits, for only {healthy['reference']} runs of {result['reference']} are healthy."
    else:
        text += (
            f"limits from {healthy['reference']} healthy runs of {result['reference']}, leaving out the run's own seed."
        )
    if left_out["failed"] or left_out["reference_declined"]:
        text += (
            f" Left out: {left_out['failed']} failed runs, and {len(left_out['reference_declined'])} runs of "
            f"{result['reference']} that decline themselves."
        )
    rows = [
        "| signal | ROC area, rise | ROC area, excess | limit | lead (steps) | in time | missed | false alarms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    n, of = len(declines), healthy["reference"] + healthy["watched"]
    for name, found in result["signals"].items():
        cells = [name, _area(found["roc_rise"]), _area(found.get("roc_excess"))]
        if found.get("limit") is not None:
            leads = " ".join("–" if lead is None else f"{lead}" for lead in found["leads"].values()) or "–"
            limit = f"{found['limit']:.3g}"
            false = sum(found["false_alarms"].values())
            cells += [limit, leads, f"{found['in_time']}/{n}", f"{found['missed']}/{n}", f"{false}/{of}"]
        else:
            cells += ["–"] * 5
        rows.append(f"| {' | '.join(cells)} |")
    return text + "\n\n" + "\n".join(rows) + "\n"


def roc_area(points: Sequence[tuple[float, bool]]) -> float | None:
    """Chance that a positive scores above a negative, ties counting half; None unless there are both."""
    scores = np.array([score for score, _ in points], dtype=float)
    labels = np.array([label for _, label in points], dtype=bool)
    return _area_of(scores, labels)


# Scores ---------------------------------------------------------------------------------------------------------------


def _labelled(course: Course) -> list[tuple[int, bool]]:
    return [(step, label) for step in course.evaluated if (label := course.label(step)) is not None]


def _by_step(course: Course, warmup: int) -> Points:
    return [(float(step), label) for step, label in _labelled(course) if step > warmup]


def _scores(course: Course, signal: WatchedMetric, warmup: int) -> dict[int, float]:
    found = excesses(signal, course.lines, warmup)
    return {line[runlog.STEP]: e for line, e in zip(course.lines, found, strict=True) if e is not None}


def _rise(course: Course, signal: WatchedMetric, warmup: int) -> Points:
    scores = _scores(course, signal, warmup)
    return [(scores[step], label) for step, label in _labelled(course) if step in scores]


def _excess(course: Course, reference: Course, signal: WatchedMetric, warmup: int) -> Points:
    own, other = _scores(course, signal, warmup), _scores(reference, signal, warmup)
    return [(own[step] - other[step], label) for step, label in _labelled(course) if step in own and step in other]


def _roc(runs: Sequence[Points], resamples: int, seed: int = 0) -> dict[str, Any] | None:
    """ROC area over the points of all runs, and its 95 % percentile bootstrap over runs (seeds).

    A bootstrap sample without positives or without negatives has no area and is left out.
    """
    area = roc_area([p for points in runs for p in points])
    if area is None:
        return None
    scores = [np.array([s for s, _ in points], dtype=float) for points in runs]
    labels = [np.array([y for _, y in points], dtype=bool) for points in runs]
    drawn = np.random.default_rng(seed).integers(len(runs), size=(resamples, len(runs)))
    areas = [_area_of(np.concatenate([scores[i] for i in d]), np.concatenate([labels[i] for i in d])) for d in drawn]
    low, high = np.quantile([a for a in areas if a is not None], [0.025, 0.975])
    return {
        "value": area,
        "low": float(low),
        "high": float(high),
        "points": sum(map(len, runs)),
        "positives": int(sum(y.sum() for y in labels)),
    }


def _area_of(scores: npt.NDArray[np.float64], labels: npt.NDArray[np.bool_]) -> float | None:
    positives, negatives = scores[labels], np.sort(scores[~labels])
    if not len(positives) or not len(negatives):
        return None
    below = np.searchsorted(negatives, positives, "left") + np.searchsorted(negatives, positives, "right")
    return float(below.mean() / 2 / len(negatives))


def _area(found: Mapping[str, Any] | None) -> str:
    return "–" if found is None else f"{found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"
