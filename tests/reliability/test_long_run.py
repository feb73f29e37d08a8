"""2,010 steps of `pgpo train` in one process: memory and open files stay flat, no line is missing, resume is exact.

`python tests/reliability/test_long_run.py OUT.md` writes the table of docs/RELIABILITY.md.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pgpo import cli, runlog
from pgpo.runlog import RunLog, read_run
from pgpo.train import checkpoint

pytestmark = pytest.mark.slow

LAST, RESUMED, EVERY = 2010, 2000, 100
WARM = 400  # steps: caches are filled, each kind of evaluation and save was done
MOST_MB = 1.0  # per 100 steps
# A generation serves three steps, so the checkpoint of step 2000 lies within one; 2,010 steps pass over the questions
# many times; the guard keeps watch; two checkpoints are kept. At the preset's learning rate so small a batch collapses
# within 300 steps, and nothing would move any more; at this one it learns to the end.
FLAGS = [
    *("--learning_rate", "3e-5", "--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--eval_steps", "200"),
    *("--prompts_per_step", "2", "--num_generations", "4", "--num_iterations", "3", "--alpha", "1.5"),
    *("--save_steps", "200", "--save_total_limit", "2", "--guard", "warn", "--max_steps", str(LAST)),
]
TIMES = {runlog.STEP_SECONDS, runlog.GENERATION_SECONDS, runlog.UPDATE_SECONDS}


# In the process that trains -------------------------------------------------------------------------------------------


def watch(out: Path) -> None:
    """Write a line after every 100 steps, as the log of the step is written."""
    plain, start = RunLog.metrics, time.monotonic()

    def metrics(self: RunLog, step: int, values: Any) -> None:
        plain(self, step, values)
        if step % EVERY == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
            line = {
                "step": step,
                "megabytes": resident / 1e6,
                "files": len(list(Path("/proc/self/fd").iterdir())),
                "threads": len(list(Path("/proc/self/task").iterdir())),
                "objects": len(gc.get_objects()),
                "seconds": time.monotonic() - start,
            }
            with out.open("a") as file:
                file.write(json.dumps(line) + "\n")

    RunLog.metrics = metrics  # type: ignore[method-assign]


def train(out: Path, *words: str) -> None:
    """`pgpo train` in a process of its own, watched."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CI": "true"}
    command = [sys.executable, __file__, "--watched", str(out), "train", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# Of the run -----------------------------------------------------------------------------------------------------------


def slope(steps: list[float], values: list[float]) -> float:
    """Least squares, per step."""
    mean_x, mean_y = sum(steps) / len(steps), sum(values) / len(values)
    above = sum((x - mean_x) * (y - mean_y) for x, y in zip(steps, values))
    return above / sum((x - mean_x) ** 2 for x in steps)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {f"{f.name} {n}": t for f in folder.glob("*.safetensors") for n, t in load_file(f).items()}
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    return found | {f"optimizer {i} {n}": t for i, values in optimizer.items() for n, t in values.items()}


def differences(directory: Path, other: Path) -> list[str]:
    """What of two runs and their last checkpoints is not the same, the times left out."""
    a, b = read_run(directory), read_run(other)
    found = []
    for name in ("metrics", "evaluations", "samples", "alarms"):
        one, two = ([{k: v for k, v in line.items() if k not in TIMES} for line in getattr(r, name)] for r in (a, b))
        found += [name] * (one != two)
    folders = [d / f"checkpoints/checkpoint-{LAST}" for d in (directory, other)]
    one, two = (tensors(folder) for folder in folders)
    found += sorted(one.keys() ^ two.keys()) + [n for n in one.keys() & two.keys() if not torch.equal(one[n], two[n])]
    for name in ("pgpo_state.json", "scheduler.pt"):
        found += [name] * (len({(folder / name).read_bytes() for folder in folders}) != 1)
    return found


class Long:
    """The run, and its copy that is continued from the checkpoint of step 2000."""

    def __init__(self, work: Path) -> None:
        self.directory, self.again = work / "run", work / "again"
        train(work / "whole.jsonl", "--output_dir", str(self.directory), *FLAGS)
        self.lines = [json.loads(line) for line in (work / "whole.jsonl").read_text().splitlines()]
        shutil.copytree(self.directory, self.again)
        shutil.rmtree(self.again / f"checkpoints/checkpoint-{LAST}")
        train(work / "again.jsonl", "--resume", str(self.again))

    def measured(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values after the warm-up."""
        warm = [line for line in self.lines if line["step"] >= WARM]
        return [line["step"] for line in warm], [line[name] for line in warm]

    def megabytes_per_100_steps(self) -> float:
        return 100 * slope(*self.measured("megabytes"))


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Long:
    return Long(tmp_path_factory.mktemp("long"))


def test_memory_stays_flat(long):
    assert [line["step"] for line in long.lines] == list(range(EVERY, LAST + 1, EVERY))
    assert long.megabytes_per_100_steps() < MOST_MB, long.lines


def test_no_file_and_no_thread_stays_open(long):
    for name in ("files", "threads"):
        assert len(set(long.measured(name)[1])) == 1, long.lines


def test_no_step_is_missing(long):
    run = read_run(long.directory)
    assert [line["step"] for line in run.metrics] == list(range(1, LAST + 1))
    assert [line["step"] for line in run.samples] == list(range(1, LAST + 1))
    validated = [line["step"] for line in run.evaluations if line["split"] == "validation"]
    assert validated == [*range(0, LAST, 200), LAST]
    assert checkpoint.steps(long.directory / "checkpoints") == [RESUMED, LAST]


def test_it_still_learns_and_resumes_exactly(long):
    steps = read_run(long.directory).metrics
    moved = [line["grad_norm"] > 0 and line["rho"] != 1 for line in steps]
    assert sum(moved) > 0.9 * LAST and all(moved[RESUMED:])
    assert (long.again / f"checkpoints/checkpoint-{RESUMED}/pgpo_rollout-0.safetensors").exists()
    assert differences(long.directory, long.again) == []


# The table ------------------------------------------------------------------------------------------------------------


def table(long: Long) -> str:
    lines = ["| step | resident MB | open files | threads | Python objects | seconds |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {m['step']} | {m['megabytes']:.1f} | {m['files']} | {m['threads']} | {m['objects']} | {m['seconds']:.0f} |"
        for m in long.lines
    ]
    run = read_run(long.directory)
    same = [line["step"] for line in run.metrics] == list(range(1, LAST + 1))
    lines += [
        "",
        f"slope from step {WARM} on: {long.megabytes_per_100_steps():+.3f} MB per 100 steps",
        f"metrics: {len(run.metrics)} lines, {'no gap' if same else 'GAPS'}",
        f"resumed at {RESUMED}, differences at {LAST}: {differences(long.directory, long.again) or 'none'}",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "--watched":
        torch.set_num_threads(1)
        cli._draw = lambda *_: None  # the picture is drawn from the log, at the end
        watch(Path(sys.argv[2]))
        sys.exit(cli.main(sys.argv[3:]))
    with tempfile.TemporaryDirectory() as work:
        Path(sys.argv[1]).write_text(table(Long(Path(work))))
