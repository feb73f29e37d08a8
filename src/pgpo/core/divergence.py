"""Per-token divergences between student and teacher: the dense definitions.

Kinds (SDPO, arXiv 2601.20802, and the settings of its public code):

    forward_kl   KL(teacher || student)
    reverse_kl   KL(student || teacher)                                  the D of PGPO's Eq. 2
    jsd          (1 - b) KL(student || m) + b KL(teacher || m),  m = (1 - b) student + b teacher

For jsd, b = 0 and b = 1 mean forward and reverse KL, the limits of JSD / b and JSD / (1 - b), as in SDPO's code.
Support: the full vocabulary; the student's top-k tokens, either with one bucket for the remaining mass (`tail=True`)
or renormalised (`tail=False`); or only the sampled token (`sampled_token_divergence`).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .information import scaled_logits

KINDS = ("jsd", "forward_kl", "reverse_kl")

# log(1 - captured mass) needs captured mass < 1. The bound is that of SDPO's code, about fp32's resolution at 1.
_MAX_LOG_MASS = -1e-7
# Replaces log 0 where -inf would make a gradient nan; its exp is exactly 0 in every floating dtype.
_LOG_ZERO = -1e30


def divergence(
    student_logits: Tensor,
    teacher_logits: Tensor,
    kind: str = "jsd",
    beta: float = 0.5,
    top_k: int | None = None,
    tail: bool = True,
    temperature: float = 1.0,
) -> Tensor:
    """Divergence at every position; gradients flow to the student only.

    Args:
        student_logits: [..., V]; half precision is computed in fp32.
        teacher_logits: [..., V], treated as constant.
        kind: "jsd", "forward_kl" or "reverse_kl" (module docstring).
        beta: weight of the teacher in the JSD mixture, in [0, 1]; the SDPO settings use 0.5.
        top_k: keep the student's k most likely tokens (the SDPO settings use 100); None = full vocabulary.
        tail: with top_k, add one bucket with the remaining mass; False renormalises the k tokens.
        temperature: divides both logits.

    Returns:
        [...], nats, >= 0 up to rounding; fp32 (fp64 for fp64 logits). JSD is at most ln 2. Without a tail the result
        is nan where the teacher's logits are -inf for all kept tokens.

    Raises:
        ValueError: unknown kind, shapes that differ, or a number outside its range.
    """
    check_divergence(kind, beta, top_k)
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have one shape [..., V]; got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}."
        )
    student = torch.log_softmax(scaled_logits(student_logits, temperature), dim=-1)
    teacher = torch.log_softmax(scaled_logits(teacher_logits.detach(), temperature), dim=-1)
    if top_k is not None and top_k < student.shape[-1]:
        student, index = student.topk(top_k, dim=-1)
        teacher = teacher.gather(-1, index)
        close = _append_tail if tail else _renormalise
        student, teacher = close(student), close(teacher)
    return divergence_of_log_probs(student, teacher, kind, beta)


def divergence_of_log_probs(student: Tensor, teacher: Tensor, kind: str, beta: float) -> Tensor:
    """The formula of the module docstring on normalised log-probabilities [..., K] -> [...]."""
    if kind == "forward_kl" or (kind == "jsd" and beta == 0.0):
        return _kl(teacher, student)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1.0):
        return _kl(student, teacher)
    # Where both are -inf, the gradient of logaddexp would be nan.
    mixture = torch.logaddexp(
        student.clamp_min(_LOG_ZERO) + math.log1p(-beta), teacher.clamp_min(_LOG_ZERO) + math.log(beta)
    )
    return (1 - beta) * _kl(student, mixture) + beta * _kl(teacher, mixture)


def sampled_token_divergence(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float = 1.0
) -> Tensor:
    """Score-function surrogate of the reverse KL on the sampled tokens only (SDPO's sampled-token variant).

    Args:
        student_logits, teacher_logits: [..., V].
        labels: [...] sampled token ids, drawn from the student.
        temperature: divides both logits.

    Returns:
        [...]: stopgrad(log p_S(y) - log p_T(y)) * log p_S(y). Its gradient, averaged over y ~ student, is the
        gradient of KL(student || teacher) in nats; its VALUE is not a divergence.
    """
    student = torch.log_softmax(scaled_logits(student_logits, temperature), dim=-1)
    teacher = torch.log_softmax(scaled_logits(teacher_logits.detach(), temperature), dim=-1)
    index = labels.unsqueeze(-1)
    student_logp = student.gather(-1, index).squeeze(-1)
    teacher_logp = teacher.gather(-1, index).squeeze(-1)
    return (student_logp - teacher_logp).detach() * student_logp


def check_divergence(kind: str, beta: float, top_k: int | None) -> None:
    """Raise ValueError for an unknown kind, beta outside [0, 1] or top_k < 1."""
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}.")
    if not 0 <= beta <= 1:
        raise ValueError(f"beta is {beta!r}; the JSD weight of the teacher must lie in [0, 1].")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}; keep at least one token, or None for the full vocabulary.")


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) from log-probabilities; a token with p = 0 (also by underflow) contributes 0, even where q = 0."""
    probability = p.exp()
    difference = torch.where(probability == 0, 0.0, p - q)
    return (probability * difference).sum(-1)


def _append_tail(log_probs: Tensor) -> Tensor:
    captured = torch.logsumexp(log_probs, dim=-1, keepdim=True).clamp_max(_MAX_LOG_MASS)
    return torch.cat([log_probs, torch.log(-torch.expm1(captured))], dim=-1)


def _renormalise(log_probs: Tensor) -> Tensor:
    # Subtracting logsumexp would lose precision where all kept log-probabilities are very negative.
    return torch.log_softmax(log_probs, dim=-1)
