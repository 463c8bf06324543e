"""The life of a volume: init-vol, clear-vol, reset-vol, start, stop (docs/archive.md, "Commands").

Clearing begins with a record that says SyncReady without a base: from there on nothing usable is promised, and a
crash leaves a volume that can be cleared again. The directory then gets a name that no volume can have, which is
the moment the volume is gone; what bears such a name is removed here and at start-up.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from pathlib import Path
from typing import Final

import structlog

from walbd.archive.diffs import remove_all_diffs
from walbd.archive.images.store import ImageStore
from walbd.archive.record import VolumeRecord
from walbd.archive.recover import remove_copies
from walbd.archive.states import Command, State
from walbd.archive.volume import Place, Volume
from walbd.daemon.env import Pool
from walbd.daemon.jobs import Job
from walbd.daemon.logs import error_fields
from walbd.daemon.record import RECORD_NAME
from walbd.daemon.states import Step
from walbd.errors import WalbError
from walbd.fs import FileSystem, failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import Fact

log = structlog.get_logger()

CLEARED_PREFIX: Final = "cleared_"  # no volume name has an underscore

FP_BEFORE_REMOVE: Final = failpoints.register(
    "archive.clear.before_remove", "the volume is SyncReady without a base; its files are still there"
)
FP_BEFORE_RENAME: Final = failpoints.register(
    "archive.clear.before_rename", "SyncReady; the images are gone, the directory is still there"
)
FP_AFTER_RENAME: Final = failpoints.register(
    "archive.clear.after_rename", "Clear; a directory with another name is garbage"
)
FP_INIT_BEFORE_RECORD: Final = failpoints.register(
    "archive.init.before_record", "an empty directory, which the next start removes"
)


async def init_vol(volumes: dict[str, Volume], name: str, place: Place) -> None:
    """Make a volume known, in state SyncReady. Raises BadState when it is."""
    volume = volumes.get(name)
    if volume is None:
        volume = Volume(name, place)
    step = volume.enter(Command.INIT_VOL)
    volumes[name] = volume
    fs, pools = place.env.fs, place.env.pools
    async with AsyncExitStack() as ending:
        ending.callback(volume.machine.leave)
        async with AsyncExitStack() as undo:
            undo.callback(volumes.pop, name)
            await pools.run(Pool.RECORD, fs.make_dir, volume.directory)
            undo.push_async_callback(pools.run, Pool.RECORD, fs.remove_tree, volume.directory)
            with disk_errors(volume.directory, "initialise the volume"):
                failpoints.hit(FP_INIT_BEFORE_RECORD)
            await volume.commit(step)
            undo.pop_all()


async def clear_vol(volumes: dict[str, Volume], volume: Volume) -> None:
    """Forget a volume and remove everything of it. It can be repeated after a failure."""
    step = volume.enter(Command.CLEAR_VOL)
    pools, place = volume.place.env.pools, volume.place
    try:
        if volume.machine.state is not State.BROKEN:
            await promise_nothing(volume, step)
        await pools.run(Pool.RECORD, _remove_images, place.env.fs, place.images, volume.directory)
        garbage = await pools.run(Pool.RECORD, _rename_away, place.env.fs, volume.directory)
        volume.machine.state = State.CLEAR
        volume.error = None
        del volumes[volume.name]
        try:
            await pools.run(Pool.RECORD, place.env.fs.remove_tree, garbage)
        except WalbError as exc:  # the volume is gone all the same; the next start removes the rest
            log.warning("volume.garbage_left", volume=volume.name, path=str(garbage), **error_fields(exc))
    finally:
        volume.machine.leave()


async def reset_vol(volume: Volume) -> None:
    """Remove all data of a volume: SyncReady again. It can be repeated after a failure."""
    step = volume.enter(Command.RESET_VOL)
    place = volume.place
    try:
        await promise_nothing(volume, step)
        await place.env.pools.run(
            Pool.RECORD, _remove_images, place.env.fs, place.images, volume.directory, keep_record=True
        )
    finally:
        volume.machine.leave()


async def start(volume: Volume) -> None:
    """Take diffs again."""
    async with volume.machine.transition(Command.START, lambda to: volume.save(state=to)):
        pass


async def stop(volume: Volume, _job: Job) -> dict[str, Fact] | None:
    """The job of a stop: the caller has checked the state, and holds the stop flag until this ends."""
    machine = volume.machine
    await machine.changed.wait_for(lambda: machine.at_rest)
    async with machine.transition(Command.STOP, lambda to: volume.save(state=to)):
        pass
    return None


async def promise_nothing(volume: Volume, step: Step) -> None:
    """Write the record of an empty volume, SyncReady, and forget what it had but its policy. The step goes on."""
    empty = VolumeRecord(state=State.SYNC_READY)
    fields = {name: getattr(empty, name) for name in empty.__struct_fields__ if name not in ("state", "policy")}
    await volume.commit(Step(step.during, State.SYNC_READY), **fields)
    volume.reset_memory()
    volume.machine.actions.clear()


def _remove_images(fs: FileSystem, images: ImageStore, directory: Path, *, keep_record: bool = False) -> None:
    """Remove restored images, the base image and the diffs; with `keep_record`, everything but the record."""
    with disk_errors(directory, "remove the data"):
        failpoints.hit(FP_BEFORE_REMOVE)
    name = directory.name
    remove_copies(images, name)
    images.remove_unfinished(name)
    images.remove_base(name)
    remove_all_diffs(fs, directory)
    if keep_record:
        for other in fs.list_names(directory):
            path = directory / other
            if other != RECORD_NAME and not fs.is_dir(path):
                fs.unlink(path)
        fs.sync_dir(directory)


def _rename_away(fs: FileSystem, directory: Path) -> Path:
    garbage = directory.parent / (CLEARED_PREFIX + directory.name)
    with disk_errors(directory, "remove the volume"):
        failpoints.hit(FP_BEFORE_RENAME)
        fs.remove_tree(garbage)
        fs.rename(directory, garbage)
        failpoints.hit(FP_AFTER_RENAME)
    return garbage


def remove_garbage(fs: FileSystem, base_dir: Path) -> None:
    """Remove what cleared volumes left in the base directory."""
    for name in fs.list_names(base_dir):
        if name.startswith(CLEARED_PREFIX):
            fs.remove_tree(base_dir / name)
