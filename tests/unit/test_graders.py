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
        (f"{REASONED}<answer>B.</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>A: 64 pC</answer>", WRONG_AND_LOOSE),
        (f"{REASONED}<answer>\\boxed{{B}}</answer>", RIGHT_BUT_LOOSE),
        (f"{REASONED}<answer>$B$</answer>", RIGHT_BUT_LOOSE),
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


# What models write into the place for the final answer of a question with the options A to D.
A_READER_SAYS_B = [
    # the letter alone, and what may stand behind it
    *("B", "(B)", "[B]", "B)", "B.", "B:", "B,", "B;", "B -", "B - 64 pC", "B – 64 pC", "B — 64 pC", "B—64 pC"),
    *("B -- 64 pC", "B: 64 pC", "B. 64 pC", "B) 64 pC", "(B) 64 pC", "[B] 64 pC", "B, 64 pC", "B; 64 pC"),
    *("B (64 pC)", "(B: 64 pC)"),
    # LaTeX fonts, sizes, colours, boxes
    *(r"\text{B}", r"\textbf{(B)}", r"\mathrm{B}", r"\mathbf{B}", r"\mathsf{B}", r"\mathcal{B}", r"\mathbb{B}"),
    *(r"\boldsymbol{B}", r"\bm{B}", r"\operatorname{B}", r"\Large B", r"\Huge{B}", r"\LARGE \textbf{B}"),
    *(r"{\Large B}", r"\big(B\big)", r"\Bigl(B\Bigr)", r"\left(B\right)", r"\displaystyle B", r"\textcolor{red}{B}"),
    *(r"\color{blue}{B}", r"\color{red} B", r"{\color{red}B}", r"\colorbox{yellow}{B}"),
    *(r"\fcolorbox{red}{yellow}{B}", r"\textcolor[rgb]{1,0,0}{\textbf{B}}", r"\bbox[yellow]{B}", r"\underline{B}"),
    *(r"\emph{B}", r"\textit{B}", r"\texttt{B}", r"\textsf{B}", r"\text{ B }", r"\ B\,", r"\quad B \quad"),
    *(r"\boxed{B}", r"\fbox{B}", r"\mbox{B}", r"{\bf B}"),
    # math and markdown marks, quotes, other forms of the character
    *("$B$", r"$\mathbf{B}$", "**B**", "*B*", "__B__", "_B_", '"B"', "'B'", "“B”", "‘B’", "`B`", "``B''"),
    *('"B: 64 pC"', "Ｂ", "（B）", "Ⓑ", "B：64 pC"),
    # words before it
    *("The answer is B", "the answer is B", "THE ANSWER IS B", "The correct answer is B."),
    *("The correct answer is (B)", "The final answer is: B", "Final answer: B", "Answer: B", "ANSWER: B", "answer B"),
    *("Answer = B", "Answer is option B", "Option B", "option B", "OPTION B", "Option (B)", "Option B: 64 pC"),
    *("Option B 64 pC", "Choice B", "choice (B): 64 pC", "The correct option is B", "The correct choice is B"),
    *("The best answer is B", "Correct: B", "Therefore, B", "Thus, the answer is B", "So the answer is B", "Hence B"),
    *("It is B", "I choose B", r"\text{The answer is } B", r"\text{The answer is } \textbf{B}", r"\text{Option B}"),
    *(r"\text{Answer: B}", "The answer is\nB"),
    # the letter last
    *("64 pC (B)", "64 pC [B]", "$64$ pC (B)", r"64\ \mathrm{pC}\ (B)", "64 pC, option B"),
    *("64 pC, which is option B", "64 pC, so the answer is B", "64 pC (option B)", "64 pC → B"),
    *(r"64 pC \rightarrow B", r"64 pC \implies \text{B}", "64 pC => B", "64 pC\nB", "64 pC – B"),
    # a line break inside
    *("B\n64 pC", r"B \\ 64 pC", r"\text{B}\\64 pC", "B\newline 64 pC", "B<br>64 pC", "\nB\n"),
    # option texts that hold another option's letter
    *("B: 45 N/C", "B: vitamin A", "B: between 0°C and 100°C", r"B: $\mathrm{C}_{6}\mathrm{H}_{6}$"),
    "B: CCOC(=O)/C(F)=C(/C)c1cc2c(cc1OC)OC(C)(C)C=C2CC",
    "B. B",
    r"\text{B: } \{x \mid x > 0",
    # words and marks behind it
    *("B is correct", "B is the correct answer", "B is the answer", "(B) is correct", "B because q = 64"),
    *("Probably B", "I think B", "We choose option B", "Ans: B", "Solution: B", "64 pC, so B", r"\(B\)", r"\{B\}"),
    *(r"\begin{array}{c}B\end{array}", r"B \par 64 pC", "✅ B", "B ✓", r"\checkmark B", "<b>B</b>"),
    *("<strong>B</strong>", r"\\text{B}", r"B.\ 64", "(B). 64", "(B), 64", "B) ", "(B", "B!", "B..."),
    *("B, because C is wrong", "B, not C", "B (not C)", r"\text{(B) } 2.0 \times 10^{-9} \mathrm{~C}"),
    *(r"\text{B}: 64 \mathrm{~pC}", "A good conductor (B)", "45 N/C (B)", "does not change (B)"),
    *(r"The answer is: $\boxed{B}$", r"\mathbf{\text{B}}", "The magnitude is 64 pC (B).", "B:64", "B.64 pC"),
    *('The answer is "B"', "The answer is **B**", "The correct answer is option (B): 64 pC"),
]
A_READER_SAYS_NOTHING = [
    # no letter of an option
    *("", "b", r"\text{b}", "E", "64 pC", "B 64 pC", "A good conductor"),
    # a letter that is something else
    *("B = 64", "B=64 pC", r"\beta", r"\frac{B}{2}", r"\textB", "BB"),
    # several letters
    *("A, B", "A,B", "B, C", "A and B", "B and C", "B & C", "A/B", "B/C", "(A)(B)", "(A)/(B)", "A and/or B"),
    *(r"\{A, B\}", "from A to B", "blood type B", "B-field", r"\mathbf{B}_0", "qvB", "|B|", "(A), (B)", "(B) or (C)"),
    *("B or C", "Either B or C", "either A or (B)", "A. B", "B: C", "A: 32 pC, B: 64 pC"),
    *(r"\text{B: } 64; \text{C: } 32", "neither A nor B", "B_2", "B_{2}", r"B_{\text{max}}", r"\vec{B}", r"\hat{B}"),
    *(r"\overline{B}", r"\tilde{B}", r"\dot{B}", "B^2", "B^{-1}", "B'", "B+C", "B + C", "B - C", "B-12", "B12", "2B"),
    *("B/2", "B(t)", r"B\cdot A", r"\sqrt{B}"),
    # denied
    *("not B", "The answer is not B", "Not (B)", "all except (B)", "cannot be (B)", "isn't (B)", "B is wrong"),
    *("(B) is wrong", "B is incorrect", "both B and C", "Options B and C", "Option B or C", "option A or option B"),
    *("A, B, and C", "A\nB", r"B\\C", "32 pC (A), 64 pC (B)", "A: 32 pC (B)", "A (B)", "A → B", "ABCD", "B, C, D"),
    *("A; B", "(A,B)", "(A, B)", "[A, B]", "{A, B}", r"A \text{ and } B", r"A \text{ or } B", r"\text{A}\text{B}"),
    *("Bob", "Bohr", "BC", "none", "None of the above", "B?", "B cells", "A-B", "AB", "x = B", "v(B)", r"B\%"),
    *("B < C", "B > A", "A = B", "B ≈ 64", r"B \approx 64", r"B \times 2", "The answer is A good conductor"),
    *("The B field", "Vitamin B", "vitamin B", "Group B", "B or not", "B and D only", "I", "$B$ and $C$"),
    *("(B) and (C)", "(B), (C)", "B) C)", "B. C.", "B: 64 pC, C: 32 pC", r"\text{A} \& \text{B}", r"A \lor B"),
    *(r"B\,C", "B~C", r"B \quad C"),
]
TABLE = [(content, "B") for content in A_READER_SAYS_B] + [(content, None) for content in A_READER_SAYS_NOTHING]


def test_the_table_is_long_and_names_each_output_once() -> None:
    assert len(A_READER_SAYS_B) >= 150 and len(A_READER_SAYS_NOTHING) >= 100
    assert len({content for content, _ in TABLE}) == len(TABLE)


@pytest.mark.parametrize(("content", "letter"), TABLE)
def test_final_answer_in_a_box(content: str, letter: str | None) -> None:
    # For every letter: "A, B" must not earn the reward of A either, as it would if the first letter were taken.
    for answer in ABCD:
        grade = grade_boxed(f"The charge is 64 pC.\n\n$$\\boxed{{{content}}}$$\nThat is all.", answer, ABCD)
        assert (grade.reward, grade.answer) == (float(answer == letter), letter)


@pytest.mark.parametrize(("content", "letter"), TABLE)
def test_final_answer_in_tags(content: str, letter: str | None) -> None:
    for answer in ABCD:
        grade = grade_tagged(f"{REASONED}\n<answer>{content}</answer>", answer, ABCD)
        assert (grade.reward, grade.answer) == (float(answer == letter), letter)
        assert grade.well_formed == (content.strip() == "B")  # the asked format is the letter alone


# What math-verify takes for B and a reader does not: it ignores case and primes, and takes the right of an equation.
MATH_VERIFY_TAKES_TOO = {"b", r"\text{b}", "B'", "x = B", "A = B"}


def test_what_math_verify_takes_for_b_is_taken_and_what_is_refused_it_refuses() -> None:
    math_verify = pytest.importorskip("math_verify")
    right, wrong = math_verify.parse("$B$"), math_verify.parse("$A$")
    taken = set()
    short_ones = [(content, letter) for content, letter in TABLE if len(content) < 16]  # sentences take it long
    for content, letter in short_ones:
        text = f"so \\boxed{{{content}}}"
        read = math_verify.parse(text)
        if math_verify.verify(right, read):
            taken.add(content)
        if letter:
            assert not math_verify.verify(wrong, read), content
    assert {content for content in taken if not boxed(f"\\boxed{{{content}}}")[0]} == MATH_VERIFY_TAKES_TOO
    assert len(taken) > 20  # both apply to the plain forms


VITAMINS = ["vitamin A", "vitamins A and C", "B vitamins", "none of A, B and C"]


@pytest.mark.parametrize(
    ("content", "options", "letter"),
    [
        # an option text that itself names letters
        ("B: vitamins A and C", VITAMINS, "B"),
        ("B vitamins A and C", VITAMINS, "B"),
        (r"\textbf{B. vitamins A and C}", VITAMINS, "B"),
        ("vitamins A and C (B)", VITAMINS, "B"),
        ("vitamins A and C: B", VITAMINS, "B"),
        ("The answer is D: none of A, B and C", VITAMINS, "D"),
        ("none of A, B and C (D)", VITAMINS, "D"),
        ("B: vitamins A and D", VITAMINS, None),
        # the letter and its text, without a mark between them
        ("B 64 pC", ["32 pC", "64 pC", "1 C", "2 C"], "B"),
        (r"B $64\,\mathrm{pC}$", ["32 pC", r"$64 \mathrm{pC}$", "1 C", "2 C"], "B"),
        ("64 pC - B", ["32 pC", "64 pC", "1 C", "2 C"], "B"),
        ("A good conductor", ["good conductor", "bad conductor", "x", "y"], "A"),
        # the letter with another option's text, or that text alone
        ("B: 32 pC", ["32 pC", "64 pC", "1 C", "2 C"], None),
        ("32 pC (B)", ["32 pC", "64 pC", "1 C", "2 C"], None),
        ("64 pC", ["32 pC", "64 pC", "1 C", "2 C"], None),
        ("B. subtilis", ["E. coli", "yeast", "x", "B. subtilis"], None),
        ("B. subtilis", ["E. coli", "B. subtilis", "x", "yeast"], None),
        ("C=CCc1cc(C)ccc1C(=O)OC", ["CC", "CCO", "C=CCc1cc(C)ccc1C(=O)OC", "O"], None),
        ("magnetic field (B)", ["x", "y", "magnetic field", "z"], None),
        # a text in other words decides nothing
        ("B: sixty-four", ["32 pC", "64 pC", "1 C", "2 C"], "B"),
        ("A good conductor", ["a metal", "64 pC", "1 C", "2 C"], None),
        # options that are letters or marks themselves
        ("B", ["B", "A", "D", "C"], "B"),
        ("(B)", ["B", "A", "D", "C"], "B"),
        ("B: A", ["B", "A", "D", "C"], "B"),
        ("B", ["=", "<", "-", ">"], "B"),
        ("(B)", ["=", "<", "-", ">"], "B"),
        ("B: <", ["=", "<", "-", ">"], "B"),
    ],
)
def test_the_option_texts_tell_letters_from_words(content: str, options: list[str], letter: str | None) -> None:
    for answer in ABCD:
        expected = (float(answer == letter), letter)
        grade = grade_boxed(f"\\boxed{{{content}}}", answer, ABCD, options=options)
        assert (grade.reward, grade.answer) == expected
        grade = grade_tagged(f"{REASONED}<answer>{content}</answer>", answer, ABCD, options=options)
        assert (grade.reward, grade.answer) == expected


def test_a_text_that_stands_twice_is_right_under_either_letter() -> None:
    options = ["8 s", "2 s", "4 s", " 8  s"]
    for right, other in ("AD", "DA"):
        assert grade_boxed(f"\\boxed{{{other}}}", right, ABCD, options=options) == Grade(1.0, right, True, None)
        grade = grade_tagged(f"{REASONED}<answer>{other}</answer>", right, ABCD, options=options)
        assert grade == Grade(1.0, right, True, None)
    # votes for a wrong text count together; case makes another text: 1 mW is not 1 MW
    assert [grade_boxed(f"\\boxed{{{x}}}", "B", ABCD, options=options).answer for x in "AD"] == ["A", "A"]
    assert grade_boxed(r"\boxed{A}", "B", ABCD, options=["1 mW", "1 MW", "2 W", "3 W"]).reward == 0.0


@pytest.mark.parametrize("grade", [grade_tagged, grade_boxed])
def test_options_and_labels_of_unequal_number_are_an_error(grade) -> None:
    with pytest.raises(ValueError, match="3 options for 4 labels"):
        grade("anything", "B", ABCD, options=["x", "y", "z"])


# Thinking: what the user does not see is no answer. Each with the answer's own marks in the thinking.
OPENED = True


@pytest.mark.parametrize(
    ("completion", "opened", "reward"),
    [
        ("<think>Perhaps ANSWER? No.</think>The answer is C.", False, 0.0),  # every form: test_visible.py
        ("<think>Perhaps ANSWER", False, 0.0),
        ("Perhaps ANSWER</think>", False, 0.0),
        ("Perhaps ANSWER", OPENED, 0.0),
        ("<think>a</think>ANSWER", False, 1.0),
        ("<think>ANSWERS? C? No.</think>ANSWER", False, 1.0),
        ("a</think>ANSWER", OPENED, 1.0),
        ("ANSWER<think>was that right", False, 1.0),
        ("ANSWER", False, 1.0),
    ],
)
def test_an_answer_in_the_thinking_is_none(completion: str, opened: bool, reward: float) -> None:
    for answer, grade in (
        (r"\boxed{B}", grade_boxed(completion.replace("ANSWER", r"\boxed{B}"), "B", ABCD, opened=opened)),
        ("tags", grade_tagged(completion.replace("ANSWER", "<answer>B</answer>"), "B", ABCD, opened=opened)),
        ("short", grade_short_answer(completion.replace("ANSWER", "<answer>28</answer>"), "28", opened=opened)),
    ):
        assert grade.reward == reward, answer
        if reward == 0.0:
            assert (grade.answer, grade.well_formed) == (None, False)


def test_thinking_before_the_asked_format_keeps_the_format() -> None:
    assert tagged(f"<think>hm</think>\n{REASONED}<answer>B</answer>") == RIGHT
    assert boxed(r"<think>\boxed{A}?</think>\boxed{B}") == RIGHT
    assert short("<think><answer>1</answer></think><answer> 28 </answer>") == (1.0, "28", True)


def test_feedback_says_that_there_was_only_thinking() -> None:
    expected = "The attempt shows nothing but thinking, so no answer follows it."
    assert grade_boxed(r"<think>\boxed{B}", "B", ABCD).feedback == expected
    assert grade_tagged("<think>a</think>\n", "B", ABCD).feedback == expected
    assert grade_short_answer("28", "28", opened=True).feedback == expected
    assert grade_boxed(" ", "B", ABCD, opened=True).feedback == "The attempt is empty."


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


LONG = 100_000  # characters: more than 8192 tokens hold, and at this length a quadratic step takes a minute


@pytest.mark.parametrize(
    "piece",
    [
        *("<answer>", "</answer>", "<reasoning>", "<reasoning></reasoning>", "<answer>B</answer>", "<", " "),
        *("\\boxed{", "\\boxed{}", "\\boxed", "\\boxed ", "{", "}", "{}", "\\", "\\{", "\\text{", "A, ", "A and "),
        *("B", "(", "(B) ", "Option ", "the ", "not be ", "'", "`", "_", "-", "\\\\", "\\color[", "\\fcolorbox{"),
        *("<think>", "<think>a", "</think>", "<a:"),
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
        f"\\boxed{{not {filling} (B)}}",
    ]
    start = time.process_time()
    for text in texts:
        grade_tagged(text, "B", ABCD, options=ABCD)
        grade_boxed(text, "B", ABCD, options=ABCD)
        grade_short_answer(text, "28")
    assert time.process_time() - start < 20.0  # seconds for 18 grades; a linear pass takes about 1
