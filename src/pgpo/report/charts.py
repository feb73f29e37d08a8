"""Charts as inline SVG: drawn here, so that they show without JavaScript; page.js adds the readings under a pointer.

Colours are classes (`c0` ... `c6` take the palette of page.css, light or dark); every method has a marker shape too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from pgpo.report.markup import Html, el, join
from pgpo.report.methods import Curve
from pgpo.report.sources import Array

COLORS = 7  # as figures.COLORS; page.css has the values
INSET = 8.0  # px between the frame and the first and last step
STRIP, FOREST = (140, 6), (200, 8)  # width of a strip and its margin, px
SHAPES = ("circle", "square", "triangle", "wedge", "plus", "star", "bar", "diamond")  # 7 x 8: 56 methods differ


@dataclass(frozen=True)
class Style:
    """Color and marker of a method on the whole page; page.js shows and hides it by its `index`."""

    index: int

    @property
    def classes(self) -> str:
        return f"m c{self.index % COLORS}"

    @property
    def shape(self) -> str:
        return SHAPES[self.index % len(SHAPES)]


@dataclass(frozen=True)
class Point:
    """A value at a step with its interval, drawn hollow; `cross` marks a collapse; `shift` (px) keeps methods apart."""

    method: str
    x: float
    y: float
    low: float = math.nan
    high: float = math.nan
    cross: bool = False
    shift: float = 0.0
    title: str = ""


@dataclass(frozen=True)
class Chart:
    """The content of a chart. `levels`: values with a horizontal line; `markers`: at every point, not only the last."""

    key: str
    title: str
    unit: str
    curves: list[Curve]
    points: list[Point] = field(default_factory=list)
    levels: Sequence[float] = ()
    alarms: list[tuple[float, str]] = field(default_factory=list)
    log: bool = False
    markers: bool = False
    note: str = ""

    @property
    def empty(self) -> bool:
        return not self.curves and not self.points


@dataclass(frozen=True)
class _Frame:
    """Maps values to the units of the viewBox."""

    left: float
    right: float
    top: float
    bottom: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def place_x(self, value: float) -> float:
        """With an inset, so that marks at the first and the last step stay within the frame."""
        left, right = self.left + INSET, self.right - INSET
        return left + (value - self.x[0]) / (self.x[1] - self.x[0]) * (right - left)

    def place_y(self, value: float) -> float:
        low, high, value = (math.log10(v) for v in (*self.y, value)) if self.log else (*self.y, value)
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)


def styles_of(methods: Sequence[str]) -> dict[str, Style]:
    """PGPO is blue, SDPO vermilion, GRPO green wherever they occur; the others take the next free ones in order."""
    preferred: dict[int, str] = {}
    for index, name in enumerate(("pgpo", "sdpo", "grpo")):
        exact = [method for method in methods if method.lower() == name]
        similar = [method for method in methods if method.lower().startswith(name) and method not in exact]
        if exact or similar:
            preferred[index] = (exact or similar)[0]
    others = iter(dict.fromkeys(method for method in methods if method not in preferred.values()))
    styles: dict[str, Style] = {}
    index = 0
    while len(styles) < len(set(methods)):
        method = preferred.get(index)
        if method is None:
            method = next(others, None)
        if method is not None:
            styles[method] = Style(index)
        index += 1
    return styles


def line_chart(
    chart: Chart, styles: Mapping[str, Style], last: float, size: tuple[int, int], direct: bool = False
) -> Html:
    """The chart from step 0 to `last`; `size`: width and height of its viewBox; `direct`: names at the line ends."""
    width, height = size
    frame = _Frame(44, width - (165 if direct else 12), 22, height - 26, (0.0, last), _y_range(chart), chart.log)
    clip = f"clip-{chart.key}-{width}"
    body = [
        el("clipPath", _rect(frame.left, frame.top - 6, frame.right + 6, frame.bottom), id=clip),
        _grid(frame, chart.unit, sparse=width < 300),
        *(_level(frame, level) for level in chart.levels),
        *(_alarm(frame, step, title) for step, title in chart.alarms if _inside(step, frame.x)),
    ]
    order = sorted(chart.curves, key=lambda curve: curve.dashed)
    marks = [_band(frame, curve, styles) for curve in order if curve.low is not None]
    marks += [_raw(frame, curve, styles) for curve in order if curve.raw is not None]
    marks += [_line(frame, curve, styles, chart.markers) for curve in order]
    marks += [_point(frame, point, styles) for point in chart.points]
    body.append(el("g", *marks, clip_path=f"url(#{clip})"))
    if direct:
        body.append(_names(frame, chart, styles))
    body.append(el("line", class_="cursor", x1=0, x2=0, y1=_f(frame.top), y2=_f(frame.bottom)))
    edges = (frame.left + INSET, frame.right - INSET, *frame.x)
    return el(
        "svg",
        *body,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=describe(chart),
        data_chart=chart.key,
        data_frame=" ".join(f"{edge:g}" for edge in edges),
    )


def readings(chart: Chart, styles: Mapping[str, Style]) -> dict[str, object]:
    """The chart's numbers for page.js: grids of steps, and for each curve its grid, values and band."""
    grids: list[list[float | None]] = []
    series = []
    for curve in chart.curves:
        grid = _rounded(curve.x)
        if grid not in grids:
            grids.append(grid)
        entry: dict[str, object] = {
            "m": styles[curve.method].index,
            "c": styles[curve.method].index % COLORS,
            "n": curve.label,
            "x": grids.index(grid),
            "y": _rounded(curve.y),
        }
        if curve.low is not None and curve.high is not None:
            entry |= {"l": _rounded(curve.low), "h": _rounded(curve.high)}
        series.append(entry)
    return {"u": chart.unit, "x": grids, "s": series}


def describe(chart: Chart) -> str:
    """The chart in words, for screen readers."""
    parts = []
    for curve in chart.curves:
        known = np.flatnonzero(np.isfinite(curve.y))
        if len(known):
            first, last = known[0], known[-1]
            parts.append(
                f"{curve.label} from {significant(curve.y[first])} at step {curve.x[first]:g}"
                f" to {significant(curve.y[last])} at step {curve.x[last]:g}"
            )
    return f"{chart.title} ({chart.unit}) over optimizer steps: {'; '.join(parts) or 'points only'}."


def swatch(style: Style) -> Html:
    """A method in the legend: a piece of its line with its marker."""
    line = el("path", d="M1 7H27", class_="line")
    mark = el("path", d=_marker(style.shape, 14, 7, 4), class_="mark")
    return el(
        "svg", el("g", line, mark, class_=style.classes), viewBox="0 0 28 14", class_="swatch", aria_hidden="true"
    )


def strip(
    values: Sequence[float], crosses: Sequence[bool], mean: float, domain: tuple[float, float], style: Style
) -> Html:
    """One dot per run on a common scale, a cross for a collapsed one, a tick at the mean."""
    place = _scale(domain, *STRIP)
    dots = [
        el("path", d=_cross(place(value), 11, 3.6), class_="cross")
        if crossed
        else el("circle", cx=_f(place(value)), cy=11, r=3.4, class_="dot")
        for value, crossed in zip(values, [*crosses, *[False] * len(values)])
        if math.isfinite(value)
    ]
    tick = [el("path", d=f"M{_f(place(mean))} 2V20", class_="mean")] if math.isfinite(mean) else []
    label = "runs: " + ", ".join(significant(value) for value in values)
    body = [el("path", d="M2 11H138", class_="axis"), el("g", *tick, *dots, class_=style.classes)]
    return el("svg", *body, viewBox="0 0 140 22", class_="strip", role="img", aria_label=label)


def interval_strip(value: float, low: float, high: float, domain: tuple[float, float], style: Style) -> Html:
    """A difference with its interval against the zero line; filled where the interval leaves zero out."""
    place = _scale(domain, *FOREST)
    decided = low > 0 or high < 0
    body = [
        el("path", d=f"M{_f(place(0.0))} 0V24", class_="zero"),
        el(
            "g",
            el("path", d=f"M{_f(place(low))} 12H{_f(place(high))}", class_="line")
            if math.isfinite(low + high)
            else None,
            el("circle", cx=_f(place(value)), cy=12, r=4.5, class_="mark" if decided else "hollow"),
            class_=style.classes,
        ),
    ]
    return el("svg", *body, viewBox="0 0 200 24", class_="forest", aria_hidden="true")


def scale_strip(domain: tuple[float, float], size: tuple[int, int]) -> Html:
    """The scale under a column of strips of that size (STRIP or FOREST)."""
    width, margin = size
    place = _scale(domain, *size)
    marks: list[Html] = []
    for tick, label in _labelled([tick for tick in ticks(*domain, 3) if margin <= place(tick) <= width - margin]):
        x = _f(place(tick))
        marks.append(el("path", d=f"M{x} 0V4", class_="axis"))
        marks.append(el("text", label, x=x, y=15, text_anchor="middle"))
    return el("svg", *marks, viewBox=f"0 0 {width} 18", class_="strip" if size == STRIP else "forest")


# Parts of a chart ------------------------------------------------------------------------------------------------


def _grid(frame: _Frame, unit: str, sparse: bool) -> Html:
    rows = _log_ticks(*frame.y) if frame.log else ticks(*frame.y, 4)
    columns = [tick for tick in ticks(*frame.x, 4 if sparse else 5) if tick == int(tick)]
    marks = []
    for tick, label in _labelled(rows):
        y = _f(frame.place_y(tick))
        marks.append(el("path", d=f"M{_f(frame.left)} {y}H{_f(frame.right)}", class_="grid"))
        marks.append(el("text", label, x=_f(frame.left - 6), y=y, dy="0.32em", text_anchor="end"))
    for tick, label in _labelled(columns):
        x = _f(frame.place_x(tick))
        marks.append(el("path", d=f"M{x} {_f(frame.bottom)}v4", class_="axis"))
        # The name of the axis stands where the last label would be too near.
        if frame.right - frame.place_x(tick) > 30 or tick == frame.x[1]:
            marks.append(el("text", label, x=x, y=_f(frame.bottom + 16), text_anchor="middle"))
    base = f"M{_f(frame.left)} {_f(frame.bottom)}H{_f(frame.right)}"
    marks.append(el("path", d=base, class_="axis"))
    marks.append(el("text", unit, x=0, y=11, class_="unit"))
    marks.append(el("text", "step", x=_f(frame.left - 8), y=_f(frame.bottom + 16), text_anchor="end", class_="unit"))
    return el("g", *marks, class_="frame")


def _level(frame: _Frame, level: float) -> Html | None:
    y = _f(frame.place_y(level))
    return el("path", d=f"M{_f(frame.left)} {y}H{_f(frame.right)}", class_="level") if _inside(level, frame.y) else None


def _inside(value: float, span: tuple[float, float]) -> bool:
    return span[0] <= value <= span[1]


def _alarm(frame: _Frame, step: float, title: str) -> Html:
    x = frame.place_x(step)
    pole = el("path", d=f"M{_f(x)} {_f(frame.bottom)}V{_f(frame.top)}", class_="alarm")
    return el(
        "g", pole, el("path", d=f"M{_f(x)} {_f(frame.top - 6)}l10 5l-10 5Z", class_="flag-mark"), el("title", title)
    )


def _band(frame: _Frame, curve: Curve, styles: Mapping[str, Style]) -> Html:
    assert curve.low is not None and curve.high is not None
    known = np.isfinite(curve.low) & np.isfinite(curve.high)
    pieces = []
    for part in _runs_of(known):
        upper = [_pair(frame, x, y) for x, y in zip(curve.x[part], curve.high[part])]
        lower = [_pair(frame, x, y) for x, y in zip(curve.x[part][::-1], curve.low[part][::-1])]
        pieces.append(f"M{'L'.join([*upper, *lower])}Z")
    return _of_method(styles[curve.method], el("path", d="".join(pieces), class_="band"))


def _raw(frame: _Frame, curve: Curve, styles: Mapping[str, Style]) -> Html:
    assert curve.raw is not None
    return _of_method(styles[curve.method], el("path", d=_path(frame, *curve.raw), class_="raw"))


def _line(frame: _Frame, curve: Curve, styles: Mapping[str, Style], markers: bool) -> Html:
    style = styles[curve.method]
    line = el("path", d=_path(frame, curve.x, curve.y), class_="line dashed" if curve.dashed else "line")
    known = np.flatnonzero(np.isfinite(curve.y))
    shown = known if markers else known[-1:]
    drawn = "".join(
        _marker(style.shape, frame.place_x(curve.x[i]), frame.place_y(curve.y[i]), 3.6)
        for i in shown
        if not frame.log or curve.y[i] > 0
    )
    return _of_method(style, line, el("path", d=drawn, class_="mark"))


def _point(frame: _Frame, point: Point, styles: Mapping[str, Style]) -> Html:
    x, y = frame.place_x(point.x) + point.shift, frame.place_y(point.y)
    title = el("title", point.title) if point.title else None
    if point.cross:
        return _of_method(styles[point.method], el("path", title, d=_cross(x, y, 4.5), class_="cross"))
    bar = None
    if math.isfinite(point.low + point.high):
        low, high = frame.place_y(point.low), frame.place_y(point.high)
        bar = el(
            "path", d=f"M{_f(x)} {_f(low)}V{_f(high)}M{_f(x - 3)} {_f(low)}h6M{_f(x - 3)} {_f(high)}h6", class_="bar"
        )
    style = styles[point.method]
    return _of_method(style, bar, el("path", title, d=_marker(style.shape, x, y, 4.6), class_="hollow"))


def _names(frame: _Frame, chart: Chart, styles: Mapping[str, Style]) -> Html:
    """The methods' names beside the ends of their lines, moved apart where they would overlap."""
    ends = []
    for curve in chart.curves:
        known = np.flatnonzero(np.isfinite(curve.y))
        if len(known) and curve.x[known[-1]] > frame.x[1] / 2:  # an earlier end is too far from its name
            ends.append((frame.place_y(curve.y[known[-1]]), curve))
    ends.sort(key=lambda end: end[0])
    gap = min(14.0, (frame.bottom - frame.top) / max(1, len(ends)))
    places = [y for y, _ in ends]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    over = max(0.0, places[-1] - frame.bottom) if places else 0.0
    for i in range(len(places) - 1, -1, -1):  # back up from the lower edge
        limit = places[i + 1] - gap if i + 1 < len(places) else frame.bottom
        places[i] = min(places[i], limit) if over else places[i]
    names = []
    for y, (end, curve) in zip(places, ends):
        style = styles[curve.method]
        text = shortened(curve.label, 19)
        lead = f"M{_f(frame.right + 4)} {_f(end)}L{_f(frame.right + 14)} {_f(y)}"
        names.append(
            _of_method(
                style,
                el("path", d=lead, class_="lead"),
                el("path", d=_marker(style.shape, frame.right + 20, y, 3.6), class_="mark"),
                el("text", text, x=_f(frame.right + 28), y=_f(y), dy="0.32em", class_="name"),
            )
        )
    return join(names)


def _of_method(style: Style, *children: Html | None) -> Html:
    return el("g", *children, class_=style.classes, data_m=style.index)


def _marker(shape: str, x: float, y: float, r: float) -> str:
    """The outline of a marker around (x, y) as path data."""
    if shape == "circle":
        return f"M{_f(x - r)} {_f(y)}a{_f(r)} {_f(r)} 0 1 0 {_f(2 * r)} 0a{_f(r)} {_f(r)} 0 1 0 {_f(-2 * r)} 0Z"
    return "M" + "L".join(f"{_f(x + r * dx)} {_f(y + r * dy)}" for dx, dy in OUTLINES[shape]) + "Z"


def _star(points: int, inner: float) -> list[tuple[float, float]]:
    radii = [(1.25, inner)[i % 2] for i in range(2 * points)]
    angles = [math.pi * i / points - math.pi / 2 for i in range(2 * points)]
    return [(r * math.cos(angle), r * math.sin(angle)) for r, angle in zip(radii, angles)]


_ARM = 0.36  # half the width of the arms of a plus
OUTLINES: dict[str, list[tuple[float, float]]] = {  # of radius about 1; y points down
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1.15), (1.1, 0.85), (-1.1, 0.85)],
    "wedge": [(0, 1.15), (1.1, -0.85), (-1.1, -0.85)],
    "plus": [
        *[(-_ARM, -1.2), (_ARM, -1.2), (_ARM, -_ARM), (1.2, -_ARM), (1.2, _ARM), (_ARM, _ARM)],
        *[(_ARM, 1.2), (-_ARM, 1.2), (-_ARM, _ARM), (-1.2, _ARM), (-1.2, -_ARM), (-_ARM, -_ARM)],
    ],
    "star": _star(5, 0.5),
    "bar": [(-0.5, -1.2), (0.5, -1.2), (0.5, 1.2), (-0.5, 1.2)],
    "diamond": [(0, -1.3), (1, 0), (0, 1.3), (-1, 0)],
}


def _cross(x: float, y: float, r: float) -> str:
    return f"M{_f(x - r)} {_f(y - r)}l{_f(2 * r)} {_f(2 * r)}m0 {_f(-2 * r)}l{_f(-2 * r)} {_f(2 * r)}"


def _rect(left: float, top: float, right: float, bottom: float) -> Html:
    return el("rect", x=_f(left), y=_f(top), width=_f(right - left), height=_f(bottom - top))


def _path(frame: _Frame, x: Array, y: Array) -> str:
    """A line with gaps at nan; a lone point becomes a dot (round caps)."""
    known = np.isfinite(y) & ((y > 0) | (not frame.log))
    pieces = []
    for part in _runs_of(known):
        pairs = [_pair(frame, a, b) for a, b in zip(x[part], y[part])]
        pieces.append(f"M{'L'.join(pairs)}" if len(pairs) > 1 else f"M{pairs[0]}h0")
    return "".join(pieces)


def _pair(frame: _Frame, x: float, y: float) -> str:
    return f"{_f(frame.place_x(x))} {_f(frame.place_y(y))}"


def _runs_of(known: np.ndarray) -> list[slice]:
    """The stretches without a gap."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], known.astype(int), [0]])))
    return [slice(start, end) for start, end in zip(edges[::2], edges[1::2])]


# Scales and numbers ----------------------------------------------------------------------------------------------


def _y_range(chart: Chart) -> tuple[float, float]:
    """All lines, bands and points; of the raw values all but the outer hundredth, so that a spike flattens nothing."""
    values: list[Array] = []
    for curve in chart.curves:
        values += [part for part in (curve.y, curve.low, curve.high) if part is not None]
        raw = curve.raw[1][np.isfinite(curve.raw[1])] if curve.raw is not None else np.empty(0)
        if chart.log:
            raw = raw[raw > 0]
        if len(raw):
            values.append(np.quantile(raw, [0.01, 0.99]))
    values += [np.array([point.y, point.low, point.high]) for point in chart.points]
    every = np.concatenate(values) if values else np.empty(0)
    every = every[np.isfinite(every) & ((every > 0) | (not chart.log))]
    if not len(every):
        return (0.1, 10.0) if chart.log else (0.0, 1.0)
    low, high = float(every.min()), float(every.max())
    if chart.log:
        return (low / 1.15, high * 1.15) if high / low > 1.5 else (low / 1.5, high * 1.5)
    levels = [level for level in chart.levels if low - (high - low) <= level <= high + (high - low)]
    low, high = min([low, *levels]), max([high, *levels])
    pad = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
    return low - pad, high + pad


def padded(values: Sequence[float], around: float | None = None) -> tuple[float, float]:
    """A domain that holds the finite values, and `around` where it is given."""
    known = [value for value in values if math.isfinite(value)] + ([around] if around is not None else [])
    low, high = min(known, default=0.0), max(known, default=1.0)
    pad = 0.05 * (high - low) or 0.5
    return low - pad, high + pad


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within the range."""
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    found = []
    for step in (power, 2 * power, 5 * power, 10 * power):
        found.append([i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)])
    return min(found, key=lambda values: abs(len(values) - count))


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        found = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(found) <= 5:
            return found or [low, high]
    return found[:: math.ceil(len(found) / 5)]


def _labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with labels of the same number of decimals."""
    gaps = [abs(b - a) for a, b in itertools.pairwise(values)]
    even = len(gaps) > 0 and max(gaps) < 1.5 * min(gaps)
    if not even or max(map(abs, values)) >= 1e5 or min(gaps) < 1e-4:
        return [(value, significant(value)) for value in values]
    decimals = max(0, -math.floor(math.log10(min(gaps)) + 1e-9))
    return [(value, fixed(value, decimals)) for value in values]


def fixed(value: float, decimals: int) -> str:
    """With a minus sign, not a hyphen, and no minus before zero; an en dash for nan."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "−∞"
    text = f"{value:.{decimals}f}"
    return text.lstrip("-") if float(text) == 0 else text.replace("-", "−")


def significant(value: float, digits: int = 3) -> str:
    """Three significant digits, in plain notation where that is short."""
    if not math.isfinite(value):
        return fixed(value, 0)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        whole = 0 if value == 0 else max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{whole}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}".replace("-", "−")


def shortened(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _scale(domain: tuple[float, float], width: int, margin: int) -> Callable[[float], float]:
    (low, high), left, right = domain, margin, width - margin
    return lambda value: left + (value - low) / (high - low) * (right - left)


def _rounded(values: Array) -> list[float | None]:
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]


def _f(value: float) -> str:
    """A coordinate, to a tenth of a pixel."""
    return f"{value:.1f}".removesuffix(".0")
