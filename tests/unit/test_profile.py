"""A profile tells where time went, adds up, costs nothing while it is off, and changes no number of a run."""

from __future__ import annotations

import time

import pytest
import torch
import trainer_kit
from test_checkpoint import TIMES

from pgpo import runlog
from pgpo.report.details import profile_section
from pgpo.runlog import LoggedRun
from pgpo.train import profile
from pgpo.train.profile import Profile, part


def test_a_part_inside_another_counts_for_itself_alone():
    p = Profile(torch.device("cpu"))
    with p.part("optimizer"):
        time.sleep(0.05)
        with p.part("probe"):
            time.sleep(0.15)
        time.sleep(0.05)
    with p.part("evaluation"), p.part("sampling"):
        time.sleep(0.02)
    seconds, _ = p.take()
    assert seconds.keys() == {"optimizer", "probe", "evaluation"}
    assert seconds["probe"] >= 0.15 and seconds["optimizer"] >= 0.1 and seconds["evaluation"] >= 0.02
    assert p.take()[0] == {} and p.total_seconds == seconds


def test_a_part_that_raises_ends():
    p = Profile(torch.device("cpu"))
    with pytest.raises(ValueError), p.part("grading"):
        raise ValueError
    with p.part("teacher"):
        pass
    assert p.take()[0].keys() == {"grading", "teacher"}


@pytest.mark.skipif(not profile._CLEAR.exists(), reason="peaks of a process are told by Linux alone")
def test_peak_memory_is_that_of_the_part():
    p = Profile(torch.device("cpu"))
    with p.part("teacher"):
        torch.ones(2**26)  # 256 MiB, given back
    with p.part("student"):
        torch.ones(2**20)
    _, peaks = p.take()
    assert peaks["teacher"] - peaks["student"] > 200 * 2**20


def test_off_it_is_an_empty_context():
    assert part("sampling") is part("teacher")
    assert not hasattr(part("sampling"), "gen")  # no generator is made


def test_a_run_logs_its_parts_and_ends_with_a_table(tmp_path):
    said: list[str] = []
    options = dict(rollout=None, trust="measured", max_steps=2, eval_dataset=trainer_kit.dataset(2))
    options |= dict(eval_strategy="steps", eval_steps=1, learning_rate=5.0)
    plain = trainer_kit.trainer(tmp_path / "a", **options)
    logs = trainer_kit.train(plain)
    t = trainer_kit.trainer(tmp_path / "b", profile=True, **options)
    t.host.say = said.append
    profiled = trainer_kit.train(t)
    assert part("sampling") is profile._OFF
    for before, after in zip(logs, profiled, strict=True):
        seconds = {n: v for n, v in after.items() if n.startswith(runlog.PROFILE) and n.endswith("_seconds")}
        named = {n.removeprefix(runlog.PROFILE).removesuffix("_seconds") for n in seconds}
        assert {"sampling", "grading", "teacher", "student", "backward", "probe", "optimizer", "average"} <= named
        assert named <= set(runlog.PROFILE_PARTS)
        once = sum(v for n, v in seconds.items() if "evaluation" not in n)
        # The step's own time ends before the optimizer: sampling to backward must fit in it.
        inside = once - sum(seconds[f"{runlog.PROFILE}{n}_seconds"] for n in ("optimizer", "average", "probe"))
        assert 0 < inside <= after["step_time"]
        same = after.keys() - {n for n in after if n.startswith(runlog.PROFILE)}
        assert before.keys() == same
        assert all(before[n] == after[n] for n in same if not n.endswith((*TIMES, "_runtime", "epoch")))
    (table,) = [text for text in said if text.startswith("profile of 2 steps")]
    assert {line.split()[0] for line in table.splitlines()[2:]} >= {
        "sampling",
        "teacher",
        "optimizer",
        "evaluation",
        "other",
    }
    shares = [float(line.split()[2].rstrip("%")) for line in table.splitlines()[2:]]
    assert sum(shares) == pytest.approx(100, abs=1)
    assert trainer_kit.differences(plain, t) == []


def test_the_report_draws_it_and_is_silent_without(tmp_path):
    lines = [{"step": k, "profile/sampling_seconds": 0.3, "profile/teacher_seconds": 0.1} for k in (1, 2)]
    lines[1]["profile/teacher_peak_gib"] = 1.5
    fields = dict(directory=tmp_path, config={}, evaluations=[], alarms=[])
    section = profile_section([_run(lines, **fields), _run([{"step": 1}], **fields)], ["a <b>", "other"])
    assert "a &lt;b&gt;" in section and "75.0%" in section and "1.5" in section and "<h3>other" not in section
    assert section.count("<rect") == 4
    assert profile_section([_run([{"step": 1}], **fields)], ["other"]) is None


def _run(metrics, **fields) -> LoggedRun:
    run = object.__new__(LoggedRun)
    for name, value in (fields | {"metrics": metrics}).items():
        object.__setattr__(run, name, value)
    return run


def test_a_training_that_fails_leaves_no_profile_on(tmp_path):
    """Red if the parts of a later run in this process are added to a dead trainer's."""

    def fail(*args, **kwargs):
        raise RuntimeError("the disk is gone")

    t = trainer_kit.trainer(tmp_path, profile=True, max_steps=1)
    t.optimize = fail
    with pytest.raises(RuntimeError, match="the disk is gone"):
        t.train()
    assert profile._on is None
