"""An archive's side of wdiff transfers, with scripted answers.

Without a script it does what an archive does: it knows one uuid and its latest snapshot, checks them in order,
takes the wdiff, verifies it, and lays it over its image. It keeps everything in memory, also over `restart`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit.process import free_port, release_ports
from tests.kit.running import Running
from walbd.daemon.conn import Connection, Me
from walbd.daemon.env import Env
from walbd.daemon.net import Address
from walbd.daemon.server import Server
from walbd.daemon.tasks import Signal
from walbd.errors import WalbError
from walbd.format.meta import Diff, Relation, Snapshot, apply, relation
from walbd.format.virtual import VirtualImage
from walbd.format.wdiff_read import open_wdiff
from walbd.protocol.base import End, Kind, Ok
from walbd.protocol.control import GetHostType, HostType
from walbd.protocol.transfer import Verdict, WdiffChunk, WdiffOffer, WdiffVerdict

RELATIONS = {Relation.TOO_OLD: Verdict.TOO_OLD, Relation.TOO_NEW: Verdict.TOO_NEW}


def drop_connections(server: Server) -> None:
    """Close all sockets of a server at once, before its tasks are cancelled: no task can begin after that."""
    server._closing = True
    for listener in server._listeners:
        listener.close()
    for stream in server._streams:
        stream.abort()


class MemoryFile:
    """Bytes that can be read like a file."""

    def __init__(self, data: bytes, name: str = "memory") -> None:
        self.path = Path(name)
        self.data = data

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return self.data[offset_b : offset_b + size_b]

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        part = self.data[offset_b : offset_b + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def size(self) -> int:
        return len(self.data)


def overlay(image: bytes, wdiffs: list[bytes]) -> bytes:
    """Return an image with wdiff files (oldest first) laid over it."""
    readers = [open_wdiff(MemoryFile(data, f"wdiff {i}")) for i, data in enumerate(wdiffs)]
    return VirtualImage(MemoryFile(image), readers, len(image)).read(0, len(image))


@dataclass(frozen=True)
class Got:
    """One wdiff that came whole."""

    offer: WdiffOffer
    data: bytes
    chunks: int


@dataclass
class FakeArchive:
    """The archive; `size_b` is that of its image."""

    name: str = "a0"
    kind: Kind = Kind.ARCHIVE
    size_b: int = 1 << 20
    image: bytes = b""
    uuid: bytes | None = None  # None: the first offer's is taken
    latest: Snapshot = field(default_factory=lambda: Snapshot.clean(0))
    script: deque[Verdict | WalbError] = field(default_factory=deque)  # answers to the next offers; then what fits
    always: Verdict | None = None  # the answer to every offer while it is set
    lose_acks: int = 0  # take the next wdiffs, but drop the connection instead of the acknowledgement
    fail_in_stream: WalbError | None = None  # answer the next stream with this error after its first chunk
    hold: asyncio.Event | None = None  # while set and not fired: nothing is read of a stream
    offers: list[WdiffOffer] = field(default_factory=list)
    answers: list[Verdict] = field(default_factory=list)
    got: list[Got] = field(default_factory=list)
    broken: int = 0  # streams that did not come to their end
    streaming: int = 0
    changed: Signal = field(default_factory=Signal)
    address: Address = field(default_factory=lambda: Address("127.0.0.1", 0))
    env: Env | None = None  # None: the real one

    def __post_init__(self) -> None:
        self.image = self.image or bytes(self.size_b)
        self._env = self.env or Env()
        self._running = Running()

    async def __aenter__(self) -> FakeArchive:
        await self.up()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.down()
        self._env.pools.close()
        release_ports([self.address.port])

    async def up(self) -> None:
        """Begin to listen; on the same port as before."""
        if self.env is None and not self.address.port:
            self.address = Address(self.address.host, free_port())  # that nobody else gets while we are down
        handlers: dict[type[Any], Callable[..., Any]] = {WdiffOffer: self._serve, GetHostType: self._host_type}
        server = Server(self._env, Me(self.name, self.kind, io_timeout_s=10), handlers)

        async def start(tasks: asyncio.TaskGroup) -> None:
            await server.listen(tasks, [self.address])
            self.address = server.addresses[0]

        await self._running.up(start, lambda: drop_connections(server))

    async def down(self) -> None:
        """Drop all connections and listen no more."""
        await self._running.crash()

    def refuse_all(self, verdict: Verdict | None) -> None:
        """Answer every offer with this from now on; None: as it fits."""
        self.always = verdict

    @property
    def diffs(self) -> list[str]:
        """Labels of what came whole, in order."""
        return [str(got.offer.diff) for got in self.got]

    async def _host_type(self, _conn: Connection, _request: GetHostType) -> HostType:
        return HostType(kind=self.kind)

    def _verdict(self, offer: WdiffOffer) -> Verdict:
        if self.script:
            scripted = self.script.popleft()
            if isinstance(scripted, WalbError):
                raise scripted
            return scripted
        if self.always is not None:
            return self.always
        if self.uuid is None:
            self.uuid = offer.uuid
        if offer.uuid != self.uuid:
            return Verdict.DIFFERENT_UUID
        if self.size_b < offer.size_lb * 512:
            return Verdict.SMALLER
        return RELATIONS.get(relation(self.latest, offer.diff), Verdict.ACCEPT)

    async def _serve(self, conn: Connection, offer: WdiffOffer) -> Ok | None:
        self.offers.append(offer)
        try:
            verdict = self._verdict(offer)
            self.answers.append(verdict)
            await conn.send(WdiffVerdict(verdict=verdict, latest=self.latest))
            if verdict is not Verdict.ACCEPT:
                return None
            self.streaming += 1
            self.changed.set()
            try:
                data, chunks = await self._stream(conn)
            except BaseException:
                self.broken += 1
                raise
            finally:
                self.streaming -= 1
        finally:
            self.changed.set()
        self._take(offer, data, chunks)
        if self.lose_acks > 0:
            self.lose_acks -= 1
            conn.abort()
            return None
        return Ok()

    async def _stream(self, conn: Connection) -> tuple[bytes, int]:
        parts: list[bytes] = []
        while True:
            if self.hold is not None:
                await self.hold.wait()
            message, payload = await conn.receive()
            if isinstance(message, End):
                return b"".join(parts), len(parts)
            assert isinstance(message, WdiffChunk), message
            parts.append(bytes(payload))
            if self.fail_in_stream is not None:
                error, self.fail_in_stream = self.fail_in_stream, None
                raise error

    def _take(self, offer: WdiffOffer, data: bytes, chunks: int) -> None:
        reader = open_wdiff(MemoryFile(data))
        assert reader.header.uuid == offer.uuid
        self.latest = apply(self.latest, offer.diff)  # raises for what a dead proxy has left under way
        self.image = overlay(self.image, [data])
        self.got.append(Got(offer, data, chunks))
        self.changed.set()


def clean(begin: int, end: int, *, mergeable: bool = True, timestamp: int = 1_700_000_000) -> Diff:
    """Return a clean diff."""
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), mergeable=mergeable, timestamp=timestamp + end)
