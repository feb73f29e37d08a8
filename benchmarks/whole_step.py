"""A whole step of PGPOTrainer, sampling included, over one of TRL's SDPOTrainer.

    lab    the lab's base model (0.12 M parameters) on its own questions, graded by its own grader
    32k    Qwen3 of 11.5 M parameters, V = 32,768, random weights; prompts of 50 tokens, completions of 64, log-normal
           with sigma 0.6, at most 256, by a processor that both are handed (sampler.py); a fifth of them is right

8 questions x 8 completions, temperature 1. Both: fp32, no gradient checkpointing, AdamW, top 100 and a tail, JSD with
beta 0.5. SDPOTrainer takes 8 micro-batches of 8 rows, PGPOTrainer its defaults. What is timed is every optimizer step,
from `on_step_begin` to `on_step_end`: questions, sampling, rewards, both forwards, backward, step, teacher, log. The
learning rate is small, so that both stay where they began and lengths keep their law.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
from datasets import Dataset
from paired import measure, report, reuse_memory
from sampler import ends_by_first_token
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer
from update_step import GROUP, GROUPS, SCALES, TEXTS, build

from pgpo import PGPOConfig, PGPOTrainer
from pgpo.command.train import rewards_of
from pgpo.tasks import lab_world, load_task

AIMS = {"lab": 0.45, "32k": 0.40}
STEPS = {"lab": 10, "32k": 1}  # per measurement


class Steps(TrainerCallback):
    """So many steps per call; returns their CPU seconds."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self)

    def __call__(self) -> float:
        self.seconds = 0.0
        self.trainer.train()
        return self.seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.process_time() - self.start


def right_by_first_token(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] % 5 == 0) for ids in completion_ids]


def setting(name: str, folder: Path) -> tuple[Path, Any, Any, Dataset, int]:
    """Checkpoint, tokenizer, reward function, questions, longest completion."""
    if name == "lab":
        path, task = lab_world.checkpoint_path("plain"), load_task("lab_world")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
        return path, tokenizer, rewards_of(task), Dataset.from_list(task.train[:800]), 24
    scale = SCALES[name]
    rng = np.random.default_rng(0)
    lengths = rng.integers(round(0.8 * scale.prompt), round(1.2 * scale.prompt) + 1, 200)
    texts = [" ".join(f"w{i}" for i in rng.integers(len(TEXTS), scale.vocabulary, n)) for n in lengths]
    return folder, build(scale, folder), right_by_first_token, Dataset.from_list([{"prompt": t} for t in texts]), 256


def compare(name: str, pairs: int) -> bool:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, tokenizer, reward, questions, longest = setting(name, folder)
        common: dict[str, Any] = dict(
            output_dir=str(folder / "out"),
            num_generations=GROUP,
            max_completion_length=longest,
            learning_rate=1e-7,
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_steps=STEPS[name],
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )

        def model() -> Any:
            loaded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            if name != "lab":
                ends_by_first_token(loaded, SCALES[name].vocabulary, SCALES[name].completion, longest)
            return loaded

        ours = PGPOTrainer(
            model(), reward, PGPOConfig(prompts_per_step=GROUPS, **common), questions, processing_class=tokenizer
        )
        theirs = SDPOTrainer(
            model(),
            reward,
            SDPOConfig(
                per_device_train_batch_size=GROUP,
                gradient_accumulation_steps=GROUPS,
                distillation_alpha=0.5,
                distillation_mode="topk_logits",
                distillation_topk=100,
                distillation_add_tail=True,
                **common,
            ),
            questions,
            processing_class=tokenizer,
        )
        result = measure(Steps(ours), Steps(theirs), pairs)
        logs = [log for log in ours.state.log_history if "completion_length" in log]
        result["completion_length_a"] = logs[-1]["completion_length"]
    question = f"{STEPS[name]} whole steps of 64 completions, {name}: PGPOTrainer / TRL SDPOTrainer"
    return report(f"whole_step_{name}", question, AIMS[name], result)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=list(AIMS))
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    reuse_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in [arguments.scale] if arguments.scale else AIMS:
        compare(name, max(7, arguments.pairs))


if __name__ == "__main__":
    main()
