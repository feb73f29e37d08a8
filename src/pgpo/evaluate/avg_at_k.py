"""From graded completions to numbers with error bars.

k completions of one question share its difficulty, so the question, not the completion, is the independent unit.
Each measure is first a score per question, and its interval comes from the spread of these scores. With equally
many completions per question this is the cluster-robust standard error (Miller 2024, Adding Error Bars
to Evals, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt

from pgpo import runlog
from pgpo.errors import UserError

LEVEL = 0.95
Z = NormalDist().inv_cdf((1 + LEVEL) / 2)  # 1.95996
RESAMPLES = 10_000  # ours: an end of the interval then has a standard error of .7 % of its width
RIGHT = 1.0  # SDPO's threshold for a successful attempt: reward >= 1.0


class Record(TypedDict):
    """One graded completion.

    answer: what it votes for, None if it gives none. well_formed: None where the grader does not judge the form.
    """

    question_id: str
    domain: str
    sample: int
    reward: float
    answer: str | None
    well_formed: bool | None
    completion: str


@dataclass(frozen=True)
class Estimate:
    """A mean over questions and its 95 % interval; nan bounds where one question gives no interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean of a minus mean of b over paired questions (and runs), with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
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
    avg_at_k: Estimate
    pass_at_k: Estimate | None
    maj_at_k: Estimate | None
    well_formed_share: float | None

    def as_dict(self) -> dict[str, Any]:
        values: dict[str, Any] = {runlog.K: self.k, runlog.QUESTIONS: self.questions}
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


def summarize(
    records: Sequence[Record], k: int, bootstrap_seed: int | None = None, right: float | None = RIGHT
) -> Summary:
    """avg@k, pass@k and maj@k of records with exactly k completions a question.

    `bootstrap_seed` replaces the normal interval by a percentile bootstrap over questions. `right` is the reward from
    which a completion is right; None if none says so.
    Raises UserError when there are no records, or a question has not k completions.
    """
    questions = len(_by_question(records, k))
    forms = [record["well_formed"] for record in records if record["well_formed"] is not None]
    passed = None if right is None else estimate(pass_scores(records, k, right), bootstrap_seed)
    judged = bool(forms) or any(record["answer"] is not None for record in records)
    voted = None if right is None or not judged else estimate(maj_scores(records, k, right), bootstrap_seed)
    return Summary(
        k=k,
        questions=questions,
        avg_at_k=estimate(avg_scores(records, k), bootstrap_seed),
        pass_at_k=passed,
        maj_at_k=voted,
        well_formed_share=float(np.mean(forms)) if forms else None,
    )


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


def estimate(scores: Mapping[str, float], bootstrap_seed: int | None = None) -> Estimate:
    """Mean of the scores per question with a 95 % interval over questions.

    Normal, mean +- 1.96 * sd / sqrt(questions), or with a seed a percentile bootstrap. Scores within [0, 1]
    have bounds within [0, 1]. Where all scores are 0 or all are 1 both would have no width and claim
    certainty: Wilson's interval for that many questions is given instead. Raises UserError when there are no
    scores.
    """
    if not scores:
        raise UserError("There are no questions to average over; give at least one record.")
    values = np.array(list(scores.values()), dtype=np.float64)
    mean, count = float(values.mean()), len(values)
    if count == 1:
        return Estimate(mean, math.nan, math.nan)
    if np.all(values == 0.0) or np.all(values == 1.0):
        margin = Z**2 / (count + Z**2)
        return Estimate(mean, max(0.0, mean - margin), min(1.0, mean + margin))
    if bootstrap_seed is not None:
        weights = _resample(np.random.default_rng(bootstrap_seed), count, RESAMPLES)
        low, high = _percentiles(weights @ values)
        return Estimate(mean, low, high)
    half = Z * float(values.std(ddof=1)) / math.sqrt(count)
    low, high = mean - half, mean + half
    if values.min() >= 0.0 and values.max() <= 1.0:
        low, high = max(0.0, low), min(1.0, high)
    return Estimate(mean, low, high)


def paired_bootstrap(
    records_a: Sequence[Record] | Sequence[Sequence[Record]],
    records_b: Sequence[Record] | Sequence[Sequence[Record]],
    k: int,
    scores: Scores = avg_scores,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Difference a - b of a measure (`avg_scores`, `pass_scores` or `maj_scores`) on the same questions.

    One record list each: questions are drawn with replacement, a and b together, so that their shared
    difficulty cancels. A list of record lists each, run i of a and run i of b having the same training seed:
    runs are drawn as well, independently of the questions. Crossing the two errs a little to the wide side
    (Owen 2007, The pigeonhole bootstrap, Annals of Applied Statistics 1); drawing from few runs errs to the
    narrow side, so use at least 8. Raises UserError when the runs cannot be paired, or the question sets
    differ.
    """
    runs_a, runs_b = _runs(records_a), _runs(records_b)
    return paired_scores_bootstrap(
        [scores(run, k) for run in runs_a], [scores(run, k) for run in runs_b], seed, resamples
    )


def paired_scores_bootstrap(
    runs_a: Sequence[Mapping[str, float]],
    runs_b: Sequence[Mapping[str, float]],
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """`paired_bootstrap` from scores per question, one mapping per run, as `avg_scores` gives them."""
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
    differences = table[: len(runs_a)] - table[len(runs_a) :]
    rng = np.random.default_rng(seed)
    run_weights = _resample(rng, len(runs_a), resamples)
    question_weights = _resample(rng, len(questions), resamples)
    low, high = _percentiles(np.sum((run_weights @ differences) * question_weights, axis=1))
    return Difference(float(differences.mean()), low, high, len(questions), len(runs_a))


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


def _resample(rng: np.random.Generator, count: int, resamples: int) -> npt.NDArray[np.float64]:
    """Weights [resamples, count] of means over `count` units drawn with replacement."""
    return rng.multinomial(count, np.full(count, 1.0 / count), size=resamples) / count


def _percentiles(means: npt.NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
