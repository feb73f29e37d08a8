"""Records for other tools: their contents by hand, and read back by inspect-ai's and lm-eval's own readers."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from pgpo.errors import UserError
from pgpo.evaluate import Record
from pgpo.evaluate.exports import inspect_log, lm_eval_samples, write_inspect_log, write_lm_eval_samples

TIME = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
ROWS: list[dict[str, Any]] = [
    {"id": "q1", "prompt": [{"role": "user", "content": "1 + 1?\nA: 2\nB: 3"}], "answer": "A", "domain": "sums"},
    {"id": "q2", "prompt": "2 + 2?", "answer": "B", "domain": "sums", "stem": "two"},
]


def records() -> list[Record]:
    found = []
    for question, answers in (("q2", ("B", None)), ("q1", ("B", "B"))):
        for sample, answer in enumerate(answers):
            right = {"q1": "A", "q2": "B"}[question]
            record = Record(
                question_id=question,
                domain="sums",
                sample=sample,
                reward=float(answer == right),
                answer=answer,
                well_formed=answer is not None,
                completion=f"I say {answer}. \ud83d \u2028é" if answer is None else f"I say {answer}.",
            )
            found.append(Record(**record, stem="two") if question == "q2" else record)
    return found


def log() -> dict[str, Any]:
    sampling = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 24}
    return inspect_log(records(), ROWS, task="sums", model="a/b", k=2, sampling=sampling, created=TIME)


def test_a_log_has_a_sample_per_completion() -> None:
    found = log()
    assert [(s["id"], s["epoch"], s["scores"]["pgpo"]["value"]) for s in found["samples"]] == [
        ("q2", 1, 1.0),
        ("q2", 2, 0.0),
        ("q1", 1, 0.0),
        ("q1", 2, 0.0),
    ]
    metrics = found["results"]["scores"][0]["metrics"]
    assert (metrics["avg_at_k"]["value"], metrics["pass_at_k"]["value"]) == (0.25, 0.5)
    assert metrics["avg_at_k_low"]["value"] < 0.25 < metrics["avg_at_k_high"]["value"]
    assert found["eval"]["config"]["epochs"] == 2 and found["samples"][0]["metadata"]["stem"] == "two"
    assert log() == found


def test_a_sample_file_has_a_line_per_question(tmp_path: Path) -> None:
    path = write_lm_eval_samples(tmp_path, lm_eval_samples(records(), ROWS, k=2), task="my_sums", model="a/b")
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    assert [(line["doc_id"], line["doc"]["id"], line["avg_at_k"], line["pass_at_k"]) for line in lines] == [
        (0, "q2", 0.5, 1.0),
        (1, "q1", 0.0, 0.0),
    ]
    assert [len(line["resps"]) for line in lines] == [1, 1] and lines[1]["resps"][0] == ["I say B.", "I say B."]
    assert lines[1]["arguments"]["gen_args_0"]["arg_0"] == "user: 1 + 1?\nA: 2\nB: 3"


def test_records_without_their_rows_are_refused() -> None:
    with pytest.raises(UserError, match=r"question 'q2' has records and no row; give the rows of the evaluation\."):
        lm_eval_samples(records(), ROWS[:1], k=2)
    with pytest.raises(UserError, match="has 2 completions instead of k = 3"):
        inspect_log(records(), ROWS, task="sums", model="m", k=3)


def test_inspect_reads_the_log(tmp_path: Path) -> None:
    reader = pytest.importorskip("inspect_ai.log", reason="inspect-ai is not installed: pip install inspect-ai")
    write_inspect_log(tmp_path / "log.json", log())
    found = reader.read_eval_log(tmp_path / "log.json")
    assert (found.status, found.eval.model, found.eval.config.epochs, found.eval.dataset.samples) == (
        *("success", "a/b", 2),
        2,
    )
    assert found.results.scores[0].metrics["avg_at_k"].value == 0.25
    first, second = found.samples[0], found.samples[1]
    assert (first.id, first.epoch, first.target, first.input) == ("q2", 1, "B", "2 + 2?")
    assert (first.output.completion, first.scores["pgpo"].as_float()) == ("I say B.", 1.0)
    assert second.output.completion == "I say None. ? \u2028é"  # a lone surrogate is no text
    assert second.scores["pgpo"].answer is None and second.metadata["well_formed"] is False
    assert found.samples[2].input[0].role == "user" and found.samples[2].input[0].text == "1 + 1?\nA: 2\nB: 3"
    assert found.eval.model_generate_config.temperature == 0.6
    reader.write_eval_log(found, str(tmp_path / "log.eval"))  # their own format takes it
    again = reader.read_eval_log(tmp_path / "log.eval")
    values = [{(s.id, s.epoch): s.scores["pgpo"].value for s in read.samples} for read in (found, again)]
    assert values[0] == values[1] and len(values[0]) == 4


def test_lm_eval_reads_the_samples(tmp_path: Path) -> None:
    utils = pytest.importorskip("lm_eval.utils", reason="lm-eval is not installed: pip install lm-eval")
    from datasets import load_dataset
    from lm_eval.result_schema import SampleResult

    samples = lm_eval_samples(records()[2:], ROWS, k=2) + lm_eval_samples(records()[:2], ROWS, k=2)
    path = write_lm_eval_samples(tmp_path, samples, task="my_sums", model="a/b", created=TIME)
    assert path.parent.name == utils.sanitize_model_name("a/b")
    assert utils.get_sample_results_filenames([str(path)]) == [str(path)]
    assert utils.get_file_task_name(path.name) == "my-sums"
    assert utils.get_file_datetime(path.name) == "2026-01-02T03-04-05.000678"
    assert SampleResult.__required_keys__ <= samples[0].keys()
    table = load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert table["avg_at_k"][:] == [0.0, 0.5] and table["resps"][0] == [["I say B.", "I say B."]]
