"""Figures and one HTML page from run directories and studies; reads runs, never models."""

from __future__ import annotations

from pgpo.report.figures import plot_runs

__all__ = ["plot_runs"]
