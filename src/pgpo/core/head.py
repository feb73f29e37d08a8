"""Divergence, entropies and log-probabilities straight from hidden states: the logits [N, V] never exist.

The heads run over chunks of rows. Of a chunk's logits one pass takes both normalisers and entropies, one the
divergence, one writes dD/dlogits over the student's logits. With l = log p, u = p_S, m = log of the mixture,
K = KL(p_S || mixture), the gradient with respect to the student's logits z is

    jsd          (1 - b) u (l_S - m - K)
    reverse_kl   u (l_S - l_T - D)
    forward_kl   u - p_T
    top-k        scatter(v) - u sum(v),  v = dD / d l_S on the k tokens (autograd on [rows, k])
    log-prob     onehot(label) - u

Two forms. With token weights known (SDPO and PGPO: masks, 1 / tokens, importance ratios) the parameter gradients are
made during the forward pass: 4 matmuls of N V H, as many as the dense path. Without, D and the log-probability are
differentiable per token and backward makes the chunk's logits again: 6 matmuls.

`dense_distillation_head` is the same function on full logits: the definition, and what tests and benchmarks compare.

The elementwise part: on CUDA, and on a CPU with a large vocabulary, torch.compile makes kernels of `_statistics` and
`_logit_gradient`, which also run as they are. Triton kernels written by hand for CUDA (triton_kernels.py), which have
not run on a GPU yet, take their place where the environment has PGPO_TRITON=1.

Precision. All elementwise work is fp32 (fp64 for fp64). Logits of a bf16 or fp16 head are fp32 on CUDA, where a matmul
can write them at no cost. Elsewhere they are rounded to the head's dtype, as every dense half-precision head does: on
a CPU an fp32 matmul takes 4 times as long (docs/PERFORMANCE.md has the errors of both).
"""

from __future__ import annotations

import importlib.util
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .divergence import (
    _append_tail,
    _renormalise,
    check_divergence,
    divergence,
    divergence_of_log_probs,
    sampled_token_divergence,
)
from .information import scaled_logits, token_entropy

# Logits per chunk and side (ours). CPU: 128 rows of V = 151,936; 256 would save 4 % of the time and take 75 MiB more.
# Elsewhere 1024 rows: fewer would make the weight gradient memory-bound (an H200 needs about 800).
_CHUNK_LOGITS = {"cpu": 20_000_000}
_CHUNK_LOGITS_ELSEWHERE = 160_000_000
# Without a compiler, rows go through the elementwise part a few at a time: temporaries stay in a CPU's cache (1 MiB).
_EAGER_LOGITS = {"cpu": 2**18}
_EAGER_LOGITS_ELSEWHERE = 2**24
# Compiling takes tens of seconds, once; on a CPU it pays for vocabularies of language models only.
_COMPILE_FROM_VOCABULARY = 2**15

TokenWeights = Tensor | Callable[["HeadOutput", slice], Tensor]


@dataclass(frozen=True)
class HeadOutput:
    """What the heads say about N tokens; [N] each, nats, fp32 (fp64 for fp64 inputs).

    Attributes:
        divergence: per-token divergence (`kind="sampled_token"`: its surrogate, not a divergence).
        student_entropy, teacher_entropy: entropies of softmax(logits / temperature); never differentiable.
        student_logprob, teacher_logprob: log-probabilities of the labels; None without labels.
        loss: with token weights, the scalar sum(token_weights * divergence): the ONLY differentiable field.
            Without, None: `divergence` and `student_logprob` are differentiable then.
    """

    divergence: Tensor
    student_entropy: Tensor
    teacher_entropy: Tensor
    student_logprob: Tensor | None = None
    teacher_logprob: Tensor | None = None
    loss: Tensor | None = None


def fused_distillation_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    token_weights: TokenWeights | None = None,
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    compiled: bool | None = None,
) -> HeadOutput:
    """Everything the loss and I_k need of both heads, chunk by chunk.

    The logits are softcap(scale * (hidden @ weight.T + bias)) / temperature with softcap(z) = cap tanh(z / cap).

        out = fused_distillation_head(hs, student.weight, ht, teacher.weight, labels, mask / tokens)
        out.loss.backward()                          # out.divergence, out.student_entropy, ... are plain numbers

        out = fused_distillation_head(hs, student.weight, ht, teacher.weight, labels)
        (advantage * out.student_logprob + out.divergence).sum().backward()          # any function of the two

    Args:
        student_hidden: [N, H], the last hidden states at the positions that predict the N tokens.
        student_weight: [V, H]; may be the embedding too (tied), or frozen (then its gradient takes no memory).
        teacher_hidden: [N, H'], constant, as are the other teacher arguments.
        teacher_weight: [V, H'].
        labels: [N] sampled token ids in [0, V), at masked rows too; None = no log-probabilities.
        token_weights: [N], constant (0 masks a row out of the loss; its values are still returned). Or a function
            (chunk, rows) -> [rows] that sees the chunk's values first, e.g. for importance ratios:
            lambda chunk, rows: (chunk.student_logprob - old[rows]).exp().clamp_max(2.0) / tokens
        kind, beta, top_k, tail, temperature: as in `divergence`; or kind = "sampled_token", the surrogate of
            `sampled_token_divergence`, which needs labels and ignores beta, top_k and tail.
        student_bias, teacher_bias: [V]; -inf forbids a token.
        student_scale, teacher_scale: multiply the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        student_softcap, teacher_softcap: cap in logits (Gemma's final_logit_softcapping); None = no cap.
        chunk_size: rows per chunk; None = 20 million logits per chunk on a CPU, 160 million elsewhere.
        compiled: how the elementwise part runs. True: torch.compile. False: eagerly. None: on CUDA, and on a
            CPU for V >= 32768, by torch.compile; on CUDA with PGPO_TRITON=1 by Triton kernels; eagerly where there is
            no compiler. A way that is there and fails is given up for the process with one warning.

    Under autocast the matmuls run in autocast's dtype. Call it inside the forward of the module that FSDP wraps, where
    the student's weight is whole; a sharded (DTensor) weight is gathered here if it needs no gradient.

    With token_weights, `loss.backward()` works once (the gradients are handed over, not copied), and a float16 head,
    whose gradients a loss scaler has to lift before they are rounded, takes the 6-matmul way.

    Raises:
        ValueError: shapes that do not fit, unknown kind, a number outside its range, sampled_token without labels,
            a sharded student weight that needs a gradient.
    """
    student_weight, teacher_weight = _gathered(student_weight, "student"), _gathered(teacher_weight, "teacher")
    student_bias, teacher_bias = _gathered(student_bias, "student"), _gathered(teacher_bias, "teacher")
    rows, vocabulary = _check_shapes(
        student_hidden, student_weight, student_bias, teacher_hidden, teacher_weight, teacher_bias, labels
    )
    spec = _Spec(kind, beta, top_k, tail, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap)
    if top_k is not None and top_k >= vocabulary:
        spec = replace(spec, top_k=None)
    if spec.support == "label" and labels is None:
        raise ValueError("kind 'sampled_token' compares the log-probabilities of the sampled tokens: pass labels.")
    if isinstance(token_weights, Tensor):
        _check_vector("token_weights", token_weights, rows)
    device = student_hidden.device.type
    if chunk_size is None:
        chunk_size = _default_chunk_size(student_hidden, student_weight)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least one row, or None for the default.")
    if compiled is None and device != "cuda" and not (device == "cpu" and vocabulary >= _COMPILE_FROM_VOCABULARY):
        compiled = False
    options = _Options(
        spec,
        # equal chunks: 130 rows at 128 per chunk are 65 + 65
        step=math.ceil(rows / max(1, math.ceil(rows / chunk_size))),
        compiled=compiled,
        student_dtype=_matmul_dtype(student_hidden, student_weight),
        teacher_dtype=_matmul_dtype(teacher_hidden, teacher_weight),
    )
    teacher = (
        teacher_hidden.detach(),
        teacher_weight.detach(),
        None if teacher_bias is None else teacher_bias.detach(),
    )
    student = (student_hidden, student_weight, student_bias)
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in student)

    if token_weights is None or options.student_dtype == torch.float16:
        output = HeadOutput(*_Recompute.apply(*student, *teacher, labels, options, needs))
        return output if token_weights is None else _weighted(output, token_weights)
    loss, *values = _GradientInForward.apply(*student, *teacher, labels, token_weights, options, needs)
    return replace(HeadOutput(*values), loss=loss)


def dense_distillation_head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor | None = None,
    token_weights: TokenWeights | None = None,
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
    student_bias: Tensor | None = None,
    teacher_bias: Tensor | None = None,
    student_scale: float = 1.0,
    teacher_scale: float = 1.0,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
    chunk_size: int | None = None,
    compiled: bool | None = None,
) -> HeadOutput:
    """`fused_distillation_head` on full logits: slow, large and plain. chunk_size and compiled have no effect."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
        return _capped(scaled_logits(F.linear(hidden, weight, bias), 1.0), scale, softcap)

    student = logits(student_hidden, student_weight, student_bias, student_scale, student_softcap)
    with torch.no_grad():
        teacher = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap)
    return distillation_of_logits(student, teacher, labels, token_weights, kind, beta, top_k, tail, temperature)


def distillation_of_logits(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    token_weights: TokenWeights | None = None,
    kind: str = "jsd",
    beta: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
) -> HeadOutput:
    """The same from logits [N, V], for models whose logits are no plain head on their last hidden state."""
    with torch.no_grad():
        entropies = token_entropy(student, temperature), token_entropy(teacher, temperature)

    def logprob(z: Tensor) -> Tensor | None:
        if labels is None:
            return None
        return torch.log_softmax(scaled_logits(z, temperature), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    if kind == "sampled_token":
        if labels is None:
            raise ValueError("kind 'sampled_token' compares the log-probabilities of the sampled tokens: pass labels.")
        per_token = sampled_token_divergence(student, teacher, labels, temperature)
    else:
        per_token = divergence(student, teacher, kind, beta, top_k, tail, temperature)
    output = HeadOutput(per_token, *entropies, logprob(student), logprob(teacher))
    return output if token_weights is None else _weighted(output, token_weights)


def _weighted(output: HeadOutput, token_weights: TokenWeights) -> HeadOutput:
    """The form with a loss, made from differentiable per-token values."""
    logprob = output.student_logprob
    values = replace(
        output,
        divergence=output.divergence.detach(),
        student_logprob=None if logprob is None else logprob.detach(),
    )
    weights = _weights_of(token_weights, values, slice(0, len(values.divergence)))
    return replace(values, loss=(weights * output.divergence).sum())


def _weights_of(token_weights: TokenWeights, values: HeadOutput, rows: slice) -> Tensor:
    if isinstance(token_weights, Tensor):
        return token_weights.detach()[rows].to(values.divergence)
    weights = token_weights(values, rows).detach()
    _check_vector("the result of token_weights", weights, len(values.divergence))
    return weights.to(values.divergence)


# Arguments ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Spec:
    """What is computed from a row of logits. Frozen: compiled code is specialised to it."""

    kind: str
    beta: float
    top_k: int | None
    tail: bool
    temperature: float
    student_scale: float
    teacher_scale: float
    student_softcap: float | None
    teacher_softcap: float | None

    def __post_init__(self) -> None:
        if self.kind != "sampled_token":
            check_divergence(self.kind, self.beta, self.top_k)
        for name in ("temperature", "student_scale", "teacher_scale", "student_softcap", "teacher_softcap"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value!r}; it must be a positive number.")

    @property
    def direction(self) -> str:
        """The kind, where jsd with beta 0 or 1 is the KL that it stands for."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        return self.kind

    @property
    def support(self) -> str:
        if self.kind == "sampled_token":
            return "label"
        return "full" if self.top_k is None else "top_k"


@dataclass(frozen=True)
class _Options:
    spec: _Spec
    step: int  # rows per chunk
    compiled: bool | None
    student_dtype: torch.dtype  # of the matmuls
    teacher_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """Of the elementwise part and of every per-token value."""
        return torch.float64 if torch.float64 in (self.student_dtype, self.teacher_dtype) else torch.float32


def _check_shapes(
    student_hidden: Tensor,
    student_weight: Tensor,
    student_bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    teacher_bias: Tensor | None,
    labels: Tensor | None,
) -> tuple[int, int]:
    """(N, V). Raises ValueError for shapes that do not fit together."""
    for name, hidden, weight in (
        ("student", student_hidden, student_weight),
        ("teacher", teacher_hidden, teacher_weight),
    ):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}_hidden must be [N, H] and {name}_weight [V, H]; got {tuple(hidden.shape)} and "
                f"{tuple(weight.shape)}."
            )
    (rows, _), (vocabulary, _) = student_hidden.shape, student_weight.shape
    if teacher_weight.shape[0] != vocabulary:
        raise ValueError(
            f"student_weight has {vocabulary} tokens and teacher_weight {teacher_weight.shape[0]}; both heads must "
            "share one vocabulary."
        )
    if teacher_hidden.shape[0] != rows:
        raise ValueError(f"student_hidden has {rows} rows and teacher_hidden {teacher_hidden.shape[0]}; pair them up.")
    if labels is not None:
        _check_vector("labels", labels, rows)
    for name, bias in (("student_bias", student_bias), ("teacher_bias", teacher_bias)):
        if bias is not None:
            _check_vector(name, bias, vocabulary)
    return rows, vocabulary


def _default_chunk_size(hidden: Tensor, weight: Tensor) -> int:
    """Rows per chunk. A lone chunk may be twice as long and peak no higher: the teacher's logits are gone before the
    weight's gradient, [V, H], needs their room."""
    rows = max(1, _CHUNK_LOGITS.get(hidden.device.type, _CHUNK_LOGITS_ELSEWHERE) // len(weight))
    alone = weight.requires_grad and len(hidden) <= min(2 * rows, hidden.shape[1])
    return 2 * rows if alone else rows


def _check_vector(name: str, vector: Tensor, length: int) -> None:
    if vector.shape != (length,):
        raise ValueError(f"{name} must have shape [{length}]; got {tuple(vector.shape)}.")


def _gathered(parameter: Any, side: str) -> Any:
    """A sharded parameter in one piece (recognised by DTensor's method: core knows no torch.distributed)."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if side == "student" and parameter.requires_grad:
        raise ValueError(
            "the student's head is a sharded DTensor that needs a gradient; call the fused head inside the forward of "
            "the module that FSDP wraps, where the parameter is whole and its gradient is reduced over ranks."
        )
    return parameter.detach().full_tensor()


def _matmul_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    promoted = torch.promote_types(hidden.dtype, weight.dtype)
    device = hidden.device.type
    if promoted != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return promoted


# Matmuls ------------------------------------------------------------------------------------------------------------


def _writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Can a half-precision matmul write its fp32 accumulator? CUDA, torch >= 2.8."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and device.type == "cuda" and "dtype_out" in torch.ops.aten.addmm.overloads()


def _mm_fp32(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.mm(a, b, out_dtype=torch.float32, out=out)


def _addmm_fp32(total: Tensor, a: Tensor, b: Tensor, beta: float) -> None:
    torch.addmm(total, a, b, beta=beta, out_dtype=torch.float32, out=total)


class _Head:
    """One side's head and the buffer for a chunk of its logits, [step, V]."""

    def __init__(self, tensors: list[Any], dtype: torch.dtype, step: int) -> None:
        hidden, weight, self.bias = tensors
        self.hidden, self.weight = hidden.to(dtype), weight.to(dtype)
        self.wide = _writes_fp32(hidden.device, dtype)
        self.buffer = self.hidden.new_empty((step, len(weight)), dtype=torch.float32 if self.wide else dtype)

    def logits(self, rows: slice) -> Tensor:
        """hidden @ weight.T + bias of some rows, written over the rows before."""
        out = self.buffer[: rows.stop - rows.start]
        if self.wide:
            _mm_fp32(self.hidden[rows], self.weight.t(), out)
            if self.bias is not None:
                out.add_(self.bias)
        elif self.bias is not None:
            torch.addmm(self.bias.to(out.dtype), self.hidden[rows], self.weight.t(), out=out)
        else:
            torch.mm(self.hidden[rows], self.weight.t(), out=out)
        return out


class _Gradients:
    """Gradients of the student's hidden states, weight and bias, summed over chunks. None where not needed.

    The weight's is summed in fp32 where a matmul can add to fp32, else in the weight's dtype (a CPU in bf16 rounds it
    once per chunk, as accumulating micro-batches does).
    """

    def __init__(
        self, student: _Head, hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: tuple[bool, ...]
    ) -> None:
        self.student, self.needs = student, needs
        wide = torch.promote_types(student.weight.dtype, torch.float32)
        same = not student.wide and student.weight.dtype == weight.dtype
        self.sum_dtype = weight.dtype if same else wide
        self.hidden = torch.empty_like(hidden) if needs[0] else None
        self.weight: Tensor | None = None  # made when the first chunk needs it
        self.bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None  # type: ignore[arg-type]
        self.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)

    def add(self, rows: slice, logit_gradient: Tensor) -> None:
        """Add what a chunk's d loss / d logits [rows, V], in the matmul's dtype, contributes."""
        hidden = self.student.hidden[rows]
        if self.hidden is not None:
            self.hidden[rows] = logit_gradient @ self.student.weight
        if self.needs[1]:
            self._add_to_weight(logit_gradient.t(), hidden)
        if self.bias is not None:
            self.bias += logit_gradient.sum(0, dtype=self.bias.dtype)

    def _add_to_weight(self, a: Tensor, b: Tensor) -> None:
        beta = 1.0
        if self.weight is None:
            beta = 0.0  # whatever is in this memory does not count
            self.weight = torch.empty_like(self.student.weight, dtype=self.sum_dtype)
        total = self.weight
        if self.student.wide:
            _addmm_fp32(total, a, b, beta)
        elif total.dtype == b.dtype:
            total.addmm_(a, b, beta=beta)
        else:  # product and sum differ in dtype: a block of the vocabulary at a time keeps the product small
            for block in _slices(0, len(total), 2**14):
                total[block] = a[block] @ b + (total[block] if beta else 0.0)

    def result(self) -> tuple[Tensor | None, ...]:
        if self.needs[1] and self.weight is None:
            self.weight = torch.zeros_like(self.student.weight)
        gradients = (self.hidden, self.weight, self.bias)
        return tuple(g if g is None else g.to(dtype) for g, dtype in zip(gradients, self.dtypes, strict=True))


# Elementwise, on [rows, V] ------------------------------------------------------------------------------------------


def _capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _student_logits(spec: _Spec, raw: Tensor, dtype: torch.dtype) -> Tensor:
    z = _capped(raw.to(dtype), spec.student_scale, spec.student_softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def _teacher_logits(spec: _Spec, raw: Tensor, dtype: torch.dtype) -> Tensor:
    z = _capped(raw.to(dtype), spec.teacher_scale, spec.teacher_softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def _student_slope(spec: _Spec, z: Tensor) -> Tensor | float:
    """d z / d raw for z = _student_logits(raw); tanh' = 1 - tanh^2."""
    slope = spec.student_scale / spec.temperature
    if spec.student_softcap is None:
        return slope
    return slope * (1 - (z * (spec.temperature / spec.student_softcap)) ** 2)


def _normalizer(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, log sum exp(z - max) and entropy, [rows, 1]. Apart, the two keep the digits that max + log would round."""
    top = z.amax(-1, keepdim=True)
    z = z - top
    weight = z.exp()
    total = weight.sum(-1, keepdim=True)
    mean = torch.where(weight == 0, 0.0, weight * z).sum(-1, keepdim=True) / total
    return top, total.log(), total.log() - mean


def _log_mixture(spec: _Spec, student: Tensor, teacher: Tensor) -> Tensor:
    """log of (1 - b) p_S + b p_T from probabilities; a token below the smallest float adds nothing anywhere."""
    mixture = (1 - spec.beta) * student + spec.beta * teacher
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


# Columns of the table that _statistics makes: [rows, 6], or [rows, 8] for the full vocabulary.
_TOP_S, _LOG_S, _H_S, _TOP_T, _LOG_T, _H_T, _D, _K = range(8)


def _column(table: Tensor, i: int) -> Tensor:
    return table[:, i : i + 1]


def _statistics(spec: _Spec, dtype: torch.dtype, student: Tensor, teacher: Tensor) -> Tensor:
    """Normalisers and entropies of both sides; for the full vocabulary D, and K of the gradient (module docstring)."""
    zs, zt = _student_logits(spec, student, dtype), _teacher_logits(spec, teacher, dtype)
    columns = [*_normalizer(zs), *_normalizer(zt)]
    if spec.support == "full":
        ls, lt = zs - columns[_TOP_S] - columns[_LOG_S], zt - columns[_TOP_T] - columns[_LOG_T]
        columns += _full_divergence(spec, ls, lt)
    return torch.cat(columns, dim=-1)


def _full_divergence(spec: _Spec, ls: Tensor, lt: Tensor) -> list[Tensor]:
    ps, pt = ls.exp(), lt.exp()
    if spec.direction == "jsd":
        lm = _log_mixture(spec, ps, pt)
        to_student = torch.where(ps == 0, 0.0, ps * (ls - lm)).sum(-1, keepdim=True)
        to_teacher = torch.where(pt == 0, 0.0, pt * (lt - lm)).sum(-1, keepdim=True)
        return [(1 - spec.beta) * to_student + spec.beta * to_teacher, to_student]
    if spec.direction == "reverse_kl":
        kl = torch.where(ps == 0, 0.0, ps * (ls - lt)).sum(-1, keepdim=True)
    else:
        kl = torch.where(pt == 0, 0.0, pt * (lt - ls)).sum(-1, keepdim=True)
    return [kl, kl]


def _logit_gradient(
    spec: _Spec,
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
    """Write d loss / d raw logits into out, or over `student` if out is None.

    per_divergence [rows, 1] multiplies dD/dz over the full vocabulary (needs teacher), per_label the one-hot of the
    labels [rows, 1], per_mass -p_S.
    """
    zs = _student_logits(spec, student, dtype)
    ls = zs - _column(table, _TOP_S) - _column(table, _LOG_S)
    ps = ls.exp()
    gradient = torch.zeros_like(ps)
    if per_divergence is not None:
        assert teacher is not None
        lt = _teacher_logits(spec, teacher, dtype) - _column(table, _TOP_T) - _column(table, _LOG_T)
        if spec.direction == "forward_kl":
            gradient = per_divergence * (ps - lt.exp())
        else:
            other = lt if spec.direction == "reverse_kl" else _log_mixture(spec, ps, lt.exp())
            share = 1.0 if spec.direction == "reverse_kl" else 1 - spec.beta
            gradient = share * per_divergence * torch.where(ps == 0, 0.0, ps * (ls - other - _column(table, _K)))
    if per_mass is not None:
        gradient = gradient - per_mass * ps
    if per_label is not None:
        tokens = torch.arange(ps.shape[-1], device=ps.device)
        gradient = gradient + per_label * (tokens == labels)
    (student if out is None else out).copy_(gradient * _student_slope(spec, zs))


_triton_failed = False
_compiler_failed = False


@lru_cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def _has_triton(device: torch.device) -> bool:
    """On request: no GPU has run them yet."""
    return device.type == "cuda" and os.environ.get("PGPO_TRITON") == "1" and _triton_installed()


def _in_triton(function: Callable[..., Any]) -> Callable[..., Any]:
    from . import triton_kernels  # not everyone has Triton

    return triton_kernels.statistics if function is _statistics else triton_kernels.logit_gradient


@lru_cache
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True)


def _run(function: Callable[..., Any], options: _Options, *arguments: Tensor | None) -> Any:
    """Call an elementwise function on a chunk: its Triton kernel, compiled, or on a few rows at a time."""
    global _compiler_failed, _triton_failed
    device = arguments[0].device  # type: ignore[union-attr]
    rows, vocabulary = arguments[0].shape  # type: ignore[union-attr]
    spec, dtype = options.spec, options.dtype
    if options.compiled is None and not _triton_failed and _has_triton(device):
        try:
            return _in_triton(function)(spec, dtype, *arguments)
        except Exception as error:  # no C compiler, a GPU that Triton does not know: before anything is written
            if isinstance(error, torch.OutOfMemoryError):
                raise
            _triton_failed = True
            _warn("its Triton kernels", error)
    # A length of 1 is never dynamic to the compiler, which would compile once more for it.
    if rows > 1 and (options.compiled or (options.compiled is None and not _compiler_failed)):
        for argument in arguments:
            if argument is not None:
                torch._dynamo.mark_dynamic(argument, 0)
        try:
            # Floats of the spec are constants: otherwise the second value of one becomes an fp64 input of the kernel.
            with torch._dynamo.config.patch(specialize_float=True):
                return _compile(function)(spec, dtype, *arguments)
        except Exception as error:  # no compiler, too many formulas in one process; what is no fault of it comes again
            if options.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            _compiler_failed = True
            _warn("torch.compile", error)
    block = max(1, _EAGER_LOGITS.get(device.type, _EAGER_LOGITS_ELSEWHERE) // vocabulary)
    results = [
        function(spec, dtype, *(a if a is None else a[i : i + block] for a in arguments)) for i in range(0, rows, block)
    ]
    return None if results[0] is None else torch.cat(results)


def _warn(way: str, error: Exception) -> None:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    warnings.warn(f"the fused head runs without {way}, which failed: {reason}", stacklevel=3)


# One chunk ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chunk:
    """A chunk's values, and what its gradient needs besides the logits."""

    values: HeadOutput
    table: Tensor
    top_index: Tensor | None = None  # [rows, k]
    top_slope: Tensor | None = None  # [rows, k], dD / d log p_S


def _evaluate(options: _Options, student: Tensor, teacher: Tensor, labels: Tensor | None, slope: bool) -> _Chunk:
    """Values of a chunk from its raw logits [rows, V], which stay as they are. labels: [rows] | None."""
    spec, dtype = options.spec, options.dtype
    table = _run(_statistics, options, student, teacher)

    def log_probs(index: Tensor) -> tuple[Tensor, Tensor]:
        ls = _student_logits(spec, student.gather(-1, index), dtype) - _column(table, _TOP_S) - _column(table, _LOG_S)
        lt = _teacher_logits(spec, teacher.gather(-1, index), dtype) - _column(table, _TOP_T) - _column(table, _LOG_T)
        return ls, lt

    top_index = top_slope = student_logprob = teacher_logprob = None
    if labels is not None:
        student_logprob, teacher_logprob = (x.squeeze(-1) for x in log_probs(labels.unsqueeze(-1)))
    if spec.support == "full":
        value = table[:, _D]
    elif spec.support == "top_k":
        assert spec.top_k is not None
        top_index = student.topk(spec.top_k, dim=-1).indices
        value, top_slope = _top_k_divergence(spec, *log_probs(top_index), slope)
    else:
        assert student_logprob is not None and teacher_logprob is not None
        value = (student_logprob - teacher_logprob) * student_logprob
    values = HeadOutput(value, table[:, _H_S], table[:, _H_T], student_logprob, teacher_logprob)
    return _Chunk(values, table, top_index, top_slope)


def _top_k_divergence(spec: _Spec, ls: Tensor, lt: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """D [rows] on the kept tokens, and dD / d ls [rows, k]."""
    close = _append_tail if spec.tail else _renormalise
    with torch.set_grad_enabled(slope):
        ls = ls.requires_grad_(slope)
        value = divergence_of_log_probs(close(ls), close(lt), spec.kind, spec.beta)
        return value.detach(), torch.autograd.grad(value.sum(), ls)[0] if slope else None


def _differentiate(
    options: _Options,
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
    per_mass = per_label = None if per_logprob is None else per_logprob.unsqueeze(-1)
    labels = None if labels is None or per_label is None else labels.unsqueeze(-1)
    if spec.support == "full" or per_divergence is None:
        used = None if per_divergence is None else teacher
        _run(_logit_gradient, options, student, used, chunk.table, per_divergence, per_label, per_mass, labels, out)
        return student if out is None else out

    # top-k: -p_S sum(v) everywhere, and at the k tokens the exact sum, rounded once
    index, slope = chunk.top_index, chunk.top_slope
    assert index is not None and slope is not None
    slope = per_divergence * slope
    z = _student_logits(spec, student.gather(-1, index), options.dtype)
    top_mass = (z - _column(chunk.table, _TOP_S) - _column(chunk.table, _LOG_S)).exp()
    mass = slope.sum(-1, keepdim=True)
    per_mass = mass if per_mass is None else per_mass + mass
    at_top = slope - per_mass * top_mass
    if per_label is not None:
        at_top = at_top + per_label * (index == labels)
    at_top = at_top * _student_slope(spec, z)
    _run(_logit_gradient, options, student, None, chunk.table, None, per_label, per_mass, labels, out)
    result = student if out is None else out
    return result.scatter_(-1, index, at_top.to(result.dtype))


# All chunks ---------------------------------------------------------------------------------------------------------


def _heads(options: _Options, tensors: list[Any]) -> tuple[_Head, _Head, Tensor | None]:
    """Student, teacher, and a buffer for d loss / d logits in the matmul's dtype (None: over the student's logits)."""
    student = _Head(tensors[:3], options.student_dtype, options.step)
    teacher = _Head(tensors[3:6], options.teacher_dtype, options.step)
    return student, teacher, student.hidden.new_empty(student.buffer.shape) if student.wide else None


def _slices(start: int, stop: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, stop)) for i in range(start, stop, max(step, 1))]


def _joined(options: _Options, chunks: list[_Chunk], like: Tensor, labels: Tensor | None) -> list[Tensor | None]:
    """The five per-token values of all rows."""
    names = ("divergence", "student_entropy", "teacher_entropy", "student_logprob", "teacher_logprob")
    empty = like.new_zeros(0, dtype=options.dtype)

    def join(name: str) -> Tensor | None:
        if labels is None and name.endswith("logprob"):
            return None
        return torch.cat([empty, *(getattr(chunk.values, name) for chunk in chunks)])

    return [join(name) for name in names]


class _GradientInForward(torch.autograd.Function):
    """loss = sum(weights * divergence) and the per-token values; the gradients exist before backward asks."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, labels, token_weights, options, needs = arguments
        hidden, weight, bias = tensors[:3]
        chunks, losses = [], [hidden.new_zeros((), dtype=options.dtype)]
        with torch.autocast(hidden.device.type, enabled=False):
            student, teacher, narrow = _heads(options, tensors)
            gradients = _Gradients(student, hidden, weight, bias, needs)
            for rows in _slices(0, len(hidden), options.step):
                zs, zt = student.logits(rows), teacher.logits(rows)
                picked = None if labels is None else labels[rows]
                chunk = _evaluate(options, zs, zt, picked, any(needs))
                weights = _weights_of(token_weights, chunk.values, rows)
                losses.append((weights * chunk.values.divergence).sum())
                chunks.append(chunk)
                if any(needs):
                    out = None if narrow is None else narrow[: len(zs)]
                    logit_gradient = _differentiate(options, zs, zt, chunk, picked, weights, None, out)
                    del zt
                    if rows.stop == len(hidden):
                        del teacher  # see _default_chunk_size
                    gradients.add(rows, logit_gradient)
            ctx.gradients = gradients.result()
        values = _joined(options, chunks, hidden, labels)
        ctx.mark_non_differentiable(*(v for v in values if v is not None))
        return torch.stack(losses).sum(), *values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> Any:
        if ctx.gradients is None:
            raise RuntimeError("the fused head's loss was differentiated twice; its gradients are handed over once.")
        gradients, ctx.gradients = ctx.gradients, None
        # Asking a GPU for the value would wait for it; on a CPU it saves a pass over [V, H].
        if upstream.device.type != "cpu" or upstream.item() != 1.0:
            gradients = tuple(None if g is None else g.mul_(upstream) for g in gradients)
        return *gradients, *(None,) * 7


class _Recompute(torch.autograd.Function):
    """Per-token values, of which divergence and student_logprob are differentiable; backward makes the logits again."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        *tensors, labels, options, needs = arguments
        chunks = []
        with torch.autocast(tensors[0].device.type, enabled=False):
            student, teacher, _ = _heads(options, tensors)
            for rows in _slices(0, len(tensors[0]), options.step):
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
            gradients = _Gradients(student, hidden, weight, bias, ctx.needs)
            for rows, chunk in zip(_slices(0, len(hidden), options.step), ctx.chunks, strict=True):
                zs, zt = student.logits(rows), teacher.logits(rows) if needs_teacher else None
                picked = None if labels is None else labels[rows]
                on_divergence = None if per_divergence is None else per_divergence[rows].to(options.dtype)
                on_logprob = None if per_logprob is None else per_logprob[rows].to(options.dtype)
                out = None if narrow is None else narrow[: len(zs)]
                logit_gradient = _differentiate(options, zs, zt, chunk, picked, on_divergence, on_logprob, out)
                del zt
                if rows.stop == len(hidden):
                    del teacher  # see _default_chunk_size
                gradients.add(rows, logit_gradient)
            return *gradients.result(), *(None,) * 6
