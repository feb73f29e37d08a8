"""Token ids of unequal rows -> one batch for the model: padded, packed without padding, or joined siblings.

Joined: a prompt, and behind it several of its completions, which do not see one another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Tokens = Sequence[int]


@dataclass(frozen=True)
class Inputs:
    """A batch for the model, and where in it the completion tokens are predicted.

    Attributes:
        ids, positions: [B, L].
        mask: [B, 1, L, L], True where a token may look; or None where causal attention needs none: padding only
            behind, or a packed row, whose borders are where positions start again.
        keep: [N] places in the flattened [B * L] that predict the completion tokens, row after row.
        serves: [B, L] how many completions a token belongs to: a joined prompt's to several, padding to none.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor | None
    keep: Tensor
    serves: Tensor

    def to(self, device: torch.device) -> Inputs:
        tensors = (self.ids, self.positions, self.mask, self.keep, self.serves)
        return Inputs(*(None if t is None else t.to(device) for t in tensors))  # type: ignore[arg-type]


def padded(prompts: Sequence[Tokens], completions: Sequence[Tokens], pad: int) -> Inputs:
    """Every row from its first token on, padded at its end, where causal attention does not look: no mask."""
    rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows))
    keep: list[int] = []
    for i, completion in enumerate(completions):
        end = i * width + len(rows[i])
        keep.extend(range(end - len(completion), end))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    positions = torch.arange(width).expand(len(rows), -1)
    serves = (positions < torch.tensor([[len(row)] for row in rows])).long()
    return Inputs(ids, positions, None, torch.tensor(keep), serves)


def packed(prompts: Sequence[Tokens], completions: Sequence[Tokens]) -> Inputs:
    """All rows behind one another in a single row; positions start again at every border."""
    ids: list[int] = []
    positions: list[int] = []
    keep: list[int] = []
    for prompt, completion in zip(prompts, completions, strict=True):
        keep.extend(range(len(ids) + len(prompt) - 1, len(ids) + len(prompt) - 1 + len(completion)))
        ids += [*prompt, *completion[:-1]]
        positions += range(len(prompt) + len(completion) - 1)
    return Inputs(torch.tensor([ids]), torch.tensor([positions]), None, torch.tensor(keep), torch.ones(1, len(ids)))


def joined(prompts: Sequence[Tokens], completions: Sequence[Tokens], counts: Sequence[int], pad: int) -> Inputs:
    """Rows of siblings: a prompt, then `counts[row]` completions, each of which sees the prompt and itself alone.

    The prompt's last token predicts the first of every completion.
    """
    rows: list[tuple[list[int], list[int], list[int]]] = []  # ids, positions, and whose tokens they are: 0 the prompt
    places: list[list[int]] = []  # of a completion, in its row
    start = 0
    for count in counts:
        prompt = prompts[start]
        ids, positions, owners = list(prompt), list(range(len(prompt))), [0] * len(prompt)
        for k, completion in enumerate(completions[start : start + count], 1):
            places.append([len(prompt) - 1, *range(len(ids), len(ids) + len(completion) - 1)])
            ids += completion[:-1]
            positions += range(len(prompt), len(prompt) + len(completion) - 1)
            owners += [k] * (len(completion) - 1)
        rows.append((ids, positions, owners))
        start += count
    width = max(len(ids) for ids, _, _ in rows)

    def filled(part: int, value: int) -> Tensor:
        return torch.tensor([[*row[part], *[value] * (width - len(row[part]))] for row in rows])

    owner = filled(2, -1).unsqueeze(1)  # padding sees the prompt and itself: no row of the mask is empty
    mask = ((owner.transpose(1, 2) == owner) | (owner == 0)).tril_().unsqueeze(1)
    offsets = [i * width for i, count in enumerate(counts) for _ in range(count)]
    keep = [offset + k for offset, mine in zip(offsets, places, strict=True) for k in mine]
    whose = owner.squeeze(1)
    serves = (whose > 0) + (whose == 0) * torch.tensor(counts).unsqueeze(1)
    return Inputs(filled(0, pad), filled(1, 0), mask, torch.tensor(keep), serves)


def padded_with_mask(rows: Sequence[Tokens], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask [B, longest]."""
    width = max(map(len, rows))
    ids = [[*row, *[pad] * (width - len(row))] for row in rows]
    return torch.tensor(ids), torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
