"""From a request to durable log: packing, the log write, the answer, and group commit.

Everything happens on the event loop but the disk: small batches are written from the loop (the page cache takes
them in some microseconds), larger ones and all syncs in threads. One log write runs at a time, so positions
complete in order. A write is answered once its pack is written and its data are in the overlay; with FUA, once
a sync that began later has ended. Requests wait in the queue while the device is held, the data stage is
behind, or the ring is full.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

import structlog

from walbd.daemon.env import Pool
from walbd.daemon.nbd_server import Writes
from walbd.errors import WalbError
from walbd.ext.packer import LogBatch, Packer
from walbd.format.logpack import LOG_RECORD_B
from walbd.format.superblock import Superblock
from walbd.fs import failpoints
from walbd.protocol.nbd import Error
from walbd.storage.device.blockio import write_log
from walbd.storage.device.checkpoint import Checkpointer
from walbd.storage.device.core import Core
from walbd.storage.device.data_stage import DataStage, LoggedBatch, cost_b
from walbd.units import MIB

log = structlog.get_logger()

BATCH_MAX_B: Final = 4 * MIB
RECORD_MAX_B: Final = 1 * MIB
UNSYNCED_MAX_B: Final = 4096 * MIB  # of log that is not permanent: the next start looks no further (FORGET_MAX_B)
_SLOW_WRITE_S: Final = 0.05  # a write from the loop that took longer: the disk makes writers wait
_SLOW_PAUSE_S: Final = 1.0  # for so long then, all writes go to threads

FP_BEFORE_WRITE = failpoints.register(
    "device.log.before_write", "requests that were received, and nothing of them in the log"
)
FP_AFTER_WRITE = failpoints.register(
    "device.log.after_write", "packs in the page cache that nobody was told of: they may survive or not"
)
FP_BEFORE_SYNC = failpoints.register(
    "device.log.before_sync", "packs that were answered without durability, and flushes that were not"
)
FP_AFTER_SYNC = failpoints.register("device.log.after_sync", "durable packs whose flush was not answered")


class _Part(NamedTuple):
    """What one `Writes` has in a batch."""

    writes: Writes
    records: bytes
    begin: int  # requests [begin, end) are complete with this batch
    end: int


class _Waiter(NamedTuple):
    """Somebody to tell once `lsid` is permanent, or that it never will be."""

    lsid: int
    tell: Callable[[int], None]


def make_packer(superblock: Superblock) -> Packer:
    """Return the packer for the ring that a superblock describes."""
    record_max_pb = max(1, min(RECORD_MAX_B // superblock.pbs, superblock.ring_size_pb // 4))
    return Packer(
        pbs=superblock.pbs,
        ring_pb=superblock.ring_size_pb,
        ring_begin_b=superblock.ring_offset_pb * superblock.pbs,
        salt=superblock.salt,
        record_max_pb=record_max_pb,
        pack_max_pb=record_max_pb,
    )


class LogStage:
    """The queue of writes, the log device, and who waits for durability."""

    def __init__(
        self,
        core: Core,
        data: DataStage,
        *,
        pending_max_b: int,
        flush_interval_b: int,
        flush_interval_s: float,
        inline_max_b: int,
        checkpoints: Checkpointer,
    ) -> None:
        self._core = core
        self._data = data
        self._pending_max_b = pending_max_b
        self._flush_interval_b = flush_interval_b
        self._flush_interval_s = flush_interval_s
        self._inline_max_b = inline_max_b
        self._checkpoints = checkpoints
        self._loop = asyncio.get_running_loop()
        self._packer = make_packer(core.superblock)
        self._queue: deque[Writes] = deque()
        self._waiters: deque[_Waiter] = deque()  # ascending
        self._held = False
        self._stopping = False
        self._scheduled = False
        self._writing: asyncio.Future[None] | None = None  # a log write in a thread
        self._slow_until = 0.0
        self._sync_timer: asyncio.TimerHandle | None = None
        self._sync_wanted = False
        self.syncs_begun = 0
        self.syncs_done = 0
        self.ring_full = False  # the queue waits for a checkpoint
        self._epoch = 0  # counts resets: a sync that began before one tells nothing about the new log

    # what the server and the engine call

    def submit(self, writes: Writes) -> None:
        """Take requests; they are answered in time."""
        if self._stopping:
            writes.answer(0, writes.n, Error.SHUTDOWN)
            return
        self._queue.append(writes)
        self.kick()

    def flush(self, done: Callable[[int], None]) -> None:
        """Call `done(error)` once everything received so far and not held back is durable."""
        core = self._core
        if core.has_failed():
            done(Error.IO)
            return
        if not self._held and not self._scheduled and self._queue:
            self.kick()
        if self._scheduled:
            # Writes of this very turn are packed first, so that the flush covers them too.
            self._loop.call_soon(self._wait_permanent, done)
        else:
            self._wait_permanent(done)

    def _wait_permanent(self, done: Callable[[int], None]) -> None:
        core = self._core
        if core.has_failed():
            done(Error.IO)
        elif core.lsids.latest <= core.lsids.permanent:
            done(0)
        else:
            self._waiters.append(_Waiter(core.lsids.latest, done))
            if core.lsids.completed == core.lsids.latest:
                self.want_sync()

    def kick(self) -> None:
        """Look at the queue soon: something came, or what it waited for may have happened."""
        if not self._scheduled and self._writing is None:
            self._scheduled = True
            self._loop.call_soon(self._pump)

    def hold(self) -> None:
        """Log no more writes until `release`; those begun go on."""
        self._held = True

    def release(self) -> None:
        """Go on with the queue."""
        self._held = False
        self.kick()

    def refuse(self) -> None:
        """Answer writes that come from now on with an error; those in the queue are still done."""
        self._stopping = True

    @property
    def is_idle(self) -> bool:
        """True when no log write is running and, unless held, none is waiting."""
        return self._writing is None and (self._held or not self._queue)

    @property
    def is_writing(self) -> bool:
        """True while a thread writes to the log device."""
        return self._writing is not None

    def reset(self) -> None:
        """Start over with the core's superblock; nothing may be in flight."""
        assert self._writing is None
        assert not self._waiters
        self._packer = make_packer(self._core.superblock)
        self._epoch += 1

    # packing and writing

    def _pump(self) -> None:
        self._scheduled = False
        self._take_queue()
        self._core.settled.set()

    def _take_queue(self) -> None:
        """Log what is in the queue as far as possible."""
        core = self._core
        while self._queue and self._writing is None:
            if core.has_failed():
                self._fail_queue()
                return
            if self._held:
                return
            if self._data.pending_b >= self._pending_max_b:
                self.want_sync()  # what is pending may wait for it
                self._data.hurry()
                return
            if (core.lsids.latest - core.lsids.permanent) * core.superblock.pbs >= UNSYNCED_MAX_B:
                self.want_sync()
                return
            if not self._write_some():
                return

    def _write_some(self) -> bool:
        """Pack what is there and write it; False when the ring has no room."""
        core, lsids = self._core, self._core.lsids
        # Log that no consumer needs is freed by a checkpoint: waiting for that is better than an overflow.
        limit = lsids.oldest if core.given_up > lsids.oldest else lsids.prev_written
        batch = self._packer.begin(lsids.latest, limit + core.ring_pb)
        parts: list[_Part] = []
        try:
            self._fill(batch, parts)
        except (ValueError, MemoryError) as exc:
            self._write_failed(parts, exc)
            return False
        if not parts:
            self._ring_is_full()
            return False
        self.ring_full = False
        lsids.latest = batch.lsid_end
        self._watch_ring()
        # What lies in the ring behind the batch may be cleared as far as nobody needs it.
        overflowed = lsids.latest - lsids.oldest > core.ring_pb
        fill_limit = (lsids.prev_written if overflowed else lsids.oldest) + core.ring_pb
        if batch.size_b <= self._inline_max_b and self._loop.time() >= self._slow_until:
            self._write_inline(batch, parts, fill_limit)
        else:
            self._writing = self._loop.create_future()
            self._spawn(batch, parts, fill_limit)
        return True

    def _fill(self, batch: LogBatch, parts: list[_Part]) -> None:
        """Take requests off the queue while they fit."""
        queue = self._queue
        size_max_b = min(BATCH_MAX_B, self._pending_max_b - self._data.pending_b)
        while queue and batch.size_b < size_max_b:
            writes = queue[0]
            begin = writes.index
            writes.index, writes.done_b, records = batch.add(
                writes.table, begin, writes.done_b, writes.data, size_max_b
            )
            if records:
                parts.append(_Part(writes, records, begin, writes.index))
            if writes.index < writes.n:
                return
            queue.popleft()

    def _write_inline(self, batch: LogBatch, parts: list[_Part], fill_limit: int) -> None:
        began = self._loop.time()
        try:
            self._write(batch, fill_limit)
        except (WalbError, OSError) as exc:
            self._write_failed(parts, exc)
            return
        if self._loop.time() - began > _SLOW_WRITE_S:
            self._slow_until = self._loop.time() + _SLOW_PAUSE_S
        self._logged(batch, parts)

    def _spawn(self, batch: LogBatch, parts: list[_Part], fill_limit: int) -> None:
        self._data.tasks.create_task(self._write_in_thread(batch, parts, fill_limit), name="log-write")

    async def _write_in_thread(self, batch: LogBatch, parts: list[_Part], fill_limit: int) -> None:
        assert self._writing is not None
        try:
            await self._core.env.pools.run(Pool.RECEIVE, self._write, batch, fill_limit)
        except (WalbError, OSError) as exc:
            self._writing = None
            self._write_failed(parts, exc)
        except asyncio.CancelledError as exc:
            self._writing = None
            self._write_failed(parts, exc)  # it is in the log and not in the overlay: nothing may follow it
            raise
        else:
            self._writing = None
            self._logged(batch, parts)
        self._core.settled.set()
        self.kick()

    def _write(self, batch: LogBatch, fill_limit: int) -> None:
        batch.seal(fill_limit)
        failpoints.hit(FP_BEFORE_WRITE)
        write_log(self._core.ldev, batch)
        failpoints.hit(FP_AFTER_WRITE)

    def _logged(self, batch: LogBatch, parts: list[_Part]) -> None:
        """A batch is in the log: make it visible, answer, and hand it on."""
        core, lsids = self._core, self._core.lsids
        if core.has_failed():
            # Something else failed meanwhile: `completed` must not move any more.
            self._write_failed(parts)
            return
        try:
            cost = cost_b(batch.data_b, sum([len(part.records) for part in parts]) // LOG_RECORD_B)
            self._data.add(LoggedBatch(batch.lsid_end, [(part.records, part.writes.data) for part in parts], cost))
        except MemoryError as exc:
            self._write_failed(parts, exc)
            return
        lsids.completed = batch.lsid_end
        assert lsids.in_order(), lsids
        for writes, _, begin, end in parts:
            if begin == end:
                continue
            if not writes.n_fua:
                writes.answer(begin, end)
                continue
            writes.answer(begin, end, 0, 0)
            self._waiters.append(
                _Waiter(batch.lsid_end, lambda code, w=writes, b=begin, e=end: w.answer(b, e, code, 1))  # type: ignore[misc]
            )
        somebody_waits = self._waiters and lsids.flush < self._waiters[-1].lsid
        if somebody_waits or (lsids.completed - lsids.flush) * core.superblock.pbs >= self._flush_interval_b:
            self.want_sync()
        elif self._sync_timer is None:
            self._sync_timer = self._loop.call_later(self._flush_interval_s, self.want_sync)

    def _ring_is_full(self) -> None:
        """No pack fits before the superblock's lsids have moved on: have that happen."""
        if not self.ring_full:
            self.ring_full = True
            log.info("device.ring_stalled", **self._ring_fields())
        if self._checkpoints.is_of_use():
            self._checkpoints.want()
        self.want_sync()
        self._data.hurry()

    def _watch_ring(self) -> None:
        core, lsids = self._core, self._core.lsids
        if lsids.latest - lsids.prev_written > core.ring_pb // 2:
            self._checkpoints.want()
        if not core.overflow and lsids.latest - lsids.oldest > core.ring_pb:
            core.overflow = True
            core.log_advanced.set()  # watchers are told of flags too
            log.warning("device.overflowed", **self._ring_fields())

    def _ring_fields(self) -> dict[str, int]:
        lsids = self._core.lsids
        return {
            "latest": lsids.latest,
            "written": lsids.written,
            "prev_written": lsids.prev_written,
            "oldest": lsids.oldest,
            "ring_pb": self._core.ring_pb,
        }

    # failure

    def _write_failed(self, parts: list[_Part], error: BaseException | None = None) -> None:
        if error is not None:
            self._core.fail(error, "writing the log")
        for writes, _, begin, end in parts:
            if begin < end:
                writes.answer(begin, end, Error.IO)
        self._fail_queue()

    def _fail_queue(self) -> None:
        while self._queue:
            writes = self._queue.popleft()
            writes.answer(writes.index, writes.n, Error.IO)
        self._tell_waiters()

    def _tell_waiters(self) -> None:
        waiters, permanent = self._waiters, self._core.lsids.permanent
        while waiters and waiters[0].lsid <= permanent:
            waiters.popleft().tell(0)
        if self._core.has_failed():
            while waiters:
                waiters.popleft().tell(Error.IO)

    # group commit

    def want_sync(self) -> None:
        """Have the log synced as soon as the running sync, if any, has ended."""
        if not self._sync_wanted:
            self._sync_wanted = True
            self._core.sync_wanted.set()

    async def sync(self) -> None:
        """Return once a sync that began after this call has ended; raises ReadOnlyDevice."""
        number = self.syncs_begun + 1
        self.want_sync()
        await self._core.settled.wait_for(lambda: self.syncs_done >= number or self._core.has_failed())
        self._core.check_alive()

    async def run(self) -> None:
        """Sync the log whenever wanted, until the device fails; one sync serves all who asked before it."""
        core, lsids = self._core, self._core.lsids
        while True:
            await core.sync_wanted.wait_for(lambda: self._sync_wanted or core.has_failed())
            if core.has_failed():
                self._fail_queue()
                return
            self._sync_wanted = False
            if self._sync_timer is not None:
                self._sync_timer.cancel()
                self._sync_timer = None
            self.syncs_begun += 1
            epoch = self._epoch
            target = lsids.completed
            lsids.flush = target
            try:
                await core.env.pools.run(Pool.RECORD, self._sync)
            except (WalbError, OSError) as exc:
                core.fail(exc, "syncing the log")
                continue
            if core.has_failed():
                continue
            self.syncs_done = self.syncs_begun
            if epoch == self._epoch and target > lsids.permanent:
                lsids.permanent = target
                self._tell_waiters()
                core.log_advanced.set()
                if self._queue:
                    self.kick()
            if self._waiters and self._waiters[0].lsid <= lsids.completed:
                self._sync_wanted = True
            core.settled.set()

    def _sync(self) -> None:
        failpoints.hit(FP_BEFORE_SYNC)
        self._core.ldev.sync()
        failpoints.hit(FP_AFTER_SYNC)
