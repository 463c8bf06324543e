"""A storage with a fake device, a proxy and an archive in this process, all three the real daemons."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from tests.kit.fake_device import FakeDevice
from tests.kit.feeder import ArchiveRig
from tests.kit.process import free_port, release_ports
from tests.kit.proxy_rig import ProxyRig
from tests.kit.storage_rig import DEADLINE_S, DEVICE, VOL, Rig
from walbd.errors import RemoteError
from walbd.protocol import control as c
from walbd.protocol.base import JobInfo, JobState
from walbd.protocol.codec import Message, Request

R = TypeVar("R", bound=Message)


class StorageRig(Rig):
    """A storage whose neighbours are others than its own fakes."""

    neighbours: tuple[str, str] = ("", "")  # archive, proxy

    def config(self) -> Any:
        archive, proxy = self.neighbours
        self.options |= {"archive": archive, "proxy": [proxy]}
        return super().config()


class BackupRig:
    """The three daemons; `device` is what an application writes to."""

    def __init__(self, base: Path, *, size_lb: int = 2048, ring_pb: int = 8192, **archive: Any) -> None:
        self.archive = ArchiveRig(base / "a0", **archive)
        self.proxy = ProxyRig(base / "p0")
        self.storage = StorageRig(base / "s0")
        self.storage.devices[DEVICE] = FakeDevice(size_lb=size_lb, ring_pb=ring_pb)
        (base / "a0").mkdir()
        (base / "p0").mkdir()

    @property
    def device(self) -> FakeDevice:
        return self.storage.device

    @asynccontextmanager
    async def running(self) -> AsyncIterator[BackupRig]:
        """Run the group with one volume, known everywhere and backed up nowhere."""
        for rig in (self.archive, self.proxy):
            rig.settings["port"] = free_port()  # a restart listens where it did
            await rig.up()
        self.storage.neighbours = (str(self.archive.address), str(self.proxy.address))
        try:
            async with self.storage.running():
                await self.archive.call(c.ArchiveInitVol(volume=VOL))
                info = c.ArchiveInfo(archive="a0", address=str(self.archive.address))
                await self.proxy.call(c.AddArchiveInfo(volume=VOL, info=info))
                await self.proxy.call(c.Start(volume=VOL))
                await self.storage.init()
                yield self
        finally:
            await self.proxy.crash()
            await self.archive.crash()
            self.proxy.env.pools.close()
            self.archive.env.pools.close()
            release_ports(rig.settings["port"] for rig in (self.archive, self.proxy))

    async def full_backup(self) -> int:
        """Run a full backup; return its generation."""
        info = await self.storage.full_backup()
        assert info.state is JobState.DONE, info
        return int(info.result["gid"] or 0)

    async def ask(self, request: Request[R], storage: Rig | None = None) -> R:
        """Ask a storage, again while something is busy: the archive may just take a wdiff."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + DEADLINE_S
        while True:
            try:
                return await (storage or self.storage).call(request)
            except RemoteError as exc:
                if exc.remote_code != "busy" or loop.time() > deadline:
                    raise

    async def begin_hash_backup(self, storage: Rig | None = None, **options: Any) -> int:
        """Begin a hash backup; return its job."""
        return (await self.ask(c.HashBackup(volume=VOL, **options), storage)).job

    async def hash_backup(self, storage: Rig | None = None, **options: Any) -> JobInfo:
        """Run a hash backup to its end, whatever that is."""
        return await (storage or self.storage).job(await self.begin_hash_backup(storage, **options))

    async def done_hash_backup(self, **options: Any) -> int:
        """Run a hash backup that must succeed; return its generation."""
        info = await self.hash_backup(**options)
        assert info.state is JobState.DONE, info
        return int(info.result["gid"] or 0)

    async def snapshot(self) -> tuple[int, bytes]:
        """Take a snapshot and bring it to the archive; return its generation and what it must hold."""
        image = bytes(self.device.data)
        gid = (await self.storage.call(c.TakeSnapshot(volume=VOL))).gid
        await self.until_archived(gid)
        return gid, image

    async def until_archived(self, gid: int) -> None:
        """Wait until the archive has a generation, clean."""
        await self.storage.until(lambda: self.has(gid), f"generation {gid}")

    def has(self, gid: int) -> bool:
        volume = self.archive.server.volumes.get(VOL)
        return volume is not None and gid in [point.gid for point in volume.restorable(all_points=True)]

    async def image(self, gid: int) -> bytes:
        """Restore and read."""
        return await self.archive.restored_image(VOL, gid)

    async def overflow(self) -> None:
        """Write so much while nothing is sent that the log overflows; the storage stops by itself."""
        await self.proxy.crash()
        while not self.device.overflow:
            self.device.scribble(50)
        storage = self.storage.server.volumes[VOL]
        await self.storage.until(lambda: str(storage.machine.state) == "Stopped", "the storage to notice")
        await self.proxy.up()
