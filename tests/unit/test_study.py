"""`pgpo study`: the plan and its mistakes, the queue with needs and failures, resumption, and one real tiny study.

The engine is run with functions that stand in for training; they are named here so that the worker processes, which
import this file anew, find them.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import patient

from pgpo.cli import main as cli
from pgpo.errors import UserError
from pgpo.lab import study as study_module
from pgpo.lab.plan import Arm, Study, StudyRun, argv, read_study
from pgpo.lab.study import (
    arguments_of,
    check_unchanged,
    duration,
    plan,
    rounded,
    run_study,
    seconds_for,
    selected_runs,
    write_tables,
)
from pgpo.runlog import lock
from pgpo.settings.arguments import parse
from pgpo.study_files import RECORDS_FILE, multipliers, read_records, write_records

STEPS = 20


# ---------------------------------------------------------------- stand-ins for training


def fake(job: dict[str, Any]) -> dict[str, Any]:
    """What `execute` returns, at once; notes each call beside the run's directory. rho depends on the seed."""
    if "base" in job:
        Path(job["base"]["out"]).mkdir(parents=True)
        note(Path(job["base"]["out"]).parents[1], job["name"])
        return {}
    directory = Path(job["directory"])
    note(directory.parents[3], job["name"])
    seed = int(directory.name.removeprefix("seed-"))
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "job.json").write_text(json.dumps(job))
    return result([1 + (seed + step) / 100 for step in range(STEPS)])


def result(rho: list[float], scores: tuple[float, ...] = (0.25, 0.75)) -> dict[str, Any]:
    questions = {f"q{i}": score for i, score in enumerate(scores)}
    curve = [(0, 0.5), (10, 0.9), (20, 0.7)]
    return {
        "environment": {"python": "3", "git_commit": "abc"},
        "steps": list(range(1, len(rho) + 1)),
        "metrics": {"rho": rho, "information": [0.1] * len(rho)},
        "evaluations": [{"step": s, "split": "validation", "avg_at_k": v} for s, v in curve],
        "test_scores": questions,
        "selected_step": 10,
        "selected_test_scores": questions,
        "seconds_per_step": 0.1,
        "seconds": 3.0,
    }


def note(out: Path, name: str) -> None:
    with (out / "calls.txt").open("a") as file:
        file.write(f"{name}\n")


def sometimes_broken(job: dict[str, Any]) -> dict[str, Any]:
    """Fails where the method is called so."""
    if "broken" in job["name"] and not (Path(job["directory"]).parents[3] / "mended").exists():
        raise ArithmeticError("grad_norm is\nnot finite")
    return fake(job)


def sometimes_killed(job: dict[str, Any]) -> dict[str, Any]:
    if "broken" in job["name"]:
        os.kill(os.getpid(), signal.SIGKILL)
    return fake(job)


def slow_after_two(job: dict[str, Any]) -> dict[str, Any]:
    """Two jobs at once, the others in a minute; notes its process."""
    out = Path(job["directory"]).parents[3]
    (out / f"pid-{os.getpid()}").touch()
    if len(calls(out)) >= 2:
        time.sleep(60)
    return fake(job)


def base_broken(job: dict[str, Any]) -> dict[str, Any]:
    if "base" in job:
        raise OSError("disk full")
    return fake(job)


def calls(out: Path) -> list[str]:
    path = out / "calls.txt"
    return path.read_text().split() if path.exists() else []


def study_of(*arms: Arm, seeds: tuple[int, ...] = (1,), compare: dict[str, list[str]] | None = None) -> Study:
    queue = [StudyRun(arm, seed) for seed in seeds for arm in arms]
    return Study("test", list(seeds), 4, queue, compare or {}, {"name": "test"})


def arm(method: str, setting: str = "plain", **values: Any) -> Arm:
    flags = values.pop("flags", {"learning_rate": 0.001})
    defaults = {"objective": "pgpo", "learning_rate": 0.001, "max_steps": STEPS, "eval_steps": 10, "seconds": 1.0}
    return Arm(setting, method, flags, **{**defaults, **values})


def run(study: Study, out: Path, do: Any = fake, jobs: int = 1, **options: Any) -> dict[str, dict[str, Any]]:
    return run_study(study, out, study.queue, jobs=jobs, do=do, **options)


def job_of(out: Path, name: str) -> dict[str, str]:
    """The flags that a run got."""
    argv = json.loads((out / "runs" / name / "job.json").read_text())["argv"]
    return dict(word.removeprefix("--").split("=", 1) for word in argv)


# ---------------------------------------------------------------- the queue


def test_runs_are_done_in_order_and_recorded(tmp_path: Path) -> None:
    study = study_of(arm("b"), arm("a", flags={"alpha": 0.5, "bf16": False}), seeds=(3, 2))
    records = run(study, tmp_path)
    assert calls(tmp_path) == ["plain/b/seed-3", "plain/a/seed-3", "plain/b/seed-2", "plain/a/seed-2"]
    assert records == read_records(tmp_path / RECORDS_FILE)
    record = records["plain/a/seed-3"]
    assert (record["status"], record["error"], record["commit"], record["test_k"]) == ("ok", None, "abc", 4)
    assert record["flags"] == {"alpha": 0.5, "bf16": False}
    assert record["arguments"] == {"alpha": 0.5, "bf16": False, "seed": 3}
    flags = job_of(tmp_path, "plain/a/seed-3")
    assert flags["seed"] == "3" and flags["bf16"] == "false"
    assert (flags["save_strategy"], flags["save_steps"]) == ("steps", "10")  # a checkpoint at every evaluation
    assert flags["output_dir"] == str(tmp_path / "runs/plain/a/seed-3")


def test_the_learning_rate_is_multiplied_by_the_mean_rho_of_the_same_seed(tmp_path: Path) -> None:
    """The derived run stands first in the queue and must wait; another seed or setting has another mean."""
    arms = [arm("lr", s, lr_times_mean_rho_of="pgpo", learning_rate=r) for s, r in (("plain", 0.001), ("style", 0.1))]
    arms += [arm("pgpo", "plain"), arm("pgpo", "style")]
    run(study_of(*arms, seeds=(1, 50)), tmp_path, jobs=2)
    for setting, rate in (("plain", 0.001), ("style", 0.1)):
        for seed in (1, 50):
            mean = sum(1 + (seed + step) / 100 for step in range(STEPS)) / STEPS
            flags = job_of(tmp_path, f"{setting}/lr/seed-{seed}")
            assert float(flags["learning_rate"]) == pytest.approx(rate * mean, rel=1e-5)


def test_what_trust_kept_is_a_multiplier_too(tmp_path: Path) -> None:
    """rho times trust's part, for the constant rate and the shuffled one; a record of an older run has rho alone."""
    record = {"metrics": {"rho": [1.0, 2.0, 1.5, None], "trust_rho": [0.5, 0.25, None, 1.0]}}
    assert multipliers(record["metrics"]) == [0.5, 0.5, 1.5] and multipliers({"rho": [1.2]}) == [1.2]
    assert multipliers({}) == []
    trust = StudyRun(arm("lr", lr_times_mean_rho_of="pgpo", learning_rate=0.01), 1)
    assert arguments_of(trust, {"plain/pgpo/seed-1": record}, tmp_path)["learning_rate"] == pytest.approx(
        0.01 * 2.5 / 3, rel=1e-5
    )


def test_the_rate_of_the_teacher_is_multiplied_too_where_it_is_asked(tmp_path: Path) -> None:
    """Measured trust slows both; a control that slows the step alone teaches from another teacher."""
    record = {"plain/pgpo/seed-1": {"metrics": {"rho": [1.0, 1.0], "trust_rho": [0.5, 0.25]}}}
    both = arm("c", lr_times_mean_rho_of="pgpo", teacher_rate_times_mean_rho_of="pgpo", learning_rate=0.01)
    both = dataclasses.replace(both, teacher_rate=0.04)
    flags = arguments_of(StudyRun(both, 1), record, tmp_path)
    assert (flags["learning_rate"], flags["teacher_rate"]) == (pytest.approx(0.00375), pytest.approx(0.015))
    teacher = dataclasses.replace(both, lr_times_mean_rho_of=None)
    assert StudyRun(teacher, 1).needs == "plain/pgpo/seed-1"
    assert arguments_of(StudyRun(teacher, 1), record, tmp_path)["learning_rate"] == 0.001  # the arm's own


def test_the_shuffled_multipliers_are_that_runs_own_in_a_seeded_order(tmp_path: Path) -> None:
    study = study_of(arm("shuffled", rho_shuffled_from="pgpo"), arm("pgpo"), seeds=(1, 2))
    for out in (tmp_path / "a", tmp_path / "b"):
        records = run(study, out)
    orders = []
    for seed in (1, 2):
        own = records[f"plain/pgpo/seed-{seed}"]["metrics"]["rho"]
        files = [
            Path(job_of(out, f"plain/shuffled/seed-{seed}")["rho_file"]) for out in (tmp_path / "a", tmp_path / "b")
        ]
        first, second = (json.loads(file.read_text()) for file in files)
        assert sorted(first) == sorted(own) and first != own
        assert first == second  # the same study again is the same experiment
        orders.append([own.index(value) for value in first])
    assert orders[0] != orders[1]


def test_a_failure_is_recorded_and_stops_no_other(tmp_path: Path) -> None:
    study = study_of(arm("broken"), arm("lr", lr_times_mean_rho_of="broken"), arm("good"), compare={"good": ["broken"]})
    records = run(study, tmp_path, sometimes_broken)
    assert {name: r["status"] for name, r in records.items()} == {
        "plain/broken/seed-1": "failed",
        "plain/lr/seed-1": "failed",
        "plain/good/seed-1": "ok",
    }
    assert records["plain/broken/seed-1"]["error"] == "ArithmeticError: grad_norm is not finite"
    assert records["plain/lr/seed-1"]["error"] == "it needs plain/broken/seed-1, which failed"
    assert "Traceback" in (tmp_path / "worker-1.log").read_text()
    write_tables(study, tmp_path, records)  # tables of what there is
    assert "0 (1 failed)" in (tmp_path / "tables.md").read_text()

    (tmp_path / "mended").touch()
    assert run(study, tmp_path, sometimes_broken) == records  # a failed run is not tried again by itself
    again = run(study, tmp_path, sometimes_broken, retry_failed=True)
    assert {r["status"] for r in again.values()} == {"ok"}
    assert calls(tmp_path).count("plain/good/seed-1") == 1


def test_a_worker_that_is_killed_costs_its_own_run_only(tmp_path: Path) -> None:
    records = run(study_of(arm("a"), arm("broken"), arm("b"), arm("c")), tmp_path, sometimes_killed, jobs=2)
    assert [name for name, r in records.items() if r["status"] == "failed"] == ["plain/broken/seed-1"]
    assert "exit code -9" in records["plain/broken/seed-1"]["error"]
    assert sorted(calls(tmp_path)) == ["plain/a/seed-1", "plain/b/seed-1", "plain/c/seed-1"]


def test_a_killed_study_leaves_no_worker_behind_and_goes_on(tmp_path: Path) -> None:
    script = f"""
import sys; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]
from pathlib import Path
import test_study as t
if __name__ == "__main__":
    t.run(t.study_of(t.arm("a"), t.arm("b"), t.arm("c"), t.arm("d")), Path({str(tmp_path)!r}), t.slow_after_two, jobs=2)
"""
    (tmp_path / "script.py").write_text(script)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], stderr=subprocess.DEVNULL)
    wait_until(lambda: len(read_records(tmp_path / RECORDS_FILE)) == 2)
    parent.kill()
    parent.wait()
    pids = [int(p.name.removeprefix("pid-")) for p in tmp_path.glob("pid-*")]
    assert pids
    wait_until(lambda: not any(alive(pid) for pid in pids))
    study = study_of(arm("a"), arm("b"), arm("c"), arm("d"))
    before = calls(tmp_path)
    records = run(study, tmp_path)
    assert len(records) == 4
    assert sorted(calls(tmp_path)[len(before) :]) == sorted({r.name for r in study.queue} - set(before))


def wait_until(true: Any, seconds: float = patient(20)) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie that nobody has waited for does not)."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_the_records_alone_are_the_resume_point(tmp_path: Path) -> None:
    study = study_of(arm("a"), arm("lr", lr_times_mean_rho_of="a"), arm("later", lr_times_mean_rho_of="a"))
    run_study(study, tmp_path / "a", study.queue[:2], jobs=1, do=fake)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / RECORDS_FILE).write_bytes((tmp_path / "a" / RECORDS_FILE).read_bytes())
    records = run(study, tmp_path / "b")
    assert calls(tmp_path / "b") == ["plain/later/seed-1"]
    assert list(records) == [r.name for r in study.queue]


def test_a_base_model_is_built_once_before_the_runs_that_need_it(tmp_path: Path) -> None:
    study = study_of(arm("a", base_seed=1), arm("b", base_seed=1), arm("c"))
    records = run(study, tmp_path)
    done = calls(tmp_path)
    assert done.count("bases/plain-seed-1") == 1 and set(done[:1]) == {"bases/plain-seed-1"}
    assert len(records) == 3 and "bases" not in str(list(records))
    assert job_of(tmp_path, "plain/a/seed-1")["model_name_or_path"] == str(tmp_path / "bases/plain-seed-1")
    assert records["plain/a/seed-1"]["arguments"]["model_name_or_path"] == "bases/plain-seed-1"  # the study can move
    assert "model_name_or_path" not in job_of(tmp_path, "plain/c/seed-1")

    failed = run(study, tmp_path / "no", base_broken)
    assert [r["status"] for r in failed.values()].count("failed") == 2
    assert "OSError: disk full" in failed["plain/a/seed-1"]["error"]


def test_a_changed_study_is_refused_before_anything_runs(tmp_path: Path) -> None:
    run(study_of(arm("a", flags={"learning_rate": "1e-3", "variant": "style"})), tmp_path)
    before = (tmp_path / RECORDS_FILE).read_bytes()
    run(study_of(arm("a", flags={"learning_rate": 0.001, "variant": "style"})), tmp_path)  # the same number
    for other in (
        arm("a", flags={"learning_rate": 0.002, "variant": "style"}),
        arm("a", flags={"learning_rate": 0.001}),
        arm("a", flags={"learning_rate": 0.001, "variant": "style", "alpha": 2}),
        arm("a", flags={"learning_rate": 0.001, "variant": "style"}, base_seed=1),
        arm("a", flags={"learning_rate": 0.001, "variant": "style"}, train=False),
    ):
        with pytest.raises(UserError, match=r"the run plain/a/seed-1 was finished with .* choose another --out"):
            run(study_of(other, arm("new")), tmp_path)
    changed_k = study_of(arm("a", flags={"learning_rate": 0.001, "variant": "style"}))
    with pytest.raises(UserError, match="test_k = 4, the study now says 8"):
        run(Study("test", [1], 8, changed_k.queue, {}, {}), tmp_path)
    assert (tmp_path / RECORDS_FILE).read_bytes() == before
    assert calls(tmp_path) == ["plain/a/seed-1"]


def test_a_failed_run_may_be_changed(tmp_path: Path) -> None:
    run(study_of(arm("broken")), tmp_path, sometimes_broken)
    changed = study_of(arm("broken", flags={"learning_rate": 0.5}))
    records = run(changed, tmp_path, retry_failed=True)
    assert records["plain/broken/seed-1"]["flags"] == {"learning_rate": 0.5}


def test_two_studies_in_one_folder_are_refused(tmp_path: Path) -> None:
    with lock(tmp_path, "busy"), pytest.raises(UserError, match="another study is running"):
        run(study_of(arm("a")), tmp_path)
    assert len(run(study_of(arm("a")), tmp_path)) == 1


def test_damaged_records_are_named_and_left_alone(tmp_path: Path) -> None:
    run(study_of(arm("a"), arm("b")), tmp_path)
    path = tmp_path / RECORDS_FILE
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"no gzip", gzip.compress(b"[1]\n"), gzip.compress(b'{"a": 1')):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"records\.jsonl\.gz cannot be read"):
            run(study_of(arm("a")), tmp_path)
        assert path.read_bytes() == damaged
    assert [p.name for p in tmp_path.glob("*.tmp")] == []


def test_floats_of_a_record_have_five_digits_and_are_finite() -> None:
    given = {"a": [0.123456789, 1234567.0, 1.5e-9], "b": (math.nan, math.inf), "c": "x", "d": 7, "e": True, "f": None}
    assert rounded(given) == {
        "a": [0.12346, 1234600.0, 1.5e-9],
        "b": [None, None],
        "c": "x",
        "d": 7,
        "e": True,
        "f": None,
    }


def test_the_time_left_is_the_estimate_scaled_by_what_was_measured() -> None:
    study = study_of(arm("a", seconds=10), arm("b", seconds=30), arm("c", seconds=100))
    a, b, c = study.queue
    assert seconds_for([a, c], study.queue, {}) == 110
    records = {a.name: {"seconds": 25.0}, b.name: {"seconds": 55.0}}  # 80 measured for 40
    assert seconds_for([c], study.queue, records) == 200
    assert [duration(s) for s in (12, 89, 600, 3600 * 3 + 300)] == ["12 s", "89 s", "10 min", "3 h 05 min"]


def test_only_chooses_arms_and_what_they_need() -> None:
    study = study_of(arm("a"), arm("lr", lr_times_mean_rho_of="a"), arm("b"), arm("a", "style"), seeds=(1, 2))
    chosen = [r.name for r in selected_runs(study, ["plain/lr"])]
    assert chosen == ["plain/a/seed-1", "plain/lr/seed-1", "plain/a/seed-2", "plain/lr/seed-2"]
    assert {r.arm.name for r in selected_runs(study, ["style", "*/b"])} == {"style/a", "plain/b"}
    assert selected_runs(study, []) == study.queue
    with pytest.raises(UserError, match="'plain/x' fits no setting/method"):
        selected_runs(study, ["plain/a", "plain/x"])


def test_the_plan_counts_what_is_done(tmp_path: Path) -> None:
    study = study_of(arm("a"), arm("broken"), seeds=(1, 2))
    run_study(study, tmp_path, study.queue[:2], jobs=1, do=sometimes_broken)
    first, second, last = plan(study, study.queue, read_records(tmp_path / RECORDS_FILE), jobs=2).splitlines()
    assert first.split()[:5] == ["plain/a", "2", "runs", "1", "done"]
    assert "1 failed" in second
    assert last.startswith("4 runs, 2 to do: 6 s of one core, 3 s on 2 workers (measured")  # a run took 3 s, not 1 s


def test_records_are_replaced_whole(tmp_path: Path, monkeypatch) -> None:
    """A crash while writing leaves the old file."""
    path = tmp_path / RECORDS_FILE
    write_records(path, {"x": {"setting": "s", "method": "m", "seed": 1}})
    before = path.read_bytes()
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_records(path, {})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_summary_file_is_the_summary(tmp_path: Path) -> None:
    """Its lists stand on one line each; texts and numbers must survive that."""
    study = study_of(arm("a"), arm("b"), seeds=(1, 2), compare={"a": ["b"]})
    object.__setattr__(study, "document", {"name": "t", "texts": ["a [ b ]", "c,  d"], "empty": [], "deep": [[1, 2]]})
    write_tables(study, tmp_path, run(study, tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["study"] == study.document
    assert summary["settings"]["plain"]["methods"]["b"]["seeds"] == [1, 2]
    assert summary["settings"]["plain"]["methods"]["b"]["versus"]["a"]["runs"] == 2
    assert len((tmp_path / "summary.json").read_text().splitlines()) < 120


# ---------------------------------------------------------------- the plan

GOOD: dict[str, Any] = {
    "name": "good",
    "seeds": [1, 2],
    "common": {"max_steps": 20, "eval_steps": 10, "learning_rate": "1e-3"},
    "settings": {"plain": {}, "fast": {"learning_rate": 0.002}},
    "methods": {
        "base": {"train": False},
        "sdpo": {"objective": "sdpo"},
        "pgpo": {"alpha": 0.5},
        "lr": {"objective": "sdpo", "lr_times_mean_rho_of": "pgpo", "max_steps": 30},
        "shuffled": {"rho_shuffled_from": "pgpo"},
    },
    "compare": {"sdpo": "all", "lr": ["pgpo"]},
}


def written(tmp_path: Path, **changes: Any) -> Path:
    path = tmp_path / "study.yaml"
    document = {k: v for k, v in (GOOD | changes).items() if v is not None}
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


def test_a_study_is_read(tmp_path: Path) -> None:
    study = read_study(written(tmp_path))
    assert (study.name, study.seeds, study.test_k) == ("good", [1, 2], 16)
    assert study.compare == {"sdpo": ["base", "pgpo", "lr", "shuffled"], "lr": ["pgpo"]}
    assert [r.name for r in study.queue[:6]] == [
        "plain/base/seed-1",
        "plain/sdpo/seed-1",
        "plain/pgpo/seed-1",
        "plain/lr/seed-1",
        "plain/shuffled/seed-1",
        "fast/base/seed-1",
    ]
    assert len(study.queue) == 20
    arms = {r.arm.name: r.arm for r in study.queue}
    assert [arms[n].learning_rate for n in ("plain/sdpo", "fast/sdpo")] == [0.001, 0.002]
    assert (arms["plain/lr"].max_steps, arms["plain/sdpo"].max_steps) == (30, 20)  # methods override common
    assert (arms["plain/base"].train, arms["plain/sdpo"].train) == (False, True)
    assert arms["plain/lr"].identity["lr_times_mean_rho_of"] == "pgpo"
    assert "train" in arms["plain/base"].identity and "train" not in arms["plain/sdpo"].identity
    check_unchanged(study, {})


def test_groups_are_done_one_after_the_other_each_run_once(tmp_path: Path) -> None:
    groups = [
        {"settings": ["fast"], "methods": ["pgpo", "base"], "seeds": [7]},
        {"settings": "all", "methods": ["base"]},
        {"settings": ["fast"], "methods": ["base"], "seeds": [7, 2]},
    ]
    study = read_study(written(tmp_path, groups=groups))
    assert [r.name for r in study.queue] == [
        "fast/pgpo/seed-7",
        "fast/base/seed-7",
        "plain/base/seed-1",
        "fast/base/seed-1",
        "plain/base/seed-2",
        "fast/base/seed-2",
    ]


def test_another_task_and_model_with_options_as_a_mapping(tmp_path: Path, capsys) -> None:
    common = {
        **{"model_name_or_path": "somebody/model", "task": "reasoning_gym:chain_sum", "use_cpu": True},
        **{"task_options": {"max_digits": 1}, "max_steps": 4, "eval_steps": 2, "eval_strategy": "steps"},
    }
    path = written(tmp_path, common=common, settings={"sums": {}}, methods={"sdpo": {}}, compare={}, groups=[{}])
    (run,) = read_study(path).queue[:1]
    words = argv(run.arm.flags)
    assert '--task_options={"max_digits": 1}' in words and "--use_cpu=true" in words
    assert parse(words).run.task_options == {"max_digits": 1}
    assert study_module.main(path, out=tmp_path / "out", list_only=True) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].split()[0] == "sums/sdpo"
    assert said[-1].endswith("how long is known when the first one is finished")  # the estimate is the lab's


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"seeds": None}, "seeds is None"),
        ({"seeds": []}, r"seeds is \[\]"),
        ({"seeds": [1, 1]}, "seeds has a number twice"),
        ({"seeds": [1, "2"]}, "seeds is"),
        ({"seeds": [True]}, "seeds is"),
        ({"seeds": [-1]}, "seeds is"),
        ({"name": None}, "name is None"),
        ({"name": "a/b"}, "name is 'a/b'"),
        ({"test_k": 0}, "test_k is 0"),
        ({"seedz": [1]}, "unknown names: seedz"),
        ({"settings": {}}, "settings is missing or empty"),
        ({"methods": None}, "methods is missing or empty"),
        ({"methods": {1.0: {}}}, "methods has the name 1.0"),
        ({"methods": {"../x": {}}}, "methods has the name '../x'"),
        ({"methods": {"a": 3}}, "method a is 3"),
        ({"methods": {"a": {"alpha": [1]}}}, r"method a: alpha is \[1\]"),
        ({"methods": {"a": {"alpha": None}}}, "method a: alpha is None"),
        ({"methods": {"a": {"alfa": 1}}, "compare": {}}, "plain/a: .*--alfa"),
        ({"methods": {"a": {"alpha": "much"}}, "compare": {}}, "plain/a: .*much"),
        ({"methods": {"a": {"objective": "ppo"}}, "compare": {}}, "plain/a: objective is 'ppo'"),
        ({"methods": {"a": {"seed": 1}}, "compare": {}}, "plain/a sets seed, which the study sets itself"),
        ({"common": {"save_steps": 5}, "compare": {}}, "plain/base sets save_steps"),
        ({"common": {"greater_is_better": False}, "compare": {}}, "plain/base sets greater_is_better"),
        ({"methods": {"a": {"train": "no"}}, "compare": {}}, "train is 'no'"),
        ({"methods": {"a": {"lr_times_mean_rho_of": "b"}}, "compare": {}}, "needs plain/b/seed-1, which no group runs"),
        (
            {"methods": {"s": {"objective": "sdpo"}, "a": {"lr_times_mean_rho_of": "s"}}, "compare": {}},
            "needs the multipliers of plain/s/seed-1, which has none",
        ),
        (
            {"methods": {"b": {"train": False}, "a": {"lr_times_mean_rho_of": "b"}}, "compare": {}},
            "needs the multipliers of plain/b/seed-1, which has none",
        ),
        (
            {"methods": {"p": {}, "a": {"lr_times_mean_rho_of": "p", "rho_shuffled_from": "p"}}, "compare": {}},
            "plain/a shuffles multipliers and takes the mean of others",
        ),
        (
            {
                "methods": {
                    "p": {},
                    "q": {},
                    "a": {"lr_times_mean_rho_of": "p", "teacher_rate_times_mean_rho_of": "q"},
                },
                "compare": {},
            },
            "plain/a takes multipliers of two methods",
        ),
        (
            {
                "methods": {"p": {}, "a": {"teacher_rate_times_mean_rho_of": "p", "teacher": "frozen"}},
                "compare": {},
            },
            "plain/a has teacher_rate_times_mean_rho_of and no teacher with a rate",
        ),
        (
            {"methods": {"p": {}, "a": {"lr_times_mean_rho_of": "p", "learning_rate": 0.5}}, "compare": {}},
            "has the learning rate 0.5, and the multipliers of plain/p/seed-1 are of 0.001; make them equal",
        ),
        (
            {
                "methods": {
                    "p": {"objective": "sdpo", "trust": "measured", "trust_form": "lagged"},
                    "a": {"teacher_rate_times_mean_rho_of": "p"},
                },
                "compare": {},
            },
            "the teacher of plain/p/seed-1 follows at its own rate",
        ),
        (
            {"methods": {"p": {}, "a": {"teacher_rate_times_mean_rho_of": "p", "objective": "grpo"}}, "compare": {}},
            "plain/a has teacher_rate_times_mean_rho_of and no teacher with a rate",
        ),
        ({"methods": {"p": {}, "a": {"rho_shuffled_from": "p", "max_steps": 10}}, "compare": {}}, "has 10 steps"),
        (
            {"methods": {"p": {}, "a": {"rho_shuffled_from": "p", "objective": "sdpo"}}, "compare": {}},
            "plain/a: rho_file replaces the law",
        ),
        (
            {"methods": {"p": {}, "a": {"rho_shuffled_from": "p", "lr_times_mean_rho_of": "p"}}, "compare": {}},
            "make two methods of it",
        ),
        ({"settings": {"s": {"train": False}}}, "train is set in a setting or in common; set it in a method"),
        ({"settings": {"s": {"base_seed": "x"}}}, "base_seed is 'x'"),
        ({"settings": {"s": {"base_seed": 1, "model_name_or_path": "m"}}}, "base_seed rebuilds the lab's own"),
        ({"common": {"max_steps": 25, "eval_steps": 10}}, "does not divide max_steps = 25"),
        ({"common": {"max_steps": -1, "eval_steps": 10}}, "max_steps is -1"),
        ({"groups": []}, "groups must be a list"),
        ({"groups": [{"settings": ["slow"]}]}, "group 1: settings names 'slow'"),
        ({"groups": [{"methods": []}]}, "group 1: methods is"),
        ({"groups": [{"method": ["sdpo"]}]}, "group 1 has unknown names: method"),
        ({"groups": [{"seeds": [3, 3]}]}, "group 1: seeds has a number twice"),
        ({"groups": [{"methods": ["lr"]}]}, "plain/lr/seed-1 needs plain/pgpo/seed-1"),
        ({"compare": {"sdpq": "all"}}, "compare names 'sdpq'"),
        ({"compare": {"sdpo": ["pgpq"]}}, "compare: sdpo names 'pgpq'"),
        ({"compare": {"sdpo": "pgpo"}}, "compare: sdpo is 'pgpo'"),
        ({"alarms": ["sdpo"]}, "alarms must map"),
        ({"alarms": {"sdpo": "frozn"}}, "alarms names 'frozn'"),
        ({"reference": [1]}, "reference must map"),
        ({"reference": {"slow": {}}}, "reference names 'slow'"),
        ({"reference": {"plain": {"sdpq": 0.5}}}, "reference: plain names 'sdpq'"),
        ({"reference": {"plain": {"sdpo": 72.57}}}, "plain/sdpo is 72.57; give a share"),
        ({"reference": {"plain": 0.5}}, "plain must map methods"),
    ],
)
def test_a_mistake_in_the_study_is_told(changes: dict[str, Any], told: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told) as caught:
        study_module.main(written(tmp_path, **changes), out=tmp_path / "out")
    assert "study.yaml" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: [", "not valid YAML"),
        ("- a\n", "holds no"),
        ("", "holds no"),
        ("name: a\nmethods: {x: {}, x: {}}\n", "'x' stands twice"),
        ("name: a\nname: b\n", "'name' stands twice"),
    ],
)
def test_a_file_that_is_no_study_is_told(text: str, told: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(text)
    assert cli(["study", str(path)]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_command_tells_what_it_cannot_do(tmp_path: Path, capsys) -> None:
    path, blocked = written(tmp_path), tmp_path / "file"
    blocked.touch()
    for words, told in (
        ([str(tmp_path / "none.yaml")], "cannot be read"),
        ([str(path), "--jobs", "0"], "--jobs is 0"),
        ([str(path), "--out", str(blocked)], "is a file"),
        ([str(path), "--tables", "--out", str(tmp_path / "empty")], "no finished runs"),
        ([str(path), "--only", "x/y"], "fits no setting/method"),
    ):
        assert cli(["study", *words]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_the_base_model_is_whole_or_not_there(tmp_path: Path, monkeypatch) -> None:
    from pgpo.command.models import load_model
    from pgpo.lab import base_model

    real = base_model.main
    monkeypatch.setattr(base_model, "measure", lambda *a, **k: {"student": 0.5})
    monkeypatch.setattr(base_model, "main", lambda **k: real(**k, steps=2))
    out = tmp_path / "bases/style-seed-3"
    (tmp_path / "bases/style-seed-3.tmp").mkdir(parents=True)
    (tmp_path / "bases/style-seed-3.tmp/config.json").write_text("of a killed worker")
    job = {"name": "bases/style-seed-3", "base": {"variant": "style", "seed": 3, "out": str(out)}}
    assert study_module.execute(job) == {}
    assert json.loads((out / "provenance.json").read_text())["command"] == "pgpo lab-base --variant style --seed 3"
    assert load_model(out)[0].num_parameters() > 100_000
    assert [p.name for p in out.parent.iterdir()] == ["style-seed-3"]


# ---------------------------------------------------------------- the whole, with real training


def test_a_real_study_trains_tests_and_compares(tmp_path: Path, capsys) -> None:
    study = {
        "name": "tiny",
        "seeds": [1],
        "test_k": 3,
        "common": {
            "max_steps": 3,
            "eval_steps": 1,
            "eval_k": 2,
            "eval_rows": 8,
            "test_rows": 6,
            "samples_per_step": 0,
            "prompts_per_step": 2,
            "num_generations": 4,
        },
        "settings": {"plain": {}},
        "methods": {
            "base": {"train": False},
            "pgpo": {"alpha": 1.5},
            "shuffled": {"rho_shuffled_from": "pgpo"},
            "ruined": {"objective": "sdpo", "learning_rate": 0.3},
        },
        "compare": {"pgpo": "all"},
    }
    path, out = tmp_path / "tiny.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(study))
    assert cli(["study", str(path), "--out", str(out), "--jobs", "1"]) == 0
    records = read_records(out / RECORDS_FILE)
    base, pgpo, shuffled = (records[f"plain/{m}/seed-1"] for m in ("base", "pgpo", "shuffled"))
    assert base["test_scores"].keys() == pgpo["test_scores"].keys() and len(base["test_scores"]) == 6
    for record in (base, pgpo, shuffled):
        for score in (record["test_scores"] | record["selected_test_scores"]).values():
            assert round(3 * score) == pytest.approx(3 * score, abs=1e-4)  # a mean of 3
    assert pgpo["steps"] == [1, 2, 3] and len(pgpo["metrics"]["rho"]) == 3
    assert sorted(shuffled["metrics"]["rho"]) == sorted(pgpo["metrics"]["rho"])  # the trainer took the file
    validation = [e for e in pgpo["evaluations"] if e["split"] == "validation"]
    assert [e["step"] for e in validation] == [0, 1, 2, 3]
    assert base["evaluations"][0]["avg_at_k"] == validation[0]["avg_at_k"]  # the same model, questions and seed
    best = max(e["avg_at_k"] for e in validation)
    assert pgpo["selected_step"] == min(e["step"] for e in validation if e["avg_at_k"] == best)
    ruined = records["plain/ruined/seed-1"]
    assert sum(ruined["test_scores"].values()) == 0 and ruined["selected_step"] == 0
    assert ruined["selected_test_scores"] == base["test_scores"]
    for series in pgpo["metrics"].values():
        assert len(series) == 3  # one value, or null, for each step
    folder = out / "runs/plain/pgpo/seed-1"
    assert (folder / "metrics.jsonl").exists() and not (folder / "checkpoints").exists()
    assert "final vs pgpo" in (out / "tables.md").read_text()
    capsys.readouterr()

    # The tables again, from the records alone; and nothing is left to do.
    moved = tmp_path / "moved"
    moved.mkdir()
    (moved / RECORDS_FILE).write_bytes((out / RECORDS_FILE).read_bytes())
    assert cli(["study", str(path), "--out", str(moved), "--tables"]) == 0
    assert (moved / "summary.json").read_bytes() == (out / "summary.json").read_bytes()
    assert cli(["study", str(path), "--out", str(moved), "--list"]) == 0
    assert "4 runs, 0 to do" in capsys.readouterr().out
    assert cli(["study", str(path), "--out", str(moved)]) == 0
    assert not (moved / "runs").exists()


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"model_name_or_path": "./nowhere"}, "there is no model folder ./nowhere"),
        ({"task": "nowhere/task.py", "model_name_or_path": "."}, "there is no task file nowhere/task.py"),
    ],
)
def test_what_no_run_could_load_is_told_before_the_first(flags, says, tmp_path, monkeypatch) -> None:
    """Red if each run fails for itself, and the failures are written down as the study's records."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "study.yaml"
    settings = {"s": {"max_steps": 10, "eval_steps": 10, "eval_strategy": "steps", **flags}}
    path.write_text(json.dumps({"name": "t", "seeds": [1], "settings": settings, "methods": {"a": {}}}))
    with pytest.raises(UserError, match=says):
        study_module.main(path)
    assert not (tmp_path / "runs").exists()
