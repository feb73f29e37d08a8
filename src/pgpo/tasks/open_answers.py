r"""Questions with an open answer: how a prompt asks for it, and where it stands in a completion.

| style | the prompt asks for            | the answer is                                                             |
|-------|--------------------------------|---------------------------------------------------------------------------|
| boxed | reasoning, then \boxed{answer} | what stands in the last complete box                                      |
| plain | the answer and nothing else    | what follows the last "is ", ": " or "= " of the first line, or the first |
|       |                                | line; or the whole visible text, if that scores more; without quotes,     |
|       |                                | stars and a full stop at the ends                                         |

`plain` is for short answers of small models: they seldom keep a format, and write "2 + 2 = 4" or "The answer is 4."
whatever they are asked, and go on in another paragraph.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pgpo.errors import UserError
from pgpo.tasks.graders import Grade, last_box, nothing_to_read
from pgpo.visible import visible_text

_NO_ANSWER = "The attempt has no final answer where the question asks for it."
_UNREADABLE = "The final answer cannot be read."
_WRONG = "The final answer is wrong."


@dataclass(frozen=True)
class Style:
    """instruction: follows the question, on a line of its own. read: visible text -> (readings of its answer, none
    without one; well-formed)."""

    instruction: str
    read: Callable[[str], tuple[Sequence[str], bool]]

    def prompt(self, question: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{question}\n{self.instruction}"}]


def _boxed(text: str) -> tuple[Sequence[str], bool]:
    content, opened = last_box(text)
    answer = (content or "").strip()
    return ([answer] if answer else []), bool(answer) and opened == 1


_LEAD = re.compile(r".*(?:\bis|[:=])\s+(?=\S)", re.DOTALL)  # up to the last of them


def _plain(text: str) -> tuple[Sequence[str], bool]:
    """Never two different final answers: a text that gives both would be right whatever the truth is."""
    line = text.strip().partition("\n")[0]
    readings = [bare for bare in map(_bare, (_LEAD.sub("", line), text)) if bare]
    return list(dict.fromkeys(readings)), _LEAD.match(text) is None


def _bare(text: str) -> str:
    ends = " \t\n*`\"'"
    return text.strip(ends).removesuffix(".").strip(ends)


STYLES = {
    # The unguided prompt of the PGPO paper.
    "boxed": Style(r"Please reason step by step, and put your final answer within \boxed{}.", _boxed),
    "plain": Style("Give the final answer and nothing else.", _plain),
}


def style_of(name: str) -> Style:
    """The style of this name. Raises UserError for another one."""
    if name not in STYLES:
        raise UserError(f"Unknown prompt style {name!r}; this task has {' and '.join(STYLES)}.")
    return STYLES[name]


def grade(completion: str, style: Style, score: Callable[[str], float], *, opened: bool = False) -> Grade:
    """The grade of a completion: the best of what `score` gives to the readings of its answer, 1.0 if it is right.

    The answer that counts in votes is the reading that scores most, of equal ones the first. `score` raising an
    exception is an answer that it cannot read, reward 0. `opened`: the prompt ends inside a thinking block.
    """
    text = visible_text(completion, opened)
    if not text.strip():
        return nothing_to_read(completion)
    readings, well_formed = style.read(text)
    if not readings:
        return Grade(0.0, None, False, _NO_ANSWER)
    scores: dict[str, float] = {}
    for reading in readings:
        try:
            scores[reading] = float(score(reading))
        except Exception:  # scorers parse what a model wrote, and not all of them expect what models write
            continue
    if not scores:
        return Grade(0.0, readings[0], well_formed, _UNREADABLE)
    answer = max(scores, key=scores.__getitem__)
    return Grade(scores[answer], answer, well_formed, None if scores[answer] >= 1 else _WRONG)
