"""Wdiffs on their way into a directory: from proxies, from hash backups, and from other archives.

Packs are verified as they come and written to an unfinished file; at the end that is read back and decoded. Only
its name makes it count. Source: docs/archive.md, "wdiff transfer".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final

from walbd.archive.volume import Place, Volume, check_room
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.hash_sync import DiffSink, receive_differences
from walbd.daemon.pipeline import Pipeline
from walbd.errors import AlreadyExists
from walbd.format.meta import Diff, diff_name
from walbd.format.wdiff import HEADER_B, WdiffHeader, WdiffType
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import open_wdiff
from walbd.format.wdiff_stream import PackVerifier, check_stream_header
from walbd.fs import Buf, TempFile, failpoints
from walbd.fs.disk import disk_errors
from walbd.ids import NIL_UUID
from walbd.protocol.base import End
from walbd.protocol.transfer import WdiffChunk
from walbd.units import LB

FP_BEFORE_COMMIT: Final = failpoints.register(
    "archive.wdiff.before_commit", "an unfinished file; the proxy sends the diff again"
)
FP_AFTER_COMMIT: Final = failpoints.register(
    "archive.wdiff.after_commit", "the wdiff is there; the proxy was not told, and hears too-old next time"
)


def look_for_room(place: Place, name: str) -> int | None:
    """Return the size of the base image; raises DiskFull when there is no room for more data."""
    check_room(place)
    return place.images.base_size(name)


class WdiffSink:
    """An unfinished wdiff file, and the checks on the way into it. One thread at a time calls it.

    `uuid` must be known before the first piece, `diff` before `commit`.
    """

    def __init__(self, volume: Volume, diff: Diff | None, uuid: bytes, sender: str) -> None:
        self.diff = diff
        self.uuid = uuid
        self.size_b = 0
        self._volume = volume
        self._source = f"wdiff stream from {sender}"
        self._verifier = PackVerifier(source=self._source)
        self._file: TempFile | None = None

    @property
    def n_records(self) -> int:
        """How many records came so far."""
        return self._verifier.n_records

    @property
    def file(self) -> TempFile:
        """The open file."""
        assert self._file is not None
        return self._file

    def open(self) -> None:
        """Begin the file, for a volume of the size that it has now."""
        if self.diff is not None and self.diff in self._volume.diffs:
            raise AlreadyExists("this diff is already there", diff=str(self.diff))
        self._verifier = PackVerifier(size_lb=self._volume.size_lb, source=self._source)
        self._file = self._volume.place.env.fs.temp_file(self._volume.directory)

    def feed(self, piece: memoryview) -> None:
        """Verify and write one piece: whole packs, the first one behind the file header. Raises CorruptData."""
        if self.size_b == 0:
            check_stream_header(piece, self._source, self.uuid, NIL_UUID)
            self._write(WdiffHeader(WdiffType.SORTED, self.uuid).pack())
            piece = piece[HEADER_B:]
        self._verifier.feed_all(piece)
        self._write(piece)

    def sync(self) -> None:
        """Make what came so far durable, so that the end need not wait for all of it."""
        self.file.sync()

    def finish(self) -> None:
        """Check that the stream was complete, and read the file back as a later apply will; raises CorruptData."""
        self._verifier.finish()
        verify(open_wdiff(self.file), size_lb=self._volume.size_lb, check=self._volume.check_force)
        self.file.sync()

    def commit(self) -> Diff:
        """Name the file durably; return its label with its size."""
        directory, diff = self._volume.directory, self.diff
        assert diff is not None
        with disk_errors(directory, "name a wdiff"):
            failpoints.hit(FP_BEFORE_COMMIT)
            self.file.commit(directory / diff_name(diff))
            failpoints.hit(FP_AFTER_COMMIT)
        return replace(diff, size_b=self.size_b)

    def close(self) -> None:
        """Close the file; it is removed if it got no name."""
        if self._file is not None:
            self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self.file.pwrite(data, self.size_b)
        self.size_b += len(data)


async def take_stream(volume: Volume, conn: Connection, sink: WdiffSink) -> None:
    """Take packs until the end of the stream; each piece is verified while the next one comes.

    On return the file is complete, decoded once, and durable, without a name.
    """
    pools = volume.place.env.pools
    timer = volume.sync_timer()
    async with Pipeline(0) as pipeline:
        while True:
            message, payload = await conn.receive()
            if isinstance(message, End) and not payload:
                break
            if not isinstance(message, WdiffChunk) or not payload:
                raise conn.unexpected(message, WdiffChunk, End)
            await pipeline.push(pools.run(Pool.RECEIVE, sink.feed, payload), len(payload))
            if timer.is_due(len(payload)):
                await pipeline.push(pools.run(Pool.RECEIVE, sink.sync), 0)
        await pipeline.drain()
    await with_filler(conn, pools.run(Pool.MAINTAIN, sink.finish))  # long: reception has few threads


async def take_differences(
    volume: Volume,
    conn: Connection,
    read: Callable[[int, int], Buf],
    sink: DiffSink,
    *,
    size_b: int,
    bulk_b: int,
    seed: int,
) -> None:
    """Let the sender compare its image with what `read` gives, and take what differs.

    The volume shows how far it is. The caller sends the Ok.
    """

    def tick(done_b: int) -> None:
        volume.progress_lb = done_b // LB

    await receive_differences(
        conn,
        volume.place.env.pools,
        read,
        sink,
        size_b=size_b,
        bulk_b=bulk_b,
        seed=seed,
        timer=volume.sync_timer(),
        tick=tick,
    )
