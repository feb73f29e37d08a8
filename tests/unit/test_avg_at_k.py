from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.evaluate import (
    Record,
    avg_scores,
    estimate,
    maj_scores,
    paired_bootstrap,
    pass_scores,
    summarize,
)


def _records(
    rewards: dict[str, Sequence[float]], answers: dict[str, Sequence[str | None]] | None = None
) -> list[Record]:
    return [
        Record(
            question_id=question,
            domain="physics",
            sample=sample,
            reward=reward,
            answer=answers[question][sample] if answers else None,
            well_formed=reward > 0,
            completion="",
        )
        for question, group in rewards.items()
        for sample, reward in enumerate(group)
    ]


def test_avg_and_its_interval_by_hand() -> None:
    # Question means 1, 1/2, 0, 1/2: mean 1/2, sample variance (1/4 + 0 + 1/4 + 0) / 3 = 1/6, standard error
    # sqrt(1/6 / 4) = 0.204124, times 1.959964 = 0.400076.
    summary = summarize(_records({"a": [1, 1], "b": [1, 0], "c": [0, 0], "d": [0, 1]}), k=2)
    assert summary.avg_at_k.value == 0.5
    assert summary.avg_at_k.low == pytest.approx(0.5 - 0.400076, abs=1e-6)
    assert summary.avg_at_k.high == pytest.approx(0.5 + 0.400076, abs=1e-6)
    assert summary.pass_at_k.value == 0.75  # a, b and d have a right one
    assert summary.well_formed_share == 0.5
    assert (summary.k, summary.questions) == (2, 4)


def test_questions_count_alike_and_in_any_order_of_records() -> None:
    records = _records({"a": [1, 1, 1, 0], "b": [0, 0, 1, 0]})
    shuffled = [records[index] for index in np.random.default_rng(0).permutation(len(records))]
    assert avg_scores(shuffled, 4) == pytest.approx({"a": 0.75, "b": 0.25})
    assert summarize(shuffled, 4).avg_at_k.value == 0.5


def test_pass_at_j_is_the_share_of_subsets_with_a_right_one() -> None:
    for n in range(1, 8):
        for c, j in itertools.product(range(n + 1), range(1, n + 1)):
            rewards = [1.0] * c + [0.0] * (n - c)
            subsets = list(itertools.combinations(rewards, j))
            expected = Fraction(sum(any(subset) for subset in subsets), len(subsets))
            assert pass_scores(_records({"q": rewards}), j)["q"] == pytest.approx(float(expected), abs=1e-14), (n, c, j)


def test_pass_at_j_stays_exact_where_binomials_overflow() -> None:
    # C(9999, 5000) / C(10000, 5000) = 1/2, though either has 3,000 digits.
    rewards = [1.0] + [0.0] * 9_999
    assert pass_scores(_records({"q": rewards}), 5_000)["q"] == pytest.approx(0.5, abs=1e-12)


def test_partial_rewards_count_in_avg_but_are_not_right() -> None:
    summary = summarize(_records({"a": [0.5, 0.5], "b": [1.0, 0.5]}, {"a": ["x", "x"], "b": ["y", "z"]}), k=2)
    assert summary.avg_at_k.value == 0.625
    assert summary.pass_at_k.value == 0.5
    assert summary.maj_at_k.value == 0.25  # a: x is not right; b: tie of a right and a wrong answer


@pytest.mark.parametrize(
    ("answers", "right", "score"),
    [
        (["A", "A", "B", "C"], "A", 1.0),
        (["A", "B", "B", "C"], "A", 0.0),
        (["A", "A", "B", "B"], "A", 0.5),  # tie of two, one right
        (["B", "B", "A", "A"], "A", 0.5),  # the order of the samples does not matter
        (["A", "B", "C", "D"], "C", 0.25),
        (["B", "B", "C", "C"], "A", 0.0),
        ([None, None, None, "A"], "A", 1.0),  # None is not an answer: it does not win three to one
        ([None, None, "B", "A"], "A", 0.5),
        ([None, None, None, None], "A", 0.0),
    ],
)
def test_majority_vote(answers: list[str | None], right: str, score: float) -> None:
    rewards = [float(answer == right) for answer in answers]
    assert maj_scores(_records({"q": rewards}, {"q": answers}), 4) == {"q": score}


def test_an_answer_is_right_if_one_completion_with_it_was_graded_right() -> None:
    # The grader may refuse the same answer in another format; the vote is on answers.
    for rewards in ([0.0, 1.0, 0.0], [1.0, 0.0, 0.0]):
        assert maj_scores(_records({"q": rewards}, {"q": ["A", "A", "B"]}), 3) == {"q": 1.0}


def test_no_certainty_from_a_flawless_or_hopeless_sample() -> None:
    # Wilson with n questions all alike: the other end lies z^2 / (n + z^2) away; 3.841459 / 23.841459 = 0.161125.
    right = estimate({str(i): 1.0 for i in range(20)})
    wrong = estimate({str(i): 0.0 for i in range(20)}, bootstrap_seed=0)
    assert (right.value, right.high) == (1.0, 1.0) and right.low == pytest.approx(1 - 0.161125, abs=1e-6)
    assert (wrong.value, wrong.low) == (0.0, 0.0) and wrong.high == pytest.approx(0.161125, abs=1e-6)


def test_bounds_stay_within_the_scale_and_one_question_has_none() -> None:
    few = estimate({"a": 1.0, "b": 1.0, "c": 0.0})
    assert few.high == 1.0 and 0.0 <= few.low < few.value
    wide = estimate({"a": 3.0, "b": -1.0})  # not shares: nothing to clip; sd 2.828427, half width 1.959964 * 2
    assert (wide.low, wide.high) == pytest.approx((1 - 3.919928, 1 + 3.919928), abs=1e-6)
    one = estimate({"a": 0.5})
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(one.high)


def _simulated_coverage(seed: int) -> tuple[float, float, float]:
    """Coverage of the clustered normal, the bootstrap, and a naive interval that takes completions as independent.

    400 data sets of 60 questions with 16 completions; the chance of a right one is Beta(1, 1) over questions, mean 1/2.
    Variance of a mean of 60: (1/12 + 1/6 / 16) / 60, naive (1/4) / 960, the true one is 6.0 times as large.
    """
    rng = np.random.default_rng(seed)
    clustered = bootstrap = naive = 0
    for trial in range(400):
        chance = rng.uniform(size=60)
        rewards = (rng.uniform(size=(60, 16)) < chance[:, None]).astype(float)
        scores = {str(i): value for i, value in enumerate(rewards.mean(axis=1))}
        interval = estimate(scores)
        clustered += interval.low <= 0.5 <= interval.high
        if trial % 4 == 0:
            interval = estimate(scores, bootstrap_seed=trial)
            bootstrap += interval.low <= 0.5 <= interval.high
        half = 1.96 * rewards.std(ddof=1) / np.sqrt(rewards.size)
        naive += abs(rewards.mean() - 0.5) <= half
    return clustered / 400, bootstrap / 100, naive / 400


def test_the_interval_covers_the_truth_as_often_as_it_says_and_the_naive_one_does_not() -> None:
    clustered, bootstrap, naive = _simulated_coverage(seed=0)
    assert 0.92 <= clustered <= 0.98
    assert 0.88 <= bootstrap <= 0.99  # of 100 only
    assert naive < 0.75


def test_bootstrap_agrees_with_the_normal_interval_and_repeats_with_its_seed() -> None:
    scores = {str(i): value for i, value in enumerate(np.random.default_rng(1).uniform(size=200))}
    normal, one, same, other = estimate(scores), estimate(scores, 1), estimate(scores, 1), estimate(scores, 2)
    assert one == same != other
    assert (one.low, one.high) == pytest.approx((normal.low, normal.high), abs=0.1 * (normal.high - normal.low))
    assert one.value == normal.value


def _simulated_pair(
    rng: np.random.Generator, gain: float, questions: int = 100, k: int = 8
) -> tuple[list[Record], list[Record]]:
    chance = rng.uniform(0.1, 0.8, size=questions)
    return tuple(
        _records({f"q{i}": (rng.uniform(size=k) < p + shift).astype(float).tolist() for i, p in enumerate(chance)})
        for shift in (gain, 0.0)
    )  # type: ignore[return-value]


def test_paired_difference_by_hand() -> None:
    a = _records({"p": [1, 1], "q": [1, 0], "r": [0, 0]})
    b = _records({"r": [0, 1], "p": [0, 0], "q": [1, 0]})  # another order: questions pair by id
    difference = paired_bootstrap(a, b, k=2)
    assert difference.value == pytest.approx((1 + 0 - 0.5) / 3)
    # 27 equally likely draws of (1, 0, -1/2); the extreme means, -1/2 and 1, come once each: 3.7 % > 2.5 %.
    assert (difference.low, difference.high) == (-0.5, 1.0)
    assert (difference.questions, difference.runs) == (3, 1)
    swapped = paired_bootstrap(b, a, k=2)
    assert (swapped.low, swapped.high) == (-difference.high, -difference.low)


def test_pairing_removes_the_difficulty_that_both_share() -> None:
    a, b = _simulated_pair(np.random.default_rng(0), gain=0.1)
    paired = paired_bootstrap(a, b, k=8)
    unpaired = math.hypot(*(est.high - est.low for est in (summarize(a, 8).avg_at_k, summarize(b, 8).avg_at_k)))
    # Within-question variance only: sqrt(2 * .2 / 8) against sqrt(2 * (.04 + .2 / 8)) for the unpaired, a ratio of .62.
    assert 0.5 < (paired.high - paired.low) / unpaired < 0.75
    assert paired.low > 0.0


def test_paired_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        interval = paired_bootstrap(*_simulated_pair(rng, gain=0.1, questions=40, k=4), k=4, resamples=1_000)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.90 <= covered / 200 <= 0.985


def test_the_spread_between_runs_enters_when_several_runs_are_given() -> None:
    # Every question has the same difference within a run, runs differ: no draw of questions can show that spread.
    def run(right: int) -> list[Record]:
        return _records({f"q{i}": [1.0] * right + [0.0] * (10 - right) for i in range(50)})

    ours, theirs = [run(9), run(7), run(3), run(5)], [run(5)] * 4
    difference = paired_bootstrap(ours, theirs, k=10)
    assert difference.value == pytest.approx(0.1)
    assert (difference.questions, difference.runs) == (50, 4)
    # Runs differ by .4, .2, -.2, 0: sd of a bootstrap mean sqrt(.05 / 4) = .112, so about +- .219.
    assert difference.low == pytest.approx(0.1 - 0.219, abs=0.04)
    assert difference.high == pytest.approx(0.1 + 0.219, abs=0.04)
    single = paired_bootstrap(ours[0], theirs[0], k=10)
    assert single.low == pytest.approx(0.4) and single.high == pytest.approx(0.4)


def test_paired_bootstrap_of_other_measures() -> None:
    a = _records({"p": [1, 0], "q": [1, 0]}, {"p": ["A", "B"], "q": ["A", "B"]})
    b = _records({"p": [0, 0], "q": [1, 1]}, {"p": ["B", "C"], "q": ["A", "A"]})
    assert paired_bootstrap(a, b, k=2).value == 0.0
    assert paired_bootstrap(a, b, k=2, scores=pass_scores).value == 0.5
    assert paired_bootstrap(a, b, k=2, scores=maj_scores).value == 0.0


def test_runs_that_cannot_be_compared_are_refused() -> None:
    a, b = _records({"p": [1], "q": [0]}), _records({"p": [1], "r": [0]})
    with pytest.raises(UserError, match=r"do not share their questions, 2 of them are missing in one .*'q'"):
        paired_bootstrap(a, b, k=1)
    with pytest.raises(UserError, match="do not share their questions, 1 of them"):
        paired_bootstrap([a, a], [a, a[:1]], k=1)
    with pytest.raises(UserError, match="2 runs of a and 1 of b cannot be paired"):
        paired_bootstrap([a, a], [a], k=1)
    with pytest.raises(UserError, match="no records to compare"):
        paired_bootstrap([], a, k=1)


def test_records_that_do_not_make_an_average_are_refused() -> None:
    with pytest.raises(UserError, match="'b' has 1 completions instead of k = 2"):
        summarize(_records({"a": [1, 1], "b": [1]}), k=2)
    with pytest.raises(UserError, match="no records"):
        summarize([], k=2)
    two_runs = _records({"a": [1]}) + _records({"a": [0]})
    with pytest.raises(UserError, match="'a' has two records of one sample"):
        summarize(two_runs, k=2)
    for j in (0, 3):
        with pytest.raises(UserError, match=rf"pass@{j} needs 1 to 2 completions, question 'a' has 2"):
            pass_scores(_records({"a": [1, 0]}), j)
    with pytest.raises(UserError, match="no questions"):
        estimate({})


def test_the_summary_speaks_the_schema_of_the_run_log() -> None:
    values = summarize(_records({"a": [1, 1], "b": [1, 0]}), k=2).as_dict()
    assert {runlog.STEP, runlog.SPLIT, *values} == runlog.EVALUATIONS.keys()
    assert (values["avg_at_k"], values["k"], values["questions"]) == (0.75, 2, 2)
    assert values["avg_at_k_low"] < values["avg_at_k"] < values["avg_at_k_high"]


def test_measures_that_the_grades_do_not_tell_are_left_out() -> None:
    records = _records({"a": [1, 0.5], "b": [0.5, 0]})
    for record in records:
        record["well_formed"] = None
    values = summarize(records, k=2).as_dict()
    assert not [name for name in values if name.startswith(("maj", "well_formed"))]
    assert (values["avg_at_k"], values["pass_at_k"]) == (0.5, 0.5)
    assert summarize(records, k=2, right=0.5).as_dict()["pass_at_k"] == 1.0
    assert not [name for name in summarize(records, k=2, right=None).as_dict() if name.startswith("pass")]
    records[0]["answer"], records[0]["well_formed"] = "x", True
    values = summarize(records, k=2).as_dict()
    assert (values["maj_at_k"], values["well_formed_share"]) == (0.5, 1.0)  # the share of what was judged
