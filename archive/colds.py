"""Cold images: read-only copies of single snapshots, from which later restores and scans start.

They are by-products of restores, and exist only where the store shares their blocks with the base image. A cold
image counts once the record has its time: the image is made first and the entry second, and removed the other way
round, so what a crash leaves is an image without an entry, which the next start removes (docs/archive.md, "Cold
images").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

import structlog

from walbd.archive.record import VolumeRecord
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.logs import error_fields
from walbd.errors import NotFound, WalbError
from walbd.format.meta import BaseState, starting_state
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors

log = structlog.get_logger()

FP_BEFORE_RECORD: Final = failpoints.register(
    "archive.cold.before_record", "a cold image without an entry, which the next start removes"
)
FP_BEFORE_REMOVE: Final = failpoints.register(
    "archive.cold.before_remove", "a cold image whose entry is gone, which the next start removes"
)


def colds_of(record: VolumeRecord) -> dict[int, int]:
    """Return the time of each cold image [unix s] by its generation."""
    return {int(gid): time for gid, time in record.colds.items()}


def start_for(volume: Volume, gid: int) -> BaseState:
    """Return where a restore or scan of `gid` starts: at a cold image if one is nearer, else at the base."""
    return starting_state(volume.base, colds_of(volume.record), gid, to_apply=False)


def cold_gid(volume: Volume, start: BaseState) -> int | None:
    """Return which cold image `start_for` has chosen; None: the base image."""
    return None if start == volume.base else int(start.begin.gid_b)


async def keep_cold(volume: Volume, gid: int, timestamp: int) -> None:
    """Keep the unfinished copy of a restore as a cold image too, where that costs nothing; a failure is logged."""
    pools = volume.place.env.pools
    if str(gid) in volume.record.colds:
        return
    try:
        if not await pools.run(Pool.MAINTAIN, _make, volume, gid):
            return
        await volume.update(lambda record: {"colds": record.colds | {str(gid): timestamp}})
        if volume.place.config.keep_one_cold:
            newest = max(colds_of(volume.record))
            await remove_colds(volume, [other for other in colds_of(volume.record) if other != newest])
    except WalbError as exc:
        log.warning("cold.not_kept", volume=volume.name, gid=gid, **error_fields(exc))


async def delete_cold(volume: Volume, gid: int) -> None:
    """Remove one cold image; raises NotFound."""
    if str(gid) not in volume.record.colds:
        raise NotFound("there is no such cold image", hint="see get cold", gid=gid)
    await remove_colds(volume, [gid])


async def remove_colds(volume: Volume, gids: Iterable[int]) -> None:
    """Remove cold images: first their entries, then the images."""
    gone = set(gids)
    if gone:
        await volume.update(lambda record: {"colds": without(record.colds, lambda gid: gid in gone)})
        await volume.place.env.pools.run(Pool.MAINTAIN, erase_images, volume, gone)


def without(colds: Mapping[str, int], is_gone: Callable[[int], bool]) -> dict[str, int]:
    """Return the entries that stay."""
    return {gid: time for gid, time in colds.items() if not is_gone(int(gid))}


# in threads


def erase_images(volume: Volume, gids: Iterable[int]) -> None:
    """Remove the images of cold snapshots that are not recorded any more."""
    with disk_errors(volume.directory, "remove cold images"):
        failpoints.hit(FP_BEFORE_REMOVE)
    for gid in sorted(gids):
        volume.place.images.remove_cold(volume.name, gid)


def _make(volume: Volume, gid: int) -> bool:
    made = volume.place.images.make_cold(volume.name, gid)
    if made:
        with disk_errors(volume.directory, "keep a cold image"):
            failpoints.hit(FP_BEFORE_RECORD)
    return made
