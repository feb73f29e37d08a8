"""How far a step moved the policy, whether gradients agree, and the clip at a running mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgpo.core import AdaptiveClip, Agreement, gradient_cosine, kl_moved, token_mean
from tests.oracles import numerics as oracle

torch.manual_seed(0)


def logits(rows: int, vocabulary: int, seed: int = 0) -> Tensor:
    return 2 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(rows: int, vocabulary: int, distance: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities before and after a move of the logits."""
    before = logits(rows, vocabulary)
    return before.log_softmax(-1), (before + distance * logits(rows, vocabulary, 1)).log_softmax(-1)


def top(before: Tensor, after: Tensor, k: int) -> tuple[Tensor, Tensor]:
    kept, index = before.topk(k, -1)
    return kept, after.gather(-1, index)


# The three forms of K ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", [1e-3, 0.1, 3.0])
def test_all_tokens_by_value(distance: float) -> None:
    """Red if the two are exchanged: KL(after || before) differs by far more than this tolerance at distance 3."""
    before, after = pair(5, 7, distance)
    expected = [
        float(oracle.kl(*(oracle.probabilities(z) for z in row))) for row in zip(before.tolist(), after.tolist())
    ]
    assert kl_moved(before, after).tolist() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_most_likely_tokens_by_value(k: int) -> None:
    """Red if the kept tokens are those most likely AFTER, or without the bucket for the rest."""
    before, after = pair(5, 7, 1.0)
    expected = [
        float(oracle.kl(*oracle.top_k(oracle.probabilities(p), oracle.probabilities(q), k, tail=True)))
        for p, q in zip(before.tolist(), after.tolist())
    ]
    assert kl_moved(*top(before, after, k), kept="top").tolist() == pytest.approx(expected, rel=1e-7)


def sampled_expectation(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """Exact mean and variance of the sampled form over its one draw per position, by enumeration of the vocabulary."""
    draws, p = kl_moved(before, after, kept="sampled"), before.exp()
    mean = (p * draws).sum(-1)
    return mean, (p * draws.square()).sum(-1) - mean**2


@pytest.mark.parametrize("distance", [1e-3, 0.1, 1.0])
def test_sampled_tokens_are_unbiased_and_never_negative(distance: float) -> None:
    """Red for KL(after || before)'s estimator (r log r - r + 1) and the plain log ratio, negative in single draws."""
    before, after = pair(50, 40, distance)
    mean, _ = sampled_expectation(before, after)
    assert mean.tolist() == pytest.approx(kl_moved(before, after).tolist(), rel=1e-9)
    assert bool((kl_moved(before, after, kept="sampled") >= 0).all())


def test_sampled_tokens_have_less_variance_than_the_plain_log_ratio() -> None:
    """What the control variate buys: near the old policy the plain estimate is all noise."""
    before, after = pair(50, 40, 0.05)
    p, plain = before.exp(), before - after
    _, variance = sampled_expectation(before, after)
    plain_variance = (p * plain.square()).sum(-1) - (p * plain).sum(-1) ** 2
    assert float(variance.mean()) < 0.01 * float(plain_variance.mean())


@pytest.mark.parametrize(("k", "worst"), [(1, 0.8), (8, 0.27), (20, 0.06)])
def test_bias_of_the_most_likely_tokens_falls_with_their_number(k: int, worst: float) -> None:
    """Bounds from one measurement, a third above it. Never above the exact value: merging tokens loses information."""
    before, after = pair(200, 40, 0.1)
    exact, kept = kl_moved(before, after), kl_moved(*top(before, after, k), kept="top")
    assert bool((kept <= exact * (1 + 1e-9)).all())
    assert 0 <= 1 - float(kept.mean() / exact.mean()) < worst


def test_nothing_moved_is_exactly_zero() -> None:
    before, _ = pair(4, 9, 0.0)
    for kept, args in (("all", (before, before)), ("top", top(before, before, 3)), ("sampled", (before, before))):
        assert float(kl_moved(*args, kept=kept).abs().max()) < 1e-15


def test_a_token_ruled_out_is_infinitely_far_and_a_forbidden_one_costs_nothing() -> None:
    half = math.log(0.5)
    before = torch.tensor([[half, half, -math.inf]], dtype=torch.float64)
    after = torch.tensor([[0.0, -math.inf, -math.inf]], dtype=torch.float64)
    assert kl_moved(before, after).item() == math.inf
    assert kl_moved(after, before).item() == pytest.approx(math.log(2))


def test_small_moves_survive_half_precision_input() -> None:
    """Red if computed in bf16, where a probability of 1 cannot move by less than 0.4 %."""
    before, after = (x.float() for x in pair(64, 50, 0.02))
    exact = kl_moved(before, after).mean()
    assert kl_moved(before.bfloat16(), before.bfloat16()).abs().max() < 1e-6
    assert kl_moved(before, after).dtype == torch.float32 and float(exact) > 0


def test_bad_arguments() -> None:
    before, after = pair(2, 3, 0.1)
    with pytest.raises(ValueError, match="choose one of all, top, sampled"):
        kl_moved(before, after, kept="some")
    with pytest.raises(ValueError, match="one shape"):
        kl_moved(before, after[:1])


# The mean ------------------------------------------------------------------------------------------------------------


def test_mean_over_tokens_ignores_padding_and_adds_over_ranks() -> None:
    """Red for a mean of row means: the rows have 1 and 3 tokens."""
    values = torch.tensor([[4.0, math.nan, math.inf], [1.0, 1.0, 2.0]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1]])
    assert token_mean(values, mask) == 2.0
    halves = [torch.tensor([4.0, 1.0], dtype=torch.float64), torch.tensor([4.0, 3.0], dtype=torch.float64)]
    assert token_mean(values[:1], mask[:1], reduce=lambda mine: mine + halves[1]) == 2.0
    assert token_mean(values, torch.zeros(2, 3)) == 0.0
    assert token_mean(torch.tensor([3.0])) == 3.0  # a prompt of one completion of one token


# Cosine, agreement, clip ---------------------------------------------------------------------------------------------


def test_cosine_is_that_of_the_joined_vector() -> None:
    """Red for a mean of per-parameter cosines."""
    g = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]
    m = [torch.tensor([[1.0, 0.0]]), torch.tensor([0.0])]
    assert gradient_cosine(zip(g, m)) == pytest.approx(0.6)
    other = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)  # the other rank's moment is orthogonal to its gradient
    assert gradient_cosine([(g[0], m[0])], reduce=lambda mine: mine + other) == pytest.approx(1 / math.sqrt(2))
    assert gradient_cosine(zip(g, [torch.zeros(1, 2), torch.zeros(1)])) is None


def test_cosine_is_the_same_at_any_size_of_the_gradient() -> None:
    g, m = torch.randn(9), torch.randn(9)
    whole = gradient_cosine([(g, m)])
    assert gradient_cosine([(1e-12 * g, 1e8 * m)]) == pytest.approx(whole, rel=1e-5)


def test_agreement_is_the_clipped_mean_cosine_after_a_few_steps() -> None:
    agreement = Agreement()
    cosines = [0.08, 0.02, None, 0.05, -0.01, 0.03, 0.04, -0.02]
    seen: list[float] = []
    for cosine in cosines:
        agreement.add(cosine)
        seen += [] if cosine is None else [cosine]
        weights = [0.9 ** (len(seen) - 1 - i) for i in range(len(seen))]
        mean = sum(w * c for w, c in zip(weights, seen)) / sum(weights)
        assert agreement.value == pytest.approx(1.0 if len(seen) <= 5 else min(max(mean / 0.1, 0.1), 1.0))
    assert 0.1 < agreement.value < 1
    for _ in range(60):
        agreement.add(-1.0)
    assert agreement.value == 0.1


def test_clip_by_hand() -> None:
    """gbar: 1, then .95 + .05 * 2 (10 is clipped to 2 * 1) = 1.05; 4 is clipped to 2.1."""
    clip = AdaptiveClip()
    assert clip(1.0) == 1.0
    assert clip(10.0) == pytest.approx(0.2)
    assert clip(4.0) == pytest.approx(2.1 / 4)
    assert clip.mean == pytest.approx(0.95 * 1.05 + 0.05 * 2.1)


def test_clip_survives_batches_without_a_teacher() -> None:
    """Red if a zero gradient enters the mean: as the first one it would clip all that follow to zero."""
    clip = AdaptiveClip()
    assert [clip(0.0), clip(3.0), clip(0.0), clip(3.0)] == [1.0, 1.0, 1.0, 1.0]
    assert clip.mean == pytest.approx(3.0)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=30), st.floats(1e-3, 1e3))
def test_clip_knows_no_unit(norms: list[float], scale: float) -> None:
    one, other = AdaptiveClip(), AdaptiveClip()
    for norm in norms:
        factor = one(norm)
        assert 0 < factor <= 1
        assert other(scale * norm) == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_clip_refuses_what_is_not_a_norm_and_forgets_it(bad: float) -> None:
    clip = AdaptiveClip()
    clip(1.0)
    with pytest.raises(ValueError, match="gradient norm"):
        clip(bad)
    assert clip.mean == 1.0


@pytest.mark.parametrize(
    "make",
    [
        lambda: AdaptiveClip(ratio=0.5),
        lambda: AdaptiveClip(decay=1.0),
        lambda: Agreement(unit=0),
        lambda: Agreement(floor=0),
    ],
)
def test_settings_out_of_range(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"must|would"):
        make()


def test_agreement_refuses_nan() -> None:
    with pytest.raises(ValueError, match="cosine is nan"):
        Agreement().add(math.nan)


def test_resume_is_the_uninterrupted_run() -> None:
    clip, agreement = AdaptiveClip(), Agreement()
    again, other = AdaptiveClip(), Agreement()
    for i in range(20):
        clip(1 + i % 3)
        agreement.add(0.01 * i)
        if i == 9:
            again.load_state_dict(clip.state_dict())
            other.load_state_dict(agreement.state_dict())
        elif i > 9:
            again(1 + i % 3)
            other.add(0.01 * i)
    assert (again.mean, other.value) == (clip.mean, agreement.value)
