"""The study's alarms over all settings: does a signal of the guard see a decline before the accuracy shows it?

Settings in which at least two runs with a frozen teacher stayed healthy have limits; there the alarms of SDPO and PGPO
are counted. The ROC area is compared with that of the step number, a clock, wherever four or more runs declined.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median


def main() -> None:
    alarms = json.loads(Path(__file__).with_name("summary.json").read_text())["alarms"]
    clock = "step number"
    print("| signal | in time | missed | median lead (steps) | false alarms | ROC area above a clock's |")
    print("|---|---|---|---|---|---|")
    for signal in alarms[0]["signals"]:
        if signal == clock:
            continue
        limited = [a for a in alarms if a["signals"][signal].get("limit") is not None]
        found = [a["signals"][signal] for a in limited]
        declines = sum(len(a["declines"]) for a in limited)
        healthy = sum(a["healthy"]["watched"] for a in limited)
        leads = [lead for f in found for lead in f["leads"].values() if lead is not None]
        better = [
            a["signals"][signal]["roc_rise"]["value"] > a["signals"][clock]["roc_rise"]["value"]
            for a in alarms
            if len(a["declines"]) >= 4
        ]
        early, missed, false = (
            sum(f["in_time"] for f in found),
            sum(f["missed"] for f in found),
            sum(f["false_alarms"]["watched"] for f in found),
        )
        print(
            f"| {signal} | {early}/{declines} | {missed}/{declines} | {median(leads):g} | {false}/{healthy} | "
            f"{sum(better)} of {len(better)} |"
        )


if __name__ == "__main__":
    main()
