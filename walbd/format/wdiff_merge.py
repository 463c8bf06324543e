"""Merging wdiffs into one sorted stream, and verifying them.

Rules: inputs are given oldest first and a later one wins where ranges overlap (discards and zeros win like data);
records are cut there. Source: docs/formats.md, "wdiff: overlaps and merging".
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from walbd.format.compress import CompressOpt
from walbd.format.extents import EXTENT, EXTENT_B, Check, merge_extents, no_check
from walbd.format.files import ReadFile
from walbd.format.wdiff import END_PACK, PACK_RECORDS_MAX, WdiffHeader, WdiffType, corrupt
from walbd.format.wdiff_batch import Batcher
from walbd.format.wdiff_read import WdiffReader
from walbd.ids import NIL_UUID
from walbd.units import LB, MIB

PACK_RAW_MAX_B: Final = 16 * MIB  # decoded data in one pack: bounds the memory, and what a reader must hold
VERIFY_MAX: Final = 1024  # extents verified at a time
VERIFY_MAX_B: Final = 2 * MIB  # and their data: what the second-level cache holds


def merge(
    readers: Sequence[WdiffReader], compress: CompressOpt, *, uuid: bytes | None = None, check: Check = no_check
) -> Iterator[bytes]:
    """Merge wdiffs, oldest first, into the pieces of one sorted wdiff: the file header, whole packs, the end pack.

    The header carries `uuid`, by default that of the newest input that has one. Records that are not cut and are
    stored as `compress` wants go through as they are; checksums of everything used are verified. Raises
    CorruptData, before the piece that would have held damaged data.
    """
    yield WdiffHeader(WdiffType.SORTED, newest_uuid(readers) if uuid is None else uuid).pack()
    streams = [reader.extents(i) for i, reader in enumerate(readers)]
    yield from build_packs(
        merge_extents(streams, n_max=PACK_RECORDS_MAX, lb_max=PACK_RAW_MAX_B // LB),
        [reader.file for reader in readers],
        compress,
        check=check,
    )
    yield END_PACK


def build_packs(
    batches: Iterable[bytes], files: Sequence[ReadFile], compress: CompressOpt, *, check: Check = no_check
) -> Iterator[bytes]:
    """Yield one whole pack for each batch (of at most 127 sorted extents) whose data lies in `files`."""
    batcher = Batcher(files)
    for extents in batches:
        check()
        batcher.load(extents)
        yield batcher.pack(extents, compress)[0]


def newest_uuid(readers: Sequence[WdiffReader]) -> bytes:
    """Return the uuid of the newest wdiff that has one; files merged by the old tools have none."""
    for reader in reversed(readers):
        if reader.header.uuid != NIL_UUID:
            return reader.header.uuid
    return NIL_UUID


def verify(
    reader: WdiffReader, *, decode: bool = True, size_lb: int | None = None, check: Check = no_check
) -> int:
    """Verify every record of a wdiff and the checksum of all data in use; return the number of records.

    With `decode`, data is decompressed too. With `size_lb`, a record that ends beyond it is refused. Images of an
    indexed wdiff that no record uses are not looked at. Raises CorruptData.
    """
    batcher = Batcher([reader.file])
    count = 0
    for extents in merge_extents([reader.extents()], n_max=VERIFY_MAX, lb_max=VERIFY_MAX_B // LB, join=False):
        check()
        if size_lb is not None:
            check_inside(extents, size_lb, [reader.file])
        batcher.load(extents)
        if decode:
            batcher.decode_all(extents)
        count += len(extents) // EXTENT_B
    return count


def check_inside(extents: bytes, size_lb: int, files: Sequence[ReadFile]) -> None:
    """Raise CorruptData if the last of these sorted extents ends beyond a volume of `size_lb` blocks."""
    address_lb, data_b, blocks_lb, _, _, _, _, source, _, _ = EXTENT.unpack_from(extents, len(extents) - EXTENT_B)
    if address_lb + blocks_lb > size_lb:
        raise corrupt(
            "a record ends beyond the end of the volume",
            files[source].path,
            data_b,
            address_lb=address_lb,
            blocks_lb=blocks_lb,
            size_lb=size_lb,
        )
