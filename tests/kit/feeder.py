"""An archive in this process, and the peers that feed it: a storage and a proxy played over the real shell.

    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig, "vol0", size_lb=64)
        await feed.init()
        await feed.full_backup()
        feed.write(...)
        await feed.send()
        assert await rig.restored_image("vol0", gid) == feed.images[gid]

`Feed` is the plain-array model: it remembers what the volume held at each generation.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import lz4.block
import xxhash

from tests.kit.running import Running
from tests.kit.wdiffs import MemoryFile
from walbd.archive.config import ArchiveConfig
from walbd.archive.server import ArchiveServer
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection, Me, call, dial
from walbd.daemon.env import Env
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.daemon.net import Address
from walbd.format.compress import CompressOpt
from walbd.format.meta import Diff, Snapshot
from walbd.format.wdiff_write import SortedWdiffWriter
from walbd.fs import FileSystem, OsFileSystem
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol.base import End, JobInfo, JobState, Kind, Ok, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.protocol.transfer import (
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    FullChunk,
    LogReset,
    Packing,
    Verdict,
    WdiffChunk,
    WdiffOffer,
    WdiffVerdict,
)
from walbd.units import LB

M = TypeVar("M", bound=Message)

CONTROL = Me(node="ctl", kind=Kind.CONTROL, io_timeout_s=20)
STORAGE = Me(node="s0", kind=Kind.STORAGE, io_timeout_s=20)
PROXY = Me(node="p0", kind=Kind.PROXY, io_timeout_s=20)
ZSTD1 = CompressOpt.parse("zstd:1")
NOW = 1_700_000_000

Hole = tuple[str, int]  # ("zero" or "discard", number of blocks)


@dataclass
class FakeClock:
    """A clock that tests move."""

    time_s: int = NOW

    def now(self) -> int:
        return self.time_s


class ArchiveRig:
    """One archive that can be crashed and started again on the same directory."""

    def __init__(self, base: Path, *, fs: FileSystem | None = None, **settings: Any) -> None:
        self.base = base
        self.settings: dict[str, Any] = {
            "node_id": "a0",
            "port": 0,
            "io_timeout_s": 20.0,
            "free_reserve_b": 0,
            "policy": False,  # what a test leaves unfinished stays so
        } | settings
        self.env = Env(fs=fs or OsFileSystem(), clock=FakeClock(), rng=random.Random(1))
        self.shutdown = Shutdown()
        self.server = self._make()
        self._running = Running()

    def _make(self) -> ArchiveServer:
        return ArchiveServer(ArchiveConfig(base_dir=str(self.base), **self.settings), self.env, self.shutdown)

    @property
    def address(self) -> Address:
        return self.server.addresses[0]

    def volume(self, name: str) -> Volume:
        return self.server.volumes[name]

    async def up(self) -> None:
        """Start; raises what keeps the archive from starting."""
        self.shutdown = Shutdown()
        self.server = self._make()
        await self._running.up(self.server.start)

    async def crash(self) -> None:
        """End everything that runs, at whatever place it is, and forget all that is in memory."""
        await self._running.crash()
        if self.server.addresses:
            self.server._server._closing = True
            for listener in self.server._server._listeners:
                listener.close()
            if self.server._lock is not None:
                self.server._lock.close()

    async def stop(self, mode: ShutdownMode = ShutdownMode.GRACEFUL) -> None:
        """End in an orderly way."""
        await self.server.stop(mode)
        await self.crash()

    async def restart(self) -> None:
        await self.crash()
        await self.up()

    async def __aenter__(self) -> Self:
        await self.up()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.crash()
        self.env.pools.close()

    async def call(self, request: Request[M], me: Me = CONTROL) -> M:
        """Make one call."""
        return await call(self.env, me, self.address, request)

    @asynccontextmanager
    async def dial(self, me: Me) -> AsyncIterator[Connection]:
        async with dial(self.env, me, self.address) as conn:
            yield conn

    async def job(self, request: Request[Any]) -> JobInfo:
        """Start a job and return how it ended."""
        number = (await self.call(request)).job
        return await self.ended(number)

    async def ended(self, number: int) -> JobInfo:
        """Return a job once it has ended."""
        while (info := await self.call(WaitJob(job=number, wait_s=20))).state is JobState.RUNNING:
            pass
        return info

    async def done(self, request: Request[Any]) -> JobInfo:
        """Start a job that must succeed."""
        info = await self.job(request)
        assert info.state is JobState.DONE, f"{info.error} {info.hint}"
        return info

    async def state(self, volume: str) -> str:
        return (await self.call(c.GetState(volume=volume))).value

    async def status(self, volume: str) -> c.VolumeStatus:
        return (await self.call(c.GetStatus(volume=volume))).volumes[0]

    async def points(self, volume: str) -> list[int]:
        """Every generation that can be restored."""
        return [p.gid for p in (await self.call(c.GetRestorable(volume=volume, all_points=True))).points]

    async def restored_image(self, volume: str, gid: int) -> bytes:
        """Restore, read, delete."""
        await self.done(c.Restore(volume=volume, gid=gid))
        path = (await self.call(c.GetRestoredPath(volume=volume, gid=gid))).value
        with self.env.fs.open(Path(path)) as file:
            data = file.pread(file.size(), 0)
        await self.call(c.DelRestored(volume=volume, gid=gid))
        return data

    async def stopped(self, volume: str) -> None:
        await self.done(c.Stop(volume=volume))

    async def settled(self, volume: str = "vol0") -> None:
        """Wait until nothing is at work for a volume: a client that has left knows nothing of that."""
        machine = self.volume(volume).machine
        await machine.wait_for(lambda: machine.at_rest, timeout_s=60, what="the end of all work")

    async def idle(self) -> None:
        """Wait until every job has ended: a client may have the last message of one a moment before."""
        async with asyncio.timeout(60):
            await self.server.jobs.idle()


def make_wdiff(blocks: dict[int, bytes | str], uuid: bytes, compress: CompressOpt = ZSTD1) -> bytes:
    """Return a sorted wdiff of single blocks: data, or "zero" or "discard"; neighbours of a kind are joined."""
    out = MemoryFile()
    writer = SortedWdiffWriter(out, uuid, compress)
    for begin, run in _runs(blocks):
        match run[0]:
            case "zero":
                writer.add_zero(begin, len(run))
            case "discard":
                writer.add_discard(begin, len(run))
            case _:
                writer.add_data(begin, b"".join(run))  # type: ignore[arg-type]
    writer.finish()
    return bytes(out.data)


def _runs(blocks: dict[int, bytes | str]) -> Iterable[tuple[int, list[bytes | str]]]:
    begin, run = 0, list[bytes | str]()
    for at in sorted(blocks):
        kind = blocks[at] if isinstance(blocks[at], str) else "data"
        last = (run[-1] if isinstance(run[-1], str) else "data") if run else ""
        if run and (at != begin + len(run) or kind != last or len(run) == 128):
            yield begin, run
            run = []
        if not run:
            begin = at
        run.append(blocks[at])
    if run:
        yield begin, run


async def offer_wdiff(
    conn: Connection, volume: str, diff: Diff, data: bytes, *, uuid: bytes, size_lb: int, pieces: int = 1
) -> Verdict | Ok:
    """Offer a wdiff and, when it is accepted, send it; return the archive's last word."""
    sender = Kind.PROXY
    answer = await conn.call(WdiffOffer(volume=volume, sender=sender, uuid=uuid, size_lb=size_lb, diff=diff))
    assert isinstance(answer, WdiffVerdict)
    if answer.verdict is not Verdict.ACCEPT:
        return answer.verdict
    for piece in cut_packs(data, pieces):
        await conn.send(WdiffChunk(), piece)
    await conn.send(End())
    return await conn.expect(Ok)


def cut_packs(data: bytes, pieces: int) -> list[bytes]:
    """Cut a sorted wdiff at pack boundaries into at most so many pieces."""
    if pieces <= 1:
        return [data]
    ends, at = [], 32
    while at < len(data):
        at += 4096 + int.from_bytes(data[at + 8 : at + 12], "little")
        ends.append(at)
    if len(ends) > pieces:
        ends = [*ends[: pieces - 1], ends[-1]]
    begins = [0, *ends[:-1]]
    return [data[b:e] for b, e in zip(begins, ends, strict=True)]


@dataclass
class Feed:
    """A volume, the storage and proxy that feed an archive with it, and what it held at each generation."""

    rig: ArchiveRig
    name: str = "vol0"
    size_lb: int = 64
    seed: int = 1
    images: dict[int, bytes] = field(default_factory=dict)
    acked: int = 0  # the newest generation that the archive has acknowledged
    gid: int = 0  # of the newest snapshot
    now: int = NOW
    on_chunk: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.image = bytearray(self.size_lb * LB)
        self.uuid = self.rng.randbytes(16)
        self._changed: dict[int, bytes | str] = {}
        self._unsent: list[tuple[Diff, bytes]] = []

    # --- the volume

    def write(self, begin_lb: int, n_lb: int, kind: str = "data") -> None:
        """Change some blocks."""
        for at in range(begin_lb, begin_lb + n_lb):
            block = self.rng.randbytes(16) * (LB // 16) if kind == "data" else bytes(LB)
            self.image[at * LB : (at + 1) * LB] = block
            self._changed[at] = block if kind == "data" else kind

    def scribble(self, count: int = 6) -> None:
        """Change something, here and there."""
        for _ in range(count):
            n_lb = self.rng.randint(1, 8)
            kind = self.rng.choice(["data", "data", "data", "zero", "discard"])
            self.write(self.rng.randint(0, self.size_lb - n_lb), n_lb, kind)

    def snapshot(self, *, mergeable: bool = True) -> Diff:
        """Cut the log here; the diff waits to be sent."""
        self.now += 1
        diff = Diff(
            Snapshot.clean(self.gid), Snapshot.clean(self.gid + 1), mergeable=mergeable, timestamp=self.now
        )
        self.gid += 1
        self.images[self.gid] = bytes(self.image)
        self._unsent.append((diff, make_wdiff(self._changed, self.uuid)))
        self._changed = {}
        return diff

    # --- feeding

    async def init(self) -> None:
        await self.rig.call(c.ArchiveInitVol(volume=self.name))

    async def begin(self, *, steps: int = 0) -> None:
        """Initialise the volume, with something in it, back it up, and take so many snapshots."""
        await self.init()
        self.scribble()
        await self.full_backup()
        await self.step(steps)

    async def full_backup(self, *, dirty: int = 0) -> BackupDone:
        """Back up what the volume holds now; with `dirty`, that many generations pass during the copy."""
        self.uuid = self.rng.randbytes(16)
        self.images, self.gid, self.acked, self._changed, self._unsent = {}, 0, 0, {}, []
        copy = bytearray()
        for step in range(dirty + 1):  # each part of the copy is of another instant
            end = self.size_lb * LB * (step + 1) // (dirty + 1) // LB * LB
            copy += self.image[len(copy) : end]
            if step < dirty:
                self.scribble()
                self.snapshot()
        if not dirty:
            self.images[0] = bytes(self.image)
        async with self.rig.dial(STORAGE) as conn:
            return await send_full_backup(
                conn, self.name, bytes(copy), self.uuid, Snapshot(Gid(0), Gid(self.gid)), on_chunk=self.on_chunk
            )

    async def send(self, *, pieces: int = 1) -> list[Verdict | Ok]:
        """Send what waits, oldest first; what is acknowledged, or known to be there, waits no more."""
        words = []
        async with self.rig.dial(PROXY) as conn:
            while self._unsent:
                diff, data = self._unsent[0]
                word = await offer_wdiff(
                    conn, self.name, diff, data, uuid=self.uuid, size_lb=self.size_lb, pieces=pieces
                )
                words.append(word)
                if not isinstance(word, Ok) and word is not Verdict.TOO_OLD:
                    break
                self.acked = max(self.acked, diff.end.gid_b)
                self._unsent.pop(0)
        return words

    async def step(self, count: int = 1, *, mergeable: bool = True) -> None:
        """Write, snapshot and send, so many times."""
        for _ in range(count):
            self.scribble()
            self.snapshot(mergeable=mergeable)
            assert all(isinstance(word, Ok) for word in await self.send())

    # --- checking

    async def check(self) -> list[int]:
        """Restore everything there is to restore and compare; return the generations."""
        points = await self.rig.points(self.name)
        volume = self.rig.volume(self.name)
        assert volume.latest == volume.diffs.latest(volume.base)
        for every in (False, True):
            assert volume.restorable(all_points=every) == volume.diffs.restorable(volume.base, all_points=every)
        for gid in points:
            if gid in volume.restored:
                continue  # kept by the test
            data, image = await self.rig.restored_image(self.name, gid), self.images[gid]
            assert data[: len(image)] == image, f"restore({gid}) differs"
            assert not any(data[len(image) :]), f"restore({gid}): what was grown is not zero"
        return points


async def send_full_backup(
    conn: Connection,
    volume: str,
    image: bytes,
    uuid: bytes,
    snapshot: Snapshot,
    *,
    started: int = NOW,
    chunk_b: int = 8 * LB,
    on_chunk: Callable[[], None] = lambda: None,
) -> BackupDone:
    """Play a storage that backs up `image`, as chunks of alternating packing."""
    await conn.call(FullBackupOffer(volume=volume, size_lb=len(image) // LB, started=started, bulk_b=chunk_b))
    await conn.call(LogReset(uuid=uuid))
    for number, at in enumerate(range(0, len(image), chunk_b)):
        on_chunk()
        await send_chunk(conn, at, image[at : at + chunk_b], lz4_packed=number % 2 == 0)
    await conn.send(End())
    await conn.expect(Ok)
    return await conn.call(BackupEnd(snapshot=snapshot))


async def send_chunk(conn: Connection, at: int, data: bytes, *, lz4_packed: bool, xxh: int | None = None) -> None:
    """Send one chunk of a full backup; zeros go without payload."""
    if not any(data):
        await conn.send(FullChunk(offset_b=at, size_b=len(data)))
        return
    payload = lz4.block.compress(data, store_size=False) if lz4_packed else data
    xxh = xxhash.xxh3_64_intdigest(data) if xxh is None else xxh
    packing = Packing.LZ4 if lz4_packed else Packing.NONE
    await conn.send(FullChunk(offset_b=at, size_b=len(data), packing=packing, xxh=xxh), payload)
