"""The paper's way of comparing, applied to the study: the best of three alphas, at its best step, against one SDPO run.

For each of the four domains and each seed: does the best of PGPO's three arms reach a higher peak than SDPO of that
seed (validation curve)? Beside it, what three tries give by arithmetic alone, three times of four less ties, and how
much they gain: the best of three other seeds of SDPO in place of PGPO.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from statistics import mean

DOMAINS = ("physics", "chemistry", "biology", "materials")
ARMS = ("pgpo-0.5", "pgpo-1.0", "pgpo-1.5")


def main() -> None:
    settings = json.loads(Path(__file__).with_name("summary.json").read_text())["settings"]
    gains: list[float] = []
    control: list[float] = []
    for domain in DOMAINS:
        methods = settings[domain]["methods"]
        sdpo = methods["sdpo"]["peak"]
        for i, own in enumerate(sdpo):
            gains.append(max(methods[arm]["peak"][i] for arm in ARMS) - own)
            others = sdpo[:i] + sdpo[i + 1 :]
            control += [max(three) - own for three in itertools.combinations(others, 3)]
    for name, values in (("best of PGPO's three alphas", gains), ("best of three other seeds of SDPO", control)):
        won = sum(v > 0 for v in values)
        print(f"{name}: above SDPO in {won} of {len(values)} ({won / len(values):.1%}), on average {mean(values):+.4f}")


if __name__ == "__main__":
    main()
