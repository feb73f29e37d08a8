"""Entropies of a step -> I_k -> rho_k, by PGPOConfig, with the state of earlier steps."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pgpo.core import CrossFit, EarlierInformation, Information, InformationMeter
from pgpo.errors import UserError
from pgpo.settings.config import PGPOConfig
from pgpo.train.rows import Sums

BASELINE_WEIGHT = 0.1  # ours: the running mean remembers about ten steps


class StepSignal:
    """The meters of a step, and the multiplier that they give.

    Attributes:
        meters: one per half-batch: two with information_source="cross_fit".
        steps: steps with a signal so far.
        negative_steps: those with I_k < 0.
    """

    def __init__(self, config: PGPOConfig) -> None:
        self.config = config
        halves = 2 if config.information_source == "cross_fit" and config.objective == "pgpo" else 1
        self.meters = [InformationMeter(config.information_denominator) for _ in range(halves)]
        self.multiplier = StepMultiplier(config)
        self.steps = self.negative_steps = 0
        self._before = self._state()

    def read(
        self, reduce: Callable[[Tensor], Tensor], step: int, total_steps: int, halves: CrossFit | None
    ) -> tuple[Information, float]:
        """I_k of the whole batch and rho_k of a 0-based step; the halves' gradients are balanced.

        Args:
            reduce: sums a tensor over ranks.

        Raises:
            ValueError: the information is not finite.
        """
        self._before = self._state()
        try:
            parts = [meter.summary(reduce) for meter in self.meters]
        except ValueError:
            if halves is not None:
                halves.discard()
            raise
        information = pooled(parts, self.config.information_denominator)
        self.steps += 1
        self.negative_steps += information.information < 0
        gaps = [part.information for part in parts] if halves is not None else []
        rhos = self.multiplier(step, total_steps, information.information, gaps)
        return information, rhos[0] if halves is None else halves.combine(*rhos)

    def forget(self) -> None:
        """Undo the latest `read`, whose step is skipped."""
        self.negative_steps, self.steps, multiplier = self._before
        self.multiplier.load_state_dict(multiplier)

    def metrics(
        self,
        information: Information,
        rho: float,
        alpha: float,
        sums: Sums,
        tokens: float,
        rate: float,
        losses: Mapping[str, float],
    ) -> dict[str, float]:
        """The numbers of the step that was read last, under the names of its log.

        Args:
            alpha: of Eq. 9 at this step.
            tokens: active ones, of all ranks; without any there is nothing to measure.
            rate: learning rate times everything that scales it.
            losses: parts of the loss, to be logged beside the rest.
        """
        values = {
            "information": information.information,
            "rho": rho,
            "alpha": alpha if self.config.objective == "pgpo" else 0.0,
            "active_share": information.hinted_samples / information.samples,
            "active_tokens": tokens,
            "effective_lr": rate,
            "negative_information_share": self.negative_steps / self.steps,
            **losses,
        }
        if tokens:
            values["student_entropy"] = information.student_entropy
            values["teacher_entropy"] = information.teacher_entropy
            values["divergence"] = sums.divergence / tokens
            values["sampled_kl"] = sums.gap / tokens
        if sums.wrong_tokens:
            values["sampled_kl_wrong"] = sums.wrong_gap / sums.wrong_tokens
        return values

    def _state(self) -> tuple[int, int, dict[str, Any]]:
        return self.negative_steps, self.steps, self.multiplier.state_dict()

    def state_dict(self) -> dict[str, Any]:
        negative, steps, multiplier = self._state()
        return {"negative_steps": negative, "signal_steps": steps, "multiplier": multiplier}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore `state_dict()`. Raises KeyError or ValueError if it was written by a run with another signal."""
        self.negative_steps, self.steps = state["negative_steps"], state["signal_steps"]
        self.multiplier.load_state_dict(state["multiplier"])


class StepMultiplier:
    """rho of one step; remembers earlier information where `information_source` or `information_baseline` need it.

    Raises:
        UserError: `rho_file` cannot be used.
    """

    def __init__(self, config: PGPOConfig) -> None:
        self.config = config
        lagged, centred = config.information_source == "lagged", config.information_baseline == "running_mean"
        self.lag = EarlierInformation(config.information_weight) if lagged else None
        self.baseline = EarlierInformation(BASELINE_WEIGHT) if centred else None
        self.replayed = None if config.rho_file is None else read_multipliers(Path(config.rho_file), config.max_steps)

    def __call__(self, step: int, total_steps: int, information: float, halves: Sequence[float] = ()) -> list[float]:
        """Multipliers of a 0-based step.

        Args:
            information: I of the whole batch, nats.
            halves: I of each half-batch, with `information_source="cross_fit"`.

        Returns:
            One multiplier, or one per half: the law at that half's own I.
        """
        signals = list(halves) or [information]
        if self.config.objective != "pgpo":
            return [1.0] * len(signals)
        if self.replayed is not None:
            return [self.replayed[step]]
        if self.baseline is not None:
            earlier = self.baseline.exchange(information)
            signals = [0.0 if earlier is None else signal - earlier for signal in signals]
        if self.lag is not None:
            earlier = self.lag.exchange(signals[0])
            if earlier is None:
                return [1.0]
            signals = [earlier]
        law = self.config.law(step, total_steps)
        return [law(signal) for signal in signals]

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore `state_dict()`. Raises ValueError if it was written by a run with another signal."""
        if state.keys() != self._parts().keys():
            raise ValueError(f"the saved signal has the parts {sorted(state)}, this run {sorted(self._parts())}")
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def _parts(self) -> dict[str, EarlierInformation]:
        parts = {"lag": self.lag, "baseline": self.baseline}
        return {name: part for name, part in parts.items() if part is not None}


def pooled(parts: Sequence[Information], denominator: str = "all") -> Information:
    """The information of the whole batch from that of its half-batches."""
    if len(parts) == 1:
        return parts[0]
    samples, hinted = sum(p.samples for p in parts), sum(p.hinted_samples for p in parts)

    def mean(values: Sequence[float], weights: Sequence[int]) -> float:
        return math.fsum(v * w for v, w in zip(values, weights)) / max(sum(weights), 1)

    weights = [p.samples if denominator == "all" else p.hinted_samples for p in parts]
    return Information(
        information=mean([p.information for p in parts], weights),
        student_entropy=mean([p.student_entropy for p in parts], [p.hinted_samples for p in parts]),
        teacher_entropy=mean([p.teacher_entropy for p in parts], [p.hinted_samples for p in parts]),
        samples=samples,
        hinted_samples=hinted,
    )


def read_multipliers(path: Path, steps: int) -> list[float]:
    """The multipliers of `rho_file`; at least `steps` of them. Raises UserError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"rho_file {path} cannot be read ({error}); give a JSON list of numbers.") from error
    good = isinstance(values, list) and all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values
    )
    if not good:
        raise UserError(f"rho_file {path} is not a JSON list of finite numbers >= 0; correct it.")
    if not 0 < steps <= len(values):
        raise UserError(
            f"rho_file {path} has {len(values)} multipliers for max_steps = {steps}; give one per step, and max_steps."
        )
    return [float(v) for v in values]
