"""The storage's side of backups: the live volume is copied, or compared, while it is written to.

The log is reset first, so everything written from then on is in the log of the new history; it is sent through
the proxies during the scan already. The copy is dirty: each block shows some instant between the reset and the
snapshot at the end. The logs make it clean at the archive.

A full backup sends all of it; a hash backup what differs from the archive's latest snapshot, and so continues its
history. Source: docs/storage.md, "Backups".
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from contextlib import AsyncExitStack
from typing import ClassVar, Final

from walbd.daemon.conn import Connection, dial, with_filler
from walbd.daemon.copying import ImageSource, tell
from walbd.daemon.full_copy import send_full
from walbd.daemon.hash_sync import send_differences
from walbd.daemon.jobs import Job
from walbd.daemon.states import Step
from walbd.errors import ConnectError, Refused, RemoteError, RemoteProtocolError, TimedOut, WalbError
from walbd.format.compress import CompressOpt
from walbd.format.meta import Snapshot, hash_backup_gid
from walbd.fs import failpoints
from walbd.ids import NO_GID, Gid
from walbd.protocol.base import Fact, Ok
from walbd.protocol.codec import Request
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupAccepted, BackupEnd, FullBackupOffer, LogReset, Packing
from walbd.storage.device.interface import DataReader, DeviceInfo
from walbd.storage.pace import Pace
from walbd.storage.shared import hit
from walbd.storage.states import Command, State
from walbd.storage.volume import Volume
from walbd.units import LB

FP_AFTER_ACCEPT: Final = failpoints.register(
    "storage.backup.after_accept", "SyncReady, the log as it was; the archive drops the backup"
)
FP_AFTER_RESET: Final = failpoints.register(
    "storage.backup.after_reset", "SyncReady with a new log; the archive drops the backup"
)
FP_BEFORE_END: Final = failpoints.register(
    "storage.backup.before_end", "SyncReady, a complete copy that the archive drops"
)
FP_AFTER_DONE: Final = failpoints.register(
    "storage.backup.after_done", "SyncReady, while the archive has the backup: a hash backup continues it"
)


async def begin_full_backup(volume: Volume, bulk_b: int) -> Job:
    """Ask the archive, and begin a full backup as a job once it has agreed.

    Raises what the state table, the device, or the archive refuses; then nothing has changed.
    """
    return await FullBackup(volume, bulk_b).begin()


async def begin_hash_backup(volume: Volume, bulk_b: int, gid_past: int = 0) -> Job:
    """The same for a hash backup; it begins above `gid_past`, whatever this storage and the archive know."""
    return await HashBackup(volume, bulk_b, gid_past).begin()


class Backup(ABC):
    """One backup, from the question to the archive to its end."""

    NAME: ClassVar[str]
    COMMAND: ClassVar[Command]
    PHASE: ClassVar[str]  # what the scan is called

    def __init__(self, volume: Volume, bulk_b: int) -> None:
        self._volume = volume
        self._bulk_b = bulk_b
        self._size_b = 0  # of the device

    @abstractmethod
    def _offer(self, info: DeviceInfo) -> Request[BackupAccepted]:
        """Return what to ask the archive."""

    @abstractmethod
    def _first_gid(self, accepted: BackupAccepted) -> Gid:
        """Return where the new history begins; raises RemoteProtocolError."""

    @abstractmethod
    async def _scan(self, job: Job, conn: Connection, source: ImageSource, uuid: bytes) -> dict[str, Fact]:
        """Send the volume; return when the archive has all of it. Returns facts for the job's result."""

    async def begin(self) -> Job:
        """Ask the archive, and begin the work as a job."""
        volume, shared = self._volume, self._volume.shared
        volume.check(self.COMMAND)
        async with AsyncExitStack() as stack:
            step = volume.machine.enter(self.COMMAND)
            stack.callback(volume.machine.leave)
            info = await volume.info()
            self._size_b = info.size_lb * LB
            address = shared.config.archive_address()
            conn = await stack.enter_async_context(dial(shared.env, shared.me, address))
            accepted = await conn.call(self._offer(info))
            gid = self._first_gid(accepted)
            hit(FP_AFTER_ACCEPT, volume.directory)
            job = shared.start_job(
                self.NAME, volume.name, lambda job: self._run(job, conn, step, gid, accepted, kept)
            )
            kept = stack.pop_all()
            return job

    async def _run(
        self, job: Job, conn: Connection, step: Step, gid: Gid, accepted: BackupAccepted, stack: AsyncExitStack
    ) -> dict[str, Fact]:
        """Do it all; `stack` holds the step of the state machine and the connection."""
        volume = self._volume
        async with stack:
            try:
                return await volume.unless_forced(self._in_slot(job, conn, step, gid, accepted))
            except (ConnectError, TimedOut, RemoteError):
                raise
            except WalbError as exc:
                await tell(conn, exc)
                raise
            finally:
                if volume.machine.state is not State.TARGET and volume.monitored:
                    await volume.end_monitoring()

    async def _in_slot(
        self, job: Job, conn: Connection, step: Step, gid: Gid, accepted: BackupAccepted
    ) -> dict[str, Fact]:
        """Wait for one of the few places for scans; the archive is told that we are still there."""
        job.begin("waiting for other scans")
        with self._volume.shared.scan_slots.turn() as comes:
            await with_filler(conn, comes())
            return await self._backup(job, conn, step, gid, accepted)

    async def _backup(
        self, job: Job, conn: Connection, step: Step, gid: Gid, accepted: BackupAccepted
    ) -> dict[str, Fact]:
        volume, loop = self._volume, asyncio.get_running_loop()
        began = loop.time()
        job.begin("resetting the log")
        self._check_size(await volume.info())
        info = await volume.reset_log(gid)
        hit(FP_AFTER_RESET, volume.directory)
        self._check_size(info)
        await conn.call(LogReset(uuid=info.uuid))
        volume.begin_monitoring()

        size_b = max(self._size_b, accepted.size_lb * LB)
        job.begin(self.PHASE, total=size_b)
        reader = await volume.device.open_data()
        try:
            facts = await self._scan(job, conn, self._source(job, reader, size_b), info.uuid)
        finally:
            await reader.close()

        job.begin("finishing")
        hit(FP_BEFORE_END, volume.directory)
        point = await volume.take_point()
        volume.shared.scheduler.hurry(volume.name)
        done = await conn.call(BackupEnd(snapshot=Snapshot(gid, point.gid)))
        hit(FP_AFTER_DONE, volume.directory)
        await volume.machine.commit_step(step, volume.commit)
        return {
            "gid": point.gid,
            "size_b": self._size_b,
            **facts,
            "elapsed_s": round(loop.time() - began, 3),
            "archive_uuid": done.archive_uuid.hex(),
        }

    def _check_size(self, info: DeviceInfo) -> None:
        """Raise Refused when the volume has grown since the archive agreed, maybe long ago.

        What was written to the new part before the log was reset is in no log, and the copy would end before it.
        """
        if info.size_lb * LB != self._size_b:
            raise Refused(
                "the volume has grown since the archive agreed",
                hint="run the backup again",
                volume=self._volume.name,
                agreed_b=self._size_b,
                size_b=info.size_lb * LB,
            )

    def _source(self, job: Job, reader: DataReader, size_b: int) -> ImageSource:
        """Return the live volume, up to `size_b`, as fast as scans may go."""

        def tick(done_b: int) -> None:
            if self._volume.lost is not None:
                raise self._volume.lost
            job.progress(done_b)

        spend = Pace(self._volume.shared.scan_limit).spend
        return ImageSource(read=reader.read, size_b=size_b, data_b=self._size_b, tick=tick, spend=spend)


class FullBackup(Backup):
    """A copy of everything, with which a new history begins at generation 0."""

    NAME = "full-backup"
    COMMAND = Command.FULL_BACKUP
    PHASE = "copying"

    def _offer(self, info: DeviceInfo) -> Request[BackupAccepted]:
        now = self._volume.shared.now()
        return FullBackupOffer(volume=self._volume.name, size_lb=info.size_lb, started=now, bulk_b=self._bulk_b)

    def _first_gid(self, accepted: BackupAccepted) -> Gid:
        if accepted.latest is not None or accepted.size_lb:
            raise RemoteProtocolError("the archive takes a full backup for another one")
        return Gid(0)

    async def _scan(self, job: Job, conn: Connection, source: ImageSource, uuid: bytes) -> dict[str, Fact]:
        shared = self._volume.shared
        packing = Packing(shared.config.backup_packing)
        wire_b = await send_full(conn, shared.env.pools, source, bulk_b=self._bulk_b, packing=packing)
        await conn.expect(Ok)
        return {"wire_b": wire_b}


class HashBackup(Backup):
    """What differs from the archive's latest snapshot: the history goes on above it."""

    NAME = "hash-backup"
    COMMAND = Command.HASH_BACKUP
    PHASE = "comparing"

    def __init__(self, volume: Volume, bulk_b: int, gid_past: int) -> None:
        super().__init__(volume, bulk_b)
        self._gid_past = gid_past
        self._seed = volume.shared.env.rng.getrandbits(64)

    def _offer(self, info: DeviceInfo) -> Request[BackupAccepted]:
        return HashBackupOffer(
            volume=self._volume.name,
            size_lb=info.size_lb,
            started=self._volume.shared.now(),
            bulk_b=self._bulk_b,
            seed=self._seed,
        )

    def _first_gid(self, accepted: BackupAccepted) -> Gid:
        latest = accepted.latest
        if latest is None or latest.is_none or latest.gid_e >= NO_GID >> 1 or accepted.size_lb * LB < self._size_b:
            raise RemoteProtocolError(
                "the archive has nothing to compare with", latest=latest, size_lb=accepted.size_lb
            )
        # A snapshot that was answered, here or elsewhere, and then lost on its way must not come back with other
        # contents.
        gid = max(hash_backup_gid(latest), self._volume.record.gid_greatest + 1, self._gid_past + 1)
        if gid >= NO_GID >> 1:
            raise Refused("no generation is left", hint="clear the volume, and run a full backup", gid=gid)
        return Gid(gid)

    async def _scan(self, job: Job, conn: Connection, source: ImageSource, uuid: bytes) -> dict[str, Fact]:
        shared = self._volume.shared
        compress = CompressOpt.parse(shared.config.backup_packing)
        found = await send_differences(
            conn, shared.env.pools, source, bulk_b=self._bulk_b, seed=self._seed, uuid=uuid, compress=compress
        )
        return {"differing_b": found.differing_b, "wire_b": found.wire_b}
