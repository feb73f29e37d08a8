"""Details behind the numbers: alarms, settings, environment and commands of runs; plan and failures of a study."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pgpo import runlog
from pgpo.report import methods as m
from pgpo.report.charts import significant
from pgpo.report.markup import Html, el, join
from pgpo.report.methods import Comparison
from pgpo.report.sources import StudySource, number
from pgpo.report.tables import scrolling, settings_table
from pgpo.runlog import LoggedRun

MOST_ALARMS = 200
_TEXTS = ("signal", "action", "reason")
NOT_TOLD = ("seed", "output_dir", "logging_dir", "run_id")


def mapping(value: object) -> dict[str, Any]:
    """The value if it is a JSON object, else an empty one."""
    return {str(name): item for name, item in value.items()} if isinstance(value, dict) else {}


# What each part of a step is drawn with: colours of Okabe and Ito 2008, in the order of runlog.PROFILE_PARTS.
_PART_COLORS = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#999999", "#7F7F00", "#005F5F")
_BAR = 720  # wide


# Runs ------------------------------------------------------------------------------------------------------------


def alarm_marks(runs: Sequence[LoggedRun]) -> list[tuple[float, str]]:
    """Step and text of the alarms that have a step."""
    return [
        (step, f"{run.name}, step {step:g}: {alarm.get('signal')}, {alarm.get('action')}")
        for run in runs
        for alarm in run.alarms[:MOST_ALARMS]
        if math.isfinite(step := number(alarm.get("step")))
    ]


def alarm_section(runs: Sequence[LoggedRun]) -> Html | None:
    alarms = [(run.name, alarm) for run in runs for alarm in run.alarms]
    if not alarms:
        return None
    names = ("step", "signal", "value", "limit", "action", "reason")
    rows = []
    for run, alarm in alarms[:MOST_ALARMS]:
        cells = [el("td", _number_or_text(alarm.get(name)), class_=_side(name)) for name in names]
        rows.append(el("tr", el("th", run, scope="row"), *cells))
    heads = [el("th", name, scope="col", class_=_side(name)) for name in names]
    head = el("tr", el("th", "run", scope="col", class_="left"), *heads)
    table = el("table", el("thead", head), el("tbody", *rows))
    left_out = len(alarms) - len(rows)
    note = f"{left_out} more stand in the runs’ alarms.jsonl." if left_out else "Flags in the charts mark their steps."
    return el("section", el("h2", "Alarms"), scrolling(table, "Alarms"), el("p", note, class_="note"), id="alarms")


def _side(name: str) -> str | None:
    return "left wrap" if name in _TEXTS else None


def _number_or_text(value: object) -> str:
    return significant(value) if isinstance(value, float) else m.short(value, 200)


def profile_section(runs: Sequence[LoggedRun], labels: Sequence[str]) -> Html | None:
    """Where the seconds of a step went, of the runs with a profile: a bar in proportion, and a table."""
    found = [(label, parts) for run, label in zip(runs, labels, strict=True) if (parts := profile_of(run))]
    if not found:
        return None
    blocks = [join([el("h3", label), _profile_bar(parts), _profile_table(parts)]) for label, parts in found]
    note = "Seconds per step and peak memory of the main process. A part inside another one counts for itself alone."
    return el("section", el("h2", "Profile"), *blocks, el("p", note, class_="note"), id="profile")


def profile_of(run: LoggedRun) -> list[tuple[str, float, float]]:
    """(part, mean seconds per logged step, peak GiB or nan) of the parts that have run."""
    found = []
    for name in runlog.PROFILE_PARTS:
        start = runlog.PROFILE + name
        seconds = [value for line in run.metrics if (value := number(line.get(start + runlog.PROFILE_SECONDS))) >= 0]
        peaks = [value for line in run.metrics if (value := number(line.get(start + runlog.PROFILE_PEAK))) >= 0]
        if seconds:
            found.append((name, sum(seconds) / len(run.metrics), max(peaks, default=math.nan)))
    return found


def _profile_bar(parts: Sequence[tuple[str, float, float]]) -> Html:
    whole, x, bars = sum(seconds for _, seconds, _ in parts) or 1.0, 0.0, []
    for name, seconds, _ in parts:
        width = _BAR * seconds / whole
        text = el("title", f"{name}: {significant(seconds)} s per step, {seconds / whole:.1%}")
        bars.append(el("rect", text, x=f"{x:.1f}", y=0, width=f"{width:.1f}", height=28, fill=_part_color(name)))
        x += width
    told = ", ".join(f"{name} {seconds / whole:.0%}" for name, seconds, _ in parts)
    return el("svg", *bars, viewBox=f"0 0 {_BAR} 28", role="img", aria_label=f"share of a step: {told}")


def _profile_table(parts: Sequence[tuple[str, float, float]]) -> Html:
    whole, rows = sum(seconds for _, seconds, _ in parts) or 1.0, []
    for name, seconds, peak in parts:
        mark = el(
            "svg", el("rect", width=10, height=10, fill=_part_color(name)), width=10, height=10, aria_hidden="true"
        )
        cells = [significant(seconds), f"{seconds / whole:.1%}", significant(peak) if peak == peak else ""]
        rows.append(el("tr", el("th", mark, " ", name, scope="row"), *(el("td", cell) for cell in cells)))
    heads = [el("th", text, scope="col") for text in ("part", "seconds per step", "share", "peak memory, GiB")]
    return scrolling(el("table", el("thead", el("tr", *heads)), el("tbody", *rows)), "Profile")


def _part_color(name: str) -> str:
    return _PART_COLORS[runlog.PROFILE_PARTS.index(name) % len(_PART_COLORS)]


def configuration_section(runs: Sequence[LoggedRun], labels: Sequence[str]) -> Html:
    """Settings that differ, settings that were given, all settings, environment, commands."""
    configs = [{k: v for k, v in run.config.items() if k != "arguments"} for run in runs]
    given = [mapping(run.config.get("arguments")) for run in runs]
    environments = [flat(run.environment) | {"pgpo": run.version} for run in runs]
    names = [label if labels.count(label) == 1 else f"{label} ({run.name})" for label, run in zip(labels, runs)]
    told = [name for name in m.differing(configs) if name not in NOT_TOLD[1:]]
    changed = m.differing(environments)
    parts: list[Html] = []
    if told:
        parts.append(settings_table("Settings that differ", names, configs, told, open_=True))
    if changed:
        parts.append(settings_table("Environment that differs", names, environments, changed, open_=True))
    if len(runs) > 1 and not told and not changed:
        parts.append(el("p", "All runs share their settings and their environment.", class_="note"))
    if any(given):
        chosen = list(dict.fromkeys(name for of_run in given for name in of_run))
        parts.append(settings_table("Settings that were given", names, given, chosen, open_=len(runs) == 1))
    every = sorted({name for config in configs for name in config})
    parts.append(settings_table("All settings", names, configs, every))
    known = list(dict.fromkeys(name for environment in environments for name in environment))
    parts.append(settings_table("Environment", names, environments, known))
    commands = [{"command": " ".join(map(str, run.command)), "folder": str(run.directory)} for run in runs]
    parts.append(settings_table("Commands and folders", names, commands, ["command", "folder"]))
    return el("section", el("h2", "Configuration"), *parts, id="configuration")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON objects with dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return found


# Studies ---------------------------------------------------------------------------------------------------------


def plan_section(study: StudySource, comparisons: Sequence[Comparison], key: str) -> Html:
    document = flat(mapping(study.summary.get("study")))
    environment = flat(mapping(study.summary.get("environment")))
    return el(
        "section",
        el("h2", "Plan and environment"),
        _failures(study),
        join(_arguments(study, comparison) for comparison in comparisons),
        settings_table("The study as it was written", [""], [document], list(document)),
        settings_table("Environment", [""], [environment], list(environment)),
        el("p", "Folder: ", el("code", str(study.directory)), class_="note"),
        id=key,
    )


def _failures(study: StudySource) -> Html | None:
    failed = [record for record in study.records if record.get("status") != "ok"]
    if not failed:
        return None
    rows = [
        el(
            "tr",
            el("th", f"{record['setting']}/{record['method']}, seed {record.get('seed')}", scope="row"),
            el("td", m.short(record.get("error"), 500)),
        )
        for record in failed
    ]
    heads = el("tr", el("th", "Run", scope="col", class_="left"), el("th", "Error", scope="col", class_="left"))
    table = el("table", el("thead", heads), el("tbody", *rows), class_="settings")
    summary = el("summary", "Failed runs ", el("span", f"({len(failed)})", class_="muted"))
    return el("details", summary, scrolling(table, "Failed runs"), open=True)


def _arguments(study: StudySource, comparison: Comparison) -> Html | None:
    """The arguments that differ between methods; one that depends on the seed lists its values."""
    values: dict[str, dict[str, list[str]]] = {}
    for record in study.records:
        if str(record["setting"]) == comparison.name and record.get("status") == "ok":
            of_method = values.setdefault(str(record["method"]), {})
            for name, value in mapping(record.get("arguments")).items():
                seen = of_method.setdefault(name, [])
                if (written := m.short(value, 100)) not in seen:
                    seen.append(written)
    names = [method for method in comparison.methods if method in values]
    columns = [{name: _listed(seen) for name, seen in values[method].items()} for method in names]
    told = [name for name in m.differing(columns) if name not in NOT_TOLD]
    return settings_table(f"Arguments that differ in {comparison.name}", names, columns, told) if told else None


def _listed(values: Sequence[str], most: int = 3) -> str:
    return ", ".join(values[:most]) + (", …" if len(values) > most else "")
