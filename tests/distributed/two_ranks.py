"""Run plainly or under torchrun: trains the tiny model on every case and saves what this rank saw.

usage: two_ranks.py OUT
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit


def first_half_fails(prompts, completions, **kwargs):
    """The questions of rank 0 (the first half of every step of four) are never solved."""
    right = trainer_kit.parity_reward(prompts, completions)
    return [r * (i % 4 >= 2) for r, i in zip(right, kwargs["index"], strict=True)]


def nobody_succeeds(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


CASES: dict[str, dict] = {
    "plain": {},
    "split_groups": dict(prompts_per_step=3),  # 12 rows in groups of 4: the middle group lies on both ranks
    "one_rank_without_teacher": dict(reward=first_half_fails),
    "nobody": dict(reward=nobody_succeeds),
    "micro_batches": dict(micro_batch_size=2),
    "cross_fit": dict(information_source="cross_fit"),
    "watched": dict(watch_demonstrations=True),
    "grpo": dict(objective="grpo"),
}


def run(options: dict, folder: str) -> dict:
    t = trainer_kit.trainer(folder, **(dict(optim="sgd", learning_rate=0.5, max_steps=3) | options))
    hinted = []
    plain = t._active_rows
    t._active_rows = lambda batch: hinted.append(rows := plain(batch)) or rows
    logs = trainer_kit.train(t)
    questions = [dict(row, id=str(i)) for i, row in enumerate(trainer_kit.dataset(5))]
    return {
        "logs": logs,
        "weights": trainer_kit.weights(t.accelerator.unwrap_model(t.model)),
        "teacher": trainer_kit.weights(t.teacher.module) if t.teacher else {},
        "ranks": t.accelerator.num_processes,
        "rank": t.accelerator.process_index,
        "active_rows": [len(rows) for rows in hinted],
        "records": len(t.held_out_records(questions)),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        results = {name: run(options, folder) for name, options in CASES.items()}
    rank = results["plain"]["rank"]
    torch.save(results, f"{sys.argv[1]}.{rank}.pt")
