"""Worker processes that take jobs and return results; one that dies fails its own job only."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

Job = dict[str, Any]  # {"name": ..., and what `do` needs}; the parent pickles it
Result = dict[str, Any]


def _serve(connection: Connection, do: Callable[[Job], Result], log: str, niceness: int) -> None:
    """The loop of a worker: one job at a time, until the pipe closes or the parent dies."""
    import threading

    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the parent alone, which ends us
    os.nice(niceness)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel
        # A killed parent must not leave us writing into runs that its successor starts again.
        threading.Thread(target=lambda: (wait([sentinel]), os._exit(1)), daemon=True).start()
    file = Path(log).open("a", encoding="utf-8")  # noqa: SIM115 - for the life of the process
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        print(f"\n--- {job['name']}", file=sys.stderr, flush=True)
        try:
            connection.send((do(job), None))
        except Exception as error:
            traceback.print_exc()
            connection.send((None, f"{type(error).__name__}: {' '.join(str(error).split())}"))


class Pool:
    """At most `jobs` spawned workers, which are reused. One that dies is replaced, and its job fails."""

    def __init__(self, do: Callable[[Job], Result], jobs: int, out: Path, niceness: int) -> None:
        self.do, self.jobs, self.out, self.niceness = do, jobs, out, niceness
        self.idle: list[tuple[Connection, Any]] = []
        self.busy: dict[Connection, tuple[Any, str]] = {}
        self.started = 0

    @property
    def running(self) -> list[str]:
        return [name for _, name in self.busy.values()]

    @property
    def free(self) -> bool:
        return len(self.busy) < self.jobs

    def start(self, job: dict[str, Any]) -> None:
        connection, process = self.idle.pop() if self.idle else self._spawn()
        connection.send(job)
        self.busy[connection] = (process, job["name"])

    def finished(self, timeout: float) -> Iterator[tuple[str, dict[str, Any] | None, str | None]]:
        """(name, result, error) of the jobs that have ended; waits at most `timeout` seconds for the first."""
        for connection in wait(list(self.busy), timeout):
            assert isinstance(connection, Connection)
            process, name = self.busy.pop(connection)
            try:
                result, error = connection.recv()
                self.idle.append((connection, process))
            except (EOFError, ConnectionResetError):
                process.join()
                result, error = None, f"its process died (exit code {process.exitcode}; out of memory or killed)"
            yield name, result, error

    def _spawn(self) -> tuple[Connection, Any]:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        log = str(self.out / f"worker-{self.started % self.jobs + 1}.log")
        self.started += 1
        process = context.Process(target=_serve, args=(theirs, self.do, log, self.niceness), daemon=True)
        with _environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", TOKENIZERS_PARALLELISM="false"):
            process.start()
        theirs.close()  # or the death of the worker would not end the pipe
        return ours, process

    def close(self) -> None:
        for process in [p for _, p in self.idle] + [p for p, _ in self.busy.values()]:
            process.terminate()
            process.join()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for the processes that are started in this context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
