"""Hint rehearsal from its formula: float64, one row at a time, by the models themselves."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Row = tuple[Sequence[int], Sequence[int], Sequence[bool]]  # hinted prompt, completion, which of its tokens count


def log_probs(model: nn.Module, row: Row, temperature: float) -> Tensor:
    """[N, V] behind the tokens that count."""
    prompt, completion, counts = row
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    return torch.log_softmax(logits[torch.tensor(list(counts))] / temperature, -1)


def rehearsal(student: nn.Module, teacher: nn.Module, rows: Sequence[Row], temperature: float):
    """mean over rows of mean over t of KL(teacher || student) in nats, and its gradient by the student's names."""
    s, t = copy.deepcopy(student).double().eval(), copy.deepcopy(teacher).double().eval()
    s.requires_grad_(True)
    means = []
    for row in rows:
        q = log_probs(t, row, temperature).detach()
        p = log_probs(s, row, temperature)
        means.append((q.exp() * (q - p)).sum(-1).mean())
    loss = torch.stack(means).mean()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in s.named_parameters() if p.grad is not None}
