"""Writing wdiffs: packs from data that comes in address order, and indexed files from log in order of arrival.

Source: docs/formats.md, "wdiff: sorted" and "wdiff: indexed".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Protocol

from walbd.errors import CorruptData, InternalError
from walbd.ext.buffers import Buf
from walbd.ext.checksum import checksum, is_zero
from walbd.ext.extent import cut_batch, from_log
from walbd.ext.wdiff import build_index, relocate
from walbd.format.compress import CompressOpt, Kind
from walbd.format.extents import (
    EXTENT,
    EXTENT_B,
    FLAG_ALLZERO,
    FLAG_DISCARD,
    IO_MAX_LB,
    ExtentMap,
    ScratchFile,
    merge_extents,
)
from walbd.format.logpack import LOG_RECORD, LOG_RECORD_B
from walbd.format.wdiff import (
    END_PACK,
    HEADER_B,
    INDEX_LIMIT_LB,
    INDEX_SUPER,
    PACK_RECORDS_MAX,
    WdiffHeader,
    WdiffType,
)
from walbd.format.wdiff_batch import Batcher
from walbd.units import LB, MIB

_PACK_RAW_MAX_B: Final = 16 * MIB
_ADD_MAX_B: Final = 8 * MIB  # log data compressed at a time
_ADD_MAX: Final = 1024  # records likewise
_INDEX_ROOM: Final = 4096  # index records made at a time


class WriteFile(Protocol):
    """What writers need of an open, new and empty file."""

    path: Path

    def pwrite(self, data: Buf, offset_b: int) -> None: ...


class PackMaker:
    """Makes the packs of a sorted wdiff from ranges given in ascending order.

    Each method returns the packs that became complete, often none. Adding out of order raises ValueError.
    """

    def __init__(self, compress: CompressOpt) -> None:
        self._compress = compress
        self._batcher = Batcher([])
        self._extents = bytearray()
        self._data = bytearray()
        self._end_lb = 0

    def add_data(self, address_lb: int, data: Buf) -> bytes:
        """Add data (whole blocks, at most 65535); all-zero data becomes an all-zero record."""
        size_b = len(data)
        if size_b % LB or not 0 < size_b <= IO_MAX_LB * LB:
            raise ValueError("data must be 1 to 65535 whole blocks")
        if is_zero(data):
            return self.add_zero(address_lb, size_b // LB)
        packs = self.flush() if len(self._data) + size_b > _PACK_RAW_MAX_B else b""
        at, blocks = len(self._data), size_b // LB
        self._data += data
        extent = EXTENT.pack(address_lb, at, blocks, 0, blocks, size_b, checksum(data), 0, 0, Kind.NONE)
        return packs + self._add(address_lb, blocks, extent)

    def add_zero(self, address_lb: int, blocks_lb: int) -> bytes:
        """Add an all-zero range."""
        extent = EXTENT.pack(address_lb, 0, blocks_lb, 0, 0, 0, 0, 0, FLAG_ALLZERO, 0)
        return self._add(address_lb, blocks_lb, extent)

    def add_discard(self, address_lb: int, blocks_lb: int) -> bytes:
        """Add a discarded range."""
        extent = EXTENT.pack(address_lb, 0, blocks_lb, 0, 0, 0, 0, 0, FLAG_DISCARD, 0)
        return self._add(address_lb, blocks_lb, extent)

    def flush(self) -> bytes:
        """Return the pack of what was added so far; nothing if nothing was."""
        if not self._extents:
            return b""
        extents, data = bytes(self._extents), memoryview(self._data)
        self._extents, self._data = bytearray(), bytearray()
        self._batcher.load_in_place(extents, data, 0)
        return self._batcher.pack(extents, self._compress)[0]

    def finish(self) -> bytes:
        """Return the last packs, end pack included."""
        return self.flush() + END_PACK

    def _add(self, address_lb: int, blocks_lb: int, extent: bytes) -> bytes:
        if address_lb < self._end_lb or blocks_lb <= 0:
            raise ValueError("ranges must ascend and not be empty")
        self._end_lb = address_lb + blocks_lb
        self._extents += extent
        return self.flush() if len(self._extents) == PACK_RECORDS_MAX * EXTENT_B else b""


class SortedWdiffWriter:
    """Writes a sorted wdiff file from ranges given in ascending order. The caller syncs and names the file."""

    def __init__(self, file: WriteFile, uuid: bytes, compress: CompressOpt) -> None:
        self._file = file
        self._maker = PackMaker(compress)
        self.size_b = 0
        self._write(WdiffHeader(WdiffType.SORTED, uuid).pack())

    def add_data(self, address_lb: int, data: Buf) -> None:
        """Add data (whole blocks, at most 65535); all-zero data becomes an all-zero record."""
        self._write(self._maker.add_data(address_lb, data))

    def add_zero(self, address_lb: int, blocks_lb: int) -> None:
        """Add an all-zero range."""
        self._write(self._maker.add_zero(address_lb, blocks_lb))

    def add_discard(self, address_lb: int, blocks_lb: int) -> None:
        """Add a discarded range."""
        self._write(self._maker.add_discard(address_lb, blocks_lb))

    def finish(self) -> None:
        """Write the last pack and the end pack."""
        self._write(self._maker.finish())

    def _write(self, data: bytes) -> None:
        if data:
            self._file.pwrite(data, self.size_b)
            self.size_b += len(data)


class IndexedWdiffWriter:
    """Writes an indexed wdiff file from log in order of arrival: data at once, the index at the end.

    Memory is that of the visible extents, 40 bytes each; `scratch` makes a temporary file for them when there are
    more than half a million. The caller syncs and names the file.
    """

    def __init__(
        self,
        file: WriteFile,
        uuid: bytes,
        compress: CompressOpt,
        *,
        index_limit_lb: int = INDEX_LIMIT_LB,
        scratch: Callable[[], ScratchFile] | None = None,
    ) -> None:
        if index_limit_lb <= 0:
            raise ValueError("index_limit_lb must be positive")
        self._file = file
        self._compress = compress
        self._limit_lb = 1 << (index_limit_lb.bit_length() - 1)
        self._map = ExtentMap(scratch)
        self._batcher = Batcher([])
        self._n_data = 0
        self.size_b = HEADER_B  # of the file so far
        file.pwrite(WdiffHeader(WdiffType.INDEXED, uuid).pack(), 0)

    def add_log(self, buf: Buf, records: Buf, *, source: str = "log") -> None:
        """Add the log records (walb_log_record structs) that a verified scan found in `buf`.

        Raises CorruptData, naming `source`, when a record has an address that no volume has.
        """
        arrived = log_extents(buf, records, source=source)
        view = memoryview(buf)
        first, n = 0, len(arrived) // EXTENT_B
        while first < n:
            last = cut_batch(arrived, first, _ADD_MAX, _ADD_MAX_B // LB)
            part = arrived[first * EXTENT_B : last * EXTENT_B]
            self._batcher.load_in_place(part, view, 0)
            data, items = self._batcher.pack(part, self._compress, header=False)
            self._file.pwrite(data, self.size_b)
            self._map.add(relocate(part, items, self.size_b, 0))
            self.size_b += len(data)
            first = last
        self._n_data += n

    def finish(self) -> None:
        """Write the index."""
        self._write(bytes(-self.size_b % 8))
        index_b = self.size_b
        n_records = 0
        for records in self._index():
            self._write(records)
            n_records += len(records) // 48
        block = INDEX_SUPER.pack(index_b, n_records, self._n_data & 0xFFFFFFFF, 0, 0)
        if n_records > 0xFFFFFFFF:
            raise InternalError("too many records for an index", n=n_records)
        self._write(block[:20] + checksum(block).to_bytes(4, "little"))

    def _index(self) -> Iterator[bytes]:
        batches = merge_extents(self._map.streams(), n_max=_INDEX_ROOM, lb_max=1 << 62, join=False)
        for extents in batches:
            at = done_lb = 0
            while at * EXTENT_B < len(extents):
                records, at, done_lb = build_index(extents, self._limit_lb, at, done_lb, _INDEX_ROOM)
                yield records

    def _write(self, data: bytes) -> None:
        if data:
            self._file.pwrite(data, self.size_b)
            self.size_b += len(data)


def log_extents(
    buf: Buf, records: Buf, *, at_b: int = 0, number: int = 0, max_lb: int = 0, source: str = "log"
) -> bytes:
    """Return the extents of log records in order of arrival; raises CorruptData for an impossible address.

    `buf` lies at `at_b` of the file with this number; `max_lb` cuts larger records (0: none).
    """
    extents, bad = from_log(records, buf, at_b, number, max_lb)
    if bad >= 0:
        lsid, offset_lb, data_b, io_size_lb, _, _, _ = LOG_RECORD.unpack_from(records, bad * LOG_RECORD_B)
        raise CorruptData(
            "a log record has an address that no volume has",
            hint="the log is damaged, or its volume is larger than 8 EiB",
            path=source,
            offset=at_b + data_b,
            lsid=lsid,
            offset_lb=offset_lb,
            io_size_lb=io_size_lb,
        )
    return extents
