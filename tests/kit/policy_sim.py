"""A volume without files: labels arrive, the planner decides, and what it wants is done at once."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from walbd.format.meta import BaseState, Diff, DiffManager, Snapshot, merge_all
from walbd.format.planning import Action, Apply, Facts, Merge, Planner
from walbd.format.policy import Policy
from walbd.ids import Gid
from walbd.protocol.maintenance import Hold, ReplicaPosition


@dataclass
class SimVolume:
    """Snapshots at given times; sizes are made up: what is changed again counts once, up to `size_b`."""

    policy: Policy
    start: int  # time of the base [unix s]
    seed: int = 1
    size_b: int = 1 << 40
    check: Callable[[SimVolume, Action], None] = lambda *_: None
    holds: list[Hold] = field(default_factory=list)
    replicas: list[ReplicaPosition] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.base = BaseState(Snapshot.clean(0), timestamp=self.start)
        self.diffs = DiffManager()
        self.planner = Planner()
        self.gid = 0
        self.explicit = True  # whether the newest snapshot is
        self.time = self.now = self.start
        self.applied = 0
        self.chain_max = 0
        self.came_b = self.merged_b = self.applied_b = 0
        self.merges = self.applies = 0

    def facts(self) -> Facts:
        return Facts(
            base=self.base,
            diffs=self.diffs,
            policy=self.policy,
            now=self.now,
            holds=self.holds,
            replicas=self.replicas,
            needed={replica.gid for replica in self.replicas},
            applied=self.applied,
            newest=self.time,
        )

    def snapshot(self, time: int, *, explicit: bool = False) -> int:
        """A diff arrives, and with it a new snapshot; returns its gid."""
        size_b = self.rng.randrange(1, 1 << 20)
        self.diffs.add(
            Diff(
                Snapshot(Gid(self.gid), Gid(self.gid)),
                Snapshot(Gid(self.gid + 1), Gid(self.gid + 1)),
                mergeable=not self.explicit,
                timestamp=time,
                size_b=size_b,
            )
        )
        self.came_b += size_b
        self.gid += 1
        self.time = time
        self.explicit = explicit
        self.chain_max = max(self.chain_max, len(self.diffs))
        return self.gid

    def work(self) -> None:
        """Do what there is to do."""
        if not self.planner.is_due(self.time, self.now, len(self.diffs)):
            return
        while (action := self.planner.next(self.facts())) is not None:
            self.do(action)

    def do(self, action: Action) -> None:
        """Do one step."""
        self.check(self, action)
        match action:
            case Merge():
                for gid in action.release:
                    assert self.diffs.change_snapshot(gid, enable=False).changed
                found = list(action.diffs)
                if action.release:  # their flags have changed
                    found = [diff for old in action.diffs if (diff := self.diffs.find(old.begin, old.end))]
                assert len(found) == len(action.diffs) > 1
                assert all(diff in self.diffs for diff in found[:: len(found) - 1])
                total_b = sum(diff.size_b for diff in found)
                merged = (
                    merge_all(found)
                    if len(found) < 3
                    else Diff(
                        found[0].begin, found[-1].end, mergeable=found[0].mergeable, timestamp=found[-1].timestamp
                    )
                )
                self.diffs.add(replace(merged, size_b=min(total_b, self.size_b)))
                self.diffs.erase_all(found)
                self.merged_b += total_b
                self.merges += 1
            case Apply():
                diffs = self.diffs.to_apply(self.base, action.gid)
                assert diffs
                self.applied_b += sum(diff.size_b for diff in diffs)
                self.base = self.base.end_applying(diffs)
                assert self.base.begin.gid_b == action.gid
                self.diffs.erase_before(action.gid)
                self.applied = self.now
                self.applies += 1

    def gids(self) -> list[int]:
        """Generations that can be restored."""
        return [point.gid for point in self.diffs.restorable(self.base, all_points=True)]
