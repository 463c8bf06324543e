"""Sets of wdiffs in memory: what was received, and what each archive has still to get.

Each wdiff carries the number of its receipt. A piece of log may come twice (its acknowledgement was lost) and then
replaces what came first under the same snapshots; whoever has just sent the first one must not delete the second.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from walbd.format.meta import Diff, DiffIndex, diff_name


class DiffSet:
    """Diffs by their snapshots, each with the number of its receipt."""

    def __init__(self, diffs: DiffIndex | None = None, *, receipt: int = 0) -> None:
        """Begin with what a directory holds."""
        self._index = diffs if diffs is not None else DiffIndex()
        self._receipts: dict[Diff, int] = dict.fromkeys(self._index, receipt)
        self._newest: Diff | None = None  # None: not known, or none

    def __len__(self) -> int:
        return len(self._index)

    def __iter__(self) -> Iterator[Diff]:
        """Iterate by begin gid."""
        return iter(self._index)

    @property
    def size_b(self) -> int:
        """Sum of the file sizes [byte]."""
        return self._index.size_b

    @property
    def first(self) -> Diff | None:
        """The diff with the lowest begin: the one that waits longest, within one history."""
        return next(iter(self._index), None)

    @property
    def gid_e(self) -> int:
        """The highest end gid; 0 for an empty set."""
        newest = self.newest()
        return newest.end.gid_b if newest is not None else 0

    def newest(self) -> Diff | None:
        """Return the diff that reaches furthest."""
        if self._newest is None:
            self._newest = max(self._index, key=_reach, default=None)
        return self._newest

    def find(self, diff: Diff) -> Diff | None:
        """Return the diff between the same snapshots, with its own flags and time."""
        return self._index.find(diff.begin, diff.end)

    def same(self, diff: Diff) -> Diff | None:
        """Return the diff that has the same file name: the same snapshots, flags and time."""
        found = self.find(diff)
        return found if found is not None and diff_name(found) == diff_name(diff) else None

    def put(self, diff: Diff, receipt: int) -> None:
        """Add a diff; one between the same snapshots is replaced."""
        self._index.erase(diff)
        self._index.add(diff)
        self._receipts.pop(diff, None)  # the key is compared by its snapshots only
        self._receipts[diff] = receipt
        if self._newest is not None and _reach(diff) >= _reach(self._newest):
            self._newest = diff

    def receipt(self, diff: Diff) -> int:
        """Return the number of the receipt that brought a diff which is here."""
        return self._receipts[diff]

    def remove(self, taken: Iterable[tuple[Diff, int]]) -> list[Diff]:
        """Remove diffs (with their receipts) that were not replaced since; return those removed."""
        removed = []
        for diff, receipt in taken:
            if self._receipts.get(diff) == receipt:
                del self._receipts[diff]
                self._index.erase(diff)
                removed.append(diff)
        if self._newest in removed:
            self._newest = None
        return removed

    def to_send(self, *, size_max_b: int, n_max: int) -> list[tuple[Diff, int]]:
        """Return what goes next as one diff, oldest first, with receipts; empty only if the set is."""
        diffs = self._index.to_send(size_max_b=size_max_b, n_max=n_max)
        return [(diff, self._receipts[diff]) for diff in diffs]


def _reach(diff: Diff) -> tuple[int, int]:
    return diff.end.gid_b, diff.begin.gid_b
