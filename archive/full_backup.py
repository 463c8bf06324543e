"""Taking a full backup from a storage (docs/archive.md, "Full backup").

    full-backup-offer -> backup-accepted    everything that can be refused is refused here, before the storage
                                            throws its log away; the image is ready to be written
    log-reset (uuid)  -> ok
    full-chunk*, end  -> ok                 written and synced
    backup-end        -> backup-done        one replacement of the record makes it the volume's base, `<|0,g|>`

Until that replacement the volume is SyncReady, on disk and after any failure; the next attempt begins anew and
writes over what is there.
"""

from __future__ import annotations

from types import TracebackType
from typing import Final, Self

import structlog
import xxhash

from walbd.archive.diffs import remove_all_diffs
from walbd.archive.images.store import PreparedImage
from walbd.archive.slots import Slots
from walbd.archive.states import Command
from walbd.archive.volume import Volume, check_room
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.pipeline import Pipeline, SyncTimer
from walbd.daemon.states import Step
from walbd.daemon.tasks import uninterrupted
from walbd.errors import Busy, CorruptData, Refused, RemoteProtocolError, UsageError
from walbd.format.compress import Kind as Compression
from walbd.format.compress import decompress
from walbd.format.meta import BaseState, full_backup_state
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NO_GID, new_uuid
from walbd.protocol.base import End, Kind, Ok
from walbd.protocol.transfer import (
    BackupAccepted,
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    FullChunk,
    LogReset,
    Packing,
)
from walbd.units import KIB, LB, MIB

log = structlog.get_logger()

WINDOW_B: Final = 32 * MIB  # received and not yet written
_CHUNK_COST_B: Final = 256 * KIB  # what each chunk counts beside its payload, so that zeros are bounded too

FP_AFTER_PREPARE: Final = failpoints.register(
    "archive.full.after_prepare", "SyncReady; the base image has its size and no known contents"
)
FP_MID_WRITE: Final = failpoints.register("archive.full.mid_write", "SyncReady; a part of the image is written")
FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.full.before_commit", "the whole image is durable, but the volume is SyncReady: it must be sent again"
)


async def receive_full_backup(
    volume: Volume, slots: Slots, conn: Connection, offer: FullBackupOffer
) -> BackupDone:
    """Conduct a full backup; the returned message is the last answer. A failure leaves the volume SyncReady."""
    if conn.peer.kind is not Kind.STORAGE:
        raise Refused("full backups are taken from storages only", sender=str(conn.peer.kind))
    if offer.size_lb == 0:
        raise UsageError("a volume of size 0 cannot be backed up", volume=volume.name)
    volume.check(Command.FULL_BACKUP)
    if slots.is_full:
        raise Busy("too many backups are running", hint="try again when one has ended", backups_max=slots.n_max)
    with slots.turn() as turn:
        await turn.comes()
        step = volume.enter(Command.FULL_BACKUP)
        try:
            async with ImageReceiver(volume, conn, offer) as receiver:
                async with volume.giving_up():
                    await volume.settle()
                    await with_filler(conn, receiver.prepare())
                    await conn.send(BackupAccepted())
                    uuid = (await conn.expect(LogReset)).uuid
                    await conn.send(Ok())
                    await receiver.receive()
                    await conn.send(Ok())
                    base = await _expect_end(conn, offer.started)
            archive_uuid = new_uuid(volume.place.env.rng)
            await uninterrupted(_commit(volume, step, base, offer.size_lb, uuid, archive_uuid))
        finally:
            volume.progress_lb = 0
            volume.machine.leave()
    log.info("full_backup.received", volume=volume.name, size_lb=offer.size_lb, base=str(base))
    return BackupDone(archive_uuid=archive_uuid)


async def _expect_end(conn: Connection, started: int) -> BaseState:
    snapshot = (await conn.expect(BackupEnd)).snapshot
    if snapshot.gid_b != 0 or snapshot.gid_e == NO_GID:
        raise RemoteProtocolError("a full backup ends with a snapshot that begins at 0", snapshot=str(snapshot))
    return full_backup_state(snapshot.gid_e, started)


async def _commit(
    volume: Volume, step: Step, base: BaseState, size_lb: int, uuid: bytes, archive_uuid: bytes
) -> None:
    """Make what was received the volume's base, on disk and then in memory."""
    with disk_errors(volume.directory, "finish the backup"):
        failpoints.hit(FP_BEFORE_COMMIT)
    await volume.commit(step, size_lb=size_lb, base=base, uuid=uuid.hex(), archive_uuid=archive_uuid.hex())
    volume.reset_memory()
    volume.received = volume.place.env.clock.now()


class ImageReceiver:
    """Writes the chunks of a backup to the base image while the next ones come."""

    def __init__(self, volume: Volume, conn: Connection, offer: FullBackupOffer) -> None:
        self._volume = volume
        self._conn = conn
        self._size_b = offer.size_lb * LB
        self._image: PreparedImage | None = None
        self._source = f"full backup from {conn.peer.node}"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._image is not None:
            await self._volume.place.env.pools.run(Pool.RECEIVE, self._image.file.close)

    async def prepare(self) -> None:
        """Make room and an image to write to; raises DiskFull."""
        await self._volume.place.env.pools.run(Pool.RECEIVE, self._prepare)

    async def receive(self) -> None:
        """Take all chunks, in order, up to the end of the stream; the image is durable on return."""
        pools, config = self._volume.place.env.pools, self._volume.place.config
        timer = SyncTimer(config.fsync_interval_b, config.fsync_interval_s)
        at = 0
        async with Pipeline(WINDOW_B) as pipeline:
            while True:
                message, payload = await self._conn.receive()
                if isinstance(message, End) and not payload:
                    break
                if not isinstance(message, FullChunk):
                    raise self._conn.unexpected(message, FullChunk, End)
                self._check_place(message, at)
                at += message.size_b
                await pipeline.push(self._take(message, payload), len(payload) + _CHUNK_COST_B)
                if timer.is_due(message.size_b):
                    await pipeline.push(pools.run(Pool.RECEIVE, self._sync_some), 0)
            if at != self._size_b:
                raise RemoteProtocolError("the backup ends early", offset_b=at, size_b=self._size_b)
            await with_filler(self._conn, pipeline.drain())
        await with_filler(self._conn, pools.run(Pool.RECEIVE, self._sync))

    def _check_place(self, chunk: FullChunk, at: int) -> None:
        if chunk.offset_b != at or chunk.size_b == 0 or chunk.size_b % LB or at + chunk.size_b > self._size_b:
            raise RemoteProtocolError(
                "a chunk is not where it must be",
                offset_b=chunk.offset_b,
                expected_b=at,
                chunk_b=chunk.size_b,
                size_b=self._size_b,
            )

    async def _take(self, chunk: FullChunk, payload: memoryview) -> None:
        await self._volume.place.env.pools.run(Pool.RECEIVE, self._write, chunk, payload)
        self._volume.progress_lb = max(self._volume.progress_lb, (chunk.offset_b + chunk.size_b) // LB)

    # in threads

    def _prepare(self) -> None:
        place, name = self._volume.place, self._volume.name
        check_room(place)
        remove_all_diffs(place.env.fs, self._volume.directory)
        self._image = place.images.prepare_base(name, self._size_b)
        with disk_errors(self._volume.directory, "prepare the image"):
            failpoints.hit(FP_AFTER_PREPARE)

    def _write(self, chunk: FullChunk, payload: memoryview) -> None:
        assert self._image is not None
        if not payload:
            if not self._image.reads_zero:
                self._image.file.zero(chunk.offset_b, chunk.size_b)
            return
        data = self._unpack(chunk, payload)
        if xxhash.xxh3_64_intdigest(data) != chunk.xxh:
            raise CorruptData(
                "the checksum of a chunk does not match",
                hint="the sender or the connection damaged the stream; run the backup again",
                source=self._source,
                offset=chunk.offset_b,
            )
        self._image.file.pwrite(data, chunk.offset_b)
        with disk_errors(self._image.file.path, "write"):
            failpoints.hit(FP_MID_WRITE)

    def _unpack(self, chunk: FullChunk, payload: memoryview) -> bytes | memoryview:
        if chunk.packing is Packing.LZ4:
            return decompress(Compression.LZ4, payload, chunk.size_b, source=self._source, offset=chunk.offset_b)
        if len(payload) != chunk.size_b:
            raise CorruptData(
                "a chunk has another size than announced",
                hint="the sender made the stream wrongly",
                source=self._source,
                offset=chunk.offset_b,
                size_b=len(payload),
                expected_b=chunk.size_b,
            )
        return payload

    def _sync_some(self) -> None:
        check_room(self._volume.place)
        self._sync()

    def _sync(self) -> None:
        assert self._image is not None
        self._image.file.sync()
