"""Apply: diffs become part of the base image, and the snapshots before it vanish (docs/archive.md, "Apply").

In rounds of a limited number of files, each of which is

    1. read and verified: damage is found while the base is still good for everything before it
    2. record: the base is on its way from B to E
    3. blocks written, image synced
    4. record: the base is E, and there are no cold images up to E
    5. diffs up to E removed, and these cold images

Between 2 and 4 the base means nothing without the diffs of that round, and they are all still there: whoever
restores then lays them over the copy, and the next apply, whatever its target, does the round again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import structlog

from walbd.archive.colds import colds_of, erase_images, without
from walbd.archive.diffs import remove_diffs
from walbd.archive.holds import held_now
from walbd.archive.opening import open_diffs
from walbd.archive.states import APPLY
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.daemon.logs import error_fields
from walbd.daemon.tasks import uninterrupted
from walbd.errors import Refused, WalbError
from walbd.format.meta import BaseState, Diff, NotReachable
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import WdiffReader
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.fs.wdiff_apply import apply
from walbd.ids import NIL_UUID
from walbd.protocol.base import Fact
from walbd.units import LB

log = structlog.get_logger()

FP_BEFORE_BEGIN: Final = failpoints.register("archive.apply.before_begin", "nothing has been done")
FP_AFTER_BEGIN: Final = failpoints.register(
    "archive.apply.after_begin", "the base is in progress by its record, no block is written"
)
FP_MID_WRITE: Final = failpoints.register(
    "archive.apply.mid_write", "the base is in progress, some blocks are written, perhaps not durably"
)
FP_BEFORE_DONE: Final = failpoints.register(
    "archive.apply.before_done", "every block is durable, the record still says in progress"
)
FP_BEFORE_ERASE: Final = failpoints.register(
    "archive.apply.before_erase", "the base is done; diffs that it holds are still there"
)


def plan_apply(volume: Volume, gid: int) -> list[Diff]:
    """Return the next round on the way to `gid`.

    Raises NotReachable when there is nothing to do at all, and Refused when a held snapshot would vanish.
    """
    diffs = _next_round(volume, gid)
    if not diffs:
        raise NotReachable(
            "nothing can be applied up to this generation",
            hint="choose one of the restorable generations above the base",
            gid=gid,
            base=str(volume.base),
        )
    after = volume.base.end_applying(volume.diffs.to_apply(volume.base, gid)).begin
    for hold in held_now(volume):
        if hold.gid < after.gid_b and any(point.gid == hold.gid for point in volume.restorable(all_points=True)):
            raise Refused(
                "a held snapshot lies below",
                hint="apply up to it; delete-hold gives it up",
                gid=hold.gid,
                kept_for=hold.reason,
                base_after=str(after),
            )
    return diffs


async def run_apply(volume: Volume, gid: int, job: Job) -> dict[str, Fact]:
    """The job: apply up to `gid`; the caller holds the action. An interrupted apply is finished first."""
    count = 0
    while _next_round(volume, gid):
        count += await _round(volume, gid, job)
    return {"base": str(volume.base), "diffs": count}


def _next_round(volume: Volume, gid: int) -> list[Diff]:
    return volume.diffs.to_apply(volume.base, gid, n_max=volume.place.config.open_files_max)


async def _round(volume: Volume, gid: int, job: Job) -> int:
    """Apply one round; return of how many diffs."""
    pools, clock = volume.place.env.pools, volume.place.env.clock
    volume.check_force()
    base, began = volume.base, clock.now()
    async with open_diffs(volume, Pool.MAINTAIN, lambda: _next_round(volume, gid)) as (diffs, readers):
        job.begin("verifying", len(diffs), "wdiffs")
        await pools.run(Pool.MAINTAIN, _verify, volume, readers, job)
        on_its_way, done = base.begin_applying(diffs), base.end_applying(diffs)
        await volume.update(lambda record: {"base": on_its_way, "began": record.began | {APPLY: began}})
        job.begin("writing", volume.size_lb * LB)
        await pools.run(Pool.MAINTAIN, _write, volume, readers, job)
        uuid = readers[-1].header.uuid
    await uninterrupted(_finish(volume, done, uuid))
    return len(diffs)


async def _finish(volume: Volume, done: BaseState, uuid: bytes) -> None:
    """Say that the base is done, in the history of the last diff, and remove what it holds."""
    pools, gid = volume.place.env.pools, done.begin.gid_b
    passed = [cold for cold in colds_of(volume.record) if cold <= gid]
    base_uuid = "" if uuid == NIL_UUID else uuid.hex()
    await volume.update(
        lambda record: {
            "base": done,
            "base_uuid": base_uuid,
            "colds": without(record.colds, lambda cold: cold <= gid),
        }
    )
    async with volume.naming:
        erased = volume.drop_before(gid)
        try:
            await pools.run(Pool.MAINTAIN, _erase, volume, erased, passed)
        except WalbError as exc:  # the base is done all the same; gc-diff, or the next start, removes them
            log.warning("diffs.not_removed", volume=volume.name, diffs=len(erased), **error_fields(exc))


# in threads


def _verify(volume: Volume, readers: Sequence[WdiffReader], job: Job) -> None:
    """Read all of the diffs once, so that damage is met before the base is touched."""
    for i, reader in enumerate(readers):
        verify(reader, decode=False, size_lb=volume.size_lb, check=volume.check_force)
        job.progress(i + 1)
    with disk_errors(volume.directory, "apply"):
        failpoints.hit(FP_BEFORE_BEGIN)


def _write(volume: Volume, readers: Sequence[WdiffReader], job: Job) -> None:
    place = volume.place

    def progress(done_lb: int) -> None:
        job.progress(done_lb * LB)
        failpoints.hit(FP_MID_WRITE)

    with disk_errors(volume.directory, "apply"):
        failpoints.hit(FP_AFTER_BEGIN)
        with place.images.open_base(volume.name, write=True) as image:
            apply(readers, image, size_lb=volume.size_lb, check=volume.check_force, progress=progress)
            image.sync()
        failpoints.hit(FP_BEFORE_DONE)


def _erase(volume: Volume, diffs: Sequence[Diff], colds: Sequence[int]) -> None:
    with disk_errors(volume.directory, "remove applied diffs"):
        failpoints.hit(FP_BEFORE_ERASE)
    remove_diffs(volume.place.env.fs, volume.directory, diffs)
    if colds:
        erase_images(volume, colds)
