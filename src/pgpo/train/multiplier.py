"""From the information of a step, and of the steps before it, to the multiplier rho_k: what PGPOConfig asks for."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pgpo.core import EarlierInformation
from pgpo.errors import UserError
from pgpo.train.config import PGPOConfig

BASELINE_WEIGHT = 0.1  # ours: the running mean remembers about ten steps


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
        raise UserError(f"rho_file {path} holds something else than a JSON list of finite numbers >= 0; mend it.")
    if not 0 < steps <= len(values):
        raise UserError(
            f"rho_file {path} has {len(values)} multipliers for max_steps = {steps}; give one per step, and max_steps."
        )
    return [float(v) for v in values]
