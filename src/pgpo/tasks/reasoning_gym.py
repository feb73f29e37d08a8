"""Tasks of reasoning_gym (arXiv 2505.24760): generators of questions with a scorer each, `reasoning_gym:chain_sum`.

The options of a generator (its difficulty) are passed through. Questions are numbered: number i is generated from the
seed and i alone. They are taken in that order, each text once, until there are `size` of them, or as many as come
within ATTEMPTS times that number; the first ones are the test questions, then come validation and training. So the
splits share no text, whatever the generator repeats, and a larger `size` leaves the test questions as they are as long
as there are TEST of them.

The reward is the generator's `score_answer`. Many give parts of 1 for answers that are near, long or merely of the
right form; such a reward counts in the mean (avg@k, GRPO's advantages), but only the full 1.0 is a right solution, that
is one that a teacher is shown (`success_threshold`). What else should it learn from it but the mistake?
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

from pgpo.errors import UserError
from pgpo.tasks import Row, Task
from pgpo.tasks.graders import Grade
from pgpo.tasks.open_answers import grade, style_of

SEED = 42  # as the split of science_qa; nothing depends on it
# Ours, the lab's numbers: questions in test and validation, at most; and all questions by default.
TEST, VALIDATION, SIZE = 256, 128, 1408
_PARTS = SIZE // VALIDATION  # of few questions the same shares: 2 of 11 for test, 1 for validation
# Generators of reasoning_gym 0.1.25 that draw from sets of texts, whose order is another in each process: with two hash
# seeds their first eight questions differ. A resumed run, or another rank, would train on other questions.
BY_HASH_SEED = {
    *("codeio", "isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder")
}
ATTEMPTS = 4  # ours: of a generator with enough questions a quarter of the numbers or more give a new one


def load(name: str = "", *, options: Mapping[str, Any] | None = None, style: str = "boxed") -> Task:
    """The task `reasoning_gym:name`.

    options: fields of the generator's config; `seed` and `size`, the number of questions in all three splits, are among
    them. style: see `open_answers`.

    Raises UserError: reasoning_gym is not installed, an unknown name or option, options that the generator refuses,
    fewer than 11 different questions, or questions that would be others in the next process.
    """
    gym = _installed()
    answers = style_of(style)
    if name in BY_HASH_SEED and os.environ.get("PYTHONHASHSEED", "random") == "random":
        raise UserError(
            f"the questions of reasoning_gym:{name} depend on Python's hash seed, which differs between processes; set "
            "the environment variable PYTHONHASHSEED, for example to 0."
        )
    settings = {"seed": SEED, "size": SIZE, **(options or {})}
    entries = _questions(gym, name, settings)
    generator = _create(gym, name, settings)
    by_id = {_id(name, entry): entry for entry in entries}
    rows = [
        {
            "id": id,
            "prompt": answers.prompt(entry["question"]),
            "answer": "" if entry["answer"] is None else str(entry["answer"]),  # None where several are right
            "domain": name,
        }
        for id, entry in by_id.items()
    ]

    def score(completion: str, row: Row) -> Grade:
        entry = by_id[row["id"]]  # here, for metadata of any type does not survive a table's columns
        opened = row.get("thinking_opened", False)
        return grade(completion, answers, lambda answer: generator.score_answer(answer, entry), opened=opened)

    test = min(TEST, 2 * len(rows) // _PARTS)
    selecting = test + min(VALIDATION, len(rows) // _PARTS)
    return Task(f"reasoning_gym:{name}", rows[selecting:], rows[test:selecting], rows[:test], score)


def _questions(gym: Any, name: str, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Up to `size` entries with different questions, in the order of their numbers."""
    size = settings["size"]
    if type(size) is not int or size < _PARTS:
        raise UserError(f"reasoning_gym:{name}: size is {size!r}; give a whole number of questions, {_PARTS} or more.")
    generator = _create(gym, name, {**settings, "size": ATTEMPTS * size})
    found: dict[str, dict[str, Any]] = {}
    for number in range(len(generator)):
        if len(found) == size:
            break
        try:
            entry = generator[number]
        except Exception as error:
            raise UserError(
                f"reasoning_gym:{name} fails at question {number} with {_given(settings)} ({type(error).__name__}: "
                f"{_reason(error)}); choose other options."
            ) from error
        found.setdefault(entry["question"], entry)
    if len(found) < _PARTS:
        raise UserError(
            f"reasoning_gym:{name} has only {len(found)} different questions with {_given(settings)}, and three splits "
            f"need {_PARTS}; widen its options."
        )
    return list(found.values())


def _create(gym: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """The generator with these settings. Raises UserError."""
    known = gym.factory.DATASETS
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5) or ["chain_sum", "basic_arithmetic", "spell_backward"]
        raise UserError(
            f"there is no reasoning_gym task {name!r}; give --task reasoning_gym:NAME with one of its {len(known)} "
            f"names, for example {', '.join(near)}."
        )
    fields = [field.name for field in dataclasses.fields(known[name][1])]
    if unknown := sorted(settings.keys() - set(fields)):
        raise UserError(f"reasoning_gym:{name} has no option {unknown[0]!r}; its options are {', '.join(fields)}.")
    try:
        return gym.create_dataset(name, **settings)
    except Exception as error:  # assertions mostly, and whatever a value of another type runs into
        raise UserError(
            f"reasoning_gym:{name} refuses {_given(settings)} ({type(error).__name__}: {_reason(error)})."
        ) from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or "no reason given"


def _given(settings: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in settings.items() if k not in ("seed", "size")}, default=str)


def _id(name: str, entry: Mapping[str, Any]) -> str:
    """Name and 12 digits of the question's SHA-256: equal ids mean equal questions."""
    return f"{name}-{hashlib.sha256(entry['question'].encode()).hexdigest()[:12]}"


def _installed() -> Any:
    try:
        import reasoning_gym
    except ImportError as error:
        raise UserError("this task needs reasoning_gym; install it with: pip install 'pgpo[tasks]'") from error
    return reasoning_gym
