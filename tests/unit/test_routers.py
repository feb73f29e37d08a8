"""The router loss of a mixture of experts: once per step, of the student's forwards alone, whatever the split."""

from __future__ import annotations

import pytest
import torch
from conftest import build_model
from trainer_kit import Spy, bitwise_equal, build_experts, largest_difference, train, trainer, weights
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from pgpo import UserError
from pgpo.core import divergence
from pgpo.forward.open_model import open_forward
from pgpo.forward.passes import Passes
from pgpo.forward.routers import load

SGD = dict(optim="sgd", learning_rate=0.5, weight_decay=0.0, max_grad_norm=1e9, divergence_top_k=0, objective="sdpo")
COEFFICIENT = 0.5


@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_a_forward_is_transformers(masked):
    torch.manual_seed(0)
    logits = tuple(torch.randn(15, 4, dtype=torch.float64).requires_grad_() for _ in range(3))
    mask = (torch.arange(5) < torch.tensor([[5], [2], [4]])).long() if masked else None
    expected = load_balancing_loss_func(logits, 4, 2, mask)
    gradients = torch.autograd.grad(expected, logits)
    got = load(logits, 2, mask).loss()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(torch.autograd.grad(got, logits), gradients)


def test_shares_of_parts_add_up_in_value_and_gradient():
    torch.manual_seed(0)
    logits = torch.randn(12, 4).requires_grad_()
    whole = load([logits], 2).loss()
    (gradient,) = torch.autograd.grad(whole, logits)
    parts = [load([logits[part]], 2) for part in (slice(0, 3), slice(3, 4), slice(4, 12))]
    total = parts[0] + parts[1] + parts[2]
    shares = sum(part.loss(total) for part in parts)
    assert shares.item() == pytest.approx(whole.item(), rel=1e-6)
    known = load([logits.detach()], 2)
    (summed,) = torch.autograd.grad(sum(part.loss(known) for part in parts), logits)
    torch.testing.assert_close(summed, gradient)
    # The mean of the parts' own losses, as a plain split would have it, is another number.
    assert abs(sum(part.loss() for part in parts).item() / 3 - whole.item()) > 1e-2


def reference(batch, coefficient: float):
    """The step by plain forwards, one row at a time: (divergence, router loss, stepped student)."""
    student, teacher = build_experts(), build_experts()
    total, tokens, routed = 0.0, 0, [[], []]
    for i, teacher_prompt in enumerate(batch["teacher_prompt_ids"]):
        if teacher_prompt is None:
            continue
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()].tolist()
        ids = torch.tensor([[*prompt, *completion[:-1]]])
        out = student(input_ids=ids, output_router_logits=True)
        told = teacher(input_ids=torch.tensor([[*teacher_prompt, *completion[:-1]]])).logits
        s, t = out.logits[0, len(prompt) - 1 :], told[0, len(teacher_prompt) - 1 :].detach()
        total = total + divergence(s, t, kind="jsd").sum()
        tokens += len(completion)
        for layer, logits in zip(routed, out.router_logits, strict=True):
            layer.append(logits)
    balance = load_balancing_loss_func(tuple(torch.cat(layer) for layer in routed), 4, 2)
    (total / tokens + coefficient * balance).backward()
    with torch.no_grad():
        for p in student.parameters():
            p -= 0.5 * p.grad
    return (total / tokens).item(), balance.item(), student


@pytest.mark.parametrize(
    "path",
    [
        {},
        dict(micro_batch_size=1),
        dict(micro_batch_size=3, share_teacher_prompts=False),
        dict(join_siblings=True),
        dict(join_siblings=True, max_tokens_per_microbatch=60),
        dict(packing=True, join_siblings=False),
        dict(packing=True, join_siblings=False, max_tokens_per_microbatch=60),
        dict(fused_head=False, micro_batch_size=4),
        dict(gradient_checkpointing=True, micro_batch_size=4),
        dict(teacher="live", micro_batch_size=4),
    ],
    ids=str,
)
def test_a_step_with_routers(tmp_path, path):
    t = trainer(tmp_path, model=build_experts(), router_aux_loss_coef=COEFFICIENT, **SGD | path)
    spy = Spy(t)
    (log,) = train(t)
    distance, balance, student = reference(spy.batches[0], COEFFICIENT)
    assert log["divergence"] == pytest.approx(distance, rel=1e-5)
    assert log["aux_loss"] == pytest.approx(balance, rel=1e-5)
    assert log["loss"] == pytest.approx(distance + COEFFICIENT * balance, rel=1e-5)
    assert largest_difference(weights(t.model), weights(student)) < 1e-5
    # It can fail: without the router loss the step is another.
    assert largest_difference(weights(reference(spy.batches[0], 0.0)[2]), weights(student)) > 1e-3


def test_whole_logits_have_routers_too(tmp_path):
    """A model whose head is none of ours: its own forward, the same load."""
    ends = []
    for whole in (False, True):
        t = trainer(
            tmp_path, model=build_experts(), router_aux_loss_coef=COEFFICIENT, micro_batch_size=4, **SGD,
            share_teacher_prompts=False,
        )  # fmt: skip
        t.passes.whole_logits = whole
        ends.append((train(t)[0]["aux_loss"], weights(t.model)))
    assert ends[0][0] == pytest.approx(ends[1][0], rel=1e-6)
    assert largest_difference(ends[0][1], ends[1][1]) < 1e-5


@pytest.mark.parametrize("options", [dict(information_source="cross_fit"), dict(alpha=2.0), dict(num_iterations=2)])
def test_the_split_changes_nothing(tmp_path, options):
    options = SGD | dict(objective="pgpo", max_steps=2, router_aux_loss_coef=COEFFICIENT) | options
    runs = [trainer(tmp_path, model=build_experts(), micro_batch_size=size, **options) for size in (None, 2)]
    one, many = (train(t) for t in runs)
    assert largest_difference(*(weights(t.model) for t in runs)) < 1e-5
    for a, b in zip(one, many, strict=True):
        for name in ("aux_loss", "information", "rho", "loss", "grad_norm"):
            assert a[name] == pytest.approx(b[name], abs=5e-6), name


def test_dropout_is_the_same_in_the_pass_that_counts(tmp_path):
    """The load that scales the gradient belongs to the very forwards that carry it."""
    model = build_experts()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    t = trainer(tmp_path, model=model, router_aux_loss_coef=COEFFICIENT, micro_batch_size=4, **SGD)
    seen, plain = [], t.distillation._load_of_step
    t.distillation._load_of_step = lambda *args: seen.append(plain(*args)) or seen[-1]
    (log,) = train(t)
    assert log["aux_loss"] == pytest.approx(seen[0].loss().item(), rel=1e-6)


def test_off_means_off(tmp_path):
    """Coefficient 0: no load is measured, nothing is logged; None: the architecture's own coefficient."""
    t = trainer(tmp_path, model=build_experts(), router_aux_loss_coef=0.0, micro_batch_size=4, **SGD)
    t.distillation._load_of_step = None
    (log,) = train(t)
    assert "aux_loss" not in log
    assert log["loss"] == pytest.approx(log["divergence"], rel=1e-5)
    own = trainer(tmp_path, model=build_experts(), **SGD)
    assert own.router_aux_loss_coef == 0.001 and "aux_loss" in train(own)[0]
    assert not bitwise_equal(weights(own.model), weights(t.model))


def test_nobody_teaches_no_router(tmp_path):
    def nobody(prompts, **_):
        return [0.0] * len(prompts)

    t = trainer(tmp_path, model=build_experts(), reward=nobody, router_aux_loss_coef=COEFFICIENT, **SGD)
    (log,) = train(t)
    assert log["aux_loss"] == 0
    assert bitwise_equal(weights(t.model), weights(build_experts()))


@pytest.mark.parametrize("objective", ["sdpo", "grpo"])
def test_routers_that_nobody_can_count_are_refused(tmp_path, objective):
    model = build_model()
    model.config.output_router_logits = False
    with pytest.raises(UserError, match=r"no num_experts, which their loss needs; set router_aux_loss_coef=0\."):
        trainer(tmp_path, model=model, **SGD | dict(objective=objective, router_aux_loss_coef=0.1))


def test_a_joined_prompt_counts_once_per_completion():
    model = build_experts().eval()
    open_forward(model)
    passes = Passes(model, 0, torch.device("cpu"))
    prompts, completions = [[2, 10, 3]] * 3, [[20, 21, 1], [22, 1], [23, 24, 25, 1]]
    found = []
    for counts in ([3], [1, 1, 1], [2, 1]):
        loads: list = []
        passes.forward(model, prompts, completions, lambda hidden, head: hidden, counts, loads)
        found.append(loads[0])
    for other in found[1:]:
        assert other.tokens == found[0].tokens == 2 * (3 * 3 + 2 + 1 + 3)
        assert torch.equal(other.chosen, found[0].chosen)
        torch.testing.assert_close(other.probability, found[0].probability)
