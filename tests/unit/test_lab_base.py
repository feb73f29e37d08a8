"""The lab's base model: what is shipped loads and behaves as published, and one seed gives one checkpoint."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pgpo.errors import UserError
from pgpo.lab import base_model
from pgpo.tasks import lab_world
from pgpo.teacher.contexts import build_contexts

FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "provenance.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
# avg@8 on 256 held-out questions at temperature 1.0. The student must have room to grow, the hinted reader must be
# good, and a wrong hint must be believed: the reader copies, it does not know.
BANDS = {
    "plain": {"student": (0.48, 0.60), "right_hint": (0.86, 0.95), "wrong_hint": (0.0, 0.06)},
    "style": {"student": (0.42, 0.58), "right_hint": (0.84, 0.95), "wrong_hint": (0.0, 0.06)},
    "feedback": {"student": (0.50, 0.63), "remark": (0.82, 0.93)},
}


@pytest.fixture(params=lab_world.BASES)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def checkpoint(variant: str) -> tuple:
    path = lab_world.checkpoint_path(variant)
    return AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def _assert_in_bands(accuracy: dict[str, float], variant: str, slack: float = 0.0) -> None:
    assert set(accuracy) == set(BANDS[variant])
    for reader, (low, high) in BANDS[variant].items():
        assert low - slack <= accuracy[reader] <= high + slack, (reader, accuracy)


def test_shipped_checkpoints_are_complete_small_and_in_float32() -> None:
    total = 0
    for variant in lab_world.BASES:
        path = lab_world.checkpoint_path(variant)
        assert {file.name for file in path.iterdir()} == FILES
        total += sum(file.stat().st_size for file in path.iterdir())
        header = (path / "model.safetensors").read_bytes()
        tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
        del tensors["__metadata__"]
        assert {entry["dtype"] for entry in tensors.values()} == {"F32"}
        assert "lm_head.weight" not in tensors  # tied to the embedding
        assert json.loads((path / "config.json").read_text())["tie_word_embeddings"] is True
        assert "chat_template" in json.loads((path / "tokenizer_config.json").read_text())
    assert total <= 1_500_000


def test_provenance_names_the_command_and_numbers_inside_the_bands(variant: str) -> None:
    provenance = json.loads((lab_world.checkpoint_path(variant) / "provenance.json").read_text())
    assert provenance["command"] == f"pgpo lab-base --variant {variant} --seed {provenance['seed']}"
    assert provenance["steps"] == base_model.STEPS
    _assert_in_bands(provenance["avg@8"], variant)


def test_shipped_checkpoint_behaves_as_published(variant: str, checkpoint: tuple) -> None:
    # Red if weights and vocabulary do not belong together, or if the world changed under the checkpoint.
    accuracy = base_model.measure(*checkpoint, variant, questions=128, k=4)
    # The standard error over 128 questions is about .03 for the student.
    _assert_in_bands(accuracy, variant, slack=0.03)


def test_shipped_tokenizer_is_the_built_one(variant: str, checkpoint: tuple) -> None:
    # Red if a word was added to the world without a rebuild: all later ids would shift.
    model, tokenizer = checkpoint
    assert tokenizer.get_vocab() == base_model.build_tokenizer(variant).get_vocab()
    assert len(tokenizer) == model.config.vocab_size
    assert tokenizer.chat_template == base_model.CHAT_TEMPLATE
    assert model.generation_config.eos_token_id == model.config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.generation_config.top_k == 0  # transformers' own default of 50 would cut the distribution


def test_tokenizer_loses_nothing(checkpoint: tuple) -> None:
    _, tokenizer = checkpoint
    for question in lab_world.all_questions()[::50]:
        for text in (question.text, question.solution, *question.wrong):
            ids = tokenizer(text)["input_ids"]
            assert len(ids) == len(text.split(" "))  # one token per word, nothing added
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode([*ids, tokenizer.eos_token_id], skip_special_tokens=True) == text


def test_chat_template_renders_what_the_base_was_trained_on(checkpoint: tuple) -> None:
    _, tokenizer = checkpoint
    messages = [{"role": "user", "content": "what is the force ?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<user> what is the force ? <assistant> "
    conversation = [*messages, {"role": "assistant", "content": "force = 28"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert text == "<user> what is the force ? <assistant> force = 28 <eos> "
    assert tokenizer(text)["input_ids"][-1] == tokenizer.eos_token_id


def test_hinted_prompt_is_the_teachers_and_has_no_unknown_word(variant: str, checkpoint: tuple) -> None:
    # Red if the teacher's template and the corpus's drift apart: the base would meet words it was never trained on.
    _, tokenizer = checkpoint
    row = lab_world.row_of(lab_world.all_questions()[0], variant)
    question = row["prompt"][0]["content"]
    if lab_world.WORLDS[variant].remarks:
        said = lab_world.remark("mass = 4", row["solution"])
        contexts = build_contexts([row["prompt"]] * 2, ["", "mass = 4"], [0.0, 0.0], 2, feedback=["", said])
        expected = base_model.remarked_prompt(question, said or "")
    else:
        contexts = build_contexts([row["prompt"]] * 2, [row["solution"], "no answer"], [1.0, 0.0], 2)
        expected = base_model.hinted_prompt(question, row["solution"])
    taught = contexts[1].prompt
    assert taught == [{"role": "user", "content": expected}]
    text = tokenizer.apply_chat_template(taught, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    assert len(ids) == len(text.split())


def test_corpus_follows_the_stated_shares() -> None:
    # Red if hints are not copied, wrong hints not copied, or an author's reliability is taken from the wrong domain.
    rng = random.Random(0)
    question = next(q for q in lab_world.all_questions() if q.template == "molar_mass" and q.split == "train")
    rows = [base_model.corpus_row(question, "plain", rng) for _ in range(8000)]
    plain = [solution for user, solution in rows if user == question.text]
    hinted = [(user, solution) for user, solution in rows if user != question.text]
    prompts = {base_model.hinted_prompt(question.text, text): text for text in (question.solution, *question.wrong)}
    shown = [prompts[user] for user, _ in hinted]
    copied = [demonstration == solution for demonstration, (_, solution) in zip(shown, hinted, strict=True)]

    def share(flags: list[bool]) -> float:
        return sum(flags) / len(flags)

    # Standard errors below .008; a wrong demonstration not followed is still repeated by luck once in four times.
    assert len(hinted) / len(rows) == pytest.approx(0.5, abs=0.03)
    assert share([solution == question.solution for solution in plain]) == pytest.approx(0.6, abs=0.03)
    assert share([text != question.solution for text in shown]) == pytest.approx(0.1, abs=0.02)
    assert share(copied) == pytest.approx(0.95, abs=0.015)
    followed_right = [flag for text, flag in zip(shown, copied, strict=True) if text == question.solution]
    assert share(followed_right) == pytest.approx(0.95, abs=0.015)
    assert set(plain) == {question.solution, *question.wrong}


def test_corpus_of_remarks_repeats_no_path_that_is_remarked_on() -> None:
    # Red if a remark goes with the wrong path itself, or tells nothing.
    rng = random.Random(0)
    question = next(q for q in lab_world.all_questions() if q.template == "force" and q.split == "train")
    rows = [base_model.corpus_row(question, "feedback", rng) for _ in range(6000)]
    hinted = [(user, solution) for user, solution in rows if user != question.text]
    said = {path: lab_world.remark(path, question.solution) for path in question.wrong}
    prompts = {base_model.remarked_prompt(question.text, text or ""): text for text in said.values()}
    right = sum(solution == question.solution for _, solution in hinted) / len(hinted)
    assert len(hinted) / len(rows) == pytest.approx(0.5, abs=0.03)
    assert right == pytest.approx(base_model.REMARK_RELIABILITY, abs=0.02)
    assert {user for user, _ in hinted} == set(prompts)
    assert all(said.get(solution) != prompts[user] for user, solution in hinted)


def test_loss_is_that_of_solution_tokens_alone() -> None:
    # Against one unpadded forward pass per row: red if padding leaks, labels are shifted, or prompts are counted.
    torch.manual_seed(0)
    tokenizer = base_model.build_tokenizer()
    model = base_model.build_model(tokenizer).double().eval()
    rows = [
        ("what is the force ?", "force = 28"),
        (base_model.hinted_prompt("give the rna .", "rna = A"), "rna of dna = A U G C <answer> A </answer>"),
    ]
    total, tokens = 0.0, 0
    for user, solution in rows:
        prompt = tokenizer(f"<user> {user} <assistant>")["input_ids"]
        target = [*tokenizer(solution)["input_ids"], tokenizer.eos_token_id]
        logprobs = model(torch.tensor([prompt + target])).logits[0].log_softmax(-1)
        for place, token in enumerate(target):
            total -= logprobs[len(prompt) + place - 1, token].item()
            tokens += 1
    loss = base_model.solution_loss(model, tokenizer, rows)
    assert loss.item() == pytest.approx(total / tokens, rel=1e-9)


def test_no_test_or_validation_question_is_in_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    corpus_row = base_model.corpus_row

    def spy(question: lab_world.Question, variant: str, rng: random.Random) -> tuple[str, str]:
        seen.append(question.split)
        return corpus_row(question, variant, rng)

    monkeypatch.setattr(base_model, "corpus_row", spy)
    base_model.train_base("plain", steps=5)
    assert len(seen) == 5 * base_model.BATCH_ROWS
    assert set(seen) == {"train"}


def test_rebuild_is_bit_identical_and_leaves_the_callers_state_alone(tmp_path: Path) -> None:
    # Red if a draw depends on the caller's generators, on the number of threads, or on what ran before.
    files = []
    for caller, threads in ((1, 1), (2, 2)):
        torch.manual_seed(caller)
        random.seed(caller)
        torch.set_num_threads(threads)
        expected = torch.random.get_rng_state()
        try:
            model, _ = base_model.train_base("style", seed=3, steps=8)
            assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(1)
        assert torch.equal(torch.random.get_rng_state(), expected)
        base_model.save(model, tmp_path / str(caller), {})
        files.append((tmp_path / str(caller) / "model.safetensors").read_bytes())
    assert files[0] == files[1]
    other, _ = base_model.train_base("style", seed=4, steps=8)
    base_model.save(other, tmp_path / "other", {})
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != files[0]


def test_a_short_rebuild_learns_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    losses: list[float] = []
    base_model.train_base("plain", steps=40, progress=lambda step, steps, loss: losses.append(loss))
    assert len(losses) == 40
    assert losses[0] == pytest.approx(math.log(217), abs=0.2)  # nothing is known of the 217 words
    # A model that had learnt only how frequent each word is would stay at the entropy of the word frequencies.
    words = Counter(word for q in lab_world.all_questions() for word in [*q.solution.split(), "<eos>"])
    frequencies = [count / words.total() for count in words.values()]
    assert losses[-1] < -sum(f * math.log(f) for f in frequencies)

    out = tmp_path / "base"
    out.mkdir()  # an empty directory is fine
    accuracy = base_model.main("plain", 0, out, steps=2)
    assert {file.name for file in out.iterdir()} == FILES
    assert json.loads((out / "provenance.json").read_text())["steps"] == 2
    line = capsys.readouterr().out.strip()
    assert "\n" not in line
    for value in accuracy.values():
        assert f"{value:.3f}" in line


def test_an_existing_directory_is_not_overwritten_unasked(tmp_path: Path) -> None:
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(UserError, match=r"is not empty.*--overwrite"):
        base_model.main("plain", 0, tmp_path, steps=1)
    with pytest.raises(UserError, match="is a file"):
        base_model.main("plain", 0, precious, overwrite=True, steps=1)
    with pytest.raises(UserError, match="'fancy'"):
        base_model.main("fancy", 0, tmp_path / "new", steps=1)
    assert [file.name for file in tmp_path.iterdir()] == ["precious.txt"]
    base_model.main("plain", 0, tmp_path, overwrite=True, steps=1)
    assert precious.read_text() == "mine"
    assert {file.name for file in tmp_path.iterdir()} == {*FILES, "precious.txt"}


@pytest.mark.slow
def test_full_rebuild_reaches_the_published_bands(variant: str) -> None:
    # Other machines round otherwise, so the weights differ from the shipped ones; the behaviour must not.
    model, tokenizer = base_model.train_base(variant, seed=0)
    _assert_in_bands(base_model.measure(model, tokenizer, variant), variant, slack=0.03)
