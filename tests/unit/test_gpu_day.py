"""benchmarks/gpu_day.py where there is no GPU: every part runs, and one that fails or hangs stops no other one."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import on_cpus, patient

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPT = BENCHMARKS / "gpu_day.py"


@pytest.fixture
def gpu_day(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_day

    return gpu_day


def document(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def test_every_part_is_rehearsed(gpu_day, tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--rehearse", "--out", tmp_path]
    done = subprocess.run(command, env=on_cpus(), capture_output=True, text=True, timeout=patient(120))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    found = {name: document(tmp_path, name) for name in gpu_day.PARTS}
    assert {name: each["status"] for name, each in found.items()} == dict.fromkeys(gpu_day.PARTS, "done")
    assert all(each["found"] and each["rehearsed"] for each in found.values())
    # An aim is not judged by sizes it was not made for.
    aims = {name for name, each in found.items() for aim in each["aims"].values() if aim["reached"] is None}
    assert aims == {"head", "update_8b", "whole_step", "sampling"}


def test_all_parts_fit_into_the_time(gpu_day) -> None:
    """The last part takes what is left, which must be enough to start it even if all others use up their limits."""
    *others, _last = gpu_day.PARTS.values()
    assert sum(part.seconds for part in others) + gpu_day.LEAST <= 60 * gpu_day.MINUTES <= 540


def test_a_part_that_fails_hangs_or_dies_is_recorded_and_the_next_one_starts(gpu_day, tmp_path: Path, capfd) -> None:
    def breaks(day) -> None:
        day.add("before", 1)
        raise ValueError("no such kernel")

    def hangs(day) -> None:
        day.add("before", 2)
        subprocess.run(["sleep", "600"])

    def dies(day) -> None:
        day.add("before", 3)
        import os
        import signal

        os.kill(os.getpid(), signal.SIGKILL)

    def misses(day) -> None:
        day.rehearse = False
        day.aim("ratio", 0.9, most=0.5)

    parts = {
        "breaks": gpu_day.Part(breaks, patient(60)),
        "hangs": gpu_day.Part(hangs, 3.0),
        "dies": gpu_day.Part(dies, patient(60)),
        "misses": gpu_day.Part(misses, patient(60)),
    }
    start = time.monotonic()
    assert not gpu_day.run(parts, tmp_path, rehearse=True, minutes=60)
    assert time.monotonic() - start < 300
    found = {name: document(tmp_path, name) for name in parts}
    statuses = {"breaks": "failed", "hangs": "timed out", "dies": "failed", "misses": "done"}
    assert {name: each["status"] for name, each in found.items()} == statuses
    assert [found[name]["found"]["before"] for name in ("breaks", "hangs", "dies")] == [1, 2, 3]
    assert "no such kernel" in found["breaks"]["error"] and "-9" in found["dies"]["error"]
    assert "aim missed: ratio 0.9" in capfd.readouterr().out
    assert gpu_day.run({"misses": parts["misses"]}, tmp_path, rehearse=True, minutes=60)  # a missed aim is no failure


def test_no_time_left_is_recorded(gpu_day, tmp_path: Path) -> None:
    assert not gpu_day.run({"late": gpu_day.Part(lambda day: None, 1.0)}, tmp_path, rehearse=True, minutes=0.1)
    assert document(tmp_path, "late")["status"] == "left out"


def test_without_a_gpu_it_is_refused_in_a_sentence() -> None:
    done = subprocess.run([sys.executable, SCRIPT], env=on_cpus(), capture_output=True, text=True, timeout=patient(60))
    assert done.returncode == 2
    assert (
        done.stderr == "error: torch sees no CUDA GPU here; run this where there is one, or add --rehearse for a CPU.\n"
    )
