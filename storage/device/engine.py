"""A running device: the stages put together, and the operations of an operator or the storage daemon.

Source: docs/device.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

import structlog

from walbd.daemon.env import Env, Pool
from walbd.daemon.nbd_server import Writes
from walbd.daemon.tasks import uninterrupted
from walbd.errors import BadState, Refused, Stopping, WalbError
from walbd.ext.nbd import Chunk
from walbd.format.ring import Ring
from walbd.format.superblock import ring_size_pb
from walbd.fs import failpoints, physical_block_size
from walbd.ids import new_uuid
from walbd.protocol.nbd import STATE_HOLE, STATE_ZERO, Export, ExportFlag
from walbd.storage.device.blockio import read_cached, read_data
from walbd.storage.device.checkpoint import Checkpointer
from walbd.storage.device.core import Core, Lsids
from walbd.storage.device.data_stage import DataStage
from walbd.storage.device.log_stage import LogStage
from walbd.storage.device.start import OpenedDevice, open_device
from walbd.units import LB, MIB

log = structlog.get_logger()

FREEZE_MAX_S: Final = 86400

FP_RESET_BEFORE_SUPERBLOCK = failpoints.register(
    "device.reset.before_superblock", "a drained device with its old log"
)
FP_RESET_AFTER_SUPERBLOCK = failpoints.register(
    "device.reset.after_superblock", "an empty log with new uuid and salt; the old packs do not count any more"
)
FP_SET_OLDEST = failpoints.register("device.set_oldest.before_superblock", "the old oldest lsid")
FP_RESIZE = failpoints.register(
    "device.resize.before_superblock", "the old size; the data device may have grown already"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """Sizes and intervals of a device; docs/device.md tells what they trade."""

    checkpoint_interval_s: float = 10.0
    flush_interval_s: float = 0.1  # log is made permanent after so long at the latest
    flush_interval_b: int = 16 * MIB  # or after so much
    data_delay_s: float = 0.25  # permanent log waits so long for more (half of pending_max) to be written with
    pending_max_b: int = 64 * MIB  # logged and not yet on the data device: above it, writes wait
    inline_max_b: int = 512 << 10  # log writes up to here (0.1 ms) are made from the event loop


class FreezeState(Enum):
    """Whether new writes are held back, and by whom."""

    MELTED = "melted"
    FROZEN = "frozen"  # by the user, until melted or timed out
    BUSY = "busy"  # by reset-wal, until it has ended


class Engine:
    """One open device; an `NbdBackend`. Everything but the docstrings' exceptions runs on one event loop."""

    def __init__(
        self, env: Env, opened: OpenedDevice, tasks: asyncio.TaskGroup, *, name: str, tuning: Tuning = Tuning()
    ) -> None:
        lsids = Lsids(oldest=opened.superblock.oldest_lsid)
        lsids.set_all(opened.superblock.written_lsid)
        self.core = Core(env=env, ldev=opened.ldev, ddev=opened.ddev, superblock=opened.superblock, lsids=lsids)
        self.core.overflow = opened.overflow
        self.name = name
        self.data = DataStage(
            self.core, tasks, self._on_written, gather_b=tuning.pending_max_b // 2, delay_s=tuning.data_delay_s
        )
        self.checkpoints = Checkpointer(self.core, tuning.checkpoint_interval_s, self._on_checkpoint)
        self.log = LogStage(
            self.core,
            self.data,
            pending_max_b=tuning.pending_max_b,
            flush_interval_b=tuning.flush_interval_b,
            flush_interval_s=tuning.flush_interval_s,
            inline_max_b=tuning.inline_max_b,
            checkpoints=self.checkpoints,
        )
        self.freeze_state = FreezeState.MELTED
        self._melt_timer: asyncio.TimerHandle | None = None
        self._stopping = False  # no operation begins any more
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        self._workers = [
            tasks.create_task(self.log.run(), name="log-sync"),
            tasks.create_task(self.data.run(), name="data"),
            tasks.create_task(self.checkpoints.run(), name="checkpoint"),
        ]

    def _on_written(self) -> None:
        if self.log.ring_full:
            self.checkpoints.want()
        self.log.kick()

    def _on_checkpoint(self) -> None:
        assert self.core.lsids.in_order(), self.core.lsids
        self.log.kick()

    # NbdBackend

    def find(self, name: str) -> Export | None:
        if name not in ("", self.name):
            return None
        flags = (
            ExportFlag.HAS_FLAGS
            | ExportFlag.SEND_FLUSH
            | ExportFlag.SEND_FUA
            | ExportFlag.SEND_TRIM
            | ExportFlag.SEND_WRITE_ZEROES
            | ExportFlag.SEND_FAST_ZERO
            | ExportFlag.SEND_DF
            | ExportFlag.CAN_MULTI_CONN
        )
        if self.core.has_failed():
            flags |= ExportFlag.READ_ONLY
        return Export(self.name, self.core.size_b, flags, f"walb device {self.name}")

    def names(self) -> Sequence[str]:
        return [self.name]

    def size_b(self) -> int:
        return self.core.size_b

    def write(self, writes: Writes) -> None:
        self.log.submit(writes)

    def flush(self, done: Callable[[int], None]) -> None:
        self.log.flush(done)

    def fill(self, ranges: bytes, out: Chunk) -> bytes:
        return self.data.overlay.fill(ranges, out)

    def read_cached(self, ranges: bytes, out: Chunk) -> bytes:
        missing = self.data.overlay.fill(ranges, out)
        if not missing:
            return missing
        try:
            return read_cached(self.core.ddev, missing, out)
        except WalbError:
            return missing  # `read` will meet the error again, and its caller can answer with it

    async def read(self, ranges: bytes, out: Chunk) -> None:
        await self.core.env.pools.run(Pool.SEND, read_data, self.core.ddev, ranges, out)

    async def extents(self, offset_b: int, size_b: int, n_max: int) -> list[tuple[int, int]]:
        # First the overlay, then the disk: what leaves the overlay in between is on the disk.
        pending = self.data.overlay.extents(offset_b, size_b)
        return await self.core.env.pools.run(Pool.QUERY, self._extents, offset_b, size_b, n_max, pending)

    def _extents(
        self, offset_b: int, size_b: int, n_max: int, pending: list[tuple[int, int, bool]]
    ) -> list[tuple[int, int]]:
        """Merge what the overlay has over the holes and data of the data device; runs in a thread."""
        end_b = offset_b + size_b
        hole = STATE_HOLE | STATE_ZERO
        found: list[tuple[int, int]] = []  # (end, state)

        def add(end: int, state: int) -> None:
            if found and found[-1][1] == state:
                found[-1] = (end, state)
            elif end > (found[-1][0] if found else offset_b):
                found.append((end, state))

        def add_disk(begin: int, end: int) -> None:
            for data_b, length_b in self.core.env.fs.data_ranges(self.core.ddev, begin, end):
                add(data_b, hole)
                add(data_b + length_b, 0)
                if len(found) > n_max + 1:
                    return
            add(end, hole)

        pos = offset_b
        for begin, end, is_zero in pending:
            if begin > pos:
                add_disk(pos, begin)
            if len(found) > n_max:
                break
            add(end, hole if is_zero else 0)
            pos = end
        else:
            if pos < end_b:
                add_disk(pos, end_b)
        lengths, pos = [], offset_b
        for end, state in found[:n_max]:
            lengths.append((end - pos, state))
            pos = end
        return lengths

    # operations

    @property
    def usage_pb(self) -> int:
        """Log that must be kept for consumers, or was overwritten before they took it."""
        return self.core.lsids.latest - self.core.lsids.oldest

    async def drain(self) -> None:
        """Return once everything begun is on the data device; raises ReadOnlyDevice.

        What is in the queue goes first, unless the queue is held.
        """
        core, lsids = self.core, self.core.lsids
        self.log.kick()
        while not (self.log.is_idle and lsids.written == lsids.latest):
            core.check_alive()
            if lsids.completed > lsids.permanent:
                self.log.want_sync()
            self.data.hurry()
            await core.settled.next()
        core.check_alive()

    def _check_running(self) -> None:
        if self._stopping:
            raise Stopping("the device is being stopped")

    async def take_checkpoint(self) -> None:
        """Make everything on the data device durable and note it; raises ReadOnlyDevice."""
        self._check_running()
        await self.checkpoints.take()

    async def set_oldest(self, lsid: int) -> None:
        """Give up the log below `lsid`: durably as far as `prev_written`; a later checkpoint does the rest.

        Raises Refused unless oldest <= lsid <= permanent and a pack begins at `lsid` (or the log ends there).
        """
        self._check_running()
        core, lsids = self.core, self.core.lsids
        async with self.checkpoints.exclusive():
            if not lsids.oldest <= lsid <= lsids.permanent:
                raise Refused(
                    "cannot delete log up to there",
                    hint="only log that is permanent can have been taken by a consumer",
                    lsid=lsid,
                    oldest=lsids.oldest,
                    permanent=lsids.permanent,
                )
            ring = Ring(core.ldev, core.superblock)
            if lsid < lsids.permanent and not await core.env.pools.run(Pool.RECORD, ring.has_pack, lsid):
                raise Refused("no pack begins at that lsid", lsid=lsid)
            core.given_up = max(core.given_up, lsid)
            await self.checkpoints.give_up(FP_SET_OLDEST)
        self.log.kick()
        log.debug("device.log_deleted", oldest=lsids.oldest, given_up=lsid)

    async def freeze(self, timeout_s: float) -> None:
        """Hold back new writes, and return once all others are on the data device.

        0: until melted. Freezing again sets the timeout anew. Reads go on. Raises ReadOnlyDevice, Refused.
        """
        self._check_running()
        if self.freeze_state is FreezeState.BUSY:
            raise BadState("the log is being reset", hint="try again when that has ended")
        if not 0 <= timeout_s <= FREEZE_MAX_S:
            raise Refused("bad timeout", hint=f"0 to {FREEZE_MAX_S} seconds", timeout_s=timeout_s)
        self.core.check_alive()
        self.freeze_state = FreezeState.FROZEN
        self.log.hold()
        self.checkpoints.paused = True
        self._set_melt_timer(timeout_s)
        self.core.log_advanced.set()  # watchers are told of flags too
        log.info("device.frozen", timeout_s=timeout_s)
        await self.drain()

    def melt(self) -> None:
        """Let writes go on; harmless when not frozen. Raises BadState while the log is being reset."""
        if self.freeze_state is FreezeState.BUSY:
            raise BadState("the log is being reset", hint="it melts by itself")
        if self.freeze_state is FreezeState.FROZEN:
            log.info("device.melted")
        self._melt()

    def _melt(self) -> None:
        self._set_melt_timer(0)
        self.freeze_state = FreezeState.MELTED
        self.checkpoints.paused = False
        self.log.release()
        self.core.log_advanced.set()

    def _set_melt_timer(self, timeout_s: float) -> None:
        if self._melt_timer is not None:
            self._melt_timer.cancel()
        self._melt_timer = self._loop.call_later(timeout_s, self._melt_timed_out) if timeout_s else None

    def _melt_timed_out(self) -> None:
        log.warning("device.freeze_timed_out")
        self._melt_timer = None
        self._melt()

    async def reset_wal(self) -> None:
        """Empty the log: lsid 0, new uuid, new salt, no overflow; a grown log device is used wholly.

        Raises BadState when frozen, Refused when the log device has shrunk, ReadOnlyDevice.
        """
        self._check_running()
        if self.freeze_state is not FreezeState.MELTED:
            raise BadState("the device is frozen", hint="melt it first")
        self.freeze_state = FreezeState.BUSY
        self.log.hold()
        try:
            await self.drain()
            async with self.checkpoints.exclusive():
                # A client that leaves now must not leave a new log on disk and the old one in memory.
                await uninterrupted(self._reset())
        finally:
            self._melt()

    async def _reset(self) -> None:
        core = self.core
        old = core.superblock
        ring_pb = ring_size_pb(await core.env.pools.run(Pool.RECORD, core.ldev.size), old.pbs)
        ring_pb -= old.metadata_size_pb
        if ring_pb < old.ring_size_pb:
            raise Refused("the log device has shrunk", ring_pb=ring_pb, was_pb=old.ring_size_pb)
        await self.checkpoints.sync_data()
        salt = old.salt
        while salt in (old.salt, 0):
            salt = core.env.rng.getrandbits(32)
        await self.checkpoints.write(
            FP_RESET_BEFORE_SUPERBLOCK,
            oldest=0,
            written=0,
            uuid=new_uuid(core.env.rng),
            salt=salt,
            ring_size_pb=ring_pb,
        )
        core.lsids.set_all(0)
        core.lsids.oldest = core.given_up = 0
        core.overflow = False
        self.log.reset()
        await self.checkpoints.step(self._clear_first_pb, "clearing the log")
        log.info("device.log_reset", uuid=core.superblock.uuid.hex(), ring_pb=ring_pb)
        core.log_advanced.set()

    def _clear_first_pb(self) -> None:
        """Make sure that no old block can be taken for the first pack, whatever the salts."""
        failpoints.hit(FP_RESET_AFTER_SUPERBLOCK)
        superblock = self.core.superblock
        self.core.ldev.pwrite(bytes(superblock.pbs), superblock.offset_b(0))
        self.core.ldev.sync()

    async def resize(self, size_lb: int) -> None:
        """Grow the volume; 0: to the size of the data device. A data device that is a file grows along.

        Raises Refused when it would shrink, or the data device is a block device and too small.
        """
        self._check_running()
        core = self.core
        async with self.checkpoints.exclusive():
            ddev_lb = await core.env.pools.run(Pool.RECORD, core.ddev.size) // LB
            size_lb = size_lb or ddev_lb
            if size_lb < core.superblock.device_size_lb:
                raise Refused("a volume cannot shrink", size_lb=size_lb, was_lb=core.superblock.device_size_lb)
            if size_lb > ddev_lb:
                await core.env.pools.run(Pool.RECORD, self._grow_data, size_lb)
            await self.checkpoints.write(
                FP_RESIZE, oldest=core.lsids.oldest, written=core.lsids.prev_written, device_size_lb=size_lb
            )
        log.info("device.resized", size_lb=size_lb)

    def _grow_data(self, size_lb: int) -> None:
        ddev = self.core.ddev
        if ddev.fileno() >= 0 and physical_block_size(ddev) is not None:
            raise Refused("the data device is too small", hint="grow the block device first", ddev=str(ddev.path))
        ddev.truncate(size_lb * LB)
        ddev.sync()

    def refuse_writes(self) -> None:
        """Refuse writes and operations from now on; what was taken before is still done, frozen or not."""
        self._stopping = True
        self.log.refuse()
        if self.freeze_state is not FreezeState.BUSY:  # a reset melts when it has ended, and not before
            self._melt()

    async def stop(self) -> None:
        """End in an orderly way: nothing is left to redo. A read-only device just closes."""
        if self._stopped:
            return
        self._stopped = True
        self.refuse_writes()
        try:
            await self.core.log_advanced.wait_for(lambda: self.freeze_state is not FreezeState.BUSY)
            if not self.core.has_failed():
                await self.drain()
                await self.checkpoints.take()
        except WalbError:
            pass  # logged where it failed; the next start redoes the log
        finally:
            for worker in self._workers:
                worker.cancel()
            await asyncio.wait(self._workers)
            # Also a device that has failed may be writing still, and descriptors are used again once closed.
            await self.core.settled.wait_for(lambda: not self.log.is_writing)
            await self.checkpoints.settle()
            self.core.ldev.close()
            self.core.ddev.close()


async def resize_stopped(env: Env, ldev_path: Path, ddev_path: Path, name: str, size_lb: int) -> int:
    """Grow the volume of a device that is not served; return its size [lb]. Raises Busy if it is."""
    opened = await env.pools.run(Pool.MAINTAIN, open_device, env.fs, ldev_path, ddev_path)
    async with asyncio.TaskGroup() as tasks:
        engine = Engine(env, opened, tasks, name=name)
        try:
            await engine.resize(size_lb)
            return engine.core.superblock.device_size_lb
        finally:
            await engine.stop()
