"""Opening a device: locks, the superblock, redo, and whether the log has overflowed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

from walbd.daemon.logs import error_fields
from walbd.errors import DiskFailed, HistoryBroken, Refused, WalbError
from walbd.format.files import aligned_buffer
from walbd.format.ring import Ring
from walbd.format.superblock import SUPERBLOCK_OFFSET_B, Superblock
from walbd.fs import File, FileSystem, failpoints, physical_block_size
from walbd.storage.device.redo import redo
from walbd.storage.device.superblocks import open_superblock

log = structlog.get_logger()

RING_MIN_PB: Final = 16

FP_BEFORE_REDO = failpoints.register("device.start.before_redo", "what the last run left; nothing is changed")


@dataclass(frozen=True, slots=True)
class OpenedDevice:
    """Both files, open and locked, and the log redone: nothing is pending."""

    ldev: File
    ddev: File
    superblock: Superblock
    overflow: bool


def open_files(fs: FileSystem, ldev_path: Path, ddev_path: Path) -> tuple[File, File]:
    """Open both devices for this process alone. Raises Busy, NotFound, DiskFailed."""
    if ldev_path.resolve() == ddev_path.resolve():
        raise Refused("the log device and the data device are the same", path=str(ldev_path))
    ldev = fs.open(ldev_path, write=True, lock=True)
    try:
        return ldev, fs.open(ddev_path, write=True, lock=True)
    except WalbError:
        ldev.close()
        raise


def open_device(
    fs: FileSystem, ldev_path: Path, ddev_path: Path, *, expect_lsid: int | None = None
) -> OpenedDevice:
    """Open a device and redo its log. Blocking: for a thread.

    With `expect_lsid`, the log must reach at least there: a consumer has taken what is below. If it does not, the
    disk has lost what it had promised to keep; raises HistoryBroken. Raises CorruptData, Busy, Refused,
    DiskFailed.
    """
    ldev, ddev = open_files(fs, ldev_path, ddev_path)
    try:
        return _open(ldev, ddev, expect_lsid)
    except BaseException:
        ldev.close()
        ddev.close()
        raise


def _open(ldev: File, ddev: File, expect_lsid: int | None) -> OpenedDevice:
    found = open_superblock(ldev, device_pbs=_pbs_of(ldev))
    superblock = found.superblock
    if found.problem is not None:
        log.warning("device.superblock_damaged", using="superblock 1", **error_fields(found.problem))
    if superblock.ring_size_pb < RING_MIN_PB:
        raise Refused(
            "the ring of the log device is too small",
            hint=f"{RING_MIN_PB} blocks is the least; sensible is some GiB",
            ring_pb=superblock.ring_size_pb,
        )
    _check_writable(ldev, superblock)
    failpoints.hit(FP_BEFORE_REDO)
    result = redo(ldev, ddev, superblock)
    superblock = result.superblock
    log.info(
        "device.redone",
        begin_lsid=result.begin_lsid,
        end_lsid=result.end.lsid,
        packs=result.n_packs,
        records=result.n_records,
        forgotten=len(result.forgotten),
        end=result.end.reason,
    )
    if expect_lsid is not None and result.end.lsid < expect_lsid:
        raise HistoryBroken(
            "the log ends before what was already taken from it",
            hint="the disk lost flushed writes: check it, then reset the log and resynchronise the volume",
            end_lsid=result.end.lsid,
            expected_lsid=expect_lsid,
        )
    return OpenedDevice(ldev, ddev, superblock, _has_overflowed(ldev, superblock))


def _pbs_of(file: File) -> int | None:
    """Physical block size of a block device; None for files."""
    return physical_block_size(file) if file.fileno() >= 0 else None


def _check_writable(ldev: File, superblock: Superblock) -> None:
    """Write superblock 0 as it is and read it back: a log device that does not take writes shows now."""
    block = aligned_buffer(superblock.pbs)
    block[:] = superblock.pack()
    ldev.pwrite(block, SUPERBLOCK_OFFSET_B)
    ldev.sync()
    if ldev.pread(superblock.pbs, SUPERBLOCK_OFFSET_B) != bytes(block):
        raise DiskFailed("the log device does not keep what is written to it", path=str(ldev.path))


def _has_overflowed(ldev: File, superblock: Superblock) -> bool:
    """Say whether log that consumers still need was overwritten; the flag itself is not stored."""
    oldest, latest = superblock.oldest_lsid, superblock.written_lsid
    if latest - oldest > superblock.ring_size_pb:
        return True
    return latest > oldest and not Ring(ldev, superblock).has_pack(oldest)
