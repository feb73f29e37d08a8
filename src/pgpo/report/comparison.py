"""The section of one comparison: legend, learning curves, table, differences, signals over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pgpo import runlog
from pgpo.report import methods as m
from pgpo.report.charts import Chart, Point, Style, line_chart, readings, swatch
from pgpo.report.markup import Html, el
from pgpo.report.methods import Comparison, Curve
from pgpo.report.sources import RunCurves, number
from pgpo.report.tables import COLLAPSE_POINTS, difference_table, method_table
from pgpo.study_files import collapsed

SMALL = (360, 216)
HERO = {"large": (1080, 350), "mid": (660, 320), "small": (360, 270)}  # page.css shows the one that fits
CHARTS_OPEN = 3  # of a study: I_k, rho_k, entropies; the rest is one click away
MANY = 6  # ours: bands of more methods than this are drawn fainter
SHIFT = 7.0  # px between the points of two methods at one step

Alarms = list[tuple[float, str]]  # step, text


@dataclass
class Shared:
    """Shared by the sections of a page.

    Attributes:
        styles: the look of each method.
        points: largest number of points of a signal's curve.
        readings: numbers for page.js, to which each section adds its own.
    """

    styles: dict[str, Style]
    points: int = m.POINTS
    readings: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class SignalChart:
    """A chart of one or two metrics. `names`: metric and its text, the second one dashed; `levels`: marked values."""

    title: str
    unit: str
    names: tuple[tuple[str, str], ...]
    levels: tuple[float, ...] = ()
    log: bool = False


SIGNAL_CHARTS = (
    SignalChart("Information I", "nats", ((runlog.INFORMATION, ""),), (0.0,)),
    SignalChart("Step multiplier ρ", "×", ((runlog.RHO, ""),), (1.0,)),
    SignalChart("Token entropy", "nats", ((runlog.STUDENT_ENTROPY, "student"), (runlog.TEACHER_ENTROPY, "teacher"))),
    SignalChart("Gradient norm before clipping", "log scale", ((runlog.GRAD_NORM, ""),), log=True),
    SignalChart("Divergence of student and teacher", "nats per token", ((runlog.DIVERGENCE, ""),)),
    SignalChart(
        "Completion length", "tokens", ((runlog.COMPLETION_LENGTH, "mean"), (runlog.LENGTH_TAIL, "95th percentile"))
    ),
    SignalChart("Training reward", "mean", ((runlog.REWARD, ""),)),
    SignalChart(
        "Sampled divergence",
        "nats per token",
        ((runlog.SAMPLED_KL, "all completions"), (runlog.SAMPLED_KL_WRONG, "wrong ones")),
        (0.0,),
    ),
    SignalChart(
        "Teacher on a demonstration it is shown", "log p, nats per token", ((runlog.DEMONSTRATION_LOGPROB, ""),)
    ),
    SignalChart(
        "How far a step moves the policy",
        "nats per token, log scale",
        ((runlog.TRUST_MOVED, "moved"), (runlog.TRUST_BUDGET, "budget")),
        log=True,
    ),
    SignalChart(
        "How far a whole step moves the policy, of what the teacher asks", "×", ((runlog.TRUST_RATIO, ""),), (1.0,)
    ),
    SignalChart("Part of the step kept by trust", "×", ((runlog.TRUST_RHO, ""),), (1.0,)),
    SignalChart("Samples with a teacher", "share", ((runlog.ACTIVE_SHARE, ""),)),
    SignalChart("Time per step", "s", ((runlog.STEP_SECONDS, ""),)),
)


def comparison_section(
    shared: Shared, comparison: Comparison, key: str, title: str, alarms: Alarms, all_open: bool = False
) -> Html:
    """`key`: id of the section, and prefix of those of its charts; `all_open`: no chart is folded away."""
    hero = accuracy_chart(comparison, f"{key}-accuracy", alarms)
    charts = signal_charts(comparison, key, alarms, shared.points)
    last = _last_step(comparison)
    drawn = [_figure(shared, chart, last) for chart in charts]
    open_ = len(drawn) if all_open else CHARTS_OPEN
    folded = None
    if drawn[open_:]:
        names = ", ".join(chart.title for chart in charts[open_:])
        summary = el("summary", "More signals ", el("span", names, class_="muted"))
        folded = el("details", summary, el("div", *drawn[open_:], class_="charts"))
    no_curve = el("p", "No evaluation was recorded.", class_="note")
    failed = [f"{result.method} seed {', '.join(result.failed)}" for result in comparison.results if result.failed]
    return el(
        "section",
        el("h2", title),
        _legend(shared, comparison),
        _hero(shared, comparison, hero, last) if not hero.empty else no_curve,
        method_table(comparison, shared.styles),
        el("p", "Failed: ", "; ".join(failed), ".", class_="note") if failed else None,
        *(el("p", sentence, class_="note") for sentence in m.narrowed_runs(comparison)),
        difference_table(comparison, shared.styles),
        el("h3", "Signals"),
        el("div", *drawn[:open_], class_="charts") if drawn else el("p", "No signals were recorded.", class_="note"),
        folded,
        id=key,
        class_="many" if len(comparison.results) > MANY else None,
    )


def accuracy_chart(comparison: Comparison, key: str, alarms: Alarms) -> Chart:
    """A line per method on the split of the curve, hollow points on the others, a cross where a run collapsed."""
    groups = _by_method(comparison)
    curves = [curve for runs in groups if (curve := m.accuracy_curve(runs, comparison.split))]
    sparse = all(len(curve.x) <= 2 for curve in curves)  # a line between two points would claim what lies between
    points = [
        point
        for place, runs in enumerate(groups)
        for point in _other_points(runs, None if sparse else comparison.split, SHIFT * (place - (len(groups) - 1) / 2))
    ]
    for run in comparison.runs:
        steps, values = m.accuracy(m.evaluated(run, comparison.split))
        if collapsed(values.tolist()):
            told = f"{run.name} ends {100 * (values.max() - values[-1]):.0f} points below its peak"
            points.append(Point(run.method, float(steps[-1]), 100 * float(values[-1]), cross=True, title=told))
    ks = {number(line.get(runlog.K)) for run in comparison.runs for line in run.evaluations}
    title = f"Accuracy, avg@{ks.pop():g}" if len(ks) == 1 else "Accuracy, avg@k"
    if comparison.split and not sparse:
        title += f", {comparison.split} questions"
    lines = [] if sparse else [_in_percent(curve) for curve in curves]
    return Chart(key, title, "%", lines, points, alarms=alarms, markers=True)


def signal_charts(comparison: Comparison, key: str, alarms: Alarms, points: int = m.POINTS) -> list[Chart]:
    """The charts of SIGNALS for which any run has values."""
    charts = []
    for signal in SIGNAL_CHARTS:
        curves = [
            curve
            for runs in _by_method(comparison)
            for place, (name, part) in enumerate(signal.names)
            if (curve := m.metric_curve(runs, name, _label(runs, part), signal.log, place == 1, points))
        ]
        if curves:
            note = ""
            if any(curve.dashed for curve in curves):
                note = f"Solid: {signal.names[0][1]}; dashed: {signal.names[1][1]}."
            charts.append(
                Chart(
                    key=f"{key}-{signal.names[0][0].replace('_', '-')}",
                    title=signal.title,
                    unit=signal.unit,
                    curves=curves,
                    levels=signal.levels,
                    alarms=alarms,
                    log=signal.log,
                    note=note,
                )
            )
    return charts


def _by_method(comparison: Comparison) -> list[list[RunCurves]]:
    groups = [[run for run in comparison.runs if run.method == method] for method in comparison.methods]
    return [runs for runs in groups if runs]


def _label(runs: Sequence[RunCurves], part: str) -> str:
    return f"{runs[0].method}, {part}" if part else runs[0].method


def _other_points(runs: Sequence[RunCurves], split: str | None, shift: float) -> list[Point]:
    """Evaluations on the splits that have no line: one run with its interval, several as mean and range."""
    points = []
    for other in dict.fromkeys(name for run in runs for name in m.splits(run) if name != split):
        curve = m.accuracy_curve(runs, other)
        if curve is None or curve.low is None or curve.high is None:
            continue
        for x, y, low, high in zip(curve.x.tolist(), 100 * curve.y, 100 * curve.low, 100 * curve.high):
            title = f"{curve.method}, {other}, step {x:g}: {y:.1f} % [{low:.1f}, {high:.1f}]"
            points.append(Point(curve.method, x, float(y), float(low), float(high), shift=shift, title=title))
    return points


def _in_percent(curve: Curve) -> Curve:
    low, high = (None if edge is None else 100 * edge for edge in (curve.low, curve.high))
    return Curve(curve.method, curve.label, curve.x, 100 * curve.y, low, high, runs=curve.runs)


def _last_step(comparison: Comparison) -> float:
    steps = [float(step) for run in comparison.runs for step in run.steps[-1:]]
    steps += [float(line[runlog.STEP]) for run in comparison.runs for line in run.evaluations]
    return max([*steps, 1.0])


def _legend(shared: Shared, comparison: Comparison) -> Html:
    keys = []
    for result in comparison.results:
        style = shared.styles[result.method]
        count = f" ({len(result.seeds)})" if len(result.seeds) > 1 else ""
        box = Html(f'<input type="checkbox" checked value="{style.index}">')
        name = el("span", result.method, el("span", count, class_="muted"))
        keys.append(el("label", box, swatch(style), name, data_key=style.index))
    return el("div", *keys, class_="legend", role="group", aria_label="Methods to show in the charts")


def _hero(shared: Shared, comparison: Comparison, chart: Chart, last: float) -> Html:
    shared.readings[chart.key] = readings(chart, shared.styles)
    drawn = [
        el(
            "div",
            line_chart(chart, shared.styles, last, size, direct=bool(chart.curves) and name != "small"),
            class_=name,
        )
        for name, size in HERO.items()
    ]
    runs = [curve.runs for curve in chart.curves]
    several, single = any(count > 1 for count in runs), any(count == 1 for count in runs)
    hollow = [point for point in chart.points if not point.cross]
    told = [
        (several, "Line: mean over the seeds of a method; band: from its lowest to its highest seed."),
        (single, f"Band{' of a method with one run' if several else ''}: 95 % interval over questions."),
        (bool(hollow), f"Hollow: {_hollow_splits(comparison, chart)}, with {_hollow_bars(comparison)}."),
        (len(hollow) < len(chart.points), f"Cross: a run that ends more than {COLLAPSE_POINTS} below its own peak."),
        (bool(chart.alarms), "Flag: an alarm."),
    ]
    caption = " ".join(text for holds, text in told if holds)
    return el("figure", el("h3", chart.title), el("div", *drawn, class_="hero"), el("figcaption", caption))


def _hollow_splits(comparison: Comparison, chart: Chart) -> str:
    names = dict.fromkeys(name for run in comparison.runs for name in m.splits(run))
    return " and ".join(name for name in names if name != comparison.split or not chart.curves) + " questions"


def _hollow_bars(comparison: Comparison) -> str:
    several = any(len(runs) > 1 for runs in _by_method(comparison))
    return "the range over seeds" if several else "the 95 % interval over questions"


def _figure(shared: Shared, chart: Chart, last: float) -> Html:
    shared.readings[chart.key] = readings(chart, shared.styles)
    note = el("figcaption", chart.note) if chart.note else None
    return el("figure", el("h4", chart.title), line_chart(chart, shared.styles, last, SMALL), note)
