"""Applying log records as the specification reads: the twin of walbd.ext.logapply, and a whole redo of a log."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.logpack import DISCARD, PADDING, Found


def first_outside(found: Sequence[Found], limit_lb: int) -> int:
    for i, r in enumerate(found):
        if not r.flags & PADDING and r.offset_lb + r.io_size_lb > limit_lb:
            return i
    return -1


def first_odd_padding(found: Sequence[Found], pbs: int, ring_size_pb: int) -> int:
    for i, r in enumerate(found):
        if r.flags & PADDING and r.io_size_lb and (r.lsid + r.io_size_lb * 512 // pbs) % ring_size_pb:
            return i
    return -1


def write_records(image: bytearray, data: bytes, found: Sequence[Found], first: int) -> int:
    """Write up to the next discard; return its index, or the number of records."""
    for i in range(first, len(found)):
        r = found[i]
        if r.flags & DISCARD:
            return i
        if not r.flags & PADDING:
            image[r.offset_lb * 512 : (r.offset_lb + r.io_size_lb) * 512] = data[
                r.data_b : r.data_b + r.io_size_lb * 512
            ]
    return len(found)


def apply(image: bytearray, data: bytes, found: Sequence[Found], zero_discards: bool = True) -> None:
    """Bring `image` to the state after these records, in log order."""
    i = write_records(image, data, found, 0)
    while i < len(found):
        r = found[i]
        if zero_discards:
            image[r.offset_lb * 512 : (r.offset_lb + r.io_size_lb) * 512] = bytes(r.io_size_lb * 512)
        i = write_records(image, data, found, i + 1)
