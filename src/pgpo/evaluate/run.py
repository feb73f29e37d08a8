"""One evaluation: rows and any `generate` callable in, one record per completion out."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import Record
from pgpo.files import json_line, read_lines, write_atomically

if TYPE_CHECKING:
    from pgpo.tasks.graders import Grade

Messages = Any  # chat messages, or plain text
Generate = Callable[[list[Messages], int, int], list[list[str]]]
"""(prompts, k, seed) -> k completion texts per prompt; `pgpo.evaluate.runners` has two, a function of yours
will do."""


def evaluate(
    rows: Sequence[Mapping[str, Any]],
    generate: Generate,
    grade: Callable[[str, Any], Grade],
    k: int,
    seed: int,
    context: Callable[[Any], Messages] | None = None,
    opens: Callable[[Any], bool] | None = None,
) -> list[Record]:
    """k graded completions for each row, in the order of the rows.

    `context(row)` replaces the prompt of the row, for example by that of the self-teacher, which sees a solution.
    `opens(prompt)` tells whether a prompt ends inside a thinking block; the grader then finds "thinking_opened": True
    in the row. By default the generator's `opens_thinking`, if it has one (`pgpo.evaluate.runners` has).
    Raises UserError when k < 1, there are no rows or two of the same id, or `generate` returns another shape.
    """
    if k < 1:
        raise UserError(f"k = {k} completions per question cannot be averaged; set k to 1 or more.")
    if not rows:
        raise UserError("There are no rows to evaluate; check the split of the task.")
    check_ids([row["id"] for row in rows])
    prompts = [context(row) if context else row["prompt"] for row in rows]
    completions = generate(prompts, k, seed)
    _check_shape(completions, len(prompts), k, generate)
    opens = opens or getattr(generate, "opens_thinking", None)
    marked = [
        {"thinking_opened": True, **row} if opens is not None and opens(prompt) else row
        for row, prompt in zip(rows, prompts, strict=True)
    ]
    return [
        graded(row, sample, text, grade(text, row))
        for row, texts in zip(marked, completions, strict=True)
        for sample, text in enumerate(texts)
    ]


def check_ids(ids: Sequence[Any]) -> None:
    """Raises UserError where two rows have the same id."""
    question, count = Counter(ids).most_common(1)[0]
    if count > 1:
        raise UserError(
            f"{count} rows have the id {question!r}, they would count as one question; make the ids unique."
        )


def graded(row: Mapping[str, Any], sample: int, text: str, grade: Grade) -> Record:
    """The record of one completion. Raises UserError if a grader returned no Grade, or one without a finite reward."""
    try:
        reward, answer, well_formed = float(grade.reward), grade.answer, grade.well_formed
    except (AttributeError, TypeError, ValueError):
        raise UserError(
            f"grade returned {grade!r:.100} for question {row['id']!r}; it must return a pgpo.tasks.graders.Grade, "
            "with a number as its reward."
        ) from None
    if not math.isfinite(reward):
        raise UserError(f"grade returned the reward {reward} for question {row['id']!r}; a reward must be finite.")
    record = Record(
        question_id=row["id"],
        domain=row["domain"],
        sample=sample,
        reward=reward,
        answer=answer,
        well_formed=well_formed,
        completion=text,
    )
    return with_stem(record, row)


def with_stem(record: Record, row: Mapping[str, Any]) -> Record:
    """The record with the stem of its row, if that has one."""
    return record if row.get("stem") is None else Record(**record, stem=str(row["stem"]))


def write_records(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Writes one JSON line per record, all or nothing."""
    write_atomically(Path(path), "".join(map(json_line, records)))


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Reads what `write_records` wrote. Raises UserError for a missing file, a broken line, or one without
    all keys."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no file of records {path}; write one with write_records.")
    records: list[Record] = []
    for number, line in enumerate(read_lines(path), 1):
        missing = sorted(Record.__required_keys__ - line.keys())
        if missing:
            raise UserError(f"Line {number} of {path} is not a record, it has no {missing[0]!r}; evaluate again.")
        records.append(Record(**line))  # type: ignore[typeddict-item]
    return records


def _check_shape(completions: Any, prompts: int, k: int, generate: Generate) -> None:
    name = getattr(generate, "__qualname__", type(generate).__qualname__)
    if not isinstance(completions, list) or len(completions) != prompts:
        got = f"{len(completions)} lists" if isinstance(completions, list) else f"a {type(completions).__name__}"
        raise UserError(
            f"{name} returned {got} for {prompts} prompts; it must return one list of {k} texts per prompt."
        )
    for index, texts in enumerate(completions):
        if not isinstance(texts, list) or len(texts) != k or not all(isinstance(text, str) for text in texts):
            got = f"{len(texts)} items" if isinstance(texts, list) else f"a {type(texts).__name__}"
            raise UserError(f"{name} returned {got} for prompt {index}; it must return a list of {k} texts per prompt.")
