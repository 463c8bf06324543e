"""Random lives of a volume at two archives, compared with a plain array after each event.

Archive 0 is fed; archive 1 gets replications, sometimes wdiffs of proxies too, and sometimes what archive 0 never
got before its log was lost. Both are merged, applied, restarted and cut off the power at random.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

from tests.kit.memfs import MemoryFileSystem
from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.errors import RemoteError
from walbd.format.meta import diff_name
from walbd.protocol import control as c
from walbd.protocol.base import JobState
from walbd.protocol.maintenance import Merge

BASE = Path("/")
N_STEPS = 40


class Life:
    """One life; `events` counts what happened, so that a test can show that lives meet what they are for."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.events: Counter[str] = Counter()
        self.disks = [MemoryFileSystem(), MemoryFileSystem()]
        for number, disk in enumerate(self.disks):
            disk.make_dir(BASE / f"a{number}")
        self.group = Group(BASE, fs=self.disks, fsync_interval_b=4096, open_files_max=self.rng.choice([0, 2, 256]))
        self.feed: TwoFeeds
        self.now = 0

    async def live(self) -> None:
        async with self.group as group:
            self.feed = await group.feed(size_lb=32, dirty=self.rng.choice([0, 2]), seed=self.rng.randrange(1000))
            self.truth.update({(self.feed.uuid, 0): self.feed.images.get(0, b"")})
            await group.init(1)
            events: list[tuple[int, Callable[[], Awaitable[None]]]] = [
                (12, self.write),
                (9, self.replicate),
                (4, self.send_to_replica),
                (5, self.apply),
                (4, self.merge),
                (2, self.protect),
                (2, self.restart),
                (2, self.lose_power),
                (2, self.lose_log),
            ]
            weights, actions = zip(*events, strict=True)
            for action in self.rng.choices(actions, weights, k=N_STEPS):
                await action()
                if self.rng.random() < 0.2:
                    await self.check(3)
            await self.settle()

    @property
    def truth(self) -> dict[tuple[bytes, int], bytes]:
        return self.feed.truth

    # --- events

    async def write(self) -> None:
        feed = self.feed
        for _ in range(self.rng.randint(1, 3)):
            feed.scribble(3)
            feed.snapshot(mergeable=self.rng.random() < 0.7)
        if self.rng.random() < 0.8:
            await feed.send()

    async def replicate(self) -> None:
        rng, source = self.rng, self.group.volume(0)
        wish = rng.choice([{}, {}, {"size_b": 0}, {"gid": rng.randint(0, int(source.latest.begin.gid_b))}])
        resync = rng.random() < 0.1
        request = self.group.request(
            1, resync=resync, dont_merge=rng.random() < 0.3, compress=rng.choice(["lz4", "zstd:1"]), **wish
        )
        try:
            info = await self.group[0].job(request)
        except RemoteError as exc:
            self.events[exc.remote_code] += 1
            return
        if info.state is JobState.FAILED:
            assert info.error_code == "history-broken", info
            self.events["ahead" if "ahead" in info.error else "no way"] += 1
            return
        self.events[str(info.result["kind"])] += 1
        if wish in ({}, {"size_b": 0}):
            old, new = source, self.group.volume(1)
            assert new.latest.begin.gid_b >= old.latest.begin.gid_b
            assert new.record.uuid == old.record.uuid
            self.events["comparing"] += any(diff.comp for diff in new.diffs)

    async def send_to_replica(self) -> None:
        feed = self.feed
        first = self.rng.randrange(len(feed.log)) if feed.log else 0
        words = await feed.send_to(self.group[1], first)
        self.events["sent"] += sum(type(word).__name__ == "Ok" for word in words)

    async def apply(self) -> None:
        number = self.rng.choice([0, 0, 0, 1])
        points = await self.group[number].points(VOL)
        if points:
            await self.try_job(number, c.Apply(volume=VOL, gid=self.rng.choice(points)))

    async def merge(self) -> None:
        number = self.rng.choice([0, 0, 1])
        volume = self.group.volume(number)
        if volume.is_active:
            gid = self.rng.randint(volume.base.begin.gid_b, volume.latest.begin.gid_b)
            await self.try_job(number, Merge(volume=VOL, gid_b=gid, gid_e=gid + self.rng.randint(2, 6)))

    async def try_job(self, number: int, request: c.Apply | Merge) -> None:
        try:
            await self.group[number].done(request)
        except RemoteError:
            return
        self.events[type(request).__name__] += 1

    async def protect(self) -> None:
        number = self.rng.choice([0, 1])
        volume = self.group.volume(number)
        diffs = list(volume.diffs)
        if diffs and not volume.machine.during:
            diff = self.rng.choice(diffs)
            async with volume.naming:
                for old, new in volume.diffs.snapshot_change(diff.begin.gid_b, enable=True).changed:
                    self.disks[number].rename(volume.directory / diff_name(old), volume.directory / diff_name(new))
                    volume.relabel_diff(new)

    async def restart(self) -> None:
        await self.group[self.rng.choice([0, 1])].restart()

    async def lose_power(self) -> None:
        """The power fails at some operation of a replication, at one side."""
        number, fuse = self.rng.choice([0, 1]), self.rng.randint(1, 25)
        disk, left = self.disks[number], list[MemoryFileSystem]()

        def burn() -> None:
            nonlocal fuse
            fuse -= 1
            if fuse == 0:
                left.append(disk.after_crash(self.rng))

        disk.on_change = burn
        await self.replicate()
        disk.on_change = None
        if left:
            self.events["power"] += 1
            rig = self.group[number]
            await rig.crash()
            self.disks[number] = left[0]
            rig.env = type(rig.env)(
                fs=left[0], net=rig.env.net, clock=rig.env.clock, rng=rig.env.rng, pools=rig.env.pools
            )
            await rig.up()

    async def lose_log(self) -> None:
        """What archive 0 does not have yet it never gets; a proxy may still bring it to archive 1."""
        for _ in range(self.rng.randint(1, 4)):
            self.feed.scribble()
            self.feed.snapshot()
        if self.rng.random() < 0.7:
            await self.send_to_replica()
        await self.feed.hash_backup()
        await self.feed.send()
        self.events["hash backup"] += 1

    # --- what must hold

    async def settle(self) -> None:
        """In the end all arrives at both."""
        feed = self.feed
        feed.scribble()
        feed.snapshot()
        await feed.send()
        while feed.gid <= max(self.group.volume(1).latest.begin.gid_b, 0) < 1 << 60:
            feed.snapshot()
            await feed.send()
        await self.group[1].settled()  # it may just be giving up what a crash of the source has cut
        await self.group.replicate(0, 1)
        await self.check()
        newest = [max(await self.group[number].points(VOL)) for number in (0, 1)]
        assert newest == [feed.gid, feed.gid]
        for number in (0, 1):
            assert await self.group[number].restored_image(VOL, feed.gid) == bytes(feed.image)

    async def check(self, n_max: int = 1000) -> None:
        """Every point of either archive is what the volume was at that generation, in one of its histories.

        Looks at the newest, and at `n_max` others.
        """
        for number in (0, 1):
            volume = self.group.volume(number)
            if not volume.is_active:
                continue
            assert volume.latest == volume.diffs.latest(volume.base)
            points = await self.group[number].points(VOL)
            for gid in {*self.rng.sample(points, min(n_max, len(points))), *points[-1:]}:
                image = await self.group[number].restored_image(VOL, gid)
                truths = [truth for (_, g), truth in self.truth.items() if g == gid]
                assert image in truths, f"{gid} at a{number}"
                self.events["restored"] += 1


async def test_random_lives() -> None:
    events: Counter[str] = Counter()
    for seed in range(6):
        life = Life(seed)
        await life.live()
        events += life.events
    for name in ("full", "rounds", "comparing", "Apply", "Merge", "sent", "hash backup", "power"):
        assert events[name], (name, events)
