"""Science-QA: reading, splitting, overlap, manifest and prompts, on small files and on the published ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from pgpo.errors import UserError
from pgpo.tasks import load_task, science_qa
from pgpo.tasks.graders import Grade
from pgpo.tasks.science_qa import Overlap, Question, find_overlap, hold_out, load, load_split, split

REPOSITORY = Path(__file__).parents[2]
PUBLISHED = Path(os.environ.get("PGPO_SCIENCE_DATA") or REPOSITORY.parent / "shared/data/sciknoweval")
needs_published = pytest.mark.skipif(
    not PUBLISHED.is_dir(), reason=f"no folder {PUBLISHED}; set PGPO_SCIENCE_DATA to the SciKnowEval split files"
)
FILE_STEMS = {"biology": "biology", "chemistry": "chemistry", "materials": "material", "physics": "physics"}


def record(number: int, domain: str = "Physics", **changes: Any) -> dict[str, Any]:
    """A question in the hub's columns; the right option's text is unique to its number."""
    columns = {
        "question": f"How far is {number}?",
        "choices": {"label": ["A", "B", "C", "D"], "text": [f"{number}.{i} m" for i in range(4)]},
        "answerKey": "ABCD"[number % 4],
        "domain": domain,
        "type": "mcq-4-choices",
        "details": {"level": "L3", "task": "distances"},
    }
    return columns | changes


def write_jsonl(file: Path, records: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(columns) + "\n" for columns in records), encoding="utf-8")
    return file


def question(idx: int, text: str = "", options: str = "pqrs", answer: str = "A") -> Question:
    labels = tuple("ABCD"[: len(options)])
    return Question("physics", idx, text or f"Question {idx}?", labels, tuple(options), answer)


# Splitting


def test_split_of_ten_by_hand() -> None:
    # numpy.random.default_rng(42).permutation(10) is [5 6 0 7 3 2 4 9 1 8]
    assert split("abcdefghij") == (list("gahdcejbi"), ["f"])


@pytest.mark.parametrize("size", [2, 3, 9, 10, 11, 19, 20, 21, 500, 935])
def test_split_equals_the_datasets_library(size: int) -> None:
    datasets = pytest.importorskip("datasets")
    reference = datasets.Dataset.from_dict({"n": list(range(size))}).train_test_split(test_size=0.1, seed=42)
    assert split(range(size)) == (reference["train"]["n"][:], reference["test"]["n"][:])


@pytest.mark.parametrize("rows", [[], ["a"]])
def test_split_needs_two_rows(rows: list[str]) -> None:
    with pytest.raises(UserError, match=f"only {len(rows)} question"):
        split(rows)


# Reading unsplit questions


def test_an_unsplit_file_is_filtered_numbered_and_split(tmp_path: Path) -> None:
    wanted = [record(n) for n in range(20)]
    wanted[3]["type"] = "mcq-2-choices"
    wanted[3]["choices"] = {"label": ["A", "B"], "text": ["near", "far"]}
    wanted[3]["answerKey"] = "B"
    unwanted = [
        record(100, domain="Chemistry"),
        record(101, details={"level": "L2"}),
        record(102, type="open-ended-qa", choices={"label": [], "text": []}, answerKey=""),
        record(103, type="true_or_false", choices=None),
    ]
    mixed = [wanted[0], unwanted[0], *wanted[1:10], *unwanted[1:], *wanted[10:]]
    train, test = load_split("physics", path=write_jsonl(tmp_path / "all.jsonl", mixed), check=False)
    order = split(range(20))
    assert ([q.idx for q in train], [q.idx for q in test]) == order
    assert {q.idx: q.text for q in train + test} == {n: wanted[n]["question"] for n in range(20)}
    assert {len(q.labels) for q in train + test if q.idx == 3} == {2}


def test_a_folder_of_unsplit_files_is_read_in_name_order(tmp_path: Path) -> None:
    records = [record(n) for n in range(30)]
    write_jsonl(tmp_path / "b.jsonl", records[12:])
    write_jsonl(tmp_path / "a.jsonl", records[:12])
    (tmp_path / "notes.txt").write_text("not data")
    whole = load_split("physics", path=write_jsonl(tmp_path / "whole", records), check=False)
    assert load_split("physics", path=tmp_path, check=False) == whole


def test_idx_restores_the_order_of_shuffled_questions(tmp_path: Path) -> None:
    records = [record(n) for n in range(30)]
    ordered = load_split("physics", path=write_jsonl(tmp_path / "ordered.jsonl", records), check=False)
    shuffled = [records[n] | {"idx": n} for n in reversed(range(30))]
    assert load_split("physics", path=write_jsonl(tmp_path / "shuffled.jsonl", shuffled), check=False) == ordered


def write_split(folder: Path, stem: str = "physics", domain: str = "Physics", size: int = 40) -> Path:
    numbers = split(range(size))
    for name, members in zip(("train", "test"), numbers):
        write_jsonl(folder / f"{stem}-{name}.jsonl", [record(n, domain) | {"idx": n} for n in members])
    return folder


def test_split_files_keep_their_order_and_membership(tmp_path: Path) -> None:
    records = [record(n) for n in range(40)]
    unsplit = load_split("physics", path=write_jsonl(tmp_path / "unsplit", records), check=False)
    assert load_split("physics", path=write_split(tmp_path), check=False) == unsplit


@pytest.mark.parametrize("name", ["materials", "material", "Materials"])
def test_materials_has_two_names(tmp_path: Path, name: str) -> None:
    task = load(name, path=write_split(tmp_path, "material", "Material"), check=False)
    assert {row["domain"] for row in task.train + task.validation + task.test} == {"materials"}
    assert task.test[0]["id"].startswith("materials-")


def test_texts_are_kept_character_for_character(tmp_path: Path) -> None:
    text = " \n\u2028 α\t{x}  "
    records = [record(n, question=f"{text}{n}") for n in range(10)]
    file = tmp_path / "raw.jsonl"
    lines = [json.dumps(columns, ensure_ascii=False) for columns in records]
    file.write_bytes("\r\n\r\n".join(lines).encode("utf-8"))
    train, test = load_split("physics", path=file, check=False)
    assert {q.text for q in train + test} == {f"{text}{n}" for n in range(10)}


# Bad input


def error_of(**options: Any) -> str:
    with pytest.raises(UserError) as caught:
        load(**({"domain": "physics", "check": False} | options))
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    return message


def test_bad_options_are_named(tmp_path: Path) -> None:
    folder = write_split(tmp_path)
    assert "'astronomy'" in error_of(domain="astronomy", path=folder) and "biology, chemistry" in error_of(domain="x")
    assert "'xml'" in error_of(style="xml", path=folder) and "boxed, sdpo" in error_of(style="xml", path=folder)
    assert "revision='v2'" in error_of(revision="v2", path=folder)
    assert "validation_fraction=1.0" in error_of(validation_fraction=1.0, path=folder)
    assert "validation_fraction=-0.1" in error_of(validation_fraction=-0.1, path=folder)


def test_missing_files_are_named(tmp_path: Path) -> None:
    assert str(tmp_path / "absent") in error_of(path=tmp_path / "absent")
    assert "no .jsonl file" in error_of(path=tmp_path)
    write_split(tmp_path)
    assert "lacks chemistry-train.jsonl and chemistry-test.jsonl" in error_of(domain="chemistry", path=tmp_path)
    assert f"the folder that holds both, {tmp_path}" in error_of(path=tmp_path / "physics-train.jsonl")
    (tmp_path / "physics-test.jsonl").unlink()
    assert "lacks physics-test.jsonl;" in error_of(path=tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_empty_files_are_named(tmp_path: Path, content: bytes) -> None:
    write_split(tmp_path)
    (tmp_path / "physics-test.jsonl").write_bytes(content)
    assert f"{tmp_path / 'physics-test.jsonl'} is empty" in error_of(path=tmp_path)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"question": "\xff"}', "not UTF-8 at byte 14"),
        (b'{"question": ', "not JSON"),
        (b"[1, 2]", "a JSON list instead of an object"),
        (b'{"question": ' + b"1" * 5000 + b"}", "not JSON"),  # more digits than Python converts
    ],
)
def test_an_unreadable_line_is_named_by_its_number(tmp_path: Path, line: bytes, complaint: str) -> None:
    file = tmp_path / "raw.jsonl"
    file.write_bytes(json.dumps(record(0)).encode() + b"\n\n" + line + b"\n" + json.dumps(record(1)).encode())
    message = error_of(path=file)
    assert f"{file}, line 3: {complaint}" in message


FOUR = ["A", "B", "C", "D"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"question": None}, 'column "question" is None; make it a text'),
        ({"question": " "}, 'column "question" is blank'),
        ({"choices": ["1", "2"]}, "column \"choices\" is ['1', '2']; make it an object"),
        ({"choices": {"label": FOUR}}, 'column "choices" must have'),
        ({"choices": {"label": FOUR, "text": ["1", "2", "3"]}}, 'column "choices" must have'),
        ({"choices": {"label": FOUR, "text": ["1", "2", "3", 4]}}, 'column "choices" must have'),
        ({"choices": {"label": FOUR, "text": ["1", "2", "3", " "]}}, 'column "choices" must have'),
        ({"choices": {"label": ["A"], "text": ["1"]}}, 'column "choices" must have'),
        ({"choices": {"label": "ABCD", "text": ["1", "2", "3", "4"]}}, 'column "choices" must have'),
        ({"choices": {"label": ["A", "B", "B", "D"], "text": ["1", "2", "3", "4"]}}, "repeat a letter"),
        ({"choices": {"label": ["a", "b", "c", "d"], "text": ["1", "2", "3", "4"]}}, "make each one capital letter"),
        ({"choices": {"label": ["A", "B", "C", "10"], "text": ["1", "2", "3", "4"]}}, "make each one capital letter"),
        ({"answerKey": "E"}, "answerKey 'E' is not among the option labels ['A', 'B', 'C', 'D']"),
        ({"answerKey": ""}, "answerKey '' is not among"),
        ({"answerKey": 1}, 'column "answerKey" is 1; make it a text'),
        ({"details": {}}, 'column "details" has no "level"'),
        ({"details": "L3"}, "column \"details\" is 'L3'; make it an object"),
        ({"domain": 3}, 'column "domain" is 3; make it a text'),
        ({"domain": "Chemistry"}, "not of domain Physics, level L3"),
        ({"details": {"level": "L2"}}, "not of domain Physics, level L3"),
        ({"type": "open-ended-qa"}, "not of domain Physics, level L3"),
        ({"idx": "7"}, "column \"idx\" is '7'; make it a whole number"),
        ({"idx": -1}, 'column "idx" is -1'),
        ({"idx": True}, 'column "idx" is True'),
    ],
)
def test_a_malformed_question_is_named_by_file_and_line(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    records = [record(n) | {"idx": n} for n in range(3)]
    write_jsonl(tmp_path / "physics-train.jsonl", records[:1])
    file = write_jsonl(tmp_path / "physics-test.jsonl", [records[1], records[2] | changes])
    message = error_of(path=tmp_path)
    assert message.startswith(f"{file}, line 2: ") and complaint in message


@pytest.mark.parametrize("column", ["question", "choices", "answerKey", "domain", "type", "details", "idx"])
def test_a_missing_column_is_named_with_the_ones_there_are(tmp_path: Path, column: str) -> None:
    write_split(tmp_path)
    broken = record(50) | {"idx": 50, "answer": "A"}
    del broken[column]
    file = write_jsonl(tmp_path / "physics-test.jsonl", [broken])
    message = error_of(path=tmp_path)
    assert f'{file}, line 1: no column "{column}" among' in message and "answer;" in message


def test_two_questions_with_one_number_are_an_error(tmp_path: Path) -> None:
    write_split(tmp_path)
    write_jsonl(tmp_path / "physics-test.jsonl", [record(99) | {"idx": split(range(40))[0][0]}])
    assert f'2 physics questions have "idx" {split(range(40))[0][0]}' in error_of(path=tmp_path)


def test_a_file_without_the_domain_is_an_error(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "all.jsonl", [record(0, "Chemistry"), record(1, details={"level": "L1"})])
    message = error_of(path=file)
    assert f"{file} holds no question of domain Physics" in message
    assert "but 1 of domain 'Chemistry', 1 of level 'L1'; pass path=" in message
    assert "only 1 question" in error_of(domain="chemistry", path=file)


def test_an_error_names_the_spellings_that_it_saw(tmp_path: Path) -> None:
    records = [record(n, domain) for n, domain in enumerate(["physics"] * 3 + ["PHYSICS", "Physics "])]
    message = error_of(path=write_jsonl(tmp_path / "all.jsonl", records))
    assert "but 3 of domain 'physics', 1 of domain 'PHYSICS', 1 of domain 'Physics '" in message


def losing(lost: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*(record(n) for n in range(20)), *lost]


@pytest.mark.parametrize(
    ("changes", "counted"),
    [
        ({"domain": "physics"}, "2 of domain 'physics'"),
        ({"domain": "Astronomy"}, "2 of domain 'Astronomy'"),
        ({"type": "mcq-5-choices"}, "2 of type 'mcq-5-choices'"),
        ({"details": {"level": "l3"}}, "2 of level 'l3'"),
    ],
)
def test_rows_that_are_left_out_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], counted: str
) -> None:
    records = losing([record(100 + n, **changes) for n in range(2)])
    file = write_jsonl(tmp_path / "all.jsonl", records)
    with pytest.warns(UserWarning, match=f"20 physics questions are used, 2 rows are left out, .*: {counted}[.]"):
        train, test = load_split("physics", path=file, check=False)
    assert len(train + test) == 20
    assert f"left out: {counted};" in error_of(path=file, check=True)
    hub(monkeypatch, records)
    with pytest.warns(UserWarning, match=f"not the published ones: .*; left out: {counted}; scores will not compare"):
        load_split("physics")


def test_many_kinds_of_rows_that_are_left_out_make_one_short_sentence(tmp_path: Path) -> None:
    records = losing([record(100 + n, type=f"type-{n // 2}") for n in range(40)])
    with pytest.warns(UserWarning, match="40 rows are left out, .*: 2 of type 'type-0', .*, 24 of others[.]") as caught:
        load_split("physics", path=write_jsonl(tmp_path / "all.jsonl", records), check=False)
    assert len(caught) == 1


def test_rows_of_the_other_science_domains_are_no_loss(tmp_path: Path) -> None:
    others = [record(100 + n, domain) for n, domain in enumerate(["Biology", "Chemistry", "Material"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_split("physics", path=write_jsonl(tmp_path / "all.jsonl", losing(others)), check=False)


# The hub, replaced by a table in memory


def hub(monkeypatch: pytest.MonkeyPatch, records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, *, split: str, revision: str | None) -> Any:
        calls.append((name, split, revision))
        return datasets.Dataset.from_list(records)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_the_hub_gives_the_same_questions_as_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = [record(n, domain) for n in range(25) for domain in ("Chemistry", "Physics")]
    calls = hub(monkeypatch, records)
    from_file = load_split("physics", path=write_jsonl(tmp_path / "all.jsonl", records), check=False)
    assert load_split("physics", revision="abc", check=False) == from_file
    assert calls == [("hicai-zju/SciKnowEval", "test", "abc")]


def test_a_changed_hub_is_a_warning_and_a_changed_copy_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = [record(n) for n in range(20)]
    hub(monkeypatch, records)
    difference = r"train has 18 questions \(0 with two options\) instead of 720 \(0\); test has 2 questions"
    with pytest.warns(UserWarning, match=f"at revision main are not the published ones: {difference}.*pin revision="):
        from_hub = load("physics")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load("physics", check=False) == from_hub
    file = write_jsonl(tmp_path / "all.jsonl", records)
    with pytest.raises(UserError, match=f"{difference}.*check=False"):
        load("physics", path=file)


def test_an_unreachable_hub_names_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: Any, **options: Any) -> Any:
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = error_of(revision="abc")
    assert "ConnectionError: no route to host)" in message and "path=" in message and "revision abc" in message


# Validation set


def test_the_validation_set_is_a_part_of_train_with_the_asked_size() -> None:
    train, test = [question(n) for n in range(100)], [question(n) for n in range(100, 110)]
    rest, validation = hold_out(train, test, 0.125)
    assert len(validation) == 13
    assert sorted(rest + validation, key=lambda q: q.idx) == train
    assert [q.idx for q in rest] == sorted(q.idx for q in rest)
    assert hold_out(train, test, 0.0) == (train, [])


def test_the_validation_set_depends_on_the_content_only() -> None:
    # A change of the rule would let a checkpoint meet its old validation questions in training: so it is spelled out.
    train, test = [question(n) for n in range(100)], [question(n) for n in range(100, 110)]
    _, validation = hold_out(train, test)
    _, reversed_validation = hold_out(train[::-1], test[::-1])
    assert reversed_validation == validation[::-1]

    def ticket(q: Question) -> str:
        content = f'["{q.text}",["A","B","C","D"],["p","q","r","s"],"A"]'
        return hashlib.sha256(b"42:" + hashlib.sha256(content.encode()).hexdigest().encode()).hexdigest()

    assert {q.idx for q in validation} == {q.idx for q in sorted(train, key=ticket)[:10]}


def test_the_validation_set_avoids_copies_in_test_and_in_train() -> None:
    unique = [question(n) for n in range(4)]
    in_test = [
        question(10, "Twice?"),
        question(11, "Reordered?", "srqp", "D"),
        question(12, "Reworded?", "pxyz"),
    ]
    in_train = [question(20, "Same?"), question(21, " same? "), question(22, "Alike?", "pxyz"), question(23, "Alike?")]
    test = [question(30, "Twice?"), question(31, "Reordered?"), question(32, "Reworded?")]
    train = [*in_test, *unique, *in_train]
    rest, validation = hold_out(train, test, 4 / 11)
    assert validation == unique and rest == in_test + in_train
    with pytest.raises(UserError, match="asks for 5 of 11 training questions, but only 4"):
        hold_out(train, test, 5 / 11)


# Overlap of train and test


def test_overlap_names_every_pair_and_its_kind() -> None:
    test = [question(0, "How?"), question(1, "What?")]
    train = [
        question(10, "How?"),  # character for character
        question(11, "How?", "qprs", "B"),  # reordered
        question(12, "HOW? "),  # other spacing and case
        question(13, "How?", "pxyz"),  # other wrong options
        question(14, "How?", "pqrs", "B"),  # the same prompt with another right answer is still the same prompt
        question(15, "How?", "qxyz"),  # another right option: no overlap
        question(16, "Why?"),  # another question: no overlap
        question(17, "What?", "zyxp", "D"),
    ]
    kinds = [(10, 0, "prompt"), (11, 0, "options"), (12, 0, "options"), (13, 0, "answer"), (14, 0, "prompt")]
    ids = {q.idx: q.id for q in train + test}
    expected = [Overlap(ids[a], ids[b], kind) for a, b, kind in [*kinds, (17, 1, "answer")]]
    assert find_overlap(train, test) == expected


def test_drop_overlap_removes_only_training_questions(tmp_path: Path) -> None:
    numbers = split(range(40))
    kept, copy = numbers[0][0], numbers[0][1]
    records = [record(n) for n in range(40)]
    records[copy] = dict(records[numbers[1][0]])
    file = write_jsonl(tmp_path / "all.jsonl", records)
    plain = load("physics", path=file, check=False)
    dropped = load("physics", path=file, check=False, drop_overlap=True)
    assert (dropped.test, dropped.validation) == (plain.test, plain.validation)
    gone = [row["id"] for row in plain.train if row not in dropped.train]
    assert [id.split("-")[1] for id in gone] == [str(copy)]
    assert any(row["id"].startswith(f"physics-{kept}-") for row in dropped.train + dropped.validation)


# Rows, prompts, grading


def two_option_task(tmp_path: Path, style: str) -> Any:
    records = [
        record(n, "Biology", type="mcq-2-choices", choices={"label": ["A", "B"], "text": [f"{n} x", f"{n} y"]})
        | {"answerKey": "AB"[n % 2]}
        for n in range(20)
    ]
    return load("biology", path=write_jsonl(tmp_path / "b.jsonl", records), style=style, check=False)


def test_the_boxed_prompt_is_the_papers(tmp_path: Path) -> None:
    row = load("physics", path=write_split(tmp_path), check=False).test[0]
    number = split(range(40))[1][0]
    options = "".join(f"{label}: {number}.{i} m\n" for i, label in enumerate("ABCD"))
    instruction = "Please reason step by step, and put your final answer within \\boxed{}."
    content = f"How far is {number}?\n\n{options}{instruction}"
    assert row == {
        "id": row["id"],
        "prompt": [{"role": "user", "content": content}],
        "answer": "ABCD"[number % 4],
        "domain": "physics",
        "stem": row["stem"],
        "labels": ["A", "B", "C", "D"],
        "options": [f"{number}.{i} m" for i in range(4)],
    }


def test_questions_with_one_text_share_a_stem_whatever_their_options() -> None:
    one, other = question(1, "How far is it?", "pqrs"), question(2, "how  far is\nIT?", "tu")
    assert one.stem == other.stem != question(3, "How far is he?", "pqrs").stem
    assert one.id != other.id and one.stem.startswith("physics-")


def test_the_sdpo_prompt_names_exactly_the_options_there_are(tmp_path: Path) -> None:
    four = load("physics", path=write_split(tmp_path), style="sdpo", check=False).test[0]["prompt"]
    two = two_option_task(tmp_path, "sdpo").test[0]["prompt"]
    assert [message["role"] for message in four] == ["system", "user"]
    assert "(A, B, C or D)" in four[0]["content"] and "(A or B)" in two[0]["content"]
    assert not re.search(r"\b[CD]\b", two[0]["content"] + two[1]["content"])
    assert four[1]["content"].startswith("How far") and four[1]["content"].endswith(" m\nPlease reason step by step.")
    for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>"):
        assert tag in four[0]["content"]


def test_each_style_has_its_own_grader_and_uses_the_rows_letters(tmp_path: Path) -> None:
    boxed, tagged = two_option_task(tmp_path, "boxed"), two_option_task(tmp_path, "sdpo")
    row = boxed.test[0]
    right = row["answer"]
    in_box, in_tags = f"\\boxed{{{right}}}", f"<reasoning>.</reasoning><answer>{right}</answer>"
    assert boxed.grade(in_box, row) == tagged.grade(in_tags, row) == Grade(1.0, right, True, None)
    assert boxed.grade(in_tags, row).reward == tagged.grade(in_box, row).reward == 0.0
    assert boxed.grade("\\boxed{C}", row).answer is None
    assert [row["id"] for row in boxed.test] == [row["id"] for row in tagged.test]


@pytest.mark.parametrize("style", ["boxed", "sdpo"])
def test_a_letter_with_the_right_options_text_is_right(tmp_path: Path, style: str) -> None:
    records = [record(n, choices={"label": FOUR, "text": [f"{n} s", "x", f"{n} s", "y"]}) for n in range(20)]
    task = load("physics", path=write_jsonl(tmp_path / "a.jsonl", records), style=style, check=False)
    for row in task.train + task.validation + task.test:
        graded = [
            task.grade(f"<reasoning>.</reasoning><answer>{letter}</answer> \\boxed{{{letter}}}", row) for letter in FOUR
        ]
        right = {"A": "AC", "B": "B", "C": "AC", "D": "D"}[row["answer"]]
        assert "".join(letter for letter, grade in zip(FOUR, graded) if grade.reward) == right
        assert {grade.answer for grade in graded if grade.reward} == {row["answer"]}


@needs_published
def test_the_published_questions_with_a_text_twice_take_either_letter() -> None:
    task = load("physics", path=PUBLISHED, validation_fraction=0)
    rows = {int(row["id"].split("-")[1]): row for row in task.train}
    taken = {
        number: "".join(x for x in FOUR if task.grade(f"\\boxed{{{x}}}", rows[number]).reward)
        for number in (237, 632, 691)
    }
    assert taken == {237: "ABC", 632: "BD", 691: "BC"}


@needs_published
@pytest.mark.parametrize("form", ["{0}: {1}", "({0}) {1}", "{0} {1}", r"\text{{{0}}} - {1}", "{1} ({0})"])
def test_a_letter_with_its_own_text_is_read_in_every_published_test_question(form: str) -> None:
    """Texts that name letters (SMILES, vitamins, "A and C") must not hide the letter, and alone must not be one."""
    for domain in FILE_STEMS:
        task = load(domain, path=PUBLISHED)
        for row in task.test:
            for label, text in zip(row["labels"], row["options"]):
                grade = task.grade(f"\\boxed{{{form.format(label, text)}}}", row | {"answer": label})
                assert grade == Grade(1.0, label, True, None), (row["id"], label, text)
                assert task.grade(f"\\boxed{{{text}}}", row).answer is None, (row["id"], text)


@pytest.mark.parametrize("style", ["boxed", "sdpo"])
def test_the_row_says_where_the_prompt_opened_the_thinking(tmp_path: Path, style: str) -> None:
    task = load("physics", path=write_split(tmp_path), style=style, check=False)
    row = task.test[0]
    answer = f"<reasoning>.</reasoning><answer>{row['answer']}</answer> \\boxed{{{row['answer']}}}"
    opened = {**row, "thinking_opened": True}
    assert task.grade(answer, row).reward == task.grade(f"hm</think>{answer}", opened).reward == 1.0
    assert task.grade(answer, opened) == task.grade(f"<think>{answer}", row)
    assert task.grade(answer, opened).reward == 0.0


def test_ids_follow_the_content(tmp_path: Path) -> None:
    one, same, other = question(7), question(7), question(7, answer="B")
    assert one.id == same.id != other.id and question(8, one.text).id != one.id
    # sha256 of ["Question 7?",["A","B","C","D"],["p","q","r","s"],"A"], computed with the command sha256sum
    assert one.id == "physics-7-0b4679f6"


def test_load_task_passes_options_and_names_wrong_ones(tmp_path: Path) -> None:
    options: dict[str, Any] = {"path": write_split(tmp_path), "check": False}
    assert load_task("science_qa", domain="physics", **options).test == load("physics", **options).test
    with pytest.raises(UserError, match="Unknown task 'physics'; choose one of lab_world, math, "):
        load_task("physics")
    with pytest.raises(UserError, match=r"'stile'; its options are domain, path, revision, style"):
        load_task("science_qa", domain="physics", stile="boxed")
    with pytest.raises(UserError, match="missing a required argument: 'domain'"):
        load_task("science_qa")


def test_importing_the_tasks_imports_no_task_and_no_datasets() -> None:
    script = "import sys, pgpo.tasks; assert not {'pgpo.tasks.science_qa', 'pgpo.tasks.lab_world'} & set(sys.modules); "
    script += "import pgpo.tasks.science_qa; assert not {'datasets', 'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# Manifest


def test_the_manifest_records_the_published_counts() -> None:
    domains = science_qa.read_manifest()["domains"]
    counts = {name: (facts["train"]["questions"], facts["test"]["questions"]) for name, facts in domains.items()}
    assert counts == {"biology": (450, 50), "chemistry": (1890, 210), "materials": (841, 94), "physics": (720, 80)}
    two = {name: (facts["train"]["two_options"], facts["test"]["two_options"]) for name, facts in domains.items()}
    assert two == {"biology": (181, 19), "chemistry": (0, 0), "materials": (0, 0), "physics": (0, 0)}


@needs_published
def test_the_manifest_is_that_of_the_published_files() -> None:
    assert science_qa.build_manifest(PUBLISHED) == science_qa.read_manifest()


def published_records(domain: str, name: str) -> list[dict[str, Any]]:
    file = PUBLISHED / f"{FILE_STEMS[domain]}-{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@needs_published
@pytest.mark.parametrize("domain", FILE_STEMS)
def test_the_split_reproduces_the_published_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, domain: str) -> None:
    train, test = published_records(domain, "train"), published_records(domain, "test")
    raw = sorted(train + test, key=lambda columns: columns["idx"])
    assert split(raw) == (train, test)
    # ... and through the reader, from unsplit rows as on the hub: the manifest's check passes
    rows = [{key: value for key, value in columns.items() if key != "idx"} for columns in raw]
    hub(monkeypatch, [record(0, "Astronomy"), *rows, record(1, "Astronomy")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        from_hub = load_split(domain)
    assert from_hub == load_split(domain, path=PUBLISHED)
    assert from_hub == load_split(domain, path=write_jsonl(tmp_path / "raw.jsonl", rows))


@needs_published
@pytest.mark.parametrize("domain", FILE_STEMS)
def test_the_published_task_has_clean_splits(domain: str) -> None:
    task = load(domain, path=PUBLISHED)
    sizes = {"biology": (405, 45), "chemistry": (1701, 189), "materials": (756, 85), "physics": (648, 72)}
    assert (len(task.train), len(task.validation)) == sizes[domain]
    prompts = [[json.dumps(row["prompt"]) for row in rows] for rows in (task.train, task.validation, task.test)]
    shared = [set(prompts[a]) & set(prompts[b]) for a, b in ((0, 1), (1, 2), (0, 2))]
    assert list(map(len, shared)) == [0, 0, 1 if domain == "materials" else 0]
    ids = [row["id"] for rows in (task.train, task.validation, task.test) for row in rows]
    assert len(set(ids)) == len(ids)


@needs_published
def test_the_published_overlap_is_what_the_documentation_says() -> None:
    found = {}
    for domain in FILE_STEMS:
        pairs = find_overlap(*load_split(domain, path=PUBLISHED))
        kinds = Counter(pair.kind for pair in pairs)
        found[domain] = (len({p.test_id for p in pairs}), len({p.train_id for p in pairs}), kinds["prompt"])
        kept = load(domain, path=PUBLISHED, validation_fraction=0, drop_overlap=True).train
        assert len(kept) == len(published_records(domain, "train")) - found[domain][1]
    assert found == {"biology": (4, 4, 0), "chemistry": (0, 0, 0), "materials": (3, 10, 1), "physics": (5, 8, 0)}


@needs_published
def test_the_published_stems_are_as_many_as_the_documentation_says() -> None:
    found = {domain: len({q.stem for q in load_split(domain, path=PUBLISHED)[1]}) for domain in FILE_STEMS}
    assert found == {"biology": 36, "chemistry": 210, "materials": 93, "physics": 79}


def damaged_copy(folder: Path, damage: Any) -> Path:
    for name in ("train", "test"):
        records = published_records("physics", name)
        if name == "test":
            records = damage(records)
        write_jsonl(folder / f"physics-{name}.jsonl", records)
    return folder


def change_answer(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0] | {"answerKey": "A" if records[0]["answerKey"] != "A" else "B"}, *records[1:]]


def change_space(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [records[0] | {"question": records[0]["question"] + " "}, *records[1:]]


@needs_published
@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (change_answer, "test has as many questions as it should, but their content or order differs"),
        (change_space, "test has as many questions as it should, but their content or order differs"),
        (lambda records: records[::-1], "test has as many questions as it should, but their content or order differs"),
        (lambda records: records[1:], r"test has 79 questions \(0 with two options\) instead of 80 \(0\)"),
    ],
)
def test_a_damaged_copy_of_the_published_files_is_noticed(tmp_path: Path, damage: Any, complaint: str) -> None:
    folder = damaged_copy(tmp_path, damage)
    with pytest.raises(UserError, match=rf"not the published ones: {complaint}.*check=False") as caught:
        load("physics", path=folder)
    assert "train has" not in str(caught.value)
    load("physics", path=folder, check=False)


@needs_published
def test_extra_columns_and_key_order_do_not_matter(tmp_path: Path) -> None:
    def rewrite(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [dict(reversed(columns.items())) | {"source": "copy"} for columns in records]

    assert load("physics", path=damaged_copy(tmp_path, rewrite)) == load("physics", path=PUBLISHED)
