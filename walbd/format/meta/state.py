"""The base image's state, and the labels and states that backups start from (docs/metadata.md, Base state).

Text form `<B>`, or `<B-->E>` while diffs are being applied to the base; with time `<B>-YYYYMMDDhhmmss`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self

from walbd.errors import HistoryBroken, UsageError
from walbd.format.meta import diff as rules
from walbd.format.meta.diff import Diff
from walbd.format.meta.errors import BadLabel, NotApplicable
from walbd.format.meta.snapshot import GID_PATTERN, NO_SNAPSHOT, SNAPSHOT_PATTERN, Snapshot
from walbd.format.meta.times import check_time, format_compact, parse_compact
from walbd.ids import Gid
from walbd.units import UINT64_MAX, format_time, parse_time

_STATE: Final = re.compile(rf"<({SNAPSHOT_PATTERN})(?:-->({SNAPSHOT_PATTERN}))?>(?:-([0-9]{{14}}))?")
_POINT: Final = re.compile(rf"({GID_PATTERN}) (---|[0-9T:-]{{19}}) ([01])")


@dataclass(frozen=True, slots=True)
class BaseState:
    """What the base image is known to be. Equality leaves the time out. Raises BadLabel.

    `end` is set only while an apply is in progress: then each block shows `begin` or any later point up to
    `end`, and the image must not be used without the diffs of `DiffManager.minimum`. `begin` is not moved
    until the apply is done, so a second crash loses nothing.
    """

    begin: Snapshot
    end: Snapshot | None = None
    timestamp: int = field(default=0, compare=False)  # of the snapshot; while applying of the target [unix second]

    def __post_init__(self) -> None:
        if self.end is not None and self.begin.gid_b >= self.end.gid_b:
            raise BadLabel("an apply must lead forward", state=f"<{self.begin}-->{self.end}>")
        check_time(self.timestamp)

    @property
    def is_applying(self) -> bool:
        """An apply was begun and is not known to be done."""
        return self.end is not None

    def can_apply(self, diffs: Sequence[Diff]) -> bool:
        """Tell whether `diffs` continue the base and reach at least the target of an apply in progress."""
        if not rules.can_apply(self.begin, diffs):
            return False
        return self.end is None or self.end.gid_b <= rules.apply_all(self.begin, diffs).gid_b

    def begin_applying(self, diffs: Sequence[Diff]) -> BaseState:
        """Return the state to store before the first block is written; raises NotApplicable."""
        after = self.end_applying(diffs)
        return BaseState(self.begin, after.begin, after.timestamp) if diffs else self

    def end_applying(self, diffs: Sequence[Diff]) -> BaseState:
        """Return the state to store once every block of `diffs` is durable; raises NotApplicable."""
        if not self.can_apply(diffs):
            raise NotApplicable("these diffs do not continue the base", state=self, diffs=len(diffs))
        if not diffs:
            return self
        return BaseState(rules.apply_all(self.begin, diffs), timestamp=diffs[-1].timestamp)

    def describe(self) -> str:
        """Write the text form with the time."""
        return f"{self}-{format_compact(self.timestamp)}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `describe` or `str` writes; without a time it is 0. Raises BadLabel."""
        match = _STATE.fullmatch(text)
        if match is None:
            raise BadLabel("not a base state", hint="write <|B|> or <|B|-->|E|>, then -YYYYMMDDhhmmss", text=text)
        begin = Snapshot.parse(match[1])
        end = Snapshot.parse(match[2]) if match[2] else None
        return cls(begin, end, parse_compact(match[3]) if match[3] else 0)

    def __str__(self) -> str:
        return f"<{self.begin}>" if self.end is None else f"<{self.begin}-->{self.end}>"


NO_BASE: Final = BaseState(NO_SNAPSHOT)  # after init-vol


@dataclass(frozen=True, slots=True)
class RestorePoint:
    """One generation that can be restored. `explicit` is false for the base, however it was taken."""

    gid: Gid
    timestamp: int  # [unix second]
    explicit: bool

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes; raises BadLabel."""
        match = _POINT.fullmatch(text)
        if match is None:
            raise BadLabel("not a restore point", hint="write GID TIME 0|1", text=text)
        try:
            point = cls(Gid(int(match[1])), parse_time(match[2]), match[3] == "1")
        except UsageError as exc:
            raise BadLabel("not a restore point", text=text) from exc
        if str(point) != text:
            raise BadLabel("not a restore point: the time is not in its form", text=text)
        return point

    def __str__(self) -> str:
        return f"{self.gid} {format_time(self.timestamp)} {int(self.explicit)}"


def full_backup_state(gid_end: int, started: int) -> BaseState:
    """Return the base after a full backup: `<|0,g|>`, g the snapshot taken at its end, with the time it began."""
    return BaseState(Snapshot(Gid(0), Gid(gid_end)), timestamp=started)


def hash_backup_gid(latest: Snapshot) -> Gid:
    """Return the gid that a hash backup resets the log to: above the whole range of the archive's latest."""
    if latest.gid_e >= UINT64_MAX - 1:
        raise BadLabel("no generation is left above the latest snapshot", latest=latest)
    return Gid(latest.gid_e + 1)


def hash_backup_diff(latest: Snapshot, taken: Snapshot, started: int) -> Diff:
    """Return the label of the diff that a hash backup stores: from the archive's latest to what storage took.

    It is a comparison, yet not `comp`, as nothing lies between. A clean latest becomes an explicit snapshot.
    Raises BadLabel unless `taken` lies wholly above `latest`.
    """
    if taken.gid_b <= latest.gid_e:
        raise BadLabel("a hash backup must lie above the latest snapshot", latest=latest, taken=taken)
    return Diff(latest, taken, mergeable=not latest.is_clean, timestamp=started)


def hash_replication_diff(destination: Snapshot, source: BaseState) -> Diff:
    """Return the label for replicating by hash to a destination older than the source's base.

    `source` is the source's oldest clean state. Raises HistoryBroken where only a resync helps.
    """
    taken = source.begin
    if source.is_applying or not taken.is_clean:
        raise BadLabel("the source of a hash replication must be clean", source=source)
    if destination.gid_b >= taken.gid_b or destination.gid_e > taken.gid_e:
        raise HistoryBroken(
            "the destination is not below the source's oldest clean snapshot",
            hint="replicate with resync",
            destination=destination,
            source=source,
        )
    return Diff(destination, taken, mergeable=True, comp=True, timestamp=source.timestamp)


def starting_state(base: BaseState, colds: Mapping[int, int], gid: int, *, to_apply: bool) -> BaseState:
    """Choose where the way to `gid` starts: the newest cold image up to it if above the base, else the base.

    `colds` gives the time of each cold image [unix second] by its gid. To apply, an apply in progress must be
    finished first, so the base it is.
    """
    cold = max((c for c in colds if c <= gid), default=None)
    if cold is None or cold <= base.begin.gid_b or (to_apply and base.is_applying):
        return base
    return BaseState(Snapshot.clean(cold), timestamp=colds[cold])
