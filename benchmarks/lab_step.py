"""What the trainer and the modulation cost on the lab world.

    trainer_over_minimal   a lab step through PGPOTrainer / the same work in the plain loop of minimal.py
    pgpo_over_sdpo         a step with rho / the same step without, same engine, same rollouts

Equal work: the same questions and completions (sampling is left out of both: minimal.py and transformers have
different samplers), so that what is timed is contexts, both forwards, loss, backward, clip, step, teacher.
A third line times the whole step, each with its own sampler.
"""

from __future__ import annotations

import copy
import os
import statistics
import tempfile
import time
import warnings
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import transformers
from datasets import Dataset
from paired import measure, pairs_from_command_line, report
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback

from pgpo import PGPOConfig, PGPOTrainer, minimal
from pgpo.command.train import rewards_of
from pgpo.tasks import lab_world, load_task

STEPS = 30  # per measurement; a run's set-up (about 25 ms) is shared by these
SHORT = 10  # where only steps are timed: a busy neighbour comes and goes within a pair of long measurements
PATH = lab_world.checkpoint_path("plain")
TASK = load_task("lab_world")
WORDS = minimal.Words(PATH)


def fixed_rollouts() -> dict[str, list[list[int]]]:
    """Eight completions of the base model for each of the first questions."""
    torch.manual_seed(0)
    model, s = minimal.load_model(PATH), minimal.Settings()
    prompts = [WORDS.prompt(row["prompt"]) for row in TASK.train[: 8 * STEPS]]
    repeated = [p for p in prompts for _ in range(8)]
    completions = minimal.sample(model, repeated, s, WORDS.end)
    return {str(p): completions[i * 8 : (i + 1) * 8] for i, p in enumerate(prompts)}


class Loop:
    """PGPOTrainer's training loop, so many steps per call."""

    def __init__(
        self, objective: str, rollouts: dict[str, list[list[int]]] | None, folder: str, steps: int = STEPS
    ) -> None:
        transformers.logging.set_verbosity_error()

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            assert rollouts is not None
            ids = [WORDS.prompt(p) for p in prompts]
            completions = [rollouts[str(p)][i % 8] for i, p in enumerate(ids)]
            return {"prompt_ids": ids, "completion_ids": completions, "logprobs": [[0.0] * len(c) for c in completions]}

        args = PGPOConfig(
            folder,
            objective=objective,
            prompts_per_step=8,
            max_completion_length=24,
            learning_rate=1e-3,
            warmup_steps=0,
            max_steps=steps,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            shuffle_dataset=False,
        )
        self.trainer = PGPOTrainer(
            AutoModelForCausalLM.from_pretrained(PATH),
            rewards_of(TASK),
            args,
            Dataset.from_list(TASK.train[: 8 * STEPS]),
            processing_class=AutoTokenizer.from_pretrained(PATH, padding_side="left"),
            rollout_func=rollout if rollouts else None,
        )
        self.trainer.remove_callback(PrinterCallback)

    def __call__(self) -> None:
        self.trainer.train()


class MedianStep(TrainerCallback):
    """Runs a loop and returns the median CPU seconds of its steps, which a busy neighbour hardly moves."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.steps: list[float] = []
        loop.trainer.add_callback(self)

    def __call__(self) -> float:
        self.steps.clear()
        self.loop()
        return statistics.median(self.steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(time.process_time() - self.start)


def plain_loop(rollouts: dict[str, list[list[int]]] | None) -> Any:
    """minimal.py's loop over the same questions."""
    s = minimal.Settings()
    student = minimal.load_model(PATH)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = minimal.adamw(student, s)

    def run() -> None:
        for step in range(STEPS):
            rows = [row for row in TASK.train[step * 8 : (step + 1) * 8] for _ in range(8)]
            prompts = [WORDS.prompt(row["prompt"]) for row in rows]
            if rollouts is None:
                completions = minimal.sample(student, prompts, s, WORDS.end)
            else:
                completions = [rollouts[str(p)][i % 8] for i, p in enumerate(prompts)]
            texts = [WORDS.text(c) for c in completions]
            rewards = [TASK.grade(text, row).reward for text, row in zip(texts, rows)]
            hints = [None if m is None else WORDS.prompt(m) for m in minimal.teach(rows, texts, rewards, s)]
            batch = [minimal.Sample(p, c, h) for p, c, h in zip(prompts, completions, hints)]
            minimal.update(student, teacher, optimizer, batch, s)

    return run


def main() -> None:
    pairs = pairs_from_command_line(9)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    rollouts = fixed_rollouts()
    with tempfile.TemporaryDirectory() as folder:
        report(
            "lab_trainer_over_minimal",
            f"{STEPS} lab steps, given completions: PGPOTrainer / minimal.py",
            1.3,
            measure(Loop("pgpo", rollouts, folder), plain_loop(rollouts), pairs),
        )
        report(
            "lab_trainer_over_minimal_with_sampling",
            f"{STEPS} lab steps, each with its own sampler: PGPOTrainer / minimal.py",
            1.3,
            measure(Loop("pgpo", None, folder), plain_loop(None), pairs),
        )
        report(
            "lab_pgpo_over_sdpo",
            f"median of {SHORT} lab steps, given completions: PGPO / SDPO in PGPOTrainer",
            1.005,
            measure(
                MedianStep(Loop("pgpo", rollouts, folder, SHORT)),
                MedianStep(Loop("sdpo", rollouts, folder, SHORT)),
                9 * pairs,
            ),
        )


if __name__ == "__main__":
    main()
