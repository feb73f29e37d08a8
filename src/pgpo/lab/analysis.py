"""From the records of a study to its summary and tables: pure functions.

The validation curve gives peak, area and collapse, and selects a step (the first maximum). Test questions give `final`
(at the last step) and `selected` (at the selected one), so that no reported number was used to choose a step.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pgpo import runlog, study_files
from pgpo.evaluate.avg_at_k import paired_scores
from pgpo.study_files import COLLAPSE, ENOUGH_RUNS, accuracy_curve, area, collapsed

Record = Mapping[str, Any]


def negative_share(information: Sequence[float]) -> float | None:
    """Share of the steps with I_k < 0; None where I_k was not measured."""
    return sum(value < 0 for value in information) / len(information) if information else None


def summarize_study(
    records: Sequence[Record], name: str, document: Mapping[str, Any], compare: Mapping[str, Sequence[str]]
) -> dict[str, Any]:
    """The summary of a study; its lists have one entry per finished run, in the order of `seeds`.

    `compare`: reference method -> methods compared with it, on final and selected test accuracy, paired by seed and
    by question: mean difference method - reference with its 95 % interval and the minimum detectable effect.
    """
    settings: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        settings.setdefault(record["setting"], {}).setdefault(record["method"], []).append(record)
    return {
        "schema": study_files.SCHEMA,
        "name": name,
        "study": document,
        "environment": _environment(records),
        "settings": {
            setting: {
                "methods": {
                    method: _method(of_method, {r: methods.get(r, []) for r in compare if method in compare[r]})
                    for method, of_method in methods.items()
                }
            }
            for setting, methods in settings.items()
        },
    }


def _method(records: Sequence[Record], references: Mapping[str, Sequence[Record]]) -> dict[str, Any]:
    ok = _ok(records)
    curves = [accuracy_curve(r["evaluations"]) for r in ok]
    rho = [study_files.multipliers(r["metrics"]) for r in ok]
    return {
        "seeds": [r["seed"] for r in ok],
        "failed": sorted(r["seed"] for r in records if r["status"] != "ok"),
        study_files.INITIAL: round(statistics.fmean(values[0] for _, values in curves), 5) if ok else None,
        study_files.PEAK: [max(values) for _, values in curves],
        study_files.FINAL: [_mean_score(r["test_scores"]) for r in ok],
        study_files.FINAL_VALIDATION: [values[-1] for _, values in curves],
        study_files.SELECTED: [_mean_score(r["selected_test_scores"]) for r in ok],
        "selected_step": [r["selected_step"] for r in ok],
        study_files.AUC: [round(area(*curve), 5) for curve in curves],
        "collapsed": [collapsed(values) for _, values in curves],
        study_files.MEAN_RHO: [round(statistics.fmean(values), 5) if values else None for values in rho],
        study_files.NEGATIVE_INFORMATION_SHARE: [
            None if share is None else round(share, 5)
            for share in (negative_share(_measured(r, runlog.INFORMATION)) for r in ok)
        ],
        study_files.SECONDS_PER_STEP: [r["seconds_per_step"] for r in ok],
        "versus": _versus(ok, references, "test_scores"),
        "versus_selected": _versus(ok, references, "selected_test_scores"),
    }


def _versus(records: Sequence[Record], references: Mapping[str, Sequence[Record]], scores: str) -> dict[str, Any]:
    return {
        name: difference
        for name, reference in references.items()
        if (difference := paired_difference(records, _ok(reference), scores)) is not None
    }


def paired_difference(a: Sequence[Record], b: Sequence[Record], scores: str = "test_scores") -> dict[str, Any] | None:
    """Difference a - b, paired by seed and by question; None if they share no seed."""
    of_a, of_b = ({r["seed"]: r[scores] for r in records} for records in (a, b))
    seeds = sorted(of_a.keys() & of_b.keys())
    if not seeds:
        return None
    found = paired_scores([of_a[seed] for seed in seeds], [of_b[seed] for seed in seeds])
    return {
        "value": round(found.value, 5),
        "low": round(found.low, 5),
        "high": round(found.high, 5),
        "detectable": round(found.detectable, 5),
        "runs": found.runs,
        "questions": found.questions,
    }


def _measured(record: Record, name: str) -> list[float]:
    """The values of a metric, without the steps that have none."""
    return [value for value in record["metrics"].get(name, []) if value is not None]


def _ok(records: Sequence[Record]) -> list[Record]:
    return sorted((r for r in records if r["status"] == "ok"), key=lambda r: r["seed"])


def _mean_score(scores: Mapping[str, float]) -> float:
    return round(statistics.fmean(scores.values()), 5)


def _environment(records: Sequence[Record]) -> dict[str, Any]:
    """The most frequent environment of the runs, with the number of runs per commit and of different environments."""
    found = [r["environment"] for r in records if r.get("environment")]
    if not found:
        return {}
    keys = [repr(sorted((k, repr(v)) for k, v in e.items() if k != "git_commit")) for e in found]
    frequent = Counter(keys).most_common(1)[0][0]
    commits = Counter(str(e.get("git_commit")) for e in found)
    return {
        **{k: v for k, v in found[keys.index(frequent)].items() if k != "git_commit"},
        "commits": dict(commits),
        "environments": len(set(keys)),
    }


# ---------------------------------------------------------------- Markdown


def tables_markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown: differences over all settings first, then one table per setting."""
    settings = summary["settings"]
    lines = [f"# Study {summary['name']}", "", *_notes(summary), ""]
    references = list(dict.fromkeys(r for s in settings.values() for m in s["methods"].values() for r in m["versus"]))
    for reference in references:
        lines += [*_differences(settings, reference), ""]
    for name, setting in settings.items():
        lines += [f"## {name}", "", *_setting(setting["methods"]), ""]
    return "\n".join(lines)


def _notes(summary: Mapping[str, Any]) -> list[str]:
    differences = [d for s in summary["settings"].values() for m in s["methods"].values() for d in m["versus"].values()]
    enough = [d for d in differences if d["runs"] >= ENOUGH_RUNS]
    apart = sum(d["low"] > 0 or d["high"] < 0 for d in enough)
    return [
        "Test accuracies are avg@k on the test questions, mean over seeds (sd over seeds); *selected* is that of the",
        "step which the validation questions select. Peak, area (AUC) and collapse come from the validation curve; a",
        f"run collapsed if the curve ends more than {COLLAPSE:.2f} below its own peak. Differences are paired by seed",
        "and by question: mean [95 % interval] (minimum detectable effect: the true difference that such a comparison",
        "tells from 0 four times of five). Seeds and questions are both random (Student's t); with one seed (marked †)",
        "the noise of seeds is not in the interval. "
        f"Of the {len(enough)} others on final accuracy {apart} exclude 0; about {0.05 * len(enough):.0f} would do",
        "so by chance alone if no method differed.",
    ]


def _differences(settings: Mapping[str, Any], reference: str) -> list[str]:
    """Method x setting: final test accuracy minus the reference's."""
    methods = list(
        dict.fromkeys(n for s in settings.values() for n, m in s["methods"].items() if reference in m["versus"])
    )
    columns = [n for n, s in settings.items() if any(reference in m["versus"] for m in s["methods"].values())]
    rows = [
        [
            method,
            *(_difference(settings[c]["methods"].get(method, {}).get("versus", {}).get(reference)) for c in columns),
        ]
        for method in methods
    ]
    return [f"## Final test accuracy minus {reference}", "", *_table(["method", *columns], rows)]


def _setting(methods: Mapping[str, Any]) -> list[str]:
    references = list(dict.fromkeys(r for m in methods.values() for r in m["versus"]))
    head = [
        "method",
        "seeds",
        "initial",
        "final",
        "selected",
        "peak",
        "AUC",
        "collapsed",
        "mean rho",
        "I < 0",
        "s/step",
    ]
    rows = []
    for name, m in methods.items():
        runs = len(m["seeds"])
        failed = f" ({len(m['failed'])} failed)" if m["failed"] else ""
        rows.append(
            [
                name,
                f"{runs}{failed}",
                "-" if m["initial"] is None else f"{m['initial']:.3f}",
                _mean_sd(m["final"]),
                _mean_sd(m["selected"]),
                _mean(m["peak"]),
                _mean(m["auc"]),
                f"{sum(m['collapsed'])}/{runs}",
                _mean(m["mean_rho"]),
                _mean(m["negative_information_share"], ".2f"),
                _mean(m["seconds_per_step"], ".2f"),
                *(_difference(m["versus"].get(r)) for r in references),
            ]
        )
    return _table([*head, *(f"final vs {r}" for r in references)], rows)


def _difference(d: Mapping[str, Any] | None) -> str:
    if d is None:
        return "-"
    few = "†" if d["runs"] < ENOUGH_RUNS else ""
    return f"{d['value']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]{few} ({d['detectable']:.3f})"


def _mean(values: Sequence[float | None], form: str = ".3f") -> str:
    known = [v for v in values if v is not None]
    return format(statistics.fmean(known), form) if known else "-"


def _mean_sd(values: Sequence[float]) -> str:
    if not values:
        return "-"
    return f"{statistics.fmean(values):.3f}" + (f" ({statistics.stdev(values):.3f})" if len(values) > 1 else "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
