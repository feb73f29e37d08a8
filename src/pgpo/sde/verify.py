"""`pgpo sde`: check the theorem's order of weak approximation for every row."""

from __future__ import annotations

import importlib
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from pgpo.errors import UserError

from .experiments import DEFAULT_LAW, Claim, ema_teacher, one_dimensional, remedies, smooth_cap, two_dimensional
from .facts import Fact, all_facts, engine, noise_floor
from .kink import kinked_law
from .orders import Outcome, measure
from .problem import FEEDBACK, PHI_1, Bandit, Law, apply_law
from .trust import trust_facts, trust_rows

ETAS = tuple(2.0**-j for j in range(3, 11))
QUICK_ETAS = tuple(2.0**-j for j in range(4, 9))


def main(
    json_out: str | Path | None = None,
    figure: str | Path | None = None,
    law: str | Law | None = None,
    quick: bool = False,
) -> int:
    """Print the verdicts; return 0 if all agree with the theorem, else 1.

    Args:
        json_out: where to write everything as JSON.
        figure: where to write the figure (needs matplotlib).
        law: "module:Name" or a callable information -> rho, checked in the same way; None = the default.
        quick: one-dimensional rows on five learning rates, without the second grid.

    Raises:
        UserError: the law is not usable, or the folder of an output does not exist.
    """
    outputs = [Path(path) for path in (json_out, figure) if path is not None]
    for path in outputs:
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; create it or choose another path.")
    chosen = DEFAULT_LAW if law is None else load_law(law) if isinstance(law, str) else check_law(law, repr(law))
    began = time.perf_counter()
    print(f"Weak order of approximation, law {chosen!r}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: a second thread costs more than it saves
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
        print(f"\nAll {len(outcomes)} verdicts agree with the theorem ({seconds:.0f} s).")
    else:
        print(f"\n{len(wrong)} of {len(outcomes)} verdicts and {len(wrong_facts)} numbers differ ({seconds:.0f} s).")
    if any(o.measured is None for o in outcomes):
        print("The theorem needs a law that is smooth on the grid: see the K1 rows and SmoothExponentialLaw.")
    if json_out is not None:
        record = to_json(outcomes, facts, chosen, passed, seconds)
        Path(json_out).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if figure is not None:
        from .figure import draw

        draw([o for o in outcomes if not o.trouble], str(figure))
    return 0 if passed else 1


def run(
    law: Law, quick: bool = False, report: Callable[[Outcome], None] | None = None
) -> tuple[list[Outcome], list[Fact]]:
    """Measure all rows and facts; `report` is called after every row."""
    etas = QUICK_ETAS if quick else ETAS
    outcomes: list[Outcome] = []
    for rows, checks in sections(law, quick):
        for row, check in zip_longest(rows, checks or []):
            outcomes.append(measure(row, etas, check))
            if report is not None:
                report(outcomes[-1])
    facts = [*engine(law), *noise_floor()] if quick else [*all_facts(law), *trust_facts()]
    return outcomes, facts


def sections(law: Law, quick: bool) -> Iterator[tuple[list[Claim], list[Claim] | None]]:
    """All rows, each list with the same rows on another grid (None: not checked)."""
    if quick:
        yield one_dimensional(law), None
        return
    yield one_dimensional(law), one_dimensional(law, 56, 4.0, (24, 3.5))
    yield two_dimensional(law), two_dimensional(law, 16)
    yield ema_teacher(law), ema_teacher(law, 16)
    yield remedies(law), remedies(law, 32, fast_degree=20)
    yield smooth_cap(), smooth_cap(64)
    yield kinked_law(), kinked_law(1600, 80)
    yield trust_rows(), None  # no grid


def load_law(name: str) -> Law:
    """The law `module:Name` (a class that needs no arguments, or a function of one float).

    Raises:
        UserError: it cannot be found, or is not a law.
    """
    module_name, colon, attribute = name.partition(":")
    if not (colon and module_name and attribute):
        raise UserError(f"--law is {name!r}; write it as module:Name, for example pgpo.core:SmoothExponentialLaw.")
    sys.path.insert(0, "")  # as `python -m` does: the user's module is in the working directory
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
    """Raise UserError unless the law gives a finite rho >= 0 that varies over the information of the problem."""
    theta = torch.linspace(-4.0, 4.0, 9, dtype=torch.float64).unsqueeze(1)
    sample = Bandit(PHI_1, FEEDBACK, 0.0).sample_law(theta, theta)
    try:
        rho = apply_law(law, sample.information)
    except Exception as problem:
        raise UserError(
            f"--law {name!r} failed for information of less than one nat ({problem}); a law maps one float to rho."
        ) from problem
    if not bool(torch.isfinite(rho).all()) or float(rho.min()) < 0:
        raise UserError(f"--law {name!r} gives rho in [{rho.min():g}, {rho.max():g}]; rho must be finite and >= 0.")
    if float(rho.max() - rho.min()) < 1e-3:
        raise UserError(f"--law {name!r} gives rho = {float(rho[0, 0]):g} always; the checks need a rho that varies.")
    return law


def to_json(
    outcomes: Sequence[Outcome], facts: Sequence[Fact], law: Law, passed: bool, seconds: float
) -> dict[str, Any]:
    """All measurements as plain data (nan becomes null)."""

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
    """Prints each row when it is measured, with a heading per section."""

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
