"""Both heads on full logits in float64, by the formulas on probabilities; derivatives by autograd.

Tokens that both sides forbid (a bias of -inf) are taken out of the vocabulary before anything else.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    z = torch.einsum("nh,vh->nv", hidden.double(), weight.double())
    if bias is not None:
        z = z + bias.double()
    z = scale * z
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


def head(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    labels: Tensor,
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
    kept: Tensor | None = None,
) -> dict[str, Tensor]:
    """[N] each: divergence, student_entropy, teacher_entropy, student_logprob, teacher_logprob.

    kept: the tokens [N, k] of the top-k support, instead of the student's largest logits.
    """
    zs = logits(student_hidden, student_weight, student_bias, student_scale, student_softcap) / temperature
    zt = logits(teacher_hidden, teacher_weight, teacher_bias, teacher_scale, teacher_softcap).detach() / temperature
    allowed = ~((zs == -math.inf) & (zt == -math.inf)).all(0)
    zs, zt = zs[:, allowed], zt[:, allowed]
    position = allowed.cumsum(0) - 1  # of a token among the allowed
    p, q = torch.softmax(zs, -1), torch.softmax(zt, -1)
    rows = torch.arange(len(p))
    label = position[labels]
    values = {
        "student_entropy": -torch.where(p > 0, p * p.log(), 0.0).sum(-1),
        "teacher_entropy": -torch.where(q > 0, q * q.log(), 0.0).sum(-1),
        "student_logprob": p[rows, label].log(),
        "teacher_logprob": q[rows, label].log(),
    }
    if kind == "sampled_token":
        gap = values["student_logprob"] - values["teacher_logprob"]
        return {**values, "divergence": gap.detach() * values["student_logprob"]}
    if top_k is not None and top_k < p.shape[1]:
        index = zs.topk(top_k).indices if kept is None else position[kept]
        inside = torch.zeros_like(p, dtype=torch.bool).scatter(1, index, True)

        def restrict(x: Tensor) -> Tensor:
            head = x.gather(1, index)
            if tail:
                return torch.cat([head, torch.where(inside, 0.0, x).sum(-1, keepdim=True)], 1)
            return head / head.sum(-1, keepdim=True)

        p, q = restrict(p), restrict(q)
    if kind == "forward_kl" or (kind == "jsd" and beta == 0):
        value = kl(q, p)
    elif kind == "reverse_kl" or (kind == "jsd" and beta == 1):
        value = kl(p, q)
    else:
        m = (1 - beta) * p + beta * q
        value = (1 - beta) * kl(p, m) + beta * kl(q, m)
    return {**values, "divergence": value}
