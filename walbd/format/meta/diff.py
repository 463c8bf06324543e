"""Diffs as labels, and the rules on ranges (docs/metadata.md, Diffs, Applying, Merging).

Here a diff is opaque: a set of blocks that turns one snapshot into a later one. What the rules compare are
lower bounds: an image that is dirty over [x, y], given every write from z to w with z <= x < w, becomes
dirty over [w, max(w, y)]. Everything below is this sentence.

Text forms: `B-->E` is the identity; listings write `B-->E FL TIME SIZE`, where FL is `M` or `-` (mergeable),
then `C` or `-` (compared), TIME is `YYYY-MM-DDThh:mm:ss` or `---` for zero, SIZE is bytes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final, Self

from walbd.errors import UsageError
from walbd.format.meta.errors import BadLabel, NotApplicable, NotMergeable
from walbd.format.meta.snapshot import SNAPSHOT_PATTERN, Snapshot
from walbd.format.meta.times import check_time
from walbd.ids import NO_GID, Gid
from walbd.units import format_time, parse_time

_DIFF: Final = re.compile(
    rf"({SNAPSHOT_PATTERN})-->({SNAPSHOT_PATTERN})"
    r" ([M-][C-]) (---|[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}) (0|[1-9][0-9]{0,19})"
)


@dataclass(frozen=True, slots=True)
class Diff:
    """The label of one stored diff. Two diffs are equal when `begin` and `end` are: that pair is the identity.

    `mergeable` protects or gives up the snapshot at the *beginning*: only if it is set may this diff be
    appended to the one before. It says nothing about `end`. Raises BadLabel when there is no progress
    (`begin.gid_b >= end.gid_b`), when `begin.gid_e > end.gid_e`, or when a gid is none.
    """

    begin: Snapshot
    end: Snapshot
    mergeable: bool = field(default=False, compare=False)
    comp: bool = field(default=False, compare=False)  # made by comparing two images: valid from one image only
    timestamp: int = field(default=0, compare=False)  # of the snapshot `end` [unix second]
    size_b: int = field(default=0, compare=False)  # of the stored file; bookkeeping only [byte]

    def __post_init__(self) -> None:
        if self.begin.gid_b >= self.end.gid_b or self.begin.gid_e > self.end.gid_e:
            raise BadLabel("a diff must lead forward", diff=f"{self.begin}-->{self.end}")
        if self.end.gid_e == NO_GID:
            raise BadLabel("a diff needs known generations", diff=f"{self.begin}-->{self.end}")
        if self.size_b < 0:
            raise BadLabel("a diff cannot have a negative size", size_b=self.size_b)
        check_time(self.timestamp)

    @property
    def is_clean(self) -> bool:
        """Both ends are clean."""
        return self.begin.is_clean and self.end.is_clean

    @property
    def flags(self) -> str:
        """The two flag characters of listings and file names."""
        return ("M" if self.mergeable else "-") + ("C" if self.comp else "-")

    def with_mergeable(self, mergeable: bool) -> Diff:
        """Return the same diff with the flag set to `mergeable`."""
        return replace(self, mergeable=mergeable)

    def describe(self) -> str:
        """Write the long form used in listings: `B-->E FL TIME SIZE`."""
        return f"{self} {self.flags} {format_time(self.timestamp)} {self.size_b}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read exactly what `describe` writes; raises BadLabel."""
        match = _DIFF.fullmatch(text)
        if match is None:
            raise BadLabel("not a diff", hint="write |B|-->|E| FL TIME SIZE", text=text)
        try:
            timestamp = parse_time(match[4])
        except UsageError as exc:
            raise BadLabel("not a diff: the time does not exist", text=text) from exc
        diff = cls(
            Snapshot.parse(match[1]),
            Snapshot.parse(match[2]),
            mergeable=match[3][0] == "M",
            comp=match[3][1] == "C",
            timestamp=timestamp,
            size_b=int(match[5]),
        )
        if diff.describe() != text:
            raise BadLabel("not a diff: write time zero as ---", text=text)
        return diff

    def __str__(self) -> str:
        return f"{self.begin}-->{self.end}"


class Relation(StrEnum):
    """Where a diff lies, seen from a snapshot."""

    APPLICABLE = "applicable"
    TOO_OLD = "too-old"  # the snapshot has all of it
    TOO_NEW = "too-new"  # something between the snapshot and the diff is missing
    NOT_APPLICABLE = "not-applicable"  # a compared diff of another image


def relation(snapshot: Snapshot, diff: Diff) -> Relation:
    """Tell whether `diff` continues `snapshot`. Upper bounds play no part."""
    if diff.comp:
        same = diff.begin.gid_b == snapshot.gid_b
        return Relation.APPLICABLE if same else Relation.NOT_APPLICABLE
    if diff.begin.gid_b > snapshot.gid_b:
        return Relation.TOO_NEW
    if diff.end.gid_b <= snapshot.gid_b:
        return Relation.TOO_OLD
    return Relation.APPLICABLE


def apply(snapshot: Snapshot, diff: Diff) -> Snapshot:
    """Return the snapshot that `diff` makes of `snapshot`; raises NotApplicable."""
    _require_applicable(snapshot, diff)
    if diff.is_clean:
        return Snapshot(diff.end.gid_b, max(diff.end.gid_b, snapshot.gid_e))
    return diff.end


def apply_all(snapshot: Snapshot, diffs: Iterable[Diff]) -> Snapshot:
    """Apply `diffs` in order; none changes nothing. Raises NotApplicable at the first that does not continue."""
    for diff in diffs:
        snapshot = apply(snapshot, diff)
    return snapshot


def can_apply(snapshot: Snapshot, diffs: Iterable[Diff]) -> bool:
    """Tell whether `apply_all` would succeed."""
    for diff in diffs:
        if relation(snapshot, diff) is not Relation.APPLICABLE:
            return False
        snapshot = apply(snapshot, diff)
    return True


def trim(diff: Diff, snapshot: Snapshot) -> Diff:
    """Return `diff` labelled to begin at `snapshot`, with the same contents; raises NotApplicable.

    For a receiver whose newest snapshot lies inside a diff: the blocks are good from there too, and a label that
    begins there cannot lead past snapshots that are protected here, nor be used from other images below, of which
    the sender knew nothing. What the sender merged over is implicit, so a moved begin is mergeable. Compared diffs
    are returned as they are.
    """
    _require_applicable(snapshot, diff)
    if diff.comp or diff.begin.gid_b == snapshot.gid_b:
        return diff
    begin = Snapshot.clean(snapshot.gid_b) if diff.is_clean else snapshot
    return replace(diff, begin=begin, mergeable=True) if begin.gid_e <= diff.end.gid_e else diff


def can_merge(first: Diff, second: Diff) -> bool:
    """Tell whether `second` may be appended to `first`; the flag of `first` is not looked at."""
    return (
        second.mergeable
        and not first.comp
        and not second.comp
        and first.begin.gid_b <= second.begin.gid_b <= first.end.gid_b < second.end.gid_b
        and first.begin.gid_e <= _merged_end(first, second).gid_e  # else the label would lead backward
    )


def merge(first: Diff, second: Diff) -> Diff:
    """Return the label of `second` appended to `first`; raises NotMergeable.

    The flag is the first's, the time the second's, the size unknown (0) until the file exists. Blocks come
    from `second` where it has them, else from `first`.
    """
    if not can_merge(first, second):
        raise NotMergeable("the second diff must not be appended to the first", first=first, second=second)
    return Diff(first.begin, _merged_end(first, second), mergeable=first.mergeable, timestamp=second.timestamp)


def can_merge_all(diffs: Sequence[Diff]) -> bool:
    """Tell whether `merge_all` would succeed: false for none, true for one, even a compared one."""
    if not diffs:
        return False
    running = diffs[0]
    for diff in diffs[1:]:
        if not can_merge(running, diff):
            return False
        running = merge(running, diff)
    return True


def merge_all(diffs: Sequence[Diff]) -> Diff:
    """Merge `diffs`, oldest first, into one label; raises NotMergeable, also for none.

    One diff alone is returned as it is, with its size.
    """
    if not diffs:
        raise NotMergeable("there is nothing to merge")
    running = diffs[0]
    for diff in diffs[1:]:
        running = merge(running, diff)
    return running


def contains(diff: Diff, other: Diff) -> bool:
    """Tell whether `other` may be deleted while `diff` is stored: `diff.end` stays reachable."""
    return diff.begin.gid_b <= other.begin.gid_b and other.end.gid_b <= diff.end.gid_b


def _require_applicable(snapshot: Snapshot, diff: Diff) -> None:
    where = relation(snapshot, diff)
    if where is not Relation.APPLICABLE:
        raise NotApplicable(
            "the diff does not continue the snapshot", snapshot=snapshot, diff=diff, relation=where
        )


def _merged_end(first: Diff, second: Diff) -> Snapshot:
    if second.is_clean:
        return Snapshot(second.end.gid_b, Gid(max(second.end.gid_b, first.end.gid_e)))
    return second.end
