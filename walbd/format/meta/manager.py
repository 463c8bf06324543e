"""What can be reached from a base image with a set of diffs (docs/metadata.md, From the base).

One manager per volume in an archive, one per volume and archive in a proxy. An in-progress state names a
*minimum*: the diffs that must be applied together before the base means anything. No list made here stops
short of it.
"""

from __future__ import annotations

from walbd.errors import HistoryBroken
from walbd.format.meta.diff import Diff, apply_all
from walbd.format.meta.errors import NotReachable
from walbd.format.meta.index import DiffIndex
from walbd.format.meta.snapshot import Snapshot
from walbd.format.meta.state import BaseState, RestorePoint


class DiffManager(DiffIndex):
    """A set of diffs with one identity each, and the lists that work on a base image needs.

    `n_max` is a limit on files open at once; 0 means none. Lists are oldest first.
    """

    def minimum(self, state: BaseState) -> list[Diff]:
        """Return the diffs that finish an apply in progress; empty if there is none.

        Normally the chain up to the target. If that does not reach it because the chain jumps over it, the
        way that stays below the target, else the shortest part of the chain that passes it. Raises
        HistoryBroken when no stored diffs reach it: the base cannot be used any more.
        """
        if state.end is None:
            return []
        target = state.end.gid_b
        diffs = self.chain_to_gid(state.begin, target)
        if apply_all(state.begin, diffs).gid_b >= target:
            return diffs
        below = DiffManager(diff for diff in self.get_range(0, target) if diff.end.gid_b <= target)
        diffs = below.chain(state.begin)
        if apply_all(state.begin, diffs).gid_b >= target:
            return diffs
        diffs = []
        for diff, after in self.steps(state.begin):
            diffs.append(diff)
            if after.gid_b >= target:
                return diffs
        raise HistoryBroken(
            "the diffs that finish the interrupted apply are missing",
            hint="replicate from another archive with resync, or run a full backup",
            base=state,
        )

    def to_apply(self, state: BaseState, gid: int, *, n_max: int = 0) -> list[Diff]:
        """Return the next round of diffs to apply on the way to `gid`; empty: nothing is left to do.

        It may pass `gid` and `n_max` to finish an apply in progress.
        """
        diffs = self.minimum(state)
        room = max(n_max - len(diffs), 0) if n_max else None
        return diffs + self.chain_to_gid(apply_all(state.begin, diffs), gid, n_max=room)

    def to_materialise(self, state: BaseState, gid: int, *, clean: bool) -> list[Diff]:
        """Return the diffs that make exactly snapshot `gid` of the base image; raises NotReachable.

        `clean`: the result must be clean. Otherwise it may be dirty, with `gid` as its lower end.
        """
        diffs = self.minimum(state)
        after = apply_all(state.begin, diffs)
        if state.is_applying and after.gid_b > gid:
            raise _unreachable("an interrupted apply has already passed this generation", state, gid)
        rest = self.chain_to_gid(after, gid)
        after = apply_all(after, rest)
        if after.gid_b != gid or after.is_none:
            raise _unreachable("no diff ends at this generation", state, gid)
        if clean and not after.is_clean:
            raise _unreachable("the image is dirty at this generation", state, gid)
        return diffs + rest

    def to_restore(self, state: BaseState, gid: int, *, n_max: int = 0) -> list[Diff]:
        """Return the first round of diffs on the way to clean snapshot `gid`; raises NotReachable.

        Further rounds continue from the state after this one, until `gid` is reached.
        """
        diffs = self.to_materialise(state, gid, clean=True)
        return diffs[: max(n_max, len(self.minimum(state)))] if n_max else diffs

    def to_scan(self, state: BaseState, gid: int, *, n_max: int = 0) -> list[Diff]:
        """Return the diffs to lay over the base image to read it as of `gid`, which may be dirty.

        A scan cannot be split: raises NotReachable if they are more than `n_max`, too.
        """
        diffs = self.to_materialise(state, gid, clean=False)
        if n_max and len(diffs) > n_max:
            raise NotReachable(
                "too many diffs for one scan",
                hint="merge diffs, or apply some, or raise the limit on open files",
                gid=gid,
                diffs=len(diffs),
                n_max=n_max,
            )
        return diffs

    def latest(self, state: BaseState) -> BaseState:
        """Return the newest state that can be reached."""
        return self._follow(state, clean=False)

    def oldest_clean(self, state: BaseState) -> BaseState:
        """Return the first clean state at or above the base; raises NotReachable if all are dirty."""
        found = self._follow(state, clean=True)
        if not found.begin.is_clean or found.begin.is_none:
            raise NotReachable(
                "no clean snapshot can be reached yet", hint="wait until more logs have arrived", base=state
            )
        return found

    def restorable(self, state: BaseState, *, all_points: bool = False) -> list[RestorePoint]:
        """Return the generations that can be restored, ascending: the base if clean, then explicit snapshots.

        The newest counts as explicit. `all_points` adds the implicit ones. The base's row is never explicit.
        """
        after, timestamp = self._finished(state)
        if after.is_none:
            return []
        points = [RestorePoint(after.gid_b, timestamp, explicit=False)] if after.is_clean else []
        waiting: RestorePoint | None = None  # is explicit if the diff after it is not mergeable
        for diff, snapshot in self.steps(after):
            if waiting is not None and (all_points or not diff.mergeable):
                points.append(RestorePoint(waiting.gid, waiting.timestamp, explicit=not diff.mergeable))
            waiting = RestorePoint(snapshot.gid_b, diff.timestamp, explicit=True) if snapshot.is_clean else None
        if waiting is not None:
            points.append(waiting)
        return points

    def gc(self, state: BaseState) -> list[Diff]:
        """Remove every diff that leads nowhere from the base, those beyond a gap too; return the removed.

        Raises HistoryBroken and removes nothing when an apply in progress could not be finished.
        """
        needed = self.minimum(state)
        return self.keep_only([*self.chain(state.begin), *needed, *self.chain(apply_all(state.begin, needed))])

    def _finished(self, state: BaseState) -> tuple[Snapshot, int]:
        """Return the snapshot, and its time, that the base is once an apply in progress is finished."""
        diffs = self.minimum(state)
        timestamp = diffs[-1].timestamp if diffs else state.timestamp
        return apply_all(state.begin, diffs), timestamp

    def _follow(self, state: BaseState, *, clean: bool) -> BaseState:
        after, timestamp = self._finished(state)
        if not (clean and after.is_clean):
            for diff, snapshot in self.steps(after):
                after, timestamp = snapshot, diff.timestamp
                if clean and after.is_clean:
                    break
        return BaseState(after, timestamp=timestamp)


def _unreachable(why: str, state: BaseState, gid: int) -> NotReachable:
    return NotReachable(why, hint="choose one of the restorable generations", gid=gid, base=state)
