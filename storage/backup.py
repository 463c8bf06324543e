"""The storage's side of a full backup: the live volume is copied while it is written to.

The log is reset first, so everything written from then on is in the log of the new history; it is sent through
the proxies during the scan already. The copy is dirty: each block shows some instant between the reset and the
snapshot at the end. The logs make it clean at the archive. Source: docs/storage.md, "Full backup".
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Final

import structlog

from walbd.daemon.conn import Connection, dial, with_filler
from walbd.daemon.copying import ImageSource
from walbd.daemon.full_copy import send_full
from walbd.daemon.jobs import Job
from walbd.daemon.states import Step
from walbd.errors import ConnectError, RemoteError, TimedOut, WalbError
from walbd.ext.buffers import Buf
from walbd.format.meta import Snapshot
from walbd.fs import failpoints
from walbd.ids import Gid
from walbd.protocol.base import Fact, Ok
from walbd.protocol.transfer import BackupEnd, FullBackupOffer, FullChunk, LogReset, Packing
from walbd.storage.device.interface import DataReader
from walbd.storage.pace import Pace
from walbd.storage.shared import hit
from walbd.storage.states import Command, State
from walbd.storage.volume import Volume
from walbd.units import KIB, LB, MIB

log = structlog.get_logger()

PIECE_B: Final = 2 * MIB  # read at once
PIECES_AHEAD: Final = 4  # being read or packed
GRANULE_B: Final = 64 * KIB  # least size in which zeros are looked for
ZEROS_MAX_B: Final = 32 * MIB  # told of in one message

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
    "storage.backup.after_done", "SyncReady, while the archive has the backup: back it up again"
)

_LAST_WORDS_S: Final = 2.0

Chunk = tuple[FullChunk, Buf]  # without payload: zeros


async def begin_full_backup(volume: Volume, bulk_b: int) -> Job:
    """Ask the archive, and begin the backup as a job once it has agreed.

    Raises what the state table, the device, or the archive refuses; then nothing has changed.
    """
    shared = volume.shared
    volume.check(Command.FULL_BACKUP)
    async with AsyncExitStack() as stack:
        step = volume.machine.enter(Command.FULL_BACKUP)
        stack.callback(volume.machine.leave)
        info = await volume.info()
        conn = await stack.enter_async_context(dial(shared.env, shared.me, shared.config.archive_address()))
        await conn.call(
            FullBackupOffer(volume=volume.name, size_lb=info.size_lb, started=shared.now(), bulk_b=bulk_b)
        )
        hit(FP_AFTER_ACCEPT, volume.directory)
        backup = FullBackup(volume, conn, step, size_b=info.size_lb * LB, bulk_b=bulk_b)
        job = shared.start_job("full-backup", volume.name, lambda job: backup.run(job, kept))
        kept = stack.pop_all()
        return job


class FullBackup:
    """One running full backup."""

    def __init__(self, volume: Volume, conn: Connection, step: Step, *, size_b: int, bulk_b: int) -> None:
        self._volume = volume
        self._conn = conn
        self._step = step
        self._size_b = size_b
        self._bulk_b = bulk_b
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._wire_b = 0

    async def run(self, job: Job, stack: AsyncExitStack) -> dict[str, Fact]:
        """Do it all; `stack` holds the step of the state machine and the connection."""
        volume = self._volume
        async with stack:
            try:
                return await volume.unless_forced(lambda: self._in_slot(job))
            except (ConnectError, TimedOut, RemoteError):
                raise
            except WalbError as exc:
                await self._tell(exc)
                raise
            finally:
                if volume.machine.state is not State.TARGET and volume.monitored:
                    await volume.end_monitoring()

    async def _tell(self, error: WalbError) -> None:
        """Tell the archive why the copy ends here, if it still listens; a lost connection would do as well."""
        try:
            async with asyncio.timeout(_LAST_WORDS_S):
                await self._conn.send_error(error)
        except TimeoutError:
            pass

    async def _in_slot(self, job: Job) -> dict[str, Fact]:
        """Wait for one of the few places for scans; the archive is told that we are still there."""
        slots = self._volume.shared.scan_slots
        job.begin("waiting for other scans")
        await with_filler(self._conn, slots.acquire())
        try:
            return await self._backup(job)
        finally:
            slots.release()

    async def _backup(self, job: Job) -> dict[str, Fact]:
        volume, conn = self._volume, self._conn
        began = self._loop.time()
        job.begin("resetting the log")
        info = await volume.reset_log(0)
        hit(FP_AFTER_RESET, volume.directory)
        await conn.call(LogReset(uuid=info.uuid))
        volume.begin_monitoring()

        job.begin("copying", total=self._size_b)
        reader = await volume.device.open_data()
        try:
            await self._copy(job, reader)
        finally:
            await reader.close()
        await conn.expect(Ok)

        job.begin("finishing")
        hit(FP_BEFORE_END, volume.directory)
        point = await volume.take_point()
        volume.shared.scheduler.hurry(volume.name)
        done = await conn.call(BackupEnd(snapshot=Snapshot(Gid(0), point.gid)))
        hit(FP_AFTER_DONE, volume.directory)
        await volume.machine.commit_step(self._step, volume.commit)
        return {
            "gid": point.gid,
            "size_b": self._size_b,
            "wire_b": self._wire_b,
            "elapsed_s": round(self._loop.time() - began, 3),
            "archive_uuid": done.archive_uuid.hex(),
        }

    async def _copy(self, job: Job, reader: DataReader) -> None:
        """Send the whole volume in order."""
        shared = self._volume.shared

        def tick(done_b: int) -> None:
            if self._volume.lost is not None:
                raise self._volume.lost
            job.progress(done_b)

        source = ImageSource(read=reader.read, size_b=self._size_b, tick=tick, spend=Pace(shared.scan_limit).spend)
        packing = Packing(shared.config.backup_packing)
        self._wire_b = await send_full(self._conn, shared.env.pools, source, bulk_b=self._bulk_b, packing=packing)
