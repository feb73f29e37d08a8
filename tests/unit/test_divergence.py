"""Divergences: value and gradient against 40-digit arithmetic, inequalities, extremes, the sampled-token surrogate."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pgpo.core import divergence, sampled_token_divergence
from tests.oracles import numerics as oracle

INF, NAN = math.inf, math.nan
LN2 = math.log(2)

KINDS = [("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.9), ("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.0), ("jsd", 1.0)]
SUPPORTS: list[tuple[int | None, bool]] = [
    (None, True), (1, True), (3, True), (3, False), (6, True), (6, False), (7, True), (100, False)
]  # fmt: skip

kinds = st.sampled_from(KINDS)
pairs = st.lists(st.tuples(st.floats(-15, 15), st.floats(-15, 15)), min_size=2, max_size=9)

# No two student logits alike: a tie at the k-th place would leave the choice of the support open.
untied_pairs = st.lists(
    st.tuples(st.integers(-60, 60), st.floats(-15, 15)).map(lambda p: (p[0] / 4, p[1])),
    min_size=2,
    max_size=9,
    unique_by=lambda p: p[0],
)


def f64(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def random_logits(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------ value and gradient


@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient_equal_the_oracle(
    kind: str, beta: float, top_k: int | None, tail: bool, temperature: float
) -> None:
    student, teacher = random_logits(2, 7, seed=1).requires_grad_(), random_logits(2, 7, seed=2).requires_grad_()
    value = divergence(student, teacher, kind, beta, top_k, tail, temperature)
    weights = f64([1.0, -3.0])  # positions must not mix
    (gradient,) = torch.autograd.grad((weights * value).sum(), student, retain_graph=True)
    (to_teacher,) = torch.autograd.grad(value.sum(), teacher, allow_unused=True)
    assert to_teacher is None

    def exact(z: Any, row: int) -> Any:
        return oracle.divergence(z, teacher[row].tolist(), kind, beta, top_k, tail, temperature)

    expected = f64([float(exact(student[row].tolist(), row)) for row in range(2)])
    expected_gradient = f64(
        [oracle.gradient(lambda z, row=row: exact(z, row), student[row].tolist()) for row in range(2)]
    )
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(gradient, weights[:, None] * expected_gradient, rtol=1e-10, atol=1e-13)


def test_forward_and_reverse_by_hand() -> None:
    # student (1/2, 1/2), teacher (1/4, 3/4)
    student, teacher = f64([0.0, 0.0]), f64([0.0, math.log(3)])
    assert divergence(student, teacher, "reverse_kl").item() == pytest.approx(0.5 * math.log(4 / 3), abs=1e-15)
    assert divergence(student, teacher, "forward_kl").item() == pytest.approx(
        0.25 * math.log(1 / 2) + 0.75 * math.log(3 / 2), abs=1e-15
    )


def test_the_mixture_weighs_the_teacher_with_beta() -> None:
    # student (1, 0), teacher (0, 1): m = (1-b, b) and JSD = -(1-b) ln(1-b) - b ln b
    student, teacher = f64([0.0, -INF]), f64([-INF, 0.0])
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert divergence(student, teacher, beta=0.25).item() == pytest.approx(expected, abs=1e-15)
    # b KL(teacher || m) alone: student (1/2, 1/2) against teacher (1, 0), b = 1/4, m = (5/8, 3/8)
    expected = 0.75 * (0.5 * math.log(4 / 5) + 0.5 * math.log(4 / 3)) + 0.25 * math.log(8 / 5)
    assert divergence(f64([0.0, 0.0]), f64([0.0, -INF]), beta=0.25).item() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("kind", "expected"), [("reverse_kl", -2 / 5), ("forward_kl", 1 / 10)])
def test_the_direction_of_the_gradient_by_hand(kind: str, expected: float) -> None:
    # p = sigmoid(z). Student p = 1/2; forward: dKL/dz = p - q. Reverse: p (1-p) (logit p - logit q).
    q = 0.4 if kind == "forward_kl" else 1 / (1 + math.exp(-1.6))
    student = f64([0.0, 0.0]).requires_grad_()
    teacher = f64([math.log(q / (1 - q)), 0.0])
    (gradient,) = torch.autograd.grad(divergence(student, teacher, kind), student)
    torch.testing.assert_close(gradient, f64([expected, -expected]), rtol=0, atol=1e-15)


def test_sdpo_settings_are_the_defaults() -> None:
    student, teacher = random_logits(5, seed=3), random_logits(5, seed=4)
    assert torch.equal(divergence(student, teacher), divergence(student, teacher, "jsd", 0.5, None, True, 1.0))


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7), (0, 7), (2, 0, 7), (2, 1, 7)])
@pytest.mark.parametrize("top_k", [None, 3])
def test_any_leading_shape(shape: tuple[int, ...], top_k: int | None) -> None:
    student, teacher = random_logits(*shape, seed=5), random_logits(*shape, seed=6)
    value = divergence(student, teacher, top_k=top_k)
    assert value.shape == shape[:-1]
    flat = [divergence(s, t, top_k=top_k) for s, t in zip(student.view(-1, 7), teacher.view(-1, 7), strict=True)]
    torch.testing.assert_close(value.flatten(), torch.stack(flat) if flat else value.flatten(), rtol=0, atol=1e-15)


# ------------------------------------------------------------------------------------------------ laws


@given(pairs, kinds)
def test_zero_for_equal_distributions_whatever_their_common_shift(
    pair: list[tuple[float, float]], kind_beta: tuple[str, float]
) -> None:
    student = f64(pair)[:, 0]
    for top_k in (None, 2):
        assert divergence(student, student + 5.0, *kind_beta, top_k=top_k).item() == pytest.approx(0, abs=1e-12)


@given(pairs, kinds, st.randoms(use_true_random=False))
def test_the_order_of_the_vocabulary_does_not_matter(
    pair: list[tuple[float, float]], kind_beta: tuple[str, float], random: Any
) -> None:
    shuffled = list(pair)
    random.shuffle(shuffled)
    (student, teacher), (student_shuffled, teacher_shuffled) = f64(pair).T, f64(shuffled).T
    expected = divergence(student, teacher, *kind_beta).item()
    assert divergence(student_shuffled, teacher_shuffled, *kind_beta).item() == pytest.approx(expected, abs=1e-12)


@given(pairs, st.floats(0.01, 0.99))
def test_swapping_the_two_mirrors_beta(pair: list[tuple[float, float]], beta: float) -> None:
    student, teacher = f64(pair).T
    mirrored = divergence(teacher, student, beta=1 - beta).item()
    assert divergence(student, teacher, beta=beta).item() == pytest.approx(mirrored, abs=1e-12)


def test_the_limits_of_beta_are_the_two_kls() -> None:
    student, teacher = random_logits(6, seed=7), random_logits(6, seed=8)
    forward, reverse = (divergence(student, teacher, kind) for kind in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(divergence(student, teacher, beta=1e-6) / 1e-6, forward, rtol=1e-4, atol=0)
    torch.testing.assert_close(divergence(student, teacher, beta=1 - 1e-6) / 1e-6, reverse, rtol=1e-4, atol=0)
    assert torch.equal(divergence(student, teacher, beta=0.0), forward)
    assert torch.equal(divergence(student, teacher, beta=1.0), reverse)


@given(untied_pairs.filter(lambda pair: len(pair) > 2), kinds)
def test_a_finer_tail_never_loses_divergence(pair: list[tuple[float, float]], kind_beta: tuple[str, float]) -> None:
    """Merging tokens into one bucket cannot increase a divergence, and the last bucket of one token is that token."""
    student, teacher = f64(pair).T / 4  # keeps every bucket above the 1e-7 at which the tail is cut
    vocabulary = len(pair)
    values = [divergence(student, teacher, *kind_beta, top_k=k).item() for k in range(1, vocabulary)]
    full = divergence(student, teacher, *kind_beta).item()
    for coarse, fine in itertools.pairwise(values):
        assert coarse <= fine + 1e-12
    assert values[-1] == pytest.approx(full, abs=1e-11)


@pytest.mark.parametrize("tail", [True, False])
def test_keeping_the_whole_vocabulary_is_the_full_divergence(tail: bool) -> None:
    student, teacher = random_logits(4, 7, seed=9), random_logits(4, 7, seed=10)
    for k in (7, 8, 1000):
        assert torch.equal(divergence(student, teacher, top_k=k, tail=tail), divergence(student, teacher))


def test_top_k_follows_the_student_not_the_teacher() -> None:
    # student (3/4, 1/8, 1/8), teacher (1/8, 3/4, 1/8): the student's top token has teacher mass 1/8
    student, teacher = f64([0.75, 0.125, 0.125]).log(), f64([0.125, 0.75, 0.125]).log()
    expected = 0.75 * math.log(6) + 0.25 * math.log(2 / 7)
    assert divergence(student, teacher, "reverse_kl", top_k=1).item() == pytest.approx(expected, abs=1e-14)
    assert divergence(student, teacher, "reverse_kl", top_k=1, tail=False).item() == 0.0


# ------------------------------------------------------------------------------------------------ extremes


@given(untied_pairs, kinds, st.sampled_from([None, 1]), st.data())
def test_tokens_that_both_forbid_are_as_if_absent(
    pair: list[tuple[float, float]], kind_beta: tuple[str, float], top_k: int | None, data: Any
) -> None:
    where = data.draw(st.integers(0, len(pair)))
    masked = [*pair[:where], (-INF, -INF), *pair[where:]]
    student = f64([s for s, _ in masked]).requires_grad_()
    value = divergence(student, f64([t for _, t in masked]), *kind_beta, top_k=top_k)
    (gradient,) = torch.autograd.grad(value, student)

    reduced = f64([s for s, _ in pair]).requires_grad_()
    expected = divergence(reduced, f64([t for _, t in pair]), *kind_beta, top_k=top_k)
    (expected_gradient,) = torch.autograd.grad(expected, reduced)
    near = 1e-12
    if top_k is not None:  # the tail is 1 - p_top, whose digits a confident student takes
        near += 1e-15 / float(1 - torch.softmax(reduced.detach(), -1).max())
    assert value.item() == pytest.approx(expected.item(), rel=near, abs=near)
    assert gradient[where].item() == 0.0
    kept = [v for v in range(len(masked)) if v != where]
    torch.testing.assert_close(gradient[kept], expected_gradient, rtol=near, atol=near)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("forbidden", [-INF, -1e4])
def test_a_token_that_only_one_forbids(dtype: torch.dtype, forbidden: float) -> None:
    both = torch.tensor([0.0, 0.0, 0.0], dtype=dtype)
    one = torch.tensor([0.0, 0.0, forbidden], dtype=dtype)
    infinite = INF if forbidden == -INF else pytest.approx(1e4 / 3, rel=1e-3)
    # (student, teacher): KL(p || q) is infinite where q forbids what p has, and finite the other way round
    assert divergence(both, one, "reverse_kl").item() == infinite
    assert divergence(one, both, "forward_kl").item() == infinite
    assert divergence(both, one, "forward_kl").item() == pytest.approx(math.log(1.5), abs=1e-6)
    assert divergence(one, both, "reverse_kl").item() == pytest.approx(math.log(1.5), abs=1e-6)
    for student, teacher in ((both, one), (one, both)):
        student = student.clone().requires_grad_()
        value = divergence(student, teacher)
        (gradient,) = torch.autograd.grad(value, student)
        assert 0 < value.item() < LN2
        assert gradient.isfinite().all()


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
@pytest.mark.parametrize("swap", [False, True])
def test_a_probability_that_underflows_meets_a_forbidden_token(kind: str, swap: bool) -> None:
    # exp(-300) is 0 in fp32, and 0 * inf would be nan
    pair = torch.tensor([0.0, -300.0]), torch.tensor([0.0, -INF])
    student, teacher = reversed(pair) if swap else pair
    student = student.clone().requires_grad_()
    value = divergence(student, teacher, kind)
    (gradient,) = torch.autograd.grad(value, student)
    assert value.item() == 0.0
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.5, 0.25])
def test_opposite_certainties_reach_the_largest_jsd(dtype: torch.dtype, beta: float) -> None:
    student = torch.tensor([1e4, 0.0, 0.0], dtype=dtype).requires_grad_()
    value = divergence(student, torch.tensor([0.0, 1e4, 0.0], dtype=dtype), beta=beta)
    (gradient,) = torch.autograd.grad(value, student)
    expected = -(1 - beta) * math.log(1 - beta) - beta * math.log(beta)
    assert value.item() == pytest.approx(expected, rel=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), KINDS)
@pytest.mark.parametrize("tail", [True, False])
def test_top_k_that_captures_all_mass_stays_finite(dtype: torch.dtype, kind: str, beta: float, tail: bool) -> None:
    """log(1 - 1) = -inf in the tail would poison value and gradient."""
    certain = torch.tensor([40.0, 39.0, -200.0, -200.0], dtype=dtype)
    student = certain.clone().requires_grad_()
    close = divergence(student, certain + 1, kind, beta, top_k=2, tail=tail)
    far = divergence(student, torch.tensor([0.0, 0.0, 0.0, 3.0], dtype=dtype), kind, beta, top_k=2, tail=tail)
    (gradient,) = torch.autograd.grad(close + far, student)
    assert close.item() == pytest.approx(0, abs=1e-6)
    assert far.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "beta"), KINDS[:5])
@pytest.mark.parametrize("top_k", [None, 20])
def test_half_precision_logits_are_computed_in_fp32(
    dtype: torch.dtype, kind: str, beta: float, top_k: int | None
) -> None:
    # distinct student logits: a tie at the k-th place would leave the choice of the support open
    student = torch.randperm(101, generator=torch.Generator().manual_seed(0)).double().mul(0.0625).to(dtype)
    teacher = random_logits(101, seed=11).to(dtype)
    value = divergence(student, teacher, kind, beta, top_k, temperature=0.6)
    expected = oracle.divergence(student.tolist(), teacher.tolist(), kind, beta, top_k, temperature=0.6)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(float(expected), rel=3e-6)


# ------------------------------------------------------------------------------------------------ sampled token


@pytest.mark.parametrize("vocabulary", [2, 5])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_gradient_averages_to_the_reverse_kl_gradient(vocabulary: int, temperature: float) -> None:
    """Exact expectation over y ~ student; the gradient of log p * (log p - log q) without the stop would miss it."""
    student, teacher = random_logits(vocabulary, seed=12).requires_grad_(), random_logits(vocabulary, seed=13)
    probabilities = torch.softmax(student.detach() / temperature, -1)
    mean = torch.zeros(vocabulary, dtype=torch.float64)
    for y in range(vocabulary):
        surrogate = sampled_token_divergence(student, teacher, torch.tensor(y), temperature)
        mean += probabilities[y] * torch.autograd.grad(surrogate, student)[0]
    expected = f64(
        oracle.gradient(
            lambda z: oracle.divergence(z, teacher.tolist(), "reverse_kl", temperature=temperature), student.tolist()
        )
    )
    torch.testing.assert_close(mean, expected, rtol=1e-10, atol=1e-14)


def test_sampled_value_and_gradient_by_hand() -> None:
    # student (1/4, 3/4), teacher (1/2, 1/2), y = 0: ln(1/2) * ln(1/4); gradient ln(1/2) * (onehot - p)
    student, teacher = f64([0.0, math.log(3)]).requires_grad_(), f64([0.0, 0.0]).requires_grad_()
    value = sampled_token_divergence(student, teacher, torch.tensor(0))
    (gradient,) = torch.autograd.grad(value, student, retain_graph=True)
    (to_teacher,) = torch.autograd.grad(value, teacher, allow_unused=True)
    assert value.item() == pytest.approx(math.log(2) * math.log(4), abs=1e-15)
    torch.testing.assert_close(gradient, -LN2 * f64([0.75, -0.75]), rtol=0, atol=1e-15)
    assert to_teacher is None


def test_sampled_picks_each_positions_own_label() -> None:
    student, teacher = random_logits(2, 3, 5, seed=14), random_logits(2, 3, 5, seed=15)
    labels = torch.tensor([[0, 4, 2], [1, 1, 3]])
    value = sampled_token_divergence(student, teacher, labels)
    for index in [(i, j) for i in range(2) for j in range(3)]:
        s, t = (oracle.probabilities(z[index].tolist())[int(labels[index])] for z in (student, teacher))
        assert value[index].item() == pytest.approx(float(oracle.mp.log(s / t) * oracle.mp.log(s)), rel=1e-12)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kind": "kl"}, "kind.*reverse_kl"),
        ({"beta": -0.1}, "beta"),
        ({"beta": 1.1}, "beta"),
        ({"beta": NAN}, "beta"),
        ({"top_k": 0}, "top_k"),
        ({"top_k": -3}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        divergence(torch.zeros(3), torch.zeros(3), **arguments)


@pytest.mark.parametrize("teacher_shape", [(3,), (1, 3), (2, 4)])
def test_shapes_that_differ_are_an_error_even_if_they_broadcast(teacher_shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="shape"):
        divergence(torch.zeros(2, 3), torch.zeros(teacher_shape))
