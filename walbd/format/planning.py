"""What an archive's policy does next with the diffs of a volume (docs/policy.md, "What is done").

One step at a time, each of which is right by itself:

    finish       an apply that was interrupted, before everything else
    merge        the diffs between two points that stay, when no point between them does
    apply        up to the oldest point that stays, when retention has dropped points below it

Work is found in two ways. Each level looks only at what has become old enough since it last looked, so that a
new snapshot costs nothing until an interval is complete. A look at everything, once in an hour of the volume's
time and after `reset`, finds the rest: what retention drops, and what was protected and is so no more.

How often a block is rewritten is bounded. A level merges an interval once, when it is complete. What retention
drops is merged when the next coarser calendar period is complete, not point by point.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from walbd.format.meta import (
    BaseState,
    Diff,
    DiffManager,
    RestorePoint,
    Snapshot,
    can_merge,
    merge,
)
from walbd.format.policy import DAY_S, Policy
from walbd.format.retention import (
    PERIODS,
    HoldLike,
    ReplicaLike,
    Verdict,
    explain,
    is_holding,
    limits,
    reference_time,
)

LOOK_S: Final = 3600  # a look at everything comes at least this often, in time of the volume
FRONT_MAX: Final = 64  # diffs below the oldest point that stays wait for an apply, unless they are more
_NEVER: Final = 1 << 62
_RAW: Final = -1  # the rank of a point within the shortest period
_LAST: Final = 99  # above all ranks


@dataclass(frozen=True)
class Merge:
    """Make one diff of these, which follow one another; the points `release` are explicit and dropped."""

    diffs: tuple[Diff, ...]
    release: tuple[int, ...] = ()

    @property
    def gid_b(self) -> int:
        return self.diffs[0].begin.gid_b

    @property
    def gid_e(self) -> int:
        return self.diffs[-1].end.gid_b

    @property
    def size_b(self) -> int:
        """What is read [byte]."""
        return sum(diff.size_b for diff in self.diffs)

    def __str__(self) -> str:
        return f"merge {len(self.diffs)} diffs {self.gid_b}-->{self.gid_e}"


@dataclass(frozen=True)
class Apply:
    """Write the diffs up to a generation into the base."""

    gid: int
    finish: bool = False  # an apply was interrupted on the way to it

    def __str__(self) -> str:
        return f"{'finish the apply' if self.finish else 'apply'} up to {self.gid}"


Action = Merge | Apply


@dataclass(frozen=True)
class Facts:
    """What is known of a volume when its next step is chosen."""

    base: BaseState
    diffs: DiffManager
    policy: Policy
    now: int  # [unix s]
    holds: Sequence[HoldLike] = ()
    replicas: Sequence[ReplicaLike] = ()  # no merge may lead past one of them
    needed: Collection[int] = ()  # generations of replicas that no apply may pass either
    applied: int = 0  # when the last apply began [unix s]
    newest: int = 0  # time of the newest snapshot [unix s]
    merge_max: int = 256  # diffs that one merge reads

    @property
    def protected(self) -> set[int]:
        """Generations that must stay the end of a diff."""
        held = {hold.gid for hold in self.holds if is_holding(hold, reference_time(self.newest, self.now))}
        return held | {replica.gid for replica in self.replicas}


class _Node(NamedTuple):
    """A state on the chain, and the diff that leads to it."""

    diff: Diff
    after: Snapshot
    explicit: bool = False  # the diff that follows may not be merged onto this one

    @property
    def time(self) -> int:
        return self.diff.timestamp

    @property
    def gid(self) -> int:
        return self.after.gid_b


@dataclass
class _Level:
    """How far a level has looked."""

    cursor: Snapshot  # everything up to here is as the level wants it
    done: int = -_NEVER  # its limit then


@dataclass
class Planner:
    """Chooses steps for one volume. It remembers only where it has looked; `reset` is always safe."""

    due: int = -_NEVER  # nothing can be found before the volume's time reaches this [unix s]
    _levels: list[_Level] = field(default_factory=list)
    _look: int = -_NEVER  # when to look at everything again, in the volume's time
    _looked: int = -_NEVER  # when that was done last, by the clock
    _count_max: int = 0  # or when so many diffs are there, as when times go back

    def reset(self) -> None:
        """Look at everything again: the policy, a hold, or something by another hand has changed."""
        self.due = self._look = -_NEVER
        self._levels = []

    def is_due(self, newest: int, now: int, count: int) -> bool:
        """Tell whether there may be something to do, `count` diffs being there; cheap."""
        return reference_time(newest, now) >= self.due or self._is_look_due(now, count)

    def _is_look_due(self, now: int, count: int) -> bool:
        return count >= self._count_max or not -1 <= now - self._looked < LOOK_S

    def next(self, facts: Facts, *, avoid: Callable[[Action], bool] = lambda _: False) -> Action | None:
        """Return the next step, but none that `avoid` refuses; None: nothing until `is_due` says so again."""
        if not facts.policy.enabled or facts.base.begin.is_none:
            self.due, self._looked, self._count_max = _NEVER, facts.now, _NEVER
            return None
        if facts.base.end is not None:
            finish = Apply(facts.base.end.gid_b, finish=True)
            return None if avoid(finish) else finish
        reference = reference_time(facts.newest, facts.now)
        if len(self._levels) != len(facts.policy.levels):
            self._levels = [_Level(facts.base.begin) for _ in facts.policy.levels]
        for number in range(len(self._levels)):
            for action in self._look_at_level(facts, number, reference):
                if not avoid(action):
                    return action
        if reference >= self._look or self._is_look_due(facts.now, len(facts.diffs)):
            for action in look_at_everything(facts):
                if not avoid(action):
                    return action
            self._look = (reference // LOOK_S + 1) * LOOK_S
            self._looked = facts.now
            self._count_max = 2 * len(facts.diffs) + 256
        self.due = min([self._look, *self._next_limits(facts.policy)])
        return None

    def _next_limits(self, policy: Policy) -> Iterator[int]:
        for level, own in zip(self._levels, policy.levels, strict=True):
            yield level.done + own.interval_s + own.older_than_s

    def _look_at_level(self, facts: Facts, number: int, reference: int) -> Iterator[Action]:
        """Yield the merges of the intervals that are complete and not looked at yet; then remember the place.

        A place is passed when its merge is done, or is not wanted now; the next look at everything finds it then.
        """
        level, own = self._levels[number], facts.policy.levels[number]
        limit = limits([own], reference)[0]
        if limit <= level.done:
            return
        base = facts.base.begin
        if level.cursor.gid_b < base.gid_b or _is_inside(facts.diffs, level.cursor):
            level.cursor = base  # applied, or merged by another hand
        protected = facts.protected
        run: list[_Node] = []
        for node in _nodes(facts.diffs, level.cursor):
            if run:
                last = run[-1]
                if last.gid in protected or (
                    last.after.is_clean
                    and (last.explicit or last.time // own.interval_s != node.time // own.interval_s)
                ):
                    yield from _merges(run, facts)
                    level.cursor = last.after
                    run = []
            if node.after.is_clean and node.time >= limit:
                break
            run.append(node)
        level.done = limit


def look_at_everything(facts: Facts) -> Iterator[Action]:
    """Yield all steps that verdicts on all points ask for, the most urgent first."""
    base, diffs = facts.base, facts.diffs
    nodes = list(_nodes(diffs, base.begin))
    if not nodes:
        return
    points = diffs.restorable(base, all_points=True)
    verdicts = verdicts_on(points, facts, with_until=False)
    kept = {verdict.gid: verdict.kept for verdict in verdicts}
    retired = {verdict.gid for verdict in verdicts if "no rule" in verdict.rules}
    yield from _applies(facts, nodes, kept, retired)
    ranks = _ranks(nodes, facts.policy)
    protected = facts.protected
    oldest_raw = reference_time(facts.newest, facts.now) - facts.policy.raw_s
    held = {hold.gid for hold in facts.holds}
    run: list[_Node] = []
    marks: list[int] = []  # for each state of the run: the shortest period that it need not outlast, see _segments
    waits_for_apply = facts.policy.apply and not kept.get(base.begin.gid_b) and not facts.needed
    for i, node in enumerate(nodes[:-1]):
        run.append(node)
        if node.gid not in protected and (not node.after.is_clean or not kept[node.gid]):
            marks.append(ranks[i] if node.gid in retired else _RAW - 1)
            continue
        is_left_to_apply = waits_for_apply and max(marks, default=_RAW - 1) >= _RAW and len(run) <= FRONT_MAX
        if node.time <= oldest_raw and not is_left_to_apply:
            marks.append(_LAST if node.gid in held else ranks[i])
            for segment in _segments(run, marks, closed=True):
                yield from _merges(segment, facts)
        run, marks, waits_for_apply = [], [], False
    while run and run[-1].time > oldest_raw:
        run.pop()
    for segment in _segments(run, marks[: len(run)], closed=False):
        yield from _merges(segment, facts)


def _segments(run: Sequence[_Node], marks: Sequence[int], *, closed: bool) -> Iterator[Sequence[_Node]]:
    """Yield the parts of a run that may become one diff now, those of short periods first.

    All points of the run are dropped, but the last one of a run that is closed. What a level drops can go at
    once. What retention drops goes when a longer period is complete than any that ends inside: else it would be
    rewritten point by point.
    """
    for rank in sorted(set(marks)):
        if rank <= _RAW:
            continue
        begin = 0
        for end, mark in enumerate(marks, 1):
            if mark >= rank:
                if end - begin > 1:
                    yield run[begin:end]
                begin = end
    if closed and max(marks[:-1], default=_RAW - 1) < _RAW:
        yield run


def verdicts_on(points: Sequence[RestorePoint], facts: Facts, *, with_until: bool = True) -> list[Verdict]:
    """Return the verdict on each of `points`, which are all restore points; the diffs are not looked at."""
    base_gid = facts.base.begin.gid_b if facts.base.begin.is_clean and not facts.base.is_applying else None
    return explain(
        points,
        facts.holds,
        facts.replicas,
        facts.policy,
        facts.now,
        base_gid=base_gid,
        with_until=with_until,
    )


def _applies(
    facts: Facts, nodes: Sequence[_Node], kept: dict[int, bool], retired: Collection[int]
) -> Iterator[Action]:
    """Yield the apply up to the oldest point that stays, if retention has dropped a point below it."""
    policy, base = facts.policy, facts.base
    waited = facts.now - facts.applied
    if not policy.apply or 0 <= waited < policy.apply_interval_s or kept.get(base.begin.gid_b):
        return
    needed = min((gid for gid in facts.needed if gid >= base.begin.gid_b), default=_NEVER)
    goal = None
    dropped = base.begin.gid_b in retired
    for node in nodes:
        if node.gid > needed:
            break
        if node.after.is_clean:
            if dropped:
                goal = node.gid
            if kept[node.gid]:
                break
            dropped = dropped or node.gid in retired
    if goal is not None:
        yield Apply(goal)


def _is_inside(diffs: DiffManager, state: Snapshot) -> bool:
    """Tell whether the chain leads past a state instead of to it."""
    first = next(diffs.steps(state), None)
    return first is not None and first[0].begin.gid_b < state.gid_b


def _nodes(diffs: DiffManager, start: Snapshot) -> Iterator[_Node]:
    """Yield the states after `start`; the collection must not change meanwhile."""
    waiting: tuple[Diff, Snapshot] | None = None
    for diff, after in diffs.steps(start):
        if waiting is not None:
            yield _Node(*waiting, explicit=not diff.mergeable)
        waiting = diff, after
    if waiting is not None:
        yield _Node(*waiting, explicit=True)


def _ranks(nodes: Sequence[_Node], policy: Policy) -> list[int]:
    """Return for each state but the last the longest period that ends with it: its number, or _RAW."""
    numbers: list[Callable[[int], int]] = [
        lambda time, size_s=level.interval_s: time // size_s  # type: ignore[misc]
        for level in policy.levels
        if level.interval_s <= DAY_S
    ]
    numbers += [period.number for period in PERIODS]
    ranks = []
    for node, after in itertools.pairwise(nodes):
        rank = len(numbers) - 1
        while rank >= 0 and numbers[rank](node.time) == numbers[rank](after.time):
            rank -= 1
        ranks.append(rank)
    return ranks


def _merges(run: Sequence[_Node], facts: Facts) -> Iterator[Merge]:
    """Yield the merges that make one diff of a run, or as few as the limits allow; smallest first.

    Every state inside may vanish, except dirty ones that are protected.
    """
    if len(run) < 2:
        return
    if all(_follows_plainly(before, node) for before, node in itertools.pairwise(run)):
        yield from _within_limits([node.diff for node in run], [], facts)
        return
    part: list[Diff] = []
    release: list[int] = []
    running: Diff | None = None
    for node, before in zip(run, [None, *run], strict=False):
        diff = node.diff
        if running is not None and before is not None:
            freed = diff
            if not diff.mergeable and before.after.is_clean:
                freed = replace(diff, mergeable=True)
            if can_merge(running, freed):
                running = merge(running, freed)
                if freed is not diff:
                    release.append(before.gid)
                part.append(diff)
                continue
            yield from _within_limits(part, release, facts)
        running, part, release = diff, [diff], []
    yield from _within_limits(part, release, facts)


def _follows_plainly(before: _Node, node: _Node) -> bool:
    """Tell in short whether two diffs can be merged; the rules need not be asked for what is usual."""
    first, second = before.diff, node.diff
    return (
        second.mergeable
        and first.end == second.begin
        and first.is_clean
        and second.is_clean
        and not (first.comp or second.comp)
    )


def _within_limits(part: list[Diff], release: list[int], facts: Facts) -> Iterator[Merge]:
    """Yield the merge of these diffs; if they are too many, or too large, of the smallest group that fits."""
    if len(part) < 2:
        return
    size_max_b = facts.policy.merge_max_b
    if len(part) <= facts.merge_max and (not size_max_b or sum(d.size_b for d in part) <= size_max_b):
        yield Merge(tuple(part), tuple(release))
        return
    groups: list[list[Diff]] = [[]]
    size_b = 0
    for diff in part:
        size_b += diff.size_b
        if groups[-1] and (len(groups[-1]) >= facts.merge_max or (size_max_b and size_b > size_max_b)):
            groups.append([])
            size_b = diff.size_b
        groups[-1].append(diff)
    best = min((group for group in groups if len(group) > 1), key=_average_b, default=None)
    if best is not None:
        inside = {diff.begin.gid_b for diff in best[1:]}
        yield Merge(tuple(best), tuple(gid for gid in release if gid in inside))


def _average_b(group: Sequence[Diff]) -> float:
    return sum(diff.size_b for diff in group) / len(group)


def states_inside(diffs: Sequence[Diff]) -> set[int]:
    """Return the generations that vanish when these diffs, which follow one another, become one."""
    return {diff.begin.gid_b for diff in diffs[1:]} | {diff.end.gid_b for diff in diffs[:-1]}


def is_right(action: Merge, facts: Facts) -> bool:
    """Tell whether a merge is still right: its diffs are there, and nothing was protected inside it meanwhile."""
    if states_inside(action.diffs) & facts.protected:
        return False
    return all(facts.diffs.find(diff.begin, diff.end) is not None for diff in action.diffs)
