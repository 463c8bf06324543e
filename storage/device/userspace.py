"""`UserspaceDevice`: a device served by `walbd device serve`, seen from another process on the same host."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, TypeVar

from walbd.daemon.conn import Connection, Me, call, dial
from walbd.daemon.env import Env, Pool
from walbd.daemon.nbd_client import NbdReader, open_reader
from walbd.errors import Busy, ConnectError
from walbd.format.ring import Ring
from walbd.format.superblock import read_superblock
from walbd.fs import File
from walbd.protocol.base import Kind
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
    TakeCheckpoint,
    WatchLsids,
)
from walbd.storage.device.config import control_address, nbd_address

R = TypeVar("R", bound=Message)

# Control sockets are local: who may open them is a matter of file permissions, not of backup groups.
CONTROL_GROUP: Final = "device"


def device_me(node: str = "storage", io_timeout_s: float = 30.0) -> Me:
    """Return who a storage is towards its devices; one for all of them."""
    return Me(
        node=node,
        kind=Kind.STORAGE,
        group=CONTROL_GROUP,
        io_timeout_s=io_timeout_s,
        connect_timeout_s=io_timeout_s,
    )


class UserspaceDevice:
    """A `Device` by its directory. Each call connects anew, so a restarted device is found again."""

    def __init__(self, env: Env, directory: Path, *, node: str = "storage", me: Me | None = None) -> None:
        """`me`: see `device_me`; without it one is made for `node`."""
        self.directory = directory
        self._env = env
        self._me = me if me is not None else device_me(node)

    async def _call(self, request: Request[R]) -> R:
        try:
            return await call(self._env, self._me, control_address(self.directory), request)
        except ConnectError as exc:
            exc.hint = (
                f"start the device (systemctl start walbd-device@{self.directory.name}), or correct the path"
            )
            raise

    async def info(self) -> DeviceInfo:
        return await self._call(GetDeviceInfo())

    async def lsids(self) -> LsidSample:
        return await self._call(GetLsids())

    async def set_oldest(self, lsid: int) -> None:
        await self._call(SetOldest(lsid=lsid))

    async def take_checkpoint(self) -> None:
        await self._call(TakeCheckpoint())

    async def reset_wal(self) -> DeviceInfo:
        return await self._call(ResetLog())

    async def freeze(self, timeout_s: float) -> None:
        await self._call(Freeze(timeout_s=timeout_s))

    async def melt(self) -> None:
        await self._call(Melt())

    async def resize(self, size_lb: int) -> DeviceInfo:
        return await self._call(Resize(size_lb=size_lb))

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[LsidSample]]:
        async with dial(self._env, self._me, control_address(self.directory)) as conn:
            await conn.send(WatchLsids())
            samples = _samples(conn)
            try:
                yield samples
            finally:
                await samples.aclose()
                conn.abort()  # the device goes on sending: there is no orderly end to wait for

    async def open_log(self, *, direct: bool = False) -> UserspaceLog:
        """Open the log device for reading.

        Through the page cache by default: the device process writes through the same cache, and what is to be
        sent was written a moment ago. `direct` reads from the disk. Raises Busy while the log is being reset.
        """
        info = await self.info()
        return await self._env.pools.run(Pool.SEND, self._open_log, info, direct)

    def _open_log(self, info: DeviceInfo, direct: bool) -> UserspaceLog:
        file = self._env.fs.open(Path(info.ldev), direct=direct)
        try:
            superblock = read_superblock(file)
            if superblock.uuid != info.uuid:
                raise Busy("the log is being reset", path=info.ldev)
        except BaseException:
            file.close()
            raise
        return UserspaceLog(self._env, file, Ring(file, superblock))

    async def open_data(self) -> NbdReader:
        return await open_reader(nbd_address(self.directory), timeout_s=self._me.io_timeout_s)


async def _samples(conn: Connection) -> AsyncGenerator[LsidSample, None]:
    while True:
        yield await conn.expect(LsidSample)


class UserspaceLog:
    """The log device of a `UserspaceDevice`, open for reading."""

    def __init__(self, env: Env, file: File, ring: Ring) -> None:
        self.ring = ring
        self._env = env
        self._file = file

    async def read(self, lsid: int, n_pb: int) -> memoryview:
        return await self._env.pools.run(Pool.SEND, self.ring.read, lsid, n_pb)

    def close(self) -> None:
        self._file.close()
