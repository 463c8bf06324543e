"""Snapshots that must stay: held ones, and those where replicas stand, when operators merge and apply by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.kit.feeder import ArchiveRig, Feed
from tests.kit.gate import gated
from tests.kit.memfs import MemoryFileSystem
from walbd.errors import DiskFailed, RemoteError
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import JobState, Ok

VOL = "vol0"


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=6)
        yield feed


async def hold(feed: Feed, gid: int, reason: str = "audit", until: int = 0) -> None:
    await feed.rig.call(m.AddHold(volume=VOL, gid=gid, reason=reason, until=until))


async def test_nothing_is_applied_past_a_hold_by_hand(feed: Feed) -> None:
    await hold(feed, 3)
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(c.Apply(volume=VOL, gid=4))
    assert (caught.value.remote_code, caught.value.facts["gid"]) == ("refused", 3)
    assert "delete-hold" in caught.value.hint
    assert feed.rig.volume(VOL).base.begin.gid_b == 0
    await feed.rig.done(c.Apply(volume=VOL, gid=3))
    assert 3 in await feed.check()
    await feed.rig.call(m.DeleteHold(volume=VOL, gid=3))
    await feed.rig.done(c.Apply(volume=VOL, gid=4))
    assert await feed.check() == [4, 5, 6]


async def test_an_ended_hold_is_in_nobodys_way(feed: Feed) -> None:
    volume = feed.rig.volume(VOL)
    await volume.save(holds=(m.Hold(gid=2, reason="x", created=0, until=1),))
    await feed.rig.done(c.Apply(volume=VOL, gid=4))


async def test_a_hold_of_what_an_unfinished_apply_has_passed_does_not_stop_it(feed: Feed) -> None:
    volume = feed.rig.volume(VOL)
    base = volume.base.begin_applying(volume.diffs.to_apply(volume.base, 3))
    await volume.save(base=base, holds=(m.Hold(gid=2, reason="x", created=0),))
    await feed.rig.restart()
    await feed.rig.done(c.Apply(volume=VOL, gid=1))
    assert await feed.check() == [3, 4, 5, 6]


async def test_a_hold_and_an_apply_that_begin_together(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either the hold is refused, or the point stays: never a hold of what is just going."""
    await hold(feed, 6, "of before")
    for gid in (2, 6):  # an apply to 4 passes the one and not the other
        with gated(monkeypatch, "archive.record.before_save") as gate:
            adding = asyncio.create_task(hold(feed, gid))
            await gate.wait()
            job = (await feed.rig.call(c.Apply(volume=VOL, gid=4 if gid == 2 else 5))).job
            gate.open.set()
            with pytest.raises(RemoteError, match="apply has just begun"):
                await adding
        assert (await feed.rig.ended(job)).state is JobState.DONE
        assert [(hold.gid, hold.reason) for hold in feed.rig.volume(VOL).record.holds] == [(6, "of before")]
    assert await feed.check() == [5, 6]


async def test_a_replica_where_no_snapshot_is_keeps_nothing(feed: Feed) -> None:
    """It may stand at a generation of another history, which nothing here leads on from."""
    await feed.rig.done(m.Merge(volume=VOL, gid_b=2, gid_e=4))
    row = m.ReplicaPosition(node="a1", address="h:1", gid=3, timestamp=0, seen=0)
    await feed.rig.volume(VOL).save(replicas=(row,))
    await feed.rig.done(m.Merge(volume=VOL, gid_b=1, gid_e=4))
    assert await feed.check() == [0, 1, 4, 5, 6]
    await feed.rig.volume(VOL).save(
        replicas=(m.ReplicaPosition(node="a1", address="h:1", gid=4, timestamp=0, seen=0),)
    )
    with pytest.raises(RemoteError, match="must be kept"):
        await feed.rig.call(m.Merge(volume=VOL, gid_b=1, gid_e=6))


@pytest.mark.parametrize("name", ["archive.merge.before_commit", "archive.merge.after_commit"])
async def test_a_merge_whose_name_is_not_durable_has_not_been(feed: Feed, name: str) -> None:
    """Else the next start would take the merged diff, and what was protected after the failure would be gone."""
    failpoints.arm(f"{name}=eio")
    info = await feed.rig.job(m.Merge(volume=VOL, gid_b=0, gid_e=9))
    assert (info.state, info.error_code) == (JobState.FAILED, "disk-failed")
    await hold(feed, 2)
    await feed.rig.call(m.EnableSnapshot(volume=VOL, gids=[4]))
    await feed.rig.restart()
    assert await feed.check() == list(range(7))
    await feed.rig.done(m.Merge(volume=VOL, gid_b=2, gid_e=4))


async def test_a_wdiff_whose_name_is_not_durable_has_not_come(feed: Feed) -> None:
    failpoints.arm("archive.wdiff.after_commit=eio")
    feed.scribble()
    feed.snapshot()
    with pytest.raises(RemoteError, match="Input/output error"):
        await feed.send()
    await feed.rig.restart()
    assert await feed.rig.points(VOL) == list(range(7))
    assert await feed.send() == [Ok()]
    assert await feed.check() == list(range(8))


async def test_an_error_of_the_disk_at_every_step_of_a_merge_leaves_all_points() -> None:
    """Also one in which nothing works any more until a restart."""
    for left in range(40):
        disk = MemoryFileSystem()
        disk.make_dir(Path("/a0"))
        async with ArchiveRig(Path("/a0"), fs=disk) as rig:
            feed = Feed(rig, size_lb=16)
            await feed.init()
            await feed.full_backup()
            await feed.step(4)
            count = 0

            def fail(left: int = left) -> None:
                nonlocal count
                count += 1
                if count > left:
                    raise DiskFailed("the disk has gone")

            disk.on_change = fail
            info = await rig.job(m.Merge(volume=VOL, gid_b=0, gid_e=9))
            disk.on_change = None
            await rig.restart()
            points = await feed.check()
            assert points in ([0, 1, 2, 3, 4], [0, 4]), points
            if info.state is JobState.DONE and count <= left:
                return
    raise AssertionError("it never ended")
