"""A volume at several archives, to which everything happens at once: on virtual time, from one seed.

A storage that is written to, two proxies, operators, the policies of the archives, power failures, disks that fail
for a while and connections that break: all of them are tasks of one loop. `Promises` has what operators were told;
the truth is what the device was at each snapshot. Generations never come twice, as a storage sees to it.

Here are the archives with their disks, the storage and the proxies; tests/kit/storm_life.py has the others, what
must hold, and `live(seed)`.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.feeder import CONTROL, PROXY, STORAGE, make_wdiff, send_chunk
from tests.kit.mem_net import MemNetwork, MemStream
from tests.kit.memfs import MemoryFileSystem
from tests.kit.policy_rig import VirtualArchive
from tests.kit.virtual import InlinePools
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection, call, dial
from walbd.daemon.copying import ImageSource
from walbd.daemon.env import Env
from walbd.daemon.hash_sync import send_differences
from walbd.daemon.net import Accept, Address, Listener
from walbd.errors import ConnectError, RemoteError, WalbError
from walbd.format.meta import Diff, Snapshot, can_merge, hash_backup_gid, merge
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol.base import End, JobAccepted, JobInfo, JobState, Kind, Ok, WaitJob
from walbd.protocol.codec import Request
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import (
    BackupEnd,
    FullBackupOffer,
    LogReset,
    Verdict,
    WdiffChunk,
    WdiffOffer,
)
from walbd.units import LB

VOL = "vol0"
BASE = Path("/archive")
BULK_B = 2 * LB
SEED = 5  # of hashes
FOR_EVER = 1 << 62
FINE = {  # what an operator may be told; all else is a defect
    *("busy", "stopping", "bad-state", "not-reachable", "not-mergeable", "already-exists", "not-found", "refused"),
    *("force-stopped", "history-broken", "connect", "timed-out", "usage", "disk-failed", "disk-full", "remote"),
}


class Broken(AssertionError):
    """A promise was not kept."""


class Disk(MemoryFileSystem):
    """A disk of which operations may fail, before or after they were done."""

    fails: Callable[[], None] | None = None

    @contextmanager
    def change(self) -> Iterator[None]:
        if self.fails is not None:
            self.fails()
        with super().change():
            yield
            if self.fails is not None:
                self.fails()

    def after_crash(self, rng: random.Random) -> Disk:
        return self._like(super().after_crash(rng))

    def copy(self) -> Disk:
        return self._like(super().copy())

    @staticmethod
    def _like(other: MemoryFileSystem) -> Disk:
        disk = Disk()
        disk.root, disk.shares = other.root, other.shares
        return disk


class Wires:
    """The part of a network that one daemon uses (`walbd.daemon.net.Network`)."""

    def __init__(self, net: MemNetwork) -> None:
        self._net = net
        self._streams: list[MemStream] = []
        self._listens: Address | None = None
        self._dead = False

    async def connect(self, address: Address, tls: Any = None) -> MemStream:
        if self._dead:
            raise ConnectError("this host is dead")
        stream = await self._net.connect(address, tls)
        self._streams.append(stream)
        return stream

    async def listen(self, address: Address, accept: Accept, tls: Any = None) -> Listener:
        def taken(stream: Any) -> None:
            self._streams.append(stream)
            accept(stream)

        self._listens = address
        return await self._net.listen(address, taken, tls)

    def kill(self) -> None:
        """End all of it at once: what the daemon says from now on, nobody hears."""
        self._dead = True
        if self._listens is not None:
            self._net.forget(self._listens)
        for stream in self._streams:
            stream.abort()

    def cut_one(self, rng: random.Random) -> None:
        """Break one connection."""
        live = [stream for stream in self._streams if not stream._closed]
        if live:
            rng.choice(live).abort()


@dataclass(eq=False)
class Item:
    """A wdiff at a proxy."""

    uuid: bytes
    diff: Diff
    blocks: dict[int, bytes | str]
    size_lb: int


@dataclass
class Promises:
    """What was said of one archive, and must be so until something is said that takes it back."""

    held: set[int] = field(default_factory=set)
    explicit: set[int] = field(default_factory=set)
    latest: int = -1  # it has at least this generation
    floor: int = -1  # an apply may have moved the base up to here

    def apply(self, gid: int) -> None:
        """Somebody has asked for an apply."""
        self.floor = max(self.floor, gid)
        self.held = {held for held in self.held if held >= self.floor}
        self.explicit = {explicit for explicit in self.explicit if explicit >= self.floor}

    def give_up(self) -> None:
        """The volume is going to be copied anew."""
        self.held, self.explicit, self.latest, self.floor = set(), set(), -1, FOR_EVER


class Host:
    """One archive, its disk and its network."""

    def __init__(self, number: int, net: MemNetwork, rng: random.Random, **settings: Any) -> None:
        self.number = number
        self.name = f"a{number}"
        self.address = Address("127.0.0.1", 10200 + number)
        self.rng = rng
        self.net = net
        self.promises = Promises()
        self.fed = True
        self.dead = False
        self.disk = Disk()
        self.disk.make_dir(BASE)
        self.rig = VirtualArchive(self.name, net=net, port=self.address.port, **settings)
        self._pools = InlinePools(random.Random(rng.random()), turns_max=rng.choice([1, 2, 6]))
        self.keeps_all = settings["keep"] == "everything"
        self._use(self.disk)

    def _use(self, disk: Disk) -> None:
        self.disk, self.wires = disk, Wires(self.net)
        rig = self.rig
        rig.env = Env(fs=disk, net=self.wires, clock=rig.clock, rng=rig.env.rng, pools=self._pools)

    @property
    def env(self) -> Env:
        """Of those who talk to it: they live on when it dies."""
        return Env(fs=self.disk, net=self.net, clock=self.rig.clock, rng=self.rng, pools=self._pools)

    @property
    def volume(self) -> Volume | None:
        return self.rig.server.volumes.get(VOL)

    @property
    def state(self) -> str:
        return str(self.volume.machine.shown) if self.volume is not None else "Clear"

    async def reboot(self, disk: Disk) -> None:
        """Start on what a crash has left; sometimes that crashes, too."""
        self.dead = True
        self.wires.kill()
        await self.rig.crash()
        self._use(disk)
        left = crash_after(disk, self.rng, self.rng.randint(1, 8), self.wires) if self.rng.random() < 0.3 else []
        await self.rig.up()
        disk.on_change = None
        if left:
            return await self.reboot(left[0])
        self.dead = False
        if self.volume is None or self.volume.error is not None:
            raise Broken(f"{self.name} cannot use what is left: {self.volume and self.volume.error}")


def _time() -> float:
    return asyncio.get_running_loop().time()


def crash_after(disk: Disk, rng: random.Random, fuse: int, wires: Wires) -> list[Disk]:
    """Let the power fail, or the process be killed, after so many operations; then the list has what is left."""
    left: list[Disk] = []
    power = rng.random() < 0.6

    def burn() -> None:
        nonlocal fuse
        fuse -= 1
        if fuse == 0:
            left.append(disk.after_crash(rng) if power else disk.copy())
            wires.kill()

    disk.on_change = burn
    return left


class Storm:
    """One life of the volume."""

    def __init__(self, seed: int, *, steps: int) -> None:
        self.rng = rng = random.Random(seed)
        self.steps = steps
        self.events: Counter[str] = Counter()
        self.story: list[str] = []
        net = MemNetwork()
        shares, self.faults = rng.random() < 0.6, rng.random() < 0.8
        common = {"policy": rng.random() < 0.5, "auto_resize": rng.random() < 0.7}
        self.hosts = [
            Host(
                number,
                net,
                rng,
                **common,
                open_files_max=rng.choice([0, 1, 2, 3, 256]),
                fsync_interval_b=rng.choice([2048, 8192, 1 << 20]),
                levels=rng.choice(["30s:20s 2m:1m", "1m:40s", "none"]),
                keep=rng.choice(["everything", "everything", "all=10m"]),
                apply_interval_s=rng.choice([60, 600]),
                keep_one_cold=rng.random() < 0.3,
                wdiffs_max=rng.choice([1, 2, 16]),
                backups_max=rng.choice([1, 2, 8]),
                replications_max=rng.choice([1, 2]),
                merge_compress=rng.choice(["lz4", "zstd:1", "none"]),
            )
            for number in range(rng.choice([2, 2, 3]))
        ]
        for host in self.hosts[1:]:
            host.fed = rng.random() < 0.6
        for host in self.hosts:
            host.disk.shares = shares
        self.primary = self.hosts[0]
        self.size_lb = rng.choice([16, 32])
        self.image = bytearray(self.size_lb * LB)
        self.truth: dict[int, tuple[bytes, bytes]] = {}  # by generation: history, image
        self.queues: dict[tuple[int, int], list[Item]] = {(p, h.number): [] for p in range(2) for h in self.hosts}
        self.gid = 0  # greatest ever
        self.alive = self.backing = self.ended = False
        self.last: Any = None  # why the last request was not granted
        self._reset_log(0)
        self._open = asyncio.Event()  # closed while all is looked at

    def say(self, *words: object) -> None:
        """Tell the story, for whoever has to find out what went wrong."""
        self.story.append(f"{_time():8.3f} " + " ".join(map(str, words)))

    # --- the device and its storage

    def _reset_log(self, gid: int) -> None:
        self.uuid = self.rng.randbytes(16)
        self.done = gid  # where the next diff begins
        self.gid = max(self.gid, gid)
        self.changed: dict[int, bytes | str] = {}
        self.explicit, self.alive = True, False

    def write(self) -> None:
        rng = self.rng
        for _ in range(rng.randint(1, 3)):
            n_lb = rng.randint(1, 4)
            begin = rng.randint(0, self.size_lb - n_lb)
            kind = rng.choice(["data", "data", "data", "again", "zero", "discard"])
            for at in range(begin, begin + n_lb):
                block = rng.randbytes(8) * (LB // 8) if kind == "data" else bytes(LB)
                if kind == "again":  # few contents, so that blocks come back to what they were
                    block = bytes([rng.randint(1, 3)]) * LB
                self.image[at * LB : (at + 1) * LB] = block
                self.changed[at] = kind if kind in ("zero", "discard") else block

    def snapshot(self, *, explicit: bool) -> int:
        """Cut the log here, and hand it to one of the proxies."""
        rng = self.rng
        self.gid = max(self.gid, self.done) + rng.choice([1, 1, 1, 2, 5])
        diff = Diff(
            Snapshot.clean(self.done),
            Snapshot.clean(self.gid),
            mergeable=not self.explicit,
            timestamp=self.hosts[0].rig.clock.now() - 1,
        )
        self.truth[self.gid] = (self.uuid, bytes(self.image))
        proxy = rng.randrange(2)
        for host in self.hosts:
            if host.fed:
                item = Item(self.uuid, diff, dict(self.changed), self.size_lb)
                self.queues[proxy, host.number].append(item)
        self.done, self.changed, self.explicit = self.gid, {}, explicit
        return self.gid

    def _live_on(self) -> None:
        if self.rng.random() < 0.4:
            self.write()
            if self.rng.random() < 0.4:
                self.snapshot(explicit=self.rng.random() < 0.3)

    async def backup(self, host: Host, conduct: Callable[[Connection], Awaitable[None]]) -> bool:
        self.backing = True
        try:
            async with dial(host.env, STORAGE, host.address) as conn:
                await conduct(conn)
        except WalbError as exc:
            self.last = exc
            self.say("the backup failed:", exc)
            self.events["backup failed"] += 1
            return False
        finally:
            self.backing = False
        self.alive = True
        self.events["backup"] += 1
        return True

    async def full_backup(self, conn: Connection) -> None:
        started, size_b = self.hosts[0].rig.clock.now() - 1, self.size_lb * LB
        await conn.call(FullBackupOffer(volume=VOL, size_lb=self.size_lb, started=started, bulk_b=BULK_B))
        self._reset_log(0)
        await conn.call(LogReset(uuid=self.uuid))
        for at in range(0, size_b, BULK_B):
            await send_chunk(conn, at, bytes(self.image[at : at + BULK_B]), lz4_packed=True)
            self._live_on()
        await conn.send(End())
        await conn.expect(Ok)
        await conn.call(BackupEnd(snapshot=Snapshot(Gid(0), Gid(self.snapshot(explicit=True)))))

    async def hash_backup(self, conn: Connection) -> None:
        started, size_lb = self.hosts[0].rig.clock.now() - 1, self.size_lb
        offer = HashBackupOffer(volume=VOL, size_lb=size_lb, started=started, bulk_b=BULK_B, seed=SEED)
        accepted = await conn.call(offer)
        assert accepted.latest is not None
        begin = max(hash_backup_gid(accepted.latest), self.gid + 1)
        self._reset_log(begin)
        await conn.call(LogReset(uuid=self.uuid))

        async def read(offset_b: int, size_b: int) -> bytes:
            await asyncio.sleep(0)
            self._live_on()
            return bytes(self.image[offset_b : offset_b + size_b])

        source = ImageSource(read=read, size_b=accepted.size_lb * LB, data_b=size_lb * LB)
        pools = self.hosts[0].env.pools
        await send_differences(conn, pools, source, bulk_b=BULK_B, seed=SEED, uuid=self.uuid)
        await conn.call(BackupEnd(snapshot=Snapshot(Gid(begin), Gid(self.snapshot(explicit=True)))))

    # --- proxies

    async def deliver(self, proxy: int, host: Host) -> None:
        """Offer the first wdiff that waits, or what several of them make together."""
        queue = self.queues[proxy, host.number]
        if not queue:
            return
        items, label, blocks = queue[:1], queue[0].diff, dict(queue[0].blocks)
        for item in queue[1 : self.rng.choice([1, 2, 6])]:
            if item.uuid != items[0].uuid or not can_merge(label, item.diff):
                break
            label = merge(label, item.diff)
            blocks |= item.blocks
            items.append(item)
        try:
            async with dial(host.env, PROXY, host.address) as conn:
                taken = await self._offer(conn, host, items, label, blocks)
        except WalbError as exc:
            code = exc.remote_code if isinstance(exc, RemoteError) else exc.code
            if code not in FINE:
                raise Broken(f"a wdiff to {host.name}: {exc} {exc.facts}") from exc
            return
        if taken:
            self.queues[proxy, host.number] = [item for item in queue if item not in items]

    async def _offer(
        self, conn: Connection, host: Host, items: list[Item], label: Diff, blocks: dict[int, bytes | str]
    ) -> bool:
        uuid, size_lb = items[0].uuid, max(item.size_lb for item in items)
        verdict = (
            await conn.call(WdiffOffer(volume=VOL, sender=Kind.PROXY, uuid=uuid, size_lb=size_lb, diff=label))
        ).verdict
        self.events[str(verdict)] += 1
        if verdict is not Verdict.ACCEPT:
            self.say("offer", label, host.name, verdict)
        if verdict is Verdict.SMALLER:
            await self.ask(host, c.Resize(volume=VOL, size_b=size_lb * LB))
        if verdict is not Verdict.ACCEPT:
            return verdict in (Verdict.TOO_OLD, Verdict.DIFFERENT_UUID)
        await conn.send(WdiffChunk(), make_wdiff(blocks, uuid))
        await conn.send(End())
        if self.rng.random() < 0.1:  # the answer is lost
            for _ in range(self.rng.randint(0, 10)):
                await asyncio.sleep(0)
            return False
        await conn.expect(Ok)
        host.promises.latest = max(host.promises.latest, label.end.gid_b)
        return True

    # --- requests

    async def ask(self, host: Host, request: Request[Any]) -> Any:
        """Make a request and wait for its job; return the answer, or None when it was not granted (see `last`)."""
        name = type(request).__name__
        try:
            answer = await call(host.env, CONTROL, host.address, request)
            if isinstance(answer, JobAccepted):
                answer = await self._ended(host, answer.job)
        except WalbError as exc:
            self.last = exc
            code = exc.remote_code if isinstance(exc, RemoteError) else exc.code
            answer = None
        else:
            code = ""
            if isinstance(answer, JobInfo) and answer.state is not JobState.DONE:
                self.last, code, answer = answer, answer.error_code, None
        self.events[f"{name} {code}".rstrip()] += 1
        if code and code not in FINE:
            raise Broken(f"{request} at {host.name}: {self.last} {getattr(self.last, 'facts', '')}")
        return answer

    async def _ended(self, host: Host, number: int) -> JobInfo:
        wait = WaitJob(job=number, wait_s=20)
        while (info := await call(host.env, CONTROL, host.address, wait)).state is JobState.RUNNING:
            pass
        return info

    def code(self) -> str:
        """Return the code with which the last request was not granted."""
        return str(getattr(self.last, "error_code", "") or getattr(self.last, "remote_code", ""))
