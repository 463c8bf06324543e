"""The two superblocks on disk: which one to believe, and how to replace them.

The kernel driver knows superblock 0 only. We keep a second copy behind it, written after the first is durable,
so that at any moment one of the two is whole. The copy is used only when superblock 0 fails its checks, and
then only if the log itself shows that the copy is recent enough.

Source: docs/device.md, "The second superblock".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from walbd.errors import CorruptData
from walbd.format.files import aligned_buffer
from walbd.format.ring import Ring, find_end
from walbd.format.superblock import (
    SUPERBLOCK_OFFSET_B,
    Superblock,
    damaged_uuid,
    read_superblock,
    read_superblock1,
)
from walbd.fs import File, failpoints

FP_BEFORE_FIRST: Final = failpoints.register(
    "device.superblock.before_first", "both superblocks are the old ones; the log they point at is all there"
)
FP_BEFORE_FIRST_SYNC: Final = failpoints.register(
    "device.superblock.before_first_sync", "superblock 0 is old, new or torn; superblock 1 is old"
)
FP_BEFORE_SECOND: Final = failpoints.register(
    "device.superblock.before_second", "superblock 0 is new, superblock 1 is old"
)
FP_BEFORE_SECOND_SYNC: Final = failpoints.register(
    "device.superblock.before_second_sync", "superblock 0 is new, superblock 1 is old, new or torn"
)


@dataclass(frozen=True, slots=True)
class OpenedSuperblock:
    """The superblock to work with."""

    superblock: Superblock
    problem: CorruptData | None  # what was wrong with superblock 0 if this is the copy; to be logged


def open_superblock(file: File, *, device_pbs: int | None = None, uuid: bytes | None = None) -> OpenedSuperblock:
    """Read superblock 0 or, if that is damaged, the second copy; changes nothing.

    `uuid` is that of the log sequence where the caller knows it; otherwise what is left of superblock 0 has
    to agree with the copy. The copy may be older than superblock 0 was. That is harmless as long as the log from
    its `written_lsid` on is still there: redo then goes the longer way. One good pack there proves it, as packs
    are written in order and the ring overwrites the oldest first. Without one, the copy counts only if no block
    of the ring claims to be log from there on.
    Raises CorruptData (about superblock 0) when neither can be used.
    """
    try:
        return OpenedSuperblock(read_superblock(file, device_pbs=device_pbs), None)
    except CorruptData as exc:
        problem = exc
    try:
        copy = read_superblock1(file, uuid=uuid or damaged_uuid(file), device_pbs=device_pbs)
        end = find_end(file, copy)
    except CorruptData as exc:
        raise problem from exc
    begin = copy.written_lsid
    if end.lsid == begin:
        later = Ring(file, copy).headers(begin, begin + copy.ring_size_pb)
        if any(found >= begin for _, found in later):
            raise problem
    return OpenedSuperblock(copy, problem)


def write_superblocks(file: File, superblock: Superblock) -> None:
    """Replace both superblocks, superblock 0 first; durable on return.

    What the new values promise (data below `written_lsid`) has to be durable before the call.
    """
    block = aligned_buffer(superblock.pbs)
    block[:] = superblock.pack()
    failpoints.hit(FP_BEFORE_FIRST)
    file.pwrite(block, SUPERBLOCK_OFFSET_B)
    failpoints.hit(FP_BEFORE_FIRST_SYNC)
    file.sync()
    failpoints.hit(FP_BEFORE_SECOND)
    file.pwrite(block, superblock.superblock1_offset_b)
    failpoints.hit(FP_BEFORE_SECOND_SYNC)
    # Before superblock 0 is next touched, the copy has to be durable; nothing else would see to that.
    file.sync()
