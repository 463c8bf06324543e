"""What happens to the device: overflow, resets behind our back, outages, lost log, growing; and start-up."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import uvloop

from tests.kit.fake_device import FakeDevice
from tests.kit.storage_rig import DEVICE, VOL, Rig
from walbd.daemon.main import ShutdownMode
from walbd.errors import Busy, HistoryBroken, Refused, RemoteError
from walbd.protocol.base import GetJobs, JobState
from walbd.protocol.control import (
    ClearVol,
    GetActions,
    GetHandlerStat,
    GetHostType,
    GetIsOverflow,
    GetLatestSnap,
    GetNumAction,
    GetPid,
    GetStatus,
    GetTsDelta,
    GetUuid,
    GetVersion,
    GetVolumes,
    ResetVol,
    Resize,
    Role,
    SetFullScanBps,
    Shutdown,
    ShutdownHow,
    TakeSnapshot,
)
from walbd.units import LB


async def refused(rig: Rig, request: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await rig.call(request)  # type: ignore[arg-type]
    return caught.value


def overflow(device: FakeDevice) -> None:
    while not device.overflow:
        device.write(0, bytes(range(256)) * 8)


async def test_overflow_stops_a_target_until_it_is_reset(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.devices[DEVICE] = FakeDevice(ring_pb=100)
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.proxy.refusal = Refused("no")
        overflow(rig.device)
        await rig.until(lambda: rig.server.volumes[VOL].machine.shown == "Stopped")
        assert (await rig.call(GetIsOverflow(volume=VOL))).value
        status = (await rig.call(GetStatus())).volumes[0]
        assert status.overflow
        assert "overflowed" in status.error
        oldest = rig.device.oldest
        with pytest.raises(RemoteError) as caught:
            await rig.start_volume()
        assert caught.value.remote_code == "wlog-overflow"
        assert (await refused(rig, TakeSnapshot(volume=VOL))).remote_code == "wlog-overflow"
        assert rig.device.oldest == oldest
        await rig.restart()
        assert await rig.state() == "Stopped"
        await rig.call(ResetVol(volume=VOL))
        assert not (await rig.call(GetIsOverflow(volume=VOL))).value
        rig.proxy.refusal = None
        assert (await rig.full_backup()).state is JobState.DONE
        rig.device.scribble(3)
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


@pytest.mark.parametrize("when", ["at once", "daemon away", "start"])
async def test_overflow_in_standby_needs_nobody(tmp_path: Path, when: str) -> None:
    """The log of a Standby volume is not wanted, so nothing is lost by beginning a new one."""
    rig = Rig(tmp_path / "s")
    rig.devices[DEVICE] = FakeDevice(ring_pb=100)
    async with rig.running():
        await rig.init()
        await rig.start_volume(Role.STANDBY)
        rig.device.write(0, bytes(LB))
        await rig.until(lambda: rig.device.oldest == rig.device.latest)
        uuid = rig.device.uuid
        rig.device.written_at_once = False
        if when == "start":
            await rig.stop_volume()
        if when == "daemon away":
            await rig.die()
        overflow(rig.device)
        if when == "start":
            await rig.start_volume(Role.STANDBY)
        if when == "daemon away":
            await rig.start()
        await rig.until(lambda: not rig.device.overflow)
        await rig.until(lambda: rig.server.volumes[VOL].record.uuid == rig.device.uuid != uuid)
        assert await rig.state() == "Standby"
        rig.device.written_at_once = True
        rig.device.write(0, bytes(LB))
        await rig.until(lambda: rig.device.oldest == rig.device.latest == 2)


@pytest.mark.parametrize("what", ["reset", "reset-and-more", "lost", "given-up"])
async def test_log_that_does_not_continue_is_never_sent(tmp_path: Path, what: str) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        rig.device.scribble(5)
        await rig.until_delivered()
        done = rig.server.volumes[VOL].record.done
        n = len(rig.pieces)
        if what == "lost":
            rig.device.latest = rig.device.permanent = rig.device.written = rig.device.prev_written = 3
            rig.device.oldest = 0
            rig.device.changed.set()
        elif what == "given-up":
            rig.device.written_at_once = False
            rig.device.permanent_at_once = False
            rig.device.scribble(5)
            rig.device.oldest = rig.device.latest
            rig.device.sync()
        else:
            rig.device.reset_behind()
            if what == "reset-and-more":
                while rig.device.latest <= done.lsid + 10:
                    rig.device.scribble(1)
        await rig.until(lambda: rig.server.volumes[VOL].machine.shown == "Stopped")
        assert len(rig.pieces) == n
        assert rig.server.volumes[VOL].record.done == done
        assert (await rig.call(GetStatus())).volumes[0].error
        for request in (TakeSnapshot(volume=VOL),):
            assert (await refused(rig, request)).remote_code in ("history-broken", "wlog-overflow")
        with pytest.raises(RemoteError) as caught:
            await rig.start_volume()
        assert caught.value.remote_code in ("history-broken", "wlog-overflow")
        assert "reset" in caught.value.hint
        await rig.restart()
        with pytest.raises(RemoteError):
            await rig.start_volume()
        await rig.call(ResetVol(volume=VOL))
        assert (await rig.full_backup()).state is JobState.DONE


async def test_device_down_at_start_and_back_later(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"retry_delay_min_s": 1000.0, "retry_delay_max_s": 1000.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.device.go_down()
        await rig.until(lambda: rig.server.volumes[VOL].device_error != "")
        await rig.restart()
        status = (await rig.call(GetStatus())).volumes[0]
        assert (status.state, status.device_error != "") == ("Target", True)
        assert (await refused(rig, TakeSnapshot(volume=VOL))).remote_code == "connect"
        rig.device.scribble(3)
        rig.device.come_up()
        await rig.until_delivered()  # by itself
        assert (await rig.call(GetStatus())).volumes[0].device_error == ""
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        rig.device.go_down()
        assert (await rig.stop_volume()).state is JobState.DONE  # needs no device
        with pytest.raises(RemoteError):
            await rig.start_volume()
        assert await rig.state() == "Stopped"


async def test_a_device_that_returns_is_noticed_although_somebody_has_asked_it_before(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"retry_delay_min_s": 1000.0, "retry_delay_max_s": 1000.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        volume = rig.server.volumes[VOL]
        rig.device.go_down()
        await rig.until(lambda: volume.device_error != "")
        rig.server.scheduler.hurry(VOL)
        await rig.until(lambda: rig.server.scheduler.failures(VOL) == 1)
        rig.device.scribble(3)
        rig.device.come_up()
        await volume.info()  # as a status does, before the watch has found it
        assert volume.device_error == ""
        await rig.until_delivered()


async def test_every_state_survives_a_restart(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        for bring, state in (
            (rig.init, "SyncReady"),
            (lambda: rig.start_volume(Role.STANDBY), "Standby"),
            (rig.stop_volume, "SyncReady"),
            (rig.full_backup, "Target"),
            (rig.stop_volume, "Stopped"),
            (rig.start_volume, "Target"),
        ):
            await bring()
            await rig.restart()
            assert await rig.state() == state
        rig.device.scribble(3)
        await rig.until_delivered()
        await rig.stop_volume()
        await rig.call(ResetVol(volume=VOL, gid=41))
        await rig.restart()
        assert rig.server.volumes[VOL].record.done.gid == 41
        await rig.call(ClearVol(volume=VOL))
        assert await rig.state() == "Clear"
        await rig.restart()
        assert (await rig.call(GetVolumes())).names == []


async def test_snapshots_taken_while_stopped_are_sent_after_the_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        images = {}
        for _ in range(3):
            rig.device.scribble(2)
            images[(await rig.call(TakeSnapshot(volume=VOL))).gid] = bytes(rig.device.data)
        await rig.restart()
        await rig.start_volume()
        await rig.until_delivered()
        for gid, image in images.items():
            assert rig.archive.restore(gid) == image


async def test_a_snapshot_that_meets_a_reset_is_refused(tmp_path: Path) -> None:
    """The reset comes while the snapshot waits for its log to become permanent."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.permanent_at_once = False
        rig.device.scribble(3)
        taking = asyncio.create_task(rig.call(TakeSnapshot(volume=VOL)))
        await rig.until(lambda: rig.device.calls[-1] == "sample")
        await rig.call(ResetVol(volume=VOL))
        with pytest.raises(RemoteError):
            await taking
        volume = rig.server.volumes[VOL]
        with pytest.raises(HistoryBroken):
            await volume.push_point(0, uuid=bytes(16), explicit=True, now=0)
        assert volume.record.queue == ()


async def test_one_device_one_volume(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.devices["/fake/alias"] = rig.device
    rig.devices["/fake/dev1"] = FakeDevice(seed=1)
    async with rig.running():
        await rig.init()
        for path in (DEVICE, DEVICE + "/", "/fake/alias"):
            with pytest.raises(RemoteError) as caught:
                await rig.init("other", path)
            assert caught.value.remote_code == "already-exists"
        for path, code in (("fake/dev1", "usage"), ("/fake/nothing", "connect")):
            with pytest.raises(RemoteError) as caught:
                await rig.init("other", path)
            assert caught.value.remote_code == code
        assert (await rig.call(GetVolumes())).names == [VOL]
        assert [path.name for path in rig.base_dir.iterdir() if path.is_dir()] == [VOL]
        both = await asyncio.gather(
            rig.init("a", "/fake/dev1"), rig.init("b", "/fake/dev1"), return_exceptions=True
        )
        assert sum(not isinstance(outcome, BaseException) for outcome in both) <= 1
        names = (await rig.call(GetVolumes())).names
        assert len(names) == 1 + sum(not isinstance(outcome, BaseException) for outcome in both)


async def test_two_volumes_side_by_side(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    other = rig.devices["/fake/dev1"] = FakeDevice(seed=1, pbs=4096, ring_pb=512)
    async with rig.running():
        await rig.target()
        await rig.init("vol1", "/fake/dev1")
        assert (await rig.full_backup("vol1")).state is JobState.DONE
        for _ in range(3):
            rig.device.scribble(3)
            other.scribble(3)
        await rig.until_delivered()
        await rig.until_delivered("vol1", other)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        assert rig.archive.restore(rig.archive.latest("vol1"), "vol1") == bytes(other.data)
        rows = (await rig.call(GetLatestSnap())).rows
        assert [row[0] for row in rows] == [VOL, "vol1"]


async def test_resize(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        size_b = len(rig.device.data)
        await rig.call(Resize(volume=VOL, size_b=size_b))
        await rig.call(Resize(volume=VOL, size_b=0))
        assert len(rig.device.data) == size_b
        await rig.call(Resize(volume=VOL, size_b=2 * size_b))
        assert len(rig.device.data) == 2 * size_b
        assert (await refused(rig, Resize(volume=VOL, size_b=size_b))).remote_code == "refused"
        assert (await refused(rig, Resize(volume=VOL, size_b=2 * size_b + 1))).remote_code == "usage"
        assert (await refused(rig, Resize(volume=VOL, size_b=0, zero=True))).remote_code == "usage"
        rig.device.write(2 * size_b // LB - 1, bytes([7]) * LB)
        await rig.until_delivered()
        assert rig.pieces[-1].offer.size_lb == 2 * size_b // LB


async def test_a_broken_volume_is_isolated(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    rig.devices["/fake/dev1"] = FakeDevice(seed=1)
    async with rig.running():
        await rig.target()
        await rig.init("vol1", "/fake/dev1")
        path = rig.base_dir / "vol1" / "volume.json"
        await rig.stop()
        path.write_bytes(path.read_bytes().replace(b"SyncReady", b"Stopped"))
        (rig.base_dir / "leftover").mkdir()
        (rig.base_dir / "leftover" / "tmp123").write_text("x")
        (rig.base_dir / "foreign").mkdir()
        (rig.base_dir / "foreign" / "file").write_text("keep me")
        (rig.base_dir / "not a volume!").mkdir()
        await rig.start()
        assert await rig.state("vol1") == "Broken"
        assert await rig.state("foreign") == "Broken"
        assert await rig.state("leftover") == "Clear"
        assert not (rig.base_dir / "leftover").exists()
        status = await rig.call(GetStatus())
        assert {row.volume: row.state for row in status.volumes} == {
            VOL: "Target",
            "vol1": "Broken",
            "foreign": "Broken",
        }
        assert any("vol1" in text for text in status.errors)
        error = await refused(rig, TakeSnapshot(volume="vol1"))
        assert (error.remote_code, "damaged" in str(error.facts["reason"])) == ("bad-state", True)
        rig.device.scribble(2)
        await rig.until_delivered()
        await rig.call(ClearVol(volume="vol1"))
        await rig.init("vol1", "/fake/dev1")
        assert (await refused(rig, ClearVol(volume="foreign"))).remote_code == "refused"
        assert (rig.base_dir / "foreign" / "file").exists()


async def test_one_daemon_for_one_directory(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        second = Rig(tmp_path / "s")
        second.archive.address, second.proxy.address = rig.archive.address, rig.proxy.address
        with pytest.raises(BaseExceptionGroup) as caught:
            await second.start()
        assert caught.group_contains(Busy)
        second.peer_env.pools.close()


async def test_queries(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"ts_delta_interval_s": 0.01})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        assert (await rig.call(GetHostType())).kind == "storage"
        assert (await rig.call(GetVersion())).log_format == 2
        assert (await rig.call(GetPid())).value > 0
        assert (await rig.call(GetUuid(volume=VOL))).value == rig.device.uuid
        rows = (await rig.call(GetLatestSnap(volume=VOL))).rows
        assert rows == [(VOL, "", 1, 0, rig.clock.now())]
        await rig.until_idle()
        assert (await rig.call(GetNumAction(volume=VOL, action="WlogSend"))).value == 0
        assert (await refused(rig, GetNumAction(volume=VOL, action="Dance"))).remote_code == "not-found"
        assert {row[1] for row in (await rig.call(GetActions())).rows} == {"WlogSend"}
        jobs = (await rig.call(GetJobs(volume=VOL))).jobs
        assert [(job.name, job.state) for job in jobs] == [("full-backup", JobState.DONE)]
        stats = {row[0]: row[2] for row in (await rig.call(GetHandlerStat())).rows}
        assert stats["get-version"] == 1
        rig.device.scribble(1)
        await rig.until_delivered()
        rig.clock.time += 100
        await rig.until(lambda: any((row.gid, row.dest_gid) == (2, 2) for row in rig.server.lag.rows))
        (row,) = (await rig.call(GetTsDelta())).rows
        assert (row.volume, row.dest, row.gid, row.dest_gid) == (VOL, "a0", 2, 2)
        assert row.delta_s == row.timestamp - 5
        await rig.archive.stop()
        await rig.until(lambda: rig.server.lag._failed, "a comparison that failed")
        assert (await rig.call(GetTsDelta())).rows == [row]  # the last good result stays
        status = (await rig.call(GetStatus(volume=VOL))).volumes[0]
        assert (status.state, status.done_gid, status.lag_lb, status.pbs) == ("Target", 2, 0, 512)
        assert (await refused(rig, GetStatus(volume="other"))).remote_code == "not-found"


@pytest.mark.parametrize("how", list(ShutdownHow))
async def test_shutdown(tmp_path: Path, how: ShutdownHow) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.proxy.hold = asyncio.Event()
        chunks = rig.proxy.chunks
        rig.device.scribble(3)
        await rig.until(lambda: rig.proxy.chunks > chunks)
        await rig.call(Shutdown(how=how))
        life = rig._life
        assert life is not None
        if how is ShutdownHow.GRACEFUL:
            for _ in range(20):
                await asyncio.sleep(0)
            assert not life.done()
            rig.proxy.hold.set()
        await life
        rig._life = None
        rig.proxy.hold.set()
        assert rig.server.volumes[VOL].record.queue == () or how is ShutdownHow.FORCE
        await rig.start()
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


def test_force_overrides_a_graceful_shutdown(tmp_path: Path) -> None:
    # On the loop that daemons run on: asyncio's own loses a socket that is accepted while its listener closes.
    uvloop.run(_force_overrides(tmp_path))


async def _force_overrides(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.init()
        rig.archive.hold = asyncio.Event()
        await rig.call(SetFullScanBps(bytes_per_s=1))
        backup = asyncio.create_task(rig.full_backup())
        await rig.until(lambda: bool(rig.archive.offers))
        stopping = asyncio.create_task(rig.stop(ShutdownMode.GRACEFUL))
        await rig.until(lambda: rig.server.server._closing, "the graceful stop to begin")
        assert not stopping.done()
        rig._shutdown.request(ShutdownMode.FORCE)
        await stopping
        with pytest.raises(Exception, match="conn"):
            await backup
        rig.archive.hold.set()
        await rig.start()
        assert await rig.state() == "SyncReady"


async def test_a_planned_snapshot_whose_log_was_lost_is_forgotten(tmp_path: Path) -> None:
    """The device crashes and writes on differently: the place of the snapshot lies within a pack now."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        device, volume = rig.device, rig.server.volumes[VOL]
        device.permanent_at_once = False
        device.write(0, bytes([1]) * LB)
        device.sync()
        device.write(8, bytes([2]) * LB * 8)
        await rig.until(lambda: volume.candidate is not None)
        planned = device.latest
        device.crash()
        device.write(16, bytes([3]) * LB * 20)
        assert device.latest > planned
        device.sync()
        await rig.until_delivered()
        assert planned not in {piece.lsid_end for piece in rig.pieces}
        assert rig.archive.restore(rig.archive.latest()) == bytes(device.data)
