"""The storage's side of a full backup: the live volume is copied while it is written to.

The log is reset first, so everything written from then on is in the log of the new history; it is sent through
the proxies during the scan already. The copy is dirty: each block shows some instant between the reset and the
snapshot at the end. The logs make it clean at the archive. Source: docs/storage.md, "Full backup".
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Final

import structlog
import xxhash

from walbd.daemon.conn import Connection, dial, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.daemon.states import Step
from walbd.errors import ConnectError, DiskFailed, RemoteError, TimedOut, WalbError
from walbd.ext.buffers import Buf
from walbd.ext.checksum import is_zero
from walbd.format.meta import Snapshot
from walbd.fs import failpoints
from walbd.ids import Gid
from walbd.protocol.base import End, Fact, Filler, Ok
from walbd.protocol.transfer import BackupEnd, FullBackupOffer, FullChunk, LogReset, Packing
from walbd.storage.device.interface import DataReader
from walbd.storage.flow import in_order
from walbd.storage.logread import pack_bytes
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
        await conn.send(End())
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
        """Send the whole volume in order. Reading and packing go on while chunks are being sent."""
        granule_b = granule_of(self._bulk_b)
        packing = Packing(self._volume.shared.config.backup_packing)
        piece_b = max(PIECE_B // granule_b, 1) * granule_b
        pieces = ((at, min(piece_b, self._size_b - at)) for at in range(0, self._size_b, piece_b))
        pools = self._volume.shared.env.pools
        pace = Pace(self._volume.shared.scan_limit)
        zeros = Zeros()

        async def read(piece: tuple[int, int]) -> list[Chunk]:
            offset_b, size_b = piece
            data = await reader.read(offset_b, size_b)
            if len(data) != size_b:
                raise DiskFailed("the volume ended before its size", offset=offset_b, size_b=size_b)
            return await pools.run(Pool.SEND, cut_piece, data, offset_b, granule_b, packing)

        done_b = 0
        async with in_order(pieces, read, depth=PIECES_AHEAD) as cut:
            async for chunks in cut:
                if self._volume.lost is not None:
                    raise self._volume.lost
                for chunk in chunks:
                    for ready in zeros.join(*chunk):
                        await self._send(*ready)
                if self._is_silent():
                    for ready in zeros.flush():
                        await self._send(*ready)
                size_b = min(piece_b, self._size_b - done_b)
                done_b += size_b
                job.progress(done_b)
                await pace.spend(size_b, self._keep_alive)
        for ready in zeros.flush():
            await self._send(*ready)

    async def _send(self, chunk: FullChunk, payload: Buf) -> None:
        if len(payload):
            await self._conn.send(chunk, payload)
        else:
            await self._conn.send(chunk)
        self._sent_at = self._loop.time()
        self._wire_b += len(payload)

    def _is_silent(self) -> bool:
        return self._loop.time() - self._sent_at > self._conn.io_timeout_s / 4

    async def _keep_alive(self) -> None:
        """While the scan is held back, tell the archive now and then that we are still there."""
        if self._is_silent():
            await self._conn.send(Filler())
            self._sent_at = self._loop.time()


class Zeros:
    """Joins the zero chunks that follow one another, so that an empty volume costs few messages."""

    def __init__(self) -> None:
        self._run: FullChunk | None = None

    def join(self, chunk: FullChunk, payload: Buf) -> Iterator[Chunk]:
        """Take the next chunk; yield what can be sent now, in order. No payload: zeros."""
        run = self._run
        if len(payload):
            yield from self.flush()
            yield chunk, payload
        elif run is not None and run.size_b + chunk.size_b <= ZEROS_MAX_B:
            self._run = FullChunk(offset_b=run.offset_b, size_b=run.size_b + chunk.size_b)
        else:
            yield from self.flush()
            self._run = chunk

    def flush(self) -> Iterator[Chunk]:
        """Yield what is held back."""
        run, self._run = self._run, None
        if run is not None:
            yield run, b""


def granule_of(bulk_b: int) -> int:
    """Return in which pieces zeros are looked for: whole bulks, and not many tiny ones."""
    return -(-GRANULE_B // bulk_b) * bulk_b


def cut_piece(data: memoryview, offset_b: int, granule_b: int, packing: Packing) -> list[Chunk]:
    """Cut a piece of the volume into runs of zeros and runs of data, packed; runs in a thread."""
    if is_zero(data):
        return [(FullChunk(offset_b=offset_b, size_b=len(data)), b"")]
    chunks: list[Chunk] = []
    begin = 0
    zero = is_zero(data[:granule_b])
    for at in range(granule_b, len(data) + granule_b, granule_b):
        zero_here = not zero if at >= len(data) else is_zero(data[at : at + granule_b])
        if zero_here != zero:
            end = min(at, len(data))
            chunks.append(_chunk(data[begin:end], offset_b + begin, zero, packing))
            begin, zero = end, zero_here
    return chunks


def _chunk(data: memoryview, offset_b: int, zero: bool, packing: Packing) -> Chunk:
    if zero:
        return FullChunk(offset_b=offset_b, size_b=len(data)), b""
    kind, payload = pack_bytes(data, packing)
    xxh = xxhash.xxh3_64_intdigest(data)
    return FullChunk(offset_b=offset_b, size_b=len(data), packing=kind, xxh=xxh), payload
