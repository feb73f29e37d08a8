"""Student against teacher on the tokens of a forward, by the configuration of a run."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from pgpo.core import HeadOutput, dense_distillation_head, distillation_of_logits, fused_distillation_head
from pgpo.core.head import TokenWeights
from pgpo.forward.passes import States
from pgpo.settings.config import PGPOConfig


def compare(
    args: PGPOConfig, student: States, teacher: States, labels: Tensor, weights: TokenWeights, **changes: Any
) -> HeadOutput:
    """Divergence, entropies and log-probabilities of N tokens; runs inside the student's forward.

    changes: of the arguments of `fused_distillation_head`.
    """
    arguments: dict[str, Any] = dict(
        kind=args.divergence,
        beta=args.divergence_beta,
        top_k=args.divergence_top_k or None,
        tail=args.divergence_tail,
        temperature=args.temperature,
    )
    arguments |= changes
    if student.head is None or teacher.head is None:
        return distillation_of_logits(student.hidden, teacher.hidden, labels, weights, **arguments)
    s, t = student.head, teacher.head
    function = fused_distillation_head if args.fused_head else dense_distillation_head
    return function(
        student.hidden,
        s.weight,
        teacher.hidden,
        t.weight,
        labels,
        weights,
        student_bias=s.bias,
        teacher_bias=t.bias,
        student_scale=s.scale,
        teacher_scale=t.scale,
        student_softcap=s.softcap,
        teacher_softcap=t.softcap,
        **arguments,
    )
