"""A whole update of PGPOTrainer over one of TRL's SDPOTrainer: same completions, hints, model and optimizer.

An update = teacher forward, student forward and backward, loss, clip, optimizer step, EMA teacher. Sampling, rewards
and the texts of the teacher's prompts are left out of both: what `_prepare_inputs` takes is subtracted.

    lab    0.12 M parameters, V = 217; prompts of 15 tokens, completions of 14
    32k    Qwen3 of 11.5 M parameters, V = 32,768; prompts of 50 tokens, completions of 64

64 completions in groups of 8, lengths log-normal with sigma 0.6 (mean as above, no cap), 80 % of the groups with a
success (6, 7, 6, 7, 6 of 8 in five batches that take turns). JSD with beta 0.5 over the student's top 100 and a tail,
or over the whole vocabulary. SDPOTrainer runs 8 micro-batches of 8 rows, each padded to the longest of the 64, a common
setting of its; PGPOTrainer runs its defaults, with a token budget equal to the tokens of such a micro-batch.
Both: fp32, no gradient checkpointing, AdamW, clip at 1. `--trl-defaults`: bf16 and gradient checkpointing in both.
The first update, from equal weights, is not timed: there both must have worked on the same tokens and hints, and their
divergences are reported.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
from datasets import Dataset
from paired import measure, report, reuse_memory
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

from pgpo import PGPOConfig, PGPOTrainer

GROUP, GROUPS = 8, 8
HINTED = (6, 7, 6, 7, 6)  # groups with a success, per batch: 80 %
TEMPLATE = ["Correct", "solution:", "Correctly", "solve", "the", "original", "question."]  # of the teacher's prompt
TEXTS = ["<pad>", "<eos>", "right", "wrong", *TEMPLATE]
PAD, EOS, RIGHT, WRONG = range(4)


@dataclass(frozen=True)
class Scale:
    """Sizes of a model, and mean lengths in tokens."""

    vocabulary: int
    prompt: int
    completion: int
    shape: dict[str, int]


def shape(hidden: int, layers: int, kv_heads: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // 4,
    }


SCALES = {
    "lab": Scale(vocabulary=217, prompt=15, completion=14, shape=shape(64, 2, 4)),
    "32k": Scale(vocabulary=32_768, prompt=50, completion=64, shape=shape(256, 4, 2)),
}


@dataclass(frozen=True)
class Given:
    """One batch: 8 questions and their 64 completions, row by row."""

    questions: Dataset
    prompts: list[int]  # tokens of each question
    completions: list[list[int]]

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens of a micro-batch of SDPOTrainer's student."""
        return GROUP * (max(self.prompts) + max(map(len, self.completions)))


def given(scale: Scale, hinted: int, rng: np.random.Generator) -> Given:
    def words(count: int) -> list[int]:
        return rng.integers(len(TEXTS), scale.vocabulary, count).tolist()

    lengths = rng.lognormal(np.log(scale.completion) - 0.6**2 / 2, 0.6, GROUP * GROUPS).round().clip(2).astype(int)
    with_success = rng.permutation(GROUPS) < hinted
    right = np.zeros(GROUP * GROUPS, bool)
    for group in np.flatnonzero(with_success):
        mine = np.zeros(GROUP, bool)
        while mine.sum() < 2:  # with two or more, every row of the group has a teacher
            mine = rng.random(GROUP) < 0.5
        right[group * GROUP : (group + 1) * GROUP] = mine
    completions = [[RIGHT if r else WRONG, *words(n - 2), EOS] for n, r in zip(lengths, right)]
    prompts = rng.integers(round(0.8 * scale.prompt), round(1.2 * scale.prompt) + 1, GROUPS).tolist()
    questions = [" ".join(f"w{i}" for i in words(n)) for n in prompts]
    return Given(Dataset.from_list([{"prompt": q} for q in questions]), prompts, completions)


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: TEXTS, then w11, w12, ..."""
    texts = TEXTS + [f"w{i}" for i in range(len(TEXTS), vocabulary)]
    whole = Tokenizer(models.WordLevel({t: i for i, t in enumerate(texts)}, unk_token="<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=whole, pad_token="<pad>", eos_token="<eos>")
    tokenizer.padding_side = "left"
    return tokenizer


def build(scale: Scale, folder: Path) -> PreTrainedTokenizerFast:
    """Write a model with random weights and a tokenizer of whole words."""
    tokenizer = words_tokenizer(scale.vocabulary)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=scale.vocabulary,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        initializer_range=0.1,  # far from uniform
        **scale.shape,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return tokenizer


def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [float(ids[0] == RIGHT) for ids in completion_ids]


@dataclass
class Seen:
    """What a trainer worked on in its last update."""

    active_tokens: int = 0
    divergence: float = 0.0  # nats per active token
    teacher_prompts: list[list[int]] = field(default_factory=list)  # of the rows with a teacher


class Updates(TrainerCallback):
    """One update per call on the next batch; returns its CPU seconds without those of `_prepare_inputs`."""

    trainer: Any

    def __init__(self, batches: list[Given]) -> None:
        self.batches = batches
        self.calls = 0
        self.seen = Seen()

    def attach(self) -> None:
        self.trainer.remove_callback(PrinterCallback)
        self.trainer.add_callback(self)  # the last: what others do at the end of a step is part of it
        plain = self.trainer._prepare_inputs

        def prepare(inputs: Any) -> Any:
            start = time.process_time()
            batch = plain(inputs)
            self.look(batch)
            self.preparing += time.process_time() - start
            return batch

        self.trainer._prepare_inputs = prepare

    def look(self, batch: dict[str, Any]) -> None:
        raise NotImplementedError

    @property
    def batch(self) -> Given:
        return self.batches[(self.calls - 1) % len(self.batches)]

    def __call__(self) -> float:
        self.calls += 1
        self.seen = Seen()
        self.trainer.train_dataset = self.batch.questions
        self.trainer.train()
        return self.seconds

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.preparing = 0.0
        self.start = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.process_time() - self.start - self.preparing


def common(folder: Path, defaults: bool) -> dict[str, Any]:
    return dict(
        output_dir=str(folder / "out"),
        num_generations=GROUP,
        max_completion_length=4096,
        learning_rate=1e-5,
        weight_decay=0.01,
        max_grad_norm=1.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_steps=1,
        logging_steps=1,
        bf16=defaults,
        gradient_checkpointing=defaults,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        shuffle_dataset=False,
    )


class Ours(Updates):
    def __init__(
        self, batches: list[Given], folder: Path, tokenizer: Any, top_k: int, defaults: bool, own_budget: bool
    ) -> None:
        super().__init__(batches)
        self.own_budget = own_budget

        def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
            completions = self.batch.completions
            ids = tokenizer(text=prompts)["input_ids"]
            logprobs = [[0.0] * len(c) for c in completions]
            return {"prompt_ids": ids, "completion_ids": completions, "logprobs": logprobs}

        args = PGPOConfig(prompts_per_step=GROUPS, divergence_top_k=top_k, **common(folder, defaults))
        self.trainer = PGPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward,
            args,
            batches[0].questions,
            processing_class=tokenizer,
            rollout_func=rollout,
        )
        self.attach()

    def __call__(self) -> float:
        if not self.own_budget:
            batch = self.batches[self.calls % len(self.batches)]
            self.trainer.args.max_tokens_per_microbatch = batch.micro_batch_tokens
        seconds = super().__call__()
        log = next(entry for entry in reversed(self.trainer.state.log_history) if "divergence" in entry)
        self.seen.active_tokens, self.seen.divergence = int(log["active_tokens"]), log["divergence"]
        return seconds

    def look(self, batch: dict[str, Any]) -> None:
        self.seen.teacher_prompts = [ids for ids in batch["teacher_prompt_ids"] if ids is not None]


class Trl(Updates):
    def __init__(self, batches: list[Given], folder: Path, tokenizer: Any, top_k: int, defaults: bool) -> None:
        super().__init__(batches)
        args = SDPOConfig(
            per_device_train_batch_size=GROUP,
            gradient_accumulation_steps=GROUPS,
            distillation_alpha=0.5,
            distillation_mode="topk_logits" if top_k else "full_logits",
            distillation_topk=top_k or None,
            distillation_add_tail=True,
            **common(folder, defaults),
        )
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

        def generate(input_ids: torch.Tensor, **_: Any) -> torch.Tensor:
            rows = [torch.tensor(c) for c in self.batch.completions]
            return torch.cat([input_ids, torch.nn.utils.rnn.pad_sequence(rows, True, PAD)], 1)

        model.generate = generate
        self.trainer = SDPOTrainer(model, reward, args, batches[0].questions, processing_class=tokenizer)
        self.attach()
        self.trainer._log_self_distillation_metric = lambda mode, value: self.parts.append(value)

    def __call__(self) -> float:
        self.parts: list[float] = []  # divergence per active token, micro-batch by micro-batch
        self.counts: list[int] = []
        seconds = super().__call__()
        self.seen.active_tokens = sum(self.counts)
        weighted = sum(value * count for value, count in zip(self.parts, self.counts, strict=True))
        self.seen.divergence = weighted / self.seen.active_tokens
        return seconds

    def look(self, batch: dict[str, Any]) -> None:
        active = batch["self_distillation_mask"].bool()
        self.counts.append(int(batch["completion_mask"][active].sum()))
        width = batch["completion_ids"].shape[1]
        ids, mask = batch["teacher_input_ids"][:, :-width], batch["teacher_attention_mask"][:, :-width].bool()
        self.seen.teacher_prompts += [ids[i][mask[i]].tolist() for i in active.nonzero().flatten().tolist()]


def compare(name: str, top_k: int, pairs: int, defaults: bool, own_budget: bool) -> bool:
    scale = SCALES[name]
    rng = np.random.default_rng(0)
    batches = [given(scale, hinted, rng) for hinted in HINTED]
    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        tokenizer = build(scale, folder)
        ours = Ours(batches, folder, tokenizer, top_k, defaults, own_budget)
        trl = Trl(batches, folder, tokenizer, top_k, defaults)
        ours(), trl()  # the only update from equal weights: the loss is another mean, so that the weights part
        assert ours.seen.active_tokens == trl.seen.active_tokens, "the trainers saw different work"
        assert sorted(ours.seen.teacher_prompts) == sorted(trl.seen.teacher_prompts), "the trainers saw different hints"
        work = {
            "active_tokens": ours.seen.active_tokens,
            "divergence_a": ours.seen.divergence,
            "divergence_b": trl.seen.divergence,
            "teacher_prompt_tokens_mean": float(np.mean([len(p) for p in ours.seen.teacher_prompts])),
            "token_budget_a": ours.trainer.args.max_tokens_per_microbatch,
            "micro_batch_tokens_b": batches[0].micro_batch_tokens,
            "longest_completion": max(map(len, batches[0].completions)),
            "parameters": sum(p.numel() for p in ours.trainer.model.parameters()),
        }
        result = measure(ours, trl, pairs, warmup=0)
    print(f"divergence of the first update: {work['divergence_a']:.6f} here, {work['divergence_b']:.6f} in TRL")
    what = f"top {top_k} + tail" if top_k else "full vocabulary"
    setting = "bf16 and checkpointing in both" if defaults else "fp32"
    if own_budget:
        setting += ", its own default token budget"
    return report(
        f"update_step_{name}_{'topk' if top_k else 'full'}{'_trl_defaults' if defaults else ''}"
        f"{'_default_budget' if own_budget else ''}",
        f"one update of 64 completions, {name}, {what}, {setting}: PGPOTrainer / TRL SDPOTrainer",
        0.33,
        {**result, "first_update": work},
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scale", choices=list(SCALES))
    parser.add_argument("--divergence", choices=["topk", "full"])
    parser.add_argument("--trl-defaults", action="store_true", help="bf16 and gradient checkpointing in both")
    parser.add_argument("--default-budget", action="store_true", help="PGPOTrainer's own token budget, 16,384")
    parser.add_argument("--pairs", type=int, default=10)
    arguments = parser.parse_args()
    reuse_memory()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in [arguments.scale] if arguments.scale else SCALES:
        for top_k in {"topk": [100], "full": [0], None: [100, 0]}[arguments.divergence]:
            compare(name, top_k, max(7, arguments.pairs), arguments.trl_defaults, arguments.default_budget)


if __name__ == "__main__":
    main()
