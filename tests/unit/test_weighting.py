"""`sample_weights`: the rules by hand, and what they do to a step."""

from __future__ import annotations

import math

import pytest
from conftest import build_model
from trainer_kit import (
    GROUP,
    Spy,
    bitwise_equal,
    config,
    environment_rollout,
    largest_difference,
    train,
    trainer,
    weights,
)

from pgpo import UserError
from pgpo.settings.rules import CHOICES
from pgpo.train.rows import active_samples
from pgpo.train.weighting import RULES, weigh

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9, objective="sdpo")


def test_the_rules_by_hand():
    assert tuple(RULES) == CHOICES["sample_weights"]
    right = [True, True, False, False] + [True, False, False, False] + [True] * 4 + [False] * 4
    assert RULES["equal"](right, 4) == [1.0] * 16
    half, quarter = 0.5, math.sqrt(0.25 * 0.75)
    assert RULES["pass_rate"](right, 4) == pytest.approx([half] * 4 + [quarter] * 4 + [0.0] * 8)


def test_weights_have_mean_one_over_those_that_learn():
    right = [True, True, False, False] + [True, False, False, False] + [True] * 4
    hinted = [True] * 4 + [False] + [True] * 7
    found = weigh("pass_rate", hinted, right, 4)
    assert found[4] == 0 and found[8:] == [0] * 4  # without a teacher; all right
    assert sum(found) == pytest.approx(7)
    assert found[0] / found[5] == pytest.approx(0.5 / math.sqrt(0.25 * 0.75))
    assert weigh("equal", hinted, right, 4) == [1.0] * 4 + [0.0] + [1.0] * 7
    assert weigh("pass_rate", [True] * 4, [True] * 4, 4) == [0.0] * 4  # nobody learns


def graded(prompts, completions, **kwargs):
    """Of the step's four questions 2, 1, 3 and all of four completions are right."""
    shares = (2, 1, 3, 4)
    return [float(i % GROUP < shares[i // GROUP]) for i in range(len(prompts))]


def step(path, **options):
    t = trainer(path, reward=graded, **SGD | options)
    spy, start = Spy(t), weights(t.model)
    (log,) = train(t)
    return {n: p - start[n] for n, p in weights(t.model).items()}, log, active_samples(spy.batches[0]), spy.batches[0]


@pytest.mark.parametrize(
    "options",
    [{}, dict(micro_batch_size=3), dict(rollout=environment_rollout)],
    ids=["plain", "micro-batches", "environment"],
)
def test_the_loss_is_the_weighted_mean(options, tmp_path):
    """By linearity: the step is the mean of the steps of the questions alone, each times tokens and weight. Red if the
    weights are those of other rows, if they do not reach the gradient, or if an unhinted group takes part."""
    common = dict(max_tokens_per_microbatch=None) | options
    moved, log, active, batch = step(tmp_path, sample_weights="pass_rate", **common)
    assert {s.index // GROUP for s in active} == {0, 1, 2}
    raw = {0: 0.5, 1: math.sqrt(0.25 * 0.75), 2: math.sqrt(0.25 * 0.75)}
    hinted = [s.index // GROUP for s in active]
    # Hinted samples without a token of the model's own count in the mean, too.
    rows, prompts = batch["row"].tolist(), batch["teacher_prompt_ids"]
    counted = [row // GROUP for row, prompt in zip(rows, prompts, strict=True) if prompt is not None]
    mean = sum(raw[q] for q in counted) / len(counted)
    expected = {n: 0.0 * p for n, p in moved.items()}
    total = sum(len(s.labels) for s in active)
    for question in range(3):

        def alone(s, question=question):
            return s.index // GROUP == question

        t = trainer(tmp_path, reward=graded, **SGD | common)
        t.active_samples = lambda batch, keep=alone: [s for s in active_samples(batch) if keep(s)]
        start = weights(t.model)
        train(t)
        tokens = sum(len(s.labels) for s in active if alone(s))
        for n, p in weights(t.model).items():
            expected[n] = expected[n] + (p - start[n]) * (tokens / total) * (raw[question] / mean)
    assert set(hinted) == {0, 1, 2} and largest_difference(moved, expected) < 2e-6
    equal = step(tmp_path, **common)[0]
    assert largest_difference(moved, equal) > 1e-4
    assert log["active_share"] == pytest.approx(len(active) / 16)


def test_where_no_question_is_between_nobody_learns(tmp_path):
    def all_or_none(prompts, completions, **kwargs):
        return [float(i // GROUP % 2) for i in range(len(prompts))]

    t = trainer(tmp_path, reward=all_or_none, **SGD | dict(sample_weights="pass_rate"))
    train(t)
    assert bitwise_equal(weights(t.model), weights(build_model()))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(sample_weights="p"), "choose one of equal, pass_rate"),
        (dict(sample_weights="pass_rate", objective="grpo"), "objective='grpo' has no teacher"),
        (dict(sample_weights="pass_rate", num_generations=1, allow_own_success=True), "passed by all or by none"),
    ],
)
def test_refused(options, says, tmp_path):
    with pytest.raises(UserError, match=says):
        config(tmp_path, **options)
