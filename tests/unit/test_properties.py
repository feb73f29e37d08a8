"""What holds for every input of the core, on generated ones.

By default about 500 cases, the same in every run; with `-m slow` 11 times as many, new in every run. A case that
fails is shrunk by hypothesis and printed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pgpo.core import (
    dense_distillation_head,
    divergence,
    fused_distillation_head,
    token_entropy,
)

LN2 = math.log(2)
SLOW_FACTOR = 11


def examples(count: int, **strategies: Any) -> Callable[[Callable[..., None]], Any]:
    """The check on `count` draws of the strategies by default, on SLOW_FACTOR times as many in the slow suite."""

    def decorate(check: Callable[..., None]) -> Any:
        @pytest.mark.parametrize("cases", [count, pytest.param(SLOW_FACTOR * count, marks=pytest.mark.slow)])
        def test(cases: int) -> None:
            chosen = settings(
                max_examples=cases,
                deadline=None,
                database=None,
                derandomize=cases == count,
                suppress_health_check=list(HealthCheck),
            )
            chosen(given(**strategies)(check))()

        return test

    return decorate


# Distributions --------------------------------------------------------------------------------------------------------

_NUMBERS = st.one_of(
    st.floats(-20, 20, width=32),
    st.floats(-(2.0**100), 2.0**100, width=32),  # 1e30
    st.sampled_from([0.0, -0.0, 1e-40, -1e-40, -math.inf]),
)


@st.composite
def logits(draw: Any, rows: int = 1) -> Tensor:
    """[rows, V] with at least one token per row that is not forbidden, V from 1."""
    size = draw(st.integers(1, 9))
    values = [draw(st.lists(_NUMBERS, min_size=size, max_size=size)) for _ in range(rows)]
    for row in values:
        allowed = draw(st.integers(0, size - 1))
        row[allowed] = max(row[allowed], -1e30)
    return torch.tensor(values, dtype=draw(st.sampled_from([torch.float32, torch.float64])))


_TEMPERATURES = st.one_of(st.just(1.0), st.floats(0.05, 20))


@examples(200, z=logits(), temperature=_TEMPERATURES, half=st.sampled_from([None, torch.bfloat16]))
def test_entropy_lies_between_zero_and_the_uniform_distributions(z, temperature, half):
    z = z if half is None else z.to(half)
    entropy = token_entropy(z, temperature)
    assert entropy.shape == z.shape[:-1] and entropy.dtype in (torch.float32, torch.float64)
    assert (entropy >= 0).all() and (entropy <= math.log(z.shape[-1]) + 1e-6).all()


@examples(
    200,
    pair=logits(rows=2),
    temperature=_TEMPERATURES,
    kind=st.sampled_from(["jsd", "forward_kl", "reverse_kl"]),
    beta=st.floats(0.01, 0.99),
    top_k=st.sampled_from([None, 1, 2, 5, 100]),
    tail=st.booleans(),
)
def test_a_divergence_is_not_negative_and_jsd_at_most_ln_2(pair, temperature, kind, beta, top_k, tail):
    value = divergence(*pair, kind, beta, top_k, tail, temperature)
    if not tail and top_k is not None and top_k < pair.shape[1]:
        kept = torch.log_softmax(pair[0] / temperature, -1).topk(top_k).indices  # where equals may be ordered anew
        if (pair[1][kept] == -math.inf).all():  # nothing to renormalise
            assert value.isnan()
            return
    assert value >= -1e-5  # nan is not
    if kind == "jsd":
        assert value <= LN2 + 1e-5
    if pair.isfinite().all() and (tail or top_k is None):
        assert abs(divergence(pair[0], pair[0], kind, beta, top_k, tail, temperature)) <= 1e-5


# The fused head -------------------------------------------------------------------------------------------------------

FUSED = dict(
    n=st.integers(0, 9),
    vocabulary=st.integers(1, 13),
    widths=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    chunk_size=st.integers(1, 10),
    kind=st.sampled_from(["jsd", "forward_kl", "reverse_kl", "sampled_token"]),
    beta=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    top_k=st.sampled_from([None, 1, 3, 100]),
    tail=st.booleans(),
    temperature=st.sampled_from([0.6, 1.0, 2.5]),
    biases=st.tuples(st.booleans(), st.booleans()),
    scales=st.tuples(st.sampled_from([0.5, 1.0]), st.sampled_from([1.0, 2.0])),
    softcaps=st.tuples(st.sampled_from([None, 5.0]), st.sampled_from([None, 8.0])),
    frozen=st.booleans(),
    form=st.sampled_from(["weights", "function", "per token"]),
    seed=st.integers(0, 2**31),
)


@examples(120, **FUSED)
def test_the_fused_head_is_its_dense_twin(
    n,
    vocabulary,
    widths,
    chunk_size,
    kind,
    beta,
    top_k,
    tail,
    temperature,
    biases,
    scales,
    softcaps,
    frozen,
    form,
    seed,
):
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    inputs = {
        "student_hidden": random(n, widths[0]),
        "student_weight": random(vocabulary, widths[0]),
        "teacher_hidden": random(n, widths[1]),
        "teacher_weight": random(vocabulary, widths[1]),
        "student_bias": random(vocabulary) if biases[0] else None,
        "teacher_bias": random(vocabulary) if biases[1] else None,
    }
    labels = torch.randint(vocabulary, (n,), generator=generator)
    weights, old = random(n).abs(), random(n)

    def ratio(chunk: Any, rows: slice) -> Tensor:
        return (chunk.student_logprob - old[rows]).exp().clamp_max(2.0) * weights[rows]

    results = []
    for head, options in ((fused_distillation_head, {"chunk_size": chunk_size}), (dense_distillation_head, {})):
        own = {k: None if v is None else v.clone() for k, v in inputs.items()}
        trained = [own[k] for k in ("student_hidden", "student_weight", "student_bias") if own[k] is not None]
        if frozen:
            trained = trained[:1]
        for t in trained:
            t.requires_grad_()
        out = head(
            **own,
            labels=labels,
            token_weights={"weights": weights, "function": ratio, "per token": None}[form],
            kind=kind,
            beta=beta,
            top_k=top_k,
            tail=tail,
            temperature=temperature,
            student_scale=scales[0],
            teacher_scale=scales[1],
            student_softcap=softcaps[0],
            teacher_softcap=softcaps[1],
            **options,
        )
        loss = out.loss if form != "per token" else (weights * out.divergence + old * out.student_logprob).sum()
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        values = [out.divergence, out.student_entropy, out.teacher_entropy, out.student_logprob, out.teacher_logprob]
        results.append(
            [*values, loss.unsqueeze(0), *(torch.zeros_like(t) if g is None else g for t, g in zip(trained, gradients))]
        )
    for fused, dense in zip(*results, strict=True):
        assert fused.shape == dense.shape
        assert torch.allclose(fused, dense, rtol=1e-9, atol=1e-9)
