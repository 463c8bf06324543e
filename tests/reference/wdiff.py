"""The layouts of wdiffs and the plans for batches, record by record. Twin of walbd.ext.wdiff."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

from tests.reference.extent import ADDRESS_MAX_LB, aligned_pieces, checksum, image_of
from walbd.format.extents import IO_MAX_LB, Extent
from walbd.format.wdiff import INDEX_RECORD, REASONS, RECORD

NOWHERE = (1 << 64) - 1
NO_IMAGE = (1 << 32) - 1

T = TypeVar("T")


def reason(part_of_text: str) -> int:
    """The number of the one reason whose text contains this."""
    (number,) = (i for i, text in enumerate(REASONS) if part_of_text in text)
    return number


def _check_range(address_lb: int, blocks_lb: int, flags: int, end_lb: int) -> str:
    if flags & ~7 or flags & 6 == 6:
        return "impossible flags"
    if blocks_lb == 0:
        return "no blocks"
    if address_lb >= ADDRESS_MAX_LB or address_lb + blocks_lb > ADDRESS_MAX_LB:
        return "no volume has"
    return "overlaps its predecessor" if address_lb < end_lb else ""


def _check_image(orig_lb: int, kind: int, size_b: int) -> str:
    if orig_lb > IO_MAX_LB:
        return "larger than any IO"
    if kind > 5:
        return "unknown compression"
    if not 0 < size_b <= orig_lb * 512 or (kind == 0 and size_b != orig_lb * 512):
        return "impossible data size"
    return ""


class Refused(Exception):
    """A header or record is refused."""

    def __init__(self, text: str, record: int = -1) -> None:
        super().__init__(text)
        self.code = reason(text)
        self.record = record


def attempt(call: Callable[[], T]) -> T | Refused:
    """Return what a call returns, or the refusal that it raises."""
    try:
        return call()
    except Refused as refused:
        return refused


def parse_pack(header: bytes, data_b: int, source: int, end_lb: int) -> tuple[bool, int, int, list[Extent]]:
    """Return (is end pack, size of the data area, where the records end, extents), or raise Refused."""
    _, n, flags, total_b = struct.unpack_from("<IHBxI", header)
    if checksum(header) != 0:
        raise Refused("checksum of a {part}")
    if n > 127:
        raise Refused("more than 127")
    if flags & 1:
        if n or total_b:
            raise Refused("end pack is not empty")
        return True, total_b, end_lb, []
    if n == 0:
        raise Refused("is no end")
    at, extents = 0, []
    for i in range(n):
        address_lb, blocks_lb, flags, kind, _, offset_b, size_b, csum, _ = RECORD.unpack_from(header, 16 + 32 * i)
        if bad := _check_range(address_lb, blocks_lb, flags, end_lb):
            raise Refused(bad, i)
        end_lb = address_lb + blocks_lb
        if offset_b != at:
            raise Refused("not where it must be", i)
        if flags & 6:
            if size_b:
                raise Refused("impossible data size", i)
            extents.append(Extent(address_lb, 0, blocks_lb, 0, 0, 0, 0, 0, flags & 6, 0))
            continue
        if bad := _check_image(blocks_lb, kind, size_b):
            raise Refused(bad, i)
        extents.append(Extent(address_lb, data_b + at, blocks_lb, 0, blocks_lb, size_b, csum, source, 0, kind))
        at += size_b
    if at != total_b:
        raise Refused("do not add up")
    return False, total_b, end_lb, extents


def parse_index(records: bytes, index_b: int, source: int, end_lb: int) -> tuple[int, list[Extent]]:
    """Return (where the records end, extents), or raise Refused."""
    extents = []
    for i in range(len(records) // 48):
        record = records[48 * i : 48 * i + 48]
        address_lb, blocks_lb, flags, kind, _, data_b, size_b, offset_lb, orig_lb, _, csum, _ = (
            INDEX_RECORD.unpack(record)
        )
        if checksum(record) != 0:
            raise Refused("checksum of a {part}", i)
        if bad := _check_range(address_lb, blocks_lb, flags, end_lb):
            raise Refused(bad, i)
        end_lb = address_lb + blocks_lb
        if bin(blocks_lb).count("1") != 1 or address_lb % blocks_lb:
            raise Refused("aligned power of two", i)
        if flags & 6:
            if size_b or orig_lb:
                raise Refused("impossible data size", i)
            extents.append(Extent(address_lb, 0, blocks_lb, 0, 0, 0, 0, 0, flags & 6, 0))
            continue
        if bad := _check_image(orig_lb, kind, size_b):
            raise Refused(bad, i)
        if offset_lb + blocks_lb > orig_lb:
            raise Refused("outside its image", i)
        if not 32 <= data_b <= index_b - size_b:
            raise Refused("not where it must be", i)
        extents.append(Extent(address_lb, data_b, blocks_lb, offset_lb, orig_lb, size_b, csum, source, 0, kind))
    return end_lb, extents


def build_index(extents: Sequence[Extent], limit_lb: int) -> bytes:
    result = []
    for e in extents:
        for address_lb, blocks_lb in aligned_pieces(e.address_lb, e.blocks_lb, limit_lb):
            fields = [address_lb, blocks_lb, e.flags, 0, 0, 0, 0, 0, 0, 0, 0, 0]
            if not e.flags:
                fields[3], fields[5], fields[6] = e.kind, e.data_b, e.data_size_b
                fields[7], fields[8] = e.offset_lb + address_lb - e.address_lb, e.orig_lb
                fields[10] = e.checksum
            fields[11] = checksum(INDEX_RECORD.pack(*fields))
            result.append(INDEX_RECORD.pack(*fields))
    return b"".join(result)


def images(extents: Sequence[Extent]) -> tuple[list[tuple[int, ...]], list[int]]:
    """The distinct images, ordered by source and place, and which of them each extent has."""
    found: list[tuple[int, ...]] = []
    refs = [NO_IMAGE] * len(extents)
    with_data = [i for i, e in enumerate(extents) if not e.flags]
    for i in sorted(with_data, key=lambda i: (extents[i].source, extents[i].data_b, i)):
        if not found or found[-1] != image_of(extents[i]):
            found.append(image_of(extents[i]))
        refs[i] = len(found) - 1
    return found, refs


def reads(
    found: Sequence[tuple[int, ...]], gap_b: int
) -> tuple[list[tuple[int, list[tuple[int, int, int]]]], int]:
    """What to read for the images: by source, (offset, size, place), and the size of it all."""
    result: list[tuple[int, list[tuple[int, int, int]]]] = []
    at = 0
    for source, data_b, size_b, *_ in found:
        if not result or result[-1][0] != source:
            result.append((source, []))
        pieces = result[-1][1]
        if pieces and data_b <= pieces[-1][0] + pieces[-1][1] + gap_b:
            offset, size, place = pieces[-1]
            grown = max(data_b + size_b - offset, size)
            at += grown - size
            pieces[-1] = offset, grown, place
        else:
            pieces.append((data_b, size_b, at))
            at += size_b
    return result, at


class Stored(NamedTuple):
    """A record as it is put into a pack."""

    extent: Extent
    kind: int
    data: bytes


def build_pack(records: Sequence[Stored]) -> bytes:
    header, data, at = bytearray(4096), b"", 0
    for i, (e, kind, stored) in enumerate(records):
        size_b, csum = (0, 0) if e.flags else (len(stored), checksum(stored))
        RECORD.pack_into(
            header, 16 + 32 * i, e.address_lb, e.blocks_lb, e.flags, 0 if e.flags else kind, 0, at, size_b, csum, 0
        )
        if not e.flags:
            data += stored
            at += size_b
    struct.pack_into("<IHBxI", header, 0, 0, len(records), 0, at)
    struct.pack_into("<I", header, 0, checksum(bytes(header)))
    return bytes(header) + data


def runs(
    extents: Sequence[Extent], ignore_discard: bool, zero_min_lb: int
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """The byte ranges of an image to write as data and to zero, block by block: what must come out in the end."""
    zeros: list[list[int]] = []
    data: list[list[int]] = []
    for e in extents:
        if e.flags & 4 and ignore_discard:
            continue
        into = zeros if e.flags else data
        if into and into[-1][1] == e.address_lb:
            into[-1][1] += e.blocks_lb
        else:
            into.append([e.address_lb, e.address_lb + e.blocks_lb])
    data += [z for z in zeros if z[1] - z[0] < zero_min_lb]
    zeros = [z for z in zeros if z[1] - z[0] >= zero_min_lb]
    merged: list[list[int]] = []
    for begin, end in sorted(data):
        if merged and merged[-1][1] == begin:
            merged[-1][1] = end
        else:
            merged.append([begin, end])
    return [(b * 512, (e - b) * 512) for b, e in merged], [(b * 512, (e - b) * 512) for b, e in zeros]
