from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pgpo.errors import UserError
from pgpo.evaluate import Record, evaluate, read_records, write_records
from pgpo.tasks.graders import Grade

ROWS: list[dict[str, Any]] = [
    {
        "id": "p-1",
        "prompt": [{"role": "user", "content": "2 * 3"}],
        "answer": "6",
        "domain": "physics",
        "solution": "6 !",
    },
    {
        "id": "c-1",
        "prompt": [{"role": "user", "content": "5 * 1"}],
        "answer": "5",
        "domain": "chemistry",
        "solution": "5 !",
    },
]


def _grade(text: str, row: dict[str, Any]) -> Grade:
    answer = text.split()[0] if text else None
    return Grade(reward=float(answer == row["answer"]), answer=answer, well_formed=text.endswith("."), feedback=None)


def test_records_pair_each_completion_with_its_own_row() -> None:
    asked: list[tuple[Any, int, int]] = []

    def generate(prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        asked.append((prompts, k, seed))
        return [["6 .", ""], ["6 .", "5"]]

    assert evaluate(ROWS, generate, _grade, k=2, seed=17) == [
        Record(
            question_id="p-1", domain="physics", sample=0, reward=1.0, answer="6", well_formed=True, completion="6 ."
        ),
        Record(
            question_id="p-1", domain="physics", sample=1, reward=0.0, answer=None, well_formed=False, completion=""
        ),
        Record(
            question_id="c-1", domain="chemistry", sample=0, reward=0.0, answer="6", well_formed=True, completion="6 ."
        ),
        Record(
            question_id="c-1", domain="chemistry", sample=1, reward=1.0, answer="5", well_formed=False, completion="5"
        ),
    ]
    assert asked == [([row["prompt"] for row in ROWS], 2, 17)]


@pytest.mark.parametrize("by_the_generator", [True, False])
def test_the_grader_hears_where_the_prompt_opened_the_thinking(by_the_generator: bool) -> None:
    opens = lambda prompt: prompt[0]["content"] == "2 * 3"  # noqa: E731

    def generate(prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        return [["x"] * k for _ in prompts]

    seen: list[tuple[str, bool]] = []

    def grade(text: str, row: dict[str, Any]) -> Grade:
        seen.append((row["id"], row.get("thinking_opened", False)))
        return _grade(text, row)

    if by_the_generator:
        generate.opens_thinking = opens  # type: ignore[attr-defined]
        evaluate(ROWS, generate, grade, k=2, seed=0)
    else:
        evaluate(ROWS, generate, grade, k=2, seed=0, opens=opens)
    assert seen == [("p-1", True), ("p-1", True), ("c-1", False), ("c-1", False)]
    assert "thinking_opened" not in ROWS[0]


def test_context_replaces_the_prompt_and_only_that() -> None:
    def context(row: dict[str, Any]) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"{row['prompt'][0]['content']} hint: {row['solution']}"}]

    def copy_hint(prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        return [[prompt[0]["content"].split("hint: ")[1]] * k for prompt in prompts]

    records = evaluate(ROWS, copy_hint, _grade, k=1, seed=0, context=context)
    assert [record["reward"] for record in records] == [1.0, 1.0]
    assert [record["question_id"] for record in records] == ["p-1", "c-1"]


class Endpoint:
    def __call__(self, prompts: list[Any], k: int, seed: int) -> list[list[str]]:
        return [["a"] * k]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([["a", "b"]], "returned 1 lists for 2 prompts; it must return one list of 2 texts per prompt"),
        ([["a", "b"], ["a"]], "returned 1 items for prompt 1; it must return a list of 2 texts"),
        (["ab", "cd"], "returned a str for prompt 0"),  # a text of k letters is not k texts
        ([["a", "b"], ["a", None]], "returned 2 items for prompt 1"),
        (None, "returned a NoneType for 2 prompts"),
    ],
)
def test_a_callable_that_returns_another_shape_is_named(returned: Any, message: str) -> None:
    def my_sampler(prompts: list[Any], k: int, seed: int) -> Any:
        return returned

    with pytest.raises(UserError, match=f"my_sampler {message}"):
        evaluate(ROWS, my_sampler, _grade, k=2, seed=0)


def test_a_callable_object_is_named_by_its_class() -> None:
    with pytest.raises(UserError, match=r"^Endpoint returned 1 lists for 2 prompts"):
        evaluate(ROWS, Endpoint(), _grade, k=2, seed=0)


def test_rows_that_cannot_be_evaluated_are_refused() -> None:
    with pytest.raises(UserError, match="2 rows have the id 'p-1'"):
        evaluate([ROWS[0], ROWS[1], ROWS[0]], Endpoint(), _grade, k=1, seed=0)
    with pytest.raises(UserError, match="no rows"):
        evaluate([], Endpoint(), _grade, k=1, seed=0)
    with pytest.raises(UserError, match="k = 0"):
        evaluate(ROWS, Endpoint(), _grade, k=0, seed=0)


def test_records_survive_the_disk(tmp_path: Path) -> None:
    texts = [["6 µ\n\u2028.", "NaN"], ['"5"', ""]]
    records = evaluate(ROWS, lambda prompts, k, seed: texts, _grade, k=2, seed=0)
    write_records(tmp_path / "records.jsonl", records)
    assert read_records(tmp_path / "records.jsonl") == records


def test_files_that_hold_no_records_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    with pytest.raises(UserError, match=r"no file of records .*records\.jsonl"):
        read_records(path)
    write_records(path, evaluate(ROWS, lambda prompts, k, seed: [["6"], ["5"]], _grade, k=1, seed=0))
    whole = path.read_text()
    path.write_text(whole[:-5])  # records are written at once: a cut file is not an unfinished run
    with pytest.raises(UserError, match="Line 2 of"):
        read_records(path)
    path.write_text(whole.replace('"reward"', '"score"', 1))
    with pytest.raises(UserError, match=r"Line 1 of .* is not a record, it has no 'reward'"):
        read_records(path)


@pytest.mark.parametrize("grade", [1.0, None, Grade(float("nan"), None, True, None)])
def test_what_is_no_grade_is_refused(grade: Any) -> None:
    with pytest.raises(UserError, match="for question 'p-1'"):
        evaluate(ROWS[:1], lambda *_: [["a"]], lambda *_: grade, k=1, seed=0)
