"""Full backup from the storage's side: the copy, logs meanwhile, and everything that can cut it short."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.kit.fake_device import FakeDevice
from tests.kit.storage_rig import DEVICE, VOL, Rig
from walbd.errors import Refused, RemoteError
from walbd.protocol.base import GetJobs, JobState
from walbd.protocol.control import (
    FullBackup,
    GetState,
    GetStatus,
    ResetVol,
    SetFullScanBps,
    Stop,
    StopHow,
    TakeSnapshot,
)
from walbd.protocol.transfer import Packing
from walbd.storage.device.interface import DeviceInfo
from walbd.units import KIB, LB, MIB


async def until_scanning(rig: Rig) -> None:
    await rig.until(lambda: rig.server.volumes[VOL].monitored, "the scan")


@pytest.mark.parametrize("bulk_b", [512, 4096, 256 * KIB, 4 * MIB])
@pytest.mark.parametrize("packing", list(Packing))
async def test_the_copy_is_exact(tmp_path: Path, bulk_b: int, packing: Packing) -> None:
    """Sizes that are no multiple of a bulk, holes, data that does not shrink."""
    rig = Rig(tmp_path / "s", options={"backup_packing": str(packing)})
    device = rig.devices[DEVICE] = FakeDevice(size_lb=6 * MIB // LB + 3)
    device.write(1, bytes(range(256)) * 2)
    device.write(3 * MIB // LB, device.rng.randbytes(100 * LB))
    device.write(6 * MIB // LB + 2, b"x" * LB)
    async with rig.running():
        await rig.init()
        info = await rig.full_backup(bulk_b=bulk_b)
        assert info.state is JobState.DONE, info
        base = rig.archive.bases[VOL]
        assert bytes(base.image) == bytes(device.data)
        assert (base.snapshot.gid_b, base.snapshot.gid_e) == (0, info.result["gid"])
        assert base.uuid == device.uuid
        assert rig.archive.zero_chunks <= 4
        assert info.result["size_b"] == len(device.data)
        await rig.until_delivered()
        assert rig.archive.restore(base.snapshot.gid_e) == bytes(device.data)


async def test_writes_during_the_scan(tmp_path: Path) -> None:
    """The log is sent during the scan already; base and logs together are the volume at the last snapshot."""
    rig = Rig(tmp_path / "s")
    device = rig.devices[DEVICE] = FakeDevice(size_lb=8 * MIB // LB, ring_pb=64 * 1024)
    device.scribble(50)
    async with rig.running():
        await rig.init()
        await rig.call(SetFullScanBps(bytes_per_s=1))
        job = (await rig.call(FullBackup(volume=VOL))).job
        await until_scanning(rig)
        assert await rig.state() == "FullSync"
        device.scribble(50)
        await rig.until(lambda: len(rig.pieces) > 0, "a piece during the scan")
        with pytest.raises(RemoteError) as caught:
            await rig.call(TakeSnapshot(volume=VOL))
        assert caught.value.remote_code == "busy"
        await rig.call(SetFullScanBps(bytes_per_s=0))  # a running scan obeys at once
        info = await rig.job(job)
        assert info.state is JobState.DONE
        assert (info.done, info.total) == (0, 0)  # of the last phase
        truth = bytes(device.data)
        device.scribble(20)
        await rig.until_delivered()
        assert rig.archive.restore(int(info.result["gid"] or 0)) == truth
        assert rig.archive.restore(rig.archive.latest()) == bytes(device.data)


async def test_progress_and_speed_limit(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.devices[DEVICE] = FakeDevice(size_lb=8 * MIB // LB)
    async with rig.running():
        await rig.init()
        await rig.call(SetFullScanBps(bytes_per_s=1))
        job = (await rig.call(FullBackup(volume=VOL))).job
        await until_scanning(rig)

        await rig.until(lambda: rig.server.jobs.get(job).info().done > 0, "progress")
        (info,) = (await rig.call(GetJobs())).jobs
        assert (info.phase, info.done, info.total) == ("copying", 2 * MIB, 8 * MIB)  # and then held back
        assert (await rig.call(GetStatus())).server["full_scan_bytes_per_s"] == 1
        assert (await rig.stop_volume(StopHow.FORCE)).state is JobState.FAILED
        info = await rig.job(job)
        assert (info.state, info.error_code) == (JobState.FAILED, "force-stopped")
        assert await rig.state() == "SyncReady"
        assert not rig.archive.bases


@pytest.mark.parametrize("why", ["refused", "down", "device-down", "no-volume"])
async def test_refused_before_anything_happened(tmp_path: Path, why: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        if why != "no-volume":
            await rig.init()
        code = {"no-volume": "bad-state"}.get(why, "connect")
        if why == "refused":
            code, rig.archive.refusal = "refused", Refused("not now", hint="later")
        elif why == "down":
            await rig.archive.stop()
        elif why == "device-down":
            rig.device.go_down()
        uuid = rig.device.uuid
        with pytest.raises(RemoteError) as caught:
            await rig.call(FullBackup(volume=VOL))
        assert caught.value.remote_code == code
        assert await rig.state() == ("Clear" if why == "no-volume" else "SyncReady")
        assert rig.device.uuid == uuid
        assert (await rig.call(GetJobs())).jobs == []


@pytest.mark.parametrize("why", ["archive-dies", "archive-refuses-at-end", "device-dies", "overflow", "kill"])
async def test_cut_short_and_done_again(tmp_path: Path, why: str) -> None:
    """The volume is SyncReady again, and the next attempt begins over."""
    rig = Rig(tmp_path / "s")
    device = rig.devices[DEVICE] = FakeDevice(size_lb=8 * MIB // LB, ring_pb=2048)
    for offset_lb in range(0, len(device.data) // LB, 2048):
        device.write(offset_lb, device.rng.randbytes(LB))
    async with rig.running():
        await rig.init()
        if why == "archive-dies":
            rig.archive.abort_at_chunk = 3
        elif why == "archive-refuses-at-end":
            rig.archive.fail_at_end = Refused("disk full")
        else:
            await rig.call(SetFullScanBps(bytes_per_s=1))
        job = (await rig.call(FullBackup(volume=VOL))).job
        if why == "device-dies":
            await until_scanning(rig)
            device.go_down()
            await rig.call(SetFullScanBps(bytes_per_s=0))
        elif why == "overflow":
            await until_scanning(rig)
            rig.proxy.refusal = Refused("full")
            while not device.overflow:
                device.write(0, bytes(range(256)) * 8)
            await rig.until(lambda: rig.server.volumes[VOL].lost is not None)
            await rig.call(SetFullScanBps(bytes_per_s=0))
        if why == "kill":
            await until_scanning(rig)
            await rig.restart()
        else:
            info = await rig.job(job)
            assert info.state is JobState.FAILED
            assert info.error
        assert await rig.state() == "SyncReady"
        assert not rig.archive.bases
        rig.archive.fail_at_end = rig.proxy.refusal = None
        device.come_up()
        await rig.call(SetFullScanBps(bytes_per_s=0))
        assert (await rig.full_backup()).state is JobState.DONE
        device.scribble(5)
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(device.data)


async def test_graceful_stop_waits_for_the_backup(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.init()
        rig.archive.hold = asyncio.Event()
        job = (await rig.call(FullBackup(volume=VOL))).job
        stopping = asyncio.create_task(rig.stop_volume())
        await rig.until(lambda: rig.server.volumes[VOL].machine.stopping is not None)
        assert not stopping.done()
        rig.archive.hold.set()
        assert (await stopping).state is JobState.DONE
        assert (await rig.job(job)).state is JobState.DONE
        assert await rig.state() == "Stopped"


async def test_force_overrides_a_graceful_stop(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.init()
        rig.archive.hold = asyncio.Event()
        backup = (await rig.call(FullBackup(volume=VOL))).job
        first = (await rig.call(Stop(volume=VOL))).job
        assert (await rig.call(Stop(volume=VOL, how=StopHow.FORCE))).job == first
        with pytest.raises(RemoteError):
            await rig.call(Stop(volume=VOL, how=StopHow.FORCE))
        assert (await rig.job(first)).error_code == "bad-state"  # it is not Target, and never was
        assert (await rig.job(backup)).error_code == "force-stopped"
        assert await rig.state() == "SyncReady"
        rig.archive.hold.set()


async def test_force_stop_before_the_copy(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.init()
        rig.archive.hold = asyncio.Event()
        job = (await rig.call(FullBackup(volume=VOL))).job
        stop = await rig.stop_volume(StopHow.FORCE)
        assert (stop.state, stop.error_code) == (JobState.FAILED, "bad-state")
        assert (await rig.job(job)).error_code == "force-stopped"
        assert await rig.state() == "SyncReady"
        rig.archive.hold.set()
        rig.archive.hold = None
        assert (await rig.full_backup()).state is JobState.DONE


async def test_scans_wait_for_a_place(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"backups_max": 1})
    rig.devices["/fake/dev1"] = FakeDevice(seed=1)
    async with rig.running():
        await rig.init()
        await rig.init("vol1", "/fake/dev1")
        rig.archive.hold = asyncio.Event()
        first = (await rig.call(FullBackup(volume=VOL))).job
        await until_scanning(rig)
        second = (await rig.call(FullBackup(volume="vol1"))).job
        uuid = rig.devices["/fake/dev1"].uuid
        await rig.until(lambda: rig.server.jobs.get(second).info().phase == "waiting for other scans", "the queue")
        assert rig.devices["/fake/dev1"].uuid == uuid  # its log is kept until its turn
        rig.archive.hold.set()
        for job in (first, second):
            assert (await rig.job(job)).state is JobState.DONE
        for volume in (VOL, "vol1"):
            assert (await rig.call(GetState(volume=volume))).value == "Target"


@pytest.mark.parametrize("when", ["before-the-reset", "with-the-reset"])
async def test_a_volume_that_grows_before_its_log_is_reset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """What was written to the new part until then is in no log, so a copy of the old size would lack it."""
    rig = Rig(tmp_path / "s")
    device = rig.device
    size_lb = len(device.data) // LB

    def grow() -> None:
        device.resize(size_lb + 8)
        device.write(size_lb + 4, b"y" * LB)

    reset = device.reset

    def reset_grown() -> DeviceInfo:
        grow()
        return reset()

    async with rig.running():
        await rig.init()
        rig.archive.hold = asyncio.Event()
        uuid = device.uuid
        if when == "with-the-reset":
            monkeypatch.setattr(device, "reset", reset_grown)
        else:
            agreed = rig.server.volumes[VOL].info

            async def info_grown() -> DeviceInfo:
                monkeypatch.undo()
                info = await agreed()
                grow()
                return info

            monkeypatch.setattr(rig.server.volumes[VOL], "info", info_grown)
        job = (await rig.call(FullBackup(volume=VOL))).job
        rig.archive.hold.set()
        assert "has grown" in (await rig.job(job)).error
        assert await rig.state() == "SyncReady"
        assert not rig.archive.bases
        assert (device.uuid == uuid) is (when == "before-the-reset")
        monkeypatch.undo()
        assert (await rig.full_backup()).state is JobState.DONE
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(device.data)


async def test_backup_after_a_history(tmp_path: Path) -> None:
    """Generations begin at 0 again, under a new uuid: pieces of the old history do not mix with it."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        rig.device.scribble(5)
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.scribble(5)
        await rig.call(ResetVol(volume=VOL))
        rig.device.scribble(5)
        assert (await rig.full_backup()).state is JobState.DONE
        rig.device.scribble(5)
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        assert len({piece.offer.uuid for piece in rig.pieces}) == 2
