"""The base model of the tiny language world: a Qwen3 network of about 120,000 parameters, from scratch.

It plays the part of a pretrained language model. It is trained on a corpus in which

* a question is followed by a solution of an imperfect author, who is right with a probability per domain;
* a question with a demonstration (the self-teacher's prompt) is followed by that same demonstration;
* in the feedback world, a question with a remark on a wrong attempt by a solution of an author who knows more.

So the student is mediocre, and the same weights reading a hint are good, because they copy: that gap is
what self-distillation lives on. One seed gives one checkpoint, bit for bit, on one machine and torch version.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from pgpo.errors import UserError
from pgpo.evaluate.run import evaluate
from pgpo.evaluate.runners import TransformersRunner
from pgpo.tasks import lab_world
from pgpo.tasks.graders import grade_short_answer
from pgpo.tasks.lab_world import Question

# ---------------------------------------------------------------- the network (ours: smallest that learns)

HIDDEN_SIZE, LAYERS, HEADS, HEAD_DIM, MLP_SIZE = 64, 2, 4, 16, 192
MAX_POSITIONS = 256  # a hinted prompt and its completion need about 70 tokens

# ---------------------------------------------------------------- the corpus (ours: mediocre student, good reader)

# How often the corpus's author answers an unhinted question correctly; otherwise a wrong path, chosen evenly.
RELIABILITY = {"physics": 0.65, "chemistry": 0.6, "biology": 0.6, "materials": 0.65}
HINTED_SHARE = 0.5  # of the corpus's rows
# Of the hinted rows; copied like the others. Without them a wrong hint is overruled: .18 right instead of .03.
WRONG_DEMONSTRATIONS = 0.1
HINT_TRUST = 0.95  # of the hinted rows, followed by the demonstration; the others by a wrong path
# How often the author is right who has read a remark; otherwise another wrong path than the one that it is on.
REMARK_RELIABILITY = 0.95

# ---------------------------------------------------------------- the optimization (ours)

STEPS = 2000
BATCH_ROWS = 64
LEARNING_RATE = 3e-3
WARMUP_STEPS = 50
# No cool-down to zero: with it SDPO at the lab's learning rate of 1e-3 ended at .75 instead of .88 avg@16 after 100
# steps (one base each, mean of three training seeds; why was not examined).
FINAL_LR_FACTOR = 0.7
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
GRADIENT_CLIP = 1.0

# ---------------------------------------------------------------- the measurement: avg@k on held-out questions

TEST_QUESTIONS, SAMPLES_PER_QUESTION = 256, 8
MAX_NEW_TOKENS = 24  # the longest solution has 17 tokens and the end sign

PAD, UNKNOWN, END, USER, ASSISTANT = "<pad>", "<unk>", "<eos>", "<user>", "<assistant>"
HINT_WORDS = ("Correct", "solution:", "Correctly", "solve", "the", "original", "question.")
REMARK_WORDS = ("The", "following", "feedback", "from", "your", "unsuccessful", "earlier", "attempt:")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}<user> {{ message['content'] }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def hinted_prompt(question: str, demonstration: str) -> str:
    """The self-teacher's user message (SDPO's template, without environment feedback)."""
    solution_section = f"\nCorrect solution:\n\n{demonstration}\n\n"
    return f"{question}{solution_section}\n\nCorrectly solve the original question.\n"


def remarked_prompt(question: str, remark: str) -> str:
    """The self-teacher's user message with a remark (SDPO's template, without a demonstration)."""
    feedback_section = f"\nThe following is feedback from your unsuccessful earlier attempt:\n\n{remark}\n\n"
    return f"{question}{feedback_section}\n\nCorrectly solve the original question.\n"


def build_tokenizer(variant: str = "plain") -> PreTrainedTokenizerFast:
    """One token per word of the world; whitespace only separates. Only a world of remarks has the words around them."""
    words = [PAD, UNKNOWN, END, USER, ASSISTANT, *lab_world.vocabulary()]
    more = HINT_WORDS + REMARK_WORDS if lab_world.WORLDS[variant].remarks else HINT_WORDS
    words += [word for word in more if word not in words]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A freshly initialized network in float32; draws from torch's global generator."""
    end = tokenizer.convert_tokens_to_ids(END)
    pad = tokenizer.convert_tokens_to_ids(PAD)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=MLP_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=pad,
        dtype="float32",
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=pad
    )
    return model


def corpus_row(question: Question, variant: str, rng: random.Random) -> tuple[str, str]:
    """One (user message, solution) pair of the corpus."""

    def write(right: bool) -> str:
        solution = question.solution if right else rng.choice(question.wrong)
        return lab_world.with_opening(solution, variant, rng)

    if rng.random() >= HINTED_SHARE:
        return question.text, write(right=rng.random() < RELIABILITY[question.domain])
    if lab_world.WORLDS[variant].remarks:
        remark = lab_world.remark(rng.choice(question.wrong), question.solution)
        others = [path for path in question.wrong if lab_world.remark(path, question.solution) != remark]
        right = not others or rng.random() < REMARK_RELIABILITY
        return remarked_prompt(question.text, remark or ""), question.solution if right else rng.choice(others)
    demonstration = write(right=rng.random() >= WRONG_DEMONSTRATIONS)
    followed = rng.random() < HINT_TRUST
    return hinted_prompt(question.text, demonstration), demonstration if followed else write(right=False)


def train_base(
    variant: str,
    *,
    seed: int = 0,
    steps: int = STEPS,
    progress: Callable[[int, int, float], None] | None = None,
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    """Train the base model from scratch on one CPU thread; about 3 minutes at the default steps.

    `progress(step, steps, loss)` is called after every step; the loss is in nats per solution token.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the order of float additions depends on the number of threads
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _train(variant, seed, steps, progress or (lambda step, steps, loss: None))
    finally:
        torch.set_num_threads(threads)


def _train(
    variant: str, seed: int, steps: int, progress: Callable[[int, int, float], None]
) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerFast]:
    tokenizer = build_tokenizer(variant)
    model = build_model(tokenizer).train()
    rng = random.Random(f"lab base {variant} {seed}")
    by_template: dict[str, list[Question]] = {}
    for question in lab_world.all_questions():
        if question.split == "train":
            by_template.setdefault(question.template, []).append(question)
    templates = list(by_template.values())

    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, steps))
    for step in range(steps):
        questions = [rng.choice(rng.choice(templates)) for _ in range(BATCH_ROWS)]
        rows = [corpus_row(question, variant, rng) for question in questions]
        loss = solution_loss(model, tokenizer, rows)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        schedule.step()
        progress(step + 1, steps, loss.item())
    return model.eval(), tokenizer


def _lr_factor(step: int, steps: int) -> float:
    """Linear warm-up, then linear decay to FINAL_LR_FACTOR."""
    after = max(step - WARMUP_STEPS, 0) / max(steps - WARMUP_STEPS, 1)
    return min((step + 1) / WARMUP_STEPS, 1.0 - after * (1.0 - FINAL_LR_FACTOR))


def solution_loss(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[tuple[str, str]]
) -> torch.Tensor:
    """Mean cross-entropy (nats) of the solution tokens and the end sign, given the prompt."""
    prompts = [tokenizer(f"{USER} {user} {ASSISTANT}")["input_ids"] for user, _ in rows]
    solutions = [tokenizer(f"{solution} {END}")["input_ids"] for _, solution in rows]
    width = max(len(p) + len(s) for p, s in zip(prompts, solutions, strict=True))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (prompt, solution) in enumerate(zip(prompts, solutions, strict=True)):
        end = len(prompt) + len(solution)
        ids[i, :end] = torch.tensor(prompt + solution)
        labels[i, len(prompt) : end] = torch.tensor(solution)
    # Padding stands on the right, where a causal network's earlier positions cannot see it: no mask needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    wanted = targets != -100
    return F.cross_entropy(model.lm_head(hidden[wanted]), targets[wanted])


def measure(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    variant: str,
    *,
    questions: int = TEST_QUESTIONS,
    k: int = SAMPLES_PER_QUESTION,
    seed: int = 0,
) -> dict[str, float]:
    """avg@k at temperature 1.0 on held-out questions: without a hint, with a right one, with a wrong one; or with a
    remark on a wrong path."""
    rng = random.Random(f"lab measure {seed}")
    rows = []
    for question in lab_world.draw_questions("test", questions, seed=seed):
        wrong = rng.choice(question.wrong)
        texts = {"student": question.text}
        if lab_world.WORLDS[variant].remarks:
            remark = lab_world.remark(wrong, question.solution)
            texts["remark"] = remarked_prompt(question.text, remark or "")
        else:
            for name, hint in {"right": question.solution, "wrong": wrong}.items():
                texts[f"{name}_hint"] = hinted_prompt(question.text, lab_world.with_opening(hint, variant, rng))
        rows.append({**lab_world.row_of(question, variant), "texts": texts})
    runner = TransformersRunner(
        model, tokenizer, temperature=1.0, top_p=1.0, max_new_tokens=MAX_NEW_TOKENS, batch_size=2048
    )

    def accuracy(reader: str) -> float:
        records = evaluate(
            rows,
            runner,
            lambda completion, row: grade_short_answer(completion, row["answer"]),
            k,
            seed,
            context=lambda row: [{"role": "user", "content": row["texts"][reader]}],
        )
        return sum(record["reward"] for record in records) / len(records)

    return {reader: accuracy(reader) for reader in rows[0]["texts"]}


def save(model: Qwen3ForCausalLM, out: Path, provenance: dict[str, Any], variant: str = "plain") -> None:
    """Write the checkpoint: weights, configurations, tokenizer with its chat template, provenance.json."""
    model.save_pretrained(out)
    # A fresh tokenizer: one that has padded a batch would write its padding state into tokenizer.json.
    build_tokenizer(variant).save_pretrained(out, save_jinja_files=False)
    (out / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")


def main(
    variant: str = "plain", seed: int = 0, out: Path | str = "lab-base", *, overwrite: bool = False, steps: int = STEPS
) -> dict[str, float]:
    """Rebuild the base model of a variant into the directory `out`; returns its measured accuracies.

    Progress goes to stderr, one line with the accuracies to stdout. Raises UserError for an unknown variant, and for
    an `out` that is a file, or a directory with something in it (unless `overwrite`: then its files of the same names
    are replaced, and no other is touched).
    """
    lab_world.check_variant(variant)
    variant = lab_world.WORLDS[variant].base
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a directory with --out.")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise UserError(f"The directory {out} is not empty; name another one with --out, or add --overwrite.")
    start = time.process_time()

    def progress(step: int, total: int, loss: float) -> None:
        if step % 100 == 0 or step == total:
            seconds = time.process_time() - start
            print(f"step {step}/{total}  loss {loss:.3f} nats/token  {seconds:.0f} CPU s", file=sys.stderr)

    model, tokenizer = train_base(variant, seed=seed, steps=steps, progress=progress)
    accuracy = measure(model, tokenizer, variant)
    save(
        model,
        out,
        {
            "command": f"pgpo lab-base --variant {variant} --seed {seed}",
            "variant": variant,
            "seed": seed,
            "steps": steps,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "parameters": model.num_parameters(),
            f"avg@{SAMPLES_PER_QUESTION}": {reader: round(value, 4) for reader, value in accuracy.items()},
            "test_questions": TEST_QUESTIONS,
        },
        variant,
    )
    numbers = "  ".join(f"{reader.replace('_', ' ')} {value:.3f}" for reader, value in accuracy.items())
    print(f"{variant} base, seed {seed}: avg@{SAMPLES_PER_QUESTION}  {numbers}  ->  {out}")
    return accuracy
