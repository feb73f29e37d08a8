"""What test_triton_kernels.py asks of the Triton kernels, in a process that has Triton. Importing this takes none.

python triton_cases.py RESULTS.json interpreted        on CPU tensors, under Triton's interpreter
python triton_cases.py RESULTS.json compiled           for GPUs that need not be here
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pgpo.core import _head_formulas as formulas
from pgpo.core import _head_kernels as head_kernels
from pgpo.core import dense_distillation_head, fused_distillation_head
from pgpo.core._head_formulas import Spec

INF, NAN = math.inf, math.nan
KINDS = [("jsd", 0.5), ("jsd", 0.2), ("jsd", 0.0), ("jsd", 1.0), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
DIRECTIONS = [("jsd", 0.2), ("forward_kl", 0.5), ("reverse_kl", 0.5)]
NEUTRAL = dict(temperature=1.0, student_scale=1.0, teacher_scale=1.0, student_softcap=None, teacher_softcap=None)
EVERYTHING = dict(temperature=0.7, student_scale=0.6, teacher_scale=1.7, student_softcap=2.5, teacher_softcap=4.0)
HEADS: dict[str, dict[str, Any]] = dict(
    neutral=NEUTRAL,
    everything=EVERYTHING,
    warm=NEUTRAL | dict(temperature=1.6),
    scaled=NEUTRAL | dict(student_scale=0.6, teacher_scale=1.7),
    student_capped=NEUTRAL | dict(student_softcap=30.0),
)
# rows, vocabulary, block: one block or several, the last one whole or not. A block of a row takes 5 ms.
SHAPES = [(1, 1, 16), (2, 7, 4), (3, 1000, 256), (4, 1025, 512), (5, 2049, 1024), (2, 64, 32)]
DTYPES = dict(fp64=torch.float64, fp32=torch.float32, bf16=torch.bfloat16, fp16=torch.float16)
# Largest error relative to the largest value. In fp32 the sums run in another order.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}

INTERPRETED: dict[str, Callable[[], Any]] = {}
COMPILED: dict[str, Callable[[], Any]] = {}


def case(cases: dict[str, Callable[[], Any]], *choices: Any) -> Any:
    """Register a function, once for each of `choices` ({name: value} each) that it takes."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        for chosen in itertools.product(*(c.items() for c in choices)):
            name = "-".join([function.__name__, *(str(key) for key, _ in chosen)])
            assert name not in cases
            cases[name] = partial(function, *(value for _, value in chosen))
        return function

    return register


def named(values: Any) -> dict[str, Any]:
    return {"_".join(map(str, v)) if isinstance(v, tuple) else str(v): v for v in values}


def spec_of(kind: str, beta: float, top_k: int | None = None, **head: Any) -> Spec:
    return Spec(kind, beta, top_k, True, **NEUTRAL | head)


def kernels(block: int | None = None) -> Any:
    from pgpo.core import triton_kernels

    if block is not None:
        triton_kernels._STATISTICS_BLOCK = triton_kernels._GRADIENT_BLOCK = block
        triton_kernels._block = lambda tokens, dtype: tokens
    return triton_kernels


def random(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float, name: str = "") -> None:
    """Infinite and undefined in the same places, else the largest error relative to the largest value."""
    actual, expected = actual.double(), expected.double()
    assert actual.shape == expected.shape, name
    for special in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(special(actual), special(expected)), f"{name}: {special.__name__}"
    finite = expected.isfinite()
    if finite.any():
        error = (actual - expected)[finite].abs().max().item()
        largest = max(expected[finite].abs().max().item(), 1e-3)
        assert error <= tolerance * largest, f"{name}: {error} of {largest}"


def check_statistics(spec: Spec, student: Tensor, teacher: Tensor, tolerance: float | None = None) -> Tensor:
    """The table by what it is for: log-probabilities, entropies, D and K. Returns the formulas' own, in fp64."""
    from pgpo.core import triton_kernels

    dtype = torch.promote_types(student.dtype, torch.float32)
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    actual = triton_kernels.statistics(spec, dtype, student, teacher)
    expected = formulas.statistics(spec, torch.float64, student, teacher)
    assert actual.dtype == dtype and actual.shape == expected.shape
    for side, raw, logits, top, log in (
        ("student", student, formulas.student_logits, formulas.TOP_S, formulas.LOG_S),
        ("teacher", teacher, formulas.teacher_logits, formulas.TOP_T, formulas.LOG_T),
    ):
        # the two columns apart, as each is used
        z, exact = logits(spec, raw, dtype), logits(spec, raw, torch.float64)
        ours = z.double() - actual[:, [top]].double() - actual[:, [log]].double()
        close(ours, exact - expected[:, [top]] - expected[:, [log]], tolerance, f"log p of the {side}")
        whole = ~z.isnan().any(-1)
        close(actual[whole, top], z.amax(-1)[whole], tolerance, f"max of the {side}")
    names = ("entropy of the student", "entropy of the teacher", "D", "K")
    for name, i in zip(names, (formulas.H_S, formulas.H_T, formulas.D, formulas.K)):
        if i < expected.shape[1]:
            close(actual[:, i], expected[:, i], tolerance, name)
    return expected


def check_gradient(
    spec: Spec,
    student: Tensor,
    teacher: Tensor | None,
    table: Tensor,
    weights: tuple[Tensor | None, Tensor | None, Tensor | None],
    labels: Tensor | None,
    out: Tensor | None = None,
    tolerance: float | None = None,
) -> None:
    """Both write the same, into `out` or over student. table: fp64."""
    from pgpo.core import triton_kernels

    dtype = torch.promote_types(student.dtype, torch.float32)
    written = (student if out is None else out).dtype
    tolerance = TOLERANCE[dtype] if tolerance is None else tolerance
    if written.itemsize == 2:
        tolerance = 2.0 ** (-7 if written == torch.bfloat16 else -10)  # the interpreter cuts off where a GPU rounds
    expected = torch.full_like(student, NAN, dtype=torch.float64)
    formulas.logit_gradient(spec, torch.float64, student.double(), teacher, table, *weights, labels, expected)
    before = student.clone()
    triton_kernels.logit_gradient(spec, dtype, student, teacher, table.to(dtype), *weights, labels, out)
    close(student if out is None else out, expected, tolerance, "gradient")
    if out is not None:
        assert torch.equal(student.nan_to_num(0.5), before.nan_to_num(0.5)), "written over its input"


def everything_of(spec: Spec, student: Tensor, teacher: Tensor, tolerance: float | None = None) -> None:
    """The table, and the gradient of all three kinds at once."""
    rows, vocabulary = student.shape
    dtype = torch.promote_types(student.dtype, torch.float32)
    table = check_statistics(spec, student, teacher, tolerance)
    weights = tuple(random(rows, 1, scale=1.0, seed=10 + i).to(dtype) for i in range(3))
    labels = torch.tensor([[(7 * i + vocabulary - 1) % vocabulary] for i in range(rows)])
    if spec.support != "full":
        weights = (None, *weights[1:])  # type: ignore[assignment]
    used = teacher if spec.support == "full" else None
    out = torch.full_like(student, NAN)
    check_gradient(spec, student, used, table, weights, labels, out, tolerance)


# ---------------------------------------------------------------------------------------------- under the interpreter


@case(INTERPRETED, named(KINDS))
def formula(kind: tuple[str, float]) -> None:
    for rows, vocabulary, block in SHAPES:
        kernels(block)
        student, teacher = random(rows, vocabulary, seed=1), random(rows, vocabulary, seed=2)
        everything_of(spec_of(*kind), student, teacher)


@case(INTERPRETED, named(DIRECTIONS))
def formula_with_everything(kind: tuple[str, float]) -> None:
    for rows, vocabulary, block in SHAPES:
        kernels(block)
        student, teacher = random(rows, vocabulary, seed=1), random(rows, vocabulary, seed=2)
        everything_of(spec_of(*kind, **EVERYTHING), student, teacher)


@case(INTERPRETED, {name: HEADS[name] for name in ("warm", "scaled", "student_capped")})
def head_options(head: dict[str, Any]) -> None:
    kernels(32)
    for scale in (0.01, 3.0, 40.0):  # tanh near 0, in between, saturated
        everything_of(spec_of("jsd", 0.3, **head), random(2, 50, scale=scale, seed=1), random(2, 50, seed=2))


@case(INTERPRETED, {name: DTYPES[name] for name in ("fp64", "fp32")})
def tanh_keeps_its_digits(dtype: torch.dtype) -> None:
    """Relative to itself, also near 0. The maximum of a vocabulary of one token is its capped logit."""
    sizes = torch.logspace(-7, 1.5, 25, dtype=torch.float64)
    logits = torch.cat([sizes, -sizes, torch.tensor([0.0, 0.5, -0.5, INF, -INF])]).to(dtype).unsqueeze(-1)
    spec = spec_of("sampled_token", 0.5, student_softcap=1.0)
    ours = kernels(16).statistics(spec, dtype, logits, logits)[:, [formulas.TOP_S]]
    torch.testing.assert_close(ours, torch.tanh(logits), rtol=4 * torch.finfo(dtype).eps, atol=0)


@case(INTERPRETED, {name: DTYPES[name] for name in ("fp32", "bf16", "fp16")}, named(DIRECTIONS))
def precision(dtype: torch.dtype, kind: tuple[str, float]) -> None:
    for head in (NEUTRAL, EVERYTHING):
        for rows, vocabulary, block in ((3, 7, 4), (2, 1025, 512)):
            kernels(block)
            student, teacher = random(rows, vocabulary, seed=1).to(dtype), random(rows, vocabulary, seed=2).to(dtype)
            everything_of(spec_of(*kind, **head), student, teacher)


@case(INTERPRETED)
def sides_of_unequal_dtype() -> None:
    kernels(32)
    for student, teacher, dtype in itertools.product(*[DTYPES.values()] * 2, [torch.float32, torch.float64]):
        if dtype == torch.float64 or torch.float64 not in (student, teacher):
            a, b = random(1, 40, seed=1).to(student), random(1, 40, seed=2).to(teacher)
            spec = spec_of("jsd", 0.2)
            table = kernels().statistics(spec, dtype, a, b)
            close(table[:, formulas.D], formulas.statistics(spec, torch.float64, a, b)[:, formulas.D], TOLERANCE[dtype])


@case(INTERPRETED, dict(top_k=("jsd", 3), label=("sampled_token", None)))
def other_supports(support: tuple[str, int | None]) -> None:
    kernels(16)
    for head in (NEUTRAL, EVERYTHING):
        everything_of(spec_of(support[0], 0.5, support[1], **head), random(3, 37, seed=1), random(3, 37, seed=2))


@case(INTERPRETED)
def any_of_the_three_weights() -> None:
    kernels(4)
    student, teacher = random(3, 7, seed=1), random(3, 7, seed=2)
    labels = torch.tensor([[6], [0], [3]])
    for kind, given, place in itertools.product(DIRECTIONS, itertools.product([True, False], repeat=3), [True, False]):
        spec = spec_of(*kind, **EVERYTHING)
        table = formulas.statistics(spec, torch.float64, student, teacher)
        weights = tuple(random(3, 1, scale=1.0, seed=10 + i) if g else None for i, g in enumerate(given))
        out = torch.full_like(student, NAN) if place else None
        check_gradient(
            spec,
            student.clone(),
            teacher if given[0] else None,
            table,
            weights,  # type: ignore[arg-type]
            labels if given[1] else None,
            out,
        )


@case(INTERPRETED, named(DIRECTIONS), dict(student=(True, False), teacher=(False, True), both=(True, True)))
def forbidden(kind: tuple[str, float], sides: tuple[bool, bool]) -> None:
    """Single tokens; whole blocks at the start, in the middle and at the end; all but one token; all."""
    kernels(16)
    student, teacher = random(7, 43, seed=1), random(7, 43, seed=2)
    for forbids, logits in zip(sides, (student, teacher)):
        if forbids:
            logits[0, [0, 6, 42]] = -INF
            logits[1, :19] = -INF
            logits[2, 16:32] = -INF
            logits[3, 30:] = -INF
            logits[4, :42] = -INF
            logits[5, 1:] = -INF
            logits[6] = -INF
    everything_of(spec_of(*kind), student, teacher)
    everything_of(spec_of(*kind), student.float(), teacher.float())
    some = slice(1, 3)  # a cap ends at -cap: it allows what was forbidden
    everything_of(spec_of(*kind, **EVERYTHING), student[some], teacher[some])


@case(INTERPRETED, named(DIRECTIONS), {name: DTYPES[name] for name in ("fp64", "fp32")})
def extreme_logits(kind: tuple[str, float], dtype: torch.dtype) -> None:
    """Each side within 10 000 of the other; maxima that rise or fall by as much from block to block."""
    kernels(16)
    student, teacher = random(4, 43, seed=1), random(4, 43, seed=2)
    for logits, shift in ((student, 0), (teacher, 1)):
        logits[0, 5 + shift] = 1e4
        logits[1, 40] = -1e4
        logits[2] = torch.linspace(-1e4, 1e4, 43)
        logits[3] = torch.linspace(1e4, -1e4, 43)
    everything_of(spec_of(*kind), student.to(dtype), teacher.to(dtype))


@case(INTERPRETED, named([("jsd", 0.5), ("jsd", 0.9), ("forward_kl", 0.5), ("reverse_kl", 0.5)]))
def probabilities_near_the_smallest_float(kind: tuple[str, float]) -> None:
    """exp(-103) is the last denormal of fp32; a share of it in the mixture is 0, whose logarithm is -inf."""
    kernels(4)
    low = torch.tensor([-80.0, -87.5, -100.0, *torch.arange(-103.0, -104.0, -0.1).tolist(), -300.0])
    student = torch.cat([torch.zeros(1), low]).expand(2, -1).contiguous()
    teacher = torch.cat([torch.zeros(1), low + 1]).expand(2, -1).contiguous()
    table = kernels().statistics(spec_of(*kind), torch.float32, student, teacher)
    assert table.isfinite().all() and table[:, formulas.D :].abs().max() < 1e-30
    out = torch.full_like(student, NAN)
    one = torch.ones(2, 1)
    kernels().logit_gradient(spec_of(*kind), torch.float32, student, teacher, table, one, None, None, None, out)
    assert out.abs().max() < 1e-30


@case(INTERPRETED, named(DIRECTIONS), named([NAN, INF]))
def not_a_number(kind: tuple[str, float], value: float) -> None:
    """It spoils its row, where `_statistics` does, and no other."""
    kernels(16)
    for side, token in itertools.product((0, 1), (3, 42)):
        pair = random(2, 43, seed=1), random(2, 43, seed=2)
        pair[side][1, token] = value
        everything_of(spec_of(*kind), *pair)


@case(INTERPRETED)
def rows_apart_and_one_weight_for_all() -> None:
    """Views of larger buffers; weights of a sum, which lie once in memory for all rows; labels of a column."""
    kernels(16)
    spec = spec_of("jsd", 0.2)
    student, teacher = random(4, 50, seed=1)[:, 3:40], random(5, 41, seed=2)[1:, :37]
    table = check_statistics(spec, student, teacher)
    wide = torch.zeros(4, 11, dtype=torch.float64)
    wide[:, 2:10] = table
    weight = torch.tensor([[0.7]], dtype=torch.float64).expand(4, 1)
    labels = torch.tensor([[9, 1], [9, 0], [9, 36], [9, 5]])[:, 1:]
    buffer = torch.full((4, 60), 5.0, dtype=torch.float64)
    check_gradient(spec, student, teacher, wide[:, 2:10], (weight, weight, weight), labels, buffer[:, 20:57])
    assert (buffer[:, :20] == 5).all() and (buffer[:, 57:] == 5).all(), "written beside its rows"
    several = random(4, 3, scale=1.0, seed=5)
    check_gradient(spec, student, teacher, table, (several[:, :1], several[:, 1:2], several[:, 2:]), labels)


@case(INTERPRETED)
def offsets_beyond_two_to_the_31() -> None:
    """Memory of which only the rows are touched."""
    kernels(16)
    spec, stride = spec_of("jsd", 0.2), 2**30 + 512
    memory = torch.empty(2 * stride + 64, dtype=torch.bfloat16)
    far = memory.as_strided((3, 40), (stride, 1))
    student, teacher = random(3, 40, seed=1).bfloat16(), random(3, 40, seed=2).bfloat16()
    far.copy_(student)
    table = check_statistics(spec, far, teacher)
    assert torch.equal(table, check_statistics(spec, student, teacher))
    check_statistics(spec, teacher, far)
    weights = (torch.ones(3, 1), None, None)
    check_gradient(spec, student, far, table, weights, None, torch.empty_like(student))
    check_gradient(spec, far, teacher, table, weights, None)


@case(INTERPRETED)
def no_rows() -> None:
    tk = kernels(16)
    empty, spec = torch.empty(0, 40), spec_of("jsd", 0.5)
    table = tk.statistics(spec, torch.float32, empty, empty)
    assert table.shape == (0, 8)
    tk.logit_gradient(spec, torch.float32, empty, empty, table, torch.empty(0, 1), None, None, None, None)


@case(INTERPRETED)
def rows_that_are_not_contiguous_are_refused() -> None:
    tk, spec = kernels(16), spec_of("jsd", 0.5)
    good, bad, weight = random(3, 8), random(8, 3).t(), torch.ones(3, 1).double()
    table = tk.statistics(spec, torch.float64, good, good)
    for refused in (
        lambda: tk.statistics(spec, torch.float64, bad, good),
        lambda: tk.statistics(spec, torch.float64, good, bad),
        lambda: tk.logit_gradient(spec, torch.float64, good, bad, table, weight, None, None, None, None),
        lambda: tk.logit_gradient(spec, torch.float64, good, good, table, weight, None, None, None, bad),
    ):
        try:
            refused()
        except ValueError as error:
            assert "contiguous" in str(error)
        else:
            raise AssertionError("not refused")


@contextmanager
def triton_everywhere() -> Iterator[list[str]]:
    """The fused head takes its way of a CUDA device; yields the kernels that it called."""
    tk = kernels(16)
    calls: list[str] = []

    def counted(name: str) -> Callable[..., Any]:
        function = getattr(tk, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    with (
        mock.patch.object(head_kernels, "_has_triton", lambda device: True),
        mock.patch.object(head_kernels, "_COMPILE_FROM_VOCABULARY", 1),
        mock.patch.object(tk, "statistics", counted("statistics")),
        mock.patch.object(tk, "logit_gradient", counted("logit_gradient")),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", UserWarning)  # no way but this one
        yield calls


@case(INTERPRETED, named([*DIRECTIONS, ("jsd", 1.0), ("sampled_token", 0.5)]), dict(full=None, top_k=3))
def whole_head(kind: tuple[str, float], top_k: int | None) -> None:
    """Values and gradients of both forms, fused with Triton against dense on full logits."""
    from test_head import VALUES, build, gradients

    options: dict[str, Any] = dict(kind=kind[0], beta=kind[1], top_k=top_k, **EVERYTHING)
    sides = []
    for function in (fused_distillation_head, dense_distillation_head):
        one, other = build(n=5, vocabulary=19), build(n=5, vocabulary=19, seed=1)
        with triton_everywhere() as calls:
            weighted = function(**one.arguments(**options), token_weights=one.weights, chunk_size=2)
            grads = gradients(weighted.loss, one)
            plain = function(**other.arguments(**options), chunk_size=2)
            total = (other.weights * plain.divergence + other.on_logprob * plain.student_logprob).sum()
            grads += gradients(total, other)
        # rows in chunks of 2, 2 and 1, with one table and one gradient each, in either form
        fused = function is fused_distillation_head
        assert calls.count("statistics") == calls.count("logit_gradient") == (6 if fused else 0)
        values = [getattr(out, name).detach() for out in (weighted, plain) for name in VALUES]
        sides.append([*values, weighted.loss.detach(), *grads])
    for i, (actual, expected) in enumerate(zip(*sides, strict=True)):
        close(actual, expected, 1e-12, f"{i}")


@case(INTERPRETED)
def whole_head_in_bf16_with_fp32_logits() -> None:
    """As on CUDA: fp32 logits, and a buffer of bf16 for their gradient."""
    from test_head import VALUES, build, gradients

    def mm(a: Tensor, b: Tensor, out: Tensor) -> None:
        out.copy_(a.float() @ b.float())

    def addmm(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
        total.copy_(a.float() @ b.float() if beta == 0 else total + a.float() @ b.float())

    sides = []
    for way in ("triton", "eager"):
        made = build(n=9, vocabulary=19, dtype=torch.bfloat16)
        with (
            triton_everywhere() as calls,
            mock.patch.object(head_kernels, "_writes_fp32", lambda device, dtype: True),
            mock.patch.object(head_kernels, "_mm_fp32", mm),
            mock.patch.object(head_kernels, "_addmm_fp32", addmm),
        ):
            compiled = None if way == "triton" else False
            out = fused_distillation_head(
                **made.arguments(), token_weights=made.weights, chunk_size=4, compiled=compiled
            )
            grads = gradients(out.loss, made)
        assert len(calls) == (6 if way == "triton" else 0), "compiled=False is eager"
        sides.append(([getattr(out, name) for name in VALUES], grads))
    for a, b in zip(sides[0][0], sides[1][0], strict=True):
        close(a, b, 1e-6)
    for a, b in zip(sides[0][1], sides[1][1], strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - b).norm() < 1e-2 * b.norm()


# ---------------------------------------------------------------------------------------------- for GPUs not at hand

TYPES = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
TYPES |= {torch.int64: "*i64"}


class Recorder:
    """Stands for a kernel and keeps what it is called with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.grid = kernel, None
        self.arguments: tuple[Any, ...] = ()
        self.options: dict[str, Any] = {}

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def call(*arguments: Any, **options: Any) -> None:
            self.grid, self.arguments, self.options = grid, arguments, options

        return call

    def compile(self, capability: int) -> Any:
        """As a call would, on a GPU of this capability."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants: dict[tuple[int], Any] = {}
        attributes: dict[tuple[int], Any] = {}
        for i, name in enumerate(self.kernel.arg_names):
            given = i < len(self.arguments)
            value = self.arguments[i] if given else self.options[name]
            if isinstance(value, Tensor):
                signature[name] = TYPES[value.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif given and isinstance(value, int) and value != 1:
                signature[name] = "i32"
                if value % 16 == 0:
                    attributes[(i,)] = [["tt.divisibility", 16]]
            else:
                signature[name] = "constexpr"
                constants[(i,)] = value
        return triton.compile(
            ASTSource(self.kernel, signature, constants, attributes),
            target=GPUTarget("cuda", capability, 32),
            options=dict(num_warps=self.options["num_warps"]),
        )


def launches(
    spec: Spec, dtype: torch.dtype, given: tuple[bool, bool, bool], vocabulary: int = 151_936
) -> list[Recorder]:
    """Of both kernels; the vocabulary is Qwen3's."""
    tk = kernels()
    wide = torch.promote_types(dtype, torch.float32)
    logits, weight = torch.empty(2, vocabulary, dtype=dtype), torch.empty(2, 1, dtype=wide)
    weights = [weight if g else None for g in given]
    teacher = logits if given[0] else None
    labels = torch.zeros(2, 1, dtype=torch.int64) if given[1] else None
    names = ("_statistics_kernel", "_gradient_kernel")
    recorders = [Recorder(getattr(tk, name)) for name in names]
    with mock.patch.object(tk, names[0], recorders[0]), mock.patch.object(tk, names[1], recorders[1]):
        table = tk.statistics(spec, wide, logits, logits)
        tk.logit_gradient(spec, wide, logits, teacher, table, *weights, labels, None)
    return recorders


def usage(binary: bytes) -> dict[str, int]:
    """Registers, stack, shared and local bytes, read from the code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    path = Path(os.environ["TRITON_CACHE_DIR"], "kernel.cubin")
    path.write_bytes(binary)
    done = subprocess.run([tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", done.stdout)}


CAPPED = dict(EVERYTHING, student_softcap=30.0, teacher_softcap=30.0)
FORMULAS: dict[str, tuple[Spec, tuple[bool, bool, bool]]] = dict(
    jsd=(spec_of("jsd", 0.5), (True, False, False)),
    jsd_with_everything=(spec_of("jsd", 0.2, **CAPPED), (True, True, True)),
    forward_kl=(spec_of("forward_kl", 0.5), (True, False, False)),
    reverse_kl=(spec_of("reverse_kl", 0.5), (True, False, False)),
    top_k=(spec_of("jsd", 0.5, 20), (False, False, True)),
    sampled_token=(spec_of("sampled_token", 0.5), (False, True, True)),
)
GPUS = dict(sm_80=80, sm_90=90, sm_100=100)


@case(COMPILED, {name: FORMULAS[name] for name in ("jsd", "jsd_with_everything")}, GPUS)
def code_for(formula: tuple[Spec, tuple[bool, bool, bool]], capability: int) -> dict[str, Any]:
    return code(*formula, torch.float32, capability)


@case(COMPILED, FORMULAS, {name: DTYPES[name] for name in ("bf16", "fp64")})
def code_of(formula: tuple[Spec, tuple[bool, bool, bool]], dtype: torch.dtype) -> dict[str, Any]:
    return code(*formula, dtype, 90)


@case(COMPILED, named([1, 7]))
def code_for_a_vocabulary_of(tokens: int) -> dict[str, Any]:
    """Triton makes a constant of a 1; rows that start at odd places are not read four numbers at once."""
    return code(*FORMULAS["jsd_with_everything"], torch.float32, 90, tokens)


def code(
    spec: Spec, given: tuple[bool, bool, bool], dtype: torch.dtype, capability: int, vocabulary: int = 151_936
) -> dict[str, Any]:
    """There is machine code, nothing is spilled, and fp64 is fp64 throughout."""
    found = {}
    for recorder in launches(spec, dtype, given, vocabulary):
        kernel = recorder.compile(capability)
        assert kernel.asm["cubin"][:4] == b"\x7fELF" and f"sm_{capability}" in kernel.asm["ptx"]
        used = usage(kernel.asm["cubin"])
        assert 0 < used["REG"] < 255 and used["STACK"] == used["LOCAL"] == 0, used
        assert dtype != torch.float64 or not re.search(r"\bf32\b|xf32\b", kernel.asm["ttir"]), "fp32 within fp64"
        found[recorder.kernel.__name__] = used | {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps}
    return found


@case(COMPILED)
def wide_grids() -> None:
    """Rows are more than a grid's second dimension can count (65,535); a block covers each token once."""
    statistics, gradient = launches(*FORMULAS["jsd"][:1], torch.float32, (True, False, False))
    block = gradient.options["BLOCK"]
    assert statistics.grid == (2,) and gradient.grid == (2, -(-151_936 // block))


def run(cases: dict[str, Callable[[], Any]]) -> dict[str, Any]:
    results = {}
    for name, function in cases.items():
        start, error, found = time.perf_counter(), None, None
        try:
            found = function()
        except Exception:
            error = traceback.format_exc()
        results[name] = dict(error=error, found=found, seconds=time.perf_counter() - start)
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's, of the interpreter: inf - inf
    target, mode = sys.argv[1:]
    Path(target).write_text(json.dumps(run(dict(interpreted=INTERPRETED, compiled=COMPILED)[mode])), encoding="utf-8")
