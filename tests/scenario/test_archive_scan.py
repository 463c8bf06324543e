"""Hashes, scans and scrubs of an archive's images, and the cold images that restores leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.kit.feeder import CONTROL, NOW, ArchiveRig, Feed
from tests.kit.gate import Gate, gated
from tests.kit.memfs import MemoryFileSystem
from walbd.archive import scan as scan_module
from walbd.archive import scrub as scrub_module
from walbd.cli.image import image as image_command
from walbd.daemon.conn import Connection
from walbd.errors import ConnectError, DiskFailed, RemoteError
from walbd.format.compress import Kind as Compression
from walbd.format.compress import decompress
from walbd.format.meta import diff_name
from walbd.format.virtual import VirtualImage
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import End, GetJobs, JobState
from walbd.protocol.transfer import FullChunk, Packing
from walbd.units import KIB, LB, MIB

VOL = "vol0"
BASE = Path("/archive")


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 4, whose base is dirty up to 1."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig, size_lb=600)
        await feed.init()
        feed.scribble(30)
        await feed.full_backup(dirty=1)
        await feed.send()
        await feed.step(3)
        yield feed


@pytest.fixture
async def cold(tmp_path: Path) -> AsyncIterator[Feed]:
    """The same on a disk that shares blocks."""
    fs = MemoryFileSystem()
    fs.shares = True
    fs.make_dir(BASE)
    async with ArchiveRig(BASE, fs=fs) as rig:
        feed = Feed(rig)
        await feed.begin(steps=5)
        yield feed


async def code_of(feed: Feed, request: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(request)
    return caught.value.remote_code


def hash_of(path: Path, bulk_b: int) -> str:
    """What `walbd image hash` says of a file."""
    args = ["hash", str(path), "--algorithm", "murmur3", "--combine", "--chunk", str(bulk_b)]
    return CliRunner().invoke(image_command, args, catch_exceptions=False).output.strip()


def gate_reads(monkeypatch: pytest.MonkeyPatch) -> Gate:
    """Hold the first read of a virtual image."""
    gate = Gate()
    real = VirtualImage.read

    def read(self: VirtualImage, offset_b: int, size_b: int) -> bytes:
        if not gate.open.is_set():
            gate.stand()
        return real(self, offset_b, size_b)

    monkeypatch.setattr(VirtualImage, "read", read)
    return gate


# --- hash


@pytest.mark.parametrize("bulk_b", [512, 64 * KIB, 1536])
async def test_hash_is_that_of_the_restored_image(
    feed: Feed, tmp_path: Path, bulk_b: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "STEP_B", 100 * KIB)
    for gid in (1, 4):
        info = await feed.rig.done(m.BlockHash(volume=VOL, gid=gid, bulk_b=bulk_b))
        path = tmp_path / "image"
        path.write_bytes(feed.images[gid])
        size_b = 600 * LB
        assert info.result == {"hash": hash_of(path, bulk_b), "gid": gid, "size_b": size_b, "bulk_b": bulk_b}
        assert (info.phase, info.done, info.total) == ("hashing", size_b, size_b)


async def test_hash_of_a_dirty_snapshot_and_of_a_part(feed: Feed, tmp_path: Path) -> None:
    base = (tmp_path / VOL / "base.img").read_bytes()
    path = tmp_path / "image"
    path.write_bytes(base)
    info = await feed.rig.done(m.BlockHash(volume=VOL, gid=0))  # |0,1|: the base as it is
    assert info.result["hash"] == hash_of(path, 64 * KIB)
    path.write_bytes(feed.images[4][: 100 * LB])
    for rest in (0, 50):
        info = await feed.rig.done(m.BlockHash(volume=VOL, gid=4, size_lb=100, sleep_percent=rest))
        assert info.result["hash"] == hash_of(path, 64 * KIB)


@pytest.mark.parametrize(("ask", "code"), [({"gid": 9}, "not-reachable"), ({"gid": 4, "size_lb": 601}, "usage")])
async def test_what_cannot_be_read(feed: Feed, ask: dict[str, int], code: str) -> None:
    assert await code_of(feed, m.BlockHash(volume=VOL, **ask)) == code
    assert await code_of(feed, m.VirtFullScan(volume=VOL, **ask)) == code
    assert (await feed.rig.call(GetJobs())).jobs == []


async def test_scan_of_more_files_than_allowed(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, scan_files_max=2) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(3)
        await rig.done(m.BlockHash(volume=VOL, gid=2))
        assert await code_of(feed, m.BlockHash(volume=VOL, gid=3)) == "not-reachable"
        await rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=2))
        await rig.done(m.BlockHash(volume=VOL, gid=3))


async def test_hash_keeps_applies_out_and_lets_the_rest_go_on(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_reads(monkeypatch)
    job = (await feed.rig.call(m.BlockHash(volume=VOL, gid=4))).job
    await gate.wait()
    assert (await feed.rig.status(VOL)).actions == {"Scan": 1}
    assert await code_of(feed, c.Apply(volume=VOL, gid=4)) == "busy"
    await feed.step()
    await feed.rig.done(m.Merge(volume=VOL, gid_b=1, gid_e=99))
    await feed.rig.done(c.Restore(volume=VOL, gid=5))
    await feed.rig.call(c.Resize(volume=VOL, size_b=MIB))
    gate.open.set()
    info = await feed.rig.ended(job)
    assert info.state is JobState.DONE
    assert info.result["size_b"] == 600 * LB
    await feed.rig.done(c.Apply(volume=VOL, gid=5))


async def test_forced_stop_ends_a_hash(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "STEP_B", 64 * KIB)
    gate = gate_reads(monkeypatch)
    job = (await feed.rig.call(m.BlockHash(volume=VOL, gid=4))).job
    await gate.wait()
    stop = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
    gate.open.set()
    assert (await feed.rig.ended(job)).error_code == "force-stopped"
    assert (await feed.rig.ended(stop)).state is JobState.DONE


async def test_scans_have_a_limit_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ArchiveRig(tmp_path, scans_max=1, maintain_max=1, restores_max=1) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(3)
        gate = gate_reads(monkeypatch)
        jobs = [(await rig.call(m.BlockHash(volume=VOL, gid=gid))).job for gid in (1, 2)]
        await gate.wait()
        facts = (await rig.call(c.GetStatus())).server
        assert (facts["scans_running"], facts["scans_waiting"]) == (1, 1)
        await rig.done(c.Restore(volume=VOL, gid=3))
        await rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
        gate.open.set()
        # The second waited, and its generation is gone now.
        states = [(await rig.ended(job)).error_code for job in jobs]
        assert states == ["", "not-reachable"]


# --- virtual full scan


async def scan(feed: Feed, **ask: Any) -> bytes:
    """Take an image as a client does."""
    async with feed.rig.dial(CONTROL) as conn:
        image = bytearray((await conn.call(m.VirtFullScan(volume=VOL, **ask))).size_b)
        while True:
            message, payload = await conn.receive()
            if isinstance(message, End):
                return bytes(image)
            assert isinstance(message, FullChunk)
            if len(payload):
                data: bytes | memoryview = payload
                if message.packing is Packing.LZ4:
                    data = decompress(Compression.LZ4, payload, message.size_b, source="scan", offset=0)
                image[message.offset_b : message.offset_b + message.size_b] = data


async def test_scan_gives_the_image(feed: Feed) -> None:
    for gid in (1, 2, 3, 4):
        assert await scan(feed, gid=gid, bulk_b=512) == feed.images[gid]
    assert await scan(feed, gid=4, size_lb=77) == feed.images[4][: 77 * LB]
    assert await scan(feed, gid=4, sleep_percent=50) == feed.images[4]
    await feed.rig.idle()
    jobs = (await feed.rig.call(GetJobs(volume=VOL))).jobs
    assert [(job.name, job.state) for job in jobs] == [("virt-full-scan", JobState.DONE)] * 6
    assert jobs[0].result["size_b"] == 600 * LB


async def test_running_scan_is_a_job_and_ends_with_its_client(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_reads(monkeypatch)
    async with feed.rig.dial(CONTROL) as conn:
        await conn.call(m.VirtFullScan(volume=VOL, gid=4))
        await gate.wait()
        (job,) = (await feed.rig.call(GetJobs(volume=VOL))).jobs
        assert (job.name, job.state, job.phase, job.total) == (
            "virt-full-scan",
            JobState.RUNNING,
            "sending",
            600 * LB,
        )
        assert await code_of(feed, c.Apply(volume=VOL, gid=4)) == "busy"
        conn.abort()
    gate.open.set()
    info = await feed.rig.ended(job.job)
    await feed.rig.settled()
    assert (info.state, info.error_code) in {(JobState.FAILED, ConnectError.code), (JobState.DONE, "")}
    await feed.rig.done(c.Apply(volume=VOL, gid=4))


async def drain(conn: Connection) -> None:
    """Take messages until the stream ends or breaks."""
    while not isinstance((await conn.receive()).message, End):
        pass


async def test_forced_stop_ends_a_scan(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = gate_reads(monkeypatch)
    async with feed.rig.dial(CONTROL) as conn:
        await conn.call(m.VirtFullScan(volume=VOL, gid=4))
        await gate.wait()
        stop = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
        await asyncio.sleep(0)
        gate.open.set()
        with pytest.raises(RemoteError) as caught:
            await drain(conn)
        assert caught.value.remote_code == "force-stopped"
        conn.abort()
    assert (await feed.rig.ended(stop)).state is JobState.DONE


# --- scrub


async def test_scrub_of_what_is_good(feed: Feed) -> None:
    info = await feed.rig.done(m.Scrub(volume=VOL))
    diffs = feed.rig.volume(VOL).diffs
    assert (info.result["wdiffs"], info.result["wdiffs_b"]) == (len(diffs), diffs.size_b)
    assert (info.result["images"], info.result["images_b"]) == (1, 600 * LB)
    assert (info.result["damaged"], info.result["damaged_files"]) == (0, "")
    assert (await feed.rig.status(VOL)).verified == NOW
    await feed.rig.restart()
    assert (await feed.rig.status(VOL)).verified == NOW
    assert (VOL, "Scrub", 0, NOW) in (await feed.rig.call(c.GetActions())).rows


async def test_scrub_names_damage_and_removes_nothing(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = feed.rig
    await rig.done(m.Scrub(volume=VOL))
    rig.env.clock.time_s += 50  # type: ignore[attr-defined]
    paths = [rig.base / VOL / diff_name(diff) for diff in rig.volume(VOL).diffs]
    flipped, cut, gone = paths[0], paths[1], paths[2]
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-100])
    gone.unlink()

    def broken(*_args: Any) -> Any:
        raise DiskFailed("cannot read: Input/output error", path="base.img")

    with monkeypatch.context() as patch:
        patch.setattr(scrub_module, "_read", broken)
        info = await rig.done(m.Scrub(volume=VOL))
    assert info.result["damaged"] == 4
    assert str(info.result["damaged_files"]).endswith(", base image")
    assert "base image" in (await rig.status(VOL)).error
    info = await rig.done(m.Scrub(volume=VOL))
    assert info.result["damaged"] == 3
    assert info.result["damaged_files"] == ", ".join(path.name for path in (flipped, cut, gone))
    status = await rig.status(VOL)
    assert status.verified == NOW  # of the good one
    for path in (flipped, cut, gone):
        assert path.name in status.error
    assert flipped.exists()
    assert cut.exists()
    await rig.stopped(VOL)
    assert (await rig.done(m.Scrub(volume=VOL))).result["damaged"] == 3


async def test_scrub_passes_over_what_is_merged_meanwhile(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(monkeypatch, "archive.record.after_save") as gate:  # where the scrub notes that it begins
        job = (await feed.rig.call(m.Scrub(volume=VOL))).job
        await gate.wait()
        assert await code_of(feed, m.Scrub(volume=VOL)) == "busy"
        gate.open.set()
        await feed.rig.done(m.Merge(volume=VOL, gid_b=1, gid_e=99))
        await feed.rig.done(c.Apply(volume=VOL, gid=4))
        info = await feed.rig.ended(job)
    assert (info.state, info.result["damaged"]) == (JobState.DONE, 0)


# --- cold images


async def colds(feed: Feed) -> list[int]:
    gids = (await feed.rig.call(m.GetCold(volume=VOL))).gids
    volume = feed.rig.volume(VOL)
    assert volume.place.images.colds(VOL) == gids == (await feed.rig.status(VOL)).cold
    return gids


async def keep(feed: Feed, *gids: int) -> None:
    for gid in gids:
        assert await feed.rig.restored_image(VOL, gid) == feed.images[gid]


async def test_restores_leave_cold_images_and_start_from_them(cold: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    await keep(cold, 2, 4)
    assert await colds(cold) == [2, 4]
    volume = cold.rig.volume(VOL)
    assert volume.record.colds == {"2": NOW + 2, "4": NOW + 4}
    sources: list[int | None] = []
    real = type(volume.place.images).clone_base

    def clone_base(*args: Any, cold: int | None = None) -> Any:
        sources.append(cold)
        return real(*args, cold=cold)

    monkeypatch.setattr(type(volume.place.images), "clone_base", clone_base)
    await keep(cold, 1, 2, 3, 4, 5)
    assert sources == [None, 2, 2, 4, 4]
    await cold.rig.restart()
    assert await colds(cold) == [1, 2, 3, 4, 5]
    await cold.check()


async def test_scans_start_from_cold_images(cold: Feed) -> None:
    await keep(cold, 3)
    volume = cold.rig.volume(VOL)
    fs = volume.place.env.fs
    with fs.open(BASE / VOL / "base.img", write=True) as file:
        file.pwrite(b"damage" * 100, 0)  # nothing that begins at 3 looks at it
    assert await scan(cold, gid=4) == cold.images[4]
    assert await scan(cold, gid=3) == cold.images[3]
    assert await scan(cold, gid=2) != cold.images[2]


async def test_cold_image_outlasts_merges_over_it(cold: Feed) -> None:
    await keep(cold, 2)
    await cold.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
    assert [str(diff) for diff in cold.rig.volume(VOL).diffs] == ["|0|-->|5|"]
    assert await colds(cold) == [2]
    await keep(cold, 5)


async def test_cold_image_of_a_smaller_volume(cold: Feed) -> None:
    await keep(cold, 3)
    await cold.rig.call(c.Resize(volume=VOL, size_b=100 * LB))
    for gid in (3, 4):
        data = await cold.rig.restored_image(VOL, gid)
        assert data == cold.images[gid] + bytes(36 * LB)
    assert await scan(cold, gid=4) == cold.images[4] + bytes(36 * LB)


async def test_apply_removes_cold_images_up_to_the_new_base(cold: Feed) -> None:
    await keep(cold, 1, 2, 4)
    await cold.rig.done(c.Apply(volume=VOL, gid=2))
    assert await colds(cold) == [4]
    assert await cold.check() == [2, 3, 4, 5]


async def test_cold_start_while_an_apply_is_unfinished(cold: Feed) -> None:
    """Below its target only a cold image helps, and it does."""
    await keep(cold, 2)
    volume = cold.rig.volume(VOL)
    diffs = volume.diffs.to_apply(volume.base, 4)
    await volume.save(base=volume.base.begin_applying(diffs))
    assert await code_of(cold, c.Restore(volume=VOL, gid=1)) == "not-reachable"
    await keep(cold, 2, 3)
    await cold.rig.done(c.Apply(volume=VOL, gid=1))
    assert str(volume.base) == "<|4|>"
    assert await colds(cold) == []


async def test_delete_cold(cold: Feed) -> None:
    await keep(cold, 2, 3)
    assert await code_of(cold, m.DelCold(volume=VOL, gid=1)) == "not-found"
    await cold.rig.call(m.DelCold(volume=VOL, gid=2))
    assert await colds(cold) == [3]
    failpoints.arm("archive.cold.before_remove=eio")
    assert await code_of(cold, m.DelCold(volume=VOL, gid=3)) == "disk-failed"
    volume = cold.rig.volume(VOL)
    assert (volume.record.colds, volume.place.images.colds(VOL)) == ({}, [3])
    await cold.rig.restart()
    assert await colds(cold) == []


async def test_keep_only_the_newest_cold_image() -> None:
    fs = MemoryFileSystem()
    fs.shares = True
    fs.make_dir(BASE)
    async with ArchiveRig(BASE, fs=fs, keep_one_cold=True) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(4)
        await keep(feed, 2)
        await keep(feed, 4)
        assert await colds(feed) == [4]
        await keep(feed, 1)
        assert await colds(feed) == [4]


async def test_start_makes_record_and_cold_images_agree(cold: Feed) -> None:
    await keep(cold, 2, 3)
    volume = cold.rig.volume(VOL)
    volume.place.images.remove_cold(VOL, 2)
    await volume.save(colds={"2": 5})
    await cold.rig.restart()
    assert await colds(cold) == []
    assert await cold.check() == list(range(6))


async def test_reset_and_clear_remove_cold_images(cold: Feed) -> None:
    await keep(cold, 2)
    await cold.rig.stopped(VOL)
    await cold.rig.call(c.ResetVol(volume=VOL))
    assert cold.rig.server.place.images.colds(VOL) == []
    await cold.full_backup()
    await cold.step(2)
    await keep(cold, 1)
    await cold.rig.stopped(VOL)
    await cold.rig.call(c.ClearVol(volume=VOL))
    assert cold.rig.server.place.images.colds(VOL) == []


async def test_scrub_reads_cold_images(cold: Feed) -> None:
    await keep(cold, 2, 3)
    info = await cold.rig.done(m.Scrub(volume=VOL))
    assert (info.result["images"], info.result["damaged"]) == (3, 0)


async def test_disks_that_do_not_share_have_no_cold_images(feed: Feed, tmp_path: Path) -> None:
    feed.rig.env.fs.clone = lambda source, target: False  # type: ignore[method-assign]
    await keep(feed, 2)
    assert await colds(feed) == []
    assert not (tmp_path / VOL / "cold").exists()
