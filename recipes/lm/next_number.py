"""A task of few words for a small model: which number comes after n? `pgpo train --task recipes/lm/next_number.py`.

200 questions, apart by their number: 146 to train on, 18 to validate, 36 to test. The last number of a completion is
its answer.
"""

from __future__ import annotations

import random
import re
from typing import Any

from pgpo.tasks import Grade, Task


def grade(completion: str, row: dict[str, Any]) -> Grade:
    found = re.findall(r"\d+", completion)
    return Grade(float(found[-1:] == [row["answer"]]), found[-1] if found else None, bool(found), None)


def question(n: int) -> dict[str, Any]:
    text = f"Which number comes after {n}? Give the number and nothing else."
    return {
        "id": f"after-{n}",
        "prompt": [{"role": "user", "content": text}],
        "answer": str(n + 1),
        "domain": "counting",
    }


def load() -> Task:
    numbers = list(range(11, 211))
    random.Random(0).shuffle(numbers)
    rows = [question(n) for n in numbers]
    return Task("next number", rows[:146], rows[146:164], rows[164:], grade)
