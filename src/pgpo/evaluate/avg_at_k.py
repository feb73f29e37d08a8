"""From graded completions to numbers with error bars.

k completions of one question share its difficulty, so the question, not the completion, is the independent unit;
where questions share a stem, the stem is. Each measure is first a score per question, and its interval comes from
the spread of these scores, the cluster-robust standard error of Miller 2024 (Adding Error Bars to Evals, arXiv
2411.00640). How the interval is made of it, and what it covers: `pgpo.intervals`, docs/EVALUATION.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np

from pgpo import intervals, runlog
from pgpo.errors import UserError

RIGHT = 1.0  # SDPO's threshold for a successful attempt: reward >= 1.0


class _Record(TypedDict):
    question_id: str
    domain: str
    sample: int
    reward: float
    answer: str | None
    well_formed: bool | None
    completion: str


class Record(_Record, total=False):
    """One graded completion.

    answer: what it votes for, None if it gives none. well_formed: None where the grader does not judge the form.
    stem: what its question shares with others, which then are no independent questions; may be missing.
    """

    stem: str


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval; nan bounds where one question, or one stem, gives no interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b over paired questions (and runs), with its 95 % interval.

    detectable: the minimum detectable effect, the true difference that would be told from 0 in 80 % of the cases.
    """

    value: float
    low: float
    high: float
    detectable: float
    questions: int
    runs: int


@dataclass(frozen=True)
class Summary:
    """What one evaluation says. `as_dict` has the names of `runlog.EVALUATIONS`.

    None is what the grades do not tell, and no entry of `as_dict`: pass@k and maj@k where nothing says which
    completions are right, the share where none judges the form, and then maj@k too if none holds an answer.
    """

    k: int
    questions: int
    stems: int
    avg_at_k: Estimate
    pass_at_k: Estimate | None
    maj_at_k: Estimate | None
    well_formed_share: float | None

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {runlog.K: self.k, runlog.QUESTIONS: self.questions, runlog.STEMS: self.stems}
        measures = {
            runlog.AVG_AT_K: self.avg_at_k,
            runlog.PASS_AT_K: self.pass_at_k,
            runlog.MAJ_AT_K: self.maj_at_k,
        }
        for name, measure in measures.items():
            if measure is not None:
                values |= {name: measure.value, name + runlog.LOW: measure.low, name + runlog.HIGH: measure.high}
        return values if self.well_formed_share is None else values | {runlog.WELL_FORMED_SHARE: self.well_formed_share}


Scores = Callable[[Sequence[Record], int], dict[str, float]]


def summarize(records: Sequence[Record], k: int, right: float | None = RIGHT) -> Summary:
    """avg@k, pass@k and maj@k of records with exactly k completions a question.

    `right` is the reward from which a completion is right; None if none says so.
    Raises UserError when there are no records, or a question has not k completions.
    """
    questions = len(_by_question(records, k))
    stems = stems_of(records)
    forms = [record["well_formed"] for record in records if record["well_formed"] is not None]
    passed = None if right is None else estimate(pass_scores(records, k, right), stems)
    judged = bool(forms) or any(record["answer"] is not None for record in records)
    voted = None if right is None or not judged else estimate(maj_scores(records, k, right), stems)
    return Summary(
        k=k,
        questions=questions,
        stems=len(set(stems.values())),
        avg_at_k=estimate(avg_scores(records, k), stems),
        pass_at_k=passed,
        maj_at_k=voted,
        well_formed_share=float(np.mean(forms)) if forms else None,
    )


def stems_of(records: Sequence[Record]) -> dict[str, str]:
    """The stem of each question, by default the question itself."""
    return {record["question_id"]: record.get("stem") or record["question_id"] for record in records}


def avg_scores(records: Sequence[Record], k: int) -> dict[str, float]:
    """Mean reward of each question's k completions. Raises UserError unless each question has k."""
    return {
        question: math.fsum(record["reward"] for record in group) / k
        for question, group in _by_question(records, k).items()
    }


def pass_scores(records: Sequence[Record], j: int, right: float = RIGHT) -> dict[str, float]:
    """Chance that at least one of j completions is right (reward >= `right`), from the n >= j of each question.

    1 - C(n-c, j) / C(n, j) for c right ones: unbiased (Chen et al. 2021, arXiv 2107.03374, Eq. 1), as a
    product of ratios because the binomials overflow. Raises UserError when a question has fewer than j
    completions.
    """
    scores = {}
    for question, group in _by_question(records).items():
        n, c = len(group), sum(record["reward"] >= right for record in group)
        if not 1 <= j <= n:
            raise UserError(f"pass@{j} needs 1 to {n} completions, question {question!r} has {n}; lower j or raise k.")
        none_right = math.prod(1.0 - j / i for i in range(n - c + 1, n + 1)) if n - c >= j else 0.0
        scores[question] = 1.0 - none_right
    return scores


def maj_scores(records: Sequence[Record], k: int, right: float = RIGHT) -> dict[str, float]:
    """Whether the most frequent answer of each question's k completions is right, 0 or 1.

    Tied answers give the share of them that is right, the expectation of drawing one of them. A completion
    without an answer does not vote; no votes give 0. An answer is right if any completion that gives it was
    graded right (reward >= `right`). Raises UserError unless each question has k completions.
    """
    scores = {}
    for question, group in _by_question(records, k).items():
        votes: dict[str, int] = defaultdict(int)
        solved: dict[str, bool] = defaultdict(bool)
        for record in group:
            if record["answer"] is not None:
                votes[record["answer"]] += 1
                solved[record["answer"]] |= record["reward"] >= right
        tied = [answer for answer, count in votes.items() if count == max(votes.values())]
        scores[question] = sum(solved[answer] for answer in tied) / len(tied) if tied else 0.0
    return scores


def estimate(scores: Mapping[str, float], stems: Mapping[str, str] | None = None) -> Estimate:
    """Mean of the scores per question with its 95 % interval (`pgpo.intervals.mean_interval`).

    `stems`: question -> what it shares with others; questions of one stem count as one cluster. Scores within
    [0, 1] have bounds within [0, 1]. Raises UserError when there are no scores.
    """
    if not scores:
        raise UserError("There are no questions to average over; give at least one record.")
    values = np.array(list(scores.values()), dtype=np.float64)
    low, high = intervals.mean_interval(values, None if stems is None else [stems[question] for question in scores])
    return Estimate(float(values.mean()), low, high)


def paired_difference(
    records_a: Sequence[Record] | Sequence[Sequence[Record]],
    records_b: Sequence[Record] | Sequence[Sequence[Record]],
    k: int,
    scores: Scores = avg_scores,
) -> Difference:
    """Difference a - b of a measure (`avg_scores`, `pass_scores` or `maj_scores`) on the same questions.

    One record list each: questions are paired, so that their shared difficulty cancels; the noise of training seeds
    is not in the interval. A list of record lists each, run i of a and run i of b having the same training seed: the
    spread between runs is in it too (`pgpo.intervals.paired_difference`), however few they are. Raises UserError when
    the runs cannot be paired, or the question sets differ.
    """
    runs_a, runs_b = _runs(records_a), _runs(records_b)
    stems = stems_of(runs_a[0])
    return paired_scores([scores(run, k) for run in runs_a], [scores(run, k) for run in runs_b], stems)


def paired_scores(
    runs_a: Sequence[Mapping[str, float]],
    runs_b: Sequence[Mapping[str, float]],
    stems: Mapping[str, str] | None = None,
) -> Difference:
    """`paired_difference` from scores per question, one mapping per run, as `avg_scores` gives them."""
    if not runs_a or len(runs_a) != len(runs_b):
        raise UserError(
            f"{len(runs_a)} runs of a and {len(runs_b)} of b cannot be paired; give one run of each per seed."
        )
    scored = [*runs_a, *runs_b]
    questions = list(scored[0])
    for other in scored[1:]:
        odd = sorted(set(questions) ^ set(other))
        if odd:
            raise UserError(
                f"The runs do not share their questions, {len(odd)} of them are missing in one (such as {odd[0]!r});"
                " evaluate all runs on the same rows."
            )
    table = np.array([[run[question] for question in questions] for run in scored], dtype=np.float64)
    clusters = None if stems is None else [stems[question] for question in questions]
    found = intervals.paired_difference(table[: len(runs_a)] - table[len(runs_a) :], clusters)
    return Difference(found.value, found.low, found.high, found.detectable, len(questions), len(runs_a))


def _by_question(records: Sequence[Record], k: int | None = None) -> dict[str, list[Record]]:
    if not records:
        raise UserError("There are no records; evaluate at least one question.")
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["question_id"]].append(record)
    for question, group in groups.items():
        if len({record["sample"] for record in group}) != len(group):
            raise UserError(f"Question {question!r} has two records of one sample; pass the records of one run only.")
        if k is not None and len(group) != k:
            raise UserError(
                f"Question {question!r} has {len(group)} completions instead of k = {k}; evaluate it with k = {k}."
            )
    return groups


def _runs(records: Sequence[Record] | Sequence[Sequence[Record]]) -> list[Sequence[Record]]:
    if not records:
        raise UserError("There are no records to compare; give at least one run on each side.")
    if isinstance(records[0], Mapping):
        return [records]  # type: ignore[list-item]
    return list(records)  # type: ignore[arg-type]
