"""Times of snapshots that cannot be: a storage whose clock was set back (docs/policy.md, "Which points stay").

Retention goes by the times that storages give to snapshots. One that is dated long before a snapshot that it
follows would count as old at once, and could take the place of a good one of that time. So such a diff is dated
when it comes, by our clock, less what its predecessors were late by. What is dated ahead of our clock is left
alone, and nothing is compared with it: it stays, and counts for no rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

import structlog

from walbd.format.meta import BaseState, Diff, DiffManager

log = structlog.get_logger()

SLACK_S: Final = 3600  # clocks of storages may differ by so much: the shortest period of retention


@dataclass
class Dating:
    """What the diffs of one volume say of the clocks that dated them."""

    newest: int | None = None  # greatest time of a snapshot that is not ahead of our clock [unix s]
    late_s: int | None = None  # how old the last diff was when it came

    def dated(self, diff: Diff, base: BaseState, diffs: DiffManager, now: int) -> Diff:
        """Return `diff`, which is about to continue these, with a time that is not long before theirs."""
        newest = self.newest
        if newest is None:
            times = (base.timestamp, *(known.timestamp for known in diffs))
            newest = max((time for time in times if time <= now), default=diff.timestamp)
        if diff.timestamp < newest - SLACK_S and newest <= now:
            if self.late_s is None:  # after a start: it goes on from what is here
                self.late_s = now - newest
            time = max(now - self.late_s, newest)
            log.warning("wdiff.clock_wrong", diff=str(diff), timestamp=diff.timestamp, taken_for=time)
            diff = replace(diff, timestamp=time)
        elif diff.timestamp <= now:
            self.late_s = now - diff.timestamp
        if diff.timestamp <= now:
            self.newest = max(newest, diff.timestamp)
        return diff
