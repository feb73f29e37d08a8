"""The numbers of `pgpo probe`: lines of questions in, what the model and its self-teacher can do out. No tensors.

A line holds what was seen of one question at one temperature (`Line`). Hints of four kinds are tried:

    right      a right sibling's completion, as in training
    wrong      a wrong sibling's completion in its place: whether the teacher copies
    placebo    a right completion of another question: whether the hint informs, or the context
    feedback   the grader's remark on the sample's own wrong attempt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import TypedDict

from pgpo.evaluate.avg_at_k import Estimate, estimate
from pgpo.intervals import student_t

KINDS = ("right", "wrong", "placebo", "feedback")


class Group(TypedDict):
    """Completions of one prompt, one entry each.

    answer: what a completion votes for, None if it gives none. well_formed: None where the grader does not judge it.
    tokens: its length. clipped: cut at the length limit.
    """

    right: list[bool]
    answer: list[str | None]
    well_formed: list[bool | None]
    tokens: list[int]
    clipped: list[bool]
    completion: list[str]


class Hinted(TypedDict):
    """Completions of a prompt with a hint. shown: the answer that the hint gives, None if the grader reads none."""

    shown: str | None
    completions: Group


class Signal(TypedDict):
    """Sums over the samples of one question that have a teacher with this kind of hint.

    student_entropy, teacher_entropy: of each sample's mean over its tokens, nats. divergence: over all tokens, nats.
    samples: of the question, with a hint or without.
    """

    samples: int
    hinted: int
    student_entropy: float
    teacher_entropy: float
    divergence: float
    tokens: int


class Line(TypedDict):
    """One question at one temperature; a kind of hint that it has not is left out of `hinted`."""

    temperature: float
    question_id: str
    domain: str
    student: Group
    hinted: dict[str, Hinted]
    signals: dict[str, Signal]


@dataclass(frozen=True)
class HintReading:
    """What one kind of hint does.

    Attributes:
        questions: that have such a hint.
        success: share of right completions of the self-teacher reading it.
        student: the student's on the same questions.
        gain: the difference of the two.
        followed: share of hinted completions that give the hint's own answer; None where nothing is read.
        unprompted: share of the student's completions that give that answer without the hint.
        hinted_share: share of all samples that have such a hint in training.
        information: I_k of a batch with these hints, nats.
        student_entropy, teacher_entropy: means over the hinted samples, nats per token.
        divergence: mean per token of the hinted samples, nats.
    """

    questions: int
    success: Estimate | None
    student: Estimate | None
    gain: Estimate | None
    followed: Estimate | None
    unprompted: Estimate | None
    hinted_share: float
    information: Estimate
    student_entropy: float | None
    teacher_entropy: float | None
    divergence: float | None


@dataclass(frozen=True)
class Reading:
    """What the model and its self-teacher can do at one temperature.

    Attributes:
        completions, right, well_formed: of the student, in numbers; well_formed None where the grader judges no form.
        pass_at_1, pass_at_k: k = `group`, the completions per question.
        clipped: share of the student's completions that were cut at the length limit.
        all_right, all_wrong, lone_success, mixed: shares of the questions; mixed have right and wrong completions,
            and lone successes are among them.
        groups: number of questions by their right completions, 0 to `group`.
        taught: the kind of hint that the run's teacher reads, "right" or "feedback".
        gain: mean over questions of hinted share * (success reading such a hint - success without), 0 without a hint
            (ours: how much better than the student the teacher of an average sample is).
        rho: multiplier of a step with this I_k.
        worth: ids of the mixed questions.
        domains: {domain: (questions, pass@1, share of mixed questions)}.
    """

    temperature: float
    questions: int
    group: int
    completions: int
    right: int
    well_formed: int | None
    pass_at_1: Estimate
    pass_at_k: Estimate
    clipped: float
    all_right: float
    all_wrong: float
    lone_success: float
    mixed: float
    groups: list[int]
    taught: str
    gain: Estimate
    rho: float
    worth: list[str]
    domains: dict[str, tuple[int, float, float]]
    hints: dict[str, HintReading]


def read(
    lines: Sequence[Line], law: Callable[[float], float], denominator: str = "all", taught: str = "right"
) -> Reading:
    """The numbers of one temperature.

    Args:
        lines: one per question.
        law: I_k in nats -> rho.
        denominator: of I_k, "all" samples or the "hinted" ones, as in training.
        taught: the kind of hint that the run's teacher reads.
    """
    right = {line["question_id"]: line["student"]["right"] for line in lines}
    share = {question: _mean(flags) for question, flags in right.items()}
    mixed = [question for question, value in share.items() if 0 < value < 1]
    forms = [form for line in lines for form in line["student"]["well_formed"] if form is not None]
    clipped = [cut for line in lines for cut in line["student"]["clipped"]]
    hints = {kind: _hint(lines, kind, denominator) for kind in KINDS if any(kind in line["signals"] for line in lines)}
    group = max(map(len, right.values()))
    domains = {line["domain"]: [m["question_id"] for m in lines if m["domain"] == line["domain"]] for line in lines}
    information = hints[taught].information.value if taught in hints else 0.0
    return Reading(
        temperature=lines[0]["temperature"],
        questions=len(lines),
        group=group,
        completions=sum(map(len, right.values())),
        right=sum(map(sum, right.values())),
        well_formed=sum(forms) if forms else None,
        pass_at_1=estimate(share),
        pass_at_k=estimate({question: float(any(flags)) for question, flags in right.items()}),
        clipped=_mean(clipped),
        all_right=_mean([value == 1 for value in share.values()]),
        all_wrong=_mean([value == 0 for value in share.values()]),
        lone_success=_mean([sum(flags) == 1 for flags in right.values()]),
        mixed=len(mixed) / len(lines),
        groups=[sum(sum(flags) == n for flags in right.values()) for n in range(group + 1)],
        taught=taught,
        gain=_signed(gains(lines, taught)),
        rho=law(information),
        worth=mixed,
        domains={
            name: (len(ids), _mean([share[i] for i in ids]), _mean([0 < share[i] < 1 for i in ids]))
            for name, ids in domains.items()
        },
        hints=hints,
    )


def gains(lines: Sequence[Line], taught: str = "right") -> dict[str, float]:
    """Question -> its part of `Reading.gain`."""
    found = {}
    for line in lines:
        hinted, signal = line["hinted"].get(taught), line["signals"].get(taught)
        found[line["question_id"]] = 0.0
        if hinted is not None and signal is not None:
            better = _mean(hinted["completions"]["right"]) - _mean(line["student"]["right"])
            found[line["question_id"]] = signal["hinted"] / signal["samples"] * better
    return found


def _hint(lines: Sequence[Line], kind: str, denominator: str) -> HintReading:
    signals = {line["question_id"]: line["signals"][kind] for line in lines if kind in line["signals"]}
    found = [(line, line["hinted"][kind]) for line in lines if kind in line["hinted"]]
    success = {line["question_id"]: _mean(hinted["completions"]["right"]) for line, hinted in found}
    student = {line["question_id"]: _mean(line["student"]["right"]) for line, _ in found}
    told = [(line, hinted, hinted["shown"]) for line, hinted in found if hinted["shown"] is not None]
    followed = {line["question_id"]: _share(hinted["completions"]["answer"], shown) for line, hinted, shown in told}
    unprompted = {line["question_id"]: _share(line["student"]["answer"], shown) for line, _, shown in told}
    samples, hinted_samples = (sum(s[name] for s in signals.values()) for name in ("samples", "hinted"))
    tokens = sum(signal["tokens"] for signal in signals.values())

    def per_sample(name: str) -> float | None:
        total = sum(signal[name] for signal in signals.values())  # type: ignore[literal-required]
        return total / hinted_samples if hinted_samples else None

    # Each question has as many samples: the mean over questions is I_k, and its interval is by question.
    divisor = (hinted_samples if denominator == "hinted" and hinted_samples else samples) / len(signals)
    gaps = {question: s["student_entropy"] - s["teacher_entropy"] for question, s in signals.items()}
    return HintReading(
        questions=len(found),
        success=estimate(success) if success else None,
        student=estimate(student) if success else None,
        gain=_signed({q: success[q] - student[q] for q in success}) if success else None,
        followed=estimate(followed) if followed else None,
        unprompted=estimate(unprompted) if followed else None,
        hinted_share=hinted_samples / samples,
        information=_signed({question: gap / divisor for question, gap in gaps.items()}),
        student_entropy=per_sample("student_entropy"),
        teacher_entropy=per_sample("teacher_entropy"),
        divergence=sum(s["divergence"] for s in signals.values()) / tokens if tokens else None,
    )


def _share(answers: Sequence[str | None], shown: str | None) -> float:
    return _mean([answer == shown for answer in answers])


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def _signed(scores: Mapping[str, float]) -> Estimate:
    """`estimate` of what is no share: zeros alone are no rare successes."""
    values = list(scores.values())
    error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    mean, half = fmean(values), student_t(max(1, len(values) - 1)) * error
    return Estimate(mean, mean - half, mean + half)


# The table ------------------------------------------------------------------------------------------------------------

_HEADINGS = ("hint", "questions", "right", "student there", "follows it", "without it", "I", "H_S", "H_T", "D")


def table(reading: Reading) -> list[str]:
    """The lines about one temperature."""
    r, form = (
        reading,
        "" if reading.well_formed is None else f"  well-formed {reading.well_formed}/{reading.completions}",
    )
    hinted = r.hints[r.taught].hinted_share if r.taught in r.hints else 0.0
    rows = [_HEADINGS, *(_row(kind, r.hints[kind]) for kind in KINDS if kind in r.hints)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    return [
        f"temperature {r.temperature:g}: {r.questions} questions x {r.group} completions",
        f"  student  pass@1 {_cell(r.pass_at_1)}  pass@{r.group} {_cell(r.pass_at_k)}{form}  cut {r.clipped:.2f}",
        f"  groups   all right {r.all_right:.2f}  all wrong {r.all_wrong:.2f}  lone success {r.lone_success:.2f}  "
        f"right and wrong {r.mixed:.2f}",
        f"  training hinted share {hinted:.2f}  gain {_cell(r.gain)}  rho {r.rho:.3f}",
        *(
            "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ),
        "  (I, H_S, H_T, D in nats; intervals of 95 % by question)",
    ]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    return "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _row(kind: str, h: HintReading) -> tuple[str, ...]:
    estimates = (h.success, h.student, h.followed, h.unprompted)
    shown = ["-" if e is None else (_cell(e) if i == 0 else f"{e.value:.2f}") for i, e in enumerate(estimates)]
    numbers = (h.student_entropy, h.teacher_entropy, h.divergence)
    return (
        kind,
        str(h.questions),
        *shown,
        f"{h.information.value:+.3f}",
        *("-" if value is None else f"{value:.3f}" for value in numbers),
    )


def _cell(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"
