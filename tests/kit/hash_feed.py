"""A storage that runs hash backups against an archive, for `tests.kit.feeder`."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from tests.kit.feeder import STORAGE, Feed
from walbd.daemon.conn import Connection
from walbd.daemon.copying import ImageSource
from walbd.daemon.hash_sync import Differences, send_differences
from walbd.format.meta import Snapshot, hash_backup_gid
from walbd.ids import Gid
from walbd.protocol.sync import HashBackupOffer
from walbd.protocol.transfer import BackupAccepted, BackupDone, BackupEnd, LogReset
from walbd.units import LB

BULK_B = 4 * LB


async def _nothing() -> None:
    return None


class HashFeed(Feed):
    """A volume whose history can be continued by hash backups."""

    found: Differences | None = None
    seed = 77

    def hash_offer(self, **fields: Any) -> HashBackupOffer:
        values: dict[str, Any] = {
            "volume": self.name,
            "size_lb": self.size_lb,
            "started": self.now,
            "bulk_b": BULK_B,
            "seed": 12345,
        }
        return HashBackupOffer(**values | fields)

    async def hash_backup(
        self,
        *,
        dirty: int = 0,
        conn: Connection | None = None,
        after_accept: Callable[[], Awaitable[None]] = _nothing,
        mid_scan: Callable[[], Awaitable[None]] = _nothing,
        before_end: Callable[[], Awaitable[None]] = _nothing,
    ) -> BackupDone:
        """Compare what the volume holds with the archive; with `dirty`, so many generations pass meanwhile.

        When it fails, the storage has a new history all the same, unless the archive refused it at once.
        """
        if conn is None:
            async with self.rig.dial(STORAGE) as opened:
                return await self.hash_backup(
                    dirty=dirty,
                    conn=opened,
                    after_accept=after_accept,
                    mid_scan=mid_scan,
                    before_end=before_end,
                )
        accepted = await conn.call(self.hash_offer())
        await after_accept()
        begin = self.begin_history(accepted)
        await conn.call(LogReset(uuid=self.uuid))
        left = dirty
        size_b = accepted.size_lb * LB

        async def read(offset_b: int, size_b: int) -> bytes:
            nonlocal left
            if offset_b == 0:
                await mid_scan()
            data = bytes(self.image[offset_b : offset_b + size_b])
            if left:
                left -= 1
                self.scribble()
                self.snapshot()
            return data

        source = ImageSource(read=read, size_b=size_b, data_b=self.size_lb * LB)
        self.found = await send_differences(
            conn, self.rig.env.pools, source, bulk_b=BULK_B, seed=12345, uuid=self.uuid
        )
        for _ in range(left):
            self.scribble()
            self.snapshot()
        await before_end()
        self.snapshot(mergeable=False)
        return await conn.call(BackupEnd(snapshot=Snapshot(begin, Gid(self.gid))))

    def begin_history(self, accepted: BackupAccepted) -> Gid:
        """Reset the log, as a storage does."""
        assert accepted.latest is not None
        self.uuid = self.rng.randbytes(16)
        self.images = {gid: image for gid, image in self.images.items() if gid <= accepted.latest.gid_b}
        begin = hash_backup_gid(accepted.latest)
        self.gid, self._changed, self._unsent = begin, {}, []
        return begin

    def lose(self, count: int = 1) -> None:
        """Write, and lose the log of it."""
        for _ in range(count):
            self.scribble()
        self._changed = {}
