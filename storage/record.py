"""What a storage daemon keeps of a volume: one record, BASE_DIR/VOL/volume.json, replaced as a whole.

A snapshot, a finished transfer and a change of state are one replacement each, so no crash leaves them in
disagreement. Source: docs/storage.md, "The record".
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Final

import msgspec

from walbd.daemon.record import RECORD_NAME, load_record, save_record
from walbd.errors import CorruptData, UsageError
from walbd.format.meta import NO_POINT, LogPoint, drop_delivered, reset_point
from walbd.fs import FileSystem
from walbd.ids import NIL_UUID, NO_GID, parse_uuid, uuid_text
from walbd.storage.states import State

BAD_HEADER_PREFIX: Final = "logpackheader-"  # blocks kept for analysis, one file for each lsid
STEADY: Final = frozenset({State.SYNC_READY, State.STOPPED, State.TARGET, State.STANDBY})


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The durable state of one volume."""

    state: State
    device: str
    uuid_hex: str = uuid_text(NIL_UUID)  # of the log that `done` and `queue` speak of; nil: none yet
    done: LogPoint = NO_POINT  # everything before it is safe at a proxy
    queue: tuple[LogPoint, ...] = ()  # snapshots not yet delivered, oldest first
    gid_past: int = 0  # greatest generation given out before the last reset of the log
    cut_lsid: int = 0  # where a partial stretch from `done` ended that a proxy may have; 0: none was sent

    @property
    def uuid(self) -> bytes:
        return bytes.fromhex(self.uuid_hex)

    @property
    def newest(self) -> LogPoint:
        """The newest snapshot, delivered or not."""
        return self.queue[-1] if self.queue else self.done

    @property
    def gid_greatest(self) -> int:
        """The greatest generation ever given out here: somebody may know it, so no other snapshot may get it."""
        return self.gid_past if self.newest.is_none else max(self.gid_past, self.newest.gid)

    def with_state(self, state: State) -> VolumeRecord:
        """Return the record with another state."""
        return msgspec.structs.replace(self, state=state)

    def after_delivery(self, done: LogPoint) -> VolumeRecord:
        """Return the record once everything up to `done` is safe at a proxy."""
        return msgspec.structs.replace(self, done=done, queue=drop_delivered(done, self.queue), cut_lsid=0)

    def with_cut(self, lsid: int) -> VolumeRecord:
        """Return the record that remembers where a partial stretch ends."""
        return msgspec.structs.replace(self, cut_lsid=lsid)

    def after_reset(self, uuid: bytes, gid: int, now: int) -> VolumeRecord:
        """Return the record of a new, empty log whose first diff begins at `gid`."""
        return msgspec.structs.replace(
            self,
            state=State.SYNC_READY,
            uuid_hex=uuid_text(uuid),
            done=reset_point(gid, now),
            queue=(),
            gid_past=self.gid_greatest,
            cut_lsid=0,
        )


def save(fs: FileSystem, directory: Path, record: VolumeRecord) -> None:
    """Replace the record durably. Blocks; raises DiskFailed."""
    save_record(fs, directory / RECORD_NAME, record)


def load(fs: FileSystem, directory: Path) -> VolumeRecord:
    """Read a record. Blocks; raises NotFound, or CorruptData when it is not what `save` writes."""
    path = directory / RECORD_NAME
    record = load_record(fs, path, VolumeRecord)
    problem = _problem(record)
    if problem:
        raise CorruptData(
            f"the record of the volume contradicts itself: {problem}",
            hint="restore the file from a backup, or clear the volume and initialise it again",
            path=str(path),
            offset=0,
        )
    return record


def _problem(record: VolumeRecord) -> str:
    if record.state not in STEADY:
        return f"state {record.state} is never on disk"
    if not record.device.startswith("/"):
        return "the device is no absolute path"
    try:
        uuid = parse_uuid(record.uuid_hex)
    except UsageError:
        return "the uuid is not 32 hexadecimal digits"
    if record.state in (State.STOPPED, State.TARGET) and (record.done.is_none or uuid == NIL_UUID):
        return "it has a history and no beginning of it"
    points = [record.done, *record.queue]
    for before, after in pairwise(points):
        if after.is_none or before.is_none or after.lsid < before.lsid or after.gid <= before.gid:
            return "its snapshots are not in order"
    if not 0 <= record.gid_past < NO_GID:
        return "its greatest generation is impossible"
    if record.cut_lsid and record.cut_lsid <= record.done.lsid:
        return "its transfer was cut before it began"
    return ""
