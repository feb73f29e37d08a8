"""Run under torchrun: checkpoints of two processes. usage: two_ranks_resume.py OUT"""

from __future__ import annotations

import errno
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import trainer_kit

TIMES = ("step_time", "generation_seconds", "update_seconds")
OPTIONS = dict(
    max_steps=6, steps_per_generation=2, num_iterations=2, save_strategy="steps", save_steps=1, shuffle_dataset=True
)


def run(folder: Path, resume: Path | None = None, full: bool = False) -> dict:
    t = trainer_kit.trainer(folder, rollout=None, rows=8, **OPTIONS)
    said: list[str] = []
    t.host.say = said.append
    if full:
        plain = t.save_extra

        def save_extra(directory: Path) -> None:
            if t.state.global_step == 2 and t.accelerator.process_index == 1:
                raise OSError(errno.ENOSPC, "full")
            plain(directory)

        t.save_extra = save_extra
    trainer_kit.train(t, resume_from_checkpoint=None if resume is None else str(resume))
    t.accelerator.wait_for_everyone()
    lines = [r for r in t.state.log_history if "grad_norm" in r]
    return {
        "logs": [{k: repr(v) for k, v in line.items() if k not in TIMES} for line in lines],
        "weights": trainer_kit.weights(t.accelerator.unwrap_model(t.model)),
        "teacher": trainer_kit.weights(t.teacher.module),
        "random": torch.get_rng_state(),
        "rollout": t.last_rollout.completions,
        "said": said,
    }


if __name__ == "__main__":
    out = Path(sys.argv[1])
    results = {"whole": run(out / "whole")}
    for step in (1, 3, 4, 5):
        results[f"from {step}"] = run(out / f"from-{step}", out / f"whole/checkpoint-{step}")
    results["full"] = run(out / "full", full=True)
    rank = torch.distributed.get_rank()
    torch.save(results, out / f"{rank}.pt")
