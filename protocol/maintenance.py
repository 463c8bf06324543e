"""What operators and the policy ask of archives beside backup and restore. Source: docs/protocol.md, "Control"."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated

import msgspec

from walbd.format.meta import BaseState, Diff
from walbd.protocol.base import U32, U64, JobAccepted, Node, Ok, Text, Time, Uuid, Volume
from walbd.protocol.codec import Message, Request, message
from walbd.protocol.control import BoolValue, Bulk, Compress, Gids, HostPort, IntValue, TextValue

UINT64_MAX = (1 << 64) - 1


# Diffs


@message("merge")
class Merge(Request[JobAccepted]):
    """Make one diff of those that continue `gid_b`: up to generation `gid_e`, or as many as fit into `size_max_b`.

    Exactly one of the two is given. Fewer than two candidates are an error.
    """

    volume: Volume
    gid_b: U64
    gid_e: U64 | None = None
    size_max_b: U64 | None = None


@message("enable-snapshot")
class EnableSnapshot(Request[Ok]):
    """Protect snapshots from merging: all of them, or none when one is unknown."""

    volume: Volume
    gids: list[U64]


@message("disable-snapshot")
class DisableSnapshot(Request[Ok]):
    """Let merging destroy snapshots: all of them, or none when one is unknown."""

    volume: Volume
    gids: list[U64]


@message("get-num-diff")
class GetNumDiff(Request[IntValue]):
    """Count the diffs with gid_b <= begin gid < gid_e."""

    volume: Volume
    gid_b: U64 = 0
    gid_e: U64 = UINT64_MAX


@message("get-total-diff-size")
class GetTotalDiffSize(Request[IntValue]):
    """Add up the sizes of those diffs [byte]."""

    volume: Volume
    gid_b: U64 = 0
    gid_e: U64 = UINT64_MAX


@message("get-exists-diff")
class GetExistsDiff(Request[BoolValue]):
    """Ask whether a diff with exactly these ends is stored."""

    volume: Volume
    diff: Diff


# Images


@message("del-cold")
class DelCold(Request[Ok]):
    """Remove a cold image."""

    volume: Volume
    gid: U64


@message("get-cold")
class GetCold(Request[Gids]):
    """List cold images."""

    volume: Volume


@message("block-hash")
class BlockHash(Request[JobAccepted]):
    """Hash the image of a snapshot in pieces of `bulk_b`; the job's result has `hash` (32 hex digits)."""

    volume: Volume
    gid: U64
    bulk_b: Bulk = 64 << 10
    size_lb: U64 = 0  # 0: the whole volume
    sleep_percent: Annotated[int, msgspec.Meta(ge=0, le=99)] = 0  # share of the time to rest


@message("scan-begin")
class ScanBegin(Message):
    """The image comes: FullChunk*, End."""

    size_b: U64


@message("virt-full-scan")
class VirtFullScan(Request[ScanBegin]):
    """Read the image of a snapshot without restoring it."""

    volume: Volume
    gid: U64
    bulk_b: Bulk = 256 << 10
    size_lb: U64 = 0  # 0: the whole volume
    sleep_percent: Annotated[int, msgspec.Meta(ge=0, le=99)] = 0  # share of the time to rest


@message("scrub")
class Scrub(Request[JobAccepted]):
    """Read and verify every wdiff of a volume, and read its images; nothing is changed or removed.

    The job's result counts what was read, and what is damaged; `damaged_files` names it.
    """

    volume: Volume


@message("base-states")
class BaseStates(Message):
    """Base states by volume."""

    rows: list[tuple[str, BaseState]]


@message("get-base-all")
class GetBaseAll(Request[BaseStates]):
    """Ask for the base states of all active volumes."""


@message("get-volume-group")
class GetVolumeGroup(Request[TextValue]):
    """Ask in which LVM volume group the images are; empty when they are files."""


@message("get-thinpool")
class GetThinpool(Request[TextValue]):
    """Ask in which LVM thin pool the images are; empty when in none."""


# Replication


@message("replicate")
class Replicate(Request[JobAccepted]):
    """Bring the volume at another archive up to this one; accepted only after that one has agreed.

    Ends when the destination has reached `gid` (default: what is the latest here at the beginning), or, if
    `size_b` is given, when no more than that is left to be sent.
    """

    volume: Volume
    dest: HostPort
    gid: U64 | None = None
    size_b: U64 | None = None
    resync: bool = False
    dont_merge: bool = False
    compress: Compress = "zstd:1"
    merge_size_max_b: Annotated[int, msgspec.Meta(ge=1 << 20)] = 1 << 30
    bulk_b: Bulk = 64 << 10


# Gaps: intervals in which no restore point can exist


class Gap(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An interval that cannot be restored, because its log was lost. Times are those of snapshots [unix s].

    `end` 0: it is still open, as nothing clean has come since.
    """

    begin: Time  # the last restore point before it
    end: Time
    gid_b: U64
    gid_e: U64  # 0 while open
    cause: str  # "hash-backup", "hash-replication", "full-backup", "resync"


@message("gaps")
class Gaps(Message):
    """Intervals without restore points, oldest first."""

    gaps: list[Gap]


@message("get-gaps")
class GetGaps(Request[Gaps]):
    """Ask for the intervals for which no restore point can exist."""

    volume: Volume


# Holds


class Hold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A snapshot that no policy may remove."""

    gid: U64
    reason: Text
    created: Time
    until: Time = 0  # 0: until it is removed


@message("holds")
class Holds(Message):
    """Holds by generation."""

    holds: list[Hold]


@message("get-holds")
class GetHolds(Request[Holds]):
    """List the holds of a volume."""

    volume: Volume


@message("add-hold")
class AddHold(Request[Ok]):
    """Keep a restore point whatever the policy says; replaces a hold of the same generation."""

    volume: Volume
    gid: U64
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]
    until: Time = 0


@message("delete-hold")
class DeleteHold(Request[Ok]):
    """Let the policy decide again."""

    volume: Volume
    gid: U64


# Repair by hand: the volume must be Stopped


@message("dbg-reload-metadata")
class DbgReloadMetadata(Request[Ok]):
    """Build everything that is known of the volume again from its files."""

    volume: Volume


@message("dbg-set-uuid")
class DbgSetUuid(Request[Ok]):
    """Set the uuid of the log history that the volume continues."""

    volume: Volume
    uuid: Uuid


@message("dbg-set-state")
class DbgSetState(Request[Ok]):
    """Set the steady state; Clear is refused, as it has no record."""

    volume: Volume
    state: str


@message("dbg-set-base")
class DbgSetBase(Request[Ok]):
    """Say what the base image is."""

    volume: Volume
    base: BaseState


# Settings of any daemon


@message("reloaded")
class Reloaded(Message):
    """What a reload did: settings that count from now on, and those that need a restart."""

    applied: list[str]
    needs_restart: list[str]


@message("reload")
class Reload(Request[Reloaded]):
    """Read the configuration again; an error in it changes nothing."""


@message("retarget")
class Retarget(Request[Reloaded]):
    """Storage: use another primary archive or other proxies from now on, durably. Empty: as it is.

    It holds until the configured value itself is changed.
    """

    archive: str = ""
    proxies: list[HostPort] = field(default_factory=list)


@message("dump-log-header")
class DumpLogHeader(Request[Ok]):
    """Storage: keep the block at an lsid of the log as a file in the volume's directory."""

    volume: Volume
    lsid: U64


# Positions of replicas


class ReplicaPosition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a destination of a replication was when it was last seen; diffs that it needs are not merged away."""

    node: Node
    address: HostPort
    gid: U64
    timestamp: Time
    seen: Time
    failures: U32 = 0
    error: str = ""


@message("replica-positions")
class ReplicaPositions(Message):
    """Known destinations of a volume's replications."""

    rows: list[ReplicaPosition]


@message("get-replica-positions")
class GetReplicaPositions(Request[ReplicaPositions]):
    """Ask for them."""

    volume: Volume


@message("forget-replica")
class ForgetReplica(Request[Ok]):
    """Do not keep anything for a destination any more."""

    volume: Volume
    node: Node
