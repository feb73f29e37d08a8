"""What the self-teacher reads: the question plus a correct sibling completion and/or feedback on the attempt.

Messages in, messages out: no tokenizer, no tensors, standard library and `pgpo.visible` only. A row with nothing to
show has prompt None and takes no part in the loss. The texts are SDPO's (arXiv 2601.20802; science settings of its
code).

Departures from the reference code (lasgroup/SDPO), each with its reason:
* Over-long teacher prompts: there the token sequence is cut on its right, which removes the final instruction and the
  assistant header. Here the privileged text is shortened; question and instruction always stay whole.
* Success means reward >= 1.0 unless told otherwise; one of its configuration files says 0.5, so that a half-right
  answer would be shown as "Correct solution".
* The template is filled in one pass, so braces in a question, a solution or feedback are plain text; there a brace in
  a template raises.
* Thinking of every form is removed (`pgpo.visible`), also where the chat template opened it or where it was cut off;
  there only whole <think>...</think> blocks. A success that is nothing but thinking is passed over: it shows nothing.
* Earlier turns, turns after the last user message and parts of a message that are not text are kept; there everything
  but the last message is kept and the last message is taken to be the user's, in plain text.
* The demonstration can be drawn at random among the successes, reproducibly.
* A control has no counterpart there: the placebo, a right completion of another question.
"""

from __future__ import annotations

import bisect
import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pgpo.visible import visible_text

Prompt: TypeAlias = "str | list[dict[str, Any]]"
"""Plain text, or chat messages {"role": ..., "content": text or list of parts}."""

Choice: TypeAlias = Literal["first", "random", "placebo"]
CHOICES: tuple[Choice, ...] = ("first", "random", "placebo")
FeedbackMode: TypeAlias = Literal["without_demonstration", "always", "never"]

_PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class ContextTemplates:
    """The three texts of the teacher prompt, defaults as in SDPO's code.

    Args:
        reprompt: the new user message; holds {prompt}, {solution} and {feedback}, once each.
        solution: the solution section; holds {demonstration} once. Left out where there is no demonstration.
        feedback: the feedback section; holds {feedback} once. Left out where there is no feedback.

    A placeholder is an identifier in braces; any other brace is plain text.

    Raises:
        ValueError: a placeholder is missing, repeated or unknown.
    """

    reprompt: str = "{prompt}{solution}{feedback}\n\nCorrectly solve the original question.\n"
    solution: str = "\nCorrect solution:\n\n{demonstration}\n\n"
    feedback: str = "\nThe following is feedback from your unsuccessful earlier attempt:\n\n{feedback}\n\n"

    def __post_init__(self) -> None:
        for field, expected in (
            ("reprompt", ["feedback", "prompt", "solution"]),
            ("solution", ["demonstration"]),
            ("feedback", ["feedback"]),
        ):
            found = sorted(_PLACEHOLDER.findall(getattr(self, field)))
            if found != expected:
                wanted, got = (", ".join(f"{{{name}}}" for name in names) for names in (expected, found))
                raise ValueError(
                    f"The {field} template holds {got or 'no placeholder'}; it must hold {wanted}, once each."
                )

    def around(self, demonstration: str | None, feedback: str | None) -> tuple[str, str]:
        """The text before and the text after the question."""
        sections = {
            "solution": "" if demonstration is None else _fill(self.solution, demonstration=demonstration),
            "feedback": "" if feedback is None else _fill(self.feedback, feedback=feedback),
        }
        before, after = self.reprompt.split("{prompt}")
        return _fill(before, **sections), _fill(after, **sections)


@dataclass(frozen=True)
class TeacherContext:
    """What one sample's teacher reads.

    Attributes:
        prompt: the teacher's prompt, in the form of the student's (messages or plain text); None = no privileged
            context, the sample is masked out of the loss.
        demonstration: index in the batch of the completion shown; None if none is.
        feedback_used: whether the prompt holds feedback on the sample's own attempt.
        truncated: whether privileged text was shortened or left out to respect the length limit.
    """

    prompt: Prompt | None
    demonstration: int | None = None
    feedback_used: bool = False
    truncated: bool = False


def build_contexts(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    rewards: Sequence[float],
    group_size: int,
    *,
    feedback: Sequence[str | None] | None = None,
    success_threshold: float = 1.0,
    use_successes: bool = True,
    choice: Choice = "first",
    seed: int = 0,
    step: int = 0,
    allow_own_success: bool = False,
    feedback_mode: FeedbackMode = "without_demonstration",
    remove_thinking: bool = True,
    opened: Sequence[bool] | None = None,
    templates: ContextTemplates = ContextTemplates(),
    max_length: int | None = None,
    length: Callable[[Prompt], int] | None = None,
) -> list[TeacherContext]:
    """One teacher context per sample; nothing handed in is changed.

    The last user message's text is put into the reprompt template. Where that message is a list of parts, what
    stands before {prompt} goes in front of its first text part and what stands after goes behind its last text part,
    so that images and further texts keep their places.

    Args:
        prompts: B prompts; rows i*group_size .. (i+1)*group_size - 1 are the same question.
        completions: B completion texts.
        rewards: B rewards; NaN counts as unsuccessful.
        group_size: completions per question.
        feedback: B texts on the samples' own attempts; None or blank = nothing to say. The default template calls
            the attempt unsuccessful, so say nothing about a right one.
        success_threshold: smallest reward of a demonstration (1.0: SDPO's science settings).
        use_successes: whether right completions are shown at all; False: feedback alone.
        choice: which success is shown: the "first" in the group, a "random" one of it, or as a "placebo" one of
            another question, to the samples that would be shown a sibling otherwise: a control that keeps the form and
            the number of the hints and takes what they say on the question. All samples of a question read the same
            placebo; where no other question has a success, there is none.
        seed, step: the draw of "random" depends on these and the row, that of "placebo" on these and the question's
            first row, on no global random state.
        allow_own_success: whether a sample may be shown its own completion.
        feedback_mode: feedback only where there is no demonstration, wherever there is some, or never.
        remove_thinking: show only the visible text of a demonstration (`pgpo.visible.visible_text`). With False it is
            shown whole; either way a completion without visible text is no demonstration.
        opened: B flags, whether the sample's prompt ends inside a thinking block, as after a template's `<think>`;
            None = nowhere.
        templates: the texts.
        max_length: longest teacher prompt in tokens; None = no limit.
        length: tokens of a rendered teacher prompt, chat template included; handed in together with max_length.
            Called once per hinted row, and about log2(words) times more where it is too long.

    An over-long prompt loses feedback from its end first (a verdict stands at its beginning, and the demonstration
    teaches more), then the demonstration from its beginning (its final answer stays). Cuts fall between words: half
    a number would be another number. If not one word fits, the row is masked, with truncated=True.

    Raises:
        ValueError: lists of unequal length, a batch that is not whole groups of one prompt, nothing to show possible
            (group_size 1 or no successes, and no feedback), a prompt without text of a user, an unknown option.
    """
    _check(prompts, completions, rewards, group_size, feedback, opened, choice, feedback_mode, allow_own_success)
    if not use_successes and (feedback is None or feedback_mode == "never"):
        raise ValueError(
            "use_successes is False and there is no feedback, so no sample can have a teacher; pass feedback."
        )
    if (max_length is None) != (length is None):
        raise ValueError("max_length and length belong together: pass both (a limit in tokens needs a counter).")

    def fits(prompt: Prompt) -> bool:
        return max_length is None or length is None or length(prompt) <= max_length

    visible = [visible_text(text, begun) for text, begun in zip(completions, opened or [False] * len(completions))]
    demonstrations = visible if remove_thinking else completions
    usable = [
        use_successes and reward >= success_threshold and bool(text.strip()) for reward, text in zip(rewards, visible)
    ]
    contexts = []
    for row, prompt in enumerate(prompts):
        start = row - row % group_size
        successes = [j for j in range(start, start + group_size) if usable[j] and (j != row or allow_own_success)]
        shown = successes[0] if successes else None
        if successes and choice == "random":
            shown = _drawn(successes, seed, step, row)
        elif successes and choice == "placebo":
            shown = _drawn([j for j in range(len(prompts)) if usable[j] and prompts[j] != prompt], seed, step, start)
        said = None if feedback is None or feedback_mode == "never" else feedback[row]
        if said is not None and (not said.strip() or (feedback_mode == "without_demonstration" and shown is not None)):
            said = None
        contexts.append(_fit(prompt, shown, None if shown is None else demonstrations[shown], said, templates, fits))
    return contexts


def _fit(
    prompt: Prompt,
    index: int | None,
    demonstration: str | None,
    feedback: str | None,
    templates: ContextTemplates,
    fits: Callable[[Prompt], bool],
) -> TeacherContext:
    """The context of one row, its privileged text shortened until it fits."""
    if demonstration is None and feedback is None:
        return TeacherContext(None)

    def render(demonstration: str | None, feedback: str | None) -> Prompt:
        return _wrap(prompt, *templates.around(demonstration, feedback))

    full = render(demonstration, feedback)
    if fits(full):
        return TeacherContext(full, index, feedback is not None)

    if feedback is not None:
        ends = [word.end() for word in re.finditer(r"\S+", feedback)]
        kept = bisect.bisect_left(ends, True, key=lambda end: not fits(render(demonstration, feedback[:end])))
        if kept > 0:
            return TeacherContext(render(demonstration, feedback[: ends[kept - 1]]), index, True, truncated=True)

    if demonstration is not None:
        starts = [word.start() for word in re.finditer(r"\S+", demonstration)]
        kept = bisect.bisect_left(starts, True, key=lambda start: fits(render(demonstration[start:], None)))
        if kept < len(starts):
            return TeacherContext(render(demonstration[starts[kept] :], None), index, truncated=True)

    return TeacherContext(None, truncated=True)


def _wrap(prompt: Prompt, before: str, after: str) -> Prompt:
    """A copy of the prompt with the last user message's text between `before` and `after`."""
    if isinstance(prompt, str):
        return before + prompt + after
    messages = [dict(message) for message in prompt]
    message = next((m for m in reversed(messages) if m.get("role") == "user"), None)
    if message is None:
        raise ValueError("A prompt holds no user message; the teacher's hint is written into the last user message.")
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = before + content + after
        return messages
    parts = [dict(part) for part in content or []]
    texts = [part for part in parts if part.get("type") == "text"]
    if not texts:
        raise ValueError("The last user message of a prompt holds no text; the teacher's hint is written around it.")
    texts[0]["text"] = before + texts[0]["text"]
    texts[-1]["text"] = texts[-1]["text"] + after
    message["content"] = parts
    return messages


def _fill(template: str, **values: str) -> str:
    """One pass, so that a value that looks like a placeholder stays as it is."""
    return _PLACEHOLDER.sub(lambda match: values[match[1]], template)


def _drawn(rows: list[int], seed: int, step: int, row: int) -> int | None:
    """One of the rows; None of none."""
    digest = hashlib.sha256(f"{seed},{step},{row}".encode()).digest()
    return rows[int.from_bytes(digest, "big") % len(rows)] if rows else None


def _check(
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    rewards: Sequence[float],
    group_size: int,
    feedback: Sequence[str | None] | None,
    opened: Sequence[bool] | None,
    choice: str,
    feedback_mode: str,
    allow_own_success: bool,
) -> None:
    rows = len(prompts)
    for name, values in (
        ("completions", completions),
        ("rewards", rewards),
        ("feedback", feedback),
        ("opened", opened),
    ):
        if values is not None and len(values) != rows:
            raise ValueError(f"There are {rows} prompts but {len(values)} {name}; pass one per sample.")
    if choice not in CHOICES:
        raise ValueError(f"choice is {choice!r}; it must be one of {', '.join(map(repr, CHOICES))}.")
    if feedback_mode not in ("without_demonstration", "always", "never"):
        raise ValueError(
            f"feedback_mode is {feedback_mode!r}; it must be 'without_demonstration', 'always' or 'never'."
        )
    if group_size < 1 or rows % group_size:
        raise ValueError(f"{rows} samples are not whole groups of group_size {group_size}; pass whole groups.")
    if group_size == 1 and not allow_own_success and (feedback is None or feedback_mode == "never"):
        raise ValueError(
            "group_size is 1, so no sample has a sibling to learn from; use at least 2 completions per prompt, "
            "pass feedback, or set allow_own_success."
        )
    for row, prompt in enumerate(prompts):
        first = row - row % group_size
        if prompt != prompts[first]:
            raise ValueError(
                f"Sample {row} has another prompt than sample {first} of its group; order the batch in runs of "
                f"group_size {group_size} completions of one prompt."
            )
