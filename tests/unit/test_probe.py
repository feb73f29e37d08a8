"""The numbers and the verdict of `pgpo probe`, from lines made by hand."""

from __future__ import annotations

import math

import pytest

from pgpo.evaluate.avg_at_k import Estimate
from pgpo.evaluate.probe import gains, read, table
from pgpo.evaluate.verdict import ADVICE, VERDICTS, Situation, conclusion, judge


def group(right, answers=None, formed=True, clipped=False):
    n = len(right)
    return {
        "right": [bool(r) for r in right],
        "answer": list(answers) if answers is not None else ["r" if r else f"w{i}" for i, r in enumerate(right)],
        "well_formed": [formed] * n if isinstance(formed, bool | None) else list(formed),
        "tokens": [5] * n,
        "clipped": [clipped] * n if isinstance(clipped, bool) else list(clipped),
        "completion": ["text"] * n,
    }


def signal(samples, hinted, student=0.0, teacher=0.0, divergence=0.0, tokens=0):
    return {
        "samples": samples,
        "hinted": hinted,
        "student_entropy": student,
        "teacher_entropy": teacher,
        "divergence": divergence,
        "tokens": tokens,
    }


def line(question, student, hinted=None, signals=None, temperature=1.0, domain="d"):
    size = len(student["right"])
    return {
        "temperature": temperature,
        "question_id": question,
        "domain": domain,
        "student": student,
        "hinted": {kind: {"shown": shown, "completions": g} for kind, (shown, g) in (hinted or {}).items()},
        "signals": {"right": signal(size, 0), "wrong": signal(size, 0), "placebo": signal(size, 0)} | (signals or {}),
    }


def test_the_numbers_by_hand():
    lines = [
        line(
            "a",
            group([1, 0, 0, 0], "rwwx", formed=[True, True, False, True], clipped=[False, False, True, False]),
            {
                "right": ("r", group([1, 1], "rr")),
                "wrong": ("w", group([0, 1], "wr")),
                "placebo": ("p", group([0, 0], "pw")),
            },
            {
                "right": signal(4, 3, student=3.0, teacher=1.5, divergence=0.6, tokens=12),
                "wrong": signal(4, 4, student=4.0, teacher=6.0, divergence=1.0, tokens=20),
            },
            domain="x",
        ),
        line("b", group([0, 0, 0, 0], "wwwv"), domain="x"),
        line(
            "c", group([1, 1, 1, 1], "rrrr"), {"right": ("r", group([1, 0], "rw"))}, {"right": signal(4, 4, 2.0, 1.0)}
        ),
        line("d", group([1, 1, 0, 0], ["r", "r", None, None])),
    ]
    r = read(lines, law=lambda information: math.exp(2 * information))
    assert (r.questions, r.group, r.completions, r.right, r.well_formed) == (4, 4, 16, 7, 15)
    assert (r.all_right, r.all_wrong, r.lone_success, r.mixed) == (0.25, 0.25, 0.25, 0.5)
    assert (r.groups, r.worth, r.clipped) == ([1, 1, 1, 0, 1], ["a", "d"], 1 / 16)
    assert r.pass_at_1.value == pytest.approx((0.25 + 0 + 1 + 0.5) / 4)
    assert r.pass_at_k.value == 0.75
    assert r.domains == {"x": (2, 0.125, 0.5), "d": (2, 0.75, 0.5)}
    right, wrong, placebo = (r.hints[kind] for kind in ("right", "wrong", "placebo"))
    assert "feedback" not in r.hints
    assert (right.questions, right.success.value, right.student.value) == (2, 0.75, 0.625)  # on the same questions
    assert right.gain.value == pytest.approx(0.125)
    assert (wrong.followed.value, wrong.unprompted.value, wrong.success.value) == (0.5, 0.5, 0.5)
    assert (placebo.followed.value, placebo.unprompted.value) == (0.5, 0.0)
    # I_k divides by all samples, the entropies by the hinted ones, D by their tokens
    assert right.hinted_share == 7 / 16
    assert right.information.value == pytest.approx((1.5 + 1.0) / 16)
    assert (right.student_entropy, right.teacher_entropy) == (pytest.approx(5 / 7), pytest.approx(2.5 / 7))
    assert right.divergence == pytest.approx(0.05)
    assert wrong.information.value == pytest.approx(-2.0 / 16)
    assert (placebo.student_entropy, placebo.divergence) == (None, None)
    assert r.rho == pytest.approx(math.exp(2 * 2.5 / 16))
    assert gains(lines) == pytest.approx({"a": 0.75 * 0.75, "b": 0.0, "c": 1.0 * -0.5, "d": 0.0})
    assert r.gain.value == pytest.approx((0.5625 - 0.5) / 4)
    hinted = read(lines, law=lambda information: information, denominator="hinted")
    assert hinted.hints["right"].information.value == pytest.approx(2.5 / 7)
    assert hinted.rho == pytest.approx(2.5 / 7)


def test_without_a_judge_of_forms_none_is_counted():
    r = read([line("a", group([1, 0], formed=None)), line("b", group([0, 0], formed=None))], law=math.exp)
    assert r.well_formed is None
    assert "well-formed" not in "\n".join(table(r))


# The verdict: worlds whose truth is known -----------------------------------------------------------------------------


def world(
    student, teacher=0.0, placebo=0.0, copied=0.0, hinted=1.0, questions=32, formed=True, clipped=0.0, temperature=1.0
):
    """Each question alike: shares of right completions (student, and reading hints), of wrong hints followed, of
    samples with a teacher."""
    size = 20

    def shares(value):
        return [i < round(value * size) for i in range(size)]

    lines = []
    for q in range(questions):
        own = group(shares(student), formed=formed, clipped=shares(clipped))
        hints = {
            "right": ("r", group(shares(teacher))),
            "wrong": ("w", group(shares(0.0), ["w" if f else "v" for f in shares(copied)])),
            "placebo": ("p", group(shares(placebo))),
        }
        signals = {kind: signal(size, round(hinted * size), 1.0, 0.5, 1.0, 100) for kind in hints}
        lines.append(line(f"q{q}", own, hints if hinted else {}, signals, temperature))
    return lines


def verdict_of(*worlds, length=64):
    return judge([read(w, law=lambda i: 1.0) for w in worlds], [gains(w) for w in worlds], length)


WORLDS = {
    "cut": (world(0.0, hinted=0.0, formed=False, clipped=0.6), "384 of 640 answers are cut at 64 tokens"),
    "no format": (world(0.0, hinted=0.0, formed=False), "0 of 640 answers have the asked format"),
    "no success": (world(0.0, hinted=0.0), "0 of 640 answers are right, so that 0 % of the samples"),
    "solved": (world(0.95, 1.0), "right in .95 already"),
    "no help": (world(0.5, 0.5), "right in .50 where the student is right in .50"),
    "context": (world(0.3, 0.8, placebo=0.6), "right in .80 with a right sibling's answer in its prompt (student .30)"),
    "copies": (world(0.1, 0.8, copied=0.7), "a wrong hint is followed in 70 %"),
    "worth it": (
        world(0.1, 0.8, copied=0.3),
        "temperature 1 gives a teacher that is right in .80 where the student is",
    ),
}


@pytest.mark.parametrize("name", WORLDS)
def test_each_world_gets_its_verdict_and_its_reason(name):
    lines, reason = WORLDS[name]
    verdict = verdict_of(lines)
    assert verdict.name == name
    assert reason in verdict.sentence
    assert verdict.worth == (name in ("copies", "worth it"))
    assert verdict.sentence.endswith(".") and "\n" not in verdict.sentence
    assert conclusion(verdict)[-1] == f"verdict: {verdict.sentence}"


def test_a_wrong_answer_that_is_given_anyway_is_no_copy():
    lines = world(0.1, 0.8, copied=0.7)
    for entry in lines:
        entry["student"]["answer"] = ["r"] * 2 + ["w"] * 11 + ["v"] * 7  # .55 without the hint, .70 with it
    assert verdict_of(lines).name == "worth it"
    for entry in lines:
        entry["hinted"]["wrong"]["completions"]["answer"] = ["w"] * 16 + ["v"] * 4
    assert "followed in 80 % (its answer is given in 55 % without it)" in verdict_of(lines).sentence


def test_a_teacher_of_remarks_is_judged_by_what_it_reads():
    lines = world(0.3, 0.3, copied=0.9)  # a sibling's answer is of no help, and copied
    for entry in lines:
        entry["hinted"]["feedback"] = {"shown": None, "completions": group([1] * 16 + [0] * 4)}
        entry["signals"]["feedback"] = signal(20, 14, 1.4, 0.7, 1.0, 100)
    reading = read(lines, law=lambda information: 1 + information, taught="feedback")
    assert reading.gain.value == pytest.approx(0.7 * 0.5)
    assert reading.rho == pytest.approx(1.035)
    assert "hinted share 0.70" in table(reading)[3]
    verdict = judge([reading], [gains(lines, "feedback")], 64)
    assert verdict.name == "worth it" and "right in .80 where the student is right in .30" in verdict.sentence
    assert verdict_of(lines).name == "no help"


def test_few_questions_that_disagree_decide_nothing():
    lines = world(0.5, 0.5, questions=3)
    for i, flags in enumerate(([1] * 20, [1] * 20, [0] * 20)):
        lines[i]["hinted"]["right"]["completions"] = group(flags)
    verdict = verdict_of(lines)
    assert verdict.name == "unsure"
    assert "3 questions cannot tell" in verdict.sentence and "--questions" in verdict.sentence


def test_every_rule_has_a_world_and_speaks_of_what_is_known():
    assert {rule.name for rule in VERDICTS} == {*WORLDS, "unsure"}
    facts = Situation(read(world(0.1, 0.8), law=lambda i: 1.0), 1.0, 64).facts()
    facts |= {"twice_the_length": 128, "twice_the_group": 40}
    for rule in (*VERDICTS, *ADVICE):
        assert "{" not in rule.sentence.format(**facts) + rule.flags.format(**facts)


@pytest.mark.parametrize(
    ("worlds", "flags"),
    [
        ([world(0.5, 0.5)], ["--objective", "grpo"]),
        ([world(1.0, 1.0)], []),  # no group has right and wrong answers
        ([world(0.1, 0.8)], []),
        ([world(0.3, 0.8, clipped=0.15)], ["--max_completion_length", "128"]),
        ([world(0.05, 0.8, hinted=0.95)], ["--num_generations", "40"]),  # one of twenty is right
        # the run's own temperature comes first, another must be better beyond doubt
        ([world(0.1, 0.15), world(0.1, 0.8, temperature=0.5)], ["--temperature", "0.5"]),
        ([world(0.1, 0.8), world(0.1, 0.3, temperature=0.5)], []),
        ([world(0.1, 0.8), world(0.1, 0.8, temperature=0.5)], []),
    ],
)
def test_the_flags_to_use(worlds, flags):
    assert verdict_of(*worlds).flags == flags


def test_a_difference_within_the_noise_changes_no_temperature():
    lines = world(0.1, 0.5, temperature=0.5)
    for i, entry in enumerate(lines):
        entry["hinted"]["right"]["completions"] = group([1] * (19 if i % 2 else 2) + [0] * (1 if i % 2 else 18))
    assert read(lines, law=lambda i: 1.0).gain.value > read(world(0.1, 0.5), law=lambda i: 1.0).gain.value
    verdict = verdict_of(world(0.1, 0.5), lines)
    assert (verdict.temperature, verdict.flags) == (1.0, [])


def test_the_table_names_every_hint():
    lines = world(0.3, 0.8)
    lines[0]["signals"]["feedback"] = signal(20, 0)
    text = table(read(lines, law=lambda i: 1.07))
    assert text[0] == "temperature 1: 32 questions x 20 completions"
    assert [row.split()[0] for row in text[5:9]] == ["right", "wrong", "placebo", "feedback"]
    assert "pass@1 0.30 [0.17, 0.48]" in text[1] and "rho 1.070" in text[3]
    assert text[8].split()[2:] == ["-", "-", "-", "-", "+0.000", "-", "-", "-"]


def test_an_unknown_interval_is_no_help_to_a_verdict():
    one = read(world(0.1, 0.8, questions=1), law=lambda i: 1.0)
    assert math.isnan(one.hints["right"].gain.low)
    assert verdict_of(world(0.1, 0.8, questions=1)).name == "unsure"
    assert isinstance(one.gain, Estimate)
