"""The directory of a volume at a storage: made and removed so that no crash leaves what cannot be told.

All functions block. Source: docs/storage.md, "The record".
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from walbd.daemon.record import RECORD_NAME
from walbd.errors import Refused
from walbd.fs import TMP_PREFIX, FileSystem, failpoints
from walbd.storage.record import BAD_HEADER_PREFIX, VolumeRecord, save
from walbd.storage.shared import hit

FP_INIT_AFTER_DIR: Final = failpoints.register(
    "storage.init.after_dir", "a directory without a record: removed at the next start"
)
FP_CLEAR_BEFORE_RECORD: Final = failpoints.register("storage.clear.before_record", "the volume as it was")
FP_CLEAR_AFTER_RECORD: Final = failpoints.register(
    "storage.clear.after_record", "a directory without a record: removed at the next start"
)


def create_directory(fs: FileSystem, directory: Path, record: VolumeRecord) -> None:
    """Make the directory of a new volume with its record, or nothing."""
    fs.make_dir(directory)
    try:
        hit(FP_INIT_AFTER_DIR, directory)
        save(fs, directory, record)
    except BaseException:
        fs.remove_tree(directory)
        raise


def remove_directory(fs: FileSystem, directory: Path) -> None:
    """Remove the record first: what is left of a directory without one is garbage.

    Raises Refused when there is something that is not ours.
    """
    foreign = [name for name in fs.list_names(directory) if not _is_ours(name) and name != RECORD_NAME]
    if foreign:
        raise Refused(
            "the directory holds files that no storage has written",
            hint="look at them, and move them away",
            path=str(directory),
            names=", ".join(foreign[:5]),
        )
    hit(FP_CLEAR_BEFORE_RECORD, directory)
    fs.unlink(directory / RECORD_NAME)
    fs.sync_dir(directory)
    hit(FP_CLEAR_AFTER_RECORD, directory)
    fs.remove_tree(directory)


def _is_ours(name: str) -> bool:
    """Say whether a storage wrote a file of this name beside the record."""
    return name.startswith((TMP_PREFIX, BAD_HEADER_PREFIX))


def remove_leftover(fs: FileSystem, directory: Path) -> bool:
    """Remove a directory that an init-vol began or a clear-vol did not finish; say whether it was one.

    In a volume's directory, remove unfinished files.
    """
    names = fs.list_names(directory)
    if RECORD_NAME not in names and all(map(_is_ours, names)):
        fs.remove_tree(directory)
        return True
    for name in names:
        if name.startswith(TMP_PREFIX):
            fs.unlink(directory / name)
    return False
