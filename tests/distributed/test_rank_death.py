"""A rank that dies, fails or falls silent ends the job within a minute, is named, and what was saved is whole."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import on_cpus, patient

from pgpo.runlog import read_run
from pgpo.train import checkpoint

SCRIPT = Path(__file__).with_name("rank_death.py")
FLAGS = ["--max_steps", "50", "--save_steps", "2", "--test_rows", "2", "--eval_rows", "2", "--eval_k", "2"]
FLAGS += ["--prompts_per_step", "2", "--num_generations", "4", "--use_cpu", "--rank_timeout", "12"]
LIMIT = 60  # seconds from the end of the rank to that of the job


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Job:
    """Two ranks: under torchrun, or ("apart") each on its own as on two machines, where nobody tells of the other."""

    def __init__(self, folder: Path, launcher: str, rank: int, how: str, where: str) -> None:
        self.run = folder / "run"
        self.ended = folder / "ended"
        words = [str(SCRIPT), str(rank), how, where, str(self.ended), "--output_dir", str(self.run), *FLAGS]
        if launcher == "torchrun":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *words]
            environments = [on_cpus()]
        else:
            command, port = [sys.executable, *words], str(free_port())
            common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            environments = [on_cpus(RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]
        self.files = [folder / f"said-{i}" for i in range(len(environments))]
        self.processes = [
            subprocess.Popen(command, env=e, stdout=f.open("w"), stderr=subprocess.STDOUT, start_new_session=True)
            for e, f in zip(environments, self.files, strict=True)
        ]
        self.victim = None if launcher == "torchrun" else self.processes[rank]
        self.survivor = self.processes[0 if launcher == "torchrun" else 1 - rank]

    def said(self) -> str:
        return "\n".join(f.read_text() for f in self.files)

    def seconds_to_the_end(self) -> float:
        """From the moment at which the rank came to its end to the job's."""
        start = time.monotonic()
        while self.survivor.poll() is None:
            assert time.monotonic() - start < patient(90), self.said()
            time.sleep(0.1)
        return time.time() - float(self.ended.read_text().split()[0])

    def close(self) -> None:
        if self.ended.exists():  # torchrun gives its processes groups of their own
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(self.ended.read_text().split()[1]), 9)
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()


@pytest.fixture
def job(tmp_path):
    jobs = []

    def start(*arguments) -> Job:
        jobs.append(Job(tmp_path, *arguments))
        return jobs[-1]

    yield start
    for started in jobs:
        started.close()


CASES = [
    # launcher, rank, how, where, what names the rank
    ("apart", 1, "SIGKILL", "optimize", "pgpo: rank 1 ({host}, process {pid}) has sent no heartbeat for 1"),
    ("apart", 0, "SIGKILL", "optimize", "pgpo: the job's store at 127.0.0.1, rank 0's machine, has not answered"),
    ("apart", 1, "SIGSTOP", "optimize", "pgpo: rank 1 ({host}, process {pid}) has sent no heartbeat for 1"),
    ("apart", 0, "SIGSTOP", "optimize", "pgpo: the job's store at 127.0.0.1, rank 0's machine, has not answered"),
    ("apart", 1, "error", "optimize", "({host}, process {pid}) has failed: MemoryError: no room for 3 more tensors"),
    ("apart", 0, "error", "optimize", "({host}, process {pid}) has failed: MemoryError: no room for 3 more tensors"),
    ("apart", 1, "exit", "save_extra", "pgpo: rank 1 ({host}, process {pid}) has sent no heartbeat for 1"),
    ("apart", 1, "SIGSTOP", "held_out_records", "pgpo: rank 1 ({host}, process {pid}) has sent no heartbeat for 1"),
    ("torchrun", 1, "SIGKILL", "optimize", "rank      : 1 (local_rank: 1)\n  exitcode  : -9"),
    ("torchrun", 0, "SIGKILL", "_generate_and_score_completions", "rank      : 0 (local_rank: 0)\n  exitcode  : -9"),
    ("torchrun", 1, "SIGSTOP", "optimize", "pgpo: rank 1 ({host}, process"),
    ("torchrun", 1, "error", "save_extra", "rank      : 1 (local_rank: 1)\n  exitcode  : 1"),
]


@pytest.mark.parametrize(
    ("launcher", "rank", "how", "where", "named"),
    [pytest.param(*case, marks=[] if i == 0 else pytest.mark.slow) for i, case in enumerate(CASES)],
)
def test_the_job_ends_and_names_the_rank(job, launcher, rank, how, where, named):
    started = job(launcher, rank, how, where)
    seconds = started.seconds_to_the_end()
    said = started.said()
    print(f"{launcher} rank {rank} {how} in {where}: {seconds:.0f} s\n{said}")
    assert started.survivor.returncode not in (0, 2), said
    assert seconds < LIMIT, said
    pid = started.victim.pid if started.victim else ""
    assert named.format(host=socket.gethostname(), pid=pid) in said
    survivor = started.files[-1 if len(started.files) == 1 else 1 - rank].read_text()
    if launcher == "apart":
        assert "Traceback" not in survivor
    if where == "held_out_records":
        return
    steps = checkpoint.steps(started.run / "checkpoints")
    assert steps == [2]
    assert checkpoint.problem(started.run / "checkpoints/checkpoint-2") is None
    finished = 4 if where == "save_extra" else 3
    if launcher == "apart":
        assert (
            f"ends after step {finished}; continue from step 2, with the same launcher, by: pgpo train --resume "
            in survivor
        )
    assert len(read_run(started.run).metrics) == finished
