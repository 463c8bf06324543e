"""Hypothesis strategies for labels, and label histories made by the two rules that produce diffs."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import strategies as st

from walbd.format.meta import BaseState, Diff, DiffManager, Snapshot, apply, hash_backup_diff, merge_all
from walbd.format.meta.times import TIME_MAX_S, TIME_MIN_S
from walbd.ids import NO_GID, Gid


def snapshots(gid_max: int) -> st.SearchStrategy[Snapshot]:
    """Any snapshot with gids up to `gid_max`."""
    gids = st.integers(0, gid_max)
    return st.tuples(gids, gids).map(lambda pair: Snapshot(Gid(min(pair)), Gid(max(pair))))


@st.composite
def diffs(draw: st.DrawFn, gid_max: int = 12, *, any_time: bool = False) -> Diff:
    """Any legal diff, mostly clean, with gids up to `gid_max` and sizes up to 10 bytes."""
    begin_b = draw(st.integers(0, gid_max - 1))
    end_b = draw(st.integers(begin_b + 1, gid_max))
    begin_e, end_e = begin_b, end_b
    if draw(st.integers(0, 3)) == 0:
        begin_e = draw(st.integers(begin_b, gid_max))
        end_e = draw(st.integers(max(begin_e, end_b), gid_max))
    return Diff(
        Snapshot(Gid(begin_b), Gid(begin_e)),
        Snapshot(Gid(end_b), Gid(end_e)),
        mergeable=draw(st.integers(0, 3)) > 0,
        comp=draw(st.integers(0, 7)) == 0,
        timestamp=draw(st.integers(TIME_MIN_S, TIME_MAX_S) if any_time else st.integers(0, 9)),
        size_b=draw(st.integers(0, 10)),
    )


GID_MAX = NO_GID - 1


@dataclass
class LabelHistory:
    """A base and diffs as an archive may come to hold them: logs, hash backups, merges, removal of parts."""

    rng: random.Random
    base: BaseState
    manager: DiffManager = field(default_factory=DiffManager)
    now: int = 0

    @property
    def latest(self) -> Snapshot:
        return self.manager.latest(self.base).begin

    def add_log(self) -> None:
        """A log diff: clean, begins where the latest has everything for sure."""
        self.now += 1
        begin = self.latest.gid_b
        self.manager.add(
            Diff(
                Snapshot.clean(begin),
                Snapshot.clean(begin + self.rng.randint(1, 3)),
                mergeable=self.rng.random() < 0.7,
                timestamp=self.now,
                size_b=self.rng.randint(1, 9),
            )
        )

    def add_hash_backup(self) -> None:
        """A dirty diff over the whole latest snapshot."""
        self.now += 1
        latest = self.latest
        begin = latest.gid_e + 1
        self.manager.add(
            hash_backup_diff(latest, Snapshot(Gid(begin), Gid(begin + self.rng.randint(1, 4))), self.now)
        )

    def merge_some(self, *, keep_parts: bool) -> bool:
        """Merge a random legal run, and remove its parts unless they should stay for a while."""
        run = self.manager.merge_candidates(self.rng.randint(0, self.latest.gid_b), n_max=self.rng.randint(2, 4))
        if len(run) < 2:
            return False
        merged = merge_all(run)
        if merged in self.manager:
            return False
        self.manager.add(merged)
        if not keep_parts:
            self.manager.erase_all(run)
        return True


def label_history(seed: int, n_steps: int = 14, *, merges: bool = True) -> LabelHistory:
    """Build a random history."""
    rng = random.Random(seed)
    dirty = rng.random() < 0.5
    history = LabelHistory(rng, BaseState(Snapshot(Gid(0), Gid(rng.randint(1, 6) if dirty else 0)), timestamp=1))
    for _ in range(n_steps):
        what = rng.random()
        if what < 0.75:
            history.add_log()
        elif what < 0.9:
            history.add_hash_backup()
        elif merges:
            history.merge_some(keep_parts=rng.random() < 0.5)
    return history


def apply_each(start: Snapshot, steps: list[Diff]) -> list[Snapshot]:
    """Return the snapshots passed on the way."""
    passed = [start]
    for step in steps:
        passed.append(apply(passed[-1], step))
    return passed
