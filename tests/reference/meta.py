"""Twin of the diff collection: every query by linear search, written like the rules in docs/metadata.md."""

from __future__ import annotations

from collections.abc import Iterable

from walbd.format.meta import Diff, Relation, Snapshot, apply, can_merge, merge, relation


class LinearDiffs:
    """A list of diffs in insertion order."""

    def __init__(self, diffs: Iterable[Diff]) -> None:
        self.diffs = list(diffs)

    def listing(self) -> list[Diff]:
        return sorted(self.diffs, key=lambda d: d.begin.gid_b)  # stable: then by insertion

    def get_range(self, gid_begin: int, gid_end: int) -> list[Diff]:
        return [d for d in self.listing() if gid_begin <= d.begin.gid_b < gid_end]

    def over(self, gid: int) -> set[Diff]:
        return {d for d in self.diffs if d.begin.gid_b <= gid < d.end.gid_b}

    def chain(self, start: Snapshot, gid_max: int | None = None, time_max: int | None = None) -> list[Diff]:
        found: list[Diff] = []
        while candidates := [d for d in self.diffs if relation(start, d) is Relation.APPLICABLE]:
            best = best_of(candidates)
            start = apply(start, best)
            if (gid_max is not None and start.gid_b > gid_max) or (
                time_max is not None and best.timestamp > time_max
            ):
                break
            found.append(best)
        return found

    def applicable_and_mergeable(self, start: Snapshot) -> list[Diff]:
        found: list[Diff] = []
        for diff in self.chain(start):
            if found:
                running = found[0]
                for other in found[1:]:
                    running = merge(running, other)
                if not can_merge(running, diff):
                    break
            found.append(diff)
        return found

    def merge_candidates(self, gid: int) -> list[Diff]:
        begins = [d.begin.gid_b for d in self.diffs if d.begin.gid_b >= gid]
        if not begins:
            return []
        running = best_of([d for d in self.diffs if d.begin.gid_b == min(begins)])
        found = [running]
        while candidates := [d for d in self.diffs if can_merge(running, d)]:
            found.append(best_of(candidates))
            running = merge(running, found[-1])
        return found

    def inside(self, gid_begin: int, gid_end: int) -> list[Diff]:
        """What gc_range removes."""
        return [
            d
            for d in self.listing()
            if gid_begin <= d.begin.gid_b < gid_end
            and d.end.gid_b <= gid_end
            and (d.begin.gid_b, d.end.gid_b) != (gid_begin, gid_end)
        ]

    def before(self, gid: int) -> list[Diff]:
        """What erase_before removes."""
        return [d for d in self.listing() if d.end.gid_b <= gid]


def best_of(diffs: list[Diff]) -> Diff:
    """Largest end, then largest begin; the rules say no more, so then the cleanest."""
    return sorted(diffs, key=lambda d: (-d.end.gid_b, -d.begin.gid_b, d.end.gid_e, d.begin.gid_e))[0]
