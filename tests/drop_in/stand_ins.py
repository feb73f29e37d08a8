"""Models, tokenizers and questions made on the spot, in place of those that TRL's tests fetch."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
from trl import chat_template_utils

PAD, END = "<|endoftext|>", "<|im_end|>"
_MARKS = [PAD, END, "<|im_start|>"]
# As in Qwen's tokenizers: one token each, but no special ones.
_TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
_TEMPLATES = Path(chat_template_utils.__file__).parent / "chat_templates"

TEXTS = [
    *[
        "A bird in the hand is worth",
        "Many hands",
        "Still waters run",
        "A stitch in time",
        "Look before",
        "Haste makes",
    ],
    *["The early bird", "No smoke without", "All that glitters is not", "Better late than", "Actions speak louder"],
    *[
        "Where there is a will",
        "Practice makes",
        "Time and tide wait for",
        "Two heads are better",
        "Honesty is the best",
    ],
]

_SHAPE: dict[str, Any] = dict(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=4096,
    initializer_range=0.2,  # far from uniform
    bos_token_id=None,
)
_EXPERTS: dict[str, Any] = dict(moe_intermediate_size=8, num_experts_per_tok=2)
# name -> (transformers' model type, what it has beside the common shape)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", dict(tie_word_embeddings=False)),
    "gemma2": ("gemma2", dict(tie_word_embeddings=True, query_pre_attn_scalar=8)),
    "llama": ("llama", {}),
    "cohere2": ("cohere2", {}),
    "qwen3_moe": ("qwen3_moe", _EXPERTS | dict(num_experts=4)),
    "glm4_moe": ("glm4_moe", _EXPERTS | dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=1)),
    "gpt_oss": ("gpt_oss", dict(num_local_experts=4, num_experts_per_tok=2)),
    "nemotron_h": (
        "nemotron_h",
        dict(layers_block_type=["mamba", "attention", "moe"], mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8)
        | dict(n_groups=1, chunk_size=16, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
        | dict(moe_shared_expert_intermediate_size=8, n_group=1, topk_group=1, num_hidden_layers=3),
    ),
}


def tokenizer(template: str = "qwen2_5") -> PreTrainedTokenizerFast:
    """Every byte is a token; ChatML's marks are one each. template: of those that TRL ships."""
    vocabulary = {mark: i for i, mark in enumerate(_MARKS + _TAGS)}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[letter] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    made.add_tokens(_TAGS)
    made.chat_template = (_TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    return made


def model(kind: str = "qwen2", seed: int = 0) -> Any:
    return AutoModelForCausalLM.from_pretrained(saved(kind, seed), dtype=torch.float32)


def reward_model(kind: str = "qwen2", seed: int = 1) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(saved(kind, seed, scores=True), dtype=torch.float32)


@functools.cache
def saved(kind: str = "qwen2", seed: int = 0, scores: bool = False) -> str:
    """A folder with a model and its tokenizer, as a script would name it. scores: a reward model."""
    words = tokenizer("qwen3" if "qwen3" in kind else "qwen2_5")
    model_type, own = KINDS[kind]
    options = _SHAPE | dict(vocab_size=len(words), pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id)
    config = AutoConfig.for_model(model_type, **options | own)
    torch.manual_seed(seed)
    if scores:
        config.num_labels = 1
        made = AutoModelForSequenceClassification.from_config(config)
    else:
        made = AutoModelForCausalLM.from_config(config)
    folder = str(Path(_folder(), f"{kind}-{'scores' if scores else 'words'}-{seed}"))
    made.save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@functools.cache
def with_own_code() -> str:
    """A folder whose model class is a Python file in it, which transformers runs with trust_remote_code alone."""
    folder = Path(_folder(), "own_code")
    made = model()
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n\n\n"
        'class OwnConfig(Qwen2Config):\n    model_type = "own"\n\n\n'
        "class OwnForCausalLM(Qwen2ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = type(made.config).from_pretrained(folder)
    config.auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    text = config.to_json_string().replace('"model_type": "qwen2"', '"model_type": "own"')
    (folder / "config.json").write_text(text.replace("Qwen2ForCausalLM", "OwnForCausalLM"))
    return str(folder)


@functools.cache
def _folder() -> str:
    """For this process, removed at its end."""
    whole = tempfile.TemporaryDirectory(prefix="drop_in_")
    _kept.append(whole)
    transformers.dynamic_module_utils.HF_MODULES_CACHE = f"{whole.name}/modules"  # it copies code of models there
    transformers.dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # nobody is there to be asked
    return whole.name


_kept: list[tempfile.TemporaryDirectory] = []


def questions(kind: str = "text", **columns: list[Any]) -> Dataset:
    """Plain texts, or chat messages ("chat"), with further columns."""
    prompts = TEXTS if kind == "text" else [[{"role": "user", "content": text}] for text in TEXTS]
    return Dataset.from_dict({"prompt": prompts, **columns})


def stream(kind: str = "text") -> IterableDataset:
    return questions(kind).to_iterable_dataset()
