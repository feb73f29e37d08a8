"""Triton kernels of the fused head's elementwise formulas: `statistics` and `logit_gradient`.

`_head_formulas.statistics` and `_head_formulas.logit_gradient` define results and arguments. The kernels read the
logits twice for the table (once if it contains no divergence) and once for the gradient. exp is the hardware's,
accurate to 2^-22 in fp32.

Imported only where Triton is installed (`_head_kernels._in_triton`). With TRITON_INTERPRET=1 the kernels run on CPU
tensors, for tests.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _head_formulas as formulas

if TYPE_CHECKING:
    from ._head_formulas import Spec

# Tokens per block, half as many in fp64, and warps per program (ours; not tuned on a GPU). Compiled for sm_80 to
# sm_100, neither kernel spills registers. A table block of 2048 did on sm_80: it keeps six numbers per token.
_STATISTICS_BLOCK = 1024
_GRADIENT_BLOCK = 2048
_WARPS = 8

_DTYPES = {torch.float32: tl.float32, torch.float64: tl.float64}

# A kernel can read only globals that are constexpr.
_TOP_S, _LOG_S, _H_S = (tl.constexpr(i) for i in (formulas.TOP_S, formulas.LOG_S, formulas.H_S))
_TOP_T, _LOG_T, _H_T = (tl.constexpr(i) for i in (formulas.TOP_T, formulas.LOG_T, formulas.H_T))
_D, _K = (tl.constexpr(i) for i in (formulas.D, formulas.K))


def statistics(spec: Spec, dtype: torch.dtype, student: Tensor, teacher: Tensor) -> Tensor:
    """`_head_formulas.statistics`: the table [rows, 8], or [rows, 6] without the full divergence."""
    _check_layout(student, teacher)
    rows, vocabulary = student.shape
    full = spec.support == "full"
    table = torch.empty((rows, 8 if full else 6), dtype=dtype, device=student.device)
    if rows:
        with torch.cuda.device_of(student):  # a kernel runs on the current device, not on its tensors'
            _statistics_kernel[(rows,)](
                student,
                teacher,
                table,
                student.stride(0),
                teacher.stride(0),
                table.stride(0),
                vocabulary,
                **_formula(spec, dtype, full),
                BLOCK=_block(_STATISTICS_BLOCK, dtype),
                num_warps=_WARPS,
            )
    return table


def logit_gradient(
    spec: Spec,
    dtype: torch.dtype,
    student: Tensor,
    teacher: Tensor | None,
    table: Tensor,
    per_divergence: Tensor | None,
    per_label: Tensor | None,
    per_mass: Tensor | None,
    labels: Tensor | None,
    out: Tensor | None,
) -> None:
    """`_head_formulas.logit_gradient`: d loss / d raw logits into out, or over `student` if out is None."""
    out = student if out is None else out
    used = None if per_divergence is None else teacher
    _check_layout(student, used, out, table)
    rows, vocabulary = student.shape
    block = _block(_GRADIENT_BLOCK, dtype)
    if not rows:
        return
    with torch.cuda.device_of(student):
        # rows first: the second dimension of a grid is limited to 65,535
        _gradient_kernel[(rows, triton.cdiv(vocabulary, block))](
            student,
            used,
            table,
            per_divergence,
            per_label,
            per_mass,
            None if per_label is None else labels,
            out,
            student.stride(0),
            _stride(used),
            table.stride(0),
            # 0 for the gradient of a sum: one number for all rows
            _stride(per_divergence),
            _stride(per_label),
            _stride(per_mass),
            _stride(labels),
            out.stride(0),
            vocabulary,
            **_formula(spec, dtype, used is not None),
            BLOCK=block,
            num_warps=_WARPS,
        )


def _check_layout(*tensors: Tensor | None) -> None:
    for tensor in tensors:
        if tensor is not None and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension must be contiguous; strides are {tensor.stride()}.")


def _stride(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.stride(0)


def _block(tokens: int, dtype: torch.dtype) -> int:
    return tokens // 2 if dtype == torch.float64 else tokens


def _formula(spec: Spec, dtype: torch.dtype, divergence: bool) -> dict[str, Any]:
    """The constants of a kernel. DIRECTION is None where no divergence over the full vocabulary is asked for."""
    direction = spec.direction if divergence else None
    return dict(
        DIRECTION=direction,
        BETA=spec.beta if direction == "jsd" else None,  # else unused: do not compile a kernel per value
        TEMPERATURE=spec.temperature,
        SCALE_S=spec.student_scale,
        SCALE_T=spec.teacher_scale,
        CAP_S=spec.student_softcap,
        CAP_T=spec.teacher_softcap,
        TINY=torch.finfo(dtype).tiny,
        DTYPE=_DTYPES[dtype],
    )


# Kernels ------------------------------------------------------------------------------------------------------------
# An annotation other than tl.constexpr would be code to Triton.


@triton.jit
def _tanh(x):
    """To a few ulp. Near 0 a continued fraction to depth 7 (2e-16 at 1/2), where 1 - 2e / (1 + e) would cancel."""
    size = tl.abs(x)
    near = size < 0.5
    y = x * x
    above = size * (135135.0 + y * (17325.0 + y * (378.0 + y)))
    below = 135135.0 + y * (62370.0 + y * (3150.0 + y * 28.0))
    e = tl.exp(-2.0 * size)
    part = tl.where(near, above, 2.0 * e) / tl.where(near, below, 1.0 + e)
    t = tl.where(near, part, 1.0 - part)
    return tl.where(x < 0, -t, t)


@triton.jit
def _logits(
    row,
    tokens,
    inside,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """`_head_formulas.student_logits` of a block; -inf beyond the vocabulary, where it has no weight."""
    z = tl.load(row + tokens, mask=inside, other=0.0).to(DTYPE)
    if SCALE != 1.0:
        z = z * SCALE
    if CAP is not None:
        z = CAP * _tanh(z * (1.0 / CAP))
    if TEMPERATURE != 1.0:
        z = z * (1.0 / TEMPERATURE)
    return tl.where(inside, z, float("-inf"))


@triton.jit
def _add(z, top, total, moment):
    """One more logit per lane: max, sum exp(z - max) and sum exp(z - max) (z - max), each relative to the newest max.

    A lane that has seen only -inf is relative to 0. Where an exponential is 0, its product counts as 0, even with an
    infinite factor.
    """
    new = tl.maximum(top, z)
    base = tl.where(new == float("-inf"), 0.0, new)
    fall = top - base
    shrink = tl.exp(fall)
    moment = tl.where(shrink == 0, 0.0, shrink * (moment + fall * total))
    shifted = z - base
    weight = tl.exp(shifted)
    moment += tl.where(weight == 0, 0.0, weight * shifted)
    return new, total * shrink + weight, moment


@triton.jit
def _normalizer(top, total, moment):
    """Combine all lanes into max, log sum exp(z - max) and entropy, as in `_head_formulas._normalizer`."""
    new = tl.max(top, 0)
    base = tl.where(new == float("-inf"), 0.0, new)
    fall = top - base
    shrink = tl.exp(fall)
    mean = tl.sum(tl.where(shrink == 0, 0.0, shrink * (moment + fall * total)), 0)
    sums = tl.sum(total * shrink, 0)
    log = tl.log(sums)
    return new, log, log - mean / sums


@triton.jit
def _log_mixture(ps, pt, BETA: tl.constexpr, TINY: tl.constexpr):
    mixture = (1 - BETA) * ps + BETA * pt
    return tl.log(tl.where(mixture < TINY, TINY, mixture))  # a maximum would turn NaN into TINY


@triton.jit
def _statistics_kernel(
    student,
    teacher,
    table,
    student_stride,
    teacher_stride,
    table_stride,
    vocabulary,
    DIRECTION: tl.constexpr,
    BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE_S: tl.constexpr,
    SCALE_T: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row per program. Each lane keeps its own max and sums, so that lanes need no exchange within a block."""
    row = tl.program_id(0).to(tl.int64)  # rows * vocabulary may pass 2^31
    student += row * student_stride
    teacher += row * teacher_stride
    table += row * table_stride
    lanes = tl.arange(0, BLOCK)

    top_s = tl.full([BLOCK], float("-inf"), DTYPE)
    top_t = tl.full([BLOCK], float("-inf"), DTYPE)
    total_s = tl.zeros([BLOCK], DTYPE)
    total_t = tl.zeros([BLOCK], DTYPE)
    moment_s = tl.zeros([BLOCK], DTYPE)
    moment_t = tl.zeros([BLOCK], DTYPE)
    for start in range(0, vocabulary, BLOCK):
        tokens = start + lanes
        inside = tokens < vocabulary
        zs = _logits(student, tokens, inside, SCALE_S, CAP_S, TEMPERATURE, DTYPE)
        top_s, total_s, moment_s = _add(zs, top_s, total_s, moment_s)
        zt = _logits(teacher, tokens, inside, SCALE_T, CAP_T, TEMPERATURE, DTYPE)
        top_t, total_t, moment_t = _add(zt, top_t, total_t, moment_t)
    row_top_s, log_s, entropy_s = _normalizer(top_s, total_s, moment_s)
    row_top_t, log_t, entropy_t = _normalizer(top_t, total_t, moment_t)
    tl.store(table + _TOP_S, row_top_s)
    tl.store(table + _LOG_S, log_s)
    tl.store(table + _H_S, entropy_s)
    tl.store(table + _TOP_T, row_top_t)
    tl.store(table + _LOG_T, log_t)
    tl.store(table + _H_T, entropy_t)

    if DIRECTION is not None:
        to_student = tl.zeros([BLOCK], DTYPE)
        to_teacher = tl.zeros([BLOCK], DTYPE)
        for start in range(0, vocabulary, BLOCK):
            tokens = start + lanes
            inside = tokens < vocabulary
            ls = _logits(student, tokens, inside, SCALE_S, CAP_S, TEMPERATURE, DTYPE) - row_top_s - log_s
            lt = _logits(teacher, tokens, inside, SCALE_T, CAP_T, TEMPERATURE, DTYPE) - row_top_t - log_t
            if DIRECTION == "jsd":
                ps, pt = tl.exp(ls), tl.exp(lt)
                lm = _log_mixture(ps, pt, BETA, TINY)
                to_student += tl.where(ps == 0, 0.0, ps * (ls - lm))
                to_teacher += tl.where(pt == 0, 0.0, pt * (lt - lm))
            elif DIRECTION == "reverse_kl":
                ps = tl.exp(ls)
                to_student += tl.where(ps == 0, 0.0, ps * (ls - lt))
            else:
                pt = tl.exp(lt)
                to_student += tl.where(pt == 0, 0.0, pt * (lt - ls))
        k = tl.sum(to_student, 0)
        d = k
        if DIRECTION == "jsd":
            d = (1 - BETA) * k + BETA * tl.sum(to_teacher, 0)
        tl.store(table + _D, d)
        tl.store(table + _K, k)


@triton.jit
def _gradient_kernel(
    student,
    teacher,
    table,
    per_divergence,
    per_label,
    per_mass,
    labels,
    out,
    student_stride,
    teacher_stride,
    table_stride,
    per_divergence_stride,
    per_label_stride,
    per_mass_stride,
    labels_stride,
    out_stride,
    vocabulary,
    DIRECTION: tl.constexpr,
    BETA: tl.constexpr,
    TEMPERATURE: tl.constexpr,
    SCALE_S: tl.constexpr,
    SCALE_T: tl.constexpr,
    CAP_S: tl.constexpr,
    CAP_T: tl.constexpr,
    TINY: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one row. It reads its tokens before it writes them: out may be student."""
    row = tl.program_id(0).to(tl.int64)
    tokens = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = tokens < vocabulary
    table += row * table_stride

    zs = _logits(student + row * student_stride, tokens, inside, SCALE_S, CAP_S, TEMPERATURE, DTYPE)
    ls = zs - tl.load(table + _TOP_S) - tl.load(table + _LOG_S)
    ps = tl.exp(ls)
    gradient = tl.zeros([BLOCK], DTYPE)
    if DIRECTION is not None:
        weight = tl.load(per_divergence + row * per_divergence_stride).to(DTYPE)
        zt = _logits(teacher + row * teacher_stride, tokens, inside, SCALE_T, CAP_T, TEMPERATURE, DTYPE)
        lt = zt - tl.load(table + _TOP_T) - tl.load(table + _LOG_T)
        if DIRECTION == "forward_kl":
            gradient = weight * (ps - tl.exp(lt))
        elif DIRECTION == "reverse_kl":
            gradient = weight * tl.where(ps == 0, 0.0, ps * (ls - lt - tl.load(table + _K)))
        else:
            lm = _log_mixture(ps, tl.exp(lt), BETA, TINY)
            gradient = (1 - BETA) * weight * tl.where(ps == 0, 0.0, ps * (ls - lm - tl.load(table + _K)))
    if per_mass is not None:
        gradient -= tl.load(per_mass + row * per_mass_stride).to(DTYPE) * ps
    if per_label is not None:
        label = tl.load(labels + row * labels_stride)
        gradient += tl.load(per_label + row * per_label_stride).to(DTYPE) * (tokens == label).to(DTYPE)
    gradient *= SCALE_S / TEMPERATURE
    if CAP_S is not None:
        tanh = zs * (TEMPERATURE / CAP_S)
        gradient *= 1 - tanh * tanh
    tl.store(out + row * out_stride + tokens, gradient.to(out.dtype.element_ty), mask=inside)
