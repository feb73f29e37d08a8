"""Where fp64 may stand: MPS has none, so it must not be asked of a device's tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pgpo.core.information import sum_dtype

SOURCE = Path(__file__).parents[2] / "src/pgpo"
FP64 = re.compile(r"\.double\(\)|dtype=torch\.float64")
# Tensors on the CPU, one of each.
ON_CPUS = [
    *("core/information.py", "core/signals.py", "forward/routers.py"),
    *("train/distill.py", "train/engine.py", "train/held_out.py"),
]


def test_tensors_of_a_device_are_summed_in_a_dtype_that_it_has() -> None:
    """A `.double()` on a device's tensor ends training and `pgpo eval` on a Mac; `sum_dtype` says what to use."""
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64
    found = []
    for folder in ("core", "forward", "train"):
        for file in sorted((SOURCE / folder).rglob("*.py")):
            found += [file.relative_to(SOURCE).as_posix()] * len(FP64.findall(file.read_text()))
    assert found == ON_CPUS
