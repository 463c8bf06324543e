"""An NBD server: sockets and batches around the protocol core; what is served comes from a backend.

One wake-up of a connection gives one table of writes, one of reads and one of the rest (walbd.ext.nbd); the
backend sees tables, not requests. Payloads stay where they were received: a `Writes` holds its receive buffer.
Replies of a batch leave in one write. What may be in flight is bounded by one `Budget` for the server: above
it, sockets are not read.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final, Protocol

import structlog

from walbd.daemon.logs import error_fields
from walbd.daemon.net import Address
from walbd.daemon.tasks import Signal
from walbd.errors import ConnectError, RemoteProtocolError, WalbError
from walbd.ext.buffers import Buf
from walbd.ext.nbd import CHUNK_B, REQUEST_COST_B, Chunk, parse_requests, read_replies, simple_replies
from walbd.protocol.nbd import (
    CONTEXT_ALLOCATION,
    LENGTH_MAX_B,
    RANGE_TABLE,
    REQUEST,
    REQUEST_TABLE,
    Command,
    CommandFlag,
    Ended,
    Error,
    Export,
    Negotiation,
    TlsPolicy,
    Transmission,
    block_status_reply,
    error_reply,
)

__all__ = ["CONTEXT_ALLOCATION", "Budget", "NbdBackend", "NbdServer", "Writes"]

log = structlog.get_logger()

_UNSENT_MAX_B: Final = 8 << 20  # replies not sent yet: above it a connection is not read
_ROOM_MIN_B: Final = 64 << 10  # a receive buffer with less room is replaced
_LARGE_READ_B: Final = 128 << 10  # reads from here on, on average, are made one by one in threads;
_BATCH_READ_MAX_B: Final = 1 << 20  # so are those of batches above this,
_SMALL_READ_B: Final = 16 << 10  # unless they are small
_STRUCTURED_HEADER_B: Final = 28
_SIMPLE_HEADER_B: Final = 16
_EXTENTS_MAX: Final = 512


class WriteSink(Protocol):
    """Where the answers to writes go: a connection."""

    def send_simple(self, table: bytes, begin: int, end: int, error: int, fua: int) -> int:
        """Send simple replies to requests [begin, end) of a table; return how many that were."""

    def give(self, size_b: int) -> None:
        """All requests of a `Writes` were answered: its bytes count no more."""


class Writes:
    """Writes, trims and zero-writes that one wake-up brought, and how far the backend is with them.

    `table` is a walb_request table of `n` valid requests, `n_fua` of them with FUA; payloads lie in `data`. They
    count as `size_b` bytes in flight.
    `index` and `done_b` are for the backend: the first request that is not wholly taken, and what of it is.
    Every request must be answered once.
    """

    __slots__ = ("_left", "_sink", "data", "done_b", "index", "n", "n_fua", "size_b", "table")

    def __init__(self, sink: WriteSink, table: bytes, data: Chunk | Buf, n_fua: int, size_b: int) -> None:
        self._sink = sink
        self.table = table
        self.data = data
        self.n = len(table) // REQUEST_TABLE.size
        self.n_fua = n_fua
        self.size_b = size_b
        self.index = 0
        self.done_b = 0
        self._left = self.n

    def answer(self, begin: int, end: int, error: int = 0, fua: int = -1) -> None:
        """Reply to requests [begin, end): all, or only those without (0) or with (1) the FUA flag."""
        n = self._sink.send_simple(self.table, begin, end, error, fua)
        self._left -= n
        if n and self._left == 0:  # there may have been none with that flag, after the last answer
            self._sink.give(self.size_b)


class NbdBackend(Protocol):
    """What stands behind an export. All calls come from the event loop."""

    def find(self, name: str) -> Export | None:
        """Return the export of that name as it is now; the empty name is the default."""

    def names(self) -> Sequence[str]:
        """Return the names to be listed."""

    def size_b(self) -> int:
        """Return the size of the volume now; it may grow."""

    def write(self, writes: Writes) -> None:
        """Take requests; answer them when they are done. Must not block."""

    def flush(self, done: Callable[[int], None]) -> None:
        """Call `done(error)` once everything that was answered before is durable."""

    def fill(self, ranges: bytes, out: Chunk) -> bytes:
        """Copy what is in memory to `out`; return the ranges that are not (walb_range tables)."""

    def read_cached(self, ranges: bytes, out: Chunk) -> bytes:
        """Read what needs no waiting; return the ranges that do."""

    async def read(self, ranges: bytes, out: Chunk) -> None:
        """Read ranges that `fill` or `read_cached` left. Raises WalbError."""

    async def extents(self, offset_b: int, size_b: int, n_max: int) -> list[tuple[int, int]]:
        """Return (length [byte], state) of at most `n_max` extents from an offset on. Raises WalbError."""


class Budget:
    """Bounds what all connections together have in flight [byte].

    Above the limit a connection waits as long as it has requests in flight itself; one that has none may always
    take one. So nobody waits for others only: writes that are held back do not stop readers.
    """

    def __init__(self, limit_b: int) -> None:
        self.limit_b = limit_b
        self.used_b = 0
        self._paused: set[_Connection] = set()

    @property
    def room_b(self) -> int:
        """What may be taken yet; not positive when the limit is reached."""
        return self.limit_b - self.used_b

    def take(self, size_b: int) -> None:
        """Note new work."""
        self.used_b += size_b

    def give(self, size_b: int) -> None:
        """Note finished work."""
        self.used_b -= size_b
        if self._paused and self.used_b <= self.limit_b // 2:
            for connection in list(self._paused):
                self.go_on(connection)

    def pause(self, connection: _Connection) -> None:
        """Hold a connection until half of the limit is free, or `go_on`."""
        self._paused.add(connection)
        connection.hold("budget")

    def go_on(self, connection: _Connection) -> None:
        """Hold a connection no more."""
        if connection in self._paused:
            self._paused.discard(connection)
            connection.release("budget")

    def forget(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._paused.discard(connection)


class NbdServer:
    """Serve a backend on any number of sockets."""

    def __init__(
        self,
        backend: NbdBackend,
        *,
        inflight_max_b: int = 128 << 20,
        connections_max: int = 64,
        negotiation_timeout_s: float = 30.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.backend = backend
        self.budget = Budget(inflight_max_b)
        self.addresses: list[Address] = []
        self.connections: set[_Connection] = set()
        self.changed = Signal()  # a connection came, went or became idle
        self.negotiation_timeout_s = negotiation_timeout_s
        self.tls = tls
        self._connections_max = connections_max
        self._servers: list[asyncio.AbstractServer] = []
        self._tasks: asyncio.TaskGroup | None = None
        self._closing = False

    async def listen(self, tasks: asyncio.TaskGroup, addresses: Sequence[Address]) -> None:
        """Begin to accept; work of connections runs in `tasks`. Raises ConnectError."""
        self._tasks = tasks
        loop = asyncio.get_running_loop()
        for address in addresses:
            try:
                if address.path:
                    server: asyncio.AbstractServer = await loop.create_unix_server(
                        lambda: _Connection(self, TlsPolicy.OFF), address.path
                    )
                    self.addresses.append(address)
                else:
                    policy = TlsPolicy.OFF if self.tls is None else TlsPolicy.REQUIRED
                    tcp = await loop.create_server(
                        lambda policy=policy: _Connection(self, policy),  # type: ignore[misc]
                        address.host,
                        address.port,
                    )
                    self.addresses.append(Address(host=address.host, port=tcp.sockets[0].getsockname()[1]))
                    server = tcp
            except OSError as exc:
                self.abort()
                raise ConnectError("cannot listen", address=str(address), reason=exc.strerror or str(exc)) from exc
            self._servers.append(server)

    def is_full(self) -> bool:
        """True when no further connection is taken."""
        return self._closing or len(self.connections) >= self._connections_max

    async def stop(self) -> None:
        """Accept no more, take no more requests, answer those that are in flight, and close."""
        self._closing = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.drain()
        await self.changed.wait_for(lambda: not self.connections)

    def abort(self) -> None:
        """Drop all connections at once."""
        self._closing = True
        for server in self._servers:
            server.close()
        for connection in list(self.connections):
            connection.abort()

    def spawn(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run `work` as a task of the server."""
        assert self._tasks is not None
        self._tasks.create_task(work, name=name)


class _Connection(asyncio.BufferedProtocol):
    """One client."""

    def __init__(self, server: NbdServer, policy: TlsPolicy) -> None:
        self._server = server
        self._backend = server.backend
        self._negotiation: Negotiation | None = Negotiation(
            find=server.backend.find, names=server.backend.names, tls=policy
        )
        self._agreed: Transmission | None = None
        self._structured = False
        self._header_b = _SIMPLE_HEADER_B
        self._transport: asyncio.Transport | None = None
        self._chunk = Chunk(CHUNK_B)
        self._view = memoryview(self._chunk)
        self._begin = 0  # of what is not parsed yet
        self._end = 0  # of what was received
        self._need = REQUEST.size  # size of the request at `_begin`, as far as known
        self._shared = False  # somebody else holds the chunk
        self._inflight = 0  # requests not answered yet
        self._holds: set[str] = set()  # why the socket is not read
        self._draining = False  # no more requests; close when all are answered
        self._timer: asyncio.TimerHandle | None = None
        self.peer = ""

    # called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=_UNSENT_MAX_B)
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        if self._server.is_full():
            log.warning("nbd.refused", peer=self.peer, connections=len(self._server.connections))
            self._transport.abort()
            return
        self._server.connections.add(self)
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(self._server.negotiation_timeout_s, self._too_slow)
        assert self._negotiation is not None
        self._transport.write(self._negotiation.greeting())

    def get_buffer(self, sizehint: int) -> memoryview:
        size_b = len(self._chunk)
        if self._begin == self._end:
            if not self._shared:
                self._begin = self._end = 0
            elif size_b - self._end < _ROOM_MIN_B:
                self._replace_chunk(CHUNK_B)
        if self._begin + self._need > len(self._chunk):
            self._replace_chunk(max(CHUNK_B, self._need))
        return self._view[self._end :]

    def buffer_updated(self, nbytes: int) -> None:
        self._end += nbytes
        if self._negotiation is not None:
            self._negotiate()
        elif self._end - self._begin >= self._need:
            self._take_requests()

    def eof_received(self) -> bool:
        self.drain()
        # Plain transports then stay open until everything is answered; encrypted ones cannot.
        return self._transport is not None and self._transport.get_extra_info("sslcontext") is None

    def connection_lost(self, exc: BaseException | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._transport = None
        self._server.budget.forget(self)
        self._server.connections.discard(self)
        self._server.changed.set()

    def pause_writing(self) -> None:
        self.hold("writing")

    def resume_writing(self) -> None:
        self.release("writing")

    # reading on and off

    def hold(self, why: str) -> None:
        """Do not read the socket until `release(why)`."""
        if not self._holds and self._transport is not None:
            self._transport.pause_reading()
        self._holds.add(why)

    def release(self, why: str) -> None:
        """One reason less not to read; requests that were received already come first."""
        self._holds.discard(why)
        if not self._holds:
            asyncio.get_running_loop().call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._negotiation is None:
            self._take_requests()
        if not self._holds and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def drain(self) -> None:
        """Take no more requests, and close once all are answered."""
        self._draining = True
        self.hold("draining")
        self._close_if_done()

    def abort(self) -> None:
        """Drop the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _close_if_done(self) -> None:
        if self._draining and self._inflight == 0 and self._transport is not None:
            self._transport.close()

    def _too_slow(self) -> None:
        if self._negotiation is not None:
            log.info("nbd.negotiation_timed_out", peer=self.peer)
            self.abort()

    def _replace_chunk(self, size_b: int) -> None:
        """Go on in a new buffer, which gets what is not parsed yet."""
        rest = self._view[self._begin : self._end]
        chunk = Chunk(size_b)
        view = memoryview(chunk)
        view[: len(rest)] = rest
        self._chunk, self._view, self._shared = chunk, view, False
        self._begin, self._end = 0, len(rest)

    # negotiation

    def _negotiate(self) -> None:
        negotiation, transport = self._negotiation, self._transport
        assert negotiation is not None
        if transport is None:
            return
        try:
            answer = negotiation.feed(self._view[self._begin : self._end])
        except RemoteProtocolError as exc:
            log.warning("nbd.refused", peer=self.peer, **error_fields(exc))
            transport.abort()
            return
        self._begin = self._end = 0
        if answer:
            transport.write(answer)
        match negotiation.outcome:
            case None:
                return
            case Ended.ABORTED:
                transport.close()
            case Ended.START_TLS:
                self.hold("tls")
                self._server.spawn(self._start_tls(negotiation), f"nbd-tls:{self.peer}")
            case Transmission() as agreed:
                self._begin_transmission(agreed, negotiation.rest)

    async def _start_tls(self, negotiation: Negotiation) -> None:
        transport, tls = self._transport, self._server.tls
        assert tls is not None
        if transport is None:
            return
        try:
            negotiation.restart()
            self._transport = await asyncio.get_running_loop().start_tls(
                transport, self, tls, server_side=True, ssl_handshake_timeout=self._server.negotiation_timeout_s
            )
        except (OSError, RemoteProtocolError) as exc:
            log.warning("nbd.tls_failed", peer=self.peer, **error_fields(exc))
            transport.abort()
            return
        if self._transport is None:
            return  # the client left meanwhile
        self._transport.set_write_buffer_limits(high=_UNSENT_MAX_B)
        self._holds.discard("tls")  # start_tls has resumed reading

    def _begin_transmission(self, agreed: Transmission, rest: bytes) -> None:
        self._negotiation = None
        if self._timer is not None:
            self._timer.cancel()
        self._agreed = agreed
        self._structured = agreed.structured
        self._header_b = _STRUCTURED_HEADER_B if agreed.structured else _SIMPLE_HEADER_B
        log.debug("nbd.connected", peer=self.peer, structured=agreed.structured)
        if rest:  # a client may send requests without waiting; at most a few, they fit
            self._view[: len(rest)] = rest
            self._end = len(rest)
            self._take_requests()

    # transmission

    def _take_requests(self) -> None:
        """Take the requests that were received, as far as the budget allows."""
        budget = self._server.budget
        while not self._draining and self._transport is not None:
            if budget.room_b <= 0 and self._inflight:
                budget.pause(self)
            if self._holds or self._end - self._begin < self._need:
                return  # what is left is taken by `_go_on`, or when there is more
            room_b = max(budget.room_b, 0)
            try:
                consumed, self._need, writes, n_fua, write_b, reads, read_b, others = parse_requests(
                    self._chunk,
                    self._begin,
                    self._end,
                    self._backend.size_b(),
                    LENGTH_MAX_B,
                    room_b=room_b,
                )
            except RemoteProtocolError as exc:
                log.warning("nbd.broken", peer=self.peer, **error_fields(exc))
                self.abort()
                return
            self._begin = consumed
            if writes:
                self._shared = True
                cost_b = write_b + len(writes) // REQUEST_TABLE.size * REQUEST_COST_B
                batch = Writes(self, writes, self._chunk, n_fua, cost_b)
                self._inflight += batch.n
                budget.take(cost_b)
                self._backend.write(batch)
            if reads:
                self._read(reads, read_b)
            if others:
                for request in REQUEST_TABLE.iter_unpack(others):
                    self._other(*request)

    def send_simple(self, table: bytes, begin: int, end: int, error: int, fua: int) -> int:
        """Answer requests of a table (WriteSink)."""
        replies = simple_replies(table, begin, end, error, fua)
        n = len(replies) // _SIMPLE_HEADER_B
        if self._transport is not None and replies:
            self._transport.write(replies)
        self._answered(n)
        return n

    def give(self, size_b: int) -> None:
        """Return the bytes of writes to the budget (WriteSink)."""
        self._server.budget.give(size_b)

    def _answered(self, n: int) -> None:
        self._inflight -= n
        if self._inflight == 0:
            self._server.budget.go_on(self)
            self._close_if_done()

    def _read(self, table: bytes, read_b: int) -> None:
        n = len(table) // REQUEST_TABLE.size
        self._inflight += n
        self._server.budget.take(read_b + n * REQUEST_COST_B)
        if read_b < _LARGE_READ_B * n and read_b <= max(_BATCH_READ_MAX_B, _SMALL_READ_B * n):
            out, ranges = read_replies(table, self._structured)
            missing = self._backend.read_cached(ranges, out)
            if missing:
                self._read_missing(table, ranges, missing, out)
            else:
                self._send_read(memoryview(out), n, read_b)
            return
        for i in range(n):
            part = table[i * REQUEST_TABLE.size : (i + 1) * REQUEST_TABLE.size]
            out, ranges = read_replies(part, self._structured)
            missing = self._backend.fill(ranges, out)
            if missing:
                self._server.spawn(self._read_one(part, missing, memoryview(out), out), "nbd-read")
            else:
                self._send_read(memoryview(out), 1, len(out) - self._header_b)

    def _read_missing(self, table: bytes, ranges: bytes, missing: bytes, out: Chunk) -> None:
        """Send the replies that are complete, and read for each of the others in a task."""
        gaps: dict[int, bytes] = {}
        for at in range(0, len(missing), RANGE_TABLE.size):
            gap = missing[at : at + RANGE_TABLE.size]
            index = RANGE_TABLE.unpack(gap)[3]
            gaps[index] = gaps.get(index, b"") + gap
        view = memoryview(out)
        for _, size_b, out_b, index in RANGE_TABLE.iter_unpack(ranges):
            span = view[out_b - self._header_b : out_b + size_b]
            if index in gaps:
                part = table[index * REQUEST_TABLE.size : (index + 1) * REQUEST_TABLE.size]
                self._server.spawn(self._read_one(part, gaps[index], span, out), "nbd-read")
            else:
                self._send_read(span, 1, size_b)

    async def _read_one(self, request: bytes, missing: bytes, span: memoryview, out: Chunk) -> None:
        size_b = len(span) - self._header_b
        try:
            await self._backend.read(missing, out)
        except WalbError as exc:
            log.error("nbd.read_failed", peer=self.peer, **error_fields(exc))
            cookie = REQUEST_TABLE.unpack(request)[0]
            span = memoryview(error_reply(cookie, Error.IO, structured=self._structured))
        self._send_read(span, 1, size_b)

    def _send_read(self, reply: memoryview, n: int, size_b: int) -> None:
        if self._transport is not None:
            self._transport.write(reply)
        self._server.budget.give(size_b + n * REQUEST_COST_B)
        self._answered(n)

    def _other(
        self, cookie: int, offset_b: int, _: int, length_b: int, error: int, kind: int, flags: int, __: int
    ) -> None:
        """Handle one request that is not a valid read or write."""
        structured = self._structured and kind in (Command.READ, Command.BLOCK_STATUS)
        if kind == Command.DISC and not error:
            self.drain()
            return
        self._inflight += 1
        self._server.budget.take(REQUEST_COST_B)
        if error:
            self._reply(error_reply(cookie, error, structured=structured))
        elif kind == Command.FLUSH:
            self._backend.flush(lambda code: self._reply(error_reply(cookie, code, structured=False)))
        elif self._agreed is None or not self._agreed.allocation:
            self._reply(error_reply(cookie, Error.INVAL, structured=structured))
        else:
            one = bool(flags & CommandFlag.REQ_ONE)
            self._server.spawn(self._block_status(cookie, offset_b, length_b, one), "nbd-block-status")

    async def _block_status(self, cookie: int, offset_b: int, length_b: int, one: bool) -> None:
        try:
            extents = await self._backend.extents(offset_b, length_b, 1 if one else _EXTENTS_MAX)
            reply = block_status_reply(cookie, extents)
        except WalbError as exc:
            log.error("nbd.block_status_failed", peer=self.peer, **error_fields(exc))
            reply = error_reply(cookie, Error.IO, structured=True)
        self._reply(reply)

    def _reply(self, reply: bytes) -> None:
        """Send the one reply to one request; a simple reply without error has the form of an error reply."""
        if self._transport is not None:
            self._transport.write(reply)
        self._server.budget.give(REQUEST_COST_B)
        self._answered(1)
