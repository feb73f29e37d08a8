"""The output of a command: lines on stderr, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


def say(text: str) -> None:
    """One line to stderr. Outside a terminal rich would wrap it, so it is printed plainly."""
    if console.is_terminal:
        console.print(text, highlight=False, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)


def quiet() -> None:
    """Silence the warnings and the progress bars of transformers, and what the libraries below say of their own future,
    such as of fields that TRL sets by an old name: who calls a command cannot change it."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


class Heartbeat:
    """Lines that say how far something long has come: one every half minute, from the first half minute on.

    seconds: ours.
    """

    def __init__(self, seconds: float = 30.0) -> None:
        self.seconds = seconds
        self.start = self.last = time.monotonic()

    def __call__(self, text: Callable[[], str]) -> None:
        """`text` gives the line, to which the minutes since the beginning are added; it is called if one is due."""
        now = time.monotonic()
        if now - self.last >= self.seconds:
            self.last = now
            say(f"{text()} ({(now - self.start) / 60:.1f} min)")


class progress:
    """A progress bar on a terminal, nothing elsewhere."""

    def __init__(self, title: str) -> None:
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self.line = self.bar.add_task(title, total=None, shown="")

    def __enter__(self) -> tuple[Progress, Any]:
        self.bar.start()
        return self.bar, self.line

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()
