from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest

from pgpo import intervals, runlog
from pgpo.errors import UserError
from pgpo.evaluate import (
    Record,
    avg_scores,
    estimate,
    maj_scores,
    paired_difference,
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


T3 = 3.182446  # Student's t, 95 %, 3 degrees of freedom: printed tables


def wilson_ends(mean: float, variance: float, t: float) -> tuple[float, float]:
    """The shares p that lie t standard errors from the mean, each with the standard error that p itself would have.

    (p - mean)^2 = t^2 p (1 - p) / m with the effective number m = mean (1 - mean) / variance.
    """
    m = mean * (1 - mean) / variance
    roots = np.roots([1 + t**2 / m, -2 * mean - t**2 / m, mean**2])
    return float(roots.min()), float(roots.max())


def test_avg_and_its_interval_by_hand() -> None:
    # Question means 1, 1/2, 0, 1/2: mean 1/2, sample variance (1/4 + 0 + 1/4 + 0) / 3 = 1/6, of the mean 1/24.
    summary = summarize(_records({"a": [1, 1], "b": [1, 0], "c": [0, 0], "d": [0, 1]}), k=2)
    assert summary.avg_at_k.value == 0.5
    ends = wilson_ends(0.5, 1 / 24, T3)
    assert (summary.avg_at_k.low, summary.avg_at_k.high) == pytest.approx(ends, abs=1e-6)
    assert summary.pass_at_k.value == 0.75  # a, b and d have a right one
    assert (summary.pass_at_k.low, summary.pass_at_k.high) == pytest.approx(wilson_ends(0.75, 0.25 / 4, T3), abs=1e-6)
    assert summary.well_formed_share == 0.5
    assert (summary.k, summary.questions, summary.stems) == (2, 4, 4)


def test_questions_of_one_stem_are_one_cluster() -> None:
    # Two pairs with the same scores say as much as two questions: means of clusters 1 and 0, variance 1/2, / 2 = 1/4.
    records = _records({"a": [1], "b": [1], "c": [0], "d": [0], "e": [1]})
    for record, stem in zip(records, ("s", "s", "t", "t", "u")):
        record["stem"] = stem
    four = summarize(records[:4], k=1)
    assert (four.questions, four.stems, four.avg_at_k.value) == (4, 2, 0.5)
    assert (four.avg_at_k.low, four.avg_at_k.high) == pytest.approx(wilson_ends(0.5, 0.25, 12.7062), abs=1e-5)
    # Unequal clusters, jackknife by hand: without s 1/3, without t 1, without u 2/4; mean 3/5.
    five = summarize(records, k=1).avg_at_k
    variance = 2 / 3 * ((1 / 3 - 0.6) ** 2 + (1 - 0.6) ** 2 + (0.5 - 0.6) ** 2)
    assert (five.low, five.high) == pytest.approx(wilson_ends(0.6, variance, 4.302653), abs=1e-6)
    alone = summarize(records[:2], k=1)
    assert alone.stems == 1 and math.isnan(alone.avg_at_k.low)
    without = [{**record, "stem": ""} for record in records]
    assert summarize(without, k=1).stems == 5  # an empty stem is none
    paired = paired_difference(records, _records({q: [0] for q in "abcde"}), k=1)
    assert paired.high - paired.value == pytest.approx(4.302653 * math.sqrt(variance), abs=1e-6)


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
    # Wilson with n questions all alike: the other end lies t^2 / (n + t^2) away; t = 2.093024 for 19 degrees.
    margin = 2.093024**2 / (20 + 2.093024**2)
    right, wrong = estimate({str(i): 1.0 for i in range(20)}), estimate({str(i): 0.0 for i in range(20)})
    assert (right.value, right.high) == (1.0, 1.0) and right.low == pytest.approx(1 - margin, abs=1e-6)
    assert (wrong.value, wrong.low) == (0.0, 0.0) and wrong.high == pytest.approx(margin, abs=1e-6)
    half = estimate({str(i): 0.5 for i in range(20)})  # no spread between questions, not no uncertainty
    assert half.low < 0.3 and half.high > 0.7


def test_bounds_stay_within_the_scale_and_one_question_has_none() -> None:
    few = estimate({"a": 1.0, "b": 1.0, "c": 0.0})
    assert few.high < 1.0 and 0.0 < few.low < few.value
    wide = estimate({"a": 3.0, "b": -1.0})  # not shares: mean +- t se; sd 2.828427, so se 2, t = 12.7062
    assert (wide.low, wide.high) == pytest.approx((1 - 25.4124, 1 + 25.4124), abs=1e-4)
    one = estimate({"a": 0.5})
    assert one.value == 0.5 and math.isnan(one.low) and math.isnan(one.high)


def _simulated_coverage(seed: int, p: float, questions: int) -> tuple[float, float, float]:
    """Coverage of our interval, of the normal one, and of one that takes completions as independent.

    600 data sets with 16 completions a question; the chance of a right one is Beta with mean p and a + b = 1.
    """
    rng = np.random.default_rng(seed)
    ours = normal = naive = 0
    for _ in range(600):
        rewards = rng.binomial(16, rng.beta(p, 1 - p, size=questions)) / 16
        interval = estimate({str(i): value for i, value in enumerate(rewards)})
        ours += interval.low <= p <= interval.high
        normal += abs(rewards.mean() - p) <= 1.959964 * rewards.std(ddof=1) / np.sqrt(questions)
        naive += abs(rewards.mean() - p) <= 1.959964 * np.sqrt(p * (1 - p) / (16 * questions))
    return ours / 600, normal / 600, naive / 600


def test_the_interval_covers_the_truth_as_often_as_it_says_and_the_others_do_not() -> None:
    """The standard error of a coverage is .009; benchmarks/interval_coverage.py has more cells."""
    middle = _simulated_coverage(seed=0, p=0.5, questions=60)
    assert 0.92 <= middle[0] <= 0.98 and middle[2] < 0.75
    edge = _simulated_coverage(seed=1, p=0.93, questions=50)
    assert 0.92 <= edge[0] <= 0.98 and edge[1] < 0.92


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
    difference = paired_difference(a, b, k=2)
    assert difference.value == pytest.approx((1 + 0 - 0.5) / 3)
    # Of 1, 0, -1/2 the variance is 7/12, of their mean 7/36; t = 4.302653 for 2 degrees, 1.060660 with 20 % above it.
    half = 4.302653 * math.sqrt(7 / 36)
    assert (difference.low, difference.high) == pytest.approx((1 / 6 - half, 1 / 6 + half), abs=1e-6)
    assert difference.detectable == pytest.approx((4.302653 + 1.060660) * math.sqrt(7 / 36), abs=1e-6)
    assert (difference.questions, difference.runs) == (3, 1)
    swapped = paired_difference(b, a, k=2)
    assert (swapped.low, swapped.high) == pytest.approx((-difference.high, -difference.low))


def test_pairing_removes_the_difficulty_that_both_share() -> None:
    a, b = _simulated_pair(np.random.default_rng(0), gain=0.1)
    paired = paired_difference(a, b, k=8)
    unpaired = math.hypot(*(est.high - est.low for est in (summarize(a, 8).avg_at_k, summarize(b, 8).avg_at_k)))
    # Within-question variance only: sqrt(2 * .2 / 8) against sqrt(2 * (.04 + .2 / 8)) for the unpaired, a ratio of .62.
    assert 0.5 < (paired.high - paired.low) / unpaired < 0.75
    assert paired.low > 0.0


def test_paired_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        interval = paired_difference(*_simulated_pair(rng, gain=0.1, questions=40, k=4), k=4)
        covered += interval.low <= 0.1 <= interval.high
    assert 0.90 <= covered / 200 <= 0.985


def test_the_spread_between_runs_enters_when_several_runs_are_given() -> None:
    # Every question has the same difference within a run, runs differ: no draw of questions can show that spread.
    def run(right: int) -> list[Record]:
        return _records({f"q{i}": [1.0] * right + [0.0] * (10 - right) for i in range(50)})

    ours, theirs = [run(9), run(7), run(3), run(5)], [run(5)] * 4
    difference = paired_difference(ours, theirs, k=10)
    assert difference.value == pytest.approx(0.1)
    assert (difference.questions, difference.runs) == (50, 4)
    # Runs differ by .4, .2, -.2, 0: variance of their mean (.2 / 3) / 4 = 1/60, three degrees of freedom.
    half = T3 * math.sqrt(1 / 60)
    assert (difference.low, difference.high) == pytest.approx((0.1 - half, 0.1 + half), abs=1e-5)
    single = paired_difference(ours[0], theirs[0], k=10)
    assert single.low == pytest.approx(0.4) and single.high == pytest.approx(0.4)
    same = paired_difference(theirs[0], theirs[0], k=10)  # no difference anywhere is not no uncertainty
    margin = 2.009575**2 / (50 + 2.009575**2)
    assert (same.value, same.high) == pytest.approx((0.0, margin), abs=1e-6)


def test_runs_and_questions_are_crossed() -> None:
    """Against the textbook's mean squares: EMS of a two-way layout without replication, all effects random."""
    rng = np.random.default_rng(4)
    runs, questions = 5, 12
    table = rng.normal(0, 0.2, (runs, 1)) + rng.normal(0, 0.3, questions) + rng.normal(0, 0.1, (runs, questions))
    found = intervals.paired_difference(table)
    mean = table.mean()
    square_runs = questions * sum((row.mean() - mean) ** 2 for row in table) / (runs - 1)
    square_questions = runs * sum((column.mean() - mean) ** 2 for column in table.T) / (questions - 1)
    rest = sum(
        (table[r, q] - table[r].mean() - table[:, q].mean() + mean) ** 2
        for r, q in itertools.product(range(runs), range(questions))
    ) / ((runs - 1) * (questions - 1))
    total = square_runs + square_questions - rest
    terms = (square_runs, runs - 1), (square_questions, questions - 1), (rest, (runs - 1) * (questions - 1))
    freedom = total**2 / sum(square**2 / degrees for square, degrees in terms)
    half = intervals.student_t(int(freedom)) * math.sqrt(total / (runs * questions))
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=1e-12)


def test_the_detectable_effect_is_found_four_times_of_five() -> None:
    rng = np.random.default_rng(7)
    noise = rng.normal(0, 0.3, (4000, 1, 25))
    # The expected one, for its own standard error is that of one sample: (2.0639 + .8569) * .3 / 5.
    effect = (2.0639 + 0.8569) * 0.3 / 5
    single = intervals.paired_difference(noise[0])
    assert single.detectable / (single.high - single.value) == pytest.approx((2.0639 + 0.8569) / 2.0639, abs=1e-4)
    found = np.mean([intervals.paired_difference(sample + effect).low > 0 for sample in noise[:1500]])
    assert 0.76 <= found <= 0.84


@pytest.mark.parametrize(("units", "power"), [(4, 0.65), (8, 0.72), (16, 0.76)])
def test_a_printed_effect_is_found_less_often_where_units_are_few(units: int, power: float) -> None:
    """Its standard error is another sample's. The three are from 400,000 draws."""
    rng = np.random.default_rng(8)
    printed, own = rng.normal(0, 0.1, (2, 5000, 1, units))
    pairs = zip(printed, own, strict=True)
    found = [
        intervals.paired_difference(x + intervals.paired_difference(other).detectable).low > 0 for other, x in pairs
    ]
    assert np.mean(found) == pytest.approx(power, abs=0.02)  # its own deviation is .007


def test_paired_difference_of_other_measures() -> None:
    a = _records({"p": [1, 0], "q": [1, 0]}, {"p": ["A", "B"], "q": ["A", "B"]})
    b = _records({"p": [0, 0], "q": [1, 1]}, {"p": ["B", "C"], "q": ["A", "A"]})
    assert paired_difference(a, b, k=2).value == 0.0
    assert paired_difference(a, b, k=2, scores=pass_scores).value == 0.5
    assert paired_difference(a, b, k=2, scores=maj_scores).value == 0.0


def test_runs_that_cannot_be_compared_are_refused() -> None:
    a, b = _records({"p": [1], "q": [0]}), _records({"p": [1], "r": [0]})
    with pytest.raises(UserError, match=r"do not share their questions, 2 of them are missing in one .*'q'"):
        paired_difference(a, b, k=1)
    with pytest.raises(UserError, match="do not share their questions, 1 of them"):
        paired_difference([a, a], [a, a[:1]], k=1)
    with pytest.raises(UserError, match="2 runs of a and 1 of b cannot be paired"):
        paired_difference([a, a], [a], k=1)
    with pytest.raises(UserError, match="no records to compare"):
        paired_difference([], a, k=1)


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
