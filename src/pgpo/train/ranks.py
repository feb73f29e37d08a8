"""Several processes: one that dies, fails or falls silent ends the job on all of them, by name.

    every rank, every BEAT seconds: store[own rank] = count; read the others'
    one silent for `rank_timeout` seconds, or failed: say which, and exit

Without it torch waits `ddp_timeout` (half an hour) for a rank whose machine is gone, and names nobody.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pgpo.errors import LostRankError

BEAT = 2.0  # seconds; ours
# Ours, seconds. Once a connection has broken, a rank that was silent for so long is the reason; and when a rank has
# said that it failed, the others have twice as long to end by themselves.
SUSPICION = 10.0
_STORE_TIMEOUT = 10.0  # ours: seconds that one question to the store may take
_MESSAGE = 300  # ours: characters of a failed rank's message that the others show
_numbers = itertools.count()  # every rank opens its watches in the same order


@contextlib.contextmanager
def watch_ranks(limit: float | None, advice: Callable[[], str] = str) -> Iterator[None]:
    """End this process if another rank of the job dies, fails, or is silent for `limit` seconds.

    Silent ranks end it by `os._exit(1)` from a thread, since the main one waits in a collective. An error of a
    collective that such a rank explains is raised as that.

    Args:
        limit: seconds; None, one process, or a job without a TCP store (MASTER_ADDR, MASTER_PORT): nothing is watched.
        advice: what to tell the user to do; called when a rank is lost.

    Raises:
        LostRankError: instead of the error of a collective, with the name of the rank that is gone.
    """
    watch = None if limit is None else _open(limit, advice)
    if watch is None:
        yield
        return
    watch.start()
    try:
        yield
    except Exception as error:
        lost = watch.explain() if _of_a_collective(error) else None
        watch.stop(f"{type(error).__name__}: {error}" if lost is None else lost)
        if lost is not None:
            raise LostRankError(watch.sentence(lost)) from error
        raise
    except BaseException as error:
        watch.stop(f"stopped by {type(error).__name__}")
        raise
    else:
        watch.stop(None)


class Watch:
    """This rank's sign of life, and what it knows of the others.

    Args:
        store: `set(key, text)`, `check([keys])`, `multi_get([keys])`; its calls may block.
        end: called with the exit status when another rank is lost.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world: int,
        limit: float,
        advice: Callable[[], str] = str,
        prefix: str = "",
        end: Callable[[int], Any] = os._exit,
        beat: float = BEAT,
    ) -> None:
        self.store, self.rank, self.limit, self.advice, self.end, self.beat = store, rank, limit, advice, end, beat
        self.keys = {other: f"pgpo/{prefix}/{other}" for other in range(world)}
        self.me = f"{socket.gethostname()}, process {os.getpid()}"
        now = time.monotonic()
        self.answered = now  # when the store last did
        self.heard = dict.fromkeys(self.keys, now)  # rank -> when its sign last changed
        self.signs: dict[int, str] = {}  # rank -> "count|who", "done|who" or "failed|who|why"
        self._stopped = threading.Event()
        self._last = "done"
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._keep_beating, self._keep_watching)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, failure: str | None) -> None:
        """Tell the others that this rank is done, or has failed, and stop watching them."""
        if failure is not None:
            self._last = "failed"
            self.me += f"|{' '.join(failure.split())[:_MESSAGE]}"
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=_STORE_TIMEOUT / 2)  # a store that is gone does not hold up the end

    def explain(self) -> str | None:
        """Which rank made a collective of this one fail; waits up to 1.5 SUSPICION for it to fall silent."""
        until = time.monotonic() + 1.5 * SUSPICION
        while (problem := self.problem(min(SUSPICION, self.limit))) is None and time.monotonic() < until:
            time.sleep(self.beat / 4)
        return problem

    def problem(self, limit: float, patience: float = 0.0) -> str | None:
        """The rank that failed at least `patience` seconds ago, or was silent for `limit` seconds, if there is one."""
        now = time.monotonic()
        for rank, sign in sorted(self.signs.items()):
            state, who, *why = sign.split("|", 2)
            if state == "failed" and rank != self.rank and now - self.heard[rank] >= patience:
                return f"rank {rank} ({who}) has failed: {why[0]}"
        if now - self.answered > limit:
            return (
                f"the store of the job at {os.environ.get('MASTER_ADDR', '?')}, where rank 0 is, has not answered for "
                f"{now - self.answered:.0f} s"
            )
        for rank, heard in self.heard.items():
            state, who = (self.signs.get(rank, "") + "|").split("|")[:2]
            if rank != self.rank and state != "done" and self.answered - heard > limit:
                return f"rank {rank} ({who or 'never seen'}) has not been heard of for {self.answered - heard:.0f} s"
        return None

    def sentence(self, problem: str) -> str:
        return " ".join(f"{problem}; rank {self.rank} of {len(self.keys)} ends {self.advice()}".split())

    def exchange(self, state: str) -> None:
        """One beat: write our sign and read those of the others."""
        self.store.set(self.keys[self.rank], f"{state}|{self.me}")
        known = [r for r, key in self.keys.items() if r != self.rank and (r in self.signs or self.store.check([key]))]
        signs = self.store.multi_get([self.keys[r] for r in known]) if known else []
        self.answered = time.monotonic()
        for rank, sign in zip(known, signs, strict=True):
            text = sign.decode(errors="replace") if isinstance(sign, bytes) else sign
            if text != self.signs.get(rank):
                self.signs[rank], self.heard[rank] = text, self.answered

    def _keep_beating(self) -> None:
        for count in itertools.count():
            try:
                self.exchange(str(count))
            except dist.DistNetworkError:
                return  # the connection is gone for good; the other thread sees it from `answered`
            except Exception:
                pass  # too slow this time
            if self._stopped.wait(self.beat):
                break
        with contextlib.suppress(Exception):
            self.store.set(self.keys[self.rank], f"{self._last}|{self.me}")

    def _keep_watching(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.beat / 2):
            now = time.monotonic()
            if now - before > self.limit / 2:  # it was this process that stood still, perhaps with all the others
                self.answered = now
                self.heard = dict.fromkeys(self.keys, now)
            before = now
            problem = self.problem(self.limit, patience=2 * SUSPICION)
            if problem is not None:
                print(f"pgpo: {self.sentence(problem)}", file=sys.stderr, flush=True)
                self.end(1)
                return


def _open(limit: float, advice: Callable[[], str]) -> Watch | None:
    """A watch with a connection of its own: the group's is locked while a collective waits for its store."""
    number = next(_numbers)
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(
            host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=_STORE_TIMEOUT)
        )
    except (KeyError, ValueError, RuntimeError):
        return None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # the store outlives a failed attempt
    return Watch(store, dist.get_rank(), dist.get_world_size(), limit, advice, f"{attempt}/{number}")


def _of_a_collective(error: BaseException) -> bool:
    """Whether it may come from another rank's end: gloo raises a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "Connection reset", "Connection closed", "Broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
