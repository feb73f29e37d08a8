"""Teacher contexts: who is shown what, in which words, and what is cut when it is too long."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from typing import Any

import pytest

from pgpo.teacher.contexts import ContextTemplates, TeacherContext, build_contexts

END = "\n\nCorrectly solve the original question.\n"


def user(text: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": text}]


def text_of(context: TeacherContext) -> str:
    assert isinstance(context.prompt, list)
    return context.prompt[-1]["content"]


def words(prompt: Any) -> int:
    """A tokenizer that counts words of all messages, plus 3 for a chat template."""
    return 3 + sum(len(message["content"].split()) for message in prompt)


# --- the words -----------------------------------------------------------------------------------------------------


def test_teacher_prompt_is_sdpos_letter_by_letter() -> None:
    rows = build_contexts(
        [user("Q?")] * 2, ["wrong", "right"], [0.0, 1.0], 2, feedback=["No.", None], feedback_mode="always"
    )
    assert rows[0] == TeacherContext(
        prompt=user(
            "Q?\nCorrect solution:\n\nright\n\n"
            "\nThe following is feedback from your unsuccessful earlier attempt:\n\nNo.\n\n"
            "\n\nCorrectly solve the original question.\n"
        ),
        demonstration=1,
        feedback_used=True,
        truncated=False,
    )
    # The only success has no sibling to learn from.
    assert rows[1] == TeacherContext(prompt=None, demonstration=None, feedback_used=False, truncated=False)


def test_plain_text_prompts_stay_plain_text() -> None:
    row = build_contexts(["Q?", "Q?"], ["wrong", "right"], [0, 1], 2)[0]
    assert row.prompt == "Q?\nCorrect solution:\n\nright\n\n" + END


def test_braces_and_placeholder_names_are_plain_text_everywhere() -> None:
    question = r"Is {prompt} or {solution} in \boxed{}? {0} {feedback} {"
    demonstration = "{feedback} {demonstration} {prompt} {{x}} }"
    said = "{solution} {demonstration} {unknown} {feedback}"
    row = build_contexts(
        [user(question)] * 2, ["w", demonstration], [0, 1], 2, feedback=[said, None], feedback_mode="always"
    )[0]
    assert text_of(row) == (
        question
        + "\nCorrect solution:\n\n"
        + demonstration
        + "\n\n"
        + "\nThe following is feedback from your unsuccessful earlier attempt:\n\n"
        + said
        + "\n\n"
        + END
    )


def test_own_templates_may_order_sections_freely_and_hold_braces() -> None:
    templates = ContextTemplates(
        reprompt='{feedback}|{solution}|{prompt}| Use \\boxed{} and {"a": 1}.',
        solution="S={demonstration}",
        feedback="F={feedback}",
    )
    row = build_contexts(
        ["Q", "Q"], ["w", "r"], [0, 1], 2, feedback=["f", None], feedback_mode="always", templates=templates
    )[0]
    assert row.prompt == 'F=f|S=r|Q| Use \\boxed{} and {"a": 1}.'


@pytest.mark.parametrize(
    "field, text, named",
    [
        ("reprompt", "{prompt}{solution}", "{feedback}"),
        ("reprompt", "{prompt}{solution}{feedback}{prompt}", "{prompt}"),
        ("reprompt", "{prompt}{solution}{feedback}{hint}", "{hint}"),
        ("solution", "Correct solution:", "{demonstration}"),
        ("feedback", "{feedback} {prompt}", "{prompt}"),
    ],
)
def test_template_with_wrong_placeholders_is_refused(field: str, text: str, named: str) -> None:
    with pytest.raises(ValueError, match=f"{field} template") as error:
        ContextTemplates(**{field: text})
    assert named in str(error.value)


# --- the chat ------------------------------------------------------------------------------------------------------


def test_only_the_last_user_message_changes_and_the_input_is_left_alone() -> None:
    prompt = [
        {"role": "system", "content": "Be exact."},
        {"role": "user", "content": "First?"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Second?", "name": "ann"},
        {"role": "assistant", "content": "Let me"},
    ]
    prompts = [prompt, copy.deepcopy(prompt)]
    before = copy.deepcopy(prompts)
    row = build_contexts(prompts, ["w", "r"], [0, 1], 2)[0]
    assert isinstance(row.prompt, list)
    assert row.prompt[:3] == prompt[:3] and row.prompt[4] == prompt[4]
    assert row.prompt[3] == {
        "role": "user",
        "content": "Second?\nCorrect solution:\n\nr\n\n" + END,
        "name": "ann",
    }
    for message in row.prompt:
        message["content"] = "changed by the caller"
    assert prompts == before


def test_parts_that_are_not_text_keep_their_places() -> None:
    parts = [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "What is this?"},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "And this?"},
    ]
    prompts = [user(copy.deepcopy(parts)) for _ in range(2)]
    row = build_contexts(
        prompts,
        ["w", "r"],
        [0, 1],
        2,
        templates=ContextTemplates(
            reprompt="Hint first.{solution}{prompt}{feedback} Solve.", solution="[{demonstration}]"
        ),
    )[0]
    assert isinstance(row.prompt, list)
    assert row.prompt[0]["content"] == [
        {"type": "image", "image": "a.png"},
        {"type": "text", "text": "Hint first.[r]What is this?"},
        {"type": "image", "image": "b.png"},
        {"type": "text", "text": "And this? Solve."},
    ]
    assert prompts == [user(parts)] * 2


@pytest.mark.parametrize(
    "prompt, complaint",
    [
        ([{"role": "system", "content": "s"}], "no user message"),
        (user([{"type": "image", "image": "a.png"}]), "no text"),
    ],
)
def test_prompt_without_a_users_text_is_refused(prompt: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        build_contexts([prompt] * 2, ["w", "r"], [0, 1], 2)


# --- who is shown --------------------------------------------------------------------------------------------------


def test_first_successful_sibling_of_the_own_group_never_the_sample_itself() -> None:
    prompts = ["A"] * 4 + ["B"] * 4 + ["C"] * 4
    completions = [f"c{i}" for i in range(12)]
    rewards = [0, 1, 0.99, 1, 1, 0, 0, 0, 0, 0, float("nan"), 0]
    rows = build_contexts(prompts, completions, rewards, 4)
    # Group A: rows 1 and 3 succeeded. Group B: row 4 alone. Group C: none (NaN is no success).
    assert [r.demonstration for r in rows] == [1, 3, 1, 1, None, 4, 4, 4, None, None, None, None]
    assert [r.prompt is None for r in rows] == [r.demonstration is None for r in rows]
    for row in rows:
        if row.demonstration is not None:
            assert f"c{row.demonstration}\n" in str(row.prompt)


def test_own_success_is_shown_when_allowed() -> None:
    rows = build_contexts(["A"] * 2, ["w", "r"], [0, 1], 2, allow_own_success=True)
    assert [r.demonstration for r in rows] == [1, 1]
    assert build_contexts(["A"], ["r"], [1], 1, allow_own_success=True)[0].demonstration == 0


def test_threshold_is_inclusive() -> None:
    rewards = [0.0, 0.5]
    assert build_contexts(["A"] * 2, ["w", "r"], rewards, 2, success_threshold=0.5)[0].demonstration == 1
    assert build_contexts(["A"] * 2, ["w", "r"], rewards, 2, success_threshold=0.51)[0].demonstration is None


def draw(**options: Any) -> list[int | None]:
    rows = build_contexts(["A"] * 16, [f"c{i}" for i in range(16)], [1] * 16, 16, choice="random", **options)
    return [row.demonstration for row in rows]


def test_random_choice_covers_the_siblings_and_depends_on_seed_step_and_row_only() -> None:
    random.seed(1)
    state = random.getstate()
    drawn = [draw(seed=3, step=step) for step in range(40)]
    assert random.getstate() == state
    random.seed(2)
    assert drawn == [draw(seed=3, step=step) for step in range(40)]
    for row in range(16):
        assert {step[row] for step in drawn} <= set(range(16)) - {row}
        # 15 siblings, 40 draws: fewer than 10 different ones has probability < 1e-4.
        assert len({step[row] for step in drawn}) >= 10
    assert draw(seed=4, step=0) != drawn[0]
    assert len({step[0] == step[1] for step in drawn}) == 2  # rows draw on their own


def test_random_choice_is_the_same_in_another_process() -> None:
    code = (
        "import json; from pgpo.teacher.contexts import build_contexts;"
        "r = build_contexts(['A'] * 16, [f'c{i}' for i in range(16)], [1] * 16, 16, choice='random', seed=3, step=7);"
        "print(json.dumps([x.demonstration for x in r]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(output.stdout) == draw(seed=3, step=7)


def placebos(prompts: list[str], rewards: list[float], size: int, **options: Any) -> list[int | None]:
    completions = [f"c{i}" for i in range(len(prompts))]
    rows = build_contexts(prompts, completions, rewards, size, choice="placebo", **options)
    for row, prompt in zip(rows, prompts):
        assert (row.prompt is None) == (row.demonstration is None)
        if row.demonstration is not None:
            assert row.prompt == f"{prompt}\nCorrect solution:\n\nc{row.demonstration}\n\n{END}"
    return [row.demonstration for row in rows]


def test_a_placebo_is_another_questions_success_where_a_sibling_stood() -> None:
    prompts = [question for question in "ABCAD" for _ in range(3)]  # A stands twice in the batch
    rewards = [0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 1, 1, 1]
    sibling = build_contexts(prompts, ["c"] * 15, rewards, 3)
    drawn = [placebos(prompts, rewards, 3, seed=3, step=step) for step in range(60)]
    assert drawn == [placebos(prompts, rewards, 3, seed=3, step=step) for step in range(60)]
    assert placebos(prompts, rewards, 3, seed=4) != drawn[0]
    for shown in drawn:
        # the same samples have a hint: not the lone success of B, nobody of C
        assert [j is None for j in shown] == [row.demonstration is None for row in sibling]
        for i, j in enumerate(shown):
            assert j is None or (rewards[j] == 1 and prompts[j] != prompts[i])
        for start in range(0, 15, 3):  # one teacher prompt per question
            assert len(set(shown[start : start + 3]) - {None}) <= 1
    assert {shown[0] for shown in drawn} == {4, 12, 13, 14}  # every success of B and D gets its turn
    assert len({(shown[0], shown[9]) for shown in drawn}) > 8  # the groups draw on their own


def test_without_another_success_there_is_no_placebo() -> None:
    assert placebos(["A", "A", "B", "B"], [1, 1, 0, 0], 2) == [None] * 4
    assert placebos(["A"] * 4, [1] * 4, 2) == [None] * 4


# --- thinking ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "completion, shown",
    [
        ("x <think>a</think> y <think>b</think>z", "x y z"),  # every form: test_visible.py
        ("opened by the template</think>\n4", "4"),
        ("4 <think>never closed", "4 "),
        (" no thinking \n", " no thinking \n"),
    ],
)
def test_thinking_is_removed_from_demonstrations(completion: str, shown: str) -> None:
    row = build_contexts(["Q"] * 2, ["w", completion], [0, 1], 2)[0]
    assert row.prompt == f"Q\nCorrect solution:\n\n{shown}\n\n{END}"
    kept = build_contexts(["Q"] * 2, ["w", completion], [0, 1], 2, remove_thinking=False)[0]
    assert kept.prompt == f"Q\nCorrect solution:\n\n{completion}\n\n{END}"


@pytest.mark.parametrize("remove_thinking", [True, False])
@pytest.mark.parametrize("nothing", ["<think>4</think>\n", "<think>4", "4</think>", "[THINK]4", "<THINK>4</THINK>"])
def test_success_that_shows_nothing_is_passed_over(nothing: str, remove_thinking: bool) -> None:
    rows = build_contexts(["Q"] * 3, ["w", nothing, "4"], [0, 1, 1], 3, remove_thinking=remove_thinking)
    assert [r.demonstration for r in rows] == [2, 2, None]


def test_thinking_that_the_prompt_opened_and_that_is_cut_off_is_no_demonstration() -> None:
    completions = ["w", "cut off", "thought</think>4"]
    rows = build_contexts(["Q"] * 3, completions, [0, 1, 1], 3, opened=[True, True, True])
    assert [r.demonstration for r in rows] == [2, 2, None]
    assert rows[0].prompt == f"Q\nCorrect solution:\n\n4\n\n{END}"
    # a flag of its own for each sample: here the second one's prompt opened nothing
    rows = build_contexts(["Q"] * 3, completions, [0, 1, 1], 3, opened=[True, False, True])
    assert [r.demonstration for r in rows] == [1, 2, 1]
    with pytest.raises(ValueError, match="3 prompts but 2 opened"):
        build_contexts(["Q"] * 3, completions, [0, 1, 1], 3, opened=[True, True])


# --- feedback ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mode, used",
    [
        ("without_demonstration", [False, True, False, False]),
        ("always", [True, True, False, False]),
        ("never", [False, False, False, False]),
    ],
)
def test_feedback_modes(mode: Any, used: list[bool]) -> None:
    # Row 0 has a demonstration, row 1 (the only success) has none, rows 2 and 3 got nothing worth saying.
    rows = build_contexts(
        ["Q"] * 4, list("wrww"), [0, 1, 0, 0], 4, feedback=["f0", "f1", None, " \n"], feedback_mode=mode
    )
    assert [r.feedback_used for r in rows] == used
    assert [f"f{i}" in str(r.prompt) for i, r in enumerate(rows)] == used
    assert [r.demonstration for r in rows] == [1, None, 1, 1]
    assert (rows[1].prompt is None) == (mode == "never")


def test_feedback_makes_a_group_of_one_possible() -> None:
    row = build_contexts(["Q"], ["w"], [0], 1, feedback=["No."])[0]
    assert row.prompt == "Q\nThe following is feedback from your unsuccessful earlier attempt:\n\nNo.\n\n" + END


# --- length --------------------------------------------------------------------------------------------------------

# words() of a teacher prompt: 3 for the chat template, 1 for "Q", 5 for the final instruction, 2 for "Correct
# solution:", 9 for the feedback sentence, and the words shown.
FIXED, SOLUTION, FEEDBACK = 3 + 1 + 5, 2, 9


def limited(demonstration: str | None, said: str | None, limit: int) -> TeacherContext:
    rewards = [0, 0] if demonstration is None else [0, 1]
    return build_contexts(
        [user("Q")] * 2,
        ["w", demonstration or "w"],
        rewards,
        2,
        feedback=[said, None],
        feedback_mode="always",
        max_length=limit,
        length=words,
    )[0]


DEMO = " ".join(f"d{i}" for i in range(50)) + " answer:\n42"  # 52 words
SAID = " ".join(f"f{i}" for i in range(30))


def test_a_prompt_at_the_limit_is_whole() -> None:
    limit = FIXED + SOLUTION + 52 + FEEDBACK + 30
    row = limited(DEMO, SAID, limit)
    assert words(row.prompt) == limit
    assert not row.truncated and DEMO in text_of(row) and SAID in text_of(row)


@pytest.mark.parametrize("kept", [29, 17, 1])
def test_feedback_is_shortened_first_and_keeps_its_beginning(kept: int) -> None:
    row = limited(DEMO, SAID, FIXED + SOLUTION + 52 + FEEDBACK + kept)
    assert row.truncated and row.feedback_used and row.demonstration == 1
    said = " ".join(f"f{i}" for i in range(kept))
    assert DEMO in text_of(row) and f"attempt:\n\n{said}\n\n" in text_of(row)


def test_feedback_section_goes_before_the_demonstration_is_touched() -> None:
    for room in (0, FEEDBACK):  # a feedback section without a word of feedback is never shown
        row = limited(DEMO, SAID, FIXED + SOLUTION + 52 + room)
        assert row == TeacherContext(user(f"Q\nCorrect solution:\n\n{DEMO}\n\n{END}"), 1, False, True)


@pytest.mark.parametrize("kept", [51, 20, 2, 1])
@pytest.mark.parametrize("said", [SAID, None])
def test_demonstration_is_shortened_from_its_beginning(kept: int, said: str | None) -> None:
    row = limited(DEMO, said, FIXED + SOLUTION + kept)
    assert row.truncated and not row.feedback_used and row.demonstration == 1
    text = text_of(row)
    assert words(row.prompt) == FIXED + SOLUTION + kept
    assert text.startswith("Q\nCorrect solution:\n\n") and text.endswith("42\n\n" + END)


@pytest.mark.parametrize("limit", [FIXED + SOLUTION, FIXED - 1, 0])
def test_row_is_masked_if_not_one_word_fits(limit: int) -> None:
    assert limited(DEMO, SAID, limit) == TeacherContext(None, None, False, True)


def test_feedback_alone_is_shortened_or_masked() -> None:
    row = limited(None, SAID, FIXED + FEEDBACK + 4)
    assert row.truncated and row.feedback_used and "attempt:\n\nf0 f1 f2 f3\n\n" in text_of(row)
    assert limited(None, SAID, FIXED + FEEDBACK) == TeacherContext(None, None, False, True)


def test_no_cut_inside_a_word() -> None:
    def characters(prompt: Any) -> int:
        return len(prompt)

    def cut(limit: int) -> TeacherContext:
        return build_contexts(["Q"] * 2, ["w", "11 + 131 = 142"], [0, 1], 2, max_length=limit, length=characters)[0]

    fixed = len("Q\nCorrect solution:\n\n\n\n" + END)
    assert cut(fixed + 6).prompt == f"Q\nCorrect solution:\n\n= 142\n\n{END}"
    assert cut(fixed + 4).prompt == f"Q\nCorrect solution:\n\n142\n\n{END}"
    assert cut(fixed + 2).prompt is None  # "42" would fit


def test_length_is_asked_a_few_times_only() -> None:
    calls = 0

    def counted(prompt: Any) -> int:
        nonlocal calls
        calls += 1
        return words(prompt)

    demonstration = " ".join(["word"] * 10_000)
    options: dict[str, Any] = {"max_length": 500, "length": counted}
    build_contexts([user("Q")] * 2, ["w", demonstration], [0, 1], 2, **options)
    assert calls <= 1 + 15  # the whole, and log2(10 000) + 1
    calls = 0
    build_contexts([user("Q")] * 4, ["w", "r", "w", "w"], [0, 1, 0, 0], 4, **options)
    assert calls == 3  # one per hinted row; the masked row costs nothing


# --- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({"completions": ["w"]}, "2 prompts but 1 completions"),
        ({"rewards": [0, 1, 1]}, "2 prompts but 3 rewards"),
        ({"feedback": ["f"]}, "2 prompts but 1 feedback"),
        ({"group_size": 1}, "group_size is 1"),
        ({"group_size": 1, "feedback": ["f", "f"], "feedback_mode": "never"}, "group_size is 1"),
        ({"group_size": 0}, "whole groups"),
        ({"group_size": 3}, "whole groups"),
        ({"prompts": ["Q", "R"]}, "Sample 1 has another prompt than sample 0"),
        ({"choice": "best"}, "'best'.*'first', 'random', 'placebo'"),
        ({"feedback_mode": "sometimes"}, "'sometimes'"),
        ({"max_length": 10}, "max_length and length"),
        ({"length": len}, "max_length and length"),
    ],
)
def test_bad_input_is_refused_with_its_reason(change: dict[str, Any], complaint: str) -> None:
    call: dict[str, Any] = {"prompts": ["Q", "Q"], "completions": ["w", "r"], "rewards": [0, 1], "group_size": 2}
    with pytest.raises(ValueError, match=complaint):
        build_contexts(**{**call, **change})
