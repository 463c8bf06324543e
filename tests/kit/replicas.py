"""Several archives in this process, one of which is fed, and replications between them.

async with Group(tmp_path, 2) as group:
    feed = await group.feed()           # archive 0 has a full backup
    await feed.step(3)
    await group.replicate(0, 1)
    await group.check(feed, 1)          # every point of it is exact
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.kit.feeder import PROXY, STORAGE, ArchiveRig, Feed, offer_wdiff
from tests.kit.memfs import MemoryFileSystem
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection, Me
from walbd.daemon.copying import ImageSource
from walbd.daemon.hash_sync import send_differences
from walbd.format.meta import Diff, Snapshot
from walbd.ids import Gid
from walbd.protocol import control as c
from walbd.protocol.base import JobInfo, JobState, Kind, Ok
from walbd.protocol.maintenance import Replicate
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupEnd, LogReset, Verdict
from walbd.units import LB

VOL = "vol0"


class TwoFeeds(Feed):
    """A feed that remembers its wdiffs, so that they can be sent to other archives, too; and loses its log.

    `truth` is what the volume held, by history and generation.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.log: list[tuple[bytes, Diff, bytes]] = []
        self.truth: dict[tuple[bytes, int], bytes] = {}

    def snapshot(self, *, mergeable: bool = True) -> Diff:
        diff = super().snapshot(mergeable=mergeable)
        self.log.append((self.uuid, diff, self._unsent[-1][1]))
        self.truth[self.uuid, diff.end.gid_b] = self.images[diff.end.gid_b]
        return diff

    async def send_to(self, rig: ArchiveRig, first: int = 0, last: int | None = None) -> list[Verdict | Ok]:
        """Offer remembered wdiffs to another archive; return its words."""
        words = []
        for uuid, diff, data in self.log[first:last]:
            async with rig.dial(PROXY) as conn:
                words.append(await offer_wdiff(conn, self.name, diff, data, uuid=uuid, size_lb=self.size_lb))
        return words

    def lose_log(self) -> None:
        """What was written and not sent will never be sent."""
        self._unsent, self._changed = [], {}

    async def hash_backup(self) -> None:
        """Continue with a new history after the log was lost."""
        self.lose_log()
        async with self.rig.dial(STORAGE) as conn:
            accepted = await conn.call(
                HashBackupOffer(volume=self.name, size_lb=self.size_lb, started=self.now, bulk_b=LB, seed=7)
            )
            assert accepted.latest is not None
            self.uuid = self.rng.randbytes(16)
            self.gid = accepted.latest.gid_e + 1
            begin = Gid(self.gid)
            await conn.call(LogReset(uuid=self.uuid))
            image = bytes(self.image)
            self.snapshot()

            async def read(offset_b: int, size_b: int) -> bytes:
                return image[offset_b : offset_b + size_b]

            source = ImageSource(read=read, size_b=len(image))
            pools = self.rig.env.pools
            await send_differences(conn, pools, source, bulk_b=LB, seed=7, uuid=self.uuid)
            await conn.call(BackupEnd(snapshot=Snapshot(begin, Gid(self.gid))))


class Group:
    """Archives a0, a1, ..."""

    def __init__(
        self, base: Path, n: int = 2, *, fs: list[MemoryFileSystem] | None = None, **settings: Any
    ) -> None:
        self.archives: list[ArchiveRig] = []
        for number in range(n):
            directory = base / f"a{number}"
            if fs is None:
                directory.mkdir()
            rig = ArchiveRig(directory, fs=fs[number] if fs else None, node_id=f"a{number}", **settings)
            rig.env.rng.seed(number)  # each draws uuids of its own
            self.archives.append(rig)
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for rig in self.archives:
                await stack.enter_async_context(rig)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def __getitem__(self, number: int) -> ArchiveRig:
        return self.archives[number]

    def volume(self, number: int) -> Volume:
        return self.archives[number].volume(VOL)

    async def feed(
        self, number: int = 0, *, dirty: int = 0, seed: int = 1, size_lb: int = 64, image: bytes = b""
    ) -> TwoFeeds:
        """Make the volume known, and back it up."""
        feed = TwoFeeds(self[number], seed=seed, size_lb=size_lb)
        await feed.init()
        feed.image[: len(image)] = image
        if not image:
            feed.scribble()
        await feed.full_backup(dirty=dirty)
        return feed

    async def init(self, *numbers: int) -> None:
        for number in numbers:
            await self[number].call(c.ArchiveInitVol(volume=VOL))

    def request(self, to: int, **fields: Any) -> Replicate:
        return Replicate(volume=VOL, dest=str(self[to].address), **fields)

    async def replicate(self, source: int, to: int, **fields: Any) -> JobInfo:
        """Replicate, which must succeed."""
        return await self[source].done(self.request(to, **fields))

    async def failing(self, source: int, to: int, **fields: Any) -> JobInfo:
        """Replicate, which must be accepted and then fail."""
        info = await self[source].job(self.request(to, **fields))
        assert info.state is JobState.FAILED, info
        return info

    async def check(self, feed: Feed, number: int) -> list[int]:
        """Restore every point of an archive and compare; return the generations."""
        rig = self[number]
        volume = rig.volume(VOL)
        assert volume.latest == volume.diffs.latest(volume.base)
        for every in (False, True):
            assert volume.restorable(all_points=every) == volume.diffs.restorable(volume.base, all_points=every)
        points = await rig.points(VOL)
        for gid in points:
            image, truth = await rig.restored_image(VOL, gid), feed.images[gid]
            assert image[: len(truth)] == truth, f"restore({gid}) at a{number} differs"
            assert not any(image[len(truth) :])
        return points

    @asynccontextmanager
    async def as_source(self, to: int, *, node: str = "a9") -> AsyncIterator[Connection]:
        """Play a source by hand."""
        async with self[to].dial(Me(node=node, kind=Kind.ARCHIVE, io_timeout_s=20)) as conn:
            yield conn
