"""The output of a command: lines on stderr, and a progress bar on a terminal."""

from __future__ import annotations

import sys
import warnings
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


def ignore_renamed_fields() -> None:
    """Hide transformers 5's warning on a field that TRL still sets by its old name; a user cannot change that."""
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)


def quiet() -> None:
    """Silence the warnings and the progress bars of transformers."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


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
