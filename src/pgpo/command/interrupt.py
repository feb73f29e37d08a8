"""Ctrl-C and SIGTERM: they end training after the current step, and everything else at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pgpo.command.terminal import say

INTERRUPTED = 130  # the shell's status for Ctrl-C
TERMINATED = 143  # and for SIGTERM


class Terminated(KeyboardInterrupt):
    """SIGTERM outside a training step."""

    status = TERMINATED


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Make SIGTERM end the command as Ctrl-C does, so that unfinished files are removed."""
    if not _in_main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class Interruption:
    """Ctrl-C, and SIGTERM inside `stopped_by_sigterm`, during training.

    The first one ends training after the current step, the second one at once.

    Attributes:
        asked: training ends after the current step.
        status: exit status of the command, by the signal.
    """

    def __init__(self) -> None:
        self.asked = False
        self.status = INTERRUPTED

    @contextmanager
    def handled(self) -> Iterator[None]:
        if not _in_main_thread():
            yield
            return
        numbers = [signal.SIGINT, *([signal.SIGTERM] if signal.getsignal(signal.SIGTERM) is _terminate else [])]
        before = [signal.signal(number, self._note) for number in numbers]
        try:
            yield
        finally:
            for number, handler in zip(numbers, before):
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        terminated = number == signal.SIGTERM
        if self.asked:
            raise Terminated if terminated else KeyboardInterrupt
        self.asked, self.status = True, TERMINATED if terminated else INTERRUPTED
        say("stopping after this step and saving; press Ctrl-C again to stop at once.")


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
