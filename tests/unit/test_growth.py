"""benchmarks/growth.py: what it measures of a small cell, that it goes on where it was, and the numbers it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from pgpo.errors import UserError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def growth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import growth

    return growth


def line(axis: str, size: float, side: str, seconds: float, **more) -> dict:
    parts = {"sampling": seconds, "teacher": 2 * seconds, "student": 3 * seconds, "update": 0.01}
    return {
        "axis": axis, "size": size, "side": side, "status": "done", "tokens": 1000.0,
        "seconds": parts | {"step": 4 * seconds}, "peak_mib": dict.fromkeys(parts, 1234.5), "load": [1.5, 0.1],
    } | more  # fmt: skip


def test_the_slope_is_the_power(growth) -> None:
    sizes = [8.0, 64.0, 512.0]
    assert growth.slope(sizes, [3 * x**1.5 for x in sizes]) == pytest.approx(1.5)
    assert growth.slope([8.0, 64.0], [0.0, 1.0]) != growth.slope([8.0, 64.0], [0.0, 1.0])  # nan: one point


def test_every_size_of_an_axis_is_work_that_trl_takes_too(growth) -> None:
    for axis in growth.AXES:
        assert set(axis.quick) <= set(axis.sizes)
        for size in axis.sizes:
            work = axis.work(size)
            assert work.completions % work.group == 0 and work.completions % 8 == 0
    assert growth.AXES[0].work(64) == growth.BASE
    for count, shape in growth.SHAPES.items():
        vocabulary = growth.SMOLLM2_VOCABULARY if count == 135e6 else 1024
        kv, queries = shape.kv_heads * shape.head_dim, shape.heads * shape.head_dim
        block = shape.hidden * (2 * queries + 2 * kv + 3 * shape.intermediate)
        assert shape.layers * block + vocabulary * shape.hidden == pytest.approx(count, rel=0.75)


def test_a_cell_is_measured_and_not_twice(growth, tmp_path: Path, monkeypatch, capsys) -> None:
    """The trainers run in forked processes; one that takes too long is named, and so are larger ones."""
    small = growth.Work(replace(growth.BASE.shape, hidden=16, intermediate=16, layers=1), 256, 8, 4, 8, 10)
    monkeypatch.setattr(growth, "BASE", small)
    axis = growth.Axis("length", (8, 9, 10), (8,))
    path, limits = tmp_path / "growth.jsonl", growth.Limits(300, 8 * 2**30, 1, 0.0)
    assert growth.run([(axis, 8, "ours"), (axis, 8, "trl")], path, limits, minutes=60) == []
    ours, trl = growth.read(path)
    assert (ours["status"], trl["status"]) == ("done", "done"), (ours.get("why"), trl.get("why"))
    for found in (ours, trl):
        seconds = found["seconds"]
        assert all(seconds[part] > 0 for part in growth.PARTS)
        assert sum(seconds[part] for part in growth.PARTS) <= seconds["step"]
        assert 8 * 2 <= found["tokens"] <= 8 * 8
        assert all(0 < peak < 2000 for peak in found["peak_mib"].values())

    monkeypatch.setattr(growth, "measured", lambda *_: {"status": "over the limit", "why": "slow"})
    assert growth.run([(axis, size, "trl") for size in (8, 9, 10)], path, limits, minutes=60) == []
    assert [found["status"] for found in growth.read(path)[2:]] == ["over the limit", "left out"]
    assert growth.run([(axis, 9, "ours")], path, limits, minutes=0) == ["length 9 ours"]


def test_too_long_and_too_much_memory_are_told(growth, monkeypatch) -> None:
    import time

    limits = growth.Limits(0.5, 8 * 2**30, 1, 0.0)
    monkeypatch.setattr(growth, "_measure", lambda *_: time.sleep(60))
    assert growth.measured("ours", growth.BASE, limits)["status"] == "over the limit"

    def fills(*_):
        import torch

        return torch.ones(2**33)

    monkeypatch.setattr(growth, "_measure", fills)
    found = growth.measured("ours", growth.BASE, replace(limits, seconds=300, memory=4 * 2**30))
    assert found["status"] == "out of memory" and "allocate" in found["why"]


def test_figure_and_table(growth, tmp_path: Path) -> None:
    lines = [
        line(axis.name, size, side, 1e-3 * (size / axis.sizes[0]) ** power)
        for axis in growth.AXES
        for side, power in (("ours", 0.5), ("trl", 1.0))
        for size in axis.sizes
    ]
    lines[-1] = {k: v for k, v in lines[-1].items() if k not in ("seconds", "peak_mib")} | {"status": "out of memory"}
    page = tmp_path / "PERFORMANCE.md"
    page.write_text(f"before\n{growth.BEGIN}\nold\n{growth.END}\nafter\n")
    for _ in range(2):  # again, over what it wrote itself
        growth.write(lines, tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| **slope, completions** | 0.50/1.00 | 0.50/1.00 | 0.50/1.00 | 0.00/0.00 | 0.50/1.00 |  |" in text
    assert "| completions 512 | 8/64 | 16/128 |" in text
    assert "Not measured: parameters 135M TRL (out of memory)." in text
    assert max(map(len, text.splitlines())) <= 100
    assert (tmp_path / "growth.svg").stat().st_size < 150_000
    with pytest.raises(UserError, match="nothing to write"):
        growth.write([], tmp_path)
    page.write_text("no marks")
    with pytest.raises(UserError, match="lacks the marks"):
        growth.write(lines, tmp_path)


def test_the_page_has_the_marks(growth) -> None:
    text = (growth.DOCS / "PERFORMANCE.md").read_text(encoding="utf-8")
    assert text.count(growth.BEGIN) == text.count(growth.END) == 1


def test_lines_are_whole_json(growth, tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    assert growth.read(path) == []
    path.write_text(json.dumps(line("G", 2, "ours", 1.0)) + "\n")
    assert growth.read(path)[0]["size"] == 2
