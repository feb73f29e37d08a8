"""`pgpo train --resume`: what a kill, a signal, a full disk or a foreign file leaves, and that nothing of it shows."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import json
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from pgpo import PGPOTrainer, cli, runlog
from pgpo.cli import main
from pgpo.command import session
from pgpo.command import train as run
from pgpo.runlog import RunLog, read_run
from pgpo.settings.arguments import parse
from pgpo.tasks import lab_world
from pgpo.train import checkpoint

# Checkpoints of steps 3, within a generation of two steps, and 4; evaluations at 0, 2 and 4.
FLAGS = [
    *("--domain", "physics", "--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--max_steps", "4"),
    *("--prompts_per_step", "2", "--num_generations", "4", "--num_iterations", "2", "--alpha", "1.5"),
    *("--eval_steps", "2", "--save_steps", "3"),
]
TIMES = {runlog.STEP_SECONDS, runlog.GENERATION_SECONDS, runlog.UPDATE_SECONDS}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No pictures, and the questions drawn and rendered once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_draw", lambda *_: None)
        patch.setattr(lab_world, "load", functools.cache(lab_world.load))
        patch.setattr(run, "check_prompts", lambda *_: None)
        yield


def pgpo(*words: object) -> tuple[int, list[str]]:
    """Exit status and lines on stderr of a command line."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(word) for word in words])
    return status, err.getvalue().splitlines()


@pytest.fixture
def new(tmp_path):
    """The words that start the run in tmp_path/run."""
    return ["train", "--output_dir", tmp_path / "run", *FLAGS]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that nothing happened to."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    status, err = pgpo("train", "--output_dir", directory, *FLAGS)
    assert status == 0, err
    return directory


def story(directory: Path) -> dict:
    """Everything that a run tells, but for the times."""
    told = read_run(directory)
    folder = directory / "checkpoints/checkpoint-4"
    weights = load_file(folder / "model.safetensors") | load_file(folder / "pgpo_teacher.safetensors")
    return {
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in told.metrics],
        "evaluations": told.evaluations,
        "samples": told.samples,
        "records": (directory / "test_records.jsonl").read_text(),
        "weights": {name: tensor.numpy().tobytes() for name, tensor in weights.items()},
        "files": {p.name for p in directory.iterdir()},
        "checkpoints": checkpoint.steps(directory / "checkpoints"),
    }


def assert_resumes_to(whole: Path, directory: Path, more: frozenset[str] = frozenset()) -> list[str]:
    """Of the files in the directory, `more` were there before."""
    status, err = pgpo("train", "--resume", directory)
    assert status == 0, err
    told, expected = story(directory), story(whole)
    assert told.pop("files") == expected.pop("files") | more
    assert told == expected
    return err


def test_the_run_saves_within_a_generation_and_learns(whole):
    assert (whole / "checkpoints/checkpoint-3/pgpo_rollout-0.safetensors").exists()
    last = read_run(whole).metrics[-1]  # the step that is repeated below
    assert last["rho"] != 1 and last["grad_norm"] > 0


# Killed ---------------------------------------------------------------------------------------------------------------


def test_lines_past_the_checkpoint_and_leftovers_of_a_kill_go(whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    folder = directory / "checkpoints"
    (folder / ".writing").mkdir()
    (folder / "checkpoint-4").rename(folder / ".writing/checkpoint-4")  # killed just before the rename
    (folder / ".removing/checkpoint-2").mkdir(parents=True)
    (directory / "test_records.jsonl").unlink()
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rho"')
    (directory / "metrics.jsonl.4711.tmp").write_text("half")
    (directory / "thesis.tmp").write_text("the user's own")
    err = assert_resumes_to(whole, directory, frozenset({"thesis.tmp"}))
    assert not any("cannot be read" in line for line in err)
    assert {p.name for p in folder.iterdir()} == {"README.md", "checkpoint-3", "checkpoint-4"}


def test_killed_before_the_first_checkpoint(whole, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints")
    (directory / "checkpoints/.writing/checkpoint-3").mkdir(parents=True)
    status, err = pgpo("train", "--resume", directory)
    assert status == 2
    assert err == [
        f"pgpo: {directory} was stopped before its first checkpoint was written, so there is nothing "
        'to continue; start it again with the "command" in its config.json, --overwrite and a smaller '
        "--save_steps."
    ]


def test_the_command_in_the_configuration_starts_it_again(new, whole, tmp_path):
    """The remedy of the sentence above."""
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/metrics.jsonl").write_text("")
    assert pgpo(*new)[0] == 2
    assert pgpo(*new, "--overwrite")[0] == 0
    assert story(tmp_path / "run") == story(whole)


def test_killed_while_it_was_created(new, tmp_path):
    """Before config.json was there: only our own two files may lie in it."""
    directory = tmp_path / "run"
    directory.mkdir()
    for name in ("environment.json", "config.json.4711.tmp", "thesis.txt"):
        (directory / name).write_text("x")
    status, err = pgpo(*new, "--overwrite", "--max_steps", "1")
    assert (status, len(list(directory.iterdir()))) == (2, 3)
    assert "is not empty and not a run, it is not overwritten" in err[-1]
    (directory / "thesis.txt").unlink()
    assert pgpo(*new, "--overwrite", "--max_steps", "1")[0] == 0
    assert not (directory / "config.json.4711.tmp").exists()


def test_killed_while_a_run_is_overwritten(new, whole, tmp_path, monkeypatch):
    """The old run can still be continued, or has no checkpoint: never a log with holes."""
    shutil.copytree(whole, tmp_path / "run")

    def killed(path, **_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runlog.shutil, "rmtree", killed)
        with contextlib.suppress(KeyboardInterrupt):
            RunLog.create(tmp_path / "run", {}, overwrite=True)
    assert story(tmp_path / "run") == story(whole)


@pytest.mark.parametrize("when", ["records", "line"])
def test_killed_in_the_last_evaluation(new, whole, tmp_path, monkeypatch, when):
    """It ends neither without its line nor without its records."""
    plain_records, plain_line = session.write_records, RunLog.evaluation

    def records(path, values):
        plain_records(path, values)
        raise KeyboardInterrupt

    def line(self, step, values):
        if step == 4 and values["split"] == "test":
            raise KeyboardInterrupt
        plain_line(self, step, values)

    with monkeypatch.context() as patch:
        owner, name, what = (session, "write_records", records) if when == "records" else (RunLog, "evaluation", line)
        patch.setattr(owner, name, what)
        assert pgpo(*new)[0] == 130
    err = assert_resumes_to(whole, tmp_path / "run")
    assert "all 4 steps are done; raise --max_steps to continue." in err


def test_the_records_are_those_of_the_last_step(whole, tmp_path, monkeypatch):
    """A finished run that goes on and is killed has none, and gets those of its new end when it is resumed."""
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    plain = RunLog.metrics

    def killed_in_step_6(self, step, values):
        if step == 6:
            raise KeyboardInterrupt
        plain(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "metrics", killed_in_step_6)
        assert pgpo("train", "--resume", directory, "--max_steps", "6")[0] == 130
    assert not (directory / "test_records.jsonl").exists()
    assert pgpo("train", "--resume", directory)[0] == 0
    records = [json.loads(line)["reward"] for line in (directory / "test_records.jsonl").read_text().splitlines()]
    last = read_run(directory).evaluations[-1]
    assert (last["step"], last["split"], last["avg_at_k"]) == (6, "test", sum(records) / len(records))


def test_a_checkpoint_is_hashed_once(whole, tmp_path, monkeypatch):
    """Not by the command and by its trainer again: a large one takes minutes."""
    shutil.copytree(whole, tmp_path / "run")
    hashed = []
    plain = checkpoint.sha256
    monkeypatch.setattr(checkpoint, "sha256", lambda file: (hashed.append(file.name), plain(file))[1])
    assert pgpo("train", "--resume", tmp_path / "run")[0] == 0
    assert hashed and len(set(hashed)) == len(hashed)


# Two processes in one directory ---------------------------------------------------------------------------------------


@pytest.fixture
def running(new, at_step, tmp_path):
    """A process that trains in tmp_path/run, and now stands still in step 4, with a checkpoint of step 3."""

    def stand_still() -> None:
        (tmp_path / "here").touch()
        time.sleep(600)

    at_step(4, stand_still)
    process = multiprocessing.get_context("fork").Process(target=pgpo, args=new)
    process.start()
    at_step(None)
    while not (tmp_path / "here").exists():
        assert process.exitcode is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.join()


def content(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(p): (p.stat().st_mtime_ns, p.read_bytes()) for p in directory.rglob("*") if p.is_file()}


def test_a_second_process_is_refused_and_changes_nothing_until_the_first_is_dead(new, whole, tmp_path, running):
    directory = tmp_path / "run"
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rho"')  # the line that it is writing: not to be cut off
    (directory / "checkpoints/.writing/checkpoint-4").mkdir(parents=True)  # nor this
    before = content(directory)
    for words in (("train", "--resume", directory), (*new, "--overwrite")):
        assert pgpo(*words) == (
            2,
            [f"pgpo: another process is training in {directory}; wait until it ends, or stop it first."],
        )
    assert content(directory) == before
    assert (directory / "checkpoints/.writing/checkpoint-4").exists()
    running.kill()
    running.join()
    assert_resumes_to(whole, directory)


def test_of_two_that_start_one_runs(new, whole, tmp_path):
    barrier = multiprocessing.get_context("fork").Barrier(2)

    def start(number: int) -> None:
        barrier.wait()
        status, err = pgpo(*new, "--overwrite")
        (tmp_path / f"{number}.json").write_text(json.dumps([status, err[-1]]))

    both = [multiprocessing.get_context("fork").Process(target=start, args=(i,)) for i in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    (_, done), (status, refused) = sorted(json.loads((tmp_path / f"{i}.json").read_text()) for i in range(2))
    assert (status, done) == (2, f"run directory: {tmp_path / 'run'}")
    assert refused.startswith("pgpo: another process is training in")
    assert story(tmp_path / "run") == story(whole)


def test_only_the_first_rank_takes_the_lock(tmp_path, monkeypatch):
    taken = []

    @contextlib.contextmanager
    def lock(folder, refusal):
        taken.append(folder)
        yield

    monkeypatch.setattr(runlog, "lock", lock)
    monkeypatch.setattr(run, "_train", lambda *_: (0, tmp_path))
    for rank in (1, 0):
        parsed = parse(["--use_cpu"])
        monkeypatch.setattr(type(parsed.config), "process_index", rank)
        run.train(parsed, tmp_path / "run")
        assert taken == ([] if rank else [tmp_path / "run"])


def test_the_lock_of_a_dead_process_is_in_nobodys_way(new, tmp_path):
    """Killed before it had written anything else."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.lock").touch()
    assert pgpo(*new, "--max_steps", "1")[0] == 0
    assert not (tmp_path / "run/.lock").exists()


# Foreign and broken checkpoints ---------------------------------------------------------------------------------------


def test_the_checkpoint_of_another_run_is_named_and_not_used(new, whole, tmp_path):
    assert pgpo(*new, "--seed", "7")[0] == 0
    directory = tmp_path / "mine"
    shutil.copytree(whole, directory)
    shutil.rmtree(directory / "checkpoints/checkpoint-4")
    shutil.copytree(tmp_path / "run/checkpoints/checkpoint-4", directory / "checkpoints/checkpoint-4")
    err = assert_resumes_to(whole, directory)
    assert err[0] == (
        "checkpoint checkpoint-4 cannot be read (manifest.json: another run wrote it); trying the one before."
    )


def test_a_copied_run_is_the_same_run(whole, tmp_path):
    """Also once it was resumed: the id is kept."""
    shutil.copytree(whole, tmp_path / "run")
    for steps in ("5", "6"):
        status, err = pgpo("train", "--resume", tmp_path / "run", "--max_steps", steps)
        assert (status, [line for line in err if "cannot be read" in line]) == (0, [])
        run_id = read_run(tmp_path / "run").config["run_id"]
        folders = (tmp_path / "run/checkpoints").glob("checkpoint-*")
        assert [checkpoint.problem(folder, run_id) for folder in folders] == [None, None]


# Signals --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def at_step(monkeypatch):
    """Call something in the middle of a step."""
    plain = PGPOTrainer.optimize

    def arrange(step: int | None, action=lambda: None) -> None:
        def optimize(self, model, batch):
            if self.state.global_step + 1 == step:
                action()
            return plain(self, model, batch)

        monkeypatch.setattr(PGPOTrainer, "optimize", optimize)

    return arrange


def send(number: int, times: int = 1):
    def action() -> None:
        for _ in range(times):
            signal.raise_signal(number)

    return action


both_signals = pytest.mark.parametrize(("number", "exit_status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])


@both_signals
def test_a_signal_ends_the_step_saves_and_tells_the_shell(new, whole, tmp_path, at_step, number, exit_status):
    handler = signal.getsignal(number)
    at_step(1, send(number))
    status, err = pgpo(*new, "--save_total_limit", "3")
    assert status == exit_status
    assert "stopping after this step and saving; press Ctrl-C again to stop at once." in err
    assert f"stopped after step 1; continue with: pgpo train --resume {tmp_path / 'run'}" in err
    assert checkpoint.steps(tmp_path / "run/checkpoints") == [1]
    assert signal.getsignal(number) is handler
    at_step(None)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    assert pgpo("train", "--resume", tmp_path / "copy", "--save_total_limit", "2")[0] == 0
    assert story(tmp_path / "copy") == story(whole)


@both_signals
def test_a_second_signal_stops_at_once_and_leaves_a_readable_run(new, tmp_path, at_step, number, exit_status):
    at_step(2, send(number, times=2))
    status, err = pgpo(*new)
    assert (status, err[-1]) == (exit_status, "pgpo: stopped.")
    assert [line["step"] for line in read_run(tmp_path / "run").metrics] == [1]
    assert checkpoint.steps(tmp_path / "run/checkpoints") == []


@both_signals
def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, monkeypatch, number, exit_status):
    monkeypatch.setattr(PGPOTrainer, "held_out_records", lambda *_: signal.raise_signal(number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    status, err = pgpo("train", "--output_dir", tmp_path / "a/run", *FLAGS)
    assert (status, err[-1]) == (exit_status, "pgpo: stopped.")
    assert list(tmp_path.iterdir()) == []


def test_sigterm_is_left_to_whoever_calls_train_for_himself(new, tmp_path, at_step):
    """A worker process of a study dies of it at once; only the command takes it."""
    seen = []
    at_step(1, lambda: seen.append(signal.getsignal(signal.SIGTERM)))
    words = [str(w) for w in new[1:]] + ["--max_steps", "1", "--eval_strategy", "no"]
    with contextlib.redirect_stderr(io.StringIO()):
        assert run.train(parse(words), tmp_path / "run")[0] == 0
    assert seen == [signal.SIG_DFL]


# A disk that takes no more --------------------------------------------------------------------------------------------


@pytest.fixture
def full_at(monkeypatch):
    """No checkpoint of these steps can be written."""

    def arrange(*steps: int) -> None:
        plain = PGPOTrainer.save_extra

        def save_extra(self, directory):
            if self.state.global_step in steps:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory / "pgpo_state.json"))
            plain(self, directory)

        monkeypatch.setattr(PGPOTrainer, "save_extra", save_extra)

    yield arrange
    monkeypatch.undo()


def test_a_full_disk_at_the_end_is_exit_status_1_and_the_log_is_whole(new, whole, tmp_path, full_at, monkeypatch):
    full_at(4)
    status, err = pgpo(*new)
    directory = tmp_path / "run"
    assert status == 1
    assert (
        "step 4 is not saved (No space left on device), the newest checkpoint is of step 3; the log is complete. Free "
        f"some space, then: pgpo train --resume {directory}" in err
    )
    assert read_run(directory).evaluations == read_run(whole).evaluations
    assert len(read_run(directory).metrics) == 4
    monkeypatch.undo()
    assert_resumes_to(whole, directory)


def test_interrupted_on_a_full_disk(new, tmp_path, full_at, at_step):
    at_step(2, send(signal.SIGTERM))
    full_at(2)
    status, err = pgpo(*new)
    assert status == 1
    assert any(
        line.startswith("step 2 is not saved (No space left on device), the newest checkpoint is of step 0")
        for line in err
    )


def test_a_log_that_cannot_be_written_ends_the_run_in_one_sentence(new, whole, tmp_path, monkeypatch):
    plain = RunLog.metrics

    def metrics(self, step, values):
        if step == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        plain(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "metrics", metrics)
        status, err = pgpo(*new)
    assert (status, err[-1]) == (
        2,
        f"pgpo: the log in {tmp_path / 'run'} could not be written (No space left on device); free some space, then "
        f"continue with `pgpo train --resume {tmp_path / 'run'}`.",
    )
    assert_resumes_to(whole, tmp_path / "run")


def test_the_log_is_on_the_disk_before_the_checkpoint_has_its_name(new, tmp_path, monkeypatch):
    order = []
    plain_sync, plain_commit = RunLog.sync, checkpoint.commit
    monkeypatch.setattr(RunLog, "sync", lambda self: (order.append("sync"), plain_sync(self)))
    monkeypatch.setattr(checkpoint, "commit", lambda *a: (order.append("commit"), plain_commit(*a)))
    assert pgpo(*new, "--max_steps", "1")[0] == 0
    assert order == ["sync", "commit"]
