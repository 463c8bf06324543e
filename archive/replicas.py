"""Where the destinations of a volume's replications stand, as far as we know (docs/archive.md, "Replication").

A position is in the record: merges leave the diffs that a destination needs next, and a restart forgets none. It
is replaced after each round, and bears the error of the last attempt.
"""

from __future__ import annotations

from typing import Any

import msgspec
import structlog

from walbd.archive.record import VolumeRecord
from walbd.archive.volume import Volume
from walbd.daemon.logs import error_fields
from walbd.errors import WalbError
from walbd.protocol import control as c
from walbd.protocol.maintenance import ReplicaPosition

log = structlog.get_logger()

_ERROR_LEN_MAX = 1000


async def note_position(volume: Volume, node: str, address: str, gid: int, timestamp: int) -> None:
    """Remember durably where a destination stands; raises DiskFailed."""
    now = volume.place.env.clock.now()
    row = ReplicaPosition(node=node, address=address, gid=gid, timestamp=timestamp, seen=now)
    await volume.update(lambda record: _with_row(record, row))


async def note_failure(volume: Volume, address: str, error: WalbError) -> None:
    """Remember that a replication failed, if the destination at this address is known. Never raises."""
    row = next((row for row in volume.record.replicas if row.address == address), None)
    if row is None:
        return
    failed = msgspec.structs.replace(row, failures=row.failures + 1, error=str(error)[:_ERROR_LEN_MAX])
    try:
        await volume.update(lambda record: _with_row(record, failed))
    except WalbError as exc:
        log.warning("replica.not_noted", volume=volume.name, node=row.node, **error_fields(exc))


def _with_row(record: VolumeRecord, row: ReplicaPosition) -> dict[str, Any]:
    others = [other for other in record.replicas if other.node != row.node]
    return {"replicas": tuple(sorted([*others, row], key=lambda other: other.node))}


def hops(volume: Volume) -> list[c.HopStatus]:
    """Return what waits for each destination."""
    rows = []
    latest = volume.latest.begin.gid_b
    for replica in volume.record.replicas:
        waiting = [*volume.diffs.over(replica.gid), *volume.diffs.get_range(replica.gid + 1)]
        rows.append(
            c.HopStatus(
                dest=replica.node,
                address=replica.address,
                sending=replica.address in volume.replicating,
                diffs=len(waiting),
                size_b=sum(diff.size_b for diff in waiting),
                gid_b=replica.gid,
                gid_e=latest,
                oldest=min((diff.timestamp for diff in waiting), default=0),
                last_sent=replica.seen,
                error=bool(replica.error),
                error_text=replica.error,
            )
        )
    return rows
