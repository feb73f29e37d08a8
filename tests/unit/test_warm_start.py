"""The small science model made on the spot: its tokenizer, its answers, one seed one model, and what it must learn."""

from __future__ import annotations

import hashlib
import math
import os
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgpo.command import warm_start as module
from pgpo.command.eval import hinted_prompt
from pgpo.command.warm_start import Example, answer, build_model, build_tokenizer, warm_start
from pgpo.errors import UserError
from pgpo.evaluate import evaluate, summarize
from pgpo.evaluate.runners import TransformersRunner
from pgpo.tasks import load_task
from pgpo.tasks.science_qa import Question

SCIENCE = Path(os.environ.get("PGPO_SCIENCE_DATA") or Path(__file__).parents[3] / "shared/data/sciknoweval")
needs_science = pytest.mark.skipif(
    not SCIENCE.is_dir(), reason=f"no folder {SCIENCE}; set PGPO_SCIENCE_DATA to the SciKnowEval split files"
)
STYLES = ("sdpo", "boxed")


def rows(style: str = "sdpo", count: int = 24) -> list[dict]:
    """Questions in the task's own words."""
    from pgpo.tasks.science_qa import _STYLES, _row

    questions = [
        Question(
            "physics", n, f"How far is {n} m/s · {n} s?", tuple("ABCD"), tuple(f"{n + i} m" for i in range(4)), "B"
        )
        for n in range(count)
    ]
    return [_row(question, _STYLES[style][0]) for question in questions]


def grader(style: str):
    from pgpo.tasks.science_qa import _STYLES

    return _STYLES[style][1]


# Tokenizer and answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "How far is 3 m/s · 3 s?",
        "Ångström, 10⁻³ kg, ΔG° = −RT ln K, 温度",  # nothing of this is in the training texts
        "  two  spaces,\ttabs\n\n\nand lines ",
        "{braces} <answer>B</answer> \\boxed{B} 🙂",
    ],
)
def test_the_tokenizer_loses_nothing(text):
    tokenizer = build_tokenizer(rows())
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.unk_token_id is None or tokenizer.unk_token_id not in ids


def test_the_chat_template_marks_every_message_with_one_token():
    tokenizer = build_tokenizer(rows())
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How far?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    starts, ends = (ids.count(tokenizer.convert_tokens_to_ids(t)) for t in ("<|im_start|>", "<|im_end|>"))
    assert (starts, ends) == (3, 2)  # the assistant's message is open
    assert tokenizer.decode(ids).endswith("<|im_start|>assistant\n")
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id != tokenizer.pad_token_id


@pytest.mark.parametrize("style", STYLES)
def test_answers_are_graded_by_their_letter_alone(style):
    grade = grader(style)
    rng = random.Random(0)
    row = rows(style)[0]
    texts = {letter: {answer(letter, style, rng) for _ in range(40)} for letter in row["labels"]}
    assert all(len(found) == len(module._THOUGHTS) for found in texts.values())
    for letter, found in texts.items():
        for text in found:
            graded = grade(text, row)
            assert (graded.well_formed, graded.answer) == (True, letter)
            assert graded.reward == float(letter == row["answer"])


def test_an_answer_in_the_other_style_is_not_well_formed():
    for style, other in zip(STYLES, reversed(STYLES)):
        assert not grader(style)(answer("B", other, random.Random(0)), rows(style)[0]).well_formed


# Training -------------------------------------------------------------------------------------------------------------


def test_one_seed_one_model_and_a_folder_that_loads(tmp_path):
    seen = []

    def progress(step, steps, loss):
        seen.append((step, steps, loss))

    data = rows()
    first = warm_start(data, "sdpo", tmp_path / "a", seed=3, steps=4, progress=progress)
    assert first == tmp_path / "a"
    assert [(step, steps) for step, steps, _ in seen] == [(n, 4) for n in (1, 2, 3, 4)]
    assert seen[-1][2] < seen[0][2]  # the first steps learn which bytes are in use
    assert seen[0][2] == pytest.approx(math.log(len(build_tokenizer(data))), rel=0.1)  # untrained: uniform

    torch.manual_seed(99)  # the caller's random state is of no account
    random.seed(99)
    warm_start(data, "sdpo", tmp_path / "b", seed=3, steps=4)
    warm_start(data, "sdpo", tmp_path / "c", seed=4, steps=4)
    names = {p.name for p in first.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"} <= names
    model_digests, tokenizer_digests = (
        [hashlib.sha256((tmp_path / run / name).read_bytes()).hexdigest() for run in "abc"]
        for name in ("model.safetensors", "tokenizer.json")
    )
    assert model_digests[0] == model_digests[1] != model_digests[2]
    assert len(set(tokenizer_digests)) == 1  # the same questions

    model = AutoModelForCausalLM.from_pretrained(first)
    tokenizer = AutoTokenizer.from_pretrained(first)
    assert model.config.eos_token_id == tokenizer.eos_token_id
    made = build_tokenizer(data)
    prompt = data[0]["prompt"]
    assert tokenizer.apply_chat_template(prompt, tokenize=False) == made.apply_chat_template(prompt, tokenize=False)
    texts = TransformersRunner(model, tokenizer, max_new_tokens=3)([prompt], 2, seed=0)
    assert len(texts[0]) == 2


@pytest.fixture
def batches(monkeypatch) -> list[list[Example]]:
    """The batches that the warm start trains on."""
    seen: list[list[Example]] = []
    plain = module._loss
    monkeypatch.setattr(module, "_loss", lambda model, batch, pad: seen.append(batch) or plain(model, batch, pad))
    return seen


@pytest.mark.parametrize("style", STYLES)
def test_the_corpus_hides_the_answer_and_shows_how_to_read_a_hint(tmp_path, monkeypatch, batches, style):
    """Un-hinted letters are drawn evenly, whatever is right; a hinted letter is the demonstration's."""
    for name, value in {"BATCH": 400, "CURRICULUM": (0.0, 0.0), "HIDDEN": 16, "LAYERS": 1}.items():
        monkeypatch.setattr(module, name, value)
    data, grade = rows(style), grader(style)
    warm_start(data, style, tmp_path, steps=1)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    counts = dict.fromkeys("ABCD", 0)
    for example in batches[0]:
        assert example.target[-1] == tokenizer.eos_token_id
        graded = grade(tokenizer.decode(example.target[:-1]), data[0])
        assert graded.well_formed
        assert tokenizer.decode([example.target[example.letter]]) == graded.answer
        text = tokenizer.decode(example.prompt)
        assert "How far is" in text and text.endswith("assistant\n")
        if "Correct solution:" in text:
            demonstration = text.split("Correct solution:\n\n")[1].split("\n\n\n\nCorrectly solve")[0]
            assert grade(demonstration, data[0]).answer == graded.answer
        else:
            counts[graded.answer] += 1
    share, unhinted = 1 - module.HINTED_SHARE, sum(counts.values())
    assert unhinted == pytest.approx(400 * share, abs=5 * math.sqrt(400 * share * (1 - share)))
    for count in counts.values():  # a quarter each; the right one (B) is no exception
        assert count == pytest.approx(unhinted / 4, abs=4 * math.sqrt(unhinted * 3 / 16))


def test_the_curriculum_goes_from_no_question_to_whole_ones(tmp_path, monkeypatch, batches):
    for name, value in {"BATCH": 16, "CURRICULUM": (0.3, 0.6), "HIDDEN": 16, "LAYERS": 1}.items():
        monkeypatch.setattr(module, name, value)
    data = rows()
    warm_start(data, "sdpo", tmp_path, steps=10)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    shares = []
    for batch in batches:
        texts = [tokenizer.decode(example.prompt) for example in batch]
        assert all("<|im_start|>user\n" in text for text in texts)
        shares.append(sum("How far is" in text for text in texts) / len(texts))
        whole = sum("You are given a multiple-choice question" in text for text in texts)
        assert whole == (len(texts) if len(shares) > 6 else 0)
    assert shares[:3] == [0.0] * 3
    assert 0 < sum(shares[3:6]) < 3
    assert shares[6:] == [1.0] * 4


def test_long_questions_are_left_out_and_nothing_but_long_ones_is_an_error(tmp_path, monkeypatch, batches):
    data = rows(count=3)
    data[0]["prompt"][-1]["content"] += " very" * 400 + " LONG"
    long, *others = build_tokenizer(data)([row["prompt"][-1]["content"] for row in data])["input_ids"]
    assert len(long) > 400 > 100 > len(others[0])
    monkeypatch.setattr(module, "MAX_PROMPT", len(long))  # the template's own tokens are too many
    monkeypatch.setattr(module, "CURRICULUM", (0.0, 0.0))
    warm_start(data, "sdpo", tmp_path / "a", steps=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    texts = [tokenizer.decode(example.prompt) for batch in batches for example in batch]
    assert texts and not any("LONG" in text for text in texts)
    with pytest.raises(UserError, match=r"no training question is at most \d+ tokens long.* --model_name_or_path"):
        warm_start(data[:1], "sdpo", tmp_path / "b", steps=2)
    with pytest.raises(UserError, match="no training question"):
        warm_start([], "sdpo", tmp_path / "b", steps=2)
    assert not (tmp_path / "b").exists()


def test_the_loss_is_the_weighted_mean_over_answer_tokens_and_ignores_padding():
    tokenizer = build_tokenizer(rows())
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    batch = [Example([5, 6, 7, 8], [9, 10], 0), Example([11], [12, 13, 14], 2)]
    nats, weights = [], [module.LETTER_WEIGHT, 1, 1, 1, module.LETTER_WEIGHT]
    for e in batch:  # one at a time, without padding
        with torch.no_grad():
            logprobs = model(input_ids=torch.tensor([e.prompt + e.target])).logits[0].double().log_softmax(-1)
        nats += [-logprobs[len(e.prompt) + i - 1, token].item() for i, token in enumerate(e.target)]
    expected = sum(w * n for w, n in zip(weights, nats, strict=True)) / sum(weights)
    assert module._loss(model, batch, tokenizer.pad_token_id).item() == pytest.approx(expected, rel=1e-5)


# The real questions ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_science
@pytest.mark.parametrize("style", STYLES)
def test_a_full_warm_start_keeps_the_format_knows_no_physics_and_reads_hints(tmp_path, style):
    task = load_task("science_qa", domain="physics", path=SCIENCE, style=style)
    warm_start(task.train, style, tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    generate = TransformersRunner(model, tokenizer, temperature=1.0, top_p=1.0, max_new_tokens=64)
    k = 4
    student = summarize(evaluate(task.test, generate, task.grade, k, seed=0), k)
    rng = random.Random(0)
    hinted = summarize(
        evaluate(
            task.test,
            generate,
            task.grade,
            k,
            seed=0,
            context=lambda row: hinted_prompt(row, answer(row["answer"], style, rng)),
        ),
        k,
    )
    assert student.well_formed_share > 0.9
    assert hinted.well_formed_share > 0.9
    # It was shown random letters: a quarter is right, 320 completions give a standard error of 0.025.
    assert 0.15 < student.avg_at_k.value < 0.35
    assert hinted.avg_at_k.value > student.avg_at_k.value + 0.2
    assert hinted.avg_at_k.low > student.avg_at_k.high
