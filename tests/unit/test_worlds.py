"""The lab's worlds in training: what the trainer sees of a misleading verifier and of remarks, and what is logged."""

from __future__ import annotations

import types

import pytest

from pgpo.command.train import feedback_of, rewards_of
from pgpo.command.train import main as train
from pgpo.runlog import METRICS, read_run
from pgpo.settings.arguments import parse
from pgpo.tasks import load_task
from pgpo.tasks.lab_world import misleading_rewards, misled_rate, remark

SMALL = "--max_steps 2 --prompts_per_step 2 --num_generations 4 --eval_strategy no --test_rows 2 --eval_k 2 --seed 5"


def columns(rows):
    return {name: [row[name] for row in rows] for name in rows[0]}


def said(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_a_reward_function_gets_the_verdicts_of_seed_and_step():
    task = load_task("lab_world", variant="misleading", n_train=60)
    texts = ["force = 1 <answer> 1 </answer>", *(row["solution"] for row in task.train[1:])]
    logged = {}
    for step in (0, 4):
        state = types.SimpleNamespace(global_step=step)
        rewards = rewards_of(task, 3)([None] * 60, said(texts), state, logged.__setitem__, **columns(task.train))
        assert (rewards, logged) == misleading_rewards(texts, task.train, 3, step)
    plain = load_task("lab_world", n_train=60)
    assert rewards_of(plain)([None] * 60, said(texts), **columns(plain.train)) == [0.0] + [1.0] * 59


def test_a_run_logs_how_much_it_was_misled(tmp_path):
    status, folder = train([*SMALL.split(), "--variant", "misleading", "--output_dir", str(tmp_path / "r")])
    assert status == 0
    metrics = read_run(folder).metrics
    rates = [line["false_success_rate"] for line in metrics]
    assert rates == pytest.approx([misled_rate(5, 0), misled_rate(5, 1)], rel=1e-6)  # TRL averages in fp32
    assert all(0 <= line["false_success_share"] <= line["success_share"] for line in metrics)
    assert {"false_success_rate", "false_success_share"} <= METRICS.keys()


def test_remarks_are_on_failed_attempts_alone():
    task = load_task("lab_world", variant="feedback", n_train=2)
    right, wrong = task.train
    texts = [right["solution"], "mass = 4"]
    feedback = feedback_of(task)([None] * 2, said(texts), **columns(task.train))
    assert feedback == [None, remark("mass = 4", wrong["solution"])] and feedback[1] is not None
    assert feedback_of(load_task("lab_world", n_train=1)) is None
    assert feedback_of(task, right=0.0)([None] * 2, said(texts), **columns(task.train)) == [None, None]  # none failed


@pytest.mark.parametrize(("flags", "shown"), [([], True), (["--variant", "feedback"], False)])
def test_the_feedback_world_shows_no_solutions_unless_it_is_told_to(flags, shown):
    assert parse(flags).config.use_successful_as_teacher is shown
    assert parse([*flags, "--use_successful_as_teacher", "true"]).config.use_successful_as_teacher is True


def test_a_run_in_the_feedback_world_is_taught_by_remarks(tmp_path):
    status, folder = train([*SMALL.split(), "--variant", "feedback", "--output_dir", str(tmp_path / "r")])
    assert status == 0
    for line in read_run(folder).metrics:
        wrong = 1 - line["success_share"]
        assert line["active_share"] == pytest.approx(wrong)  # who is right has nothing to read
