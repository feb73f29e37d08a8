"""Earlier information and cross-fitting, by hand-computed numbers and against plain steps of torch's optimizers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pgpo.core import CrossFit, EarlierInformation, modulate


def test_the_average_is_of_earlier_steps_only():
    earlier = EarlierInformation(0.25)
    assert earlier.exchange(1.0) is None  # nothing before the first step
    assert earlier.exchange(3.0) == 1.0
    assert earlier.exchange(100.0) == 1.5  # 1 + .25 (3 - 1)
    assert EarlierInformation().weight == 1.0


def test_weight_one_is_the_previous_step_exactly():
    earlier = EarlierInformation()
    values = [0.1, 0.3, -0.7, 1e-9]
    assert [earlier.exchange(v) for v in values] == [None, *values[:-1]]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_value_is_not_remembered(bad):
    earlier = EarlierInformation()
    earlier.exchange(0.5)
    with pytest.raises(ValueError, match="finite entropy gap"):
        earlier.exchange(bad)
    assert earlier.exchange(0.6) == 0.5


@pytest.mark.parametrize("weight", [0, -0.1, 1.1, math.nan])
def test_weights_outside_the_range_are_refused(weight):
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        EarlierInformation(weight)


def test_the_average_goes_on_from_its_state():
    first, second = EarlierInformation(0.5), EarlierInformation(0.5)
    first.exchange(1.0), first.exchange(2.0)
    second.load_state_dict(first.state_dict())
    assert second.exchange(0.0) == first.exchange(0.0) == 1.5
    with pytest.raises(ValueError, match="weight"):
        EarlierInformation(0.4).load_state_dict(first.state_dict())


def parameters(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=generator)) for shape in ((3,), (2, 2))]


def halves(ps, parts=("a", "b")):
    """Losses of two half-batches with unlike gradients."""
    x, y = ps
    return [{"a": (x**3).sum() + y.sin().sum(), "b": (x * 2).cos().sum() - (y**2).sum()}[part] for part in parts]


def gradient(loss, ps):
    return torch.autograd.grad(loss, ps)


def step(ps, optimizer, rho_a, rho_b):
    loss_a, loss_b = halves(ps)
    cross, handle = CrossFit(ps), modulate(optimizer)
    loss_a.backward()
    cross.stash()
    loss_b.backward()
    handle.arm(cross.combine(rho_a, rho_b))
    optimizer.step()


@pytest.mark.parametrize(("rho_a", "rho_b"), [(1.7, 0.4), (0.0, 2.0), (2.0, 0.0), (0.0, 0.0), (10.0, 1e-3)])
def test_sgd_moves_by_each_half_times_the_others_multiplier(rho_a, rho_b):
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    g_a, g_b = (gradient(loss, ps) for loss in halves(ps))
    step(ps, torch.optim.SGD(ps, lr=0.1), rho_a, rho_b)
    for p, old, a, b in zip(ps, before, g_a, g_b, strict=True):
        torch.testing.assert_close(p.detach(), old - 0.1 * (rho_b * a + rho_a * b), rtol=1e-14, atol=1e-14)
        assert rho_a + rho_b > 0 or torch.equal(p, old)


def test_equal_multipliers_are_the_plain_modulated_step_bit_for_bit():
    crossed, plain = parameters(), parameters()
    step(crossed, torch.optim.AdamW(crossed, lr=0.1), 1.3, 1.3)
    optimizer = torch.optim.AdamW(plain, lr=0.1)
    handle = modulate(optimizer)
    loss_a, loss_b = halves(plain)
    g_a, g_b = gradient(loss_a, plain), gradient(loss_b, plain)
    for p, a, b in zip(plain, g_a, g_b, strict=True):
        p.grad = b + a
    handle.arm(1.3)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(crossed, plain, strict=True))


def test_adam_sees_the_balance_and_modulate_the_size():
    """Doubling both multipliers doubles Adam's step, which a scaled gradient alone would not."""
    moves = []
    for scale in (1.0, 2.0):
        ps = parameters()
        before = [p.detach().clone() for p in ps]
        step(ps, torch.optim.Adam(ps, lr=0.1), 0.9 * scale, 0.3 * scale)
        moves.append([p.detach() - old for p, old in zip(ps, before, strict=True)])
    for one, two in zip(*moves, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("silent", ["first", "second"])
def test_a_parameter_without_gradient_in_one_half(silent):
    ps = parameters()
    x, y = ps
    cross = CrossFit(ps)
    (x.sum() if silent == "first" else x.sum() + y.sum()).backward()
    cross.stash()
    (x.sum() if silent == "second" else x.sum() + y.sum()).backward()
    assert cross.combine(2.0, 1.0) == 1.5
    weight = {"first": 2.0, "second": 1.0}[silent] / 1.5  # y has one half's gradient, times the other's multiplier
    torch.testing.assert_close(y.grad, torch.full_like(y, weight))
    torch.testing.assert_close(x.grad, torch.full_like(x, 2.0))


def test_frozen_parameters_are_left_out():
    ps = parameters()
    ps[1].requires_grad_(False)
    assert CrossFit(ps).parameters == [ps[0]]


def test_the_protocol_is_checked():
    ps = parameters()
    cross = CrossFit(ps)
    with pytest.raises(RuntimeError, match="without stash"):
        cross.combine(1.0, 1.0)
    halves(ps)[0].backward()
    cross.stash()
    assert all(p.grad is None for p in ps)
    with pytest.raises(RuntimeError, match="twice"):
        cross.stash()
    halves(ps)[1].backward()
    kept = [p.grad.clone() for p in ps]
    with pytest.raises(ValueError, match="rho_b is nan"):
        cross.combine(1.0, math.nan)
    assert all(torch.equal(p.grad, g) for p, g in zip(ps, kept, strict=True))
    cross.discard()
    with pytest.raises(RuntimeError, match="without stash"):
        cross.combine(1.0, 1.0)
