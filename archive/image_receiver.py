"""Writing an image that a peer sends as the base of a volume: full backup and full replication.

Chunks come in order, each with a checksum of its unpacked bytes, and are written while the next ones come. Source:
docs/archive.md, "Full backup".
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Final, Self

import xxhash

from walbd.archive.diffs import remove_all_diffs
from walbd.archive.images.store import PreparedImage
from walbd.archive.volume import Volume, check_room
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Pool
from walbd.daemon.pipeline import Pipeline
from walbd.errors import CorruptData, Refused, RemoteProtocolError
from walbd.format.compress import Kind as Compression
from walbd.format.compress import decompress
from walbd.fs import failpoints
from walbd.fs.disk import disk_errors
from walbd.protocol.base import End
from walbd.protocol.transfer import FullChunk, Packing
from walbd.units import KIB, LB, MIB

WINDOW_B: Final = 32 * MIB  # received and not yet written
_CHUNK_COST_B: Final = 256 * KIB  # what each chunk counts beside its payload, so that zeros are bounded too

FP_AFTER_PREPARE: Final = failpoints.register(
    "archive.full.after_prepare", "SyncReady; the base image has its size and no known contents"
)
FP_MID_WRITE: Final = failpoints.register("archive.full.mid_write", "SyncReady; a part of the image is written")

Saved = Callable[[int], Awaitable[None]]
"""Awaited now and then with the bytes from the beginning of the image that are durable."""


class ImageReceiver:
    """Receives one image; use it as a context.

    `begin_b`: what is before it was received, and is durable, already; the stream begins there. `saved` is told
    how far the image is durable each time it was synced.
    """

    def __init__(
        self,
        volume: Volume,
        conn: Connection,
        size_lb: int,
        *,
        source: str,
        begin_b: int = 0,
        saved: Saved | None = None,
    ) -> None:
        self._volume = volume
        self._conn = conn
        self._size_b = size_lb * LB
        self._begin_b = begin_b
        self._source = source
        self._saved = saved
        self._image: PreparedImage | None = None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self._image is not None:
            await self._volume.place.env.pools.run(Pool.RECEIVE, self._image.file.close)

    async def prepare(self) -> None:
        """Remove all diffs of the volume, and make room and an image to write to.

        Raises DiskFull, and Refused when an image to be continued is not there.
        """
        if not self._begin_b and self._volume.record.full_progress is not None:
            await self._volume.save(full_progress=None)  # first: the image is no longer what was begun before
        await self._volume.place.env.pools.run(Pool.RECEIVE, self._prepare)

    async def receive(self) -> None:
        """Take all chunks, in order, up to the end of the stream; the image is durable on return."""
        pools = self._volume.place.env.pools
        timer = self._volume.sync_timer()
        at = self._begin_b
        async with Pipeline(WINDOW_B) as pipeline:
            while True:
                message, payload = await self._conn.receive()
                if isinstance(message, End) and not payload:
                    break
                if not isinstance(message, FullChunk):
                    raise self._conn.unexpected(message, FullChunk, End)
                self._check_place(message, at)
                at += message.size_b
                await pipeline.push(self._take(message, payload), len(payload) + _CHUNK_COST_B)
                if timer.is_due(message.size_b):
                    await self._sync_to(at, pipeline)
            if at != self._size_b:
                raise RemoteProtocolError("the copy ends early", offset_b=at, size_b=self._size_b)
            await with_filler(self._conn, pipeline.drain())
        await with_filler(self._conn, pools.run(Pool.RECEIVE, self._sync))

    async def _sync_to(self, at: int, pipeline: Pipeline) -> None:
        """Sync what came so far; wait for that only if somebody has to be told of it."""
        pools = self._volume.place.env.pools
        if self._saved is None:
            await pipeline.push(pools.run(Pool.RECEIVE, self._sync_some), 0)
        else:
            await pipeline.drain()
            await pools.run(Pool.RECEIVE, self._sync_some)
            await self._saved(at)

    def _check_place(self, chunk: FullChunk, at: int) -> None:
        if chunk.offset_b != at or chunk.size_b == 0 or chunk.size_b % LB or at + chunk.size_b > self._size_b:
            raise RemoteProtocolError(
                "a chunk is not where it must be",
                offset_b=chunk.offset_b,
                expected_b=at,
                chunk_b=chunk.size_b,
                size_b=self._size_b,
            )

    async def _take(self, chunk: FullChunk, payload: memoryview) -> None:
        await self._volume.place.env.pools.run(Pool.RECEIVE, self._write, chunk, payload)
        self._volume.progress_lb = max(self._volume.progress_lb, (chunk.offset_b + chunk.size_b) // LB)

    # in threads

    def _prepare(self) -> None:
        place, name = self._volume.place, self._volume.name
        check_room(place)
        remove_all_diffs(place.env.fs, self._volume.directory)
        if self._begin_b:
            self._image = PreparedImage(place.images.open_base(name, write=True), reads_zero=False)
            if self._image.file.size() != self._size_b:
                raise Refused("the image to be continued has another size", hint="begin anew", volume=name)
        else:
            self._image = place.images.prepare_base(name, self._size_b)
        with disk_errors(self._volume.directory, "prepare the image"):
            failpoints.hit(FP_AFTER_PREPARE)

    def _write(self, chunk: FullChunk, payload: memoryview) -> None:
        assert self._image is not None
        if not payload:
            if not self._image.reads_zero:
                self._image.file.zero(chunk.offset_b, chunk.size_b)
            return
        data = self._unpack(chunk, payload)
        if xxhash.xxh3_64_intdigest(data) != chunk.xxh:
            raise CorruptData(
                "the checksum of a chunk does not match",
                hint="the sender or the connection damaged the stream; run the backup again",
                source=self._source,
                offset=chunk.offset_b,
            )
        self._image.file.pwrite(data, chunk.offset_b)
        with disk_errors(self._image.file.path, "write"):
            failpoints.hit(FP_MID_WRITE)

    def _unpack(self, chunk: FullChunk, payload: memoryview) -> bytes | memoryview:
        if chunk.packing is Packing.LZ4:
            return decompress(Compression.LZ4, payload, chunk.size_b, source=self._source, offset=chunk.offset_b)
        if len(payload) != chunk.size_b:
            raise CorruptData(
                "a chunk has another size than announced",
                hint="the sender made the stream wrongly",
                source=self._source,
                offset=chunk.offset_b,
                size_b=len(payload),
                expected_b=chunk.size_b,
            )
        return payload

    def _sync_some(self) -> None:
        check_room(self._volume.place)
        self._sync()

    def _sync(self) -> None:
        assert self._image is not None
        self._image.file.sync()
