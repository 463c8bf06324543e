"""The durable record of a volume at an archive: what `volume.json` holds (docs/archive.md, "Files").

One replacement of this file is one step of the volume: a finished full backup changes state, base, uuids and size
at once. Everything that files tell by themselves (which wdiffs and restored images there are) is not in it.
"""

from __future__ import annotations

import msgspec

from walbd.archive.states import State
from walbd.format.meta import NO_BASE, BaseState, Diff
from walbd.format.policy import Policy
from walbd.ids import NIL_UUID
from walbd.protocol.maintenance import Gap, Hold, ReplicaPosition


class Pending(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes true when a wdiff gets its name (archive/pending.py)."""

    diff: Diff
    uuid: str
    gaps: tuple[Gap, ...]

    def is_true(self, record: VolumeRecord) -> bool:
        """Tell whether a record says so anyway, so that the name alone is enough."""
        return self.uuid == record.uuid and self.gaps == record.gaps

    def applied(self, record: VolumeRecord) -> VolumeRecord:
        """Return the record as it is with the wdiff."""
        return msgspec.structs.replace(record, uuid=self.uuid, gaps=self.gaps, pending=None)


class FullProgress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A full replication that did not end: what the image is a part of. It goes on if all of it is equal."""

    archive_uuid: str
    uuid: str
    base: BaseState
    size_lb: int
    offset_b: int = 0  # durable before this [byte]


class VolumeRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What must survive a restart and no other file says."""

    state: State  # a steady one: SyncReady, Archived or Stopped
    size_lb: int = 0  # of the base image, once there is one to use
    base: BaseState = NO_BASE  # what the base image is
    base_uuid: str = ""  # log history that its generation belongs to; "": not known
    uuid: str = NIL_UUID.hex()  # of the log history that feeds the volume
    archive_uuid: str = NIL_UUID.hex()  # of the lineage of images: equal at replicas
    colds: dict[str, int] = {}  # time of each cold image [unix s] by its gid
    began: dict[str, int] = {}  # when an action last began [unix s], by name
    verified: int = 0  # when the last scrub that found no damage began [unix s]
    gaps: tuple[Gap, ...] = ()  # intervals without restore points, oldest first; only the last may be open
    holds: tuple[Hold, ...] = ()  # by generation
    replicas: tuple[ReplicaPosition, ...] = ()  # destinations of replications, by node
    policy: Policy | None = None  # None: that of the archive's settings
    pending: Pending | None = None  # in Archived only
    full_progress: FullProgress | None = None  # in SyncReady only: anything else that touches the image clears it
