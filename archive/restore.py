"""Restore: a writable copy of the volume as it was at one clean snapshot (docs/archive.md, "Restore").

The base image, or a cold image above it, is cloned and the diffs up to the snapshot are applied to the clone,
which gets its name when it is complete and durable. An apply is kept out from the beginning to the end, so the
clone is what the record says.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack, ExitStack
from typing import Final

from walbd.archive.colds import cold_gid, keep_cold, start_for
from walbd.archive.opening import open_diffs
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.daemon.tasks import uninterrupted
from walbd.errors import AlreadyExists, InternalError
from walbd.format.meta import BaseState, Diff, Snapshot
from walbd.format.wdiff_read import WdiffReader
from walbd.fs import File, failpoints
from walbd.fs.disk import disk_errors
from walbd.fs.wdiff_apply import apply
from walbd.protocol.base import Fact
from walbd.units import LB

FP_AFTER_CLONE: Final = failpoints.register(
    "archive.restore.after_clone", "an unfinished copy, which the next start removes"
)
FP_BEFORE_RENAME: Final = failpoints.register(
    "archive.restore.before_rename", "a complete copy without its name, which the next start removes"
)
FP_AFTER_RENAME: Final = failpoints.register("archive.restore.after_rename", "the restored image is there")


def check_restore(volume: Volume, gid: int) -> None:
    """Raise AlreadyExists or NotReachable unless `gid` can be restored now."""
    if gid in volume.restored:
        raise AlreadyExists("this generation is restored already", hint="delete the restored image first", gid=gid)
    volume.diffs.to_restore(start_for(volume, gid), gid)


async def run_restore(volume: Volume, gid: int, job: Job) -> dict[str, Fact]:
    """The job; the caller holds the action. A failure leaves nothing behind."""
    pools, images = volume.place.env.pools, volume.place.images
    volume.check_force()
    state = start_for(volume, gid)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(pools.run, Pool.MAINTAIN, images.abandon_clone, volume.name, gid)
        job.begin("cloning", volume.size_lb * LB)
        image = await pools.run(Pool.MAINTAIN, _clone, volume, gid, cold_gid(volume, state), job)
        try:
            while _next_round(volume, state, gid):
                job.begin("writing", volume.size_lb * LB)
                state = await _round(volume, image, state, gid, job)
            if state.begin != Snapshot.clean(gid):
                raise InternalError("the diffs do not lead to the snapshot", gid=gid, state=str(state))
            job.begin("syncing")
            await pools.run(Pool.MAINTAIN, image.sync)
        finally:
            await pools.run(Pool.MAINTAIN, image.close)
        await keep_cold(volume, gid, state.timestamp)
        await uninterrupted(_finish(volume, gid))
        undo.pop_all()
    return {"gid": gid, "path": str(images.restored_path(volume.name, gid))}


def _next_round(volume: Volume, state: BaseState, gid: int) -> list[Diff]:
    return volume.diffs.to_restore(state, gid, n_max=volume.place.config.open_files_max)


async def _round(volume: Volume, image: File, state: BaseState, gid: int, job: Job) -> BaseState:
    """Apply one round to the copy and return where it leads. Files may be replaced by merged ones meanwhile."""
    async with open_diffs(volume, Pool.MAINTAIN, lambda: _next_round(volume, state, gid)) as found:
        await volume.place.env.pools.run(Pool.MAINTAIN, _write, volume, image, found.readers, job)
        return state.end_applying(found.diffs)


async def _finish(volume: Volume, gid: int) -> None:
    await volume.place.env.pools.run(Pool.MAINTAIN, _name, volume, gid)
    volume.restored.add(gid)


# in threads


def _clone(volume: Volume, gid: int, cold: int | None, job: Job) -> File:
    def tick(done_b: int) -> None:
        job.progress(done_b)
        volume.check_force()

    with ExitStack() as undo:
        image = undo.enter_context(volume.place.images.clone_base(volume.name, gid, tick, cold=cold))
        with disk_errors(image.path, "restore"):
            failpoints.hit(FP_AFTER_CLONE)
        undo.pop_all()
    return image


def _write(volume: Volume, image: File, readers: Sequence[WdiffReader], job: Job) -> None:
    apply(
        readers,
        image,
        size_lb=volume.size_lb,
        check=volume.check_force,
        progress=lambda done_lb: job.progress(done_lb * LB),
    )


def _name(volume: Volume, gid: int) -> None:
    with disk_errors(volume.directory, "restore"):
        failpoints.hit(FP_BEFORE_RENAME)
        volume.place.images.finish_clone(volume.name, gid)
        failpoints.hit(FP_AFTER_RENAME)
