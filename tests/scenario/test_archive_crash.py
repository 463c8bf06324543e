"""Crashes of an archive: at every failpoint, and between operations of a disk that forgets what was not synced.

A story is told once without harm, and what a crash would leave is put aside at many moments of it. Then a new
archive starts on each of these: what had been acknowledged must be there, everything that it says it can restore
must be right, and the volume's life must be able to go on.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

import walbd.archive.server  # noqa: F401 - registers the failpoints
from tests.kit.feeder import ArchiveRig, Feed
from tests.kit.memfs import MemoryFileSystem
from walbd.errors import WalbError
from walbd.format.meta import Diff
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import Ok
from walbd.protocol.transfer import Verdict
from walbd.units import LB

VOL = "vol0"
BASE = Path("/archive")
START = "archive.start.before_gc"
WARNINGS = {  # what the step was for is done all the same
    "archive.apply.before_erase",
    "archive.merge.before_erase",
    "archive.cold.before_record",
    "archive.cold.before_remove",  # in an apply
}
OTHERS = ("archive.hash.", "archive.repl", "archive.policy.")  # they have stories of their own


def archive_failpoints() -> set[str]:
    names = {name for name in failpoints.registered() if name.startswith("archive.")}
    return {name for name in names if not name.startswith(OTHERS)}


@dataclass
class Promise:
    """What the archive has said by now, so what must be true after a crash."""

    state: set[str] = field(default_factory=lambda: {"Clear"})  # any of these
    gid: int | None = None  # acknowledged and not given up: it can be restored
    restored: dict[int, bytes] = field(default_factory=dict)
    images: dict[int, bytes] = field(default_factory=dict)  # what the volume held at each generation
    uuid: bytes = bytes(16)
    unsent: list[tuple[Diff, bytes]] = field(default_factory=list)  # what the proxy still has


class Story:
    """A volume's life, and at each moment what the archive has promised."""

    def __init__(self, rig: ArchiveRig, seed: int) -> None:
        self.rig = rig
        self.feed = Feed(rig, seed=seed)
        self._promise = Promise()

    @property
    def promise(self) -> Promise:
        """As of now."""
        feed, promise = self.feed, self._promise
        return replace(
            promise,
            state=set(promise.state),
            restored=dict(promise.restored),
            images=dict(feed.images),
            uuid=feed.uuid,
            unsent=list(feed._unsent),
        )

    async def tell(self) -> None:
        """All that an archive can do to a volume."""
        feed, call, promise = self.feed, self.rig.call, self._promise
        await self.entering({"SyncReady"}, feed.init())
        feed.scribble()
        await self.backup(dirty=1)
        await self.send()
        for _ in range(3):
            await self.step()
        await self.restore(2)
        await self.rig.done(c.Apply(volume=VOL, gid=2))
        await self.step()
        await self.entering({"Stopped"}, self.rig.done(c.Stop(volume=VOL)))
        await self.entering({"Archived"}, call(c.Start(volume=VOL)))
        await call(c.GcDiff(volume=VOL))
        await self.step()
        await call(m.EnableSnapshot(volume=VOL, gids=[3, 4]))
        await call(m.DisableSnapshot(volume=VOL, gids=[3]))
        await self.rig.done(m.Merge(volume=VOL, gid_b=2, gid_e=4))
        await call(m.DisableSnapshot(volume=VOL, gids=[4]))
        await self.rig.done(c.Restore(volume=VOL, gid=5))
        await call(c.DelRestored(volume=VOL, gid=5))
        assert await self.rig.restored_image(VOL, 6) == self.feed.images[6]  # from the cold image
        await call(m.DelCold(volume=VOL, gid=5))
        await self.rig.done(c.Apply(volume=VOL, gid=99))
        promise.restored.pop(2)
        await call(c.DelRestored(volume=VOL, gid=2))
        await call(c.Resize(volume=VOL, size_b=(self.feed.size_lb + 8) * LB))
        await self.entering({"Stopped"}, self.rig.done(c.Stop(volume=VOL)))
        promise.gid = None
        await self.entering({"SyncReady"}, call(c.ResetVol(volume=VOL)))
        await self.backup(dirty=0)
        await self.step()
        await self.entering({"Stopped"}, self.rig.done(c.Stop(volume=VOL)))
        promise.gid = None
        promise.state = {"Stopped", "SyncReady"}  # clearing first says SyncReady, then removes
        await self.entering({"Clear"}, call(c.ClearVol(volume=VOL)))

    async def entering(self, after: set[str], work: Awaitable[object]) -> None:
        """Do what leads to another state; until it is acknowledged either may be found."""
        self._promise.state |= after
        await work
        self._promise.state = set(after)

    async def backup(self, *, dirty: int) -> None:
        await self.entering({"Archived"}, self.feed.full_backup(dirty=dirty))
        self._promise.gid = None if dirty else 0

    async def send(self) -> None:
        assert all(isinstance(word, Ok) for word in await self.feed.send())
        self._promise.gid = self.feed.acked

    async def step(self) -> None:
        self.feed.scribble()
        self.feed.snapshot()
        await self.send()

    async def restore(self, gid: int) -> None:
        await self.rig.done(c.Restore(volume=VOL, gid=gid))
        self._promise.restored[gid] = self.feed.images[gid]


@dataclass
class Moment:
    """What a crash would leave at one moment of the story."""

    name: str
    fs: MemoryFileSystem
    promise: Promise

    async def check(self) -> None:
        """Start on what is left, and check that nothing acknowledged is lost and nothing is invented."""
        try:
            await check(self.fs, self.promise)
        except BaseException as exc:
            raise AssertionError(f"crash at {self.name}: {exc!r}") from exc


async def check(fs: MemoryFileSystem, promise: Promise) -> None:
    async with ArchiveRig(BASE, fs=fs) as rig:
        state = await rig.state(VOL)
        assert state in promise.state, f"{state}, not one of {promise.state}"
        if state == "Clear":
            await rig.call(c.ArchiveInitVol(volume=VOL))
            state = "SyncReady"
        feed = Feed(rig, seed=99)
        if state == "SyncReady":
            assert not rig.volume(VOL).diffs
            assert not rig.volume(VOL).restored
            await feed.full_backup()
            await feed.step(2)
            assert await feed.check() == [0, 1, 2]
            return
        feed.images = promise.images
        if state == "Stopped":
            await rig.call(c.Start(volume=VOL))
        restored = (await rig.call(c.GetRestored(volume=VOL))).gids
        assert set(promise.restored) <= set(restored)
        for gid in restored:
            path = Path((await rig.call(c.GetRestoredPath(volume=VOL, gid=gid))).value)
            assert fs.read_bytes(path) == promise.images[gid]
            await rig.call(c.DelRestored(volume=VOL, gid=gid))
        if rig.volume(VOL).record.uuid != promise.uuid.hex():
            return  # the record is older than the history that is just beginning: nothing more was promised
        await finish_apply(rig)
        points = await feed.check()
        assert promise.gid is None or promise.gid in points
        await resend(rig, feed, promise)


async def finish_apply(rig: ArchiveRig) -> None:
    """An apply that was interrupted is finished by the next one, whatever its target."""
    if (await rig.call(c.GetBase(volume=VOL))).base.is_applying:
        await rig.done(c.Apply(volume=VOL, gid=0))
        assert not (await rig.call(c.GetBase(volume=VOL))).base.is_applying


async def resend(rig: ArchiveRig, feed: Feed, promise: Promise) -> None:
    """The proxy sends again what was not acknowledged; it may have arrived, and then is too old."""
    feed.uuid, feed._unsent = promise.uuid, list(promise.unsent)
    newest = max([diff.end.gid_b for diff, _ in promise.unsent], default=promise.gid)
    assert all(isinstance(word, Ok) or word is Verdict.TOO_OLD for word in await feed.send())
    points = await feed.check()
    assert newest is None or newest in points


async def tell(
    seed: int, *, failpoint_copies: bool = False, power_failures: random.Random | None = None
) -> list[Moment]:
    """Tell the story on a disk in memory, and return what crashes would leave."""
    fs = MemoryFileSystem()
    fs.shares = True  # for cold images
    fs.make_dir(BASE)
    moments: list[Moment] = []
    count: dict[str, int] = {}
    async with ArchiveRig(BASE, fs=fs) as rig:
        story = Story(rig, seed)
        real = failpoints.hit

        def hit(name: str) -> None:
            count[name] = count.get(name, 0) + 1
            if failpoint_copies:
                moments.append(Moment(f"{name}, time {count[name]}", fs.copy(), story.promise))
            real(name)

        def changed() -> None:
            count["op"] = count.get("op", 0) + 1
            if power_failures is not None:
                moments.append(Moment(f"operation {count['op']}", fs.after_crash(power_failures), story.promise))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(failpoints, "hit", hit)
            fs.on_change = changed
            await story.tell()
            fs.on_change = None
    assert count.keys() - {"op"} == archive_failpoints() - {START}
    return moments


async def test_kill_at_every_failpoint() -> None:
    """The process dies, the disk forgets nothing."""
    seen: dict[str, list[Moment]] = {}
    for moment in await tell(3, failpoint_copies=True):
        seen.setdefault(moment.name.split(",")[0], []).append(moment)
    for moments in seen.values():
        for moment in moments if len(moments) < 4 else moments[:2] + moments[-2:]:
            await moment.check()


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_power_failure_between_operations(seed: int) -> None:
    """The disk forgets whatever was not synced; a third of all moments in each run."""
    moments = await tell(7, power_failures=random.Random(seed))
    assert len(moments) > 150
    for moment in moments[seed - 1 :: 3]:
        await moment.check()


async def test_kill_during_the_repair_after_a_kill() -> None:
    moments = [m for m in await tell(4, failpoint_copies=True) if m.name == "archive.apply.before_erase, time 1"]
    first = moments[0]
    again: list[MemoryFileSystem] = []

    def hit(name: str) -> None:
        assert name == START
        again.append(first.fs.copy())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "hit", hit)
        async with ArchiveRig(BASE, fs=first.fs) as rig:
            assert await rig.state(VOL) == "Archived"
    assert len(again) == 1
    await Moment("start", again[0], first.promise).check()


@pytest.mark.parametrize("action", ["eio", "enospc"])
@pytest.mark.parametrize("name", sorted(archive_failpoints() - {START}))
async def test_failing_disk_at_every_failpoint(name: str, action: str) -> None:
    """The step fails with a typed error, and the archive lives on with its promises kept."""
    fs = MemoryFileSystem()
    fs.shares = True
    fs.make_dir(BASE)
    async with ArchiveRig(BASE, fs=fs) as rig:
        story = Story(rig, 5)
        failpoints.arm(f"{name}={action}")
        if name in WARNINGS:
            await story.tell()
        else:
            with pytest.raises((WalbError, AssertionError), match=r"Input/output error|no space left"):
                await story.tell()
        failpoints.disarm()
        if VOL in rig.server.volumes:
            await rig.settled()
            if rig.volume(VOL).machine.shown == "Archived":
                await story.feed.check()
    await Moment(name, fs.copy(), story.promise).check()
