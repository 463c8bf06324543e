"""Loading a volume at start-up, and repairing what a crash left (docs/archive.md, "Start").

First everything is read and checked; a volume that does not make sense is reported (the error says why) before
anything on its disk is touched. Then leftovers are removed: unfinished files, diffs that the base already holds
or that a merged one replaces, unfinished restores.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from walbd.archive.diffs import (
    ASIDE_DUPLICATE,
    ASIDE_GAP,
    find_diffs,
    put_aside,
    remove_all_diffs,
    remove_diffs,
)
from walbd.archive.images.store import ImageStore
from walbd.archive.record import VolumeRecord
from walbd.archive.states import State
from walbd.daemon.record import RECORD_NAME, load_record, save_record
from walbd.errors import CorruptData, NotFound
from walbd.format.meta import Diff, DiffManager, diff_name
from walbd.format.wdiff_read import open_wdiff
from walbd.fs import TMP_PREFIX, FileSystem, failpoints
from walbd.fs.disk import disk_errors
from walbd.units import LB, MIB

FP_BEFORE_GC: Final = failpoints.register(
    "archive.start.before_gc", "everything is read and nothing is repaired: the next start does it"
)
_GID: Final = re.compile(r"0|[1-9][0-9]{0,19}")
_COMPARE_B: Final = 1 * MIB
STORED_STATES: Final = frozenset({State.SYNC_READY, State.ARCHIVED, State.STOPPED})


@dataclass
class Loaded:
    """A volume as its files tell."""

    record: VolumeRecord
    diffs: DiffManager = field(default_factory=DiffManager)
    restored: set[int] = field(default_factory=set)
    remarks: list[str] = field(default_factory=list)  # for the operator: what was put aside, and why


def is_leftover(fs: FileSystem, directory: Path) -> bool:
    """Tell whether a directory is what an init-vol that did not end leaves: nothing but unfinished files."""
    return all(name.startswith(TMP_PREFIX) for name in fs.list_names(directory))


def load_volume(fs: FileSystem, images: ImageStore, directory: Path) -> Loaded:
    """Load and repair one volume. Raises WalbError, with nothing changed, when it is broken."""
    name = directory.name
    record = load_record(fs, directory / RECORD_NAME, VolumeRecord)
    check_record(record, directory)
    if record.state is State.SYNC_READY:
        return _load_empty(fs, images, directory, record)
    found = find_diffs(fs, directory)
    settled = _settle_pending(fs, directory, _check_image(images, name, record), found.diffs)
    diffs, duplicates = DiffManager.load(found.diffs)
    doubled = [diff for diff in duplicates if _is_second_name(fs, directory, diff, diffs)]
    duplicates = [diff for diff in duplicates if diff_name(diff) not in map(diff_name, doubled)]
    useless = diffs.gc(record.base)  # raises HistoryBroken
    newest = diffs.latest(record.base).begin
    gap = [diff for diff in useless if diff.begin.gid_b > newest.gid_b]
    passed = [diff for diff in useless if diff.begin.gid_b <= newest.gid_b]
    with disk_errors(directory, "repair the volume"):
        failpoints.hit(FP_BEFORE_GC)
    remove_diffs(fs, directory, doubled)
    put_aside(fs, directory, duplicates, ASIDE_DUPLICATE)
    put_aside(fs, directory, gap, ASIDE_GAP)
    remove_diffs(fs, directory, passed)
    _remove_unfinished(fs, images, directory, found.unfinished)
    repaired = _check_colds(images, name, settled)
    if repaired is not record:
        save_record(fs, directory / RECORD_NAME, repaired)
    return Loaded(
        repaired,
        diffs,
        set(images.restored(name)),
        _remarks(duplicates, gap, found.unreadable, found.aside),
    )


def check_record(record: VolumeRecord, directory: Path) -> None:
    """Raise CorruptData unless the fields fit together."""
    holds = record.state is not State.SYNC_READY
    uuids = [record.uuid, record.archive_uuid]
    problem = ""
    if record.state not in STORED_STATES:
        problem = "no such state is ever stored"
    elif not all(map(_is_uuid, uuids)):
        problem = "a uuid is not 32 hexadecimal digits"
    elif record.base_uuid and not _is_uuid(record.base_uuid):
        problem = "the uuid of the base is not 32 hexadecimal digits"
    elif any(_GID.fullmatch(gid) is None for gid in record.colds):
        problem = "a cold image has no generation"
    elif record.size_lb < 0 or (holds and record.size_lb == 0):
        problem = "impossible size"
    elif holds and record.base.begin.is_none:
        problem = "there is no base, but the state says so"
    if problem:
        raise CorruptData(
            "the record of the volume contradicts itself",
            hint="restore the file from a backup, or clear the volume and initialise it again",
            path=str(directory / RECORD_NAME),
            offset=0,
            reason=problem,
        )


def _is_uuid(text: str) -> bool:
    return len(text) == 32 and not set(text) - set("0123456789abcdef")


def _load_empty(fs: FileSystem, images: ImageStore, directory: Path, record: VolumeRecord) -> Loaded:
    """Finish a reset or a full backup that did not end: no diffs and no restored images belong to SyncReady."""
    found = find_diffs(fs, directory)
    with disk_errors(directory, "repair the volume"):
        failpoints.hit(FP_BEFORE_GC)
    remove_all_diffs(fs, directory)
    _remove_unfinished(fs, images, directory, found.unfinished)
    remove_copies(images, directory.name)
    return Loaded(record)


def remove_copies(images: ImageStore, volume: str) -> None:
    """Remove all restored and cold images of a volume."""
    for gid in images.restored(volume):
        images.remove_restored(volume, gid)
    for gid in images.colds(volume):
        images.remove_cold(volume, gid)


def _check_image(images: ImageStore, volume: str, record: VolumeRecord) -> VolumeRecord:
    """Compare the base image with the record; an image that was grown just before a crash is taken as it is."""
    size_b = images.base_size(volume)
    if size_b is None:
        raise NotFound(
            "the base image is missing",
            hint="put the image back and restart, or clear the volume and back it up again",
            volume=volume,
        )
    if size_b < record.size_lb * LB:
        raise CorruptData(
            "the base image is smaller than the record says",
            hint="put the right image back and restart, or clear the volume and back it up again",
            source=f"base image of {volume}",
            offset=size_b,
            size_b=size_b,
            expected_b=record.size_lb * LB,
        )
    size_lb = size_b // LB
    return record if size_lb == record.size_lb else msgspec.structs.replace(record, size_lb=size_lb)


def _is_second_name(fs: FileSystem, directory: Path, diff: Diff, diffs: DiffManager) -> bool:
    """Tell whether a crash came while this file was getting other flags, so that it has another name too."""
    other = diffs.find(diff.begin, diff.end)
    if other is None or (other.timestamp, other.comp, other.size_b) != (diff.timestamp, diff.comp, diff.size_b):
        return False
    with fs.open(directory / diff_name(diff)) as first, fs.open(directory / diff_name(other)) as second:
        return all(
            first.pread(_COMPARE_B, at) == second.pread(_COMPARE_B, at) for at in range(0, diff.size_b, _COMPARE_B)
        )


def _check_colds(images: ImageStore, volume: str, record: VolumeRecord) -> VolumeRecord:
    """Remove cold images that are not recorded, and forget those that are gone."""
    there = [str(gid) for gid in images.colds(volume)]
    for gid in there:
        if gid not in record.colds:
            images.remove_cold(volume, int(gid))
    colds = {gid: time for gid, time in record.colds.items() if gid in there}
    return record if colds == record.colds else msgspec.structs.replace(record, colds=colds)


def _settle_pending(fs: FileSystem, directory: Path, record: VolumeRecord, diffs: Iterable[Diff]) -> VolumeRecord:
    """Return the record as it is now that the diffs of the directory are known. Raises CorruptData."""
    pending = record.pending
    if pending is None:
        return record
    for diff in diffs:
        if diff == pending.diff:
            with fs.open(directory / diff_name(diff)) as file:
                if open_wdiff(file).header.uuid.hex() == pending.uuid:
                    return pending.applied(record)
    return msgspec.structs.replace(record, pending=None)


def _remove_unfinished(fs: FileSystem, images: ImageStore, directory: Path, names: list[str]) -> None:
    for name in names:
        fs.unlink(directory / name)
    images.remove_unfinished(directory.name)


def _remarks(duplicates: list[Diff], gap: list[Diff], unreadable: list[str], aside: list[str]) -> list[str]:
    remarks = []
    if duplicates:
        remarks.append(f"{len(duplicates)} wdiffs put aside: another file holds the same range")
    if gap:
        remarks.append(
            f"{len(gap)} wdiffs put aside: a diff before {gap[0]} is missing; "
            "a hash or full backup continues the volume"
        )
    if unreadable:
        remarks.append(f"{len(unreadable)} files end in .wdiff but are not named like one, as {unreadable[0]}")
    if aside:
        remarks.append(f"{len(aside)} files were put aside at an earlier start, as {aside[0]}")
    return remarks
