"""Tiny models, tokenizer and task, made on the spot."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: a spinning OpenMP pool is 10x slower on a busy machine
os.environ.setdefault("CI", "true")  # TRL sends no telemetry from CI
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import gc
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """accelerate collects garbage whenever training starts: not among what the imports made, 0.2 s of each run."""
    gc.collect()
    gc.freeze()


WORDS = [
    "<pad>",
    "<eos>",
    "<user>",
    "<assistant>",
    "<answer>",
    "</answer>",
    *["Correct", "solution:", "Correctly", "solve", "the", "original", "question."],
    *(f"w{i}" for i in range(36)),
    "feedback:",
    "end.",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def build_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


SHAPE = dict(
    **dict(vocab_size=len(WORDS), hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8),
    **dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128),
    **dict(pad_token_id=0, eos_token_id=1, bos_token_id=None),
    initializer_range=0.3,  # far from uniform, so that entropies and divergences are not all alike
)


def build_model(seed: int = 0, kind: str = "qwen3", dtype: torch.dtype = torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    kinds = {"qwen3": (Qwen3Config, Qwen3ForCausalLM), "llama": (LlamaConfig, LlamaForCausalLM)}
    config, cls = kinds[kind]
    return cls(config(**SHAPE, tie_word_embeddings=True)).to(dtype)


@pytest.fixture
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model():
    return build_model()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty working folder."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.delenv("PGPO_SCIENCE_DATA", raising=False)
    return work
