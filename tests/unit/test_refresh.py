"""Teachers that are copies of the student: made anew every n-th step ("periodic"), or on a condition ("gated")."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig
from trainer_kit import GROUP, bitwise_equal, config, largest_difference, train, trainer, weights

from pgpo import UserError
from pgpo.teacher.refresh import TAIL, RefreshCondition

EVERY = 3


def told(rewards, tails=None):
    condition = RefreshCondition()
    for i, reward in enumerate(rewards):
        condition.observe({"reward": reward, "length_tail": 10.0 if tails is None else tails[i]})
    return condition


# The rule -------------------------------------------------------------------------------------------------------------


def test_it_holds_where_the_smoothed_reward_has_risen():
    assert not RefreshCondition().holds and not told([0.5]).holds  # nothing to compare with
    assert told([0.5, 0.6]).holds
    assert not told([0.5, 0.5]).holds and not told([0.5, 0.4]).holds
    # One better batch after a bad one: smoothed .8 (.8 * .5 + .2 * 0) + .2 * .6 = .44, still below .5.
    assert not told([0.5, 0.0, 0.6]).holds
    assert told([0.5, 0.0, 0.6]).reward == pytest.approx(0.44)


def test_a_renewal_asks_for_more_than_the_last_one_had():
    condition = told([0.5, 1.0])
    condition.renewed()
    assert not condition.holds
    condition.observe({"reward": 0.55, "length_tail": 10.0})  # better than at the start, worse than at the renewal
    assert not condition.holds
    for _ in range(3):
        condition.observe({"reward": 1.0, "length_tail": 10.0})
    assert condition.holds


def test_it_does_not_hold_while_completions_are_long():
    # Smoothed: 10, then .8 * 10 + .2 x; the limit is 12.5, hence x = 22.5.
    assert TAIL == 1.25
    assert told([0.5, 0.9], [10.0, 22.4]).holds
    assert not told([0.5, 0.9], [10.0, 22.6]).holds


@pytest.mark.parametrize("nothing", [{}, {"reward": 0.9}, {"reward": float("nan"), "length_tail": 10.0}])
def test_a_step_that_measures_nothing_changes_nothing(nothing):
    condition = told([0.5, 0.4])
    before = condition.state_dict()
    condition.observe(nothing)
    assert condition.state_dict() == before


def test_its_state_survives_json_exactly():
    rewards = [0.1, 0.7, 0.3, 0.9, 0.2]
    for cut in range(len(rewards) + 1):
        condition, again = told(rewards[:cut]), RefreshCondition()
        again.load_state_dict(json.loads(json.dumps(condition.state_dict())))
        for reward in rewards[cut:]:
            for g in (condition, again):
                g.observe({"reward": reward, "length_tail": 10.0})
        assert condition.state_dict() == again.state_dict() and condition.holds == again.holds


# In the trainer -------------------------------------------------------------------------------------------------------


def paid(first_steps, then):
    """Rewards that differ within each group, whose mean is lower in the first steps."""

    def reward(prompts, completions, trainer_state=None, **kwargs):
        right = first_steps if trainer_state.global_step < EVERY else then
        return [float(i % GROUP < right) for i in range(len(prompts))]

    return reward


def run(path, kind, reward=None, **options):
    """Student's and teacher's weights after every step."""
    more = {} if reward is None else {"reward": reward}
    t = trainer(path, teacher=kind, teacher_sync_steps=EVERY, objective="sdpo", **{"max_steps": 7} | options | more)
    student, teacher, plain = [weights(t.model)], [], t.teacher_follows

    def follows():
        plain()
        student.append(weights(t.model))
        teacher.append(t.teacher.state_dict()["parameters"])

    t.teacher_follows = follows
    return t, train(t), student, teacher


def lora():
    return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_periodic_teacher_is_the_student_of_the_last_copy(peft, tmp_path):
    options = dict(peft_config=lora()) if peft else {}
    _, _, student, teacher = run(tmp_path, "periodic", **options)
    for step, found in enumerate(teacher, 1):
        copied = student[step - step % EVERY]
        assert all(torch.equal(tensor, copied[name]) for name, tensor in found.items()), step
    assert largest_difference(student[0], student[EVERY]) > 1e-4


def test_a_periodic_teacher_is_the_average_at_rate_one(tmp_path):
    """One mechanism, not two: bit for bit."""
    periodic = run(tmp_path / "a", "periodic")[2]
    average = run(tmp_path / "b", "ema", teacher_rate=1.0)[2]
    assert all(bitwise_equal(a, b) for a, b in zip(periodic, average, strict=True))


def test_trust_does_not_thin_a_copy(tmp_path):
    """The clock slows an average down; red if it makes a mixture of a copy."""
    options = dict(trust="measured", learning_rate=0.5, optim="sgd", max_grad_norm=1e9)
    _, logs, student, teacher = run(tmp_path, "periodic", **options)
    assert min(log["trust_rho"] for log in logs[:EVERY]) < 0.9
    assert all(torch.equal(tensor, student[EVERY][name]) for name, tensor in teacher[EVERY - 1].items())


@pytest.mark.parametrize("then", [1, 3])
def test_a_gated_teacher_is_renewed_only_when_the_reward_has_risen(then, tmp_path):
    """Rewards of 2 of 4 at first: with 3 of 4 from the fourth step on the copy is made at step 6, with 1 never."""
    t, logs, student, teacher = run(tmp_path, "gated", reward=paid(2, then))
    rose = then > 2
    assert all(torch.equal(tensor, student[0][name]) for name, tensor in teacher[4].items())
    copied = student[6 if rose else 0]
    assert all(torch.equal(tensor, copied[name]) for name, tensor in teacher[6].items())
    assert [log["teacher_renewed"] for log in logs] == [0, 0, 0, 0, 0, float(rose), 0]
    assert t.teacher.condition.then[0] == pytest.approx(0.75 - 0.25 * 0.8**3 if rose else 0.5)


def test_length_keeps_a_teacher_of_the_trainer(tmp_path):
    """The same run, but its tail was measured short: red if the trainer's condition does not see the lengths."""
    t = trainer(tmp_path, teacher="gated", teacher_sync_steps=EVERY, max_steps=6, reward=paid(2, 3))
    t.teacher.condition.load_state_dict({"reward": 0.5, "tail": 2.0, "then": [0.5, 2.0]})
    logs = train(t)
    assert not any(log["teacher_renewed"] for log in logs)
    assert t.teacher.condition.reward > 0.5 and t.teacher.condition.tail > TAIL * 2.0


@pytest.mark.parametrize("kind", ["periodic", "gated"])
@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_resumed_run_goes_on_bit_for_bit(kind, peft, tmp_path):
    """From a step between two copies, after the first. Red if the condition's memory or what it waits for is lost."""
    options = dict(reward=paid(1, 3), max_steps=13, **(dict(peft_config=lora()) if peft else {}))
    whole, logs, _, expected = run(tmp_path / "a", kind, save_strategy="steps", save_steps=8, **options)
    again = trainer(tmp_path / "b", teacher=kind, teacher_sync_steps=EVERY, objective="sdpo", **options)
    rest = train(again, resume_from_checkpoint=str(tmp_path / "a/checkpoint-8"))
    assert bitwise_equal(weights(whole.model), weights(again.model))
    assert bitwise_equal(expected[-1], again.teacher.state_dict()["parameters"])
    assert not bitwise_equal(expected[7], expected[-1])
    if kind == "gated":
        assert whole.teacher.condition.state_dict() == again.teacher.condition.state_dict()
        assert [log["teacher_renewed"] for log in logs[8:]] == [log["teacher_renewed"] for log in rest[-5:]]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(teacher="periodic"), "teacher='periodic' copies the student every teacher_sync_steps = 1 step"),
        (dict(teacher="periodic", teacher_sync_steps=9, teacher_rate=0.5), "teacher='periodic' has no rate"),
        (dict(teacher="gated", teacher_sync_steps=9, trust="measured", trust_clock=False), "averages nothing"),
        (dict(teacher="frozen", teacher_sync_steps=9), "follows no student"),
        (dict(teacher="weekly"), "choose one of ema, live, frozen, trust_region, periodic, gated"),
    ],
)
def test_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        config(tmp_path, **options)


def test_a_gate_may_be_looked_at_in_every_step(tmp_path):
    """Where it holds; so `teacher_sync_steps=1` is not the live teacher. Nothing is renewed while nothing moves."""
    right = [0, 0, 2, 3, 0]  # of 4, in each step; with 0 no sample has a teacher, and nothing moves

    def reward(prompts, completions, trainer_state=None, **kwargs):
        return [float(i % GROUP < right[trainer_state.global_step]) for i in range(len(prompts))]

    logs = train(trainer(tmp_path, teacher="gated", objective="sdpo", max_steps=5, reward=reward))
    assert [log["teacher_renewed"] for log in logs] == [0, 0, 1, 1, 0]


def test_a_guard_may_act_on_a_copy(tmp_path):
    """Red if the guard's teacher actions are kept for averages: its snapshot is taken, and a frozen copy stays."""
    t = trainer(tmp_path, teacher="periodic", teacher_sync_steps=2, guard="freeze_teacher", max_steps=4)
    t.guard.teacher_frozen = True
    start = weights(t.teacher.module)
    train(t)
    assert bitwise_equal(start, weights(t.teacher.module))
    assert t.guard._teacher_moves
