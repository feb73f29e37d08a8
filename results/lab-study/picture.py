"""The learning curves of README.md and docs/RESULTS.md, from the committed records: docs/learning_curves.png.

    python results/lab-study/picture.py

Validation accuracy (avg@4 on 128 questions) of four methods in the four settings without domain: mean over 8 seeds and
the 95 % interval of that mean (Student's t over seeds). Settings and methods are those of the claims in RESULTS.md.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pgpo import runlog
from pgpo.intervals import student_t
from pgpo.report.figures import STYLE
from pgpo.report.methods import accuracy, evaluated
from pgpo.report.sources import read_sources

HERE = Path(__file__).parent
OUT = HERE.parents[1] / "docs" / "learning_curves.png"
SETTINGS = {
    "plain-1e-3": "plain, learning rate 1e-3",
    "plain-2e-3": "plain, 2e-3: SDPO collapses",
    "style-3e-4": "style, 3e-4",
    "style-1e-3": "style, 1e-3",
}
# Okabe and Ito's colours, which the colour-blind can tell apart; each method has a line of its own too.
METHODS = {
    "sdpo": ("SDPO", "#0072B2", "-"),
    "pgpo-1.0": ("PGPO, alpha 1", "#D55E00", "--"),
    "sdpo-slow": ("SDPO, slow teacher", "#009E73", "-."),
    "grpo": ("GRPO", "#555555", ":"),
}


def main() -> None:
    _, (study,) = read_sources([HERE])
    with matplotlib.rc_context(STYLE | {"font.size": 9}):
        figure = Figure(figsize=(9, 2.9), layout="constrained")
        panels = figure.subplots(1, len(SETTINGS), sharey=True)
        for axes, (setting, title) in zip(panels, SETTINGS.items()):
            axes.set_title(title, loc="left", fontsize=9)
            axes.set_xlabel("optimizer step")
            for method, (label, color, line) in METHODS.items():
                runs = [run for run in study.runs[setting] if run.method == method]
                curves = [accuracy(evaluated(run, runlog.VALIDATION)) for run in runs]
                steps, values = curves[0][0], np.stack([values for _, values in curves])
                mean = values.mean(0)
                half = student_t(len(runs) - 1) * values.std(0, ddof=1) / math.sqrt(len(runs))
                axes.fill_between(steps, mean - half, np.minimum(1, mean + half), color=color, alpha=0.13, linewidth=0)
                axes.plot(steps, mean, color=color, linestyle=line, linewidth=1.8, label=label)
        panels[0].set_ylabel("accuracy (avg@4)")
        panels[0].set_ylim(0.2, 1.0)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(METHODS), frameon=False)
        figure.savefig(OUT, dpi=130)
    print(f"{OUT.name}: {OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
