"""bhash and virt-full-scan: the image of a snapshot hashed, or sent, without restoring it.

Both hold the action SCAN, which keeps applies out, and read in small steps, so that nothing else of the daemon
waits for them. Source: docs/archive.md, "Hashes and scans".
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Final

from walbd.archive.states import SCAN
from walbd.archive.virtual import check_scan, open_virtual
from walbd.archive.volume import Volume
from walbd.archive.work import Starter
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.copying import ImageSource
from walbd.daemon.env import Pool
from walbd.daemon.full_copy import send_full
from walbd.daemon.jobs import Job
from walbd.format.hashes import BlockHash
from walbd.format.virtual import VirtualImage
from walbd.protocol.base import Fact
from walbd.protocol.maintenance import BlockHash as HashRequest
from walbd.protocol.maintenance import ScanBegin, VirtFullScan
from walbd.protocol.transfer import Packing
from walbd.units import MIB

STEP_B: Final = 8 * MIB  # hashed in one call to a pool
_REST_MAX_S: Final = 0.5  # rested at a time, so that a forced stop is noticed


def plan_hash(volume: Volume, request: HashRequest) -> int:
    """Return how many bytes to hash; raises as `check_scan` does."""
    return check_scan(volume, request.gid, request.size_lb)


async def run_hash(volume: Volume, request: HashRequest, size_b: int, job: Job) -> dict[str, Fact]:
    """The job: hash the image as `walbd image hash --algorithm murmur3 --combine --chunk BULK` does it.

    The caller holds the action.
    """

    async def giving_up() -> None:
        volume.check_force()

    total = BlockHash()
    step_b = max(STEP_B // request.bulk_b, 1) * request.bulk_b
    pools = volume.place.env.pools
    job.begin("opening")
    async with open_virtual(volume, request.gid, Pool.QUERY) as image:
        job.begin("hashing", size_b)
        rest = _Rest(request.sleep_percent)
        for at in range(0, size_b, step_b):
            volume.check_force()
            end = min(at + step_b, size_b)
            await pools.run(Pool.QUERY, _hash, image, total, at, end, request.bulk_b)
            job.progress(end)
            await rest.spend(end - at, giving_up)
    return {"hash": total.digest().hex(), "gid": request.gid, "size_b": size_b, "bulk_b": request.bulk_b}


def _hash(image: VirtualImage, total: BlockHash, begin: int, end: int, bulk_b: int) -> None:
    """Hash a range; runs in a thread."""
    data = memoryview(image.read(begin, end - begin))
    for at in range(0, len(data), bulk_b):
        total.update(data[at : at + bulk_b])


async def send_scan(volume: Volume, starter: Starter, conn: Connection, request: VirtFullScan) -> None:
    """Conduct a scan: ScanBegin, FullChunk*, End. The caller has checked that it is allowed, just now."""
    size_b = check_scan(volume, request.gid, request.size_lb)

    async def work(job: Job) -> dict[str, Fact]:
        job.begin("opening")
        async with volume.giving_up(), AsyncExitStack() as stack:
            opening = stack.enter_async_context(open_virtual(volume, request.gid, Pool.QUERY))
            image = await with_filler(conn, opening)
            await conn.send(ScanBegin(size_b=size_b))
            job.begin("sending", size_b)
            sent_b = await _send(volume, conn, request, image, size_b, job)
        return {"gid": request.gid, "size_b": size_b, "sent_b": sent_b}

    await starter.within("virt-full-scan", volume, SCAN, conn, work)


async def _send(
    volume: Volume, conn: Connection, request: VirtFullScan, image: VirtualImage, size_b: int, job: Job
) -> int:
    pools = volume.place.env.pools

    async def read(offset_b: int, read_b: int) -> bytes:
        return await pools.run(Pool.QUERY, image.read, offset_b, read_b)

    rest = _Rest(request.sleep_percent)
    source = ImageSource(read=read, size_b=size_b, tick=job.progress, spend=rest.spend if rest.share else None)
    return await send_full(conn, pools, source, bulk_b=request.bulk_b, packing=Packing.LZ4, pool=Pool.QUERY)


class _Rest:
    """Rests for a share of the time, after each piece of work."""

    def __init__(self, percent: int) -> None:
        self.share = percent / 100
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()

    async def spend(self, _size_b: int, keep_alive: Callable[[], Awaitable[None]]) -> None:
        """Rest for as long as the work since the last rest demands."""
        worked_s = self._loop.time() - self._since
        until = self._loop.time() + worked_s * self.share / (1 - self.share)
        while (left_s := until - self._loop.time()) > 0:
            await asyncio.sleep(min(left_s, _REST_MAX_S))
            await keep_alive()
        self._since = self._loop.time()
