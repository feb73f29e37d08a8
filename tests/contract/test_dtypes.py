"""Where fp64 may be asked for: MPS has none, so never of a device's tensors."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from pgpo.core.information import sum_dtype

SOURCE = Path(__file__).parents[2] / "src/pgpo"
ASKED = re.compile(r"\.double\(\)|torch\.double\b|\.(to|type)\([^)]*float64|dtype=torch\.float64")
# On the CPU, whatever the device.
ON_CPUS = [
    "sums = torch.zeros(4, dtype=torch.float64) if self._sums is None else self._sums.clone()",
    "sums = torch.zeros(3, dtype=torch.float64)",
    "flat = torch.zeros(2 * experts + 1, dtype=torch.float64)",
    "sums = torch.tensor([total_logprob, len(labels)], dtype=torch.float64)",
    "return self.reduce(torch.tensor([float(value)], dtype=torch.float64)).item()",
    "values = values[~values.isnan()].cpu().double()  # MPS has no fp64",
]


def test_tensors_of_a_device_are_summed_in_a_dtype_that_it_has() -> None:
    """fp64 asked of a device's tensor ends training and `pgpo eval` on a Mac; `sum_dtype` says what to use."""
    assert sum_dtype(torch.device("mps")) == torch.float32
    assert sum_dtype(torch.device("cpu")) == sum_dtype(torch.device("cuda")) == torch.float64
    found = []
    for folder in ("core", "forward", "teacher", "train", "evaluate"):
        for file in sorted((SOURCE / folder).rglob("*.py")):
            found += [line.strip() for line in file.read_text().splitlines() if ASKED.search(line)]
    assert found == ON_CPUS
