"""Repair by hand: the dbg- commands (docs/archive.md, "Repair by hand").

They change what the archive believes, so the volume must be Stopped with nothing running, and each of them is a
step that keeps everything else out. What cannot be true is refused; what is left is the operator's word.
"""

from __future__ import annotations

from dataclasses import replace

import structlog

from walbd.archive.lifecycle import promise_nothing
from walbd.archive.recover import load_volume
from walbd.archive.states import Command, State
from walbd.archive.volume import Volume
from walbd.daemon.env import Pool
from walbd.errors import NotFound, Refused, UsageError
from walbd.format.meta import BaseState
from walbd.ids import NIL_UUID
from walbd.units import LB

log = structlog.get_logger()


async def reload_metadata(volume: Volume) -> None:
    """Load the volume from its files as a start does. Raises what makes it broken; then nothing has changed."""
    place = volume.place
    step = volume.enter(Command.DBG_RELOAD_METADATA)
    try:
        loaded = await place.env.pools.run(Pool.RECORD, load_volume, place.env.fs, place.images, volume.directory)
        if loaded.record.state is not step.to:
            raise Refused(
                "the record says another state than Stopped",
                hint="restart the archive, which takes it as it is",
                state=str(loaded.record.state),
            )
        volume.reset_memory()
        volume.adopt(loaded)
    finally:
        volume.machine.leave()
    log.warning("volume.reloaded", volume=volume.name, base=str(volume.base), diffs=len(volume.diffs))


async def set_uuid(volume: Volume, uuid: bytes) -> None:
    """Say which log history the volume continues; a nil uuid is refused."""
    if uuid == NIL_UUID:
        raise UsageError("a history has a uuid", hint="get uuid at the storage tells it", uuid=uuid.hex())
    step = volume.enter(Command.DBG_SET_UUID)
    old = volume.record.uuid
    try:
        await volume.commit(step, uuid=uuid.hex())
    finally:
        volume.machine.leave()
    log.warning("volume.uuid_set", volume=volume.name, uuid=uuid.hex(), old=old)


async def set_base(volume: Volume, base: BaseState) -> None:
    """Say what the base image is; a state without a time is of now.

    Raises UsageError for the state of no image, HistoryBroken for an unfinished apply that no diffs finish.
    """
    if base.begin.is_none:
        raise UsageError("a base has a generation", hint="reset-vol forgets the base", base=str(base))
    if not base.timestamp:
        base = replace(base, timestamp=volume.place.env.clock.now())
    step = volume.enter(Command.DBG_SET_BASE)
    old = volume.base
    try:
        latest = volume.diffs.latest(base)  # raises HistoryBroken
        await volume.commit(step, base=base, base_uuid="")
        volume.latest = latest
    finally:
        volume.machine.leave()
    log.warning("volume.base_set", volume=volume.name, base=str(base), old=str(old), latest=str(latest))


async def set_state(volume: Volume, name: str) -> None:
    """Say which steady state the volume is in.

    Archived and Stopped need an image to use. SyncReady forgets the base, and is refused while there are diffs or
    restored images, which would be removed at the next start. The others have no record.
    """
    wanted = _steady(name)
    step = volume.enter(Command.DBG_SET_STATE)
    try:
        if wanted is State.SYNC_READY:
            _check_empty(volume)
            await promise_nothing(volume, step)
        else:
            await _check_image(volume)
            await volume.commit(step._replace(to=wanted))
    finally:
        volume.machine.leave()
    log.warning("volume.state_set", volume=volume.name, state=str(wanted))


def _steady(name: str) -> State:
    for state in (State.SYNC_READY, State.ARCHIVED, State.STOPPED):
        if name == state:
            return state
    raise UsageError(
        "no such state can be set", hint="SyncReady, Archived or Stopped; clear-vol leads to Clear", state=name
    )


def _check_empty(volume: Volume) -> None:
    if volume.diffs or volume.restored:
        raise Refused(
            "there are diffs or restored images, which SyncReady cannot have",
            hint="reset-vol removes them",
            diffs=len(volume.diffs),
            restored=len(volume.restored),
        )


async def _check_image(volume: Volume) -> None:
    images = volume.place.images
    size_b = await volume.place.env.pools.run(Pool.RECORD, images.base_size, volume.name)
    if size_b is None or size_b < volume.size_lb * LB:
        raise NotFound(
            "the base image is missing or too short",
            hint="put the image back, or reset the volume and back it up again",
            size_b=size_b,
            expected_b=volume.size_lb * LB,
        )
