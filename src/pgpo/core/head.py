"""Divergence, entropies and log-probabilities directly from hidden states, without the full logits [N, V].

head.py              the public functions, and the dense twin on full logits, for tests and benchmarks
_head_formulas.py    formulas on a chunk's logits: softmax, entropy, divergence, gradient
_head_chunks.py      the loop over chunks of rows, forward and backward
_head_kernels.py     matmuls, and the formulas run eagerly, by torch.compile or by Triton (triton_kernels.py)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._head_chunks import (
    GradientInForward,
    HeadOutput,
    Options,
    Recompute,
    TokenWeights,
    check_vector,
    default_chunk_size,
    matmul_dtype,
    weights_of,
)
from ._head_formulas import Spec, capped
from ._head_kernels import pays_to_compile
from .divergence import divergence, sampled_token_divergence
from .information import scaled_logits, token_entropy

# Hidden states [N, H], weight [V, H], bias [V] or None.
Side = tuple[Tensor, Tensor, Tensor | None]
_NO_LABELS = "kind 'sampled_token' compares the log-probabilities of the sampled tokens: pass labels."


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
    """Compute what the loss and I_k need from both heads, in chunks of rows.

    The logits are softcap(scale * (hidden @ weight.T + bias)) / temperature with softcap(z) = cap tanh(z / cap).

        out = fused_distillation_head(hs, student.weight, ht, teacher.weight, labels, mask / tokens)
        out.loss.backward()                          # out.divergence, out.student_entropy, ... are plain numbers

        out = fused_distillation_head(hs, student.weight, ht, teacher.weight, labels)
        (advantage * out.student_logprob + out.divergence).sum().backward()          # any function of the two

    Args:
        student_hidden: [N, H], the last hidden states at the positions that predict the N tokens.
        student_weight: [V, H]; may be the embedding too (tied), or frozen (then its gradient takes no memory).
        teacher_hidden: [N, H'], constant, like the other teacher arguments.
        teacher_weight: [V, H'].
        labels: [N] sampled token ids in [0, V), also at masked rows; None = no log-probabilities.
        token_weights: [N], constant (0 masks a row out of the loss; its values are still returned). Or a function
            (chunk, rows) -> [rows] of the chunk's values, e.g. for importance ratios:
            lambda chunk, rows: (chunk.student_logprob - old[rows]).exp().clamp_max(2.0) / tokens
        kind, beta, top_k, tail, temperature: as in `divergence`; or kind = "sampled_token", the surrogate of
            `sampled_token_divergence`, which needs labels and ignores beta, top_k and tail.
        student_bias, teacher_bias: [V]; -inf forbids a token.
        student_scale, teacher_scale: multiply the logits (Cohere's logit_scale, 1 / Granite's logits_scaling).
        student_softcap, teacher_softcap: cap in logits (Gemma's final_logit_softcapping); None = no cap.
        chunk_size: rows per chunk; None = 20 million logits per chunk on a CPU, 160 million elsewhere.
        compiled: how the elementwise part runs. True: by torch.compile. False: eagerly. None: by the Triton kernels
            on CUDA with PGPO_TRITON=1, else by torch.compile on CUDA and, for V >= 32768, on a CPU, else eagerly. A
            backend that fails is replaced by the next one for the rest of the process, with one warning.

    Under autocast the matmuls run in autocast's dtype. Call it inside the forward of the module that FSDP wraps, where
    the student's weight is whole; a sharded (DTensor) weight is gathered here if it needs no gradient.

    Cost: with token weights the forward computes the gradients (4 matmuls of N V H), and `loss.backward()` works once,
    because it returns them without a copy. Without token weights backward recomputes the logits (6 matmuls), also for
    a float16 head, where the loss scaler must act before gradients are rounded.

    Precision: elementwise work is fp32 (fp64 for fp64). Logits of a bf16 or fp16 head are fp32 on CUDA, and rounded to
    the head's dtype elsewhere (_head_kernels.py).

    Raises:
        ValueError: shapes that do not fit, unknown kind, a number outside its range, sampled_token without labels,
            a sharded student weight that needs a gradient.
    """
    student = (student_hidden, _gathered(student_weight, "student"), _gathered(student_bias, "student"))
    teacher = (teacher_hidden, _gathered(teacher_weight, "teacher"), _gathered(teacher_bias, "teacher"))
    rows, vocabulary = _check_shapes(student, teacher, labels)
    spec = Spec(kind, beta, top_k, tail, temperature, student_scale, teacher_scale, student_softcap, teacher_softcap)
    if top_k is not None and top_k >= vocabulary:
        spec = replace(spec, top_k=None)
    if spec.support == "label" and labels is None:
        raise ValueError(_NO_LABELS)
    if isinstance(token_weights, Tensor):
        check_vector("token_weights", token_weights, rows)
    options = _options(spec, student, teacher, chunk_size, compiled)
    constants = [None if t is None else t.detach() for t in teacher]
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in student)

    if token_weights is None or options.student_dtype == torch.float16:
        output = HeadOutput(*Recompute.apply(*student, *constants, labels, options, needs))
        return output if token_weights is None else _weighted(output, token_weights)
    loss, *values = GradientInForward.apply(*student, *constants, labels, token_weights, options, needs)
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
    """`fused_distillation_head` by definition, on full logits [N, V]. chunk_size and compiled have no effect."""

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
        return capped(scaled_logits(F.linear(hidden, weight, bias), 1.0), scale, softcap)

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
    """The same from logits [N, V], for models whose logits are not linear in the last hidden state."""
    with torch.no_grad():
        entropies = token_entropy(student, temperature), token_entropy(teacher, temperature)

    def logprob(z: Tensor) -> Tensor | None:
        if labels is None:
            return None
        return torch.log_softmax(scaled_logits(z, temperature), -1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    if kind == "sampled_token":
        if labels is None:
            raise ValueError(_NO_LABELS)
        per_token = sampled_token_divergence(student, teacher, labels, temperature)
    else:
        per_token = divergence(student, teacher, kind, beta, top_k, tail, temperature)
    output = HeadOutput(per_token, *entropies, logprob(student), logprob(teacher))
    return output if token_weights is None else _weighted(output, token_weights)


def _weighted(output: HeadOutput, token_weights: TokenWeights) -> HeadOutput:
    """Add a loss to differentiable per-token values."""
    logprob = output.student_logprob
    values = replace(
        output,
        divergence=output.divergence.detach(),
        student_logprob=None if logprob is None else logprob.detach(),
    )
    weights = weights_of(token_weights, values, slice(0, len(values.divergence)))
    return replace(values, loss=(weights * output.divergence).sum())


# Arguments ------------------------------------------------------------------------------------------------------------


def _options(spec: Spec, student: Side, teacher: Side, chunk_size: int | None, compiled: bool | None) -> Options:
    hidden, weight, _ = student
    if chunk_size is None:
        chunk_size = default_chunk_size(hidden, weight)
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}; a chunk has at least one row, or None for the default.")
    if compiled is None and not pays_to_compile(hidden.device, len(weight)):
        compiled = False
    return Options(
        spec,
        # equal chunks: 130 rows at 128 per chunk are 65 + 65
        step=math.ceil(len(hidden) / max(1, math.ceil(len(hidden) / chunk_size))),
        compiled=compiled,
        student_dtype=matmul_dtype(*student[:2]),
        teacher_dtype=matmul_dtype(*teacher[:2]),
    )


def _check_shapes(student: Side, teacher: Side, labels: Tensor | None) -> tuple[int, int]:
    """(N, V). Raises ValueError for shapes that do not fit together."""
    for name, (hidden, weight, _) in (("student", student), ("teacher", teacher)):
        if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
            raise ValueError(
                f"{name}_hidden must be [N, H] and {name}_weight [V, H]; got {tuple(hidden.shape)} and "
                f"{tuple(weight.shape)}."
            )
    rows, vocabulary = len(student[0]), len(student[1])
    if len(teacher[1]) != vocabulary:
        raise ValueError(
            f"student_weight has {vocabulary} tokens and teacher_weight {len(teacher[1])}; both heads must share one "
            "vocabulary."
        )
    if len(teacher[0]) != rows:
        raise ValueError(f"student_hidden has {rows} rows and teacher_hidden {len(teacher[0])}; they must be equal.")
    if labels is not None:
        check_vector("labels", labels, rows)
    for name, (_, _, bias) in (("student_bias", student), ("teacher_bias", teacher)):
        if bias is not None:
            check_vector(name, bias, vocabulary)
    return rows, vocabulary


def _gathered(parameter: Any, side: str) -> Any:
    """Gather a sharded parameter (recognised by DTensor's method: core does not import torch.distributed)."""
    if not hasattr(parameter, "full_tensor"):
        return parameter
    if side == "student" and parameter.requires_grad:
        raise ValueError(
            "the student's head is a sharded DTensor that needs a gradient; call the fused head inside the forward of "
            "the module that FSDP wraps, where the parameter is whole and its gradient is reduced over ranks."
        )
    return parameter.detach().full_tensor()
