"""What all fake servers of `tests.kit.fake_group` have: a volume table, jobs, the common requests."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from tests.kit.group import free_port
from walbd.daemon.conn import Connection, Me
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.net import Address
from walbd.daemon.server import Handler, Server
from walbd.errors import BadState, Refused
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobAccepted, JobInfo, JobList, Kind, Ok, WaitJob
from walbd.protocol.codec import Message, Request

if TYPE_CHECKING:
    from tests.kit.fake_group import FakeGroup

NOW = 1_800_000_000  # what every fake server takes for the time


@dataclass
class FakeVolume:
    """A volume at one server; each kind uses its part."""

    state: str
    # storage
    device: str = ""
    overflow: bool = False
    uuid: bytes = bytes(16)
    gid: int = 0
    gid_past: int = 0  # given out before the last reset
    snapshots: list[int] = field(default_factory=list)  # not yet taken by a proxy
    lag_lb: int = 0
    # proxy
    infos: dict[str, c.ArchiveInfo] = field(default_factory=dict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    send_error: bool = False
    # archive
    points: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    colds: list[int] = field(default_factory=list)
    base: int = 0
    size_lb: int = 1 << 15
    archive_uuid: bytes = bytes(15) + b"\x07"
    protected: list[int] = field(default_factory=list)  # starts of diffs that must not be merged
    compared: list[int] = field(default_factory=list)  # ends of diffs that a comparison made
    image: bytes = b""  # what a scan sends
    damage: str = ""  # what is wrong with that
    gaps: list[m.Gap] = field(default_factory=list)
    policy: bool = True  # is it on?
    replicas: list[m.ReplicaPosition] = field(default_factory=list)


class FakeServer:
    """One server: its volumes, and the requests it serves."""

    def __init__(self, group: FakeGroup, name: str, kind: Kind) -> None:
        self.group = group
        self.name = name
        self.kind = kind
        self.volumes: dict[str, FakeVolume] = {}
        self.port = free_port()
        self.jobs = Jobs(group.env.clock)
        self.tasks: asyncio.TaskGroup | None = None
        self._stop: asyncio.Event | None = None
        self._main: asyncio.Task[None] | None = None

    # life

    async def up(self) -> None:
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stop = asyncio.Event()
        self.jobs = Jobs(self.group.env.clock)
        self._main = asyncio.create_task(self._serve(started, self._stop))
        await asyncio.wait({self._main, started}, return_when=asyncio.FIRST_COMPLETED)
        if self._main.done():
            self._main.result()

    async def down(self) -> None:
        if self._stop is not None and self._main is not None:
            self._stop.set()
            await self._main
            self._main = None

    async def _serve(self, started: asyncio.Future[None], stop: asyncio.Event) -> None:
        me = Me(node=self.name, kind=self.kind, io_timeout_s=60)
        handlers = {cls: self._guard(handler) for cls, handler in self.handlers().items()}
        server = Server(self.group.env, me, handlers | self.streams())
        background: asyncio.Task[None] | None = None
        async with asyncio.TaskGroup() as tasks:
            await server.listen(tasks, [Address("127.0.0.1", self.port)])
            background = asyncio.create_task(self._jobs_group(stop))
            started.set_result(None)
            await stop.wait()
            await server.stop(force=True)
        background.cancel()
        await asyncio.wait({background})

    async def _jobs_group(self, stop: asyncio.Event) -> None:
        async with asyncio.TaskGroup() as self.tasks:
            await asyncio.Event().wait()

    def streams(self) -> dict[type[Request[Any]], Handler]:
        """Handlers that conduct a whole conversation."""
        return {}

    def _guard(self, handler: Callable[[Any], Awaitable[Message]]) -> Any:
        async def serve(_conn: Connection, request: Any) -> Message:
            self.group.requests.append((self.name, request))
            await self.group.before(self.name, request)
            return await handler(request)

        return serve

    # requests of all servers

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return {
            c.GetHostType: self.host_type,
            c.GetVersion: self.version,
            c.GetState: self.get_state,
            c.GetVolumes: self.get_volumes,
            c.GetStatus: self.status,
            c.GetActions: self.actions,
            c.GetNumAction: self.num_action,
            c.GetLatestSnap: self.latest,
            GetJobs: self.get_jobs,
            WaitJob: self.wait_job,
            c.Stop: self.stop,
            c.ClearVol: self.clear_vol,
            c.Shutdown: self.shutdown,
            c.Start: self.start,
            m.Reload: self.reload,
        }

    async def host_type(self, _request: c.GetHostType) -> c.HostType:
        return c.HostType(kind=self.kind)

    async def version(self, _request: c.GetVersion) -> c.VersionInfo:
        return c.VersionInfo(version="0.1.0", protocol_min=1, protocol_max=1, log_format=2, python="3.11.2")

    async def get_state(self, request: c.GetState) -> c.TextValue:
        return c.TextValue(value=self.state(request.volume))

    async def get_volumes(self, _request: c.GetVolumes) -> c.Names:
        return c.Names(names=sorted(self.volumes))

    async def actions(self, _request: c.GetActions) -> c.Actions:
        return c.Actions(rows=[(name, "Apply", 0, NOW - 60) for name in sorted(self.volumes)])

    async def num_action(self, request: c.GetNumAction) -> c.IntValue:
        return c.IntValue(value=len([job for job in self.jobs.of(request.volume) if job.running]))

    async def latest(self, request: c.GetLatestSnap) -> c.Latest:
        rows = [
            (name, "", max(v.points, default=v.gid), 0, NOW - 5)
            for name, v in sorted(self.volumes.items())
            if request.volume in ("", name)
        ]
        return c.Latest(rows=rows)

    async def get_jobs(self, request: GetJobs) -> JobList:
        return JobList(jobs=[job.info() for job in self.jobs.of(request.volume)])

    async def wait_job(self, request: WaitJob) -> JobInfo:
        return await self.jobs.wait(request.job, request.wait_s)

    async def shutdown(self, _request: c.Shutdown) -> Ok:
        assert self._stop is not None
        asyncio.get_running_loop().call_later(0.01, self._stop.set)
        return Ok()

    async def reload(self, _request: m.Reload) -> m.Reloaded:
        return m.Reloaded(applied=["log_level"], needs_restart=["port"] if self.kind is Kind.PROXY else [])

    async def clear_vol(self, request: c.ClearVol) -> Ok:
        self.require(request.volume, "SyncReady", "Stopped")
        del self.volumes[request.volume]
        return Ok()

    async def start(self, request: c.Start) -> Ok:
        volume = self.require(request.volume, "Stopped")
        volume.state = {Kind.PROXY: "Started", Kind.ARCHIVE: "Archived"}.get(self.kind, "Target")
        self.group.settle()
        return Ok()

    async def stop(self, request: c.Stop) -> JobAccepted:
        volume = self.require(request.volume, *self.stoppable())

        async def work(job: Job) -> None:
            await self.group.gate("stop")
            if request.how is c.StopHow.EMPTY:
                self.group.settle()
                if any(volume.waiting.values()):
                    raise Refused("not empty")
            volume.state = "SyncReady" if volume.state in ("Standby", "FullSync", "HashSync") else "Stopped"

        return self.job("stop", request.volume, work)

    async def status(self, request: c.GetStatus) -> c.StatusReply:
        names = [request.volume] if request.volume else sorted(self.volumes)
        return c.StatusReply(
            node=self.name,
            kind=self.kind,
            version="0.1.0",
            pid=4242,
            now=NOW,
            volumes=[self.volume_status(name, self.volumes.get(name) or FakeVolume("Clear")) for name in names],
        )

    def volume_status(self, name: str, v: FakeVolume) -> c.VolumeStatus:
        more: dict[str, Any] = {}
        if self.kind is Kind.STORAGE:
            more = {
                "device": v.device,
                "overflow": v.overflow,
                "log_usage_pb": 1000,
                "log_capacity_pb": 10000,
                "pbs": 4096,
                "lag_lb": v.lag_lb,
                "waiting_since": NOW - 7 if v.lag_lb else 0,
                "done_gid": v.gid,
                "done_time": NOW - 7,
                "latest_gid": v.gid,
                "gid_greatest": max(v.gid, v.gid_past),
                "size_lb": v.size_lb,
                "uuid": v.uuid.hex(),
            }
        elif self.kind is Kind.PROXY:
            more = {"hops": [self.hop(v, info) for info in v.infos.values()]}
        else:
            more = {
                "restorable": len(v.points),
                "restored": v.restored,
                "oldest_time": NOW - 600,
                "latest_time": NOW - 5,
                "latest_gid": max(v.points, default=0),
                "diffs": max(len(v.points) - 1, 0),
                "diffs_b": 4096 * max(len(v.points) - 1, 0),
                "size_lb": v.size_lb,
                "uuid": v.uuid.hex(),
                "hops": [self.replica(v, row) for row in v.replicas],
            }
        return c.VolumeStatus(volume=name, state=v.state, **more)

    def replica(self, v: FakeVolume, row: m.ReplicaPosition) -> c.HopStatus:
        behind = [gid for gid in v.points if gid > row.gid]
        return c.HopStatus(
            dest=row.node,
            address=row.address,
            sending=False,
            diffs=len(behind),
            size_b=4096 * len(behind),
            gid_b=row.gid,
            gid_e=max(v.points),
            oldest=row.timestamp if behind else 0,
            last_sent=row.seen,
            error=bool(row.error),
            error_text=row.error,
        )

    def hop(self, v: FakeVolume, info: c.ArchiveInfo) -> c.HopStatus:
        waiting = v.waiting.get(info.archive, [])
        return c.HopStatus(
            dest=info.archive,
            address=info.address,
            sending=False,
            diffs=len(waiting),
            size_b=8192 * len(waiting),
            gid_b=min(waiting, default=0),
            gid_e=max(waiting, default=0),
            oldest=NOW - 100 if waiting else 0,
            last_sent=NOW - 9,
            error=v.send_error,
            error_text="smaller-lv-size" if v.send_error else "",
        )

    # helpers

    def stoppable(self) -> tuple[str, ...]:
        return ("Started",) if self.kind is Kind.PROXY else ("Archived",)

    def state(self, vol: str) -> str:
        volume = self.volumes.get(vol)
        return volume.state if volume is not None else "Clear"

    def require(self, vol: str, *states: str) -> FakeVolume:
        if self.state(vol) not in states:
            raise BadState(
                "not allowed in this state", hint=f"allowed in: {', '.join(states)}", state=self.state(vol)
            )
        return self.volumes[vol]

    def known(self, vol: str) -> FakeVolume:
        if vol not in self.volumes:
            raise BadState("not allowed in this state", state="Clear")
        return self.volumes[vol]

    def job(self, name: str, vol: str, work: Callable[[Job], Coroutine[Any, Any, Any]]) -> JobAccepted:
        assert self.tasks is not None
        return JobAccepted(job=self.jobs.start(self.tasks, name, vol, work).number)
