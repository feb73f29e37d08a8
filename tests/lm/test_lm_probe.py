"""`pgpo probe` on a pretrained model: counting on, in a few words (`make test-lm`)."""

from __future__ import annotations

import json
import os
import re
import sys
import warnings
from pathlib import Path

import pytest

from pgpo.command.probe import ProbeArguments, main
from pgpo.tasks import Grade, Task, load_task

COUNTING = Path(__file__).parents[2] / "recipes/lm/next_number.py"
FOLDER = Path(os.environ.get("PGPO_SMOLLM2", Path(sys.prefix, "smollm2")))  # `make test-lm` puts it there
pytestmark = [
    pytest.mark.lm,
    pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no SmolLM2 in {FOLDER}: its wheel could not be had"),
]


def counting() -> Task:
    """The next number after 11 to 42, which this model knows in part."""
    task = load_task(str(COUNTING))
    rows = sorted([*task.train, *task.validation, *task.test], key=lambda row: int(row["answer"]))[:32]
    return Task(task.name, rows, rows, rows, task.grade)


def boxed(task: Task) -> Task:
    def grade(completion, row):
        box = re.search(r"\\boxed\{(\d+)\}", completion)
        return Grade(float(box is not None and box[1] == row["answer"]), box and box[1], box is not None, None)

    return Task(task.name, task.train, task.validation, task.test, grade)


def probed(monkeypatch, task, folder, *words):
    monkeypatch.setattr(ProbeArguments, "load", lambda self: task)
    flags = ["--max_completion_length", "12", "--hinted_samples", "2", "--output_dir", str(folder), *words]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main([str(FOLDER), *flags])
    return json.loads((folder / "probe.json").read_text())


def test_a_real_model_teaches_itself_where_a_hint_is_read(tmp_path, monkeypatch):
    flags = ["--questions", "16", "--num_generations", "8", "--temperature", "0.5", "--temperatures", "0.5"]
    result = probed(monkeypatch, counting(), tmp_path / "p", *flags)
    (reading,) = result["readings"]
    right, wrong, placebo = (reading["hints"][kind] for kind in ("right", "wrong", "placebo"))
    assert right["success"]["value"] > right["student"]["value"] + 0.1
    assert wrong["followed"]["value"] > wrong["unprompted"]["value"] + 0.1  # it copies what it is shown
    assert placebo["success"]["value"] < right["success"]["value"]
    assert -1 < right["information"]["value"] < 1 and right["divergence"] > 0
    assert result["verdict"]["worth"]


def test_a_format_that_the_model_does_not_know_is_nothing_to_distil(tmp_path, monkeypatch):
    task = boxed(counting())
    flags = ["--questions", "8", "--num_generations", "4", "--temperature", "0.5", "--temperatures", "0.5"]
    result = probed(monkeypatch, task, tmp_path / "p", *flags)
    assert result["readings"][0]["well_formed"] == 0
    assert result["verdict"]["name"] in ("no format", "cut") and not result["verdict"]["worth"]
    assert result["verdict"]["sentence"].startswith("nothing to distil: ")
