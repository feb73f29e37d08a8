"""A small Qwen3-architecture model, made on the spot for science_qa: it knows the answer format, nothing more.

No pretrained weights are needed: the tokenizer is trained on the training questions, the model trained on them with
supervision for one to three minutes. Unhinted, it is shown answers with a RANDOM letter, so that it learns the format
but no answer; with a demonstration in the prompt it is shown the demonstration's letter, so that, like a real language
model, it can use a hint. What self-distillation then teaches it is the answer prior of the domain. It cannot learn
physics.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgpo.errors import UserError
from pgpo.tasks import Row
from pgpo.teacher import build_contexts

# All ours: small enough for one to three minutes on a core, large enough to copy a letter from a demonstration.
VOCABULARY, HIDDEN, LAYERS, STEPS, BATCH, LEARNING_RATE = 1024, 128, 2, 350, 16, 3e-3
MAX_PROMPT = 540  # tokens without a hint; longer questions are left out of the warm start
# The letter is one token of thirty: without a weight, copying it is not learned in time (measured: 300 steps at
# weight 1 stay at chance, 100 steps at weight 10 copy perfectly from short prompts).
LETTER_WEIGHT = 10.0
HINTED_SHARE = 0.7
# First no question at all, then the end of one, then whole prompts: copying is learned where it is easy.
CURRICULUM = (0.4, 0.75)
_THOUGHTS = (
    "I compare the options with the question.",
    "The numbers point to one option.",
    "One option fits the units and the size.",
    "I work through the given values.",
)
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(rows: Sequence[Row]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on the prompts, with a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [m["content"] for row in rows for m in row["prompt"]] + list(_THOUGHTS) * 10
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """About 0.4 million parameters."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HIDDEN // 4,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def answer(letter: str, style: str, rng: random.Random) -> str:
    """A completion in the asked format."""
    thought = rng.choice(_THOUGHTS)
    if style == "boxed":
        return f"{thought} \\boxed{{{letter}}}"
    return f"<reasoning>\n{thought}\n</reasoning>\n<answer>\n{letter}\n</answer>"


def warm_start(
    rows: Sequence[Row],
    style: str,
    directory: Path,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, int, float], None] | None = None,
) -> Path:
    """Train tokenizer and model on the rows; save them to `directory` and return it.

    progress(step, steps, loss in nats per token) is called after every step.
    Raises UserError when there is no row, or all are longer than MAX_PROMPT.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(rows)

    def encode(prompt: Any) -> list[int]:
        return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]

    rows = [row for row in rows if len(encode(row["prompt"])) <= MAX_PROMPT]
    if not rows:
        raise UserError(
            f"no training question is at most {MAX_PROMPT} tokens long, so no model can be made on the spot; give one "
            "with --model_name_or_path."
        )
    model = build_model(tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        batch: list[Example] = []
        while len(batch) < BATCH:
            row = rng.choice(rows)
            done = step / steps
            length = 0 if done < CURRICULUM[0] else rng.randrange(200) if done < CURRICULUM[1] else None
            batch.append(_example(row, length, style, tokenizer, rng))
        loss = _loss(model, batch, tokenizer.pad_token_id)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if progress:
            progress(step + 1, steps, loss.item())
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@dataclass(frozen=True)
class Example:
    """Token ids of a prompt and of the answer to it; letter is the place of the option letter in the answer."""

    prompt: list[int]
    target: list[int]
    letter: int


def _example(row: Row, length: int | None, style: str, tokenizer: Any, rng: random.Random) -> Example:
    """An answer with a random letter; hinted, with the demonstration's. `length`: characters of the question kept."""
    letter = rng.choice(row["labels"])
    prompt: Any = row["prompt"]
    if length is not None:
        text = prompt[-1]["content"]
        prompt = [{"role": "user", "content": text[len(text) - min(length, len(text)) :] or "?"}]
    if rng.random() < HINTED_SHARE:
        prompt = build_contexts([prompt] * 2, [answer(letter, style, rng), ""], [1.0, 0.0], 2)[1].prompt
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
    target = [*tokenizer(answer(letter, style, rng))["input_ids"], tokenizer.eos_token_id]
    place = len(target) - 1 - target[::-1].index(tokenizer.convert_tokens_to_ids(letter))
    return Example(ids, target, place)


def _loss(model: Qwen3ForCausalLM, batch: list[Example], pad: int) -> torch.Tensor:
    """Cross-entropy on the answers, weighted mean over their tokens."""
    width = max(len(e.prompt) + len(e.target) for e in batch)
    ids = torch.full((len(batch), width), pad)
    weight = torch.zeros(len(batch), width)
    for i, e in enumerate(batch):
        start, end = len(e.prompt), len(e.prompt) + len(e.target)
        ids[i, :end] = torch.tensor(e.prompt + e.target)
        weight[i, start:end] = 1.0
        weight[i, start + e.letter] = LETTER_WEIGHT
    logits = model(input_ids=ids).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (loss * weight[:, 1:]).sum() / weight[:, 1:].sum()
