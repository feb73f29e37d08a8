"""The fused head: values and gradients in float64 against an oracle on full logits; memory, precision, compilation."""

from __future__ import annotations

import gc
import itertools
import math
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pgpo.core import HeadOutput, dense_distillation_head, divergence, fused_distillation_head, token_entropy
from pgpo.core import _head_chunks as chunks
from pgpo.core import _head_kernels as kernels
from tests.oracles import head as oracle

INF, NAN = math.inf, math.nan
VALUES = ("divergence", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
KINDS = [("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.0), ("jsd", 1.0), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
SUPPORTS: list[tuple[int | None, bool]] = [(None, True), (3, True), (3, False), (1, True)]
PLAIN: dict[str, Any] = {}
GEMMA = dict(student_softcap=2.5, teacher_softcap=4.0)
COHERE = dict(student_scale=0.6, teacher_scale=1.7)
EVERYTHING = dict(**GEMMA, **COHERE)


@dataclass
class Case:
    """Random heads and tokens; biases are there unless taken out."""

    student_hidden: Tensor
    student_weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    student_bias: Tensor | None
    teacher_bias: Tensor | None
    weights: Tensor  # a third of them zero
    on_logprob: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        candidates = (self.student_hidden, self.student_weight, self.student_bias)
        return [t for t in candidates if t is not None and t.requires_grad]

    def arguments(self, **more: Any) -> dict[str, Any]:
        names = [f.name for f in fields(self) if f.name not in ("weights", "on_logprob")]
        return {name: getattr(self, name) for name in names} | more


def build(
    n: int = 7, hidden: int = 5, teacher_hidden: int = 4, vocabulary: int = 11, seed: int = 0, dtype=torch.float64
) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, dtype=torch.float64, generator=generator)).to(dtype)

    weights = random(n).double().abs()
    weights[1::3] = 0.0
    return Case(
        random(n, hidden).requires_grad_(),
        random(vocabulary, hidden, scale=0.8).requires_grad_(),
        random(n, teacher_hidden).requires_grad_(),
        random(vocabulary, teacher_hidden, scale=0.8).requires_grad_(),
        torch.randint(vocabulary, (n,), generator=generator),
        random(vocabulary).requires_grad_(),
        random(vocabulary).requires_grad_(),
        weights,
        random(n).double(),
    )


def close(actual: Tensor | None, expected: Tensor, name: str = "", tolerance: float = 1e-12) -> None:
    """Largest error relative to the largest entry."""
    assert actual is not None and actual.shape == expected.shape, name
    if expected.numel():
        error = (actual - expected).abs().max().item()
        assert error <= tolerance * max(expected.abs().max().item(), 1e-3), f"{name}: {error}"


def gradients(total: Tensor, case: Case, keep: bool = False) -> list[Tensor]:
    teacher = [case.teacher_hidden, case.teacher_weight]
    inputs = [*case.parameters, *teacher]
    *ours, hidden, weight = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=keep)
    assert hidden is None and weight is None, "the teacher is constant"
    return ours


def check(case: Case, expected: dict[str, Tensor], head: Any = fused_distillation_head, **arguments: Any) -> None:
    """Both forms of `head`, with values and gradients, against the oracle's values of the same case."""
    on_divergence = case.weights - 0.3  # of both signs
    expected_loss = gradients((case.weights * expected["divergence"]).sum(), case, keep=True)
    both = (on_divergence * expected["divergence"] + case.on_logprob * expected["student_logprob"]).sum()
    expected_both = gradients(both, case, keep=True)

    with_loss = head(**case.arguments(**arguments), token_weights=case.weights)
    per_token = head(**case.arguments(**arguments))
    for out in (with_loss, per_token):
        for name in VALUES:
            close(getattr(out, name), expected[name], name)
    assert not any(getattr(with_loss, name).requires_grad for name in VALUES)
    assert not per_token.student_entropy.requires_grad and not per_token.teacher_logprob.requires_grad
    assert per_token.loss is None
    close(with_loss.loss, (case.weights * expected["divergence"]).sum(), "loss")

    for actual, wanted in zip(gradients(-1.7 * with_loss.loss, case), expected_loss, strict=True):
        close(actual, -1.7 * wanted, "gradient of the loss")
    total = (on_divergence * per_token.divergence + case.on_logprob * per_token.student_logprob).sum()
    for actual, wanted in zip(gradients(total, case), expected_both, strict=True):
        close(actual, wanted, "gradient of the values")


# ------------------------------------------------------------------------------------------------ against the oracle


@pytest.mark.parametrize(("kind", "beta"), [*KINDS, ("sampled_token", 0.5)])
@pytest.mark.parametrize(("top_k", "tail"), SUPPORTS)
@pytest.mark.parametrize("head", [PLAIN, GEMMA, COHERE, EVERYTHING], ids=["plain", "softcap", "scale", "both"])
def test_values_and_gradients_equal_the_oracle(
    kind: str, beta: float, top_k: int | None, tail: bool, head: dict[str, Any]
) -> None:
    case = build()
    for temperature, bias in itertools.product([1.0, 0.7], [True, False]):
        used = case if bias else replace(case, student_bias=None, teacher_bias=None)
        formula = dict(kind=kind, beta=beta, top_k=top_k, tail=tail, temperature=temperature, **head)
        expected = oracle.head(**used.arguments(**formula))
        for chunk_size in (1, 3, 100):
            check(used, expected, chunk_size=chunk_size, **formula)
        check(used, expected, dense_distillation_head, **formula)


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl", "sampled_token"])
@pytest.mark.parametrize("top_k", [None, 3])
def test_gradcheck(kind: str, top_k: int | None) -> None:
    """Against finite differences, which know no closed form. (The surrogate's value is not what it differentiates.)"""
    case = build(n=3, hidden=2, vocabulary=6)

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        used = replace(case, student_hidden=hidden, student_weight=weight, student_bias=bias)
        out = fused_distillation_head(
            **used.arguments(kind=kind, beta=0.3, top_k=top_k, student_softcap=3.0), chunk_size=2
        )
        return out.student_logprob if kind == "sampled_token" else (out.divergence, out.student_logprob)

    assert torch.autograd.gradcheck(function, case.parameters)


@pytest.mark.parametrize("tail", [True, False])
@pytest.mark.parametrize("kind", ["jsd", "reverse_kl"])
def test_a_tie_at_the_kth_place_is_settled_one_way_throughout(tail: bool, kind: str) -> None:
    """Whichever of the tied tokens is kept, value and gradient must mean the same one."""
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
    eye = torch.eye(6, dtype=torch.float64)
    teacher = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.0, 0.3]], dtype=torch.float64)

    def run(head: Any, **more: Any) -> tuple[Tensor, Tensor]:
        hidden = logits.clone().requires_grad_()
        out = head(hidden, eye, teacher, eye, torch.tensor([0]), kind=kind, top_k=2, tail=tail, **more)
        value = out["divergence"] if isinstance(out, dict) else out.divergence
        return value.detach(), torch.autograd.grad(value.sum(), hidden)[0]

    value, gradient = run(fused_distillation_head)
    choices = [run(oracle.head, kept=torch.tensor([[0, other]])) for other in (1, 2, 3)]
    matches = [i for i, (v, _) in enumerate(choices) if torch.allclose(v, value, rtol=1e-12, atol=0)]
    assert len(matches) == 1
    close(gradient, choices[matches[0]][1])


@pytest.mark.parametrize(("kind", "beta"), [*KINDS, ("sampled_token", 0.5)])
@pytest.mark.parametrize(("top_k", "tail"), [(None, True), (3, True), (3, False), (10, True)])
def test_tokens_that_both_forbid_are_as_if_absent(kind: str, beta: float, top_k: int | None, tail: bool) -> None:
    case = build()
    for bias in (case.student_bias, case.teacher_bias):
        assert bias is not None
        bias.data[[0, 6]] = -INF
    case.labels[(case.labels == 0) | (case.labels == 6)] = 1
    if top_k == 10:  # more than the nine that are left: a forbidden token is in the support, with probability zero
        formula: dict[str, Any] = dict(kind=kind, beta=beta)
        expected = oracle.head(**case.arguments(**formula))["divergence"]
        out = fused_distillation_head(**case.arguments(**formula, top_k=10), token_weights=case.weights)
        close(out.divergence, expected, tolerance=1e-6)
        assert all(g.isfinite().all() for g in gradients(out.loss, case))
        return
    formula = dict(kind=kind, beta=beta, top_k=top_k, tail=tail)
    expected = oracle.head(**case.arguments(**formula))
    check(case, expected, chunk_size=3, **formula)
    check(case, expected, dense_distillation_head, **formula)


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_a_token_that_one_side_forbids(kind: str, beta: float) -> None:
    for side in ("student_bias", "teacher_bias"):
        case = build()
        getattr(case, side).data[4] = -INF
        case.labels[case.labels == 4] = 1
        dense, fused = (
            head(**case.arguments(kind=kind, beta=beta)) for head in (dense_distillation_head, fused_distillation_head)
        )
        finite = kind == "jsd" and 0 < beta < 1
        finite |= side == ("teacher_bias" if kind == "forward_kl" or beta == 0 else "student_bias")
        assert dense.divergence.isfinite().all() == finite
        torch.testing.assert_close(fused.divergence, dense.divergence, rtol=1e-12, atol=1e-14)
        if finite:
            wanted = gradients(dense.divergence.sum(), case)
            for actual, w in zip(gradients(fused.divergence.sum(), case), wanted, strict=True):
                close(actual, w)


@pytest.mark.parametrize(("kind", "beta"), [("jsd", 0.5), ("jsd", 0.9), ("forward_kl", 0.5), ("reverse_kl", 0.5)])
def test_probabilities_near_the_smallest_float(kind: str, beta: float) -> None:
    """exp(-103) is the last denormal of fp32; a share of it in the mixture is 0, whose logarithm is -inf."""
    one, eye = torch.ones(1, 1), torch.tensor([0])
    for low in [-80.0, -87.5, -100.0, *torch.arange(-103.0, -104.0, -0.1).tolist(), -300.0]:
        student = torch.tensor([[0.0], [low]]).requires_grad_()
        teacher = torch.tensor([[0.0], [low + 1]])
        out = fused_distillation_head(one, student, one, teacher, eye, torch.ones(1), kind=kind, beta=beta)
        assert abs(out.divergence.item()) < 1e-30
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert gradient.abs().max() < 1e-30


@pytest.mark.parametrize(("kind", "beta"), KINDS)
def test_top_k_that_captures_all_mass_has_the_reference_clamp(kind: str, beta: float) -> None:
    """log(1 - 1) = -inf in the tail would poison value and gradient."""
    case = build(n=4)
    case.student_hidden.data *= 40
    dense, fused = (
        head(**case.arguments(kind=kind, beta=beta, top_k=3))
        for head in (dense_distillation_head, fused_distillation_head)
    )
    torch.testing.assert_close(fused.divergence, dense.divergence, rtol=1e-7, atol=1e-9)
    wanted = gradients(dense.divergence.sum(), case)
    for actual, w in zip(gradients(fused.divergence.sum(), case), wanted, strict=True):
        assert actual.isfinite().all()
        close(actual, w, tolerance=1e-6)


# ------------------------------------------------------------------------------------------------ which gradients, when


@pytest.mark.parametrize("form", ["loss", "values"])
@pytest.mark.parametrize("n", [0, 5])
def test_no_active_token_gives_zeros_and_right_values(form: str, n: int) -> None:
    case = build(n=n)
    expected = oracle.head(**case.arguments())
    if form == "loss":
        out = fused_distillation_head(**case.arguments(), token_weights=torch.zeros(n), chunk_size=2)
        total = out.loss
    else:
        out = fused_distillation_head(**case.arguments(), chunk_size=2)
        total = (0 * out.divergence).sum() + (0 * out.student_logprob).sum()
    for name in VALUES:
        close(getattr(out, name), expected[name], name)
    assert total.item() == 0.0
    for parameter, gradient in zip(case.parameters, gradients(total, case), strict=True):
        assert torch.equal(gradient, torch.zeros_like(parameter))


@pytest.mark.parametrize("frozen", [("student_weight",), ("student_weight", "student_bias"), ("student_hidden",)])
@pytest.mark.parametrize("weighted", [True, False])
def test_what_is_frozen_gets_no_gradient_and_the_rest_does(frozen: tuple[str, ...], weighted: bool) -> None:
    case = build()

    def run() -> list[Tensor]:
        out = fused_distillation_head(
            **case.arguments(), token_weights=case.weights if weighted else None, chunk_size=3
        )
        return gradients(out.loss if weighted else (case.weights * out.divergence).sum(), case)

    names = [n for n in ("student_hidden", "student_weight", "student_bias") if n not in frozen]
    wanted = dict(zip(("student_hidden", "student_weight", "student_bias"), run(), strict=True))
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    assert len(case.parameters) == len(names)
    for name, gradient in zip(names, run(), strict=True):
        close(gradient, wanted[name], name)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_tied_embedding_gets_the_gradients_of_both_uses(weighted: bool) -> None:
    """The weight of the head is the embedding too, of student and (as a live teacher) of teacher."""
    case = build(hidden=5, teacher_hidden=5)
    tokens = case.labels.flip(0)
    total = []
    for head in (fused_distillation_head, dense_distillation_head):
        weight = case.student_weight.detach().clone().requires_grad_()
        arguments = case.arguments(student_hidden=torch.tanh(weight[tokens]), student_weight=weight)
        arguments |= dict(teacher_hidden=torch.sin(weight[tokens]).detach(), teacher_weight=weight)
        out = head(**arguments, token_weights=case.weights if weighted else None)
        (out.loss if weighted else (case.weights * out.divergence).sum()).backward()
        total.append(weight.grad)
    close(*total)


def test_gradients_accumulate_over_calls() -> None:
    case = build()
    once = gradients(fused_distillation_head(**case.arguments(), token_weights=case.weights).loss, case)
    for _ in range(2):
        fused_distillation_head(**case.arguments(), token_weights=case.weights).loss.backward()
    for parameter, gradient in zip(case.parameters, once, strict=True):
        close(parameter.grad, 2 * gradient)


def test_gradients_are_handed_over_once() -> None:
    case = build()
    loss = fused_distillation_head(**case.arguments(), token_weights=case.weights).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="twice"):
        loss.backward()


@pytest.mark.parametrize("weighted", [True, False])
def test_without_labels_there_are_no_log_probabilities(weighted: bool) -> None:
    case = build()
    weights = case.weights if weighted else None
    out = fused_distillation_head(**case.arguments(labels=None), token_weights=weights)
    assert out.student_logprob is None and out.teacher_logprob is None
    expected = oracle.head(**case.arguments())
    close(out.divergence, expected["divergence"])
    wanted = gradients((case.weights * expected["divergence"]).sum(), case, keep=True)
    total = out.loss if weighted else (case.weights * out.divergence).sum()
    for actual, w in zip(gradients(total, case), wanted, strict=True):
        close(actual, w)


def test_weights_that_depend_on_the_values() -> None:
    """Clipped importance ratios; every chunk sees its own rows."""
    case = build()
    old = case.on_logprob

    def ratios(chunk: HeadOutput, rows: slice) -> Tensor:
        seen.append(rows)
        assert chunk.loss is None and not chunk.divergence.requires_grad
        return (chunk.student_logprob - old[rows]).exp().clamp_max(2.0) * (1 + chunk.student_entropy)

    expected = oracle.head(**case.arguments())
    weights = ((expected["student_logprob"] - old).exp().clamp_max(2.0) * (1 + expected["student_entropy"])).detach()
    wanted = gradients((weights * expected["divergence"]).sum(), case)
    for head in (fused_distillation_head, dense_distillation_head):
        seen: list[slice] = []
        out = head(**case.arguments(), token_weights=ratios, chunk_size=3)
        close(out.loss, (weights * expected["divergence"]).sum())
        for actual, w in zip(gradients(out.loss, case), wanted, strict=True):
            close(actual, w)
        assert [i for rows in seen for i in range(7)[rows]] == list(range(7))


@pytest.mark.parametrize("head", [fused_distillation_head, dense_distillation_head])
@pytest.mark.parametrize("function", [True, False])
def test_token_weights_are_constant(head: Any, function: bool) -> None:
    case = build()
    learned = case.weights.clone().requires_grad_()
    out = head(**case.arguments(), token_weights=(lambda chunk, rows: learned[rows]) if function else learned)
    assert torch.autograd.grad(out.loss, [learned, case.student_hidden], allow_unused=True)[0] is None


# ------------------------------------------------------------------------------------------------ memory and work


class Watch(TorchDispatchMode):
    """Elements of the largest tensor that is made (views do not count), and multiplications in matmuls."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.multiplications = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in inputs}
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        new = [t.numel() for t in made if t.untyped_storage().data_ptr() not in known]
        self.largest = max([self.largest, *new])
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            a, b = args[:2] if func.overloadpacket is torch.ops.aten.mm else args[1:3]
            self.multiplications += a.shape[0] * a.shape[1] * b.shape[1]
        return result


@pytest.mark.parametrize("top_k", [None, 3])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_logits_of_all_tokens_never_exist_and_no_matmul_is_wasted(
    top_k: int | None, weighted: bool, frozen: bool
) -> None:
    n, h, v, chunk = 12, 7, 50, 4
    case = build(n, h, h, v)
    case = replace(case, student_bias=None, teacher_bias=None)
    if frozen:
        case.student_weight.requires_grad_(False)

    def run(head: Any) -> Watch:
        with Watch() as watch:
            out = head(
                **case.arguments(top_k=top_k), token_weights=case.weights if weighted else None, chunk_size=chunk
            )
            (out.loss if weighted else (out.divergence + out.student_logprob).sum()).backward()
        return watch

    assert run(dense_distillation_head).largest >= n * v
    watch = run(fused_distillation_head)
    assert watch.largest == (chunk * v if frozen else h * v)
    matmuls = 4 if weighted else 6 if top_k is None else 5
    assert watch.multiplications == (matmuls - frozen) * n * v * h


@pytest.mark.parametrize("weighted", [True, False])
def test_without_gradients_there_are_two_matmuls(weighted: bool) -> None:
    case = replace(build(12, 7, 7, 50), student_bias=None, teacher_bias=None)
    with torch.no_grad(), Watch() as watch:
        fused_distillation_head(**case.arguments(), token_weights=case.weights if weighted else None, chunk_size=4)
    assert watch.multiplications == 2 * 12 * 50 * 7
    assert watch.largest == 4 * 50


def test_the_default_chunk_holds_a_fixed_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunks._CHUNK_LOGITS, "cpu", 250)
    case = replace(build(12, 2, 2, 50), student_bias=None, teacher_bias=None)
    with Watch() as watch:
        fused_distillation_head(**case.arguments(), token_weights=case.weights).loss.backward()
    assert watch.largest == 4 * 50  # 12 rows in chunks of at most 5: three of 4


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("n", "frozen", "rows"), [(10, False, 10), (10, True, 5), (11, False, 4), (16, False, 4)])
def test_a_lone_chunk_is_twice_as_long_and_lets_the_teacher_go_first(
    weighted: bool, n: int, frozen: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits and the weight's gradient must not be in memory at once."""
    monkeypatch.setitem(chunks._CHUNK_LOGITS, "cpu", 5 * 50)
    heads, parts = [], []
    original = kernels.Gradients.add

    def add(self: Any, part: slice, gradient: Tensor) -> None:
        heads.append(sum(isinstance(o, kernels.Head) for o in gc.get_objects()))
        parts.append(part.stop - part.start)
        original(self, part, gradient)

    monkeypatch.setattr(kernels.Gradients, "add", add)
    case = replace(build(n, 15, 3, 50), student_bias=None, teacher_bias=None)
    case.student_weight.requires_grad_(not frozen)
    out = fused_distillation_head(**case.arguments(), token_weights=case.weights if weighted else None)
    (out.loss if weighted else out.divergence.sum()).backward()
    assert max(parts) == rows
    assert heads[-1] == 1 and set(heads[:-1]) <= {2}


def test_the_eager_part_runs_on_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    case = build()
    expected = oracle.head(**case.arguments())
    monkeypatch.setitem(kernels._EAGER_LOGITS, "cpu", 2 * 11)
    check(case, expected, chunk_size=7)


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize("kind", ["jsd", "forward_kl", "reverse_kl"])
def test_a_common_offset_of_the_logits_costs_no_digits(kind: str) -> None:
    """log Z - E[z] would keep 4 digits of an entropy at an offset of 1000. Multiples of 1/64 are exact in fp32."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randint(-200, 200, (1, 40), generator=generator) / 64 for _ in range(2))
    one, labels = torch.ones(1, 1), torch.tensor([3])
    for offset in (0.0, 1000.0, -1000.0):
        out = fused_distillation_head(one, student.T + offset, one, teacher.T + offset, labels, kind=kind)
        expected = oracle.head(one, student.T, one, teacher.T, labels, kind=kind)
        for name in VALUES:
            assert getattr(out, name).dtype == torch.float32
            torch.testing.assert_close(getattr(out, name).double(), expected[name], rtol=2e-6, atol=1e-7)


# dtype: relative error of D, error of entropies and log-probabilities in nats, relative error of gradients (norms).
# About 2.5 times the largest of three seeds: fp32 3e-7, 2e-6, 1e-6; bf16 4e-3, 3e-2, 2e-2; fp16 2e-4, 2e-3, 1e-3.
TOLERANCES = {
    torch.float32: (1e-6, 4e-6, 3e-6),
    torch.bfloat16: (1e-2, 6e-2, 6e-2),
    torch.float16: (4e-4, 6e-3, 3e-3),
}


def rounded(dtype: torch.dtype) -> tuple[Case, Case]:
    """A case in `dtype`, and the same numbers in float64."""
    case = build(n=48, hidden=32, teacher_hidden=24, vocabulary=101, dtype=dtype)
    exact = replace(case)
    for f in fields(case):
        if f.name not in ("labels", "weights", "on_logprob"):
            value = getattr(case, f.name)
            if f.name.endswith("weight"):
                value.data.div_(2)  # entropies of 2.6 nats
            setattr(exact, f.name, value.detach().double().requires_grad_())
    return case, exact


def errors(out: HeadOutput, grads: list[Tensor], expected: dict[str, Tensor], wanted: list[Tensor]) -> list[float]:
    relative = ((out.divergence - expected["divergence"]).norm() / expected["divergence"].norm()).item()
    nats = max((getattr(out, name) - expected[name]).abs().max().item() for name in VALUES[1:])
    norms = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(grads, wanted, strict=True)]
    return [relative, nats, max(norms)]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("top_k", [None, 20])
@pytest.mark.parametrize("weighted", [True, False])
def test_half_precision_stays_within_its_tolerance_and_no_worse_than_dense(
    dtype: torch.dtype, top_k: int | None, weighted: bool
) -> None:
    case, exact = rounded(dtype)
    expected = oracle.head(**exact.arguments(top_k=top_k))
    wanted = gradients((exact.weights * expected["divergence"]).sum(), exact, keep=True)

    def run(head: Any) -> list[float]:
        out = head(**case.arguments(top_k=top_k), token_weights=case.weights if weighted else None, chunk_size=16)
        assert all(getattr(out, name).dtype == torch.float32 for name in VALUES)
        total = out.loss if weighted else (case.weights.float() * out.divergence).sum()
        grads = gradients(total, case)
        assert all(g.dtype == dtype for g in grads)
        return errors(out, grads, expected, wanted)

    fused, dense = run(fused_distillation_head), run(dense_distillation_head)
    for error, tolerance, other in zip(fused, TOLERANCES[dtype], dense, strict=True):
        assert error <= tolerance
        assert error <= 2 * other + 1e-6


def test_fp32_logits_of_a_bf16_head_where_a_matmul_can_write_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a CUDA device, with its two matmuls done here in fp32: separate logits and gradient buffers."""
    calls = []

    def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
        calls.append("mm")
        out.copy_(a.float() @ b.float())

    def addmm(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        assert a.dtype == b.dtype == torch.bfloat16 and total.dtype == torch.float32
        calls.append("addmm")
        total.copy_(a.float() @ b.float() if beta == 0 else total + a.float() @ b.float())

    case, exact = rounded(torch.bfloat16)
    for top_k in (None, 20):
        expected = oracle.head(**exact.arguments(top_k=top_k))
        wanted = gradients((exact.weights * expected["divergence"]).sum(), exact, keep=True)
        results = []
        for wide in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(kernels, "_writes_fp32", lambda device, dtype, wide=wide: wide)
                patch.setattr(kernels, "_mm_fp32", mm)
                patch.setattr(kernels, "_addmm_fp32", addmm)
                out = fused_distillation_head(**case.arguments(top_k=top_k), token_weights=case.weights, chunk_size=9)
                grads = gradients(out.loss, case)
                assert [g.dtype for g in grads] == [torch.bfloat16] * 3
                results.append(errors(out, grads, expected, wanted))
        narrow, wide_errors = results
        assert wide_errors[0] < 1e-5 and wide_errors[1] < 1e-5
        assert wide_errors[0] < narrow[0] / 100 and wide_errors[2] < 5e-3
    assert set(calls) == {"mm", "addmm"}


@pytest.mark.parametrize("weighted", [True, False])
def test_autocast_runs_the_matmuls_in_its_dtype(weighted: bool) -> None:
    case = build(n=20, hidden=32, teacher_hidden=24, vocabulary=101, dtype=torch.float32)
    results = []
    for head in (fused_distillation_head, dense_distillation_head):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = head(**case.arguments(), token_weights=case.weights if weighted else None, chunk_size=8)
            total = out.loss if weighted else (case.weights.float() * out.divergence).sum()
        grads = gradients(total, case)
        assert all(g.dtype == torch.float32 for g in grads)
        results.append((out, grads))
    (fused, grads), (dense, dense_grads) = results
    exact = fused_distillation_head(**case.arguments())
    assert not torch.allclose(fused.divergence, exact.divergence, rtol=1e-5)  # it did round
    torch.testing.assert_close(fused.divergence, dense.divergence, rtol=0.02, atol=2e-3)
    for a, b in zip(grads, dense_grads, strict=True):
        assert (a - b).norm() < 0.02 * b.norm()


def test_a_loss_scaler_lifts_float16_gradients_before_they_are_rounded() -> None:
    """A weight of 1e-7 times a probability underflows in float16; times a scale of 2^16 it does not."""
    case = build(n=20, hidden=8, vocabulary=30, dtype=torch.float16)
    case.student_bias = case.teacher_bias = None
    weights = torch.full((20,), 1e-7)
    out = fused_distillation_head(**case.arguments(), token_weights=weights, chunk_size=8)
    assert not any(getattr(out, name).requires_grad for name in VALUES)
    scaled = gradients(out.loss * 2.0**16, case)
    reference = fused_distillation_head(**case.arguments(), token_weights=torch.full((20,), 1e-7 * 2**16))
    for actual, wanted in zip(scaled, gradients(reference.loss, case), strict=True):
        assert actual.abs().max() > 1e-4
        assert (actual - wanted).norm() < 5e-3 * wanted.norm()


def test_a_teacher_of_another_dtype() -> None:
    """An fp32 EMA teacher of a bf16 student keeps its precision."""
    case = build(n=10, dtype=torch.bfloat16)
    precise = build(n=10, dtype=torch.float32)
    case = replace(case, teacher_hidden=precise.teacher_hidden, teacher_weight=precise.teacher_weight)
    case = replace(case, teacher_bias=precise.teacher_bias)
    out = fused_distillation_head(**case.arguments())
    logits = precise.teacher_hidden @ precise.teacher_weight.T + precise.teacher_bias
    torch.testing.assert_close(out.teacher_entropy, token_entropy(logits), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------------------------ compilation


@pytest.fixture
def fresh_compiler(monkeypatch: pytest.MonkeyPatch) -> Any:
    def reset() -> None:
        torch._dynamo.reset()
        kernels._compile.cache_clear()

    reset()
    monkeypatch.setattr(kernels, "_failed", set())
    yield monkeypatch
    monkeypatch.undo()
    reset()


FORMULAS = [
    dict(),
    dict(beta=0.2, temperature=0.7, **EVERYTHING),
    dict(kind="forward_kl"),
    dict(kind="reverse_kl"),
    dict(top_k=3),
    dict(top_k=3, tail=False, student_softcap=2.0),
    dict(kind="sampled_token"),
]


@pytest.mark.parametrize("formula", [FORMULAS[1], FORMULAS[5], FORMULAS[6]], ids=str)
def test_the_elementwise_part_is_one_graph_for_all_numbers_of_rows(
    formula: dict[str, Any], fresh_compiler: pytest.MonkeyPatch
) -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append([type(i) for i in inputs])
        return graph

    fresh_compiler.setattr(torch, "compile", _with_backend(torch.compile, backend))
    for n, chunk in ((7, 4), (9, 9), (40, 7)):  # parts of 4, 3, 9, 7 and 5 rows
        case = build(n=n)
        out = fused_distillation_head(
            **case.arguments(**formula), token_weights=case.weights, chunk_size=chunk, compiled=True
        )
        expected = oracle.head(**case.arguments(**formula))
        close(out.divergence, expected["divergence"], tolerance=1e-11)
        wanted = gradients((case.weights * expected["divergence"]).sum(), case, keep=True)
        for actual, w in zip(gradients(out.loss, case), wanted, strict=True):
            close(actual, w, tolerance=1e-11)
    assert len(graphs) == 2
    assert not any(float in kinds for kinds in graphs), "a number of the formula became an input of the kernel"


def _with_backend(compile: Any, backend: Any) -> Any:
    return lambda function, **options: compile(function, backend=backend, **options)


def test_two_formulas_stay_constants_of_their_graphs(fresh_compiler: pytest.MonkeyPatch) -> None:
    inputs: list[int] = []

    def backend(graph: Any, tensors: Any) -> Any:
        inputs.append(sum(isinstance(t, Tensor) for t in tensors))
        return graph

    fresh_compiler.setattr(torch, "compile", _with_backend(torch.compile, backend))
    case = build()
    for beta in (0.5, 0.2, 0.3):
        expected = oracle.head(**case.arguments(beta=beta))["divergence"]
        close(fused_distillation_head(**case.arguments(beta=beta), compiled=True).divergence, expected)
    assert inputs == [2, 2, 2]


def test_compiled_by_the_real_compiler(fresh_compiler: pytest.MonkeyPatch) -> None:
    """Value and gradients in float64, chunks of 4 and 3 rows."""
    case = build()
    formula: dict[str, Any] = dict(beta=0.2, temperature=0.7)
    expected = oracle.head(**case.arguments(**formula))
    out = fused_distillation_head(**case.arguments(**formula), token_weights=case.weights, chunk_size=4, compiled=True)
    for name in VALUES:
        close(getattr(out, name), expected[name], name)
    wanted = gradients((case.weights * expected["divergence"]).sum(), case)
    for actual, w in zip(gradients(out.loss, case), wanted, strict=True):
        close(actual, w)


@pytest.mark.slow
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_formula_compiled(
    formula: dict[str, Any], dtype: torch.dtype, fresh_compiler: pytest.MonkeyPatch
) -> None:
    case = build(n=11, vocabulary=67, dtype=dtype)
    if dtype == torch.float64:
        check(case, oracle.head(**case.arguments(**formula)), chunk_size=4, compiled=True, **formula)
        return
    results = []
    for compiled in (True, False):
        out = fused_distillation_head(
            **case.arguments(**formula), token_weights=case.weights, chunk_size=4, compiled=compiled
        )
        results.append((out, gradients(out.loss, case)))
    (a, grads_a), (b, grads_b) = results
    for name in VALUES:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-6)
    for x, y in zip(grads_a, grads_b, strict=True):
        assert (x - y).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * y.norm()


def test_without_a_compiler_it_runs_eagerly_and_says_so_once(fresh_compiler: pytest.MonkeyPatch) -> None:
    def backend(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no C++ compiler found")

    fresh_compiler.setattr(torch, "compile", _with_backend(torch.compile, backend))
    fresh_compiler.setattr(kernels, "_COMPILE_FROM_VOCABULARY", 11)
    case = build()
    expected = oracle.head(**case.arguments())
    with pytest.warns(UserWarning, match="without torch.compile") as caught:
        check(case, expected, chunk_size=4)
        check(case, expected, chunk_size=4)
    assert len(caught) == 1
    with pytest.raises(Exception, match="no C\\+\\+ compiler found"):
        fused_distillation_head(**case.arguments(), compiled=True)


def test_too_many_formulas_for_the_compiler_run_eagerly(fresh_compiler: pytest.MonkeyPatch) -> None:
    fresh_compiler.setattr(torch, "compile", _with_backend(torch.compile, "eager"))
    fresh_compiler.setattr(kernels, "_COMPILE_FROM_VOCABULARY", 11)
    case = build()
    with torch._dynamo.config.patch(recompile_limit=1), pytest.warns(UserWarning, match="without torch.compile"):
        for beta in (0.5, 0.2, 0.3):
            expected = oracle.head(**case.arguments(beta=beta))["divergence"]
            close(fused_distillation_head(**case.arguments(beta=beta)).divergence, expected)


@pytest.mark.parametrize(
    ("vocabulary", "compiled", "calls"), [(11, None, 2), (10, None, 0), (11, False, 0), (5, True, 2)]
)
def test_only_large_vocabularies_are_compiled(
    vocabulary: int, compiled: bool | None, calls: int, fresh_compiler: pytest.MonkeyPatch
) -> None:
    used = []

    def compile(function: Any, **options: Any) -> Any:
        used.append(function)
        return function

    fresh_compiler.setattr(torch, "compile", compile)
    fresh_compiler.setattr(kernels, "_COMPILE_FROM_VOCABULARY", 11)
    case = build(vocabulary=vocabulary)
    fused_distillation_head(**case.arguments(), token_weights=case.weights, compiled=compiled)
    assert len(used) == calls


# ------------------------------------------------------------------------------------------------ sharded parameters


def test_a_sharded_weight_is_gathered_unless_it_needs_a_gradient() -> None:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    case = build()
    plain = fused_distillation_head(**case.arguments())
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        teacher = distribute_tensor(case.teacher_weight.detach(), mesh, [Shard(0)])
        out = fused_distillation_head(**case.arguments(teacher_weight=teacher))
        assert torch.equal(out.divergence, plain.divergence)
        student = distribute_tensor(case.student_weight.detach(), mesh, [Shard(0)])
        out = fused_distillation_head(**case.arguments(student_weight=student))
        assert torch.equal(out.divergence, plain.divergence)
        with pytest.raises(ValueError, match="inside the forward of the module that FSDP wraps"):
            fused_distillation_head(**case.arguments(student_weight=student.requires_grad_()))
    finally:
        dist.destroy_process_group()


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"kind": "kl"}, "kind.*reverse_kl"),
        ({"beta": 1.1}, "beta"),
        ({"top_k": 0}, "top_k"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": NAN}, "temperature"),
        ({"student_scale": -1.0}, "student_scale"),
        ({"teacher_scale": INF}, "teacher_scale"),
        ({"student_softcap": 0.0}, "student_softcap"),
        ({"teacher_softcap": -30.0}, "teacher_softcap"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"kind": "sampled_token", "labels": None}, "pass labels"),
        ({"labels": torch.zeros(6, dtype=torch.long)}, "labels.*\\[7\\].*6"),
        ({"labels": torch.zeros(7, 1, dtype=torch.long)}, "labels"),
        ({"token_weights": torch.ones(7, 1)}, "token_weights"),
        ({"token_weights": torch.ones(())}, "token_weights"),
        ({"token_weights": lambda chunk, rows: torch.ones(1)}, "result of token_weights"),
        ({"student_hidden": torch.zeros(7, 4)}, "student_hidden.*\\[N, H\\]"),
        ({"student_hidden": torch.zeros(1, 7, 5)}, "student_hidden.*\\[N, H\\]"),
        ({"teacher_hidden": torch.zeros(7, 5)}, "teacher_hidden"),
        ({"teacher_hidden": torch.zeros(6, 4)}, "7 rows and teacher_hidden 6"),
        ({"teacher_weight": torch.zeros(12, 4)}, "11 tokens and teacher_weight 12"),
        ({"student_bias": torch.zeros(12)}, "student_bias"),
        ({"teacher_bias": torch.zeros(11, 1)}, "teacher_bias"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        fused_distillation_head(**(build().arguments() | change))


def test_the_twins_have_one_signature_and_the_definitions_of_divergence() -> None:
    import inspect

    fused, dense = (inspect.signature(f) for f in (fused_distillation_head, dense_distillation_head))
    assert fused == dense
    for name, parameter in inspect.signature(divergence).parameters.items():
        if "logits" not in name:
            assert fused.parameters[name].default == parameter.default
