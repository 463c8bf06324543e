"""A plain NBD client for tests, written from the protocol's text and sharing nothing with the product.

Fixed newstyle handshake, simple replies, one request at a time.
"""

from __future__ import annotations

import socket
import struct
from types import TracebackType
from typing import Self

_OPT_GO = 7
_REP_ACK, _REP_INFO = 1, 3
_READ, _WRITE, _DISC, _FLUSH, _TRIM, _WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA, NO_HOLE = 1, 2


class NbdError(Exception):
    """The server answered a request with an error; `args[0]` is its number."""


class NbdClient:
    """A connection to one export; offsets and sizes are bytes."""

    def __init__(self, address: str | tuple[str, int], export: str = "", *, timeout_s: float = 120.0) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._sock = socket.socket(family, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        self._cookie = 0
        try:
            self._sock.connect(address)
            if family == socket.AF_INET:
                self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.size_b, self.flags = self._handshake(export)
        except BaseException:
            self._sock.close()
            raise

    def read(self, offset_b: int, size_b: int) -> bytes:
        return self._request(_READ, offset_b, size_b)

    def write(self, offset_b: int, data: bytes, *, fua: bool = False) -> None:
        self._request(_WRITE, offset_b, len(data), data, FUA if fua else 0)

    def flush(self) -> None:
        self._request(_FLUSH, 0, 0)

    def trim(self, offset_b: int, size_b: int) -> None:
        self._request(_TRIM, offset_b, size_b)

    def write_zeroes(self, offset_b: int, size_b: int, *, no_hole: bool = False) -> None:
        self._request(_WRITE_ZEROES, offset_b, size_b, b"", NO_HOLE if no_hole else 0)

    def close(self) -> None:
        try:
            self._sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, _DISC, 0, 0, 0))
        except OSError:
            pass
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _handshake(self, export: str) -> tuple[int, int]:
        magic, option_magic, _flags = struct.unpack(">8s8sH", self._take(18))
        assert (magic, option_magic) == (b"NBDMAGIC", b"IHAVEOPT")
        name = export.encode()
        data = struct.pack(">I", len(name)) + name + struct.pack(">H", 0)
        self._sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", _OPT_GO, len(data)) + data)
        size = flags = -1
        while True:
            reply_magic, option, kind, length = struct.unpack(">QIII", self._take(20))
            payload = self._take(length)
            assert (reply_magic, option) == (0x3E889045565A9, _OPT_GO)
            if kind == _REP_INFO and struct.unpack_from(">H", payload)[0] == 0:
                size, flags = struct.unpack_from(">QH", payload, 2)
            elif kind == _REP_ACK:
                return size, flags
            elif kind & 0x80000000:
                raise NbdError(kind, payload)

    def _request(self, kind: int, offset_b: int, size_b: int, data: bytes = b"", flags: int = 0) -> bytes:
        self._cookie += 1
        head = struct.pack(">IHHQQI", 0x25609513, flags, kind, self._cookie, offset_b, size_b)
        self._sock.sendall(head + data)
        magic, error, cookie = struct.unpack(">IIQ", self._take(16))
        assert (magic, cookie) == (0x67446698, self._cookie)
        if error:
            raise NbdError(error)
        return self._take(size_b) if kind == _READ else b""

    def _take(self, n: int) -> bytes:
        parts = bytearray()
        while len(parts) < n:
            part = self._sock.recv(n - len(parts))
            if not part:
                raise ConnectionError("the server closed the connection")
            parts += part
        return bytes(parts)
