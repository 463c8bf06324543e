"""What every daemon answers alike. Source: docs/protocol.md, "Control"."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from walbd import __version__
from walbd.daemon.conn import Connection, Me
from walbd.daemon.env import Clock, Env, Pool
from walbd.daemon.jobs import Jobs
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.daemon.reload import Settings
from walbd.daemon.scheduler import Waiting
from walbd.daemon.server import Handler, RequestStat
from walbd.daemon.states import Machine
from walbd.errors import DiskFailed, NotFound
from walbd.format.superblock import LOG_VERSION
from walbd.protocol.base import VERSION_MAX, VERSION_MIN, Fact, GetJobs, JobInfo, JobList, Ok, WaitJob
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    Actions,
    GetHandlerStat,
    GetHostType,
    GetPid,
    GetState,
    GetVersion,
    HostType,
    IntValue,
    ProxyHealth,
    RequestStats,
    StatusReply,
    TaskStatus,
    TextValue,
    VersionInfo,
    VolumeStatus,
)
from walbd.protocol.control import Shutdown as ShutdownRequest
from walbd.protocol.maintenance import Reload, Reloaded

UNKNOWN_STATE: Final = "Clear"  # of a volume that is not known, at every daemon
_ERROR_LEN_MAX: Final = 4096


class HasMachine(Protocol):
    """A volume of any daemon."""

    @property
    def machine(self) -> Machine[Any, Any]: ...


class CommonRequests:
    """Handlers of the requests that are the same at every daemon."""

    def __init__(
        self,
        me: Me,
        jobs: Jobs,
        volumes: Mapping[str, HasMachine],
        shutdown: Shutdown,
        stats: Callable[[], Mapping[tuple[str, str], RequestStat]],
        settings: Settings[Any],
    ) -> None:
        """`stats()` returns those of the server that these handlers are for: it is made after them."""
        self._me = me
        self._jobs = jobs
        self._volumes = volumes
        self._shutdown = shutdown
        self._stats = stats
        self._settings = settings

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            GetHandlerStat: self._handler_stat,
            GetHostType: self._host_type,
            GetJobs: self._list_jobs,
            GetPid: self._pid,
            GetState: self._state,
            GetVersion: self._version,
            Reload: self._reload,
            ShutdownRequest: self._shut_down,
            WaitJob: self._wait_job,
        }

    async def _version(self, _conn: Connection, _request: GetVersion) -> VersionInfo:
        return VersionInfo(
            version=__version__,
            protocol_min=VERSION_MIN,
            protocol_max=VERSION_MAX,
            log_format=LOG_VERSION,
            python=platform.python_version(),
        )

    async def _host_type(self, _conn: Connection, _request: GetHostType) -> HostType:
        return HostType(kind=self._me.kind)

    async def _pid(self, _conn: Connection, _request: GetPid) -> IntValue:
        return IntValue(value=os.getpid())

    async def _handler_stat(self, _conn: Connection, _request: GetHandlerStat) -> RequestStats:
        rows = [
            (tag, node, stat.count, stat.elapsed_s / stat.count)
            for (tag, node), stat in sorted(self._stats().items())
        ]
        return RequestStats(rows=rows)

    async def _state(self, _conn: Connection, request: GetState) -> TextValue:
        volume = self._volumes.get(request.volume)
        return TextValue(value=volume.machine.shown if volume is not None else UNKNOWN_STATE)

    async def _list_jobs(self, _conn: Connection, request: GetJobs) -> JobList:
        return JobList(jobs=[job.info() for job in self._jobs.of(request.volume)])

    async def _wait_job(self, _conn: Connection, request: WaitJob) -> JobInfo:
        return await self._jobs.wait(request.job, request.wait_s)

    async def _reload(self, _conn: Connection, _request: Reload) -> Reloaded:
        return await self._settings.reload()

    async def _shut_down(self, conn: Connection, request: ShutdownRequest) -> None:
        try:
            await conn.send(Ok())  # first: a forced end drops connections
        finally:
            self._shutdown.request(ShutdownMode(request.how.value))


def begun_actions(volumes: Mapping[str, HasMachine]) -> Actions:
    """Return the actions that have begun at least once, by volume."""
    return Actions(
        rows=[
            (name, action, info.count, info.began)
            for name, volume in sorted(volumes.items())
            for action in volume.machine.table.actions
            if (info := volume.machine.actions.get(action)) is not None
        ]
    )


def status_reply(
    me: Me,
    clock: Clock,
    server: dict[str, Fact],
    volumes: list[VolumeStatus],
    *,
    waiting: Iterable[Waiting[Any]] = (),
    proxies: Iterable[ProxyHealth] = (),
    errors: Iterable[str] = (),
) -> StatusReply:
    """Return the status of this daemon; `server` holds its settings and totals."""
    return StatusReply(
        node=me.node,
        kind=me.kind,
        version=__version__,
        pid=os.getpid(),
        now=clock.now(),
        server=server,
        proxies=list(proxies),
        volumes=volumes,
        tasks=[
            TaskStatus(key=str(row.key), due_in_s=round(row.due_in_s, 3), failures=row.failures) for row in waiting
        ],
        errors=[text[:_ERROR_LEN_MAX] for text in errors],
    )


async def free_space(env: Env, base: Path) -> dict[str, Fact]:
    """Return the free space of the base directory [byte] for a status, or why it is not known."""
    try:
        return {"free_b": await env.pools.run(Pool.QUERY, env.fs.free_b, base)}
    except (DiskFailed, NotFound) as exc:
        return {"disk_error": str(exc)}
