"""A backup group whose servers are small fakes behind the real network shell, for tests of the controller.

    with FakeGroup(storages=2) as group:
        group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
        group.kill("p0")                                  # as if its process had died
        group.fail("s0", TakeSnapshot, Busy("not now"))   # once

The fakes know states and move snapshots from storages over proxies to archives at once (`group.settle`), unless
`group.frozen` is set. They run in a thread of their own, as the controller is synchronous.
"""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Self, TypeVar

from tests.kit.group import free_port
from walbd.controller import Controller, ServerConnectionParam, ServerLayout
from walbd.controller.progress import Progress
from walbd.daemon.conn import Connection, Me
from walbd.daemon.env import Env
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.net import Address
from walbd.daemon.server import Server
from walbd.errors import AlreadyExists, BadState, NotFound, Refused, WalbError, WlogOverflow
from walbd.format.meta import BaseState, Diff, RestorePoint, Snapshot
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol.base import Fact, GetJobs, JobAccepted, JobInfo, JobList, Kind, Ok, WaitJob
from walbd.protocol.codec import Message, Request

T = TypeVar("T")
KINDS = {Kind.STORAGE: 0, Kind.PROXY: 1, Kind.ARCHIVE: 2}
NOW = 1_800_000_000  # what every fake server takes for the time


class StoppedClock:
    """It is always `NOW`."""

    def now(self) -> int:
        return NOW


@dataclass
class FakeVolume:
    """A volume at one server; each kind uses its part."""

    state: str
    # storage
    device: str = ""
    overflow: bool = False
    uuid: bytes = bytes(16)
    gid: int = 0
    snapshots: list[int] = field(default_factory=list)  # not yet taken by a proxy
    lag_lb: int = 0
    # proxy
    infos: dict[str, c.ArchiveInfo] = field(default_factory=dict)
    waiting: dict[str, list[int]] = field(default_factory=dict)
    send_error: bool = False
    # archive
    points: list[int] = field(default_factory=list)
    restored: list[int] = field(default_factory=list)
    base: int = 0


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
        me = Me(node=self.name, kind=self.kind, io_timeout_s=10)
        handlers = {cls: self._guard(handler) for cls, handler in self.handlers().items()}
        server = Server(self.group.env, me, handlers)
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
            volume.state = "SyncReady" if volume.state in ("Standby", "FullSync") else "Stopped"

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
                "done_gid": v.gid,
                "done_time": NOW - 7,
                "latest_gid": v.gid,
                "size_lb": 1 << 15,
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
                "size_lb": 1 << 15,
                "uuid": v.uuid.hex(),
            }
        return c.VolumeStatus(volume=name, state=v.state, **more)

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


class FakeStorage(FakeServer):
    """Full backups and snapshots."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.StorageInitVol: self.init_vol,
            c.ResetVol: self.reset_vol,
            c.FullBackup: self.full_backup,
            c.TakeSnapshot: self.snapshot,
            c.SetFullScanBps: self.set_bps,
            c.GetIsOverflow: self.is_overflow,
            c.GetLogUsage: self.log_usage,
            c.GetUuid: self.get_uuid,
            c.GetTsDelta: self.ts_delta,
            c.Kick: self.kick,
        }

    def stoppable(self) -> tuple[str, ...]:
        return "Target", "Standby", "FullSync"

    async def init_vol(self, request: c.StorageInitVol) -> Ok:
        if request.volume in self.volumes:
            raise BadState("not allowed in this state", state=self.state(request.volume))
        self.volumes[request.volume] = FakeVolume("SyncReady", device=request.device)
        return Ok()

    async def start(self, request: c.Start) -> Ok:
        if request.role is c.Role.STANDBY:
            self.require(request.volume, "SyncReady").state = "Standby"
            return Ok()
        if self.known(request.volume).overflow:
            raise WlogOverflow("the log has overflowed")
        return await super().start(request)

    async def reset_vol(self, request: c.ResetVol) -> Ok:
        volume = self.require(request.volume, "Stopped")
        volume.state, volume.overflow, volume.gid = "SyncReady", False, request.gid
        return Ok()

    async def full_backup(self, request: c.FullBackup) -> JobAccepted:
        volume = self.require(request.volume, "SyncReady")
        archive = self.group.servers[self.group.layout.get_primary_archive().name]
        if archive.state(request.volume) != "SyncReady":
            raise BadState("the archive cannot take a full backup", state=archive.state(request.volume))
        at_archive = archive.volumes[request.volume]
        volume.state = at_archive.state = "FullSync"

        async def work(job: Job) -> dict[str, Fact]:
            try:
                job.begin("copy", total=1 << 24)
                job.progress(1 << 22)
                await self.group.gate("full-backup")
                volume.uuid = at_archive.uuid = bytes(15) + b"\x07"
                volume.gid, volume.state, at_archive.state = 1, "Target", "Archived"
                volume.snapshots.append(1)
                self.group.settle()
                return {"gid": 1}
            finally:
                if volume.state == "FullSync":
                    volume.state = at_archive.state = "SyncReady"

        return self.job("full-backup", request.volume, work)

    async def snapshot(self, request: c.TakeSnapshot) -> c.GidValue:
        volume = self.require(request.volume, "Target", "Stopped")
        volume.gid += 1
        volume.snapshots.append(volume.gid)
        self.group.settle()
        return c.GidValue(gid=volume.gid)

    async def set_bps(self, _request: c.SetFullScanBps) -> Ok:
        return Ok()

    async def is_overflow(self, request: c.GetIsOverflow) -> c.BoolValue:
        return c.BoolValue(value=self.known(request.volume).overflow)

    async def log_usage(self, request: c.GetLogUsage) -> c.LogUsages:
        names = [request.volume] if request.volume else sorted(self.volumes)
        return c.LogUsages(rows=[c.LogUsage(volume=n, usage_pb=10, capacity_pb=1000, pbs=4096) for n in names])

    async def get_uuid(self, request: c.GetUuid) -> c.UuidValue:
        return c.UuidValue(value=self.known(request.volume).uuid)

    async def ts_delta(self, _request: c.GetTsDelta) -> c.TsDeltas:
        row = c.TsDelta(
            volume="vol0", dest="a0", gid=9, timestamp=NOW, dest_gid=7, dest_timestamp=NOW - 3, delta_s=3
        )
        return c.TsDeltas(rows=[row])

    async def kick(self, _request: c.Kick) -> c.Kicked:
        self.group.settle()
        return c.Kicked(tasks=1)


class FakeProxy(FakeServer):
    """Archive infos, and what waits for archives."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.ListArchiveInfo: self.list_infos,
            c.GetArchiveInfo: self.get_info,
            c.AddArchiveInfo: self.add_info,
            c.UpdateArchiveInfo: self.update_info,
            c.DeleteArchiveInfo: self.delete_info,
            c.GetIsWdiffSendError: self.is_error,
            c.GetProxyDiff: self.diffs,
            c.Kick: self.kick,
        }

    async def list_infos(self, request: c.ListArchiveInfo) -> c.Names:
        volume = self.volumes.get(request.volume)
        return c.Names(names=sorted(volume.infos) if volume is not None else [])

    async def get_info(self, request: c.GetArchiveInfo) -> c.ArchiveInfo:
        return self.info(request.volume, request.archive)

    async def add_info(self, request: c.AddArchiveInfo) -> Ok:
        volume = self.volumes.setdefault(request.volume, FakeVolume("Stopped"))
        self.require(request.volume, "Stopped")
        if request.info.archive in volume.infos:
            raise AlreadyExists("the archive is there", archive=request.info.archive)
        volume.infos[request.info.archive] = request.info
        return Ok()

    async def update_info(self, request: c.UpdateArchiveInfo) -> Ok:
        self.require(request.volume, "Stopped")
        self.info(request.volume, request.info.archive)
        self.volumes[request.volume].infos[request.info.archive] = request.info
        return Ok()

    async def delete_info(self, request: c.DeleteArchiveInfo) -> Ok:
        volume = self.require(request.volume, "Stopped")
        volume.infos.pop(request.archive, None)
        volume.waiting.pop(request.archive, None)
        if not volume.infos:
            del self.volumes[request.volume]
        return Ok()

    async def is_error(self, request: c.GetIsWdiffSendError) -> c.BoolValue:
        self.info(request.volume, request.archive)
        return c.BoolValue(value=self.volumes[request.volume].send_error)

    async def diffs(self, request: c.GetProxyDiff) -> c.Diffs:
        gids = self.known(request.volume).waiting.get(request.archive, [])
        return c.Diffs(diffs=[clean_diff(gid - 1, gid) for gid in gids])

    async def kick(self, request: c.Kick) -> c.Kicked:
        if request.volume:
            self.require(request.volume, "Started")
            self.info(request.volume, request.archive)
            self.volumes[request.volume].send_error = False
        self.group.settle()
        return c.Kicked(tasks=1)

    def info(self, vol: str, archive: str) -> c.ArchiveInfo:
        infos = self.known(vol).infos
        if archive not in infos:
            raise NotFound("no such archive here", archive=archive)
        return infos[archive]


class FakeArchive(FakeServer):
    """Restore points and images."""

    def handlers(self) -> dict[type[Request[Any]], Callable[[Any], Awaitable[Message]]]:
        return super().handlers() | {
            c.ArchiveInitVol: self.init_vol,
            c.ResetVol: self.reset_vol,
            c.GetRestorable: self.restorable,
            c.GetRestored: self.get_restored,
            c.GetRestoredPath: self.path,
            c.Restore: self.restore,
            c.DelRestored: self.del_restored,
            c.Apply: self.apply,
            c.GcDiff: self.gc,
            c.GetDiff: self.get_diff,
            c.GetApplicableDiff: self.get_diff,
            c.GetBase: self.get_base,
            c.GetMetaState: self.get_base,
            c.GetMetaSnap: self.meta_snap,
            c.GetVolSize: self.size,
            c.GetProgress: self.progress,
            c.GetUuid: self.get_uuid,
            c.GetArchiveUuid: self.get_uuid,
            c.GetExistsBaseImage: self.exists_base,
        }

    async def init_vol(self, request: c.ArchiveInitVol) -> Ok:
        if request.volume in self.volumes:
            raise BadState("not allowed in this state", state=self.state(request.volume))
        self.volumes[request.volume] = FakeVolume("SyncReady")
        return Ok()

    async def reset_vol(self, request: c.ResetVol) -> Ok:
        self.require(request.volume, "Stopped", "SyncReady")
        self.volumes[request.volume] = FakeVolume("SyncReady")
        return Ok()

    async def restorable(self, request: c.GetRestorable) -> c.RestorePoints:
        volume = self.volumes.get(request.volume)
        if volume is None or volume.state != "Archived":
            return c.RestorePoints(points=[])
        return c.RestorePoints(points=[RestorePoint(Gid(gid), NOW + gid, gid > 1) for gid in volume.points])

    async def get_restored(self, request: c.GetRestored) -> c.Gids:
        return c.Gids(gids=sorted(self.known(request.volume).restored))

    async def path(self, request: c.GetRestoredPath) -> c.TextValue:
        if request.gid not in self.known(request.volume).restored:
            raise NotFound("no such image", gid=request.gid)
        return c.TextValue(value=f"/images/{request.volume}/{request.gid}")

    async def restore(self, request: c.Restore) -> JobAccepted:
        volume = self.require(request.volume, "Archived")
        if request.gid not in volume.points:
            raise NotFound("the generation cannot be restored", hint="see get_restorable", gid=request.gid)

        async def work(job: Job) -> None:
            job.begin("write", total=1000, unit="diffs")
            await self.group.gate("restore")
            volume.restored.append(request.gid)

        return self.job("restore", request.volume, work)

    async def del_restored(self, request: c.DelRestored) -> Ok:
        volume = self.known(request.volume)
        if request.gid not in volume.restored:
            raise NotFound("no such image", gid=request.gid)
        volume.restored.remove(request.gid)
        return Ok()

    async def apply(self, request: c.Apply) -> JobAccepted:
        volume = self.require(request.volume, "Archived")

        async def work(job: Job) -> None:
            await self.group.gate("apply")
            volume.base = request.gid
            volume.points = [gid for gid in volume.points if gid >= request.gid]

        return self.job("apply", request.volume, work)

    async def gc(self, request: c.GcDiff) -> c.Kicked:
        self.known(request.volume)
        return c.Kicked(tasks=2)

    async def get_diff(self, request: c.GetDiff | c.GetApplicableDiff) -> c.Diffs:
        volume = self.known(request.volume)
        gids = [volume.base, *(gid for gid in volume.points if gid > volume.base)]
        return c.Diffs(diffs=[clean_diff(a, b) for a, b in itertools.pairwise(gids)])

    async def get_base(self, request: c.GetBase | c.GetMetaState) -> c.BaseValue:
        return c.BaseValue(base=BaseState(Snapshot.clean(self.known(request.volume).base), timestamp=NOW))

    async def meta_snap(self, request: c.GetMetaSnap) -> c.SnapshotValue:
        return c.SnapshotValue(snapshot=Snapshot.clean(max(self.known(request.volume).points)))

    async def size(self, request: c.GetVolSize) -> c.IntValue:
        self.known(request.volume)
        return c.IntValue(value=1 << 15)

    async def progress(self, request: c.GetProgress) -> c.IntValue:
        self.known(request.volume)
        return c.IntValue(value=0)

    async def get_uuid(self, request: c.GetUuid | c.GetArchiveUuid) -> c.UuidValue:
        return c.UuidValue(value=self.known(request.volume).uuid)

    async def exists_base(self, request: c.GetExistsBaseImage) -> c.BoolValue:
        return c.BoolValue(value=self.state(request.volume) == "Archived")


def clean_diff(begin: int, end: int) -> Diff:
    """A mergeable clean diff."""
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), mergeable=True, timestamp=NOW, size_b=4096)


class FakeGroup:
    """All of it; leaving the block ends it."""

    def __init__(self, *, storages: int = 1, proxies: int = 1, archives: int = 1, timeoutS: float = 5) -> None:
        self.frozen = False
        self.requests: list[tuple[str, Request[Any]]] = []
        self.progress: list[Progress] = []
        self.env = Env(clock=StoppedClock())
        self._gates: dict[str, asyncio.Event] = {}
        self._failures: list[tuple[str, type[Request[Any]], WalbError | None]] = []
        self._job_failures: dict[str, WalbError] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fake group", daemon=True)
        self._thread.start()
        made: list[tuple[type[FakeServer], str, int, Kind]] = [
            (FakeStorage, "s", storages, Kind.STORAGE),
            (FakeProxy, "p", proxies, Kind.PROXY),
            (FakeArchive, "a", archives, Kind.ARCHIVE),
        ]
        self.servers: dict[str, FakeServer] = {
            f"{letter}{i}": cls(self, f"{letter}{i}", kind) for cls, letter, n, kind in made for i in range(n)
        }
        for name in self.servers:
            self.revive(name)
        params = [ServerConnectionParam(s.name, "127.0.0.1", s.port, KINDS[s.kind]) for s in self.servers.values()]
        self.s, self.p, self.a = ([param for param in params if param.kind == kind] for kind in range(3))
        self.layout = ServerLayout(self.s, self.p, self.a)
        self.ctl = Controller("", self.layout, timeoutS=timeoutS, progress=self.progress.append)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.ctl.close()
        self.release_all()
        for name, server in self.servers.items():
            self.run(server.jobs.idle())
            self.kill(name)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self.env.pools.close()

    def run(self, step: Coroutine[Any, Any, T]) -> T:
        """Run on the fakes' loop."""
        return asyncio.run_coroutine_threadsafe(step, self._loop).result(30)

    def kill(self, name: str) -> None:
        """End a server; its volumes stay for `revive`."""
        self.run(self.servers[name].down())

    def revive(self, name: str) -> None:
        """Start a server where it was."""
        self.run(self.servers[name].up())

    def volume(self, name: str, vol: str = "vol0") -> FakeVolume:
        """A server's volume, for tests to look at and to change."""
        return self.servers[name].volumes[vol]

    def fail(self, name: str, request: type[Request[Any]], error: WalbError | None, times: int = 1) -> None:
        """Refuse the next requests of a type; `error` None drops the connection instead."""
        self._failures += [(name, request, error)] * times

    def hold(self, what: str) -> None:
        """Make jobs of a name wait until `release`."""
        self._gates[what] = asyncio.Event()

    def release(self, what: str) -> None:
        """Let held jobs go on."""
        self._loop.call_soon_threadsafe(self._gates[what].set)

    def release_all(self) -> None:
        """Let everything go on."""
        for what in list(self._gates):
            self.release(what)

    async def gate(self, what: str) -> None:
        """Where jobs wait."""
        if what in self._gates:
            await self._gates[what].wait()
        if what in self._job_failures:
            raise self._job_failures.pop(what)

    def fail_job(self, what: str, error: WalbError) -> None:
        """Make the next job of a name fail."""
        self._job_failures[what] = error

    async def before(self, name: str, request: Request[Any]) -> None:
        """Called with every request before it is served."""
        for failure in self._failures:
            if failure[0] == name and failure[1] is type(request):
                self._failures.remove(failure)
                if failure[2] is None:
                    raise asyncio.CancelledError  # the connection is dropped without an answer
                raise failure[2]

    def settle(self) -> None:
        """Move snapshots as far as states allow."""
        if self.frozen:
            return
        by_kind = {kind: [s for s in self.servers.values() if s.kind is kind] for kind in KINDS}
        for storage in by_kind[Kind.STORAGE]:
            for vol, volume in storage.volumes.items():
                proxy = next((p for p in by_kind[Kind.PROXY] if p.state(vol) == "Started"), None)
                if volume.state != "Target" or proxy is None:
                    continue
                for archive in proxy.volumes[vol].infos:
                    proxy.volumes[vol].waiting.setdefault(archive, []).extend(volume.snapshots)
                volume.snapshots.clear()
        for proxy in by_kind[Kind.PROXY]:
            for vol, volume in proxy.volumes.items():
                for archive, gids in volume.waiting.items():
                    if volume.state == "Started" and self.servers[archive].state(vol) == "Archived":
                        self.servers[archive].volumes[vol].points += gids
                        gids.clear()

    def changes(self) -> list[str]:
        """Return the requests that may change something, oldest first, as `SERVER TAG [VOLUME]`."""
        return [
            " ".join(filter(None, (name, request.TAG, getattr(request, "volume", ""))))
            for name, request in self.requests
            if not request.TAG.startswith(("get-", "wait-", "archive-info-list", "archive-info-get"))
        ]
