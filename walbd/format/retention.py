"""Which restore points stay, and why (docs/policy.md, "Which points stay").

Time is that of the snapshots. It is counted back from the newest point or from the clock, whichever is earlier:
a clock that jumps drops nothing, and a point dated later than that stays and counts for no rule.
"""

from __future__ import annotations

import datetime as dt
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, Protocol

import msgspec

from walbd.format.meta import RestorePoint
from walbd.format.policy import DAY_S, RULES, Grid, Level, Policy, format_span

_HOUR_S: Final = 3600
_WEEK_S: Final = 7 * DAY_S
_MONTH_S: Final = 28 * DAY_S
_YEAR_S: Final = 365 * DAY_S
_EPOCH_DAY: Final = dt.date(1970, 1, 1).toordinal()
_FIRST_DAY: Final = -_EPOCH_DAY + 1  # 0001-01-01
_LAST_DAY: Final = dt.date.max.toordinal() - _EPOCH_DAY


class HoldLike(Protocol):
    """A hold: the point `gid` stays until `until` [unix s], for ever if that is 0 (`is_holding`)."""

    @property
    def gid(self) -> int: ...
    @property
    def reason(self) -> str: ...
    @property
    def until(self) -> int: ...


class ReplicaLike(Protocol):
    """Where a replica stands."""

    @property
    def node(self) -> str: ...
    @property
    def gid(self) -> int: ...


class Verdict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of one restore point."""

    gid: int
    timestamp: int
    explicit: bool
    kept: bool
    rules: tuple[str, ...]  # that keep it; or that drop it: "thinned 5m", "no rule"
    until: int = 0  # kept at least until then if backups go on as before [unix s]; 0: no end is in sight


class Period(msgspec.Struct, frozen=True):
    """A kind of calendar period; `number` is the same for all times of one period. All in UTC."""

    rule: str
    number: Callable[[int], int]
    size_s: int  # of the shortest


def _day(timestamp: int) -> int:
    return timestamp // DAY_S


def _week(timestamp: int) -> int:
    return (timestamp // DAY_S + 3) // 7  # 1970-01-01 was a Thursday: weeks begin on Monday, as in ISO 8601


def _month(timestamp: int) -> int:
    return _month_of_day(timestamp // DAY_S)


def _year(timestamp: int) -> int:
    return _month_of_day(timestamp // DAY_S) // 12


@lru_cache(maxsize=4096)
def _month_of_day(day: int) -> int:
    date = dt.date.fromordinal(min(max(day, _FIRST_DAY), _LAST_DAY) + _EPOCH_DAY)
    return date.year * 12 + date.month - 1


PERIODS: Final = (
    Period("hourly", lambda timestamp: timestamp // _HOUR_S, _HOUR_S),
    Period("daily", _day, DAY_S),
    Period("weekly", _week, _WEEK_S),
    Period("monthly", _month, _MONTH_S),
    Period("yearly", _year, _YEAR_S),
)
assert tuple(period.rule for period in PERIODS) == RULES[2:]


def reference_time(newest: int, now: int) -> int:
    """Return the time that ages are counted back from."""
    return min(newest, now)


def is_holding(hold: HoldLike, reference: int) -> bool:
    """Tell whether a hold counts at a reference time: a clock that jumps ahead must not end it either."""
    return hold.until == 0 or hold.until > reference


def limits(levels: Sequence[Level], reference: int) -> list[int]:
    """Return for each level the time below which it counts: an end of one of its intervals."""
    return [(reference - level.older_than_s) // level.interval_s * level.interval_s for level in levels]


def level_at(levels: Sequence[Level], level_limits: Sequence[int], timestamp: int) -> Level | None:
    """Return the coarsest level that counts for a point of this time; None while the point is raw."""
    for level, limit in zip(reversed(levels), reversed(level_limits), strict=True):
        if timestamp < limit:
            return level
    return None


def explain(
    points: Sequence[RestorePoint],
    holds: Iterable[HoldLike],
    replicas: Iterable[ReplicaLike],
    policy: Policy,
    now: int,
    *,
    base_gid: int | None = None,
    with_until: bool = True,
) -> list[Verdict]:
    """Say of each of `points` (ascending by gid) whether it stays, by which rules, and until when at least.

    The newest point, held ones, those where a replica stands and future-dated ones always stay. `base_gid`: the
    point that the base image is; levels do not drop it, as it cannot be merged away. Points that a policy which
    is not enabled would drop are kept. Without `with_until` it is quicker, and nothing is said of ends.
    """
    if not points:
        return []
    reference = reference_time(points[-1].timestamp, now)
    because = _protected(points, holds, replicas, reference)
    thinned = thin(points, policy.levels, reference, base_gid)
    left = [
        point
        for i, point in enumerate(points)
        if not thinned[i] and point.timestamp <= reference and not _is_held(because.get(point.gid))
    ]
    rules = grid_rules(left, policy.keep, reference)
    ends = _ends(left, points, policy, reference) if with_until else {}
    keeps_everything = policy.keep.is_everything
    held_until = {hold.gid: hold.until for hold in holds if is_holding(hold, reference)}
    verdicts = []
    for i, point in enumerate(points):
        why = because.get(point.gid, [])
        level = thinned[i]
        rule = rules.get(point.gid)
        by_grid = level is None and (rule is not None or keeps_everything)
        kept = bool(why) or by_grid
        words = list(why)
        if by_grid:
            words.append(rule or "everything")
            if not point.explicit and policy.levels and point.timestamp <= reference:
                own = level_at(policy.levels, limits(policy.levels, reference), point.timestamp)
                words.append(f"each {format_span(own.interval_s)}" if own is not None else "raw")
        elif not kept:
            words.append(f"thinned {format_span(level.interval_s)}" if level is not None else "no rule")
        until = ends.get(point.gid, 0) if kept else 0
        if why:
            hold_end = held_until.get(point.gid)
            until = max(until, hold_end) if why == [w for w in why if _is_hold(w)] and hold_end else 0
        if not kept and not policy.enabled:
            kept, words = True, ["policy off"]
        verdicts.append(
            Verdict(
                gid=point.gid,
                timestamp=point.timestamp,
                explicit=point.explicit,
                kept=kept,
                rules=tuple(words),
                until=until,
            )
        )
    return verdicts


def thin(
    points: Sequence[RestorePoint], levels: Sequence[Level], reference: int, base_gid: int | None
) -> list[Level | None]:
    """Return for each point the level that drops it: it is implicit and not the newest of its interval.

    Of points in a row: should times go back, a point of an interval that is met again stays as well.
    """
    level_limits = limits(levels, reference)
    dropped: list[Level | None] = []
    for i, point in enumerate(points):
        level = None
        if i + 1 < len(points) and not point.explicit and point.gid != base_gid:
            level = level_at(levels, level_limits, point.timestamp)
            if level is not None:
                size_s = level.interval_s
                if points[i + 1].timestamp // size_s != point.timestamp // size_s:
                    level = None
        dropped.append(level)
    return dropped


def grid_rules(points: Sequence[RestorePoint], grid: Grid, reference: int) -> dict[int, str]:
    """Return by gid which rule keeps a point, as Proxmox Backup Server decides it.

    The rules are asked in their order, each from the newest point on. A calendar rule keeps the newest point of
    each period, unless a rule before has kept one of that period; the others of the period are dropped, and no
    later rule takes them. It ends when it has kept as many as its number says; older points are the next rule's.
    """
    rules: dict[int, str] = {}
    marked: set[int] = set()  # kept or dropped
    newest_first = sorted(points, key=lambda point: (point.timestamp, point.gid), reverse=True)

    def keep(point: RestorePoint, rule: str) -> None:
        rules[point.gid] = rule
        marked.add(point.gid)

    for point in newest_first[: grid.last]:
        keep(point, "last")
    for point in newest_first:
        if grid.all_s and point.gid not in marked and point.timestamp >= reference - grid.all_s:
            keep(point, "all")
    for period in PERIODS:
        count = grid.value(period.rule)
        if not count:
            continue
        covered = {period.number(point.timestamp) for point in newest_first if point.gid in rules}
        taken: set[int] = set()
        for point in newest_first:
            if point.gid in marked:
                continue
            number = period.number(point.timestamp)
            if number in covered:
                continue
            if number in taken:
                marked.add(point.gid)
                continue
            if len(taken) >= count:
                break
            taken.add(number)
            keep(point, period.rule)
    return rules


def _protected(
    points: Sequence[RestorePoint],
    holds: Iterable[HoldLike],
    replicas: Iterable[ReplicaLike],
    reference: int,
) -> Mapping[int, list[str]]:
    """Return what keeps points whatever the rules say, by gid."""
    because: dict[int, list[str]] = {points[-1].gid: ["newest"]}
    for point in points:
        if point.timestamp > reference:
            because.setdefault(point.gid, []).append("future")
    for hold in holds:
        if is_holding(hold, reference):
            because.setdefault(hold.gid, []).append(f"hold: {hold.reason}")
    for replica in replicas:
        because.setdefault(replica.gid, []).append(f"replica: {replica.node}")
    return because


def _is_hold(word: str) -> bool:
    return word.startswith("hold: ")


def _is_held(words: list[str] | None) -> bool:
    """Held points count for no rule of the grid: another point of the period stays too."""
    return words is not None and any(map(_is_hold, words))


def _ends(
    left: Sequence[RestorePoint], points: Sequence[RestorePoint], policy: Policy, reference: int
) -> dict[int, int]:
    """Return until when at least the rules keep the points they keep now, if each coming period gets a point."""
    ends: dict[int, int] = {}
    following = {point.gid: after for point, after in itertools.pairwise(points)}
    for i, point in enumerate(left):
        found = [end for end in (_level_end(point, following.get(point.gid), policy, reference),) if end]
        after = left[i + 1] if i + 1 < len(left) else None
        if not policy.keep.is_everything and after is not None:
            found.append(_grid_end(point, after, policy.keep))
        ends[point.gid] = max(min(found), reference) if found else 0
    return ends


def _level_end(point: RestorePoint, after: RestorePoint | None, policy: Policy, reference: int) -> int:
    """Return when a level drops the point; 0: none does."""
    if point.explicit or after is None:
        return 0
    for level in policy.levels:
        number = point.timestamp // level.interval_s
        if after.timestamp // level.interval_s == number:
            end = (number + 1) * level.interval_s + level.older_than_s
            return end if end > reference else 0
    return 0


def _grid_end(point: RestorePoint, after: RestorePoint, grid: Grid) -> int:
    """Return a time until which the grid keeps the point at least: rule after rule, as it is handed on."""
    window = grid.all_s
    is_first = not window and not grid.last
    for period in PERIODS:
        count = grid.value(period.rule)
        if period.number(after.timestamp) == period.number(point.timestamp):
            break
        if count:
            window += (count - is_first) * period.size_s  # the first rule spends one on the period of today
            is_first = False
    return point.timestamp + window
