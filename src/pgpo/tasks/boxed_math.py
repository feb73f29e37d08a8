r"""Mathematics with a final answer in \boxed{}, from local JSONL files with the columns `prompt` and `solution`.

These are the columns of TRL's datasets for GRPO, and the judge is TRL's: `trl.rewards.accuracy_reward`, which compares
by value with math-verify ("\frac{1}{2}" is "0.5"). Two differences to calling that function itself: the answer must
stand in a box, the last complete one counts; and a solution that math-verify cannot read is an error here before
anything is trained, where TRL leaves the row out of each batch.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pgpo.errors import UserError
from pgpo.tasks import Row, Task
from pgpo.tasks.graders import Grade
from pgpo.tasks.jsonl import Record, read_jsonl
from pgpo.tasks.open_answers import STYLES, grade
from pgpo.tasks.science_qa import SEED, VALIDATION_FRACTION, split


def load(path: str | os.PathLike[str], *, validation_fraction: float = VALIDATION_FRACTION) -> Task:
    r"""The task of a folder with train.jsonl and test.jsonl, or of one file, split 90/10 as science_qa is.

    `prompt` is a text, to which the request for a \boxed{} answer is added, or chat messages, taken as they are.
    `solution` is the answer or a text that ends with it, as math-verify reads it. A prompt counts once, whatever its
    spaces and case: training rows that repeat it are left out with a warning. validation_fraction: share of the
    training questions held out.

    Raises UserError: missing or malformed files, a solution that cannot be read, fewer than two questions, a fraction
    outside [0, 1), or math-verify is not installed.
    """
    if not 0 <= validation_fraction < 1:
        raise UserError(f"validation_fraction={validation_fraction} is not in [0, 1); {VALIDATION_FRACTION} is usual.")
    judge = _judge()
    train, test = _read(Path(path).expanduser(), judge)
    # The lottery depends on a question alone, not on its place: see science_qa.hold_out.
    drawn = sorted(train, key=lambda row: hashlib.sha256(f"{SEED}:{row['id']}".encode()).digest())
    held_out = min(math.ceil(validation_fraction * len(train)), len(train) - 1)  # at least one is trained on
    validation = {row["id"] for row in drawn[:held_out]}

    def score(completion: str, row: Row) -> Grade:
        opened = row.get("thinking_opened", False)
        return grade(completion, STYLES["boxed"], lambda answer: judge(answer, row["answer"]) or 0.0, opened=opened)

    rest = [row for row in train if row["id"] not in validation]
    return Task("math", rest, [row for row in train if row["id"] in validation], test, score)


def _read(path: Path, judge: Callable[[str, str], float | None]) -> tuple[list[Row], list[Row]]:
    """Training and test questions, each prompt once."""
    if path.is_dir():
        parts = [path / "train.jsonl", path / "test.jsonl"]
        if missing := [file.name for file in parts if not file.is_file()]:
            raise UserError(f"The folder {path} lacks {' and '.join(missing)}; add it, or give one file to be split.")
        train, test = ([_row(record, judge) for record in read_jsonl(file)] for file in parts)
        train, test = _once(train, {row["id"] for row in _once(test, set())}), _once(test, set())
    else:
        train, test = split(_once([_row(record, judge) for record in read_jsonl(path)], set()))
    if not train:
        raise UserError(f"{path}: every training question stands in the test file too; give other questions.")
    return train, test


def _once(rows: Sequence[Row], seen: set[str]) -> list[Row]:
    """The first row of each prompt that is not in `seen`."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["id"] not in seen:
            found.setdefault(row["id"], row)
    if left_out := len(rows) - len(found):
        warnings.warn(f"{left_out} of {len(rows)} questions repeat a prompt and are left out.", stacklevel=2)
    return list(found.values())


def _row(record: Record, judge: Callable[[str, str], float | None]) -> Row:
    prompt, solution = (record.columns.get(name) for name in ("prompt", "solution"))
    if not isinstance(solution, str) or not solution.strip():
        raise UserError(f'{record.where}: column "solution" is {solution!r:.60}; write the right answer there.')
    said = prompt if isinstance(prompt, str) else ""
    if _is_chat(prompt):
        said = " ".join(message["content"] for message in prompt or [])
    if isinstance(prompt, str) and prompt.strip():
        prompt = STYLES["boxed"].prompt(prompt)
    elif not _is_chat(prompt):
        raise UserError(f'{record.where}: column "prompt" is {prompt!r:.60}; make it a text, or chat messages.')
    if judge("0", solution) is None:
        raise UserError(
            f'{record.where}: math-verify reads no answer in the solution "{solution:.60}"; write it as LaTeX, in '
            "$...$ or \\boxed{}."
        )
    key = " ".join(said.casefold().split())
    digest = hashlib.sha256(key.encode("utf-8", "backslashreplace")).hexdigest()
    return {"id": f"math-{digest[:12]}", "prompt": prompt, "answer": solution, "domain": "math"}


def _is_chat(prompt: Any) -> bool:
    return (
        isinstance(prompt, list)
        and bool(prompt)
        and all(isinstance(m, dict) and {type(m.get("role")), type(m.get("content"))} == {str} for m in prompt)
    )


def _judge() -> Callable[[str, str], float | None]:
    """(answer, solution) -> 1.0 or 0.0, None for a solution that cannot be read."""
    from trl.import_utils import is_math_verify_available
    from trl.rewards import accuracy_reward

    if not is_math_verify_available():
        raise UserError("the task math needs math-verify; install it with: pip install 'pgpo[tasks]'")

    def judge(answer: str, solution: str) -> float | None:
        reward: float | None = accuracy_reward([[{"content": rf"\boxed{{{answer}}}"}]], [solution])[0]
        return reward

    return judge
