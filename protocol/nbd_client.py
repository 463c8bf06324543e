"""The client's half of the NBD negotiation, as far as walbd's own clients need it. No IO.

Source: as `walbd.protocol.nbd`. NBD_OPT_GO without TLS, structured replies or contexts: every server has that.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Final

from walbd.errors import NotFound, RemoteProtocolError
from walbd.protocol.nbd import MAGIC, OPTION_MAGIC, REPLY_MAGIC, REQUEST, REQUEST_MAGIC

_OPT_GO: Final = 7
_REP_ACK: Final = 1
_REP_INFO: Final = 3
_INFO_EXPORT: Final = 0
_ERROR_BIT: Final = 1 << 31
_REPLY: Final = struct.Struct(">QIII")
_GREETING_B: Final = 18


@dataclass
class ClientNegotiation:
    """Choose an export. `feed` what arrives and send what it returns, until `done`; then requests may go out."""

    name: str = ""
    done: bool = False
    size_b: int = 0
    flags: int = 0  # ExportFlag
    _buf: bytearray = field(default_factory=bytearray)
    _greeted: bool = False

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take bytes from the server; return the answer. Raises RemoteProtocolError, NotFound."""
        self._buf += data
        out = b""
        if not self._greeted:
            if len(self._buf) < _GREETING_B:
                return b""
            if self._buf[:16] != MAGIC + OPTION_MAGIC or not self._buf[17] & 1:
                raise RemoteProtocolError("not an NBD server of the fixed newstyle")
            no_zeroes = self._buf[17] & 2
            del self._buf[:_GREETING_B]
            self._greeted = True
            raw = self.name.encode()
            body = struct.pack(">I", len(raw)) + raw + struct.pack(">H", 0)
            out = struct.pack(">I", 1 | no_zeroes) + OPTION_MAGIC + struct.pack(">II", _OPT_GO, len(body)) + body
        while not self.done and len(self._buf) >= _REPLY.size:
            magic, option, kind, size = _REPLY.unpack_from(self._buf)
            if magic != REPLY_MAGIC or option != _OPT_GO or size > 1 << 16:
                raise RemoteProtocolError("not an answer to an NBD option", option=option, size_b=size)
            if len(self._buf) < _REPLY.size + size:
                break
            body = bytes(self._buf[_REPLY.size : _REPLY.size + size])
            del self._buf[: _REPLY.size + size]
            self._answer(kind, body)
        if self.done and self._buf:
            raise RemoteProtocolError("NBD server sent more than was asked for")
        return out

    def _answer(self, kind: int, body: bytes) -> None:
        if kind & _ERROR_BIT:
            reason = body.decode(errors="replace")[:200]
            raise NotFound("the NBD server refuses the export", export=self.name, reason=reason)
        if kind == _REP_INFO and len(body) == 12 and struct.unpack_from(">H", body)[0] == _INFO_EXPORT:
            self.size_b, self.flags = struct.unpack_from(">QH", body, 2)
        elif kind == _REP_ACK:
            if not self.flags:
                raise RemoteProtocolError("NBD server did not tell about the export")
            self.done = True
        elif kind != _REP_INFO:
            raise RemoteProtocolError("unexpected NBD answer", kind=kind)


def request(kind: int, cookie: int, offset_b: int, length_b: int, flags: int = 0) -> bytes:
    """Return the header of a request."""
    return REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset_b, length_b)
