"""scrub: everything that a volume needs to be restored is read and verified (docs/archive.md, "Scrub").

Each wdiff is read as an apply would read it: headers, checksums, order, decoding, nothing beyond the volume. Of
the images only readability can be told. Nothing is changed or removed: what is damaged is named, for a person to
decide. Scrubs keep nothing out, so what a merge or an apply takes away meanwhile is passed over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import structlog

from walbd.archive.colds import colds_of
from walbd.archive.states import SCRUB
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.errors import CorruptData, DiskFailed, NotFound, WalbError
from walbd.format.meta import Diff, diff_name
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import open_wdiff
from walbd.fs import File
from walbd.protocol.base import Fact
from walbd.units import LB, MIB

log = structlog.get_logger()

BASE: Final = "base image"
_PIECE_B: Final = 4 * MIB
_REMARKS_MAX: Final = 10
_STEP_B: Final = 256 * MIB  # of an image, read in one call to a pool


@dataclass
class Findings:
    """What a scrub has seen so far."""

    wdiffs: int = 0
    wdiffs_b: int = 0
    records: int = 0
    images: int = 0
    images_b: int = 0
    damaged: dict[str, WalbError] = field(default_factory=dict)  # by file

    def note(self, name: str, error: WalbError) -> None:
        """Take down a damage."""
        self.damaged[name] = error
        log.error("scrub.damage_found", file=name, error=str(error))

    def facts(self) -> dict[str, Fact]:
        """Return them as the result of a job."""
        return {
            "wdiffs": self.wdiffs,
            "wdiffs_b": self.wdiffs_b,
            "records": self.records,
            "images": self.images,
            "images_b": self.images_b,
            "damaged": len(self.damaged),
            "damaged_files": ", ".join(self.damaged),
        }

    def remarks(self) -> list[str]:
        """Return them for the status."""
        lines = [f"damaged: {name}: {error}" for name, error in self.damaged.items()]
        more = len(lines) - _REMARKS_MAX
        return [*lines[:_REMARKS_MAX], f"and {more} more damaged files, see the job"] if more > 0 else lines


async def run_scrub(volume: Volume, job: Job) -> dict[str, Fact]:
    """The job; the caller holds the action. Damage does not fail it: it is the result."""
    began = volume.place.env.clock.now()
    await volume.begin_action(SCRUB)
    found = Findings()
    diffs = list(volume.diffs)
    job.begin("wdiffs", sum(diff.size_b for diff in diffs))
    for diff in diffs:
        await _scrub_wdiff(volume, diff, found)
        job.progress(found.wdiffs_b)
    images = volume.place.images
    await _scrub_image(volume, BASE, lambda: images.open_base(volume.name), found, job)
    for gid in sorted(colds_of(volume.record)):
        await _scrub_cold(volume, gid, found, job)
    volume.damage = found.remarks()
    if not found.damaged:
        await volume.save(verified=began)
    return found.facts()


async def _scrub_wdiff(volume: Volume, diff: Diff, found: Findings) -> None:
    """Verify one wdiff under the name that it has now, if it is still there."""
    pools = volume.place.env.pools
    while (now := volume.diffs.find(diff.begin, diff.end)) is not None:
        name = diff_name(now)
        try:
            found.records += await pools.run(Pool.MAINTAIN, _verify, volume, name)
        except NotFound as exc:
            async with volume.naming:
                again = volume.diffs.find(diff.begin, diff.end)
            if again is not None and diff_name(again) == name:
                found.note(name, exc)
                return
            continue
        except (CorruptData, DiskFailed) as exc:
            found.note(name, exc)
        found.wdiffs += 1
        found.wdiffs_b += now.size_b
        return


async def _scrub_cold(volume: Volume, gid: int, found: Findings, job: Job) -> None:
    images = volume.place.images
    if str(gid) in volume.record.colds:
        await _scrub_image(volume, f"cold image {gid}", lambda: images.open_cold(volume.name, gid), found, job)


async def _scrub_image(volume: Volume, name: str, open_it: Callable[[], File], found: Findings, job: Job) -> None:
    """Read an image from beginning to end."""
    pools = volume.place.env.pools
    least_b = volume.size_lb * LB if name == BASE else 0
    try:
        file = await pools.run(Pool.MAINTAIN, open_it)
    except NotFound as exc:
        if name == BASE:
            found.note(name, exc)
        return  # a cold image may be removed at any time
    try:
        size_b = await pools.run(Pool.MAINTAIN, file.size)
        job.begin(name, size_b)
        if size_b < least_b:
            found.note(name, CorruptData("the image is too short", path=str(file.path), offset=size_b))
        for at in range(0, size_b, _STEP_B):
            volume.check_force()
            end = min(at + _STEP_B, size_b)
            await pools.run(Pool.MAINTAIN, _read, volume, file, at, end)
            job.progress(end)
        found.images += 1
        found.images_b += size_b
    except DiskFailed as exc:
        found.note(name, exc)
    finally:
        await pools.run(Pool.MAINTAIN, file.close)


# in threads


def _verify(volume: Volume, name: str) -> int:
    with volume.place.env.fs.open(volume.directory / name) as file:
        return verify(open_wdiff(file), size_lb=volume.size_lb, check=volume.check_force)


def _read(volume: Volume, file: File, begin_b: int, end_b: int) -> None:
    """Read what is not a hole."""
    buffer = memoryview(bytearray(_PIECE_B))
    for offset_b, range_b in volume.place.env.fs.data_ranges(file, begin_b, end_b):
        for at in range(offset_b, offset_b + range_b, _PIECE_B):
            volume.check_force()
            file.pread_into(buffer[: min(_PIECE_B, offset_b + range_b - at)], at)
