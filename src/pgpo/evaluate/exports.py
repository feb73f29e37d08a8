"""Graded completions as a log of inspect-ai and as a sample file of lm-evaluation-harness; needs neither of them.

Written for inspect-ai 0.3 (log version 2) and lm-eval 0.4 (`lm_eval.result_schema.SampleResult`), and read back by
their own readers in tests/unit/test_exports.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pgpo import runlog
from pgpo.errors import UserError
from pgpo.evaluate.avg_at_k import RIGHT, Record, avg_scores, pass_scores, summarize
from pgpo.files import json_document, json_line, write_atomically

SCORER = "pgpo"  # name of the grade among the scores of inspect-ai


def inspect_log(
    records: Sequence[Record],
    rows: Sequence[Mapping[str, Any]],
    *,
    task: str,
    model: str,
    k: int,
    right: float = RIGHT,
    sampling: Mapping[str, Any] | None = None,
    created: datetime | None = None,
) -> dict[str, Any]:
    """The log of inspect-ai: one sample per completion, its epoch counted from 1, the reward as the score's value.

    The metrics are those of `summarize`, with the ends of their intervals. `sampling`: temperature, top_p,
    max_tokens. `created`: by default now. Raises UserError for a record without its row, or a question without k.
    """
    by_id = _rows(records, rows)
    summary = summarize(records, k, right).as_dict()
    questions = list(dict.fromkeys(record["question_id"] for record in records))
    time = (created or datetime.now(UTC)).isoformat()
    identity = _hash(task, model, time)[:22]
    metrics = {name: {"name": name, "value": value} for name, value in summary.items()}
    score = {"name": SCORER, "scorer": SCORER, "metrics": metrics}
    return {
        "version": 2,
        "status": "success",
        "eval": {
            **{"eval_id": identity, "run_id": identity, "task_id": identity, "created": time, "task": task},
            **{"dataset": {"name": task, "samples": len(questions), "sample_ids": questions}, "model": model},
            **{"config": {"epochs": k}, "model_generate_config": dict(sampling or {})},
        },
        "results": {"total_samples": len(records), "completed_samples": len(records), "scores": [score]},
        "samples": [_inspect_sample(record, by_id[record["question_id"]], model) for record in records],
    }


def _inspect_sample(record: Record, row: Mapping[str, Any], model: str) -> dict[str, Any]:
    answer = {"role": "assistant", "content": record["completion"]}
    told = {"domain": record["domain"], "well_formed": record["well_formed"], "stem": record.get("stem")}
    return {
        **{"id": record["question_id"], "epoch": record["sample"] + 1},
        **{"input": row["prompt"], "target": str(row.get("answer", ""))},
        "output": {"model": model, "choices": [{"message": answer}]},
        "scores": {SCORER: {"value": record["reward"], "answer": record["answer"]}},
        "metadata": {name: value for name, value in told.items() if value is not None},
    }


def lm_eval_samples(
    records: Sequence[Record], rows: Sequence[Mapping[str, Any]], *, k: int, right: float = RIGHT
) -> list[dict[str, Any]]:
    """The lines of lm-eval's sample file: one per question, its k completions as repeats of one request.

    Metrics per question: avg@k and pass@k. Raises UserError for a record without its row, or a question without k.
    """
    by_id = _rows(records, rows)
    average, passed = avg_scores(records, k), pass_scores(records, k, right)
    lines = []
    for place, question in enumerate(average):
        row = by_id[question]
        group = [record for record in records if record["question_id"] == question]
        prompt, target = _text(row["prompt"]), str(row.get("answer", ""))
        doc = {name: value for name, value in row.items() if isinstance(value, (str, int, float, list))}
        texts = [record["completion"] for record in group]
        hashes = {"doc_hash": _hash(json_line(doc)), "prompt_hash": _hash(prompt), "target_hash": _hash(target)}
        lines.append(
            {
                **{"doc_id": place, "doc": doc, "target": target, "resps": [texts], "filtered_resps": [texts]},
                "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
                **{"filter": "none", "metrics": [runlog.AVG_AT_K, runlog.PASS_AT_K], **hashes},
                **{runlog.AVG_AT_K: average[question], runlog.PASS_AT_K: passed[question]},
            }
        )
    return lines


def write_inspect_log(path: Path, log: Mapping[str, Any]) -> None:
    """All or nothing."""
    write_atomically(path, _sound(json_document(log)))


def write_lm_eval_samples(
    folder: Path, samples: Sequence[Mapping[str, Any]], *, task: str, model: str, created: datetime | None = None
) -> Path:
    """Writes folder/MODEL/samples_TASK_TIME.jsonl, where lm-eval looks for it; returns the path."""
    time = (created or datetime.now(UTC)).strftime("%Y-%m-%dT%H-%M-%S.%f")
    place = folder / re.sub(r"[\"<>:/|\\?*\[\]]+", "__", model)
    path = place / f"samples_{re.sub(r'[^0-9A-Za-z]+', '-', task)}_{time}.jsonl"
    place.mkdir(parents=True, exist_ok=True)
    write_atomically(path, _sound("".join(map(json_line, samples))))
    return path


def _rows(records: Sequence[Record], rows: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    by_id = {str(row["id"]): row for row in rows}
    for record in records:
        if record["question_id"] not in by_id:
            raise UserError(
                f"question {record['question_id']!r} has records and no row; give the rows of the evaluation."
            )
    return by_id


def _sound(text: str) -> str:
    """Without lone surrogates, which strict readers of JSON refuse."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def _hash(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "backslashreplace")).hexdigest()
