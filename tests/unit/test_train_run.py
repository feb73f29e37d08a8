"""`pgpo train` from arguments to the last file: the run directory, interruption, resumption, repetition."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_science_qa import record

from pgpo import PGPOTrainer, UserError, runlog
from pgpo.cli import main
from pgpo.command import warm_start
from pgpo.runlog import read_run
from pgpo.settings.arguments import PRESETS, parse
from pgpo.tasks import lab_world

RECIPE = """
task: lab_world
domain: physics
test_rows: 4
eval_rows: 3
eval_k: 2
max_steps: 4
prompts_per_step: 2
num_generations: 4
learning_rate: 1e-3
eval_steps: 3
save_steps: 4
samples_per_step: 3
alpha: 1.5
"""
TIMES = {runlog.STEP_SECONDS, runlog.GENERATION_SECONDS, runlog.UPDATE_SECONDS}
ON_REQUEST = {runlog.DEMONSTRATION_LOGPROB, runlog.SKIPPED_SHARE, runlog.AGREEMENT, runlog.PROBES}
ON_REQUEST |= {runlog.TRUST_RHO, runlog.TRUST_MOVED, runlog.TRUST_BUDGET, runlog.TRUST_RATIO}
ON_REQUEST |= {runlog.SAMPLED_KL_WRONG}  # in a step with wrong completions that have a teacher
ON_REQUEST |= {runlog.AUX_LOSS, runlog.POLICY_LOSS, runlog.FALSE_SUCCESS_RATE, runlog.FALSE_SUCCESS_SHARE}
ON_REQUEST |= {runlog.TEACHER_RENEWED, runlog.REHEARSAL_KL}
WEIGHTS, TEACHER, ADAPTER = "model.safetensors", "pgpo_teacher.safetensors", "adapter_model.safetensors"


def pgpo(*words: object) -> tuple[int, str]:
    """Exit status and stderr of a command line."""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        status = main([str(word) for word in words])
    return status, err.getvalue()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory) -> Path:
    """An uninterrupted run of four steps."""
    directory = tmp_path_factory.mktemp("whole") / "run"
    status, err = pgpo("train", "--config", recipe, "--output_dir", directory)
    assert status == 0, err
    assert err.splitlines()[-2:] == [f"run directory: {directory}", f"figure: {directory / 'figure.png'}"]
    return directory


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def without_times(run: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in TIMES} for line in read_run(run).metrics]


def tensors(run: Path, step: int, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / f"checkpoints/checkpoint-{step}" / name)


def assert_same_run(run: Path, other: Path, step: int = 4, files: tuple[str, ...] = (WEIGHTS, TEACHER)) -> None:
    """Every metric but the times, every evaluation and completion, and every weight, bit for bit."""
    a, b = read_run(run), read_run(other)
    assert without_times(run) == without_times(other)
    assert a.evaluations == b.evaluations
    assert a.samples == b.samples
    assert digest(run / "test_records.jsonl") == digest(other / "test_records.jsonl")
    for name in files:
        left, right = tensors(run, step, name), tensors(other, step, name)
        assert left.keys() == right.keys() and left
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)


# The run directory ----------------------------------------------------------------------------------------------------


def test_the_run_directory_holds_what_is_promised(whole):
    names = {p.name for p in whole.iterdir()}
    assert names == {
        *("config.json", "environment.json", "metrics.jsonl", "evaluations.jsonl", "samples.jsonl"),
        *("test_records.jsonl", "checkpoints", "figure.png"),
    }
    assert (whole / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "checkpoints/checkpoint-4/pgpo_state.json").exists()


def test_every_line_has_every_metric(whole):
    lines = read_run(whole).metrics
    assert [line[runlog.STEP] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert runlog.METRICS.keys() - line.keys() <= ON_REQUEST
        assert line[runlog.EFFECTIVE_LR] == pytest.approx(line[runlog.RHO] * line[runlog.LEARNING_RATE])
        assert line[runlog.STEP_SECONDS] == pytest.approx(
            line[runlog.GENERATION_SECONDS] + line[runlog.UPDATE_SECONDS], abs=1e-6
        )
    assert any(runlog.SAMPLED_KL_WRONG in line for line in lines)
    assert any(line[runlog.ACTIVE_SHARE] > 0 and line[runlog.RHO] != 1.0 for line in lines)  # it did learn from hints


def test_it_evaluates_first_in_between_and_last(whole):
    lines = read_run(whole).evaluations
    assert [(line["step"], line["split"], line["questions"], line["k"]) for line in lines] == [
        (0, "test", 4, 2),
        (0, "validation", 3, 2),
        (3, "validation", 3, 2),
        (4, "validation", 3, 2),
        (4, "test", 4, 2),
    ]
    for line in lines:
        assert runlog.EVALUATIONS.keys() <= line.keys()
    records = [json.loads(line) for line in (whole / "test_records.jsonl").read_text().splitlines()]
    assert len(records) == 8
    assert sum(r["reward"] for r in records) / 8 == lines[-1]["avg_at_k"]


def test_samples_are_completions_of_their_step(whole):
    task = lab_world.load(domain="physics")
    questions = {row["prompt"][0]["content"]: row for row in task.train}
    lines = read_run(whole).samples
    assert [(line["step"], len(line["samples"])) for line in lines] == [(n, 3) for n in (1, 2, 3, 4)]
    for line in lines:
        for sample in line["samples"]:
            assert task.grade(sample["completion"], questions[sample["prompt"]]).reward == sample["reward"]


# Repeating a run ------------------------------------------------------------------------------------------------------


def test_the_stored_arguments_alone_repeat_the_run(whole, tmp_path):
    arguments = tmp_path / "again.yaml"
    arguments.write_text(json.dumps(read_run(whole).config["arguments"]))  # JSON is YAML
    assert pgpo("train", "--config", arguments, "--output_dir", tmp_path / "again")[0] == 0
    assert_same_run(tmp_path / "again", whole)
    # The comparison can fail: another seed is another run.
    assert pgpo("train", "--config", arguments, "--output_dir", tmp_path / "other", "--seed", "1")[0] == 0
    assert without_times(tmp_path / "other") != without_times(whole)


def test_every_flag_is_among_the_stored_arguments(tmp_path):
    """Also one that undoes a preset (1e-5 is PGPOConfig's default, but not the lab's), and one that says no."""
    assert PRESETS["lab_world"]["learning_rate"] != 1e-5
    words = "--learning_rate 1e-5 --no_divergence_tail --alpha_end 2 --domain biology --lora_r 4"
    first = parse(words.split())
    assert (first.config.learning_rate, first.config.divergence_tail) == (1e-5, False)
    (tmp_path / "r.yaml").write_text(json.dumps(first.given))
    for again in (parse([], stored=first.given), parse(["--config", str(tmp_path / "r.yaml")])):
        assert again.config.to_dict() == first.config.to_dict()
        assert again.run == first.run
        assert again.model == first.model


def test_flags_win_over_the_recipe_and_the_recipe_over_the_preset(recipe):
    parsed = parse([f"--config={recipe}", "--max_steps", "7"])
    assert (parsed.config.max_steps, parsed.config.eval_steps) == (7, 3)
    assert parsed.config.eval_top_p == PRESETS["lab_world"]["eval_top_p"]
    assert parsed.config.learning_rate == 1e-3  # YAML reads 1e-3 as a text


# Interruption and resumption ------------------------------------------------------------------------------------------


@pytest.fixture
def interrupt(monkeypatch):
    """Ctrl-C in the middle of a step."""
    plain = PGPOTrainer.optimize

    def arrange(step: int | None) -> None:
        def optimize(self, model, batch):
            if self.state.global_step + 1 == step:
                signal.raise_signal(signal.SIGINT)
            return plain(self, model, batch)

        monkeypatch.setattr(PGPOTrainer, "optimize", optimize)

    return arrange


def test_resuming_a_finished_run_changes_nothing_until_it_gets_more_steps(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    before = {name: digest(run / name) for name in ("metrics.jsonl", "evaluations.jsonl", "test_records.jsonl")}
    assert pgpo("train", "--resume", run)[0] == 0
    assert {name: digest(run / name) for name in before} == before
    assert {p.name for p in (run / "checkpoints").glob("checkpoint-*")} == {"checkpoint-4"}

    assert pgpo("train", "--resume", run, "--max_steps", "6")[0] == 0
    assert [line["step"] for line in read_run(run).metrics] == [1, 2, 3, 4, 5, 6]
    assert without_times(run)[:4] == without_times(whole)
    assert [(e["step"], e["split"]) for e in read_run(run).evaluations][3:] == [
        (4, "validation"),
        (4, "test"),
        (6, "validation"),
        (6, "test"),
    ]


# Objectives, overwriting, adapters -----------------------------------------------------------------------------------


def test_overwrite_replaces_the_run_and_sdpo_never_scales(whole, recipe, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "notes.txt").write_text("the user's own")
    words = ("train", "--config", recipe, "--output_dir", run, "--objective", "sdpo", "--max_steps", "2")
    assert pgpo(*words)[0] == 2
    assert without_times(run) == without_times(whole)
    assert pgpo(*words, "--overwrite")[0] == 0
    lines = read_run(run).metrics
    assert [line["step"] for line in lines] == [1, 2]
    assert [(line["rho"], line["alpha"]) for line in lines] == [(1.0, 0.0)] * 2
    assert runlog.METRICS.keys() - lines[0].keys() <= ON_REQUEST
    assert any(line["information"] != 0.0 for line in lines)  # measured, not acted on
    assert {p.name for p in (run / "checkpoints").glob("checkpoint-*")} == {"checkpoint-2"}
    assert (run / "notes.txt").read_text() == "the user's own"
    # The first rollouts are the same, so is what they say; only the update differs.
    shared = ("information", "student_entropy", "teacher_entropy", "reward")
    assert [lines[0][name] for name in shared] == [read_run(whole).metrics[0][name] for name in shared]


def test_grpo_through_the_command_line(recipe, tmp_path):
    words = ("--objective", "grpo", "--max_steps", "2", "--learning_rate", "1e-2", "--num_generations", "8")
    assert pgpo("train", "--config", recipe, "--output_dir", tmp_path / "run", *words)[0] == 0
    lines = read_run(tmp_path / "run").metrics
    needed = {"step", "loss", "reward", "grad_norm", "learning_rate", "completion_length", "step_seconds"}
    assert all(needed <= line.keys() for line in lines)
    assert not any({"information", "rho"} & line.keys() for line in lines)
    assert any(0 < line["reward"] < 1 and line["grad_norm"] > 0 for line in lines)
    assert not (tmp_path / "run/checkpoints/checkpoint-2" / TEACHER).exists()


def test_a_step_that_reuses_completions_has_no_reward_of_its_own(recipe, tmp_path):
    words = ("--num_iterations", "2", "--max_steps", "2", "--eval_strategy", "no")
    assert pgpo("train", "--config", recipe, "--output_dir", tmp_path / "run", *words)[0] == 0
    first, second = read_run(tmp_path / "run").metrics
    assert "reward" in first and "reward" not in second
    assert {"information", "rho", "loss", "update_seconds"} <= second.keys()


def test_a_science_run_keeps_the_model_made_on_the_spot(tmp_path, monkeypatch, interrupt):
    """Its base is part of the run: resuming, evaluating the adapters and overwriting need nothing else."""
    monkeypatch.setattr(warm_start, "warm_start", functools.partial(warm_start.warm_start, steps=2))
    data = tmp_path / "questions.jsonl"
    data.write_text("".join(json.dumps(record(n)) + "\n" for n in range(30)))
    task = ("--task", "science_qa", "--domain", "physics", "--data_path", data, "--no_data_check")
    sizes = "--max_steps 2 --prompts_per_step 2 --num_generations 2 --max_completion_length 4 --eval_k 1 --test_rows 2"
    words = ("train", *task, *sizes.split(), "--eval_strategy", "no", "--use_peft", "--output_dir", tmp_path / "run")
    interrupt(1)
    assert pgpo(*words)[0] == 130
    base = digest(tmp_path / "run/base/model.safetensors")
    evaluation = ("eval", tmp_path / "run", *task, "--k", "1", "--rows", "2", "--max_new_tokens", "4")
    assert pgpo(*evaluation)[0] == 0
    interrupt(None)
    monkeypatch.setattr(warm_start, "warm_start", None)  # not made a second time
    status, err = pgpo("train", "--resume", tmp_path / "run")
    assert status == 0, err
    assert digest(tmp_path / "run/base/model.safetensors") == base
    monkeypatch.undo()
    monkeypatch.setattr(warm_start, "warm_start", functools.partial(warm_start.warm_start, steps=1))
    assert pgpo(*words, "--overwrite")[0] == 0
    assert digest(tmp_path / "run/base/model.safetensors") != base


TINY = ["--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--prompts_per_step", "2", "--num_generations", "2"]


def test_a_crash_after_a_checkpoint_keeps_it(tmp_path, monkeypatch):
    """Nothing is logged before step 100, yet two checkpoints are good."""
    monkeypatch.chdir(tmp_path)
    plain = PGPOTrainer.optimize

    def third_step_fails(self, model, batch):
        if self.state.global_step == 2:
            raise UserError("the disk of the grader is full.")
        return plain(self, model, batch)

    monkeypatch.setattr(PGPOTrainer, "optimize", third_step_fails)
    flags = ["--max_steps", "4", "--logging_steps", "100", "--save_steps", "1", "--eval_strategy", "no"]
    assert main(["train", *flags, *TINY, "--output_dir", "run"]) == 2
    kept = sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2"]


def test_what_a_resumed_run_changes_is_remembered_or_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--max_steps", "1", "--save_steps", "1", *TINY, "--output_dir", "run"]) == 0
    before = read_run(tmp_path / "run").config
    capsys.readouterr()
    assert main(["train", "--resume", "run", "--learning_rate", "5e-4"]) == 2
    assert "--learning_rate cannot change" in capsys.readouterr().err
    assert read_run(tmp_path / "run").config == before
    assert main(["train", "--resume", "run", "--max_steps", "2"]) == 0
    after = read_run(tmp_path / "run").config
    assert after["max_steps"] == after["arguments"]["max_steps"] == 2
    assert after["arguments"] == before["arguments"] | {"max_steps": 2}
