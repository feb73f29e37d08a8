"""Whose information scales a step: the multiplier's rules, and the trainer's steps against steps computed by hand."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import build_model
from trainer_kit import Spy, config, largest_difference, train, trainer, weights

from pgpo.core import ExponentialLaw, SmoothExponentialLaw, divergence, token_entropy
from pgpo.errors import UserError
from pgpo.train.multiplier import BASELINE_WEIGHT, StepMultiplier, pooled

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0)
UNBOUND = dict(alpha=1.5, rho_max=5.0)


def multiplier(path, **options) -> StepMultiplier:
    return StepMultiplier(config(path, **options))


def test_the_papers_source_is_the_batch_itself(tmp_path):
    rho = multiplier(tmp_path, alpha=1.0)
    assert rho(0, 10, 0.3) == [math.exp(0.3)]
    assert rho(1, 10, -0.2) == [math.exp(-0.2)]


def test_lagged_uses_the_steps_before(tmp_path):
    rho = multiplier(tmp_path, information_source="lagged")
    assert [rho(i, 10, v) for i, v in enumerate([0.3, -0.2, 0.1])] == [[1.0], [math.exp(0.3)], [math.exp(-0.2)]]
    smoothed = multiplier(tmp_path, information_source="lagged", information_weight=0.5)
    values = [smoothed(i, 10, v)[0] for i, v in enumerate([0.4, 0.2, 9.0])]
    assert values == pytest.approx([1.0, math.exp(0.4), math.exp(0.3)], rel=1e-15)


def test_the_running_mean_makes_rho_two_sided(tmp_path):
    rho = multiplier(tmp_path, information_baseline="running_mean", rho_min=0.5)
    first, second, third = (rho(i, 10, v)[0] for i, v in enumerate([0.3, 0.5, 0.3]))
    assert (first, second) == (1.0, pytest.approx(math.exp(0.2)))
    assert third == pytest.approx(math.exp(0.3 - (0.3 + BASELINE_WEIGHT * 0.2)))
    assert third < 1
    assert rho(3, 10, -9.0) == [0.5]


def test_halves_have_a_multiplier_each(tmp_path):
    rho = multiplier(tmp_path, information_source="cross_fit", alpha=2.0, rho_max=9.0)
    assert rho(0, 10, 0.2, [0.1, 0.3]) == [math.exp(0.2), math.exp(0.6)]
    assert multiplier(tmp_path, objective="sdpo")(0, 10, 0.7) == [1.0]


def test_the_smooth_law_is_selectable(tmp_path):
    rho = multiplier(tmp_path, rho_law="smooth", alpha=1.5, rho_max=1.6)
    assert rho(0, 10, 0.3) == [SmoothExponentialLaw(1.5, 1.6)(0.3)] != [ExponentialLaw(1.5, 1.6)(0.3)]
    assert multiplier(tmp_path)(0, 10, 0.3) == [ExponentialLaw(1.0)(0.3)]


def test_multipliers_from_a_file(tmp_path):
    file = tmp_path / "rho.json"
    file.write_text("[1.5, 0.5, 1]")
    rho = multiplier(tmp_path, rho_file=str(file), max_steps=3)
    assert [rho(i, 3, 0.7) for i in range(3)] == [[1.5], [0.5], [1.0]]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("[1.0]", "1 multipliers for max_steps = 3"),
        ("[1, NaN, 1]", "finite numbers"),
        ("[1, -1, 1]", "finite numbers"),
        ('["1", 1, 1]', "finite numbers"),
        ("[true, 1, 1]", "finite numbers"),
        ('{"a": 1}', "finite numbers"),
        ("[1,", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_files_are_named(tmp_path, text, match):
    file = tmp_path / "rho.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=match) as caught:
        multiplier(tmp_path, rho_file=str(file), max_steps=3)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (dict(information_source="previous"), "information_source"),
        (dict(information_baseline="mean"), "information_baseline"),
        (dict(rho_law="linear"), "rho_law"),
        (dict(rho_law="smooth", rho_min=0.5), "rho_min"),
        (dict(rho_law="smooth", rho_max=1.0), "rho_max"),
        (dict(information_source="lagged", information_weight=0.0), "information_weight"),
        (dict(information_weight=0.5), "only 'lagged'"),
        (dict(information_source="cross_fit", prompts_per_step=1), "two halves"),
        (dict(rho_file="x.json", objective="sdpo"), "rho_file"),
        (dict(rho_file="x.json", information_source="lagged"), "rho_file"),
    ],
)
def test_combinations_that_cannot_work(tmp_path, options, match):
    with pytest.raises(UserError, match=match):
        config(tmp_path, **options)


def test_state_goes_on_and_does_not_fit_another_signal(tmp_path):
    options = dict(information_source="lagged", information_baseline="running_mean")
    first, second = multiplier(tmp_path, **options), multiplier(tmp_path, **options)
    first(0, 10, 0.3), first(1, 10, 0.1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert second(2, 10, 0.2) == first(2, 10, 0.2)
    with pytest.raises(ValueError, match="baseline"):
        multiplier(tmp_path).load_state_dict(first.state_dict())


# The trainer --------------------------------------------------------------------------------------------------------


def by_hand(t, batch, alpha):
    """Loss gradient and information of each half of the questions, from the initial weights, one row at a time."""
    student, teacher = build_model(), build_model()
    group = t.args.num_generations
    tokens = sum(len(r.completion) for r in t.active_samples(batch))
    results = []
    for half in (0, 1):
        student.zero_grad()
        gap, samples = 0.0, 0
        for i, prompt in enumerate(batch["teacher_prompt_ids"]):
            if int(batch["row"][i]) // group % 2 != half:
                continue
            samples += 1
            if prompt is None:
                continue
            completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
            own = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
            keep = slice(-len(completion) - 1, -1)
            logits = student(input_ids=torch.tensor([own + completion])).logits[0, keep]
            hinted = teacher(input_ids=torch.tensor([prompt + completion])).logits[0, keep].detach()
            (divergence(logits, hinted, top_k=t.args.divergence_top_k).sum() / tokens).backward()
            gap += (token_entropy(logits) - token_entropy(hinted)).mean().item()
        grads = {n: p.grad.clone() for n, p in student.named_parameters()}
        results.append((grads, math.exp(alpha * gap / samples)))
    return results


@pytest.mark.parametrize("micro", [None, 3])
def test_a_cross_fitted_step_is_each_half_times_the_others_rho(tmp_path, micro):
    t = trainer(tmp_path, information_source="cross_fit", max_grad_norm=0.0, micro_batch_size=micro, **SGD, **UNBOUND)
    spy = Spy(t)
    (log,) = train(t)
    (g_a, rho_a), (g_b, rho_b) = by_hand(t, spy.batches[0], 1.5)
    assert abs(rho_a - rho_b) > 0.02  # or the halves could be swapped unseen
    start = weights(build_model())
    expected = {n: start[n] - 0.5 * (rho_b * g_a[n] + rho_a * g_b[n]) for n in start}
    assert largest_difference(weights(t.model), expected) < 2e-6
    swapped = {n: start[n] - 0.5 * (rho_a * g_a[n] + rho_b * g_b[n]) for n in start}
    assert largest_difference(weights(t.model), swapped) > 1e-4
    assert log["rho"] == pytest.approx((rho_a + rho_b) / 2, abs=1e-6)


def test_cross_fitting_logs_the_information_of_the_whole_batch(tmp_path):
    (crossed,) = train(trainer(tmp_path, information_source="cross_fit", **SGD))
    (plain,) = train(trainer(tmp_path, **SGD))
    for name in ("information", "student_entropy", "teacher_entropy", "divergence", "active_share", "loss"):
        assert crossed[name] == pytest.approx(plain[name], abs=1e-6), name


def test_pooling_weighs_by_the_denominator():
    from pgpo.core import Information

    parts = [Information(0.2, 2.0, 1.6, samples=4, hinted_samples=2), Information(0.5, 1.0, 0.5, 12, 1)]
    both = pooled(parts)
    assert both.information == pytest.approx((4 * 0.2 + 12 * 0.5) / 16)
    assert (both.samples, both.hinted_samples) == (16, 3)
    assert both.student_entropy == pytest.approx((2 * 2.0 + 1 * 1.0) / 3)
    assert both.teacher_entropy == pytest.approx((2 * 1.6 + 1 * 0.5) / 3)
    assert pooled(parts, "hinted").information == pytest.approx((2 * 0.2 + 1 * 0.5) / 3)
    empty = Information(0.0, 0.0, 0.0, samples=4, hinted_samples=0)
    assert pooled([empty, empty], "hinted").information == 0.0


def test_lagged_in_the_trainer(tmp_path):
    logs = train(trainer(tmp_path, information_source="lagged", max_steps=4, shuffle_dataset=True, **UNBOUND))
    rho = [log["rho"] for log in logs]
    assert rho == [1.0, *(math.exp(1.5 * log["information"]) for log in logs[:-1])]
    assert len(set(rho)) > 2


def test_replayed_multipliers_scale_the_step(tmp_path):
    file = tmp_path / "rho.json"
    file.write_text("[0.25]")
    replayed = trainer(tmp_path, rho_file=str(file), max_grad_norm=0.0, **SGD)
    plain = trainer(tmp_path, objective="sdpo", max_grad_norm=0.0, **SGD)
    (log,), _ = train(replayed), train(plain)
    start, full, quarter = weights(build_model()), weights(plain.model), weights(replayed.model)
    assert log["rho"] == 0.25 and log["information"] != 0
    expected = {n: start[n] + 0.25 * (full[n] - start[n]) for n in start}
    assert largest_difference(quarter, expected) < 1e-6


# What is logged for the guard ---------------------------------------------------------------------------------------


def log_prob(model, prompt, completion):
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0, -len(completion) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


@torch.no_grad()
def test_gap_of_the_sampled_tokens_and_the_details_of_watched_rows(tmp_path):
    t = trainer(tmp_path, micro_batch_size=3, **SGD)
    spy = Spy(t)
    t.host.watched = set(range(16))
    with torch.enable_grad():
        (log,) = train(t)
    batch, model = spy.batches[0], build_model()
    gaps, wrong = [], []
    for row in t.active_samples(batch):
        student = log_prob(model, row.prompt, row.completion)
        teacher = log_prob(model, row.teacher_prompt, row.completion)
        gap = [a - b for a, b in zip(student, teacher)]
        gaps += gap
        solved = t.last_rollout.rewards[row.index] >= 1
        wrong += [] if solved else gap
        details = t.token_details[row.index]
        assert [d.token for d in details] == row.completion
        assert [d.student_logprob for d in details] == pytest.approx(student, abs=1e-5)
        assert [d.teacher_logprob for d in details] == pytest.approx(teacher, abs=1e-5)
    assert 0 < len(wrong) < len(gaps)
    assert log["sampled_kl"] == pytest.approx(sum(gaps) / len(gaps), abs=1e-5)
    assert log["sampled_kl_wrong"] == pytest.approx(sum(wrong) / len(wrong), abs=1e-5)
    mean = sum(d.divergence for ds in t.token_details.values() for d in ds) / len(gaps)
    assert log["divergence"] == pytest.approx(mean, abs=1e-6)


def test_rows_nobody_watches_are_not_kept(tmp_path):
    t = trainer(tmp_path)
    t.host.watched = {2}
    train(t)
    assert t.token_details.keys() <= {2}


@torch.no_grad()
def test_demonstrations_in_their_own_prompt(tmp_path):
    t = trainer(tmp_path, watch_demonstrations=True, **SGD)
    spy = Spy(t)
    with torch.enable_grad():
        (log,) = train(t)
    batch, model, values = spy.batches[0], build_model(), {}
    completions = {
        int(batch["row"][i]): batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        for i in range(len(batch["row"]))
    }
    rewards = t.last_rollout.rewards
    for i, prompt in enumerate(batch["teacher_prompt_ids"]):
        if prompt is None:
            continue
        row = int(batch["row"][i])
        group = range(row // 4 * 4, row // 4 * 4 + 4)
        demonstration = next(j for j in group if rewards[j] >= 1 and j != row)
        values.setdefault(demonstration, log_prob(model, prompt, completions[demonstration]))
    assert len(values) > 2
    tokens = [v for value in values.values() for v in value]
    assert log["demonstration_logprob"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-5)


def test_demonstrations_are_watched_on_request(tmp_path):
    assert "demonstration_logprob" not in train(trainer(tmp_path, **SGD))[0]


def test_length_tail_is_the_95th_percentile(tmp_path):
    t = trainer(tmp_path)
    spy = Spy(t)
    (log,) = train(t)
    lengths = spy.batches[0]["completion_mask"].sum(1).float()
    assert log["length_tail"] == pytest.approx(torch.quantile(lengths, 0.95).item())
    assert log["length_tail"] > log["completion_length"]
