"""The collapse guard: when it alarms (numbers alone), and what its actions do to a real tiny trainer."""

from __future__ import annotations

import contextlib
import io
import json
import math
import subprocess
import sys

import pytest
import torch
from trainer_kit import GROUP, bitwise_equal, config, train, trainer, weights
from transformers import TrainerCallback

from pgpo import UserError
from pgpo.alarms import SIGNALS, CollapseGuard, calibrate, choose_limits, read_limits
from pgpo.runlog import RunLog, read_run
from pgpo.train.gate import torch_optimizer

# Numbers alone --------------------------------------------------------------------------------------------------------


def alarms(values, signal="sampled_kl", limit=0.1, warmup=0, patience=1, metric=None):
    """(step, alarm) of a guard fed with these values from step 1 on."""
    guard = CollapseGuard({signal: limit}, warmup, patience)
    unit = {SIGNALS[signal].per: 2.0} if SIGNALS[signal].per else {}
    return [a for k, x in enumerate(values, 1) for a in guard.update(k, {metric or signal: x} | unit)]


def test_it_alarms_at_the_step_where_the_smoothed_value_is_beyond_its_best():
    # 1 1 1 then 2: smoothed 1 + (1 - .8^n) = 1.2, 1.36, 1.488; the limit .4 is crossed at the third step.
    (first, *more) = alarms([1.0, 1.0, 1.0, *[2.0] * 3], limit=0.4)
    assert not more
    assert (first.step, first.signal, first.best, first.best_step, first.limit) == (6, "sampled_kl", 1.0, 1, 0.4)
    assert first.value == pytest.approx(1 + 1 - 0.8**3, abs=1e-12)


def test_a_single_outlier_is_smoothed_away():
    assert alarms([1.0, 1.0, 1.45, 1.0, 1.0]) == []  # .2 * .45 = .09 < .1
    assert [a.step for a in alarms([1.0, 1.0, 1.55, 1.0])] == [3]


@pytest.mark.parametrize("name", SIGNALS)
def test_every_signal_alarms_in_its_own_direction_only(name):
    signal = SIGNALS[name]
    up, down = [1.0] * 3 + [9.0] * 9, [9.0] * 3 + [1.0] * 9
    wrong, right = (up, down) if signal.falls else (down, up)
    assert alarms(wrong, name, metric=signal.metric) == []
    assert alarms(right, name, metric=signal.metric)[0].step == 4


def test_the_directions_are_those_of_a_collapse():
    falls = {name for name, s in SIGNALS.items() if s.falls}
    assert falls == {"reward", "student_entropy_low", "demonstration_logprob", "information_per_divergence"}
    assert SIGNALS["student_entropy_low"].metric == SIGNALS["student_entropy_high"].metric == "student_entropy"


def test_a_ratio_of_two_metrics():
    """I / D. Below 0 from the start, as on a pretrained model, it has no scale and is silent until it has one."""
    guard = CollapseGuard({"information_per_divergence": 0.5}, warmup=0)
    lines = [{"information": i, "divergence": d} for i, d in [(-0.1, 0.1), (-0.5, 0.1), (0.4, 0.1), (4.0, 1.0)]]
    assert not any(guard.update(k, line) for k, line in enumerate(lines, 1))
    state = guard.tracks["information_per_divergence"]
    assert state.value == pytest.approx(0.8 * (0.8 * (0.8 * -1 + 0.2 * -5) + 0.2 * 4) + 0.2 * 4)
    for k in range(5, 30):
        guard.update(k, {"information": 4.0, "divergence": 1.0})
    found = [guard.update(k, {"information": -1.0, "divergence": 1.0}) for k in range(30, 36)]
    assert any(found) and state.best == pytest.approx(4.0, abs=0.1)
    assert not guard.update(36, {"information": 1.0, "divergence": 0.0}) and not guard.update(37, {"information": 1.0})


def test_a_relative_limit_is_a_share_of_the_best():
    """Smoothed 10 -> 12 -> 13.6 ...: 20 %, 36 %; the same course ten times as large alarms at the same step."""
    for scale in (1.0, 10.0):
        values = [x * scale for x in (10, 10, 20, 20, 20)]
        (alarm,) = alarms(values, "grad_norm", limit=0.3)
        assert alarm.step == 4
    assert alarms([10, 10, 20, 20, 20], "sampled_kl", limit=0.3)[0].step == 3  # absolute: 2 nats at once


def test_the_best_follows_improvements_and_no_others():
    # Falls from 1 to .5 (smoothed .9 .82 .756), rises to .9 again: never above its first value, far above its best.
    guard = CollapseGuard({"sampled_kl": 0.05}, warmup=0)
    found = [guard.update(k, {"sampled_kl": x}) for k, x in enumerate([1.0, 0.5, 0.5, 0.5, 0.9, 1.2, 1.2], 1)]
    assert [bool(a) for a in found] == [False] * 5 + [True, True]
    (alarm,) = found[5]
    assert alarm.best_step == 4 and alarm.best == pytest.approx(0.5 + 0.5 * 0.8**3)
    assert guard.best_step == 4 and guard.tracks["sampled_kl"].best == alarm.best  # an alarm does not move it


def test_the_warm_up_feeds_the_smoothing_and_nothing_else():
    values = [0.0, 5.0, 5.0, 5.0, 5.0, 5.0]
    assert alarms(values)[0].step == 2  # without one, the first value is the best
    assert alarms(values, warmup=1)[0].step == 3  # best: step 2
    guard = CollapseGuard({"sampled_kl": 0.1}, warmup=3)
    for k, x in enumerate(values[:3], 1):
        assert guard.update(k, {"sampled_kl": x}) == [] and guard.best_step is None
    guard.update(4, {"sampled_kl": 0.0})
    smoothed = 0.8 * (5 - 5 * 0.8**2)
    assert (guard.best_step, guard.tracks["sampled_kl"].best) == (4, pytest.approx(smoothed))


def test_the_warm_up_counts_values_not_steps():
    """A signal that starts late gets its own."""
    guard = CollapseGuard({"sampled_kl_wrong": 0.1}, warmup=2)
    assert not any(guard.update(k, {}) for k in range(1, 50))
    assert not any(guard.update(k, {"sampled_kl_wrong": float(k)}) for k in (50, 51))
    assert guard.update(52, {"sampled_kl_wrong": 99.0}) == []  # the first value that can be a best
    assert guard.update(53, {"sampled_kl_wrong": 99.0})


def test_patience_asks_for_steps_in_a_row():
    rise = [1.0, 1.0, *[2.0] * 4]
    assert alarms(rise)[0].step == 3
    assert alarms(rise, patience=3)[0].step == 5
    # Smoothed excess: .2 then .06 (within) then .248 .3984: the row starts again.
    broken = [1.0, 2.0, 0.5, 2.0, 2.0]
    assert [a.step for a in alarms(broken, limit=0.1, patience=2)] == [5]


def test_an_excursion_alarms_once_more_for_every_further_limit_and_anew_after_it():
    jump = [0.0, *[1.0] * 12]  # smoothed .2 .36 .488 .590 .672 ...
    assert [(a.step, a.limit) for a in alarms(jump, limit=0.3)] == [(3, 0.3), (6, 0.6), (12, pytest.approx(0.9))]
    assert [a.step for a in alarms(jump, limit=0.6)] == [6]
    again = [*jump, *[0.0] * 12, *[1.0] * 3]  # back within .3 at step 19 (.196); then .2 .36 .488 above .06
    assert [a.step for a in alarms(again, limit=0.3)] == [3, 6, 12, 27]


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_a_step_that_does_not_measure_a_signal_leaves_it_as_it_is(nothing):
    guard, plain = (CollapseGuard({"sampled_kl_wrong": 0.3}, warmup=1) for _ in range(2))
    for k, x in enumerate([1.0, 1.0, nothing, 2.0, nothing, 2.0], 1):
        found = guard.update(k, {"sampled_kl_wrong": x})
        if x is not nothing:
            assert found == plain.update(k, {"sampled_kl_wrong": x})
        else:
            assert found == []
    assert guard.state_dict() == plain.state_dict()
    assert guard.update(7, {}) == []


def test_a_batch_with_nothing_to_learn_does_not_count():
    """Its gradient is 0 and its means over no token are 0: as the best value, they would alarm for ever after."""
    guard = CollapseGuard({"grad_norm": 2.0, "divergence": 0.5, "reward": 0.3}, warmup=0)
    step = {"grad_norm": 1.0, "divergence": 0.9, "active_share": 0.5, "reward": 1.0}
    empty = {"grad_norm": 0.0, "divergence": 0.0, "active_share": 0.0, "reward": 0.0}
    guard.update(1, step)
    assert [a.signal for k in range(2, 9) for a in guard.update(k, empty)] == ["reward", "reward"]  # .36, .672
    assert [guard.tracks[n].seen for n in ("grad_norm", "divergence", "reward")] == [1, 1, 8]


def test_signals_are_judged_apart_and_reported_in_order():
    guard = CollapseGuard({"reward": 0.1, "sampled_kl": 0.1}, warmup=0)
    guard.update(1, {"sampled_kl": 1.0, "reward": 0.5})
    guard.update(2, {"sampled_kl": 0.5, "reward": 0.5})
    assert guard.best_step == 1  # of the first one
    assert [a.signal for a in guard.update(3, {"sampled_kl": 9.0, "reward": -9.0})] == ["reward", "sampled_kl"]


@pytest.mark.parametrize(
    ("name", "values", "limit", "expected"),
    [
        ("sampled_kl", [0.26, *[0.51] * 9], 0.05, "sampled_kl 0.35 nats is 0.09 above its best 0.26 (step 1)"),
        ("reward", [0.8, 0.1], 0.1, "reward 0.66 is 0.14 below its best 0.8 (step 1)"),
        ("grad_norm", [2.0, 22.0], 1.5, "grad_norm 6 is 200 % above its best 2 (step 1)"),
    ],
)
def test_the_reason_is_readable(name, values, limit, expected):
    assert alarms(values, name, limit)[0].reason == expected


def test_state_survives_json_exactly_at_every_step():
    values = [math.sin(3.0 * k) + 0.07 * k for k in range(40)]
    metrics = [{"sampled_kl": x, "reward": -x if k % 3 else None} for k, x in enumerate(values)]

    def guard():
        return CollapseGuard({"sampled_kl": 0.11, "reward": 0.3}, warmup=2, patience=2)

    whole = guard()
    expected = [whole.update(k, m) for k, m in enumerate(metrics)]
    assert sum(map(len, expected)) > 3
    for cut in range(len(metrics)):
        first, second = guard(), guard()
        head = [first.update(k, m) for k, m in enumerate(metrics[:cut])]
        second.load_state_dict(json.loads(json.dumps(first.state_dict(), allow_nan=False)))
        tail = [second.update(k, m) for k, m in enumerate(metrics) if k >= cut]
        assert head + tail == expected
        assert second.state_dict() == whole.state_dict()


def test_a_saved_state_is_not_changed_by_later_steps():
    guard = CollapseGuard({"sampled_kl": 0.1})
    state = guard.state_dict()
    before = json.dumps(state)
    guard.update(1, {"sampled_kl": 3.0})
    assert json.dumps(state) == before


@pytest.mark.parametrize("other", [dict(warmup=3), dict(patience=3), dict(limits={"sampled_kl": 0.2})])
def test_a_state_of_another_guard_is_refused(other):
    settings = dict(limits={"sampled_kl": 0.1}, warmup=1, patience=1)
    state = CollapseGuard(**settings).state_dict()
    with pytest.raises(ValueError, match="the saved guard has"):
        CollapseGuard(**(settings | other)).load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [
        dict(limits={}),
        dict(limits={"loss": 0.1}),
        dict(limits={"reward": 0.0}),
        dict(limits={"reward": math.nan}),
        dict(limits={"reward": 0.1}, warmup=-1),
        dict(limits={"reward": 0.1}, patience=0),
    ],
)
def test_a_guard_that_cannot_work_is_refused(settings):
    with pytest.raises(ValueError):
        CollapseGuard(**settings)


def test_the_pure_part_needs_no_torch():
    code = "import sys, pgpo.alarms; sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'trl')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# Limits ---------------------------------------------------------------------------------------------------------------


def lines(**series):
    length = len(next(iter(series.values())))
    return [{"step": k + 1} | {name: values[k] for name, values in series.items()} for k in range(length)]


def test_calibrated_limits_are_the_worst_of_the_healthy_runs_and_five_percent():
    quiet = lines(sampled_kl=[1.0, 1.0, 1.5, 1.0], reward=[0.5] * 4, grad_norm=[2.0, 2.0, 2.0, 2.0])
    loud = lines(sampled_kl=[1.0, 1.0, 0.0, 2.0], reward=[0.5, 0.0, 0.9, 0.9], grad_norm=[2.0, 3.0, 2.0, 2.0])
    limits = calibrate([quiet, loud], warmup=0)
    # KL of the loud run: 1, 1, .8, 1.04: .24 above its best; the quiet one: .1. Reward: .5 -> .4.
    assert limits == {
        "sampled_kl": pytest.approx(0.24 * 1.05),
        "reward": pytest.approx(0.1 * 1.05),
        "grad_norm": pytest.approx(0.1 * 1.05),  # 2 -> 2.2: a share
    }
    assert calibrate([quiet], warmup=0) == {"sampled_kl": pytest.approx(0.105)}
    assert calibrate([quiet], warmup=3) == {}
    with pytest.raises(ValueError, match="no healthy run"):
        calibrate([])


def test_a_run_does_not_alarm_under_its_own_calibrated_limits():
    values = [math.sin(2.0 * k) for k in range(60)]
    own = calibrate([lines(sampled_kl=values)], warmup=4)["sampled_kl"]
    assert alarms(values, limit=own, warmup=4) == []
    assert alarms(values, limit=own / 1.06, warmup=4) != []


def test_the_defaults_are_the_studys():
    defaults = {name: s.limit for name, s in SIGNALS.items() if s.limit is not None}
    assert defaults == {
        "reward": 0.06,
        "grad_norm": 2.0,
        "sampled_kl": 0.044,
        "sampled_kl_wrong": 0.27,
        "demonstration_logprob": 0.06,
    }
    assert choose_limits(None, None, True, False) == {"sampled_kl_wrong": 0.27, "sampled_kl": 0.044}
    assert next(iter(choose_limits(None, None, True, True))) == "demonstration_logprob"
    assert choose_limits(None, None, False, False) == {"reward": 0.06, "grad_norm": 2.0}


def test_signals_by_text_or_list_and_limits_from_a_file(tmp_path):
    file = tmp_path / "limits.json"
    file.write_text(json.dumps({"sampled_kl": 0.5, "length_tail": 1}))
    expected = {"length_tail": 1.0, "sampled_kl": 0.5, "reward": 0.06}
    for signals in ("length_tail,sampled_kl, reward", ["length_tail", "sampled_kl", "reward"]):
        found = choose_limits(signals, str(file), True, False)
        assert found == expected and list(found) == list(expected)
    assert choose_limits(None, str(file), True, False) == {"sampled_kl_wrong": 0.27, "sampled_kl": 0.5}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("{}", "not a JSON object"),
        ('{"loss": 1}', "names 'loss'"),
        ('{"reward": -1}', "the limit -1"),
        ('{"reward": true}', "the limit True"),
        ('{"reward": "x"}', "the limit 'x'"),
        ('{"reward": Infinity}', "the limit inf"),
        (None, "cannot be read"),
    ],
)
def test_a_limits_file_that_cannot_be_used_is_refused(tmp_path, text, match):
    file = tmp_path / "limits.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=match):
        read_limits(file)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(guard="stop"), "guard is 'stop'; choose one of off, warn,"),
        (dict(guard="warn", guard_signals="loss"), "guard_signals names 'loss'"),
        (dict(guard="warn", guard_signals=" , "), "name at least one"),
        (dict(guard="warn", guard_signals="length_tail"), "has no default limit"),
        (dict(guard="warn", guard_signals="demonstration_logprob"), "set watch_demonstrations"),
        (dict(guard="warn", guard_signals="divergence", objective="grpo"), "objective='grpo' does not measure"),
        (dict(guard="warn", guard_limits="/no/such/file"), "cannot be read"),
        (dict(guard_signals="reward"), "guard is 'off'"),
        (dict(guard="warn", guard_warmup=-1), "guard_warmup is -1"),
        (dict(guard="warn", guard_patience=0), "guard_patience is 0"),
        (dict(guard="halve_step", guard_max_actions=0), "guard_max_actions is 0"),
        (dict(guard="freeze_teacher", objective="grpo"), "objective='grpo' has none"),
        (dict(guard="rollback_teacher", teacher="frozen"), "teacher='frozen' has none"),
        (dict(guard="freeze_teacher", teacher="trust_region"), "teacher='trust_region' has none"),
        (dict(guard="halve_step", objective="sdpo", optim="lomo"), "not linear"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, options, match):
    with pytest.raises(UserError, match=match) as error:
        config(tmp_path, **options)
    assert "\n" not in str(error.value)


def test_the_command_line_takes_several_signals():
    from pgpo.settings.arguments import parse

    parsed = parse(["--guard", "warn", "--guard_signals", "sampled_kl,reward"])
    assert list(parsed.config.guarded_signals()) == ["sampled_kl", "reward"]


# Actions on a real trainer --------------------------------------------------------------------------------------------

ALARM, BEST = 5, 4
# Share of right completions per step: smoothed .5 .5 .55 .59, then .522: .068 below the best, beyond the limit .06.
SHARES = {1: 0.5, 3: 0.75, ALARM: 0.25}


def steered(prompts, completions, trainer_state, **kwargs):
    """A reward whose mean over the step is what SHARES says."""
    share = SHARES[max(k for k in SHARES if k <= trainer_state.global_step + 1)]
    return [float(i % GROUP < share * GROUP) for i in range(len(prompts))]


class Watch(TrainerCallback):
    """Everything that an action may change, as it is at the end of each step (and the log lines)."""

    def __init__(self, t):
        self.t, self.steps = t, {}
        self.lines, self.texts = [], []
        t.host.alarm = lambda line, text: (self.lines.append(line), self.texts.append(text))
        t.add_callback(self)

    def on_step_end(self, args, state, control, **kwargs):
        optimizer = torch_optimizer(self.t.optimizer)
        self.steps[state.global_step] = {
            "student": weights(self.t.model),
            "teacher": weights(self.t.teacher.module) if self.t.teacher else {},
            "optimizer": {
                f"{n}/{k}": v.clone() for n, s in optimizer.state_dict()["state"].items() for k, v in s.items()
            },
            "lr": [group["lr"] for group in optimizer.param_groups],
        }

    def at(self, step, part):
        return self.steps[step][part]

    @property
    def actions(self):
        return [(line["step"], line["action"]) for line in self.lines]


def guarded(path, guard="off", **options):
    defaults = dict(reward=steered, max_steps=8, lr_scheduler_type="linear", guard=guard)
    if guard != "off":
        defaults |= dict(guard_signals="reward", guard_warmup=0)
    return trainer(path, **(defaults | options))


def trained(path, guard="off", **options):
    watch = Watch(guarded(path, guard, **options))
    watch.logs = train(watch.t)
    return watch


@pytest.fixture
def every_step(monkeypatch):
    """A snapshot at every new best."""
    monkeypatch.setattr("pgpo.train.guard.SNAPSHOT_INTERVAL", 1)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"))


def test_without_a_guard_there_is_nothing(plain):
    assert plain.t.guard is None
    assert not bitwise_equal(plain.at(4, "teacher"), plain.at(5, "teacher"))  # else the tests below say nothing
    assert not bitwise_equal(plain.at(4, "student"), plain.at(5, "student"))


def test_a_warning_is_said_and_changes_nothing(tmp_path, plain):
    t = guarded(tmp_path, "warn")
    printed = []
    t.host.alarm = lambda line, text: printed.append((line, text))
    logs = train(t)
    assert bitwise_equal(weights(t.model), weights(plain.t.model))
    assert bitwise_equal(weights(t.teacher.module), weights(plain.t.teacher.module))
    assert [log["effective_lr"] for log in logs] == [log["effective_lr"] for log in plain.logs]
    (line, text) = printed[0]
    assert text == "step 5: reward 0.522 is 0.068 below its best 0.59 (step 4): no action asked for"
    assert line == {
        "step": 5,
        "signal": "reward",
        "value": pytest.approx(0.522),
        "best": pytest.approx(0.59),
        "best_step": 4,
        "limit": 0.06,
        "action": "warn",
        "reason": text.removeprefix("step 5: "),
    }


def test_by_default_the_sentence_goes_to_stderr(tmp_path, capfd):
    train(guarded(tmp_path, "warn", max_steps=5))
    assert "step 5: reward 0.522 is" in capfd.readouterr().err


def test_a_frozen_teacher_keeps_its_weights_bit_for_bit(tmp_path, plain):
    run = trained(tmp_path, "freeze_teacher")
    assert run.actions[0] == (ALARM, "freeze_teacher") and run.texts[0].endswith("(step 4): teacher frozen")
    assert bitwise_equal(run.at(ALARM, "teacher"), plain.at(ALARM, "teacher"))  # frozen where it stands
    for step in range(ALARM, 9):
        assert bitwise_equal(run.at(step, "teacher"), run.at(ALARM, "teacher"))
    assert not bitwise_equal(run.at(7, "student"), run.at(8, "student"))
    assert bitwise_equal(run.at(ALARM + 1, "student"), plain.at(ALARM + 1, "student"))  # same teacher until here
    assert not bitwise_equal(run.at(8, "student"), plain.at(8, "student"))
    assert {action for _, action in run.actions[1:]} == {"warn"}
    assert "the teacher is frozen already" in run.texts[1]


def test_the_teacher_alone_returns_to_its_best_and_stays(tmp_path, plain, every_step):
    run = trained(tmp_path, "rollback_teacher")
    assert run.actions[0] == (ALARM, "rollback_teacher")
    assert run.texts[0].endswith("teacher back to step 4, teacher frozen")
    for step in range(ALARM, 9):
        assert bitwise_equal(run.at(step, "teacher"), plain.at(BEST, "teacher"))
    assert bitwise_equal(run.at(ALARM, "student"), plain.at(ALARM, "student"))
    assert run.t.guard.snapshot is None  # its memory is free again


@pytest.mark.parametrize("objective", ["pgpo", "sdpo", "grpo"])
@pytest.mark.parametrize("optim", ["adamw_torch", "sgd"])
def test_half_a_step_is_half_the_learning_rate(tmp_path, objective, optim):
    """Bit for bit a run whose learning rate is halved around the optimizer's step from the alarm on."""
    options = dict(objective=objective, optim=optim, max_steps=9, weight_decay=0.1)
    run = trained(tmp_path, "halve_step", **options)
    assert run.actions == [(5, "halve_step"), (6, "halve_step"), (8, "halve_step")]  # .068 .122 .166 .201 below
    assert [text.rsplit(" ", 1)[1] for text in run.texts] == ["0.5", "0.25", "0.125"]
    factors = {6: 0.5, 7: 0.25, 8: 0.25, 9: 0.125}

    class Halve(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            for group in torch_optimizer(reference.optimizer).param_groups:
                group["lr"] *= factors.get(state.global_step + 1, 1.0)

        def on_optimizer_step(self, args, state, control, **kwargs):
            for group in torch_optimizer(reference.optimizer).param_groups:
                group["lr"] /= factors.get(state.global_step + 1, 1.0)

    reference = guarded(tmp_path, **options)
    watch = Watch(reference)
    reference.add_callback(Halve())
    logs = train(reference)
    for step in range(1, 10):
        for part in ("student", "teacher", "optimizer"):
            assert bitwise_equal(run.at(step, part), watch.at(step, part)), (step, part)
        assert run.at(step, "lr") == watch.at(step, "lr")  # the scheduler never saw a factor
    assert [log["learning_rate"] for log in run.logs] == [log["learning_rate"] for log in logs]
    if objective != "grpo":
        for step, (log, other) in enumerate(zip(run.logs, logs, strict=True), 1):
            assert log["effective_lr"] == other["effective_lr"] * factors.get(step, 1.0)
            assert log["rho"] == other["rho"]  # rho is the law's alone


def test_halving_ends_at_an_eighth(tmp_path):
    run = trained(tmp_path, "halve_step", guard_max_actions=9, guard_limits=limits_file(tmp_path, reward=0.01))
    assert run.t.step_factor == 0.125
    assert [a for _, a in run.actions] == ["halve_step"] * 3 + ["warn"] * (len(run.actions) - 3)
    assert len(run.actions) > 3 and "at 0.125 of their size already" in run.texts[3]


def limits_file(path, **limits):
    file = path / "limits.json"
    file.write_text(json.dumps(limits))
    return str(file)


def test_the_guard_acts_at_most_so_often(tmp_path):
    run = trained(tmp_path, "halve_step", guard_max_actions=1)
    assert [a for _, a in run.actions] == ["halve_step", *["warn"] * (len(run.actions) - 1)]
    assert run.t.step_factor == 0.5 and "guard_max_actions = 1 were taken" in run.texts[1]


@pytest.mark.parametrize("objective", ["pgpo", "sdpo", "grpo"])
def test_a_rollback_restores_student_optimizer_and_teacher_and_goes_on(tmp_path, objective, every_step):
    options = dict(objective=objective, max_steps=10)
    plain = trained(tmp_path / "plain", **options)
    run = trained(tmp_path / "run", "rollback", **options)
    # The rewards stay low, so each return to step 4 is followed by the same alarm, until the guard's actions are used.
    assert run.actions[:4] == [(5, "rollback"), (6, "rollback"), (7, "rollback"), (8, "warn")]
    for step in (5, 6, 7):
        for part in ("student", "teacher", "optimizer"):
            assert bitwise_equal(run.at(step, part), plain.at(BEST, part)), (step, part)
    assert not bitwise_equal(run.at(8, "student"), run.at(7, "student"))
    assert all(torch.isfinite(p).all() for p in run.at(10, "student").values())
    assert [run.at(step, "lr") for step in range(1, 11)] == [plain.at(step, "lr") for step in range(1, 11)]
    if objective == "grpo":
        assert run.t.step_factor == 0.125
        assert run.texts[0].endswith("student and optimizer back to step 4, steps now x 0.5")
    else:  # the first return freezes the teacher, the others halve the step
        assert run.t.step_factor == 0.25 and run.t.guard.teacher_frozen
        assert run.texts[0].endswith("student, optimizer and teacher back to step 4, teacher frozen")
        assert run.texts[1].endswith("student, optimizer and teacher back to step 4, steps now x 0.5")
        assert bitwise_equal(run.at(10, "teacher"), plain.at(BEST, "teacher"))


@pytest.mark.parametrize("form", ["undo", "lagged"])
def test_a_rollback_returns_trust_and_the_clip_to_that_step(form, tmp_path, every_step):
    """Red if their running means stay at the alarm, or if a later step writes into the snapshot."""
    options = dict(trust="measured", trust_form=form, adaptive_clip=1.0, objective="sdpo", max_steps=7)
    t = guarded(tmp_path, "rollback", **options)
    watch, plain = Watch(t), t.after_step
    states = {}

    def after_step():
        plain()
        states[t.state.global_step] = json.dumps([t.trust.form.state_dict(), t.clip.state_dict()])

    t.after_step = after_step
    train(t)
    assert watch.actions[:2] == [(ALARM, "rollback"), (ALARM + 1, "rollback")]
    assert states[ALARM] == states[ALARM + 1] == states[BEST]
    assert states[BEST] != states[BEST - 1]


def test_a_rollback_without_a_moving_teacher_halves_the_step(tmp_path, every_step):
    run = trained(tmp_path, "rollback", teacher="frozen", max_steps=6)
    assert run.t.step_factor == 0.25 and not run.t.guard.teacher_frozen


def test_snapshots_are_taken_at_a_best_value_and_not_too_often(tmp_path):
    run = trained(tmp_path, "rollback", max_steps=5)
    assert run.lines[0]["best_step"] == BEST
    assert run.texts[0].endswith("back to step 1, teacher frozen")  # the first best; 3 and 4 follow too closely


def test_no_snapshot_is_taken_at_an_alarm(tmp_path, every_step, monkeypatch):
    """Another signal's alarm may fall on the first one's best step."""
    t = guarded(
        tmp_path, "rollback", guard_signals="grad_norm,reward", guard_limits=limits_file(tmp_path, grad_norm=99)
    )
    update, taken = t.guard.guard.update, []

    def steered_update(step, metrics):  # the gradient norm has its best at every step
        taken.append(t.guard.snapshot.step if t.guard.snapshot else None)
        return update(step, metrics | {"grad_norm": 1.0 / step})

    monkeypatch.setattr(t.guard.guard, "update", steered_update)
    train(t)
    assert taken[:5] == [None, 1, 2, 3, 4] and taken[5] == 4


def test_without_a_snapshot_a_rollback_only_warns(tmp_path):
    """The first signal, whose best counts, has not been measured yet."""
    t = guarded(tmp_path, "rollback", guard_signals="sampled_kl_wrong,reward", max_steps=5)
    watch, update = Watch(t), t.guard.guard.update
    t.guard.guard.update = lambda step, metrics: update(step, metrics | {"sampled_kl_wrong": None})
    train(t)
    assert watch.actions == [(5, "warn")] and t.guard.taken == 0
    assert watch.texts[0].endswith("no action, sampled_kl_wrong has no best value to return to yet")


def test_one_action_per_step_whatever_alarms(tmp_path):
    t = guarded(
        tmp_path, "halve_step", guard_signals="reward,grad_norm", guard_limits=limits_file(tmp_path, grad_norm=0.1)
    )
    watch = Watch(t)
    update = t.guard.guard.update
    t.guard.guard.update = lambda step, metrics: update(step, metrics | {"grad_norm": 9.0 if step >= ALARM else 1.0})
    train(t)
    assert [(x["step"], x["signal"], x["action"]) for x in watch.lines[:2]] == [
        (5, "reward", "halve_step"),
        (5, "grad_norm", "warn"),
    ]
    assert watch.texts[1].endswith("the action of reward stands for it")


@pytest.mark.parametrize(
    ("objective", "guard"),
    [*(("pgpo", guard) for guard in ("rollback", "rollback_teacher", "freeze_teacher")), ("sdpo", "halve_step")],
)
def test_a_resumed_run_goes_on_exactly(tmp_path, objective, guard, every_step):
    """From a checkpoint before the alarm (its snapshot stands in the checkpoint), at it and between two actions."""
    options = dict(objective=objective, save_strategy="steps", save_steps=1)
    whole = trained(tmp_path / "run", guard, **options)
    assert whole.t.guard.taken
    for cut in (4, 5, 6):
        t = guarded(tmp_path / "run", guard, **options, save_total_limit=None)
        watch = Watch(t)
        train(t, resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{cut}"))
        assert t.guard.state_dict() == whole.t.guard.state_dict()
        for part in ("student", "teacher", "optimizer", "lr"):
            a, b = watch.at(8, part), whole.at(8, part)
            assert a == b if part == "lr" else bitwise_equal(a, b), (cut, part)
        assert watch.lines == [line for line in whole.lines if line["step"] > cut]


def test_a_checkpoint_of_another_guard_or_without_its_snapshot_is_refused(tmp_path):
    options = dict(save_strategy="steps", save_steps=1, max_steps=2)
    train(guarded(tmp_path, "rollback", **options))
    checkpoint = tmp_path / "checkpoint-2"
    with pytest.raises(UserError, match="the saved guard is 'rollback', this one 'warn'"):
        train(guarded(tmp_path, "warn", **options), resume_from_checkpoint=str(checkpoint))
    (checkpoint / "pgpo_guard.pt").unlink()
    with pytest.raises(UserError, match=r"checkpoint-2 is not as it was written \(pgpo_guard\.pt: missing\)"):
        train(guarded(tmp_path, "rollback", **options), resume_from_checkpoint=str(checkpoint))


def test_a_guard_may_start_at_a_checkpoint_without_one(tmp_path):
    options = dict(save_strategy="steps", save_steps=1)
    train(guarded(tmp_path, max_steps=2, **options))
    assert not (tmp_path / "checkpoint-2/pgpo_guard.pt").exists()
    t = guarded(tmp_path, "warn", **options)
    watch = Watch(t)
    train(t, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert watch.lines[0]["step"] == ALARM and t.guard.guard.tracks["reward"].seen == 6


def test_with_lora_the_adapters_return(tmp_path, every_step):
    from peft import LoraConfig

    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    t = guarded(tmp_path, "rollback", peft_config=lora, max_steps=5)
    seen = {}

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[state.global_step] = weights(t.model)

    t.add_callback(Look())
    train(t)
    assert bitwise_equal(seen[5], seen[BEST]) and not bitwise_equal(seen[BEST], seen[3])
    moved = {n for n in seen[4] if not torch.equal(seen[3][n], seen[4][n])}
    assert {n.split(".")[-2] for n in moved} == {"default", "teacher"}  # both adapters moved, and both returned
    assert all("lora_" in name for name in t.guard.snapshot.student if name.startswith("parameters/"))


def test_metrics_are_those_of_the_step_however_often_it_logs(tmp_path):
    rare = trained(tmp_path, "warn", logging_steps=4)
    often = trained(tmp_path, "warn")
    assert rare.lines == often.lines and rare.lines
    assert rare.t.guard.state_dict() == often.t.guard.state_dict()


# The run directory ----------------------------------------------------------------------------------------------------


def test_alarms_are_a_log_of_the_run(tmp_path):
    with RunLog.create(tmp_path, {}) as log:
        for step in (3, 5, 8):
            log.metrics(step, {"reward": 1.0})
            log.alarm(step, {"signal": "reward", "value": math.nan, "action": "warn"})
    assert [line["step"] for line in read_run(tmp_path).alarms] == [3, 5, 8]
    assert math.isnan(read_run(tmp_path).alarms[0]["value"])
    RunLog.resume(tmp_path, 5).close()
    assert [line["step"] for line in read_run(tmp_path).alarms] == [3, 5]
    RunLog.create(tmp_path, {}, overwrite=True).close()
    assert read_run(tmp_path).alarms == []


def test_pgpo_train_writes_and_says_every_alarm(tmp_path):
    from pgpo.cli import main

    flags = dict(
        output_dir=tmp_path / "run",
        guard="halve_step",
        guard_signals="grad_norm",
        guard_limits=limits_file(tmp_path, grad_norm=1e-6),
        guard_warmup=0,
        max_steps=4,
        prompts_per_step=2,
        num_generations=4,
        test_rows=1,
        eval_rows=1,
        eval_k=1,
        save_steps=4,
    )
    words = ["train", *(str(word) for name, value in flags.items() for word in (f"--{name}", value))]
    with contextlib.redirect_stderr(io.StringIO()) as err:
        assert main(words) == 0
    alarms = read_run(tmp_path / "run").alarms
    said = [line for line in err.getvalue().splitlines() if "grad_norm" in line]
    assert alarms and said == [f"step {line['step']}: {line['reason']}" for line in alarms]
    assert alarms[0]["action"] == "halve_step"
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-4/pgpo_state.json").read_text())
    assert state["guard"]["step_factor"] == 0.5 ** sum(line["action"] == "halve_step" for line in alarms)
