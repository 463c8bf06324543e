"""From the log to the data device: the pending overlay, and writing what is permanent.

A batch of log records is applied to the data device only when all of it is permanent in the log, so that no
crash leaves data on the data device that the log has lost. Batches are applied one after the other and each
writes only the last data of a block, so overlapping writes end in log order. Until then, reads see pending
data through the overlay.

Batches are large where they can be: sorted writes far apart cost several times what neighbours cost, as each
touches other parts of the page cache (docs/device.md, "Costs").
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from walbd.daemon.env import Pool
from walbd.daemon.tasks import Signal
from walbd.errors import WalbError
from walbd.ext.buffers import Buf
from walbd.ext.nbd import Chunk
from walbd.ext.overlay import Overlay
from walbd.format.logpack import LOG_RECORD_B
from walbd.fs import failpoints
from walbd.storage.device.blockio import write_data
from walbd.storage.device.core import Core

_RETIRE_MAX: Final = 1024  # records taken out of the overlay in one turn of the loop
_RECORD_COST_B: Final = 192  # of memory for a pending record, besides its data

FP_BEFORE_WRITE = failpoints.register(
    "device.data.before_write", "permanent log that the data device does not have"
)
FP_AFTER_WRITE = failpoints.register(
    "device.data.after_write", "log that the data device may have in its cache: redo applies it again"
)


class LoggedBatch(NamedTuple):
    """Log records that were written together, up to a pack boundary."""

    lsid_end: int
    parts: list[tuple[bytes, Buf | Chunk]]  # (walb_log_record table, data), in log order
    cost_b: int  # memory held while pending


def cost_b(data_b: int, n_records: int) -> int:
    """Return the memory that pending records hold."""
    return data_b + n_records * _RECORD_COST_B


def joined(parts: list[tuple[bytes, Buf | Chunk]]) -> list[tuple[bytes, Buf | Chunk]]:
    """Join the tables of neighbours whose data are in the same buffer."""
    found: list[tuple[bytes, Buf | Chunk]] = []
    tables: list[bytes] = []
    for i, (records, data) in enumerate(parts):
        tables.append(records)
        if i + 1 == len(parts) or parts[i + 1][1] is not data:
            found.append((b"".join(tables), data))
            tables = []
    return found


class DataStage:
    """What is logged and not yet on the data device."""

    def __init__(
        self,
        core: Core,
        tasks: asyncio.TaskGroup,
        on_written: Callable[[], None],
        *,
        gather_b: int,
        delay_s: float,
    ) -> None:
        """`gather_b`, `delay_s`: less permanent log than that waits so long for more."""
        self.overlay = Overlay()
        self.pending_b = 0
        self.tasks = tasks
        self._core = core
        self._on_written = on_written
        self._gather_b = gather_b
        self._delay_s = delay_s
        self._pending: deque[LoggedBatch] = deque()
        self._hurried = False
        self._gathered = Signal()  # there is much to write now, or somebody waits for it

    def add(self, batch: LoggedBatch) -> None:
        """Take a batch that is in the log: from now on reads see it."""
        for records, data in batch.parts:
            self.overlay.insert(records, data)
        self._pending.append(batch)
        self.pending_b += batch.cost_b
        if self.pending_b >= self._gather_b:
            self._gathered.set()

    def hurry(self) -> None:
        """Write what is permanent without delay: somebody waits for it."""
        if not self._hurried:
            self._hurried = True
            self._gathered.set()

    @property
    def is_empty(self) -> bool:
        """True when the data device has everything."""
        return not self._pending

    def _is_ready(self) -> bool:
        core = self._core
        ready = self._pending and self._pending[0].lsid_end <= core.lsids.permanent
        return bool(ready) or core.has_failed()

    async def run(self) -> None:
        """Apply what is permanent, until the device fails."""
        core, lsids = self._core, self._core.lsids
        while True:
            await core.log_advanced.wait_for(self._is_ready)
            await self._gather()
            if core.has_failed():
                return
            batches = self._take()
            parts = joined([part for batch in batches for part in batch.parts])
            try:
                await core.env.pools.run(Pool.RECEIVE, self._write, parts)
            except (WalbError, OSError, MemoryError) as exc:
                core.fail(exc, "writing the data device")
            if core.has_failed():
                return
            lsid_end = batches[-1].lsid_end
            await self._retire(parts, lsid_end)
            for batch in batches:
                self._pending.popleft()
                self.pending_b -= batch.cost_b
            lsids.written = lsid_end
            assert lsids.in_order(), lsids
            core.settled.set()
            self._on_written()

    async def _gather(self) -> None:
        """Wait a little for more to write."""
        try:
            async with asyncio.timeout(self._delay_s):
                await self._gathered.wait_for(
                    lambda: self._hurried or self.pending_b >= self._gather_b or self._core.has_failed()
                )
        except TimeoutError:
            pass
        self._hurried = False

    def _take(self) -> list[LoggedBatch]:
        """Return the first pending batches, all that are permanent; they stay pending."""
        permanent = self._core.lsids.permanent
        return list(itertools.takewhile(lambda batch: batch.lsid_end <= permanent, self._pending))

    async def _retire(self, parts: list[tuple[bytes, Buf | Chunk]], lsid_end: int) -> None:
        """Take records that the data device has out of the overlay, a few at a time."""
        n = 0
        for records, _ in parts:
            self.overlay.retire(records, lsid_end)
            n += len(records) // LOG_RECORD_B
            if n > _RETIRE_MAX:
                n = 0
                await asyncio.sleep(0)
        self.overlay.release(lsid_end)

    def _write(self, parts: list[tuple[bytes, Buf | Chunk]]) -> None:
        failpoints.hit(FP_BEFORE_WRITE)
        write_data(self._core.ddev, parts)
        failpoints.hit(FP_AFTER_WRITE)
