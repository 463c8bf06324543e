"""A plain, blocking NBD client for scripts: one request at a time."""

from __future__ import annotations

import socket
from types import TracebackType
from typing import Self

from walbd.errors import ConnectError, DiskFailed, RemoteProtocolError
from walbd.ext.buffers import Buf
from walbd.protocol.nbd import LENGTH_MAX_B, SIMPLE_REPLY, SIMPLE_REPLY_MAGIC, Command, CommandFlag
from walbd.protocol.nbd_client import ClientNegotiation, request


class NbdVolume:
    """A volume behind an NBD unix socket. Offsets and sizes are bytes, multiples of 512.

    Raises ConnectError when the server is not there or goes away, DiskFailed when it fails a request.
    """

    def __init__(self, socket_path: str, *, timeout_s: float = 60.0) -> None:
        self._path = socket_path
        self._cookie = 0
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(socket_path)
            negotiation = ClientNegotiation()
            while not negotiation.done:
                self._sock.sendall(negotiation.feed(self._sock.recv(4096) or self._gone()))
        except OSError as exc:
            self._sock.close()
            raise self._lost(exc) from exc
        except BaseException:
            self._sock.close()
            raise
        self.size_b = negotiation.size_b

    def read(self, offset_b: int, size_b: int) -> bytearray:
        """Return bytes of the volume."""
        out = bytearray(size_b)
        for at in range(0, size_b, LENGTH_MAX_B):
            n = min(LENGTH_MAX_B, size_b - at)
            self._ask(Command.READ, offset_b + at, n, into=memoryview(out)[at : at + n])
        return out

    def write(self, offset_b: int, data: Buf, *, fua: bool = False) -> None:
        """Write; with `fua`, durable on return."""
        view = memoryview(data)
        for at in range(0, len(view), LENGTH_MAX_B):
            part = view[at : at + LENGTH_MAX_B]
            self._ask(Command.WRITE, offset_b + at, len(part), part, flags=CommandFlag.FUA if fua else 0)

    def trim(self, offset_b: int, size_b: int) -> None:
        """Discard: the range reads as zeros."""
        self._ask(Command.TRIM, offset_b, size_b)

    def flush(self) -> None:
        """Make everything written so far durable."""
        self._ask(Command.FLUSH, 0, 0)

    def close(self) -> None:
        """Say goodbye and close; twice is harmless."""
        try:
            self._sock.sendall(request(Command.DISC, 0, 0, 0))
        except OSError:
            pass  # the server is gone already
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _ask(
        self,
        kind: Command,
        offset_b: int,
        length_b: int,
        data: Buf = b"",
        *,
        into: memoryview | None = None,
        flags: int = 0,
    ) -> None:
        self._cookie += 1
        try:
            self._sock.sendall(request(kind, self._cookie, offset_b, length_b, flags))
            self._sock.sendall(data)
            head = bytearray(SIMPLE_REPLY.size)
            self._fill(memoryview(head))
            magic, error, cookie = SIMPLE_REPLY.unpack(head)
            if magic != SIMPLE_REPLY_MAGIC or cookie != self._cookie:
                raise RemoteProtocolError("not an NBD reply", address=self._path)
            if error:
                raise DiskFailed("the NBD server failed a request", address=self._path, nbd_error=error)
            if into is not None:
                self._fill(into)
        except OSError as exc:
            raise self._lost(exc) from exc

    def _fill(self, view: memoryview) -> None:
        while view:
            n = self._sock.recv_into(view)
            if n == 0:
                self._gone()
            view = view[n:]

    def _gone(self) -> bytes:
        raise ConnectError("the NBD connection was closed", address=self._path)

    def _lost(self, exc: OSError) -> ConnectError:
        return ConnectError("cannot reach the NBD server", address=self._path, reason=exc.strerror or str(exc))
