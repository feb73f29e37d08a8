"""Can a signal tell a misled batch? python results/trust-late/signals.py prints areas under the ROC as a table.

For the runs in the misleading world: a signal of the steps whose verifier passed wrong solutions at a rate of HIGH and
more against those of at most LOW. 1 = always smaller where misled, .5 = chance, 0 = always larger. Mean over seeds, and
the lowest and highest. The rates are a function of seed and step (counted from 0); the signals come from
records.jsonl.gz beside this file.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from pathlib import Path

from pgpo.study_files import read_records
from pgpo.tasks.lab_world import misled_rate

SIGNALS = ("information", "divergence", "agreement", "grad_norm", "sampled_kl_wrong", "reward")
LOW, HIGH = 0.2, 0.4  # the rates are even in [0, .6]: a third each


def area(low: list[float], high: list[float]) -> float:
    """Probability that a value of `low` is larger than one of `high`."""
    return statistics.fmean((a > b) + 0.5 * (a == b) for a in low for b in high)


def main() -> None:
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read_records(Path(__file__).with_name("records.jsonl.gz")).values():
        if record["setting"] != "misleading":
            continue
        rates = [misled_rate(record["seed"], step - 1) for step in record["steps"]]
        for signal in SIGNALS:
            pairs = [(r, v) for r, v in zip(rates, record["metrics"].get(signal, [])) if v is not None]
            low, high = [v for r, v in pairs if r <= LOW], [v for r, v in pairs if r >= HIGH]
            if low and high:
                areas[record["method"]][signal].append(area(low, high))
    print("| |", " | ".join(SIGNALS), "|")
    print("|---" * (len(SIGNALS) + 1) + "|")
    for method, found in areas.items():
        cells = [found[signal] for signal in SIGNALS]
        print(
            f"| {method} |",
            " | ".join(f"{statistics.fmean(c):.2f} [{min(c):.2f}, {max(c):.2f}]" if c else "" for c in cells),
            "|",
        )


if __name__ == "__main__":
    main()
