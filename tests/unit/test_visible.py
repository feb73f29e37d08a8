"""What a user sees of a completion: every form of thinking, whole, nested, repeated, cut off, opened by the prompt."""

from __future__ import annotations

import time

import pytest

from pgpo.visible import is_thinking_tag, opens_thinking, visible_text

PAIRS = [
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<Thought>", "</Thought>"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<ifm|think>", "</ifm|think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<unused94>thought\n", "<unused95>"),
    ("Here is my thought process:", "Here is my response:"),
    ("Here's my thought process:", "Here's my response:"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
]


@pytest.mark.parametrize(("opening", "closing"), PAIRS)
def test_every_form_is_hidden(opening: str, closing: str) -> None:
    block = f"{opening}hidden{closing}"
    assert visible_text(f"{block}\n\nB") == "B"
    assert visible_text(f"x {block} y {block}z") == "x y z"
    assert visible_text(f"x {opening}cut off") == "x "
    assert visible_text(f"{opening}cut off") == ""
    for upper in (opening.upper(), opening.lower()):
        assert visible_text(f"{upper}hidden{closing.upper()}B") == "B"


@pytest.mark.parametrize(("opening", "closing"), [pair for pair in PAIRS if "channel|" not in pair[0]])
def test_nested_blocks_are_hidden_as_one(opening: str, closing: str) -> None:
    assert visible_text(f"x {opening}a {opening}b{closing} c{closing} y") == "x y"
    assert visible_text(f"{opening}a {opening}b{closing} cut off") == ""


@pytest.mark.parametrize(("opening", "closing"), [pair for pair in PAIRS if "Here" not in pair[0]])
def test_a_block_that_the_prompt_opened(opening: str, closing: str) -> None:
    for opened in (False, True):  # the closing tag alone tells
        assert visible_text(f"hidden{closing}\nB", opened) == "B"
        assert visible_text(f"a{closing}b {opening}c{closing}d", opened) == "b d"
    assert visible_text("cut off", opened=True) == ""
    # the model writes the tag once more
    assert visible_text(f"\n{opening}hidden{closing}B", opened=True) == "B"
    assert visible_text(f"{opening}\n{opening}hidden{closing}B") == "B"


@pytest.mark.parametrize(
    ("completion", "visible"),
    [
        ("", ""),
        ("\\boxed{B}", "\\boxed{B}"),
        (" kept \n", " kept \n"),
        # asked for by a prompt, and read by the user
        ("<reasoning>a</reasoning><answer>B</answer>", "<reasoning>a</reasoning><answer>B</answer>"),
        ("<scratchpad>a</scratchpad>B", "<scratchpad>a</scratchpad>B"),
        ("I think <b>x</b> [1] a < b > c", "I think <b>x</b> [1] a < b > c"),
        ("x. Here is my response: B", "x. Here is my response: B"),
        ("The analysis: B", "The analysis: B"),
        ("analysis of B", "analysis of B"),
        # two closing tags: what follows the last one, as chat templates split
        ("<think>a</think>b</think>c", "c"),
        ("<think>a</thinking>b", "b"),
        # gpt-oss: several messages, and what is left of them without special tokens
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>commentary<|message|>b<|end|>"
            "<|start|>assistant<|channel|>analysis<|message|>c<|end|><|start|>assistant<|channel|>final<|message|>B",
            "B",
        ),
        ("<|channel|>final<|message|>B", "B"),
        ("<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>B", ""),
        ("analysisWe need B.assistantanalysisOr C?assistantfinalThe C.", "The C."),
        ("analysisWe need \\boxed{B}", ""),
    ],
)
def test_particular_texts(completion: str, visible: str) -> None:
    assert visible_text(completion) == visible


@pytest.mark.parametrize(
    ("prompt", "opens"),
    [
        ("<|im_start|>assistant\n<think>\n", True),
        ("<｜User｜>Q<｜Assistant｜><think>\n", True),
        ("<seed:think>", True),
        ("<|turn>model\n<|channel>thought\n", True),
        ("[THINK]", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n", False),
        ("<|start|>assistant", False),
        ("Write your thoughts between <think> and </think>.", False),
        ("Begin with <think>, then go on.\nassistant:", False),
        ("", False),
    ],
)
def test_a_prompt_that_ends_in_an_opening_tag(prompt: str, opens: bool) -> None:
    assert opens_thinking(prompt) == opens


def test_tags_are_told_from_other_tokens() -> None:
    tags = ["<think>", "</think>", "[THINK]", "[/THINK]", "<|channel>", "<channel|>", "<|END_THINKING|>"]
    assert [is_thinking_tag(tag) for tag in tags] == [True] * len(tags)
    others = ["<|im_end|>", "<|channel|>", "<|start|>", "<|message|>", "[INST]", "<answer>", "think", ""]
    assert [is_thinking_tag(other) for other in others] == [False] * len(others)


@pytest.mark.parametrize(
    "piece", ["<", "<think>", "<think>a", "</think>", "<think></think>", "<think> ", "<a_", "Here is my ", " ", "<|"]
)
def test_time_is_linear(piece: str) -> None:
    started = time.process_time()
    for text in (piece * (400_000 // len(piece)), f"<think>{piece * (400_000 // len(piece))}</think>"):
        visible_text(text)
        opens_thinking(text)
    assert time.process_time() - started < 5.0  # seconds; a quadratic step takes minutes
