"""A wdiff file is lost, and the volume goes on by comparing: what was beyond must not be taken for its past."""

from __future__ import annotations

from pathlib import Path

from tests.kit.memfs import MemoryFileSystem
from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.format.meta import diff_name
from walbd.protocol import control as c
from walbd.units import LB

BASE = Path("/")


def disk_for(name: str) -> MemoryFileSystem:
    disk = MemoryFileSystem()
    disk.shares = True  # so that restores leave cold images
    disk.make_dir(BASE / name)
    return disk


async def lose_newest(group: Group, number: int, feed: TwoFeeds) -> bytes:
    """Lose the newest wdiff, of whose snapshot there is a cold image; return what the volume was before it.

    The device is as it was then, but for one block: what the lost wdiff wrote was written over.
    """
    before = bytes(feed.image)
    feed.write(0, 8)
    feed.snapshot()
    words = await feed.send_to(group[number], -1)
    assert words
    gid = feed.gid
    await group[number].restored_image(VOL, gid)
    volume = group.volume(number)
    assert list(volume.record.colds) == [str(gid)]
    await group[number].crash()
    newest = next(diff for diff in volume.diffs if diff.end.gid_b == gid)
    group[number].env.fs.unlink(volume.directory / diff_name(newest))
    await group[number].up()
    assert group.volume(number).latest.begin.gid_b == gid - 1
    feed.image[:] = before
    feed.write(20, 1)
    return before


async def test_a_hash_backup_leaves_no_cold_image_beyond_what_it_was_compared_with() -> None:
    async with Group(BASE, 1, fs=[disk_for("a0")]) as group:
        feed = await group.feed()
        await feed.step(3)
        await lose_newest(group, 0, feed)
        await feed.hash_backup()
        await feed.send()
        assert group.volume(0).record.colds == {}
        assert await group[0].restored_image(VOL, feed.gid) == bytes(feed.image)
        await group.check(feed, 0)


async def test_a_comparing_round_leaves_none_either() -> None:
    async with Group(BASE, 2, fs=[disk_for("a0"), disk_for("a1")]) as group:
        feed = await group.feed()
        await feed.step(3)
        await group.init(1)
        await group.replicate(0, 1)
        await feed.send()
        await lose_newest(group, 1, feed)
        feed._unsent = []
        await feed.hash_backup()
        await feed.send()
        await feed.step(1)
        await group[0].done(c.Apply(volume=VOL, gid=feed.gid))
        await group.replicate(0, 1)
        assert any(diff.comp for diff in group.volume(1).diffs)
        image = await group[1].restored_image(VOL, feed.gid)
        assert image[: 64 * LB] == bytes(feed.image)
