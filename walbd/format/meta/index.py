"""An ordered set of diffs: look-up, chains, merge candidates, removal (docs/metadata.md, Collections).

Diffs may overlap: a merged diff and its parts exist together for a moment. The set holds labels only; it
never touches a file. What depends on the base state is in `walbd.format.meta.manager`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

from sortedcontainers import SortedKeyList

from walbd.errors import AlreadyExists, NotFound
from walbd.format.meta.diff import Diff, apply, can_merge, merge
from walbd.format.meta.snapshot import Snapshot

Accept = Callable[[Diff, Snapshot], bool]  # (the next diff of a chain, the snapshot it leads to) -> take it?

_BELOW_ALL: Final = -1  # no insertion number is below it


class SnapshotChange(NamedTuple):
    """What protecting or releasing a snapshot does to the diffs which begin there."""

    found: bool  # some diff begins there, changed or not
    changed: list[tuple[Diff, Diff]]  # (as it was, as it becomes): the file must be renamed


@dataclass(slots=True, eq=False)
class _Entry:
    diff: Diff
    number: int  # of insertion


class DiffIndex:
    """A set of diffs, listed by `begin.gid_b`, then by insertion. No two have the same identity.

    Finding the diffs over a gid takes O(log n) for each power of two among the diffs' lengths, plus what is
    found, plus the diffs of such a length that end within their own length before the gid.
    """

    def __init__(self, diffs: Iterable[Diff] = ()) -> None:
        self._entries: dict[Diff, _Entry] = {}
        self._ordered = _by_begin()
        self._by_length: dict[int, Any] = {}  # bit length of the distance begin.gid_b to end.gid_b -> sorted list
        self._compared: dict[int, list[_Entry]] = {}  # compared diffs by begin.gid_b
        self._count = 0
        self._size_b = 0
        for diff in diffs:
            self.add(diff)

    @classmethod
    def load(cls, diffs: Iterable[Diff]) -> tuple[Self, list[Diff]]:
        """Build the set from a directory, where an identity may be there twice with other flags or times.

        The one with the later time is kept; of two with the same time the one that protects more. The second
        result lists those left out, whose files should be put aside.
        """
        kept: dict[Diff, Diff] = {}
        duplicates: list[Diff] = []
        for diff in diffs:
            other = kept.get(diff)
            if other is None:
                kept[diff] = diff
            elif _precedence(diff) > _precedence(other):
                kept[diff] = diff
                duplicates.append(other)
            else:
                duplicates.append(diff)
        return cls(kept.values()), duplicates

    # --- the set

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Diff]:
        for entry in self._ordered:
            yield entry.diff

    def __contains__(self, diff: Diff) -> bool:
        return diff in self._entries

    @property
    def size_b(self) -> int:
        """Sum of the file sizes [byte]."""
        return self._size_b

    def add(self, diff: Diff) -> None:
        """Add a diff; raises AlreadyExists if its identity is there, whatever its flags."""
        known = self._entries.get(diff)
        if known is not None:
            raise AlreadyExists("this diff is already there", diff=diff.describe(), known=known.diff.describe())
        entry = _Entry(diff, self._count)
        self._count += 1
        self._size_b += diff.size_b
        self._entries[diff] = entry
        self._ordered.add(entry)
        length = _length_class(diff)
        if length not in self._by_length:
            self._by_length[length] = _by_begin()
        self._by_length[length].add(entry)
        if diff.comp:
            self._compared.setdefault(diff.begin.gid_b, []).append(entry)

    def erase(self, diff: Diff, *, must_exist: bool = False) -> bool:
        """Remove the diff with this identity and say whether it was there; raises NotFound if it must be."""
        entry = self._entries.pop(diff, None)
        if entry is None:
            if must_exist:
                raise NotFound("there is no such diff", diff=diff)
            return False
        self._size_b -= entry.diff.size_b
        self._ordered.remove(entry)
        length = _length_class(entry.diff)
        self._by_length[length].remove(entry)
        if not self._by_length[length]:
            del self._by_length[length]
        if entry.diff.comp:
            compared = self._compared[entry.diff.begin.gid_b]
            compared.remove(entry)
            if not compared:
                del self._compared[entry.diff.begin.gid_b]
        return True

    def erase_all(self, diffs: Iterable[Diff]) -> None:
        """Remove each of `diffs` that is there."""
        for diff in diffs:
            self.erase(diff)

    def find(self, begin: Snapshot, end: Snapshot) -> Diff | None:
        """Return the diff with this identity, with its flags, time and size."""
        entry = self._entries.get(Diff(begin, end))
        return entry.diff if entry else None

    def get_range(self, gid_begin: int = 0, gid_end: int | None = None) -> list[Diff]:
        """Return the diffs with `gid_begin <= begin.gid_b < gid_end`, in listing order."""
        return [entry.diff for entry in self._between(gid_begin, gid_end)]

    def over(self, gid: int) -> list[Diff]:
        """Return the diffs with `begin.gid_b <= gid < end.gid_b`, in no particular order."""
        return [entry.diff for entry in self._over(gid)]

    # --- chains

    def steps(self, start: Snapshot) -> Iterator[tuple[Diff, Snapshot]]:
        """Yield the chain from `start` lazily: each diff with the snapshot it leads to.

        At every step the applicable diff that reaches furthest is taken, and on a tie the narrowest. The
        collection must not change meanwhile.
        """
        now = start
        best: Diff | None = None
        for entry in self._over(now.gid_b):
            if not entry.diff.comp:
                best = _better(best, entry.diff)
        later = self._between(now.gid_b + 1, None)
        waiting = next(later, None)
        while True:
            step = best if best is not None and best.end.gid_b > now.gid_b else None
            for entry in self._compared.get(now.gid_b, ()):
                step = _better(step, entry.diff)
            if step is None:
                return
            now = apply(now, step)
            yield step, now
            while waiting is not None and waiting.diff.begin.gid_b <= now.gid_b:
                if not waiting.diff.comp:
                    best = _better(best, waiting.diff)
                waiting = next(later, None)

    def chain(self, start: Snapshot, accept: Accept | None = None, *, n_max: int | None = None) -> list[Diff]:
        """Return the chain from `start`, ended before the first diff that `accept` refuses, or after `n_max`."""
        diffs: list[Diff] = []
        for diff, after in itertools.islice(self.steps(start), n_max):
            if accept is not None and not accept(diff, after):
                break
            diffs.append(diff)
        return diffs

    def chain_to_gid(self, start: Snapshot, gid: int, *, n_max: int | None = None) -> list[Diff]:
        """Return the chain from `start` as far as it does not pass `gid`, at most `n_max` diffs."""
        return self.chain(start, lambda _, after: after.gid_b <= gid, n_max=n_max)

    def chain_to_time(self, start: Snapshot, timestamp: int) -> list[Diff]:
        """Return the chain from `start` as far as its diffs are not younger than `timestamp` [unix second]."""
        return self.chain(start, lambda diff, _: diff.timestamp <= timestamp)

    def applicable_and_mergeable(
        self, start: Snapshot, *, size_max_b: int | None = None, n_max: int | None = None
    ) -> list[Diff]:
        """Return the longest prefix of the chain from `start` that can become one diff; the first always counts.

        Optionally cut by file sizes [byte] and number, as in `merge_candidates`.
        """

        def prefix() -> Iterator[Diff]:
            running: Diff | None = None
            for diff, _ in self.steps(start):
                if running is not None and not can_merge(running, diff):
                    return
                running = diff if running is None else merge(running, diff)
                yield diff

        return _cut(prefix(), size_max_b, n_max)

    # --- merging

    def merge_candidates(
        self, gid: int = 0, *, gid_end: int | None = None, size_max_b: int | None = None, n_max: int | None = None
    ) -> list[Diff]:
        """Return diffs, oldest first, that can become one, beginning with the first at or after `gid`.

        The flags of the first are not looked at; if it is compared it stays alone. Optionally cut before the
        first diff that begins at or after `gid_end`, before the sum of sizes passes `size_max_b` [byte], and
        to `n_max` diffs; the first stays in any case. Fewer than two: nothing to merge.
        """

        def run() -> Iterator[Diff]:
            for diff in self._merge_run(gid):
                if gid_end is not None and diff.begin.gid_b >= gid_end:
                    return
                yield diff

        return _cut(run(), size_max_b, n_max)

    def to_send(self, *, size_max_b: int, n_max: int) -> list[Diff]:
        """Return what a proxy sends next as one diff: the lowest and what can be merged onto it, within limits.

        Empty only if the collection is.
        """
        return self.merge_candidates(0, size_max_b=size_max_b, n_max=n_max)

    def _merge_run(self, gid: int) -> Iterator[Diff]:
        entries = self._between(gid, None)
        first = next(entries, None)
        if first is None:
            return
        running = first.diff
        waiting = next(entries, None)
        while waiting is not None and waiting.diff.begin.gid_b == running.begin.gid_b:
            running = max(running, waiting.diff, key=_rank)
            waiting = next(entries, None)
        yield running
        begin = running.begin.gid_b
        entries = self._between(begin, None)
        waiting = next(entries, None)
        candidates: list[Diff] = []
        while not running.comp:
            while waiting is not None and waiting.diff.begin.gid_b <= running.end.gid_b:
                candidates.append(waiting.diff)
                waiting = next(entries, None)
            candidates = [diff for diff in candidates if can_merge(running, diff)]
            if not candidates:
                return
            best = max(candidates, key=_rank)
            yield best
            running = merge(running, best)

    # --- removing and changing

    def keep_only(self, keep: Iterable[Diff]) -> list[Diff]:
        """Remove every diff but `keep` and return the removed, in listing order."""
        kept = set(keep)
        removed = [diff for diff in self if diff not in kept]
        self.erase_all(removed)
        return removed

    def gc_range(self, gid_begin: int, gid_end: int) -> list[Diff]:
        """Remove the diffs inside `gid_begin` to `gid_end` except those that cover it all; return the removed."""
        removed = [
            diff
            for diff in self.get_range(gid_begin, gid_end)
            if diff.end.gid_b <= gid_end and (diff.begin.gid_b != gid_begin or diff.end.gid_b != gid_end)
        ]
        self.erase_all(removed)
        return removed

    def erase_before(self, gid: int) -> list[Diff]:
        """Remove the diffs that end at or before `gid` and return them."""
        removed = [diff for diff in self.get_range(0, gid) if diff.end.gid_b <= gid]
        self.erase_all(removed)
        return removed

    def snapshot_change(self, gid: int, *, enable: bool) -> SnapshotChange:
        """Say what `change_snapshot` would do, and do nothing."""
        there = self.get_range(gid, gid + 1)
        return SnapshotChange(
            bool(there),
            [(diff, diff.with_mergeable(not enable)) for diff in there if diff.mergeable == enable],
        )

    def change_snapshot(self, gid: int, *, enable: bool) -> SnapshotChange:
        """Protect snapshot `gid` from merging, or release it, by the flags of the diffs that begin there.

        The newest snapshot is not found: no diff begins there, and it counts as explicit anyway.
        """
        change = self.snapshot_change(gid, enable=enable)
        for _, diff in change.changed:
            self.replace(diff)
        return change

    def replace(self, diff: Diff) -> None:
        """Give the diff with this identity new flags, time and size; its place is kept. Raises NotFound."""
        entry = self._entries.get(diff)
        if entry is None:
            raise NotFound("there is no such diff", diff=diff)
        if entry.diff.comp != diff.comp:
            raise ValueError("a diff does not become or cease to be compared")
        self._size_b += diff.size_b - entry.diff.size_b
        entry.diff = diff

    # --- inside

    def _between(self, gid_begin: int, gid_end: int | None) -> Iterator[_Entry]:
        upper = None if gid_end is None else (gid_end, _BELOW_ALL)
        found: Iterator[_Entry] = self._ordered.irange_key((gid_begin, _BELOW_ALL), upper)
        return found

    def _over(self, gid: int) -> Iterator[_Entry]:
        for length, entries in self._by_length.items():
            first = gid - (1 << length) + 1  # a diff of this class that begins below ends at or before gid
            for entry in entries.irange_key((first, _BELOW_ALL), (gid + 1, _BELOW_ALL)):
                if entry.diff.end.gid_b > gid:
                    yield entry


def _by_begin() -> Any:
    return SortedKeyList(key=_place)


def _place(entry: _Entry) -> tuple[int, int]:
    return entry.diff.begin.gid_b, entry.number


def _length_class(diff: Diff) -> int:
    return (diff.end.gid_b - diff.begin.gid_b).bit_length()


def _rank(diff: Diff) -> tuple[int, int, int, int]:
    """Order candidates: furthest end, then narrowest, then cleanest."""
    return diff.end.gid_b, diff.begin.gid_b, -diff.end.gid_e, -diff.begin.gid_e


def _better(best: Diff | None, diff: Diff) -> Diff:
    return diff if best is None or _rank(diff) > _rank(best) else best


def _precedence(diff: Diff) -> tuple[int, bool, bool]:
    return diff.timestamp, not diff.mergeable, diff.comp


def _cut(diffs: Iterator[Diff], size_max_b: int | None, n_max: int | None) -> list[Diff]:
    """Take diffs while their number and the sum of their sizes are within the limits; the first in any case."""
    taken: list[Diff] = []
    size_b = 0
    for diff in diffs:
        size_b += diff.size_b
        if taken and (
            (size_max_b is not None and size_b > size_max_b) or (n_max is not None and len(taken) >= n_max)
        ):
            break
        taken.append(diff)
    return taken
