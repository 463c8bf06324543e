"""Reading the ring of a log device: pieces by lsid, and the end of the log.

An lsid lies at PB `ring_offset + lsid mod ring_size`, so a piece of log may lie in two places: at the end of
the ring and at its beginning. Nothing here writes; redo, the checkpoint and forgetting the future are in
`walbd.storage.device.redo`.

Source: docs/formats.md, "Log device" and "Finding the end of the log".
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.ext.logpack import Fault, Stop, find_claims, find_headers
from walbd.format.files import ReadFile, aligned_buffer
from walbd.format.logpack import FAULT_TEXT
from walbd.format.logscan import CHUNK_B, WHOLE_PACK_MAX_B, LogScanner, TornPack
from walbd.format.superblock import Superblock
from walbd.ids import INVALID_LSID, Lsid

_PIECE_B: Final = 4 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LogEnd:
    """Where the log ends, and why."""

    lsid: Lsid  # the next pack would begin here
    stop: Stop
    fault: Fault  # what is wrong with the block at `lsid`, or with the data of the torn pack
    torn: TornPack | None  # the pack that the end cuts, if any

    @property
    def reason(self) -> str:
        """Why the log ends, in words."""
        return "the whole ring is valid log" if self.stop is Stop.MORE else FAULT_TEXT[self.fault]


class Ring:
    """The ring of an open log device, addressed by lsid. Safe to use from several threads."""

    def __init__(self, file: ReadFile, superblock: Superblock) -> None:
        self.file = file
        self.superblock = superblock

    def segments(self, lsid: int, n_pb: int) -> Iterator[tuple[int, int]]:
        """Yield (offset on the device, size) [byte] of the one or two places of `n_pb` PBs from `lsid` on."""
        sb = self.superblock
        assert n_pb <= sb.ring_size_pb
        while n_pb > 0:
            here = min(n_pb, sb.ring_size_pb - lsid % sb.ring_size_pb)
            yield sb.offset_b(lsid), here * sb.pbs
            lsid += here
            n_pb -= here

    def read_into(self, view: memoryview, lsid: int) -> int:
        """Fill `view`, whole PBs, with the log from `lsid` on; raise CorruptData if the device ends before."""
        done = 0
        for offset_b, size_b in self.segments(lsid, len(view) // self.superblock.pbs):
            got = self.file.pread_into(view[done : done + size_b], offset_b)
            if got < size_b:
                raise CorruptData(
                    "the log device is smaller than the ring its superblock describes",
                    hint="the device or image was cut: use the original",
                    path=str(self.file.path),
                    offset=offset_b + got,
                )
            done += got
        return done

    def read(self, lsid: int, n_pb: int) -> memoryview:
        """Return `n_pb` PBs from `lsid` on in a new aligned buffer."""
        view = aligned_buffer(n_pb * self.superblock.pbs)
        self.read_into(view, lsid)
        return view

    def scan(
        self,
        lsid: int,
        *,
        lsid_end: int = INVALID_LSID,
        verify_data: bool = True,
        collect: bool = True,
        keep_torn: bool = False,
        chunk_b: int = CHUNK_B,
        whole_pack_max_b: int = WHOLE_PACK_MAX_B,
    ) -> LogScanner:
        """Return a scanner of the log from the pack boundary `lsid` on, over one lap at most."""
        sb = self.superblock
        return LogScanner(
            self.read_into,
            pbs=sb.pbs,
            salt=sb.salt,
            lsid=lsid,
            lsid_end=min(lsid_end, lsid + sb.ring_size_pb),
            verify_data=verify_data,
            collect=collect,
            keep_torn=keep_torn,
            chunk_b=chunk_b,
            whole_pack_max_b=whole_pack_max_b,
        )

    def has_pack(self, lsid: int) -> bool:
        """Say whether the PB of `lsid` is a header with a good checksum and that very lsid."""
        return (0, lsid) in find_headers(self.read(lsid, 1), self.superblock.pbs, self.superblock.salt)

    def headers(self, lsid: int, lsid_end: int) -> Iterator[tuple[Lsid, Lsid]]:
        """Yield (lsid of the place, lsid in the header) of every block in [lsid, lsid_end) that is a header.

        A block is taken for a header by its type and checksum alone; what lies between headers is not followed.
        At most one lap.
        """
        for at, view in self._pieces(lsid, lsid_end):
            for i, found in find_headers(view, self.superblock.pbs, self.superblock.salt):
                yield Lsid(at + i), Lsid(found)

    def claims(self, lsid: int, lsid_end: int) -> Iterator[Lsid]:
        """Yield the lsid of every block in [lsid, lsid_end) that claims to be the header of its own place.

        Sector type and lsid decide, not the checksum: a header that was written in part claims its place too.
        At most one lap.
        """
        for at, view in self._pieces(lsid, lsid_end):
            for i in find_claims(view, self.superblock.pbs, at):
                yield Lsid(at + i)

    def _pieces(self, lsid: int, lsid_end: int) -> Iterator[tuple[int, memoryview]]:
        """Yield [lsid, lsid_end) in pieces: where each begins, and its bytes, valid until the next one."""
        sb = self.superblock
        assert lsid_end - lsid <= sb.ring_size_pb
        buffer = aligned_buffer(min(_PIECE_B, (lsid_end - lsid) * sb.pbs))
        while lsid < lsid_end:
            n_pb = min(len(buffer) // sb.pbs, lsid_end - lsid)
            view = buffer[: n_pb * sb.pbs]
            self.read_into(view, lsid)
            yield lsid, view
            lsid += n_pb

    def error(self, scanner: LogScanner, begin_lsid: int, *, hint: str = "") -> CorruptData:
        """Return the error for what ended `scanner`, which began at `begin_lsid`, with the place on the device."""
        lsid = begin_lsid + scanner.trouble_b // self.superblock.pbs
        facts = {"record": scanner.record} if scanner.record >= 0 else {}
        return CorruptData(
            FAULT_TEXT[scanner.fault],
            hint=hint,
            path=str(self.file.path),
            offset=self.superblock.offset_b(lsid),
            lsid=scanner.lsid,
            **facts,
        )


def find_end(file: ReadFile, superblock: Superblock, lsid: int | None = None) -> LogEnd:
    """Follow the packs from `lsid` (a pack boundary; `written_lsid` if None) to the end of the log.

    All data is verified; a last pack with bad data counts as far as its records are good. Headers that claim
    the right place but contradict themselves raise CorruptData: no crash leaves such a thing.
    """
    begin = superblock.written_lsid if lsid is None else lsid
    ring = Ring(file, superblock)
    scanner = ring.scan(begin, collect=False, keep_torn=True).run()
    refuse_contradictions(ring, scanner, begin)
    return log_end(scanner)


def refuse_contradictions(ring: Ring, scanner: LogScanner, begin_lsid: int) -> None:
    """Raise CorruptData if `scanner` ended at a header that nothing but a defect or malice can have made.

    Its checksum and lsid are right, so it is no leftover and not torn. To take it for the end of the log would
    silently drop writes that were acknowledged.
    """
    if scanner.stop is Stop.BAD_HEADER:
        raise ring.error(
            scanner,
            begin_lsid,
            hint="report this; to go on without the rest of the log, reset it and resynchronise the volume",
        )


def log_end(scanner: LogScanner) -> LogEnd:
    """Return where a scanner that is done found the end."""
    return LogEnd(lsid=scanner.lsid, stop=scanner.stop, fault=scanner.fault, torn=scanner.torn)
