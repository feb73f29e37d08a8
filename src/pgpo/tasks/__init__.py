"""Tasks with verifiable answers: questions in three splits, and a pure grader."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgpo.errors import UserError
from pgpo.tasks.graders import Grade

__all__ = ["Grade", "Row", "Task", "family", "load_task"]

Row = dict[str, Any]
"""One question: "id" (str, stable across runs and machines), "prompt" (chat messages), "answer" (str), "domain" (str).
Optional: "solution" (str, a right solution's text), "labels" (list of str, the option letters), "options" (list of
str, their texts), "stem" (str, the same for questions that share their text; intervals count these as one cluster).
The trainer and `evaluate` add "thinking_opened" (True) where the rendered prompt ends inside a thinking block, so that
the completion begins there."""


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
_MODULES = {
    "lab_world": "pgpo.tasks.lab_world",
    "science_qa": "pgpo.tasks.science_qa",
    "reasoning_gym": "pgpo.tasks.reasoning_gym",
    "math": "pgpo.tasks.boxed_math",
}


def family(name: str) -> str:
    """What loads a task: "reasoning_gym" for "reasoning_gym:chain_sum", ".py" for a file of the user's, else the name.

    Raises UserError for an unknown name.
    """
    if name.endswith(".py"):
        return ".py"
    found = name.partition(":")[0]
    if found not in _MODULES:
        raise UserError(
            f"Unknown task {name!r}; choose one of {', '.join(sorted(_MODULES))} (reasoning_gym:NAME), or a Python "
            "file with a function load() (docs/TASKS.md)."
        )
    return found


def load_task(name: str, **options: Any) -> Task:
    """Load a task by its name (see `family`); the options are those of its module's or file's `load`.

    Code in a file is run. Raises UserError for an unknown name, an unknown or missing option, a file without `load`,
    and for what `load` finds wrong.
    """
    of_file = family(name) == ".py"
    load = _load_of_file(Path(name)) if of_file else importlib.import_module(_MODULES[family(name)]).load
    if ":" in name and not of_file:
        options = {"name": name.partition(":")[2], **options}
    parameters = inspect.signature(load)
    try:
        parameters.bind(**options)
    except TypeError as error:
        known = ", ".join(parameters.parameters) or "none"
        raise UserError(f"Task {name!r}: {error}; its options are {known}.") from error
    task = load(**options)
    if not isinstance(task, Task):
        raise UserError(f"load() of {name} returned {task!r:.60}; it must return a pgpo.tasks.Task.")
    return task


def _load_of_file(path: Path) -> Callable[..., Task]:
    """The function `load` of a Python file."""
    if not path.is_file():
        raise UserError(f"there is no task file {path}; give the path of a Python file with a function load().")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # the name ends with .py
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"the task file {path} cannot be run ({type(error).__name__}: {error}).") from error
    if not callable(load := getattr(module, "load", None)):
        raise UserError(f"the task file {path} has no function load(); it must return a pgpo.tasks.Task.")
    return load
