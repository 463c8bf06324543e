"""What the offline tools do with a log device that no process serves: format, extract, check.

Source: docs/formats.md, "Log device"; docs/device.md, "Format" and "The checker".
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from walbd.errors import CorruptData, Refused, UsageError, WlogOverflow
from walbd.ext.logpack import Stop
from walbd.format.logscan import LogScanner
from walbd.format.ring import LogEnd, Ring, find_end, log_end, refuse_contradictions
from walbd.format.superblock import (
    NAME_SIZE_B,
    Superblock,
    read_superblock,
    read_superblock1,
    ring_size_pb,
)
from walbd.format.wlog import WlogHeader, WlogWriter
from walbd.fs import File, FileSystem, physical_block_size
from walbd.ids import INVALID_LSID, Lsid, new_uuid
from walbd.storage.device.superblocks import OpenedSuperblock, open_superblock, write_superblocks
from walbd.units import LB

FORMAT_PBS: Final = (512, 4096)
RING_MIN_PB: Final = 2  # a header and one PB of data
CHAIN_HINT: Final = "`walbd ldev check` tells more; if log is lost, the volume needs a hash or full backup"


@contextmanager
def open_ldev(fs: FileSystem, path: Path, *, write: bool = False) -> Iterator[tuple[File, OpenedSuperblock]]:
    """Open a log device and find its superblock; for writing, nobody else may have it open (Busy)."""
    with fs.open(path, write=write, lock=write) as file:
        yield file, open_superblock(file, device_pbs=physical_block_size(file))


def format_ldev(
    ldev: File, ddev: File, *, pbs: int | None, name: str, force: bool, rng: random.Random
) -> Superblock:
    """Make `ldev` the empty log device of `ddev`; durable on return. Returns what was written.

    PBs are of the size that the devices report (both the same), or 512 bytes for plain files unless `pbs` says
    4096. The uuid and the salt are drawn anew: nothing that stands in the ring can pass for log. Raises Refused
    when there is a log device already and not `force`, UsageError when sizes do not fit.
    """
    reported = {size for size in map(physical_block_size, (ldev, ddev)) if size is not None}
    if pbs is not None:
        reported.add(pbs)
    if len(reported) > 1:
        raise UsageError(
            "the physical block sizes do not agree",
            hint="log device, data device and --pbs must be the same",
            sizes=sorted(reported),
        )
    chosen = reported.pop() if reported else 512
    if chosen not in FORMAT_PBS:
        raise UsageError("only physical blocks of 512 and 4096 bytes are supported", pbs=chosen)
    if len(name.encode()) >= NAME_SIZE_B or "\0" in name:
        raise UsageError("the name is longer than 31 bytes", name=name)
    ring_pb = ring_size_pb(ldev.size(), chosen)
    if ring_pb < RING_MIN_PB:
        raise UsageError("the log device is too small", path=str(ldev.path), size_b=ldev.size())
    old = _superblock_or_none(ldev)
    if old is not None and not force:
        raise Refused(
            "this is a log device already, and may hold writes that are nowhere else",
            hint="`walbd ldev redo` saves them; --force formats anyway",
            path=str(ldev.path),
            uuid=old.uuid.hex(),
        )
    superblock = Superblock(
        pbs=chosen,
        salt=_new_salt(rng, old.salt if old else 0),
        uuid=new_uuid(rng),
        name=name,
        ring_size_pb=ring_pb,
        oldest_lsid=Lsid(0),
        written_lsid=Lsid(0),
        device_size_lb=ddev.size() // LB,
    )
    write_superblocks(ldev, superblock)
    return superblock


def _superblock_or_none(ldev: File) -> Superblock | None:
    try:
        return read_superblock(ldev)
    except CorruptData:
        return None


def _new_salt(rng: random.Random, former: int) -> int:
    """Draw a salt that is neither 0 nor the former one, under which old headers would still verify."""
    while (salt := rng.getrandbits(32)) in (0, former):
        pass
    return salt


def extract_wlog(
    ldev: File, superblock: Superblock, out: File, *, begin: int | None = None, end: int | None = None
) -> Lsid:
    """Copy the log [begin, end) of a log device to `out`, an empty file, as a wlog; return the lsid reached.

    From `oldest_lsid` to the end of the log by default; both ends must be pack boundaries. A torn last pack is
    copied as far as it is good. What is in `out` after an error is of no use. Raises WlogOverflow when the
    beginning was overwritten, Refused when `begin` or `end` is no boundary or lies beyond the log, CorruptData.
    """
    ring = Ring(ldev, superblock)
    first = superblock.oldest_lsid if begin is None else begin
    last = INVALID_LSID if end is None else end
    if not 0 <= first < last <= INVALID_LSID:
        raise UsageError("not a range of lsids", begin=first, end=end)
    header = WlogHeader(
        pbs=superblock.pbs,
        salt=superblock.salt,
        uuid=superblock.uuid,
        begin_lsid=Lsid(first),
        end_lsid=Lsid(last),
    )
    writer = WlogWriter(out, header)
    scanner = ring.scan(first, lsid_end=last, collect=False, keep_torn=True)
    for batch in scanner:
        writer.append(batch.data)
    refuse_contradictions(ring, scanner, first)
    if scanner.torn:
        writer.cut(scanner.torn.lsid, scanner.torn.header, scanner.torn.lsid_end)
    assert writer.lsid == scanner.lsid
    _check_extracted(ring, scanner, first, end)
    out.truncate(writer.finish())
    return writer.lsid


def _check_extracted(ring: Ring, scanner: LogScanner, begin: int, end: int | None) -> None:
    """Refuse a range that is not what was asked for, or that breaks off where the log cannot have ended."""
    sb, path, reached = ring.superblock, str(ring.file.path), scanner.lsid
    if reached == begin and begin not in (sb.oldest_lsid, sb.written_lsid):
        raise Refused("there is no logpack at this lsid", hint=_BOUNDARY_HINT, path=path, lsid=begin)
    if reached == begin == sb.oldest_lsid < sb.written_lsid:
        raise WlogOverflow("the oldest log was overwritten", hint=CHAIN_HINT, path=path, oldest_lsid=begin)
    if scanner.stop is not Stop.MORE and reached < (sb.written_lsid if end is None else min(end, sb.written_lsid)):
        raise CorruptData(
            f"the log breaks off below its written lsid: {log_end(scanner).reason}",
            hint=CHAIN_HINT,
            path=path,
            offset=sb.offset_b(reached),
            lsid=reached,
            written_lsid=sb.written_lsid,
        )
    if end is not None and reached != end:
        inside = scanner.stop is Stop.MORE
        raise Refused(
            "this lsid is not the beginning of a logpack" if inside else "the log ends before this lsid",
            hint=_BOUNDARY_HINT,
            path=path,
            lsid=end,
            reached_lsid=reached,
        )


_BOUNDARY_HINT: Final = "lsids of logpacks are those that `walbd wlog show` prints for packs"


@dataclass(slots=True)
class CheckReport:
    """What the checker found. `problems` make the device unfit or the log incomplete; `notes` do not."""

    superblock: Superblock
    end: LogEnd | None = None
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def check_ldev(ldev: File, opened: OpenedSuperblock) -> CheckReport:
    """Check a log device without changing it: superblocks, ring geometry, the chain of packs, leftovers.

    Raises only DiskFailed and the like; damage goes into the report.
    """
    sb = opened.superblock
    report = CheckReport(sb)
    if opened.problem is not None:
        report.problems.append(f"superblock 0: {opened.problem}; superblock 1 is used instead")
    else:
        _check_copy(ldev, sb, report)
    spare_pb = ldev.size() // sb.pbs - sb.ring_offset_pb - sb.ring_size_pb
    if spare_pb > 0:
        report.notes.append(f"{spare_pb} physical blocks behind the ring are not used; a log reset takes them in")
    _check_chain(ldev, sb, report)
    return report


def _check_copy(ldev: File, sb: Superblock, report: CheckReport) -> None:
    try:
        copy = read_superblock1(ldev, uuid=sb.uuid, device_pbs=sb.pbs)
    except CorruptData as exc:
        report.notes.append(f"superblock 1 is missing or of another log: {exc.message}")
        return
    if copy != sb:
        report.notes.append(f"superblock 1 is older: written lsid {copy.written_lsid}")


def _check_chain(ldev: File, sb: Superblock, report: CheckReport) -> None:
    overflow = sb.written_lsid - sb.oldest_lsid > sb.ring_size_pb
    begin = sb.written_lsid if overflow else sb.oldest_lsid
    if overflow:
        report.problems.append("the ring has overflowed: log that was not sent is lost; a resync is due")
    try:
        end = report.end = find_end(ldev, sb, begin)
    except CorruptData as exc:
        report.problems.append(str(exc))
        return
    if end.lsid < sb.written_lsid:
        report.problems.append(
            f"the log breaks off at lsid {end.lsid}, below written lsid {sb.written_lsid}: {end.reason} "
            f"(offset={sb.offset_b(end.lsid)})"
        )
        return
    if end.torn:
        report.notes.append(
            f"the last logpack, lsid {end.torn.lsid}, is torn at record {end.torn.record}; redo cuts it there"
        )
    if end.lsid > sb.written_lsid:
        report.notes.append(f"redo is needed: lsid {sb.written_lsid} to {end.lsid}")
    ring = Ring(ldev, sb)
    future = [place for place, found in ring.headers(end.lsid, begin + sb.ring_size_pb) if place == found]
    if end.torn and end.torn.record == 0:
        future = [lsid for lsid in future if lsid != end.lsid]
    if future:
        report.notes.append(
            f"{len(future)} logpacks of a log that is no more stand above the end, the first at lsid "
            f"{future[0]}; redo removes them"
        )
