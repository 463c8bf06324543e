"""The exchange in which a source sends only what differs from a destination's image.

The source asks for hashes some ranges ahead and hashes its own data meanwhile; what differs goes out as packs of a
sorted wdiff, in address order. The destination hashes several ranges ahead and takes packs at the same time, each
in a task of its own, so neither waits for the other with data on the wire. Both are limited: in ranges asked for,
and in bytes read and not yet sent. Who has nothing to say for a while sends a filler.

A range is compared, and what differs in it sent, only after its hashes came; so the destination may write to the
very image that it hashes.

Source: docs/protocol.md, "Comparing".
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.copying import LAST_WORDS_S, ImageSource, LiveSender, Tick, nothing
from walbd.daemon.env import Pool, Pools
from walbd.daemon.flow import ahead, in_order
from walbd.daemon.pipeline import Pipeline, SyncTimer
from walbd.errors import ConnectError, RemoteError, RemoteProtocolError
from walbd.ext.buffers import Buf
from walbd.ext.checksum import is_zero
from walbd.format.compress import CompressOpt
from walbd.format.compress import Kind as Compression
from walbd.format.hashes import hash_bulks, xxh3
from walbd.format.wdiff import WdiffHeader, WdiffType
from walbd.format.wdiff_write import PackMaker
from walbd.protocol.base import End, Ok
from walbd.protocol.sync import HASH_B, HashRun, HashWanted
from walbd.protocol.transfer import WdiffChunk
from walbd.units import KIB, LB, MIB

RANGE_B: Final = 4 * MIB  # asked for, read and hashed at a time
RANGES_AHEAD: Final = 6  # asked for and not compared yet
RANGES_MAX: Final = 64  # that a destination lets a source have asked for
HASHES_AHEAD: Final = 2  # ranges that a destination hashes at a time
READS_AHEAD: Final = 3  # ranges that a source reads and hashes at a time
RECORD_B: Final = 256 * KIB  # of adjacent bulks that differ, put into one record
PACK_B: Final = 4 * MIB  # raw data from which on a pack is sent
PACK_SPAN_B: Final = 256 * MIB  # of the image, after which a pack is sent, however small
WIRE: Final = CompressOpt(Compression.LZ4)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Differences:
    """What a source found."""

    size_b: int  # compared
    differing_b: int  # sent
    wire_b: int  # as which it was sent


# --- source


async def send_differences(
    conn: Connection,
    pools: Pools,
    source: ImageSource,
    *,
    bulk_b: int,
    seed: int,
    uuid: bytes,
    compress: CompressOpt = WIRE,
) -> Differences:
    """Compare the whole image with the peer's, and send what differs as a sorted wdiff with this uuid.

    Returns after the peer's Ok. Raises what reading, `source.tick` and the connection raise, and
    RemoteProtocolError.
    """
    comparison = _Comparison(conn, pools, source, bulk_b, seed, compress)
    return await comparison.run(WdiffHeader(WdiffType.SORTED, uuid).pack())


@dataclass(frozen=True, slots=True)
class _Own:
    """A range of the source, read and hashed."""

    offset_b: int
    data: memoryview
    hashes: bytes


@dataclass
class _Comparison:
    """The source's half of one exchange."""

    conn: Connection
    pools: Pools
    source: ImageSource
    bulk_b: int
    seed: int
    compress: CompressOpt

    def __post_init__(self) -> None:
        self._maker = PackMaker(self.compress)
        self._range_b = max(RANGE_B // self.bulk_b, 1) * self.bulk_b
        self._runs: asyncio.Queue[bytes] = asyncio.Queue()  # bounded by what was asked for
        self._wanted_b = 0  # asked for so far
        self._ended = False  # everything was sent
        self._differing_b = 0
        self._pack_b = 0  # raw data in the pack that is being made
        self._pack_begin_b: int | None = None  # where in the image it begins

    async def run(self, header: bytes) -> Differences:
        """Do it all; `header` goes before the first pack."""
        async with _beside(self._receive(), heed=True):
            sender = LiveSender(self.conn)
            await self._send_all(sender, header)
        return Differences(self.source.size_b, self._differing_b, sender.payload_b)

    async def _send_all(self, sender: LiveSender, header: bytes) -> None:
        source, size_b = self.source, self.source.size_b
        done_b = 0
        await self._ask(sender, done_b)
        async with ahead(self._compared(), depth=1) as compared:
            while (packs := await with_filler(self.conn, anext(compared, None))) is not None:
                length_b = min(self._range_b, size_b - done_b)
                done_b += length_b
                await self._ask(sender, done_b)
                if packs:
                    await sender.send(WdiffChunk(), header, packs)
                    header = b""
                await sender.keep_alive()
                await source.done(done_b, length_b, sender.keep_alive)
        rest = await with_filler(self.conn, self.pools.run(Pool.SEND, self._maker.finish))
        await sender.send(WdiffChunk(), header, rest)
        self._ended = True
        await sender.send(End())

    async def _ask(self, sender: LiveSender, done_b: int) -> None:
        """Ask for hashes as far ahead of what is done as we may."""
        while self._wanted_b < min(done_b + RANGES_AHEAD * self._range_b, self.source.size_b):
            wanted = HashWanted(
                offset_b=self._wanted_b, size_b=min(self._range_b, self.source.size_b - self._wanted_b)
            )
            self._wanted_b += wanted.size_b
            await sender.send(wanted)

    async def _receive(self) -> None:
        """Receive the hashes of all ranges, and the Ok at the end; an error of the peer ends the exchange."""
        for offset_b in range(0, self.source.size_b, self._range_b):
            message, payload = await self.conn.receive()
            if not isinstance(message, HashRun):
                raise self.conn.unexpected(message, HashRun)
            bulks = -(-min(self._range_b, self.source.size_b - offset_b) // self.bulk_b)
            if message.offset_b != offset_b or offset_b >= self._wanted_b or len(payload) != bulks * HASH_B:
                raise RemoteProtocolError(
                    "these are not the hashes that were asked for",
                    offset_b=message.offset_b,
                    expected_b=offset_b,
                    hashes_b=len(payload),
                    expected_hashes_b=bulks * HASH_B,
                )
            self._runs.put_nowait(bytes(payload))
        ok = await self.conn.expect(Ok)
        if not self._ended:
            raise self.conn.unexpected(ok)

    async def _compared(self) -> AsyncGenerator[bytes, None]:
        """Yield for each range the packs that became complete with it, often none."""
        size_b = self.source.size_b
        ranges = ((at, min(self._range_b, size_b - at)) for at in range(0, size_b, self._range_b))
        async with in_order(ranges, self._read, depth=READS_AHEAD) as read:
            async for own in read:
                theirs = await self._runs.get()
                if own.hashes == theirs and not self._is_pack_due(own.offset_b + len(own.data)):
                    yield b""
                else:
                    yield await self.pools.run(Pool.SEND, self._add, own, theirs)

    async def _read(self, place: tuple[int, int]) -> _Own:
        offset_b, size_b = place
        data = await self.source.read_all(offset_b, size_b)
        return _Own(
            offset_b, data, await self.pools.run(Pool.SEND, hash_bulks, xxh3, data, self.bulk_b, self.seed)
        )

    # in threads, one at a time

    def _is_pack_due(self, end_b: int) -> bool:
        """Tell whether the pack that is being made should go out, with the image compared up to `end_b`."""
        begin_b = self._pack_begin_b
        return begin_b is not None and (self._pack_b >= PACK_B or end_b - begin_b >= PACK_SPAN_B)

    def _add(self, own: _Own, theirs: bytes) -> bytes:
        """Add what differs in a range; return the packs that go out now."""
        packs = b""
        for begin_b, end_b, zero in differing_runs(own.data, own.hashes, theirs, self.bulk_b):
            at_lb = (own.offset_b + begin_b) // LB
            if zero:
                full = self._maker.add_zero(at_lb, (end_b - begin_b) // LB)
            else:
                full = self._maker.add_data(at_lb, own.data[begin_b:end_b])
            if full or self._pack_begin_b is None:
                self._pack_b, self._pack_begin_b = 0, own.offset_b + begin_b
            packs += full
            self._pack_b += 0 if zero else end_b - begin_b
            self._differing_b += end_b - begin_b
        if self._is_pack_due(own.offset_b + len(own.data)):
            packs += self._maker.flush()
            self._pack_b, self._pack_begin_b = 0, None
        return packs


def differing_runs(data: memoryview, ours: bytes, theirs: bytes, bulk_b: int) -> list[tuple[int, int, bool]]:
    """Return (begin, end, all zero) [byte] of the parts of `data` whose hashes differ, ascending.

    Adjacent bulks go together: zeros without limit, others up to the size of a record.
    """
    found: list[tuple[int, int, bool]] = []
    for number in range(len(ours) // HASH_B):
        at = number * HASH_B
        if ours[at : at + HASH_B] == theirs[at : at + HASH_B]:
            continue
        begin, end = number * bulk_b, min((number + 1) * bulk_b, len(data))
        zero = is_zero(data[begin:end])
        if found:
            last_begin, last_end, last_zero = found[-1]
            if last_end == begin and last_zero == zero and (zero or end - last_begin <= RECORD_B):
                found[-1] = (last_begin, end, zero)
                continue
        found.append((begin, end, zero))
    return found


# --- destination


class DiffSink(Protocol):
    """Where the packs of the differences go. Called from threads, one call at a time."""

    def feed(self, piece: memoryview) -> None:
        """Take whole packs; the first piece begins with the file header."""

    def sync(self) -> None:
        """Make what came so far durable."""

    def finish(self) -> None:
        """The stream has ended: check that it is complete, and make all of it durable."""


async def receive_differences(
    conn: Connection,
    pools: Pools,
    read: Callable[[int, int], Buf],
    sink: DiffSink,
    *,
    size_b: int,
    bulk_b: int,
    seed: int,
    timer: SyncTimer,
    tick: Tick = nothing,
) -> None:
    """Serve hashes of our image, and take what differs from it, until all `size_b` bytes were compared.

    `read` runs in threads; what it does not return, beyond the end of the image, counts as zeros. `tick` is told
    how much was hashed. The caller sends the Ok. Raises RemoteProtocolError, and what `read` and the sink raise.
    """
    await _Serving(conn, pools, read, sink, size_b, bulk_b, seed, timer, tick).run()


@dataclass
class _Serving:
    """The destination's half of one exchange."""

    conn: Connection
    pools: Pools
    read: Callable[[int, int], Buf]
    sink: DiffSink
    size_b: int
    bulk_b: int
    seed: int
    timer: SyncTimer
    tick: Tick

    def __post_init__(self) -> None:
        self._turns = asyncio.Semaphore(HASHES_AHEAD)
        self._wanted_b = 0  # asked for so far
        self._answered_b = 0
        self._wanted: asyncio.Queue[tuple[HashWanted, asyncio.Task[bytes]] | None] = asyncio.Queue(RANGES_MAX)

    async def run(self) -> None:
        """Do it all."""
        async with _beside(self._answer(), heed=False) as tasks:
            async with Pipeline(0) as pipeline:
                while True:
                    message, payload = await self.conn.receive()
                    if isinstance(message, HashWanted) and not payload:
                        self._check(message)
                        self._wanted.put_nowait((message, tasks.create_task(self._hash(message))))
                    elif isinstance(message, WdiffChunk) and payload:
                        await pipeline.push(self.pools.run(Pool.RECEIVE, self.sink.feed, payload), len(payload))
                        if self.timer.is_due(len(payload)):
                            await pipeline.push(self.pools.run(Pool.RECEIVE, self.sink.sync), 0)
                    elif isinstance(message, End) and not payload:
                        break
                    else:
                        raise self.conn.unexpected(message, HashWanted, WdiffChunk, End)
                if self._answered_b != self.size_b:
                    raise RemoteProtocolError(
                        "the comparison ends early", offset_b=self._answered_b, size_b=self.size_b
                    )
                await pipeline.drain()
            await self.pools.run(Pool.MAINTAIN, self.sink.finish)  # long: it reads back what has come
            self._wanted.put_nowait(None)

    def _check(self, wanted: HashWanted) -> None:
        """Raise RemoteProtocolError unless this range may be asked for now; then it counts as asked for."""
        end_b = wanted.offset_b + wanted.size_b
        whole = wanted.size_b % self.bulk_b == 0 or end_b == self.size_b
        if wanted.offset_b != self._wanted_b or end_b > self.size_b or not whole:
            raise RemoteProtocolError(
                "a range is not where it must be",
                offset_b=wanted.offset_b,
                expected_b=self._wanted_b,
                range_b=wanted.size_b,
                size_b=self.size_b,
            )
        if self._wanted.full():
            raise RemoteProtocolError("too many ranges are asked for at once", ranges_max=RANGES_MAX)
        self._wanted_b = end_b

    async def _answer(self) -> None:
        """Send the hashes of wanted ranges, in order, and fillers, until told to end.

        A connection that fails here fails for whoever receives, too, and there the peer's reason may come.
        """
        with contextlib.suppress(ConnectError):
            await self._answer_all()

    async def _answer_all(self) -> None:
        sender = LiveSender(self.conn)
        while (wanted := await with_filler(self.conn, self._wanted.get())) is not None:
            message, hashing = wanted
            hashes = await with_filler(self.conn, _result(hashing))
            self._answered_b = message.offset_b + message.size_b  # first: the peer may end as soon as it has them
            await sender.send(HashRun(offset_b=message.offset_b), hashes)
            self.tick(self._answered_b)

    async def _hash(self, wanted: HashWanted) -> bytes:
        async with self._turns:
            return await self.pools.run(Pool.QUERY, self._hash_range, wanted.offset_b, wanted.size_b)

    # in threads

    def _hash_range(self, offset_b: int, size_b: int) -> bytes:
        data = self.read(offset_b, size_b)
        if len(data) < size_b:  # beyond the end of our image
            padded = bytearray(size_b)
            padded[: len(data)] = data
            data = padded
        return hash_bulks(xxh3, data, self.bulk_b, self.seed)


# --- both


async def _result(task: asyncio.Task[T]) -> T:
    return await task


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, None], *, heed: bool) -> AsyncIterator[asyncio.TaskGroup]:
    """Run `work` beside the body, and more in the group; the first failure ends all, and comes out alone.

    With `heed`: when the connection fails under the body, `work` may still receive the peer's reason; that wins.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            beside = tasks.create_task(work)
            try:
                yield tasks
            except ConnectError:
                if heed:
                    await asyncio.wait({beside}, timeout=LAST_WORDS_S)
                raise
    except BaseExceptionGroup as group:
        errors = group.exceptions
        raise next((error for error in errors if isinstance(error, RemoteError)), errors[0]) from None
