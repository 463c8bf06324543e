"""Crashes of either side of a replication: at every failpoint, and between operations of a disk that forgets.

A story is told once without harm, and what a crash of one side would leave, beside what the other side has then,
is put aside at many moments. Both start on each of these: what the destination had acknowledged must be there, all
that it says it can restore must be right, and the next replication must bring it level.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import walbd.archive.server  # noqa: F401 - registers the failpoints
from tests.kit.memfs import MemoryFileSystem
from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.errors import WalbError
from walbd.fs import failpoints
from walbd.protocol import control as c

BASE = Path("/")
MINE = ("archive.repl_",)


def replication_failpoints() -> set[str]:
    return {name for name in failpoints.registered() if name.startswith(MINE)}


def new_disks() -> list[MemoryFileSystem]:
    disks = [MemoryFileSystem(), MemoryFileSystem()]
    for number, disk in enumerate(disks):
        disk.make_dir(BASE / f"a{number}")
    return disks


@dataclass
class Promise:
    """What the destination has said by now."""

    states: set[str] = field(default_factory=lambda: {"SyncReady"})
    gids: set[int] = field(default_factory=set)  # can be restored there
    images: dict[int, bytes] = field(default_factory=dict)  # the truth


class Story:
    """All that a replication can do."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.feed: TwoFeeds | None = None
        self._promise = Promise()

    @property
    def promise(self) -> Promise:
        images = dict(self.feed.images) if self.feed is not None else {}
        return replace(
            self._promise, states=set(self._promise.states), gids=set(self._promise.gids), images=images
        )

    async def prepare(self) -> None:
        self.feed = await self.group.feed(size_lb=32)
        await self.feed.step(2)
        await self.group.init(1)

    async def tell(self) -> None:
        group, feed, promise = self.group, self.feed, self._promise
        assert feed is not None
        promise.states = {"SyncReady", "Archived"}
        await self.replicate()
        promise.states = {"Archived"}
        await feed.step(2)
        await self.replicate()
        await feed.step(3)
        await group[0].done(c.Apply(volume=VOL, gid=6))
        await self.replicate()  # compares
        feed.write(0, 3)
        await feed.hash_backup()
        await feed.send()
        await self.replicate()  # another history
        promise.states, promise.gids = {"Archived", "SyncReady"}, set()
        await feed.step()
        await self.replicate(resync=True)
        promise.states = {"Archived"}
        await feed.step()
        await self.replicate()

    async def replicate(self, *, resync: bool = False) -> None:
        await self.group.replicate(0, 1, resync=resync, bulk_b=512, merge_size_max_b=1 << 20)
        self._promise.gids |= set(await self.group[1].points(VOL))


@dataclass
class Moment:
    """What both disks hold when one side crashes."""

    name: str
    disks: list[MemoryFileSystem]
    promise: Promise

    async def check(self) -> None:
        try:
            await check(self.disks, self.promise)
        except BaseException as exc:
            raise AssertionError(f"crash at {self.name}: {exc!r}") from exc


async def check(disks: list[MemoryFileSystem], promise: Promise) -> None:
    async with Group(BASE, fs=disks, fsync_interval_b=4096) as group:
        state = await group[1].state(VOL)
        assert state in promise.states, f"{state}, not one of {promise.states}"
        feed = TwoFeeds(group[0], size_lb=32, images=promise.images)
        if state == "Archived":
            points = await group.check(feed, 1)
            assert promise.gids <= set(points), f"{promise.gids - set(points)} cannot be restored any more"
        info = await group.replicate(0, 1, resync=bool(len(promise.images) % 2))
        assert info.result["gid"] == group.volume(0).latest.begin.gid_b
        points = await group.check(feed, 1)
        assert max(points) == max(await group.check(feed, 0))
        old, new = group.volume(0).record, group.volume(1).record
        assert (old.uuid, old.archive_uuid) == (new.uuid, new.archive_uuid)


async def tell(*, crashing: int, copies: bool = False, power: random.Random | None = None) -> list[Moment]:
    """Tell the story, and return what crashes of one side would leave."""
    disks = new_disks()
    moments: list[Moment] = []
    count: dict[str, int] = {}
    async with Group(BASE, fs=disks, fsync_interval_b=4096) as group:
        story = Story(group)
        await story.prepare()
        real = failpoints.hit

        def hit(name: str) -> None:
            count[name] = count.get(name, 0) + 1
            if copies and name.startswith("archive."):
                moments.append(Moment(f"{name}, time {count[name]}", [d.copy() for d in disks], story.promise))
            real(name)

        def changed() -> None:
            count["op"] = count.get("op", 0) + 1
            assert power is not None
            left = [disk.copy() for disk in disks]
            left[crashing] = disks[crashing].after_crash(power)
            moments.append(Moment(f"operation {count['op']}", left, story.promise))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(failpoints, "hit", hit)
            if power is not None:
                disks[crashing].on_change = changed
            await story.tell()
            disks[crashing].on_change = None
    assert replication_failpoints() <= count.keys()
    return moments


async def test_kill_at_every_failpoint() -> None:
    """The process dies, the disk forgets nothing."""
    seen: dict[str, list[Moment]] = {}
    for moment in await tell(crashing=1, copies=True):
        seen.setdefault(moment.name.split(",")[0], []).append(moment)
    for name, moments in seen.items():
        for moment in moments[:4] if name.startswith(MINE) else moments[-1:]:
            await moment.check()


@pytest.mark.parametrize(("crashing", "seed", "step"), [(1, 1, 8), (1, 2, 8), (0, 3, 20)])
async def test_power_failure_between_operations(crashing: int, seed: int, step: int) -> None:
    """The disk forgets whatever was not synced; a part of all moments in each run."""
    moments = await tell(crashing=crashing, power=random.Random(seed))
    assert len(moments) > 60
    for moment in moments[seed::step]:
        await moment.check()


async def do(work: Awaitable[object]) -> None:
    await work


@pytest.mark.parametrize("action", ["eio", "enospc"])
async def test_failing_disk_at_every_failpoint(action: str) -> None:
    """The replication fails with a typed error, both archives live on, and the next one brings all."""
    for name in sorted(replication_failpoints()):
        disks = new_disks()
        async with Group(BASE, fs=disks, fsync_interval_b=4096) as group:
            story = Story(group)
            await story.prepare()
            failpoints.arm(f"{name}={action}")
            with pytest.raises((WalbError, AssertionError), match=r"Input/output error|no space left"):
                await do(story.tell())
            failpoints.disarm()
            await group[1].settled()
            assert story.feed is not None
            if group.volume(1).machine.shown == "Archived":
                assert story._promise.gids <= set(await group.check(story.feed, 1))
            promise = story.promise
        await Moment(name, [disk.copy() for disk in disks], promise).check()
