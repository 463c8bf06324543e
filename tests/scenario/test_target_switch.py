"""The target of a volume moves between two storages that have the same data: one history at the archive.

Storages, proxy and archive are the real daemons. The one that stands by may overflow: nobody has to do anything.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.backup_rig import BackupRig, StorageRig
from tests.kit.fake_device import FakeDevice
from tests.kit.storage_rig import DEVICE, VOL, Rig
from walbd.errors import RemoteError
from walbd.protocol import control as c
from walbd.protocol.base import JobState
from walbd.protocol.maintenance import Retarget

SIZE_LB = 2048


class Pair:
    """Two storages and the one that is the target now."""

    def __init__(self, group: BackupRig, other: Rig) -> None:
        self.group = group
        self.storages = [group.storage, other]

    def write(self, count: int = 10) -> None:
        """Write the same to both, as a mirror does."""
        first, second = (rig.device for rig in self.storages)
        for _ in range(count):
            offset_lb = first.rng.randrange(SIZE_LB - 8)
            data = first.rng.randbytes(8 * 512)
            first.write(offset_lb, data)
            second.write(offset_lb, data)
        assert first.data == second.data

    async def go_standby(self, rig: Rig) -> None:
        if await rig.state() == "Target":
            await rig.stop_volume()
            await rig.call(c.ResetVol(volume=VOL))
        await rig.start_volume(c.Role.STANDBY)

    async def become_target(self, rig: Rig) -> int:
        if await rig.state() == "Standby":
            await rig.stop_volume()
        info = await self.group.hash_backup(rig)
        assert info.state is JobState.DONE, info
        return int(info.result["gid"] or 0)

    async def check(self, rig: Rig) -> tuple[int, bytes]:
        """A fresh snapshot at the target reaches the archive."""
        image = bytes(rig.device.data)
        gid = (await rig.call(c.TakeSnapshot(volume=VOL))).gid
        await self.group.until_archived(gid)
        assert await self.group.image(gid) == image
        return gid, image


async def test_there_and_back(tmp_path: Path) -> None:
    group = BackupRig(tmp_path, size_lb=SIZE_LB)
    other = StorageRig(tmp_path / "s1", options={"node_id": "s1"})
    other.devices[DEVICE] = FakeDevice(size_lb=SIZE_LB, ring_pb=512, seed=1)
    async with group.running():
        other.neighbours = group.storage.neighbours
        await other.start()
        try:
            pair = Pair(group, other)
            points: list[tuple[int, bytes]] = []
            await other.init()
            await other.start_volume(c.Role.STANDBY)
            pair.write()
            await group.full_backup()
            pair.write(20)
            points.append(await pair.check(group.storage))

            # What stands by overflows while its daemon is away, and goes on by itself.
            await other.die()
            while not other.device.overflow:
                pair.write()
            await other.start()
            await other.until(lambda: not other.device.overflow)
            assert await other.state() == "Standby"
            points.append(await pair.check(group.storage))

            for target, standby in ((other, group.storage), (group.storage, other)):
                await pair.go_standby(standby)
                pair.write()
                await pair.become_target(target)
                pair.write()
                points.append(await pair.check(target))
                assert [await target.state(), await standby.state()] == ["Target", "Standby"]
            for gid, image in points:
                assert await group.image(gid) == image
            # Nothing of a history that was given up waits anywhere.
            await group.proxy.until(lambda: not group.proxy.volume.unsent)
        finally:
            await other.die()


async def test_a_volume_that_overflowed_takes_up_nothing_before_its_reset(tmp_path: Path) -> None:
    group = BackupRig(tmp_path, size_lb=SIZE_LB, ring_pb=512)
    async with group.running():
        await group.full_backup()
        await group.overflow()
        storage = group.storage
        for request in (
            c.Start(volume=VOL, role=c.Role.TARGET),
            c.Start(volume=VOL, role=c.Role.STANDBY),
            c.TakeSnapshot(volume=VOL),
            c.HashBackup(volume=VOL),
        ):
            with pytest.raises(RemoteError) as caught:
                await storage.call(request)  # type: ignore[misc]
            assert caught.value.hint
        # Other proxies do not help either, nor does a restart.
        await storage.call(Retarget(proxies=["127.0.0.1:1"]))
        await storage.restart()
        assert await storage.state() == "Stopped"
        await storage.call(Retarget(proxies=[group.storage.neighbours[1]]))
        await storage.call(c.ResetVol(volume=VOL))
        info = await group.hash_backup()
        assert info.state is JobState.DONE, info
        await group.until_archived(int(info.result["gid"] or 0))
