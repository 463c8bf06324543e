"""A pipelined NBD reader for the event loop: many reads on one connection, each into its own buffer."""

from __future__ import annotations

import asyncio
from typing import Final

from walbd.daemon.net import Address
from walbd.errors import ConnectError, DiskFailed, RemoteProtocolError, TimedOut, WalbError
from walbd.protocol.nbd import LENGTH_MAX_B, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, Command
from walbd.protocol.nbd_client import ClientNegotiation, request

_SCRATCH_B: Final = 4096


class _Read:
    """One read on its way."""

    __slots__ = ("buffer", "future", "got")

    def __init__(self, size_b: int, future: asyncio.Future[memoryview]) -> None:
        self.buffer = memoryview(bytearray(size_b))
        self.future = future
        self.got = 0


class NbdReader(asyncio.BufferedProtocol):
    """A connection to an export, for reading. Make one with `open_reader`."""

    def __init__(self, export: str, peer: str, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self._closed: asyncio.Future[None] = loop.create_future()
        self._negotiation = ClientNegotiation(export)
        self._peer = peer
        self._timeout_s = timeout_s
        self._transport: asyncio.Transport | None = None
        self._reads: dict[int, _Read] = {}
        self._cookie = 0
        self._scratch = bytearray(_SCRATCH_B)
        self._have = 0  # bytes in the scratch
        self._current: _Read | None = None  # whose data is being received
        self._error: WalbError | None = None

    @property
    def size_b(self) -> int:
        """Size of the export."""
        return self._negotiation.size_b

    async def read(self, offset_b: int, size_b: int) -> memoryview:
        """Return bytes of the export. Raises DiskFailed when the server could not read, ConnectError, TimedOut."""
        if not 0 < size_b <= LENGTH_MAX_B:
            raise ValueError("a read is 1 byte to 32 MiB")
        if self._error is not None or self._transport is None:
            raise self._error or ConnectError("the NBD connection is closed", address=self._peer)
        self._cookie += 1
        read = _Read(size_b, asyncio.get_running_loop().create_future())
        self._reads[self._cookie] = read
        self._transport.write(request(Command.READ, self._cookie, offset_b, size_b))
        try:
            async with asyncio.timeout(self._timeout_s):
                return await read.future
        except TimeoutError as exc:
            self._fail(TimedOut("the NBD server did not answer in time", address=self._peer))
            raise TimedOut("the NBD server did not answer in time", address=self._peer) from exc

    async def close(self) -> None:
        """Say goodbye and close."""
        if self._transport is not None:
            self._transport.write(request(Command.DISC, 0, 0, 0))
            self._transport.close()
        await asyncio.wait({self._closed})

    def abort(self) -> None:
        """Drop the connection."""
        self._fail(ConnectError("the NBD connection was dropped", address=self._peer))

    # called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def get_buffer(self, sizehint: int) -> memoryview:
        if self._current is not None:
            return self._current.buffer[self._current.got :]
        # Headers only, so that data is received where it belongs.
        size_b = SIMPLE_REPLY.size if self._negotiation.done else _SCRATCH_B
        return memoryview(self._scratch)[self._have : size_b]

    def buffer_updated(self, nbytes: int) -> None:
        try:
            self._received(nbytes)
        except WalbError as exc:
            self._fail(exc)

    def _received(self, nbytes: int) -> None:
        if not self._negotiation.done:
            self._negotiate(nbytes)
            return
        if self._current is not None:
            self._current.got += nbytes
            if self._current.got == len(self._current.buffer):
                self._finish(self._current)
                self._current = None
            return
        self._have += nbytes
        if self._have < SIMPLE_REPLY.size:
            return
        self._have = 0
        magic, error, cookie = SIMPLE_REPLY.unpack_from(self._scratch)
        read = self._reads.pop(cookie, None)
        if magic != SIMPLE_REPLY_MAGIC or read is None:
            raise RemoteProtocolError("not an NBD reply", address=self._peer)
        if not error:
            self._current = read
        elif not read.future.done():
            read.future.set_exception(
                DiskFailed("the NBD server failed a read", address=self._peer, nbd_error=error)
            )

    def _negotiate(self, nbytes: int) -> None:
        assert self._transport is not None
        self._transport.write(self._negotiation.feed(memoryview(self._scratch)[:nbytes]))
        if self._negotiation.done and not self.ready.done():
            self.ready.set_result(None)

    @staticmethod
    def _finish(read: _Read) -> None:
        if not read.future.done():  # its reader may have been cancelled
            read.future.set_result(read.buffer)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._fail(ConnectError("the NBD connection was lost", address=self._peer, reason=str(exc or "closed")))
        self._transport = None
        if not self._closed.done():
            self._closed.set_result(None)

    def _fail(self, error: WalbError) -> None:
        if self._error is None:
            self._error = error
        if self._transport is not None:
            self._transport.abort()
        waiting = [read.future for read in self._reads.values()]
        self._reads.clear()
        if self._current is not None:
            waiting.append(self._current.future)
            self._current = None
        if not self.ready.done():
            self.ready.set_exception(self._error)
        for future in waiting:
            if not future.done():
                future.set_exception(self._error)


async def open_reader(address: Address, export: str = "", *, timeout_s: float = 30.0) -> NbdReader:
    """Connect to an export for reading. Raises ConnectError, NotFound, TimedOut, RemoteProtocolError."""
    loop = asyncio.get_running_loop()

    def make() -> NbdReader:
        return NbdReader(export, str(address), timeout_s)

    reader: NbdReader | None = None
    try:
        async with asyncio.timeout(timeout_s):
            if address.path:
                _, reader = await loop.create_unix_connection(make, address.path)
            else:
                _, reader = await loop.create_connection(make, address.host, address.port)
            await reader.ready
            opened, reader = reader, None
            return opened
    except TimeoutError as exc:  # before OSError, of which it is one
        raise TimedOut("the NBD server did not answer in time", address=str(address)) from exc
    except OSError as exc:
        raise ConnectError(
            "cannot connect to the NBD server", address=str(address), reason=exc.strerror or str(exc)
        ) from exc
    finally:
        if reader is not None:  # also when the caller was cancelled
            reader.ready.cancel()
            reader.abort()
