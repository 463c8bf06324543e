"""How data moves between daemons. Source: docs/protocol.md, "Transfers".

wlog (storage to proxy):    WlogOffer -> WlogAccepted, WlogChunk*, WlogEnd -> Ok
wdiff (proxy to archive):   WdiffOffer -> WdiffVerdict; when accepted: WdiffChunk*, End -> Ok
full backup (to archive):   FullBackupOffer -> BackupAccepted, LogReset -> Ok, FullChunk*, End -> Ok,
                            BackupEnd -> BackupDone
latest (storage to archive): GatherLatest -> GatheredLatest

A receiver answers Ok only after what it acknowledges is durable and registered. A sender that fails inside
a stream sends ErrorReply; a stream without End is never taken for complete.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from walbd.format.meta import Diff, Snapshot
from walbd.protocol.base import U32, U64, Kind, Ok, Time, Uuid, Volume
from walbd.protocol.codec import Message, Request, message

Pbs = Annotated[int, msgspec.Meta(ge=512, le=4096, multiple_of=512)]
ChunkSize = Annotated[int, msgspec.Meta(ge=0, le=64 << 20)]
Bulk = Annotated[int, msgspec.Meta(ge=512, le=4 << 20, multiple_of=512)]


class Packing(StrEnum):
    """How the payload of a chunk is packed."""

    NONE = "none"
    LZ4 = "lz4"  # one raw block


@message("wlog-accepted")
class WlogAccepted(Message):
    """The proxy takes the log."""


@message("wlog-offer")
class WlogOffer(Request[WlogAccepted]):
    """A stretch of log is ready to be sent."""

    volume: Volume
    uuid: Uuid
    pbs: Pbs
    salt: U32
    size_lb: U64  # of the volume
    lsid: U64  # where the stretch begins [physical block]
    log_max_pb: U64  # its greatest length


@message("wlog-chunk")
class WlogChunk(Message):
    """Whole logpacks as they stand in the log, padding blocks included; payload packed as one piece."""

    lsid: U64  # of the first pack
    size_b: ChunkSize  # unpacked
    packing: Packing


@message("wlog-end")
class WlogEnd(Request[Ok]):
    """All packs were sent; `lsid` is where they end. Ok: durable and registered at the proxy."""

    lsid: U64
    diff: Diff


class Verdict(StrEnum):
    """What an archive says to an offered wdiff, and what the proxy does then."""

    ACCEPT = "accept"  # send it
    STOPPED = "stopped"  # retry with growing delay, for ever
    SYNCING = "syncing"  # a backup runs: retry
    BUSY = "wdiff-recv"  # another transfer to this volume runs: retry
    NOT_READY = "not-ready"  # no usable image yet, or a replication writes: retry
    NOT_FOUND = "archive-not-found"  # nothing is known of the volume: error flag
    DIFFERENT_UUID = "different-uuid"  # another history: these diffs can never be used: delete them
    SMALLER = "smaller-lv-size"  # the image must be grown first: error flag
    TOO_OLD = "too-old-diff"  # the archive has it: delete
    TOO_NEW = "too-new-diff"  # something before it is missing: keep and retry
    NOT_APPLICABLE = "not-applicable"  # a compared diff of another image: retry


@message("wdiff-verdict")
class WdiffVerdict(Message):
    """The archive's answer to an offer."""

    verdict: Verdict
    latest: Snapshot | None = None  # what the archive has, where it has something
    hint: str = ""


@message("wdiff-offer")
class WdiffOffer(Request[WdiffVerdict]):
    """A (merged) wdiff is ready to be sent."""

    volume: Volume
    sender: Kind
    uuid: Uuid
    size_lb: U64  # of the volume
    diff: Diff


@message("wdiff-chunk")
class WdiffChunk(Message):
    """A piece of a sorted wdiff: whole packs (the first piece begins with the file header)."""


@message("backup-accepted")
class BackupAccepted(Message):
    """The archive will take the backup; hash backups start from `latest`, and compare `size_lb` at least.

    That is the size of the image: what a smaller device does not have is compared as zeros.
    """

    latest: Snapshot | None = None
    size_lb: U64 = 0


@message("full-backup-offer")
class FullBackupOffer(Request[BackupAccepted]):
    """A storage wants to copy a whole volume."""

    volume: Volume
    size_lb: U64
    started: Time
    bulk_b: Bulk


@message("log-reset")
class LogReset(Request[Ok]):
    """The storage has reset its log: the history begins anew with this uuid. Ok: the archive is in FullSync."""

    uuid: Uuid


@message("full-chunk")
class FullChunk(Message):
    """A run of bulks in order, `size_b` [byte] of the volume from `offset_b`; no payload: all zero."""

    offset_b: U64
    size_b: ChunkSize
    packing: Packing = Packing.NONE
    xxh: U64 = 0  # xxh3-64 of the unpacked bytes


@message("backup-done")
class BackupDone(Message):
    """The archive holds the backup durably, as an image of `snapshot`."""

    archive_uuid: Uuid


@message("backup-end")
class BackupEnd(Request[BackupDone]):
    """The image sent is this (dirty) snapshot."""

    snapshot: Snapshot


class LatestRow(msgspec.Struct, frozen=True, kw_only=True):
    """The newest snapshot of a volume at an archive; gid 2^64-1: none."""

    volume: str
    gid: int
    timestamp: int


@message("gathered-latest")
class GatheredLatest(Message):
    """One row for each volume asked for, in that order."""

    rows: list[LatestRow]


@message("gather-latest")
class GatherLatest(Request[GatheredLatest]):
    """Ask an archive for the newest snapshots of many volumes."""

    volumes: list[Volume]
