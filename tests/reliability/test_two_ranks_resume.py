"""Two processes go on from a checkpoint bit for bit, also within a generation, and agree on a save that failed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from processes import torchrun

from pgpo.train import checkpoint

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("two_ranks_resume.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("ranks")
    torchrun(SCRIPT, out, quiet=100)
    return out, [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("case", ["from 1", "from 3", "from 4", "from 5", "full"])
def test_every_rank_ends_as_without_the_fault(results, case):
    for rank in results[1]:
        whole, other = rank["whole"], rank[case]
        assert other["logs"] == whole["logs"]
        assert torch.equal(other["random"], whole["random"])
        assert other["rollout"] == whole["rollout"]
        for part in ("weights", "teacher"):
            assert all(torch.equal(other[part][n], p) for n, p in whole[part].items())


def test_ranks_sample_for_themselves_and_learn_together(results):
    _, (first, second) = results
    assert not torch.equal(first["whole"]["random"], second["whole"]["random"])
    assert all(torch.equal(second["whole"]["weights"][n], p) for n, p in first["whole"]["weights"].items())
    assert any(float(line["grad_norm"]) > 0 for line in first["whole"]["logs"])


def test_what_one_rank_cannot_write_no_rank_seals(results):
    out, (first, second) = results
    assert checkpoint.steps(out / "full") == [1, 3, 4, 5, 6]
    assert len(first["full"]["said"]) == 1 and "checkpoint-2 could not be written" in first["full"]["said"][0]
    assert second["full"]["said"] == []
    for step in (1, 3, 4, 5, 6):
        path = out / f"full/checkpoint-{step}"
        assert checkpoint.problem(path) is None
        assert (path / "pgpo_progress-1.json").exists() and (path / "rng_state_1.pth").exists()
