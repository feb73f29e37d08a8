"""SIGKILL at any moment, then `pgpo train --resume`: the run is the one that was never killed, bit for bit.

`python tests/reliability/test_kill.py OUT.md [PHASE ...]` writes the table of docs/RELIABILITY.md.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import victim
from safetensors.torch import load_file

from pgpo import runlog
from pgpo.runlog import read_run
from pgpo.train import checkpoint

pytestmark = pytest.mark.slow

# A generation is used for four steps and a checkpoint written every two, so every other one lies within a generation;
# the data are passed over every eight steps; two checkpoints are kept.
FLAGS = [
    *("--domain", "physics", "--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--max_steps", "12"),
    *("--prompts_per_step", "2", "--num_generations", "4", "--micro_batch_size", "3", "--alpha", "1.5"),
    *("--steps_per_generation", "2", "--num_iterations", "2", "--save_steps", "2", "--eval_steps", "4"),
]
TIMES = {runlog.STEP_SECONDS, runlog.GENERATION_SECONDS, runlog.UPDATE_SECONDS}
# Phase -> kills. "any time": by the clock, from the start of the process on.
KILLS = {
    "generation": 5,
    "micro-batches": 5,
    "optimizer and teacher": 4,
    "evaluation": 4,
    "checkpoint files": 6,
    "sealing and rotation": 6,
    "run log": 5,
    "half a line": 4,
    "any time": 6,
}
NOTHING_YET = ("was stopped before its first checkpoint", "There is no run directory", "is not a run directory")


def story(directory: Path) -> dict:
    """All that a run leaves: logs without times, and the content of every checkpoint."""
    told = read_run(directory)
    contents: dict[str, bytes] = {}
    for step in checkpoint.steps(directory / "checkpoints"):
        folder = directory / f"checkpoints/checkpoint-{step}"
        assert checkpoint.problem(folder, told.config["run_id"]) is None
        tensors = {f"{f.name} {n}": t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        tensors |= {f"optimizer {i} {n}": t for i, values in optimizer.items() for n, t in values.items()}
        contents |= {f"{step} {n}": t.numpy().tobytes() for n, t in tensors.items()}
        contents[f"{step} state"] = (folder / "pgpo_state.json").read_bytes()
    return {
        "metrics": [{k: v for k, v in line.items() if k not in TIMES} for line in told.metrics],
        "evaluations": told.evaluations,
        "samples": told.samples,
        "records": (directory / "test_records.jsonl").read_text(),
        "checkpoints": contents,
        "files": sorted(p.name for p in (*directory.iterdir(), *(directory / "checkpoints").iterdir())),
    }


class Trial:
    """One folder with a run that is never killed, and runs that are."""

    def __init__(self, work: Path) -> None:
        self.work = work
        victim.run(["--version"], work, work / "out")  # the server imports everything
        start = time.monotonic()
        assert self.train(work / "whole") == 0, self.said()
        self.seconds = time.monotonic() - start
        self.moments: dict[str, int] = json.loads((work / "out.json").read_text())
        self.story = story(work / "whole")
        assert any(line["rho"] != 1 and line["grad_norm"] > 0 for line in self.story["metrics"][6:])

    def train(self, directory: Path, *more: str, resume: bool = False, **kill) -> int:
        words = ["--resume", str(directory)] if resume else ["--output_dir", str(directory), *FLAGS, *more]
        return victim.run(["train", *words], directory, self.work / "out", **kill)

    def said(self) -> str:
        return (self.work / "out").read_text()

    def kill(self, phase: str, number: int) -> tuple[str, str]:
        """Kill a run at a moment drawn from (phase, number), every third one again while it is resumed, and do as its
        message says. Returns what happened, and in what the end differs from the run that was not killed ("": nothing).
        """
        rng = random.Random(f"{phase} {number}")
        directory = self.work / "killed"
        shutil.rmtree(directory, ignore_errors=True)
        told = [self.strike(rng, phase, directory, resume=False)]
        if number % 3 == 0:
            told.append(self.strike(rng, phase, directory, resume=True))
        status = self.train(directory, resume=True)
        if status == 2 and any(text in self.said() for text in NOTHING_YET):
            told.append("nothing to resume, started again")
            status = self.train(directory, "--overwrite")
        if status:
            return "; ".join(told), f"exit status {status}: {self.said()[-300:]}"
        end = story(directory)
        return "; ".join(told), ", ".join(part for part in end if end[part] != self.story[part])

    def strike(self, rng: random.Random, phase: str, directory: Path, resume: bool) -> str:
        kind = "resumed run" if resume else "run"
        if phase == "any time":
            for _ in range(9):  # a machine that is busy now may be idle later
                after = rng.uniform(0, self.seconds)
                if self.train(directory, resume=resume, after=after) == -9:
                    return f"{kind} killed after {after:.1f} s of about {self.seconds:.1f} s"
                if resume:
                    return f"{kind} not killed"
                shutil.rmtree(directory)
            raise AssertionError("it always ended before it was to be killed")
        moment = rng.randint(1, self.moments[phase] // (3 if resume else 1))
        status = self.train(directory, resume=resume, phase=phase, moment=moment)
        if status == -9:
            return f"{kind} killed at {moment}/{self.moments[phase]}"
        assert resume, self.said()  # it has fewer moments left than the whole run, or none
        return f"{kind} not killed"


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return Trial(tmp_path_factory.mktemp("trial"))


@pytest.mark.parametrize("phase", KILLS)
def test_a_killed_run_ends_as_if_it_had_not_been(trial, phase):
    differences = {}
    for number in range(KILLS[phase]):
        what, difference = trial.kill(phase, number)
        if difference:
            differences[what] = difference
    assert differences == {}


def table(trial: Trial, lines: list[str], phases: list[str]) -> None:
    for phase in phases or KILLS:
        count = KILLS[phase]
        results = [trial.kill(phase, number) for number in range(count)]
        same = sum(not difference for _, difference in results)
        twice = sum("; resumed run killed" in what for what, _ in results)
        again = sum("started again" in what for what, _ in results)
        lines.append(
            f"| {phase} | {trial.moments.get(phase, '-')} | {count} | {twice} | {again} | {same} of {count} identical |"
        )
        print(lines[-1], flush=True)
        for what, difference in results:
            print("   ", what, "->", difference or "identical", flush=True)


if __name__ == "__main__":
    lines = [
        "| phase | moments in a run | runs killed | of these twice | before a checkpoint | result |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as work:
        table(Trial(Path(work)), lines, sys.argv[2:])
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n")
