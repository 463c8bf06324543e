"""The transmission phase of NBD, one request at a time, as doc/proto.md of the NBD project tells it."""

from __future__ import annotations

import struct
from dataclasses import dataclass

REQUEST = struct.Struct(">IHHQQI")
READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO = 1, 2, 4, 8, 16
EPERM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP = 1, 22, 28, 75, 95
MAGIC = 0x25609513
COST_B = 1024  # of any request, besides its data


class Broken(Exception):
    """The stream cannot be followed."""


@dataclass
class Request:
    """One request; `at` is the place of its payload."""

    cookie: int
    kind: int
    flags: int
    offset_b: int
    length_b: int
    at: int
    error: int


def error_of(kind: int, flags: int, offset: int, length: int, *, size_b: int, max_b: int, read_only: bool) -> int:
    """Return why a request is refused, or 0."""
    inside = offset + length <= size_b
    if kind in (WRITE, TRIM, WRITE_ZEROES):
        allowed = FUA | (NO_HOLE | FAST_ZERO if kind == WRITE_ZEROES else 0)
        if read_only:
            return EPERM
        if flags & ~allowed or length == 0 or offset % 512 or length % 512:
            return EINVAL
        if not inside:
            return ENOSPC
        return ENOTSUP if flags & FAST_ZERO and flags & NO_HOLE else 0
    if kind == READ:
        if flags & ~(FUA | DF) or length == 0 or not inside:
            return EINVAL
        return EOVERFLOW if length > max_b else 0
    if kind == BLOCK_STATUS:
        return EINVAL if flags & ~(FUA | REQ_ONE) or length == 0 or not inside else 0
    if kind == FLUSH:
        return EINVAL if flags & ~FUA else 0
    return 0 if kind == DISC else EINVAL


def parse(
    data: bytes, begin: int, end: int, *, size_b: int, max_b: int, read_only: bool, room_b: int
) -> tuple[int, int, list[Request]]:
    """Return (consumed, size of the request that is incomplete, complete requests that together cost `room_b`)."""
    found: list[Request] = []
    cost_b = 0
    pos = begin
    need = REQUEST.size
    while end - pos >= REQUEST.size and (not found or cost_b < room_b):
        magic, flags, kind, cookie, offset, length = REQUEST.unpack_from(data, pos)
        if magic != MAGIC:
            raise Broken("magic")
        need = REQUEST.size
        if kind == WRITE:
            if length > max_b:
                raise Broken("size")
            need += length
            if end - pos < need:
                break
        error = error_of(kind, flags, offset, length, size_b=size_b, max_b=max_b, read_only=read_only)
        raw = int.from_bytes(cookie.to_bytes(8, "big"), "little")
        at = pos + REQUEST.size if kind == WRITE else 0
        cost_b += COST_B + (length if kind == WRITE or (kind == READ and not error) else 0)
        found.append(Request(raw, kind, flags, offset, length, at, error))
        pos += need
        need = REQUEST.size
    return pos, need, found
