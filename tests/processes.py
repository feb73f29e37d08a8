"""Other processes that a test starts, and how long it waits for them before it calls them hung."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SLOWER = 10  # ours: with eight busy processes on two cores, each takes about five times as long


def patient(quiet: float) -> float:
    """Seconds to wait for what takes `quiet` seconds at most on a machine with nothing else to do."""
    return SLOWER * quiet


def on_cpus(**more: str) -> dict[str, str]:
    """Environment of a process that uses one thread and no accelerator."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true", **more}


def torchrun(*words: str | Path, ranks: int = 2, quiet: float, **more: str) -> None:
    """Run a script (or `-m module`) on so many ranks; a rank that waits forever ends as TimeoutExpired."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, *map(str, words)]
    done = subprocess.run(command, env=on_cpus(**more), capture_output=True, text=True, timeout=patient(quiet))
    assert done.returncode == 0, done.stderr[-6000:]
