"""The fused head's loop over chunks of rows, as two autograd functions.

`GradientInForward`, for known token weights (masks, 1 / tokens, importance ratios), computes the parameter gradients
in the forward: 4 matmuls of N V H, as many as the dense head. `Recompute`, for any function of the per-token values,
recomputes a chunk's logits in the backward: 6 matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ._head_formulas import (
    H_S,
    H_T,
    LOG_S,
    LOG_T,
    TOP_S,
    TOP_T,
    D,
    Spec,
    column,
    logit_gradient,
    statistics,
    student_logits,
    student_slope,
    teacher_logits,
)
from ._head_kernels import Gradients, Head, elementwise, slices
from .divergence import _append_tail, _renormalise, divergence_of_log_probs

# Logits per chunk and side (ours). CPU: 128 rows of V = 151,936; 256 would save 4 % of the time and take 75 MiB more.
# Elsewhere 1024 rows: fewer would make the weight gradient memory-bound (an H200 needs about 800).
_CHUNK_LOGITS = {"cpu": 20_000_000}
_CHUNK_LOGITS_ELSEWHERE = 160_000_000

TokenWeights = Tensor | Callable[["HeadOutput", slice], Tensor]


@dataclass(frozen=True)
class HeadOutput:
    """Per-token results of both heads, [N] each, nats, fp32 (fp64 for fp64 inputs).

    Attributes:
        divergence: per token (`kind="sampled_token"`: the surrogate of `sampled_token_divergence`, not a divergence).
        student_entropy, teacher_entropy: entropies of softmax(logits / temperature); never differentiable.
        student_logprob, teacher_logprob: log-probabilities of the labels; None without labels.
        loss: with token weights, the scalar sum(token_weights * divergence): the ONLY differentiable field.
            Without token weights None; then `divergence` and `student_logprob` are differentiable.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    loss: Tensor | None = None


@dataclass(frozen=True)
class Options:
    """How the chunks are computed."""

    spec: Spec
    step: int  # rows per chunk
    compiled: bool | None
    student_dtype: torch.dtype  # of the matmuls
    teacher_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the elementwise part and of every per-token value."""
        return torch.float64 if torch.float64 in (self.student_dtype, self.teacher_dtype) else torch.float32


def weights_of(token_weights: TokenWeights, values: HeadOutput, rows: slice) -> Tensor:
    """The token weights of a chunk as constants, in the dtype of its values."""
    if isinstance(token_weights, Tensor):
        return token_weights.detach()[rows].to(values.divergence)
    weights = token_weights(values, rows).detach()
    check_vector("the result of token_weights", weights, len(values.divergence))
    return weights.to(values.divergence)


def check_vector(name: str, vector: Tensor, length: int) -> None:
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}]; got {tuple(vector.shape)}.")


def default_chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk. A single chunk may be twice as long at the same peak: the teacher's logits are freed before the
    weight gradient [V, H] is allocated."""
    rows = max(1, _CHUNK_LOGITS.get(hidden.device.type, _CHUNK_LOGITS_ELSEWHERE) // len(weight))
    alone = weight.requires_grad and len(hidden) <= min(2 * rows, hidden.shape[1])
    return 2 * rows if alone else rows


def matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return promoted


# All chunks -----------------------------------------------------------------------------------------------------------


class GradientInForward(torch.autograd.Function):
    """loss = sum(weights * divergence) and the per-token values; forward computes the gradients as well."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, labels, token_weights, options, needs = arguments
        hidden, weight, bias = tensors[:3]
        chunks, losses = [], [hidden.new_zeros((), dtype=options.dtype)]
        with torch.autocast(hidden.device.type, enabled=False):
            student, teacher, narrow = _heads(options, tensors)
            gradients = Gradients(student, hidden, weight, bias, needs)
            for rows in slices(0, len(hidden), options.step):
                zs, zt = student.logits(rows), teacher.logits(rows)
                picked = None if labels is None else labels[rows]
                chunk = _evaluate(options, zs, zt, picked, any(needs))
                weights = weights_of(token_weights, chunk.values, rows)
                losses.append((weights * chunk.values.divergence).sum())
                chunks.append(chunk)
                if any(needs):
                    out = None if narrow is None else narrow[: len(zs)]
                    on_logits = _differentiate(options, zs, zt, chunk, picked, weights, None, out)
                    del zt
                    if rows.stop == len(hidden):
                        del teacher  # see default_chunk_size
                    gradients.add(rows, on_logits)
            ctx.gradients = gradients.result()
        values = _joined(options, chunks, hidden, labels)
        ctx.mark_non_differentiable(*(v for v in values if v is not None))
        return torch.stack(losses).sum(), *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's loss was differentiated twice; call backward() once per forward.")
        gradients, ctx.gradients = ctx.gradients, None
        # Reading the value would synchronise a GPU; on a CPU it saves a pass over [V, H].
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradients = tuple(None if g is None else g.mul_(upstream) for g in gradients)
        return *gradients, *(None,) * 7


class Recompute(torch.autograd.Function):
    """Per-token values; divergence and student_logprob are differentiable. backward recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, labels, options, needs = arguments
        chunks = []
        with torch.autocast(tensors[0].device.type, enabled=False):
            student, teacher, _ = _heads(options, tensors)
            for rows in slices(0, len(tensors[0]), options.step):
                picked = None if labels is None else labels[rows]
                chunks.append(_evaluate(options, student.logits(rows), teacher.logits(rows), picked, any(needs)))
        ctx.save_for_backward(*tensors, labels)
        ctx.options, ctx.needs, ctx.chunks = options, needs, chunks
        ctx.set_materialize_grads(False)
        values = _joined(options, chunks, tensors[0], labels)
        ctx.mark_non_differentiable(*(values[i] for i in (1, 2, 4) if values[i] is not None))
        return tuple(values)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, per_divergence: Tensor | None, _s: Any, _t: Any, per_logprob: Tensor | None, _q: Any) -> Any:
        if per_divergence is None and per_logprob is None:
            return (None,) * 9
        *tensors, labels = ctx.saved_tensors
        hidden, weight, bias = tensors[:3]
        options = ctx.options
        needs_teacher = options.spec.support == "full" and per_divergence is not None
        with torch.autocast(hidden.device.type, enabled=False):
            student, teacher, narrow = _heads(options, tensors)
            gradients = Gradients(student, hidden, weight, bias, ctx.needs)
            for rows, chunk in zip(slices(0, len(hidden), options.step), ctx.chunks, strict=True):
                zs, zt = student.logits(rows), teacher.logits(rows) if needs_teacher else None
                picked = None if labels is None else labels[rows]
                on_divergence = None if per_divergence is None else per_divergence[rows].to(options.dtype)
                on_logprob = None if per_logprob is None else per_logprob[rows].to(options.dtype)
                out = None if narrow is None else narrow[: len(zs)]
                on_logits = _differentiate(options, zs, zt, chunk, picked, on_divergence, on_logprob, out)
                del zt
                if rows.stop == len(hidden):
                    del teacher  # see default_chunk_size
                gradients.add(rows, on_logits)
            return *gradients.result(), *(None,) * 6


def _heads(options: Options, tensors: list[Any]) -> tuple[Head, Head, Tensor | None]:
    """Student, teacher, and a buffer for d loss / d logits in the matmul's dtype (None: over the student's logits)."""
    student = Head(tensors[:3], options.student_dtype, options.step)
    teacher = Head(tensors[3:6], options.teacher_dtype, options.step)
    return student, teacher, student.hidden.new_empty(student.buffer.shape) if student.wide else None


def _joined(options: Options, chunks: list[_Chunk], like: Tensor, labels: Tensor | None) -> list[Tensor | None]:
    """The five per-token values of all rows."""
    names = ("divergence", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
    empty = like.new_zeros(0, dtype=options.dtype)

    def join(name: str) -> Tensor | None:
        if labels is None and name.endswith("logprob"):
            return None
        return torch.cat([empty, *(getattr(chunk.values, name) for chunk in chunks)])

    return [join(name) for name in names]


# One chunk ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """A chunk's values, and what its gradient needs in addition to the logits."""

    values: HeadOutput
    table: Tensor
    top_index: Tensor | None = None  # [rows, k]
    top_slope: Tensor | None = None  # [rows, k], dD / d log p_S


def _evaluate(options: Options, student: Tensor, teacher: Tensor, labels: Tensor | None, slope: bool) -> _Chunk:
    """Values of a chunk from its raw logits [rows, V], which stay unchanged. labels: [rows] | None."""
    spec, dtype = options.spec, options.dtype
    table = elementwise(statistics, options.compiled, spec, dtype, student, teacher)

    def log_probs(index: Tensor) -> tuple[Tensor, Tensor]:
        ls = student_logits(spec, student.gather(-1, index), dtype) - column(table, TOP_S) - column(table, LOG_S)
        lt = teacher_logits(spec, teacher.gather(-1, index), dtype) - column(table, TOP_T) - column(table, LOG_T)
        return ls, lt

    top_index = top_slope = student_logprob = teacher_logprob = None
    if labels is not None:
        student_logprob, teacher_logprob = (x.squeeze(-1) for x in log_probs(labels.unsqueeze(-1)))
    if spec.support == "full":
        value = table[:, D]
    elif spec.support == "top_k":
        assert spec.top_k is not None
        top_index = student.topk(spec.top_k, dim=-1).indices
        value, top_slope = _top_k_divergence(spec, *log_probs(top_index), slope)
    else:
        assert student_logprob is not None and teacher_logprob is not None
        value = (student_logprob - teacher_logprob) * student_logprob
    values = HeadOutput(value, table[:, H_S], table[:, H_T], student_logprob, teacher_logprob)
    return _Chunk(values, table, top_index, top_slope)


def _top_k_divergence(spec: Spec, ls: Tensor, lt: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """D [rows] on the kept tokens, and dD / d ls [rows, k]."""
    close = _append_tail if spec.tail else _renormalise
    with torch.set_grad_enabled(slope):
        ls = ls.requires_grad_(slope)
        value = divergence_of_log_probs(close(ls), close(lt), spec.kind, spec.beta)
        return value.detach(), torch.autograd.grad(value.sum(), ls)[0] if slope else None


def _differentiate(
    options: Options,
    student: Tensor,
    teacher: Tensor | None,
    chunk: _Chunk,
    labels: Tensor | None,
    per_divergence: Tensor | None,
    per_logprob: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """d loss / d raw student logits [rows, V], written into out, or over `student` if out is None.

    per_divergence, per_logprob: d loss / d divergence, d loss / d student_logprob, [rows] | None.
    """
    spec, values = options.spec, chunk.values
    if spec.support == "label" and per_divergence is not None:
        assert values.student_logprob is not None and values.teacher_logprob is not None
        surrogate = per_divergence * (values.student_logprob - values.teacher_logprob)
        per_logprob = surrogate if per_logprob is None else per_logprob + surrogate
        per_divergence = None
    per_divergence = None if per_divergence is None else per_divergence.unsqueeze(-1)
    per_label = None if per_logprob is None else per_logprob.unsqueeze(-1)
    labels = None if labels is None or per_label is None else labels.unsqueeze(-1)
    if spec.support == "top_k" and per_divergence is not None:
        return _differentiate_top_k(options, student, chunk, labels, per_divergence, per_label, out)
    used = None if per_divergence is None else teacher
    given = (student, used, chunk.table, per_divergence, per_label, per_label, labels, out)  # a mass of 1 per label
    elementwise(logit_gradient, options.compiled, spec, options.dtype, *given)
    return student if out is None else out


def _differentiate_top_k(
    options: Options,
    student: Tensor,
    chunk: _Chunk,
    labels: Tensor | None,
    per_divergence: Tensor,
    per_label: Tensor | None,
    out: Tensor | None,
) -> Tensor:
    """`_differentiate` for a top-k divergence: -p_S sum(v) everywhere, and at the k tokens the exact sum, rounded
    once. per_divergence [rows, 1], labels and per_label [rows, 1] | None."""
    spec, index, slope = options.spec, chunk.top_index, chunk.top_slope
    assert index is not None and slope is not None
    slope = per_divergence * slope
    z = student_logits(spec, student.gather(-1, index), options.dtype)
    top_mass = (z - column(chunk.table, TOP_S) - column(chunk.table, LOG_S)).exp()
    mass = slope.sum(-1, keepdim=True)
    per_mass = mass if per_label is None else per_label + mass
    at_top = slope - per_mass * top_mass
    if per_label is not None:
        at_top = at_top + per_label * (index == labels)
    at_top = at_top * student_slope(spec, z)
    given = (student, None, chunk.table, None, per_label, per_mass, labels, out)
    elementwise(logit_gradient, options.compiled, spec, options.dtype, *given)
    result = student if out is None else out
    return result.scatter_(-1, index, at_top.to(result.dtype))
