"""What a storage daemon answers about itself and its volumes. Queries change nothing.

Those about all volumes leave out the ones that cannot answer; those about one volume say why it cannot.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

from walbd.daemon.common import status_reply
from walbd.errors import NotFound, TimedOut, WalbError
from walbd.protocol.base import Fact
from walbd.protocol.control import (
    LogUsage,
    StatusReply,
    VolumeStatus,
)
from walbd.storage.device.interface import DeviceInfo
from walbd.storage.history import lag_lb, lost_code, problem_of
from walbd.storage.proxies import Proxies
from walbd.storage.shared import Shared
from walbd.storage.states import TABLE, Command, State
from walbd.storage.volume import Volume

DEVICE_WAIT_S: Final = 3.0  # for a device's answer to a query

T = TypeVar("T")
LatestRow = tuple[str, str, int, int, int]


async def device_info(volume: Volume) -> DeviceInfo:
    """Ask the device of a volume, with the patience of a query."""
    try:
        async with asyncio.timeout(DEVICE_WAIT_S):
            return await volume.info()
    except TimeoutError as exc:
        volume.device_error = f"no answer within {DEVICE_WAIT_S} s"
        raise TimedOut("the device does not answer", volume=volume.name, device=volume.record.device) from exc


async def is_overflow(volume: Volume) -> bool:
    """Say whether the log has overflowed."""
    volume.check(Command.GET_DEVICE)
    return (await device_info(volume)).lsids.overflow


async def log_usage(volume: Volume) -> LogUsage:
    """Return how full the ring is; above its capacity after an overflow."""
    volume.check(Command.GET_DEVICE)
    info = await device_info(volume)
    return LogUsage(
        volume=volume.name,
        usage_pb=info.lsids.latest - info.lsids.oldest,
        capacity_pb=info.capacity_pb,
        pbs=info.pbs,
    )


async def latest_snapshot(volume: Volume) -> LatestRow:
    """Return the newest snapshot taken, delivered or not."""
    volume.check(Command.GET_LATEST_SNAP)
    point = volume.record.newest
    return (volume.name, "", point.gid, point.lsid, point.timestamp)


async def of_all(volumes: Sequence[Volume], ask: Callable[[Volume], Awaitable[T]]) -> list[T]:
    """Ask all volumes at once; leave out those that cannot answer."""
    answers = await asyncio.gather(*(ask(volume) for volume in volumes), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, WalbError):
            raise answer
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def num_action(volume: Volume, action: str) -> int:
    """Return how often an action runs for a volume; raises NotFound."""
    if action not in TABLE.actions:
        raise NotFound("no such action", hint="actions: " + ", ".join(TABLE.actions), action=action)
    return volume.machine.running(action)


async def status(
    shared: Shared, proxies: Proxies, volumes: Sequence[Volume], all_volumes: Sequence[Volume]
) -> StatusReply:
    """Return the status of the server with the given volumes."""
    config = shared.config
    rows = await asyncio.gather(*(volume_status(volume) for volume in volumes))
    server: dict[str, Fact] = {
        **shared.settings.facts(),
        "base_dir": config.base_dir,
        "full_scan_bytes_per_s": shared.scan_limit.bytes_per_s,
        "group": config.group,
        "jobs_running": sum(job.running for job in shared.jobs.of()),
        "snapshot_interval_s": config.snapshot_interval_s,
        "volumes": len(all_volumes),
        "wlog_packing": config.wlog_packing,
        "wlog_send_size_max_b": config.wlog_send_size_max,
    }
    problem = shared.settings.problem
    errors = [problem] if problem else []
    errors += [f"{row.volume}: {text}" for row in rows for text in (row.error, row.device_error) if text]
    health = proxies.health()
    if not any(proxy.available for proxy in health):
        errors.append("no proxy is available")
    return status_reply(
        shared.me,
        shared.env.clock,
        server,
        rows,
        waiting=shared.scheduler.waiting(),
        proxies=health,
        errors=errors,
    )


async def volume_status(volume: Volume) -> VolumeStatus:
    """Return the status of one volume; what the device would have to say is left out while it is away."""
    machine = volume.machine
    if not volume.has_record:
        error = str(volume.broken) if volume.broken is not None else ""
        return VolumeStatus(volume=volume.name, state=machine.shown, error=error)
    info: DeviceInfo | None = None
    try:
        info = await device_info(volume)
    except WalbError:
        pass  # `device_error` tells
    record = volume.record
    in_history = record.state in (State.TARGET, State.STOPPED)
    error = ""
    if info is not None and in_history:
        error = problem_of(record, info.lsids)
    newest = record.newest
    return VolumeStatus(
        volume=volume.name,
        state=machine.shown,
        stopping=str(machine.stopping or ""),
        actions={name: action.count for name, action in machine.actions.items() if action.count},
        size_lb=info.size_lb if info else 0,
        uuid=record.uuid_hex,
        device=record.device,
        device_error=(info.read_only if info else volume.device_error),
        overflow=info.lsids.overflow if info else False,
        log_usage_pb=info.lsids.latest - info.lsids.oldest if info else 0,
        log_capacity_pb=info.capacity_pb if info else 0,
        pbs=info.pbs if info else 0,
        lag_lb=lag_lb(record.done, info) if info and in_history else 0,
        done_gid=0 if record.done.is_none else record.done.gid,
        done_time=record.done.timestamp,
        latest_gid=0 if newest.is_none else newest.gid,
        latest_time=newest.timestamp,
        error=error or volume.send_error,
        waiting_since=volume.backlog.since(record.done.lsid) if info and in_history else 0,
        lost=lost_code(record, info.lsids) if info and in_history else "",
        log_uuid=info.lsids.uuid.hex() if info else "",
        gid_greatest=record.gid_greatest,
    )
