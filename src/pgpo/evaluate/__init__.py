"""Evaluation that is honest about noise: completions -> records -> avg@k, pass@k, maj@k with intervals by
question.

The runners of `pgpo.evaluate.runners` need torch or vLLM and are imported from there.
"""

from __future__ import annotations

from pgpo.evaluate.avg_at_k import (
    Difference,
    Estimate,
    Record,
    Summary,
    avg_scores,
    estimate,
    maj_scores,
    paired_difference,
    pass_scores,
    summarize,
)
from pgpo.evaluate.run import evaluate, read_records, write_records

__all__ = [
    "Difference",
    "Estimate",
    "Record",
    "Summary",
    "avg_scores",
    "estimate",
    "evaluate",
    "maj_scores",
    "paired_difference",
    "pass_scores",
    "read_records",
    "summarize",
    "write_records",
]
