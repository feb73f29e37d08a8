"""Tables of methods: numbers with intervals, every seed as a dot, differences as a forest plot, settings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pgpo.report import methods as m
from pgpo.report.charts import (
    FOREST,
    STRIP,
    Style,
    fixed,
    interval_strip,
    padded,
    scale_strip,
    strip,
    swatch,
)
from pgpo.report.markup import Html, el, escape, join
from pgpo.report.methods import Comparison, MethodResult, PairedDifference
from pgpo.study_files import COLLAPSE, ENOUGH_RUNS

Styles = Mapping[str, Style]
Format = Callable[[float], str]

COLLAPSE_POINTS = f"{100 * COLLAPSE:.0f} points"


def percent(share: float) -> str:
    return fixed(100 * share, 1)


def points(difference: float) -> str:
    """Percentage points, with their sign."""
    text = percent(difference)
    return f"+{text}" if difference > 0 and text != "0.0" else text


def breakable(name: str) -> Html:
    """A name that may be broken after an underscore."""
    return Html(escape(name).replace("_", "_<wbr>"))


def scrolling(table: Html, label: str) -> Html:
    """A table that scrolls, by touch or by the arrow keys, if it is wider than the page."""
    return el("div", table, class_="table", tabindex="0", role="region", aria_label=label)


# Methods of one comparison ------------------------------------------------------------------------------------------


def method_table(comparison: Comparison, styles: Styles) -> Html:
    """One row per method, the most important columns first."""
    heads = [el("th", "Method", scope="col", class_="left")]
    lines = [[_method_head(result, styles[result.method])] for result in comparison.results]
    foot = [el("th")]

    def column(
        head: object, unit: str, why: str, cell: Callable[[MethodResult], Html], scale: Html | None = None
    ) -> None:
        heads.append(el("th", head, " ", el("small", unit or "\xa0"), scope="col", title=why))
        foot.append(el("td", scale))
        for result, line in zip(comparison.results, lines):
            line.append(cell(result))

    def measure(name: str, head: str, unit: str, why: str, form: Format = percent) -> None:
        if any(len(result.known(name)) for result in comparison.results):
            intervals = name not in (m.MEAN_RHO, m.NEGATIVE_INFORMATION_SHARE, m.SECONDS_PER_STEP)
            column(head, unit, why, lambda result: _value(result, name, form, intervals, sd=name == comparison.outcome))

    curve, outcome = comparison.split or "validation", comparison.outcome
    ended = "after the last step" if outcome == m.FINAL else "at the last evaluation during training"
    several = any(len(result.seeds) > 1 for result in comparison.results)
    if several:
        domain = padded([value for result in comparison.results for value in 100 * result.known(outcome)])
        column(
            "Final, each seed",
            f"{'test' if outcome == m.FINAL else curve}, %",
            "one dot per run, a cross for a collapsed one, a tick at the mean",
            lambda result: el("td", _dots(result, outcome, domain, styles[result.method])),
            scale_strip(domain, STRIP),
        )
    measure(outcome, "Final", f"{'test' if outcome == m.FINAL else curve}, %", f"mean accuracy {ended}")
    if any(math.isfinite(result.reference) for result in comparison.results):
        column("Paper", "one run, %", "published accuracy of a single run, without interval", _reference)
    first, controls = _compared(comparison)[:1], _compared(comparison)[1:]
    if first:
        why = f"final accuracy minus that of {first[0]}, in percentage points; paired, 95 % interval"
        column(_minus(first[0]), "points", why, lambda result: _versus(result, first, named=False))
    if controls:
        why = "final accuracy minus that of the method’s own controls, in percentage points; paired, 95 % interval"
        head = _minus(controls[0]) if len(controls) == 1 else "minus controls"
        column(head, "points", why, lambda result: _versus(result, controls, named=len(controls) > 1))
    column(
        "Collapsed", "runs", f"ends more than {COLLAPSE_POINTS} below its own peak, on {curve} questions", _collapsed
    )
    if any(result.failed for result in comparison.results):
        column("Failed", "runs", "stopped with an error", lambda result: el("td", len(result.failed) or "–"))
    measure(m.PEAK, "Peak", f"{curve}, %", "highest evaluation during training: the best of many, hence biased upward")
    if outcome != m.FINAL_VALIDATION:
        measure(m.FINAL_VALIDATION, "Final", f"{curve}, %", "last evaluation during training")
    measure(m.SELECTED, "Selected", "test, %", "test questions at the step with the highest validation accuracy")
    measure(m.AUC, "Area", f"{curve}, %", "area under the evaluation curve over its range of steps: the mean accuracy")
    measure(m.MEAN_RHO, "Mean ρ", "", "mean step multiplier over the run", lambda value: fixed(value, 3))
    measure(
        m.NEGATIVE_INFORMATION_SHARE,
        "I < 0",
        "% of steps",
        "share of the steps where the teacher was less certain than the student",
    )
    measure(m.SECONDS_PER_STEP, "Time", "s per step", "median wall time of a step", lambda value: fixed(value, 2))
    body = [el("tr", *line, data_m=styles[result.method].index) for result, line in zip(comparison.results, lines)]
    parts = [el("thead", el("tr", *heads)), el("tbody", *body)]
    if several:
        parts.append(el("tfoot", el("tr", *foot), aria_hidden="true"))
    return join(
        [
            scrolling(el("table", *parts, class_="numbers"), f"Methods of {comparison.name}"),
            el("p", _table_note(comparison), class_="note"),
        ]
    )


def _table_note(comparison: Comparison) -> str:
    parts = []
    if any(len(result.seeds) > 1 for result in comparison.results):
        parts.append(
            "In brackets: 95 % interval of the mean over seeds (Student’s t), without the sampling of questions; ±:"
            " standard deviation over seeds."
        )
    if any(len(result.seeds) == 1 and result.bounds for result in comparison.results):
        parts.append("In brackets, of a single run: 95 % interval over questions, without the noise of seeds.")
    if any(len(result.seeds) == 1 and not result.bounds for result in comparison.results):
        parts.append("A method with one run has no interval.")
    parts.append(
        f"Collapsed: the last evaluation is more than {COLLAPSE_POINTS} below the run’s own highest; it compares point"
        " estimates, so that with few questions noise alone can raise it."
    )
    return " ".join(parts)


def _minus(other: str) -> Html:
    return el("span", "minus ", breakable(other), class_="wrap")


def _method_head(result: MethodResult, style: Style) -> Html:
    seeds = f"seeds {', '.join(result.seeds)}" if len(result.seeds) > 1 else None
    return el(
        "th",
        el("span", swatch(style), el("span", breakable(result.method)), class_=style.classes),
        scope="row",
        title=seeds,
    )


def _value(result: MethodResult, name: str, form: Format, intervals: bool, sd: bool) -> Html:
    if not len(result.known(name)):
        return el("td", "–", class_="no")
    interval, spread = result.interval(name) if intervals else None, result.sd(name) if sd else math.nan
    return el(
        "td",
        form(result.mean(name)),
        el("span", f" ± {form(spread)}", class_="muted") if math.isfinite(spread) else None,
        el("span", f"[{form(interval[0])}, {form(interval[1])}]", class_="ci") if interval else None,
    )


def _reference(result: MethodResult) -> Html:
    return el("td", percent(result.reference), class_=None if math.isfinite(result.reference) else "no")


def _compared(comparison: Comparison) -> list[str]:
    """The methods that others are compared with, the one with the most comparisons first."""
    counts = Counter(other for result in comparison.results for other in result.versus)
    return [other for other, _ in counts.most_common()]


def _versus(result: MethodResult, others: Sequence[str], named: bool) -> Html:
    """The row's difference from each of the others that it is compared with."""
    found = [(other, result.versus[other]) for other in others if other in result.versus]
    if not found:
        return el("td", "–", class_="no")
    parts: list[object] = []
    for other, difference in found:
        if named:
            parts.append(el("span", other, class_="ci"))
        parts += [points(difference.value), el("span", _bounds(difference), class_="ci")]
    return el("td", *parts, title="; ".join(_size(difference) for _, difference in found))


def _collapsed(result: MethodResult) -> Html:
    if not result.collapsed:
        return el("td", "–", class_="no")
    count = sum(result.collapsed)
    text = f"{count} of {len(result.collapsed)}" if len(result.collapsed) > 1 else "yes" if count else "no"
    return el("td", text, class_="flag" if count else "no")


def _dots(result: MethodResult, outcome: str, domain: tuple[float, float], style: Style) -> Html:
    values = 100 * result.values.get(outcome, result.known(outcome))
    return strip(values.tolist(), result.collapsed, 100 * result.mean(outcome), domain, style)


def _bounds(found: PairedDifference) -> str:
    return f"[{points(found.low)}, {points(found.high)}]"


def _size(found: PairedDifference) -> str:
    size = f"{found.runs:g} pair{'s' if found.runs != 1 else ''} of runs, {found.questions:g} questions"
    return size + (f", detects {percent(found.detectable)} points" if math.isfinite(found.detectable) else "")


# Differences -----------------------------------------------------------------------------------------------------


def difference_table(comparison: Comparison, styles: Styles) -> Html | None:
    """The forest plot: every comparison of the summary, by the method that is compared with."""
    pairs = [(other, result, found) for result in comparison.results for other, found in result.versus.items()]
    if not pairs:
        return None
    others = _compared(comparison)
    domain = padded([100 * end for *_, found in pairs for end in (found.low, found.high, found.value)], around=0.0)
    body: list[Html] = []
    for reference in others:
        heading = f"minus {reference}"
        body.append(el("tr", el("th", heading, colspan=6, class_="left muted", scope="colgroup")))
        for other, result, found in pairs:
            if other == reference:
                body.append(_difference(result, found, domain, styles[result.method]))
    titles = {"Method": "left", "\xa0": None, "Points": None, "Interval": "left", "MDE": None, "Pairs": None}
    heads = el("thead", el("tr", *(el("th", text, scope="col", class_=side) for text, side in titles.items())))
    foot = el("tr", el("th"), el("td", scale_strip(domain, FOREST)), *[el("td")] * 4)
    table = el("table", heads, el("tbody", *body), el("tfoot", foot, aria_hidden="true"), class_="pairs")
    note = (
        "Difference in final accuracy, percentage points, with its 95 % interval from paired runs and questions."
        " Filled: the interval excludes zero; among many comparisons some do so by chance. MDE: the minimum detectable"
        " effect, the true difference that such a comparison tells from zero four times of five."
    )
    if any(found.runs < ENOUGH_RUNS for *_, found in pairs):
        note += " The interval of a single pair of runs does not hold the noise of seeds."
    return join(
        [el("h3", "Differences"), el("p", note, class_="note"), scrolling(table, f"Differences in {comparison.name}")]
    )


def _difference(result: MethodResult, found: PairedDifference, domain: tuple[float, float], style: Style) -> Html:
    drawn = interval_strip(100 * found.value, 100 * found.low, 100 * found.high, domain, style)
    verdict = "excludes 0" if found.low > 0 or found.high < 0 else "includes 0"
    cells = [
        el("th", el("span", swatch(style), el("span", breakable(result.method)), class_=style.classes), scope="row"),
        el("td", drawn),
        el("td", points(found.value), el("span", f" {_bounds(found)}", class_="muted")),
        el("td", verdict, class_="left no"),
        el("td", percent(found.detectable) if math.isfinite(found.detectable) else "–", class_="no"),
        el("td", f"{found.runs:g}", title=_size(found)),
    ]
    return el("tr", *cells)


# Every method in every comparison ---------------------------------------------------------------------------------


def overview_table(comparisons: Sequence[Comparison], links: Sequence[Html], styles: Styles) -> Html:
    """Mean final accuracy of each method (rows) in each comparison (columns, headed by `links`)."""
    names = list(dict.fromkeys(method for comparison in comparisons for method in comparison.methods))
    heads = [el("th", "Method", scope="col", class_="left"), *(el("th", link, scope="col") for link in links)]
    body = []
    for name in names:
        results = [next((r for r in comparison.results if r.method == name), None) for comparison in comparisons]
        head = el(
            "th",
            el("span", swatch(styles[name]), el("span", breakable(name)), class_=styles[name].classes),
            scope="row",
        )
        body.append(
            el("tr", head, *(_overview(result, comparison) for result, comparison in zip(results, comparisons)))
        )
    note = (
        "Final accuracy, %: mean over seeds with the 95 % interval of that mean (Student’s t), and the number of runs"
        " that collapsed."
    )
    if any(math.isfinite(result.reference) for comparison in comparisons for result in comparison.results):
        note += " Paper: the published accuracy of a single run, without interval."
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *body), class_="numbers")
    return join([scrolling(table, "All settings"), el("p", note, class_="note")])


def _overview(result: MethodResult | None, comparison: Comparison) -> Html:
    if result is None or not len(result.known(comparison.outcome)):
        return el("td", "–", class_="no")
    interval, lost = result.interval(comparison.outcome), sum(result.collapsed)
    return el(
        "td",
        percent(result.mean(comparison.outcome)),
        el("span", f"[{percent(interval[0])}, {percent(interval[1])}]", class_="ci") if interval else None,
        el("span", f"paper {percent(result.reference)}", class_="ci") if math.isfinite(result.reference) else None,
        el("span", f"{lost} of {len(result.collapsed)} collapsed", class_="ci flag") if lost else None,
    )


# Settings --------------------------------------------------------------------------------------------------------


def settings_table(
    title: str, names: Sequence[str], values: Sequence[Mapping[str, Any]], chosen: Sequence[str], open_: bool = False
) -> Html:
    """A collapsible table, one column per name; a value that all columns share spans them."""
    rows = []
    for key in chosen:
        cells = [m.short(column[key], 300) if key in column else "–" for column in values]
        shared = len(cells) > 1 and len(set(cells)) == 1
        drawn = [el("td", cells[0], colspan=len(cells))] if shared else [el("td", cell) for cell in cells]
        rows.append(el("tr", el("th", key, scope="row"), *drawn))
    heads = [el("th", "Name", scope="col", class_="left")]
    heads += [el("th", name or "Value", scope="col", class_="left wrap") for name in names]
    table = el("table", el("thead", el("tr", *heads)), el("tbody", *rows), class_="settings")
    summary = el("summary", title, " ", el("span", f"({len(chosen)})", class_="muted"))
    return el("details", summary, scrolling(table, title), open=open_)
