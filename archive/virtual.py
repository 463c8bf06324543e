"""The image of any snapshot without restoring it: what hashes and scans read (docs/archive.md, "Hashes, scans").

It is the base image, or a cold image above it, seen through the wdiffs on the way. The caller holds the action
SCAN, which keeps applies out, from before the way is chosen until the image is closed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from walbd.archive.colds import cold_gid, start_for
from walbd.archive.opening import open_diffs
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.errors import NotFound, UsageError
from walbd.format.meta import BaseState, Diff
from walbd.format.virtual import VirtualImage
from walbd.fs import File
from walbd.units import LB


def check_scan(volume: Volume, gid: int, size_lb: int) -> int:
    """Return how much of the image to read [byte]: `size_lb`, or all if 0.

    Raises NotReachable unless `gid`, which may be dirty, can be read, and UsageError if it ends before `size_lb`.
    """
    if size_lb > volume.size_lb:
        raise UsageError("the volume is smaller", size_lb=size_lb, volume_lb=volume.size_lb)
    _way(volume, gid, start_for(volume, gid))
    return (size_lb or volume.size_lb) * LB


@asynccontextmanager
async def open_virtual(volume: Volume, gid: int, pool: Pool) -> AsyncIterator[VirtualImage]:
    """Open the image of snapshot `gid`. Raises as `check_scan` does, and CorruptData."""
    pools = volume.place.env.pools
    start, base = await _open_start(volume, gid, pool)
    try:
        async with open_diffs(volume, pool, lambda: _way(volume, gid, start)) as found:
            size_b = volume.size_lb * LB
            image = await pools.run(pool, VirtualImage, base, found.readers, size_b, check=volume.check_force)
            await pools.run(pool, image.check_inside)
            yield image
    finally:
        await pools.run(pool, base.close)


async def _open_start(volume: Volume, gid: int, pool: Pool) -> tuple[BaseState, File]:
    """Open the image that the way to `gid` starts from; a cold one may be removed until it is open."""
    pools, images = volume.place.env.pools, volume.place.images
    while True:
        start = start_for(volume, gid)
        cold = cold_gid(volume, start)
        if cold is None:
            return start, await pools.run(pool, images.open_base, volume.name)
        try:
            return start, await pools.run(pool, images.open_cold, volume.name, cold)
        except NotFound:
            if str(cold) in volume.record.colds:
                raise


def _way(volume: Volume, gid: int, start: BaseState) -> list[Diff]:
    return volume.diffs.to_scan(start, gid, n_max=volume.place.config.scan_files_max)
