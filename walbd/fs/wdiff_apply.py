"""Applying wdiffs to an image or device.

All wdiffs are merged on the way, so each block is written at most once, in ascending order and in large pieces.
Applying again after a crash gives the same image. Source: docs/formats.md, "wdiff: applying".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, Protocol

from walbd.ext.buffers import Buf
from walbd.ext.wdiff import plan_runs
from walbd.format.extents import EXTENT_B, Check, last_end_lb, merge_extents, no_check
from walbd.format.wdiff_batch import Batcher
from walbd.format.wdiff_merge import check_inside
from walbd.format.wdiff_read import WdiffReader
from walbd.fs.disk import OsFile
from walbd.units import LB, MIB

BATCH_MAX: Final = 1024  # extents handled at a time
BATCH_MAX_B: Final = 2 * MIB  # and their data: what the second-level cache holds
ZERO_MIN_LB: Final = 32  # ranges of zeros from this size on are given back to the disk, shorter ones written

_PIECE: Final = struct.Struct("<QQQ")


class Image(Protocol):
    """The part of a File that applying needs."""

    path: Path

    def pwrite(self, data: Buf, offset_b: int) -> None: ...

    def zero(self, offset_b: int, size_b: int) -> None: ...

    def size(self) -> int: ...


def apply(
    readers: Sequence[WdiffReader],
    image: Image,
    *,
    discard: Literal["zero", "ignore"] = "zero",
    size_lb: int | None = None,
    check: Check = no_check,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Write what wdiffs hold, oldest first, to an image; return how many records were applied.

    Discarded ranges become zeros, or stay as they are with `ignore`. `progress` is told up to which block the
    image is done. Raises CorruptData when a wdiff is damaged, or when a record ends beyond `size_lb` blocks (by
    default the size of the image): what lies before it in the image may have been written by then, nothing behind
    it. Verify the wdiffs first (format.wdiff_merge.verify) where that is not wanted. The caller syncs.
    """
    limit_lb = image.size() // LB if size_lb is None else size_lb
    files = [reader.file for reader in readers]
    batcher = Batcher(files)
    streams = [reader.extents(i) for i, reader in enumerate(readers)]
    count = 0
    for extents in merge_extents(streams, n_max=BATCH_MAX, lb_max=BATCH_MAX_B // LB):
        check()
        check_inside(extents, limit_lb, files)
        targets, runs, zeros, fills, size_b = plan_runs(extents, discard == "ignore", ZERO_MIN_LB)
        batcher.load(extents)
        raw = batcher.raw(batcher.plan_decode(extents, targets, size_b))
        batcher.decode(raw, fills)
        _write(image, raw, runs)
        for offset_b, zero_b, _ in _PIECE.iter_unpack(zeros):
            image.zero(offset_b, zero_b)
        count += len(extents) // EXTENT_B
        if progress is not None:
            progress(last_end_lb(extents))
    return count


def _write(image: Image, raw: memoryview, runs: bytes) -> None:
    if isinstance(image, OsFile):
        image.pwrite_many(runs, raw)
        return
    for offset_b, size_b, at in _PIECE.iter_unpack(runs):
        image.pwrite(raw[at : at + size_b], offset_b)
