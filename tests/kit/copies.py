"""Both halves of the exchange of a comparing copy, joined in memory."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

from tests.kit.fake_archive import MemoryFile, overlay
from tests.kit.virtual import InlinePools
from walbd.daemon.conn import LIMITS, Connection, Peer
from walbd.daemon.copying import ImageSource, Spend
from walbd.daemon.env import Pool
from walbd.daemon.hash_sync import Differences, receive_differences, send_differences
from walbd.daemon.pipeline import SyncTimer
from walbd.daemon.tasks import Signal
from walbd.errors import ConnectError, RemoteError, TimedOut, WalbError
from walbd.format.wdiff import HEADER_B
from walbd.format.wdiff_read import open_wdiff
from walbd.format.wdiff_stream import PackVerifier
from walbd.fs import Buf
from walbd.protocol.base import Kind, Ok
from walbd.protocol.frame import Frame, FrameLimits, encode_prefix
from walbd.units import LB

P = ParamSpec("P")
T = TypeVar("T")

IO_TIMEOUT_S = 120.0
UUID = bytes(range(16))


class NarrowStream:
    """One end of a connection that takes only so many frames until the peer has read some.

    It can break at a given frame (`walbd.daemon.net.FrameStream`).
    """

    def __init__(self, peer: str, frames_max: int) -> None:
        self.limits: FrameLimits = LIMITS
        self.peer = peer
        self.other: NarrowStream | None = None
        self.break_at = -1  # the frame with which the connection breaks
        self.sent = 0
        self._frames_max = frames_max
        self._frames: deque[Frame] = deque()
        self._ended = self._broken = False
        self._changed = Signal()  # at either end

    async def send(self, header: bytes, payload: Sequence[Buf] = ()) -> None:
        other = self._other
        if self.sent == self.break_at:
            self._end(broken=True)
        self.sent += 1
        data = b"".join(bytes(part) for part in payload)
        encode_prefix(len(header), len(data), self.limits)
        if self._ended or self._broken or other._ended:
            raise ConnectError("the connection was lost", peer=self.peer)
        other._frames.append(Frame(header, memoryview(data)))
        other._changed.set()
        await self._changed.wait_for(lambda: len(other._frames) < self._frames_max or self._broken or other._ended)
        await asyncio.sleep(0)

    async def receive(self) -> Frame | None:
        await self._changed.wait_for(lambda: bool(self._frames) or self._broken or self._other._ended)
        if self._frames:
            self._other._changed.set()
            return self._frames.popleft()
        if self._broken:
            raise ConnectError("the connection was lost", peer=self.peer)
        return None

    async def close(self) -> None:
        self._end(broken=False)

    def abort(self) -> None:
        if not self._ended:
            self._end(broken=True)

    @property
    def _other(self) -> NarrowStream:
        assert self.other is not None
        return self.other

    def _end(self, *, broken: bool) -> None:
        self._ended = True
        for stream in (self, self._other):
            stream._broken = stream._broken or broken
            stream._changed.set()


def connected(frames_max: int = 1000) -> tuple[Connection, Connection]:
    """Return the two ends of a connection after its handshake."""
    here, there = NarrowStream("there", frames_max), NarrowStream("here", frames_max)
    here.other, there.other = there, here
    return (
        Connection(here, Peer("dest", Kind.ARCHIVE, "there"), IO_TIMEOUT_S),
        Connection(there, Peer("source", Kind.STORAGE, "here"), IO_TIMEOUT_S),
    )


def images(rng: random.Random, *, size_max_lb: int, bulk_b: int) -> tuple[bytes, bytes]:
    """Make an image and another that is like it here and there, of equal or other size."""
    size_b = rng.randint(1, size_max_lb) * LB
    source, dest = bytearray(size_b), bytearray(size_b)
    for _ in range(rng.randrange(12)):
        at, length = rng.randrange(size_b), rng.choice([1, LB, bulk_b, 5 * bulk_b, size_b])
        piece = rng.choice([bytes(length), rng.randbytes(length), b"ab" * length])[: min(length, size_b - at)]
        for image in rng.choice([[source], [dest], [source, dest], [source, dest]]):
            image[at : at + len(piece)] = piece
    if rng.random() < 0.3:
        dest = dest[: rng.randint(0, size_b // LB) * LB]
    elif rng.random() < 0.2:
        dest += rng.randbytes(rng.randint(1, 5) * LB)
    return bytes(source), bytes(dest)


@dataclass
class KeptDiff:
    """A sink that keeps and verifies what comes."""

    size_lb: int
    data: bytearray = field(default_factory=bytearray)
    finished: bool = False
    syncs: int = 0
    fail_at: int = -1  # raise at this feed
    error: WalbError | None = None
    feeds: int = 0

    def __post_init__(self) -> None:
        self._verifier = PackVerifier(size_lb=self.size_lb)

    def feed(self, piece: memoryview) -> None:
        if self.feeds == self.fail_at:
            assert self.error is not None
            raise self.error
        self.feeds += 1
        self._verifier.feed_all(piece if self.data else piece[HEADER_B:])
        self.data += piece

    def sync(self) -> None:
        self.syncs += 1

    def finish(self) -> None:
        self._verifier.finish()
        assert open_wdiff(MemoryFile(bytes(self.data))).header.uuid == UUID
        self.finished = True

    def laid_over(self, image: bytes, size_b: int) -> bytes:
        """Return the image of the destination, cut or grown to a size, under the diff."""
        return overlay(image[:size_b] + bytes(max(size_b - len(image), 0)), [bytes(self.data)])


class SlowPools(InlinePools):
    """Calls that take time, but for the writing of what is received, and may come back in any order."""

    def __init__(self, rng: random.Random, latency_s: float) -> None:
        super().__init__(rng)
        self._latency_s = latency_s

    async def run(self, pool: Pool, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        if pool is not Pool.RECEIVE:
            await asyncio.sleep(self._latency_s * self._rng.random())
        return await super().run(pool, call, *args, **kwargs)


class CopyPair:
    """One exchange; `latency_s` is how long each read of either image takes."""

    def __init__(
        self,
        rng: random.Random,
        source: bytes,
        dest: bytes,
        *,
        bulk_b: int,
        latency_s: float = 0.0,
        spend: Spend | None = None,
        frames_max: int = 1000,
    ) -> None:
        self.rng = rng
        self.source = source
        self.dest = dest
        self.bulk_b = bulk_b
        self.latency_s = latency_s
        self.spend = spend
        self.seed = rng.getrandbits(64)
        self.sink = KeptDiff(len(source) // LB)
        self.ticks_source: list[int] = []
        self.ticks_dest: list[int] = []
        self.reads = 0
        self.reading = self.reading_max = 0
        self.on_source_tick: Callable[[int], None] = self.ticks_source.append
        self.on_dest_tick: Callable[[int], None] = self.ticks_dest.append
        self.read_dest: Callable[[int, int], bytes] = lambda at, size_b: self.dest[at : at + size_b]
        self.pools = SlowPools(rng, latency_s)
        self.conn, self.dest_conn = connected(frames_max)
        self.dest_error: BaseException | None = None

    async def read_source(self, offset_b: int, size_b: int) -> bytes:
        """Read the source's image, slowly."""
        self.reads += 1
        self.reading += 1
        self.reading_max = max(self.reading_max, self.reading)
        try:
            await asyncio.sleep(self.latency_s * self.rng.random())
        finally:
            self.reading -= 1
        return self.source[offset_b : offset_b + size_b]

    async def send(self) -> Differences:
        """The source's half."""
        source = ImageSource(
            read=self.read_source,
            size_b=len(self.source),
            tick=lambda at: self.on_source_tick(at),
            spend=self.spend,
        )
        return await send_differences(self.conn, self.pools, source, bulk_b=self.bulk_b, seed=self.seed, uuid=UUID)

    async def serve(self) -> None:
        """The destination's half, as a server conducts it."""
        conn = self.dest_conn
        try:
            await receive_differences(
                conn,
                self.pools,
                lambda offset_b, size_b: self.read_dest(offset_b, size_b),
                self.sink,
                size_b=len(self.source),
                bulk_b=self.bulk_b,
                seed=self.seed,
                timer=SyncTimer(1 << 16, 1),
                tick=lambda at: self.on_dest_tick(at),
            )
            await conn.send(Ok())
        except ConnectError:
            raise
        except WalbError as exc:
            await conn.send_error(exc)
            raise
        finally:
            await conn.close()

    async def run(self) -> Differences:
        """Run both; the source's result or error comes out, the destination's error is kept."""
        serving = asyncio.ensure_future(self.serve())
        try:
            found = await self.send()
            await serving
            return found
        except BaseException as exc:
            if isinstance(exc, WalbError) and not isinstance(exc, ConnectError | RemoteError | TimedOut):
                await self.conn.send_error(exc)
            self.conn.abort()
            await asyncio.wait({serving})
            self.dest_error = serving.exception()
            raise
