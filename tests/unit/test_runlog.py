from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from processes import patient

from pgpo import provenance
from pgpo.errors import UserError
from pgpo.files import write_atomically
from pgpo.runlog import RunLog, lock, read_run


def _strict(text: str) -> dict:
    """Parses standard JSON only: Python's own NaN and Infinity literals are refused, as other readers refuse them."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def _run_with_steps(directory: Path, steps: int) -> None:
    with RunLog.create(directory, {"alpha": 1.0}) as log:
        for step in range(1, steps + 1):
            log.metrics(step, {"rho": step / 10})
            log.evaluation(step, {"split": "test", "avg_at_k": step / 100})
            log.samples(step, [{"completion": f"text {step}", "reward": 1.0}])


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "run", {"alpha": 1.5, "path": Path("x")}, {"device": "NVIDIA H100"}) as log:
        log.metrics(1, {"rho": np.float32(0.5), "loss": torch.tensor(0.25), "active_tokens": np.int64(7)})
        log.metrics(2, {"rho": 1.25})
        log.evaluation(2, {"split": "test", "avg_at_k": 0.5})
        log.samples(2, [{"completion": "µ = 3\n\u2028 or\tso", "reward": 1.0}, {"completion": "b", "reward": 0.0}])
    run = read_run(tmp_path / "run")
    assert run.config == {"alpha": 1.5, "path": "x"}
    assert run.environment["device"] == "NVIDIA H100"
    assert run.environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert run.metrics == [{"step": 1, "rho": 0.5, "loss": 0.25, "active_tokens": 7}, {"step": 2, "rho": 1.25}]
    assert run.evaluations == [{"step": 2, "split": "test", "avg_at_k": 0.5}]
    assert run.samples == [
        {
            "step": 2,
            "samples": [{"completion": "µ = 3\n\u2028 or\tso", "reward": 1.0}, {"completion": "b", "reward": 0.0}],
        }
    ]
    assert run.series("loss") == ([1], [0.25])  # step 2 has none
    document = _strict((tmp_path / "run" / "config.json").read_text())
    assert document.keys() == {"schema", "pgpo", "command", "config"} and document["schema"] == 1


def test_non_finite_numbers_are_standard_json_and_come_back_as_floats(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "run", {"limit": math.inf}) as log:
        log.metrics(1, {"loss": math.nan, "grad_norm": np.float32("inf"), "information": -math.inf, "rho": 1.0})
        log.samples(1, [{"completion": "NaN", "reward": math.nan}])
    assert _strict((tmp_path / "run" / "metrics.jsonl").read_text()) == {
        "step": 1, "loss": "NaN", "grad_norm": "Infinity", "information": "-Infinity", "rho": 1.0
    }  # fmt: skip
    assert _strict((tmp_path / "run" / "config.json").read_text())["config"]["limit"] == "Infinity"
    run = read_run(tmp_path / "run")
    line = run.metrics[0]
    assert math.isnan(line["loss"]) and line["grad_norm"] == math.inf and line["information"] == -math.inf
    assert run.samples[0]["samples"][0]["completion"] == "NaN"  # a text stays a text


def test_a_text_that_is_not_unicode_does_not_stop_the_run(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "run", {}) as log:
        log.samples(1, [{"completion": "half a pair: \ud83d"}])
    RunLog.resume(tmp_path / "run", step=1).close()
    assert read_run(tmp_path / "run").samples[0]["samples"][0]["completion"] == "half a pair: \ud83d"


def test_each_line_is_on_disk_before_the_log_is_closed(tmp_path: Path) -> None:
    log = RunLog.create(tmp_path / "run", {})
    log.metrics(1, {"rho": 1.0})
    assert len(read_run(tmp_path / "run").metrics) == 1
    log.metrics(2, {"rho": 1.0})
    assert len(read_run(tmp_path / "run").metrics) == 2
    log.close()


def test_an_existing_run_is_not_overwritten_silently(tmp_path: Path) -> None:
    _run_with_steps(tmp_path / "run", 3)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(
        UserError, match=r"run already exists and is not empty; .*--resume or choose another --output_dir"
    ):
        RunLog.create(tmp_path / "run", {})
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_overwrite_replaces_log_and_checkpoints_and_nothing_else(tmp_path: Path) -> None:
    _run_with_steps(tmp_path / "run", 3)
    (tmp_path / "run" / "checkpoints" / "step-3").mkdir(parents=True)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    RunLog.create(tmp_path / "run", {"alpha": 2.0}, overwrite=True).close()
    run = read_run(tmp_path / "run")
    assert run.config == {"alpha": 2.0} and run.metrics == run.evaluations == run.samples == []
    assert not (tmp_path / "run" / "checkpoints").exists()  # else --resume would find a checkpoint of another run
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("content", [{"weights.bin": "w"}, {"config.json": '{"model_type": "qwen3"}'}])
def test_overwrite_refuses_a_directory_that_is_not_a_run(tmp_path: Path, content: dict[str, str]) -> None:
    for name, text in content.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=r"not a run|not written by a run"):
        RunLog.create(tmp_path, {}, overwrite=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == content


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file; choose another --output_dir"):
        RunLog.create(tmp_path / "file", {})
    with pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\)"):
        RunLog.create(tmp_path / "file" / "run", {})


def test_resume_drops_later_lines_in_all_three_logs(tmp_path: Path) -> None:
    _run_with_steps(tmp_path / "run", 5)
    with RunLog.resume(tmp_path / "run", step=3) as log:
        log.metrics(4, {"rho": 0.99})
    run = read_run(tmp_path / "run")
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4]
    assert run.metrics[2:] == [{"step": 3, "rho": 0.3}, {"step": 4, "rho": 0.99}]
    assert [line["step"] for line in run.evaluations] == [1, 2, 3]
    assert [line["step"] for line in run.samples] == [1, 2, 3]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json", "environment.json", "evaluations.jsonl", "metrics.jsonl", "samples.jsonl"
    ]  # fmt: skip


def test_resume_keeps_non_finite_values(tmp_path: Path) -> None:
    with RunLog.create(tmp_path / "run", {}) as log:
        log.metrics(1, {"grad_norm": math.inf})
    RunLog.resume(tmp_path / "run", step=1).close()
    assert read_run(tmp_path / "run").metrics == [{"step": 1, "grad_norm": math.inf}]


@pytest.mark.parametrize("cut", [1, 2, 6, 12])
def test_an_unfinished_last_line_is_dropped_and_resume_starts_on_a_line_of_its_own(tmp_path: Path, cut: int) -> None:
    with RunLog.create(tmp_path / "run", {}) as log:
        log.samples(1, [{"completion": "one"}])
        log.samples(2, [{"completion": "µ"}])
    path = tmp_path / "run" / "samples.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    if cut == 6:
        assert path.read_bytes().endswith("µ".encode()[:1])  # cut through a letter
    # Without its newline alone the line is whole.
    kept = [1, 2] if cut == 1 else [1]
    assert [line["step"] for line in read_run(tmp_path / "run").samples] == kept
    with RunLog.resume(tmp_path / "run", step=2) as log:
        log.samples(3, [])
    assert [line["step"] for line in read_run(tmp_path / "run").samples] == [*kept, 3]


@pytest.mark.parametrize("broken", ["{nonsense}", "", "[1]", '{"rho": 1.0}', '{"step": 2', '{"step": "2"}'])
def test_a_corrupt_middle_line_is_an_error_with_its_number(tmp_path: Path, broken: str) -> None:
    _run_with_steps(tmp_path / "run", 3)
    path = tmp_path / "run" / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], broken, lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        read_run(tmp_path / "run")
    with pytest.raises(UserError, match=r"Line 2 of .*metrics\.jsonl"):
        RunLog.resume(tmp_path / "run", step=3)


def test_a_last_line_that_was_finished_and_is_corrupt_is_an_error(tmp_path: Path) -> None:
    _run_with_steps(tmp_path / "run", 2)
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rho": \n')
    with pytest.raises(UserError, match=r"Line 3 of .*metrics\.jsonl"):
        read_run(tmp_path / "run")


def test_directories_that_are_not_runs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory .*missing"):
        read_run(tmp_path / "missing")
    with pytest.raises(UserError, match=r"not a run directory, it has no config\.json"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(UserError, match="was not written by a run"):
        read_run(tmp_path)
    (tmp_path / "config.json").write_text('{"schema": 2, "pgpo": "9.0", "command": [], "config": {}}')
    with pytest.raises(UserError, match=r"schema version 2, this pgpo reads version 1; use .*\(9\.0\)"):
        read_run(tmp_path)


def test_a_write_that_fails_leaves_the_old_file_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match="No space left on device"):
        RunLog.create(tmp_path / "run", {})


def test_secrets_and_the_home_stay_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = str(Path.home())
    arguments = ["train", "--hub_token", "hf_1", "--wandb-api-key=key2", f"--output_dir={home}/runs", "--alpha", "1.0"]
    monkeypatch.setattr(sys, "argv", [f"{home}/venv/bin/pgpo", *arguments])
    config = {"hub_token": "hf_1", "push_to_hub_token": None, "max_tokens": 5}
    RunLog.create(tmp_path / "run", config, {"cache": f"{home}/cache"}).close()
    run = read_run(tmp_path / "run")
    assert run.command == [
        "pgpo", "train", "--hub_token", "***", "--wandb-api-key=***", "--output_dir=~/runs", "--alpha", "1.0"
    ]  # fmt: skip
    assert run.config == {"hub_token": "***", "push_to_hub_token": None, "max_tokens": 5}
    assert run.environment["cache"] == "~/cache"


def test_git_commit_is_that_of_our_source_and_of_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    source = tmp_path / "venv" / "pgpo" / "provenance.py"
    source.parent.mkdir(parents=True)
    source.write_text("x = 1\n")
    (tmp_path / "users_code.py").write_text("y = 1\n")
    git("init", "-q")
    git("add", "users_code.py")
    git("commit", "-q", "-m", "a")
    monkeypatch.setattr(provenance, "__file__", str(source))
    assert provenance.environment()["git_commit"] is None  # an installed copy inside the user's own repository
    git("add", ".")
    git("commit", "-q", "-m", "b")
    commit = git("rev-parse", "HEAD")
    assert provenance.environment()["git_commit"] == commit
    source.write_text("x = 2\n")
    assert provenance.environment()["git_commit"] == f"{commit}-dirty"


def test_importing_the_run_log_and_reading_versions_imports_no_library() -> None:
    code = (
        "import sys; from pgpo import provenance, runlog; versions = provenance.environment()['packages'];"
        "assert versions['torch'], versions;"
        "print([name for name in provenance.PACKAGES if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert result.stdout.strip() == "[]"


def contend(folder: Path, rounds: int, results: Any) -> None:
    """Take the lock again and again; while it is held, nobody else may hold it."""
    held = clashes = 0
    for _ in range(rounds):
        try:
            with lock(folder, "busy"):
                held += 1
                try:
                    (folder / "inside").touch(exist_ok=False)
                except FileExistsError:
                    clashes += 1
                time.sleep(0.0005)
                (folder / "inside").unlink(missing_ok=True)
        except UserError as error:
            assert str(error) == "busy"
    results.put((held, clashes))


def test_a_folder_has_one_holder_at_a_time(tmp_path: Path) -> None:
    """Real processes; a lock file that is removed while another one opens it is the trap."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=contend, args=(tmp_path / "new", 400, results)) for _ in range(4)]
    for process in processes:
        process.start()
    found = [results.get(timeout=patient(20)) for _ in processes]
    for process in processes:
        process.join()
    assert sum(clashes for _, clashes in found) == 0
    assert sum(held for held, _ in found) > 100
    assert list((tmp_path / "new").iterdir()) == []


def test_a_lock_passes_on_what_goes_wrong_inside_and_is_free_afterwards(tmp_path: Path) -> None:
    for error in (FileNotFoundError("gone"), BlockingIOError("later"), KeyboardInterrupt()):
        with pytest.raises(type(error)), lock(tmp_path, "busy"):
            raise error
    with lock(tmp_path, "busy"), pytest.raises(UserError, match="busy"), lock(tmp_path, "busy"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks_keeps_nobody_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    entered = False
    with lock(tmp_path, "busy"), lock(tmp_path, "busy"):
        entered = True
    assert entered and list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match=r"file/run cannot be written \(Not a directory\)"),
        lock(tmp_path / "file/run", ""),
    ):
        pass
