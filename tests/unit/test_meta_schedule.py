"""Where gids come from: records, the choice of transfers, and what must hold for every log."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbd.errors import HistoryBroken, InternalError, Refused
from walbd.format.meta import (
    NO_POINT,
    BadLabel,
    Diff,
    LogPoint,
    Snapshot,
    Transfer,
    drop_delivered,
    is_implicit_due,
    new_point,
    plan_transfer,
    point_after,
    reset_point,
    transfer_diff,
)
from walbd.ids import Gid, Lsid
from walbd.units import UINT64_MAX


def point(lsid: int, gid: int, *, mergeable: bool = True, timestamp: int = 0) -> LogPoint:
    return LogPoint(Lsid(lsid), Gid(gid), mergeable, timestamp)


def plan(done: LogPoint, *queue: LogPoint, permanent: int = 10**9, size_max_pb: int = 1000) -> Transfer | None:
    return plan_transfer(done, queue, permanent, size_max_pb=size_max_pb)


def test_the_documented_cut() -> None:
    """An explicit snapshot at 2500 with transfers of at most 1000: three pieces, the gids reserved for them."""
    done = point(0, 10, mergeable=False, timestamp=5)
    end = new_point(done, [], 2500, explicit=True, now=90, size_max_pb=1000)
    assert end == point(2500, 13, mergeable=False, timestamp=90)
    pieces = []
    for lsid_end, limit in ((990, 1000), (1985, 1990), (2500, 2500)):
        transfer = plan(done, end)
        assert transfer is not None
        assert transfer.limit == limit
        pieces.append(transfer_diff(transfer, lsid_end))
        done = point_after(transfer, lsid_end)
    assert [diff.describe() for diff in pieces] == [
        "|10|-->|11| -- 1970-01-01T00:01:30 0",
        "|11|-->|12| M- 1970-01-01T00:01:30 0",
        "|12|-->|13| M- 1970-01-01T00:01:30 0",
    ]
    assert done == end


def test_no_gid_left_ignores_the_limit() -> None:
    transfer = plan(point(1985, 12), point(5000, 13))
    assert transfer == Transfer(point(1985, 12), point(5000, 13), Lsid(5000), exceeds_max=True)
    transfer = plan(point(1985, 12), point(5000, 14))
    assert transfer is not None
    assert (transfer.limit, transfer.exceeds_max) == (2985, False)


def test_implicit_records_are_skipped_and_explicit_ones_end_a_transfer() -> None:
    done, one, two, three = point(0, 0), point(10, 1), point(20, 2), point(30, 3)
    explicit = point(20, 2, mergeable=False)
    assert end_of(plan(done, one, two, three)) == three
    assert end_of(plan(done, one, explicit, three)) == explicit
    assert end_of(plan(done, explicit, three)) == explicit
    assert end_of(plan(done, one, two, three, size_max_pb=20)) == two
    assert end_of(plan(done, one, two, three, permanent=29)) == two
    assert plan(done, one, two, three, permanent=9) is None  # wait until the log is permanent
    assert plan(done) is None


def end_of(transfer: Transfer | None) -> LogPoint:
    assert transfer is not None
    assert transfer.limit == transfer.end.lsid
    return transfer.end


def test_drop_delivered() -> None:
    done = point(10, 5)
    queue = [point(5, 3), point(10, 5), point(10, 6), point(12, 7)]
    assert drop_delivered(done, queue) == (point(10, 6), point(12, 7))
    assert drop_delivered(done, queue[:2]) == ()
    assert drop_delivered(done, queue[2:]) == tuple(queue[2:])
    with pytest.raises(InternalError):
        plan(done, queue[0])
    with pytest.raises(InternalError):
        plan(done, queue[1])


def test_implicit_snapshots_are_due() -> None:
    assert is_implicit_due([], 10, 100, 2)
    assert is_implicit_due([point(9, 1, timestamp=98)], 10, 100, 2)
    assert not is_implicit_due([point(9, 1, timestamp=99)], 10, 100, 2)
    assert not is_implicit_due([point(10, 1, timestamp=0)], 10, 100, 2)


def test_implicit_snapshots_of_an_outage_are_few_and_evenly_dense() -> None:
    """The k-th is never further from the one before than a part of the time since the first."""
    queue, now = [point(0, 1, timestamp=0)], 0
    while now < 30 * 86400:
        now += 10  # a retry that fails, with new log each time
        if is_implicit_due(queue, now, now, 2):
            queue.append(point(now, len(queue) + 1, timestamp=now))
    assert 500 < len(queue) < 800
    for before, after in itertools.pairwise(queue):
        assert after.timestamp - before.timestamp <= max(10, after.timestamp // 32)


def test_snapshots_that_are_refused() -> None:
    with pytest.raises(HistoryBroken):  # never reset
        new_point(NO_POINT, [], 10, explicit=True, now=0, size_max_pb=10)
    with pytest.raises(HistoryBroken):  # the log was wiped behind our back
        new_point(point(0, 0), [point(11, 1)], 10, explicit=True, now=0, size_max_pb=10)
    with pytest.raises(Refused):
        new_point(point(0, UINT64_MAX - 2), [], 10, explicit=True, now=0, size_max_pb=10)
    assert new_point(point(0, UINT64_MAX - 2), [], 9, explicit=True, now=0, size_max_pb=10).gid == UINT64_MAX - 1
    assert NO_POINT.is_none
    assert not reset_point(0, 0).is_none
    assert reset_point(7, 9) == point(0, 7, mergeable=False, timestamp=9)
    with pytest.raises(BadLabel):
        point(-1, 0)
    with pytest.raises(BadLabel):
        point(0, UINT64_MAX + 1)


def test_transfers_that_end_where_they_must_not() -> None:
    transfer = plan(point(0, 0), point(2500, 3))
    assert transfer is not None
    for lsid_end in (1001, 2499):
        with pytest.raises(InternalError):
            point_after(transfer, lsid_end)
        with pytest.raises(InternalError):
            transfer_diff(transfer, lsid_end)
    with pytest.raises(Refused, match="larger than the largest transfer"):
        point_after(transfer, 0)
    last = plan(point(0, 0), point(2500, 1))
    assert last is not None
    with pytest.raises(InternalError):
        point_after(last, 1000)


@given(st.integers(0, 2**32), st.integers(10, 40))
def test_every_log_is_sent_without_gaps(seed: int, size_max_pb: int) -> None:
    """Random packs, snapshots, lost acknowledgements: pieces join, records keep their gids, cuts find a gid."""
    rng = random.Random(seed)
    done = reset_point(rng.randint(0, 5), 1)
    queue: tuple[LogPoint, ...] = ()
    boundaries = [0]
    explicit = {done.gid: done.lsid}
    sent: list[tuple[Diff, int, int]] = []
    for now in range(2, 60):
        for _ in range(rng.randint(0, 4)):
            boundaries.append(boundaries[-1] + rng.randint(1, 10))
        latest = boundaries[-1]
        if rng.random() < 0.2:
            record = new_point(done, queue, latest, explicit=True, now=now, size_max_pb=size_max_pb)
            explicit[record.gid] = record.lsid
            queue = (*queue, record)
        permanent = rng.choice(boundaries[-3:])
        queue = drop_delivered(done, queue)
        if (done.lsid < permanent or queue) and is_implicit_due(queue, latest, now, 3):
            queue = (*queue, new_point(done, queue, latest, explicit=False, now=now, size_max_pb=size_max_pb))
        transfer = plan_transfer(done, queue, permanent, size_max_pb=size_max_pb)
        if transfer is None:
            continue
        assert done.lsid <= transfer.limit <= permanent
        lsid_end = max(lsid for lsid in boundaries if lsid <= transfer.limit)
        if lsid_end == done.lsid and transfer.end.lsid != done.lsid:
            raise AssertionError("no pack is larger than the smallest limit here")
        assert transfer.exceeds_max == (transfer.limit - done.lsid > size_max_pb)
        diff = transfer_diff(transfer, lsid_end)
        if rng.random() < 0.2:
            continue  # the acknowledgement was lost: the same stretch is planned again
        after = point_after(transfer, lsid_end)
        assert (after.lsid, Snapshot.clean(after.gid)) == (lsid_end, diff.end)
        assert diff.mergeable == (done.gid not in explicit)
        sent.append((diff, done.lsid, lsid_end))
        done, queue = after, drop_delivered(after, queue)
    for (one, _, end), (two, begin, _) in itertools.pairwise(sent):
        assert one.end == two.begin
        assert end == begin
    ends = {diff.end.gid_b: lsid for diff, _, lsid in sent}
    for gid, lsid in explicit.items():
        if sent and sent[0][0].begin.gid_b < gid <= done.gid:
            assert ends[gid] == lsid
