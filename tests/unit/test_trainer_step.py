"""The trainer's step against minimal.py, against itself split differently, and against TRL."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from conftest import build_model
from torch import nn
from trainer_kit import (
    GROUP,
    Spy,
    bitwise_equal,
    largest_difference,
    parity_reward,
    train,
    trainer,
    weights,
)

from pgpo import minimal

CLIP = 0.3


def logits(t, model, ids):
    """Of the completion tokens [N, V], from prompts and completions."""
    return t.passes.forward(model, *ids, lambda hidden, head: head.logits(hidden))


class Bare(nn.Module):
    """minimal.py calls a model as model(ids) -> logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(input_ids=ids).logits


def minimal_step(batch: dict, alpha: float, temperature: float, optimizer_class, lr: float):
    """The same batch through minimal.update, from the same initial weights."""
    samples = [
        minimal.Sample(
            prompt=batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist(),
            completion=batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist(),
            teacher_prompt=batch["teacher_prompt_ids"][i],
        )
        for i in range(len(batch["prompt_ids"]))
    ]
    student = Bare(build_model())
    teacher = copy.deepcopy(student).requires_grad_(False)
    settings = minimal.Settings(alpha=alpha, temperature=temperature, lr=lr, top_k=10, clip=CLIP)
    optimizer = minimal.adamw(student, settings) if optimizer_class is None else optimizer_class(student.parameters())
    record = minimal.update(student, teacher, optimizer, samples, settings)
    return record, weights(student.model), weights(teacher.model)


@pytest.mark.parametrize("micro", [None, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_one_trainer_step_equals_one_minimal_step(tmp_path, micro, temperature):
    # alpha large enough that rho is far from 1 and below the cap; SGD shows every gradient at its own size.
    options = dict(alpha=1.5, temperature=temperature, divergence_top_k=10, micro_batch_size=micro, max_grad_norm=CLIP)
    t = trainer(tmp_path, optim="sgd", learning_rate=0.5, weight_decay=0.0, **options)
    spy = Spy(t)
    (log,) = train(t)
    sgd = lambda p: torch.optim.SGD(p, lr=0.5)  # noqa: E731
    record, student, teacher = minimal_step(spy.batches[0], 1.5, temperature, sgd, 0.5)

    hinted = sum(p is not None for p in spy.batches[0]["teacher_prompt_ids"])
    assert 0 < hinted < 4 * GROUP  # the step has samples with and without a teacher
    assert 1.05 < record["rho"] < 2.0
    assert record["grad_norm"] > CLIP  # clipping is active
    assert log["information"] == pytest.approx(record["information"], abs=1e-6)
    assert log["rho"] == pytest.approx(record["rho"], abs=1e-6)
    assert log["effective_lr"] == pytest.approx(0.5 * log["rho"])
    assert t.optimizer.param_groups[0]["lr"] == t.lr_scheduler.get_last_lr()[0] == 0.5  # neither keeps rho
    assert log["loss"] == pytest.approx(record["loss"], abs=1e-6)
    assert log["grad_norm"] == pytest.approx(record["grad_norm"], rel=1e-4)
    assert largest_difference(weights(t.model), student) < 1e-5
    assert largest_difference(weights(t.teacher.module), teacher) < 1e-5
    # The comparison can fail: an unscaled step is far away.
    assert largest_difference(minimal_step(spy.batches[0], 0.0, temperature, sgd, 0.5)[1], student) > 1e-3


def test_adamw_step_equals_minimal_step(tmp_path):
    t = trainer(tmp_path, alpha=3.0, divergence_top_k=10, learning_rate=1e-3, max_grad_norm=CLIP)
    spy = Spy(t)
    train(t)
    record, student, _ = minimal_step(spy.batches[0], 3.0, 1.0, None, 1e-3)
    assert record["rho"] > 1.05
    moved, expected = weights(t.model), student
    # Adam's first step is lr * sign(g): gradients at rounding level may differ in sign, all others must agree.
    agree = [((moved[n] - expected[n]).abs() < 1e-5).float().mean().item() for n in moved]
    assert min(agree) > 0.99
    start = weights(build_model())
    step = torch.cat([(moved[n] - start[n]).flatten() for n in moved]).abs()
    assert step.median().item() == pytest.approx(1e-3 * record["rho"], rel=1e-2)


@pytest.mark.parametrize(
    "split", [dict(micro_batch_size=1), dict(micro_batch_size=5), dict(max_tokens_per_microbatch=40)]
)
def test_splitting_into_micro_batches_changes_nothing(tmp_path, split):
    whole = trainer(tmp_path, optim="sgd", learning_rate=0.5, max_steps=3, max_tokens_per_microbatch=None)
    parts = trainer(tmp_path, optim="sgd", learning_rate=0.5, max_steps=3, **split)
    calls = []
    plain = parts.distillation._loss
    parts.distillation._loss = lambda model, part, *a: calls.append(len(part.samples)) or plain(model, part, *a)
    one, many = train(whole), train(parts)
    assert len(calls) > 6  # it was split
    assert largest_difference(weights(whole.model), weights(parts.model)) < 1e-5
    for a, b in zip(one, many, strict=True):
        for name in ("information", "rho", "loss", "divergence", "student_entropy", "teacher_entropy", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=2e-6), name


def test_alpha_zero_is_sdpo_bit_for_bit(tmp_path):
    runs = []
    for options in (dict(alpha=0.0), dict(objective="sdpo"), dict(alpha=1.0)):
        t = trainer(tmp_path, max_steps=5, **options)
        runs.append((t, train(t)))  # one after the other: the trainer seeds the global generator when it is built
    (zero, logs_zero), (sdpo, logs_sdpo), (one, _) = runs
    assert bitwise_equal(weights(zero.model), weights(sdpo.model))
    assert bitwise_equal(weights(zero.teacher.module), weights(sdpo.teacher.module))
    timing = ("seconds", "step_time")
    for a, b in zip(logs_zero, logs_sdpo, strict=True):
        assert {k: v for k, v in a.items() if not k.endswith(timing)} == {
            k: v for k, v in b.items() if not k.endswith(timing)
        }
    assert not bitwise_equal(weights(one.model), weights(sdpo.model))


def test_samples_without_a_teacher_cost_no_forward_and_do_not_shrink_the_step(tmp_path):
    def only_first_prompt(prompts, completions, **kwargs):
        return [
            r * (p[0]["content"].startswith("w1 "))
            for r, p in zip(parity_reward(prompts, completions), prompts, strict=True)
        ]

    t = trainer(tmp_path, optim="sgd", learning_rate=0.5, reward=only_first_prompt, diagnostics_step_interval=0)
    t.distillation.forwards._checked = True  # the check runs rows of its own
    seen = []

    def watch(plain):
        def run(module, prompts, *more):
            if module in (t.model, t.teacher):  # not the runs that a teacher's pass is made of
                seen.append(len(prompts))
            return plain(module, prompts, *more)

        return run

    t.passes.forward, t.passes.teacher = watch(t.passes.forward), watch(t.passes.teacher)
    spy = Spy(t)
    (log,) = train(t)
    hinted = sum(p is not None for p in spy.batches[0]["teacher_prompt_ids"])
    assert 0 < hinted <= GROUP
    assert seen == [hinted, hinted]  # teacher and student, hinted rows only
    assert log["active_share"] == pytest.approx(hinted / (4 * GROUP))
    # I counts all samples: it is the hinted mean times their share.
    gap = log["student_entropy"] - log["teacher_entropy"]
    assert log["information"] == pytest.approx(gap * hinted / (4 * GROUP), abs=1e-9)
    # The loss is the mean over active tokens, as if the rest were not there.
    assert log["loss"] == pytest.approx(log["divergence"], abs=1e-6)


def test_teacher_has_its_own_weights(tmp_path):
    """TRL patches model.forward with a closure over the student; a careless copy would run the student."""
    t = trainer(tmp_path)
    ids = [[2, 10, 11, 3]], [[12, 13]]
    student = logits(t, t.model, ids).detach()
    same = t.teacher.logits(lambda m: logits(t, m, ids))
    assert torch.equal(student, same)  # starts as a copy
    with torch.no_grad():
        for p in t.teacher.module.parameters():
            p.zero_()
    assert t.teacher.logits(lambda m: logits(t, m, ids)).abs().max() == 0
    states = t.passes.teacher(t.teacher, *ids)  # what the trainer runs
    assert states.head.logits(states.hidden).abs().max() == 0
    assert torch.equal(logits(t, t.model, ids).detach(), student)


@pytest.mark.parametrize("kind", ["ema", "live", "frozen", "trust_region"])
def test_teacher_kinds_train_and_move_as_they_should(tmp_path, kind):
    rate = dict(teacher_rate=0.25) if kind in ("ema", "trust_region") else {}
    t = trainer(tmp_path, teacher=kind, max_steps=2, optim="sgd", learning_rate=0.5, **rate)
    logs = train(t)
    assert all(math.isfinite(r["loss"]) for r in logs)
    start, end = weights(build_model()), weights(t.model)
    assert largest_difference(start, end) > 1e-4
    if kind == "live":
        assert t.teacher.module is None
    elif kind == "ema":
        assert 0 < largest_difference(start, weights(t.teacher.module)) < largest_difference(start, end)
    else:
        assert bitwise_equal(start, weights(t.teacher.module))


def test_off_policy_steps_clip_the_importance_ratio(tmp_path):
    """Two steps per rollout: the second is off-policy, its tokens are weighted by min(ratio, clip)."""
    seen = {}
    for clip in (2.0, 1.0, None):
        t = trainer(
            tmp_path,
            optim="sgd",
            learning_rate=2.0,
            max_steps=2,
            num_iterations=2,
            importance_clip=clip,
            divergence_top_k=0,
        )
        weighted = []
        plain = t.distillation._token_weights

        def watch(rows, share, plain=plain, weighted=weighted):
            weights = plain(rows, share)
            if isinstance(weights, torch.Tensor):
                weighted.append(weights / share)
                return weights
            return lambda *a: weighted.append((w := weights(*a)) / share) or w

        t.distillation._token_weights = watch
        logs = train(t)
        seen[clip] = weighted[-1], logs[-1]
    first = seen[2.0][0]
    assert first.max() <= 2.0 + 1e-6 and first.min() < 0.99 and first.max() > 1.01
    assert seen[1.0][0].max() <= 1.0 + 1e-6
    assert torch.allclose(seen[None][0], torch.ones(()))
    assert seen[None][1]["loss"] == pytest.approx(seen[None][1]["divergence"], abs=1e-6)
    assert seen[2.0][1]["loss"] != pytest.approx(seen[2.0][1]["divergence"], abs=1e-6)


def test_fixed_weight_decay_is_not_scaled(tmp_path):
    """With every gradient zero, AdamW moves by decay alone: lr * wd per step, whatever rho is."""
    ends = {}
    for mode in ("scaled", "fixed"):
        t = trainer(
            tmp_path, alpha=3.0, weight_decay=0.5, learning_rate=1e-2, modulated_weight_decay=mode, max_grad_norm=1e-12
        )
        (log,) = train(t)
        name = "model.layers.0.mlp.up_proj.weight"
        ends[mode] = weights(t.model)[name] / weights(build_model())[name]
    assert log["rho"] > 1.05
    assert ends["fixed"].median().item() == pytest.approx(1 - 1e-2 * 0.5, abs=1e-5)
    assert ends["scaled"].median().item() == pytest.approx(1 - 1e-2 * 0.5 * log["rho"], abs=1e-5)


def test_alpha_schedule_reaches_its_end(tmp_path):
    t = trainer(tmp_path, alpha=0.0, alpha_end=2.0, alpha_steps=2, max_steps=4)
    assert [r["alpha"] for r in train(t)] == [0.0, 1.0, 2.0, 2.0]
