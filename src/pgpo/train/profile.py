"""Where time and memory of training go, part by part (`profile=True`, `pgpo train --profile`).

Code that makes a part runs inside `with part(name)`. A part inside another one counts for itself, not for both;
evaluation alone counts as a whole. While no profile is on, `part` is an empty context: no clock, no synchronization.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from pgpo import runlog

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_OFF = contextlib.nullcontext()
_on: Profile | None = None


def part(name: str) -> contextlib.AbstractContextManager[None]:
    """Context of a part: one of runlog.PROFILE_PARTS."""
    return _OFF if _on is None else _on.part(name)


@contextlib.contextmanager
def confined() -> Iterator[None]:
    """A profile that is turned on inside ends here, also where training fails."""
    global _on
    try:
        yield
    finally:
        _on = None


def _zeros() -> dict[str, float]:
    return defaultdict(float)


class Profile:
    """Seconds and peak memory of each part on this rank, since `take` and since the beginning.

    Memory is what the process (Linux) or torch on its CUDA device held at most during the part, in bytes.

    Args:
        clock: seconds; time.process_time where other processes share the CPU.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.seconds, self.total_seconds = _zeros(), _zeros()
        self.peaks, self.total_peaks = _zeros(), _zeros()
        self._stack: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        if "evaluation" in self._stack:
            yield
            return
        self._turn()
        self._stack.append(name)
        try:
            yield
        finally:
            self._turn()
            self._stack.pop()

    def take(self) -> tuple[dict[str, float], dict[str, float]]:
        """(seconds, peaks) since the last call."""
        found = self.seconds, self.peaks
        self.seconds, self.peaks = _zeros(), _zeros()
        return found

    def _turn(self) -> None:
        """Book what has passed to the innermost part."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = self.clock()
        if self._stack:
            name, peak = self._stack[-1], self._peak()
            for seconds in (self.seconds, self.total_seconds):
                seconds[name] += now - self._since
            for peaks in (self.peaks, self.total_peaks):
                peaks[name] = max(peaks[name], peak)
        self._forget_peak()
        self._since = self.clock()

    def _peak(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        except (OSError, StopIteration):
            return 0  # not Linux: no memory is told
        return int(line.split()[1]) * 1024

    def _forget_peak(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                _CLEAR.write_text("5")


class Profiling(TrainerCallback):
    """Turns a profile on while a trainer trains, logs it with every step, and says it as a table at the end.

    Args:
        trainer: a PGPOTrainer; it records scalars and has a host.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.profile = Profile(trainer.accelerator.device)
        self.steps, self.step_seconds = 0, 0.0
        self._step: float | None = None
        self._optimizer = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        global _on
        _on = self.profile = Profile(self.trainer.accelerator.device)
        self.steps, self.step_seconds = 0, 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step = time.perf_counter()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.enter_context(self.profile.part("optimizer"))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._optimizer.close()
        self.steps += 1
        self.step_seconds += time.perf_counter() - (self._step or 0.0)
        seconds, peaks = self.profile.take()
        for name, value in seconds.items():
            self.trainer.record(f"{runlog.PROFILE}{name}{runlog.PROFILE_SECONDS}", value)
            if peaks[name]:
                self.trainer.record(f"{runlog.PROFILE}{name}{runlog.PROFILE_PEAK}", peaks[name] / 2**30)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        global _on
        _on = None
        if self.steps:
            self.trainer.say(self.table())

    def table(self) -> str:
        """Seconds per step, share of all seconds, and peak memory of each part."""
        p = self.profile
        rest = self.step_seconds - sum(s for name, s in p.total_seconds.items() if name != "evaluation")
        rows = [(name, p.total_seconds[name], p.total_peaks[name]) for name in runlog.PROFILE_PARTS]
        rows = [row for row in rows if row[1]] + [("other", max(rest, 0.0), 0.0)]
        whole = sum(seconds for _, seconds, _ in rows)
        lines = [
            f"profile of {self.steps} steps (this process)",
            f"{'part':<12}{'s/step':>10}{'share':>8}{'peak GiB':>10}",
        ]
        for name, seconds, peak in rows:
            memory = f"{peak / 2**30:>10.3f}" if peak else f"{'':>10}"
            lines.append(f"{name:<12}{seconds / self.steps:>10.4f}{seconds / whole:>8.1%}{memory}")
        return "\n".join(lines)
