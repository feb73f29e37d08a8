"""Tasks with verifiable answers: questions in three splits, and a pure grader."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pgpo.errors import UserError
from pgpo.tasks.graders import Grade

__all__ = ["Grade", "Row", "Task", "load_task"]

Row = dict[str, Any]
"""One question: "id" (str, stable across runs and machines), "prompt" (chat messages), "answer" (str), "domain" (str).
Optional: "solution" (str, a right solution's text), "labels" (list of str, the option letters), "options" (list of
str, their texts). The trainer and `evaluate` add "thinking_opened" (True) where the rendered prompt ends inside a
thinking block, so that the completion begins there."""


@dataclass(frozen=True)
class Task:
    """Questions to train on, to select with and to report on; grade maps (completion text, row) to a Grade.

    Attributes:
        rewards: (completions, their rows, seed, step) -> rewards in training and scalars to log, where training does
            not see the grade's reward; None = it does. Held-out completions are graded.
        feedback: (completion, row) -> a remark on an attempt that failed, which the teacher reads; None = none.
    """

    name: str
    train: list[Row]
    validation: list[Row]
    test: list[Row]
    grade: Callable[[str, Row], Grade]
    rewards: Callable[[Sequence[str], Sequence[Row], int, int], tuple[list[float], dict[str, float]]] | None = None
    feedback: Callable[[str, Row], str | None] | None = None


# Each module holds a function `load(**options) -> Task`; it is imported only when asked for.
_MODULES = {"lab_world": "pgpo.tasks.lab_world", "science_qa": "pgpo.tasks.science_qa"}


def load_task(name: str, **options: Any) -> Task:
    """Load a task by name ("lab_world" or "science_qa"); the options are those of the module's `load`.

    Raises UserError for an unknown name, an unknown or missing option, and for what the module's `load` finds wrong.
    """
    if name not in _MODULES:
        raise UserError(f"Unknown task {name!r}; choose one of {', '.join(sorted(_MODULES))}.")
    load: Callable[..., Task] = importlib.import_module(_MODULES[name]).load
    parameters = inspect.signature(load)
    try:
        parameters.bind(**options)
    except TypeError as error:
        known = ", ".join(parameters.parameters)
        raise UserError(f"Task {name!r}: {error}; its options are {known}.") from error
    return load(**options)
