"""Extents, block by block, as the specification reads. Twin of walbd.ext.extent."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from walbd.format.extents import EXTENT, FLAG_ALLZERO, FLAG_DISCARD, IO_MAX_LB, Extent
from walbd.format.logpack import LOG_RECORD

ADDRESS_MAX_LB = 1 << 54


def pack(extents: Iterable[Extent]) -> bytes:
    return b"".join(EXTENT.pack(*extent) for extent in extents)


def visible(arrived: Sequence[Extent]) -> list[Extent]:
    """What is seen of extents laid one upon the other: each cut where later ones lie on top."""
    owner: dict[int, int] = {}
    for number, extent in enumerate(arrived):
        for block in range(extent.address_lb, extent.address_lb + extent.blocks_lb):
            owner[block] = number
    pieces: list[Extent] = []
    last: tuple[int, int] | None = None  # block and owner
    for block in sorted(owner):
        number = owner[block]
        if last == (block - 1, number):
            pieces[-1] = pieces[-1]._replace(blocks_lb=pieces[-1].blocks_lb + 1)
        else:
            pieces.append(piece(arrived[number], block, 1))
        last = block, number
    return pieces


def piece(extent: Extent, address_lb: int, blocks_lb: int) -> Extent:
    """A part of an extent."""
    offset_lb = 0 if extent.flags else extent.offset_lb + address_lb - extent.address_lb
    return extent._replace(address_lb=address_lb, blocks_lb=blocks_lb, offset_lb=offset_lb)


def same_image(a: Extent, b: Extent) -> bool:
    return not a.flags and not b.flags and image_of(a) == image_of(b)


def image_of(e: Extent) -> tuple[int, ...]:
    return e.source, e.data_b, e.data_size_b, e.orig_lb, e.checksum, e.kind


def joined(extents: Iterable[Extent]) -> list[Extent]:
    """Sorted extents, with what continues its predecessor put together with it."""
    result: list[Extent] = []
    for extent in extents:
        if result:
            last = result[-1]
            adjacent = last.flags == extent.flags and last.address_lb + last.blocks_lb == extent.address_lb
            if adjacent and (
                last.flags or (same_image(last, extent) and last.offset_lb + last.blocks_lb == extent.offset_lb)
            ):
                result[-1] = last._replace(blocks_lb=last.blocks_lb + extent.blocks_lb)
                continue
        result.append(extent)
    return result


def clip(extents: Iterable[Extent], begin_lb: int, end_lb: int) -> list[Extent]:
    result = []
    for extent in extents:
        begin, end = max(extent.address_lb, begin_lb), min(extent.address_lb + extent.blocks_lb, end_lb)
        if begin < end:
            result.append(piece(extent, begin, end - begin))
    return result


def cut_batch(extents: Sequence[Extent], first: int, n_max: int, lb_max: int) -> int:
    total = 0
    for i in range(first, len(extents)):
        extent = extents[i]
        if not extent.flags and not (i > first and same_image(extents[i - 1], extent)):
            total += extent.orig_lb
        if i - first >= n_max or (i > first and total > lb_max):
            return i
    return len(extents)


def checksum(data: bytes) -> int:
    total = sum(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))
    return -total & 0xFFFFFFFF


def from_log(records: bytes, buf: bytes, at_b: int, source: int, max_lb: int) -> tuple[list[Extent], int]:
    result: list[Extent] = []
    for number, record in enumerate(LOG_RECORD.iter_unpack(records)):
        _, offset_lb, data_b, size_lb, flags, _, _ = record
        if flags & 2:
            continue
        if offset_lb >= ADDRESS_MAX_LB or offset_lb + size_lb > ADDRESS_MAX_LB:
            return [], number
        data = b""
        if not flags & 4:
            data = buf[data_b : data_b + size_lb * 512]
            if size_lb > IO_MAX_LB or data_b > len(buf) or len(data) != size_lb * 512:
                return [], number
        if flags & 4:
            whole = Extent(offset_lb, 0, size_lb, 0, 0, 0, 0, 0, FLAG_DISCARD, 0)
        elif not any(data):
            whole = Extent(offset_lb, 0, size_lb, 0, 0, 0, 0, 0, FLAG_ALLZERO, 0)
        else:
            whole = Extent(offset_lb, at_b + data_b, size_lb, 0, size_lb, len(data), checksum(data), source, 0, 0)
        step = max_lb or max(size_lb, 1)
        for at in range(0, size_lb, step):
            result.append(piece(whole, offset_lb + at, min(step, size_lb - at)))
    return result, -1


def aligned_pieces(address_lb: int, blocks_lb: int, limit_lb: int) -> list[tuple[int, int]]:
    """A range cut into aligned powers of two of at most `limit_lb`, each as large as it can be."""
    result = []
    while blocks_lb:
        step = 1
        while step * 2 <= min(blocks_lb, limit_lb) and address_lb % (step * 2) == 0:
            step *= 2
        result.append((address_lb, step))
        address_lb += step
        blocks_lb -= step
    return result
