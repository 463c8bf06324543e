"""The overlay as a dictionary: block number to (pack lsid, its 512 bytes)."""

from __future__ import annotations

import struct

from walbd.units import LB

RECORD = struct.Struct("<QQQIIII")  # lsid, offset_lb, data_b, io_size_lb, flags, checksum, lsid_local
RANGE = struct.Struct("<QQQQ")
PADDING, DISCARD, ZEROS = 2, 4, 256


class Overlay:
    """The last record wins, block by block."""

    def __init__(self) -> None:
        self.blocks: dict[int, tuple[int, bytes | None]] = {}

    def insert(self, records: bytes, data: bytes) -> None:
        for lsid, offset_lb, data_b, size_lb, flags, _, local in RECORD.iter_unpack(records):
            if flags & PADDING:
                continue
            for i in range(size_lb):
                block: bytes | None = data[data_b + i * LB : data_b + (i + 1) * LB]
                if flags & ZEROS:
                    block = bytes(LB)
                if flags & DISCARD:
                    block = None
                self.blocks[offset_lb + i] = (lsid - local, block)

    def retire(self, lsid_end: int) -> None:
        self.blocks = {at: found for at, found in self.blocks.items() if found[0] >= lsid_end}

    def fill(self, ranges: bytes, out: bytearray) -> set[int]:
        """Copy what is there, block by block; return the places in `out` that are not."""
        missing: set[int] = set()
        for offset_b, size_b, out_b, _ in RANGE.iter_unpack(ranges):
            pos, end = offset_b, offset_b + size_b
            while pos < end:
                block, at = divmod(pos, LB)
                n = min(LB - at, end - pos)
                place = out_b + pos - offset_b
                if block in self.blocks:
                    out[place : place + n] = (self.blocks[block][1] or bytes(LB))[at : at + n]
                else:
                    missing |= set(range(place, place + n))
                pos += n
        return missing

    def written(self) -> dict[int, bytes]:
        """What has to be written, by block."""
        return {at: block for at, (_, block) in self.blocks.items() if block is not None}

    def zeroed(self) -> set[int]:
        """Blocks that were discarded."""
        return {at for at, (_, block) in self.blocks.items() if block is None}
