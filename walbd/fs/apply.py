"""Applying log to a device or image: the records of a scan, in log order.

Source: docs/formats.md, "Finding the end of the log" (redo).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from walbd.errors import CorruptData, WalbError
from walbd.ext.buffers import Buf
from walbd.ext.logapply import first_outside, write_records
from walbd.format.logpack import FLAG_DISCARD, FLAG_PADDING, LOG_RECORD, LOG_RECORD_B
from walbd.format.wlog import WlogReader
from walbd.fs.disk import File, disk_errors
from walbd.ids import Lsid
from walbd.units import LB


def check_inside(records: Buf, limit_lb: int, *, source: str, offset_b: Callable[[int], int], what: str) -> None:
    """Raise CorruptData if a record (walb_log_record structs) reaches beyond `limit_lb`; nothing is written.

    `offset_b` tells where the logpack of a given lsid lies in `source`; `what` names the target.
    """
    index = first_outside(records, limit_lb)
    if index < 0:
        return
    lsid, offset_lb, _, io_size_lb, _, _, local = LOG_RECORD.unpack_from(records, index * LOG_RECORD_B)
    raise CorruptData(
        f"a log record reaches beyond the end of {what}",
        hint="use a target at least as large as the volume was when the log was written",
        path=source,
        offset=offset_b(lsid - local),
        lsid=lsid,
        offset_lb=offset_lb,
        io_size_lb=io_size_lb,
        target_size_lb=limit_lb,
    )


def apply_records(file: File, data: Buf, records: Buf, *, zero_discards: bool) -> None:
    """Write the data of log records (walb_log_record structs, data_b counted from `data`) to their places.

    Strictly in log order, so that of overlapping records the last one wins. Discarded ranges become zeros, or
    stay as they are. The caller has checked that everything lies inside the file, and syncs afterwards.
    """
    n = len(records) // LOG_RECORD_B
    write = _write_os if file.fileno() >= 0 else _write_any
    i = 0
    while i < n:
        i = write(file, data, records, i)
        if i < n:
            _, offset_lb, _, io_size_lb, _, _, _ = LOG_RECORD.unpack_from(records, i * LOG_RECORD_B)
            if zero_discards:
                file.zero(offset_lb * LB, io_size_lb * LB)
            i += 1


def apply_wlog(reader: WlogReader, image: File, *, zero_discards: bool) -> Lsid:
    """Apply a whole wlog to an image of fixed size; durable on return. Returns the lsid reached.

    Each piece is verified before it is applied, and nothing behind the first damage is: the error then tells in
    `applied_to` up to which lsid the image holds the log. Raises CorruptData, also for records that reach beyond
    the end of the image; DiskFailed.
    """
    limit_lb = image.size() // LB
    lsid = reader.lsid
    try:
        for batch in reader.batches():
            check_inside(
                batch.records, limit_lb, source=reader.path, offset_b=reader.offset_of, what=str(image.path)
            )
            apply_records(image, batch.data, batch.records, zero_discards=zero_discards)
            lsid = batch.lsid_end
    except WalbError as exc:
        exc.facts["applied_to"] = lsid
        raise
    image.sync()
    return lsid


def _write_os(file: File, data: Buf, records: Buf, first: int) -> int:
    """Write up to the next discard; return its index, or the number of records."""
    reached, code = write_records(file.fileno(), data, records, first)
    if code:
        with disk_errors(file.path, "write"):
            raise OSError(code, os.strerror(code))
    return reached


def _write_any(file: File, data: Buf, records: Buf, first: int) -> int:
    """The same for files without a descriptor (simulated ones)."""
    view = memoryview(data)
    for i in range(first, len(records) // LOG_RECORD_B):
        _, offset_lb, data_b, io_size_lb, flags, _, _ = LOG_RECORD.unpack_from(records, i * LOG_RECORD_B)
        if flags & FLAG_DISCARD:
            return i
        if not flags & FLAG_PADDING:
            file.pwrite(view[data_b : data_b + io_size_lb * LB], offset_lb * LB)
    return len(records) // LOG_RECORD_B
