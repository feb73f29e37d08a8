"""TRL's padded batch -> samples for the loss, one by one and without padding."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pgpo.teacher.contexts import TeacherContext
from pgpo.train.seam import Batch


@dataclass(frozen=True)
class Sample:
    """One active completion, without padding.

    Its T tokens all stand in the context; loss and statistics take the N of them that the model wrote.
    """

    prompt: list[int]
    teacher_prompt: list[int]
    completion: list[int]  # [T]
    index: int = 0  # place in this rank's rollout
    half: int = 0  # half-batch of its question, 0 or 1 (cross-fitting)
    solved: bool = True
    rollout_logprobs: Tensor | None = None  # [N] log-probs at rollout time, where the tokens are off-policy
    weight: Tensor | None = None  # [N] or [1] vLLM / trainer mismatch correction, times the rule of `sample_weights`
    own: list[int] | None = None  # [N] places in the completion that the model wrote, not its environment; None = all

    @property
    def labels(self) -> list[int]:
        """The tokens that count [N]."""
        return self.completion if self.own is None else [self.completion[i] for i in self.own]

    @property
    def student_size(self) -> tuple[int, int]:
        """Tokens of the student's prompt and of the completion."""
        return len(self.prompt), len(self.completion)

    @property
    def size(self) -> tuple[int, int]:
        """Tokens of the longer prompt (student's or teacher's) and of the completion."""
        return max(len(self.prompt), len(self.teacher_prompt)), len(self.completion)


class Sums(NamedTuple):
    """Sums over the active tokens of a step: weighted loss (with that of rehearsal), divergence, log pi_S(y) - log
    pi_T(y) of the sampled token, the same on completions that are not right, and their number of tokens; and the router
    loss, 0 without routers."""

    loss: float
    divergence: float
    gap: float
    wrong_gap: float
    wrong_tokens: float
    router_loss: float


def active_samples(batch: Batch) -> list[Sample]:
    """This rank's completions that have a teacher and at least one token of the model's own."""
    samples = []
    ratios = batch.get("importance_sampling_ratio")  # [B, T] per token or [B, 1] per sequence
    old = batch.get("old_per_token_logps")
    mask = loss_mask(batch)
    for i, written in completions(batch).items():
        if (teacher_prompt := batch["teacher_prompt_ids"][i]) is None:
            continue
        keep = mask[i]
        weight = None
        if ratios is not None:
            weight = ratios[i][keep] if ratios.shape[1] > 1 else ratios[i]
        if (own := batch.get("sample_weight")) is not None:
            weight = own[i : i + 1] if weight is None else weight * own[i]
        samples.append(
            Sample(
                prompt=_prompt(batch, i),
                teacher_prompt=teacher_prompt,
                **written,
                index=int(batch["row"][i]),
                half=int(batch["half"][i]),
                solved=bool(batch["solved"][i]),
                rollout_logprobs=None if old is None else old[i][keep],
                weight=weight,
            )
        )
    return samples


def student_samples(batch: Batch, rows: Sequence[int]) -> list[Sample]:
    """Some rows of this rank, which have a token of the model's own, without a teacher."""
    found = completions(batch, rows)
    return [Sample(_prompt(batch, i), [], **found[i]) for i in rows]


def idle_sample(batch: Batch) -> Sample:
    """A stand-in for a rank that has run out of micro-batches: its loss is multiplied by zero."""
    prompt = _prompt(batch, 0)
    return Sample(prompt=prompt, teacher_prompt=prompt, completion=batch["completion_ids"][0][:1].tolist())


def shown_demonstrations(
    contexts: Sequence[TeacherContext], teacher_prompts: Sequence[Any], mine: range
) -> dict[int, list[int]]:
    """{row of a demonstration of this rank: the first of this rank's prompts that shows it}; mine: its contexts."""
    shown: dict[int, list[int]] = {}
    for i in mine:
        j = contexts[i].demonstration
        if j is not None and j in mine:
            shown.setdefault(j - mine.start, teacher_prompts[i - mine.start])
    return shown


def demonstrations(batch: Batch, shown: dict[int, list[int]], most: int) -> list[Sample]:
    """Completions behind the teacher prompts that show them, {row: prompt}; at most so many."""
    written = completions(batch)
    return [Sample([], prompt, **written[i]) for i, prompt in shown.items() if i in written][:most]


def loss_mask(batch: Batch) -> Tensor:
    """[B, T], True on completion tokens that the model wrote: neither padding nor its environment (TRL's tool_mask),
    nor a truncated completion under mask_truncated_completions."""
    mask = batch["completion_mask"].bool()
    return mask if "tool_mask" not in batch else mask & batch["tool_mask"].bool()


def completions(batch: Batch, rows: Sequence[int] | None = None) -> dict[int, dict[str, Any]]:
    """`completion` and `own` of the rows with tokens that count, as `Sample` takes them; rows None = all."""
    found: dict[int, dict[str, Any]] = {}
    mask = loss_mask(batch)
    for i in range(len(mask)) if rows is None else rows:
        mine = mask[i]
        if not mine.any():
            continue
        tokens = batch["completion_mask"][i].bool()
        own = mine[tokens]
        found[i] = {
            "completion": batch["completion_ids"][i][tokens].tolist(),
            "own": None if own.all() else own.nonzero().flatten().tolist(),
        }
    return found


def own_places(samples: Sequence[Sample]) -> Tensor | None:
    """[N] places of the tokens that count among all completion tokens of the samples; None = all of them."""
    if all(sample.own is None for sample in samples):
        return None
    starts = itertools.accumulate((len(sample.completion) for sample in samples), initial=0)
    own = [range(len(sample.completion)) if sample.own is None else sample.own for sample in samples]
    return torch.tensor([start + i for start, places in zip(starts, own) for i in places])


def select(batch: Batch, index: list[int]) -> Batch:
    """Rows of a TRL batch, trimmed to their longest prompt (padded left) and completion (padded right)."""
    count, width = batch["completion_ids"].shape
    prompt = int(batch["prompt_mask"][index].sum(1).max())
    completion = max(int(batch["completion_mask"][index].sum(1).max()), 1)
    picked: Batch = {}
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
            value = value[index]
            if key in ("prompt_ids", "prompt_mask"):
                value = value[:, value.shape[1] - prompt :]
            elif value.dim() == 2 and value.shape[1] == width:
                value = value[:, :completion]
        picked[key] = value
    return picked


def _prompt(batch: Batch, i: int) -> list[int]:
    prompt: list[int] = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()].tolist()
    return prompt
