"""All figures that matplotlib draws: of a few runs (`plot_runs`), and of each comparison (`plot_comparisons`)."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.report import charts
from pgpo.report.charts import OUTLINES, Style, shortened, styles_of
from pgpo.report.methods import (
    SMOOTHING_SHARE,
    Comparison,
    Curve,
    accuracy_curve,
    metric_curve,
    objective_label,
    smooth,
)
from pgpo.runlog import LoggedRun
from pgpo.study_files import FINAL

Series = tuple[list[int], list[float]]  # steps and values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito 2008, safe for the colour-blind, without the yellow that white paper swallows.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LONGEST = 60  # characters of a name in the legend of a comparison
SPLIT_STYLES = ("-", "--", ":", "-.")
STYLE = {
    "font.size": 10.5,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "pgpo",  # the same runs give the same file
}


def plot_runs(runs: Sequence[LoggedRun], path: str | os.PathLike[str], title: str | None = None) -> None:
    """Writes a PNG or SVG (by suffix): the axes of `draw_runs` over the optimizer steps.

    Raises UserError without matplotlib, for another suffix, for no runs or more than the colours can tell apart,
    for runs without any line to draw, and for a path that cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"A figure cannot be written as {path.name}; end the name in .png or .svg.")
    require_matplotlib()
    import matplotlib

    with matplotlib.rc_context(STYLE):
        save(draw_runs(runs, title), path)


def require_matplotlib() -> None:
    """Raises UserError, with the remedy, where matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("Figures need matplotlib, which is not installed; run: pip install 'pgpo[report]'") from error


def save(figure: Figure, path: Path) -> None:
    """Writes a figure, the same bytes each time. Raises UserError for a path that cannot be written."""
    try:
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    except OSError as error:
        raise UserError(f"The figure {path} cannot be written ({error.strerror}); choose another path.") from error


def draw_runs(runs: Sequence[LoggedRun], title: str | None = None) -> Figure:
    """The figure of `plot_runs`; its axes are held-out accuracy, information, what multiplied the learning rate, and
    how far a step moved the policy of what the teacher asks (K / D), or the gradient norm where no run measured that.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    if not 1 <= len(runs) <= len(COLORS):
        raise UserError(f"A figure shows 1 to {len(COLORS)} runs, not {len(runs)}; give that many run directories.")
    for run in runs:
        if not run.metrics and not run.evaluations:
            raise UserError(f"The run {run.directory} has no metrics and no evaluations; let it finish a step first.")
    figure = Figure(figsize=(10.5, 6.8), layout="constrained")
    accuracy, information, rho, length = figure.subplots(2, 2, sharex=True).flat
    _draw_accuracy(accuracy, runs)
    caps = {run.config["rho_max"] for run in runs if _is_capped(run)}
    # A cap far above every multiplier would flatten them; it is told in the title instead.
    near = {cap: rf"$\rho_{{max}}$ = {cap:g}" for cap in caps if _largest(runs, runlog.RHO) >= (1 + cap) / 2}
    far = ", ".join(f"{cap:g}" for cap in sorted(caps - near.keys()))
    _draw_metric(information, runs, _read(runlog.INFORMATION), "Information $I_k$ (nats)", levels={0.0: ""})
    rho_title = r"Step multiplier $\rho_k$" + (f" (cap {far})" if far else "")
    if any(run.series(runlog.TRUST_RHO)[0] for run in runs):
        rho_title = r"Step multiplier: $\rho_k$, times trust's"
    # The lagged forms may multiply a small rate a thousand times.
    wide = max((value for run in runs for value in _multipliers(run)[1] if math.isfinite(value)), default=1.0) > 10
    _draw_metric(rho, runs, _multipliers, rho_title, levels={1.0: ""} | near, log=wide)
    if any(_step_lengths(run)[0] for run in runs):
        length_title = "KL moved / divergence to the teacher (log scale)"
        _draw_metric(length, runs, _step_lengths, length_title, levels={1.0: ""}, log=True)
    else:
        _draw_metric(length, runs, _read(runlog.GRAD_NORM), "Gradient norm before clipping (log scale)", log=True)
    for axes in (rho, length):
        axes.set_xlabel("optimizer step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _draw_legend(figure, runs)
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    return figure


def _draw_accuracy(axes: Axes, runs: Sequence[LoggedRun]) -> None:
    evaluations = [_evaluations(run) for run in runs]
    splits = _splits(runs)
    opacity = min(0.18, 0.4 / max(1, len(runs) * len(splits)))  # many bands over each other must not hide the lines
    for lines, color in zip(evaluations, COLORS):
        for split, style in zip(splits, SPLIT_STYLES):
            chosen = [line for line in lines if line.get(runlog.SPLIT) == split]
            steps, value, low, high = (
                _column(chosen, name)
                for name in (runlog.STEP, runlog.AVG_AT_K, runlog.AVG_AT_K + runlog.LOW, runlog.AVG_AT_K + runlog.HIGH)
            )
            if _is_sparse(runs, split):  # a line between two points would claim what lies between
                spread = np.vstack([value - low, high - value])
                axes.errorbar(steps, value, spread, color=color, linestyle="none", marker="D", markersize=6, capsize=4)
                continue
            axes.fill_between(steps, low, high, color=color, alpha=opacity, linewidth=0)
            axes.plot(steps, value, color=color, linestyle=style, marker="o", markersize=3.5, linewidth=1.8)
    ks = {line.get(runlog.K) for lines in evaluations for line in lines}
    name = f"avg@{ks.pop()}" if len(ks) == 1 else "avg@k"
    if len(splits) == 1 and splits[0]:
        name = f"{name}, {splits[0]}"
    axes.set_title(f"Accuracy ({name})", loc="left")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    if not any(evaluations):
        _note_absence(axes)


def _read(name: str) -> Callable[[LoggedRun], Series]:
    return lambda run: run.series(name)


def _multipliers(run: LoggedRun) -> Series:
    """rho, times the part of a step that trust kept."""
    kept = dict(zip(*run.series(runlog.TRUST_RHO)))
    steps, rho = run.series(runlog.RHO)
    return steps, [value * kept.get(step, 1.0) for step, value in zip(steps, rho)]


def _step_lengths(run: LoggedRun) -> Series:
    """K / D of the steps that were measured, after trust has shortened them."""
    divergence = dict(zip(*run.series(runlog.DIVERGENCE)))
    pairs = [(step, moved) for step, moved in zip(*run.series(runlog.TRUST_MOVED)) if divergence.get(step)]
    return [step for step, _ in pairs], [moved / divergence[step] for step, moved in pairs]


def _draw_metric(
    axes: Axes,
    runs: Sequence[LoggedRun],
    series: Callable[[LoggedRun], Series],
    title: str,
    levels: Mapping[float, str] | None = None,
    log: bool = False,
) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_title(title, loc="left")
    if not any(series(run)[0] for run in runs):
        _note_absence(axes)
        return
    for run, color in zip(runs, COLORS):
        steps, raw = series(run)
        if not steps:
            continue
        values = np.array(raw, dtype=np.float64)
        values[~np.isfinite(values) | (log & (values <= 0))] = np.nan  # a gap in the line
        smoothed = np.exp(smooth(np.log(values))) if log else smooth(values)
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smoothed, color=color, linewidth=1.8)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    for level, label in (levels or {}).items():
        _draw_level(axes, level, label)


def _draw_level(axes: Axes, level: float, label: str) -> None:
    axes.axhline(level, color="#555555", linewidth=0.9, linestyle="--" if label else "-", zorder=1)
    if label:
        axes.annotate(
            label,
            xy=(1, level),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            color="#555555",
        )


def _draw_legend(figure: Figure, runs: Sequence[LoggedRun]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=2, label=label) for color, label in zip(COLORS, _labels(runs))]
    splits = _splits(runs)
    if len(splits) > 1:
        handles += [
            Line2D([], [], color="#555555", linestyle="none", marker="D", label=split)
            if _is_sparse(runs, split)
            else Line2D([], [], color="#555555", linestyle=style, label=split)
            for style, split in zip(SPLIT_STYLES, splits)
        ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(4, len(handles)),
        frameon=False,
        title="Band or bar: 95% interval, clustered by question.  Faint: every step."
        f"  Line: centered mean over {SMOOTHING_SHARE:.0%} of the steps (geometric on the log scale).",
        title_fontsize=9,
    )


def _labels(runs: Sequence[LoggedRun]) -> list[str]:
    """Objective and alpha from the configuration, the directory name where that is missing or not unique."""
    names = [run.name for run in runs]
    labels = [objective_label(run.config) or run.name for run in runs]
    return [label if labels.count(label) == 1 else f"{label} ({name})" for label, name in zip(labels, names)]


def _is_capped(run: LoggedRun) -> bool:
    return run.config.get("rho_max") is not None and run.config.get("objective", "pgpo") == "pgpo"


def _is_sparse(runs: Sequence[LoggedRun], split: str | None) -> bool:
    """Is a split evaluated at two steps at most (before and after), in every run?"""
    return all(sum(line.get(runlog.SPLIT) == split for line in _evaluations(run)) <= 2 for run in runs)


def _largest(runs: Sequence[LoggedRun], name: str) -> float:
    values = [value for run in runs for value in run.series(name)[1] if np.isfinite(value)]
    return max(values, default=-np.inf)


def _evaluations(run: LoggedRun) -> list[dict[str, Any]]:
    return [line for line in run.evaluations if line.get(runlog.AVG_AT_K) is not None]


def _splits(runs: Sequence[LoggedRun]) -> list[str | None]:
    """The splits in order of appearance. Raises UserError for more than the line styles can tell apart."""
    splits = list(dict.fromkeys(line.get(runlog.SPLIT) for run in runs for line in _evaluations(run)))
    if len(splits) > len(SPLIT_STYLES):
        raise UserError(f"A figure shows {len(SPLIT_STYLES)} splits, not {len(splits)}; plot runs with fewer splits.")
    return splits


def _column(lines: Sequence[dict[str, Any]], name: str) -> npt.NDArray[np.float64]:
    return np.array([line.get(name) for line in lines], dtype=np.float64)


def _note_absence(axes: Axes) -> None:
    axes.set_yticks([])
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", va="center", color="#777777")


# Comparisons ----------------------------------------------------------------------------------------------------------


def plot_comparisons(comparisons: Sequence[Comparison], folder: Path) -> list[Path]:
    """Writes NAME.png and NAME.svg for each setting that has curves; returns the paths.

    Raises UserError without matplotlib, or when the folder cannot be written.
    """
    require_matplotlib()
    import matplotlib

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"The folder {folder} cannot be created ({error.strerror}); choose another --figures."
        ) from error
    styles = styles_of([method for comparison in comparisons for method in comparison.methods])
    written: list[Path] = []
    for comparison in comparisons:
        if not comparison.runs:
            continue
        name = stem = re.sub(r"[^\w.-]+", "-", comparison.name).strip("-.").lower() or "setting"
        number = 2
        while folder / f"{name}.png" in written:
            name, number = f"{stem}-{number}", number + 1
        with matplotlib.rc_context(STYLE):
            figure = draw_comparison(comparison, styles)
            for suffix in (".png", ".svg"):
                save(figure, folder / f"{name}{suffix}")
                written.append(folder / f"{name}{suffix}")
    return written


def draw_comparison(comparison: Comparison, styles: Mapping[str, Style]) -> Figure:
    """Accuracy curves, final accuracy of every run, I_k, rho_k, entropies, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    accuracy, final, information, rho, entropy, norm = figure.subplots(2, 3).flat
    by_method = {method: [t for t in comparison.runs if t.method == method] for method in comparison.methods}
    by_method = {method: runs for method, runs in by_method.items() if runs}
    for method, runs in by_method.items():
        style = styles[method]
        if curve := accuracy_curve(runs, comparison.split):
            _draw(accuracy, curve, style, marker=True)
        for axes, name, log, dashed in (
            (information, runlog.INFORMATION, False, False),
            (rho, runlog.RHO, False, False),
            (entropy, runlog.STUDENT_ENTROPY, False, False),
            (entropy, runlog.TEACHER_ENTROPY, False, True),
            (norm, runlog.GRAD_NORM, True, False),
        ):
            if curve := metric_curve(runs, name, method, log=log, dashed=dashed):
                _draw(axes, curve, style)
    _draw_final(final, comparison, styles)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    titles = {
        accuracy: f"Accuracy, {comparison.split or 'not evaluated'}",
        information: "Information $I_k$ (nats)",
        rho: r"Step multiplier $\rho_k$",
        entropy: "Entropy (nats), teacher dashed",
        norm: "Gradient norm (log scale)",
    }
    for axes, title in titles.items():
        axes.set_title(title, loc="left")
        axes.set_xlabel("optimizer step")
    information.axhline(0, color="#555555", linewidth=0.9, zorder=1)
    rho.axhline(1, color="#555555", linewidth=0.9, zorder=1)
    if norm.lines:
        norm.set_yscale("log")
    handles = [
        accuracy.plot([], [], label=shortened(method, LONGEST), **_look(styles[method]))[0] for method in by_method
    ]
    several = any(len(runs) > 1 for runs in by_method.values())
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(5, len(handles), max(1, 130 // max(len(handle.get_label()) + 6 for handle in handles))),
        frameon=False,
        title="Band: lowest to highest seed; 95% interval over questions where a method has one run."
        if several
        else None,
        title_fontsize=9,
    )
    figure.suptitle(comparison.name, x=0.01, ha="left", fontsize=13)
    return figure


def _look(style: Style) -> dict[str, Any]:
    """Colour and marker are those of the page; matplotlib takes the outline of a marker as points."""
    marker = [(x, -y) for x, y in OUTLINES[style.shape]] if style.shape in OUTLINES else "o"
    return {"color": COLORS[style.index % charts.COLORS], "marker": marker, "markersize": 5, "linewidth": 1.8}


def _draw(axes: Axes, curve: Curve, style: Style, marker: bool = False) -> None:
    look = _look(style)
    color = look["color"]
    if curve.raw is not None:
        axes.plot(*curve.raw, color=color, alpha=0.2, linewidth=0.7)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    last = int(np.flatnonzero(np.isfinite(curve.y))[-1])
    axes.plot(curve.x, curve.y, linestyle="--" if curve.dashed else "-", markevery=None if marker else [last], **look)


def _draw_final(axes: Axes, comparison: Comparison, styles: Mapping[str, Style]) -> None:
    """One mark per run, a cross for a collapsed one; the mean and its interval beside them."""
    axes.set_title(f"Final accuracy, {'test' if comparison.outcome == FINAL else comparison.split}", loc="left")
    for place, result in enumerate(comparison.results):
        values = result.values.get(comparison.outcome, np.empty(0))
        color = COLORS[styles[result.method].index % charts.COLORS]
        for value, crossed in zip(values, [*result.collapsed, *[False] * len(values)]):
            axes.plot(place - 0.12, value, color=color, marker="x" if crossed else "o", markersize=5, alpha=0.7)
        interval = result.interval(comparison.outcome)
        if interval is not None and math.isfinite(result.mean(comparison.outcome)):
            axes.plot([place + 0.15] * 2, interval, color=color, linewidth=1.4)
            axes.plot(
                place + 0.15, result.mean(comparison.outcome), color=color, marker="_", markersize=9, markeredgewidth=2
            )
    names = [shortened(result.method, 18) for result in comparison.results]
    axes.set_xticks(range(len(names)), names, rotation=25, ha="right")
    axes.set_xlim(-0.6, len(names) - 0.4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
