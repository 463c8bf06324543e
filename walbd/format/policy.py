"""What an archive does with old snapshots of a volume, as data (docs/policy.md).

Two rules thin out restore points. *Levels* keep fewer implicit points the older they are, and nothing else:
explicit snapshots and held ones pass. The *grid* says which of those that are left stay, explicit or not, in the
way of Proxmox Backup Server: `all=48h hourly=72 daily=31 weekly=8 monthly=12 yearly=3`. What neither needs is
merged away between two points that stay, or applied to the base below the oldest one.
"""

from __future__ import annotations

import itertools
import re
from typing import Annotated, Any, Final, Self

import msgspec
from msgspec import Meta

from walbd.errors import UsageError
from walbd.format.schema import convert

DAY_S: Final = 86_400
RULES: Final = ("last", "all", "hourly", "daily", "weekly", "monthly", "yearly")  # in the order they are asked
EVERYTHING: Final = "everything"

Span = Annotated[int, Meta(ge=0, le=1 << 33)]  # [s]
Many = Annotated[int, Meta(ge=0, le=1_000_000)]

_SPAN: Final = re.compile(r"([0-9]{1,10})([smhdw]?)")
_UNIT_S: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": DAY_S, "w": 7 * DAY_S}
_SPAN_HINT: Final = "write seconds, or a number with s, m, h, d or w, such as 48h"
_GRID_HINT: Final = "write for example: all=48h hourly=72 daily=31 weekly=8 monthly=12 yearly=3; or: everything"
_LEVEL_HINT: Final = "write AGE:INTERVAL, such as 30m:5m: one point each 5 minutes of those older than 30 minutes"


def parse_span(text: str) -> int:
    """Read a length of time [s]: `90`, `90s`, `5m`, `48h`, `2d`, `1w`. Raises UsageError."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise UsageError("not a length of time", hint=_SPAN_HINT, text=text)
    span_s = int(match[1]) * _UNIT_S[match[2]]
    if span_s > 1 << 33:
        raise UsageError("the length of time is too long", hint="about 272 years are the most", text=text)
    return span_s


def format_span(span_s: int) -> str:
    """Write a length of time in the largest unit that fits exactly; days only for more than three of them."""
    for unit, size_s in (("d", DAY_S), ("h", 3600), ("m", 60)):
        if span_s and span_s % size_s == 0 and (unit != "d" or span_s > 3 * DAY_S):
            return f"{span_s // size_s}{unit}"
    return f"{span_s}s"


def _count(rule: str, text: str) -> int:
    if not re.fullmatch(r"[0-9]{1,7}", text) or int(text) > 1_000_000:
        raise UsageError("not a number of points", hint=_GRID_HINT, rule=rule, value=text)
    return int(text)


class Grid(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How many points stay. None of the rules (all zero): every point stays."""

    last: Many = 0  # the newest so many points
    all_s: Span = 0  # every point that is not older [s]
    hourly: Many = 0  # the newest point of each of so many hours (and so on) that no rule before has covered
    daily: Many = 0
    weekly: Many = 0  # weeks begin on Monday; all periods are those of UTC
    monthly: Many = 0
    yearly: Many = 0

    @property
    def is_everything(self) -> bool:
        """Whether no point is ever dropped for its age."""
        return not any(self.value(rule) for rule in RULES)

    def value(self, rule: str) -> int:
        """Return the number of a rule; seconds for `all`."""
        found: int = getattr(self, "all_s" if rule == "all" else rule)
        return found

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str` writes; blanks or commas part the rules. Raises UsageError."""
        words = text.replace(",", " ").split()
        if words == [EVERYTHING]:
            return cls()
        if not words:
            raise UsageError("the retention names no rule", hint=_GRID_HINT)
        values: dict[str, int] = {}
        for word in words:
            rule, equals, value = word.partition("=")
            if rule not in RULES or not equals:
                raise UsageError("unknown retention rule", hint=_GRID_HINT, rule=word)
            name = "all_s" if rule == "all" else rule
            if name in values:
                raise UsageError("a retention rule is given twice", hint=_GRID_HINT, rule=rule)
            values[name] = parse_span(value) if rule == "all" else _count(rule, value)
        grid = cls(**values)
        if grid.is_everything:
            raise UsageError(
                "a retention that keeps nothing",
                hint=f"only the newest point would stay: say last=1; to drop nothing, say {EVERYTHING}",
                text=text,
            )
        return grid

    def __str__(self) -> str:
        words = [
            f"{rule}={format_span(self.value(rule)) if rule == 'all' else self.value(rule)}"
            for rule in ("all", "last", *RULES[2:])
            if self.value(rule)
        ]
        return " ".join(words) or EVERYTHING


class Level(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of implicit points older than this, one stays in each interval: the newest."""

    older_than_s: Annotated[int, Meta(ge=1, le=1 << 33)]
    interval_s: Annotated[int, Meta(ge=1, le=1 << 33)]

    def __str__(self) -> str:
        return f"{format_span(self.older_than_s)}:{format_span(self.interval_s)}"


def parse_levels(text: str) -> tuple[Level, ...]:
    """Read `5m:30s 30m:5m 4h:1h`, or `none`. Raises UsageError, also for levels that do not fit together."""
    words = text.replace(",", " ").split()
    if words in ([], ["none"]):
        return ()
    levels = []
    for word in words:
        age, colon, interval = word.partition(":")
        if not colon:
            raise UsageError("not a level", hint=_LEVEL_HINT, level=word)
        older_than_s, interval_s = parse_span(age), parse_span(interval)
        if not older_than_s or not interval_s:
            raise UsageError("a level needs an age and an interval above zero", hint=_LEVEL_HINT, level=word)
        levels.append(Level(older_than_s=older_than_s, interval_s=interval_s))
    check_levels(levels)
    return tuple(levels)


def format_levels(levels: tuple[Level, ...]) -> str:
    """Write what `parse_levels` reads."""
    return " ".join(map(str, levels)) or "none"


def check_levels(levels: list[Level] | tuple[Level, ...]) -> None:
    """Raise UsageError unless each level is coarser, and begins later, than the one before.

    Intervals that divide each other keep what a fine level chose eligible for the next; ages one interval apart
    keep the choice of a level from being needed before it was made.
    """
    if len(levels) > 16:
        raise UsageError("too many levels", hint="give at most 16", levels=len(levels))
    for fine, coarse in itertools.pairwise(levels):
        if coarse.interval_s % fine.interval_s or coarse.interval_s == fine.interval_s:
            raise UsageError(
                "the interval of a level is no multiple of the one before",
                hint="such as 5m:30s 30m:5m 4h:1h",
                level=str(coarse),
                before=str(fine),
            )
        if coarse.older_than_s < fine.older_than_s + fine.interval_s:
            raise UsageError(
                "a level begins too early after the one before",
                hint="its age must be larger, by at least the interval of the one before",
                level=str(coarse),
                before=str(fine),
            )


class Replication(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Another archive that gets the volume, again and again."""

    name: Annotated[str, Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,63}$")]
    dest: Annotated[str, Meta(min_length=3, max_length=300)]  # HOST:PORT
    interval_s: Annotated[int, Meta(ge=1, le=1 << 33)] = 3600  # from the end of one to the beginning of the next
    compress: Annotated[str, Meta(min_length=1, max_length=32)] = "zstd:1"
    enabled: bool = True

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `NAME=HOST:PORT[,INTERVAL[,COMPRESS]]`. Raises UsageError."""
        hint = "write NAME=HOST:PORT,INTERVAL, such as a1=backup2.example:12000,1h"
        name, _, rest = text.partition("=")
        parts = rest.split(",")
        host, colon, port = parts[0].rpartition(":")
        if not (colon and host) or not port.isdecimal() or len(parts) > 3:
            raise UsageError("not a replication", hint=hint, text=text)
        if not 0 < int(port) < 1 << 16:
            raise UsageError("not a port", hint=hint, text=text)
        values: dict[str, Any] = {"name": name, "dest": parts[0]}
        if len(parts) > 1:
            values["interval_s"] = parse_span(parts[1])
        if len(parts) > 2:
            values["compress"] = parts[2]
        try:
            return convert(values, cls)
        except msgspec.ValidationError as exc:
            raise UsageError("not a replication", hint=hint, text=text, reason=str(exc)) from exc

    def __str__(self) -> str:
        return f"{self.name}={self.dest},{format_span(self.interval_s)},{self.compress}" + (
            "" if self.enabled else " (off)"
        )


DEFAULT_LEVELS: Final = "5m:30s 30m:5m 4h:1h"
DEFAULT_KEEP: Final = "all=48h hourly=72 daily=31 weekly=8 monthly=12 yearly=3"


class Policy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the archive does with a volume by itself."""

    enabled: bool = True  # of everything here
    levels: tuple[Level, ...] = parse_levels(DEFAULT_LEVELS)
    keep: Grid = Grid.parse(DEFAULT_KEEP)
    apply: bool = True  # write what is older than the oldest point that stays into the base
    apply_interval_s: Span = DAY_S  # not more often than this, as it rewrites the base
    merge_max_b: Annotated[int, Meta(ge=0)] = 0  # a merge reads no more than this [byte]; 0: no limit
    replications: tuple[Replication, ...] = ()
    replica_keep_s: Span = 7 * DAY_S  # so long a replica that is in no list is waited for since it was seen

    def check(self) -> None:
        """Raise UsageError for what does not fit together."""
        check_levels(self.levels)
        names = [replication.name for replication in self.replications]
        if len(names) > 64:
            raise UsageError("too many replications", hint="give at most 64", replications=len(names))
        for name in names:
            if names.count(name) > 1:
                raise UsageError("two replications have the same name", name=name)

    @property
    def raw_s(self) -> int:
        """Points up to this age are never touched [s]."""
        return self.levels[0].older_than_s if self.levels else 0
