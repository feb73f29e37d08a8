r"""Graders: one completion text in, one `Grade` out. Pure functions, linear in the length of the text.

`grade_tagged` reads `<reasoning>..</reasoning><answer>LETTER</answer>`, `grade_boxed` reads `\boxed{LETTER}`,
`grade_short_answer` reads `<answer> several tokens </answer>`. A reward is 1.0 or 0.0. Feedback is one sentence about
a failed attempt and never names the right answer; it is None when the reward is 1.0, even if the format was broken,
because there is no failed attempt to comment on.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Grade:
    """The verdict on one completion.

    reward: 1.0 right, 0.0 wrong. answer: what was extracted (for majority votes), None if nothing could be.
    well_formed: the asked format was kept. feedback: one sentence on a failed attempt, None if the reward is 1.0.
    """

    reward: float
    answer: str | None
    well_formed: bool
    feedback: str | None


_EMPTY = "The attempt is empty."
_REASONING_OPEN = "The reasoning is never closed, so no answer follows it."
_NO_BLOCK_AFTER_REASONING = "The attempt has no complete <answer>...</answer> block after its reasoning."
_NO_BLOCK = "The attempt has no complete <answer>...</answer> block."
_NO_BOX = r"The attempt has no complete \boxed{...} with a final answer."
_NOTHING_INSIDE = "The place for the final answer is empty."
_SEVERAL = "The final answer names more than one option."
_NO_LETTER = "The final answer is not the letter of one of the options."
_WRONG = "The final answer is wrong."


def grade_tagged(completion: str, answer: str, labels: Sequence[str]) -> Grade:
    """Grade `<reasoning>..</reasoning><answer>LETTER</answer>`; `answer` is the right one of the letters `labels`.

    The last complete answer block after the last reasoning tag decides; it must hold one label and white space.

    | completion                                            | reward      | answer | well_formed |
    |-------------------------------------------------------|-------------|--------|-------------|
    | the asked format                                      | by letter   | letter | True        |
    | text before, between or after the two blocks          | by letter   | letter | False       |
    | an answer block but no reasoning block                | by letter   | letter | False       |
    | several answer blocks after the reasoning             | by the last | letter | False       |
    | one quoted inside the reasoning, one after it         | by the last | letter | False       |
    | a complete block, then one that is never closed       | by complete | letter | False       |
    | answer block only inside the reasoning                | 0           | None   | False       |
    | reasoning never closed (a truncated text)             | 0           | None   | False       |
    | answer block never closed                             | 0           | None   | False       |
    | no answer tag, a bare letter, empty text              | 0           | None   | False       |
    | lower-case letter or tags; "B.", "B: 64 pC", LaTeX    | 0           | None   | False       |
    | two letters; a letter that no option has; empty block | 0           | None   | False       |

    Like the public reference grader of lasgroup/SDPO, the letter must stand alone in its block, in upper case.
    Departures from it: it takes whatever stands between the last "<answer>" and the next "</answer>", even if either
    or both are missing, so that a bare letter, an unclosed block, and a block inside the reasoning earn the full reward
    there and nothing here; and its flag `incorrect_format` is set exactly when the format is right.

    Raises ValueError if `labels` are not distinct single capital letters or `answer` is not one of them.
    """
    _check_labels(answer, labels)
    if not completion.strip():
        return _failure(_EMPTY)
    opened, closed = completion.rfind("<reasoning>"), completion.rfind("</reasoning>")
    if opened > closed:
        return _failure(_REASONING_OPEN)
    block = _last_answer_block(completion, start=max(closed, 0))
    if block is None:
        return _failure(_NO_BLOCK_AFTER_REASONING if closed >= 0 else _NO_BLOCK)
    letter = completion[block].strip()
    if letter not in labels:
        return _failure(_complaint(letter, labels))
    return _verdict(letter, answer, well_formed=_has_asked_format(completion))


def grade_boxed(completion: str, answer: str, labels: Sequence[str]) -> Grade:
    r"""Grade a final answer in `\boxed{}`; `answer` is the right one of the letters `labels`.

    The box that closes last decides (of nested boxes the outer one); boxes that never close are ignored. Font commands,
    braces, `$`, `*` and thin spaces around the letter are ignored.

    | content of the deciding box                                 | reward    | answer |
    |-------------------------------------------------------------|-----------|--------|
    | B, (B), [B], B), B., B:, \text{B}, \mathrm{B}, \textbf{(B)} | by letter | letter |
    | B: 64 pC, B. 64 pC, (B) 64 pC, \text{B: } 64 \mathrm{~pC}   | by letter | letter |
    | Option B, Answer: B                                         | by letter | letter |
    | lower-case b; a letter that no option has; empty box        | 0         | None   |
    | an option's text without its letter; B 64 pC; B = 64 pC     | 0         | None   |
    | A, B; A and B; (A)(B); A: 32 pC, B: 64 pC                   | 0         | None   |

    | completion                                                  | reward      | well_formed |
    |-------------------------------------------------------------|-------------|-------------|
    | one box with one letter, any text around it                 | by letter   | True        |
    | several boxes                                               | by the last | False       |
    | a complete box, then one that is never closed               | by complete | False       |
    | no box, a bare letter, a box never closed, empty text       | 0           | False       |

    "B 64 pC" is refused because "A good conductor" would read as option A. lasgroup/SDPO grades no multiple choice in
    boxes, so there is no reference to depart from.

    Raises ValueError if `labels` are not distinct single capital letters or `answer` is not one of them.
    """
    _check_labels(answer, labels)
    if not completion.strip():
        return _failure(_EMPTY)
    content, boxes_opened = _last_box(completion)
    if content is None:
        return _failure(_NO_BOX)
    text = " ".join(_DECORATION.sub(" ", content).split())
    letter = _leading_letter(text, labels)
    if letter is None:
        return _failure(_complaint(text, labels))
    return _verdict(letter, answer, well_formed=boxes_opened == 1)


def grade_short_answer(completion: str, answer: str) -> Grade:
    """Grade an open answer in `<answer> ... </answer>`: its tokens (split at white space) must equal those of `answer`.

    The last complete block decides. The extracted answer is its tokens joined by single spaces.

    | completion                                             | reward      | answer | well_formed |
    |--------------------------------------------------------|-------------|--------|-------------|
    | any text, one block, then only white space             | by tokens   | tokens | True        |
    | wrong case; "28.0" for "28"; glued or split tokens     | 0           | tokens | True        |
    | text after the block                                   | by tokens   | tokens | False       |
    | several blocks                                         | by the last | tokens | False       |
    | a complete block, then one that is never closed        | by complete | tokens | False       |
    | no block, a bare answer, unclosed or empty block, ""   | 0           | None   | False       |

    Raises ValueError if `answer` is blank.
    """
    if not answer.strip():
        raise ValueError("The right answer is blank; pass the text that the answer block must hold.")
    if not completion.strip():
        return _failure(_EMPTY)
    block = _last_answer_block(completion, start=0)
    if block is None:
        return _failure(_NO_BLOCK)
    tokens = completion[block].split()
    if not tokens:
        return _failure(_NOTHING_INSIDE)
    one_block = completion.count("<answer>") == completion.count("</answer>") == 1
    well_formed = one_block and completion.rstrip().endswith("</answer>")
    return _verdict(" ".join(tokens), " ".join(answer.split()), well_formed=well_formed)


def _verdict(given: str, right: str, *, well_formed: bool) -> Grade:
    if given == right:
        return Grade(1.0, given, well_formed, None)
    return Grade(0.0, given, well_formed, _WRONG)


def _failure(feedback: str) -> Grade:
    return Grade(0.0, None, False, feedback)


def _complaint(text: str, labels: Sequence[str]) -> str:
    """Why `text`, the content of an answer block or box, is not one letter."""
    if not text:
        return _NOTHING_INSIDE
    named = set(re.findall(r"\b[A-Z]\b", text)) & set(labels)
    return _SEVERAL if len(named) > 1 else _NO_LETTER


def _check_labels(answer: str, labels: Sequence[str]) -> None:
    single_capitals = all(re.fullmatch("[A-Z]", label) for label in labels)
    if not labels or not single_capitals or len(set(labels)) < len(labels):
        raise ValueError(f"The option labels are {list(labels)}; pass distinct single capital letters.")
    if answer not in labels:
        raise ValueError(
            f"The right answer {answer!r} is not among the option labels {list(labels)}; pass one of them."
        )


def _last_answer_block(text: str, start: int) -> slice | None:
    """Where the content of the last complete answer block after `start` stands, None if there is none."""
    last_closing = text.rfind("</answer>", start)
    begin = text.rfind("<answer>", start, max(last_closing, start))
    if begin < 0:
        return None
    return slice(begin + len("<answer>"), text.index("</answer>", begin))


def _has_asked_format(text: str) -> bool:
    """Each tag once, in order, and nothing but white space before, between and after the two blocks."""
    text = text.strip()
    if any(text.count(tag) != 1 for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>")):
        return False
    between = text[text.index("</reasoning>") + len("</reasoning>") : text.index("<answer>")]
    return text.startswith("<reasoning>") and not between.strip() and text.endswith("</answer>")


# The beginning of a box, an escaped brace (which neither opens nor closes), or a plain brace.
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")


def _last_box(text: str) -> tuple[str | None, int]:
    r"""Content of the `\boxed{}` that closes last (None if no box closes), and the number of boxes opened."""
    pending: list[tuple[bool, int]] = []  # per open brace: does it open a box, and where its content begins
    last: slice | None = None
    boxes_opened = 0
    for brace in _BRACE.finditer(text):
        token = brace.group()
        opens_box = token.startswith("\\boxed")
        if opens_box or token == "{":
            boxes_opened += opens_box
            pending.append((opens_box, brace.end()))
        elif token == "}" and pending:
            closes_box, begin = pending.pop()
            if closes_box:
                last = slice(begin, brace.start())
    return (None if last is None else text[last]), boxes_opened


# What may surround a letter without changing it: font commands, bracket sizes, spaces, braces, math and bold marks.
_DECORATION = re.compile(
    r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm|operatorname|boxed|fbox|left|right)"
    r"(?![A-Za-z])|\\[,;:! ]|[{}$~*]"
)

# "(B) ..", "[B] ..", "B) ..", "B. ..", "B: ..", or the letter alone; "Option" or "Answer:" may come first.
_LETTER_FIRST = re.compile(
    r"(?:(?:[Oo]ption|[Aa]nswer|[Cc]hoice) ?:? ?)?"
    r"(?:[(\[] ?(?P<bracketed>[A-Z]) ?[)\]] ?[.:]?|(?P<bare>[A-Z]) ?(?:[).:]|$)) ?"
)

# One more letter in the rest: at its start, or after a comma, a semicolon, "and" or "or". A slash is none: "45 N/C".
_ONE_MORE = re.compile(r"(?:^|[,;]|\band\b|\bor\b) ?[(\[]? ?([A-Z])(?= ?[)\].:,;]| ?$| and\b| or\b)")


def _leading_letter(text: str, labels: Sequence[str]) -> str | None:
    """The label at the head of `text`, None if there is none or if the rest names another one."""
    head = _LETTER_FIRST.match(text)
    if head is None:
        return None
    letter = head["bracketed"] or head["bare"]
    others = set(_ONE_MORE.findall(text[head.end() :])) & set(labels) - {letter}
    return letter if letter in labels and not others else None
