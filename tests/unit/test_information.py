"""Token entropies and I_k: by value, by gradient, and unchanged by every way of cutting a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgpo.core import Information, InformationMeter, token_entropy
from tests.oracles import numerics as oracle

NAN, INF = math.nan, math.inf

# ---------------------------------------------------------------------------------------------------- token entropy

finite_logits = st.floats(-60, 60)
# At least one token stays possible.
logit_rows = st.builds(
    lambda allowed, rest: [allowed, *rest],
    finite_logits,
    st.lists(finite_logits | st.just(-INF), min_size=1, max_size=11),
)


@given(logit_rows, st.floats(0.05, 20))
def test_entropy_equals_the_oracle_and_lies_between_zero_and_ln_v(row: list[float], temperature: float) -> None:
    value = token_entropy(torch.tensor(row, dtype=torch.float64), temperature).item()
    assert 0.0 <= value <= math.log(len(row)) + 1e-14
    assert value == pytest.approx(float(oracle.entropy(row, temperature)), abs=1e-12)


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 1000])
def test_uniform_logits_have_entropy_ln_v(vocabulary: int) -> None:
    logits = torch.full((2, 3, vocabulary), 7.25, dtype=torch.float64)
    torch.testing.assert_close(
        token_entropy(logits), torch.full((2, 3), math.log(vocabulary), dtype=torch.float64), rtol=0, atol=1e-13
    )


def test_two_tokens_by_hand() -> None:
    # p = (1/4, 3/4): H = ln 4 - (3/4) ln 3
    logits = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    assert token_entropy(logits).item() == pytest.approx(math.log(4) - 0.75 * math.log(3), abs=1e-15)
    # temperature 1/2 squares the odds: p = (1/10, 9/10)
    assert token_entropy(logits, 0.5).item() == pytest.approx(math.log(10) - 0.9 * math.log(9), abs=1e-15)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("row", [[3e4, 0.0, 0.0], [0.0, -INF, -INF], [-3e4, -INF, -INF], [3e3, 0.0, -INF]])
def test_a_certain_token_has_entropy_zero(dtype: torch.dtype, row: list[float]) -> None:
    assert token_entropy(torch.tensor(row, dtype=dtype)).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_half_precision_logits_are_computed_in_fp32(dtype: torch.dtype, temperature: float) -> None:
    logits = (4 * torch.randn(3, 257, generator=torch.Generator().manual_seed(0))).to(dtype)
    value = token_entropy(logits, temperature)
    expected = [float(oracle.entropy(row, temperature)) for row in logits.double().tolist()]
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, torch.tensor(expected), rtol=0, atol=3e-6)


@pytest.mark.parametrize("shift", [-100.0, 30.0, 1000.0, 8192.0])
def test_a_common_shift_of_fp32_logits_costs_no_digits(shift: float) -> None:
    # multiples of 2^-10 below 2^13 are exact in fp32 with the shift added, so that only the arithmetic can lose digits
    logits = (3 * torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 1024).round() / 1024
    assert torch.equal((logits + shift) - shift, logits)
    torch.testing.assert_close(token_entropy(logits + shift), token_entropy(logits), rtol=0, atol=5e-6)


@settings(max_examples=40)
@given(logit_rows, st.sampled_from([0.5, 1.0, 2.0]))
def test_entropy_gradient_equals_finite_differences(row: list[float], temperature: float) -> None:
    logits = torch.tensor(row, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_entropy(logits, temperature), logits)
    allowed = [v for v, z in enumerate(row) if z > -INF]
    expected = torch.zeros(len(row), dtype=torch.float64)
    expected[allowed] = torch.tensor(
        oracle.gradient(lambda z: oracle.entropy(z, temperature), [row[v] for v in allowed]), dtype=torch.float64
    )
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN, INF])
def test_a_temperature_that_cannot_divide_is_an_error(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_entropy(torch.zeros(2), temperature)


def test_entropy_leaves_the_logits_alone() -> None:
    logits = torch.tensor([[1.0, -INF, 2.0]])
    token_entropy(logits, 0.5)
    assert logits.tolist() == [[1.0, -INF, 2.0]]


# ------------------------------------------------------------------------------------------------ information meter


@dataclass(frozen=True)
class Sample:
    student: list[float]  # nats per completion token
    teacher: list[float]
    hinted: bool


nats = st.floats(0, 12)
samples_strategy = st.lists(
    st.builds(
        lambda tokens, hinted: Sample([s for s, _ in tokens], [t for _, t in tokens], hinted),
        st.lists(st.tuples(nats, nats), max_size=6),
        st.booleans(),
    ),
    min_size=1,
    max_size=9,
)


def expected_information(samples: list[Sample], denominator: str = "all", unhinted: int = 0) -> float:
    return oracle.information(
        [s.student for s in samples],
        [s.teacher for s in samples],
        [s.hinted for s in samples],
        unhinted=unhinted,
        denominator=denominator,
    )


def add(meter: InformationMeter, samples: list[Sample], padding: int = 0, filler: float = NAN) -> None:
    """One micro-batch, padded by `padding` more columns than it needs; every value outside the mask is `filler`."""
    width = max((len(s.student) for s in samples), default=0) + padding
    shape = (len(samples), width)
    student, teacher = torch.full(shape, filler, dtype=torch.float64), torch.full(shape, filler, dtype=torch.float64)
    mask = torch.zeros(shape, dtype=torch.long)
    for i, s in enumerate(samples):
        # completions alternate between left- and right-padded: only the mask may say where the tokens are
        start = width - len(s.student) if i % 2 else 0
        tokens = slice(start, start + len(s.student))
        student[i, tokens] = torch.tensor(s.student, dtype=torch.float64)
        teacher[i, tokens] = torch.tensor(s.teacher, dtype=torch.float64)
        mask[i, tokens] = 1
    hinted = torch.tensor([s.hinted for s in samples], dtype=torch.bool)
    meter.add(student, teacher, mask, None if padding and bool(hinted.all()) else hinted)


def test_information_by_hand() -> None:
    meter = InformationMeter()
    meter.add(
        torch.tensor([[3.0, 1.0, NAN], [2.0, 2.0, 5.0], [9.0, 9.0, 9.0], [4.0, NAN, NAN]]),
        torch.tensor([[1.0, 0.0, NAN], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0], [6.0, NAN, NAN]]),
        torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0]]),
        torch.tensor([1, 1, 0, 1]),
    )
    meter.add_unhinted(1)
    # gaps 2 - 1/2, 3 - 1, (unhinted) 0, 4 - 6, and 0: means over tokens, never sums, divided by all five samples
    assert meter.compute() == pytest.approx(1.5 / 5, abs=1e-15)
    assert meter.summary() == Information(
        information=meter.compute(),
        student_entropy=pytest.approx((2 + 3 + 4) / 3),  # type: ignore[arg-type]
        teacher_entropy=pytest.approx((0.5 + 1 + 6) / 3),  # type: ignore[arg-type]
        samples=5,
        hinted_samples=3,
    )


def test_the_hinted_denominator_by_hand() -> None:
    meter = InformationMeter(denominator="hinted")
    meter.add(torch.tensor([[3.0], [9.0]]), torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), torch.tensor([True, False]))
    meter.add_unhinted(7)
    assert meter.compute() == 2.0


@pytest.mark.parametrize("denominator", ["all", "hinted"])
def test_a_batch_without_any_hint_has_no_information(denominator: str) -> None:
    meter = InformationMeter(denominator)
    meter.add_unhinted(4)
    assert meter.summary() == Information(0.0, 0.0, 0.0, samples=4, hinted_samples=0)


def test_no_hinted_argument_means_that_all_are_hinted() -> None:
    meter = InformationMeter()
    meter.add(torch.full((2, 1), 3.0), torch.full((2, 1), 1.0), torch.ones(2, 1))
    assert meter.summary() == Information(2.0, 3.0, 1.0, samples=2, hinted_samples=2)


@given(
    samples_strategy,
    st.sampled_from(["all", "hinted"]),
    st.integers(0, 3),
    st.integers(0, 3),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_cutting_padding_and_reordering_change_nothing(
    samples: list[Sample],
    denominator: str,
    padding: int,
    unhinted: int,
    cuts: int,
    random: object,
) -> None:
    """One batch; the batch in micro-batches in another order; the unhinted counted without a forward pass."""
    expected = pytest.approx(expected_information(samples, denominator, unhinted), abs=1e-13)

    whole = InformationMeter(denominator)
    add(whole, samples)
    whole.add_unhinted(unhinted)
    assert whole.compute() == expected

    shuffled = list(samples)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    cut = InformationMeter(denominator)
    cut.add_unhinted(unhinted)
    for start in range(0, len(shuffled), cuts):
        add(cut, shuffled[start : start + cuts], padding, filler=INF)
    assert cut.compute() == expected
    for name in ("student_entropy", "teacher_entropy", "hinted_samples"):
        assert getattr(cut.summary(), name) == pytest.approx(getattr(whole.summary(), name), abs=1e-12)

    counted = InformationMeter(denominator)
    add(counted, [s for s in samples if s.hinted], padding)
    counted.add_unhinted(unhinted + sum(not s.hinted for s in samples))
    assert counted.compute() == expected
    assert counted.summary().samples == len(samples) + unhinted


@given(samples_strategy, st.integers(1, 4), st.sampled_from(["all", "hinted"]))
def test_ranks_that_sum_equal_one_process(samples: list[Sample], ranks: int, denominator: str) -> None:
    """Uneven shares, some without a sample: dividing on each rank before the sum would be a mean of means."""
    meters = [InformationMeter(denominator) for _ in range(ranks)]
    for rank, meter in enumerate(meters):
        if share := samples[rank::ranks]:
            add(meter, share)
        meter.add_unhinted(rank)
    local: list[Tensor] = []

    def record(sums: Tensor) -> Tensor:
        local.append(sums.clone())
        return torch.ones_like(sums)

    for meter in meters:
        meter.compute(record)
    total = torch.stack(local).sum(0)
    expected = expected_information(samples, denominator, unhinted=sum(range(ranks)))
    for meter in meters:
        assert meter.compute(lambda _: total) == pytest.approx(expected, abs=1e-13)


def test_an_in_place_reduce_does_not_change_the_meter() -> None:
    meter = InformationMeter()
    meter.add(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.ones(1, 1))
    meter.add_unhinted(1)
    two_equal_ranks = lambda sums: sums.mul_(2)  # noqa: E731
    assert [meter.compute(two_equal_ranks) for _ in range(3)] == [0.5, 0.5, 0.5]
    assert meter.summary().samples == 2


def test_the_meter_keeps_no_graph() -> None:
    entropy = torch.tensor([[2.0]], requires_grad=True)
    meter = InformationMeter()
    meter.add(entropy * 1.0, entropy * 0.5, torch.ones(1, 1))

    def reduce(sums: Tensor) -> Tensor:
        assert not sums.requires_grad
        return sums

    assert meter.compute(reduce) == 1.0


def test_sums_are_kept_in_double_precision() -> None:
    # 4096 gaps of 2^-12 on top of one of 2^13: each is lost if added to the big one in fp32
    meter = InformationMeter()
    meter.add(torch.tensor([[8192.0]]), torch.zeros(1, 1), torch.ones(1, 1))
    for _ in range(4096):
        meter.add(torch.tensor([[2.0**-12]]), torch.zeros(1, 1), torch.ones(1, 1))
    assert meter.compute() == 8193 / 4097


@pytest.mark.parametrize("dtype", [torch.bool, torch.long, torch.float32])
def test_masks_and_hints_of_any_dtype(dtype: torch.dtype) -> None:
    meter = InformationMeter()
    meter.add(
        torch.tensor([[3.0, 100.0], [50.0, 50.0]]),
        torch.tensor([[1.0, NAN], [NAN, NAN]]),
        torch.tensor([[1, 0], [1, 1]]).to(dtype),
        torch.tensor([1, 0]).to(dtype),
    )
    assert meter.compute() == 1.0


def test_empty_completions_are_counted_and_contribute_nothing() -> None:
    meter = InformationMeter()
    meter.add(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))
    meter.add(torch.tensor([[3.0], [NAN]]), torch.tensor([[1.0], [NAN]]), torch.tensor([[1], [0]]))
    assert meter.summary() == Information(0.5, 0.75, 0.25, samples=4, hinted_samples=4)


def test_reset_forgets_everything() -> None:
    meter = InformationMeter()
    meter.add(torch.tensor([[NAN]]), torch.tensor([[1.0]]), torch.ones(1, 1))
    meter.add_unhinted(5)
    meter.reset()
    meter.add(torch.tensor([[2.0]]), torch.tensor([[1.0]]), torch.ones(1, 1))
    assert meter.summary() == Information(1.0, 2.0, 1.0, samples=1, hinted_samples=1)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_non_finite_signal_is_an_error_on_every_rank(bad: float, which: str) -> None:
    student, teacher = torch.ones(2, 2), torch.ones(2, 2)
    (student if which == "student" else teacher)[1, 0] = bad
    broken, sound = InformationMeter(), InformationMeter()
    broken.add(student, teacher, torch.ones(2, 2))
    sound.add(torch.ones(2, 2), torch.ones(2, 2), torch.ones(2, 2))
    local: list[Tensor] = []
    for meter in (broken, sound):
        # a rank that raised before the reduction would leave the others waiting in it
        meter.compute(lambda sums: local.append(sums) or torch.ones(4))  # type: ignore[func-returns-value]
    for meter in (broken, sound):
        with pytest.raises(ValueError, match="not finite"):
            meter.compute(lambda _: local[0] + local[1])


def test_two_infinities_do_not_cancel() -> None:
    meter = InformationMeter()
    meter.add(torch.tensor([[INF]]), torch.tensor([[INF]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="not finite"):
        meter.compute()


def test_an_empty_meter_is_an_error() -> None:
    with pytest.raises(ValueError, match="empty"):
        InformationMeter().compute()
    with pytest.raises(ValueError, match="empty"):
        InformationMeter("hinted").compute(lambda sums: sums)


def test_a_rank_without_samples_takes_part_in_the_sum() -> None:
    other_rank = torch.tensor([6.0, 2.0, 4.0, 2.0], dtype=torch.float64)
    assert InformationMeter().compute(lambda sums: sums + other_rank) == 1.0


@pytest.mark.parametrize(
    ("student", "teacher", "mask", "hinted"),
    [
        ((2, 3), (2, 4), (2, 3), (2,)),
        ((2, 3), (2, 3), (2, 1), (2,)),
        ((2, 3), (2, 3), (3,), (2,)),
        ((3,), (3,), (3,), (3,)),
        ((2, 3), (2, 3), (2, 3), (3,)),
        ((2, 3), (2, 3), (2, 3), (2, 1)),
    ],
)
def test_shapes_that_would_broadcast_are_errors(
    student: tuple[int, ...], teacher: tuple[int, ...], mask: tuple[int, ...], hinted: tuple[int, ...]
) -> None:
    meter = InformationMeter()
    with pytest.raises(ValueError, match="shape"):
        meter.add(torch.ones(student), torch.ones(teacher), torch.ones(mask), torch.ones(hinted))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="denominator"):
        InformationMeter("mean")
    with pytest.raises(ValueError, match="n is -1"):
        InformationMeter().add_unhinted(-1)
