"""The proxy daemon: its volumes, and the life of the process."""

from __future__ import annotations

import asyncio
import resource
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from walbd.daemon.basedir import lock_base, volume_names
from walbd.daemon.common import CommonRequests
from walbd.daemon.env import Env, Pool
from walbd.daemon.jobs import Jobs
from walbd.daemon.logs import error_fields
from walbd.daemon.main import Shutdown, ShutdownMode, identity, tls_context
from walbd.daemon.net import Address
from walbd.daemon.reload import Read, Settings, follow_common, retry_policy
from walbd.daemon.scheduler import Lanes, Scheduler
from walbd.daemon.server import Server
from walbd.errors import WalbError
from walbd.fs import File
from walbd.ids import volume_name
from walbd.protocol.base import Kind
from walbd.protocol.maintenance import Reloaded
from walbd.protocol.transfer import WlogOffer
from walbd.proxy.commands import Commands
from walbd.proxy.config import ProxyConfig
from walbd.proxy.probe import Prober
from walbd.proxy.queries import Queries
from walbd.proxy.queue import SendQueue
from walbd.proxy.receive import Receiver
from walbd.proxy.send import Sender, SendKey
from walbd.proxy.states import State
from walbd.proxy.volume import Volume

log = structlog.get_logger()

_OTHER_FILES: Final = 512  # descriptors for everything but the wdiffs of transfers


class ProxyServer:
    """A proxy: takes wlogs from storages, keeps them as wdiffs, sends these to archives."""

    def __init__(
        self,
        config: ProxyConfig,
        env: Env,
        shutdown: Shutdown,
        *,
        read: Read[ProxyConfig] | None = None,
    ) -> None:
        """`read()` reads the configuration again (`walbd.daemon.reload`)."""
        self.config = config  # as at the start
        self.settings = Settings(config, read)
        self.env = env
        self.volumes: dict[str, Volume] = {}
        me = identity(config, Kind.PROXY)
        self.jobs = Jobs(env.clock)
        self.prober = Prober(env, me, self._current, self._is_wanted, self._archive_is_back)
        self.sender = Sender(env, me, self._current, self.volumes, self.prober, n_max=files_per_send(config))
        self.scheduler: Scheduler[SendKey] = Scheduler(
            self.sender.run,
            workers=config.sends_max,
            retry=retry_policy(config),
            name="wdiff-send",
            lanes=Lanes(of=lambda key: key.archive, all=self._archives),
        )
        self.sends = SendQueue(self.scheduler, self.prober)
        self.receiver = Receiver(env, self._current, self.find, self.sends.push)
        self.commands = Commands(self.volumes, self.find, self.sends, self.jobs)
        common = CommonRequests(me, self.jobs, self.volumes, shutdown, lambda: self.server.stats, self.settings)
        queries = Queries(env, me, self._current, self.volumes, self.find, self.scheduler, self.receiver)
        self.server = Server(
            env,
            me,
            {
                **common.handlers(),
                **queries.handlers(),
                **self.commands.handlers(),
                WlogOffer: self.receiver.serve,
            },
            connections_max=config.connections_max,
        )
        self._lock_file: File | None = None
        follow_common(self.settings, me, self.server)
        self.settings.follow(self._follow)

    def _current(self) -> ProxyConfig:
        return self.settings.current

    async def reload(self) -> Reloaded:
        """Use the settings as they are in the configuration now."""
        return await self.settings.reload()

    def _follow(self, _old: ProxyConfig, new: ProxyConfig) -> None:
        """Take over changed settings: most are asked for when they are needed."""
        self.scheduler.adjust(workers=new.sends_max, retry=retry_policy(new))
        self.sender.n_max = files_per_send(new)

    def find(self, name: str) -> Volume:
        """Return a volume; for an unknown name a Clear one that is not kept. Raises UsageError for a bad name."""
        volume = self.volumes.get(name)
        return volume if volume is not None else Volume(self.env, volume_name(name), self._base / name)

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Read all volumes, start them, listen."""
        self.commands.tasks = tasks
        run = self.env.pools.run
        self._lock_file = await run(Pool.RECORD, partial(lock_base, self.env.fs, self._base, create=True))
        names = await run(Pool.RECORD, volume_names, self.env.fs, self._base)
        async with asyncio.TaskGroup() as loading:
            for name in names:
                loading.create_task(self._load(name), name=f"load:{name}")
        tasks.create_task(self.scheduler.run(), name="send scheduler")
        tasks.create_task(self.prober.run(), name="prober")
        tls = tls_context(self.config, server=True)
        await self.server.listen(tasks, [Address(self.config.listen, self.config.port)], tls)
        for address in self.server.addresses:
            log.info("daemon.listening", address=str(address), volumes=len(self.volumes))

    async def stop(self, mode: ShutdownMode) -> None:
        """Take no new work and return when the running work has ended, or has given up."""
        force = mode is ShutdownMode.FORCE
        self.scheduler.drain()
        if force:
            for volume in self.volumes.values():
                volume.give_up()
        self.commands.close()
        self.jobs.close()
        await self.server.stop(force=force)
        await self.scheduler.idle()
        await self.jobs.idle()
        self.release()

    def release(self) -> None:
        """Let another process have the directory."""
        if self._lock_file is not None:
            self._lock_file.close()

    @property
    def _base(self) -> Path:
        return Path(self.config.base_dir)

    async def _load(self, name: str) -> None:
        volume = Volume(self.env, name, self._base / name)
        await volume.load()
        if volume.machine.state is State.CLEAR:
            return
        self.volumes[name] = volume
        if volume.machine.state is not State.STOPPED or self.config.start_stopped:
            return
        try:
            await volume.start(at_start_up=True)
        except WalbError as exc:
            log.error("volume.start_failed", volume=name, **error_fields(exc))
        else:
            self.sends.hurry(volume)

    def _archives(self) -> set[str]:
        """Return the archives to which anything may be sent."""
        return {name for volume in self.volumes.values() for name in volume.hops}

    def _is_wanted(self, address: str) -> bool:
        """Say whether something waits for the archive at an address."""
        return any(
            hop.entry.address == address and (hop.diffs or volume.received)
            for volume in self.volumes.values()
            if volume.may_send
            for hop in volume.hops.values()
        )

    def _archive_is_back(self, address: str) -> None:
        def waits_for_it(key: SendKey) -> bool:
            volume = self.volumes.get(key.volume)
            hop = volume.hops.get(key.archive) if volume is not None else None
            return hop is not None and hop.entry.address == address

        self.scheduler.hurry_waiting(waits_for_it)


def files_per_send(config: ProxyConfig) -> int:
    """Return how many wdiffs one transfer may open, so that all transfers together keep to the system's limit."""
    sends, wanted = config.sends_max, config.wdiff_send_count_max
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    need = _OTHER_FILES + sends * wanted
    if limit == resource.RLIM_INFINITY or limit >= need:
        return wanted
    per_send = min(max((limit - _OTHER_FILES) // sends, 16), wanted)
    log.warning("daemon.few_files", limit=limit, wanted=need, wdiffs_per_transfer=per_send)
    return per_send
