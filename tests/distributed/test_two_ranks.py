"""Two processes give what one gives, whatever each of them holds, and none waits for the other forever."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trainer_kit import largest_difference
from two_ranks import CASES

SCRIPT = Path(__file__).with_name("two_ranks.py")
NOT_COMPARED = ("seconds", "step_time", "epoch", "num_tokens")


def launch(out: Path, ranks: int) -> list[dict]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "CI": "true"}
    # A hang ends as TimeoutExpired.
    done = subprocess.run(
        [*launcher, str(SCRIPT), str(out)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(f"{out}.{rank}.pt", weights_only=False) for rank in range(ranks)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    return launch(folder / "one", 1), launch(folder / "two", 2)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one(results, case):
    (one,), two = ([r[case] for r in part] for part in results)
    assert [t["ranks"] for t in two] == [2, 2]
    assert largest_difference(two[0]["weights"], two[1]["weights"]) == 0
    assert largest_difference(one["weights"], two[0]["weights"]) < 1e-5
    if one["teacher"]:
        assert largest_difference(one["teacher"], two[0]["teacher"]) < 1e-5
    assert [one["records"], two[0]["records"], two[1]["records"]] == [20, 20, 20]  # 5 questions x 4, gathered
    for a, b in zip(one["logs"], two[0]["logs"], strict=True):
        for name in a:
            if not name.endswith(NOT_COMPARED):
                assert a[name] == pytest.approx(b[name], abs=1e-5, rel=1e-4), (case, name)


def test_the_cases_are_what_they_claim(results):
    (one,), (first, second) = results
    empty = first["one_rank_without_teacher"]["active_rows"]
    assert empty == [0, 0, 0] and min(second["one_rank_without_teacher"]["active_rows"]) > 0
    assert first["nobody"]["active_rows"] == second["nobody"]["active_rows"] == [0, 0, 0]
    assert min(first["split_groups"]["active_rows"]) > 0
    for case in ("plain", "split_groups", "one_rank_without_teacher", "micro_batches"):
        assert one[case]["logs"][0]["rho"] > 1.001
