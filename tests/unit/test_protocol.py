"""Which model a run reports: the last, the one that validation selects, or the best on the test set."""

from __future__ import annotations

import json

import pytest
from test_train_run import pgpo

from pgpo import runlog
from pgpo.command.eval import main as evaluate
from pgpo.runlog import read_run
from pgpo.tasks import lab_world

RECIPE = """
task: lab_world
domain: physics
test_rows: 6
eval_rows: 6
eval_k: 2
max_steps: 6
prompts_per_step: 2
num_generations: 4
eval_steps: 2
samples_per_step: 0
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


def run(recipe, directory, *words):
    status, err = pgpo("train", "--config", recipe, "--output_dir", directory, *words)
    assert status == 0, err
    return read_run(directory), json.loads((directory / "result.json").read_text()), err


def curve(lines, split):
    return {line["step"]: line["avg_at_k"] for line in lines if line["split"] == split}


def first_best(values):
    return min(step for step, value in values.items() if value == max(values.values()))


# With a ruinous learning rate an early step is best; with none at all the start is, being the first of equals.
@pytest.mark.parametrize("rate", ["3e-2", "1e-3", "0"])
def test_strict_tests_the_step_that_validation_selects(recipe, tmp_path, rate):
    log, result, err = run(recipe, tmp_path / "run", "--protocol", "strict", "--learning_rate", rate)
    validation, test = curve(log.evaluations, "validation"), curve(log.evaluations, "test")
    assert set(validation) == {0, 2, 4, 6} and set(test) == {0, 6}
    step = first_best(validation)
    assert result["selected_by"] == "validation" and result["selected"]["step"] == step
    assert result["last"]["step"] == 6 and result["last"]["avg_at_k"] == test[6]
    selected = curve(log.evaluations, "test_selected")
    assert set(selected) == ({step} - {0, 6})  # tested once
    assert result["selected"]["avg_at_k"] == {**test, **selected}[step]
    assert f"at step {step}, which the validation questions select" in err
    if rate == "0":
        assert step == 0


def test_the_selected_model_is_the_one_of_that_checkpoint(recipe, tmp_path):
    directory = tmp_path / "run"
    _, result, _ = run(recipe, directory, "--protocol", "strict", "--learning_rate", "3e-2", "--eval_k", "4")
    step = result["selected"]["step"]
    model = directory / f"checkpoints/checkpoint-{step}" if step else lab_world.checkpoint_path("plain")
    if step:
        assert (model / "model.safetensors").exists()  # kept, though later ones came
    assert result["selected"]["avg_at_k"] != result["last"]["avg_at_k"] or step == 6
    records = tmp_path / "records.jsonl"
    words = ["--task", "lab_world", "--domain", "physics", "--k", "4", "--rows", "6", "--seed", "42", "--hint", "false"]
    assert evaluate([str(model), *words, "--records", str(records)]) == 0
    rewards = [json.loads(line)["reward"] for line in records.read_text().splitlines()]
    assert result["selected"]["avg_at_k"] == pytest.approx(sum(rewards) / len(rewards), abs=1e-9)


def test_paper_selects_on_the_test_questions_and_says_so(recipe, tmp_path):
    log, result, err = run(recipe, tmp_path / "run", "--protocol", "paper")
    test = curve(log.evaluations, "test")
    assert set(test) == {0, 2, 4, 6}
    assert {line["split"] for line in log.evaluations} == {"test"}
    assert [line["step"] for line in log.evaluations] == [0, 2, 4, 6]  # each once
    assert result["selected_by"] == "test" and result["selected"]["step"] == first_best(test)
    assert result["last"]["avg_at_k"] == test[6]
    assert "which the test questions select" in err


def test_a_finished_run_is_resumed_to_the_same_result(recipe, tmp_path):
    directory = tmp_path / "run"
    _, result, _ = run(recipe, directory, "--protocol", "strict")
    before = (directory / runlog.EVALUATIONS_FILE).read_text()
    status, err = pgpo("train", "--resume", directory)
    assert status == 0, err
    assert json.loads((directory / "result.json").read_text()) == result
    assert (directory / runlog.EVALUATIONS_FILE).read_text() == before


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--protocol", "best"), "protocol is 'best'"),
        (("--protocol", "strict", "--eval_strategy", "no"), "--eval_strategy steps"),
        (("--protocol", "paper", "--eval_strategy", "no"), "--eval_strategy steps"),
    ],
)
def test_bad_protocols(recipe, tmp_path, words, match):
    status, err = pgpo("train", "--config", recipe, "--output_dir", tmp_path / "run", *words)
    assert status == 2 and match in err
    assert not (tmp_path / "run").exists()


def test_paper_holds_nothing_out():
    from pgpo.settings.arguments import RunArguments

    assert RunArguments(protocol="paper").validation_fraction == 0
    assert RunArguments().validation_fraction == 0.1
