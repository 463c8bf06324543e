"""Work of an archive that begins in the middle of other work, or goes on after a save has failed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.kit.feeder import CONTROL, ArchiveRig, Feed
from tests.kit.gate import Gate, gated
from tests.kit.hash_feed import HashFeed
from tests.kit.policy_rig import VirtualArchive
from tests.kit.replicas import VOL, Group
from tests.kit.virtual import run
from walbd.archive import replicate_out
from walbd.archive.virtual import open_virtual
from walbd.archive.volume import Volume
from walbd.archive.wdiff_sink import WdiffSink
from walbd.daemon.env import Pool
from walbd.errors import RemoteError
from walbd.format.virtual import VirtualImage
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import End, Filler, JobState, Ok
from walbd.protocol.codec import decode
from walbd.protocol.maintenance import ForgetReplica, Merge
from walbd.protocol.sync import ReplicateLatest, ReplicateOffer
from walbd.protocol.transfer import Verdict
from walbd.units import LB


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    async with Group(tmp_path) as group:
        yield group


async def until(condition: Callable[[], bool]) -> None:
    """Return when it is true: for what tells nobody that it waits."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_save_beside_the_wdiff_that_brings_a_history(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is saved while the wdiff gets its name was read before: it must not bring the old history back."""
    feed = await group.feed()
    await feed.step(2)
    volume = group.volume(0)
    hold = m.AddHold(volume=VOL, gid=1, reason="audit")
    with gated(monkeypatch, "archive.wdiff.before_commit") as naming:
        backup = asyncio.create_task(feed.hash_backup())
        await naming.wait()
        with gated(monkeypatch, "archive.record.before_save") as saving:
            other = asyncio.create_task(group[0].call(hold))
            await saving.wait()
            naming.open.set()
            await until(lambda: bool(volume._lock._waiters))  # the backup wants to save, too
        await backup
        await other
    for _ in range(2):
        record = group.volume(0).record
        assert (record.uuid, record.pending, len(record.gaps)) == (feed.uuid.hex(), None, 1)
        assert [row.gid for row in record.holds] == [1]
        await group[0].restart()
    assert all(isinstance(word, Ok) for word in await feed.send())


async def test_nothing_is_taken_before_a_save_that_failed_is_made_up_for(group: Group) -> None:
    """The disk may say SyncReady, and a start would remove what was taken after that."""
    await group.feed()
    feed = await group.feed(1, seed=4)
    await feed.step()
    failpoints.arm("archive.record.after_save=eio")
    assert (await group.failing(0, 1, resync=True)).error_code == "disk-failed"
    assert await group[1].state(VOL) == "Archived"
    await feed.step(2)
    await group[1].restart()
    assert await group.check(feed, 1) == [0, 1, 2, 3]


async def test_a_round_that_waits_keeps_no_wdiffs_of_others_waiting(tmp_path: Path) -> None:
    async with Group(tmp_path, wdiffs_max=1) as group:
        feed = await group.feed()
        await group.init(1)
        await group.replicate(0, 1)
        await feed.step(2)
        await group[0].done(c.Apply(volume=VOL, gid=2))
        other = Feed(group[1], name="vol1", seed=8)
        await other.init()
        await other.full_backup()
        machine = group.volume(1).machine
        with machine.action("Apply", 0):
            number = (await group[0].call(group.request(1))).job
            await until(lambda: bool(machine.changed._waiters))
            async with asyncio.timeout(60):
                await other.step()
        assert (await group[0].ended(number)).state is JobState.DONE
        assert await group.check(feed, 1) == [0, 2]


async def test_an_image_that_grows_while_a_hash_backup_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The storage compares as much as the archive does: what was there when the image was opened."""
    async with ArchiveRig(tmp_path) as rig:
        feed = HashFeed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(2)
        feed.lose()
        gate, real = Gate(), WdiffSink.open

        def slow(sink: WdiffSink) -> None:
            gate.stand()
            real(sink)

        monkeypatch.setattr(WdiffSink, "open", slow)
        backup = asyncio.create_task(feed.hash_backup())
        await gate.wait()
        await rig.call(c.Resize(volume=VOL, size_b=96 * LB))
        gate.open.set()
        await backup
        monkeypatch.undo()
        assert all(isinstance(word, Ok) for word in await feed.send())
        assert (await feed.check())[-1] == feed.gid


async def test_a_comparison_with_a_larger_image_that_has_data_there(group: Group) -> None:
    """The volume is smaller now: nothing of what the abandoned history had behind its end may be left."""
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await group[1].call(c.Resize(volume=VOL, size_b=96 * LB))
    uuid = feed.uuid
    larger = Feed(group[1], seed=9, size_lb=96)
    larger.image[: 64 * LB] = feed.image
    larger.uuid = uuid
    larger.write(60, 36)
    larger.snapshot()
    assert await larger.send() == [Ok()]
    await feed.hash_backup()
    await feed.send()
    await feed.step(3)
    await group.replicate(0, 1)
    points = await group[1].points(VOL)
    image = await group[1].restored_image(VOL, points[-1])
    assert image[: 64 * LB] == feed.image
    assert not any(image[64 * LB :])


async def test_a_dirty_diff_that_begins_below_a_comparison(group: Group) -> None:
    """It holds a hash backup that was compared with another image than the destination had there.

    So it must not be used from that image on, but only from where the destination stands.
    """
    feed = await group.feed(dirty=3)
    await group.init(1)
    await group.replicate(0, 1)
    start = bytes(feed.image)
    base = group.volume(0).base.begin
    assert not base.is_clean
    # The destination alone gets a wdiff of the old history, whose writes are then undone.
    old = Feed(group[1], seed=9)
    old.uuid, old.gid = feed.uuid, base.gid_b
    old.image[:] = start
    old.write(0, 64)
    old.snapshot()
    assert await old.send() == [Ok()]
    assert not group.volume(1).latest.begin.is_clean
    await feed.hash_backup()
    await feed.step(2)
    await group.replicate(0, 1)
    assert any(diff.comp for diff in group.volume(1).diffs)
    await group[0].call(ForgetReplica(volume=VOL, node="a1"))
    await feed.step(2)
    await group[0].done(Merge(volume=VOL, gid_b=0, gid_e=99))
    assert len(group.volume(0).diffs) == 1
    await group.replicate(0, 1)
    assert group.volume(1).latest == group.volume(0).latest
    assert await group[1].restored_image(VOL, feed.gid) == bytes(feed.image)
    assert await group[1].points(VOL) == [5, 7, 9]  # nothing that could be restored has gone


async def test_wdiffs_of_another_history_are_held_while_a_replication_may_bring_it(group: Group) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step()
    await feed.hash_backup()
    await feed.send()
    uuid = group.volume(1).record.archive_uuid
    async with group.as_source(1) as conn:
        await conn.call(ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=bytes.fromhex(uuid)))
        await conn.call(ReplicateLatest())
        assert await feed.send_to(group[1], -1) == [Verdict.NOT_READY]
    machine = group.volume(1)
    async with asyncio.timeout(60):
        await machine.machine.changed.wait_for(lambda: not machine.replications)
    assert await feed.send_to(group[1], -1) == [Verdict.DIFFERENT_UUID]


async def test_the_target_of_a_comparison_is_merged_away(group: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = await group.feed(dirty=2)
    await group.init(1)
    await group.replicate(0, 1)
    old = Feed(group[1], seed=9)
    old.uuid, old.image[:] = feed.uuid, feed.image
    old.scribble()
    old.snapshot()
    assert await old.send() == [Ok()]
    await feed.hash_backup()
    await feed.step(4)
    opened: list[int] = []

    @asynccontextmanager
    async def merged(volume: Volume, gid: int, pool: Pool) -> AsyncIterator[VirtualImage]:
        opened.append(gid)
        if len(opened) == 1:
            await group[0].done(Merge(volume=VOL, gid_b=3, gid_e=7))
        async with open_virtual(volume, gid, pool) as image:
            yield image

    monkeypatch.setattr(replicate_out, "open_virtual", merged)
    await group.replicate(0, 1)
    assert len(opened) == 2
    assert group.volume(1).latest == group.volume(0).latest
    assert await group[1].restored_image(VOL, feed.gid) == bytes(feed.image)


def test_who_waits_for_a_scan_is_told_that_we_are_still_there() -> None:
    async def main() -> None:
        async with VirtualArchive(scans_max=1) as rig:
            feed = Feed(rig)
            await feed.init()
            await feed.full_backup()
            async with rig.dial(CONTROL) as conn:
                with rig.server._scans.turn() as turn:
                    await turn.comes()
                    await conn.send(m.VirtFullScan(volume=VOL, gid=0))
                    frame = await conn._stream.receive()
                    assert frame is not None
                    assert isinstance(decode(frame.header), Filler)
                assert (await conn.expect(m.ScanBegin)).size_b == feed.size_lb * LB
                while not isinstance((await conn.receive()).message, End):
                    pass

    run(main())


async def test_flags_that_change_after_an_old_name_could_not_be_removed(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = await group.feed()
    await feed.step(3)
    failpoints.arm("archive.snapshot.before_unlink=eio")
    with pytest.raises(RemoteError):
        await group[0].call(m.EnableSnapshot(volume=VOL, gids=[1]))
    await group[0].call(m.DisableSnapshot(volume=VOL, gids=[1]))
    assert [diff.flags for diff in group.volume(0).diffs] == ["M-"] * 3
    await group[0].restart()
    assert [diff.flags for diff in group.volume(0).diffs] == ["M-"] * 3
    await group.check(feed, 0)


async def test_sync_ready_by_hand_forgets_all_of_the_old_history(group: Group) -> None:
    feed = await group.feed()
    await group.init(1)
    await group.replicate(0, 1)
    await group[0].call(m.AddHold(volume=VOL, gid=0, reason="audit"))
    await group[0].stopped(VOL)
    await group[0].call(m.DbgSetState(volume=VOL, state="SyncReady"))
    await feed.full_backup()
    record = group.volume(0).record
    assert (record.holds, record.replicas, record.gaps) == ((), (), ())


async def test_wdiffs_that_are_read_back_leave_threads_to_reception(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes long for large ones, and there are few threads for reception."""
    async with ArchiveRig(tmp_path) as rig:
        feeds = [Feed(rig, name=f"v{number}", seed=number) for number in range(4)]
        for feed in feeds:
            await feed.init()
            await feed.full_backup()
        gate, real = Gate(), WdiffSink.finish
        standing = iter(range(4))

        def slow(sink: WdiffSink) -> None:
            if next(standing) == 3:
                gate.stand()
            assert gate.open.wait(120)
            real(sink)

        monkeypatch.setattr(WdiffSink, "finish", slow)
        async with asyncio.TaskGroup() as tasks:
            for feed in feeds:
                tasks.create_task(feed.step())
            await gate.wait()
            other = Feed(rig, name="v9", seed=9)
            await other.init()
            async with asyncio.timeout(60):
                await other.full_backup()
            gate.open.set()
        monkeypatch.undo()
        for feed in feeds:
            assert await feed.check() == [0, 1]
