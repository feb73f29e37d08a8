"""One picture per setting, for papers and slides: what the page shows, as PNG and SVG."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.report import figures
from pgpo.report.charts import COLORS, OUTLINES, Style, shortened, styles_of
from pgpo.report.methods import Curve, Setting, accuracy_curve, metric_curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


LONGEST = 60  # characters of a name in the legend


def plot_settings(settings: Sequence[Setting], folder: Path) -> list[Path]:
    """Writes NAME.png and NAME.svg for each setting that has curves; returns the paths.

    Raises UserError without matplotlib, or when the folder cannot be written.
    """
    figures.require_matplotlib()
    import matplotlib

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The folder {folder} cannot be made ({error.strerror}); choose another --figures.") from error
    styles = styles_of([method for setting in settings for method in setting.methods])
    written: list[Path] = []
    for setting in settings:
        if not setting.tracks:
            continue
        name = stem = re.sub(r"[^\w.-]+", "-", setting.name).strip("-.").lower() or "setting"
        number = 2
        while folder / f"{name}.png" in written:
            name, number = f"{stem}-{number}", number + 1
        with matplotlib.rc_context(figures.STYLE):
            figure = draw_setting(setting, styles)
            for suffix in (".png", ".svg"):
                figures.save(figure, folder / f"{name}{suffix}")
                written.append(folder / f"{name}{suffix}")
    return written


def draw_setting(setting: Setting, styles: Mapping[str, Style]) -> Figure:
    """Accuracy curves, final accuracy of every run, I_k, rho_k, entropies, gradient norm."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 7), layout="constrained")
    accuracy, final, information, rho, entropy, norm = figure.subplots(2, 3).flat
    by_method = {method: [t for t in setting.tracks if t.method == method] for method in setting.methods}
    by_method = {method: tracks for method, tracks in by_method.items() if tracks}
    for method, tracks in by_method.items():
        style = styles[method]
        if curve := accuracy_curve(tracks, setting.split):
            _draw(accuracy, curve, style, marker=True)
        for axes, name, log, dashed in (
            (information, runlog.INFORMATION, False, False),
            (rho, runlog.RHO, False, False),
            (entropy, runlog.STUDENT_ENTROPY, False, False),
            (entropy, runlog.TEACHER_ENTROPY, False, True),
            (norm, runlog.GRAD_NORM, True, False),
        ):
            if curve := metric_curve(tracks, name, method, log=log, dashed=dashed):
                _draw(axes, curve, style)
    _draw_final(final, setting, styles)
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    titles = {
        accuracy: f"Accuracy, {setting.split or 'not evaluated'}",
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
    several = any(len(tracks) > 1 for tracks in by_method.values())
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
    figure.suptitle(setting.name, x=0.01, ha="left", fontsize=13)
    return figure


def _look(style: Style) -> dict[str, Any]:
    """Colour and marker are those of the page; matplotlib takes the outline of a marker as points."""
    marker = [(x, -y) for x, y in OUTLINES[style.shape]] if style.shape in OUTLINES else "o"
    return {"color": figures.COLORS[style.index % COLORS], "marker": marker, "markersize": 5, "linewidth": 1.8}


def _draw(axes: Axes, curve: Curve, style: Style, marker: bool = False) -> None:
    look = _look(style)
    color = look["color"]
    if curve.raw is not None:
        axes.plot(*curve.raw, color=color, alpha=0.2, linewidth=0.7)
    if curve.low is not None and curve.high is not None:
        axes.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12, linewidth=0)
    last = int(np.flatnonzero(np.isfinite(curve.y))[-1])
    axes.plot(curve.x, curve.y, linestyle="--" if curve.dashed else "-", markevery=None if marker else [last], **look)


def _draw_final(axes: Axes, setting: Setting, styles: Mapping[str, Style]) -> None:
    """One mark per run, a cross for a collapsed one; the mean and its interval beside them."""
    axes.set_title(f"Final accuracy, {'test' if setting.outcome == 'final' else setting.split}", loc="left")
    for place, row in enumerate(setting.rows):
        values = row.values.get(setting.outcome, np.empty(0))
        color = figures.COLORS[styles[row.method].index % COLORS]
        for value, crossed in zip(values, [*row.collapsed, *[False] * len(values)]):
            axes.plot(place - 0.12, value, color=color, marker="x" if crossed else "o", markersize=5, alpha=0.7)
        interval = row.interval(setting.outcome)
        if interval is not None and math.isfinite(row.mean(setting.outcome)):
            axes.plot([place + 0.15] * 2, interval, color=color, linewidth=1.4)
            axes.plot(place + 0.15, row.mean(setting.outcome), color=color, marker="_", markersize=9, markeredgewidth=2)
    axes.set_xticks(
        range(len(setting.rows)), [shortened(row.method, 18) for row in setting.rows], rotation=25, ha="right"
    )
    axes.set_xlim(-0.6, len(setting.rows) - 0.4)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
