"""resize: a larger image, for a device that was grown (docs/archive.md, "Resize").

The image grows first and the record follows, so the record never promises what is not there. What is new reads as
zeros in any case; on request zeros are written, so that the space is taken now.
"""

from __future__ import annotations

from typing import Final

import structlog

from walbd.archive.states import RESIZE, Command, State
from walbd.archive.volume import Volume, check_room
from walbd.daemon.env import Pool
from walbd.errors import NotFound, Refused
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.units import LB, MIB

log = structlog.get_logger()

FP_BEFORE_RECORD: Final = failpoints.register(
    "archive.resize.before_record", "an image larger than recorded, which the next start takes as it is"
)

_PIECE_B: Final = 4 * MIB
_STEP_B: Final = 64 * MIB  # written in one call to a pool


async def grow(volume: Volume, size_lb: int) -> None:
    """Grow the image to the size of the sender's device: the image first, then the record that promises it."""
    place = volume.place
    old_lb = volume.size_lb
    await place.env.pools.run(Pool.RECEIVE, place.images.grow_base, volume.name, size_lb * LB)
    await volume.grown(size_lb)
    log.info("volume.grown", volume=volume.name, size_lb=size_lb, old_size_lb=old_lb)


async def resize(volume: Volume, size_b: int, *, zero: bool) -> None:
    """Grow the image of a volume to `size_b`, rounded down to whole blocks; the same size is fine.

    Raises what `Volume.check` raises, NotFound without an image, Refused for a smaller size, DiskFull, DiskFailed
    and ForceStopped.
    """
    volume.check(Command.RESIZE)
    place, clock = volume.place, volume.place.env.clock
    with volume.machine.action(RESIZE, clock.now()):
        now_b = await place.env.pools.run(Pool.MAINTAIN, place.images.base_size, volume.name)
        if now_b is None:
            raise NotFound("there is no image", hint="run a full backup", volume=volume.name)
        if volume.size_lb:
            now_b = volume.size_lb * LB  # the image may have grown just before a failure
        wanted_b = size_b // LB * LB
        if wanted_b < now_b:
            raise Refused(
                "an image cannot be made smaller",
                hint="clear the volume and back it up again",
                size_b=wanted_b,
                now_b=now_b,
            )
        if wanted_b > now_b:
            await place.env.pools.run(Pool.MAINTAIN, _grow, volume, now_b, wanted_b, zero)
            for at in range(now_b, wanted_b, _STEP_B) if zero else ():
                volume.check_force()
                await place.env.pools.run(Pool.MAINTAIN, _zero, volume, at, min(at + _STEP_B, wanted_b))
            if volume.machine.state is not State.SYNC_READY:
                await volume.grown(wanted_b // LB)
            log.info("volume.resized", volume=volume.name, size_b=wanted_b, old_size_b=now_b, zero=zero)


# in threads


def _grow(volume: Volume, now_b: int, wanted_b: int, zero: bool) -> None:
    check_room(volume.place, need_b=wanted_b - now_b if zero else 0)
    volume.place.images.grow_base(volume.name, wanted_b)
    with disk_errors(volume.directory, "resize"):
        failpoints.hit(FP_BEFORE_RECORD)


def _zero(volume: Volume, begin_b: int, end_b: int) -> None:
    """Write zeros, durably."""
    zeros = memoryview(bytes(min(_PIECE_B, end_b - begin_b)))
    with volume.place.images.open_base(volume.name, write=True) as image:
        for at in range(begin_b, end_b, _PIECE_B):
            volume.check_force()
            image.pwrite(zeros[: min(_PIECE_B, end_b - at)], at)
        image.sync()
