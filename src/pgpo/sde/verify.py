"""Verdicts: is the order of weak approximation the one that the theorem gives?

Two criteria, both from noise-free numbers:

    slope     log error = order * log eta, over 2^-3..2^-8 (with a t-interval, which measures curvature, not noise),
              over 2^-5..2^-10 (within 0.2 of the order) and over the finest pair (within 0.1; 0.2 for a half order)
    expansion signed error at T = a0 + a1 eta + ...; order >= 1 iff a0 = 0, order >= 2 iff a0 = a1 = 0

Guards: every row is repeated on another grid, which must give the same error to 1 %; a value that blows up is
reported as unresolved, never as a verdict.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgpo.errors import UserError

from .experiments import DEFAULT_LAW, Row, ema_teacher, one_dimensional, remedies, smooth_cap, two_dimensional
from .facts import Fact, all_facts, engine, noise_floor
from .kink import kinked_law
from .problem import FEEDBACK, PHI_1, Bandit, Law, apply_law
from .transfer import Unresolved
from .trust import trust_facts, trust_rows

ETAS = tuple(2.0**-j for j in range(3, 11))
QUICK_ETAS = tuple(2.0**-j for j in range(4, 9))
GUARD_ETAS = (2.0**-4, 2.0**-7)

# Wrong equations read a0 >= 5e-2 and a1 >= 1e-2, right ones a0 <= 1e-6 and a1 <= 5e-5 (ours, from the tables).
ZERO_A0, ZERO_A1 = 1e-5, 1e-4
LAST_BAND, FINE_BAND = 0.1, 0.2
GUARD_TOLERANCE = 0.01
ROUNDING = 1e-10  # errors below this are floating-point noise, where relative agreement means nothing

# Student's t, 97.5 % point, by degrees of freedom.
T_QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}


@dataclass(frozen=True)
class Outcome:
    """A row, measured.

    Attributes:
        row: what was compared.
        etas: learning rates, descending.
        errors: max over k, start and test function of |difference|, one per eta.
        slope: log-log slope over the coarser part of the range.
        interval: half width of its 95 % t-interval.
        fine_slope: slope over the finer part.
        last_slope: slope of the finest pair.
        a0: largest |a0| over starts and test functions.
        a1: largest |a1|.
        measured: the order read off, or None if the two criteria disagree.
        trouble: why the row could not be resolved, or "".
    """

    row: Row
    etas: tuple[float, ...]
    errors: tuple[float, ...]
    slope: float
    interval: float
    fine_slope: float
    last_slope: float
    a0: float
    a1: float
    measured: float | None
    trouble: str = ""

    @property
    def agrees(self) -> bool:
        """Does the measurement give the order of the theorem?"""
        return not self.trouble and self.measured == self.row.true

    @property
    def verdict(self) -> str:
        if self.trouble:
            return f"UNRESOLVED: {self.trouble}"
        if self.measured is None:
            return "UNCLEAR: slopes and expansion disagree; is the law smooth?"
        if not self.agrees:
            return f"DIFFERS from the theorem: order {self.measured:g}"
        claimed = self.row.claimed
        if claimed is None:
            return "rejected"
        if self.row.true < claimed:
            return f"refuted: order {self.row.true:g}"
        return "holds" if self.row.true == claimed else f"holds (order {self.row.true:g} here)"


def difference(row: Row, eta: float) -> Tensor:
    """Chain minus equation at every step, start and test function, [T/eta + 1, X, G]."""
    left, right = row.left(eta), row.right(eta)
    if row.moment == "variance":
        left, right = (side[..., 1:2] - side[..., 0:1] ** 2 for side in (left, right))
    return left - right


def fit_slope(etas: Sequence[float], errors: Sequence[float]) -> tuple[float, float]:
    """Least-squares slope of log error on log eta, and the half width of its 95 % t-interval."""
    x = [math.log(eta) for eta in etas]
    y = [math.log(max(error, 1e-300)) for error in errors]
    n, mx, my = len(x), sum(x) / len(x), sum(y) / len(y)
    sxx = sum((a - mx) ** 2 for a in x)
    slope = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sxx
    if n < 3:
        return slope, math.inf
    residual = sum((b - my - slope * (a - mx)) ** 2 for a, b in zip(x, y, strict=True))
    return slope, T_QUANTILE[n - 2] * math.sqrt(residual / (n - 2) / sxx)


def expansion(etas: Sequence[float], signed: Tensor) -> Tensor:
    """Coefficients of the polynomial in eta through the signed errors [E, ...]; [E, ...], a0 first."""
    scaled = torch.tensor(etas, dtype=torch.float64) / etas[0]
    powers = torch.arange(len(etas), dtype=torch.float64)
    coefficients: Tensor = torch.linalg.solve(scaled.unsqueeze(1) ** powers, signed.flatten(1))
    coefficients = coefficients / etas[0] ** powers.unsqueeze(1)
    return coefficients.reshape(signed.shape)


def read_order(fine_slope: float, last_slope: float, a0: float, a1: float) -> float | None:
    """The order on which slopes and expansion agree, in halves; None if they do not."""
    order = round(2 * last_slope) / 2
    # A half order has no expansion in whole powers of eta, and its slope settles slower: the next term is only
    # sqrt(eta) smaller.
    half = order != round(order)
    if abs(last_slope - order) >= (FINE_BAND if half else LAST_BAND) or abs(fine_slope - order) >= FINE_BAND:
        return None
    by_expansion = 0 if a0 > ZERO_A0 else 1 if a1 > ZERO_A1 else 2
    return order if half or order == by_expansion else None


def measure(row: Row, etas: tuple[float, ...], check: Row | None = None) -> Outcome:
    """Run a row on all etas; `check` is the same row on another grid."""
    try:
        differences = [difference(row, eta) for eta in etas]
        errors = tuple(float(d.abs().max()) for d in differences)
        trouble = "" if check is None else _disagreement(row, check)
    except Unresolved as problem:
        nan = math.nan
        return Outcome(
            row, etas, (nan,) * len(etas), nan, nan, nan, nan, nan, nan, None, f"{problem}; is the law smooth?"
        )
    coefficients = expansion(etas, torch.stack([d[-1] for d in differences]))
    a0, a1 = (float(coefficients[i].abs().max()) for i in (0, 1))
    slope, interval = fit_slope(etas[:-2], errors[:-2])
    fine_slope, _ = fit_slope(etas[2:], errors[2:])
    last_slope, _ = fit_slope(etas[-2:], errors[-2:])
    measured = read_order(fine_slope, last_slope, a0, a1)
    return Outcome(row, etas, errors, slope, interval, fine_slope, last_slope, a0, a1, measured, trouble)


def _disagreement(row: Row, check: Row) -> str:
    for eta in GUARD_ETAS:
        here, there = (float(difference(r, eta).abs().max()) for r in (row, check))
        if abs(here - there) > GUARD_TOLERANCE * here + ROUNDING:
            return f"errors {here:.4g} and {there:.4g} on two grids at eta = {eta:g}; is the law smooth?"
    return ""


def sections(law: Law, quick: bool) -> Iterator[tuple[list[Row], list[Row] | None]]:
    """All rows, each list with the same rows on another grid (None in quick mode)."""
    if quick:
        yield one_dimensional(law), None
        return
    yield one_dimensional(law), one_dimensional(law, 56, 4.0, (24, 3.5))
    yield two_dimensional(law), two_dimensional(law, 16)
    yield ema_teacher(law), ema_teacher(law, 16)
    yield remedies(law), remedies(law, 32, fast_degree=20)
    yield smooth_cap(), smooth_cap(64)
    yield kinked_law(), kinked_law(1600, 80)
    yield trust_rows(), None  # nothing is on a grid


def run(
    law: Law, quick: bool = False, report: Callable[[Outcome], None] | None = None
) -> tuple[list[Outcome], list[Fact]]:
    """Measure everything; `report` is called after every row."""
    etas = QUICK_ETAS if quick else ETAS
    outcomes: list[Outcome] = []
    for rows, checks in sections(law, quick):
        for row, check in zip_longest(rows, checks or []):
            outcomes.append(measure(row, etas, check))
            if report is not None:
                report(outcomes[-1])
    facts = [*engine(law), *noise_floor()] if quick else [*all_facts(law), *trust_facts()]
    return outcomes, facts


def load_law(name: str) -> Law:
    """The law `module:Name` (a class that needs no arguments, or a function of one float).

    Raises:
        UserError: it cannot be found, or is not a multiplier law.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f"--law is {name!r}; write it as module:Name, for example pgpo.core:SmoothExponentialLaw.")
    sys.path.insert(0, "")  # as `python -m` does: the user's module lies in the working directory
    try:
        module = importlib.import_module(module_name)
    except ImportError as problem:
        raise UserError(
            f"--law {name!r}: module {module_name!r} cannot be imported ({problem}); run in its folder or install it."
        ) from problem
    finally:
        sys.path.remove("")
    if not hasattr(module, attribute):
        raise UserError(f"--law {name!r}: {module_name} has no {attribute!r}; check the name after the colon.")
    found = getattr(module, attribute)
    try:
        law = found() if isinstance(found, type) else found
    except TypeError as problem:
        raise UserError(
            f"--law {name!r}: {attribute} needs arguments ({problem}); name an instance or a class with defaults."
        ) from problem
    if not callable(law):
        raise UserError(f"--law {name!r}: {attribute} is not callable; a law maps information in nats to rho.")
    return check_law(law, name)


def check_law(law: Law, name: str) -> Law:
    """Raise UserError unless law gives finite rho >= 0 and more than one value on the problem's informations."""
    theta = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64).unsqueeze(1)
    sample = Bandit(PHI_1, FEEDBACK, 0.0).sample_law(theta, theta)
    try:
        rho = apply_law(law, sample.information)
    except Exception as problem:
        raise UserError(
            f"--law {name!r} failed on an information of a fraction of a nat ({problem}); a law maps one float to rho."
        ) from problem
    if not bool(torch.isfinite(rho).all()) or float(rho.min()) < 0:
        raise UserError(f"--law {name!r} gives rho in [{rho.min():g}, {rho.max():g}]; rho must be finite and >= 0.")
    if float(rho.max() - rho.min()) < 1e-3:
        raise UserError(f"--law {name!r} gives rho = {float(rho[0, 0]):g} always; the checks need a rho that varies.")
    return law


def main(
    json_out: str | Path | None = None,
    figure: str | Path | None = None,
    law: str | Law | None = None,
    quick: bool = False,
) -> int:
    """Print the verdicts; 0 if all are as the theorem says, else 1.

    Args:
        json_out: where to write everything as JSON.
        figure: where to write the figure (needs matplotlib).
        law: "module:Name" or a callable information -> rho, put through the same checks; None = the default.
        quick: one-dimensional rows on five learning rates, without the second grid.

    Raises:
        UserError: the law is not usable, or an output cannot be written.
    """
    outputs = [Path(path) for path in (json_out, figure) if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; create it or choose another path.")
    chosen = DEFAULT_LAW if law is None else load_law(law) if isinstance(law, str) else check_law(law, repr(law))
    began = time.perf_counter()
    print(f"Weak order of approximation, law {chosen!r}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it brings
    try:
        outcomes, facts = run(chosen, quick, _Printer())
    finally:
        torch.set_num_threads(threads)
    _print_facts(facts)
    wrong = [o for o in outcomes if not o.agrees]
    wrong_facts = [f for f in facts if not f.holds]
    passed = not wrong and not wrong_facts
    seconds = time.perf_counter() - began
    if passed:
        print(f"\nAll {len(outcomes)} verdicts as the theorem says ({seconds:.0f} s).")
    else:
        print(f"\n{len(wrong)} of {len(outcomes)} verdicts and {len(wrong_facts)} numbers differ ({seconds:.0f} s).")
    if any(o.measured is None for o in outcomes):
        print("A kink of the law inside a grid is outside the theorem: see the K1 rows and SmoothExponentialLaw.")
    if json_out is not None:
        record = to_json(outcomes, facts, chosen, passed, seconds)
        Path(json_out).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if figure is not None:
        from .figure import draw

        draw([o for o in outcomes if not o.trouble], str(figure))
    return 0 if passed else 1


def to_json(
    outcomes: Sequence[Outcome], facts: Sequence[Fact], law: Law, passed: bool, seconds: float
) -> dict[str, Any]:
    """Everything measured, as plain data (not-a-number becomes null)."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    return {
        "passed": passed,
        "law": repr(law),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": [
            {
                "section": o.row.section,
                "chain": o.row.chain,
                "equation": o.row.equation,
                "moment": o.row.moment,
                "claimed_order": o.row.claimed,
                "true_order": o.row.true,
                "measured_order": o.measured,
                "etas": list(o.etas),
                "errors": [number(e) for e in o.errors],
                "slope": number(o.slope),
                "interval": number(o.interval),
                "fine_slope": number(o.fine_slope),
                "last_slope": number(o.last_slope),
                "a0": number(o.a0),
                "a1": number(o.a1),
                "agrees": o.agrees,
                "verdict": o.verdict,
            }
            for o in outcomes
        ],
        "facts": [
            {"table": f.table, "name": f.name, "value": f.value, "expected": f.expected, "holds": f.holds}
            for f in facts
        ],
    }


class _Printer:
    """Prints rows as they come, with a heading per section."""

    def __init__(self) -> None:
        self.section = ""

    def __call__(self, outcome: Outcome) -> None:
        row = outcome.row
        if row.section != self.section:
            self.section = row.section
            print(f"\n{row.section}")
            print(
                f"  {'approximating equation':<46}{'claim':>6}{'true':>6}{'slope':>8} {'+-':<6}"
                f"{'fine':>6}{'last':>7}{'a0':>9}{'a1':>9}  verdict"
            )
        name = row.equation if row.chain == row.section else f"{row.equation} [{row.chain}]"
        claimed = "-" if row.claimed is None else f"{row.claimed:g}"
        numbers = (
            f"{outcome.slope:>8.3f} {outcome.interval:<6.3f}{outcome.fine_slope:>6.2f}{outcome.last_slope:>7.3f}"
            f"{outcome.a0:>9.0e}{outcome.a1:>9.0e}"
        )
        if outcome.trouble:
            numbers = ""
        if len(name) > 45:
            print(f"  {name}\n  {'':<46}{claimed:>6}{row.true:>6g}{numbers}  {outcome.verdict}", flush=True)
        else:
            print(f"  {name:<46}{claimed:>6}{row.true:>6g}{numbers}  {outcome.verdict}", flush=True)


def _print_facts(facts: Sequence[Fact]) -> None:
    table = ""
    for fact in facts:
        if fact.table != table:
            table = fact.table
            print(f"\n{table}")
        expected = "" if fact.expected is None else f"   must be {fact.expected:.4g}"
        print(f"  {fact.name:<50}{fact.value:>12.4g}{expected}{'' if fact.holds else '   DIFFERS'}")
