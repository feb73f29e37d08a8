"""Figures from run directories; reads runs, never models."""

from __future__ import annotations

from pgpo.report.figures import plot_runs

__all__ = ["plot_runs"]
