"""`walbd device serve`: the engine of one device behind an NBD server and a control socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final

import structlog

from walbd.daemon.conn import Connection, Me, with_filler
from walbd.daemon.env import Env, Pool
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.daemon.nbd_server import NbdServer
from walbd.daemon.server import Handler, Server
from walbd.daemon.tls import mutual_tls
from walbd.protocol.base import Filler, Kind, Ok
from walbd.protocol.codec import Message, Request
from walbd.protocol.device import (
    DeviceInfo,
    Freeze,
    GetDeviceInfo,
    GetLsids,
    LsidSample,
    Melt,
    ResetLog,
    Resize,
    SetOldest,
    StopDevice,
    TakeCheckpoint,
    WatchLsids,
)
from walbd.storage.device.config import DeviceConfig, control_address, nbd_address
from walbd.storage.device.engine import Engine, FreezeState
from walbd.storage.device.start import open_device
from walbd.storage.device.userspace import CONTROL_GROUP

log = structlog.get_logger()

_WATCH_PAUSE_S: Final = 0.05  # between two samples of a watcher
_STOP_CLIENTS_S: Final = 5.0  # for NBD clients to take their last replies


class DeviceServer:
    """One device as a daemon."""

    def __init__(
        self,
        config: DeviceConfig,
        directory: Path,
        env: Env,
        shutdown: Shutdown,
        *,
        expect_lsid: int | None = None,
    ) -> None:
        self.name = directory.name
        self.engine: Engine | None = None
        self.nbd: NbdServer | None = None
        self._config = config
        self._directory = directory
        self._env = env
        self._shutdown = shutdown
        self._expect_lsid = expect_lsid
        self._control: Server | None = None
        self._stopping: asyncio.Future[None] | None = None

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Redo the log, then listen."""
        structlog.contextvars.bind_contextvars(device=self.name)
        config, env = self._config, self._env
        for check in (control_address, nbd_address):
            check(self._directory)  # before anything is changed
        opened = await env.pools.run(
            Pool.MAINTAIN,
            open_device,
            env.fs,
            self._directory / config.ldev,
            self._directory / config.ddev,
            expect_lsid=self._expect_lsid,
        )
        self.engine = Engine(env, opened, tasks, name=self.name, tuning=config.tuning())
        try:
            await self._listen(tasks, self.engine)
        except BaseException:
            if self.nbd is not None:
                self.nbd.abort()
            if self._control is not None:
                await self._control.stop(force=True)
            await self.engine.stop()
            raise

    async def _listen(self, tasks: asyncio.TaskGroup, engine: Engine) -> None:
        config = self._config
        self.nbd = NbdServer(
            engine,
            inflight_max_b=config.inflight_max,
            connections_max=config.nbd_connections_max,
            tls=_tls_context(config),
        )
        self._control = Server(
            self._env, Me(node=self.name, kind=Kind.DEVICE, group=CONTROL_GROUP), self._handlers()
        )
        await self.nbd.listen(tasks, [nbd_address(self._directory), *config.addresses()])
        await self._control.listen(tasks, [control_address(self._directory)])
        log.info("device.serving", nbd=[str(address) for address in self.nbd.addresses])

    async def stop(self, mode: ShutdownMode) -> None:
        """End in an orderly way: clients get their answers, nothing is left to redo. Both modes are the same."""
        if self._stopping is None:
            self._stopping = asyncio.ensure_future(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        assert self.engine is not None
        assert self.nbd is not None
        assert self._control is not None
        self.engine.refuse_writes()
        try:
            async with asyncio.timeout(_STOP_CLIENTS_S):
                await self.nbd.stop()
        except TimeoutError:
            self.nbd.abort()
        await self.engine.stop()
        await self._control.stop(force=True)
        for address in (control_address(self._directory), nbd_address(self._directory)):
            self._env.fs.unlink(Path(address.path))

    # the control conversation

    def _handlers(self) -> dict[type[Request[Any]], Handler]:
        async def get_info(_: Connection, __: GetDeviceInfo) -> Message:
            return self.info()

        async def get_lsids(_: Connection, __: GetLsids) -> Message:
            return self.sample()

        async def melt(_: Connection, __: Melt) -> Message:
            self._running().melt()
            return Ok()

        async def stop(_: Connection, __: StopDevice) -> Message:
            self._shutdown.request(ShutdownMode.GRACEFUL)
            return Ok()

        return {
            GetDeviceInfo: get_info,
            GetLsids: get_lsids,
            WatchLsids: self._watch,
            SetOldest: self._long(lambda engine, request: engine.set_oldest(request.lsid)),
            TakeCheckpoint: self._long(lambda engine, _: engine.take_checkpoint()),
            ResetLog: self._long(lambda engine, _: engine.reset_wal(), self.info),
            Freeze: self._long(lambda engine, request: engine.freeze(request.timeout_s)),
            Melt: melt,
            Resize: self._long(lambda engine, request: engine.resize(request.size_lb), self.info),
            StopDevice: stop,
        }

    def _running(self) -> Engine:
        assert self.engine is not None
        return self.engine

    def _long(self, work: Callable[[Engine, Any], Awaitable[None]], reply: Callable[[], Message] = Ok) -> Handler:
        """Make a handler for something that may take longer than a deadline."""

        async def handle(conn: Connection, request: Any) -> Message:
            async def run() -> None:
                await work(self._running(), request)

            await with_filler(conn, run())
            return reply()

        return handle

    async def _watch(self, conn: Connection, _: WatchLsids) -> None:
        core = self._running().core
        told: LsidSample | None = None
        while True:
            sample = self.sample()
            if told is None or _news(sample) != _news(told):
                await conn.send(sample)
                told = sample
                await asyncio.sleep(_WATCH_PAUSE_S)
                continue
            try:
                async with asyncio.timeout(conn.io_timeout_s / 4):
                    await core.log_advanced.next()
            except TimeoutError:
                await conn.send(Filler())

    def sample(self) -> LsidSample:
        """Return the lsids and flags of this moment."""
        engine = self._running()
        core, lsids = engine.core, engine.core.lsids
        return LsidSample(
            uuid=core.superblock.uuid,
            latest=lsids.latest,
            completed=lsids.completed,
            flush=lsids.flush,
            permanent=lsids.permanent,
            written=lsids.written,
            prev_written=lsids.prev_written,
            oldest=lsids.oldest,
            overflow=core.overflow,
            read_only=core.has_failed(),
            frozen=engine.freeze_state is not FreezeState.MELTED,
        )

    def info(self) -> DeviceInfo:
        """Return what the device is."""
        core = self._running().core
        return DeviceInfo(
            name=self.name,
            uuid=core.superblock.uuid,
            pbs=core.superblock.pbs,
            salt=core.superblock.salt,
            size_lb=core.superblock.device_size_lb,
            capacity_pb=core.ring_pb,
            ldev=str(core.ldev.path),
            ddev=str(core.ddev.path),
            nbd=[str(address) for address in self.nbd.addresses] if self.nbd else [],
            read_only=str(core.failed or ""),
            lsids=self.sample(),
        )


def _news(sample: LsidSample) -> tuple[object, ...]:
    """Return what a watcher wants to hear of."""
    return sample.uuid, sample.permanent, sample.overflow, sample.read_only, sample.frozen


def _tls_context(config: DeviceConfig) -> ssl.SSLContext | None:
    """Make the context for TCP clients of the NBD server, or None when TLS is not configured."""
    if not config.nbd_tls_cert:
        return None
    return mutual_tls(config.nbd_tls_cert, config.nbd_tls_key, config.nbd_tls_ca, server=True)
