"""The offline alarm study on hand-made curves whose declines, alarms and ROC areas are known."""

from __future__ import annotations

import json
import random

import pytest

from pgpo import UserError
from pgpo.lab.alarms import Course, alarm_study, alarm_table, decline_step, roc_area

EVALUATED = list(range(0, 101, 5))
STEPS = list(range(1, 101))


def record(method, seed, accuracy, status="ok", **metrics):
    """accuracy: {first step: value from there on}; a metric likewise, or a list."""
    return {
        "setting": "style",
        "method": method,
        "seed": seed,
        "status": status,
        "steps": STEPS,
        "metrics": {n: v if isinstance(v, list) else staircase(v, STEPS) for n, v in metrics.items()},
        "evaluations": [
            *(
                {"step": s, "split": "validation", "avg_at_k": a}
                for s, a in zip(EVALUATED, staircase(accuracy, EVALUATED))
            ),
            {"step": 100, "split": "test", "avg_at_k": 0.0},  # not a decline: another split
        ],
    }


def staircase(values, steps):
    return [values[max(k for k in values if k <= step)] for step in steps]


HEALTHY = {0: 0.7}


def frozen(seed, noise=1.0):
    """Healthy, with one bump of the KL by `noise` that the smoothing turns into .2 * noise."""
    return record("frozen", seed, HEALTHY, sampled_kl=staircase({0: 1.0, 20: 1.0 + noise, 21: 1.0}, STEPS))


# Declines and labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        ([0.5, 0.7, 0.66, 0.64, 0.3], 3),  # .06 below .70, not below the evaluation before
        ([0.5, 0.7, 0.65], 2),  # exactly .05, which floats make .0499...
        ([0.5, 0.7, 0.651], None),
        ([0.3, 0.4, 0.5], None),
        ([0.7, 0.6, 0.9, 0.5], 1),
        ([], None),
    ],
)
def test_a_decline_is_the_first_evaluation_five_points_below_the_best_so_far(accuracy, expected):
    assert decline_step(range(len(accuracy)), accuracy) == expected


def test_labels_are_the_15_steps_before_the_decline():
    course = Course.of(record("sdpo", 0, {0: 0.7, 60: 0.6}))
    assert course.decline == 60
    labels = {step: course.label(step) for step in EVALUATED}
    assert [s for s, y in labels.items() if y] == [45, 50, 55]
    assert [s for s, y in labels.items() if y is False] == list(range(0, 41, 5))
    healthy = Course.of(record("sdpo", 0, HEALTHY))
    assert [s for s in EVALUATED if healthy.label(s) is False] == list(range(0, 86, 5))  # 90 sees 10 steps ahead only
    assert not any(healthy.label(s) for s in EVALUATED)


def test_a_metric_without_a_value_for_every_step_is_refused():
    with pytest.raises(UserError, match="style/sdpo/seed-3 has 99 values of sampled_kl for 100 steps"):
        Course.of(record("sdpo", 3, HEALTHY, sampled_kl=[1.0] * 99))


# ROC ------------------------------------------------------------------------------------------------------------------


def test_roc_area_is_the_share_of_ordered_pairs():
    rng = random.Random(0)
    points = [(rng.randrange(6) / 2, rng.random() < 0.4) for _ in range(60)]  # many ties
    pairs = [(p, n) for p, yes in points if yes for n, other in points if not other]
    expected = sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)
    assert roc_area(points) == pytest.approx(expected, abs=1e-12)
    assert roc_area([(1.0, True)]) is None and roc_area([(1.0, False)]) is None


# The study ------------------------------------------------------------------------------------------------------------


def watched():
    """Declines at 60 in seeds 0 to 2, none in seed 3. The KL jumps by .5 at 50, at 70 (too late), never, never; the
    reward of seed 0 falls at 40."""
    falls = {0: 0.7, 60: 0.6}
    return [
        record("sdpo", 0, falls, sampled_kl={0: 1.0, 50: 1.5}, reward={0: 0.9, 40: 0.3}),
        record("sdpo", 1, falls, sampled_kl={0: 1.0, 70: 1.5}, reward={0: 0.9}),
        record("sdpo", 2, falls, sampled_kl={0: 1.0}, reward={0: 0.9}),
        record("sdpo", 3, HEALTHY, sampled_kl={0: 1.0}, reward={0: 0.9}),
    ]


@pytest.fixture(scope="module")
def result():
    references = [frozen(seed, noise=1.0 if seed else 1.2) for seed in range(4)]
    return alarm_study([*watched(), *references], "style", "sdpo", "frozen", resamples=200)


def test_leads_misses_and_false_alarms(result):
    assert result["declines"] == {0: 60, 1: 60, 2: 60}
    kl = result["signals"]["sampled_kl"]
    # Limit .2 * 1.2 * 1.05 = .252 with seed 0 among the references, .21 without. A jump of .5 smoothed reaches
    # .5 * (1 - .8^n): .1 .18 .244 .295. So seed 0 (limit .21) alarms at the third step, seed 1 (.252) at the fourth.
    assert kl["leads"] == {0: 60 - 52, 1: 60 - 73, 2: None}
    assert (kl["in_time"], kl["missed"], kl["median_lead"]) == (1, 1, -2.5)
    assert kl["limit"] == pytest.approx(0.252)
    # Of the references only seed 0 exceeds the limit of the others: .24 > .21. With its own run it would not.
    assert kl["false_alarms"] == {"reference": 1, "watched": 0}
    assert result["healthy"] == {"reference": 4, "watched": 1}


def test_a_false_alarm_in_a_watched_run_without_decline_counts():
    runs = watched()
    runs[3] = record("sdpo", 3, HEALTHY, sampled_kl={0: 1.0, 30: 1.5})
    found = alarm_study([*runs, *map(frozen, range(4))], "style", "sdpo", "frozen", resamples=20)
    assert found["signals"]["sampled_kl"]["false_alarms"] == {"reference": 0, "watched": 1}


def test_a_signal_for_which_healthy_runs_give_no_scale_never_alarms(result):
    reward = result["signals"]["reward"]  # the references do not even measure it
    assert reward["limit"] is None and set(reward["leads"].values()) == {None} and reward["missed"] == 3


def test_the_roc_area_of_a_signal_and_of_the_step_number(result):
    kl = result["signals"]["sampled_kl"]["roc_rise"]
    # Evaluations 10 .. 55 of the declining runs (3 positives each) and 10 .. 85 of the other; after the warm-up of 5.
    assert (kl["positives"], kl["points"]) == (9, 3 * 10 + 16)
    # Positives: seed 0 at 50, 55 above all negatives (0); the other seven tie with all of them.
    assert kl["value"] == pytest.approx((2 + 7 * 0.5) / 9)
    assert kl["low"] <= kl["value"] <= kl["high"]
    step = result["signals"]["step number"]["roc_rise"]
    negatives = [s for s in range(10, 41, 5) for _ in range(3)] + list(range(10, 86, 5))
    assert step["points"] == kl["points"]
    assert step["value"] == pytest.approx(
        roc_area([(s, True) for s in (45, 50, 55) for _ in range(3)] + [(s, False) for s in negatives])
    )


def test_excess_takes_away_what_the_reference_of_the_same_seed_does_at_the_same_step():
    drift = [1.0 + 0.01 * step for step in STEPS]  # rises in healthy runs as well: the rise is the step number
    jump = [x + (0.5 if step >= 40 else 0.0) for step, x in zip(STEPS, drift)]
    falls = {0: 0.7, 55: 0.6}
    runs = [record("sdpo", s, falls if s < 2 else HEALTHY, sampled_kl=jump if s < 2 else drift) for s in range(4)]
    references = [record("frozen", s, HEALTHY, sampled_kl=drift) for s in range(3)]  # none for seed 3
    kl = alarm_study([*runs, *references], "style", "sdpo", "frozen", resamples=50)["signals"]["sampled_kl"]
    assert kl["roc_excess"]["value"] == 1.0
    assert kl["roc_excess"]["points"] == kl["roc_rise"]["points"] - 16
    assert kl["roc_rise"]["value"] < 1.0


def test_a_declining_reference_is_no_measure_of_health():
    sick = record("frozen", 5, {0: 0.7, 50: 0.5}, sampled_kl={0: 1.0, 45: 9.0})
    found = alarm_study([*watched(), *map(frozen, range(4)), sick], "style", "sdpo", "frozen", resamples=20)
    assert found["left_out"]["reference_declined"] == [5]
    assert found["signals"]["sampled_kl"]["limit"] == pytest.approx(0.21)


def test_failed_runs_are_left_out_and_counted():
    failed = record("sdpo", 9, {0: 0.7, 50: 0.0}, status="failed", sampled_kl={0: 1.0})
    other = record("sdpo", 9, {0: 0.7, 50: 0.0}, sampled_kl={0: 1.0}) | {"setting": "plain"}
    found = alarm_study([*watched(), *map(frozen, range(4)), failed, other], "style", "sdpo", "frozen", resamples=20)
    assert found["seeds"] == [0, 1, 2, 3] and found["left_out"]["failed"] == 1


def test_without_a_watched_run_there_is_no_study():
    with pytest.raises(UserError, match="no finished run of style/sdpo"):
        alarm_study([frozen(0), frozen(1)], "style", "sdpo", "frozen")


def test_without_two_healthy_runs_there_are_no_limits_and_no_alarms(result):
    found = alarm_study([*watched(), frozen(0)], "style", "sdpo", "frozen")
    for name, signal in found["signals"].items():
        assert signal["roc_rise"]["value"] == result["signals"][name]["roc_rise"]["value"]
        assert signal.get("limit") is None
    table = alarm_table(found)
    assert "; no limits, for only 1 runs of frozen are healthy." in table
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) == len(found["signals"]) and all(row.endswith("| – | – | – | – | – |") for row in rows)


def test_the_table_says_what_the_dictionary_says(result):
    table = alarm_table(result)
    assert "3 of 4 runs of sdpo decline" in table and "seed 0: 60, seed 1: 60, seed 2: 60" in table
    (row,) = [line for line in table.splitlines() if line.startswith("| sampled_kl ")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[0] == "sampled_kl" and cells[1].startswith("0.61 [")
    assert cells[3:] == ["0.252", "8 -13 –", "1/3", "1/3", "1/5"]
    widths = {line.count("|") for line in table.splitlines() if line.startswith("|")}
    assert len(widths) == 1
    json.dumps(result, allow_nan=False)


def test_the_interval_comes_from_drawing_whole_seeds():
    """Two seeds, of which one orders its own points rightly and one wrongly: the samples are 1, 0 and both."""
    falls, high, low = {0: 0.7, 40: 0.6}, {0: 1.0, 30: 1.5}, {0: 1.0, 11: 1.5, 26: 1.0}
    runs = [record("sdpo", s, falls, sampled_kl=high if s == 0 else low) for s in range(2)]
    (right, wrong, both) = (
        alarm_study([*chosen, frozen(0), frozen(1)], "style", "sdpo", "frozen")["signals"]["sampled_kl"]["roc_rise"]
        for chosen in (runs[:1], runs[1:], runs)
    )
    assert right["low"] == right["value"] == right["high"]
    assert wrong["value"] < both["value"] < right["value"]
    assert (both["low"], both["high"]) == (pytest.approx(wrong["value"]), pytest.approx(right["value"]))
