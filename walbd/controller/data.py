"""What the library hands out and takes: snapshots, diffs, base states, restore points, ways to send.

Each class writes itself with `str` and reads exactly that again. Times are `datetime` in UTC, None where a
server does not know one (written as `---`). The rules of labels are in docs/metadata.md; `walbd.format.meta`
does the reading and writing.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass, field
from typing import Final

from walbd.controller.constants import (
    CMPR_ZSTD,
    COMPRESS_NAMES,
    UINT64_MAX,
    DatetimeFormatDigits,
    DatetimeFormatPretty,
)
from walbd.controller.verify import (
    verify_compress_kind,
    verify_gid_range,
    verify_size_unit,
    verify_type,
    verify_u64,
)
from walbd.errors import UsageError
from walbd.format import meta
from walbd.ids import Gid
from walbd.units import parse_size

_EPOCH: Final = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)


def str_to_datetime(s: str, fmt: str = DatetimeFormatPretty) -> dt.datetime:
    """Read a time in UTC; `fmt` is DatetimeFormatPretty or DatetimeFormatDigits. Raises UsageError."""
    verify_type(s, str)
    verify_type(fmt, str)
    try:
        return dt.datetime.strptime(s, fmt).replace(tzinfo=dt.UTC)
    except ValueError as exc:
        raise UsageError("not a time", hint=f"the form is {fmt}, in UTC", text=s) from exc


def datetime_to_str(ts: dt.datetime, fmt: str = DatetimeFormatPretty) -> str:
    """Write a time; one with a zone is converted to UTC, one without is taken for UTC."""
    verify_type(ts, dt.datetime)
    verify_type(fmt, str)
    if fmt not in (DatetimeFormatPretty, DatetimeFormatDigits):
        raise UsageError(
            "unknown form of a time", hint="use DatetimeFormatPretty or DatetimeFormatDigits", fmt=fmt
        )
    return (ts.astimezone(dt.UTC) if ts.tzinfo is not None else ts).strftime(fmt)


def from_unix(timestamp: int) -> dt.datetime | None:
    """Return unix seconds as a time; 0 means not known."""
    return _EPOCH + dt.timedelta(seconds=timestamp) if timestamp else None


def to_unix(ts: dt.datetime | None) -> int:
    """Return a time as unix seconds; one without zone is taken for UTC."""
    if ts is None:
        return 0
    aware = ts if ts.tzinfo is not None else ts.replace(tzinfo=dt.UTC)
    return (aware - _EPOCH) // dt.timedelta(seconds=1)


@dataclass
class Snapshot:
    """`|B|` when clean, `|B,E|` when dirty: between which generations each block of an image stands."""

    gidB: int = 0
    gidE: int = UINT64_MAX

    def __post_init__(self) -> None:
        verify_gid_range(self.gidB, self.gidE, "bad snapshot")

    @classmethod
    def of(cls, snapshot: meta.Snapshot) -> Snapshot:
        """Make it from what servers send."""
        return cls(snapshot.gid_b, snapshot.gid_e)

    def to_meta(self) -> meta.Snapshot:
        """Return it as servers take it."""
        return meta.Snapshot(Gid(self.gidB), Gid(self.gidE))

    def parse(self, s: str) -> None:
        """Become what `s` says; unchanged on an error (UsageError)."""
        verify_type(s, str)
        new = meta.Snapshot.parse(s)
        self.gidB, self.gidE = new.gid_b, new.gid_e

    def isDirty(self) -> bool:
        """True unless every block stands at one generation."""
        return self.gidB != self.gidE

    def __str__(self) -> str:
        return str(self.to_meta())


def create_snapshot_from_str(s: str) -> Snapshot:
    """Read `|B|` or `|B,E|`."""
    verify_type(s, str)
    return Snapshot.of(meta.Snapshot.parse(s))


@dataclass(init=False)
class Diff:
    """What leads from snapshot `B` to snapshot `E`: `B-->E MC TIME SIZE`, with `-` for flags that are not set."""

    B: Snapshot
    E: Snapshot
    isMergeable: bool
    isCompDiff: bool
    ts: dt.datetime | None  # of the snapshot E
    dataSize: int  # of the stored file [byte]

    def __init__(self, B: Snapshot | None = None, E: Snapshot | None = None) -> None:
        for snapshot in (B, E):
            if snapshot is not None:
                verify_type(snapshot, Snapshot)
        self.B = B if B is not None else Snapshot()
        self.E = E if E is not None else Snapshot()
        self.isMergeable = False
        self.isCompDiff = False
        self.ts = None
        self.dataSize = 0

    @classmethod
    def of(cls, diff: meta.Diff) -> Diff:
        """Make it from what servers send."""
        new = cls(Snapshot.of(diff.begin), Snapshot.of(diff.end))
        new.isMergeable, new.isCompDiff = diff.mergeable, diff.comp
        new.ts, new.dataSize = from_unix(diff.timestamp), diff.size_b
        return new

    def to_meta(self) -> meta.Diff:
        """Return it as servers take it; raises UsageError where it does not lead forward."""
        return meta.Diff(
            self.B.to_meta(),
            self.E.to_meta(),
            mergeable=self.isMergeable,
            comp=self.isCompDiff,
            timestamp=to_unix(self.ts),
            size_b=self.dataSize,
        )

    def verify(self) -> None:
        """Raise UsageError unless the diff leads forward."""
        self.to_meta()

    def isDirty(self) -> bool:
        """True when one of its ends is."""
        return self.B.isDirty() or self.E.isDirty()

    def genFileName(self) -> str:
        """Return the name under which servers store it."""
        return meta.diff_name(self.to_meta())

    def parse(self, s: str) -> None:
        """Become what `s` says; unchanged on an error (UsageError)."""
        verify_type(s, str)
        self.__dict__.update(Diff.of(meta.Diff.parse(s)).__dict__)

    def __str__(self) -> str:
        return self.to_meta().describe()


def create_diff_from_str(s: str) -> Diff:
    """Read `B-->E MC TIME SIZE`."""
    verify_type(s, str)
    return Diff.of(meta.Diff.parse(s))


@dataclass(init=False)
class MetaState:
    """What a base image is: `<B>-YYYYMMDDhhmmss`, or `<B-->E>-...` while diffs are being applied to it.

    Equality leaves the time out.
    """

    B: Snapshot
    E: Snapshot | None
    ts: dt.datetime | None = field(compare=False)

    def __init__(self, B: Snapshot | None = None, E: Snapshot | None = None) -> None:
        for snapshot in (B, E):
            if snapshot is not None:
                verify_type(snapshot, Snapshot)
        self.B = B if B is not None else Snapshot()
        self.E = E
        self.ts = None
        self.verify()

    @classmethod
    def of(cls, state: meta.BaseState) -> MetaState:
        """Make it from what servers send."""
        new = cls(Snapshot.of(state.begin), Snapshot.of(state.end) if state.end is not None else None)
        new.ts = from_unix(state.timestamp)
        return new

    def to_meta(self) -> meta.BaseState:
        """Return it as servers take it; raises UsageError where an apply would not lead forward."""
        end = self.E.to_meta() if self.E is not None else None
        return meta.BaseState(self.B.to_meta(), end, to_unix(self.ts))

    def is_applying(self) -> bool:
        """True while an apply was begun and is not known to be done."""
        return self.E is not None

    def verify(self) -> None:
        """Raise UsageError unless an apply leads forward."""
        self.to_meta()

    def __str__(self) -> str:
        return self.to_meta().describe()


def create_meta_state_from_str(s: str) -> MetaState:
    """Read `<B>-YYYYMMDDhhmmss` or `<B-->E>-YYYYMMDDhhmmss`."""
    verify_type(s, str)
    return MetaState.of(meta.BaseState.parse(s))


@dataclass(init=False)
class GidInfo:
    """A generation that can be restored: `GID TIME` or `GID TIME 0|1`, the last saying whether it is explicit."""

    gid: int
    ts: dt.datetime | None
    is_explicit: bool | None  # None: not said

    def __init__(self, s: str) -> None:
        verify_type(s, str)
        words = s.split(" ")
        if len(words) == 2:
            point = meta.RestorePoint.parse(f"{s} 0")
            self.is_explicit = None
        else:
            point = meta.RestorePoint.parse(s)
            self.is_explicit = point.explicit
        verify_u64(point.gid)
        self.gid, self.ts = point.gid, from_unix(point.timestamp)

    @classmethod
    def of(cls, point: meta.RestorePoint) -> GidInfo:
        """Make it from what servers send."""
        return cls(str(point))

    def __str__(self) -> str:
        point = meta.RestorePoint(Gid(self.gid), to_unix(self.ts), bool(self.is_explicit))
        return str(point) if self.is_explicit is not None else str(point).rpartition(" ")[0]


def compress_kind_to_str(kind: int) -> str:
    """Return the word for a CMPR_ number."""
    verify_compress_kind(kind)
    return COMPRESS_NAMES[kind]


def compress_str_to_kind(s: str) -> int:
    """Return the CMPR_ number for a word."""
    verify_type(s, str)
    for kind, name in COMPRESS_NAMES.items():
        if name == s:
            return kind
    raise UsageError("unknown kind of compression", hint="use " + ", ".join(COMPRESS_NAMES.values()), kind=s)


@dataclass
class CompressOpt:
    """How a proxy packs the wdiffs that it sends: `kind:level:cpus`.

    `nrCpu` is kept for scripts; proxies share their threads among all transfers.
    """

    kind: int = CMPR_ZSTD
    level: int = 1
    nrCpu: int = 1

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Raise UsageError unless the level is 0 to 9 and there is at least one CPU."""
        verify_compress_kind(self.kind)
        verify_type(self.level, int)
        verify_type(self.nrCpu, int)
        if not 0 <= self.level <= 9:
            raise UsageError("bad compression level", hint="use 0 to 9", level=self.level)
        if self.nrCpu < 1:
            raise UsageError("bad number of CPUs", hint="use 1 or more", nrCpu=self.nrCpu)

    def parse(self, s: str) -> None:
        """Become what `s` says, also `kind` or `kind:level`; unchanged on an error (UsageError)."""
        verify_type(s, str)
        kind, *numbers = s.split(":")
        if len(numbers) > 2 or not all(n.isascii() and n.isdecimal() and len(n) < 10 for n in numbers):
            raise UsageError("not a way to compress", hint="write KIND:LEVEL:CPUS, like zstd:1:1", text=s)
        level, cpus = [*(int(n) for n in numbers), *(0, 1)[len(numbers) :]]
        new = CompressOpt(compress_str_to_kind(kind), level, cpus)
        self.kind, self.level, self.nrCpu = new.kind, new.level, new.nrCpu

    @property
    def wire(self) -> str:
        """`KIND:LEVEL`, as proxies take it."""
        return f"{compress_kind_to_str(self.kind)}:{self.level}"

    def __str__(self) -> str:
        return f"{self.wire}:{self.nrCpu}"


def create_compress_opt_from_str(s: str) -> CompressOpt:
    """Read `kind:level:cpus`."""
    opt = CompressOpt()
    opt.parse(s)
    return opt


@dataclass(init=False)
class SyncOpt:
    """How diffs reach an archive. Of these, only compression and delay are known to proxies."""

    cmprOpt: CompressOpt
    delayS: int
    maxWdiffMergeSizeU: str
    bulkSizeU: str

    def __init__(
        self,
        cmprOpt: CompressOpt | None = None,
        delayS: int = 0,
        maxWdiffMergeSizeU: str = "1G",
        bulkSizeU: str = "64K",
    ) -> None:
        if cmprOpt is not None:
            verify_type(cmprOpt, CompressOpt)
        verify_type(delayS, int)
        if delayS < 0:
            raise UsageError("a delay cannot be negative", delayS=delayS)
        verify_size_unit(maxWdiffMergeSizeU)
        verify_size_unit(bulkSizeU)
        if parse_size(maxWdiffMergeSizeU) == 0:
            raise UsageError("the size of a merge cannot be 0")
        self.cmprOpt = cmprOpt if cmprOpt is not None else CompressOpt()
        self.delayS = delayS
        self.maxWdiffMergeSizeU = maxWdiffMergeSizeU
        self.bulkSizeU = bulkSizeU

    def getArchiveInfoArgs(self) -> list[str]:
        """Return what follows HOST:PORT in `archive-info add`."""
        return [str(self.cmprOpt), str(self.delayS)]

    def getReplicateArgs(self) -> list[str]:
        """Return what a replication takes."""
        return [str(self.cmprOpt), self.maxWdiffMergeSizeU, self.bulkSizeU]


def parse_ltsv(s: str) -> dict[str, str]:
    """Read one line of tab-separated `label:value`; raises UsageError."""
    verify_type(s, str)
    values: dict[str, str] = {}
    for item in s.rstrip("\n").split("\t"):
        label, colon, value = item.partition(":")
        if not colon or not label:
            raise UsageError("not a line of label:value", item=item)
        values[label] = value
    return values


def create_ts_delta_from_str(s: str) -> dict[str, str | int]:
    """Read one line of `get ts-delta`; numbers become int."""
    values: dict[str, str | int] = {}
    for label, value in parse_ltsv(s).items():
        number = value.removeprefix("-")
        is_number = number.isascii() and number.isdecimal() and label not in ("name", "dest", "kind", "dest_kind")
        values[label] = int(value) if is_number else value
    return values
