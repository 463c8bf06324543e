"""The NBD protocol as a server speaks it: numbers, the negotiation, and the rarer replies. No IO.

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md (fixed newstyle negotiation,
structured replies, the `base:allocation` context). All integers are big-endian. The transmission phase's hot
loops are in `walbd.ext.nbd`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag
from typing import Final

from walbd.errors import RemoteProtocolError

MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
REPLY_MAGIC: Final = 0x0003E889045565A9
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
SIMPLE_REPLY_MAGIC: Final = 0x67446698
REQUEST_MAGIC: Final = 0x25609513

OPTION_DATA_MAX_B: Final = 64 << 10
NAME_MAX_B: Final = 4096
LENGTH_MAX_B: Final = 32 << 20  # of one read or write
BLOCK_MIN_B: Final = 512
BLOCK_PREFERRED_B: Final = 4096
CONTEXT_ALLOCATION: Final = "base:allocation"
CONTEXT_ALLOCATION_ID: Final = 1
STATE_HOLE: Final = 1  # base:allocation: not allocated
STATE_ZERO: Final = 2  # base:allocation: reads as zeros

REQUEST: Final = struct.Struct(">IHHQQI")  # magic, flags, type, cookie, offset [byte], length [byte]
SIMPLE_REPLY: Final = struct.Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = struct.Struct(">IHHQI")  # magic, flags, type, cookie, length [byte]
_OPTION: Final = struct.Struct(">8sII")  # magic, option, length [byte]
_OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, type, length [byte]
_EXPORT: Final = struct.Struct(">QH")  # size [byte], flags
_ZEROES_B: Final = 124  # after an EXPORT_NAME answer, unless NO_ZEROES was agreed
REQUEST_TABLE: Final = struct.Struct("<QQQIIHHI")  # walb_request of ext/src/device.h
RANGE_TABLE: Final = struct.Struct("<QQQQ")  # walb_range of ext/src/device.h


class Command(IntEnum):
    """Request types of the transmission phase."""

    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    CACHE = 5
    WRITE_ZEROES = 6
    BLOCK_STATUS = 7


class CommandFlag(IntFlag):
    """Flags of requests."""

    FUA = 1
    NO_HOLE = 2
    DF = 4
    REQ_ONE = 8
    FAST_ZERO = 16


class Error(IntEnum):
    """Error numbers on the wire."""

    PERM = 1
    IO = 5
    NOMEM = 12
    INVAL = 22
    NOSPC = 28
    OVERFLOW = 75
    NOTSUP = 95
    SHUTDOWN = 108


class ChunkType(IntEnum):
    """Types of structured reply chunks."""

    NONE = 0
    OFFSET_DATA = 1
    OFFSET_HOLE = 2
    BLOCK_STATUS = 5
    ERROR = 0x8001
    ERROR_OFFSET = 0x8002


CHUNK_DONE: Final = 1  # flag of the last chunk of a reply


class ExportFlag(IntFlag):
    """What an export can do."""

    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    ROTATIONAL = 16
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_CACHE = 1024
    SEND_FAST_ZERO = 2048


class _Opt(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    STARTTLS = 5
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8
    LIST_META_CONTEXT = 9
    SET_META_CONTEXT = 10


class _Rep(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    META_CONTEXT = 4
    ERR_UNSUP = 0x80000001
    ERR_POLICY = 0x80000002
    ERR_INVALID = 0x80000003
    ERR_TLS_REQD = 0x80000005
    ERR_UNKNOWN = 0x80000006


class _Info(IntEnum):
    EXPORT = 0
    NAME = 1
    DESCRIPTION = 2
    BLOCK_SIZE = 3


class TlsPolicy(Enum):
    """What to say to STARTTLS."""

    OFF = "off"  # refused by policy
    REQUIRED = "required"  # nothing else is answered before it


@dataclass(frozen=True, slots=True)
class Export:
    """One volume as clients see it."""

    name: str
    size_b: int
    flags: ExportFlag
    description: str = ""
    block_min_b: int = BLOCK_MIN_B
    block_preferred_b: int = BLOCK_PREFERRED_B
    block_max_b: int = LENGTH_MAX_B


@dataclass(frozen=True, slots=True)
class Transmission:
    """What was agreed: the negotiation is over."""

    export: Export
    structured: bool
    allocation: bool  # the base:allocation context was chosen


class Ended(Enum):
    """How a negotiation ended without transmission."""

    ABORTED = "aborted"  # the client said so: close
    START_TLS = "start-tls"  # the answer was sent: wrap the connection, then `restart`


@dataclass
class Negotiation:
    """The server's side of the negotiation, for one connection.

    `find` maps a name to an export, None when there is none; `names` are listed. Send `greeting()` first,
    then `feed` what arrives and send what it returns, until `outcome` is set; what was received behind the
    end of the negotiation is in `rest`.
    """

    find: Callable[[str], Export | None]
    names: Callable[[], Sequence[str]]
    tls: TlsPolicy = TlsPolicy.OFF
    outcome: Transmission | Ended | None = None
    _buf: bytearray = field(default_factory=bytearray)
    _flags_seen: bool = False
    _no_zeroes: bool = False
    _structured: bool = False
    _context_export: str | None = None  # for which base:allocation was chosen
    _secure: bool = False

    def greeting(self) -> bytes:
        """Return the first bytes of the connection: fixed newstyle, and zeroes may be left out."""
        return MAGIC + OPTION_MAGIC + struct.pack(">H", 0b11)

    @property
    def rest(self) -> bytes:
        """What was received and not consumed."""
        return bytes(self._buf)

    def restart(self) -> None:
        """The connection is encrypted now: forget what was agreed before, go on with options."""
        if self._buf:
            raise RemoteProtocolError("NBD client sent plain bytes after STARTTLS")
        self._secure = True
        self._structured = False
        self._context_export = None
        self.outcome = None

    def feed(self, data: bytes | memoryview) -> bytes:
        """Take bytes from the client; return the answer. Raises RemoteProtocolError: close the connection."""
        self._buf += data
        out = bytearray()
        if not self._flags_seen:
            if len(self._buf) < 4:
                return b""
            flags = int.from_bytes(self._buf[:4], "big")
            del self._buf[:4]
            if flags & ~0b11 or not flags & 1:
                raise RemoteProtocolError("NBD client does not speak fixed newstyle", flags=flags)
            self._no_zeroes = bool(flags & 2)
            self._flags_seen = True
        while self.outcome is None and len(self._buf) >= _OPTION.size:
            magic, option, size = _OPTION.unpack_from(self._buf)
            if magic != OPTION_MAGIC:
                raise RemoteProtocolError("not an NBD option", magic=magic.hex())
            if size > OPTION_DATA_MAX_B:
                raise RemoteProtocolError("NBD option is too large", option=option, size_b=size)
            if len(self._buf) < _OPTION.size + size:
                break
            data = bytes(self._buf[_OPTION.size : _OPTION.size + size])
            del self._buf[: _OPTION.size + size]
            out += self._answer(option, data)
        return bytes(out)

    def _answer(self, option: int, data: bytes) -> bytes:
        if self.tls is TlsPolicy.REQUIRED and not self._secure and option not in (_Opt.ABORT, _Opt.STARTTLS):
            if option == _Opt.EXPORT_NAME:
                raise RemoteProtocolError("NBD client did not ask for TLS")
            return _reply(option, _Rep.ERR_TLS_REQD, b"TLS is required here")
        match option:
            case _Opt.EXPORT_NAME:
                return self._export_name(data)
            case _Opt.ABORT:
                self.outcome = Ended.ABORTED
                return _reply(option, _Rep.ACK)
            case _Opt.LIST:
                return self._list(data)
            case _Opt.STARTTLS:
                return self._start_tls(data)
            case _Opt.INFO | _Opt.GO:
                return self._go(option, data)
            case _Opt.STRUCTURED_REPLY:
                if data:
                    return _reply(option, _Rep.ERR_INVALID, b"no data expected")
                self._structured = True
                return _reply(option, _Rep.ACK)
            case _Opt.LIST_META_CONTEXT | _Opt.SET_META_CONTEXT:
                return self._contexts(option, data)
        return _reply(option, _Rep.ERR_UNSUP)

    def _export_name(self, data: bytes) -> bytes:
        export = self.find(_text(data))
        if export is None:
            # This option has no error reply; the protocol says to close the connection.
            raise RemoteProtocolError("NBD client asked for an unknown export", name=_text(data)[:64])
        self.outcome = Transmission(export, self._structured, self._context_export == _text(data))
        return _EXPORT.pack(export.size_b, export.flags) + (b"" if self._no_zeroes else bytes(_ZEROES_B))

    def _list(self, data: bytes) -> bytes:
        if data:
            return _reply(_Opt.LIST, _Rep.ERR_INVALID, b"no data expected")
        out = bytearray()
        for name in self.names():
            raw = name.encode()
            out += _reply(_Opt.LIST, _Rep.SERVER, struct.pack(">I", len(raw)) + raw)
        return bytes(out) + _reply(_Opt.LIST, _Rep.ACK)

    def _start_tls(self, data: bytes) -> bytes:
        if self.tls is TlsPolicy.OFF:
            return _reply(_Opt.STARTTLS, _Rep.ERR_POLICY, b"TLS is not configured")
        if data or self._secure:
            return _reply(_Opt.STARTTLS, _Rep.ERR_INVALID)
        self.outcome = Ended.START_TLS
        return _reply(_Opt.STARTTLS, _Rep.ACK)

    def _go(self, option: int, data: bytes) -> bytes:
        cursor = _Cursor(data)
        try:
            name = _text(cursor.take(cursor.u32()))
            wanted = [cursor.u16() for _ in range(cursor.u16())]
            cursor.end()
        except ValueError:
            return _reply(option, _Rep.ERR_INVALID, b"malformed")
        export = self.find(name)
        if export is None:
            return _reply(option, _Rep.ERR_UNKNOWN, b"no such export")
        out = _reply(
            option, _Rep.INFO, struct.pack(">H", _Info.EXPORT) + _EXPORT.pack(export.size_b, export.flags)
        )
        if _Info.NAME in wanted:
            out += _reply(option, _Rep.INFO, struct.pack(">H", _Info.NAME) + export.name.encode())
        if _Info.DESCRIPTION in wanted and export.description:
            out += _reply(option, _Rep.INFO, struct.pack(">H", _Info.DESCRIPTION) + export.description.encode())
        sizes = (export.block_min_b, export.block_preferred_b, export.block_max_b)
        out += _reply(option, _Rep.INFO, struct.pack(">HIII", _Info.BLOCK_SIZE, *sizes))
        if option == _Opt.GO:
            self.outcome = Transmission(export, self._structured, self._context_export == name)
        return out + _reply(option, _Rep.ACK)

    def _contexts(self, option: int, data: bytes) -> bytes:
        cursor = _Cursor(data)
        try:
            name = _text(cursor.take(cursor.u32()))
            queries = [_text(cursor.take(cursor.u32())) for _ in range(cursor.u32())]
            cursor.end()
        except ValueError:
            return _reply(option, _Rep.ERR_INVALID, b"malformed")
        if not self._structured:
            return _reply(option, _Rep.ERR_INVALID, b"structured replies come first")
        if self.find(name) is None:
            return _reply(option, _Rep.ERR_UNKNOWN, b"no such export")
        listing = option == _Opt.LIST_META_CONTEXT
        chosen = CONTEXT_ALLOCATION in queries or (listing and (not queries or "base:" in queries))
        if not listing:
            self._context_export = name if chosen else None
        out = b""
        if chosen:
            ident = 0 if listing else CONTEXT_ALLOCATION_ID
            out = _reply(option, _Rep.META_CONTEXT, struct.pack(">I", ident) + CONTEXT_ALLOCATION.encode())
        return out + _reply(option, _Rep.ACK)


class _Cursor:
    """Reads fields off option data; ValueError at any overrun."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._pos = 0

    def take(self, n: int) -> bytes:
        if n > len(self._data) - self._pos:
            raise ValueError("truncated")
        self._pos += n
        return self._data[self._pos - n : self._pos]

    def u32(self) -> int:
        return int.from_bytes(self.take(4), "big")

    def u16(self) -> int:
        return int.from_bytes(self.take(2), "big")

    def end(self) -> None:
        if self._pos != len(self._data):
            raise ValueError("trailing bytes")


def _text(data: bytes) -> str:
    """Names are UTF-8; bytes that are not simply name no export."""
    return data[:NAME_MAX_B].decode(errors="replace")


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return _OPTION_REPLY.pack(REPLY_MAGIC, option, kind, len(data)) + data


def error_reply(cookie: int, error: int, *, structured: bool) -> bytes:
    """Return a reply that fails a request; `structured` for READ and BLOCK_STATUS when those were agreed on.

    `cookie` is the little-endian number of the tables, that is, the wire's bytes as they came.
    """
    raw = cookie.to_bytes(8, "little")
    if not structured:
        return struct.pack(">II", SIMPLE_REPLY_MAGIC, error) + raw
    head = struct.pack(">IHH", STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.ERROR)
    return head + raw + struct.pack(">IIH", 6, error, 0)


def block_status_reply(cookie: int, extents: Sequence[tuple[int, int]]) -> bytes:
    """Return the answer to BLOCK_STATUS: (length [byte], state) of extents from the asked offset on."""
    raw = cookie.to_bytes(8, "little")
    body = struct.pack(">I", CONTEXT_ALLOCATION_ID) + b"".join(struct.pack(">II", *extent) for extent in extents)
    head = struct.pack(">IHH", STRUCTURED_REPLY_MAGIC, CHUNK_DONE, ChunkType.BLOCK_STATUS)
    return head + raw + struct.pack(">I", len(body)) + body
