"""Batches of reads and writes on a File: one call without the GIL where the file has a descriptor."""

from __future__ import annotations

from collections.abc import Sequence

from walbd.ext.buffers import Buf
from walbd.ext.nbd import Chunk
from walbd.ext.overlay import Overlay, read_ranges
from walbd.ext.packer import LogBatch
from walbd.fs import File
from walbd.fs.disk import disk_errors
from walbd.protocol.nbd import RANGE_TABLE


def write_log(file: File, batch: LogBatch) -> None:
    """Write a sealed batch to its places in the ring."""
    fd = file.fileno()
    if fd >= 0:
        try:  # not disk_errors at once: this is the hot path
            batch.write(fd)
        except OSError as exc:
            with disk_errors(file.path, "write the log"):
                raise exc
        return
    for offset_b, buffers in batch.segments():
        file.pwritev(buffers, offset_b)


def write_data(file: File, parts: Sequence[tuple[bytes, Buf | Chunk]]) -> None:
    """Bring the data device to the state after log records, (table, data) in log order.

    Within the batch only the last data of a block is written, in ascending order; the caller must know that
    the whole batch is permanent.
    """
    plan = Overlay()
    for records, data in parts:
        plan.insert(records, data)
    fd = file.fileno()
    if fd >= 0:
        with disk_errors(file.path, "write the data device"):
            plan.write(fd)
    else:
        for offset_b, block in plan.writes():
            file.pwrite(block, offset_b)
    for offset_b, size_b in plan.zeros():
        file.zero(offset_b, size_b)


def read_cached(file: File, ranges: bytes, out: Chunk) -> bytes:
    """Read those `ranges` (walb_range table) that are in memory; return the others."""
    fd = file.fileno()
    if fd < 0:
        return ranges
    try:  # as in write_log
        return read_ranges(fd, ranges, out, nowait=True)
    except OSError as exc:
        with disk_errors(file.path, "read the data device"):
            raise exc


def read_data(file: File, ranges: bytes, out: Chunk) -> None:
    """Read `ranges` into `out`; what lies behind the end of the file reads as zeros."""
    fd = file.fileno()
    if fd >= 0:
        with disk_errors(file.path, "read the data device"):
            read_ranges(fd, ranges, out)
        return
    view = memoryview(out)
    for offset_b, size_b, out_b, _ in RANGE_TABLE.iter_unpack(ranges):
        part = view[out_b : out_b + size_b]
        got = file.pread_into(part, offset_b)
        part[got:] = bytes(size_b - got)
