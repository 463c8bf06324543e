"""Redo: bringing the data device up to the end of the log after a crash, and making the log end there.

    0. sync the log: what a killed process left in the page cache is read here, and could still be lost
    1. apply every whole, good pack from `written_lsid` on, in log order     (nothing else is changed yet)
    2. cut the header of a torn last pack down to its good records, or end the log there if none is good
    3. forget the future: zero every later block that claims to be a pack header of its own place
    4. apply what is left of the torn pack
    5. sync the data device, then write both superblocks with `written_lsid` = the end of the log

A crash in between leaves something that the next redo brings to the same end, or to an earlier one above which
nothing was applied: whole records are applied again, and what steps 2 and 3 wrote only takes away what redo had
rejected.
That is why step 4 comes so late: had a crash in step 2 torn the rewritten header, the data device would hold
records that the log has lost.

Step 3 matters because packs are written out of order. If pack N was lost and N+1 was not, redo ends before N;
a new N of the same size would bring the old N+1 back to life at the next crash. Even half a header may come back:
where a disk tears blocks of 4096 bytes, the old first sector and the new zeros behind it can be the whole
old header. So a block counts by its type and lsid, whatever its checksum says.

The same code serves the userspace device at start and `walbd ldev redo`.
Source: docs/device.md, "Start and redo"; docs/formats.md, "Finding the end of the log".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from walbd.errors import CorruptData, Refused
from walbd.ext.logapply import first_odd_padding
from walbd.ext.logpack import Stop
from walbd.format.files import aligned_buffer
from walbd.format.logpack import LOG_RECORD, LOG_RECORD_B, end_header
from walbd.format.logscan import CHUNK_B, WHOLE_PACK_MAX_B, Batch
from walbd.format.ring import LogEnd, Ring, log_end, refuse_contradictions
from walbd.format.superblock import Superblock
from walbd.fs import File, failpoints
from walbd.fs.apply import apply_records, check_inside
from walbd.ids import Lsid
from walbd.storage.device.superblocks import write_superblocks
from walbd.units import LB, MIB

# What can lie above the end: all that was in flight. The kernel driver allows 2 GiB of pending IO at most, our log
# stage 4 GiB of log that is not permanent, and one batch more.
FORGET_MAX_B: Final = 4608 * MIB

FP_BEFORE_BATCH: Final = failpoints.register(
    "device.redo.before_batch", "a part of the log is applied, perhaps not durably; the log is unchanged"
)
FP_BEFORE_DATA_SYNC: Final = failpoints.register(
    "device.redo.before_data_sync", "the log is applied, perhaps not durably; the log ends where it shall"
)
FP_BEFORE_TORN: Final = failpoints.register(
    "device.redo.before_torn", "the whole packs are applied, perhaps not durably; a torn one stands at the end"
)
FP_BEFORE_FORGET: Final = failpoints.register(
    "device.redo.before_forget", "the torn pack is cut down; later packs may still stand in the ring"
)
FP_BEFORE_FORGET_SYNC: Final = failpoints.register(
    "device.redo.before_forget_sync", "later packs are zeroed, perhaps not durably"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RedoResult:
    """What redo found and did."""

    superblock: Superblock  # as it is on disk now
    begin_lsid: Lsid
    end: LogEnd
    n_packs: int
    n_records: int
    forgotten: tuple[Lsid, ...]  # packs above the end that were zeroed


def redo(
    ldev: File,
    ddev: File,
    superblock: Superblock,
    *,
    zero_discards: bool = True,
    forget_max_b: int = FORGET_MAX_B,
    chunk_b: int = CHUNK_B,
    whole_pack_max_b: int = WHOLE_PACK_MAX_B,
) -> RedoResult:
    """Apply the log from `written_lsid` on to the data device and make both agree; durable on return.

    Raises Refused when the data device is smaller than the superblock says (nothing is changed), CorruptData
    when a good header contradicts itself or reaches outside the data device (the log is unchanged; records
    before it may have been applied), DiskFailed when the disk does. Memory is bounded (LogScanner).
    """
    ddev_lb = ddev.size() // LB
    if superblock.device_size_lb > ddev_lb:
        raise Refused(
            "the data device is smaller than the volume",
            hint="give the data device that belongs to this log",
            path=str(ddev.path),
            size_lb=ddev_lb,
            expected_lb=superblock.device_size_lb,
        )
    ldev.sync()
    ring = Ring(ldev, superblock)
    begin = superblock.written_lsid
    applier = _Applier(ring, ddev, zero_discards=zero_discards)
    scan = partial(ring.scan, chunk_b=chunk_b, whole_pack_max_b=whole_pack_max_b)
    scanner = scan(begin)
    for batch in scanner:
        if not batch.n_packs and not batch.records:  # the header of a pack that comes in parts
            lsid_end = batch.lsid_end + int.from_bytes(batch.data[6:8], "little")
            if scan(batch.lsid, lsid_end=lsid_end, collect=False).run().lsid != lsid_end:
                # It is torn: nothing of it may be applied before it is cut.
                scanner = scan(batch.lsid, collect=False).run()
                break
        failpoints.hit(FP_BEFORE_BATCH)
        applier.apply(batch)
    refuse_contradictions(ring, scanner, begin)
    end = log_end(scanner)
    if scanner.stop is Stop.BAD_DATA:
        end = log_end(scan(scanner.lsid, collect=False, keep_torn=True).run())
    if end.torn:
        failpoints.hit(FP_BEFORE_TORN)
        # In a pack without any good record an end header replaces the old one, which must never count again.
        header = end.torn.header or end_header(superblock.pbs, superblock.salt)
        _write_pb(ldev, superblock, end.torn.lsid, header)
        ldev.sync()
    forgotten = forget_future(ldev, superblock, end.lsid, max_b=forget_max_b)
    if end.torn:
        for batch in scan(end.torn.lsid, lsid_end=end.lsid):
            applier.apply(batch)
    failpoints.hit(FP_BEFORE_DATA_SYNC)
    ddev.sync()
    after = replace(superblock, written_lsid=end.lsid)
    write_superblocks(ldev, after)
    return RedoResult(
        superblock=after,
        begin_lsid=begin,
        end=end,
        n_packs=applier.n_packs,
        n_records=applier.n_records,
        forgotten=forgotten,
    )


class _Applier:
    """Applies log to the data device, and counts it."""

    def __init__(self, ring: Ring, ddev: File, *, zero_discards: bool) -> None:
        self.n_packs = 0
        self.n_records = 0
        self._ring = ring
        self._ddev = ddev
        self._ddev_lb = ddev.size() // LB
        self._zero_discards = zero_discards

    def apply(self, batch: Batch) -> None:
        """Apply a batch; one with records that no device can have logged is refused whole (CorruptData)."""
        self._check(batch)
        apply_records(self._ddev, batch.data, batch.records, zero_discards=self._zero_discards)
        self.n_packs += batch.n_packs
        self.n_records += len(batch.records) // LOG_RECORD_B

    def _check(self, batch: Batch) -> None:
        """Raise CorruptData for a record outside the data device, and for a padding in mid-lap."""
        sb, path = self._ring.superblock, str(self._ring.file.path)
        check_inside(batch.records, self._ddev_lb, source=path, offset_b=sb.offset_b, what=str(self._ddev.path))
        odd = first_odd_padding(batch.records, sb.pbs, sb.ring_size_pb)
        if odd >= 0:
            lsid, _, _, _, _, _, local = LOG_RECORD.unpack_from(batch.records, odd * LOG_RECORD_B)
            raise CorruptData(
                "a padding record does not end at the end of the ring",
                hint="report this; to go on without the rest of the log, reset it and resynchronise the volume",
                path=path,
                offset=sb.offset_b(lsid - local),
                lsid=lsid,
            )


def forget_future(
    ldev: File, superblock: Superblock, end_lsid: int, *, max_b: int = FORGET_MAX_B
) -> tuple[Lsid, ...]:
    """Zero every block from `end_lsid` on that claims to be a pack header of its own place; durable on return.

    Looks at the free part of the ring, at most `max_b` bytes: it has to cover all that can have been in flight
    above the end. Log that is kept is never touched: its headers have lsids below the end. Returns the lsids.
    """
    failpoints.hit(FP_BEFORE_FORGET)
    used_pb = end_lsid - superblock.oldest_lsid
    free_pb = superblock.ring_size_pb - used_pb if used_pb <= superblock.ring_size_pb else superblock.ring_size_pb
    limit = end_lsid + min(free_pb, max_b // superblock.pbs)
    ring = Ring(ldev, superblock)
    forgotten = tuple(ring.claims(end_lsid, limit))
    for lsid in forgotten:
        _write_pb(ldev, superblock, lsid, bytes(superblock.pbs))
    failpoints.hit(FP_BEFORE_FORGET_SYNC)
    if forgotten:
        ldev.sync()
    return forgotten


def _write_pb(ldev: File, superblock: Superblock, lsid: int, block: bytes) -> None:
    buffer = aligned_buffer(superblock.pbs)
    buffer[:] = block
    ldev.pwrite(buffer, superblock.offset_b(lsid))
