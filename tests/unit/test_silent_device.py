"""A stopped device process (SIGSTOP): its sockets accept, and nothing answers. Everybody gives up in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from walbd.daemon.env import Env
from walbd.daemon.nbd_client import open_reader
from walbd.daemon.net import Address
from walbd.errors import TimedOut
from walbd.storage.device.config import control_address, nbd_address
from walbd.storage.device.userspace import UserspaceDevice, device_me

SHORT_S = 0.05
DEADLINE_S = 60.0


class Silent:
    """Accepts connections at a unix socket and says nothing; knows which are open."""

    def __init__(self) -> None:
        self.accepted = 0
        self.open = 0
        self.changed = asyncio.Condition()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self.changed:
            self.accepted += 1
            self.open += 1
            self.changed.notify_all()
        try:
            while await reader.read(4096):
                pass
        except ConnectionError:
            pass
        writer.close()
        async with self.changed:
            self.open -= 1
            self.changed.notify_all()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_S), self.changed:
            await self.changed.wait_for(condition)


@asynccontextmanager
async def silent(address: Address) -> AsyncIterator[Silent]:
    peer = Silent()
    server = await asyncio.start_unix_server(peer.serve, address.path)
    try:
        yield peer
        await peer.until(lambda: not peer.open)  # nobody leaves a connection behind
    finally:
        server.close()


CALLS: dict[str, Callable[[UserspaceDevice], Awaitable[object]]] = {
    "info": UserspaceDevice.info,
    "lsids": UserspaceDevice.lsids,
    "set_oldest": lambda device: device.set_oldest(0),
    "take_checkpoint": UserspaceDevice.take_checkpoint,
    "reset_wal": UserspaceDevice.reset_wal,
    "resize": lambda device: device.resize(1),
    "open_log": UserspaceDevice.open_log,
}


@pytest.mark.parametrize("name", CALLS)
async def test_control(tmp_path: Path, name: str) -> None:
    env = Env()
    device = UserspaceDevice(env, tmp_path, me=device_me(io_timeout_s=SHORT_S))
    async with silent(control_address(tmp_path)) as peer:
        with pytest.raises(TimedOut):
            await CALLS[name](device)
        await peer.until(lambda: peer.accepted == 1)
    env.pools.close()


async def test_watch(tmp_path: Path) -> None:
    env = Env()
    device = UserspaceDevice(env, tmp_path, me=device_me(io_timeout_s=SHORT_S))
    async with silent(control_address(tmp_path)) as peer:
        with pytest.raises(TimedOut):
            async with device.watch():
                raise AssertionError("it was greeted")
        await peer.until(lambda: peer.accepted == 1)
    env.pools.close()


async def test_data(tmp_path: Path) -> None:
    device = UserspaceDevice(Env(), tmp_path, me=device_me(io_timeout_s=SHORT_S))
    async with silent(nbd_address(tmp_path)) as peer:
        with pytest.raises(TimedOut):
            await device.open_data()
        await peer.until(lambda: peer.accepted == 1)


async def test_whoever_is_cancelled_leaves_no_connection(tmp_path: Path) -> None:
    async with silent(nbd_address(tmp_path)) as peer:
        opening = asyncio.create_task(open_reader(nbd_address(tmp_path)))
        await peer.until(lambda: peer.accepted == 1)
        opening.cancel()
        await asyncio.wait({opening})
        assert opening.cancelled()
