"""The picture of `pgpo probe`: a row per temperature, with success by hint, right completions per question, and I_k."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgpo.errors import UserError
from pgpo.files import NON_FINITE
from pgpo.report.figures import COLORS, STYLE, require_matplotlib, save

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Names in the probe's folder, as the command writes them.
RESULT_FILE, FIGURE_FILE = "probe.json", "probe.png"
_WIDTH = 0.38  # of a bar


def plot_probe(folder: Path) -> Path:
    """Draw the probe in a folder into it; the picture's path.

    Raises UserError without matplotlib, and for a folder without a result.
    """
    require_matplotlib()
    import matplotlib

    try:
        result = json.loads((folder / RESULT_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no readable {RESULT_FILE}; let the probe end first.") from error
    with matplotlib.rc_context(STYLE):
        save(draw_probe(result), folder / FIGURE_FILE)
    return folder / FIGURE_FILE


def draw_probe(result: Mapping[str, Any]) -> Figure:
    """The figure of a result, as probe.json holds it; three axes per temperature."""
    from matplotlib.figure import Figure

    readings: Sequence[Mapping[str, Any]] = result["readings"]
    figure = Figure(figsize=(12, 3.1 * len(readings) + 0.6), layout="constrained")
    for reading, (success, groups, information) in zip(readings, figure.subplots(len(readings), 3, squeeze=False)):
        _draw_success(success, reading)
        _draw_groups(groups, reading)
        _draw_information(information, reading)
    figure.suptitle(result["verdict"]["sentence"], x=0.01, ha="left", fontsize=10, wrap=True)
    return figure


def _draw_success(axes: Axes, reading: Mapping[str, Any]) -> None:
    """Student and self-teacher on the questions that have such a hint, and how often the hint's answer is given."""
    hints = {kind: hint for kind, hint in reading["hints"].items() if hint["success"] is not None}
    axes.set_title(f"Right, temperature {reading['temperature']:g}", loc="left")
    for shift, name, label in ((-_WIDTH / 2, "student", "student"), (_WIDTH / 2, "success", "reading the hint")):
        values, spread = _estimates([hint[name] for hint in hints.values()])
        places = [i + shift for i in range(len(hints))]
        color = COLORS[0] if name == "student" else COLORS[1]
        axes.bar(places, values, _WIDTH, color=color, label=label, yerr=spread, capsize=3, ecolor="#555555")
    followed = [(i, hint["followed"]["value"]) for i, hint in enumerate(hints.values()) if hint["followed"] is not None]
    places = [i + _WIDTH / 2 for i, _ in followed]
    axes.plot(places, [v for _, v in followed], "kD", markersize=5, label="gives the hint's answer")
    axes.set_ylim(0, 1.05)
    _name(axes, list(hints))
    axes.legend(fontsize=8, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=3)


def _draw_groups(axes: Axes, reading: Mapping[str, Any]) -> None:
    axes.set_title(f"Questions by right completions of {reading['group']}", loc="left")
    last = len(reading["groups"]) - 1
    colors = [COLORS[3] if n in (0, last) else COLORS[2] for n in range(last + 1)]
    axes.bar(range(last + 1), reading["groups"], color=colors)


def _draw_information(axes: Axes, reading: Mapping[str, Any]) -> None:
    hints = reading["hints"]
    axes.set_title("Information $I_k$ (nats)", loc="left")
    values, spread = _estimates([hint["information"] for hint in hints.values()])
    axes.bar(range(len(hints)), values, 2 * _WIDTH, color=COLORS[5], yerr=spread, capsize=3, ecolor="#555555")
    axes.axhline(0, color="black", linewidth=0.8)
    _name(axes, list(hints))


def _name(axes: Axes, kinds: Sequence[str]) -> None:
    axes.set_xticks(range(len(kinds)), kinds)


def _estimates(estimates: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[list[float]]]:
    """Values, and distances to the ends of their intervals; none where there is no interval."""
    found = [{name: float(NON_FINITE.get(v, v)) for name, v in estimate.items()} for estimate in estimates]
    values = [e["value"] for e in found]
    sides = [[e["value"] - e["low"] for e in found], [e["high"] - e["value"] for e in found]]
    return values, [[max(0.0, side) if side == side else 0.0 for side in row] for row in sides]
