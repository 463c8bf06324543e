"""What operators and faults do to the volume of tests/kit/storm.py, and what must hold meanwhile and at last."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.kit.storm import BULK_B, FOR_EVER, VOL, Broken, Host, Storm, crash_after
from tests.kit.virtual import run
from walbd.archive.colds import cold_gid, start_for
from walbd.archive.diffs import opened
from walbd.archive.gaps import within
from walbd.archive.volume import Volume
from walbd.errors import DiskFailed, DiskFull
from walbd.format.hashes import BlockHash
from walbd.format.meta import Snapshot
from walbd.format.policy import Grid, Policy, Replication, parse_levels
from walbd.format.virtual import VirtualImage
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.policy import SetPolicy
from walbd.units import LB

OPERATORS = 4
WAYS = [c.StopHow.GRACEFUL, c.StopHow.FORCE]


class Life(Storm):
    """Everything at once, and then an end at which all has to arrive."""

    async def live(self) -> None:
        try:
            for host in self.hosts:
                await host.rig.up()
                await self.ask(host, c.ArchiveInitVol(volume=VOL))
            while not await self.backup(self.primary, self.full_backup):
                self.gid = 0
                self.truth.clear()
                for queue in self.queues.values():
                    queue.clear()
            self._open.set()
            async with asyncio.TaskGroup() as tasks:
                operators = [tasks.create_task(self._operator()) for _ in range(OPERATORS)]
                tasks.create_task(self._writer())
                tasks.create_task(self._loser())
                for proxy, host in itertools.product(range(2), self.hosts):
                    tasks.create_task(self._courier(proxy, host))
                looker = tasks.create_task(self._looker())
                await asyncio.gather(*operators)
                looker.cancel()
                self.ended = True
                self._open.set()
            await self._settle()
        finally:
            for host in self.hosts:
                await host.rig.crash()

    # --- who is at work

    async def _turn(self) -> None:
        await asyncio.sleep(self.rng.choice([0, 0.001, 0.05, 0.3, 2, 5]))
        await self._open.wait()

    async def _writer(self) -> None:
        rng = self.rng
        while not self.ended:
            await self._turn()
            if self.backing:
                continue
            self.write()
            if self.alive or rng.random() < 0.2:
                self.snapshot(explicit=rng.random() < 0.1)
            if rng.random() < 0.02 and self.size_lb < 60:  # the device grows
                self.size_lb += rng.randint(1, 4)
                self.image += bytes(self.size_lb * LB - len(self.image))

    async def _courier(self, proxy: int, host: Host) -> None:
        while not self.ended:
            await self._turn()
            if not host.dead:
                await self.deliver(proxy, host)

    async def _loser(self) -> None:
        """The log overflows now and then; a hash backup, sometimes to another archive, goes on."""
        rng = self.rng
        while not self.ended:
            await self._turn()
            if self.alive and rng.random() < 0.015:
                self.alive = False
                self.gid += rng.randint(0, 3)  # given out, and never delivered
                self.say("the log is lost")
            elif not self.alive:
                active = [host for host in self.hosts if host.state == "Archived" and not host.dead]
                if active and rng.random() < 0.25:
                    self.primary = rng.choice(active)
                    self.primary.fed = True
                await self.backup(self.primary, self.hash_backup)
                if self.primary.state == "SyncReady":
                    self.primary = self.hosts[0]

    async def _operator(self) -> None:
        rng = self.rng
        table: list[tuple[int, Callable[[Host], Awaitable[None]]]] = [
            (8, self._restore),
            (5, self._apply),
            (8, self._merge),
            (9, self._replicate),
            (4, self._hold),
            (2, self._release_hold),
            (4, self._protect),
            (2, self._unprotect),
            (3, self._hash),
            (2, self._resize),
            (2, self._small_things),
            (1, self._stop),
            (2, self._reset),
            (1, self._set_policy),
            (1, self._set_clock),
            (8, self._look),
            *([(5, self._crash), (3, self._fail_disk), (2, self._cut)] if self.faults else []),
        ]
        weights, events = zip(*table, strict=True)
        while self.steps > 0:
            await self._turn()
            self.steps -= 1
            host = rng.choice(self.hosts)
            if not host.dead:
                await rng.choices(events, weights)[0](host)

    async def _looker(self) -> None:
        while True:
            await asyncio.sleep(self.rng.choice([10, 30]))
            self._open.clear()
            await asyncio.sleep(30)
            volumes = [host.volume for host in self.hosts]
            if not self.backing and all(v is not None and v.machine.at_rest and v.error is None for v in volumes):
                self._check_all()
            self._open.set()

    # --- operators

    async def _points(self, host: Host) -> list[int]:
        answer = await self.ask(host, c.GetRestorable(volume=VOL, all_points=True))
        return [point.gid for point in answer.points] if answer is not None else []

    async def _restore(self, host: Host) -> None:
        points = await self._points(host)
        if not points:
            return
        gid = self.rng.choice(points)
        info = await self.ask(host, c.Restore(volume=VOL, gid=gid))
        if info is None:
            if self.code() == "not-reachable" and gid in await self._points(host):
                raise Broken(f"{host.name}: {gid} is listed and cannot be restored: {self.last}")
            return
        path = Path(str(info.result["path"]))
        if host.disk.exists(path):
            self._compare(host, gid, host.disk.read_bytes(path))
        await self.ask(host, c.DelRestored(volume=VOL, gid=gid))

    async def _apply(self, host: Host) -> None:
        points = await self._points(host)
        if points:
            gid = min(self.rng.choices(points, k=2))
            if held := [held for held in host.promises.held if held < gid]:
                await self.ask(host, c.Apply(volume=VOL, gid=gid))
                return self.say("not applied past a hold", host.name, gid, held)
            volume = host.volume
            unfinished = volume.base.end.gid_b if volume is not None and volume.base.end is not None else 0
            host.promises.apply(max(gid, unfinished))
            await self.ask(host, c.Apply(volume=VOL, gid=gid))

    async def _merge(self, host: Host) -> None:
        rng, points = self.rng, await self._points(host)
        if points:
            gid = rng.choice(points)
            limit = {"gid_e": gid + rng.randint(2, 12)} if rng.random() < 0.7 else {"size_max_b": 20_000}
            await self.ask(host, m.Merge(volume=VOL, gid_b=gid, **limit))

    async def _hold(self, host: Host) -> None:
        points = await self._points(host)
        if points:
            gid = self.rng.choice(points)
            if await self.ask(host, m.AddHold(volume=VOL, gid=gid, reason="x")) and gid >= host.promises.floor:
                host.promises.held.add(gid)

    async def _release_hold(self, host: Host) -> None:
        if host.promises.held:
            gid = self.rng.choice(sorted(host.promises.held))
            host.promises.held.discard(gid)
            await self.ask(host, m.DeleteHold(volume=VOL, gid=gid))

    async def _protect(self, host: Host) -> None:
        points = (await self._points(host))[:-1]
        if points:
            gid = self.rng.choice(points)
            done = await self.ask(host, m.EnableSnapshot(volume=VOL, gids=[gid]))
            if done and host.keeps_all and gid >= host.promises.floor:  # else the policy may release it
                host.promises.explicit.add(gid)

    async def _unprotect(self, host: Host) -> None:
        if host.promises.explicit:
            gid = self.rng.choice(sorted(host.promises.explicit))
            host.promises.explicit.discard(gid)
            await self.ask(host, m.DisableSnapshot(volume=VOL, gids=[gid]))

    async def _replicate(self, host: Host) -> None:
        rng = self.rng
        to = rng.choice([other for other in self.hosts if other is not host])
        resync = rng.random() < 0.08 and to is not self.primary
        if resync or to.state == "SyncReady":
            to.promises.give_up()
        request = m.Replicate(
            volume=VOL,
            dest=str(to.address),
            resync=resync,
            dont_merge=rng.random() < 0.3,
            compress=rng.choice(["lz4", "zstd:1", "none"]),
            bulk_b=BULK_B,
        )
        info = await self.ask(host, request)
        self.say("replicate", host.name, to.name, resync, info.result if info is not None else self.last)
        if info is not None:
            self.events[f"copy: {info.result['kind']}"] += 1
            self.events["comparing"] += any(diff.comp for diff in to.volume.diffs) if to.volume else 0

    async def _hash(self, host: Host) -> None:
        points = await self._points(host)
        gid = self.rng.choice(points or [0])
        if gid not in self.truth:
            return
        bulk_b, data = 4 * LB, memoryview(self.truth[gid][1])
        request = m.BlockHash(volume=VOL, gid=gid, bulk_b=bulk_b, size_lb=len(data) // LB)
        info = await self.ask(host, request)
        total = BlockHash()
        for at in range(0, len(data), bulk_b):
            total.update(data[at : at + bulk_b])
        if info is not None and info.result["hash"] != total.digest().hex():
            raise Broken(f"{host.name}: the hash of {gid} differs")

    async def _resize(self, host: Host) -> None:
        volume, rng = host.volume, self.rng
        if volume is not None and volume.size_lb < 96:
            size_b = (volume.size_lb + rng.randint(0, 5)) * LB
            await self.ask(host, c.Resize(volume=VOL, size_b=size_b, zero=rng.random() < 0.5))

    async def _small_things(self, host: Host) -> None:
        volume = host.volume
        colds = sorted(map(int, volume.record.colds)) if volume is not None else []
        info = await self.ask(host, m.Scrub(volume=VOL))
        if info is not None and info.result["damaged"] and host.disk.fails is None:
            raise Broken(f"{host.name}: damaged: {info.result['damaged_files']}")
        await self.ask(host, c.GcDiff(volume=VOL))
        if colds:
            await self.ask(host, m.DelCold(volume=VOL, gid=self.rng.choice(colds)))
        await self.ask(host, m.ForgetReplica(volume=VOL, node=self.rng.choice(self.hosts).name))

    async def _stop(self, host: Host) -> None:
        await self.ask(host, c.Stop(volume=VOL, how=self.rng.choice(WAYS)))
        if self.rng.random() < 0.3:
            await self.ask(host, m.DbgReloadMetadata(volume=VOL))
        await asyncio.sleep(self.rng.random() * 3)
        await self._start(host)

    async def _start(self, host: Host) -> None:
        for _ in range(30):
            if await self.ask(host, c.Start(volume=VOL)) or host.state != "Stopped":
                return
            await asyncio.sleep(0.5)

    async def _reset(self, host: Host) -> None:
        """Give a copy up; the next replication makes a new one."""
        if host in (self.hosts[0], self.primary) or self.rng.random() < 0.7:
            return
        host.promises.give_up()
        await self.ask(host, c.Stop(volume=VOL, how=self.rng.choice(WAYS)))
        await self.ask(host, c.ResetVol(volume=VOL))
        await self._start(host)

    async def _set_policy(self, host: Host) -> None:
        rng = self.rng
        to = rng.choice([other for other in self.hosts if other is not host])
        copies = (Replication(name=to.name, dest=str(to.address), interval_s=5, compress="lz4"),)
        keep = "everything" if host.keeps_all else rng.choice(["all=10m", "last=4", "all=1m hourly=2"])
        policy = Policy(
            levels=parse_levels(rng.choice(["30s:20s 2m:1m", "10s:5s", "none"])),
            keep=Grid.parse(keep),
            apply_interval_s=rng.choice([10, 60]),
            replications=copies if rng.random() < 0.6 else (),
        )
        await self.ask(host, SetPolicy(volume=VOL, policy=policy))

    async def _set_clock(self, host: Host) -> None:
        host.rig.clock.shift_s = self.rng.choice([0, 0, 100_000, -5000, 10**8])

    # --- faults

    async def _crash(self, host: Host) -> None:
        if host.disk.fails is not None or host.disk.on_change is not None or self.rng.random() < 0.6:
            return
        disk = host.disk
        left = crash_after(disk, self.rng, self.rng.randint(1, 60), host.wires)
        for _ in range(60):
            await asyncio.sleep(0.1)
            if left:
                self.say(host.name, "dies")
                self.events["crash"] += 1
                return await host.reboot(left[0])
        disk.on_change = None

    async def _fail_disk(self, host: Host) -> None:
        """For a while some operations fail."""
        rng, disk = self.rng, host.disk
        if disk.fails is not None or disk.on_change is not None:
            return
        share = rng.choice([0.02, 0.1, 0.5, 1.0])

        def fail() -> None:
            if rng.random() < share:
                raise rng.choice([DiskFailed, DiskFull])("the disk fails")

        disk.fails = fail
        await asyncio.sleep(rng.random() * 1.5)
        disk.fails = None
        self.events["disk failed"] += 1
        if host.volume is not None and host.volume.error is not None:
            self.events["broken"] += 1
            await host.reboot(disk.copy())

    async def _cut(self, host: Host) -> None:
        host.wires.cut_one(self.rng)

    # --- what must hold

    async def _look(self, host: Host) -> None:
        """Look at what must hold at any moment."""
        volume, promises = host.volume, host.promises
        if volume is None or host.dead or volume.error is not None or not volume.is_holding:
            return
        if volume.latest != volume.diffs.latest(volume.base):
            raise Broken(f"{host.name}: latest is {volume.latest}, not {volume.diffs.latest(volume.base)}")
        for every in (False, True):
            if volume.restorable(all_points=every) != volume.diffs.restorable(volume.base, all_points=every):
                raise Broken(f"{host.name}: what is known of the points is wrong")
        if promises.floor == FOR_EVER:
            return
        if lost := promises.held - {point.gid for point in volume.restorable(all_points=True)}:
            raise Broken(f"{host.name}: held points have gone: {lost}; the base is {volume.base}")
        if lost := promises.explicit - {point.gid for point in volume.restorable()} - {volume.base.begin.gid_b}:
            raise Broken(f"{host.name}: protected points have gone: {lost}; the base is {volume.base}")
        if volume.latest.begin.gid_b < promises.latest:
            raise Broken(f"{host.name}: {promises.latest} was acknowledged; latest is {volume.latest}")

    def _check_all(self) -> None:
        """Look at everything, while nothing is at work."""
        self.events["all checked"] += 1
        for host in self.hosts:
            volume = host.volume
            if volume is None or volume.base.begin.is_none or not volume.is_holding:
                continue
            if host.promises.floor == FOR_EVER:
                host.promises.floor, host.promises.latest = int(volume.base.begin.gid_b), -1
            points = [point.gid for point in volume.restorable(all_points=True)]
            for gid in points:
                self._compare_all_ways(host, volume, gid)
            latest = volume.latest.begin
            told = volume.record.uuid
            if latest.is_clean and told not in (bytes(16).hex(), self.truth[latest.gid_b][0].hex()):
                raise Broken(f"{host.name}: {latest} is of another history than the record says")
            self._check_gaps(host, volume, points)

    def _compare_all_ways(self, host: Host, volume: Volume, gid: int) -> None:
        """Read a point from the base, and from the nearest cold image."""
        images = volume.place.images
        for start in {volume.base, start_for(volume, gid)}:
            diffs = volume.diffs.to_materialise(start, gid, clean=True)
            cold = cold_gid(volume, start)
            base = images.open_base(VOL) if cold is None else images.open_cold(VOL, cold)
            with base, opened(host.disk, volume.directory, diffs) as readers:
                image = VirtualImage(base, readers, volume.size_lb * LB)
                self._compare(host, gid, image.read(0, image.size_b))

    def _compare(self, host: Host, gid: int, data: bytes) -> None:
        if gid not in self.truth:
            raise Broken(f"{host.name}: {gid} was never a snapshot")
        truth = self.truth[gid][1]
        if data[: len(truth)] != truth or any(data[len(truth) :]):
            raise Broken(f"{host.name}: the image of {gid} is wrong")
        self.events["compared"] += 1

    def _check_gaps(self, host: Host, volume: Volume, points: Sequence[int]) -> None:
        """Where a history ends, or images were compared, a gap is told of; and nowhere else where points are."""
        gaps = within(volume.record.gaps, volume.restorable(all_points=True))
        for begin, end in itertools.pairwise(points):
            if self.truth[begin][0] == self.truth[end][0]:
                continue
            self.events["gap"] += 1
            if not any(begin <= gap.gid_b and (gap.gid_e or end) <= end for gap in gaps):
                raise Broken(f"{host.name}: no gap is told of between {begin} and {end}: {gaps}")
        for diff in volume.diffs:
            begin, end = diff.begin.gid_b, diff.end.gid_b
            told = any(gap.gid_b <= begin and end <= (gap.gid_e or FOR_EVER) for gap in gaps)
            if diff.comp and points and points[0] <= begin and not told:
                raise Broken(f"{host.name}: no gap is told of for {diff}: {gaps}")
        for gap in gaps:
            if inside := [gid for gid in points if gap.gid_b < gid < (gap.gid_e or FOR_EVER)]:
                raise Broken(f"{host.name}: there are points inside {gap}: {inside}")

    async def _settle(self) -> None:
        """In the end all arrives at the primary archive, and then at the others."""
        primary = self.primary
        await asyncio.sleep(100)
        for host in self.hosts:
            host.rig.clock.shift_s = 0
            if host.state == "Stopped":
                await self._start(host)
        await self.ask(primary, c.Resize(volume=VOL, size_b=self.size_lb * LB))
        for _ in range(20):
            if self.alive or await self.backup(primary, self.hash_backup):
                break
            await asyncio.sleep(3)
        else:
            raise Broken(f"no backup is possible any more: {self.last}")
        self.write()
        newest = Snapshot.clean(self.snapshot(explicit=True))
        self.say("settle", primary.name, primary.state, newest, [(k, len(q)) for k, q in self.queues.items()])
        for _ in range(3000):
            if not any(self.queues[proxy, primary.number] for proxy in range(2)):
                break
            for proxy in range(2):
                await self.deliver(proxy, primary)
            await asyncio.sleep(0.3)
        assert primary.volume is not None
        if primary.volume.latest.begin != newest:
            raise Broken(f"{primary.name} is at {primary.volume.latest}, not at {newest}")
        for host in self.hosts:
            if host is not primary:
                await self._bring_up(host, primary, newest)
        self._check_all()

    async def _bring_up(self, host: Host, primary: Host, newest: Snapshot) -> None:
        for attempt in range(30):
            host.promises.give_up()
            request = m.Replicate(volume=VOL, dest=str(host.address), bulk_b=BULK_B, resync=attempt >= 10)
            if await self.ask(primary, request) is not None:
                break
            assert primary.volume is not None
            await self.ask(host, c.Resize(volume=VOL, size_b=primary.volume.size_lb * LB))
            await asyncio.sleep(5)
        assert host.volume is not None
        if host.volume.latest.begin != newest:
            raise Broken(f"{host.name} is at {host.volume.latest}, not at {newest}: {self.last}")
        self.events["settled by resync"] += attempt >= 10


def live(seed: int, *, steps: int = 120) -> Counter[str]:
    """Live one life; return what happened. Raises Broken, or whatever went wrong, with the end of the story."""
    life = Life(seed, steps=steps)
    try:
        run(life.live())
    except BaseException as exc:
        if isinstance(exc, KeyboardInterrupt):
            raise
        raise AssertionError(f"seed {seed}: {exc!r}\n" + "\n".join(life.story[-30:])) from exc
    return life.events
