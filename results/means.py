"""Final accuracy of a study in short: python results/means.py [results/trust-late] prints one Markdown table.

Mean over seeds of avg@k on the test questions at the last step (sd over seeds), and runs that collapsed, of how many.
Everything comes from records.jsonl.gz in the folder; the differences with their intervals are in its tables.md.
"""

from __future__ import annotations

import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from pgpo.study_files import accuracy_curve, collapsed, read_records


def cell(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    final = [statistics.fmean(run["test_scores"].values()) for run in runs]
    spread = f" ({statistics.stdev(final):.3f})" if len(final) > 1 else ""
    fell = sum(collapsed(accuracy_curve(run["evaluations"])[1]) for run in runs if run["steps"])
    return f"{statistics.fmean(final):.3f}{spread} {fell}/{len(final)}"


def main(folder: Path) -> None:
    if not (folder / "records.jsonl.gz").is_file():
        sys.exit(f"there is no {folder}/records.jsonl.gz; give the folder of a study, e.g. results/trust-late.")
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in read_records(folder / "records.jsonl.gz").values():
        if record.get("test_scores"):
            found[record["method"]][record["setting"]].append(record)
    settings = list(dict.fromkeys(setting for runs in found.values() for setting in runs))
    print("| |", " | ".join(settings), "|")
    print("|---" * (len(settings) + 1) + "|")
    for method, runs in found.items():
        print(f"| {method} |", " | ".join(cell(runs[setting]) for setting in settings), "|")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/trust-late"))
