"""What `pgpo probe` concludes from its numbers: two tables of rules, and the thresholds that they name.

VERDICTS   the first that holds is the verdict: one sentence with its reason
ADVICE     each that holds adds flags of `pgpo train`
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pgpo.evaluate.avg_at_k import Estimate, paired_scores
from pgpo.evaluate.probe import Reading

# Ours: hinted samples below which a step has no batch to learn from: 3 of the lab's 64.
FEW = 0.05
# Ours: SDPO's best constant rate ends at .90 in the lab and .95 on a pretrained model of 135 million (docs/LOG.md).
SOLVED = 0.95
# Ours: of the completions that would give another answer, most follow a wrong hint. .7 of them with the lab's bases,
# which copy by construction, .5 with SmolLM2-135M.
COPIED = 0.5
# Ours: most of what a right sibling gains, another question's solution gains too.
CONTEXT = 0.5
# Ours: share of answers cut at the length limit from which raising it is advised, and from which it is the reason.
CLIPPED, MOSTLY_CLIPPED = 0.1, 0.5
# Ours: a gain whose interval reaches this far to either side cannot be told from none or from a good one.
UNSURE = 0.1


@dataclass(frozen=True)
class Situation:
    """What the rules see: the reading at the advised temperature and the flags of the run.

    Attributes:
        given: the run's own temperature, the first that was probed.
        max_completion_length: of the run, tokens.
    """

    reading: Reading
    given: float
    max_completion_length: int

    @property
    def gain(self) -> Estimate:
        """Of the self-teacher reading what the run's teacher reads."""
        return self.gain_of(self.reading.taught)

    @property
    def hinted_share(self) -> float:
        hint = self.reading.hints.get(self.reading.taught)
        return 0.0 if hint is None else hint.hinted_share

    def gain_of(self, kind: str) -> Estimate:
        """Of the self-teacher reading this kind of hint; 0 where no question has one."""
        hint = self.reading.hints.get(kind)
        return Estimate(0.0, 0.0, 0.0) if hint is None or hint.gain is None else hint.gain

    @property
    def copied(self) -> tuple[float, float]:
        """Share of completions that follow a wrong hint, and that give its answer without it."""
        hint = self.reading.hints.get("wrong")
        if hint is None or hint.followed is None or hint.unprompted is None:
            return 0.0, 0.0
        return hint.followed.value, hint.unprompted.value

    @property
    def copies(self) -> bool:
        followed, unprompted = self.copied
        return followed - unprompted >= COPIED * (1 - unprompted) and followed > 0

    @property
    def few(self) -> bool:
        return self.hinted_share < FEW

    def facts(self) -> dict[str, Any]:
        """What the sentences name."""
        r = self.reading
        placebo, hint = r.hints.get("placebo"), r.hints.get(r.taught)
        return {
            "n": r.completions,
            "right": r.right,
            "formed": r.well_formed,
            "clipped": round(r.clipped * r.completions),
            "length": self.max_completion_length,
            "temperature": f"{r.temperature:g}",
            "hinted": percent(self.hinted_share),
            "pass": share(r.pass_at_1),
            "reads": _READS[r.taught],
            "teacher": share(hint.success if hint else None),
            "student": share(hint.student if hint else None),
            "gain": interval(hint.gain if hint else None),
            "placebo": share(placebo.success if placebo else None),
            "placebo_student": share(placebo.student if placebo else None),
            "copied": percent(self.copied[0]),
            "unprompted": percent(self.copied[1]),
            "questions": r.questions,
            "mixed": percent(r.mixed),
        }


@dataclass(frozen=True)
class Rule:
    """A row of VERDICTS or ADVICE.

    Attributes:
        worth: whether the run is worth its hours.
        sentence: the reason; {names} are those of `Situation.facts`.
        flags: of `pgpo train`, with the same names.
    """

    name: str
    holds: Callable[[Situation], bool]
    sentence: str
    worth: bool = False
    flags: str = ""


@dataclass(frozen=True)
class Verdict:
    """The conclusion.

    Attributes:
        name: of the rule in VERDICTS.
        sentence: the verdict, and why.
        flags: to add to the run's own.
        reasons: why, one for each group of flags from ADVICE.
    """

    name: str
    worth: bool
    sentence: str
    temperature: float
    flags: list[str]
    reasons: list[str]


# What stands in the teacher's prompt.
_READS = {
    "right": "with a right sibling's answer in its prompt",
    "feedback": "with a remark on the attempt in its prompt",
}
_TEACHER = (
    "temperature {temperature} gives a teacher that is right in {teacher} where the student is right in {student}"
)

VERDICTS = (
    Rule(
        "cut",
        lambda s: s.few and s.reading.clipped >= MOSTLY_CLIPPED,
        "nothing to distil: {clipped} of {n} answers are cut at {length} tokens, before they end.",
    ),
    Rule(
        "no format",
        lambda s: s.few and s.reading.well_formed is not None and s.reading.well_formed < FEW * s.reading.completions,
        "nothing to distil: {formed} of {n} answers have the asked format; teach it the format first, or ask for "
        "another.",
    ),
    Rule(
        "no success",
        lambda s: s.few,
        "nothing to distil: {right} of {n} answers are right, so that {hinted} of the samples would have a teacher; "
        "take easier questions or a stronger model.",
    ),
    Rule(
        "solved",
        lambda s: s.reading.pass_at_1.value >= SOLVED,
        "little to distil: the student is right in {pass} already; take harder questions.",
    ),
    Rule(
        "unsure",
        lambda s: s.gain.low <= 0 < UNSURE < s.gain.high or math.isnan(s.gain.low),
        "{questions} questions cannot tell: {reads} the teacher is right in "
        "{teacher} where the student is right in {student} (difference {gain}); give more --questions.",
    ),
    Rule(
        "no help",
        lambda s: s.gain.low <= 0,
        "nothing to distil: {reads} the teacher is right in {teacher} where the student is right in {student}.",
    ),
    Rule(
        "context",
        lambda s: s.reading.taught == "right" and s.gain_of("placebo").value >= CONTEXT * s.gain.value,
        "the context helps, not the hint: the teacher is right in {teacher} with a right sibling's answer in its "
        "prompt (student {student}) and in {placebo} with that to another question (student {placebo_student}).",
    ),
    Rule(
        "copies",
        lambda s: s.reading.taught == "right" and s.copies,
        _TEACHER + ", but the teacher copies: a wrong hint is followed in {copied} (its answer is given in "
        "{unprompted} without it), so that what the verifier passes by mistake is taught as well.",
        worth=True,
    ),
    Rule("worth it", lambda s: True, _TEACHER + ".", worth=True),
)

ADVICE = (
    Rule(
        "temperature",
        lambda s: s.reading.temperature != s.given,
        "the teacher of an average sample is further ahead at temperature {temperature}",
        flags="--temperature {temperature}",
    ),
    Rule(
        "length",
        lambda s: s.reading.clipped >= CLIPPED,
        "{clipped} of {n} answers are cut at {length} tokens",
        flags="--max_completion_length {twice_the_length}",
    ),
    Rule(
        "grpo",
        lambda s: not s.few and s.reading.mixed >= FEW and named(s) in ("no help", "context"),
        "the hint does not help, but {mixed} of the questions have right and wrong answers, which GRPO compares",
        flags="--objective grpo",
    ),
    Rule(
        "group",
        lambda s: s.reading.right > 0 and s.reading.lone_success + s.reading.all_wrong >= 0.5,
        "half of the questions have no right sibling to show or a lone one",
        flags="--num_generations {twice_the_group}",
    ),
)


def named(situation: Situation) -> str:
    """The name of the verdict."""
    return next(rule for rule in VERDICTS if rule.holds(situation)).name


def judge(readings: Sequence[Reading], gains: Sequence[Mapping[str, float]], max_completion_length: int) -> Verdict:
    """The verdict at the best temperature.

    Args:
        readings: one per temperature, that of the run first.
        gains: `probe.gains` of each. Another temperature than the run's is advised where its gain is the largest, and
            larger than that of the run's by more than noise (95 % interval, paired by question).
    """
    best = max(range(len(readings)), key=lambda i: readings[i].gain.value)
    if best and paired_scores([gains[best]], [gains[0]]).low <= 0:
        best = 0
    situation = Situation(readings[best], readings[0].temperature, max_completion_length)
    facts = situation.facts() | {
        "twice_the_length": 2 * max_completion_length,
        "twice_the_group": 2 * readings[best].group,
    }
    verdict = next(rule for rule in VERDICTS if rule.holds(situation))
    advice = [rule for rule in ADVICE if rule.holds(situation)]
    return Verdict(
        name=verdict.name,
        worth=verdict.worth,
        sentence=verdict.sentence.format(**facts),
        temperature=readings[best].temperature,
        flags=[word for rule in advice for word in rule.flags.format(**facts).split()],
        reasons=[f"{rule.flags}: {rule.sentence}.".format(**facts) for rule in advice],
    )


def conclusion(verdict: Verdict) -> list[str]:
    """The verdict and the flags."""
    flags = " ".join(verdict.flags) or "none beside those given"
    return [*verdict.reasons, f"flags: {flags}", f"verdict: {verdict.sentence}"]


def share(estimate: Estimate | None) -> str:
    """.79"""
    return "-" if estimate is None else f"{estimate.value:.2f}".removeprefix("0")


def percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def interval(estimate: Estimate | None) -> str:
    """[-.02, .31]"""
    if estimate is None:
        return "unknown"
    low, high = (f"{bound:.2f}".replace("0.", ".", 1) for bound in (estimate.low, estimate.high))
    return f"{low} to {high}"
