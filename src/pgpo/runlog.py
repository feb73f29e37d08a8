"""The run directory: one schema for everything that writes a run and everything that reads one.

    config.json        {"schema": 1, "pgpo": version, "command": [...], "config": {...}}
    environment.json   python, platform, package versions, git commit, and what the caller adds (device, ...)
    metrics.jsonl      one line per logged step           {"step": 3, "information": 0.21, ...}
    evaluations.jsonl  one line per evaluation summary    {"step": 3, "split": "test", "avg_at_k": 0.61, ...}
    samples.jsonl      one line per logged step           {"step": 3, "samples": [{...}, ...]}
    alarms.jsonl       one line per alarm of the collapse guard, if any: {"step": 52, "signal": "sampled_kl",
                       "value": 0.31, "best": 0.26, "best_step": 30, "limit": 0.044,     smoothed, in the metric's unit
                       "action": "warn" | "freeze_teacher" | "rollback_teacher" | "halve_step" | "rollback",
                       "reason": "sampled_kl 0.31 nats is 0.05 above its best 0.26 (step 30): teacher frozen"}
                       (the limit of a relative signal is a share of the best)
    test_records.jsonl the graded completions of the last test evaluation (evaluate.run.write_records)
    result.json        with protocol "strict" or "paper": test evaluations of the last and of the selected step
    checkpoints/       written by the trainer
    tensorboard/       with report_to tensorboard, of all its resumptions
    base/              the initial model, where `pgpo train` made it
    figure.png         written by the report

All files are standard JSON in UTF-8, non-finite floats as files.py writes them. `read_run` turns these back into
floats in metrics, evaluations and alarms, and leaves samples as they are, because a completion may be the text "NaN".
In a distributed run only the main process opens a run log.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from pgpo.errors import UserError
from pgpo.files import json_document, json_line, read_lines, with_floats, write_atomically
from pgpo.provenance import command_line, environment, hide_secrets, version

SCHEMA = 1

CONFIG_FILE = "config.json"
ENVIRONMENT_FILE = "environment.json"
METRICS_FILE = "metrics.jsonl"
EVALUATIONS_FILE = "evaluations.jsonl"
SAMPLES_FILE = "samples.jsonl"
ALARMS_FILE = "alarms.jsonl"
LOG_FILES = (METRICS_FILE, EVALUATIONS_FILE, SAMPLES_FILE, ALARMS_FILE)  # a line per step; cut when a run is resumed
TEST_RECORDS_FILE = "test_records.jsonl"
RESULT_FILE = "result.json"
CHECKPOINTS_FOLDER = "checkpoints"
BASE_FOLDER = "base"
TENSORBOARD_FOLDER = "tensorboard"
FIGURE_FILE = "figure.png"
LOCK_FILE = ".lock"  # there while a process works in the folder

RUN_ID = "run_id"  # name in the configuration; every checkpoint of the run has the same

STEP = "step"
INFORMATION = "information"
RHO = "rho"
ALPHA = "alpha"
STUDENT_ENTROPY = "student_entropy"
TEACHER_ENTROPY = "teacher_entropy"
DIVERGENCE = "divergence"
LOSS = "loss"
ACTIVE_SHARE = "active_share"
ACTIVE_TOKENS = "active_tokens"
REWARD = "reward"
COMPLETION_LENGTH = "completion_length"
CLIPPED_SHARE = "clipped_share"
GRAD_NORM = "grad_norm"
LEARNING_RATE = "learning_rate"
EFFECTIVE_LR = "effective_lr"
NEGATIVE_INFORMATION_SHARE = "negative_information_share"
TRUNCATED_CONTEXTS = "truncated_contexts"
SAMPLED_KL = "sampled_kl"
SAMPLED_KL_WRONG = "sampled_kl_wrong"
LENGTH_TAIL = "length_tail"
DEMONSTRATION_LOGPROB = "demonstration_logprob"
SKIPPED_SHARE = "skipped_share"
AUX_LOSS = "aux_loss"
POLICY_LOSS = "policy_loss"
TRUST_RHO = "trust_rho"
TRUST_MOVED = "trust_moved"
TRUST_BUDGET = "trust_budget"
TRUST_RATIO = "trust_ratio"
AGREEMENT = "agreement"
PROBES = "probes"
TEACHER_RENEWED = "teacher_renewed"
REHEARSAL_KL = "rehearsal_kl"
FALSE_SUCCESS_RATE = "false_success_rate"
FALSE_SUCCESS_SHARE = "false_success_share"
STEP_SECONDS = "step_seconds"
GENERATION_SECONDS = "generation_seconds"
UPDATE_SECONDS = "update_seconds"
# With --profile, for each part of a step that has run: its seconds, and the memory held at most, GiB.
PROFILE, PROFILE_SECONDS, PROFILE_PEAK = "profile/", "_seconds", "_peak_gib"
PROFILE_PARTS = (
    *("sampling", "grading", "teacher", "student", "backward", "probe", "optimizer", "average", "evaluation"),
)

# name -> (unit, meaning). A line of metrics.jsonl may hold more names (a user's own); these mean the same in
# every run.
METRICS: dict[str, tuple[str, str]] = {
    STEP: ("1", "optimizer step, counted from 1"),
    INFORMATION: (
        "nats",
        "I_k, student entropy minus teacher entropy, mean over the samples of the step (Eq. 8)",
    ),
    RHO: ("1", "rho_k, the multiplier of the step (Eq. 9)"),
    ALPHA: ("1", "sensitivity of rho to I_k at this step"),
    STUDENT_ENTROPY: ("nats", "mean token entropy of the student over the samples that have a teacher"),
    TEACHER_ENTROPY: ("nats", "mean token entropy of the teacher over the same tokens"),
    DIVERGENCE: (
        "nats",
        "mean divergence between student and teacher per active token, before any clipping weight",
    ),
    SAMPLED_KL: ("nats", "mean of log pi_S(y) - log pi_T(y) over the active tokens"),
    SAMPLED_KL_WRONG: ("nats", "the same over completions that are not right"),
    DEMONSTRATION_LOGPROB: (
        "nats",
        "mean log-probability per token that the teacher gives to a demonstration which its own prompt shows",
    ),
    LOSS: ("nats", "the loss that was differentiated"),
    AUX_LOSS: ("1", "load-balancing loss of a mixture of experts, before its coefficient"),
    POLICY_LOSS: ("1", "TRL's policy loss, where it is mixed in (distillation_weight < 1)"),
    ACTIVE_SHARE: ("1", "share of the samples that have a teacher and hence a loss"),
    ACTIVE_TOKENS: ("tokens", "completion tokens that carry loss, over all ranks"),
    REWARD: ("1", "mean reward of the training completions"),
    COMPLETION_LENGTH: ("tokens", "mean length of the training completions"),
    LENGTH_TAIL: ("tokens", "95th percentile of their length"),
    CLIPPED_SHARE: ("1", "share of the completions that were cut at the length limit"),
    GRAD_NORM: ("1", "global gradient norm before clipping"),
    LEARNING_RATE: ("1", "learning rate of the schedule"),
    EFFECTIVE_LR: (
        "1",
        "learning_rate * rho (* the guard's factor and trust_rho), the rate that moved the parameters",
    ),
    NEGATIVE_INFORMATION_SHARE: ("1", "share of the steps so far with I_k < 0"),
    TRUNCATED_CONTEXTS: ("1", "share of the teacher contexts of this step that were cut at the context limit"),
    SKIPPED_SHARE: ("1", "share of the steps that were skipped for nan or inf, with on_nonfinite='skip'"),
    TRUST_RHO: ("1", "part of the step that trust kept (undo), or what it multiplied its rate by (lagged)"),
    TRUST_MOVED: ("nats", "K, how far the step moved the policy: mean-token KL(before || after) of what was kept"),
    TRUST_BUDGET: ("nats", "B, how far it may: the teacher's correction times a factor that falls to a small one"),
    TRUST_RATIO: (
        "1",
        "K of the whole step over the divergence, where the whole step was measured; with trust off every 10th",
    ),
    AGREEMENT: ("1", "factor of the budget's root, below 1 where successive gradients disagree"),
    REHEARSAL_KL: (
        "nats",
        "KL(teacher || student) of hint rehearsal, both with the hint, mean over the rows",
    ),
    PROBES: ("1", "measurements of K in the step"),
    TEACHER_RENEWED: ("1", "1 in a step in which the gated teacher became a copy of the student, else 0"),
    FALSE_SUCCESS_RATE: ("1", "rate at which the misleading world's verifier passes wrong completions in this step"),
    FALSE_SUCCESS_SHARE: ("1", "share of the step's completions that it passed although they are wrong"),
    STEP_SECONDS: ("seconds", "wall time of the step"),
    GENERATION_SECONDS: ("seconds", "part of it spent generating completions"),
    UPDATE_SECONDS: ("seconds", "part of it spent in forward, backward and optimizer"),
}

SPLIT = "split"
VALIDATION, TEST = "validation", "test"
TEST_SELECTED = "test_selected"  # test questions at the step that the validation questions select
K = "k"
QUESTIONS = "questions"
STEMS = "stems"
AVG_AT_K = "avg_at_k"
PASS_AT_K = "pass_at_k"
MAJ_AT_K = "maj_at_k"
WELL_FORMED_SHARE = "well_formed_share"
LOW = "_low"
HIGH = "_high"

# The same for evaluations.jsonl; `low` and `high` bound the 95 % interval clustered by question, or by stem.
EVALUATIONS: dict[str, tuple[str, str]] = {
    STEP: ("1", "optimizer steps done before the evaluation; 0 is the model at the start"),
    SPLIT: ("", "which questions, for example validation or test"),
    K: ("1", "completions per question"),
    QUESTIONS: ("1", "number of questions"),
    STEMS: ("1", "number of stems among them; questions that share one are one unit of the intervals"),
    AVG_AT_K: ("1", "mean reward over the k completions, then over the questions"),
    AVG_AT_K + LOW: ("1", "lower end of its interval"),
    AVG_AT_K + HIGH: ("1", "upper end of its interval"),
    PASS_AT_K: ("1", "share of the questions with at least one right completion among k"),
    PASS_AT_K + LOW: ("1", "lower end of its interval"),
    PASS_AT_K + HIGH: ("1", "upper end of its interval"),
    MAJ_AT_K: ("1", "share of the questions whose most frequent answer is right"),
    MAJ_AT_K + LOW: ("1", "lower end of its interval"),
    MAJ_AT_K + HIGH: ("1", "upper end of its interval"),
    WELL_FORMED_SHARE: ("1", "share of the completions in the format that the prompt asks for"),
}


class RunLog:
    """Writes one run directory. Every line is flushed: a killed run loses at most its last line."""

    def __init__(self, directory: Path) -> None:
        """Opens an existing run directory for appending; use `create` or `resume`."""
        self.directory = directory
        self._files: dict[str, TextIO] = {}

    @classmethod
    def create(
        cls,
        directory: str | os.PathLike[str],
        config: Mapping[str, Any],
        environment_extra: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> RunLog:
        """Starts a run in a new or empty directory and writes its configuration and environment.

        `environment_extra`: what only the caller knows, for example {"device": "NVIDIA H100"}.
        `overwrite` replaces the log and the checkpoints of an earlier run, and nothing else that lies there.
        Raises UserError when the directory holds something, is no directory, or cannot be written.
        """
        directory = Path(directory)
        try:
            if directory.exists() and not directory.is_dir():
                raise UserError(f"The run directory {directory} is a file; choose another --output_dir.")
            if occupied(directory):
                if not overwrite:
                    raise UserError(
                        f"The run directory {directory} already exists and is not empty; continue that run with"
                        " --resume or choose another --output_dir."
                    )
                _remove_run(directory)
            directory.mkdir(parents=True, exist_ok=True)
            document = {
                "schema": SCHEMA,
                "pgpo": version("pgpo"),
                "command": command_line(sys.argv),
                "config": {name: hide_secrets(name, value) for name, value in config.items()},
            }
            write_atomically(directory / ENVIRONMENT_FILE, json_document(environment(environment_extra)))
            write_atomically(directory / CONFIG_FILE, json_document(document))  # last: it makes this a run
        except OSError as error:
            raise _not_writable(directory, error) from error
        return cls(directory)

    @classmethod
    def resume(cls, directory: str | os.PathLike[str], step: int) -> RunLog:
        """Continues a run from its checkpoint of `step`; lines of later steps are dropped.

        Raises UserError when the directory is not a run of this schema, is corrupt, or cannot be written.
        """
        directory = Path(directory)
        _read_config(directory)
        for name in LOG_FILES:
            path = directory / name
            if path.exists():
                kept = [line for line in _read_log(path) if line[STEP] <= step]
                try:
                    write_atomically(path, "".join(map(json_line, kept)))
                except OSError as error:
                    raise _not_writable(directory, error) from error
        return cls(directory)

    def metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends the scalars of one optimizer step; METRICS lists the names with a fixed meaning."""
        self._append(METRICS_FILE, {STEP: step} | dict(values) | {STEP: step})

    def evaluation(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one evaluation: {"split": "test", **summary.as_dict()}; EVALUATIONS lists the names."""
        self._append(EVALUATIONS_FILE, {STEP: step} | dict(values) | {STEP: step})

    def samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Appends a few completions of one step, each a dict of texts and scalars."""
        self._append(SAMPLES_FILE, {STEP: step, "samples": [dict(sample) for sample in samples]})

    def alarm(self, step: int, values: Mapping[str, Any]) -> None:
        """Appends one alarm of the collapse guard."""
        self._append(ALARMS_FILE, {STEP: step} | dict(values) | {STEP: step})

    def sync(self) -> None:
        """Puts every line on the disk, so that no checkpoint written afterwards outlives its log."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, name: str, values: Mapping[str, Any]) -> None:
        if name not in self._files:
            path = self.directory / name
            self._files[name] = path.open("a", encoding="utf-8", errors="backslashreplace", newline="\n")
        self._files[name].write(json_line(values))
        self._files[name].flush()


@dataclass(frozen=True)
class LoggedRun:
    """A run as read back. Lists are in file order; `metrics` and `evaluations` hold one dict per line."""

    directory: Path
    config: dict[str, Any]
    environment: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    alarms: list[dict[str, Any]]
    command: list[str]
    version: str | None

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one metric, without the steps that have no value for it."""
        lines = [line for line in self.metrics if line.get(name) is not None]
        return [line[STEP] for line in lines], [line[name] for line in lines]


def read_run(directory: str | os.PathLike[str]) -> LoggedRun:
    """Reads a run directory; a last line that a killed run left unfinished is dropped.

    Raises UserError when the directory is missing, is no run, has another schema version or a corrupt line.
    """
    directory = Path(directory)
    document = _read_config(directory)
    logs = {name: _read_log(directory / name) if (directory / name).exists() else [] for name in LOG_FILES}
    return LoggedRun(
        directory=directory,
        config=document["config"],
        environment=_read_document(directory / ENVIRONMENT_FILE),
        metrics=[with_floats(line) for line in logs[METRICS_FILE]],
        evaluations=[with_floats(line) for line in logs[EVALUATIONS_FILE]],
        samples=logs[SAMPLES_FILE],
        alarms=[with_floats(line) for line in logs[ALARMS_FILE]],
        command=document["command"],
        version=document["pgpo"],
    )


def update_config(directory: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
    """Replace the configuration of a run that continues with other settings; the rest of config.json stays.

    Raises UserError when the directory is not a run, or cannot be written.
    """
    path = Path(directory) / CONFIG_FILE
    document = _read_config(Path(directory))
    document["config"] = {name: hide_secrets(name, value) for name, value in config.items()}
    try:
        write_atomically(path, json_document(document))
    except OSError as error:
        raise _not_writable(Path(directory), error) from error


@contextmanager
def lock(folder: Path, refusal: str) -> Iterator[None]:
    """One process at a time in a folder, which is made. The system releases the lock when the process ends, however it
    ends; on Windows, and on file systems without locks, nobody is kept apart.

    Raises UserError: `refusal` if another process holds it, or that the folder cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        import fcntl
    except ImportError:
        yield
        return
    except OSError as error:
        raise _not_writable(folder, error) from error
    path = folder / LOCK_FILE
    while True:
        with _opened(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(refusal) from error
            except OSError:  # a file system without locks
                try:
                    yield
                finally:
                    path.unlink(missing_ok=True)
                return
            if not _is(file, path):
                continue  # who held it has just removed this file, and the next one may have made its own
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a")
    except OSError as error:
        raise _not_writable(path.parent, error) from error


def _is(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def occupied(directory: Path) -> bool:
    """Whether anything but a lock lies in a directory."""
    return directory.is_dir() and any(path.name != LOCK_FILE for path in directory.iterdir())


def _read_config(directory: Path) -> dict[str, Any]:
    if not directory.is_dir():
        raise UserError(f"There is no run directory {directory}; give the --output_dir of a run.")
    path = directory / CONFIG_FILE
    document = _read_document(path)
    if "schema" not in document or "config" not in document:
        raise UserError(f"{path} was not written by a run; give the --output_dir of a run.")
    if document["schema"] != SCHEMA:
        raise UserError(
            f"{path} has schema version {document['schema']}, this pgpo reads version {SCHEMA};"
            f" use the pgpo version that wrote it ({document.get('pgpo')})."
        )
    return document


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"{path.parent} is not a run directory, it has no {path.name}; give the --output_dir of a run."
        ) from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON; restore it from a copy.") from error
    if not isinstance(document, dict):
        raise UserError(f"{path} is not a JSON object; restore it from a copy.")
    return document


def _read_log(path: Path) -> list[dict[str, Any]]:
    lines = read_lines(path, unfinished_end=True)
    for number, line in enumerate(lines, 1):
        if not isinstance(line.get(STEP), int):
            raise UserError(
                f'Line {number} of {path} has no whole number under "step"; restore the file or remove that line.'
            )
    return lines


def _remove_run(directory: Path) -> None:
    if not (directory / CONFIG_FILE).exists():
        there = [p for p in directory.iterdir() if p.name != LOCK_FILE]
        begun = [p for p in there if p.name.startswith((ENVIRONMENT_FILE, f"{CONFIG_FILE}."))]
        if len(begun) < len(there):
            raise UserError(
                f"{directory} is not empty and not a run, it is not overwritten; choose another --output_dir."
            )
        for path in begun:  # all that a run killed while it was created had written
            path.unlink()
        return
    _read_config(directory)
    for folder in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER):  # first: a log without its checkpoints is never continued
        if (directory / folder).exists():
            shutil.rmtree(directory / folder)
    for name in (*LOG_FILES, FIGURE_FILE):
        (directory / name).unlink(missing_ok=True)


def _not_writable(directory: Path, error: OSError) -> UserError:
    return UserError(f"The directory {directory} cannot be written ({error.strerror}); choose another one.")
