"""Tasks by name: reasoning_gym's generators, boxed mathematics, a file of the user's, and how they are asked for."""

from __future__ import annotations

import json
import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pgpo.cli import main
from pgpo.command.train import build_trainer
from pgpo.errors import UserError
from pgpo.settings.arguments import parse
from pgpo.tasks import Task, lab_world, load_task
from pgpo.tasks.open_answers import STYLES, grade

MODEL = ("--model_name_or_path", "somebody/model", "--use_cpu")
SUMS = {"min_terms": 2, "max_terms": 2, "max_digits": 1}  # 200 questions


def gym(name: str = "chain_sum", style: str = "plain", **options: Any) -> Task:
    pytest.importorskip("reasoning_gym", reason="reasoning_gym is not installed: pip install 'pgpo[tasks]'")
    return load_task(f"reasoning_gym:{name}", options=options, style=style)


def texts(rows: list[dict[str, Any]]) -> list[str]:
    return [row["prompt"][0]["content"] for row in rows]


# Readings of an answer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "style, completion, readings, well_formed",
    [
        ("plain", " 13.\n", ["13"], True),
        ("plain", "**Bob**", ["Bob"], True),
        ("plain", "10:30", ["10:30"], True),  # a colon within an answer
        ("plain", ".5", [".5"], True),
        ("plain", "The final answer is 12.", ["12", "The final answer is 12"], False),
        ("plain", "2 + 2 = 4", ["4", "2 + 2 = 4"], False),
        ("plain", "a is 1, so b is: 2", ["2", "a is 1, so b is: 2"], False),
        ("plain", "The answer is", ["The answer is"], True),  # cut off
        ("plain", "2 + 2 = 4\n\nThe sum", ["4", "2 + 2 = 4\n\nThe sum"], False),
        ("plain", "**", [], True),
        ("boxed", r"so \boxed{ 3 }", ["3"], True),
        ("boxed", r"\boxed{1} or \boxed{2}", ["2"], False),
        ("boxed", "3", [], False),
        ("boxed", r"\boxed{}", [], False),
    ],
)
def test_where_an_answer_stands(style: str, completion: str, readings: list[str], well_formed: bool) -> None:
    found, kept = STYLES[style].read(completion)
    assert (list(found), kept) == (readings, well_formed)


def test_the_best_reading_counts_and_a_scorer_that_fails_is_a_wrong_answer() -> None:
    def score(answer: str) -> float:
        return {"4": 1.0, "2 + 2 = 4": 0.25}[answer]

    plain = STYLES["plain"]
    assert grade("2 + 2 = 4", plain, score).reward == 1.0
    assert grade("4", plain, score) == grade("<think>5</think> 4", plain, score)
    wrong = grade("5", plain, score)  # a KeyError
    assert (wrong.reward, wrong.answer, wrong.feedback) == (0.0, "5", "The final answer cannot be read.")
    assert grade("4 </think>", plain, score, opened=True).feedback is not None  # nothing but thinking
    partly = grade("2 + 2 = 4 is", plain, lambda answer: 0.25)
    assert (partly.reward, partly.feedback) == (0.25, "The final answer is wrong.")


# reasoning_gym --------------------------------------------------------------------------------------------------------


def test_the_splits_of_a_generator_share_no_question() -> None:
    """`chain_sum` repeats itself: 1600 numbers give 199 of its 200 questions."""
    task = gym(**SUMS, size=400)
    splits = [texts(split) for split in (task.train, task.validation, task.test)]
    together = [text for split in splits for text in split]
    assert len(set(together)) == len(together) == 199
    assert [len(split) for split in splits] == [145, 18, 36]
    ids = [row["id"] for row in (*task.train, *task.validation, *task.test)]
    assert len(set(ids)) == len(ids)


def test_questions_do_not_depend_on_how_many_are_asked_for() -> None:
    few, many = (gym(size=size, max_digits=3) for size in (1500, 1600))
    assert few.test == many.test and len(few.test) == 256
    assert few.validation == many.validation and len(few.validation) == 128
    assert few.train == many.train[: len(few.train)]
    assert gym(size=1500, max_digits=3, seed=1).test != few.test


def test_difficulty_is_passed_through_and_the_generator_judges() -> None:
    task = gym(**SUMS, style="boxed")
    row = task.test[0]
    assert texts([row])[0].endswith("\\boxed{}.")
    assert all(len(word) == 1 for word in texts([row])[0].split(":")[1].split("=")[0].split())
    right, wrong = rf"\boxed{{{row['answer']}.0}}", rf"\boxed{{{row['answer']}1}}"
    assert task.grade(right, row).reward == 1.0  # score_answer compares by value
    assert task.grade(wrong, row).reward < 1.0
    assert task.grade(row["answer"], row).reward == 0.0  # without its box
    restored = json.loads(json.dumps(row))  # as a table's columns return it
    assert task.grade(right, restored).reward == 1.0


def test_part_of_a_score_is_reward_and_no_success() -> None:
    """`score_answer` of a generator with the base class's rule: the right text within a longer one earns its share."""
    task = gym("spell_backward", min_word_len=3, max_word_len=3, size=11)
    row = task.train[0]
    found = task.grade(f"{row['answer']}x", row)
    assert 0 < found.reward < 1 and found.feedback is not None


@pytest.mark.parametrize(
    "name, options, says",
    [
        ("chainsum", {}, "no reasoning_gym task 'chainsum'; .* for example chain_sum"),
        ("", {}, "no reasoning_gym task ''; give --task reasoning_gym:NAME"),
        ("chain_sum", {"digits": 2}, "has no option 'digits'; its options are min_terms, max_terms"),
        ("chain_sum", {"min_terms": 0}, 'refuses {"min_terms": 0} .*min_terms must be positive'),
        ("chain_sum", {"min_terms": "two"}, 'refuses {"min_terms": "two"}'),
        ("chain_sum", {"size": 10}, "size is 10; give a whole number of questions, 11 or more"),
        ("chain_sum", {"size": "many"}, "size is 'many'; give a whole number"),
        ("chain_sum", {"min_terms": 1, "max_terms": 1, "max_digits": 1}, "only 10 different questions"),
    ],
)
def test_what_a_generator_cannot_do_is_told_in_one_sentence(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        gym(name, **options)


def test_questions_that_change_with_the_hash_seed_need_a_fixed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    with pytest.raises(UserError, match=r"ransom_note depend on Python's hash seed.* set the environment variable"):
        gym("ransom_note")
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    assert gym("ransom_note", size=11).train


def test_without_reasoning_gym_the_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning_gym; install it with: pip install 'pgpo\[tasks\]'"):
        load_task("reasoning_gym:chain_sum")


# Boxed mathematics ----------------------------------------------------------------------------------------------------

PROBLEMS = [{"prompt": f"What is {i} / 4?", "solution": rf"\frac{{{i}}}{{4}}"} for i in range(1, 21)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_boxed_mathematics_is_judged_by_value(tmp_path: Path) -> None:
    task = load_task("math", path=written(tmp_path / "problems.jsonl", PROBLEMS), validation_fraction=0.2)
    assert [len(rows) for rows in (task.train, task.validation, task.test)] == [14, 4, 2]
    row = next(
        row for rows in (task.train, task.validation, task.test) for row in rows if row["answer"] == r"\frac{2}{4}"
    )
    assert texts([row]) == ["What is 2 / 4?\n" + STYLES["boxed"].instruction]
    for text, reward in ((r"\boxed{0.5}", 1.0), (r"\boxed{\frac{3}{6}}", 1.0), (r"\boxed{0.4}", 0.0), ("$0.5$", 0.0)):
        assert task.grade(text, row).reward == reward, text


def test_a_prompt_counts_once_and_never_in_both_splits(tmp_path: Path) -> None:
    written(tmp_path / "train.jsonl", [*PROBLEMS[:10], PROBLEMS[0], PROBLEMS[12]])
    written(tmp_path / "test.jsonl", PROBLEMS[10:])
    with pytest.warns(UserWarning, match="2 of 12 questions repeat a prompt and are left out"):
        task = load_task("math", path=tmp_path, validation_fraction=0)
    assert texts(task.train) == texts(load_task("math", path=tmp_path, validation_fraction=0).train)
    assert not set(texts(task.train)) & set(texts(task.test)) and len(task.train) == len(task.test) == 10


def test_chat_messages_are_taken_as_they_are(tmp_path: Path) -> None:
    chat = [{"role": "system", "content": "Box it."}, {"role": "user", "content": "1 + 1?"}]
    rows = [{"prompt": chat, "solution": "2"}, PROBLEMS[0]]
    task = load_task("math", path=written(tmp_path / "chat.jsonl", rows), validation_fraction=0)
    assert chat in [row["prompt"] for row in (*task.train, *task.test)]


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"prompt": "?"}], 'line 1: column "solution" is None; write the right answer there'),
        ([PROBLEMS[0], {"prompt": "?", "solution": "unclear"}], "line 2: math-verify reads no answer in the solution"),
        ([{"prompt": 3, "solution": "1"}], 'line 1: column "prompt" is 3; make it a text, or chat messages'),
        ([PROBLEMS[0]], "only 1 question to split"),
    ],
)
def test_bad_mathematics_is_told_with_its_line(tmp_path: Path, rows: list[dict[str, Any]], says: str) -> None:
    with pytest.raises(UserError, match=says):
        load_task("math", path=written(tmp_path / "bad.jsonl", rows))


# A file of the user's -------------------------------------------------------------------------------------------------

PAGE = (Path(__file__).parents[2] / "docs/TASKS.md").read_text(encoding="utf-8")
LITTLE = shlex.split(
    "--use_cpu --max_steps 1 --prompts_per_step 2 --num_generations 2 --max_completion_length 8 --max_prompt_length 64 "
    "--max_teacher_prompt_length 128 --bf16 false --gradient_checkpointing false --eval_k 1 --report_to none"
)


def test_the_task_of_the_page_trains(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """docs/TASKS.md, word for word: 20 lines, and the command below them with the lab's model."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 20
    Path("squares.py").write_text(code, encoding="utf-8")
    command = next(line for line in PAGE.splitlines() if line.startswith("pgpo train --task squares.py"))
    words = shlex.split(command)[1:-1]  # without the model's name
    model = str(lab_world.checkpoint_path("plain"))
    assert main([*words, model, *LITTLE, "--output_dir", "run"]) == 0
    assert (folder / "run/result.json").exists() or (folder / "run/test_records.jsonl").exists()
    capsys.readouterr()
    assert main(["eval", "run", "--k", "1"]) == 0  # the run knows its task and the options of it
    assert "10 questions" in capsys.readouterr().out
    task = load_task("squares.py", largest=50)
    assert [len(rows) for rows in (task.train, task.validation, task.test)] == [31, 10, 10]
    assert [task.grade(text, task.train[0]).reward for text in ("It is 400.", "20", "")] == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "code, says",
    [
        (None, "there is no task file own.py"),
        ("1 / 0", r"own.py cannot be run \(ZeroDivisionError: division by zero\)"),
        ("x = 1", r"own.py has no function load\(\)"),
        ("def load():\n    return 3", r"load\(\) of own.py returned 3; it must return a pgpo.tasks.Task"),
        ("def load(level):\n    pass", "'own.py': missing a required argument: 'level'; its options are level"),
    ],
)
def test_a_file_that_is_no_task_is_told_in_one_sentence(folder: Path, code: str | None, says: str) -> None:
    if code is not None:
        Path("own.py").write_text(code)
    with pytest.raises(UserError, match=says):
        load_task("own.py")


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, says",
    [
        ("--task reasoning_gym:chain_sum", "reasoning_gym:chain_sum comes with no model; add --model_name_or_path"),
        ("--task math", "math needs --data_path"),
        ("--task reasoning_gym:chain_sum --domain physics", "domain does nothing for the task reasoning_gym:chain_sum"),
        ("--variant style --task science_qa --domain physics", "variant does nothing for the task science_qa"),
        ("--task_options {}", "task_options does nothing for the task lab_world"),
        ("--task reasoning_gym:lcm --task_options 3", "task_options is '3'; give a JSON mapping"),
        ("--task reasoning_gym:lcm --task_options {size", "task_options is '{size', which is no JSON"),
    ],
)
def test_what_a_task_does_not_take_is_refused(words: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        parse([*words.split(), "--use_cpu"])


def test_options_are_read_from_json_and_from_a_recipe(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("task: reasoning_gym:chain_sum\ntask_options: {max_digits: 2}\n")
    words = ("--task", "reasoning_gym:chain_sum", "--task_options", '{"max_digits": 2}')
    for parsed in (parse([*words, *MODEL]), parse(["--config", str(recipe), *MODEL])):
        assert parsed.run.task_options == {"max_digits": 2}
        assert parse(MODEL[-1:], stored=json.loads(json.dumps(parsed.given))).run.task_options == {"max_digits": 2}
        assert parsed.config.max_completion_length == 8192  # the paper's values, for the model is the user's


def test_the_commands_of_the_page_are_read() -> None:
    commands = re.findall("^pgpo train (.*)$", PAGE.replace("\\\n", " "), re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        parse([*shlex.split(command), "--use_cpu"])


def test_an_unknown_task_exits_with_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--task", "reasoning_gym:", *MODEL, "--output_dir", "never"]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1 and not Path("never").exists()


def test_math_refuses_a_time_limit_that_math_verify_would_cancel():
    """It sets the same timer. Red if reward_timeout is taken, and stops nothing."""
    parsed = types.SimpleNamespace(config=types.SimpleNamespace(reward_timeout=5.0))
    task = Task("math", [], [], [], lambda completion, row: None)
    with pytest.raises(UserError, match="reward_timeout is 5, but math-verify"):
        build_trainer(parsed, task, None, None, None, [])
