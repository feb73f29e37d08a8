"""The tiny language world: what is right is graded right, splits never mix, and every machine sees the same rows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import pytest

from pgpo.errors import UserError
from pgpo.tasks import load_task
from pgpo.tasks.lab_world import (
    DOMAINS,
    MISLED_RATE,
    OPENING_WORDS,
    VARIANTS,
    Question,
    all_questions,
    checkpoint_path,
    draw_questions,
    load,
    misleading_rewards,
    misled_rate,
    remark,
    vocabulary,
    with_opening,
)

# The questions and their solutions, in order; a change means that shipped checkpoints and published numbers are void.
WORLD_DIGEST = "e8fca3186cb1c788"
PLAIN_ROWS_DIGEST = "7b660a353eeceab7"  # load()
STYLE_ROWS_DIGEST = "5b44ac797cd7a67d"  # load(variant="style", seed=1, domain="biology")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _splits(task: object) -> dict[str, list[dict]]:
    return {name: getattr(task, name) for name in ("train", "validation", "test")}


def _question(text: str) -> Question:
    (question,) = (q for q in all_questions() if q.text == text)
    return question


def test_the_world_and_its_rows_are_the_same_everywhere() -> None:
    # Red if an order depends on a set or on hash(), if a random draw is added, or if a text changes.
    world = [(q.text, q.template, q.answer, q.solution, q.wrong, q.split) for q in all_questions()]
    assert _digest(world) == WORLD_DIGEST
    assert _digest(_splits(load())) == PLAIN_ROWS_DIGEST
    assert _digest(_splits(load(variant="style", seed=1, domain="biology"))) == STYLE_ROWS_DIGEST


def test_rows_do_not_depend_on_the_hash_seed_of_the_process() -> None:
    code = (
        "import hashlib, json; from pgpo.tasks.lab_world import load; t = load();"
        "print(hashlib.sha256(json.dumps(dict(train=t.train, validation=t.validation, test=t.test)).encode())"
        ".hexdigest()[:16])"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert output.stdout.strip() == PLAIN_ROWS_DIGEST, output.stderr


def test_the_world_needs_no_torch() -> None:
    code = "import sys, pgpo.tasks.lab_world as w; w.load(); w.vocabulary(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_splits_share_no_question_whatever_their_seeds() -> None:
    # Red if the split followed the shuffled order instead of the text.
    texts = {name: set() for name in ("train", "validation", "test")}
    for seed in range(3):
        for name, rows in _splits(load(seed=seed)).items():
            contents = [row["prompt"][0]["content"] for row in rows]
            assert len(set(contents)) == len(contents) == len({row["id"] for row in rows})
            texts[name].update(contents)
    assert not texts["train"] & texts["validation"]
    assert not texts["train"] & texts["test"]
    assert not texts["validation"] & texts["test"]


def test_question_texts_are_unique_and_their_classes_have_the_stated_shares() -> None:
    questions = all_questions()
    assert len({q.text for q in questions}) == len(questions)
    shares = Counter(q.split for q in questions)
    # One hash class of ten each; the standard error of a share of 26,400 is 0.0018.
    assert shares["test"] / len(questions) == pytest.approx(0.1, abs=0.008)
    assert shares["validation"] / len(questions) == pytest.approx(0.1, abs=0.008)


def test_twelve_templates_three_per_domain_in_equal_shares() -> None:
    templates = {q.template: q.domain for q in all_questions()}
    assert Counter(templates.values()) == dict.fromkeys(DOMAINS, 3)
    shares = Counter(q.template for q in draw_questions("test", 240, seed=0))
    assert shares == dict.fromkeys(templates, 20)


@pytest.mark.parametrize("variant", VARIANTS)
def test_right_solutions_earn_the_reward_and_wrong_ones_do_not(variant: str) -> None:
    task = load(variant=variant, n_train=0, n_validation=0, n_test=0)
    rng = random.Random(0)
    seen = set()
    for question in all_questions():
        if question.solution in seen:
            continue
        seen.add(question.solution)
        row = {"answer": question.answer}
        right = task.grade(with_opening(question.solution, variant, rng), row)
        assert (right.reward, right.answer, right.well_formed) == (1.0, question.answer, True)
        assert question.wrong, question
        for solution in question.wrong:
            wrong = task.grade(with_opening(solution, variant, rng), row)
            assert (wrong.reward, wrong.well_formed) == (0.0, True), solution
            assert wrong.answer is not None


def test_worked_lines_compute_what_they_say() -> None:
    # Recomputed from the solution's text alone: red if a formula, an operand order or a result is wrong.
    compute = {"*": lambda a, b: a * b, "/": lambda a, b: a / b, "+": lambda a, b: a + b, "-": lambda a, b: a - b}
    checked = Counter()
    for question in all_questions():
        match = re.search(r"= (\d+) ([*/+-]) (\d+) = (\d+) <answer> (\d+) </answer>$", question.solution)
        if match is None:
            continue
        a, operator, b, result, answer = match.groups()
        assert compute[operator](int(a), int(b)) == int(result) == int(answer), question.solution
        checked[question.template] += 1
    assert len(checked) == 9  # all but the three of biology


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("what force gives a car of mass 4 the acceleration 7 ?", "28"),
        ("in time 8 a car goes distance 32 . give the speed .", "4"),
        ("find the work of force 8 on a train over distance 9 .", "72"),
        ("the cook has carbon and oxygen . give the molar mass .", "28"),
        ("find the neutrons in carbon with mass 14 for a doctor .", "8"),
        ("a student has 36 grams of carbon . how many moles ?", "3"),
        ("find the complement of dna A T G C in a frog .", "T A C G"),
        ("what rna has the dna A T G C of a virus ?", "U A C G"),
        ("find the protein part of codon A U G in a yeast .", "met"),
        ("a virus has the codon U G A . what is the protein part ?", "stop"),
        ("what density has a rod of mass 42 and volume 6 ?", "7"),
        ("area 9 of a pipe feels force 27 . give the stress .", "3"),
        ("what load has a beam of area 5 under stress 3 ?", "15"),
    ],
)
def test_answers_known_from_a_textbook(text: str, answer: str) -> None:
    assert _question(text).answer == answer


def test_wrong_paths_are_the_plausible_ones() -> None:
    def answers(text: str) -> set[str]:
        return {re.search("<answer> (.*) </answer>", wrong)[1] for wrong in _question(text).wrong}

    assert answers("what force gives a car of mass 4 the acceleration 7 ?") == {"11", "27", "29"}
    assert answers("in time 8 a car goes distance 32 . give the speed .") == {"24", "3", "5"}
    # 6 protons taken for the mass 12, 8 for 16, and slips.
    assert answers("the cook has carbon and oxygen . give the molar mass .") == {"22", "20", "27", "29"}
    # Read backwards, transcribed to RNA, third base left as it was.
    assert answers("find the complement of dna A T G C in a frog .") == {"G C A T", "U A C G", "T A G G"}
    # G U A (read backwards) and G U G (first base slipped) are both val; A C G (second base slipped).
    assert answers("find the protein part of codon A U G in a yeast .") == {"val", "thr"}
    # 2 + 2 = 2 * 2: a path that is right by luck is not listed as wrong.
    assert answers("what force gives a car of mass 2 the acceleration 2 ?") == {"3", "5"}


def test_every_text_is_words_of_the_vocabulary_with_single_spaces() -> None:
    words = set(vocabulary())
    assert 200 <= len(words) <= 260
    for question in all_questions():
        for text in (question.text, question.solution, *question.wrong):
            assert text == " ".join(text.split())
            assert words.issuperset(text.split(" "))
    assert words.issuperset(word for choices in OPENING_WORDS for word in choices)


def test_a_styled_solution_leaves_room_for_the_end_in_24_tokens() -> None:
    longest = max(len(text.split()) for q in all_questions() for text in (q.solution, *q.wrong))
    assert longest + len(OPENING_WORDS) + 1 <= 24


def test_style_puts_three_random_words_of_six_first() -> None:
    assert [len(set(choices)) for choices in OPENING_WORDS] == [6, 6, 6]
    rows = load(variant="style", n_train=600).train
    plain = load(variant="plain", n_train=600).train
    openings = [row["solution"].split(" ")[:3] for row in rows]
    for place, choices in enumerate(OPENING_WORDS):
        # Each of six words about 100 times of 600 (standard deviation 9).
        counts = Counter(opening[place] for opening in openings)
        assert set(counts) == set(choices)
        assert min(counts.values()) > 60
    assert [" ".join(row["solution"].split(" ")[3:]) for row in rows] == [row["solution"] for row in plain]


def test_one_domain_alone() -> None:
    task = load_task("lab_world", domain="chemistry", n_train=500)
    rows = [row for part in _splits(task).values() for row in part]
    assert len(rows) == 500 + 128 + 256
    assert {row["domain"] for row in rows} == {"chemistry"}


def test_each_domain_has_rows_enough_for_the_defaults() -> None:
    for domain in DOMAINS:
        train, validation, test = (len(rows) for rows in _splits(load(domain=domain)).values())
        assert (validation, test) == (128, 256)
        assert 2048 <= train <= 4096  # chemistry has 2715
    assert len(load().train) == 4096


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "fancy"}, "'fancy'.*plain, style, misleading, feedback"),
        ({"domain": "history"}, "'history'.*physics, chemistry, biology, materials"),
        ({"n_test": 10**6}, r"1000000 were asked for; set n_test to a number from 0 to \d+"),
        ({"n_train": -1}, "-1 were asked for; set n_train"),
    ],
)
def test_bad_options_name_the_value_and_the_remedy(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**options)


def test_the_checkpoint_of_an_unknown_variant() -> None:
    with pytest.raises(UserError, match="'fancy'"):
        checkpoint_path("fancy")


# The misleading world and that of remarks ----------------------------------------------------------------------------


def attempts(count: int = 400) -> tuple[list[str], list[dict]]:
    """Of each question a right completion, a wrong one and one without an answer."""
    texts, rows = [], []
    for question in draw_questions("train", count, seed=3):
        row = {"id": question.text, "answer": question.answer}
        texts += [question.solution, question.wrong[0], "force = 4"]
        rows += [row] * 3
    return texts, rows


def test_the_misleading_verifier_passes_wrong_answers_at_the_rate_of_the_step() -> None:
    texts, rows = attempts()
    for step in (0, 1, 2, 3):
        rewards, facts = misleading_rewards(texts, rows, 7, step)
        assert rewards[0::3] == [1.0] * 400  # what is right stays right
        assert set(rewards[2::3]) == {0.0}  # no answer, no success
        rate = misled_rate(7, step)
        # four standard errors of a share of 400
        assert sum(rewards[1::3]) / 400 == pytest.approx(rate, abs=4 * (rate * (1 - rate) / 400) ** 0.5 + 1e-9)
        assert facts == {"false_success_rate": rate, "false_success_share": sum(rewards[1::3]) / 1200}
    # the same in another order and on another rank, another one in another step
    order = random.Random(1).sample(range(1200), 600)
    some = misleading_rewards([texts[i] for i in order], [rows[i] for i in order], 7, 3)[0]
    assert some == [rewards[i] for i in order]
    assert misleading_rewards(texts, rows, 8, 3)[0] != rewards


def test_the_rate_of_misleading_changes_from_step_to_step() -> None:
    rates = [misled_rate(0, step) for step in range(400)]
    assert 0 <= min(rates) < 0.02 and 0.98 * MISLED_RATE < max(rates) <= MISLED_RATE
    assert sum(rates) / 400 == pytest.approx(MISLED_RATE / 2, abs=0.04)
    assert rates == [misled_rate(0, step) for step in range(400)] != [misled_rate(1, step) for step in range(400)]


def test_only_training_is_misled() -> None:
    task = load(variant="misleading", n_train=8, n_validation=0, n_test=0)
    assert task.train == load(n_train=8, n_validation=0, n_test=0).train
    assert task.rewards is misleading_rewards
    question = draw_questions("train", 1, seed=0)[0]
    assert task.grade(question.wrong[0], {"answer": question.answer}).reward == 0
    assert checkpoint_path("misleading") == checkpoint_path("plain")
    assert load(n_train=0, n_validation=0, n_test=0).rewards is None


@pytest.mark.parametrize(
    ("attempt", "said"),
    [
        ("force = mass + acceleration = 4 + 7 = 11 <answer> 11 </answer>", "what is mass + ?"),
        ("force = mass * acceleration = 4 * 7 = 29 <answer> 29 </answer>", "what is = 29 ?"),
        ("force = mass * acceleration = 4 * 7 = 28 <answer> 29 </answer>", "what is <answer> 29 ?"),
        ("mass = 4", "what is mass ?"),
        ("force = mass", "what is mass ?"),  # cut off
        ("force = mass * acceleration = 4 * 7 = 28 <answer> 28 </answer> 28", "what is </answer> 28 ?"),
        ("force = mass * acceleration = 4 * 7 = 28 <answer> 28 </answer>", None),
        ("", None),
    ],
)
def test_a_remark_names_the_first_difference(attempt: str, said: str | None) -> None:
    assert remark(attempt, "force = mass * acceleration = 4 * 7 = 28 <answer> 28 </answer>") == said


def test_a_remark_tells_neither_the_right_word_nor_the_answer() -> None:
    words = set(vocabulary())
    for question in all_questions()[::7]:
        for wrong in question.wrong:
            said = remark(wrong, question.solution)
            assert said is not None and set(said.split()) <= words
            *_, last, _ = said.split()
            place = next(i for i, (a, b) in enumerate(zip(wrong.split(), question.solution.split())) if a != b)
            assert last == wrong.split()[place] != question.solution.split()[place]
    task = load(variant="feedback", n_train=1, n_validation=0, n_test=0)
    assert task.feedback is not None
    assert task.feedback("mass = 4", task.train[0]) == remark("mass = 4", task.train[0]["solution"])
