"""A `pgpo train` in a process of its own that kills itself (SIGKILL) at the n-th moment of a phase.

The process forks from a server that has imported everything, so that a run takes seconds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator

from pgpo import cli, runlog
from pgpo.cli import main
from pgpo.command import session
from pgpo.tasks import lab_world
from pgpo.teacher import Teacher
from pgpo.train import checkpoint
from pgpo.train.seam import rollouts as seam_rollouts
from pgpo.train.trainer import PGPOTrainer

torch.set_num_threads(1)
TRAINING_ROWS = 8  # so that 12 steps pass over them more than once


@functools.cache
def _small(**options: Any) -> Any:
    task = _load(**options)
    return dataclasses.replace(task, train=task.train[:TRAINING_ROWS])


_load = lab_world.load
if "pytest" not in sys.modules:  # in the server alone; the tests' own process keeps its world
    cli._draw = lambda *_: None  # the picture is drawn from the log, at the end
    lab_world.load = _small
    _small(variant="plain", domain="physics")  # before the fork


class Phases:
    """Counts the moments of every phase, and dies at one of them."""

    def __init__(self, phase: str | None, moment: int) -> None:
        self.phase, self.moment = phase, moment
        self.seen: Counter[str] = Counter()
        self.generating = self.saving = False

    def reached(self, phase: str) -> bool:
        """Whether this is the moment to die."""
        self.seen[phase] += 1
        return phase == self.phase and self.seen[phase] == self.moment

    def pass_by(self, phase: str) -> None:
        if self.reached(phase):
            die()

    def install(self) -> None:
        self._around(torch, "multinomial", lambda: "generation" if self.generating else "evaluation")
        self._during(seam_rollouts.GRPOTrainer, "_generate_and_score_completions", "generating")
        self._during(PGPOTrainer, "_save_checkpoint", "saving")
        self._around(Accelerator, "backward", lambda: "micro-batches")
        self._around(Teacher, "update", lambda: "optimizer and teacher")
        self._around(torch.optim.AdamW, "step", lambda: "optimizer and teacher")
        for name in ("sha256", "_fsync", "_move_out", "remove_leftovers", "rotate"):
            self._around(checkpoint, name, lambda: "sealing and rotation")
        self._around(Path, "rename", lambda: "sealing and rotation" if self.saving else "run log")
        self._around(Path, "replace", lambda: "run log")
        self._around(runlog.RunLog, "_append", lambda: "run log")
        self._around(runlog, "write_atomically", lambda: "run log")
        self._around(session, "write_records", lambda: "run log")
        self._half_written(torch, "save", 1)
        self._half_written(Path, "write_text", 0)
        self._half_written_tensors()
        self._half_a_line()

    def _around(self, owner: Any, name: str, phase: Any) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            self.pass_by(phase())
            result = plain(*args, **kwargs)
            self.pass_by(phase())
            return result

        setattr(owner, name, call)

    def _during(self, owner: Any, name: str, flag: str) -> None:
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            setattr(self, flag, True)
            try:
                return plain(*args, **kwargs)
            finally:
                setattr(self, flag, False)

        setattr(owner, name, call)

    def _half_written(self, owner: Any, name: str, place: int) -> None:
        """Three moments: before the file, with half of it, and after it."""
        plain = getattr(owner, name)

        @functools.wraps(plain)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.saving:
                return plain(*args, **kwargs)
            self.pass_by("checkpoint files")
            result = plain(*args, **kwargs)
            if self.reached("checkpoint files"):
                cut(args[place])
                die()
            self.pass_by("checkpoint files")
            return result

        setattr(owner, name, call)

    def _half_written_tensors(self) -> None:
        import safetensors.torch
        import transformers.modeling_utils

        self._half_written(safetensors.torch, "save_file", 1)
        self._half_written(transformers.modeling_utils, "safe_save_file", 1)

    def _half_a_line(self) -> None:
        plain = runlog.json_line

        def json_line(values: Any) -> str:
            line = plain(values)
            if self.reached("half a line"):
                for name in (runlog.METRICS_FILE, runlog.EVALUATIONS_FILE, runlog.SAMPLES_FILE):
                    if (DIRECTORY / name).exists():
                        with (DIRECTORY / name).open("a") as file:
                            file.write(line[: len(line) // 2])
                die()
            return line

        runlog.json_line = json_line


DIRECTORY = Path()


def cut(file: Any) -> None:
    os.truncate(file, Path(file).stat().st_size // 2)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _run(words: list[str], directory: Path, phase: str | None, moment: int, out: Path) -> None:
    global DIRECTORY
    DIRECTORY = directory
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    phases = Phases(phase, moment)
    phases.install()
    status = main(words)
    out.with_suffix(".json").write_text(json.dumps(phases.seen))
    sys.exit(status)


def run(
    words: list[str], directory: Path, out: Path, phase: str | None = None, moment: int = 0, after: float | None = None
) -> int:
    """Exit status of `pgpo <words>` (-9: killed); its output goes to `out`, the number of moments to `out`.json.

    phase, moment: when it kills itself. after: seconds of its life, after which it is killed from outside.
    """
    out.unlink(missing_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["victim"])
    process = context.Process(target=_run, args=(words, directory, phase, moment, out))
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    with mock.patch.dict(os.environ, PYTHONPATH=path):  # for the server, which finds nothing else that pytest added
        process.start()
    if after is not None:
        process.join(after)
        if process.exitcode is None:
            process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode
