"""What a user can get wrong: one sentence, exit status 2, and nothing written, moved or half-done.

Each case asserts on the whole listing of the working folder (names and contents) before and after.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import trainer_kit
from conftest import build_model, build_tokenizer
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig

from pgpo import PGPOTrainer
from pgpo.cli import main
from pgpo.errors import UserError
from pgpo.train.checkpoint import problem

SMALL = [
    *("--test_rows", "2", "--eval_rows", "2", "--eval_k", "2", "--max_steps", "4", "--prompts_per_step", "2"),
    *("--num_generations", "2", "--max_completion_length", "4", "--eval_strategy", "no", "--save_steps", "2"),
]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder with the digest of its content."""
    return {
        str(p.relative_to(folder)): digest(p.read_bytes()) if p.is_file() else "folder"
        for p in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(folder, capsys):
    """Run the command line, which must refuse; returns what it says before the last line, and its last sentence."""

    def run(*words: str, says: int = 0) -> tuple[list[str], str]:
        before = listing(folder)
        capsys.readouterr()
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert status == 2, err
        assert out == ""
        assert "Traceback" not in err
        *said, last = err.splitlines()
        assert len(said) == says, err
        assert last.startswith("pgpo: ")
        assert listing(folder) == before
        return said, last

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A loadable model that knows none of the lab's words."""
    return save_model(tmp_path_factory.mktemp("tiny"))


def save_model(folder: Path, tokenizer=None) -> Path:
    build_model().save_pretrained(folder)
    (tokenizer or build_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny, tmp_path_factory) -> Path:
    """A run of four steps with checkpoints 2 and 4."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    with contextlib.redirect_stderr(io.StringIO()):
        assert main(["train", "--model_name_or_path", str(tiny), "--output_dir", str(directory), *SMALL]) == 0
    return directory


# Names and values -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        ("--domain astrology", "no domain 'astrology'; choose one of physics, chemistry"),
        ("--task science_qa --domain astrology --data_path .", "Unknown science domain 'astrology'; choose"),
        ("--task science_qa", "needs --domain"),
        ("--task arithmetic", "task is 'arithmetic'; choose one of lab_world, science_qa"),
        ("--variant baroque", "no variant 'baroque'; choose one of plain, style"),
        ("--objective ppo", "objective is 'ppo'; choose one of pgpo, sdpo, grpo"),
        ("--optim adamgrad", "--optim: invalid choice: 'adamgrad'"),
        ("--optim schedule_free_adamw", "not linear in the learning rate, so rho cannot act; use adamw_torch"),
        ("--alpha -0.5", "alpha is -0.5; it must be a number >= 0"),
        ("--alpha nan", "alpha is nan; it must be a finite number"),
        ("--rho_max 0.9", "rho_max is 0.9; it must be a number >= 1"),
        ("--num_generations 1", "num_generations is 1; .* no sibling can be a demonstration"),
        ("--beta 0.1 --objective sdpo", "beta is 0.1, which self-distillation does not have; leave it at 0.0"),
        (
            "--per_device_train_batch_size 9 --num_generations 4",
            "9 completions per step are no multiple of num_generations = 4",
        ),
        ("--learning_rat 1", "unrecognized arguments: --learning_rat 1; see `pgpo train --help`"),
        ("physics", "unrecognized arguments: physics; see `pgpo train --help`"),
        ("--alpha much", "--alpha: invalid float value: 'much'"),
        ("--max_steps 2.5", "--max_steps/--max-steps: invalid int value: '2.5'"),
        ("--max_steps", "--max_steps/--max-steps: expected one argument"),
        ("--test_rows 0", "test_rows is 0; it must be at least 1"),
        ("--per_device_train_batch_size 16 --prompts_per_step 8", "prompts_per_step is 8, but .* make 2 questions"),
        ("--loss_type bnpo", "loss_type is 'bnpo', which self-distillation does not have; .*set divergence"),
        ("--model_init_kwargs {}", "--model_init_kwargs does nothing here; use --dtype"),
        ("--resume_from_checkpoint run", "--resume_from_checkpoint does nothing here; use --resume"),
        ("--task", "--task.*: expected one argument; see `pgpo train --help`"),
        ("--prompts_per_step 5000", "4096 training questions, fewer than prompts_per_step = 5000; lower"),
    ],
)
def test_a_wrong_value_is_named_with_what_to_do(refused, words, says):
    _, sentence = refused("train", *words.split())
    assert_matches(sentence, says)


def assert_matches(sentence: str, pattern: str) -> None:
    assert re.search(pattern, sentence), sentence


@pytest.mark.parametrize("words", ["", "--help me"])
def test_unknown_command(refused, words):
    _, sentence = refused("trian", *words.split())
    assert_matches(sentence, "no command 'trian'; choose one of .*train, eval")


@pytest.mark.parametrize(
    "words",
    [
        *("lab-base --seed x", "lab-base --flag", "lab-base --variant baroque"),
        *("sde --flag", "sde --law nowhere:law", "sde --json nowhere/x.json", "demo --flag"),
    ],
)
def test_flags_of_the_other_commands(refused, words):
    _, sentence = refused(*words.split())
    assert_matches(sentence, words.split()[-1].split(":")[0])


def test_lab_base_refuses_a_folder_that_holds_something(refused, folder):
    (folder / "thesis").mkdir()
    (folder / "thesis/chapter.txt").write_text("three years of work")
    _, sentence = refused("lab-base", "--out", "thesis")
    assert_matches(sentence, "thesis is not empty; .*--overwrite")


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, says",
    [
        ("alpha: 1.0\nlearning_rat: 1\n", "the recipe has unknown names: learning_rat; see `pgpo train --help`"),
        ("alpha: [1.0\n", "recipe r.yaml is not valid YAML: .*line 2"),
        ("alpha: 1.0\n\tseed: 3\n", "recipe r.yaml is not valid YAML"),
        ("- alpha\n- 1.0\n", "recipe r.yaml holds no `name: value` lines"),
        ("", "recipe r.yaml holds no `name: value` lines"),
        ("alpha: much\n", "--alpha: invalid float value: 'much'"),
        ("max_steps: 2.5\n", "--max_steps/--max-steps: invalid int value: '2.5'"),
        ("alpha: .nan\n", "alpha is nan"),
    ],
)
def test_recipes(refused, folder, text, says):
    (folder / "r.yaml").write_text(text)
    _, sentence = refused("train", "--config", "r.yaml")
    assert_matches(sentence, says)


def test_missing_recipe(refused):
    assert_matches(refused("train", "--config", "r.yaml")[1], "recipe r.yaml cannot be read .No such file")
    assert_matches(refused("train", "--config")[1], "--config needs the path of a YAML recipe")
    assert_matches(refused("train", "--config", ".")[1], "recipe . cannot be read .Is a directory")


def test_flags_win_over_the_recipe_and_are_checked_last(refused, folder):
    (folder / "r.yaml").write_text("alpha: 2.0\nobjective: ppo\n")
    _, sentence = refused("train", "--config=r.yaml", "--objective", "dpo")
    assert_matches(sentence, "objective is 'dpo'")


# Data -----------------------------------------------------------------------------------------------------------------


def record(number: int, **changes) -> dict:
    """A question in the columns of SciKnowEval."""
    columns = {
        "question": f"How far is {number}?",
        "choices": {"label": ["A", "B", "C", "D"], "text": [f"{number}.{i} m" for i in range(4)]},
        "answerKey": "ABCD"[number % 4],
        "domain": "Physics",
        "type": "mcq-4-choices",
        "details": {"level": "L3"},
    }
    return columns | changes


def without(column: str) -> dict:
    return {name: value for name, value in record(3).items() if name != column}


@pytest.mark.parametrize(
    "records, says",
    [
        (None, "There is no file or folder q.jsonl"),
        ([], "q.jsonl is empty"),
        ([record(0), without("answerKey")], 'q.jsonl, line 2: no column "answerKey" among question, choices'),
        ([record(0, domain="Physik")], "holds no question of domain Physics"),
        ([record(0), record(1, answerKey="E")], "q.jsonl, line 2: answerKey 'E' is not among the option labels"),
        ([record(0), record(1)], "the task has 0 training questions, fewer than prompts_per_step = 8"),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_data_files(refused, folder, tiny, command, records, says):
    if records is not None:
        (folder / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    words = ["--task", "science_qa", "--domain", "physics", "--data_path", "q.jsonl", "--no_data_check"]
    if command == "eval":  # two questions make a test set of 1 and a validation set of 1: none is left to train on
        words = [str(tiny), *words, "--split", "train"]
        says = says if "training" not in says else "the train split holds no questions; choose another --split"
    _, sentence = refused(command, *words)
    assert_matches(sentence, says)


def test_changed_data_is_no_published_data(refused, folder):
    (folder / "q.jsonl").write_text("".join(json.dumps(record(n)) + "\n" for n in range(30)))
    _, sentence = refused("train", "--task", "science_qa", "--domain", "physics", "--data_path", "q.jsonl")
    assert_matches(sentence, "not the published ones: train has 27 questions .* instead of 720")


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train", "eval"])
def test_prompts_longer_than_the_limit(refused, tiny, command):
    model = ("--model_name_or_path", tiny) if command == "train" else (tiny,)
    _, sentence = refused(command, *model, "--max_prompt_length", "5")
    assert_matches(sentence, r"question \S+ has \d+ prompt tokens, more than max_prompt_length = 5; raise")


@pytest.mark.parametrize("command", ["train", "eval"])
@pytest.mark.parametrize("kind", ["missing", "not a model", "truncated", "no pad and no eos", "no chat template"])
def test_unusable_models(refused, folder, tiny, command, kind):
    path = folder / "model"
    if kind == "not a model":
        path.mkdir()
        (path / "notes.txt").write_text("no model here")
    elif kind == "truncated":
        shutil.copytree(tiny, path)
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif kind != "missing":
        tokenizer = build_tokenizer()
        if kind == "no pad and no eos":
            tokenizer.pad_token = tokenizer.eos_token = None
        else:
            tokenizer.chat_template = None
        save_model(path, tokenizer)
    said = {
        "missing": f"there is no model folder {path}",
        "not a model": f"the model '{path}' cannot be loaded",
        "truncated": f"the model '{path}' cannot be loaded .SafetensorError",
        "no pad and no eos": "no pad token and no eos token; set",
        "no chat template": "no chat template; use an instruction-tuned model or set one",
    }
    model = ("--model_name_or_path", path) if command == "train" else (path,)
    _, sentence = refused(command, *model)
    assert_matches(sentence, said[kind])


@pytest.mark.parametrize(
    "words, says",
    [
        ("--k 0", "k is 0; it must be at least 1"),
        ("--rows 0", "rows is 0; it must be at least 1"),
        ("--split dev", "split is 'dev'; choose test, validation or train"),
        ("--k many", "--k: invalid int value: 'many'; see `pgpo eval --help`"),
        ("--records nowhere/r.jsonl", "the folder of nowhere/r.jsonl does not exist"),
        ("--temperature -1", "temperature = -1.0 cannot be sampled at"),
        ("--use_vllm", "vLLM, which is not installed"),
    ],
)
def test_eval_arguments(refused, tiny, monkeypatch, words, says):
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    assert_matches(refused("eval", tiny, *words.split())[1], says)


def test_eval_needs_a_model(refused):
    assert_matches(refused("eval")[1], "required: model; see `pgpo eval --help`")


@pytest.mark.parametrize(
    "words, says", [("--use_peft --lora_r 0", "`r` should be a positive"), ("--seed -1", "[Ss]eed must be between")]
)
def test_what_only_the_libraries_below_can_judge(refused, tiny, words, says):
    assert_matches(refused("train", "--model_name_or_path", tiny, *words.split())[1], says)


def test_weights_in_fp16(refused, folder, tiny):
    words = ("train", "--model_name_or_path", tiny, "--dtype", "float16", *SMALL)
    assert_matches(refused(*words)[1], r"the weight model\S+ is fp16, .* load the model with dtype='float32'")


# Run directories ------------------------------------------------------------------------------------------------------


def test_an_existing_run_is_refused_and_untouched(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    _, sentence = refused("train", "--output_dir", "run")
    assert_matches(sentence, "run already exists; continue it with `pgpo train --resume run`, .* --overwrite")


def test_overwrite_replaces_runs_only(refused, folder, tiny):
    (folder / "thesis").mkdir()
    (folder / "thesis/config.json").write_text('{"chapters": 5}')
    words = ("--model_name_or_path", tiny, "--output_dir", "thesis", "--overwrite", *SMALL)
    assert_matches(refused("train", *words)[1], "thesis/config.json was not written by a run")


@pytest.mark.parametrize("name", ["file", "file/run", "file/a/b/run"])
def test_a_run_directory_that_cannot_be_made(refused, folder, name):
    (folder / "file").write_text("a regular file")
    _, sentence = refused("train", "--output_dir", name)
    assert_matches(sentence, f"run directory {name} cannot be made: file is a file; choose another --output_dir")


@pytest.mark.parametrize("place", ["new", "empty", "replaced"])
def test_a_run_that_fails_in_its_first_step_leaves_no_trace(folder, tiny, finished, monkeypatch, capsys, place):
    def fail(self, model, batch):
        raise UserError("the first step failed.")

    monkeypatch.setattr(PGPOTrainer, "optimize", fail)
    if place != "new":
        (folder / "a/b").mkdir(parents=True)
    before = listing(folder)
    if place == "replaced":
        shutil.copytree(finished, folder / "a/b/run")
        (folder / "a/b/run/notes.txt").write_text("the user's own")
        before |= {"a/b/run": "folder", "a/b/run/notes.txt": digest(b"the user's own")}
    words = ["train", "--model_name_or_path", str(tiny), "--output_dir", "a/b/run", *SMALL]
    assert main([*words, "--overwrite"] if place == "replaced" else words) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "pgpo: the first step failed."
    assert listing(folder) == before


# Resuming -------------------------------------------------------------------------------------------------------------


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: -file.stat().st_size // 2])


def break_json(file: Path) -> None:
    file.write_text('{"global_step": ')


BREAK = {
    "model.safetensors": truncate,
    "pgpo_teacher.safetensors": truncate,
    "optimizer.pt": truncate,
    "scheduler.pt": truncate,
    "rng_state.pth": truncate,
    "trainer_state.json": break_json,
    "pgpo_state.json": Path.unlink,
}


def test_resume_of_what_is_no_run(refused, folder):
    assert_matches(refused("train", "--resume", "run")[1], "There is no run directory run")
    (folder / "run").mkdir()
    assert_matches(refused("train", "--resume", "run")[1], "run is not a run directory, it has no config.json")
    (folder / "run/config.json").write_text('{"model_type": "qwen3"}')
    assert_matches(refused("train", "--resume=run")[1], "run/config.json was not written by a run")
    assert_matches(refused("train", "--resume")[1], "--resume needs the run directory")


def test_resume_with_a_recipe(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    (folder / "r.yaml").write_text("alpha: 2.0\n")
    _, sentence = refused("train", "--resume", "run", "--config", "r.yaml")
    assert_matches(sentence, "--resume continues the run with its own arguments; leave --config out")


def test_resume_without_a_checkpoint(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    shutil.rmtree(folder / "run/checkpoints")
    assert_matches(refused("train", "--resume", "run")[1], "run has no readable checkpoint")


def test_resume_of_a_run_whose_every_checkpoint_is_broken(refused, folder, finished):
    shutil.copytree(finished, folder / "run")
    truncate(folder / "run/checkpoints/checkpoint-4/model.safetensors")
    break_json(folder / "run/checkpoints/checkpoint-2/trainer_state.json")
    said, sentence = refused("train", "--resume", "run", says=2)
    assert "checkpoint-4" in said[0] and "model.safetensors" in said[0]
    assert "checkpoint-2" in said[1] and "trainer_state.json" in said[1]
    assert_matches(sentence, "run has no readable checkpoint in checkpoints/; start a new run")


def test_resume_skips_a_broken_newest_checkpoint_and_names_it(folder, finished, capsys):
    shutil.copytree(finished, folder / "run")
    (folder / "run/checkpoints/checkpoint-best").mkdir()  # not one of ours
    truncate(folder / "run/checkpoints/checkpoint-4/model.safetensors")
    assert main(["train", "--resume", "run"]) == 0
    err = capsys.readouterr().err
    assert err.startswith("checkpoint checkpoint-4 cannot be read (model.safetensors:")
    assert "trying the one before" in err
    steps = [json.loads(line)["step"] for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    assert problem(folder / "run/checkpoints/checkpoint-4") is None  # written anew


@pytest.mark.parametrize("name", BREAK)
def test_every_broken_part_of_a_checkpoint_is_found(tmp_path, finished, name):
    path = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoints/checkpoint-4", path)
    assert problem(path) is None
    BREAK[name](path / name)
    assert name in problem(path)


def test_a_checkpoint_without_weights_is_found(tmp_path, finished):
    path = tmp_path / "checkpoint-4"
    shutil.copytree(finished / "checkpoints/checkpoint-4", path)
    (path / "model.safetensors").unlink()  # the teacher's are still there
    assert problem(path) == "model.safetensors: missing"


# The Python API -------------------------------------------------------------------------------------------------------

ROWS = 16  # 4 prompts x 4 completions


def good(count: int) -> list[float]:
    return [1.0] * count


def at(place: int, value) -> list:
    return [*good(place), value, *good(ROWS - place - 1)]


@pytest.mark.parametrize(
    "returned, says",
    [
        (good(ROWS - 1), "'verdict' returned 15 rewards for 16 completions at step 1"),
        ([], "'verdict' returned 0 rewards for 16 completions"),
        (at(7, math.nan), "'verdict' returned nan for sample 7 at step 1"),
        (at(0, math.inf), "'verdict' returned inf for sample 0 at step 1"),
        (at(15, -math.inf), "'verdict' returned -inf for sample 15 at step 1"),
        (at(3, "1.0"), "'verdict' returned '1.0' for sample 3 at step 1"),
        (at(3, [1.0]), r"'verdict' returned \[1.0\] for sample 3 at step 1"),
        (1.0, "'verdict' returned 1.0 at step 1; return a list with one reward per completion"),
        (None, "'verdict' returned None at step 1; return a list with one reward per completion"),
    ],
)
def test_rewards(tmp_path, returned, says):
    def verdict(prompts, completions, **kwargs):
        return returned

    assert_training_refuses(trainer_kit.trainer(tmp_path, reward=verdict), says)


def assert_training_refuses(trainer, says: str) -> None:
    """UserError, and no update happened."""
    start, teacher = trainer_kit.weights(trainer.model), trainer_kit.weights(trainer.teacher.module)
    with pytest.raises(UserError, match=says):
        trainer_kit.train(trainer)
    assert trainer.state.global_step == 0
    assert trainer_kit.bitwise_equal(start, trainer_kit.weights(trainer.model))
    assert trainer_kit.bitwise_equal(teacher, trainer_kit.weights(trainer.teacher.module))


def test_reward_none_everywhere_means_nobody_was_right(tmp_path):
    """None = the function does not apply (TRL); a batch of these teaches nothing and moves nothing."""
    t = trainer_kit.trainer(tmp_path, reward=lambda prompts, **kwargs: [None] * len(prompts))
    start = trainer_kit.weights(t.model)
    (log,) = trainer_kit.train(t)
    assert (log["active_share"], log["information"], log["rho"], log["success_share"]) == (0.0, 0.0, 1.0, 0.0)
    assert trainer_kit.bitwise_equal(start, trainer_kit.weights(t.model))


def test_reward_none_for_some_leaves_the_others_their_reward(tmp_path):
    def half(prompts, completions, **kwargs):
        rewards = trainer_kit.parity_reward(prompts, completions)
        return [None if i % 2 else r for i, r in enumerate(rewards)]

    t = trainer_kit.trainer(tmp_path, reward=half)
    (log,) = trainer_kit.train(t)
    judged = [r for r in t.last_rollout.rewards if not math.isnan(r)]
    assert len(judged) == ROWS // 2
    assert log["success_share"] == pytest.approx(sum(judged) / len(judged))
    assert 0 < log["active_share"] < 1


@pytest.mark.parametrize("is_async", [False, True])
def test_a_raising_reward_function_is_named_with_step_and_batch(tmp_path, is_async):
    def verdict(prompts, completions, index, **kwargs):
        return [{0: 1.0}.get(i, 0.0) if i != 5 else {}["answer"] for i in index]

    async def verdict_async(**kwargs):
        return verdict(**kwargs)

    # Without shuffling, question 5 stands in the second step: its four completions are samples 4 to 7.
    t = trainer_kit.trainer(tmp_path, reward=verdict_async if is_async else verdict, max_steps=2)
    with pytest.raises(UserError) as caught:
        trainer_kit.train(t)
    name = "verdict_async" if is_async else "verdict"
    says = f"reward function {name!r} raised KeyError at step 2 on the batch of 16 samples: 'answer'."
    assert str(caught.value) == says
    assert isinstance(caught.value.__cause__, KeyError)
    assert t.state.global_step == 1


@pytest.mark.parametrize(
    "returned, says",
    [
        (["no"] * 15, "'remark' returned 15 texts for 16 completions at step 1"),
        ([*["no"] * 9, 3.0, *["no"] * 6], "'remark' returned 3.0 for sample 9 at step 1; return a text or None"),
        ([*["no"] * 9, math.nan, *["no"] * 6], "'remark' returned nan for sample 9 at step 1"),
        (None, "'remark' .* at step 1"),
        (2, "'remark' .* at step 1"),
        (RuntimeError("no connection"), "'remark' raised RuntimeError at step 1 on the batch of 16 samples: no conn"),
    ],
)
def test_feedback(tmp_path, returned, says):
    def remark(prompts, completions, **kwargs):
        if isinstance(returned, Exception):
            raise returned
        return returned

    assert_training_refuses(trainer_kit.trainer(tmp_path, feedback_funcs=remark), says)


def test_feedback_none_everywhere_is_no_feedback(tmp_path):
    ends = []
    for options in ({}, {"feedback_funcs": lambda prompts, **kwargs: [None] * len(prompts)}):
        t = trainer_kit.trainer(tmp_path, **options)
        trainer_kit.train(t)
        ends.append(trainer_kit.weights(t.model))
    assert trainer_kit.bitwise_equal(*ends)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"args": GRPOConfig}, "args is a GRPOConfig; PGPOTrainer needs a PGPOConfig"),
        ({"train_dataset": Dataset.from_dict({"prompt": []})}, "train_dataset is empty"),
        (
            {"train_dataset": Dataset.from_dict({"question": ["w1"] * 4, "answer": ["w2"] * 4})},
            "the columns question, answer but no 'prompt'; rename",
        ),
        ({"train_dataset": Dataset.from_dict({"prompt": ["w1"] * 3})}, "3 rows, fewer than prompts_per_step = 4"),
        ({"reward_funcs": None}, "reward_funcs is empty; pass a function"),
        ({"reward_funcs": []}, "reward_funcs is empty; pass a function"),
    ],
)
def test_trainer_arguments(tmp_path, changes, says):
    arguments = {
        "model": build_model(),
        "reward_funcs": trainer_kit.parity_reward,
        "args": trainer_kit.config(tmp_path),
        "train_dataset": trainer_kit.dataset(),
        "processing_class": build_tokenizer(),
    } | changes
    if arguments["args"] is GRPOConfig:
        arguments["args"] = GRPOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to="none")
    with pytest.raises(UserError, match=says):
        PGPOTrainer(**arguments)


def test_chat_prompts_need_a_chat_template(tmp_path):
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"no chat template; set tokenizer\.chat_template"):
        PGPOTrainer(
            build_model(),
            trainer_kit.parity_reward,
            trainer_kit.config(tmp_path),
            trainer_kit.dataset(),
            processing_class=tokenizer,
        )


class Poison(TrainerCallback):
    """Makes one weight NaN before a step, and remembers all state at that moment."""

    def __init__(self, trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                self.trainer.model.model.layers[0].mlp.up_proj.weight[0, 0] = math.nan
            self.before = self.snapshot()

    def snapshot(self) -> dict[str, torch.Tensor]:
        t = self.trainer
        named = {f"student {n}": p for n, p in t.model.named_parameters()}
        named |= {f"teacher {n}": p for n, p in t.teacher.module.named_parameters()}
        for i, state in t.optimizer.state_dict()["state"].items():
            named |= {f"optimizer {i} {n}": v for n, v in state.items()}
        return {n: p.detach().clone() for n, p in named.items()}


@pytest.mark.parametrize("step", [1, 2])
def test_non_finite_logits_stop_before_any_update(tmp_path, step):
    t = trainer_kit.trainer(tmp_path, max_steps=3)
    poison = Poison(t, step)
    t.add_callback(poison)
    with pytest.raises(UserError, match=f"at step {step}: .*nan"):
        trainer_kit.train(t)
    after = poison.snapshot()
    assert t.state.global_step == step - 1
    assert any(n.startswith("optimizer") for n in after) == (step > 1)
    assert poison.before.keys() == after.keys()
    for name, tensor in after.items():
        assert torch.equal(torch.nan_to_num(tensor, nan=1e30), torch.nan_to_num(poison.before[name], nan=1e30)), name
