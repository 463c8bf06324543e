"""Taking a hash backup from a storage (docs/archive.md, "Hash backup").

    hash-backup-offer -> backup-accepted    everything that can be refused is refused here, before the storage
                                            throws its log away; the image to compare with is open
    log-reset (uuid)  -> ok
    the exchange      -> ok                 what differs is in an unfinished wdiff, verified and synced
    backup-end        -> backup-done        the wdiff gets its name, and the volume its new history

Until the wdiff has its name the volume is Archived at its old snapshot and in its old history, on disk and after
any failure; the next attempt begins anew. The image that is compared is the latest snapshot, read through open
files: wdiffs may be merged and snapshots protected meanwhile, but the base must stay as it is. So the backup is a
Scan, too, which keeps applies out (archive/states.py).
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import Final

import structlog

from walbd.archive.backup_offer import check_backup
from walbd.archive.gaps import HASH_BACKUP, gaps_after
from walbd.archive.pending import commit_pending
from walbd.archive.resize import grow
from walbd.archive.slots import Slots
from walbd.archive.states import SCAN, Command
from walbd.archive.virtual import open_virtual
from walbd.archive.volume import Volume, check_room
from walbd.archive.wdiff_sink import WdiffSink, take_differences
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.tasks import uninterrupted
from walbd.errors import Refused, RemoteProtocolError
from walbd.format.meta import Diff, Snapshot, hash_backup_diff, hash_backup_gid
from walbd.format.virtual import VirtualImage
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID, NO_GID, parse_uuid
from walbd.protocol.base import Ok
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupAccepted, BackupDone, BackupEnd, LogReset
from walbd.units import LB

log = structlog.get_logger()

_GID_MAX: Final = NO_GID >> 1  # leaves room for the history that goes on

FP_AFTER_ACCEPT: Final = failpoints.register(
    "archive.hash.after_accept", "Archived at the old snapshot; an unfinished file, which the next start removes"
)
FP_MID_SCAN: Final = failpoints.register("archive.hash.mid_scan", "the same; a part of the image is compared")
FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.hash.before_commit", "the same; everything that differs is in the unfinished file"
)
FP_BEFORE_DONE: Final = failpoints.register(
    "archive.hash.before_done", "the backup is there; the storage was not told: it runs another one"
)


async def receive_hash_backup(
    volume: Volume, slots: Slots, conn: Connection, offer: HashBackupOffer
) -> BackupDone:
    """Conduct a hash backup; the returned message is the last answer. A failure leaves the volume as it was."""
    check_backup(volume, Command.HASH_BACKUP, slots, conn, offer.size_lb)
    with slots.turn() as turn:
        await turn.comes()
        volume.enter(Command.HASH_BACKUP)
        try:
            receiving = _Receiving(volume, conn, offer)
            with volume.machine.action(SCAN, volume.place.env.clock.now()):
                diff = await receiving.run()
        finally:
            volume.progress_lb = 0
            volume.machine.leave()
    with disk_errors(volume.directory, "acknowledge"):
        failpoints.hit(FP_BEFORE_DONE)
    size_b = receiving.sink.size_b
    log.info("hash_backup.received", volume=volume.name, size_lb=offer.size_lb, diff=str(diff), size_b=size_b)
    return BackupDone(archive_uuid=parse_uuid(volume.record.archive_uuid))


class _Receiving:
    """One hash backup that is being received; the caller holds the step."""

    def __init__(self, volume: Volume, conn: Connection, offer: HashBackupOffer) -> None:
        self._volume = volume
        self._conn = conn
        self._offer = offer
        self.sink = WdiffSink(volume, None, NIL_UUID, conn.peer.node)

    async def run(self) -> Diff:
        """Do it all, up to the new snapshot; return its diff."""
        volume, conn, pools = self._volume, self._conn, self._volume.place.env.pools
        try:
            async with volume.giving_up():
                await volume.settle()
                await self._make_fit()
                latest = volume.latest.begin
                async with AsyncExitStack() as stack:
                    opening = stack.enter_async_context(open_virtual(volume, latest.gid_b, Pool.QUERY))
                    image = await with_filler(conn, opening)
                    await pools.run(Pool.RECEIVE, self._open)
                    await conn.send(BackupAccepted(latest=latest, size_lb=image.size_b // LB))
                    await self._compare(image)
                diff = await self._end(latest)
            await uninterrupted(self._commit(diff))
        finally:
            await pools.run(Pool.RECEIVE, self.sink.close)
        return diff

    async def _make_fit(self) -> None:
        """Refuse a device that the image cannot hold, and a history that cannot go on."""
        volume, size_lb = self._volume, self._offer.size_lb
        if hash_backup_gid(volume.latest.begin) > _GID_MAX:
            raise Refused("no generation is left in this history", hint="reset the volume and run a full backup")
        if size_lb > volume.size_lb:
            if not volume.place.config.auto_resize:
                raise Refused(
                    "the device is larger than the image",
                    hint="grow the volume at the archive, or set auto_resize there",
                    size_lb=size_lb,
                    image_lb=volume.size_lb,
                )
            await grow(volume, size_lb)
        elif size_lb < volume.size_lb:
            log.warning("hash_backup.device_smaller", volume=volume.name, size_lb=size_lb, image_lb=volume.size_lb)

    async def _compare(self, image: VirtualImage) -> None:
        """Let the storage reset its log, and take what differs."""
        volume, conn = self._volume, self._conn
        with disk_errors(volume.directory, "compare"):
            failpoints.hit(FP_AFTER_ACCEPT)
        uuid = (await conn.expect(LogReset)).uuid
        if uuid.hex() == volume.record.uuid:
            raise RemoteProtocolError("the log was not reset", uuid=uuid.hex())
        self.sink.uuid = uuid
        await conn.send(Ok())

        def read(offset_b: int, size_b: int) -> bytes:
            with disk_errors(volume.directory, "compare"):
                failpoints.hit(FP_MID_SCAN)
            return image.read(offset_b, size_b)

        await take_differences(
            volume, conn, read, self.sink, size_b=image.size_b, bulk_b=self._offer.bulk_b, seed=self._offer.seed
        )
        await conn.send(Ok())

    async def _end(self, latest: Snapshot) -> Diff:
        """Hear which snapshot it is, and return the label of the diff that leads there."""
        taken = (await self._conn.expect(BackupEnd)).snapshot
        if not hash_backup_gid(latest) <= taken.gid_b < taken.gid_e <= _GID_MAX:
            raise RemoteProtocolError("a hash backup ends with another snapshot", snapshot=taken, latest=latest)
        return self._volume.dated(hash_backup_diff(latest, taken, self._offer.started))

    async def _commit(self, diff: Diff) -> None:
        """Name the file, and let the new history begin: one step, whatever is cancelled meanwhile."""
        volume = self._volume
        with disk_errors(volume.directory, "finish the backup"):
            failpoints.hit(FP_BEFORE_COMMIT)
        self.sink.diff = diff
        gaps = gaps_after(volume, diff, cause=HASH_BACKUP)
        await commit_pending(volume, self.sink, diff, self.sink.uuid, gaps)
        volume.received = volume.place.env.clock.now()

    # in threads

    def _open(self) -> None:
        check_room(self._volume.place)
        self.sink.open()
