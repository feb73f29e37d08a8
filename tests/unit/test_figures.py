from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest

from pgpo.errors import UserError
from pgpo.report.figures import COLORS, draw_runs, plot_runs
from pgpo.report.methods import smooth
from pgpo.runlog import LoggedRun, RunLog, read_run


def _run(
    directory: Path, config: dict[str, Any], steps: int = 40, splits: tuple[str, ...] = ("validation",)
) -> LoggedRun:
    with RunLog.create(directory, config) as log:
        for step in range(1, steps + 1):
            log.metrics(step, {"information": 0.5 - step / 100, "rho": 1 + step / 1000, "grad_norm": 2.0**step})
        for step in (0, 20, 40):
            for place, split in enumerate(splits):
                value = 0.4 + step / 100 - place / 10
                interval = {"avg_at_k_low": value - 0.05, "avg_at_k_high": value + 0.07}
                log.evaluation(step, {"split": split, "k": 16, "avg_at_k": value} | interval)
    return read_run(directory)


def _line(axes: Any, color: str, width: float) -> tuple[np.ndarray, np.ndarray]:
    """The one line of that colour and width: faint .8, smoothed 1.8."""
    found = [line for line in axes.lines if line.get_color() == color and line.get_linewidth() == width]
    assert len(found) == 1
    return np.asarray(found[0].get_xdata()), np.asarray(found[0].get_ydata())


def _levels(axes: Any) -> list[float]:
    return [line.get_ydata()[0] for line in axes.lines if line.get_color() == "#555555"]


def _legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_panels_show_what_the_run_recorded(tmp_path: Path) -> None:
    run = _run(tmp_path / "a", {"objective": "pgpo", "alpha": 1.5, "rho_max": 1.07})
    figure = draw_runs([run])
    accuracy, information, rho, grad_norm = figure.axes
    steps = np.arange(1, 41)

    x, y = _line(accuracy, COLORS[0], 1.8)
    assert x.tolist() == [0, 20, 40] and y == pytest.approx([0.4, 0.6, 0.8])
    (band,) = accuracy.collections
    corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices.tolist()}
    assert corners == {(0, 0.35), (20, 0.55), (40, 0.75), (0, 0.47), (20, 0.67), (40, 0.87)}
    assert accuracy.get_title(loc="left") == "Accuracy (avg@16, validation)"

    for axes, values in ((information, 0.5 - steps / 100), (rho, 1 + steps / 1000), (grad_norm, 2.0**steps)):
        x, y = _line(axes, COLORS[0], 0.8)
        assert x.tolist() == steps.tolist() and y == pytest.approx(values)
        x, y = _line(axes, COLORS[0], 1.8)
        # All three are straight on their axis, and a centered mean of a straight line is the line.
        assert x.tolist() == steps.tolist() and y[1:-1] == pytest.approx(values[1:-1])
    assert grad_norm.get_yscale() == "log"
    assert _levels(information) == [0.0] and _levels(rho) == [1.0, 1.07]
    assert [text.get_text() for text in rho.texts] == [r"$\rho_{max}$ = 1.07"]
    assert len({axes.get_xlim() for axes in figure.axes}) == 1
    assert _legend(figure) == ["PGPO α = 1.5"]


def test_runs_keep_their_color_and_label_over_the_panels(tmp_path: Path) -> None:
    runs = [
        _run(tmp_path / "a", {"objective": "pgpo", "alpha": 1.0, "rho_max": 1.06}),
        _run(tmp_path / "b", {"objective": "sdpo", "alpha": 1.0, "rho_max": 3.0}),
        _run(tmp_path / "c", {"objective": "pgpo", "alpha": 1.0, "rho_max": 1.06}),
        _run(tmp_path / "d", {}),
    ]
    figure = draw_runs(runs)
    assert _legend(figure) == ["PGPO α = 1 (a)", "SDPO", "PGPO α = 1 (c)", "d"]
    handles = [line.get_color() for line in figure.legends[0].get_lines()]
    for axes in figure.axes:
        drawn = [line.get_color() for line in axes.lines if line.get_linewidth() == 1.8]
        assert drawn == handles == list(COLORS[:4])
    assert _levels(figure.axes[2]) == [1.0, 1.06]  # each cap once; the one of SDPO has no effect


def test_splits_are_told_apart_and_never_joined(tmp_path: Path) -> None:
    figure = draw_runs([_run(tmp_path / "a", {"objective": "sdpo"}, splits=("validation", "test"))])
    lines = {line.get_linestyle(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    assert lines == {"-": pytest.approx([0.4, 0.6, 0.8]), "--": pytest.approx([0.3, 0.5, 0.7])}
    assert _legend(figure) == ["SDPO", "validation", "test"]
    assert figure.axes[0].get_title(loc="left") == "Accuracy (avg@16)"


def test_a_cap_far_above_the_multipliers_is_told_instead_of_drawn(tmp_path: Path) -> None:
    rho = draw_runs([_run(tmp_path / "a", {"objective": "pgpo", "alpha": 1.0, "rho_max": 2.0})]).axes[2]
    assert _levels(rho) == [1.0]
    assert rho.get_title(loc="left").endswith("(cap 2)")


def test_two_evaluations_are_points_with_bars_and_no_line(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "a", {"objective": "sdpo"}) as log:
        for step, value in ((0, 0.5), (40, 0.75)):
            log.evaluation(
                step, {"split": "test", "k": 16, "avg_at_k": value, "avg_at_k_low": 0.25, "avg_at_k_high": 1}
            )
    (container,) = draw_runs([read_run(tmp_path / "a")]).axes[0].containers
    points, _, (bars,) = container
    assert points.get_linestyle() == "None" and points.get_xydata().tolist() == [[0, 0.5], [40, 0.75]]
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.25, 1], [0.25, 1]]


def test_non_finite_values_are_gaps_and_do_not_spread(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "a", {"objective": "pgpo"}) as log:
        for step in range(1, 61):
            broken = step == 30
            values = {"information": math.nan if broken else 0.25, "grad_norm": math.inf if broken else 3.0}
            log.metrics(step, values | ({} if step == 10 else {"rho": 1.0}))
    figure = draw_runs([read_run(tmp_path / "a")])
    _, information, rho, grad_norm = figure.axes
    for axes, value in ((information, 0.25), (grad_norm, 3.0)):
        for width in (0.8, 1.8):
            _, y = _line(axes, COLORS[0], width)
            assert np.flatnonzero(np.isnan(y)).tolist() == [29]
            assert np.delete(y, 29) == pytest.approx(value)
    assert 10 not in _line(rho, COLORS[0], 0.8)[0]


def test_smoothing_by_hand() -> None:
    values = np.zeros(80)
    values[[0, 40]] = 6.0
    # 5 % of 80 is 4, the odd window 5; at the end three values remain.
    expected = np.zeros(80)
    expected[[38, 39, 40, 41, 42]] = 6 / 5
    expected[[0, 1, 2]] = 6 / 3, 6 / 4, 6 / 5
    assert smooth(values) == pytest.approx(expected)
    assert smooth(np.array([1.0, 5.0, 2.0])).tolist() == [1.0, 5.0, 2.0]  # too short to smooth


def test_a_panel_without_data_says_so(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "a", {"objective": "grpo"}) as log:
        log.metrics(1, {"grad_norm": 1.0})
    figure = draw_runs([read_run(tmp_path / "a")])
    notes = [[text.get_text() for text in axes.texts] for axes in figure.axes]
    assert notes == [["not recorded"], ["not recorded"], ["not recorded"], []]


@pytest.mark.parametrize(("name", "head"), [("figure.png", b"\x89PNG"), ("figure.svg", b"<?xml")])
def test_the_file_is_of_the_kind_its_suffix_says_and_the_same_each_time(tmp_path: Path, name: str, head: bytes) -> None:
    run = _run(tmp_path / "a", {"objective": "pgpo", "alpha": 1.0, "rho_max": 1.06})
    plot_runs([run], tmp_path / name, title="A title")
    first = (tmp_path / name).read_bytes()
    plot_runs([run], tmp_path / name, title="A title")
    assert first.startswith(head) and (tmp_path / name).read_bytes() == first


def test_colors_differ_for_the_color_blind() -> None:
    # Machado et al. 2009, deuteranopia and protanopia at full severity, in linear RGB.
    matrices = {
        "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    }
    colors = np.array([matplotlib.colors.to_rgb(color) for color in COLORS])
    for matrix in matrices.values():
        seen = (colors**2.2) @ np.array(matrix).T
        seen = np.clip(seen, 0, 1) ** (1 / 2.2)
        distances = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[np.triu_indices(len(COLORS), 1)]
        assert distances.min() > 0.15


def test_what_cannot_be_drawn_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = _run(tmp_path / "a", {})
    with pytest.raises(UserError, match=r"written as figure\.jpg; end the name in \.png or \.svg"):
        plot_runs([run], tmp_path / "figure.jpg")
    with pytest.raises(UserError, match=r"missing/figure\.png cannot be written \(No such file or directory\)"):
        plot_runs([run], tmp_path / "missing" / "figure.png")
    for runs in ([], [run] * 8):
        with pytest.raises(UserError, match=f"1 to 7 runs, not {len(runs)}"):
            plot_runs(runs, tmp_path / "figure.png")
    RunLog.create(tmp_path / "empty", {}).close()
    with pytest.raises(UserError, match="empty has no metrics and no evaluations"):
        plot_runs([run, read_run(tmp_path / "empty")], tmp_path / "figure.png")
    many = _run(tmp_path / "many", {}, splits=("a", "b", "c", "d", "e"))
    with pytest.raises(UserError, match="4 splits, not 5"):
        plot_runs([many], tmp_path / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(UserError, match=r"pip install 'pgpo\[report\]'"):
        plot_runs([run], tmp_path / "figure.png")
