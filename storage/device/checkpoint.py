"""Checkpoints: making the data device durable, and saying so in the superblock.

Whole synchronisations are serialised by one lock, so that an older one can never land on disk over a newer
one. Everything that changes the superblock holds it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

import structlog

from walbd.daemon.env import Pool
from walbd.daemon.tasks import uninterrupted
from walbd.errors import WalbError
from walbd.fs import failpoints
from walbd.ids import Lsid
from walbd.storage.device.core import Core
from walbd.storage.device.superblocks import write_superblocks

log = structlog.get_logger()

FP_BEFORE_DATA_SYNC = failpoints.register(
    "device.checkpoint.before_data_sync", "data in the data device's cache; the superblock points below it"
)
FP_BEFORE_SUPERBLOCK = failpoints.register(
    "device.checkpoint.before_superblock", "durable data; the superblock points below it"
)


class Checkpointer:
    """Writes the superblock of a running device."""

    def __init__(self, core: Core, interval_s: float, on_checkpoint: Callable[[], None]) -> None:
        self.paused = False  # no periodic checkpoints: the device is frozen
        self._core = core
        self._interval_s = interval_s
        self._on_checkpoint = on_checkpoint
        self._lock = asyncio.Lock()
        self._wanted = False

    def want(self) -> None:
        """Have a checkpoint taken soon."""
        if not self._wanted:
            self._wanted = True
            self._core.checkpoint_wanted.set()

    async def take(self) -> None:
        """Bring `prev_written` to the present `written`; raises ReadOnlyDevice."""
        async with self.exclusive():
            await self._take()

    @asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        """Hold off every other change of the superblock; raises ReadOnlyDevice if the device has failed."""
        async with self._lock:
            self._core.check_alive()
            yield

    async def settle(self) -> None:
        """Return once nobody changes the superblock."""
        async with self._lock:
            pass

    async def _take(self) -> None:
        lsids = self._core.lsids
        written = lsids.written  # sampled before the sync: it may rise meanwhile
        await self.sync_data()
        oldest = self._core.oldest_at(written)
        await self.write(FP_BEFORE_SUPERBLOCK, oldest=oldest, written=written)
        lsids.prev_written, lsids.oldest = written, oldest
        self._on_checkpoint()

    async def give_up(self, failpoint: str) -> None:
        """Bring `oldest` to where `given_up` and `prev_written` allow it; the caller holds `exclusive`."""
        lsids, oldest = self._core.lsids, self._core.oldest_at(self._core.lsids.prev_written)
        if oldest > lsids.oldest:
            await self.write(failpoint, oldest=oldest, written=lsids.prev_written)
            lsids.oldest = oldest

    def is_of_use(self) -> bool:
        """Say whether a checkpoint now would free anything in the ring."""
        lsids = self._core.lsids
        return lsids.written > lsids.prev_written or self._core.oldest_at(lsids.written) > lsids.oldest

    async def sync_data(self) -> None:
        """Make the data device durable; raises ReadOnlyDevice."""
        await self.step(self._sync_data, "syncing the data device")

    async def write(self, failpoint: str, *, oldest: int, written: int, **changes: object) -> None:
        """Write both superblocks; the caller holds `exclusive`. Raises ReadOnlyDevice.

        `written` must be durable on the data device. `failpoint` is hit first. A caller that is cancelled is so
        only when the disk and `core.superblock` agree again.
        """
        core = self._core
        superblock = replace(
            core.superblock,
            oldest_lsid=Lsid(oldest),
            written_lsid=Lsid(written),
            **changes,  # type: ignore[arg-type]
        )

        def write() -> None:
            failpoints.hit(failpoint)
            write_superblocks(core.ldev, superblock)

        async def write_and_note() -> None:
            await self.step(write, "writing the superblock")
            core.superblock = superblock

        await uninterrupted(write_and_note())

    async def step(self, call: Callable[[], None], during: str) -> None:
        """Run a disk operation in a thread; its failure is the device's. Raises ReadOnlyDevice."""
        core = self._core
        try:
            await core.env.pools.run(Pool.MAINTAIN, call)
        except (WalbError, OSError) as exc:
            core.fail(exc, during)
        core.check_alive()

    def _sync_data(self) -> None:
        failpoints.hit(FP_BEFORE_DATA_SYNC)
        self._core.ddev.sync()

    async def run(self) -> None:
        """Take checkpoints when wanted and periodically, until the device fails."""
        core, lsids = self._core, self._core.lsids
        loop = asyncio.get_running_loop()
        due = loop.time() + self._interval_s
        while not core.has_failed():
            try:
                async with asyncio.timeout_at(due):
                    await core.checkpoint_wanted.wait_for(lambda: self._wanted or core.has_failed())
            except TimeoutError:
                due = loop.time() + self._interval_s
                if self.paused or lsids.written == lsids.prev_written:
                    continue
            if core.has_failed():
                return
            self._wanted = False
            due = loop.time() + self._interval_s
            if self.is_of_use():
                try:
                    await self.take()
                except WalbError:
                    return  # logged where it failed
