"""The archive of `tests.kit.history`, played by the product's own code on a disk in memory that forgets.

Backups and wdiffs come through `receive_full_backup`, `receive_hash_backup` and `receive_wdiff`, over connections
that are only queues; applies, merges and restores are the real jobs. A crash is a power failure at a random
operation of the disk.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import xxhash

from tests.kit.feeder import FakeClock, make_wdiff
from tests.kit.history import SIZE_LB, Crashed, DiffStore, History, MemoryStore, Proxy, Storage, Truth
from tests.kit.memfs import MemoryFileSystem
from walbd.archive.apply import run_apply
from walbd.archive.config import ArchiveConfig
from walbd.archive.diffs import opened
from walbd.archive.full_backup import receive_full_backup
from walbd.archive.gc_diff import gc_diffs
from walbd.archive.hash_backup import receive_hash_backup
from walbd.archive.images.file_store import FileStore
from walbd.archive.lifecycle import init_vol, reset_vol, stop
from walbd.archive.merge import plan_merge, run_merge
from walbd.archive.receive import receive_wdiff
from walbd.archive.recover import load_volume
from walbd.archive.restore import run_restore
from walbd.archive.slots import Slots
from walbd.archive.snapshots import change_snapshots
from walbd.archive.states import APPLY, MERGE, RESTORE, Command
from walbd.archive.volume import Place, Volume
from walbd.daemon.conn import Incoming, Peer
from walbd.daemon.env import Env, Pool
from walbd.daemon.jobs import Job
from walbd.daemon.states import StopMode
from walbd.daemon.tasks import Signal
from walbd.format.compress import CompressOpt
from walbd.format.hashes import hash_bulks, xxh3
from walbd.format.meta import (
    Diff,
    Relation,
    Snapshot,
    diff_name,
    hash_backup_gid,
    relation,
)
from walbd.format.virtual import VirtualImage
from walbd.protocol.base import End, Kind, Ok
from walbd.protocol.codec import Message
from walbd.protocol.sync import HashBackupOffer, HashRun, HashWanted
from walbd.protocol.transfer import (
    BackupDone,
    BackupEnd,
    FullBackupOffer,
    FullChunk,
    LogReset,
    WdiffChunk,
    WdiffOffer,
    WdiffVerdict,
)
from walbd.units import LB

T = TypeVar("T")
BASE = Path("/archive")
VOL = "vol0"
LZ4 = CompressOpt.parse("lz4")


class InlinePools:
    """Blocking calls made at once."""

    async def run(self, pool: Pool, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        await asyncio.sleep(0)
        return call(*args, **kwargs)

    def close(self) -> None:
        pass


class QueueConnection:
    """A connection whose peer has said everything in advance."""

    io_timeout_s = 3600.0

    def __init__(self, kind: Kind, *incoming: tuple[Message, bytes]) -> None:
        self.peer = Peer("peer", kind, "queue")
        self.sent: list[Message] = []
        self.hashes: list[bytes] = []  # sent
        self._wanted = 0
        self._changed = Signal()
        self._incoming = deque(incoming)

    async def send(self, message: Message, *payload: bytes) -> None:
        self.sent.append(message)
        if isinstance(message, HashRun):
            self.hashes.append(b"".join(payload))
            self._changed.set()

    async def receive(self) -> Incoming:
        message, payload = self._incoming.popleft()
        if isinstance(message, HashWanted):
            self._wanted += 1
        if not isinstance(message, HashWanted):  # the peer goes on when it has the hashes
            await self._changed.wait_for(lambda: len(self.hashes) >= self._wanted)
        return Incoming(message, memoryview(payload))

    async def expect(self, cls: type[Any]) -> Any:
        message, _ = await self.receive()
        assert isinstance(message, cls), message
        return message


class RealArchive:
    """Same methods as `tests.kit.history.Archive`."""

    def __init__(self, rng: random.Random, truth: Truth) -> None:
        self._rng = rng
        self._truth = truth
        self._runner = asyncio.Runner()
        self.events: Counter[str] = Counter()
        self.images: dict[int, bytes] = {}
        self.protected: set[int] = set()
        self.acked = 0
        self.store = SimpleNamespace(close=lambda: None)
        self.fs = MemoryFileSystem()
        self.fs.shares = rng.random() < 0.5  # then restores leave cold images
        self.fs.make_dir(BASE)
        self._left: MemoryFileSystem | None = None
        self._load(fresh=True)

    # --- the volume

    def _load(self, *, fresh: bool = False) -> None:
        config = ArchiveConfig(
            base_dir=str(BASE), free_reserve_b=0, policy=False, open_files_max=self._rng.choice((0, 0, 1, 3))
        )
        env = Env(fs=self.fs, clock=FakeClock(), rng=self._rng, pools=InlinePools())
        self.place = Place(env, config, FileStore(self.fs, BASE))
        self.volumes: dict[str, Volume] = {}
        if fresh:
            self._run(init_vol(self.volumes, VOL, self.place))
        else:
            volume = self.volumes[VOL] = Volume(VOL, self.place)
            volume.adopt(load_volume(self.fs, self.place.images, volume.directory))
        self.volume = self.volumes[VOL]

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return self._runner.run(work)

    def _risky(self, work: Callable[[], Coroutine[Any, Any, T]], chance: float) -> T:
        """Run; with this chance the power fails at some operation on the way."""
        fuse = self._rng.randint(1, 12) if self._rng.random() < chance else 0

        def burn() -> None:
            nonlocal fuse
            fuse -= 1
            if fuse == 0:
                self._left = self.fs.after_crash(self._rng)
                raise Crashed

        if fuse:
            self.fs.on_change = burn
        try:
            return self._run(work())
        except BaseExceptionGroup as group:
            raise Crashed from group
        finally:
            self.fs.on_change = None
            if self._left is not None:
                raise Crashed

    def restart(self) -> None:
        """Start again on what the crash has left."""
        self.events["restart"] += 1
        self.fs, self._left = self._left or self.fs.after_crash(self._rng), None
        self._load()
        self.events["restart in progress"] += self.base.is_applying
        if self.is_empty:
            assert not self.diffs
            return
        assert self.latest.gid_b >= self.acked, "something acknowledged is lost"
        finished = self.base.end_applying(self.diffs.minimum(self.base)).begin
        for diff, after in self.diffs.steps(finished):
            self._learn(after, self._uuid_of(diff))

    @property
    def diffs(self) -> Any:
        return self.volume.diffs

    @property
    def base(self) -> Any:
        return self.volume.base

    @property
    def latest(self) -> Snapshot:
        return self.volume.latest.begin

    @property
    def is_empty(self) -> bool:
        return bool(self.base.begin.is_none)

    def crash_sometimes(self, chance: float) -> None:
        if self._rng.random() < chance:
            raise Crashed

    def clear(self) -> None:
        """Stop and reset: a full backup will follow."""

        async def work() -> None:
            if not self.is_empty:
                with self.volume.machine.stop_flag(StopMode.GRACEFUL):
                    await stop(self.volume, job())
            await reset_vol(self.volume)

        self._run(work())
        self.images, self.protected, self.acked = {}, set(), 0

    # --- feeding

    def backup(self, image: bytes, uuid: bytes, gid: int, started: int) -> None:
        """Take a full backup."""
        chunks: list[tuple[Message, bytes]] = []
        for at in range(0, len(image), 4 * LB):
            data = image[at : at + 4 * LB]
            payload = data if any(data) else b""
            xxh = xxhash.xxh3_64_intdigest(data)
            chunks.append((FullChunk(offset_b=at, size_b=len(data), xxh=xxh), payload))
        conn = QueueConnection(
            Kind.STORAGE,
            (LogReset(uuid=uuid), b""),
            *chunks,
            (End(), b""),
            (BackupEnd(snapshot=Snapshot(0, gid)), b""),  # type: ignore[arg-type]
        )
        offer = FullBackupOffer(volume=VOL, size_lb=len(image) // LB, started=started, bulk_b=4 * LB)
        self._run(receive_full_backup(self.volume, Slots(1), conn, offer))  # type: ignore[arg-type]

    def receive(self, diff: Diff, source: DiffStore, parts: Sequence[Diff], uuid: bytes) -> str:
        """Answer a proxy, and take the diff if it continues what is here."""
        assert isinstance(source, MemoryStore)
        blocks: dict[int, bytes | str] = {}
        for part in parts:
            blocks.update(source._files[diff_name(part)][1])
        data = make_wdiff(blocks, uuid, LZ4)
        conn = QueueConnection(Kind.PROXY, (WdiffChunk(), data), (End(), b""))
        offer = WdiffOffer(volume=VOL, sender=Kind.PROXY, uuid=uuid, size_lb=SIZE_LB, diff=diff)
        expected = relation(self.latest, diff)
        self.events["overlapping diff received"] += diff.begin.gid_b < self.latest.gid_b

        def work() -> Coroutine[Any, Any, Ok | WdiffVerdict]:
            return receive_wdiff(self.volumes, self.place, Slots(1), conn, offer)  # type: ignore[arg-type]

        word = self._risky(work, 0.1)
        if isinstance(word, WdiffVerdict):
            return str(word.verdict)
        assert expected is Relation.APPLICABLE
        self.acked = self.latest.gid_b
        self._learn(self.latest, uuid)
        return "accept"

    def take_hash_backup(
        self, theirs: bytes, blocks: dict[int, bytes | str], uuid: bytes, taken: Snapshot, started: int
    ) -> None:
        """Take a hash backup from a storage that compared with `theirs`, and found that `blocks` differ."""
        size_b, seed = SIZE_LB * LB, self._rng.getrandbits(64)
        conn = QueueConnection(
            Kind.STORAGE,
            (LogReset(uuid=uuid), b""),
            (HashWanted(offset_b=0, size_b=size_b // 2), b""),
            (HashWanted(offset_b=size_b // 2, size_b=size_b - size_b // 2), b""),
            (WdiffChunk(), make_wdiff(blocks, uuid, LZ4)),
            (End(), b""),
            (BackupEnd(snapshot=taken), b""),
        )
        offer = HashBackupOffer(volume=VOL, size_lb=SIZE_LB, started=started, bulk_b=LB, seed=seed)

        def work() -> Coroutine[Any, Any, BackupDone]:
            return receive_hash_backup(self.volume, Slots(1), conn, offer)  # type: ignore[arg-type]

        self._risky(work, 0.3)
        assert b"".join(conn.hashes) == hash_bulks(xxh3, theirs, LB, seed)
        self.acked = self.latest.gid_b

    def _learn(self, after: Snapshot, uuid: bytes) -> None:
        gid = after.gid_b
        if after.is_clean and gid not in self.images:
            self.images[gid] = self._truth.images[uuid, gid]
            if (uuid, gid) in self._truth.explicit:
                self.protected.add(gid)

    def _uuid_of(self, diff: Diff) -> bytes:
        with opened(self.fs, self.volume.directory, [diff]) as readers:
            return readers[0].header.uuid

    # --- commands

    def apply(self, now: int) -> None:
        """Apply up to a random gid."""
        if self.is_empty:
            return
        gid = min(self._rng.randint(self.base.begin.gid_b, self.latest.gid_b + 1) for _ in range(2))
        diffs = self.diffs.to_apply(self.base, gid)
        if not diffs:
            return
        self.events["apply finished later"] += self.base.is_applying
        done = self.base.end_applying(diffs).begin.gid_b
        self.protected = {g for g in self.protected if g >= done}

        async def work() -> None:
            with self.volume.machine.action(APPLY, now):
                await run_apply(self.volume, gid, job())

        self._risky(work, 0.4)

    def merge(self) -> None:
        """Merge some diffs."""
        if self.is_empty or self.base.is_applying:
            return
        begin = self._rng.randint(self.base.begin.gid_b, self.latest.gid_b)
        parts = self.diffs.merge_candidates(begin, gid_end=begin + self._rng.randint(1, 8))
        if len(parts) < 2:
            return
        self.events["merge"] += 1
        latest, explicit = self.volume.latest, self.volume.restorable()

        async def work() -> None:
            plan = plan_merge(self.volume, parts[0].begin.gid_b, parts[-1].begin.gid_b + 1)
            with self.volume.machine.action(MERGE, 0):
                await run_merge(self.volume, plan, job())

        self._risky(work, 0.3)
        assert self.diffs.latest(self.base) == latest
        assert self.volume.restorable() == explicit

    def gc(self) -> None:
        if not self.is_empty:
            self._run(gc_diffs(self.volume))

    def change_snapshot(self) -> None:
        """Protect or release a snapshot."""
        gids = [gid for gid in self.images if gid >= self.base.begin.gid_b]
        if self.is_empty or not gids:
            return
        gid, enable = self._rng.choice(gids[-4:-1] or gids), self._rng.random() < 0.7
        can_restore = gid in [p.gid for p in self.diffs.restorable(self.base, all_points=True)]
        if not self.diffs.snapshot_change(gid, enable=enable).found:
            return
        if not enable:
            self.protected.discard(gid)  # before: after a crash it may be either
        command = Command.ENABLE_SNAPSHOT if enable else Command.DISABLE_SNAPSHOT
        self._risky(lambda: change_snapshots(self.volume, [gid], command), 0.3)
        self.events["change snapshot"] += 1
        if enable and can_restore:
            self.protected.add(gid)

    # --- checking

    def check(self) -> int:
        """Restore everything there is to restore; return how many points that were."""
        if self.is_empty:
            return 0
        points = self.volume.restorable(all_points=True)
        gids = [int(point.gid) for point in points]
        self.events["check in progress"] += self.base.is_applying
        assert self.protected <= {point.gid for point in self.volume.restorable()}
        assert self.volume.latest == self.diffs.latest(self.base)
        for gid in gids:
            assert self.restore(gid) == self.images[gid], f"restore({gid}) differs"
        return len(gids)

    def restore(self, gid: int) -> bytes:
        """Restore, read, and remove again."""

        async def work() -> None:
            with self.volume.machine.action(RESTORE, 0):
                await run_restore(self.volume, gid, job())

        self._run(work())
        images = self.place.images
        data = self.fs.read_bytes(images.restored_path(VOL, gid))
        images.remove_restored(VOL, gid)
        self.volume.restored.discard(gid)
        return data

    def read_latest(self) -> bytes:
        """The virtual image of the latest snapshot, clean or not."""
        diffs = self.diffs.to_scan(self.base, self.latest.gid_b)
        with (
            opened(self.fs, self.volume.directory, diffs) as readers,
            self.place.images.open_base(VOL) as image,
        ):
            return VirtualImage(image, readers, SIZE_LB * LB).read(0, SIZE_LB * LB)

    def close(self) -> None:
        self._runner.close()


def job() -> Job:
    """A job that nobody asks for."""
    return Job(1, "test", VOL, 0, Signal())


class RealHistory(History):
    """A history whose archive is real."""

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.truth = Truth()
        self.storage = Storage(self.rng, self.truth)
        self.real = RealArchive(self.rng, self.truth)
        self.archive = self.real  # type: ignore[assignment]
        self.proxies = [Proxy(self.rng, MemoryStore()) for _ in range(self.rng.choice((1, 2)))]

    def close(self) -> None:
        self.real.close()

    def _full_backup(self) -> bool:
        self.real.clear()
        self.storage.reset(0, self.now)
        started = self.now
        copy = self._read_device(lambda _, now: now)
        if copy is None:
            return False
        gid = self.storage.snapshot(self.now, explicit=True)
        self.real.backup(b"".join(data for data in copy if data is not None), self.storage.uuid, gid, started)
        return True

    def _hash_backup(self) -> None:
        real = self.real
        if real.is_empty:
            return
        latest, started = real.latest, self.now
        gid_begin = hash_backup_gid(latest)
        theirs = real.read_latest()
        self.storage.reset(gid_begin, self.now)
        copy = self._read_device(lambda block, now: None if now == theirs[block * LB : (block + 1) * LB] else now)
        if copy is None:
            return
        gid_end = self.storage.snapshot(self.now, explicit=True)
        blocks: dict[int, bytes | str] = {block: data for block, data in enumerate(copy) if data is not None}
        taken = Snapshot(gid_begin, gid_end)
        try:
            real.take_hash_backup(theirs, blocks, self.storage.uuid, taken, started)
        except Crashed:  # the storage does not know whether the archive has it, and begins no history
            self.storage.is_active = False
            real.restart()
            assert real.latest in (latest, taken)
            real.events["crash in a hash backup"] += 1
            real.events["hash backup without an answer"] += real.latest == taken
            return
        assert real.latest == taken
        real.events["hash backup"] += 1
        if latest.is_clean:
            real.protected.add(latest.gid_b)
