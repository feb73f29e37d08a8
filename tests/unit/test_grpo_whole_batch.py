"""Objective grpo is plain TRL on one whole batch, into however many parts the batch is cut: weights, loss, every metric
and the entropy controller, for every loss of TRL and every term beside the token sum."""

from __future__ import annotations

import pytest
from conftest import build_model
from trainer_kit import (
    build_experts,
    env_mask,
    fake_rollout,
    largest_difference,
    train,
    trainer,
    trl_trainer,
    weights,
)

from pgpo.settings.rules import LOSSES

SGD = dict(objective="grpo", optim="sgd", learning_rate=0.05, max_grad_norm=1e9, max_steps=2)
# Each of them was multiplied by the number of micro-batches, or changed with it.
TERMS = {
    "policy": {},
    "kl": dict(beta=0.2),
    "entropy": dict(entropy_coef=0.3),
    "adaptive": dict(use_adaptive_entropy=True, entropy_coef=0.3, entropy_target=9.0, entropy_coef_delta=0.1),
    "quantile": dict(top_entropy_quantile=0.3, entropy_coef=0.3),
    "routers": dict(router_aux_loss_coef=0.5),
    "off_policy": dict(num_iterations=2, off_policy_mask_threshold=0.05),
    "sequence": dict(importance_sampling_level="sequence", num_iterations=2),
    "many": dict(
        env=True,
        beta=0.2,
        entropy_coef=0.3,
        top_entropy_quantile=0.5,
        router_aux_loss_coef=0.5,
        num_iterations=2,
        learning_rate=0.01,  # the KL term's second gradient is thirty times the first at 0.05, and so is its rounding
    ),
    "environment": dict(env=True, entropy_coef=0.3),
    "truncated": dict(mask_truncated_completions=True, entropy_coef=0.3),
}
NOT_COMPARED = ("seconds", "step_time", "epoch", "runtime", "samples_per_second", "steps_per_second", "train_loss")


def rollout(environment: bool):
    """Completions of which some are cut off, and in which the environment wrote what `env_mask` says."""

    def roll(prompts, t):
        out = fake_rollout(prompts, t)
        out["completion_ids"] = [c[:-1] if i % 5 == 4 else c for i, c in enumerate(out["completion_ids"])]
        out["logprobs"] = [[0.0] * len(c) for c in out["completion_ids"]]
        if environment:
            out["env_mask"] = [env_mask(c) for c in out["completion_ids"]]
        return out

    return roll


def terms(name: str) -> dict:
    return {k: v for k, v in TERMS[name].items() if k != "env"}


def model_of(term: str, path):
    model = build_experts() if "router_aux_loss_coef" in TERMS[term] else build_model()
    if not (path / "model").exists():  # where TRL reads the reference model again
        model.save_pretrained(path / "model")
    return type(model).from_pretrained(path / "model")


def of_trl(path, term: str, **options):
    model, options = model_of(term, path), SGD | options | terms(term)
    return trl_trainer(path, model, rollout("env" in TERMS[term]), **options)


def equal_runs(a, b) -> None:
    assert largest_difference(weights(a.model), weights(b.model)) < 1e-6
    for name in ("entropy_coef", "_last_world_entropy"):
        assert getattr(a, name) == pytest.approx(getattr(b, name), rel=1e-6), name
    assert a._entropy_window_stats is b._entropy_window_stats is None
    ours, theirs = ([r for r in t.state.log_history if "grad_norm" in r] for t in (a, b))
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        assert set(y) - set(x) <= {"entropy_coef"} - set(x)
        for name, value in y.items():
            if not name.endswith(NOT_COMPARED):  # vespo: 1.3e-6, a small difference of large sums
                assert x[name] == pytest.approx(value, rel=2e-6, abs=2e-6, nan_ok=True), name


def check(path, loss_type: str, term: str, sizes: tuple) -> None:
    reference = of_trl(path, term, loss_type=loss_type)
    assert largest_difference(weights(model_of(term, path)), weights(reference.model)) > 1e-4
    for size in sizes:
        t = trainer(
            path,
            model=model_of(term, path),
            rollout=rollout("env" in TERMS[term]),
            loss_type=loss_type,
            micro_batch_size=size,
            **SGD | terms(term),
        )
        parts = []
        plain = t.engine.backward
        t.engine.backward = lambda model, loss, last: parts.append(last) or plain(model, loss, last)  # noqa: B023
        train(t)
        assert len(parts) == t.state.global_step * 16 // (size or 16)
        equal_runs(t, reference)


@pytest.mark.parametrize("term", TERMS)
def test_equal_to_trl_in_one_two_four_and_eight_parts(tmp_path, term):
    check(tmp_path, "dapo", term, (None, 8, 4, 2))


@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_is_equal_to_trl_in_one_and_four_parts(tmp_path, loss_type):
    check(tmp_path, loss_type, "many", (None, 4))


@pytest.mark.parametrize("loss_type", ["dapo", "luspo"])
def test_one_part_is_trl_bit_for_bit_also_where_forward_and_loss_are_apart(tmp_path, loss_type):
    """What remains between several parts and one is the rounding of smaller forwards."""
    reference = of_trl(tmp_path, "many", loss_type=loss_type)
    t = trainer(
        tmp_path,
        model=model_of("many", tmp_path),
        rollout=rollout(True),
        loss_type=loss_type,
        **SGD | terms("many"),
    )
    t.policy.backward = lambda model, batch: t.policy._in_parts(model, batch, [list(range(16))], 1, 1.0)
    train(t)
    assert largest_difference(weights(t.model), weights(reference.model)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("term", TERMS)
@pytest.mark.parametrize("loss_type", LOSSES)
def test_every_loss_with_every_term(tmp_path, loss_type, term):
    check(tmp_path, loss_type, term, (8, 4, 2))


def test_the_token_budget_alone_may_cut_the_batch(tmp_path):
    """Parts of unequal numbers of rows and tokens."""
    reference = of_trl(tmp_path, "many")
    t = trainer(
        tmp_path,
        model=model_of("many", tmp_path),
        rollout=rollout(True),
        max_tokens_per_microbatch=50,
        **SGD | terms("many"),
    )
    train(t)
    equal_runs(t, reference)
