"""Replication between real archives: other sizes, and what is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import NOW, PROXY, STORAGE
from tests.kit.replicas import VOL, Group
from walbd.archive.states import Command
from walbd.daemon.states import StopMode
from walbd.errors import RemoteError
from walbd.protocol import control as c
from walbd.protocol.base import JobState
from walbd.protocol.sync import ReplicateOffer
from walbd.protocol.transfer import BackupAccepted, FullBackupOffer
from walbd.units import LB


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    async with Group(tmp_path) as group:
        yield group


# --- sizes


async def test_a_larger_source(tmp_path: Path) -> None:
    async with Group(tmp_path) as group:
        feed = await group.feed()
        await group.init(1)
        await group.replicate(0, 1)
        feed.size_lb = 96
        feed.image += bytes(32 * LB)
        group[0].server.place.config = type(group[0].server.place.config)(
            base_dir=str(group[0].base), auto_resize=True, free_reserve_b=0
        )
        await feed.step(2)
        with pytest.raises(RemoteError, match="smaller") as caught:
            await group.replicate(0, 1)
        assert "auto_resize" in caught.value.hint
        group[1].server.place.config = type(group[1].server.place.config)(
            base_dir=str(group[1].base), auto_resize=True, free_reserve_b=0
        )
        await group.replicate(0, 1)
        assert group.volume(1).size_lb == 96
        assert await group.check(feed, 1) == [0, 2]


async def test_a_larger_destination(group: Group) -> None:
    """It stays as large as it is; what lies beyond reads as zeros, also after a resync."""
    feed = await group.feed()
    await feed.step()
    await group.feed(1, seed=4, size_lb=80, image=b"\x99" * 80 * LB)
    await group.replicate(0, 1, resync=True)
    assert group.volume(1).size_lb == 80
    await feed.step(2)
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [0, 1, 3]


# --- refusals


async def refused(group: Group, code: str, **fields: Any) -> RemoteError:
    before = group.volume(0).record.replicas
    with pytest.raises(RemoteError) as caught:
        await group[0].call(group.request(1, **fields))
    assert caught.value.remote_code == code, caught.value
    assert group.volume(0).machine.at_rest
    assert [row.gid for row in group.volume(0).record.replicas] == [row.gid for row in before]
    return caught.value


async def test_refusals(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    assert "init" in (await refused(group, "bad-state")).hint  # Clear
    await group.init(1)
    await refused(group, "not-reachable", gid=9)
    await refused(group, "usage", gid=1, size_b=1)
    await refused(group, "usage", compress="rar:9")
    with pytest.raises(RemoteError, match="another archive"):
        await group[0].call(group.request(0))
    with pytest.raises(RemoteError, match="not allowed"):  # the source has no data
        await group[1].call(group.request(0))
    machine = group.volume(1).machine
    machine.enter(Command.FULL_BACKUP)
    await refused(group, "busy")
    machine.leave()
    await group.replicate(0, 1)
    with machine.action("Apply", 0):
        await refused(group, "busy", resync=True)
    with machine.stop_flag(StopMode.GRACEFUL):
        await refused(group, "stopping")
    await group[1].stopped(VOL)
    await refused(group, "bad-state")
    await refused(group, "bad-state", resync=True)
    with group.volume(0).machine.action("Merge", 0):
        with pytest.raises(RemoteError, match="excludes"):
            await group[0].call(group.request(1))


async def test_more_copies_than_allowed(tmp_path: Path) -> None:
    async with Group(tmp_path, backups_max=1) as group:
        await group.feed()
        await group.init(1)
        with group[1].server._backups.turn() as turn:
            await turn.comes()
            await refused(group, "busy")


async def test_a_copy_that_waits_at_its_source_takes_no_place_at_the_destination(tmp_path: Path) -> None:
    async with Group(tmp_path, backups_max=1, replications_max=1) as group:
        feed = await group.feed()
        await group.init(1)
        await group[1].call(c.ArchiveInitVol(volume="other"))
        with group[0].server._replications.turn() as turn:
            await turn.comes()
            job = (await group[0].call(group.request(1))).job
            async with group[1].dial(STORAGE) as conn:
                offer = FullBackupOffer(volume="other", size_lb=8, started=NOW, bulk_b=LB)
                assert isinstance(await conn.call(offer), BackupAccepted)
        assert (await group[0].ended(job)).state is JobState.DONE
        assert await group.check(feed, 1) == [0]


async def test_a_copy_waits_for_its_place_at_the_destination(tmp_path: Path) -> None:
    async with Group(tmp_path, backups_max=1, replications_max=1) as group:
        feed = await group.feed()
        await group.init(1)
        slots = group[1].server._backups
        with ExitStack() as stack:
            with group[0].server._replications.turn() as turn:
                await turn.comes()
                job = (await group[0].call(group.request(1))).job
                async with asyncio.timeout(60):
                    await stack.enter_context(slots.turn()).comes()  # a backup begins meanwhile
            async with asyncio.timeout(60):
                await slots.changed.wait_for(lambda: slots.waiting == 1)
            assert group.volume(1).machine.during is None
        assert (await group[0].ended(job)).state is JobState.DONE
        assert await group.check(feed, 1) == [0]


async def test_an_apply_at_the_destination_is_awaited_by_a_comparison(group: Group) -> None:
    feed = await group.feed()
    await feed.step(2)
    await group.init(1)
    await group.replicate(0, 1)
    await feed.step(2)
    await group[0].done(c.Apply(volume=VOL, gid=4))
    machine = group.volume(1).machine
    with machine.action("Apply", 0):
        number = (await group[0].call(group.request(1))).job
        source = group.volume(0)
        await source.machine.changed.wait_for(lambda: bool(source.record.replicas))
        assert machine.during is None
    info = await group[0].ended(number)
    assert info.state is JobState.DONE, info
    assert await group.check(feed, 1) == [0, 2, 4]


async def test_offers_of_others_are_refused(group: Group) -> None:
    await group.init(1)
    offer = ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=bytes(16))
    with pytest.raises(RemoteError, match="archives only"):
        await group[1].call(offer, PROXY)
    with pytest.raises(RemoteError, match="size 0"):
        async with group.as_source(1) as conn:
            await conn.call(ReplicateOffer(volume=VOL, size_lb=0, archive_uuid=bytes(16)))
