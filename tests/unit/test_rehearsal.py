"""Hint rehearsal: its value and gradient, which rows it takes, and that off is off."""

from __future__ import annotations

import random

import pytest
import torch
from conftest import build_model
from oracles.rehearsal import rehearsal
from peft import LoraConfig
from trainer_kit import (
    bitwise_equal,
    config,
    differences,
    environment_rollout,
    fake_rollout,
    largest_difference,
    train,
    trainer,
    weights,
)

from pgpo import UserError

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9, objective="sdpo", temperature=0.8)


def apart(t):
    """A teacher that is no copy of the student any more: their KL and its gradient are not 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in t.teacher.module.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return t


def rows_of(found):
    """What the oracle reads of the rehearsed samples."""
    counts = [[s.own is None or i in s.own for i in range(len(s.completion))] for s in found]
    return [(s.teacher_prompt, s.completion, own) for s, own in zip(found, counts, strict=True)]


def model_of(values):
    """A bare model: a copy of a trainer's would run the trainer's weights."""
    model = build_model()
    model.load_state_dict(values, strict=False)
    return model


def step(path, **options):
    """A step's change of the weights, its log, and the samples that it rehearsed."""
    t = apart(trainer(path, **SGD | options))
    taken = []
    if t.distillation.rehearsal is not None:
        plain = t.distillation.rehearsal.chosen

        def chosen(samples):
            mine, count = plain(samples)
            taken.extend(mine)
            return mine, count

        t.distillation.rehearsal.chosen = chosen
    before, teacher = weights(t.model), weights(t.teacher.module)
    (log,) = train(t)
    moved = {n: p - before[n] for n, p in weights(t.model).items()}
    return moved, log, taken, (model_of(before), model_of(teacher))


@pytest.mark.parametrize("rollout", [fake_rollout, environment_rollout], ids=["plain", "environment"])
@pytest.mark.parametrize(
    "split",
    [
        {},
        dict(micro_batch_size=2),
        dict(max_tokens_per_microbatch=60),
        dict(fused_head=False),
        dict(join_siblings=False),
    ],
    ids=str,
)
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_value_and_gradient_are_the_oracles(split, rollout, share, tmp_path):
    """The step with rehearsal less the step without is - lr * share * w * gradient of the oracle's term. Red if a row
    counts by its tokens, if the student reads the unhinted prompt, if the KL is the other way round or of the top-k
    tokens alone, or if the gradient is counted once per micro-batch."""
    weight, common = 0.7, dict(rollout=rollout, distillation_weight=share, divergence_top_k=5, prompts_per_step=8)
    plain, without, _, _ = step(tmp_path, **common)
    options = dict(rehearse_weight=weight, rehearse_fraction=0.5) | common | split
    moved, log, taken, models = step(tmp_path, **options)
    assert len(taken) > 2 and len({len(s.labels) for s in taken}) > 1
    value, gradient = rehearsal(*models, rows_of(taken), 0.8)
    assert value > 0.01
    assert log["rehearsal_kl"] == pytest.approx(value, rel=1e-4)
    assert log["loss"] == pytest.approx(without["loss"] + share * weight * value, abs=1e-5)
    expected = {n: -0.5 * share * weight * gradient[n] for n in moved}
    assert largest_difference({n: moved[n] - plain[n] for n in moved}, expected) < 2e-6
    assert max(g.abs().max() for g in expected.values()) > 1e-3
    for name in ("information", "divergence", "sampled_kl", "active_tokens"):  # of the distillation alone
        assert log[name] == pytest.approx(without[name], abs=1e-6)


def test_the_rows_are_a_share_of_the_active_ones_drawn_by_seed_and_step(tmp_path):
    found = {}
    for name, options in {
        "half": dict(rehearse_fraction=0.5),
        "again": dict(rehearse_fraction=0.5, micro_batch_size=1),
        "seed": dict(rehearse_fraction=0.5, seed=7),
        "one": dict(rehearse_fraction=1e-3),
        "all": dict(rehearse_fraction=1.0),
    }.items():
        t = trainer(tmp_path / name, **SGD | dict(rehearse_weight=0.1, max_steps=2) | options)
        plain, found[name] = t.distillation.rehearsal.chosen, []
        active = []

        def chosen(samples, plain=plain, name=name, active=active):
            mine, count = plain(samples)
            assert count == len(mine)
            active.append(len(samples))
            found[name].append([s.index for s in mine])
            return mine, count

        t.distillation.rehearsal.chosen = chosen
        train(t)
        if name == "half":
            assert [len(rows) for rows in found[name]] == [round(0.5 * n) for n in active]
    assert found["half"] == found["again"]
    assert found["half"] != found["seed"] and found["half"][0] != found["half"][1]
    assert [len(rows) for rows in found["one"]] == [1, 1]
    assert set(found["half"][0]) < set(found["all"][0])
    assert all(len(set(rows)) == len(rows) for rows in found["all"])


def test_no_random_number_is_drawn_for_it(tmp_path):
    states = []
    for weight in (0.0, 0.1):
        random.seed(3)
        t = trainer(tmp_path / str(weight), **SGD | dict(rehearse_weight=weight, max_steps=2))
        train(t)
        states.append((t.random_numbers, random.getstate()))
    assert torch.equal(states[0][0], states[1][0]) and states[0][1] == states[1][1]


def test_off_is_off(tmp_path):
    t = trainer(tmp_path, **SGD)
    (log,) = train(t)
    assert t.distillation.rehearsal is None and "rehearsal_kl" not in log


def test_a_batch_without_a_teacher_rehearses_nothing(tmp_path):
    t = trainer(tmp_path, reward=lambda prompts, **kwargs: [0.0] * len(prompts), **SGD | dict(rehearse_weight=0.1))
    start = weights(t.model)
    (log,) = train(t)
    assert bitwise_equal(start, weights(t.model)) and "rehearsal_kl" not in log


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_a_resumed_run_goes_on_bit_for_bit(peft, tmp_path):
    options = SGD | dict(rehearse_weight=0.5, rehearse_fraction=0.3, max_steps=4)
    if peft:
        adapter = dict(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        options |= dict(peft_config=LoraConfig(**adapter))
    whole = trainer(tmp_path / "a", save_strategy="steps", save_steps=2, **options)
    logs = train(whole)
    assert logs[0]["rehearsal_kl"] == pytest.approx(0, abs=1e-7) and logs[3]["rehearsal_kl"] > 1e-6
    again = trainer(tmp_path / "b", **options)
    rest = train(again, resume_from_checkpoint=str(tmp_path / "a/checkpoint-2"))
    assert not differences(whole, again)
    assert [log["rehearsal_kl"] for log in logs[2:]] == [log["rehearsal_kl"] for log in rest[-2:]]


def test_trust_takes_no_slope_from_a_gradient_of_two_terms(tmp_path):
    t = trainer(tmp_path, **SGD | dict(rehearse_weight=0.5, trust="measured", max_steps=2))
    slopes, plain = [], t.trust.form.settle
    t.trust.form.settle = lambda step, slope: slopes.append(slope) or plain(step, slope)
    assert all(0 < log["trust_moved"] <= 1.5 * log["trust_budget"] for log in train(t))
    assert slopes == [None, None]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(rehearse_weight=-0.1), "rehearse_weight is -0.1; it must be 0"),
        (dict(rehearse_weight=0.1, rehearse_fraction=0.0), "rehearse_fraction is 0.0"),
        (dict(rehearse_fraction=0.5), "rehearse_fraction is 0.5, but rehearse_weight is 0"),
        (dict(rehearse_weight=0.1, teacher="live"), "teacher='live' is the student"),
        (dict(rehearse_weight=0.1, objective="grpo"), "objective='grpo' has no teacher"),
        (dict(rehearse_weight=0.1, distillation_weight=0.0), "distillation_weight is 0"),
        (dict(rehearse_weight=0.1, information_source="cross_fit"), "rehearsal has no halves"),
    ],
)
def test_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        config(tmp_path, **options)
