"""The trainer's caller, as the trainer sees it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def _print_alarm(line: Mapping[str, Any], text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@dataclass
class Host:
    """What the trainer needs from its caller and reports to it. The trainer only reads it; the caller may change it.

    The defaults suit a script of one's own; `pgpo train` fills all of it in for its run directory.

    Attributes:
        say: called with one sentence for the user.
        alarm: called on the main process with an alarm of the guard, as a line of alarms.jsonl and as a sentence.
        advice: (step) -> what to do next, the end of the sentence that names a lost rank.
        run_id: written into every checkpoint; a checkpoint with another one is not resumed.
        trusted: a checkpoint that the caller has verified, so that it is not verified again.
        before_seal: called before a checkpoint is sealed, to flush files that must not be older than it.
        watched: rows of the rollout whose tokens are kept in the trainer's `token_details`.
    """

    say: Callable[[str], Any] = warnings.warn
    alarm: Callable[[dict[str, Any], str], Any] = _print_alarm
    advice: Callable[[int], str] = "after step {}.".format
    run_id: str | None = None
    trusted: Path | None = None
    before_seal: Callable[[], Any] = lambda: None
    watched: set[int] = field(default_factory=set)
