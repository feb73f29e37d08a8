"""Several processes: a rank that dies, fails or falls silent ends the job on all of them, and is named.

    every rank, every BEAT seconds: store[own rank] = count; read the others'
    one silent for `rank_timeout` seconds, or failed: say which, and exit

Without it torch waits `ddp_timeout` (half an hour) for a rank whose machine is gone, and does not name it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import socket
import sys
import threading
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from pgpo.errors import LostRankError

BEAT = 2.0  # seconds; ours
_RANKS_PER_SECOND = 32  # ours: each rank reads all others, so beats are slower in jobs of more than 64 ranks
# Ours, seconds. After a broken connection, a rank that was silent for this long counts as its cause. When a rank has
# reported a failure, the others have twice as long to end by themselves.
SUSPICION = 10.0
_STORE_TIMEOUT = 10.0  # ours: seconds for one request to the store
_ADVICE_TIMEOUT = 3.0  # ours: seconds; the disk itself may be gone
_MESSAGE = 300  # ours: characters of a failed rank's message that the others show


@contextlib.contextmanager
def watch_ranks(
    limit: float, advice: Callable[[], str] = str, say: Callable[[str], Any] = warnings.warn
) -> Iterator[None]:
    """End this process if another rank of the job dies, fails, or is silent for `limit` seconds.

    Every rank must open it (a collective agrees on that). Silent ranks end this one by `os._exit(1)` from a thread,
    since the main one waits in a collective. An error of a collective that such a rank explains is raised as that.

    Args:
        limit: seconds; 0, or one process: nothing is watched.
        advice: what to tell the user to do; called when a rank is lost.
        say: told on rank 0 if some rank cannot reach the job's store (MASTER_ADDR, MASTER_PORT), so nothing is watched.

    Raises:
        LostRankError: instead of the error of a collective, with the name of the rank that is gone.
    """
    watch = _open(limit, advice, say) if limit else None
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
    """This rank's heartbeat, and what it knows of the others'.

    Silence is counted in this rank's own completed heartbeats, so that neither a slow store nor a pause of this
    process makes another rank look dead.

    Args:
        connect: makes a store: `set(key, text)`, `check([keys])`, `multi_get([keys])`; its calls may block.
        prefix: the same on all ranks, and another one for every watch.
        end: called with the exit status when another rank is lost.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        rank: int,
        world: int,
        limit: float,
        advice: Callable[[], str] = str,
        prefix: str = "",
        end: Callable[[int], Any] = os._exit,
        beat: float = BEAT,
    ) -> None:
        self.connect, self.rank, self.advice, self.end = connect, rank, advice, end
        self.beat = max(beat, world / _RANKS_PER_SECOND)
        self.limit = max(limit, 4 * self.beat)
        self.store: Any = None
        self.keys = {other: f"pgpo/{prefix}/{other}" for other in range(world)}
        self.me = f"{socket.gethostname()}, process {os.getpid()}"
        self.answered = time.monotonic()  # when the store last did
        self.misses = dict.fromkeys(self.keys, 0)  # rank -> our heartbeats since its own last changed
        self.heartbeats: dict[int, str] = {}  # rank -> "count|who", "done|who" or "failed|who|why"
        self._stopped = threading.Event()
        self._last = "done"
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._keep_beating, self._keep_watching)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, failure: str | None) -> None:
        """Report to the others that this rank is done, or has failed, and stop watching them."""
        if failure is not None:
            self._last = "failed"
            self.me += f"|{' '.join(failure.split())[:_MESSAGE]}"
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=_STORE_TIMEOUT / 2)  # do not wait long for a store that is gone
        if failure is not None and self.rank == 0:
            time.sleep(1.5 * self.beat)  # the store may end with this process; let the others read it first

    def explain(self) -> str | None:
        """Which rank made a collective of this one fail; waits up to 1.5 SUSPICION for it to fall silent."""
        until = time.monotonic() + 1.5 * max(SUSPICION, 4 * self.beat)
        limit = min(max(SUSPICION, 4 * self.beat), self.limit)
        while (problem := self.problem(time.monotonic(), limit)) is None and time.monotonic() < until:
            time.sleep(self.beat / 4)
        return problem

    def problem(self, now: float, limit: float, patience: float = 0.0) -> str | None:
        """The rank that failed at least `patience` seconds ago, or was silent for `limit` seconds, if there is one."""
        heartbeats: dict[int, list[str]] = {}  # rank -> [state, who, why]
        for rank in self.keys:
            heartbeats[rank] = f"{self.heartbeats.get(rank, '|never seen')}|".split("|", 2)
        for rank, (state, who, why) in heartbeats.items():
            if state == "failed" and rank != self.rank and self.misses[rank] * self.beat >= patience:
                return f"rank {rank} ({who}) has failed: {why.rstrip('|')}"
        first = self.heartbeats.get(0, "")
        if now - self.answered > limit and not first.startswith("done"):  # rank 0 may take the store with it
            silence = now - self.answered
            if first.startswith("failed"):
                return f"rank 0 ({first.split('|')[1]}) has failed: {first.split('|', 2)[2]}"
            return (
                f"the job's store at {os.environ.get('MASTER_ADDR', '?')}, rank 0's machine, has not answered for "
                f"{silence:.0f} s"
            )
        for rank, (state, who, _) in heartbeats.items():
            if rank != self.rank and state not in ("done", "failed") and self.misses[rank] * self.beat > limit:
                return f"rank {rank} ({who}) has sent no heartbeat for {self.misses[rank] * self.beat:.0f} s"
        return None

    def sentence(self, problem: str) -> str:
        return " ".join(f"{problem}; rank {self.rank} of {len(self.keys)} ends {self._advice()}".split())

    def exchange(self, state: str) -> None:
        """One heartbeat: write ours and read those of the others."""
        if self.store is None:
            self.store = self.connect()
        self.store.set(self.keys[self.rank], f"{state}|{self.me}")
        others = [rank for rank in self.keys if rank != self.rank]
        known = [r for r in others if r in self.heartbeats or self.store.check([self.keys[r]])]
        heartbeats = self.store.multi_get([self.keys[r] for r in known]) if known else []
        self.answered = time.monotonic()
        for rank in others:
            self.misses[rank] += 1
        for rank, heartbeat in zip(known, heartbeats, strict=True):
            text = heartbeat.decode(errors="replace") if isinstance(heartbeat, bytes) else heartbeat
            if text != self.heartbeats.get(rank):
                self.heartbeats[rank], self.misses[rank] = text, 0

    def look(self, now: float) -> bool:
        """Whether another rank is lost; if so this process is told to end, whatever else fails."""
        problem = self.problem(now, self.limit, patience=2 * SUSPICION)
        if problem is None:
            return False
        try:
            print(f"pgpo: {self.sentence(problem)}", file=sys.stderr, flush=True)
        finally:
            self.end(1)
        return True

    def _advice(self) -> str:
        found: list[str] = []
        thread = threading.Thread(target=lambda: found.append(self.advice()), daemon=True)
        thread.start()
        thread.join(_ADVICE_TIMEOUT)
        return found[0] if found else "here."

    def _keep_beating(self) -> None:
        for count in itertools.count():
            try:
                self.exchange(str(count))
            except dist.DistNetworkError:
                self.store = None  # the connection is gone; the store perhaps is not
            except Exception:
                pass  # too slow this time; `answered` keeps the time
            if self._stopped.wait(self.beat):
                break
        with contextlib.suppress(Exception):
            self.store.set(self.keys[self.rank], f"{self._last}|{self.me}")

    def _keep_watching(self) -> None:
        before = time.monotonic()
        while not self._stopped.wait(self.beat / 2):
            now = time.monotonic()
            if now - before > self.limit / 2:  # this process itself was suspended
                self.answered = now
            before = now
            if self.look(now):
                return


def _open(limit: float, advice: Callable[[], str], say: Callable[[str], Any]) -> Watch | None:
    """A watch with a connection of its own: the group's is locked while a collective waits for its store."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    watch, problem, rank = None, "", dist.get_rank()
    try:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        connect = functools.partial(
            dist.TCPStore,
            host,
            port,
            is_master=False,
            wait_for_workers=False,
            timeout=timedelta(seconds=_STORE_TIMEOUT),
        )
        watch = Watch(connect, rank, dist.get_world_size(), limit, advice)
        watch.store = connect()
    except (KeyError, ValueError, RuntimeError) as error:
        problem = f"rank {rank} cannot reach the job's store ({type(error).__name__}: {error})"
    told: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(told, (uuid.uuid4().hex, " ".join(problem.split())[:_MESSAGE]))
    problem = next((p for _, p in told if p), "")
    if problem or watch is None:
        if rank == 0:
            say(f"the processes of this job do not watch each other: {problem}.")
        return None
    watch.keys = {other: f"pgpo/{told[0][0]}/{other}" for other in watch.keys}
    watch.answered = time.monotonic()
    return watch


def _of_a_collective(error: BaseException) -> bool:
    """Whether it may come from another rank's end: gloo raises a plain RuntimeError."""
    if isinstance(error, dist.DistError):
        return True
    words = ("gloo", "nccl", "connection reset", "connection closed", "broken pipe")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
