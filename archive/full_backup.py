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

from typing import Final

import structlog

from walbd.archive.backup_offer import check_backup
from walbd.archive.image_receiver import ImageReceiver
from walbd.archive.slots import Slots
from walbd.archive.states import Command
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.states import Step
from walbd.daemon.tasks import uninterrupted
from walbd.errors import RemoteProtocolError
from walbd.format.meta import BaseState, full_backup_state
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NO_GID, new_uuid
from walbd.protocol.base import Ok
from walbd.protocol.transfer import (
    BackupAccepted,
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    LogReset,
)

log = structlog.get_logger()

FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.full.before_commit", "the whole image is durable, but the volume is SyncReady: it must be sent again"
)


async def receive_full_backup(
    volume: Volume, slots: Slots, conn: Connection, offer: FullBackupOffer
) -> BackupDone:
    """Conduct a full backup; the returned message is the last answer. A failure leaves the volume SyncReady."""
    check_backup(volume, Command.FULL_BACKUP, slots, conn, offer.size_lb)
    with slots.turn() as turn:
        await turn.comes()
        step = volume.enter(Command.FULL_BACKUP)
        try:
            async with ImageReceiver(
                volume, conn, offer.size_lb, source=f"full backup from {conn.peer.node}"
            ) as receiver:
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
    await volume.commit(
        step,
        size_lb=size_lb,
        base=base,
        base_uuid=uuid.hex(),
        uuid=uuid.hex(),
        archive_uuid=archive_uuid.hex(),
        gaps=(),
    )
    volume.reset_memory()
    volume.received = volume.place.env.clock.now()
