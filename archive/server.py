"""The archive daemon: the volumes of one base directory, and the requests about them (docs/archive.md)."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from walbd.archive import lifecycle
from walbd.archive.apply import plan_apply, run_apply
from walbd.archive.config import ArchiveConfig
from walbd.archive.full_backup import receive_full_backup
from walbd.archive.gc_diff import gc_diffs
from walbd.archive.hash_backup import receive_hash_backup
from walbd.archive.images.file_store import FileStore
from walbd.archive.images.store import ImageStore
from walbd.archive.maintain import Maintenance
from walbd.archive.policy import PolicyRunner
from walbd.archive.policy_requests import PolicyRequests
from walbd.archive.queries import Queries, known
from walbd.archive.receive import receive_wdiff
from walbd.archive.recover import is_leftover, load_volume
from walbd.archive.replica_queries import ReplicaQueries
from walbd.archive.replicate_in import Destination
from walbd.archive.replicate_out import Replicator
from walbd.archive.restore import check_restore, run_restore
from walbd.archive.slots import Slots
from walbd.archive.states import APPLY, RESTORE, Command
from walbd.archive.status import volume_status
from walbd.archive.volume import Place, Volume
from walbd.archive.work import Starter, accepted
from walbd.daemon.basedir import lock_base, volume_names
from walbd.daemon.common import CommonRequests, free_space, status_reply
from walbd.daemon.conn import Connection
from walbd.daemon.env import Env, Pool
from walbd.daemon.jobs import Jobs
from walbd.daemon.logs import error_fields
from walbd.daemon.main import Shutdown, ShutdownMode, identity, tls_context
from walbd.daemon.net import Address
from walbd.daemon.reload import Read, Settings, follow_common
from walbd.daemon.server import Handler, Server
from walbd.daemon.states import StopMode
from walbd.daemon.tasks import uninterrupted
from walbd.errors import NotFound, UsageError, WalbError
from walbd.fs import File
from walbd.protocol import control as c
from walbd.protocol.base import Fact, JobAccepted, Kind, Ok
from walbd.protocol.codec import Request
from walbd.protocol.maintenance import Reloaded
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupDone, FullBackupOffer, WdiffOffer, WdiffVerdict

log = structlog.get_logger()


class ArchiveServer:
    """One archive daemon, from `start` to `stop` (walbd.daemon.main.Daemon)."""

    def __init__(
        self,
        config: ArchiveConfig,
        env: Env,
        shutdown: Shutdown,
        *,
        images: ImageStore | None = None,
        read: Read[ArchiveConfig] | None = None,
    ) -> None:
        """`read()` reads the configuration again (`walbd.daemon.reload`)."""
        self.volumes: dict[str, Volume] = {}
        self.jobs = Jobs(env.clock)
        self._config = config
        self._env = env
        self._base_dir = Path(config.base_dir)
        self._forced = False
        if images is None:
            images = FileStore(env.fs, self._base_dir, free_reserve_b=config.free_reserve_b)
        self.place = Place(env, config, images, lambda: self._forced)
        self._wdiffs = Slots(config.wdiffs_max)
        self._backups = Slots(config.backups_max)
        self._maintenance = Slots(config.maintain_max)
        self._restores = Slots(config.restores_max)
        self._scans = Slots(config.scans_max)
        self._replications = Slots(config.replications_max)
        self._starter = Starter(self.jobs, self._maintenance, env.clock)
        self._restorer = Starter(self.jobs, self._restores, env.clock)
        self._scanner = Starter(self.jobs, self._scans, env.clock)
        self._me = identity(config, Kind.ARCHIVE)
        self.settings = Settings(config, read)
        replicator = Replicator(self.volumes, self.place, self._me, self._starter, self._replications)
        self._replicator = replicator
        self.policy = PolicyRunner(
            self.volumes,
            self.place,
            self.jobs,
            replicator.begin,
            lambda: bool(self._maintenance.waiting or self._restores.waiting),
        )
        policies = PolicyRequests(self.volumes, self.policy, env.clock, env.pools)
        common = CommonRequests(
            self._me, self.jobs, self.volumes, shutdown, lambda: self._server.stats, self.settings
        )
        self._server = Server(
            env,
            self._me,
            {**common.handlers(), **policies.around({**self._handlers(), **policies.handlers()})},
            connections_max=config.connections_max,
        )
        self._lock: File | None = None
        follow_common(self.settings, self._me, self._server)
        self.settings.follow(self._follow)

    async def reload(self) -> Reloaded:
        """Use the settings as they are in the configuration now."""
        return await self.settings.reload()

    def _follow(self, _old: ArchiveConfig, new: ArchiveConfig) -> None:
        """Take over changed settings: most are asked for in `place.config` when they are needed."""
        self.place.config = new
        limits = (
            (self._wdiffs, new.wdiffs_max),
            (self._backups, new.backups_max),
            (self._restores, new.restores_max),
            (self._maintenance, new.maintain_max),
            (self._scans, new.scans_max),
            (self._replications, new.replications_max),
        )
        for slots, n_max in limits:
            slots.n_max = n_max
            slots.changed.set()
        self.policy.follow()
        if isinstance(self.place.images, FileStore):
            self.place.images.free_reserve_b = new.free_reserve_b

    @property
    def addresses(self) -> list[Address]:
        """Where it listens."""
        return self._server.addresses

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Load all volumes, repair what a crash left, and listen. Raises NotFound, Busy or ConnectError."""
        for starter in (self._starter, self._restorer, self._scanner):
            starter.tasks = tasks
        pools, fs, base = self._env.pools, self._env.fs, self._base_dir
        self._lock = await pools.run(Pool.RECORD, partial(lock_base, fs, base, create=False))
        with ExitStack() as undo:
            undo.enter_context(self._lock)
            await pools.run(Pool.RECORD, lifecycle.remove_garbage, fs, base)
            names = await pools.run(Pool.RECORD, volume_names, fs, base)
            await asyncio.gather(*(self._load(name) for name in names))
            await self._server.listen(
                tasks, [Address(self._config.listen, self._config.port)], tls_context(self._config, server=True)
            )
            undo.pop_all()
        self.policy.start(tasks)
        for address in self.addresses:
            log.info("daemon.listening", address=str(address), volumes=len(self.volumes))

    async def stop(self, mode: ShutdownMode) -> None:
        """Take no new work; return when the running work has ended, or has given up."""
        if mode is ShutdownMode.FORCE:
            self._forced = True
            for volume in self.volumes.values():
                volume.machine.changed.set()
        self.policy.drain()
        self.jobs.close()
        await self._server.stop(force=self._forced)
        await self.jobs.idle()
        if self._lock is not None:
            self._lock.close()

    async def _load(self, name: str) -> None:
        """Load one volume; a broken one is isolated."""
        pools, fs = self._env.pools, self._env.fs
        volume = Volume(name, self.place)
        try:
            if await pools.run(Pool.RECORD, is_leftover, fs, volume.directory):
                await pools.run(Pool.RECORD, fs.remove_tree, volume.directory)
                log.info("volume.leftover_removed", volume=name)
                return
            volume.adopt(await pools.run(Pool.RECORD, load_volume, fs, self.place.images, volume.directory))
        except WalbError as exc:
            volume.set_broken(exc)
            log.error("volume.broken", volume=name, **error_fields(exc))
        self.volumes[name] = volume
        for remark in volume.remarks:
            log.warning("volume.remark", volume=name, remark=remark)

    # --- requests

    def _handlers(self) -> dict[type[Request[Any]], Handler]:
        return {
            **Queries(self.volumes, self.place).handlers(),
            **Destination(self.volumes, self.place, copies=self._backups, wdiffs=self._wdiffs).handlers(),
            **self._replicator.handlers(),
            **ReplicaQueries(self.volumes).handlers(),
            **Maintenance(self.volumes, self._starter, self._scanner).handlers(),
            c.GetStatus: self._status,
            c.ArchiveInitVol: self._init_vol,
            c.ClearVol: self._clear_vol,
            c.ResetVol: self._reset_vol,
            c.Start: self._start,
            c.Stop: self._stop,
            c.Restore: self._restore,
            c.DelRestored: self._del_restored,
            c.Apply: self._apply,
            c.GcDiff: self._gc_diff,
            FullBackupOffer: self._full_backup,
            HashBackupOffer: self._hash_backup,
            WdiffOffer: self._wdiff,
        }

    async def _init_vol(self, _conn: Connection, request: c.ArchiveInitVol) -> Ok:
        await uninterrupted(lifecycle.init_vol(self.volumes, request.volume, self.place))
        return Ok()

    async def _clear_vol(self, _conn: Connection, request: c.ClearVol) -> Ok:
        volume = known(self.volumes, request.volume, Command.CLEAR_VOL)
        await uninterrupted(lifecycle.clear_vol(self.volumes, volume))
        return Ok()

    async def _reset_vol(self, _conn: Connection, request: c.ResetVol) -> Ok:
        if request.gid:
            raise UsageError("reset-vol takes no generation at an archive", hint="leave it out", gid=request.gid)
        await uninterrupted(lifecycle.reset_vol(known(self.volumes, request.volume, Command.RESET_VOL)))
        return Ok()

    async def _start(self, _conn: Connection, request: c.Start) -> Ok:
        if request.role is not None:
            raise UsageError("start takes no role at an archive", hint="leave it out", role=str(request.role))
        await uninterrupted(lifecycle.start(known(self.volumes, request.volume, Command.START)))
        return Ok()

    async def _stop(self, _conn: Connection, request: c.Stop) -> JobAccepted:
        if request.how is c.StopHow.EMPTY:
            raise UsageError("only proxies stop empty", hint="use graceful or force", how=str(request.how))
        volume = known(self.volumes, request.volume, Command.STOP)
        stack = ExitStack()
        stack.enter_context(volume.machine.stop_flag(StopMode(str(request.how))))
        return accepted(self._starter.holding("stop", volume, stack, lambda job: lifecycle.stop(volume, job)))

    async def _restore(self, _conn: Connection, request: c.Restore) -> JobAccepted:
        volume = known(self.volumes, request.volume, Command.RESTORE)
        check_restore(volume, request.gid)
        job = self._restorer.under_action(
            "restore", volume, RESTORE, lambda job: run_restore(volume, request.gid, job)
        )
        return accepted(job)

    async def _del_restored(self, _conn: Connection, request: c.DelRestored) -> Ok:
        volume = known(self.volumes, request.volume, Command.DEL_RESTORED)
        if request.gid not in volume.restored:
            raise NotFound("this generation is not restored", gid=request.gid)
        await self._env.pools.run(Pool.RECORD, self.place.images.remove_restored, request.volume, request.gid)
        volume.restored.discard(request.gid)
        return Ok()

    async def _apply(self, _conn: Connection, request: c.Apply) -> JobAccepted:
        volume = known(self.volumes, request.volume, Command.APPLY)
        plan_apply(volume, request.gid)
        job = self._starter.under_action("apply", volume, APPLY, lambda job: run_apply(volume, request.gid, job))
        return accepted(job)

    async def _gc_diff(self, _conn: Connection, request: c.GcDiff) -> c.Kicked:
        volume = known(self.volumes, request.volume, Command.GC_DIFF)
        return c.Kicked(tasks=await gc_diffs(volume))

    async def _full_backup(self, conn: Connection, request: FullBackupOffer) -> BackupDone:
        volume = known(self.volumes, request.volume, Command.FULL_BACKUP)
        return await receive_full_backup(volume, self._backups, conn, request)

    async def _hash_backup(self, conn: Connection, request: HashBackupOffer) -> BackupDone:
        volume = known(self.volumes, request.volume, Command.HASH_BACKUP)
        return await receive_hash_backup(volume, self._backups, conn, request)

    async def _wdiff(self, conn: Connection, request: WdiffOffer) -> WdiffVerdict | Ok:
        return await receive_wdiff(self.volumes, self.place, self._wdiffs, conn, request)

    async def _status(self, _conn: Connection, request: c.GetStatus) -> c.StatusReply:
        facts = await self._server_facts()
        names = [request.volume] if request.volume else sorted(self.volumes)
        volumes = [volume_status(name, self.volumes.get(name)) for name in names]
        return status_reply(self._me, self._env.clock, facts, volumes)

    async def _server_facts(self) -> dict[str, Fact]:
        return {
            "base_dir": self._config.base_dir,
            **await free_space(self._env, self._base_dir),
            "free_reserve_b": self.place.config.free_reserve_b,
            "auto_resize": self.place.config.auto_resize,
            "wdiffs_receiving": self._wdiffs.running,
            "wdiffs_waiting": self._wdiffs.waiting,
            "backups_receiving": self._backups.running,
            "restores_running": self._restores.running,
            "restores_waiting": self._restores.waiting,
            "scans_running": self._scans.running,
            "scans_waiting": self._scans.waiting,
            "replications_running": self._replications.running,
            "replications_waiting": self._replications.waiting,
            "policy": self.place.config.policy,
            "policy_running": self.policy.acting,
            "policy_failing": self.policy.failing,
            "maintenance_running": self._maintenance.running,
            "maintenance_waiting": self._maintenance.waiting,
        }
