"""What measured trust costs: a whole step of PGPOTrainer with trust over one without, on the lab's base model.

    undo      trust="measured": a copy of what trains, a short forward of one completion per question, perhaps more
    lagged    the short forward alone

8 questions x 8 completions, temperature 1, fp32, AdamW, SDPO; without trust no step is measured at all
(diagnostics_step_interval=0). What is timed is every optimizer step, from `on_step_begin` to `on_step_end`, sampling
included. The learning rate is small, so that both stay where they began and lengths keep their law; a step is then
measured once, which is the least (`probes_a`; 1.2 to 1.5 in training).
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from paired import measure, report, reuse_memory
from transformers import AutoModelForCausalLM
from update_step import GROUP, GROUPS
from whole_step import Steps, setting

from pgpo import PGPOConfig, PGPOTrainer

AIM = 1.05  # the study's bar: 5 % of a step in the lab
FORMS = ("undo", "lagged")


def compare(form: str, pairs: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path, tokenizer, reward, questions, longest = setting("lab", folder)

        def timed(name: str, **options: Any) -> Steps:
            config = PGPOConfig(
                output_dir=str(folder / name), objective="sdpo", prompts_per_step=GROUPS, num_generations=GROUP,
                max_completion_length=longest, learning_rate=1e-7, lr_scheduler_type="constant", warmup_steps=0,
                max_steps=steps, logging_steps=1, bf16=False, gradient_checkpointing=False, save_strategy="no",
                report_to="none", disable_tqdm=True, use_cpu=True, **options,
            )  # fmt: skip
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
            return Steps(PGPOTrainer(model, reward, config, questions, processing_class=tokenizer))

        trusting = timed(form, trust="measured", trust_form=form)
        result = measure(trusting, timed("off", diagnostics_step_interval=0), pairs)
        probes = [log["probes"] for log in trusting.trainer.state.log_history if "probes" in log]
        return result | {"probes_a": statistics.mean(probes)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--form", choices=FORMS)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--rehearse", action="store_true", help="one pair of one step; nothing is written")
    arguments = parser.parse_args()
    reuse_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for form in [arguments.form] if arguments.form else FORMS:
        if arguments.rehearse:
            print(form, compare(form, 1, 1))
            continue
        question = f"10 whole steps of 64 completions, lab: trust_form={form!r} / trust off"
        report(f"trust_step_{form}", question, AIM, compare(form, max(7, arguments.pairs), 10))


if __name__ == "__main__":
    main()
