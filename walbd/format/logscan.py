"""Walking the packs of a log, whatever it lies in: a wlog file, a ring, a stream that was received.

A `LogScanner` reads large pieces through a function that it is given, has each piece scanned in one call of
`walbd.ext.logpack`, and hands out batches of whole, verified packs. Its memory is bounded: one buffer, 1 MiB
unless a pack is larger; a pack above 16 MiB (the format allows 256 MiB) is handed out in parts at record
boundaries, so that the buffer never exceeds 32 MiB, the largest record.

Source: docs/formats.md, "Logpack" and "Finding the end of the log".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

from walbd.ext.logpack import Fault, Scan, Stop, scan, scan_data, shrink
from walbd.format.files import aligned_buffer
from walbd.ids import INVALID_LSID, Lsid

ReadLog = Callable[[memoryview, int], int]
"""Fill a buffer with the log from an lsid on; return how many bytes there are, short only at the end."""

CHUNK_B: Final = 1 << 20
WHOLE_PACK_MAX_B: Final = 16 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Verified log [lsid, lsid_end). The buffers belong to the scanner: use them before asking for the next."""

    lsid: Lsid
    lsid_end: Lsid  # a pack boundary, except within a pack that is handed out in parts
    data: memoryview  # the PBs [lsid, lsid_end) as they are, headers included
    records: bytearray  # walb_log_record structs (format.logpack.LOG_RECORD), data_b counted from data
    n_packs: int  # packs that end in this batch


@dataclass(frozen=True, slots=True)
class TornPack:
    """The pack with which a log ends because the data of one of its records is not there."""

    lsid: Lsid  # of the pack
    record: int  # the first bad record; it and all later ones are dropped
    header: bytes  # the header cut down to the good records; empty when there are none
    lsid_end: Lsid  # where the log ends: after what is left of the pack


class LogScanner:
    """Iterates over the batches of a log from `lsid` on; afterwards its fields say where and why it ended.

    `read` gets a page-aligned buffer whose size is a multiple of `pbs`, and is never asked for anything at or
    above `lsid_end`. With `keep_torn`, the good records of a last, torn pack are part of the log: its header is
    cut down in the last batch, and `torn` tells. Without, nothing of a pack with bad data is handed out
    (unless it is so large that it comes in parts). `verify_data=False` leaves the data checksums out.
    """

    stop: Stop  # MORE: the log is cut, or reached `lsid_end`
    fault: Fault
    lsid: Lsid  # where the verified log ends
    trouble_b: int  # what ended it: byte offset from the beginning of the log
    record: int  # index of the record in trouble, -1 for none
    torn: TornPack | None

    def __init__(
        self,
        read: ReadLog,
        *,
        pbs: int,
        salt: int,
        lsid: int,
        lsid_end: int = INVALID_LSID,
        verify_data: bool = True,
        collect: bool = True,
        keep_torn: bool = False,
        chunk_b: int = CHUNK_B,
        whole_pack_max_b: int = WHOLE_PACK_MAX_B,
    ) -> None:
        self._read = read
        self._pbs = pbs
        self._salt = salt
        self._begin = lsid
        self._limit = lsid_end
        self._verify = verify_data
        self._collect = collect
        self._keep_torn = keep_torn
        self._whole_max_b = max(whole_pack_max_b, pbs)
        self._buffer = aligned_buffer(max(chunk_b // pbs, 1) * pbs)
        self._filled = 0  # bytes of the log in the buffer, the first of them that of `lsid`
        self.stop, self.fault = Stop.MORE, Fault.NONE
        self.lsid = Lsid(lsid)
        self.trouble_b = 0
        self.record = -1
        self.torn = None

    def __iter__(self) -> Iterator[Batch]:
        while True:
            more = self._fill()
            view = self._buffer[: self._filled]
            records = bytearray()
            found = self._scan(view, records)
            self._note(found)
            good = found
            if found.stop is Stop.BAD_DATA and self._keep_torn:
                good = self._cut_torn(view, found, records)
            if good.consumed_b:
                yield Batch(self.lsid, Lsid(good.lsid), view[: good.consumed_b], records, good.n_packs)
                self._drop(good.consumed_b, good.lsid)
            if found.stop is not Stop.MORE or not (more or found.consumed_b):
                return
            if self.lsid + found.need_b // self._pbs > self._limit:
                return
            if found.need_b > self._whole_max_b:
                yield from self._parts()
                if self.stop is not Stop.END:
                    return
            elif found.need_b > len(self._buffer):
                self._grow(found.need_b)

    def run(self) -> LogScanner:
        """Go to the end without looking at the batches; return self."""
        for _ in self:
            pass
        return self

    def _scan(self, view: memoryview, records: bytearray) -> Scan:
        return scan(
            view,
            self._pbs,
            self._salt,
            self.lsid,
            verify_data=self._verify,
            records=records if self._collect else None,
        )

    def _note(self, found: Scan) -> None:
        self.stop, self.fault, self.record = found.stop, found.fault, found.record
        self.trouble_b = (self.lsid - self._begin) * self._pbs + found.trouble_b

    def _cut_torn(self, view: memoryview, found: Scan, records: bytearray) -> Scan:
        """Cut down the header of the torn pack in the buffer and scan up to the end of what is left of it."""
        if found.record == 0:
            self.torn = TornPack(Lsid(found.lsid), 0, b"", Lsid(found.lsid))
            return found
        at = found.consumed_b
        header = shrink(view[at : at + self._pbs], self._pbs, self._salt, found.record)
        view[at : at + self._pbs] = header
        del records[:]
        end_b = at + (1 + int.from_bytes(header[6:8], "little")) * self._pbs
        good = self._scan(view[:end_b], records)
        assert (good.stop, good.consumed_b) == (Stop.MORE, end_b), good
        self.torn = TornPack(Lsid(found.lsid), found.record, header, Lsid(good.lsid))
        return good

    def _parts(self) -> Iterator[Batch]:
        """Hand out the pack at the beginning of the buffer, header first, then as many records as fit."""
        pbs, pack_lsid = self._pbs, self.lsid
        header = bytes(self._buffer[:pbs])
        yield Batch(self.lsid, Lsid(self.lsid + 1), self._buffer[:pbs], bytearray(), 0)
        self._drop(pbs, self.lsid + 1)
        first = 0
        while True:
            more = self._fill()
            view = self._buffer[: self._filled]
            records = bytearray()
            found = scan_data(
                header,
                pbs,
                self._salt,
                view,
                first,
                verify_data=self._verify,
                records=records if self._collect else None,
            )
            self._note(found)
            first = found.record
            if found.stop is Stop.BAD_DATA and self._keep_torn:
                kept = shrink(header, pbs, self._salt, first) if first else b""
                self.torn = TornPack(pack_lsid, first, kept, Lsid(found.lsid if first else pack_lsid))
            if found.n_records or found.stop is Stop.END:
                yield Batch(
                    self.lsid, Lsid(found.lsid), view[: found.consumed_b], records, int(found.stop is Stop.END)
                )
                self._drop(found.consumed_b, found.lsid)
            if self.torn is not None:
                self.lsid = self.torn.lsid_end
            elif found.stop is Stop.BAD_DATA:
                self.lsid = pack_lsid  # some of it was handed out, but it is no part of the log
            if found.stop is not Stop.MORE or not (more or found.consumed_b):
                return
            if found.need_b > len(self._buffer):
                self._grow(found.need_b)

    def _fill(self) -> bool:
        """Read on behind what is in the buffer; say whether anything came."""
        at = self.lsid + self._filled // self._pbs
        room = min(len(self._buffer) - self._filled, (self._limit - at) * self._pbs)
        if room <= 0 or self._filled % self._pbs:
            return False
        got = self._read(self._buffer[self._filled : self._filled + room], at)
        self._filled += got
        return got > 0

    def _drop(self, size_b: int, lsid: int) -> None:
        rest = self._filled - size_b
        self._buffer[:rest] = self._buffer[size_b : self._filled]
        self._filled = rest
        self.lsid = Lsid(lsid)

    def _grow(self, size_b: int) -> None:
        larger = aligned_buffer(size_b)
        larger[: self._filled] = self._buffer[: self._filled]
        self._buffer = larger
