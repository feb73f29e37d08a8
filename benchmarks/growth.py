"""How the cost of a step grows with completions, their length, vocabulary, group and parameters: ours and TRL's.

    python benchmarks/growth.py            every cell that is not in results/growth.jsonl yet
    python benchmarks/growth.py --quick    the ends and the middle of every axis, 25 minutes at most
    python benchmarks/growth.py --write    no measurement: figure and table of docs/PERFORMANCE.md from the JSON

From one base (64 completions of at most 64 tokens in groups of 8, V = 1,024, 0.17 M parameters) one thing is varied at
a time; with the parameters a step is one question, 8 completions of at most 32 tokens. A cell is one size and one
trainer; one_step.py says what a step is. It is measured in two processes, forked from this one, each with a limit: CPU
seconds of one thread while freed memory is reused, the median over steps after the first; and the peak of resident
memory (less what was resident before the model was made) while freed memory goes back to the system.

A line of JSON is written as soon as a cell is done: a run that was stopped goes on where it was. A cell that takes too
long, or asks for more memory than `--memory`, is a line that says so, and larger ones of its axis and trainer are left
out. 1-minute load before and after a cell is in its line: numbers count for nothing where other processes ran.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import math
import multiprocessing
import os
import resource
import statistics
import sys
import textwrap
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # no workers that would outlive a process

from one_step import PARTS, SIDES, SMOLLM2_135M, SMOLLM2_VOCABULARY, Shape, Steps, Work, quiet
from paired import RESULTS, _cpu

from pgpo.errors import UserError
from pgpo.provenance import environment

DOCS = Path(__file__).parents[1] / "docs"
LINES = RESULTS / "growth.jsonl"
BEGIN, END = "<!-- growth.py writes from here -->", "<!-- to here -->"
MIB = 2**20
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # malloc.h

BASE = Work(Shape(64, 192, 2, 4, 4, 16), vocabulary=1024)
ONE_QUESTION = replace(BASE, completions=8, longest=32, prompt=20)  # a step of 135 M takes a minute at BASE's sizes
# Parameters in the key; the last one has its own vocabulary too.
SHAPES = {
    0.1e6: BASE.shape,
    1e6: Shape(128, 384, 4, 4, 2, 32),
    10e6: Shape(320, 960, 8, 5, 5, 64),
    40e6: Shape(512, 1536, 12, 8, 4, 64),
    135e6: SMOLLM2_135M,
}


@dataclass(frozen=True)
class Axis:
    name: str
    sizes: tuple[float, ...]
    quick: tuple[float, ...]

    def work(self, size: float) -> Work:
        n = int(size)
        if self.name == "parameters":
            vocabulary = SMOLLM2_VOCABULARY if size == 135e6 else BASE.vocabulary
            return replace(ONE_QUESTION, shape=SHAPES[size], vocabulary=vocabulary)
        field = {"completions": "completions", "length": "longest", "vocabulary": "vocabulary", "G": "group"}
        return replace(BASE, **{field[self.name]: n})  # type: ignore[arg-type]


AXES = (
    Axis("completions", (8, 16, 32, 64, 128, 256, 512), (8, 64, 512)),
    Axis("length", (16, 64, 256, 512, 1024, 2048), (16, 64, 256, 1024)),
    Axis("vocabulary", (256, 1024, 4096, 16_384, 65_536, 262_144), (256, 1024, 16_384, 262_144)),
    Axis("G", (2, 4, 8, 16, 32), (2, 8, 32)),
    Axis("parameters", tuple(SHAPES), (0.1e6, 1e6, 10e6, 135e6)),
)
WORDS = {
    "completions": "completions per step",
    "length": "longest completion, tokens",
    "vocabulary": "vocabulary",
    "G": "completions of a question, G",
    "parameters": "parameters",
}


@dataclass(frozen=True)
class Limits:
    seconds: float  # of one process
    memory: float  # bytes of one process
    steps: int  # timed, at most
    wanted: float  # CPU seconds of timed steps after which no other one begins


# One process --------------------------------------------------------------------------------------------------------


def _in_child(pipe: Any, what: str, side: str, work: Work, limits: Limits) -> None:
    """Send what `_measure` finds, or {"status", "why"}."""
    libc = ctypes.CDLL(None)
    for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)) if what == "time" else ((M_MMAP_THRESHOLD, 65_536),):
        libc.mallopt(option, value)
    resource.setrlimit(resource.RLIMIT_DATA, (int(limits.memory), int(limits.memory)))
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1), os.dup2(silence, 2)
    try:
        pipe.send({"status": "done", **_measure(what, side, work, limits)})
    except BaseException as error:
        text = str(error).strip() or type(error).__name__
        full = isinstance(error, MemoryError) or "allocate memory" in text
        why = text.splitlines()[0][:300] if full else traceback.format_exc()[-2000:]
        pipe.send({"status": "out of memory" if full else "failed", "why": why})


def _measure(what: str, side: str, work: Work, limits: Limits) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    before = _resident()
    with quiet() as folder:
        steps = Steps(side, work, torch.device("cpu"), folder, clock=time.process_time)
        if what == "memory":
            found = steps(2)
            return {"peak_mib": {p: (found[-1]["peak"][p] - before) / MIB for p in PARTS}}
        found = steps(1 + limits.steps, limits.wanted)[1:]
    seconds = {part: statistics.median(step["seconds"][part] for step in found) for part in (*PARTS, "step")}
    return {"seconds": seconds, "tokens": statistics.mean(step["tokens"] for step in found), "steps": len(found)}


def _resident() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) * 1024


def measured(side: str, work: Work, limits: Limits) -> dict[str, Any]:
    """Both processes of a cell; what the first one that fails says, if one does."""
    context = multiprocessing.get_context("fork")  # imports are done, once
    line: dict[str, Any] = {}
    for what in ("time", "memory"):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_in_child, args=(there, what, side, work, limits))
        process.start()
        there.close()
        found = {"status": "failed", "why": "the process died"}
        if not here.poll(limits.seconds):
            found = {"status": "over the limit", "why": f"{what}: not done after {limits.seconds:.0f} s"}
            process.kill()
        else:
            try:
                found = here.recv()
            except EOFError:
                process.join()
                found["why"] += f" with exit status {process.exitcode}"
        process.join()
        line |= found
        if found["status"] != "done":
            break
    return line


# Cells --------------------------------------------------------------------------------------------------------------


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def cells(quick: bool, axes: Iterable[Axis] = AXES) -> list[tuple[Axis, float, str]]:
    """(axis, size, trainer), the cheap ones of all axes first, both trainers of a size one after the other."""
    sizes = [(i, axis, size) for axis in axes for i, size in enumerate(axis.quick if quick else axis.sizes)]
    return [(axis, size, side) for _, axis, size in sorted(sizes, key=lambda c: c[0]) for side in SIDES]


def run(wanted: list[tuple[Axis, float, str]], path: Path, limits: Limits, minutes: float) -> list[str]:
    """Measure what `path` lacks; returns the cells that were not reached in time."""
    lines = read(path)
    known = {(line["axis"], line["size"], line["side"]): line for line in lines}
    by_work = {(json.dumps(line["work"], sort_keys=True), line["side"]): line for line in lines}
    until = time.monotonic() + 60 * minutes
    missed = []
    for axis, size, side in wanted:
        if (axis.name, size, side) in known:
            continue
        work = axis.work(size)
        key = json.dumps(_plain(work), sort_keys=True), side
        stopped = [s for (a, s, w), line in known.items() if (a, w) == (axis.name, side) and line["status"] != "done"]
        line: dict[str, Any] = {"axis": axis.name, "size": size, "side": side, "work": _plain(work)}
        if smaller := [s for s in stopped if s < size]:
            line |= {"status": "left out", "why": f"{min(smaller):g} was too much"}
        elif key in by_work:  # the base, which all axes share
            line = {**by_work[key], **line}
        elif time.monotonic() + 2 * limits.seconds > until:  # a cell is two processes
            missed.append(f"{axis.name} {size:g} {side}")
            continue
        else:
            load = os.getloadavg()[0]
            line |= measured(side, work, limits)
            line |= {"load": [load, os.getloadavg()[0]], "cpu": _cpu(), "commit": environment()["git_commit"]}
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        known[(axis.name, size, side)] = by_work[key] = line
        seconds = f"{line['seconds']['step']:.3f} s" if line["status"] == "done" else line["why"].splitlines()[-1]
        print(f"{axis.name} {size:g} {side}: {line['status']}, {seconds}", flush=True)
    return missed


def _plain(work: Work) -> dict[str, Any]:
    return {**vars(work), "shape": vars(work.shape)}


# Figure and table ---------------------------------------------------------------------------------------------------


def values(lines: list[dict[str, Any]], axis: str, side: str, part: str, what: str) -> tuple[list[float], list[float]]:
    """(sizes, values) in order: "time" is microseconds per completion token, "step" seconds per step, "memory" MiB."""
    found = {}
    for line in lines:
        if (line["axis"], line["side"], line["status"]) == (axis, side, "done"):
            seconds = line["seconds"][part]
            value = {"time": 1e6 * seconds / line["tokens"], "step": seconds, "memory": line["peak_mib"].get(part, 0.0)}
            found[line["size"]] = value[what]
    sizes = sorted(found)
    return sizes, [found[size] for size in sizes]


def slope(sizes: list[float], found: list[float]) -> float:
    """d log value / d log size, least squares; nan of fewer than two sizes."""
    points = [(math.log(x), math.log(y)) for x, y in zip(sizes, found, strict=True) if y > 0]
    if len(points) < 2:
        return math.nan
    x, y = (statistics.mean(column) for column in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 5.6), layout="constrained")
    grid = figure.subplots(2, len(AXES), squeeze=False)
    colors = dict(zip(PARTS, ("#0072B2", "#009E73", "#D55E00", "#CC79A7"), strict=True))  # Okabe-Ito
    for column, axis in enumerate(AXES):
        for row, what in enumerate(("time", "memory")):
            for part in PARTS:
                for side, style in zip(SIDES, ("o-", "x--"), strict=True):
                    sizes, found = values(lines, axis.name, side, part, what)
                    name = f"{part}, {'pgpo' if side == 'ours' else 'TRL'}"
                    grid[row][column].loglog(sizes, found, style, color=colors[part], markersize=4, lw=1.2, label=name)
            grid[row][column].minorticks_off()  # two thirds of the file
        grid[1][column].set_xlabel(WORDS[axis.name])
    grid[0][0].set_ylabel("CPU µs per completion token")
    grid[1][0].set_ylabel("peak memory, MiB")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=8, loc="outside upper center", frameon=False, fontsize=8)
    # The same bytes from the same numbers; letters as text, not as a path each.
    with matplotlib.rc_context({"svg.hashsalt": "growth", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})
    text = "\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n"
    path.write_text(text)


def _size(size: float) -> str:
    return f"{size:,.0f}" if size < 1e5 or size in AXES[2].sizes else f"{size / 1e6:g}M"  # of parameters


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(lines: list[dict[str, Any]]) -> str:
    """µs per completion token of each part, seconds of a step and highest peak: ours / TRL; then the slopes."""
    head = ["", *PARTS, "s per step", "peak MiB"]
    rows = []

    def pair(axis: str, size: float, get: Any) -> str:
        texts = []
        for side in SIDES:
            line = next((x for x in lines if (x["axis"], x["size"], x["side"]) == (axis, size, side)), None)
            texts.append("" if line is None else get(line) if line["status"] == "done" else "–")
        return "/".join(texts)

    for axis in AXES:
        mine = sorted({line["size"] for line in lines if line["axis"] == axis.name})
        for size in mine:
            parts = [pair(axis.name, size, lambda x, p=p: _short(1e6 * x["seconds"][p] / x["tokens"])) for p in PARTS]
            step = pair(axis.name, size, lambda x: _short(x["seconds"]["step"]))
            peak = pair(axis.name, size, lambda x: _short(max(x["peak_mib"].values())))
            rows.append([f"{axis.name} {_size(size)}", *parts, step, peak])
        if mine:
            slopes = [
                "/".join(f"{slope(*values(lines, axis.name, s, part, 'step')):.2f}" for s in SIDES)
                for part in (*PARTS, "step")
            ]
            rows.append([f"**slope, {axis.name}**", *slopes, ""])
    text = [f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]]
    gone = [x for x in lines if x["status"] != "done"]
    named = [f"{x['axis']} {_size(x['size'])} {'pgpo' if x['side'] == 'ours' else 'TRL'} ({x['status']})" for x in gone]
    return "\n".join([*text, "", *([textwrap.fill(f"Not measured: {'; '.join(named)}.", 100), ""] if named else [])])


def write(lines: list[dict[str, Any]], docs: Path = DOCS) -> None:
    """Put figure and table into docs/PERFORMANCE.md, between its two marks."""
    page = docs / "PERFORMANCE.md"
    text = page.read_text(encoding="utf-8")
    if not lines:
        raise UserError(f"there is nothing to write: {LINES.name} has no line; measure first, without --write.")
    if BEGIN not in text or END not in text:
        raise UserError(f"{page.name} lacks the marks {BEGIN} and {END} between which the table goes; put them there.")
    draw(lines, docs / "growth.svg")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    load = max(max(line.get("load", [0.0])) for line in lines)
    what = f"![time per token and peak memory over five sizes](growth.svg)\n\nOurs / TRL; highest load {load:.1f}."
    page.write_text(f"{before}{BEGIN}\n{what}\n\n{table(lines)}{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer sizes, shorter limits, 25 minutes at most")
    parser.add_argument("--axis", choices=[axis.name for axis in AXES])
    parser.add_argument("--smallest", action="store_true", help="the smallest size of each axis alone: a rehearsal")
    parser.add_argument("--minutes", type=float, help="no cell begins when it might end later (quick: 25)")
    parser.add_argument("--memory", type=float, default=6.0, help="GiB that a process may take")
    parser.add_argument("--out", type=Path, default=LINES)
    parser.add_argument("--write", action="store_true", help="figure and table from the JSON, no measurement")
    arguments = parser.parse_args()
    if arguments.write:
        write(read(arguments.out))
        return
    short = arguments.quick or arguments.smallest
    limits = Limits(
        seconds=120 if short else 600,
        memory=arguments.memory * 2**30,
        steps=5 if short else 9,
        wanted=6 if short else 60,
    )
    axes = [axis for axis in AXES if arguments.axis in (None, axis.name)]
    if arguments.smallest:
        axes = [replace(axis, quick=axis.quick[:1]) for axis in axes]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    minutes = arguments.minutes or (25 if short else math.inf)
    missed = run(cells(short, axes), arguments.out, limits, minutes)
    if missed:
        print(f"not reached in {minutes:g} minutes: {', '.join(missed)}; run again to go on")
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
