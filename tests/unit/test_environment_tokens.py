"""Tokens of an environment (`env_mask` of a rollout function) stand in the context and count for nothing."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import build_model
from trainer_kit import (
    GROUP,
    Spy,
    env_mask,
    environment_rollout,
    fake_rollout,
    largest_difference,
    train,
    trainer,
    weights,
)

from pgpo import UserError
from pgpo.core import divergence, token_entropy
from pgpo.train.rows import Sample, own_places

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9, divergence_top_k=0)


def reference(batch):
    """The step by plain forwards, one row at a time: (loss, I, tokens, rows, student with its gradient)."""
    student, teacher = build_model(), build_model()
    rows = []
    for i, teacher_prompt in enumerate(batch["teacher_prompt_ids"]):
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        own = torch.tensor(env_mask(completion)).bool()
        if teacher_prompt is None or not own.any():
            continue
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        s, t = (
            model(input_ids=torch.tensor([[*start, *completion]])).logits[0, len(start) - 1 : -1][own]
            for model, start in ((student, prompt), (teacher, teacher_prompt))
        )
        rows.append((s, t.detach(), torch.tensor(completion)[own]))
    tokens = sum(len(s) for s, _, _ in rows)
    loss = sum(divergence(s, t, kind="jsd").sum() for s, t, _ in rows) / tokens
    gaps = [(token_entropy(s.detach()) - token_entropy(t)).mean().item() for s, t, _ in rows]
    loss.backward()
    return loss.item(), sum(gaps) / len(batch["teacher_prompt_ids"]), tokens, rows, student


@pytest.mark.parametrize("objective", ["pgpo", "sdpo"])
@pytest.mark.parametrize(
    "path",
    [
        {},
        dict(micro_batch_size=1),
        dict(micro_batch_size=3, share_teacher_prompts=False),
        dict(join_siblings=True, max_tokens_per_microbatch=60),
        dict(packing=True, join_siblings=False),
        dict(fused_head=False),
    ],
    ids=str,
)
def test_a_step_takes_the_models_own_tokens_alone(tmp_path, objective, path):
    t = trainer(tmp_path, rollout=environment_rollout, objective=objective, alpha=1.5, **SGD | path)
    spy = Spy(t)
    (log,) = train(t)
    loss, information, tokens, rows, student = reference(spy.batches[0])
    assert 0 < len(rows) < sum(p is not None for p in spy.batches[0]["teacher_prompt_ids"])
    assert log["loss"] == pytest.approx(loss, rel=1e-5)
    assert log["divergence"] == pytest.approx(loss, rel=1e-5)
    assert log["information"] == pytest.approx(information, abs=1e-6)
    assert log["active_tokens"] == tokens
    assert log["active_share"] == pytest.approx(len(rows) / (4 * GROUP))
    gap = [s.log_softmax(-1) - t.log_softmax(-1) for s, t, _ in rows]
    sampled = sum(g.gather(-1, y[:, None]).sum().item() for g, (_, _, y) in zip(gap, rows, strict=True))
    assert log["sampled_kl"] == pytest.approx(sampled / tokens, abs=1e-5)
    rho = math.exp(1.5 * information) if objective == "pgpo" else 1.0
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.5 * rho * p.grad
    assert largest_difference(weights(t.model), weights(student)) < 1e-5
    # It can fail: without the mask the step is another.
    plain = trainer(tmp_path, objective=objective, alpha=1.5, **SGD)
    train(plain)
    assert largest_difference(weights(plain.model), weights(student)) > 1e-3


@pytest.mark.parametrize(
    "options", [{}, dict(num_iterations=2), dict(information_source="lagged"), dict(information_source="cross_fit")]
)
def test_the_split_changes_nothing(tmp_path, options):
    """Also on off-policy tokens, whose ratios are taken at the own tokens."""
    options = SGD | dict(rollout=environment_rollout, max_steps=2, watch_demonstrations=True) | options
    whole, parts = trainer(tmp_path, **options), trainer(tmp_path, micro_batch_size=2, **options)
    one, many = train(whole), train(parts)
    assert largest_difference(weights(whole.model), weights(parts.model)) < 1e-5
    for a, b in zip(one, many, strict=True):
        for name in ("information", "rho", "loss", "divergence", "active_tokens", "sampled_kl", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=2e-6), name


def test_ratios_belong_to_the_own_tokens(tmp_path):
    """[B, T] of the batch -> [N] of the row, by value."""
    t = trainer(tmp_path, rollout=environment_rollout, num_iterations=2, max_steps=1, **SGD)
    spy = Spy(t)
    train(t)
    batch = spy.batches[0]
    grid = torch.arange(batch["completion_ids"].numel()).reshape(batch["completion_ids"].shape).float()
    batch |= {"old_per_token_logps": grid, "importance_sampling_ratio": grid + 0.5}
    for row in t.active_samples(batch):
        (i,) = (batch["row"] == row.index).nonzero()[0].tolist()
        own = [j for j, kept in enumerate(env_mask(row.completion)) if kept]
        assert row.labels == [row.completion[j] for j in own]
        assert row.rollout_logprobs.tolist() == [grid[i, j].item() for j in own]
        assert row.weight.tolist() == [grid[i, j].item() + 0.5 for j in own]


def test_details_lengths_and_watched_demonstrations(tmp_path):
    t = trainer(tmp_path, rollout=environment_rollout, watch_demonstrations=True, **SGD)
    spy = Spy(t)
    t.host.watched = set(range(4 * GROUP))
    seen = []
    labels = t.distillation._labels
    t.distillation._labels = lambda rows: seen.append([(r.completion, r.labels) for r in rows]) or labels(rows)
    (log,) = train(t)
    for row in t.active_samples(spy.batches[0]):
        assert [d.token for d in t.token_details[row.index]] == row.labels
    shown = seen[0]  # the demonstrations come first
    assert shown and all(own == [c for c, k in zip(tokens, env_mask(tokens)) if k] for tokens, own in shown)
    mask = spy.batches[0]["completion_mask"].bool()
    lengths = [
        float(sum(env_mask(ids[m].tolist()))) for ids, m in zip(spy.batches[0]["completion_ids"], mask, strict=True)
    ]
    assert log["completion_length"] == pytest.approx(sum(lengths) / len(lengths))
    assert log["length_tail"] == pytest.approx(torch.tensor(lengths).quantile(0.95).item())


def test_only_tokens_of_the_environment_move_nothing(tmp_path):
    def silent(prompts, t):
        out = fake_rollout(prompts, t)
        return {**out, "env_mask": [[0] * len(c) for c in out["completion_ids"]]}

    t = trainer(tmp_path, rollout=silent, watch_demonstrations=True, **SGD)
    (log,) = train(t)
    assert largest_difference(weights(t.model), weights(build_model())) == 0
    assert (log["information"], log["rho"], log["active_tokens"]) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("environment", [False, True])
def test_truncated_completions_are_left_out_and_keep_their_length(tmp_path, environment):
    """mask_truncated_completions, with and without an environment; a truncated demonstration too."""

    def cut(prompts, t):
        out = fake_rollout(prompts, t)
        ids = [c[:-1] if i % 2 else c for i, c in enumerate(out["completion_ids"])]
        return {**out, "completion_ids": ids, **({"env_mask": [[1] * len(c) for c in ids]} if environment else {})}

    options = dict(rollout=cut, watch_demonstrations=True, mask_truncated_completions=True, **SGD)
    t = trainer(tmp_path, reward=lambda prompts, **_: [1.0] * len(prompts), **options)
    spy = Spy(t)
    (log,) = train(t)
    assert log["active_share"] == 0.5
    ended = {i for i, ids in enumerate(spy.batches[0]["completion_ids"]) if 1 in ids.tolist()}
    assert log["active_tokens"] == sum(len(r.completion) for r in t.active_samples(spy.batches[0]))
    assert len(t.active_samples(spy.batches[0])) == len(ended) == 2 * GROUP
    lengths = torch.tensor([float((ids != 0).sum()) for ids in spy.batches[0]["completion_ids"]])
    assert log["length_tail"] == pytest.approx(lengths.quantile(0.95).item())


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (lambda ids: [[1] * len(c) for c in ids][1:], r"returned 15 rows of env_mask for 16 completions at step 1"),
        (lambda ids: [[1] * (len(c) + 1) for c in ids], r"env_mask of \d values for the \d tokens of sample 0 at step"),
        (lambda ids: [[2] * len(c) for c in ids], "the value 2 in the env_mask of sample 0 at step 1"),
        (lambda ids: [[0.5] * len(c) for c in ids], "the value 0.5 in the env_mask of sample 0"),
    ],
)
@pytest.mark.parametrize("objective", ["pgpo", "grpo"])
def test_an_env_mask_that_fits_no_token_is_refused(tmp_path, objective, masks, message):
    def wrong(prompts, t):
        out = fake_rollout(prompts, t)
        return {**out, "env_mask": masks(out["completion_ids"])}

    with pytest.raises(UserError, match=message):
        train(trainer(tmp_path, rollout=wrong, objective=objective))


@pytest.mark.parametrize("kind", [bool, float, torch.tensor])
def test_masks_of_any_kind_are_taken(tmp_path, kind):
    def roll(prompts, t):
        out = environment_rollout(prompts, t)
        masks = out["env_mask"]
        return {**out, "env_mask": [kind(m) if kind is torch.tensor else [kind(v) for v in m] for m in masks]}

    t, plain = trainer(tmp_path, rollout=roll, **SGD), trainer(tmp_path, rollout=environment_rollout, **SGD)
    train(t), train(plain)
    assert largest_difference(weights(t.model), weights(plain.model)) == 0


def test_places_of_own_tokens_by_hand():
    rows = [Sample([1], [1], [5, 6, 7], own=[0, 2]), Sample([1], [1], [8, 9]), Sample([1], [1], [4, 3], own=[1])]
    assert own_places(rows).tolist() == [0, 2, 3, 4, 6]
    assert own_places(rows[1:2]) is None
    assert [r.labels for r in rows] == [[5, 7], [8, 9], [3]]
