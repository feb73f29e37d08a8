"""Tables of a study against numbers worked out by hand."""

from __future__ import annotations

import math
import random
import statistics
from typing import Any

import pytest

from pgpo.lab.analysis import (
    negative_share,
    paired_difference,
    summarize_study,
    tables_markdown,
)
from pgpo.study_files import accuracy_curve, area, collapsed


def record(
    method: str,
    seed: int,
    scores: list[float],
    curve: tuple[tuple[int, float], ...] = ((0, 0.5), (10, 0.9), (20, 0.7)),
    **more: Any,
) -> dict[str, Any]:
    questions = {f"q{i}": score for i, score in enumerate(scores)}
    return {
        "setting": "plain",
        "method": method,
        "seed": seed,
        "status": "ok",
        "error": None,
        "environment": {"python": "3.11", "packages": {"torch": "2"}, "git_commit": "abc"},
        "evaluations": [
            {"step": 0, "split": "test", "avg_at_k": 0.123},
            *({"step": s, "split": "validation", "avg_at_k": v} for s, v in curve),
        ],
        "metrics": {"rho": [1.0, 1.2, None, 1.4, 1.2], "information": [0.1, -0.1, None, 0.0, 0.3]},
        "test_scores": questions,
        "selected_step": 10,
        "selected_test_scores": {q: v / 2 for q, v in questions.items()},
        "seconds_per_step": 0.125,
        **more,
    }


def failed(method: str, seed: int) -> dict[str, Any]:
    return {"setting": "plain", "method": method, "seed": seed, "status": "failed", "error": "E: no"}


def methods_of(records: list[dict[str, Any]], compare: dict[str, list[str]] | None = None) -> dict[str, Any]:
    summary = summarize_study(records, "s", {"name": "s"}, compare or {})
    return summary["settings"]["plain"]["methods"]  # type: ignore[no-any-return]


# ---------------------------------------------------------------- one curve


def test_the_area_is_the_mean_height_of_the_curve() -> None:
    # By hand: (0 to 10: mean .5) * 10 + (10 to 40: mean .75) * 30 = 27.5 over 40 steps.
    assert area([0, 10, 40], [0.25, 0.75, 0.75]) == pytest.approx(27.5 / 40)
    assert area([5, 10], [0.25, 0.75]) == pytest.approx(0.5)
    assert area([0], [0.3]) == 0.3


def test_a_run_collapsed_if_its_curve_ends_more_than_a_tenth_below_its_peak() -> None:
    assert collapsed([0.5, 0.9, 0.7])
    assert not collapsed([0.5, 0.9, 0.85])
    assert not collapsed([0.5, 0.2, 0.5])  # it came back
    assert not collapsed([0.5, 0.75, 0.65])  # .10, not more
    assert not collapsed([0.5]) and not collapsed([]) and not collapsed([0.2, 0.9])
    assert collapsed([0.5, 0.3])  # below where it started counts too


def test_negative_information_is_below_zero() -> None:
    assert negative_share([0.1, -0.1, 0.0, -2.0]) == 0.5
    assert negative_share([]) is None


def test_the_curve_is_the_validation_split_in_the_order_of_steps() -> None:
    lines = [
        {"step": 20, "split": "validation", "avg_at_k": 0.7},
        {"step": 20, "split": "test", "avg_at_k": 0.1},
        {"step": 0, "split": "validation", "avg_at_k": 0.5},
    ]
    assert accuracy_curve(lines) == ([0, 20], [0.5, 0.7])


# ---------------------------------------------------------------- the summary


def test_a_method_is_summarized_by_seed() -> None:
    other = ((0, 0.3), (10, 0.4), (20, 0.8))
    records = [record("a", 7, [0.0, 0.5], other), failed("a", 9), record("a", 3, [0.5, 1.0])]
    assert methods_of(records)["a"] == {
        "seeds": [3, 7],
        "failed": [9],
        "initial": 0.4,  # (.5 + .3) / 2
        "peak": [0.9, 0.8],
        "final": [0.75, 0.25],
        "final_validation": [0.7, 0.8],
        "selected": [0.375, 0.125],
        "selected_step": [10, 10],
        "auc": [0.75, 0.475],  # (.7 + .8) / 2; (.35 + .6) / 2
        "collapsed": [True, False],
        "mean_rho": [1.2, 1.2],
        "negative_information_share": [0.25, 0.25],
        "seconds_per_step": [0.125, 0.125],
        "versus": {},
        "versus_selected": {},
    }


def test_what_was_not_measured_is_none() -> None:
    summary = methods_of([record("base", 1, [0.5], ((0, 0.5),), metrics={}, seconds_per_step=None), failed("x", 1)])
    base, nothing = summary["base"], summary["x"]
    assert (base["mean_rho"], base["negative_information_share"]) == ([None], [None])
    assert (base["peak"], base["auc"], base["collapsed"]) == ([0.5], [0.5], [False])
    assert (nothing["seeds"], nothing["initial"], nothing["final"]) == ([], None, [])


def test_differences_are_paired_by_seed_and_question() -> None:
    """A common gain of .25 on every question and seed has an interval without width, however the runs differ."""
    rng = random.Random(0)
    records = []
    for seed in range(8):
        scores = [rng.random() / 2 for _ in range(30)]
        records += [record("a", seed, scores), record("b", seed, [s + 0.25 for s in scores])]
    rng.shuffle(records)
    versus = methods_of(records, {"a": ["b"]})["b"]["versus"]["a"]
    assert versus == {"value": 0.25, "low": 0.25, "high": 0.25, "detectable": 0.0, "runs": 8, "questions": 30}
    assert methods_of(records, {"a": ["b"]})["b"]["versus_selected"]["a"]["value"] == 0.125
    back = methods_of(records, {"b": ["a"]})["a"]["versus"]["b"]
    assert (back["value"], back["low"]) == (-0.25, -0.25)


def test_the_interval_has_the_width_of_runs_and_questions() -> None:
    """Differences run effect + question effect: variance of the mean by hand, crossed: var_r / R + var_q / Q."""
    rng = random.Random(1)
    runs = [rng.gauss(0, 0.1) for _ in range(40)]
    questions = [rng.gauss(0, 0.2) for _ in range(50)]
    a = [record("a", i, [0.5] * 50) for i in range(40)]
    b = [record("b", i, [0.5 + r + q for q in questions]) for i, r in enumerate(runs)]
    found = paired_difference(b, a)
    assert found is not None

    of_runs, of_questions = statistics.variance(runs) / 40, statistics.variance(questions) / 50
    freedom = (of_runs + of_questions) ** 2 / (of_runs**2 / 39 + of_questions**2 / 49)  # Satterthwaite
    assert 67 < freedom < 68
    half = 1.996 * math.sqrt(of_runs + of_questions)  # Student's t, 67 degrees of freedom
    assert found["value"] == pytest.approx(sum(runs) / 40 + sum(questions) / 50, abs=1e-5)
    assert (found["high"] - found["low"]) / 2 == pytest.approx(half, rel=0.001)


def test_only_seeds_that_both_have_are_compared() -> None:
    a = [record("a", 1, [0.5, 0.5]), record("a", 2, [0.0, 0.0]), failed("a", 3)]
    b = [record("b", 1, [1.0, 0.5]), record("b", 3, [0.0, 0.0])]
    versus = methods_of([*b, *a], {"a": ["b"]})["b"]["versus"]["a"]
    assert (versus["value"], versus["runs"], versus["questions"]) == (0.25, 1, 2)
    assert methods_of([record("a", 1, [0.5]), record("b", 2, [0.5])], {"a": ["b"]})["b"]["versus"] == {}


def test_questions_are_matched_by_their_names_not_their_places() -> None:
    turned = record("b", 1, [])
    turned["test_scores"] = {"q1": 1.0, "q0": 0.25}
    found = paired_difference([turned], [record("a", 1, [0.25, 1.0])])
    assert found is not None and found["value"] == 0.0
    # No difference in two questions, t = 12.7062 for one degree of freedom: t^2 / (2 + t^2).
    assert (found["low"], found["high"]) == (-0.98776, 0.98776)


def test_settings_are_kept_apart() -> None:
    records = [record("a", 1, [0.5]), record("a", 1, [1.0], setting="style"), record("b", 1, [0.25])]
    settings = summarize_study(records, "s", {}, {"a": ["b"]})["settings"]
    assert settings["plain"]["methods"]["a"]["final"] == [0.5]
    assert settings["style"]["methods"]["a"]["final"] == [1.0]
    assert settings["plain"]["methods"]["b"]["versus"]["a"]["value"] == -0.25


def test_the_environment_is_the_most_frequent_one_with_all_commits() -> None:
    other = {"python": "3.12", "packages": {"torch": "2"}, "git_commit": "abc"}
    records = [record("a", 1, [0.5], environment=other), record("a", 2, [0.5]), record("b", 1, [0.5]), failed("b", 2)]
    records[1]["environment"] = {**records[2]["environment"], "git_commit": "def"}
    environment = summarize_study(records, "s", {}, {})["environment"]
    assert environment["python"] == "3.11" and environment["environments"] == 2
    assert environment["commits"] == {"abc": 2, "def": 1}
    assert summarize_study([failed("b", 2)], "s", {}, {})["environment"] == {}


# ---------------------------------------------------------------- Markdown


def test_the_tables_show_the_summary() -> None:
    records = [record("a", s, [0.5, 0.5], setting=name) for name in ("plain", "style") for s in range(8)]
    records += [record("b", s, [0.75, 0.75]) for s in range(8)]
    records += [record("b", 1, [0.25, 0.25], setting="style"), {**failed("b", 2), "setting": "style"}]
    records += [record("base", s, [0.1 * s] * 2, metrics={}, seconds_per_step=None) for s in range(8)]
    text = tables_markdown(summarize_study(records, "s", {}, {"a": ["b", "base"]}))
    lines = text.splitlines()
    assert lines[0] == "# Study s"
    assert "| b | +0.250 [+0.250, +0.250] (0.000) | -0.250 [-0.250, -0.250]† (0.000) |" in lines  # † one seed
    rows = [line for line in lines if line.startswith(("| a |", "| b |", "| base |"))]
    b = "| b | 8 | 0.500 | 0.750 (0.000) | 0.375 (0.000) | 0.900 | 0.750 | 8/8 | 1.200 | 0.25 | 0.12 | +0.250 "
    assert b + "[+0.250, +0.250] (0.000) |" in rows
    assert any(row.startswith("| b | 1 (1 failed) | 0.500 | 0.250 | 0.125 |") for row in rows)
    # mean .35, sd sqrt(.06) = .245; nothing measured where nothing was trained
    assert any(row.startswith("| base | 8 | 0.500 | 0.350 (0.245) | ") and "| - | - | - |" in row for row in rows)
    assert "Of the 2 others on final accuracy 1 exclude 0" in " ".join(lines)  # base's does not, style has one seed
    for name in ("plain", "style"):
        assert f"## {name}" in lines
    widths = {line.count("|") for line in lines[lines.index("## plain") :] if line.startswith("|")}
    assert len(widths) == 1  # every row has every column
