"""What a rank concludes from the heartbeats of the others, with a store in memory and a clock that the test turns."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from processes import patient

from pgpo.errors import LostRankError, UserError
from pgpo.train import ranks
from pgpo.train.ranks import Watch, watch_ranks


class Store(dict):
    gone = False

    def set(self, key, value):
        if self.gone:
            raise RuntimeError("too slow")
        self[key] = value.encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def multi_get(self, keys):
        return [self[key] for key in keys]


@pytest.fixture
def clock(monkeypatch):
    class Clock:
        now = 1000.0

        def forward(self, seconds):
            self.now += seconds

    clock = Clock()
    monkeypatch.setattr(ranks.time, "monotonic", lambda: clock.now)
    monkeypatch.setattr(ranks.time, "sleep", clock.forward)
    return clock


def watches(world=3, limit=45.0, **options):
    store = Store()
    return store, [Watch(lambda: store, r, world, limit, lambda: "after step 7.", **options) for r in range(world)]


def beat(*which, count):
    for watch in which:
        watch.exchange(str(count))


def problem(watch, limit=45.0, **options):
    return watch.problem(ranks.time.monotonic(), limit, **options)


def test_ranks_that_beat_are_well_however_slow_their_beats(clock):
    _, all_ranks = watches()
    for count in range(100):
        beat(*all_ranks, count=count)
        clock.forward(44.0)
        assert [problem(w) for w in all_ranks] == [None] * 3


def test_the_silent_rank_is_named_by_all_others(clock):
    _, (a, b, c) = watches()
    for count in range(3):
        beat(a, b, c, count=count)
        clock.forward(2)
    for count in range(3, 30):
        beat(a, c, count=count)
        clock.forward(2)
    assert b.heartbeats[0].startswith("2|")
    for other in (a, c):
        found = problem(other)
        assert found.startswith(f"rank 1 ({b.me}) has sent no heartbeat for 5")
        assert other.sentence(found) == f"{found}; rank {other.rank} of 3 ends after step 7."
        assert problem(other, 1000.0) is None


def test_a_rank_that_never_came_is_named_too(clock):
    _, (a, _, c) = watches()
    for count in range(30):
        beat(a, c, count=count)
        clock.forward(2)
    assert problem(a) == "rank 1 (never seen) has sent no heartbeat for 60 s"


def test_a_rank_that_is_done_may_be_silent_and_take_the_store_with_it(clock):
    store, (a, b, c) = watches()
    beat(a, b, c, count=0)
    a.exchange("done")
    for count in range(1, 30):
        clock.forward(2)
        beat(b, c, count=count)
    assert problem(b) is None
    store.gone = True
    clock.forward(1000)
    assert problem(b) is None


def test_a_store_that_does_not_answer_accuses_nobody_else(clock):
    store, (a, b, c) = watches()
    beat(a, b, c, count=0)
    beat(a, b, c, count=1)
    store.gone = True
    for count in range(2, 30):
        clock.forward(2)
        with pytest.raises(RuntimeError):
            a.exchange(str(count))
    assert "rank 0's machine, has not answered for 56 s" in problem(a)
    assert problem(a, 57.0) is None
    store.gone = False  # it was slow, and so it was for the others
    a.exchange("30")
    assert problem(a) is None


def test_why_rank_0_failed_is_told_though_its_store_went_with_it(clock):
    store, (a, b, _) = watches()
    beat(a, b, count=0)
    a.me += "|ValueError: 3 is not 4"
    a.exchange("failed")
    b.exchange("1")
    store.gone = True
    clock.forward(46)
    assert problem(b, patience=20.0).endswith("has failed: ValueError: 3 is not 4")


def test_a_failure_is_told_after_the_others_had_time_to_end(clock):
    _, (a, b, _) = watches()
    beat(a, b, count=0)
    b.me += "|ValueError: 3 is | not 4"
    b.exchange("failed")
    a.exchange("1")
    assert problem(a, patience=20.0) is None
    assert problem(a) == f"rank 1 ({b.me.split('|')[0]}) has failed: ValueError: 3 is | not 4"
    for count in range(2, 12):
        a.exchange(str(count))
    assert problem(a, patience=20.0) is not None
    assert problem(b) is None  # of itself it knows


@pytest.mark.parametrize("advice", ["raises", "blocks"])
def test_the_process_ends_whatever_becomes_of_the_advice(advice, capsys, monkeypatch):
    """After a cut cable the disk may be gone too."""
    monkeypatch.setattr(ranks, "_ADVICE_TIMEOUT", 0.1)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    released, statuses = threading.Event(), []

    def ask():
        if advice == "raises":
            raise OSError("stale file handle")
        released.wait(patient(10))

    store = Store()
    a = Watch(lambda: store, 0, 2, 45.0, ask, end=statuses.append)
    for count in range(30):
        a.exchange(str(count))
    assert a.look(time.monotonic()) and statuses == [1]
    assert capsys.readouterr().err.endswith(
        "rank 1 (never seen) has sent no heartbeat for 60 s; rank 0 of 2 ends here.\n"
    )
    released.set()


def test_a_pause_of_this_process_accuses_nobody(clock):
    """Suspended together: who wakes first finds all heartbeats old."""
    ended = []
    _, (a, b) = watches(2, end=ended.append)
    beat(a, b, count=0)
    waits = iter([False, False, True])
    a._stopped.wait = lambda seconds: clock.forward(100.0) or next(waits)
    a._keep_watching()
    assert ended == []


def test_beats_are_slower_in_large_jobs():
    assert Watch(Store, 0, 64, 45.0).beat == 2.0
    large = Watch(Store, 0, 512, 45.0)
    assert large.beat == 16.0 and large.limit == 64.0


# With a real store, which a thread serves ----------------------------------------------------------------------------


class Cable(threading.Thread):
    """Hands bytes on between the watches and the store, until it is cut once."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self.port, self.pairs, self.cuts = port, [], 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.start()

    def run(self):
        while True:
            near, _ = self.listener.accept()
            far = socket.create_connection(("127.0.0.1", self.port))
            self.pairs.append((near, far))
            for a, b in ((near, far), (far, near)):
                threading.Thread(target=self.hand_on, args=(a, b), daemon=True).start()

    @staticmethod
    def hand_on(a, b):
        try:
            while data := a.recv(65536):
                b.sendall(data)
        except OSError:
            pass
        for end in (a, b):
            end.close()

    def cut(self):
        for pair in self.pairs:
            for end in pair:
                with contextlib.suppress(OSError):  # its other end was quicker
                    end.shutdown(socket.SHUT_RDWR)
        self.cuts += 1
        self.pairs = []


@pytest.fixture
def served():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect(port=server.port):
        timeout = timedelta(seconds=patient(5))
        return dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False, timeout=timeout)

    return server, connect


def until(condition, quiet=10):
    start = time.monotonic()
    while not condition() and time.monotonic() - start < patient(quiet):
        time.sleep(0.01)
    return condition()


def test_the_process_is_ended_once_another_rank_is_silent(served, capsys):
    _, connect = served
    ended, others = [], []
    a = Watch(connect, 0, 2, 1.0, lambda: "after step 7.", end=ended.append, beat=0.05)
    b = Watch(connect, 1, 2, 1.0, end=others.append, beat=0.05)
    a.start(), b.start()
    assert until(
        lambda: a.heartbeats and b.heartbeats and int(a.heartbeats[1].split("|")[0]) > 30
    )  # longer than the limit
    assert ended == others == []
    b.exchange = lambda state: None  # it stops beating, and
    b._last = "still here"
    b.stop(None)  # does not say that it is done
    assert until(lambda: ended) and ended == [1]
    assert capsys.readouterr().err.startswith(f"pgpo: rank 1 ({b.me}) has sent no heartbeat for ")
    a.stop(None)


def test_the_end_is_told(served, capsys):
    server, connect = served
    ended = []
    a, b = (Watch(connect, rank, 2, 1.0, end=ended.append, beat=0.05) for rank in range(2))
    a.start(), b.start()
    assert until(lambda: b.heartbeats)
    a.stop(None)
    assert server.get(a.keys[0]).decode() == f"done|{a.me}"
    assert until(lambda: b.misses[0] > 40)  # twice the limit: b knows that a is done
    b.stop("ValueError: a\n  b")
    told = server.get(b.keys[1]).decode()
    assert told.startswith("failed|") and told.endswith("|ValueError: a b")
    assert not any(t.is_alive() for t in (*a._threads, *b._threads))
    assert ended == [] and capsys.readouterr().err == ""


def test_a_connection_that_breaks_once_is_made_anew(served):
    server, connect = served
    cable, ended = Cable(server.port), []
    port = cable.listener.getsockname()[1]
    a = Watch(lambda: connect(port), 0, 2, 5.0, end=ended.append, beat=0.05)
    b = Watch(connect, 1, 2, 5.0, end=ended.append, beat=0.05)
    a.start(), b.start()
    assert until(lambda: a.heartbeats and b.heartbeats)
    cable.cut()
    assert until(lambda: cable.pairs)
    before = b.heartbeats[0]
    assert until(lambda: b.heartbeats[0] != before)
    assert ended == [] and cable.cuts == 1
    a.stop(None), b.stop(None)


# Around a block of code -----------------------------------------------------------------------------------------------


def opened(monkeypatch, watch):
    monkeypatch.setattr(ranks, "_open", lambda limit, advice, say: watch)


def test_the_error_of_a_collective_is_explained(monkeypatch, clock):
    _, (a, b) = watches(2)
    a.start = lambda: None
    a.stop = lambda failure: None
    opened(monkeypatch, a)
    monkeypatch.setattr(ranks.time, "sleep", lambda s: (clock.forward(2), a.exchange(str(clock.now))))
    beat(a, b, count=0)
    beat(a, b, count=1)
    says = r"^rank 1 \(.*\) has sent no heartbeat for 12 s; rank 0 of 2 ends after step 7.$"
    with pytest.raises(LostRankError, match=says), watch_ranks(45.0):
        raise RuntimeError("[c10d] Gloo connectFullMesh failed with Connection closed by peer")
    assert clock.now < 1016


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), UserError("lower --alpha."), KeyboardInterrupt()])
def test_other_errors_pass_and_are_told_the_others(monkeypatch, error):
    store = Store()
    a = Watch(lambda: store, 1, 2, 45.0)
    opened(monkeypatch, a)
    with pytest.raises(type(error)) as caught, watch_ranks(45.0):
        raise error
    assert caught.value is error
    assert store[a.keys[1]].startswith(b"failed|") and type(error).__name__.encode() in store[a.keys[1]]


def test_one_process_is_not_watched():
    before = threading.active_count()
    with watch_ranks(45.0), watch_ranks(0):
        assert threading.active_count() == before
