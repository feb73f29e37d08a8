"""The graders: every trap of their docstrings, with the grade that was decided for it."""

from __future__ import annotations

import re
import time

import pytest

from pgpo.tasks.graders import Grade, grade_boxed, grade_short_answer, grade_tagged

ABCD = ["A", "B", "C", "D"]


def tagged(completion: str, answer: str = "B", labels: list[str] = ABCD) -> tuple[float, str | None, bool]:
    grade = grade_tagged(completion, answer, labels)
    return grade.reward, grade.answer, grade.well_formed


def boxed(completion: str, answer: str = "B", labels: list[str] = ABCD) -> tuple[float, str | None, bool]:
    grade = grade_boxed(completion, answer, labels)
    return grade.reward, grade.answer, grade.well_formed


def short(completion: str, answer: str = "28") -> tuple[float, str | None, bool]:
    grade = grade_short_answer(completion, answer)
    return grade.reward, grade.answer, grade.well_formed


RIGHT, RIGHT_BUT_LOOSE = (1.0, "B", True), (1.0, "B", False)
WRONG, WRONG_AND_LOOSE = (0.0, "A", True), (0.0, "A", False)
NOTHING = (0.0, None, False)
REASONED = "<reasoning>since q = Er^2/k</reasoning>"


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (f"{REASONED}\n<answer>B</answer>", RIGHT),
        (f"\n {REASONED} \n\n<answer>\nB\n</answer>\n", RIGHT),
        ("<reasoning></reasoning><answer>B</answer>", RIGHT),
        (f"{REASONED}<answer>A</answer>", WRONG),
        # text outside the two blocks costs the format, not the reward
        (f"Sure. {REASONED}<answer>B</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED} so <answer>B</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>B</answer> because.", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>B</answer> A", RIGHT_BUT_LOOSE),
        ("so <answer>B</answer>", RIGHT_BUT_LOOSE),
        ("so</reasoning><answer>B</answer>", RIGHT_BUT_LOOSE),
        # several blocks: the last complete one after the reasoning
        (f"{REASONED}<answer>A</answer><answer>B</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>B</answer><answer>A</answer>", WRONG_AND_LOOSE),
        (f"{REASONED}<answer>B</answer> or <answer>A", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>A<answer>B</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>B</answer> done </answer>", RIGHT_BUT_LOOSE),
        # what stands inside the reasoning is no answer
        ("<reasoning>is it <answer>A</answer>?</reasoning><answer>B</answer>", RIGHT_BUT_LOOSE),
        ("<reasoning>is it <answer>B</answer>?</reasoning>", NOTHING),
        ("<reasoning>it is <answer>B</answer>", NOTHING),
        ("<reasoning>it is <answer>B</answer></reasoning>A", NOTHING),
        ("<reasoning>a</reasoning><answer>B</answer><reasoning>wait", NOTHING),
        ("<answer>B</answer><reasoning>because</reasoning>", NOTHING),
        # a tag that straddles the end of the reasoning
        ("<reasoning>so <answer></reasoning>B</answer>", NOTHING),
        # no complete block
        ("", NOTHING),
        (" \n", NOTHING),
        ("B", NOTHING),
        (f"{REASONED}\nB", NOTHING),
        (f"{REASONED}<answer>B", NOTHING),
        (f"{REASONED}B</answer>", NOTHING),
        (f"{REASONED}</answer>B<answer>", NOTHING),
        # not exactly one label
        (f"{REASONED}<answer></answer>", NOTHING),
        (f"{REASONED}<answer>b</answer>", NOTHING),
        (f"{REASONED}<ANSWER>B</ANSWER>", NOTHING),
        (f"{REASONED}<answer>B.</answer>", NOTHING),
        (f"{REASONED}<answer>B: 64 pC</answer>", NOTHING),
        (f"{REASONED}<answer>\\boxed{{B}}</answer>", NOTHING),
        (f"{REASONED}<answer>$B$</answer>", NOTHING),
        (f"{REASONED}<answer>A, B</answer>", NOTHING),
        (f"{REASONED}<answer>BB</answer>", NOTHING),
        (f"{REASONED}<answer>E</answer>", NOTHING),
    ],
)
def test_tagged(completion: str, expected: tuple[float, str | None, bool]) -> None:
    assert tagged(completion) == expected


def test_tagged_takes_only_the_letters_that_the_question_has() -> None:
    completion = f"{REASONED}<answer>C</answer>"
    assert tagged(completion, labels=["A", "B"]) == NOTHING
    assert tagged(completion, labels=ABCD) == (0.0, "C", True)


@pytest.mark.parametrize(
    "content",
    [
        "B",
        " B ",
        "(B)",
        "[B]",
        "B)",
        "B.",
        "B:",
        "$B$",
        "**B**",
        "{B}",
        "{{B}}",
        r"\text{B}",
        r"\text{ B }",
        r"\textbf{B}",
        r"\textbf{(B)}",
        r"\mathrm{B}",
        r"\mathbf{B}",
        r"\mathbf{\text{B}}",
        r"\boldsymbol{B}",
        r"\left(B\right)",
        r"\ B\,",
        "B: 64 pC",
        "B. 64 pC",
        "B) 64 pC",
        "(B) 64 pC",
        "(B): 64 pC",
        r"\text{B}: 64 \mathrm{~pC}",
        r"\text{B: } 64 \, \text{pC}",
        r"\text{(B) } 2.0 \times 10^{-9} \mathrm{~C}",
        r"\text{Option B}",
        r"\text{Answer: B}",
        # option texts that hold another option's letter
        "B: 45 N/C",
        "B: vitamin A",
        r"B: $\mathrm{C}_{6}\mathrm{H}_{6}$",
        "B: CCOC(=O)/C(F)=C(/C)c1cc2c(cc1OC)OC(C)(C)C=C2CC",
        "B. B",
        r"\text{B: } \{x \mid x > 0",
        r"\boxed{B}",
    ],
)
def test_box_that_holds_one_letter(content: str) -> None:
    reward, letter, _ = boxed(f"The charge is 64 pC.\n\n$$\\boxed{{{content}}}$$\nThat is all.")
    assert (reward, letter) == (1.0, "B")


@pytest.mark.parametrize(
    "content",
    [
        "",
        " ",
        r"\text{}",
        "b",
        r"\text{b}",
        "E",
        "64 pC",
        "B 64 pC",
        "A good conductor",
        "B = 64",
        r"\beta",
        r"\frac{B}{2}",
        r"\textcolor{red}{B}",
        r"\textB",
        "BB",
        "A, B",
        "A and B",
        "A/B",
        "(A)(B)",
        "(B) or (C)",
        "A. B",
        "B: C",
        "A: 32 pC, B: 64 pC",
        r"\text{B: } 64; \text{C: } 32",
        "neither A nor B",
    ],
)
def test_box_that_does_not_hold_one_letter(content: str) -> None:
    # "A" would be right for the contents that begin with A, so a grader that takes the first letter fails here too
    for answer in ("A", "B"):
        assert boxed(f"so \\boxed{{{content}}}", answer) == NOTHING


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"\boxed{B}", RIGHT),
        (r"The answer is $\boxed{B}$.", RIGHT),
        (r"\boxed {B}", RIGHT),
        (r"\\boxed{B}", RIGHT),
        (r"a set \{x\} and a brace } then \boxed{B}", RIGHT),
        (r"an open { then \boxed{B}", RIGHT),
        (r"\boxed{A}", WRONG),
        # several boxes: the one that closes last
        (r"\boxed{A} no, \boxed{B}", RIGHT_BUT_LOOSE),
        (r"\boxed{B} no, \boxed{A}", WRONG_AND_LOOSE),
        (r"\boxed{B} and \boxed{", RIGHT_BUT_LOOSE),
        (r"\boxed{B} and \boxed{A", RIGHT_BUT_LOOSE),
        (r"\boxed{\boxed{B}}", RIGHT_BUT_LOOSE),
        (r"\boxed{A} so \boxed{64 pC}", NOTHING),
        # no complete box
        ("", NOTHING),
        ("B", NOTHING),
        ("The answer is B.", NOTHING),
        (r"\boxed B", NOTHING),
        (r"\boxed{B", NOTHING),
        (r"\boxed{\text{B}", NOTHING),
        (r"\boxed{B\}", NOTHING),
        ("boxed{B}", NOTHING),
        (r"\fbox{B}", NOTHING),
        ("<answer>B</answer>", NOTHING),
    ],
)
def test_boxed(completion: str, expected: tuple[float, str | None, bool]) -> None:
    assert boxed(completion) == expected


def test_boxed_takes_only_the_letters_that_the_question_has() -> None:
    assert boxed(r"\boxed{C}", labels=["A", "B"]) == NOTHING
    assert boxed(r"\boxed{B: C}", labels=["A", "B"]) == RIGHT  # without an option C, "C" is carbon


@pytest.mark.parametrize(
    ("completion", "answer", "expected"),
    [
        ("4 * 7 = 28 <answer> 28 </answer>", "28", (1.0, "28", True)),
        ("<answer>28</answer>\n", "28", (1.0, "28", True)),
        ("<answer> A  T\nG </answer>", "A T G", (1.0, "A T G", True)),
        ("<answer> A T G </answer>", " A  T G", (1.0, "A T G", True)),
        ("<answer> 27 </answer>", "28", (0.0, "27", True)),
        ("<answer> 128 </answer>", "28", (0.0, "128", True)),
        ("<answer> 28.0 </answer>", "28", (0.0, "28.0", True)),
        ("<answer> 28 N </answer>", "28", (0.0, "28 N", True)),
        ("<answer> ATG </answer>", "A T G", (0.0, "ATG", True)),
        ("<answer> a t g </answer>", "A T G", (0.0, "a t g", True)),
        ("<answer> G T A </answer>", "A T G", (0.0, "G T A", True)),
        ("<answer> 28 </answer> .", "28", (1.0, "28", False)),
        ("<answer> 28 </answer> <answer> 27 </answer>", "28", (0.0, "27", False)),
        ("<answer> 27 </answer> <answer> 28 </answer>", "28", (1.0, "28", False)),
        ("<answer> 28 </answer> <answer> 27", "28", (1.0, "28", False)),
        ("", "28", NOTHING),
        ("28", "28", NOTHING),
        ("<answer> 28", "28", NOTHING),
        ("28 </answer>", "28", NOTHING),
        ("<answer> </answer>", "28", NOTHING),
        ("<ANSWER> 28 </ANSWER>", "28", NOTHING),
    ],
)
def test_short_answer(completion: str, answer: str, expected: tuple[float, str | None, bool]) -> None:
    assert short(completion, answer) == expected


FAILED_ATTEMPTS = {
    "": "The attempt is empty.",
    "no tags": "The attempt has no complete <answer>...</answer> block.",
    f"{REASONED} C": "The attempt has no complete <answer>...</answer> block after its reasoning.",
    "<reasoning>endless": "The reasoning is never closed, so no answer follows it.",
    f"{REASONED}<answer> </answer>": "The place for the final answer is empty.",
    f"{REASONED}<answer>A and B</answer>": "The final answer names more than one option.",
    f"{REASONED}<answer>64 pC</answer>": "The final answer is not the letter of one of the options.",
    f"{REASONED}<answer>A</answer>": "The final answer is wrong.",
}


def test_tagged_feedback_says_what_went_wrong() -> None:
    assert {text: grade_tagged(text, "B", ABCD).feedback for text in FAILED_ATTEMPTS} == FAILED_ATTEMPTS


def test_boxed_feedback_says_what_went_wrong() -> None:
    expected = {
        " ": "The attempt is empty.",
        "B": r"The attempt has no complete \boxed{...} with a final answer.",
        r"\boxed{}": "The place for the final answer is empty.",
        r"\boxed{A, B}": "The final answer names more than one option.",
        r"\boxed{A good conductor}": "The final answer is not the letter of one of the options.",
        r"\boxed{A}": "The final answer is wrong.",
    }
    assert {text: grade_boxed(text, "B", ABCD).feedback for text in expected} == expected


def test_short_answer_feedback_says_what_went_wrong() -> None:
    expected = {
        " ": "The attempt is empty.",
        "28": "The attempt has no complete <answer>...</answer> block.",
        "<answer></answer>": "The place for the final answer is empty.",
        "<answer>27</answer>": "The final answer is wrong.",
    }
    assert {text: grade_short_answer(text, "28").feedback for text in expected} == expected


@pytest.mark.parametrize("answer", ABCD)
def test_feedback_never_names_the_right_letter(answer: str) -> None:
    contents = ["", "64 pC", "A, B", "C or D", "E", *(letter for letter in ABCD if letter != answer)]
    grades = [grade_tagged(text, answer, ABCD) for text in ["", "x", "<reasoning>x", f"{REASONED} x"]]
    grades += [grade_tagged(f"{REASONED}<answer>{content}</answer>", answer, ABCD) for content in contents]
    grades += [grade_boxed(text, answer, ABCD) for text in ["", "x", *(f"\\boxed{{{c}}}" for c in contents)]]
    for grade in grades:
        assert grade.reward == 0.0
        assert grade.feedback is not None
        assert not re.search(rf"\b{answer}\b", grade.feedback)
        assert grade.feedback.endswith(".")


def test_a_right_answer_gets_no_feedback_even_in_bad_format() -> None:
    assert grade_tagged("so <answer>B</answer> !", "B", ABCD) == Grade(1.0, "B", False, None)
    assert grade_boxed(r"\boxed{A}\boxed{B}", "B", ABCD) == Grade(1.0, "B", False, None)
    assert grade_short_answer("<answer>28</answer> !", "28") == Grade(1.0, "28", False, None)


@pytest.mark.parametrize("grade", [grade_tagged, grade_boxed])
@pytest.mark.parametrize(
    ("answer", "labels", "named"),
    [("E", ABCD, "'E'"), ("", ABCD, "''"), ("A", [], "[]"), ("A", ["A", "A"], "['A', 'A']"), ("a", ["a", "b"], "'b'")],
)
def test_impossible_options_are_an_error(grade, answer: str, labels: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=re.escape(named)):
        grade("anything", answer, labels)


def test_blank_short_answer_is_an_error() -> None:
    with pytest.raises(ValueError, match="blank"):
        grade_short_answer("<answer> </answer>", " ")


LONG = 300_000  # characters: more than 8192 tokens hold, and at this length a quadratic step takes minutes


@pytest.mark.parametrize(
    "piece",
    [
        "<answer>",
        "</answer>",
        "<reasoning>",
        "<reasoning></reasoning>",
        "<answer>B</answer>",
        "<",
        " ",
        "\\boxed{",
        "\\boxed{}",
        "\\boxed",
        "\\boxed ",
        "{",
        "}",
        "{}",
        "\\",
        "\\{",
        "\\text{",
        "A, ",
        "A and ",
        "B",
        "(",
        "Option ",
    ],
)
def test_long_texts_take_linear_time(piece: str) -> None:
    filling = piece * (LONG // len(piece))
    texts = [
        filling,
        f"<answer>{filling}</answer>",
        f"\\boxed{{{filling}}}",
        f"\\boxed{{B: {filling}}}",
        f"\\boxed{filling}",
    ]
    start = time.process_time()
    for text in texts:
        grade_tagged(text, "B", ABCD)
        grade_boxed(text, "B", ABCD)
        grade_short_answer(text, "28")
    assert time.process_time() - start < 20.0  # seconds for 15 grades; a linear pass takes about 1
