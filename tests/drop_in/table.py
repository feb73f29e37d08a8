"""Run TRL's tests, as scenarios.py retells them, with every objective; write docs/DROP_IN.md.

python tests/drop_in/table.py            print the table
python tests/drop_in/table.py --write    put it into the page
python tests/drop_in/table.py NAME ...   some tests, with tracebacks
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401  (its settings must stand before torch is imported)

import torch
from scenarios import SCENARIOS, Scenario
from setting import Setting, Unmoved

from pgpo.errors import UserError

OBJECTIVES = ("grpo", "sdpo", "pgpo")
PAGE = Path(__file__).parents[2] / "docs/DROP_IN.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# What a self-distilling run is told to say, or has to where no completion is right.
_SUM, _THRESHOLD = {"success_reward": "sum"}, {"success_threshold": 0.0}
_TOLERANCE = 1e-6


def outcome(scenario: Scenario, objective: str) -> str:
    """One cell: passes [with ...], refused: ..., not run: ..., or fails: ..."""
    if scenario.needs:
        return f"not run: needs {scenario.needs}"
    if scenario.of == "SDPO" and objective == "grpo":
        return "of self-distillation alone"
    changes: dict[str, Any] = {}
    while True:
        try:
            s = _run(scenario, objective, changes)
        except Exception as error:
            remedy = _remedy(error) if objective != "grpo" else None
            if remedy is not None and not remedy.keys() <= changes.keys():
                changes = changes | remedy
                continue
            if isinstance(error, UserError):
                return f"refused: {str(error).rstrip('.')}"
            if len(sys.argv) > 1:
                traceback.print_exc()
            return f"fails: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        break
    said = "passes"
    if changes:
        said += " with " + ", ".join(f"`{name}={value!r}`" for name, value in changes.items())
    notes = s.notes
    if objective == "grpo":
        theirs = _run(scenario, None, {})  # raises where the script asks for what TRL does not do
        if s.ended:
            if (likeness := _likeness(scenario, s, theirs)) is None:
                return "fails: other weights than TRL's"
            notes = [likeness, *notes]
    return "; ".join([said, *notes])


def _remedy(error: Exception) -> dict[str, Any] | None:
    if isinstance(error, UserError) and "set success_reward" in str(error):
        return _SUM
    return _THRESHOLD if isinstance(error, Unmoved) else None


def _likeness(scenario: Scenario, ours: Setting, theirs: Setting) -> str | None:
    """How near the weights end to those of TRL's own trainer; None if they do not.

    Adam makes a step of full size from a gradient that is rounding alone, so that where a batch is split in another
    way, plain gradient steps are compared.
    """
    if (distance := _distance(ours, theirs)) == 0:
        return "TRL's weights, bit for bit"
    if distance <= _TOLERANCE:
        return "TRL's weights to 1e-6"
    plain = {"optim": "sgd", "bf16": False}
    if _distance(_run(scenario, "grpo", plain), _run(scenario, None, plain)) <= _TOLERANCE:
        return "TRL's weights to 1e-6, with `optim='sgd', bf16=False`"
    return None


def _distance(ours: Setting, theirs: Setting) -> float:
    distance = 0.0
    for a, b in zip(ours.ended, theirs.ended, strict=True):
        assert a.keys() == b.keys()
        distance = max(distance, *((a[name].double() - b[name].double()).abs().max().item() for name in a))
    return distance


def _run(scenario: Scenario, objective: str | None, changes: dict[str, Any]) -> Setting:
    assert scenario.run is not None
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        s = Setting(objective, Path(folder), changes)
        os.chdir(folder)  # an unnamed run writes into the working folder
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                scenario.run(s)
        finally:
            os.chdir(before)
            gc.collect()
    return s


def table(scenarios: Sequence[Scenario] = SCENARIOS) -> str:
    """The counts, the tables, and what is not run, as they stand in the page."""
    lines = []
    for of in ("GRPO", "SDPO"):
        chosen = [s for s in scenarios if s.of == of]
        run = {s: [outcome(s, objective) for objective in OBJECTIVES] for s in chosen if not s.needs}
        counts = [f"{name}: {_counts([row[i] for row in run.values()])}" for i, name in enumerate(OBJECTIVES)]
        if of == "SDPO":
            counts = counts[1:]
        lines += [f"## Tests of TRL's {of}Trainer", "", f"{len(chosen)} names, {len(run)} of them run here:", ""]
        lines += [f"* {text}" for text in counts]
        lines += ["", "| test | what it sets | grpo | sdpo | pgpo |", "|---|---|---|---|---|"]
        for s, (grpo, sdpo, pgpo) in run.items():
            cells = [f"`{s.test}`", s.about, grpo, sdpo, "as sdpo" if pgpo == sdpo != "passes" else pgpo]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", "Not run here:", ""]
        missing = dict.fromkeys(s.needs for s in chosen if s.needs)
        for what in missing:
            names = [f"  `{s.test}`" for s in chosen if s.needs == what]
            lines += [f"* needs {what}:", ",\n".join(names)]
        lines.append("")
    return "\n".join(lines)


def _counts(cells: Sequence[str]) -> str:
    kinds = ("passes", "refused", "fails", "of self-distillation alone")
    numbers = {kind: sum(cell.startswith(kind) for cell in cells) for kind in kinds}
    assert sum(numbers.values()) == len(cells)
    return ", ".join(f"{number} {kind}" for kind, number in numbers.items() if number)


def written() -> str:
    """The table that the page holds."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0].strip("\n")


def main(arguments: Sequence[str]) -> None:
    names = [a for a in arguments if not a.startswith("-")]
    chosen = [s for s in SCENARIOS if not names or any(re.fullmatch(n, s.test) for n in names)]
    torch.set_num_threads(1)
    if names:
        for s in chosen:
            for objective in OBJECTIVES:
                start = time.perf_counter()
                print(
                    f"{s.test} {objective}: {outcome(s, objective)} ({time.perf_counter() - start:.1f} s)", flush=True
                )
        return
    found = table(chosen)
    if "--write" in arguments:
        page = PAGE.read_text(encoding="utf-8")
        head, tail = page.partition(BEGIN)[0], page.partition(END)[2]
        PAGE.write_text(f"{head}{BEGIN}\n\n{found.strip()}\n\n{END}{tail}", encoding="utf-8")
    else:
        print(found)


if __name__ == "__main__":
    main(sys.argv[1:])
