"""The storage daemon: volumes, the requests it serves, its start and its end. Source: docs/storage.md."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Final

import structlog

from walbd.daemon.basedir import lock_base, volume_names
from walbd.daemon.common import CommonRequests, begun_actions
from walbd.daemon.conn import Connection
from walbd.daemon.env import Env, Pool
from walbd.daemon.jobs import Jobs
from walbd.daemon.main import Shutdown, ShutdownMode, identity, tls_context
from walbd.daemon.net import Address
from walbd.daemon.reload import Read, follow_common, retry_policy
from walbd.daemon.scheduler import Again, Scheduler
from walbd.daemon.server import Handler, Server
from walbd.daemon.states import StopMode
from walbd.errors import (
    AlreadyExists,
    NotFound,
    UsageError,
    WalbError,
)
from walbd.fs import File
from walbd.ids import volume_name
from walbd.protocol.base import JobAccepted, Kind, Ok
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    Actions,
    BoolValue,
    ClearVol,
    FullBackup,
    GetActions,
    GetIsOverflow,
    GetLatestSnap,
    GetLogUsage,
    GetNumAction,
    GetStatus,
    GetTsDelta,
    GetUuid,
    GetVolumes,
    GidValue,
    HashBackup,
    IntValue,
    Kick,
    Kicked,
    Latest,
    LogUsages,
    Names,
    ResetVol,
    Resize,
    Role,
    SetFullScanBps,
    Start,
    StatusReply,
    Stop,
    StorageInitVol,
    TakeSnapshot,
    TsDeltas,
    UuidValue,
)
from walbd.protocol.maintenance import DumpLogHeader, Reloaded, Retarget
from walbd.storage import queries
from walbd.storage.backup import begin_full_backup, begin_hash_backup
from walbd.storage.config import StorageConfig
from walbd.storage.device.interface import Device, DeviceInfo
from walbd.storage.device.userspace import UserspaceDevice, device_me
from walbd.storage.lag import Lag
from walbd.storage.pace import Slots, SpeedLimit
from walbd.storage.proxies import Proxies
from walbd.storage.retarget import StorageSettings
from walbd.storage.shared import OpenDevice, Shared
from walbd.storage.states import Command
from walbd.storage.volume import Volume
from walbd.storage.worker import Worker

log = structlog.get_logger()

_SWEEP_S: Final = 10.0
_FORCE_WAIT_S: Final = 2.0


class StorageServer:
    """A storage daemon (`walbd.daemon.main.Daemon`)."""

    def __init__(
        self,
        config: StorageConfig,
        env: Env,
        shutdown: Shutdown,
        *,
        open_device: OpenDevice | None = None,
        read: Read[StorageConfig] | None = None,
    ) -> None:
        """`read()` reads the configuration again (`walbd.daemon.reload`)."""
        self.config = config  # as at the start
        self.settings = StorageSettings(config, env, read)
        self.volumes: dict[str, Volume] = {}
        self._env = env
        me = identity(config, Kind.STORAGE)
        self.scheduler: Scheduler[str] = Scheduler(
            self._work,
            workers=config.transfers_max,
            retry=retry_policy(config),
            name="volume",
        )
        self.jobs = Jobs(env.clock)
        self.shared = Shared(
            env=env,
            settings=self.settings,
            me=me,
            open_device=open_device or self._open_device,
            scheduler=self.scheduler,
            jobs=self.jobs,
            scan_limit=SpeedLimit(config.full_scan_bytes_per_s),
            scan_slots=Slots(config.backups_max),
        )
        self._device_me = device_me(config.name, config.io_timeout_s)
        self.proxies = Proxies(env, me, lambda: self.settings.current, self._proxy_returned)
        self.lag = Lag(self.shared, lambda: list(self.volumes.values()))
        common = CommonRequests(me, self.jobs, self.volumes, shutdown, lambda: self.server.stats, self.settings)
        self.server = Server(
            env, me, {**common.handlers(), **self._handlers()}, connections_max=config.connections_max
        )
        self._worker = Worker(self.proxies)
        self._background: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        follow_common(self.settings, me, self.server)
        self.settings.follow(self._follow)

    # life

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Recover the volumes, listen, and begin the background work as one task of `tasks`.

        Raises Busy when another daemon uses the directory, ConnectError when the port is taken.
        """
        base, fs = Path(self.config.base_dir), self._env.fs
        lock = await self._env.pools.run(Pool.RECORD, partial(lock_base, fs, base, create=True))
        try:
            await self.settings.load()
            for name in await self._env.pools.run(Pool.RECORD, volume_names, fs, base):
                volume = Volume(name, self.shared)
                if await volume.load():
                    self.volumes[name] = volume
            tls = tls_context(self.config, server=True)
            await self.server.listen(tasks, [Address(self.config.listen, self.config.port)], tls)
        except BaseException:
            lock.close()
            raise
        self._background = tasks.create_task(self._run(lock), name="storage")
        await self._ready.wait()
        log.info(
            "daemon.listening",
            address=str(self.server.addresses[0]),
            node=self.config.name,
            volumes=len(self.volumes),
        )

    async def _run(self, lock: File) -> None:
        """Run everything that goes on in the background, until cancelled."""
        with lock:
            try:
                async with asyncio.TaskGroup() as tasks:
                    self.shared.tasks = tasks
                    tasks.create_task(self.scheduler.run(), name="scheduler")
                    tasks.create_task(self.proxies.run(), name="proxies")
                    tasks.create_task(self.lag.run(), name="lag")
                    tasks.create_task(self._sweep(), name="sweep")
                    for volume in self.volumes.values():
                        volume.resume()
                    self._ready.set()
            finally:
                self.shared.tasks = None

    async def stop(self, mode: ShutdownMode) -> None:
        """End in an orderly way. Graceful: jobs and transfers that run end first; nothing new begins."""
        if mode is ShutdownMode.GRACEFUL:
            self.jobs.close()
            await self.server.stop(force=False)
            self.scheduler.drain()
            await self.jobs.idle()
            await self.scheduler.idle()
        if self._background is not None:
            self._background.cancel()
            await asyncio.wait({self._background})
        try:
            async with asyncio.timeout(_FORCE_WAIT_S):
                await self.server.stop(force=True)
        except TimeoutError:
            log.warning("daemon.conversations_dropped")

    async def reload(self) -> Reloaded:
        """Use the settings as they are in the configuration now."""
        return await self.settings.reload()

    def _follow(self, old: StorageConfig, new: StorageConfig) -> None:
        """Take over changed settings: most are asked for in `shared.config` when they are needed."""
        self.scheduler.adjust(workers=new.transfers_max, retry=retry_policy(new))
        self.shared.scan_slots.set_max(new.backups_max)
        if new.full_scan_bytes_per_s != old.full_scan_bytes_per_s:  # set-full-scan-bps stays otherwise
            self.shared.scan_limit.bytes_per_s = new.full_scan_bytes_per_s
        self._device_me.io_timeout_s = self._device_me.connect_timeout_s = new.io_timeout_s
        self.proxies.follow()
        self.lag.follow(compare_now=new.archive != old.archive)

    def _proxy_returned(self) -> None:
        self.scheduler.hurry_waiting()

    async def _sweep(self) -> None:
        """Look at every active volume now and then, should a device have failed to tell of new log."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            for volume in self.volumes.values():
                volume.wake()

    async def _work(self, name: str) -> Again | None:
        volume = self.volumes.get(name)
        return await self._worker.work(volume) if volume is not None else None

    def _open_device(self, path: str) -> Device:
        return UserspaceDevice(self._env, Path(path), me=self._device_me)

    # finding volumes

    def _find(self, name: str) -> Volume:
        """Return a volume; one that is not known is Clear, and every command but init-vol refuses that."""
        return self.volumes.get(name) or Volume(volume_name(name), self.shared)

    def _selected(self, name: str) -> list[Volume]:
        """Return one volume, or all when the name is empty. Raises NotFound."""
        if not name:
            return [self.volumes[key] for key in sorted(self.volumes)]
        if name not in self.volumes:
            raise NotFound("no such volume here", hint="`get-volumes` lists them", volume=name)
        return [self.volumes[name]]

    # commands

    def _handlers(self) -> dict[type[Request[Any]], Handler]:
        handlers: dict[type[Request[Any]], Handler] = {
            ClearVol: self._clear_vol,
            FullBackup: self._full_backup,
            HashBackup: self._hash_backup,
            GetActions: self._get_actions,
            GetIsOverflow: self._get_is_overflow,
            GetLatestSnap: self._get_latest_snap,
            GetLogUsage: self._get_log_usage,
            GetNumAction: self._get_num_action,
            GetStatus: self._get_status,
            GetTsDelta: self._get_ts_delta,
            GetUuid: self._get_uuid,
            GetVolumes: self._get_volumes,
            DumpLogHeader: self._dump_log_header,
            Kick: self._kick,
            ResetVol: self._reset_vol,
            Retarget: self._retarget,
            Resize: self._resize,
            SetFullScanBps: self._set_full_scan_bps,
            Start: self._start,
            Stop: self._stop,
            StorageInitVol: self._init_vol,
            TakeSnapshot: self._snapshot,
        }
        return handlers

    async def _init_vol(self, _conn: Connection, request: StorageInitVol) -> Ok:
        name = volume_name(request.volume)
        volume = self.volumes.get(name)
        if volume is None:
            # Known from here on, so that a second init-vol of the same name meets this one.
            volume = self.volumes[name] = Volume(name, self.shared)
        try:
            await volume.init(str(PurePosixPath(request.device)), self._check_unbound)
        finally:
            if not volume.known and volume.machine.during is None:
                self.volumes.pop(name, None)
        return Ok()

    async def _check_unbound(self, volume: Volume, path: str, info: DeviceInfo) -> None:
        """Raise AlreadyExists when a device belongs to another volume, under this or another path."""
        others = [other for other in self.volumes.values() if other is not volume and other.device_path]
        for other in others:
            same = other.device_path == path
            if not same:
                try:
                    same = (await self.shared.open_device(other.device_path).info()).uuid == info.uuid
                except WalbError:
                    same = other.has_record and other.record.uuid == info.uuid
            if same:
                raise AlreadyExists(
                    "the device belongs to another volume",
                    hint="clear that volume first",
                    device=path,
                    volume=other.name,
                    bound_as=other.device_path,
                )

    async def _clear_vol(self, _conn: Connection, request: ClearVol) -> Ok:
        volume = self._find(request.volume)
        await volume.clear()
        self.volumes.pop(volume.name, None)
        return Ok()

    async def _reset_vol(self, _conn: Connection, request: ResetVol) -> Ok:
        await self._find(request.volume).reset(request.gid)
        return Ok()

    async def _start(self, _conn: Connection, request: Start) -> Ok:
        volume = self._find(request.volume)
        if request.role is None:
            raise UsageError("a storage needs to know the role", hint="start as target or standby")
        if request.role is Role.TARGET:
            await volume.start_target()
        else:
            await volume.start_standby()
        return Ok()

    async def _stop(self, _conn: Connection, request: Stop) -> JobAccepted:
        job = self._find(request.volume).stop(StopMode(request.how))
        return JobAccepted(job=job.number)

    async def _full_backup(self, _conn: Connection, request: FullBackup) -> JobAccepted:
        job = await begin_full_backup(self._find(request.volume), request.bulk_b)
        return JobAccepted(job=job.number)

    async def _hash_backup(self, _conn: Connection, request: HashBackup) -> JobAccepted:
        job = await begin_hash_backup(self._find(request.volume), request.bulk_b, request.gid_past)
        return JobAccepted(job=job.number)

    async def _snapshot(self, _conn: Connection, request: TakeSnapshot) -> GidValue:
        return GidValue(gid=await self._find(request.volume).snapshot())

    async def _resize(self, _conn: Connection, request: Resize) -> Ok:
        if request.zero:
            raise UsageError("zeroing what is new is for archives", hint="leave it out")
        await self._find(request.volume).resize(request.size_b)
        return Ok()

    async def _kick(self, _conn: Connection, request: Kick) -> Kicked:
        """Hurry everything, or one volume's task."""
        if request.archive:
            raise UsageError("a storage kicks volumes, not archives", hint="leave the archive out")
        selected = {volume.name for volume in self._selected(request.volume)}
        await self.proxies.check_now()
        return Kicked(tasks=self.scheduler.hurry_waiting(lambda name: name in selected))

    async def _retarget(self, _conn: Connection, request: Retarget) -> Reloaded:
        return Reloaded(applied=await self.settings.retarget(request.archive, request.proxies), needs_restart=[])

    async def _dump_log_header(self, _conn: Connection, request: DumpLogHeader) -> Ok:
        await self._find(request.volume).dump_log_header(request.lsid)
        return Ok()

    async def _set_full_scan_bps(self, _conn: Connection, request: SetFullScanBps) -> Ok:
        self.shared.scan_limit.bytes_per_s = request.bytes_per_s
        log.info("scan_limit.set", bytes_per_s=request.bytes_per_s)
        return Ok()

    # queries

    async def _get_volumes(self, _conn: Connection, _request: GetVolumes) -> Names:
        return Names(names=sorted(name for name, volume in self.volumes.items() if volume.known))

    async def _get_is_overflow(self, _conn: Connection, request: GetIsOverflow) -> BoolValue:
        return BoolValue(value=await queries.is_overflow(self._find(request.volume)))

    async def _get_uuid(self, _conn: Connection, request: GetUuid) -> UuidValue:
        volume = self._find(request.volume)
        volume.check(Command.GET_UUID)
        return UuidValue(value=volume.record.uuid)

    async def _get_log_usage(self, _conn: Connection, request: GetLogUsage) -> LogUsages:
        if request.volume:
            return LogUsages(rows=[await queries.log_usage(self._find(request.volume))])
        return LogUsages(rows=await queries.of_all(self._selected(""), queries.log_usage))

    async def _get_latest_snap(self, _conn: Connection, request: GetLatestSnap) -> Latest:
        if request.volume:
            return Latest(rows=[await queries.latest_snapshot(self._find(request.volume))])
        return Latest(rows=await queries.of_all(self._selected(""), queries.latest_snapshot))

    async def _get_ts_delta(self, _conn: Connection, _request: GetTsDelta) -> TsDeltas:
        return TsDeltas(rows=list(self.lag.rows))

    async def _get_num_action(self, _conn: Connection, request: GetNumAction) -> IntValue:
        return IntValue(value=queries.num_action(self._find(request.volume), request.action))

    async def _get_actions(self, _conn: Connection, _request: GetActions) -> Actions:
        return begun_actions(self.volumes)

    async def _get_status(self, _conn: Connection, request: GetStatus) -> StatusReply:
        everything = self._selected("")
        selected = self._selected(request.volume)
        return await queries.status(self.shared, self.proxies, selected, everything)
