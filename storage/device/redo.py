"""Redo: bringing the data device up to the end of the log after a crash, and making the log end there.

    1. apply every good record from `written_lsid` on, in log order      (nothing else is changed yet)
    2. sync the data device
    3. cut the header of a torn last pack down to its good records, or end the log there if none is good
    4. forget the future: zero every later block that claims to be a pack header of its own place
    5. write both superblocks with `written_lsid` = the end of the log

A crash in between leaves something that the next redo brings to the same end: whole records are applied again,
and what steps 3 and 4 wrote only takes away what redo had rejected.

Step 4 matters because packs are written out of order. If pack N was lost and N+1 was not, redo ends before N;
a new N of the same size would bring the old N+1 back to life at the next crash.

The same code serves the userspace device at start and `walbd ldev redo`.
Source: docs/device.md, "Start and redo"; docs/formats.md, "Finding the end of the log".
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from walbd.errors import CorruptData, Refused
from walbd.ext.logapply import first_odd_padding
from walbd.format.files import aligned_buffer
from walbd.format.logpack import LOG_RECORD, LOG_RECORD_B, end_header
from walbd.format.logscan import CHUNK_B, Batch
from walbd.format.ring import LogEnd, Ring, log_end, refuse_contradictions
from walbd.format.superblock import Superblock
from walbd.fs import File, failpoints
from walbd.fs.apply import apply_records, check_inside
from walbd.ids import Lsid
from walbd.storage.device.superblocks import write_superblocks
from walbd.units import LB, MIB

# What can lie above the end: all that was in flight. The kernel driver allows 2 GiB of pending IO at most.
FORGET_MAX_B: Final = 4608 * MIB

FP_BEFORE_BATCH: Final = failpoints.register(
    "device.redo.before_batch", "a part of the log is applied, perhaps not durably; the log is unchanged"
)
FP_BEFORE_DATA_SYNC: Final = failpoints.register(
    "device.redo.before_data_sync", "the log is applied, perhaps not durably; the log is unchanged"
)
FP_BEFORE_TORN: Final = failpoints.register(
    "device.redo.before_torn", "the log is applied durably; a torn pack still stands at its end"
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
    ring = Ring(ldev, superblock)
    begin = superblock.written_lsid
    scanner = ring.scan(begin, keep_torn=True, chunk_b=chunk_b)
    n_packs = n_records = 0
    for batch in scanner:
        _check(ring, batch, ddev_lb, str(ddev.path))
        failpoints.hit(FP_BEFORE_BATCH)
        apply_records(ddev, batch.data, batch.records, zero_discards=zero_discards)
        n_packs += batch.n_packs
        n_records += len(batch.records) // LOG_RECORD_B
    refuse_contradictions(ring, scanner, begin)
    end = log_end(scanner)
    failpoints.hit(FP_BEFORE_DATA_SYNC)
    ddev.sync()
    if end.torn:
        failpoints.hit(FP_BEFORE_TORN)
        # In a pack without any good record an end header replaces the old one, which must never count again.
        header = end.torn.header or end_header(superblock.pbs, superblock.salt)
        _write_pb(ldev, superblock, end.torn.lsid, header)
        ldev.sync()
    forgotten = forget_future(ldev, superblock, end.lsid, max_b=forget_max_b)
    after = replace(superblock, written_lsid=end.lsid)
    write_superblocks(ldev, after)
    return RedoResult(
        superblock=after,
        begin_lsid=begin,
        end=end,
        n_packs=n_packs,
        n_records=n_records,
        forgotten=forgotten,
    )


def forget_future(
    ldev: File, superblock: Superblock, end_lsid: int, *, max_b: int = FORGET_MAX_B
) -> tuple[Lsid, ...]:
    """Zero every block from `end_lsid` on that is a pack header for its own place; durable on return.

    Looks at the free part of the ring, at most `max_b` bytes: it has to cover all that can have been in flight
    above the end. Log that is kept is never touched: its headers have lsids below the end. Returns the lsids.
    """
    failpoints.hit(FP_BEFORE_FORGET)
    used_pb = end_lsid - superblock.oldest_lsid
    free_pb = superblock.ring_size_pb - used_pb if used_pb <= superblock.ring_size_pb else superblock.ring_size_pb
    limit = end_lsid + min(free_pb, max_b // superblock.pbs)
    ring = Ring(ldev, superblock)
    forgotten = tuple(place for place, found in ring.headers(end_lsid, limit) if place == found)
    for lsid in forgotten:
        _write_pb(ldev, superblock, lsid, bytes(superblock.pbs))
    failpoints.hit(FP_BEFORE_FORGET_SYNC)
    if forgotten:
        ldev.sync()
    return forgotten


def _check(ring: Ring, batch: Batch, ddev_lb: int, ddev_path: str) -> None:
    """Refuse records that no device can have logged: outside the data device, or padding in mid-lap."""
    sb, path = ring.superblock, str(ring.file.path)
    check_inside(batch.records, ddev_lb, source=path, offset_b=sb.offset_b, what=ddev_path)
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


def _write_pb(ldev: File, superblock: Superblock, lsid: int, block: bytes) -> None:
    buffer = aligned_buffer(superblock.pbs)
    buffer[:] = block
    ldev.pwrite(buffer, superblock.offset_b(lsid))
