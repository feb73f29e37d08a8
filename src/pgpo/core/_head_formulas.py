"""Elementwise formulas of the fused head on a chunk's raw logits [rows, V]. They run eagerly or by torch.compile;
triton_kernels.py implements them by hand.

`statistics` computes a table of numbers per row, from which `logit_gradient` computes dD/dlogits of the student. With
l = log p, u = p_S, m = log of the mixture, K = KL(p_S || mixture), the gradient with respect to the student's logits z:

    jsd          (1 - b) u (l_S - m - K)
    reverse_kl   u (l_S - l_T - D)
    forward_kl   u - p_T
    top-k        scatter(v) - u sum(v),  v = dD / d l_S on the k tokens (autograd on [rows, k])
    log-prob     onehot(label) - u

Everything is fp32, fp64 for fp64 inputs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .divergence import check_divergence


@dataclass(frozen=True)
class Spec:
    """What to compute from a row of logits. Frozen, since compiled code is specialised to it."""

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
        """`kind`, with jsd at beta 0 or 1 replaced by the KL that it means."""
        if self.kind == "jsd" and self.beta in (0.0, 1.0):
            return "forward_kl" if self.beta == 0.0 else "reverse_kl"
        return self.kind

    @property
    def support(self) -> str:
        if self.kind == "sampled_token":
            return "label"
        return "full" if self.top_k is None else "top_k"


# Logits ---------------------------------------------------------------------------------------------------------------


def capped(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def student_logits(spec: Spec, raw: Tensor, dtype: torch.dtype) -> Tensor:
    z = capped(raw.to(dtype), spec.student_scale, spec.student_softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def teacher_logits(spec: Spec, raw: Tensor, dtype: torch.dtype) -> Tensor:
    z = capped(raw.to(dtype), spec.teacher_scale, spec.teacher_softcap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def student_slope(spec: Spec, z: Tensor) -> Tensor | float:
    """d z / d raw for z = student_logits(raw); tanh' = 1 - tanh^2."""
    slope = spec.student_scale / spec.temperature
    if spec.student_softcap is None:
        return slope
    return slope * (1 - (z * (spec.temperature / spec.student_softcap)) ** 2)


# The table ------------------------------------------------------------------------------------------------------------

# Columns of the table of `statistics`: [rows, 6], or [rows, 8] for the full vocabulary.
TOP_S, LOG_S, H_S, TOP_T, LOG_T, H_T, D, K = range(8)


def column(table: Tensor, i: int) -> Tensor:
    return table[:, i : i + 1]


def statistics(spec: Spec, dtype: torch.dtype, student: Tensor, teacher: Tensor) -> Tensor:
    """Normalisers and entropies of both sides; for the full vocabulary also D and K (module docstring)."""
    zs, zt = student_logits(spec, student, dtype), teacher_logits(spec, teacher, dtype)
    columns = [*_normalizer(zs), *_normalizer(zt)]
    if spec.support == "full":
        ls, lt = zs - columns[TOP_S] - columns[LOG_S], zt - columns[TOP_T] - columns[LOG_T]
        columns += _full_divergence(spec, ls, lt)
    return torch.cat(columns, dim=-1)


def _normalizer(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """max, log sum exp(z - max) and entropy, [rows, 1]. max and log stay separate: their sum would lose digits."""
    top = z.amax(-1, keepdim=True)
    z = z - top
    weight = z.exp()
    total = weight.sum(-1, keepdim=True)
    mean = torch.where(weight == 0, 0.0, weight * z).sum(-1, keepdim=True) / total
    return top, total.log(), total.log() - mean


def _full_divergence(spec: Spec, ls: Tensor, lt: Tensor) -> list[Tensor]:
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


def _log_mixture(spec: Spec, student: Tensor, teacher: Tensor) -> Tensor:
    """log of (1 - b) p_S + b p_T from probabilities, clamped at the smallest float, below which nothing counts."""
    mixture = (1 - spec.beta) * student + spec.beta * teacher
    return mixture.clamp_min(torch.finfo(mixture.dtype).tiny).log()


# The gradient ---------------------------------------------------------------------------------------------------------


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
    """Write d loss / d raw logits into out, or over `student` if out is None.

    per_divergence [rows, 1] multiplies dD/dz over the full vocabulary (needs teacher), per_label the one-hot of the
    labels [rows, 1], per_mass -p_S.
    """
    zs = student_logits(spec, student, dtype)
    ls = zs - column(table, TOP_S) - column(table, LOG_S)
    ps = ls.exp()
    gradient = torch.zeros_like(ps)
    if per_divergence is not None:
        assert teacher is not None
        lt = teacher_logits(spec, teacher, dtype) - column(table, TOP_T) - column(table, LOG_T)
        if spec.direction == "forward_kl":
            gradient = per_divergence * (ps - lt.exp())
        else:
            other = lt if spec.direction == "reverse_kl" else _log_mixture(spec, ps, lt.exp())
            share = 1.0 if spec.direction == "reverse_kl" else 1 - spec.beta
            gradient = share * per_divergence * torch.where(ps == 0, 0.0, ps * (ls - other - column(table, K)))
    if per_mass is not None:
        gradient = gradient - per_mass * ps
    if per_label is not None:
        tokens = torch.arange(ps.shape[-1], device=ps.device)
        gradient = gradient + per_label * (tokens == labels)
    (student if out is None else out).copy_(gradient * student_slope(spec, zs))
