"""Copies that compare before they send: hash backup, and replication between archives. Source: docs/protocol.md.

Comparing is one exchange, the same in all three uses. The *source* has the data; the *destination* has an image
to compare it with. The source asks for hashes, range by range and some ranges ahead, so that nobody waits with
data on the wire; it sends what differs as wdiff packs in address order:

    source -> destination: HashWanted*, WdiffChunk* (the first begins with the file header), then End
    destination -> source: one HashRun for each HashWanted, in order; after End: Ok, when all is durable

hash backup (storage to archive): HashBackupOffer -> BackupAccepted (with `latest`), LogReset -> Ok, the exchange,
                            BackupEnd -> BackupDone

replication (archive to archive; the one that dials is the source):
    ReplicateOffer -> ReplicatePlan
    full:    ReplicateFull -> FullFrom, FullChunk*, End -> Ok
    resync:  ReplicateResync -> Ok, the exchange, whose Ok comes after the new base is committed
    then rounds, as long as the source finds something to send, each of them
        ReplicateLatest -> ReplicateState
        ReplicateDiff -> RoundAnswer; when accepted: WdiffChunk*, End -> Ok
        or ReplicateHash -> RoundAnswer; when accepted: the exchange
    ReplicateDone -> Ok

A round names the state that the source was told of. The destination may have moved on since (proxies send to it,
too): then it does not accept the round, and the source asks again.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import msgspec

from walbd.format.meta import BaseState, Diff, Snapshot
from walbd.protocol.base import U64, Ok, Time, Uuid, Volume
from walbd.protocol.codec import Message, Request, message
from walbd.protocol.transfer import BackupAccepted, Bulk

HASH_B = 16  # xxh3-128 of one bulk with the seed of the run, big-endian as xxhash writes a digest

RangeSize = Annotated[int, msgspec.Meta(gt=0, le=16 << 20)]


@message("hash-wanted")
class HashWanted(Message):
    """The source asks for the hashes of a range: whole bulks but at the end of the volume."""

    offset_b: U64
    size_b: RangeSize


@message("hash-run")
class HashRun(Message):
    """The hashes of a wanted range; payload: 16 bytes for each bulk, in order."""

    offset_b: U64


@message("hash-backup-offer")
class HashBackupOffer(Request[BackupAccepted]):
    """A storage wants to continue an archive's history by comparing the whole volume with its latest image.

    Everything that can be refused is refused here, before the storage throws its log away.
    """

    volume: Volume
    size_lb: U64
    started: Time
    bulk_b: Bulk
    seed: U64


class ReplicationKind(StrEnum):
    """What the destination needs first."""

    FULL = "full"  # it has nothing
    RESYNC = "resync"  # it has an image of another lineage, or must not trust its own
    ROUNDS = "rounds"  # its image can be continued by diffs


@message("replicate-plan")
class ReplicatePlan(Message):
    """The destination's decision."""

    kind: ReplicationKind


@message("replicate-offer")
class ReplicateOffer(Request[ReplicatePlan]):
    """An archive wants to bring a volume at another archive up to its own state."""

    volume: Volume
    size_lb: U64
    archive_uuid: Uuid
    resync: bool = False  # compare everything, whatever the destination believes to have


@message("full-from")
class FullFrom(Message):
    """The destination has everything before this already; 0 unless it resumes."""

    offset_b: U64


@message("replicate-full")
class ReplicateFull(Request[FullFrom]):
    """All of an image comes in order; at the end it is the destination's base, in state `base`."""

    size_lb: U64
    base: BaseState
    uuid: Uuid  # of the log history that `base` belongs to
    bulk_b: Bulk


@message("replicate-resync")
class ReplicateResync(Request[Ok]):
    """The destination's base is made equal to `base`. Ok: its old history is given up, durably."""

    size_lb: U64
    base: BaseState
    uuid: Uuid
    bulk_b: Bulk
    seed: U64


@message("replicate-state")
class ReplicateState(Message):
    """The newest state that the destination can reach, and the log history that it belongs to."""

    latest: Snapshot
    timestamp: Time
    uuid: Uuid
    size_lb: U64 = 0  # of its image: a comparison takes in all of it, with zeros behind the source's end


@message("replicate-latest")
class ReplicateLatest(Request[ReplicateState]):
    """Ask what the destination has."""


@message("round-answer")
class RoundAnswer(Message):
    """Whether the destination takes the round. Not: its state is no longer the one that the round continues."""

    accepted: bool


@message("replicate-diff")
class ReplicateDiff(Request[RoundAnswer]):
    """A (merged) diff of the chain comes, which continues `latest` of history `latest_uuid`."""

    latest: Snapshot
    latest_uuid: Uuid
    size_lb: U64
    diff: Diff
    uuid: Uuid  # of the log history that the diff's end belongs to: the destination's afterwards


@message("replicate-hash")
class ReplicateHash(Request[RoundAnswer]):
    """No diffs lead on from what the destination has: compare its latest image with a later one.

    `diff` is a compared diff from the destination's latest snapshot.
    """

    latest: Snapshot
    latest_uuid: Uuid
    size_lb: U64
    diff: Diff
    uuid: Uuid
    bulk_b: Bulk
    seed: U64


@message("replicate-done")
class ReplicateDone(Request[Ok]):
    """Nothing more comes in this replication."""
