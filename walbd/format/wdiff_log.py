"""Converting wlogs to wdiffs.

Rules: records apply in log order, later ones override; paddings vanish; a record whose data is all zero becomes
all-zero, and discards stay discards. Sorted output takes two passes: the first verifies the logs and keeps only
extents, the second reads visible data by its place. Indexed output is one pass.

Source: docs/formats.md, "wdiff: conversion from wlogs".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Final

from walbd.errors import HistoryBroken
from walbd.format.compress import CompressOpt
from walbd.format.extents import Check, ExtentMap, ScratchFile, merge_extents, no_check
from walbd.format.files import ReadFile
from walbd.format.logscan import Batch
from walbd.format.wdiff import END_PACK, PACK_RECORDS_MAX, WdiffHeader, WdiffType
from walbd.format.wdiff_merge import PACK_RAW_MAX_B, build_packs
from walbd.format.wdiff_write import IndexedWdiffWriter, WriteFile, log_extents
from walbd.format.wlog import WlogReader
from walbd.units import LB

RECORD_MAX_LB: Final = 2048  # larger records are cut in a sorted wdiff


def sorted_from_wlogs(
    files: Sequence[ReadFile],
    compress: CompressOpt,
    *,
    uuid: bytes | None = None,
    record_max_lb: int = RECORD_MAX_LB,
    scratch: Callable[[], ScratchFile] | None = None,
    check: Check = no_check,
) -> Iterator[bytes]:
    """Convert wlogs that continue each other to the pieces of one sorted wdiff: header, packs, end pack.

    The uuid is that of the log unless given. `record_max_lb` 0 cuts no records. `scratch` makes a temporary file,
    and bounds the memory when there are more than half a million extents. Raises CorruptData, or HistoryBroken
    when a wlog does not continue the one before it; then the pieces yielded so far are worthless.
    """
    visible = ExtentMap(scratch)
    for number, reader, batch in wlog_batches(files):
        check()
        if uuid is None:
            uuid = reader.header.uuid
        visible.add(
            log_extents(
                batch.data,
                batch.records,
                at_b=reader.offset_of(batch.lsid),
                number=number,
                max_lb=record_max_lb,
                source=reader.path,
            )
        )
    if uuid is None:
        uuid = WlogReader(files[0]).header.uuid  # there were no packs
    yield WdiffHeader(WdiffType.SORTED, uuid).pack()
    batches = merge_extents(visible.streams(), n_max=PACK_RECORDS_MAX, lb_max=PACK_RAW_MAX_B // LB, join=False)
    yield from build_packs(batches, files, compress, check=check)
    yield END_PACK


def indexed_from_wlogs(
    files: Sequence[ReadFile],
    out: WriteFile,
    compress: CompressOpt,
    *,
    uuid: bytes | None = None,
    scratch: Callable[[], ScratchFile] | None = None,
    check: Check = no_check,
) -> None:
    """Convert wlogs that continue each other to one indexed wdiff in the new file `out`; errors as above."""
    writer = IndexedWdiffWriter(
        out, WlogReader(files[0]).header.uuid if uuid is None else uuid, compress, scratch=scratch
    )
    for _, reader, batch in wlog_batches(files):
        check()
        writer.add_log(batch.data, batch.records, source=reader.path)
    writer.finish()


def wlog_batches(files: Sequence[ReadFile]) -> Iterator[tuple[int, WlogReader, Batch]]:
    """Yield (number of the file, its reader, batch) for all verified log in wlogs that continue each other.

    Raises CorruptData, or HistoryBroken when a wlog does not continue the one before it.
    """
    before: WlogReader | None = None
    for number, file in enumerate(files):
        reader = WlogReader(file)
        if before is not None and (
            reader.header.begin_lsid != before.lsid or reader.header.uuid != before.header.uuid
        ):
            raise HistoryBroken(
                "a wlog does not continue the one before it",
                hint="give the wlogs of one log, in order and without gaps",
                path=reader.path,
                lsid=before.lsid,
                begin_lsid=reader.header.begin_lsid,
                uuid=reader.header.uuid.hex(),
            )
        for batch in reader.batches():
            yield number, reader, batch
        before = reader
