"""A tiny training set-up with rollouts that are a pure function of prompt, place in the group and step."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import random
import warnings

import torch
from conftest import WORDS, build_model, build_tokenizer
from datasets import Dataset
from torch import nn

from pgpo import PGPOConfig, PGPOTrainer

GROUP = 4
PROMPTS = 36


def dataset(rows: int = PROMPTS) -> Dataset:
    questions = [f"w{i} " + "w7 " * (i % 5) + f"w{(i * 7) % 36}" for i in range(rows)]  # unequal lengths
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": q}], "index": i} for i, q in enumerate(questions)]
    )


def fake_completion(question: str, place: int, step: int, tokenizer) -> list[int]:
    rng = random.Random(f"{question}|{place}|{step}")
    words = [f"w{rng.randrange(36)}" for _ in range(rng.randrange(1, 7))]
    return [*tokenizer(" ".join(words))["input_ids"], tokenizer.eos_token_id]


def fake_rollout(prompts, trainer):
    """TRL's rollout_func: no sampling, hence the same completions however the batch is split over ranks."""
    tokenizer = trainer.tokenizer
    first = trainer.accelerator.process_index * len(prompts)
    completions = [
        fake_completion(p[0]["content"], (first + i) % GROUP, trainer.state.global_step, tokenizer)
        for i, p in enumerate(prompts)
    ]
    return {
        "prompt_ids": [trainer.render(p) for p in prompts],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(c) for c in completions],
    }


def env_mask(completion: list[int]) -> list[int]:
    """A completion of three tokens or fewer is the environment's alone; of others, some tokens, the last included."""
    if len(completion) <= 3:
        return [0] * len(completion)
    rng = random.Random(str(completion))
    mask = [rng.randrange(2) for _ in completion]
    mask[len(mask) // 2] = 1
    return mask


def environment_rollout(prompts, trainer):
    """Completions of which an environment wrote what `env_mask` says."""
    out = fake_rollout(prompts, trainer)
    return {**out, "env_mask": [env_mask(c) for c in out["completion_ids"]]}


def build_experts(seed: int = 0) -> nn.Module:
    """A mixture of experts with routers far from balance."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    shape = dict(hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8)
    shape |= dict(num_experts=4, num_experts_per_tok=2, num_attention_heads=4, num_key_value_heads=2)
    words = dict(vocab_size=len(WORDS), pad_token_id=0, eos_token_id=1, bos_token_id=None, tie_word_embeddings=True)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, **words, max_position_embeddings=128, initializer_range=0.3))


def parity_reward(prompts, completions, **kwargs):
    """Right if the number of words is even; question w0 is never solved, so its group has no teacher."""
    return [
        float(len(c[0]["content"].split()) % 2 == 0 and not p[0]["content"].startswith("w0 "))
        for p, c in zip(prompts, completions, strict=True)
    ]


TRAINER_OPTIONS = inspect.signature(PGPOTrainer.__init__).parameters.keys() - {"model", "args"}


def config(path, **options) -> PGPOConfig:
    defaults = dict(
        output_dir=str(path),
        prompts_per_step=4,
        num_generations=GROUP,
        max_completion_length=8,
        bf16=False,
        gradient_checkpointing=False,
        max_steps=1,
        learning_rate=1e-2,
        warmup_steps=0,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
        shuffle_dataset=False,
        report_to="none",
        eval_k=4,
    )
    return PGPOConfig(**(defaults | options))


def trainer(
    path, model=None, reward=parity_reward, rollout=fake_rollout, rows=PROMPTS, data=..., tokenizer=None, quiet=True,
    **options,
):  # fmt: skip
    """A trainer on `data`, or on the first `rows` questions; `options` are the configuration's and the trainer's."""
    own = {name: options.pop(name) for name in TRAINER_OPTIONS & options.keys()}
    with warnings.catch_warnings():
        if quiet:
            warnings.simplefilter("ignore")
        return PGPOTrainer(
            build_model() if model is None else model,
            reward,
            config(path, **options),
            dataset(rows) if data is ... else data,
            processing_class=build_tokenizer() if tokenizer is None else tokenizer,
            rollout_func=rollout,
            **own,
        )


def trl_trainer(path, model: nn.Module | None = None, rollout=fake_rollout, tokenizer=None, **options):
    """TRL's own trainer with the same options and completions, trained: the batch in one piece."""
    from trl import GRPOConfig, GRPOTrainer

    def roll(prompts, t):
        t.tokenizer = t._tokenizer
        t.render = lambda p: t._tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=True)["input_ids"]
        return rollout(prompts, t)

    ours, names = config(path, **options), GRPOConfig.__dataclass_fields__
    skip = {"generation_batch_size", "deepspeed", "accelerator_config", "steps_per_generation"}
    args = GRPOConfig(**{n: getattr(ours, n) for n in names if names[n].init and n not in skip})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        t = GRPOTrainer(
            build_model() if model is None else model,
            parity_reward,
            args,
            dataset(),
            processing_class=build_tokenizer() if tokenizer is None else tokenizer,
            rollout_func=roll,
        )
    with contextlib.redirect_stdout(io.StringIO()):
        t.train()
    return t


def train(t, **kwargs) -> list[dict]:
    """Train quietly; the log records of the steps."""
    with contextlib.redirect_stdout(io.StringIO()):
        t.train(**kwargs)
    t.random_numbers = torch.get_rng_state()
    return [r for r in t.state.log_history if "grad_norm" in r]


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def differences(t, other) -> list[str]:
    """Which weights, teacher weights, moments and random numbers of two trained trainers differ, bit for bit."""
    a, b = ({"random numbers": x.random_numbers, **weights(x.model)} for x in (t, other))
    for x, tensors in ((t, a), (other, b)):
        if x.teacher is not None:
            tensors |= {f"teacher {n}": p for n, p in x.teacher.state_dict()["parameters"].items()}
        for i, moments in x.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer {i} {n}": v for n, v in moments.items()}
    assert a.keys() == b.keys()
    return [n for n in a if a[n].dtype != b[n].dtype or not torch.equal(a[n], b[n])]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max((a[n].double() - b[n].double()).abs().max().item() for n in a)


def bitwise_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


class Spy:
    """Keeps a copy of what `optimize` got."""

    def __init__(self, t: PGPOTrainer) -> None:
        self.batches: list[dict] = []
        plain = t.optimize

        def optimize(model, batch):
            self.batches.append(copy.deepcopy(batch))
            return plain(model, batch)

        t.optimize = optimize
