"""The figure of `pgpo sde`: error against eta for every row, with slope guides."""

from __future__ import annotations

from collections.abc import Sequence

from .orders import Outcome

# Okabe-Ito, readable without color vision.
COLORS = {0.0: "#D55E00", 0.5: "#E69F00", 1.0: "#0072B2", 1.5: "#56B4E9", 2.0: "#009E73"}
STYLES = {0.0: "-", 0.5: "--", 1.0: "-", 1.5: "--", 2.0: "-"}


def draw(outcomes: Sequence[Outcome], path: str) -> None:
    """Write the log-log figure to `path` (format by suffix)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 6.0), layout="constrained")
    axes = figure.subplots()
    labelled: set[float] = set()
    for outcome in outcomes:
        order = outcome.row.true
        axes.loglog(
            outcome.etas,
            outcome.errors,
            STYLES[order],
            color=COLORS[order],
            alpha=0.6,
            linewidth=1.0,
            marker=".",
            label=None if order in labelled else f"order {order:g} by the theorem",
        )
        labelled.add(order)
        if not outcome.agrees:
            axes.loglog(outcome.etas, outcome.errors, "rx", label=f"DIFFERS: {outcome.row.equation}")
    etas = sorted({eta for outcome in outcomes for eta in outcome.etas})
    for order in sorted(labelled):
        guide = [0.6 * (eta / etas[-1]) ** order for eta in etas]
        axes.loglog(etas, guide, ":", color="black", linewidth=1.2)
        axes.annotate(f"slope {order:g}", (etas[0], guide[0]), xytext=(-4, 0), textcoords="offset points",
                      ha="right", va="center", fontsize=8)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(etas[0] / 2, etas[-1] * 1.2)
    axes.set_xlabel("eta (learning rate)")
    axes.set_ylabel("max over time, start and test function of |E g(chain) - E g(SDE)|")
    axes.set_title("Weak error of every chain against every equation")
    handles, labels = axes.get_legend_handles_labels()
    order_of_legend = sorted(range(len(labels)), key=lambda i: labels[i])
    axes.legend([handles[i] for i in order_of_legend], [labels[i] for i in order_of_legend], fontsize=8)
    figure.savefig(path, dpi=150)
