r"""Graders: one completion text in, one `Grade` out. Pure functions, linear in the length of the text.

`grade_tagged` reads `<reasoning>..</reasoning><answer>LETTER</answer>`, `grade_boxed` reads `\boxed{LETTER}`,
`grade_short_answer` reads `<answer> several tokens </answer>`. A reward is 1.0 or 0.0. Feedback is one sentence about
a failed attempt and never names the right answer; it is None when the reward is 1.0, even if the format was broken,
because there is no failed attempt to comment on.

All of them read what the user sees (`pgpo.visible`): text inside a thinking block is no answer. `opened=True` says that
the prompt ends inside such a block, as after a chat template's `<think>`, so that the completion begins there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from pgpo.visible import visible_text


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
_ALL_THINKING = "The attempt shows nothing but thinking, so no answer follows it."
_REASONING_OPEN = "The reasoning is never closed, so no answer follows it."
_NO_BLOCK_AFTER_REASONING = "The attempt has no complete <answer>...</answer> block after its reasoning."
_NO_BLOCK = "The attempt has no complete <answer>...</answer> block."
_NO_BOX = r"The attempt has no complete \boxed{...} with a final answer."
_NOTHING_INSIDE = "The place for the final answer is empty."
_SEVERAL = "The final answer names more than one option."
_NO_LETTER = "The final answer is not the letter of one of the options."
_WRONG = "The final answer is wrong."


def grade_tagged(
    completion: str,
    answer: str,
    labels: Sequence[str],
    *,
    options: Sequence[str] | None = None,
    opened: bool = False,
) -> Grade:
    """Grade `<reasoning>..</reasoning><answer>LETTER</answer>`; `answer` is the right one of the letters `labels`.

    The last complete answer block after the last reasoning tag decides; it must name one label. `options`: see
    `grade_boxed`.

    | completion                                            | reward      | answer | well_formed |
    |-------------------------------------------------------|-------------|--------|-------------|
    | the asked format, the letter alone in its block       | by letter   | letter | True        |
    | text before, between or after the two blocks          | by letter   | letter | False       |
    | an answer block but no reasoning block                | by letter   | letter | False       |
    | "B.", "(B)", "B: 64 pC", LaTeX, and whatever else     | by letter   | letter | False       |
    | names one letter in a box (see `grade_boxed`)         |             |        |             |
    | several answer blocks after the reasoning             | by the last | letter | False       |
    | one quoted inside the reasoning, one after it         | by the last | letter | False       |
    | a complete block, then one that is never closed       | by complete | letter | False       |
    | answer block only inside the reasoning or thinking    | 0           | None   | False       |
    | reasoning or thinking never closed (a truncated text) | 0           | None   | False       |
    | answer block never closed                             | 0           | None   | False       |
    | no answer tag, a bare letter, empty text              | 0           | None   | False       |
    | lower-case letter or tags                             | 0           | None   | False       |
    | two letters; a letter that no option has; empty block | 0           | None   | False       |

    Departures from the public reference grader of lasgroup/SDPO: it takes whatever stands between the last "<answer>"
    and the next "</answer>", even if either or both are missing, so that a bare letter, an unclosed block, and a block
    inside the reasoning earn the full reward there and nothing here; the letter must stand alone there, here only for
    the format; and its flag `incorrect_format` is set exactly when the format is right.

    Raises ValueError if `labels` are not distinct single capital letters, `answer` is not one of them, or `options` are
    not as many.
    """
    _check_labels(answer, labels, options)
    text = visible_text(completion, opened)
    if not text.strip():
        return nothing_to_read(completion)
    reasoning, closed = text.rfind("<reasoning>"), text.rfind("</reasoning>")
    if reasoning > closed:
        return _failure(_REASONING_OPEN)
    block = _last_answer_block(text, start=max(closed, 0))
    if block is None:
        return _failure(_NO_BLOCK_AFTER_REASONING if closed >= 0 else _NO_BLOCK)
    content = text[block]
    letter = _named_letter(content, labels, options)
    if letter is None:
        return _failure(_complaint(content, labels))
    well_formed = content.strip() in labels and _has_asked_format(text)
    return _verdict(_canonical(letter, answer, labels, options), answer, well_formed=well_formed)


def grade_boxed(
    completion: str,
    answer: str,
    labels: Sequence[str],
    *,
    options: Sequence[str] | None = None,
    opened: bool = False,
) -> Grade:
    r"""Grade a final answer in `\boxed{}`; `answer` is the right one of the letters `labels`.

    The box that closes last decides (of nested boxes the outer one); boxes that never close are ignored. Ignored around
    the letter: LaTeX fonts, sizes, colours and spaces, braces, `$`, `*`, quotes, check marks; full-width and circled
    letters count as plain ones.

    | content of the deciding box                                     | reward    | answer |
    |-----------------------------------------------------------------|-----------|--------|
    | B, (B), [B], \text{B}, \Large\textbf{(B)}, \textcolor{red}{B}   | by letter | letter |
    | B. or B) or B: or B, or "B -" or a line break, then any text    | by letter | letter |
    | (B) 64 pC; B (64 pC); B is correct                              | by letter | letter |
    | Option B; the correct answer is B; Therefore, B: words in any   | by letter | letter |
    | case that say nothing else                                      |           |        |
    | 64 pC (B); 64 pC, option B; so the answer is B; 64 pC -> B      | by letter | letter |
    | lower-case b; a letter that no option has; empty box            | 0         | None   |
    | an option's text without its letter; B 64 pC; not B             | 0         | None   |
    | B = 64; B_2; B'; B^2; B/2; B-12; \frac{B}{2}; \hat{B}           | 0         | None   |
    | A, B; A and B; (A)(B); A: 32 pC, B: 64 pC; A: 32 pC (B)         | 0         | None   |

    options: the texts of the options, in the order of `labels`. With them,

    | content of the deciding box                                     | reward    | answer |
    |-----------------------------------------------------------------|-----------|--------|
    | B and exactly its text, however joined: "B vitamins A and C"    | by letter | letter |
    | B and exactly the text of another option; that text alone       | 0         | None   |
    | a letter with exactly the same text as the right one            | 1         | `answer` |

    | completion                                                  | reward      | well_formed |
    |-------------------------------------------------------------|-------------|-------------|
    | one box with one letter, any text around it                 | by letter   | True        |
    | several boxes                                               | by the last | False       |
    | a complete box, then one that is never closed               | by complete | False       |
    | a box only inside the thinking; thinking that never closes  | 0           | False       |
    | no box, a bare letter, a box never closed, empty text       | 0           | False       |

    "B 64 pC" is refused without the options because "A good conductor" would read as option A. lasgroup/SDPO grades no
    multiple choice in boxes, so there is no reference to depart from.

    Raises ValueError if `labels` are not distinct single capital letters, `answer` is not one of them, or `options` are
    not as many.
    """
    _check_labels(answer, labels, options)
    text = visible_text(completion, opened)
    if not text.strip():
        return nothing_to_read(completion)
    content, boxes_opened = last_box(text)
    if content is None:
        return _failure(_NO_BOX)
    letter = _named_letter(content, labels, options)
    if letter is None:
        return _failure(_complaint(content, labels))
    return _verdict(_canonical(letter, answer, labels, options), answer, well_formed=boxes_opened == 1)


def grade_short_answer(completion: str, answer: str, *, opened: bool = False) -> Grade:
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
    | a block only inside the thinking                       | 0           | None   | False       |

    Raises ValueError if `answer` is blank.
    """
    if not answer.strip():
        raise ValueError("The right answer is blank; pass the text that the answer block must hold.")
    text = visible_text(completion, opened)
    if not text.strip():
        return nothing_to_read(completion)
    block = _last_answer_block(text, start=0)
    if block is None:
        return _failure(_NO_BLOCK)
    tokens = text[block].split()
    if not tokens:
        return _failure(_NOTHING_INSIDE)
    one_block = text.count("<answer>") == text.count("</answer>") == 1
    well_formed = one_block and text.rstrip().endswith("</answer>")
    return _verdict(" ".join(tokens), " ".join(answer.split()), well_formed=well_formed)


def _verdict(given: str, right: str, *, well_formed: bool) -> Grade:
    if given == right:
        return Grade(1.0, given, well_formed, None)
    return Grade(0.0, given, well_formed, _WRONG)


def _failure(feedback: str) -> Grade:
    return Grade(0.0, None, False, feedback)


def nothing_to_read(completion: str) -> Grade:
    return _failure(_ALL_THINKING if completion.strip() else _EMPTY)


def _complaint(content: str, labels: Sequence[str]) -> str:
    """Why the content of an answer block or box is not one letter."""
    text = _plain(content)
    if not text:
        return _NOTHING_INSIDE
    named = set(re.findall(r"\b[A-Z]\b", text)) & set(labels)
    return _SEVERAL if len(named) > 1 else _NO_LETTER


def _check_labels(answer: str, labels: Sequence[str], options: Sequence[str] | None) -> None:
    single_capitals = all(re.fullmatch("[A-Z]", label) for label in labels)
    if not labels or not single_capitals or len(set(labels)) < len(labels):
        raise ValueError(f"The option labels are {list(labels)}; pass distinct single capital letters.")
    if answer not in labels:
        raise ValueError(
            f"The right answer {answer!r} is not among the option labels {list(labels)}; pass one of them."
        )
    if options is not None and len(options) != len(labels):
        raise ValueError(f"There are {len(options)} options for {len(labels)} labels; pass one text per label.")


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


def last_box(text: str) -> tuple[str | None, int]:
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


# From the content of a box or block to a letter: strip what says nothing, then one rule for a letter that stands first
# and one for a letter that stands last.

# Commands that change the looks of what follows, or nothing; with one backslash, or two as in JSON.
_LOOKS = (
    r"\\{1,2}(?:(?:bbox|framebox)(?:\[[^\[\]]{0,40}\])?|(?:begin|end)\{[a-z*]{0,40}\}(?:\{[lcr|]{0,40}\})?"
    r"|(?:colorbox|textcolor|color|fcolorbox\{[^{}]{0,40}\}|[hv]space\*?|scalebox)"
    r"(?:\[[^\[\]]{0,40}\])?(?:\{[^{}]{0,40}\})"
    r"|(?:text(?:bf|it|rm|sf|tt|sc|sl|up|md|normal|style)?|math(?:rm|bf|it|sf|tt|cal|bb|frak|scr|normal|bin|ord)"
    r"|[bB]igg?[lrm]?|[lL]arge|LARGE|[hH]uge|tiny|scriptsize|footnotesize|small|normalsize|displaystyle"
    r"|bf|it|rm|sf|tt|sc|em|emph|bfseries|itshape|rmfamily|sffamily|boldsymbol|bm|pmb|mathbfit|underline|uline"
    r"|operatorname\*?|boxed|[fmh]box|ensuremath|left|right|middle|quad|qquad|checkmark|circled|textcircled)"
    r"(?![A-Za-z]))"
)
_PLAIN = re.compile(
    rf"(?P<line>\\\\(?![A-Za-z])|\\(?:newline|par)(?![A-Za-z])|<br ?/?>)|{_LOOKS}"
    r"|(?P<arrow>\\{1,2}(?:(?:[Ll]ong)?[Rr]ightarrow|implies|to)(?![A-Za-z])|[=-]>)|(?P<break>\\\\)"
    r"|\\[,;:! (){}\[\]]|</?(?:b|i|u|em|strong)>|[{}$~*`\"“”„«»✓✔✅☑\uFE0F\u200B]"
)
_MEANING = {"line": "\n", "break": "\n", "arrow": "→"}
_SINGLE_QUOTES = re.compile(r"['‘]{1,2}([^'‘’]*)['’]{1,2}")


def _plain(content: str) -> str:
    """The content without its looks: words with single spaces, lines that are not blank."""
    text = _PLAIN.sub(lambda match: _MEANING.get(match.lastgroup or "", " "), unicodedata.normalize("NFKC", content))
    text = _SINGLE_QUOTES.sub(r"\1", text)
    text = "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))
    return text.strip("_ ") if text[:1] == "_" == text[-1:] else text


# Words that may stand before the letter without changing what it says.
_LEAD = (
    r"(?:(?:the|my|our|so|thus|hence|therefore|is|it|its|it's|final|correct|right|best|most|likely|probably"
    r"|answer|ans|solution|option|choice|letter|statement|must be|should be|would be"
    r"|(?:(?:i|we) )?(?:choose|pick|select|think))\b[ \n:.,=→-]*)*"
)
_JOINT = (
    r"(?: ?[)\]]| ?[.,:;!…→]| ?(?:[–—\n]|--+|-(?= |$))| (?=[(\[])|$"
    r"| is (?:the )?(?:only |most |best |likely )*(?:correct|right|true|answer)| (?:because|since)\b)"
)
_FIRST = re.compile(
    rf"(?i:{_LEAD})(?P<named>(?i:(?<=option )|(?<=choice )))?[(\[]? ?(?P<letter>[A-Z])\b"
    rf"(?P<joint>(?(named)|{_JOINT}))?"
)
_LAST = re.compile(
    r"(?P<joint>(?:^|[ \n])[(\[] ?"
    r"|(?i:\b(?:option|choice|letter|answer|so|hence|thus|therefore)(?: is)?)[ :,]+[(\[]?|[→\n–—] ?[(\[]?)?"
    r"\b(?P<letter>[A-Z]) ?[)\]]? ?[.!]?$"
)
# A letter that is named as an option: in brackets; first, after a comma or a word like "or", if something ends it; or
# before "or". A slash is no comma: "45 N/C".
_NAMED = re.compile(
    r"(?:^|[ \n,;/])[(\[] ?([A-Z]) ?[)\]]"
    r"|(?:^|[\n,;&]|\band\b|\bor\b|\boption\b|\bchoice\b) ?[(\[]? ?([A-Z])"
    r"(?= ?[)\].:,;&\n]| ?$| - | ?[–—]| and\b| or\b)"
    r"|(?<![^ \n,;/(\[])([A-Z]) (?:and|or|&) "
)
# What turns the letter behind which, or before which, it stands into another statement.
_DENIED = re.compile(r" ?(?:is|was) (?:not|wrong|incorrect|false)\b", re.IGNORECASE)
_NEGATED = re.compile(
    r"(?:\b(?:not|cannot|neither|either|nor|or|and|except|but)|n['’]t)(?: (?:be|the|is|option|answer|choice))*\W*\Z",
    re.IGNORECASE,
)


def _named_letter(content: str, labels: Sequence[str], options: Sequence[str] | None) -> str | None:
    """The one label that the content names, None if there is none or several."""
    text = _plain(content)
    texts = {label: _bare(_plain(option)) for label, option in zip(labels, options or ())}
    if len(_bare(text)) > 1 and _bare(text) in texts.values():
        return None  # a text alone, and should it begin with a letter, as "B cells" does
    for match in filter(None, (_FIRST.match(text), _LAST.search(text))):
        letter = match["letter"]
        if letter not in labels:
            continue
        first = match.re is _FIRST
        rest = text[match.end("letter") :] if first else text[: match.start()]
        spelled = {label for label in texts if texts[label] and texts[label] == _bare(rest)}
        if spelled:
            return letter if letter in spelled else None
        if match["joint"] is None:
            continue
        rest = text[match.end("joint") :] if first else rest
        others = {label for found in _NAMED.findall(rest) for label in found} & set(labels) - {letter}
        if not others and not (_DENIED.match(rest) if first else _NEGATED.search(rest)):
            return letter
    return None


def _bare(text: str) -> str:
    """For comparing an option's text: no spaces, no punctuation at the ends."""
    return "".join(text.split()).strip(".,:;()[]-–—→=")


def _canonical(letter: str, answer: str, labels: Sequence[str], options: Sequence[str] | None) -> str:
    """The first of the labels that have the same text, the right one before the others."""
    if options is None:
        return letter
    words = {label: option.split() for label, option in zip(labels, options)}
    return next(label for label in (answer, *labels) if words[label] == words[letter])
