"""Since when log waits: exact, never too young, bounded."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from walbd.format.meta import LogPoint
from walbd.ids import Gid, Lsid
from walbd.protocol.device import LsidSample
from walbd.storage.backlog import MARKS_MAX, Backlog


def sample(latest: int, uuid: bytes = bytes(16)) -> LsidSample:
    return LsidSample(
        uuid=uuid,
        latest=latest,
        completed=latest,
        flush=latest,
        permanent=latest,
        written=0,
        prev_written=0,
        oldest=0,
        overflow=False,
        read_only=False,
        frozen=False,
    )


def test_after_a_long_idle_time_new_log_is_new() -> None:
    backlog = Backlog()
    backlog.see(sample(100), 1000)
    assert backlog.since(0) == 1000
    assert backlog.since(100) == 0  # all is delivered
    backlog.see(sample(100), 5000)
    assert backlog.since(100) == 0
    backlog.see(sample(101), 5001)
    assert backlog.since(100) == 5001
    backlog.see(sample(200), 5009)
    assert backlog.since(100) == 5001
    assert backlog.since(101) == 5009  # a part was delivered
    assert backlog.since(150) == 5009
    assert backlog.since(200) == 0


def test_a_new_log_begins_anew() -> None:
    backlog = Backlog()
    backlog.see(sample(100), 10)
    backlog.see(sample(0, bytes([1]) * 16), 20)
    assert backlog.since(0) == 0
    backlog.see(sample(5, bytes([1]) * 16), 30)
    assert backlog.since(0) == 30


def test_a_restart_knows_the_snapshots_that_wait() -> None:
    def point(lsid: int, gid: int, time: int) -> LogPoint:
        return LogPoint(lsid=Lsid(lsid), gid=Gid(gid), timestamp=time, mergeable=True)

    backlog = Backlog()
    backlog.restore(bytes(16), [point(50, 1, 700), point(90, 2, 800)])
    backlog.see(sample(120), 900)
    assert [backlog.since(lsid) for lsid in (10, 50, 90, 120)] == [700, 800, 900, 0]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=MARKS_MAX * 3), st.integers(0, 4000))
def test_never_too_young_and_bounded(steps: list[tuple[int, int]], done: int) -> None:
    backlog = Backlog()
    lsid, now = 0, 1
    seen: list[tuple[int, int]] = []
    for more, later in steps:
        lsid, now = lsid + more, now + later
        backlog.see(sample(lsid), now)
        seen.append((lsid, now))
    assert len(backlog._marks) <= MARKS_MAX
    exact = next((time for at, time in seen if at > done), 0)
    since = backlog.since(done)
    assert bool(since) == bool(exact)
    assert since <= exact
    if len({at for at, _ in seen}) < MARKS_MAX // 2:
        assert since == exact


def test_a_long_outage_is_bounded() -> None:
    backlog = Backlog()
    for second in range(1, 100_000):
        backlog.see(sample(second), second)
    assert len(backlog._marks) <= MARKS_MAX
    assert backlog.since(0) == 1
    for done in (1000, 50_000, 99_000):
        assert 0 < backlog.since(done) <= done + 1
