"""What operators and the controller ask of daemons. Source: docs/protocol.md, "Control".

Each request names its reply. Refusals are errors with a code; work that outlives the request is a job
(`walbd.protocol.base.JobAccepted`). Queries change nothing.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from walbd.format.meta import BaseState, Diff, RestorePoint, Snapshot
from walbd.protocol.base import U16, U32, U64, Fact, JobAccepted, Kind, Node, Ok, Text, Time, Uuid, Volume
from walbd.protocol.codec import Message, Request, message

HostPort = Annotated[str, msgspec.Meta(min_length=3, max_length=300)]
Bulk = Annotated[int, msgspec.Meta(ge=512, le=4 << 20, multiple_of=512)]  # [byte]
Compress = Annotated[str, msgspec.Meta(min_length=1, max_length=32)]  # KIND[:LEVEL]


# Every daemon


class Role(StrEnum):
    """What a storage does with a volume that is started."""

    TARGET = "target"  # send the log: the volume is backed up from here
    STANDBY = "standby"  # throw the log away: another storage is the target


class StopHow(StrEnum):
    """How a volume stops."""

    GRACEFUL = "graceful"
    FORCE = "force"
    EMPTY = "empty"  # proxies only: first send everything


class ShutdownHow(StrEnum):
    """How a daemon ends."""

    GRACEFUL = "graceful"
    FORCE = "force"


@message("value-text")
class TextValue(Message):
    """One string."""

    value: str


@message("value-int")
class IntValue(Message):
    """One number."""

    value: U64


@message("value-bool")
class BoolValue(Message):
    """Yes or no."""

    value: bool


@message("value-uuid")
class UuidValue(Message):
    """One uuid."""

    value: Uuid


@message("names")
class Names(Message):
    """Names, sorted."""

    names: list[str]


@message("gids")
class Gids(Message):
    """Generations, ascending."""

    gids: list[U64]


@message("version")
class VersionInfo(Message):
    """What runs there."""

    version: str
    protocol_min: U16
    protocol_max: U16
    log_format: U16
    python: str


@message("get-version")
class GetVersion(Request[VersionInfo]):
    """Ask what runs there."""


@message("host-type")
class HostType(Message):
    """The kind of a daemon."""

    kind: Kind


@message("get-host-type")
class GetHostType(Request[HostType]):
    """Ask what kind of daemon this is: the liveness probe."""


@message("get-state")
class GetState(Request[TextValue]):
    """Ask for the state of a volume, passing states included; `Clear` for one that is not known."""

    volume: Volume


@message("get-volumes")
class GetVolumes(Request[Names]):
    """List the volumes that have a directory."""


@message("get-pid")
class GetPid(Request[IntValue]):
    """Ask for the process id."""


@message("request-stat")
class RequestStats(Message):
    """Per request and client: how often, and the mean time [s]."""

    rows: list[tuple[str, str, int, float]]


@message("get-handler-stat")
class GetHandlerStat(Request[RequestStats]):
    """Ask for request counts and latencies since the start."""


@message("get-num-action")
class GetNumAction(Request[IntValue]):
    """Ask how many actions of one name run for a volume; an unknown name is an error."""

    volume: Volume
    action: str


@message("actions")
class Actions(Message):
    """Running actions: volume, action, count, when the last began (0: never)."""

    rows: list[tuple[str, str, int, int]]


@message("get-actions")
class GetActions(Request[Actions]):
    """Ask for the actions of all volumes."""


@message("start")
class Start(Request[Ok]):
    """Start a volume; `role` at storages only, where it is needed."""

    volume: Volume
    role: Role | None = None


@message("stop")
class Stop(Request[JobAccepted]):
    """Stop a volume: checked first, then a job."""

    volume: Volume
    how: StopHow = StopHow.GRACEFUL


@message("clear-vol")
class ClearVol(Request[Ok]):
    """Forget a volume and remove its files here."""

    volume: Volume


@message("shutdown")
class Shutdown(Request[Ok]):
    """End the daemon."""

    how: ShutdownHow = ShutdownHow.GRACEFUL


@message("kicked")
class Kicked(Message):
    """How many waiting tasks were hurried."""

    tasks: U32


@message("kick")
class Kick(Request[Kicked]):
    """Hurry what waits: proxies may name a volume and an archive; storages kick all."""

    volume: str = ""
    archive: str = ""


@message("resize")
class Resize(Request[Ok]):
    """Grow a volume [byte]. Storage: 0 means the size of the data device. Archive: see `zero`."""

    volume: Volume
    size_b: U64
    zero: bool = False  # archive: write zeros over what is new


# Points in time, and the lag between servers


@message("latest")
class Latest(Message):
    """Newest snapshot per volume: volume, archive (proxies; else empty), gid, lsid (storage; else 0), time."""

    rows: list[tuple[str, str, int, int, int]]


@message("get-latest-snap")
class GetLatestSnap(Request[Latest]):
    """Ask for the newest snapshot of one volume, or of all that can answer (volume empty)."""

    volume: str = ""


class TsDelta(msgspec.Struct, frozen=True, kw_only=True):
    """How far a destination is behind: its newest snapshot against ours."""

    volume: str
    dest: str
    gid: int
    timestamp: int
    dest_gid: int
    dest_timestamp: int
    delta_s: int


@message("ts-deltas")
class TsDeltas(Message):
    """Lag per volume and destination, as last compared."""

    rows: list[TsDelta]


@message("get-ts-delta")
class GetTsDelta(Request[TsDeltas]):
    """Ask for the lag."""


# Storage


@message("storage-init-vol")
class StorageInitVol(Request[Ok]):
    """Take over a WalB device under a volume name."""

    volume: Volume
    device: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]


@message("reset-vol")
class ResetVol(Request[Ok]):
    """Storage: wipe the log, next generation `gid`. Archive: back to SyncReady, all data removed."""

    volume: Volume
    gid: U64 = 0


@message("full-backup")
class FullBackup(Request[JobAccepted]):
    """Copy the whole device to the primary archive; accepted only after the archive has agreed."""

    volume: Volume
    bulk_b: Bulk = 256 << 10


@message("hash-backup")
class HashBackup(Request[JobAccepted]):
    """Send what differs from the primary archive's latest image; accepted only after the archive agreed.

    `gid_past`: the new history begins above this generation, too, as others may have given it out.
    """

    volume: Volume
    bulk_b: Bulk = 64 << 10
    gid_past: U64 = 0


@message("gid")
class GidValue(Message):
    """One generation."""

    gid: U64


@message("snapshot")
class TakeSnapshot(Request[GidValue]):
    """Take an explicit snapshot now; durable when answered."""

    volume: Volume


@message("set-full-scan-bps")
class SetFullScanBps(Request[Ok]):
    """Limit the speed of running and later full scans [byte/s]; 0: no limit."""

    bytes_per_s: U64


@message("get-is-overflow")
class GetIsOverflow(Request[BoolValue]):
    """Ask whether the log of a volume has overflowed."""

    volume: Volume


class LogUsage(msgspec.Struct, frozen=True, kw_only=True):
    """How full the log ring of a volume is [physical block]."""

    volume: str
    usage_pb: int
    capacity_pb: int
    pbs: int


@message("log-usage")
class LogUsages(Message):
    """Log usage per volume."""

    rows: list[LogUsage]


@message("get-log-usage")
class GetLogUsage(Request[LogUsages]):
    """Ask how full the log is, of one volume or of all that can answer."""

    volume: str = ""


@message("get-uuid")
class GetUuid(Request[UuidValue]):
    """Storage: uuid of the log that is sent. Archive: of the history it continues."""

    volume: Volume


# Proxy


@message("archive-info")
class ArchiveInfo(Message):
    """Where and how a proxy sends a volume's wdiffs."""

    archive: Node
    address: HostPort
    compress: Compress = "zstd:1"
    delay_s: Annotated[int, msgspec.Meta(ge=0, le=86400)] = 0


@message("archive-info-list")
class ListArchiveInfo(Request[Names]):
    """List the archives that a volume is sent to."""

    volume: Volume


@message("archive-info-get")
class GetArchiveInfo(Request[ArchiveInfo]):
    """Ask for one archive's entry."""

    volume: Volume
    archive: Node


@message("archive-info-add")
class AddArchiveInfo(Request[Ok]):
    """Add an archive; it must not be there yet."""

    volume: Volume
    info: ArchiveInfo


@message("archive-info-update")
class UpdateArchiveInfo(Request[Ok]):
    """Change an archive's entry; it must be there."""

    volume: Volume
    info: ArchiveInfo


@message("archive-info-delete")
class DeleteArchiveInfo(Request[Ok]):
    """Remove an archive and all its unsent wdiffs; the last one clears the volume."""

    volume: Volume
    archive: Node


@message("get-is-wdiff-send-error")
class GetIsWdiffSendError(Request[BoolValue]):
    """Ask whether an archive has refused a volume's wdiffs for a reason that needs a person."""

    volume: Volume
    archive: Node


@message("diffs")
class Diffs(Message):
    """Diffs by begin gid. `more`: there are others, which begin above the last of these."""

    diffs: list[Diff]
    more: bool = False


@message("get-proxy-diff")
class GetProxyDiff(Request[Diffs]):
    """List received diffs (archive empty), or those waiting for one archive, that begin at `gid_b` or above.

    A message holds so many: for the next ones ask from the last begin + 1 on.
    """

    volume: Volume
    archive: str = ""
    gid_b: U64 = 0


# Archive


@message("archive-init-vol")
class ArchiveInitVol(Request[Ok]):
    """Make a volume known, ready for a full backup."""

    volume: Volume


@message("restore")
class Restore(Request[JobAccepted]):
    """Make a writable image of a clean snapshot."""

    volume: Volume
    gid: U64


@message("del-restored")
class DelRestored(Request[Ok]):
    """Remove a restored image."""

    volume: Volume
    gid: U64


@message("apply")
class Apply(Request[JobAccepted]):
    """Write the diffs up to `gid` into the base image; all snapshots before it vanish."""

    volume: Volume
    gid: U64


@message("get-diff")
class GetDiff(Request[Diffs]):
    """List diffs with gid_b <= begin gid < gid_e."""

    volume: Volume
    gid_b: U64 = 0
    gid_e: U64 = (1 << 64) - 1


@message("get-applicable-diff")
class GetApplicableDiff(Request[Diffs]):
    """List the chain from the base, up to a gid."""

    volume: Volume
    gid: U64 = (1 << 64) - 1


@message("get-exists-base-image")
class GetExistsBaseImage(Request[BoolValue]):
    """Ask whether there is a base image."""

    volume: Volume


@message("get-restored")
class GetRestored(Request[Gids]):
    """List restored images."""

    volume: Volume


@message("get-restored-path")
class GetRestoredPath(Request[TextValue]):
    """Ask for the path of a restored image on the archive's host."""

    volume: Volume
    gid: U64


@message("restore-points")
class RestorePoints(Message):
    """What can be restored, ascending by gid."""

    points: list[RestorePoint]


@message("get-restorable")
class GetRestorable(Request[RestorePoints]):
    """List explicit restore points and the latest, or every one; empty when the volume is not active."""

    volume: Volume
    all_points: bool = False


@message("get-archive-uuid")
class GetArchiveUuid(Request[UuidValue]):
    """Ask for the lineage of the images: equal at replicas."""

    volume: Volume


@message("base-state")
class BaseValue(Message):
    """A base state."""

    base: BaseState


@message("get-base")
class GetBase(Request[BaseValue]):
    """Ask for the state of the base image."""

    volume: Volume


@message("get-meta-state")
class GetMetaState(Request[BaseValue]):
    """Ask for the state after an apply up to `gid`, or while it would run."""

    volume: Volume
    applying: bool = False
    gid: U64 = (1 << 64) - 1


@message("snapshot-value")
class SnapshotValue(Message):
    """A snapshot."""

    snapshot: Snapshot


@message("get-meta-snap")
class GetMetaSnap(Request[SnapshotValue]):
    """Ask for the snapshot that the chain up to `gid` leads to."""

    volume: Volume
    gid: U64 = (1 << 64) - 1


@message("get-vol-size")
class GetVolSize(Request[IntValue]):
    """Ask for the size of the base image [logical block]."""

    volume: Volume


@message("get-progress")
class GetProgress(Request[IntValue]):
    """Ask how far a running copy is [logical block]; 0: none runs."""

    volume: Volume


@message("gc-diff")
class GcDiff(Request[Kicked]):
    """Remove diffs that the chain from the base does not use; answers how many."""

    volume: Volume


# Status: one answer form for all kinds, so that tools print what they do not know yet


class TaskStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A waiting task."""

    key: str
    due_in_s: float
    failures: int


class ProxyHealth(msgspec.Struct, frozen=True, kw_only=True):
    """A storage's view of a proxy."""

    address: str
    available: bool
    next_check_s: float
    error: str = ""


DAMAGED_MAX: Final = 100  # of a hop that a status names


class HopStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What waits for one destination of a volume (proxy: an archive)."""

    dest: str
    address: str
    sending: bool
    diffs: int
    size_b: int
    gid_b: int
    gid_e: int
    oldest: int  # time of the oldest waiting diff [unix s], 0: none
    last_sent: int
    error: bool
    error_text: str = ""
    damaged: list[tuple[int, int]] = []  # proxy: begin and end of wdiffs that were damaged here and put aside


class VolumeStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A volume at one server. Numbers that a kind does not have are 0, texts empty, lists empty."""

    volume: str
    state: str
    stopping: str = ""
    actions: dict[str, int] = {}
    size_lb: int = 0
    uuid: str = ""
    archive_uuid: str = ""
    device: str = ""
    device_error: str = ""
    overflow: bool = False
    log_usage_pb: int = 0
    log_capacity_pb: int = 0
    pbs: int = 0
    lag_lb: int = 0  # storage: written to the log and not yet delivered
    waiting_since: int = 0  # storage: when the oldest of it was first seen [unix s]
    done_gid: int = 0
    done_time: int = 0  # storage: time of the newest delivered snapshot
    latest_gid: int = 0
    latest_time: int = 0
    oldest_time: int = 0  # archive: time of the oldest restore point
    received: int = 0  # time of the last receipt
    diffs: int = 0
    diffs_b: int = 0
    base: str = ""
    restorable: int = 0
    restored: list[int] = []
    cold: list[int] = []  # archive: generations of cold images
    verified: int = 0  # archive: when the last scrub that found no damage began
    hops: list[HopStatus] = []
    error: str = ""
    lost: str = ""  # storage: why the log does not continue what was delivered: a code, or nothing
    log_uuid: str = ""  # storage: of the device's log as it is; `uuid` is that of the history
    gid_greatest: int = 0  # storage: the greatest generation ever given out there, in whatever history


@message("status")
class StatusReply(Message):
    """A server's status; `server` holds its settings and totals by name."""

    node: str
    kind: Kind
    version: str
    pid: int
    now: Time
    server: dict[str, Fact] = field(default_factory=dict)
    proxies: list[ProxyHealth] = field(default_factory=list)
    volumes: list[VolumeStatus] = field(default_factory=list)
    tasks: list[TaskStatus] = field(default_factory=list)
    errors: list[Text] = field(default_factory=list)


@message("get-status")
class GetStatus(Request[StatusReply]):
    """Ask for the status of a server, with one volume or all."""

    volume: str = ""
