"""Token entropies and the information signal I_k (PGPO, arXiv 2606.03620, Eq. 8).

    I_k = (1/|B_k|) * sum_i [ H(y_i | x_i, y_<t) - H(y_i | x_i, f_i, y_<t) ]      nats

H is the mean over a sample's completion tokens of the entropy of the next-token distribution. The paper does not say
whether it is a sum or a mean; a sum would reach the cap on any real completion. The average over samples divides by
ALL samples of the batch: a sample without privileged context has no f, so its gap is zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(logits / temperature) at every position.

    Args:
        logits: [..., V], any floating dtype; half precision is accumulated in fp32.
        temperature: divides the logits, as in sampling; > 0.

    Returns:
        [...], nats, in [0, ln V]; fp32 (fp64 for fp64 logits). Differentiable. A logit of -inf counts as
        probability zero.

    Raises:
        ValueError: temperature is not a positive finite number.
    """
    # log_softmax subtracts the maximum first; log Z - E[z] would lose digits to a large common offset of the logits.
    log_probs = torch.log_softmax(scaled_logits(logits, temperature), dim=-1)
    probabilities = log_probs.exp()
    # Avoid 0 * -inf = nan: a token with probability zero contributes zero.
    finite = log_probs.masked_fill(probabilities == 0, 0.0)
    return -(probabilities * finite).sum(-1)


def scaled_logits(logits: Tensor, temperature: float) -> Tensor:
    """logits / temperature in at least fp32. Raises ValueError for a temperature that is not positive and finite."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature!r}; it divides the logits and must be a positive number.")
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return logits if temperature == 1.0 else logits / temperature


@dataclass(frozen=True)
class Information:
    """I_k of one optimizer batch, and the numbers it is computed from.

    Attributes:
        information: I_k in nats.
        student_entropy: mean of H_student over hinted samples, nats (0.0 if there are none).
        teacher_entropy: mean of H_teacher over hinted samples, nats (0.0 if there are none).
        samples: |B_k|, all samples of the optimizer batch.
        hinted_samples: samples with privileged context.
    """

    information: float
    student_entropy: float
    teacher_entropy: float
    samples: int
    hinted_samples: int


def sum_dtype(device: torch.device) -> torch.dtype:
    """Of sums over tokens: fp64, in which the order of micro-batches changes I_k by ~1e-15 at most. MPS has none."""
    return torch.float32 if device.type == "mps" else torch.float64


class InformationMeter:
    """Sums and counts over the micro-batches and ranks of ONE optimizer step; divides once.

    Args:
        denominator: "all" divides by every sample of the batch (Eq. 8, default); "hinted" by the samples that
            have privileged context (ours, for comparison with per-hint averages).

    Splitting a batch into micro-batches, padding it, or reordering it changes nothing beyond rounding.
    """

    def __init__(self, denominator: str = "all") -> None:
        if denominator not in ("all", "hinted"):
            raise ValueError(f"denominator is {denominator!r}; choose 'all' (Eq. 8) or 'hinted'.")
        self.denominator = denominator
        self.reset()

    def reset(self) -> None:
        """Clear all sums and counts; call once per optimizer step."""
        self._sums: Tensor | None = None  # [4]: H_student, H_teacher, samples, hinted samples
        self._unhinted = 0

    def add(self, student_entropy: Tensor, teacher_entropy: Tensor, mask: Tensor, hinted: Tensor | None = None) -> None:
        """Add a micro-batch.

        Args:
            student_entropy: [B, T] nats.
            teacher_entropy: [B, T] nats.
            mask: [B, T], non-zero on completion tokens. Entropies elsewhere are ignored, even nan.
            hinted: [B], non-zero where the teacher read a privileged context; None = everywhere. Unhinted samples
                are counted and contribute zero.

        A hinted sample without completion tokens is counted and contributes zero.

        Raises:
            ValueError: shapes disagree.
        """
        if not (student_entropy.shape == teacher_entropy.shape == mask.shape) or mask.dim() != 2:
            raise ValueError(
                "student_entropy, teacher_entropy and mask must share one shape [B, T]; got "
                f"{tuple(student_entropy.shape)}, {tuple(teacher_entropy.shape)}, {tuple(mask.shape)}."
            )
        rows = mask.shape[0]
        if hinted is None:
            hinted = torch.ones(rows, dtype=torch.bool, device=mask.device)
        if hinted.shape != (rows,):
            raise ValueError(f"hinted must have shape [{rows}] like mask's rows; got {tuple(hinted.shape)}.")
        hinted = hinted.bool()
        active = mask.bool() & hinted.unsqueeze(1)
        dtype = sum_dtype(mask.device)
        tokens = active.sum(1).clamp_min(1).to(dtype)

        def total(entropy: Tensor) -> Tensor:
            return (torch.where(active, entropy.detach().to(dtype), 0.0).sum(1) / tokens).sum()

        counts = torch.stack([torch.full_like(hinted.sum(), rows), hinted.sum()]).to(dtype)
        sums = torch.cat([torch.stack([total(student_entropy), total(teacher_entropy)]), counts])
        self._sums = sums if self._sums is None else self._sums + sums

    def add_unhinted(self, n: int) -> None:
        """Count n samples without privileged context; they need no forward. Raises ValueError if n < 0."""
        if n < 0:
            raise ValueError(f"n is {n}; a number of samples cannot be negative.")
        self._unhinted += n

    def summary(self, reduce: Callable[[Tensor], Tensor] | None = None) -> Information:
        """Divide the sums of the whole batch.

        Args:
            reduce: sums a [4] tensor over ranks (e.g. an all-reduce). Every rank must call it.

        Raises:
            ValueError: no sample was added, or the information is not finite (checked before any update, so that
                the caller's parameters and optimizer state stay unchanged).
        """
        sums = torch.zeros(4, dtype=torch.float64) if self._sums is None else self._sums.clone()
        sums[2] += self._unhinted
        if reduce is not None:
            sums = reduce(sums)
        student, teacher, samples, hinted = sums.tolist()
        if samples == 0:
            raise ValueError("the information meter is empty: add the step's samples before asking for I_k.")
        if not (math.isfinite(student) and math.isfinite(teacher)):
            raise ValueError(
                f"the information signal is not finite (sum of student entropies {student}, of teacher entropies "
                f"{teacher} nats); look for inf or nan in the logits of this batch."
            )
        divisor = samples if self.denominator == "all" else max(hinted, 1.0)
        return Information(
            information=(student - teacher) / divisor,
            student_entropy=student / max(hinted, 1.0),
            teacher_entropy=teacher / max(hinted, 1.0),
            samples=round(samples),
            hinted_samples=round(hinted),
        )

    def compute(self, reduce: Callable[[Tensor], Tensor] | None = None) -> float:
        """I_k in nats; see `summary`."""
        return self.summary(reduce).information
