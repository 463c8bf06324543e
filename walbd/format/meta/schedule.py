"""Where generations come from: the storage's records and the choice of the next transfer.

Only storage invents gids (docs/metadata.md, Where generations come from). A `LogPoint` ties a generation to
a place in the log. `done` is the one everything before which is delivered; the queue holds planned
snapshots, oldest first. A record reserves as many gids as cutting the log up to it may need. All functions
are pure: the caller makes their results durable, `done` before the log below it is given up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from walbd.errors import HistoryBroken, InternalError, Refused
from walbd.format.meta.diff import Diff
from walbd.format.meta.errors import BadLabel
from walbd.format.meta.snapshot import Snapshot
from walbd.format.meta.times import check_time
from walbd.ids import INVALID_LSID, NO_GID, Gid, Lsid
from walbd.units import UINT64_MAX

_APART: Final = 64


@dataclass(frozen=True, slots=True)
class LogPoint:
    """A generation and where its log ends: the done record, or a planned snapshot in the queue."""

    lsid: Lsid  # [physical block]
    gid: Gid
    mergeable: bool  # implicit: merging may destroy this snapshot
    timestamp: int  # [unix second]

    def __post_init__(self) -> None:
        if not (0 <= self.lsid <= UINT64_MAX and 0 <= self.gid <= UINT64_MAX):
            raise BadLabel("a record needs lsid and gid below 2^64", lsid=self.lsid, gid=self.gid)
        check_time(self.timestamp)

    @property
    def is_none(self) -> bool:
        """Nothing was ever delivered: the log was not reset yet."""
        return self.lsid == INVALID_LSID or self.gid == NO_GID


NO_POINT: Final = LogPoint(INVALID_LSID, NO_GID, mergeable=False, timestamp=0)  # done after init-vol


@dataclass(frozen=True, slots=True)
class Transfer:
    """A stretch of log to send: whole packs from `begin.lsid`, none ending above `limit`, aiming at `end`."""

    begin: LogPoint
    end: LogPoint
    limit: Lsid
    exceeds_max: bool  # no gid was left to cut at: the stretch may be larger than asked for


def reset_point(gid: int, now: int) -> LogPoint:
    """Return `done` after the log was wiped. It is explicit, so the first diff cannot be merged away."""
    return LogPoint(Lsid(0), Gid(gid), mergeable=False, timestamp=now)


def new_point(
    done: LogPoint, queue: Sequence[LogPoint], lsid: int, *, explicit: bool, now: int, size_max_pb: int
) -> LogPoint:
    """Return the record of a snapshot at `lsid`, to be pushed as the newest of `queue`.

    `size_max_pb` is the largest stretch sent at once. An `lsid` equal to the last record's gives an empty
    diff with its own gid. Raises HistoryBroken if the log lies before the last record (it was reset behind
    our back), Refused when no generation is left.
    """
    last = queue[-1] if queue else done
    if last.is_none or lsid < last.lsid:
        raise HistoryBroken(
            "the log does not reach the last snapshot",
            hint="reset the volume, then run a hash backup",
            lsid=lsid,
            lsid_last=last.lsid,
        )
    gid = last.gid + 1 + (lsid - last.lsid) // size_max_pb
    if gid >= NO_GID:
        raise Refused("no generation is left in this history", hint="reset the volume", gid_last=last.gid)
    return LogPoint(Lsid(lsid), Gid(gid), mergeable=not explicit, timestamp=now)


def drop_delivered(done: LogPoint, queue: Sequence[LogPoint]) -> tuple[LogPoint, ...]:
    """Return `queue` without the records that `done` has reached."""
    keep = 0
    while keep < len(queue) and (
        queue[keep].lsid < done.lsid or (queue[keep].lsid == done.lsid and queue[keep].gid <= done.gid)
    ):
        keep += 1
    return tuple(queue[keep:])


def is_implicit_due(queue: Sequence[LogPoint], latest: int, now: int, interval_s: int) -> bool:
    """Tell whether the transfer loop should take an implicit snapshot at the newest lsid `latest`.

    The longer nothing was delivered, the further apart they are: a 64th of the age of the oldest that waits. So an
    outage of a month leaves 700 of them, and an early one as many as a late one.
    """
    if not queue:
        return True
    apart_s = max(interval_s, (now - queue[0].timestamp) // _APART)
    return queue[-1].lsid < latest and queue[-1].timestamp + apart_s <= now


def plan_transfer(
    done: LogPoint, queue: Sequence[LogPoint], permanent: int, *, size_max_pb: int
) -> Transfer | None:
    """Choose the next stretch to send; None: nothing is planned, or the log must become permanent first.

    Implicit records are skipped over as far as one stretch reaches; an explicit one always ends a stretch.
    `queue` must have passed `drop_delivered`; InternalError if it was not.
    """
    if not queue:
        return None
    end, steps = queue[0], 0
    for record in queue[1:]:
        if not end.mergeable or record.lsid > done.lsid + size_max_pb or record.lsid > permanent:
            break
        end, steps = record, steps + 1
    if end.lsid < done.lsid or end.gid <= done.gid:
        raise InternalError("the queue of snapshots is behind what was delivered", done=done, end=end)
    reach = Lsid(done.lsid + size_max_pb)
    is_last_gid = steps == 0 and end.gid == done.gid + 1
    limit = end.lsid if is_last_gid or end.lsid <= reach else reach
    return Transfer(done, end, limit, exceeds_max=limit > reach) if limit <= permanent else None


def transfer_diff(transfer: Transfer, lsid_end: int) -> Diff:
    """Return the label of what was sent, `[begin.lsid, lsid_end)`; raises as `point_after` does."""
    after = point_after(transfer, lsid_end)
    return Diff(
        Snapshot.clean(transfer.begin.gid),
        Snapshot.clean(after.gid),
        mergeable=transfer.begin.mergeable,  # whether the snapshot where this diff begins may vanish
        timestamp=transfer.end.timestamp,
    )


def point_after(transfer: Transfer, lsid_end: int) -> LogPoint:
    """Return `done` once the receiver has acknowledged `[begin.lsid, lsid_end)`.

    A stretch that stopped short takes the next gid and is implicit; its time stays the old one. Raises
    Refused when not even one pack was below the limit, InternalError when packs were sent above it.
    """
    begin, end = transfer.begin, transfer.end
    if lsid_end == end.lsid:
        return end
    if not begin.lsid <= lsid_end <= transfer.limit or end.gid <= begin.gid + 1:
        raise InternalError("a transfer ended where it must not", lsid_end=lsid_end, transfer=transfer)
    if lsid_end == begin.lsid:
        raise Refused(
            "a log pack is larger than the largest transfer",
            hint="raise the limit on the size of one transfer",
            lsid=begin.lsid,
            limit=transfer.limit,
        )
    return LogPoint(Lsid(lsid_end), Gid(begin.gid + 1), mergeable=True, timestamp=begin.timestamp)
