"""Intervals for which no restore point can exist, because their log was lost (docs/archive.md, "Gaps").

A copy that compares continues the history, but nothing between the last restore point before it and the first one
after it can be had again. Such a gap opens with the wdiff of the copy and ends with the first clean snapshot; both
become true together with the name of the wdiff (archive/pending.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import msgspec

from walbd.archive.volume import Volume
from walbd.format.meta import Diff, RestorePoint, apply
from walbd.protocol.maintenance import Gap

HASH_BACKUP: Final = "hash-backup"
HASH_REPLICATION: Final = "hash-replication"


def gaps_after(volume: Volume, diff: Diff, *, cause: str = "") -> tuple[Gap, ...]:
    """Return the gaps as they will be once `diff` continues the latest snapshot.

    With a `cause`, what led to the diff's end is lost, and a gap opens, unless one is open already. Cheap when
    there is no gap.
    """
    gaps = volume.record.gaps
    is_open = bool(gaps) and gaps[-1].end == 0
    if cause and not is_open:
        points = volume.restorable(all_points=True)
        if points:  # without one nothing could be restored before, either
            gaps = (*gaps, Gap(begin=points[-1].timestamp, end=0, gid_b=points[-1].gid, gid_e=0, cause=cause))
            is_open = True
    after = apply(volume.latest.begin, diff)
    if is_open and after.is_clean:
        gaps = (*gaps[:-1], msgspec.structs.replace(gaps[-1], end=diff.timestamp, gid_e=after.gid_b))
    return gaps if gaps == volume.record.gaps else within(gaps, volume.restorable(all_points=True))


def within(gaps: Sequence[Gap], points: Sequence[RestorePoint]) -> tuple[Gap, ...]:
    """Return the gaps without those that lie wholly before the oldest restore point."""
    return tuple(gap for gap in gaps if gap.end == 0 or not points or gap.gid_e > points[0].gid)
