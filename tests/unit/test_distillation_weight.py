"""`distillation_weight`: a share of self-distillation and the rest of TRL's policy loss, in one step."""

from __future__ import annotations

import pytest
import torch
from conftest import build_model
from trainer_kit import (
    Spy,
    bitwise_equal,
    build_experts,
    config,
    environment_rollout,
    fake_rollout,
    largest_difference,
    train,
    trainer,
    weights,
)

from pgpo import UserError

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9)


def moved(path, **options):
    t = trainer(path, **SGD | dict(objective="sdpo") | options)
    start = weights(t.model)
    (log,) = train(t)
    return {n: p - start[n] for n, p in weights(t.model).items()}, log


@pytest.mark.parametrize("loss_type", ["dapo", "grpo", "bnpo"])
@pytest.mark.parametrize("split", [{}, dict(micro_batch_size=3), dict(max_tokens_per_microbatch=40)], ids=str)
def test_the_step_is_the_mix_of_the_two_steps(tmp_path, split, loss_type):
    pure, told = moved(tmp_path, rollout=environment_rollout)  # which refuses a loss_type
    options = dict(loss_type=loss_type, rollout=environment_rollout)
    policy, paid = moved(tmp_path, objective="grpo", **options)
    mixed, log = moved(tmp_path, distillation_weight=0.3, **options | split)
    expected = {n: 0.3 * pure[n] + 0.7 * policy[n] for n in pure}
    assert largest_difference(mixed, expected) < 1e-6
    assert largest_difference(pure, policy) > 1e-3
    assert log["loss"] == pytest.approx(0.3 * told["loss"] + 0.7 * paid["loss"], abs=2e-6)
    assert log["policy_loss"] == pytest.approx(paid["loss"], abs=2e-6)
    for name in ("information", "divergence", "student_entropy", "teacher_entropy", "active_share", "sampled_kl"):
        assert log[name] == pytest.approx(told[name], abs=1e-6)  # of the distillation alone


def test_weight_zero_moves_as_grpo_and_one_as_before(tmp_path):
    policy, _ = moved(tmp_path, objective="grpo")
    assert largest_difference(moved(tmp_path, distillation_weight=0.0)[0], policy) < 1e-6
    runs = []
    for options in (dict(distillation_weight=1.0), {}):
        t = trainer(tmp_path, objective="sdpo", max_steps=2, **options)
        logs = train(t)
        runs.append((weights(t.model), logs[0].keys()))  # one after the other: a trainer seeds what it shuffles by
    assert bitwise_equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1] and "policy_loss" not in runs[0][1]


def test_rho_scales_the_mixed_step(tmp_path):
    mixed, _ = moved(tmp_path, distillation_weight=0.5)
    scaled, log = moved(tmp_path, objective="pgpo", alpha=1.5, distillation_weight=0.5)
    assert log["rho"] > 1.05
    assert largest_difference(scaled, {n: log["rho"] * p for n, p in mixed.items()}) < 1e-5


def test_rows_without_a_teacher_learn_from_their_reward(tmp_path):
    """Feedback-free failure of everybody: nobody teaches, but rewards below success differ, and the teacher follows."""

    def partial(prompts, completions, **_):
        return [0.5 * (len(c[0]["content"].split()) % 2) for c in completions]

    still, log = moved(tmp_path, reward=partial)
    assert log["active_tokens"] == 0 and all(p.abs().max() == 0 for p in still.values())
    policy, _ = moved(tmp_path, reward=partial, objective="grpo")
    t = trainer(tmp_path, reward=partial, objective="sdpo", distillation_weight=0.25, teacher_rate=0.5, **SGD)
    train(t)
    start = weights(build_model())
    assert largest_difference(weights(t.model), {n: start[n] + 0.75 * policy[n] for n in start}) < 1e-6
    assert largest_difference(weights(t.teacher.module), start) > 1e-4


def test_routers_in_both_parts(tmp_path):
    options = dict(router_aux_loss_coef=0.5)
    pure, policy = (
        moved(tmp_path, model=build_experts(), objective=objective, **options)[0] for objective in ("sdpo", "grpo")
    )
    mixed, log = moved(tmp_path, model=build_experts(), distillation_weight=0.3, micro_batch_size=4, **options)
    assert largest_difference(mixed, {n: 0.3 * pure[n] + 0.7 * policy[n] for n in pure}) < 1e-5
    assert log["aux_loss"] > 1


def test_no_forward_of_the_policy_exceeds_the_token_budget(tmp_path):
    t = trainer(tmp_path, objective="sdpo", distillation_weight=0.5, max_tokens_per_microbatch=60, **SGD)
    t.distillation.forwards._checked = True
    seen = []
    plain = t.grpo_scores
    t.grpo_scores = lambda model, part: (
        seen.append(part["prompt_ids"].numel() + part["completion_ids"].numel()) or plain(model, part)
    )
    train(t)
    assert len(seen) > 1 and max(seen) <= 60


def test_a_nan_advantage_stops_the_step(tmp_path):
    t = trainer(tmp_path, objective="sdpo", distillation_weight=0.5, rollout=fake_rollout, **SGD)
    spy = Spy(t)
    plain = t.optimize

    def optimize(model, batch):
        return plain(model, {**batch, "advantages": torch.full_like(batch["advantages"], torch.nan)})

    t.optimize = optimize
    with pytest.raises(UserError, match="gradient norm is nan"):
        train(t)
    assert spy.batches and bitwise_equal(weights(t.model), weights(build_model()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(distillation_weight=1.5), r"distillation_weight is 1.5; a share of the loss must lie in \[0, 1\]"),
        (dict(distillation_weight=float("nan")), "distillation_weight is nan; it must be a finite"),
        (dict(distillation_weight=0.5, objective="grpo"), "objective='grpo' has no distillation"),
        (dict(distillation_weight=0.5, information_source="cross_fit"), "the policy loss has no halves"),
        (dict(distillation_weight=0.5, loss_type="ppo"), "loss_type is 'ppo'; choose one of"),
    ],
)
def test_what_cannot_be_mixed_is_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, **options)
