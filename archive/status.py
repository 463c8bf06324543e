"""What an archive says of itself (docs/archive.md, "Information")."""

from __future__ import annotations

from walbd.archive.replicas import hops
from walbd.archive.states import State
from walbd.archive.volume import Volume
from walbd.ids import NO_GID
from walbd.protocol.control import VolumeStatus
from walbd.protocol.transfer import LatestRow


def volume_status(name: str, volume: Volume | None) -> VolumeStatus:
    """Return the status of one volume; one that is not known is Clear."""
    if volume is None:
        return VolumeStatus(volume=name, state=str(State.CLEAR))
    if volume.error is not None:
        return VolumeStatus(volume=volume.name, state=volume.machine.shown, error=str(volume.error))
    points = volume.restorable(all_points=True)
    latest = volume.latest
    known = not latest.begin.is_none
    return VolumeStatus(
        volume=volume.name,
        state=volume.machine.shown,
        stopping=str(volume.machine.stopping or ""),
        actions={name: info.count for name, info in volume.machine.actions.items() if info.count},
        size_lb=volume.size_lb,
        uuid=volume.record.uuid,
        archive_uuid=volume.record.archive_uuid,
        latest_gid=latest.begin.gid_b if known else 0,
        latest_time=latest.timestamp if known else 0,
        oldest_time=points[0].timestamp if points else 0,
        received=volume.received,
        diffs=len(volume.diffs),
        diffs_b=volume.diffs.size_b,
        base="" if volume.base.begin.is_none else volume.base.describe(),
        restorable=len(points),
        restored=sorted(volume.restored),
        cold=sorted(map(int, volume.record.colds)),
        hops=hops(volume),
        verified=volume.record.verified,
        error="; ".join([*volume.remarks, *volume.damage]),
    )


def latest_row(name: str, volume: Volume | None) -> LatestRow:
    """Return the newest snapshot of a volume; none unless there is data."""
    if volume is None or not volume.is_holding:
        return LatestRow(volume=name, gid=NO_GID, timestamp=0)
    return LatestRow(volume=name, gid=volume.latest.begin.gid_b, timestamp=volume.latest.timestamp)
