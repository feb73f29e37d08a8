"""What a rank concludes from the signs of the others, with a store in memory and a clock that the test turns."""

from __future__ import annotations

import threading
import time

import pytest

from pgpo.errors import LostRankError, UserError
from pgpo.train import ranks
from pgpo.train.ranks import Watch, watch_ranks


class Store(dict):
    gone = False

    def set(self, key, value):
        if self.gone:
            raise RuntimeError("connection lost")
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
    return clock


def watches(world=3, limit=45.0):
    store = Store()
    return store, [Watch(store, rank, world, limit, lambda: "after step 7.") for rank in range(world)]


def beat(*which, count):
    for watch in which:
        watch.exchange(str(count))


def test_ranks_that_beat_are_well(clock):
    _, all_ranks = watches()
    for count in range(100):
        beat(*all_ranks, count=count)
        clock.forward(44.0)
        assert [w.problem(45.0) for w in all_ranks] == [None] * 3


def test_the_silent_rank_is_named_by_all_others(clock):
    _, (a, b, c) = watches()
    for count in range(3):
        beat(a, b, c, count=count)
        clock.forward(2)
    for count in range(3, 30):
        beat(a, c, count=count)
        clock.forward(2)
    assert b.signs[0].startswith("2|")
    for other in (a, c):
        problem = other.problem(45.0)
        assert problem.startswith(f"rank 1 ({b.me}) has not been heard of for ")
        assert other.sentence(problem) == f"{problem}; rank {other.rank} of 3 ends after step 7."
        assert other.problem(1000.0) is None


def test_a_rank_that_never_came_is_named_too(clock):
    _, (a, _, c) = watches()
    for count in range(30):
        beat(a, c, count=count)
        clock.forward(2)
    assert a.problem(45.0) == "rank 1 (never seen) has not been heard of for 58 s"


def test_a_rank_that_is_done_may_be_silent(clock):
    _, (a, b, c) = watches()
    beat(a, b, c, count=0)
    b.exchange("done")
    for count in range(1, 30):
        clock.forward(2)
        beat(a, c, count=count)
    assert a.problem(45.0) is None


def test_a_store_that_does_not_answer_accuses_nobody_else(clock):
    store, (a, b, c) = watches()
    beat(a, b, c, count=0)
    beat(a, b, c, count=1)
    store.gone = True
    for count in range(2, 30):
        clock.forward(2)
        with pytest.raises(RuntimeError):
            a.exchange(str(count))
    assert "where rank 0 is, has not answered for 56 s" in a.problem(45.0)
    assert a.problem(57.0) is None


def test_a_failure_is_told_after_the_others_had_time_to_end(clock):
    _, (a, b, _) = watches()
    beat(a, b, count=0)
    b.me += "|ValueError: 3 is | not 4"
    b.exchange("failed")
    a.exchange("1")
    assert a.problem(45.0, patience=20.0) is None
    assert a.problem(45.0) == f"rank 1 ({b.me.split('|')[0]}) has failed: ValueError: 3 is | not 4"
    clock.forward(20.0)
    assert a.problem(45.0, patience=20.0) is not None
    assert b.problem(45.0) is None  # of itself it knows


def threads_of(watch):
    return [t for t in watch._threads if t.is_alive()]


def test_the_process_is_ended_once_another_rank_is_silent(capsys):
    store, ended = Store(), threading.Event()
    statuses = []

    def end(status):
        statuses.append(status)
        ended.set()

    a = Watch(store, 0, 2, 1.5, lambda: "after step 7.", end=end, beat=0.02)
    b = Watch(store, 1, 2, 1.5, end=lambda status: None, beat=0.02)
    a.start(), b.start()
    time.sleep(2.0)
    assert not ended.is_set()
    b._stopped.set()  # it stops beating, and
    b.store = Store()  # cannot say that it is done
    assert ended.wait(10)
    assert statuses == [1]
    assert capsys.readouterr().err.startswith(f"pgpo: rank 1 ({b.me}) has not been heard of for ")
    a.stop(None)


def test_the_end_is_told(capsys):
    store = Store()
    a, b = (Watch(store, rank, 2, 1.5, end=pytest.fail, beat=0.02) for rank in range(2))
    a.start(), b.start()
    a.stop(None)
    assert store[a.keys[0]].decode() == f"done|{a.me}"
    time.sleep(2.0)  # longer than the limit: b knows that a is done
    b.stop("ValueError: a\n  b")
    assert store[b.keys[1]].decode().endswith("|ValueError: a b") and store[b.keys[1]].startswith(b"failed|")
    assert not threads_of(a) + threads_of(b)
    assert capsys.readouterr().err == ""


def test_a_pause_of_this_process_is_not_the_others_silence(monkeypatch):
    """Suspended together: who wakes first finds all signs old."""
    now, ended = [0.0], []
    monkeypatch.setattr(ranks.time, "monotonic", lambda: now[0])
    a = Watch(Store(), 0, 2, 10.0, end=ended.append, beat=0.02)
    a.exchange("0")
    thread = threading.Thread(target=a._keep_watching, daemon=True)
    thread.start()
    time.sleep(0.2)
    now[0] += 100.0
    time.sleep(0.3)
    assert ended == []
    for _ in range(40):  # time that passes as it should, without a sign
        now[0] += 1.0
        time.sleep(0.03)
    assert ended == [1]


def opened(monkeypatch, watch):
    monkeypatch.setattr(ranks, "_open", lambda limit, advice: watch)


def test_the_error_of_a_collective_is_explained(monkeypatch, clock):
    _, (a, b) = watches(2)
    a.start = lambda: None
    a._threads = [threading.Thread(target=lambda: None)] * 2
    a._threads[0].start()
    opened(monkeypatch, a)
    monkeypatch.setattr(ranks.time, "sleep", lambda s: (clock.forward(s), a.exchange(str(clock.now))))
    beat(a, b, count=0)
    beat(a, b, count=1)
    says = r"^rank 1 \(.*\) has not been heard of for 10 s; rank 0 of 2 ends after step 7.$"
    with pytest.raises(LostRankError, match=says), watch_ranks(45.0):
        raise RuntimeError("gloo/transport/tcp/pair.cc:537: Connection reset by peer")
    assert clock.now < 1016


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), UserError("lower --alpha."), KeyboardInterrupt()])
def test_other_errors_pass_and_are_told_the_others(monkeypatch, error):
    store = Store()
    a = Watch(store, 0, 2, 45.0)
    opened(monkeypatch, a)
    with pytest.raises(type(error)) as caught, watch_ranks(45.0):
        raise error
    assert caught.value is error
    assert store[a.keys[0]].startswith(b"failed|") and type(error).__name__.encode() in store[a.keys[0]]


def test_one_process_is_not_watched(monkeypatch):
    before = threading.active_count()
    with watch_ranks(45.0), watch_ranks(None):
        assert threading.active_count() == before
