"""The device as a process sees it from outside: `DeviceServer`, its control socket, `UserspaceDevice`."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.kit.nbd import NbdClient
from walbd.daemon.conn import Me, call, dial
from walbd.daemon.env import Env
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.errors import Busy, ConnectError, Refused, RemoteError, RemoteProtocolError, UsageError, code_of
from walbd.format.ring import Ring
from walbd.fs import OsFileSystem
from walbd.protocol.base import Kind
from walbd.protocol.codec import MESSAGES, decode, encode
from walbd.protocol.device import (
    DeviceInfo,
    Freeze,
    GetLsids,
    LsidSample,
    SetOldest,
    StopDevice,
    WatchLsids,
)
from walbd.storage.device.config import DeviceConfig, control_address, load_config, socket_address
from walbd.storage.device.create import create_device
from walbd.storage.device.interface import Device
from walbd.storage.device.server import DeviceServer
from walbd.storage.device.userspace import UserspaceDevice
from walbd.units import MIB


def make(base: Path, name: str = "vol0", **options: object) -> Path:
    config = DeviceConfig(
        ldev=str(base / f"{name}.ldev"),
        ddev=str(base / f"{name}.ddev"),
        checkpoint_interval_s=3600.0,
        **options,  # type: ignore[arg-type]
    )
    create_device(
        OsFileSystem(),
        base / "dev",
        name,
        config,
        size_b=4 * MIB,
        ldev_size_b=2 * MIB,
        pbs=512,
        force=False,
        rng=random.Random(1),
    )
    return base / "dev" / name


class Rig:
    def __init__(self, directory: Path, server: DeviceServer, shutdown: Shutdown, env: Env) -> None:
        self.directory = directory
        self.server = server
        self.shutdown = shutdown
        self.env = env
        self.device = UserspaceDevice(env, directory)

    async def write(self, offset_b: int, data: bytes, *, fua: bool = True) -> None:
        def work() -> None:
            with NbdClient(str(self.directory / "nbd.sock")) as client:
                client.write(offset_b, data, fua=fua)

        await asyncio.to_thread(work)


@asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[Rig]:
    env, shutdown = Env(), Shutdown()
    config = load_config(env.fs, directory)
    server = DeviceServer(config, directory, env, shutdown)
    async with asyncio.timeout(240), asyncio.TaskGroup() as tasks:
        await server.start(tasks)
        try:
            yield Rig(directory, server, shutdown, env)
        finally:
            await server.stop(ShutdownMode.GRACEFUL)
    env.pools.close()


async def test_info_and_lsids(tmp_path: Path) -> None:
    directory = make(tmp_path)
    async with serving(directory) as rig:
        device: Device = rig.device
        info = await device.info()
        assert (info.name, info.pbs, info.size_lb) == ("vol0", 512, 8192)
        assert info.capacity_pb == 4096 - 10
        assert info.nbd == [f"unix:{directory / 'nbd.sock'}"]
        assert not info.lsids.overflow
        await rig.write(0, b"a" * 512)
        sample = await device.lsids()
        assert sample.uuid == info.uuid
        assert sample.permanent == sample.latest == 2
        assert sample.oldest == 0
        with pytest.raises(RemoteError) as caught:
            await device.set_oldest(3)
        assert code_of(caught.value) == Refused.code
        await rig.server.engine.drain()  # type: ignore[union-attr]
        await device.take_checkpoint()
        await device.set_oldest(2)
        assert (await device.lsids()).oldest == 2
        assert not (directory / "control.sock").is_file()
    assert not (directory / "control.sock").exists()
    for attempt in (device.info(), device.open_data(), device.open_log()):
        with pytest.raises(ConnectError):
            await attempt
    with pytest.raises(ConnectError):
        async with device.watch():
            pass


async def test_watch_tells_of_every_advance_once(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        await rig.write(0, b"a" * 512)  # log that is there before anybody watches
        async with rig.device.watch() as samples:
            first = await anext(samples)
            assert first.permanent == 2
            await rig.write(0, b"b" * 512)
            assert (await anext(samples)).permanent == 4
            for i in range(20):
                await rig.write(i * 512, b"c" * 512)
            sample = await anext(samples)
            while sample.permanent < 44:
                before, sample = sample, await anext(samples)
                assert sample.permanent > before.permanent
            await rig.device.freeze(0)
            assert (await anext(samples)).frozen
            await rig.device.melt()
            assert not (await anext(samples)).frozen
            info = await rig.device.reset_wal()
            sample = await anext(samples)
            while sample.uuid != info.uuid:
                sample = await anext(samples)
            assert sample.permanent == 0
        # Leaving the block ends the connection; the device does not mind.
        assert (await rig.device.lsids()).latest == 0


async def test_a_watcher_learns_that_the_device_is_gone(tmp_path: Path) -> None:
    directory = make(tmp_path)
    env = Env()
    async with serving(directory):
        watch = UserspaceDevice(env, directory).watch()
        samples = await watch.__aenter__()
        await anext(samples)
    with pytest.raises(ConnectError):
        await anext(samples)
    await watch.__aexit__(None, None, None)
    env.pools.close()


async def test_log_and_data_can_be_read(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        await rig.write(4096, b"x" * 1024)
        for direct in (False, True):
            log = await rig.device.open_log(direct=direct)
            assert isinstance(log.ring, Ring)
            header = await log.read(0, 1)
            assert bytes(header[8:16]) == bytes(8)
            assert bytes(await log.read(1, 2)) == b"x" * 1024
            scanner = log.ring.scan(0, lsid_end=3).run()
            assert scanner.lsid == 3
            log.close()
            log.close()
        data = await rig.device.open_data()
        assert data.size_b == 4 * MIB
        pieces = await asyncio.gather(*[data.read(at, 4096) for at in range(0, 65536, 4096)])
        assert b"".join(pieces) == bytes(4096) + b"x" * 1024 + bytes(65536 - 5120)
        await data.close()


async def test_open_log_during_a_reset_is_busy(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        info = await rig.device.info()
        await rig.device.reset_wal()
        with pytest.raises(Busy):
            rig.device._open_log(info, False)  # what a reset between the two steps looks like


async def test_freeze_melt_resize(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        await rig.device.freeze(100)
        with pytest.raises(RemoteError) as caught:
            await rig.device.reset_wal()
        assert code_of(caught.value) == "bad-state"
        write = asyncio.ensure_future(rig.write(0, b"w" * 512))
        await rig.device.melt()
        await write
        assert (await rig.device.resize(9000)).size_lb == 9000
        with pytest.raises(RemoteError):
            await rig.device.resize(8999)
        assert (await rig.device.resize(0)).size_lb == 9000


async def test_stop_by_message(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        me = Me(node="test", kind=Kind.CONTROL, group="device")
        address = control_address(rig.directory)
        await call(rig.env, me, address, StopDevice())
        assert await rig.shutdown.requested() is ShutdownMode.GRACEFUL


async def test_strangers_are_refused(tmp_path: Path) -> None:
    async with serving(make(tmp_path)) as rig:
        address = control_address(rig.directory)
        with pytest.raises(RemoteError):
            await call(rig.env, Me(node="x", kind=Kind.STORAGE, group="other"), address, GetLsids())
        me = Me(node="x", kind=Kind.STORAGE, group="device")
        async with dial(rig.env, me, address) as conn:
            await conn.send(sample_of(0))
            with pytest.raises((RemoteError, RemoteProtocolError, ConnectError)):
                await conn.receive()
        assert (await rig.device.lsids()).latest == 0


async def test_two_cannot_serve_one_device(tmp_path: Path) -> None:
    directory = make(tmp_path)
    async with serving(directory) as rig:
        second = DeviceServer(load_config(rig.env.fs, directory), directory, rig.env, Shutdown())
        async with asyncio.TaskGroup() as tasks:
            with pytest.raises(Busy):
                await second.start(tasks)
    async with serving(directory):
        pass


async def test_a_device_that_cannot_listen_lets_go(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        directory = make(tmp_path, nbd_listen=[f"127.0.0.1:{port}"])
        env = Env()
        server = DeviceServer(load_config(env.fs, directory), directory, env, Shutdown())
        async with asyncio.TaskGroup() as tasks:
            with pytest.raises(ConnectError):
                await server.start(tasks)
        env.pools.close()
    async with serving(directory) as rig:
        assert len((await rig.device.info()).nbd) == 2


async def test_restart_keeps_what_was_written(tmp_path: Path) -> None:
    directory = make(tmp_path)
    async with serving(directory) as rig:
        await rig.write(0, b"1" * 4096)
        before = await rig.device.info()
    async with serving(directory) as rig:
        after = await rig.device.info()
        assert after.uuid == before.uuid
        assert after.lsids.prev_written == after.lsids.latest == 9
        data = await rig.device.open_data()
        assert await data.read(0, 4096) == b"1" * 4096
        await data.close()


def sample_of(lsid: int) -> LsidSample:
    return LsidSample(
        uuid=b"u" * 16,
        latest=lsid,
        completed=lsid,
        flush=lsid,
        permanent=lsid,
        written=lsid,
        prev_written=lsid,
        oldest=lsid,
        overflow=False,
        read_only=False,
        frozen=True,
    )


def test_messages_survive_the_wire() -> None:
    sample = sample_of(2**63)
    info = DeviceInfo(
        name="vol0", uuid=b"v" * 16, pbs=512, salt=2**32 - 1, size_lb=1, capacity_pb=2, ldev="/l", ddev="/d",
        nbd=["unix:/s"], lsids=sample,
    )  # fmt: skip
    for message in (sample, info, SetOldest(lsid=5), Freeze(timeout_s=1.5), WatchLsids()):
        assert decode(encode(message)) == message
    assert {tag for tag in MESSAGES if tag.startswith("device-")} >= {"device-watch", "device-stop"}
    with pytest.raises(RemoteProtocolError):
        decode(encode(SetOldest(lsid=5)).replace(b"lsid", b"lsjd"))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("ldev = 'a'", "ddev"),
        ("ldev = 'a'\nddev = 'b'\nunknown = 1", "unknown"),
        ("ldev = 1\nddev = 'b'", "ldev"),
        ("ldev = 'a'\nddev = 'b'\npending_max = '1M'", "pending_max"),
        ("ldev = 'a'\nddev = 'b'\npending_max = '20M'", "twice"),
        ("ldev = 'a'\nddev = 'b'\npending_max = 'many'", "not a size"),
        ("ldev = 'a'\nddev = 'b'\nnbd_listen = ['0.0.0.0:1']", "TLS"),
        ("ldev = 'a'\nddev = 'b'\nnbd_listen = ['nowhere']", "nbd_listen"),
        ("ldev = 'a'\nddev = 'b'\nnbd_listen = ['unix:/x']", "always there"),
        ("ldev = 'a'\nddev = 'b'\nnbd_tls_cert = 'c'", "together"),
        ("ldev = 'a'\nddev = 'b'\ncheckpoint_interval_s = 0", "checkpoint"),
        ("ldev = ", "Invalid"),
    ],
)
def test_bad_configurations(text: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        DeviceConfig.parse(text, "device.toml")
    assert reason in str(caught.value)


def test_configurations_survive_the_file() -> None:
    text = """
        ldev = "/dev/disk/with \\"quotes\\""
        ddev = "/d"
        nbd_listen = ["127.0.0.1:10809", "[::1]:10809"]
        pending_max = "32MiB"
        log_flush_interval_size = "8MiB"
        log_flush_interval_s = 0.05
        nbd_insecure = true
    """
    config = DeviceConfig.parse(text, "device.toml")
    assert config.pending_max == 32 * MIB
    assert config.tuning().flush_interval_s == 0.05
    assert [str(address) for address in config.addresses()] == ["127.0.0.1:10809", "[::1]:10809"]
    assert DeviceConfig.parse(config.to_toml(), "device.toml") == config


def test_paths_too_long_for_a_socket_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        make(tmp_path / ("x" * 100))
    assert "too long" in str(caught.value)
    assert socket_address(Path("/" + "x" * 106)).path
    with pytest.raises(UsageError):
        socket_address(Path("/" + "x" * 107))
