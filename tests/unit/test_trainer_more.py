"""Feedback, checkpoints, LoRA, evaluation, plain-text prompts."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch
from conftest import WORDS, build_model, build_tokenizer
from datasets import Dataset
from tokenizers import AddedToken
from trainer_kit import (
    GROUP,
    Spy,
    config,
    dataset,
    fake_rollout,
    largest_difference,
    parity_reward,
    train,
    trainer,
    weights,
)

from pgpo import UserError
from pgpo.forward.batching import split
from pgpo.forward.passes import _CACHED
from pgpo.tasks.graders import Grade
from pgpo.train.forwards import MicroBatch
from pgpo.train.host import Host
from pgpo.train.rows import Sample


def nobody(prompts, completions, **kwargs):
    return [0.0] * len(prompts)


def parity_feedback(prompts, completions, index, **kwargs):
    """Feedback on the own attempt, in words of the tokenizer; nothing to say to question 2."""
    return [None if i == 2 else f"w{i} w3" for i in index]


def texts(batch) -> list[str | None]:
    tokenizer = build_tokenizer()
    return [None if ids is None else tokenizer.decode(ids) for ids in batch["teacher_prompt_ids"]]


FEEDBACK_TEMPLATE = "\nfeedback: {feedback} end.\n"  # the default's words are not in the tiny vocabulary


@pytest.mark.parametrize("mode", ["without_demonstration", "always", "never"])
def test_feedback_reaches_the_teacher(tmp_path, mode):
    t = trainer(tmp_path, feedback_funcs=parity_feedback, feedback_mode=mode, feedback_template=FEEDBACK_TEMPLATE)
    spy = Spy(t)
    (log,) = train(t)
    batch = spy.batches[0]
    shown = texts(batch)
    with_feedback = [s is not None and "feedback:" in s for s in shown]
    with_solution = [s is not None and "solution:" in s for s in shown]
    asked = [batch["prompt_ids"][i][batch["prompt_mask"][i].bool()][1].item() for i in range(len(shown))]
    question = [WORDS[i] for i in asked]
    for i in range(len(shown)):
        has_text = question[i] != "w2"
        if mode == "never":
            assert not with_feedback[i]
        elif mode == "always":
            assert with_feedback[i] == has_text
        else:
            assert with_feedback[i] == (has_text and not with_solution[i])
        if with_feedback[i]:
            assert f"feedback: {question[i]} w3 end." in shown[i]  # its own, not a sibling's
    assert log["feedback_share"] == pytest.approx(sum(with_feedback) / len(shown))
    assert any(with_solution)


def test_a_placebo_comes_from_another_question_of_the_step(tmp_path):
    spies = {}
    for choice in ("first", "placebo"):
        t = trainer(tmp_path, demonstration=choice, prompts_per_step=5)
        spies[choice] = Spy(t)
        train(t)
    batch = spies["placebo"].batches[0]
    shown, siblings = texts(batch), texts(spies["first"].batches[0])
    written = [
        t.tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["completion_ids"], batch["completion_mask"])
    ]
    asked = [tuple(row[m.bool()].tolist()) for row, m in zip(batch["prompt_ids"], batch["prompt_mask"])]
    assert [s is None for s in shown] == [s is None for s in siblings]
    assert any(s is not None for s in shown)
    for i, text in enumerate(shown):
        if text is None:
            continue
        hint = text.split("Correct solution: ")[1].split(" Correctly")[0]
        assert {asked[j] == asked[i] for j, w in enumerate(written) if w.removesuffix(" <eos>") == hint} == {False}
        assert text.split(" Correct solution")[0] == siblings[i].split(" Correct solution")[0]  # its own question


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(prompts_per_step=1), "another question of the step, but prompts_per_step is 1"),
        (dict(information_source="cross_fit"), "two halves"),
        (dict(objective="grpo"), "here there are none"),
        (dict(use_successful_as_teacher=False), "here there are none"),
    ],
)
def test_a_placebo_that_cannot_be_is_refused(tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        config(tmp_path, demonstration="placebo", **options)


def test_feedback_alone_trains_where_nobody_succeeds(tmp_path):
    t = trainer(tmp_path, reward=nobody, feedback_funcs=[parity_feedback], feedback_template=FEEDBACK_TEMPLATE)
    (log,) = train(t)
    assert log["active_share"] == pytest.approx(0.75)  # three of four questions
    assert largest_difference(weights(t.model), weights(build_model())) > 0


def test_resume_with_another_teacher_is_refused(tmp_path):
    options = dict(max_steps=2, save_strategy="steps", save_steps=1)
    train(trainer(tmp_path, **options))
    other = trainer(tmp_path, teacher="frozen", **options)
    with pytest.raises(UserError, match="checkpoint-1 cannot be continued"):
        train(other, resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_plain_text_prompts(tmp_path):
    rows = Dataset.from_list([{"prompt": f"w{i} w{(i * 7) % 36}"} for i in range(8)])

    def rollout(prompts, t):
        as_chat = [[{"role": "user", "content": p}] for p in prompts]
        out = fake_rollout(as_chat, t)
        return {**out, "prompt_ids": [t.render(p) for p in prompts]}

    def reward(prompts, completions, **kwargs):
        assert all(isinstance(c, str) for c in completions)
        return [float(len(c.split()) % 2 == 0) for c in completions]

    t = trainer(tmp_path, reward=reward, rollout=rollout, data=rows)
    spy = Spy(t)
    (log,) = train(t)
    assert log["active_share"] > 0
    assert any(s is not None and "solution:" in s and "<user>" not in s for s in texts(spy.batches[0]))


def test_too_long_contexts_are_shortened_and_counted(tmp_path):
    free = trainer(tmp_path / "a")
    spy = Spy(free)
    train(free)
    lengths = [len(ids) for ids in spy.batches[0]["teacher_prompt_ids"] if ids is not None]
    limit = max(lengths) - 1
    t = trainer(tmp_path / "b", max_teacher_prompt_length=limit)
    spy = Spy(t)
    (log,) = train(t)
    cut = [ids for ids in spy.batches[0]["teacher_prompt_ids"] if ids is not None]
    assert max(len(ids) for ids in cut) <= limit
    assert log["truncated_contexts"] > 0
    for text in texts(spy.batches[0]):
        assert text is None or text.endswith("Correctly solve the original question. <assistant>")


def test_evaluation_uses_its_own_sampling(tmp_path):
    """Greedy evaluation is deterministic, also between steps; hot evaluation samples."""
    grade = lambda text, row: Grade(float(len(text.split()) % 2), text, True, None)  # noqa: E731
    held_out = [dict(r, id=f"q{i}") for i, r in enumerate(dataset(6))]
    options = dict(eval_dataset=held_out, grade=grade)
    steps = dict(max_steps=3, eval_strategy="steps", eval_steps=1)
    t = trainer(tmp_path, **options, **steps, eval_temperature=0.0, eval_k=2)
    train(t)
    assert [r["step"] for r in t.state.log_history if "eval_avg_at_k" in r] == [1, 2, 3]
    first, second = t.held_out_records(held_out), t.held_out_records(held_out)
    assert first == second and len(first) == 12
    assert {r["question_id"] for r in first} == {f"q{i}" for i in range(6)}
    assert len({r["completion"] for r in first if r["question_id"] == "q0"}) == 1  # greedy
    hot = trainer(tmp_path, **options, eval_temperature=1.0, eval_top_p=1.0, eval_k=8)
    assert len({r["completion"] for r in hot.held_out_records(held_out) if r["question_id"] == "q0"}) > 1


def test_generation_by_the_model_itself(tmp_path):
    """No fake rollouts: transformers generates, and a sample is never its own demonstration."""
    t = trainer(tmp_path, rollout=None, max_steps=2, reward=lambda prompts, completions, **k: [1.0] * len(prompts))
    spy = Spy(t)
    logs = train(t)
    assert all(r["active_share"] == 1.0 for r in logs)
    batch, shown = spy.batches[0], texts(spy.batches[0])
    assert len(shown) == 4 * GROUP
    assert logs[0]["completion_length"] == pytest.approx(batch["completion_mask"].sum(1).float().mean().item())


@pytest.mark.parametrize("per_token", [True, False])
def test_rollout_correction_weighs_the_loss(tmp_path, per_token):
    """vLLM's ratio, per token [T] or per sequence [1], multiplies the tokens' loss and nothing else."""
    t = trainer(tmp_path)
    plain = t.active_samples
    t.active_samples = lambda batch: [
        replace(r, weight=torch.full((len(r.completion) if per_token else 1,), 0.5)) for r in plain(batch)
    ]
    (log,) = train(t)
    (unweighted,) = train(trainer(tmp_path))
    assert log["loss"] == pytest.approx(0.5 * unweighted["loss"], rel=1e-5)
    assert log["divergence"] == pytest.approx(unweighted["divergence"], rel=1e-5)
    assert log["information"] == pytest.approx(unweighted["information"], abs=1e-7)


def test_importance_ratio_is_taken_at_the_sampling_temperature(tmp_path):
    t = trainer(tmp_path, temperature=0.5, importance_clip=3.0, divergence="forward_kl", divergence_top_k=0)
    old = torch.tensor([-1.0, -2.0, -30.0])
    row = Sample(prompt=[2], teacher_prompt=[2, 9], completion=[7, 8, 9], rollout_logprobs=old)
    d = t.distillation
    states, part = d.forwards.teacher_states([row]), MicroBatch([row], [1], [0])
    loss, _ = d._loss(t.model, part, states, 1.0, False, None, t.signal.meters[0])

    def log_probs(prompt):
        logits = build_model()(input_ids=torch.tensor([prompt + row.completion])).logits[0, -4:-1].double()
        return (logits / 0.5).log_softmax(-1).detach()

    student, teacher = log_probs(row.prompt), log_probs(row.teacher_prompt)
    ratio = (student[torch.arange(3), torch.tensor(row.completion)] - old).exp().clamp_max(3.0)
    assert ratio[2] == 3.0 > ratio[:2].max() > 0
    expected = (ratio * (teacher.exp() * (teacher - student)).sum(-1)).sum()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_micro_batches_keep_to_the_token_budget(tmp_path, objective):
    """Rows are padded to the longest of them; TRL's own, for GRPO, to the longest prompt and the longest completion."""
    t = trainer(tmp_path, max_tokens_per_microbatch=2200, objective=objective)
    sizes = [(1000, 100), (100, 1000), (1000, 90), (90, 900), (10, 10), (12, 8)]
    parts = split(sizes, t.policy.limits if objective == "grpo" else t.distillation.forwards.limits())
    assert sorted(i for part in parts for i in part) == list(range(6))
    for part in parts:
        padded = len(part) * max(sum(sizes[i]) for i in part)
        if objective == "grpo":
            padded = len(part) * (max(sizes[i][0] for i in part) + max(sizes[i][1] for i in part))
        assert padded <= 2200 or len(part) == 1
    assert len(parts) < 6


def test_no_forward_exceeds_the_token_budget(tmp_path):
    for share, join, pack in ((True, True, None), (True, False, None), (False, False, None), (True, True, True)):
        seen = []
        budget = trainer(
            tmp_path, max_tokens_per_microbatch=60, share_teacher_prompts=share, join_siblings=join, packing=pack
        )
        budget.distillation.forwards._checked = True  # the check runs rows of its own

        def watch(module, args, kwargs, seen=seen):
            mask, tokens = kwargs.get("attention_mask"), kwargs["input_ids"].numel()
            cached = 0 if mask is None or mask.dim() == 4 else mask.numel() - tokens
            seen.append(tokens + cached / _CACHED)

        for m in (budget.model, budget.teacher.module):
            m.register_forward_pre_hook(watch, with_kwargs=True)
        train(budget)
        assert max(seen) <= 60 and len(seen) > 2


def test_steps_per_generation_is_folded_with_accumulation(tmp_path):
    """TRL's default written out (steps_per_generation = gradient_accumulation_steps) stays one step per rollout."""
    folded = config(
        tmp_path,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=4,
        steps_per_generation=4,
        num_generations=8,
    )
    assert (folded.generation_batch_size, folded.steps_per_generation) == (32, 1)
    with pytest.raises(UserError, match="no multiple of gradient_accumulation_steps = 4"):
        config(
            tmp_path,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=4,
            steps_per_generation=6,
            num_generations=8,
        )


def test_teacher_prompts_are_rendered_with_the_template_arguments(tmp_path):
    t = trainer(tmp_path, chat_template_kwargs={"mark": "w9"})
    t.processing_class.chat_template = "{{ mark }} " + t.processing_class.chat_template
    t.chat_template = None
    first = t.render([{"role": "user", "content": "w1"}])[0]
    assert WORDS[first] == "w9"


def test_joined_rows_are_counted_as_padded_where_other_rows_are_packed(tmp_path):
    t = trainer(tmp_path, max_tokens_per_microbatch=60, packing=True, join_siblings=True)
    rows = [Sample([2] * 10, [3], [5] * 15), Sample([2] * 10, [3], [6] * 15), Sample([4] * 10, [3], [5] * 10)]
    forwards = t.distillation.forwards
    assert forwards.bundles(rows, forwards.limits()) == [[[0, 1]], [[2]]]  # 40 + 20 tokens packed, 80 padded


def test_every_trainer_has_a_host_of_its_own(tmp_path):
    """A default that trainers shared would send the messages and alarms of one run to another."""
    first, second = trainer(tmp_path / "1"), trainer(tmp_path / "2")
    assert first.host is not second.host and first.host.watched is not second.host.watched
    mine = Host(run_id="mine")
    assert trainer(tmp_path / "3", host=mine).host is mine


OPENS = "{% if add_generation_prompt %} <think>{% endif %}"


def asked_with(t, ending: str):
    t.processing_class.chat_template += ending
    t.chat_template = None
    return t


@pytest.mark.parametrize("ending", [OPENS, OPENS.replace("<think>", "<think> </think>"), ""])
def test_thinking_that_the_template_opens_and_that_is_cut_off_teaches_nothing(tmp_path, ending):
    """No completion here closes a thinking block: behind a template's <think> it is all thinking."""
    flags, graded = [], []

    def reward(prompts, completions, thinking_opened=None, **kwargs):
        flags.append(thinking_opened)
        return parity_reward(prompts, completions)

    def feedback(prompts, completions, thinking_opened=None, **kwargs):
        flags.append(thinking_opened)
        return [None] * len(prompts)

    def grade(text, row):
        graded.append(row.get("thinking_opened", False))
        return Grade(0.0, None, True, None)

    held_out = [dict(r, id=f"q{i}") for i, r in enumerate(dataset(2))]
    t = asked_with(
        trainer(tmp_path, reward=reward, feedback_funcs=feedback, grade=grade, eval_dataset=held_out), ending
    )
    spy = Spy(t)
    train(t)
    t.evaluate()
    opens = ending == OPENS
    expected = [True] * len(spy.batches[0]["teacher_prompt_ids"]) if opens else None
    assert flags == [expected, expected]
    assert graded == [opens] * 8
    assert any(ids is not None for ids in spy.batches[0]["teacher_prompt_ids"]) == (not opens)


def test_thinking_that_trl_has_cut_off_already_is_not_looked_for(tmp_path):
    """With a response template TRL hands on what follows </think>, so the text no longer begins in the thinking."""
    t = asked_with(trainer(tmp_path), OPENS)
    prompt, ids = [{"role": "user", "content": "w1"}], t.tokenizer("w1 w2 w3")["input_ids"]
    whole, cut = [{"role": "assistant", "content": "w1 w2 w3"}], [{"role": "assistant", "content": "w3"}]

    def told(prompts, completions):
        rows = t.told_of_thinking([{"index": 5}] * len(prompts), prompts, completions, [ids] * len(prompts))
        return [row.get("thinking_opened") for row in rows]

    assert told([prompt, prompt], [whole, cut]) == [True, False]
    assert told(["w1 <think>", "w1"], ["w1 w2 w3"] * 2) == [True, False]
    assert told(["w1"], ["w1 w2 w3"]) == [None]


def test_thinking_tags_that_decoding_drops_are_named(tmp_path):
    def make(special: bool, **attributes):
        tokenizer = build_tokenizer()
        tokenizer.add_tokens([AddedToken("[THINK]", special=special), AddedToken("[/THINK]", special=special)])
        for name, value in attributes.items():
            setattr(tokenizer, name, value)
        model = build_model()
        model.resize_token_embeddings(len(tokenizer))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer(tmp_path, model, tokenizer=tokenizer, quiet=False)
        return [str(w.message) for w in caught if "special tokens" in str(w.message)]

    (sentence,) = make(special=True)
    assert "[/THINK] and [THINK]" in sentence and "response_template" in sentence
    assert make(special=False) == []
    assert make(special=True, response_template={"fields": {}}) == []
