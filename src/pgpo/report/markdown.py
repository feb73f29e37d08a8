"""The report as Markdown, for a pull request or a model card: facts, a table per comparison, differences, settings."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

from pgpo import __version__
from pgpo.report import methods as m
from pgpo.report.charts import fixed
from pgpo.report.markup import visible
from pgpo.report.methods import Comparison, MethodResult, PairedDifference
from pgpo.report.tables import COLLAPSE_POINTS, percent, points
from pgpo.study_files import ENOUGH_RUNS

# What ends a cell, starts a mark or a link, or is HTML; GitHub's Markdown takes a backslash before each of them.
_MARKS = re.compile(r"([\\`*_{}\[\]<>#|~])")
MOST_SETTINGS = 30  # rows of the table of settings


def document(title: str, facts: Mapping[str, str], comparisons: Sequence[Comparison], settings: Settings) -> str:
    """The whole text.

    Args:
        facts: name -> text, in the order in which they are told.
        settings: rows of (name, one value per method) of the comparison of runs.
    """
    lines = [f"# {plain(title)}", "", *(f"- {name}: {plain(text)}" for name, text in facts.items() if text), ""]
    for comparison in comparisons:
        lines += [f"## {plain(comparison.name)}", "", *_methods(comparison), ""]
        lines += [f"- {plain(sentence)}" for sentence in m.narrowed_runs(comparison)]
        if differences := _differences(comparison):
            lines += ["", *differences, ""]
    if settings:
        head, *rows = settings
        lines += ["## Settings", "", *_table(head, rows[:MOST_SETTINGS]), ""]
        if len(rows) > MOST_SETTINGS:
            lines += [f"{len(rows) - MOST_SETTINGS} more differ; `pgpo report` as HTML shows all.", ""]
    lines.append(f"Made by `pgpo report`, pgpo {__version__}.")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)) + "\n"


Settings = Sequence[Sequence[str]]


def plain(text: object) -> str:
    """Text of a run on one line, that no mark in it changes."""
    return _MARKS.sub(r"\\\1", " ".join(visible(text).split()))


def _methods(comparison: Comparison) -> list[str]:
    outcome = comparison.outcome
    split = "test" if outcome == m.FINAL else comparison.split or "held-out"
    columns: list[tuple[str, Callable[[MethodResult], str]]] = [
        ("method", lambda result: plain(result.method)),
        ("runs", lambda result: str(len(result.seeds))),
        (f"before, {comparison.split or 'held-out'} %", lambda result: _value(result, m.INITIAL)),
        (f"final, {split} %", lambda result: _value(result, outcome)),
        ("selected, test %", lambda result: _value(result, m.SELECTED)),
        ("collapsed", lambda result: f"{sum(result.collapsed)} of {len(result.collapsed)}"),
        ("mean rho", lambda result: fixed(result.mean(m.MEAN_RHO), 3)),
    ]
    table = [[cell(result) for _, cell in columns] for result in comparison.results]
    told = [place for place in range(len(columns)) if any(row[place] not in ("", "–") for row in table)]
    head = [columns[place][0] for place in told]
    several = any(len(result.seeds) > 1 for result in comparison.results)
    over = "over seeds (Student's t)" if several else "over questions"
    note = f"In brackets: 95 % interval {over}. Collapsed: ends more than {COLLAPSE_POINTS} below its own peak."
    return [*_table(head, [[row[place] for place in told] for row in table]), "", note]


def _value(result: MethodResult, name: str) -> str:
    if not len(result.known(name)):
        return "–"
    interval = result.interval(name)
    bounds = f" [{percent(interval[0])}, {percent(interval[1])}]" if interval else ""
    return percent(result.mean(name)) + bounds


def _differences(comparison: Comparison) -> list[str]:
    found = [(result, other, one) for result in comparison.results for other, one in result.versus.items()]
    if not found:
        return []
    rows = [[plain(result.method), plain(other), *_difference(one)] for result, other, one in found]
    note = (
        "Difference in final accuracy, percentage points, paired by run and question. MDE: the minimum detectable"
        " effect, the true difference that such a comparison tells from zero four times of five."
    )
    if any(one.runs < ENOUGH_RUNS for *_, one in found):
        note += " The interval of a single pair of runs does not hold the noise of seeds."
    return [*_table(["method", "minus", "points [95 %]", "MDE", "pairs of runs", "questions"], rows), "", note]


def _difference(found: PairedDifference) -> list[str]:
    detectable = percent(found.detectable) if math.isfinite(found.detectable) else "–"
    bounds = f"{points(found.value)} [{points(found.low)}, {points(found.high)}]"
    return [bounds, detectable, f"{found.runs:g}", f"{found.questions:g}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
