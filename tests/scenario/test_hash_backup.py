"""Hash backup of a whole group in one process: storage, proxy and archive."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import pytest

from tests.kit.backup_rig import BackupRig
from tests.kit.storage_rig import VOL
from walbd.daemon import hash_sync
from walbd.daemon.conn import Connection
from walbd.errors import RemoteError
from walbd.format.meta import Snapshot
from walbd.fs import failpoints
from walbd.ids import NO_GID, Gid
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobState
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupAccepted
from walbd.units import KIB, LB


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen ranges in the volume of a megabyte."""
    monkeypatch.setattr(hash_sync, "RANGE_B", 64 * KIB)
    monkeypatch.setattr(hash_sync, "PACK_B", 64 * KIB)


async def scanning(rig: BackupRig) -> None:
    await rig.storage.until(lambda: rig.storage.server.volumes[VOL].monitored, "the scan")


async def to_sync_ready(rig: BackupRig) -> None:
    """Stop the volume, and give up its log."""
    if await rig.storage.state() == "Target":
        await rig.storage.stop_volume()
    if await rig.storage.state() == "Stopped":
        await rig.storage.call(c.ResetVol(volume=VOL))


@pytest.mark.parametrize("bulk_b", [512, 4 * KIB, 256 * KIB])
@pytest.mark.parametrize("packing", ["lz4", "none"])
async def test_a_lost_log_is_bridged(tmp_path: Path, bulk_b: int, packing: str) -> None:
    """Overflow, then a hash backup: old restore points stay, new ones come, with the gap between them told."""
    rig = BackupRig(tmp_path, ring_pb=2048, size_lb=2048 + 3)
    rig.storage.options["backup_packing"] = packing
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        rig.device.scribble(10)
        old, old_image = await rig.snapshot()
        await rig.overflow()
        await to_sync_ready(rig)
        rig.device.scribble(5)
        info = await rig.hash_backup(bulk_b=bulk_b)
        assert info.state is JobState.DONE, info
        assert await rig.storage.state() == "Target"
        gid = int(info.result["gid"] or 0)
        assert gid > old + 1
        assert 0 < int(info.result["differing_b"] or 0) <= len(rig.device.data)
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)
        assert await rig.image(old) == old_image
        rig.device.scribble(10)
        new, image = await rig.snapshot()
        assert await rig.image(new) == image
        (gap,) = (await rig.archive.call(m.GetGaps(volume=VOL))).gaps
        assert (gap.gid_b, gap.gid_e, gap.cause) == (old, gid, "hash-backup")
        await rig.archive.done(c.Apply(volume=VOL, gid=new))
        assert await rig.image(new) == image


async def test_a_lost_snapshot_never_comes_back_with_other_contents(tmp_path: Path) -> None:
    """Its generation was answered, but its log was lost: whoever asks for it must hear that it is not there."""
    rig = BackupRig(tmp_path)
    async with rig.running():
        await rig.full_backup()
        kept, _ = await rig.snapshot()
        await rig.proxy.crash()
        lost = 0
        for _ in range(3):
            rig.device.scribble(3)
            lost = (await rig.storage.call(c.TakeSnapshot(volume=VOL))).gid
        await to_sync_ready(rig)  # the log is given up, and with it these snapshots
        await rig.proxy.up()
        gid = await rig.done_hash_backup()
        rig.device.scribble(3)
        new, image = await rig.snapshot()
        assert await rig.image(new) == image
        assert kept < lost < gid < new
        gids = [point.gid for point in rig.archive.server.volumes[VOL].restorable(all_points=True)]
        assert not [known for known in gids if kept < known <= lost]


async def test_generations_given_out_elsewhere_are_passed_over(tmp_path: Path) -> None:
    rig = BackupRig(tmp_path)
    async with rig.running():
        await rig.full_backup()
        await to_sync_ready(rig)
        with pytest.raises(RemoteError) as caught:
            await rig.hash_backup(gid_past=1 << 63)
        assert caught.value.message == "no generation is left"
        assert await rig.storage.state() == "SyncReady"
        assert await rig.done_hash_backup(gid_past=1000) == 1002  # it begins at 1001
        assert (await rig.storage.call(c.GetStatus(volume=VOL))).volumes[0].gid_greatest >= 1002
        rig.device.scribble(3)
        new, image = await rig.snapshot()
        assert await rig.image(new) == image
        await to_sync_ready(rig)
        assert (await rig.storage.call(c.GetStatus(volume=VOL))).volumes[0].gid_greatest >= new
        assert await rig.done_hash_backup(gid_past=7) > new  # what it knows itself counts, too


async def test_nothing_differs(tmp_path: Path) -> None:
    rig = BackupRig(tmp_path)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        gid, image = await rig.snapshot()
        await to_sync_ready(rig)
        info = await rig.hash_backup()
        assert info.state is JobState.DONE, info
        assert info.result["differing_b"] == 0
        assert int(info.result["wire_b"] or 0) < 5000
        await rig.until_archived(int(info.result["gid"] or 0))
        assert await rig.image(int(info.result["gid"] or 0)) == await rig.image(gid) == image


async def test_writes_during_the_scan(tmp_path: Path) -> None:
    """They are sent meanwhile, and wait at the proxy until the archive has the backup."""
    rig = BackupRig(tmp_path, size_lb=16 * 1024, ring_pb=1 << 17)
    rig.device.scribble(50)
    async with rig.running():
        await rig.full_backup()
        await rig.snapshot()
        await to_sync_ready(rig)
        rig.device.scribble(50)
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=1))
        job = await rig.begin_hash_backup()
        await scanning(rig)
        assert await rig.storage.state() == "HashSync"
        assert await rig.archive.state(VOL) == "HashSync"
        await rig.storage.until(lambda: rig.storage.server.jobs.get(job).info().done > 0, "progress")
        (info,) = [info for info in (await rig.storage.call(GetJobs())).jobs if info.job == job]
        assert (info.phase, info.done, info.total) == ("comparing", 64 * KIB, 8 << 20)
        rig.device.scribble(50)
        await rig.storage.until(lambda: rig.proxy.volume.hop("a0").diffs, "a diff during the scan")
        with pytest.raises(RemoteError) as caught:
            await rig.storage.call(c.TakeSnapshot(volume=VOL))
        assert caught.value.remote_code == "busy"
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=0))  # a running scan obeys at once
        writing = True

        async def write() -> None:
            while writing:
                rig.device.scribble(1)
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(write())
            info = await rig.storage.job(job)
            writing = False
        assert info.state is JobState.DONE, info
        rig.device.scribble(5)
        gid, image = await rig.snapshot()
        assert await rig.image(gid) == image


@pytest.mark.parametrize("why", ["state", "archive-state", "larger", "down", "device-down", "applying"])
async def test_refused_before_the_reset(tmp_path: Path, why: str) -> None:
    """The storage is SyncReady with the log that it had."""
    rig = BackupRig(tmp_path)
    async with rig.running():
        if why != "archive-state":
            await rig.full_backup()
            await rig.snapshot()
            if why != "state":
                await to_sync_ready(rig)
        await rig.archive.settled()
        code, undo = "bad-state", ExitStack()
        if why == "larger":
            code = "refused"
            await rig.storage.call(c.Resize(volume=VOL, size_b=4096 * LB))
        elif why == "down":
            code = "connect"
            await rig.archive.crash()
        elif why == "device-down":
            code = "connect"
            rig.device.go_down()
        elif why == "applying":
            code = "busy"
            undo.enter_context(rig.archive.volume(VOL).machine.action("Apply", 1))
        state, uuid = await rig.storage.state(), rig.device.uuid
        record = rig.storage.server.volumes[VOL].record
        with pytest.raises(RemoteError) as caught:
            await rig.storage.call(c.HashBackup(volume=VOL))
        assert caught.value.remote_code == code
        undo.close()
        assert await rig.storage.state() == state
        assert rig.device.uuid == uuid
        assert rig.storage.server.volumes[VOL].record == record


@pytest.mark.parametrize("how", ["force-storage", "force-archive", "overflow", "kill-storage", "kill-archive"])
async def test_cut_short_and_done_again(tmp_path: Path, how: str) -> None:
    """Storage SyncReady, archive Archived at its old snapshot; the next attempt begins over and succeeds."""
    rig = BackupRig(tmp_path, ring_pb=1024)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        old, old_image = await rig.snapshot()
        await to_sync_ready(rig)
        rig.device.scribble(5)
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=1))
        job = await rig.begin_hash_backup()
        await scanning(rig)
        if how == "force-storage":
            await rig.storage.stop_volume(c.StopHow.FORCE)
        elif how == "force-archive":
            await rig.archive.job(c.Stop(volume=VOL, how=c.StopHow.FORCE))
            assert await rig.archive.state(VOL) == "Stopped"
            await rig.archive.call(c.Start(volume=VOL))
        elif how == "overflow":
            await rig.proxy.crash()
            while not rig.device.overflow:
                rig.device.scribble(20)
            await rig.storage.until(lambda: rig.storage.server.volumes[VOL].lost is not None)
            await rig.storage.call(c.SetFullScanBps(bytes_per_s=0))
            await rig.proxy.up()
        elif how == "kill-storage":
            await rig.storage.restart()
        else:
            await rig.archive.restart()
        if how != "kill-storage":
            info = await rig.storage.job(job)
            assert info.state is JobState.FAILED, info
            code = {"force-storage": "force-stopped", "overflow": "wlog-overflow"}.get(how)
            assert code in (None, info.error_code)
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=0))
        assert await rig.storage.state() == "SyncReady"
        volume = rig.archive.volume(VOL)
        await rig.storage.until(lambda: rig.archive.volume(VOL).machine.at_rest, "the archive to give up")
        assert str(volume.machine.state) == "Archived"
        assert volume.latest.begin.gid_b == old
        rig.device.scribble(5)
        gid = await rig.done_hash_backup()
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)
        assert await rig.image(old) == old_image


@pytest.mark.parametrize(
    "point",
    [
        "storage.backup.after_accept",
        "storage.reset.before_wal",
        "storage.reset.after_wal",
        "storage.record.before_save",
        "storage.record.after_save",
        "storage.backup.after_reset",
        "storage.backup.before_end",
        "storage.queue.before_save",
        "storage.backup.after_done",
        "archive.hash.after_accept",
        "archive.hash.mid_scan",
        "archive.hash.before_commit",
        "archive.hash.before_done",
        "archive.wdiff.before_commit",
        "archive.wdiff.after_commit",
    ],
)
async def test_a_failure_at_each_step(tmp_path: Path, point: str) -> None:
    """Whatever had happened, it is enough to run another hash backup."""
    rig = BackupRig(tmp_path)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        old, old_image = await rig.snapshot()
        await to_sync_ready(rig)
        rig.device.scribble(5)
        failpoints.arm(f"{point}=eio")
        try:
            assert (await rig.hash_backup()).state is JobState.FAILED
        except RemoteError:
            assert point in ("storage.backup.after_accept", "archive.hash.after_accept")
        assert not failpoints._armed
        assert await rig.storage.state() == "SyncReady"
        await rig.storage.until(lambda: rig.archive.volume(VOL).machine.at_rest, "the archive to give up")
        rig.device.scribble(5)
        gid = await rig.done_hash_backup()
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)
        assert await rig.image(old) == old_image
        await rig.archive.restart()
        assert await rig.image(gid) == bytes(rig.device.data)


@pytest.mark.parametrize("point", ["archive.record.after_save", "storage.backup.after_done"])
async def test_a_lost_full_backup_is_continued_by_a_hash_backup(tmp_path: Path, point: str) -> None:
    """The archive has it and the storage does not know: nothing has to be copied again."""
    rig = BackupRig(tmp_path)
    rig.device.scribble(30)
    async with rig.running():
        if point.startswith("storage"):
            failpoints.arm(f"{point}=eio")
            assert (await rig.storage.full_backup()).state is JobState.FAILED
        else:
            await rig.full_backup()
            await rig.snapshot()
            await to_sync_ready(rig)
        assert await rig.storage.state() == "SyncReady"
        assert str(rig.archive.volume(VOL).machine.state) == "Archived"
        with pytest.raises(RemoteError) as caught:
            await rig.ask(c.FullBackup(volume=VOL))
        assert caught.value.remote_code == "bad-state"
        rig.device.scribble(3)
        info = await rig.hash_backup(bulk_b=512)
        assert info.state is JobState.DONE, info
        assert int(info.result["differing_b"] or 0) < len(rig.device.data) // 4
        gid = int(info.result["gid"] or 0)
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)


async def test_after_standby(tmp_path: Path) -> None:
    """A volume that stood by has no history; a hash backup gives it one."""
    rig = BackupRig(tmp_path)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        await rig.snapshot()
        await to_sync_ready(rig)
        await rig.storage.start_volume(c.Role.STANDBY)
        rig.device.scribble(10)
        await rig.storage.stop_volume()
        assert await rig.storage.state() == "SyncReady"
        gid = await rig.done_hash_backup()
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)


async def test_a_device_that_grew(tmp_path: Path) -> None:
    rig = BackupRig(tmp_path, auto_resize=True)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        await rig.snapshot()
        await to_sync_ready(rig)
        await rig.storage.call(c.Resize(volume=VOL, size_b=4096 * LB))
        rig.device.scribble(30)
        gid = await rig.done_hash_backup()
        await rig.until_archived(gid)
        assert await rig.image(gid) == bytes(rig.device.data)
        assert len(rig.device.data) == 4096 * LB


@pytest.mark.parametrize(
    "answer",
    [
        BackupAccepted(),
        BackupAccepted(latest=Snapshot.clean(3)),  # an image of no size
        BackupAccepted(latest=Snapshot.clean(3), size_lb=100),
        BackupAccepted(latest=Snapshot(Gid(3), Gid(1 << 63)), size_lb=2048),
        BackupAccepted(latest=Snapshot.clean(NO_GID), size_lb=2048),
    ],
)
async def test_an_archive_that_cannot_compare(tmp_path: Path, answer: BackupAccepted) -> None:
    """Its answer makes no sense: the log is not thrown away for it."""
    rig = BackupRig(tmp_path)

    async def accept(conn: Connection, _offer: HashBackupOffer) -> None:
        await conn.send(answer)
        await conn.receive()

    async with rig.running():
        cast(Any, rig.archive.server._server._handlers)[HashBackupOffer] = accept
        uuid = rig.device.uuid
        with pytest.raises(RemoteError) as caught:
            await rig.begin_hash_backup()
        assert caught.value.remote_code == "remote-protocol"
        assert rig.device.uuid == uuid
        assert await rig.storage.state() == "SyncReady"


async def test_a_graceful_stop_waits_for_the_backup(tmp_path: Path) -> None:
    rig = BackupRig(tmp_path)
    rig.device.scribble(30)
    async with rig.running():
        await rig.full_backup()
        await rig.snapshot()
        await to_sync_ready(rig)
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=1))
        job = await rig.begin_hash_backup()
        await scanning(rig)
        stop = (await rig.storage.call(c.Stop(volume=VOL))).job
        await rig.storage.call(c.SetFullScanBps(bytes_per_s=0))
        assert (await rig.storage.job(job)).state is JobState.DONE
        assert (await rig.storage.job(stop)).state is JobState.DONE
        assert await rig.storage.state() == "Stopped"
        await rig.storage.start_volume()
        gid, image = await rig.snapshot()
        assert await rig.image(gid) == image
