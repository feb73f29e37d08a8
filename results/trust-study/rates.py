"""The trust study against what it set out to show: python results/trust-study/rates.py prints its tables in Markdown.

    final      avg@16 on the test questions, mean over seeds (sd), and runs that collapsed, by learning rate
    bars       trust at every rate minus SDPO at its best constant rate (that of the highest mean over the same seeds),
               paired by seed and question, final and at step 25 of the validation curve
    controls   at twice the lab's rate: a constant rate with trust's mean, and trust's multipliers in another order

Everything comes from records.jsonl.gz beside this file.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pgpo.evaluate.avg_at_k import paired_scores
from pgpo.intervals import student_t
from pgpo.study_files import accuracy_curve, collapsed, read_records

RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3")
EARLY = 25  # the step at which trust must not be behind
ALLOWED = 0.02  # the bars' margin

Runs = Mapping[int, Mapping[str, Any]]  # seed -> record


def final(record: Mapping[str, Any]) -> float:
    return statistics.fmean(record["test_scores"].values())


def early(record: Mapping[str, Any]) -> float:
    steps, accuracy = accuracy_curve(record["evaluations"])
    return accuracy[steps.index(EARLY)]


def fell(runs: Runs) -> int:
    return sum(collapsed(accuracy_curve(record["evaluations"])[1]) for record in runs.values())


def cell(runs: Runs) -> str:
    values = [final(record) for record in runs.values()]
    if not values:
        return ""
    spread = f" ({statistics.stdev(values):.3f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread} {fell(runs)}/{len(values)}"


def paired_mean(differences: Sequence[float]) -> str:
    """Mean with the 95 % t interval over seeds."""
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.3f}"
    half = student_t(len(differences) - 1) * statistics.stdev(differences) / math.sqrt(len(differences))
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def difference(a: Runs, b: Runs) -> str:
    seeds = sorted(a.keys() & b.keys())
    if not seeds:
        return ""
    found = paired_scores([a[s]["test_scores"] for s in seeds], [b[s]["test_scores"] for s in seeds])
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    for line in (heads, ["---"] * len(heads), *rows):
        print("| " + " | ".join(line) + " |")
    print()


def main() -> None:
    of: dict[tuple[str, str], dict[int, Any]] = defaultdict(dict)
    for record in read_records(Path(__file__).with_name("records.jsonl.gz")).values():
        if record["status"] == "ok":
            of[record["setting"], record["method"]][record["seed"]] = record
    for variant in ("plain", "style"):
        at = {rate: {m: of[f"{variant}-{rate}", m] for m in ("sdpo", "trust")} for rate in RATES}
        print(f"{variant}: final accuracy, mean over seeds (sd), collapsed/runs\n")
        rates = [rate for rate in RATES if at[rate]["trust"]]
        table(["", *rates], [[m, *(cell(at[rate][m]) for rate in rates)] for m in ("sdpo", "trust")])
        tried = [rate for rate in RATES if at[rate]["sdpo"]]
        common = set.intersection(*(set(at[rate]["sdpo"]) for rate in tried))
        best = max(tried, key=lambda rate: statistics.fmean(final(at[rate]["sdpo"][s]) for s in common))
        reference = at[best]["sdpo"]
        print(f"{variant}: trust minus SDPO at its best constant rate, {best}\n")
        rows = []
        for rate in rates:
            trust = at[rate]["trust"]
            seeds = sorted(trust.keys() & reference.keys())
            rows.append(
                [
                    rate,
                    difference(trust, reference),
                    paired_mean([early(trust[s]) - early(reference[s]) for s in seeds]),
                    str(fell(trust)),
                ]
            )
        table(["lr", "final", f"step {EARLY}", "collapses of trust"], rows)
    print("controls, minus trust in the same setting\n")
    names = ("sdpo-lr-trust", "trust-shuffled", "slow", "trust-slow", "frozen", "grpo", "pgpo", "clip", "linear")
    rows = []
    for setting in ("plain-2e-3", "style-2e-3", "plain-2e-3-long", "style-2e-3-long"):
        for name in names:
            if of[setting, name]:
                found = difference(of[setting, name], of[setting, "trust"])
                rows.append([setting, name, cell(of[setting, name]), found])
    table(["setting", "method", "final", "minus trust"], rows)


if __name__ == "__main__":
    main()
