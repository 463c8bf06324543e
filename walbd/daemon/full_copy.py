"""Copying a whole image to a peer, in order: full backup, full replication, and scans.

The image is cut into runs of zeros, which are told of, and runs of data, which are sent packed. Reading and
packing go on while chunks are being sent. Source: docs/protocol.md, "Transfers".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import xxhash

from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.copying import ImageSource, LiveSender, heeding
from walbd.daemon.env import Pool, Pools
from walbd.daemon.flow import in_order
from walbd.daemon.packing import pack_bytes
from walbd.ext.buffers import Buf
from walbd.ext.checksum import is_zero
from walbd.protocol.base import End
from walbd.protocol.transfer import FullChunk, Packing
from walbd.units import KIB, MIB

PIECE_B: Final = 2 * MIB  # read at once
PIECES_AHEAD: Final = 4  # being read or packed
GRANULE_B: Final = 64 * KIB  # least size in which zeros are looked for
ZEROS_MAX_B: Final = 32 * MIB  # told of in one message

Chunk = tuple[FullChunk, Buf]  # without payload: zeros


async def send_full(
    conn: Connection,
    pools: Pools,
    source: ImageSource,
    *,
    bulk_b: int,
    packing: Packing,
    begin_b: int = 0,
    pool: Pool = Pool.SEND,
) -> int:
    """Send FullChunks from `begin_b` to the end of the image, and End; return the size of what was sent [byte].

    The receiver's answer is the caller's to wait for. Raises what reading, `source.tick` and the connection raise.
    """
    granule_b = granule_of(bulk_b)
    piece_b = max(PIECE_B // granule_b, 1) * granule_b
    pieces = ((at, min(piece_b, source.size_b - at)) for at in range(begin_b, source.size_b, piece_b))
    sender = LiveSender(conn)
    zeros = Zeros()

    async def cut(piece: tuple[int, int]) -> tuple[int, list[Chunk]]:
        offset_b, size_b = piece
        data = await source.read_all(offset_b, size_b)
        return size_b, await pools.run(pool, cut_piece, data, offset_b, granule_b, packing)

    async def send(chunks: Iterator[Chunk]) -> None:
        for chunk, payload in chunks:
            await sender.send(chunk, *([payload] if len(payload) else []))

    done_b = begin_b
    async with heeding(conn), in_order(pieces, cut, depth=PIECES_AHEAD) as cut_pieces:
        while (found := await with_filler(conn, anext(cut_pieces, None))) is not None:
            size_b, chunks = found
            for chunk in chunks:
                await send(zeros.join(*chunk))
            if sender.is_silent:
                await send(zeros.flush())
            done_b += size_b
            await source.done(done_b, size_b, sender.keep_alive)
        await send(zeros.flush())
        await sender.send(End())
    return sender.payload_b


class Zeros:
    """Joins the zero chunks that follow one another, so that an empty volume costs few messages."""

    def __init__(self) -> None:
        self._run: FullChunk | None = None

    def join(self, chunk: FullChunk, payload: Buf) -> Iterator[Chunk]:
        """Take the next chunk; yield what can be sent now, in order. No payload: zeros."""
        run = self._run
        if len(payload):
            yield from self.flush()
            yield chunk, payload
        elif run is not None and run.size_b + chunk.size_b <= ZEROS_MAX_B:
            self._run = FullChunk(offset_b=run.offset_b, size_b=run.size_b + chunk.size_b)
        else:
            yield from self.flush()
            self._run = chunk

    def flush(self) -> Iterator[Chunk]:
        """Yield what is held back."""
        run, self._run = self._run, None
        if run is not None:
            yield run, b""


def granule_of(bulk_b: int) -> int:
    """Return in which pieces zeros are looked for: whole bulks, and not many tiny ones."""
    return -(-GRANULE_B // bulk_b) * bulk_b


def cut_piece(data: memoryview, offset_b: int, granule_b: int, packing: Packing) -> list[Chunk]:
    """Cut a piece of the volume into runs of zeros and runs of data, packed; runs in a thread."""
    if is_zero(data):
        return [(FullChunk(offset_b=offset_b, size_b=len(data)), b"")]
    chunks: list[Chunk] = []
    begin = 0
    zero = is_zero(data[:granule_b])
    for at in range(granule_b, len(data) + granule_b, granule_b):
        zero_here = not zero if at >= len(data) else is_zero(data[at : at + granule_b])
        if zero_here != zero:
            end = min(at, len(data))
            chunks.append(_chunk(data[begin:end], offset_b + begin, zero, packing))
            begin, zero = end, zero_here
    return chunks


def _chunk(data: memoryview, offset_b: int, zero: bool, packing: Packing) -> Chunk:
    if zero:
        return FullChunk(offset_b=offset_b, size_b=len(data)), b""
    kind, payload = pack_bytes(data, packing)
    xxh = xxhash.xxh3_64_intdigest(data)
    return FullChunk(offset_b=offset_b, size_b=len(data), packing=kind, xxh=xxh), payload
