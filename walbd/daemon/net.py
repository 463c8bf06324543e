"""The stream layer: frames over TCP, TLS and unix sockets, or over whatever a test puts in its place.

`FrameStream` is all that the rest of a daemon sees of the network. The real one is a BufferedProtocol: a
large payload is received straight into the buffer that its frame hands out (docs/decisions/0003-stream-layer.md).
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from walbd.errors import ConnectError, RemoteProtocolError, UsageError
from walbd.fs import Buf
from walbd.protocol.frame import HELLO_LIMITS, Frame, FrameDecoder, FrameLimits, encode_prefix

# What is wrong when a connection is made and then no understanding is reached.
TLS_HINT: Final = 'is TLS used by one side only, or does a certificate not fit? docs/operations.md, "Certificates"'
_QUEUE_MAX_B = 8 << 20  # received and not yet taken: above it the socket is not read
_WRITE_MAX_B = 4 << 20  # sent and not yet gone: above it senders wait


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens: a TCP host and port, or a unix socket."""

    host: str = ""
    port: int = 0
    path: str = ""

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def is_local(self) -> bool:
        """True when nobody on another machine can connect."""
        return bool(self.path) or self.host in ("localhost", "::1") or self.host.startswith("127.")


def parse_address(text: str) -> Address:
    """Read `HOST:PORT`, `[IPV6]:PORT` or `unix:PATH`; raises UsageError."""
    if text.startswith("unix:") and len(text) > 5:
        return Address(path=text[5:])
    host, _, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    if not host or not port.isascii() or not port.isdecimal() or not 0 <= int(port) < 1 << 16:
        raise UsageError("bad address", hint="write HOST:PORT or unix:PATH", address=text)
    return Address(host=host, port=int(port))


class FrameStream(Protocol):
    """One connection, as frames. One task may send while another receives."""

    limits: FrameLimits  # what we accept and send from now on; widened after the handshake
    peer: str  # the other end, for logs

    async def send(self, header: bytes, payload: Sequence[Buf] = ()) -> None:
        """Send a frame; returns when the connection may take more. Raises ConnectError."""

    async def receive(self) -> Frame | None:
        """Return the next frame, None at the peer's orderly end.

        Raises ConnectError when the connection was lost (inside a frame, too), RemoteProtocolError when the
        peer sent something that is no frame.
        """

    async def close(self) -> None:
        """Send what is left and close; returns when the connection is gone. Safe to call twice."""

    def abort(self) -> None:
        """Drop the connection at once."""


class Listener(Protocol):
    """A listening socket."""

    address: Address  # with the port that was really bound

    def close(self) -> None:
        """Accept no more; connections that exist stay."""


Accept = Callable[[FrameStream], None]  # starts the task that serves the connection


class Network(Protocol):
    """Where connections come from."""

    async def connect(self, address: Address, tls: ssl.SSLContext | None = None) -> FrameStream:
        """Connect; the deadline is the caller's. Raises ConnectError."""

    async def listen(self, address: Address, accept: Accept, tls: ssl.SSLContext | None = None) -> Listener:
        """Listen; `accept` is called with each new connection. Raises ConnectError."""


class OsNetwork:
    """The network of this machine."""

    async def connect(self, address: Address, tls: ssl.SSLContext | None = None) -> FrameStream:
        loop = asyncio.get_running_loop()
        make = SocketStream
        try:
            if address.path:
                _, stream = await loop.create_unix_connection(make, address.path, ssl=tls)
            else:
                _, stream = await loop.create_connection(make, address.host, address.port, ssl=tls)
        except (OSError, ssl.SSLError, UnicodeError) as exc:  # UnicodeError: what can be no host name
            hint = TLS_HINT if isinstance(exc, ssl.SSLError) else ""
            raise ConnectError("cannot connect", hint=hint, address=str(address), reason=_reason(exc)) from exc
        return stream

    async def listen(self, address: Address, accept: Accept, tls: ssl.SSLContext | None = None) -> Listener:
        loop = asyncio.get_running_loop()

        def accepted() -> SocketStream:
            return SocketStream(accept)

        try:
            if address.path:
                server = await loop.create_unix_server(accepted, address.path, ssl=tls)
                return _OsListener(server, address)
            server = await loop.create_server(accepted, address.host, address.port, ssl=tls)
            port = server.sockets[0].getsockname()[1]
            return _OsListener(server, Address(host=address.host, port=port))
        except (OSError, UnicodeError) as exc:
            hint = "see who listens there, or choose another port" if in_use(exc) else ""
            raise ConnectError("cannot listen", hint=hint, address=str(address), reason=_reason(exc)) from exc


class _OsListener:
    def __init__(self, server: asyncio.AbstractServer, address: Address) -> None:
        self.address = address
        self._server = server

    def close(self) -> None:
        self._server.close()


class SocketStream(asyncio.BufferedProtocol):
    """A FrameStream over a socket."""

    def __init__(self, ready: Callable[[SocketStream], None] | None = None) -> None:
        self.peer = ""
        self._ready = ready
        self._limits = HELLO_LIMITS
        self._decoder = FrameDecoder(HELLO_LIMITS)
        self._frames: deque[Frame] = deque()
        self._queued_b = 0
        self._transport: asyncio.Transport | None = None
        self._reading_paused = False
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._arrived: asyncio.Future[None] | None = None
        self._end: BaseException | None = None  # why no more frames come; EOFError: orderly
        self._lost = asyncio.Event()

    @property
    def limits(self) -> FrameLimits:
        return self._limits

    @limits.setter
    def limits(self, limits: FrameLimits) -> None:
        self._limits = self._decoder.limits = limits

    # called by the loop

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "writelines")
        self._transport = transport  # type: ignore[assignment]
        assert self._transport is not None
        self._transport.set_write_buffer_limits(high=_WRITE_MAX_B)
        peer = transport.get_extra_info("peername")
        self.peer = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "unix"
        if self._ready is not None:
            self._ready(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._decoder.buffer()

    def buffer_updated(self, nbytes: int) -> None:
        if self._end is not None:
            return
        try:
            frames = self._decoder.received(nbytes)
        except RemoteProtocolError as exc:
            self._finish(exc)
            self.abort()
            return
        for frame in frames:
            self._frames.append(frame)
            self._queued_b += len(frame.header) + len(frame.payload)
        if frames:
            self._wake()
        if self._queued_b > _QUEUE_MAX_B and not self._reading_paused and self._transport is not None:
            self._reading_paused = True
            self._transport.pause_reading()

    def eof_received(self) -> bool:
        if self._decoder.in_frame:
            self._finish(ConnectError("the connection ended inside a message", peer=self.peer))
        else:
            self._finish(EOFError())
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self._finish(ConnectError("the connection was lost", peer=self.peer, reason=_reason(exc)))
        self._may_write.set()
        self._lost.set()
        self._transport = None

    def pause_writing(self) -> None:
        self._may_write.clear()

    def resume_writing(self) -> None:
        self._may_write.set()

    # called by the daemon

    async def send(self, header: bytes, payload: Sequence[Buf] = ()) -> None:
        size = sum(len(part) for part in payload)
        prefix = encode_prefix(len(header), size, self._limits)
        if self._transport is None or self._transport.is_closing():
            raise self._gone()
        self._transport.writelines([prefix + header, *payload])
        await self._may_write.wait()
        if self._lost.is_set():
            raise self._gone()

    async def receive(self) -> Frame | None:
        while not self._frames:
            if self._end is not None:
                if isinstance(self._end, EOFError):
                    return None
                raise self._end
            self._arrived = asyncio.get_running_loop().create_future()
            await self._arrived
        frame = self._frames.popleft()
        self._queued_b -= len(frame.header) + len(frame.payload)
        if self._reading_paused and self._queued_b <= _QUEUE_MAX_B // 2 and self._transport is not None:
            self._reading_paused = False
            self._transport.resume_reading()
        return frame

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            try:
                await self._lost.wait()
            except asyncio.CancelledError:
                self.abort()
                raise

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _gone(self) -> ConnectError:
        if isinstance(self._end, ConnectError):
            return self._end
        return ConnectError("the connection was closed by the peer", peer=self.peer)

    def _finish(self, why: BaseException) -> None:
        if self._end is None:
            self._end = why
        self._wake()

    def _wake(self) -> None:
        if self._arrived is not None and not self._arrived.done():
            self._arrived.set_result(None)


def in_use(exc: BaseException) -> bool:
    """Tell whether an address could not be had as somebody else listens there."""
    return isinstance(exc, OSError) and exc.errno == errno.EADDRINUSE


def _reason(exc: BaseException | None) -> str:
    if exc is None:
        return "closed"
    if isinstance(exc, socket.gaierror):
        return exc.strerror or str(exc)
    if isinstance(exc, OSError) and not isinstance(exc, ssl.SSLError) and exc.errno:
        return os.strerror(exc.errno)  # asyncio puts the address into the text, which is a fact already
    return str(exc) or type(exc).__name__
