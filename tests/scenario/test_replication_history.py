"""Which log history the base of a source belongs to: what a replica is told, and which gaps it knows of."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.protocol import control as c
from walbd.protocol.maintenance import GetGaps
from walbd.units import LB


async def lost_log_at_the_base(group: Group) -> tuple[TwoFeeds, int]:
    """Archive 0 has lost log after a snapshot, has gone on by a hash backup, and has its base at this snapshot."""
    feed = await group.feed()
    await feed.step(3)
    last = feed.gid
    feed.scribble()
    await feed.hash_backup()
    await feed.send()
    await feed.step(2)
    await group[0].done(c.Apply(volume=VOL, gid=last))
    assert group.volume(0).base.begin.gid_b == last
    return feed, last


async def gaps(group: Group, number: int) -> list[tuple[int, int]]:
    return [(gap.gid_b, gap.gid_e) for gap in (await group[number].call(GetGaps(volume=VOL))).gaps]


@pytest.mark.parametrize("resync", [False, True])
async def test_a_copy_of_a_base_before_a_loss_knows_of_the_gap(tmp_path: Path, resync: bool) -> None:
    async with Group(tmp_path) as group:
        if resync:
            await group.init(1)
            other = TwoFeeds(group[1], size_lb=64, seed=9)
            await other.full_backup()
        feed, last = await lost_log_at_the_base(group)
        known = await gaps(group, 0)
        assert [gap[0] for gap in known] == [last]
        if not resync:
            await group.init(1)
        await group.replicate(0, 1, resync=resync, dont_merge=True)
        assert await gaps(group, 1) == known
        assert group.volume(1).record.base_uuid != group.volume(1).record.uuid == feed.uuid.hex()
        assert (await group.check(feed, 1))[-1] == feed.gid


async def test_a_comparison_with_a_base_before_a_loss_leaves_both_gaps(tmp_path: Path) -> None:
    async with Group(tmp_path) as group:
        feed = await group.feed()
        await group.init(1)
        await group.replicate(0, 1)
        await feed.step(3)
        last = feed.gid
        feed.scribble()
        await feed.hash_backup()
        await feed.send()
        await group[0].done(c.Apply(volume=VOL, gid=last))
        known = await gaps(group, 0)
        await group.replicate(0, 1)
        assert await gaps(group, 1) == [(0, last), *known]
        await group.check(feed, 1)


async def test_a_replica_at_the_base_goes_on_without_comparing(tmp_path: Path) -> None:
    async with Group(tmp_path) as group:
        feed = await group.feed()
        await feed.step(3)
        await group.init(1)
        await group.replicate(0, 1)
        last = feed.gid
        feed.scribble()
        await feed.hash_backup()
        await feed.send()
        await group[0].done(c.Apply(volume=VOL, gid=last))
        await group.replicate(0, 1)
        assert not any(diff.comp for diff in group.volume(1).diffs)
        assert await gaps(group, 1) == await gaps(group, 0)
        points = await group.check(feed, 1)
        assert {last, feed.gid} <= set(points)


async def test_a_record_that_does_not_tell_it_is_no_obstacle(tmp_path: Path) -> None:
    """As one of an earlier version, or one in which an operator has said what the base is."""
    async with Group(tmp_path) as group:
        feed = await group.feed()
        await feed.step(3)
        await group[0].done(c.Apply(volume=VOL, gid=1))
        await group.volume(0).save(base_uuid="")
        await group.init(1)
        await group.replicate(0, 1)
        await feed.step(2)
        await group.replicate(0, 1)
        assert not any(diff.comp for diff in group.volume(1).diffs)
        assert (await group.check(feed, 1))[-1] == feed.gid
        assert (await group[1].restored_image(VOL, feed.gid))[: 64 * LB] == bytes(feed.image)
