"""What can be asked, and forgotten, about destinations of replications (docs/archive.md, "Replication")."""

from __future__ import annotations

from typing import Any

from walbd.archive.queries import known
from walbd.archive.states import Command
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection
from walbd.daemon.server import Handler
from walbd.errors import Busy, NotFound
from walbd.protocol import control as c
from walbd.protocol.base import Ok
from walbd.protocol.codec import Request
from walbd.protocol.maintenance import ForgetReplica, GetReplicaPositions, ReplicaPositions


class ReplicaQueries:
    """The handlers of the questions about destinations."""

    def __init__(self, volumes: dict[str, Volume]) -> None:
        self._volumes = volumes

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            GetReplicaPositions: self._positions,
            ForgetReplica: self._forget,
            c.GetTsDelta: self._ts_delta,
        }

    async def _positions(self, _conn: Connection, request: GetReplicaPositions) -> ReplicaPositions:
        volume = known(self._volumes, request.volume, Command.GET_ACTIONS)
        return ReplicaPositions(rows=list(volume.record.replicas))

    async def _forget(self, _conn: Connection, request: ForgetReplica) -> Ok:
        volume = known(self._volumes, request.volume, Command.GET_ACTIONS)
        row = next((row for row in volume.record.replicas if row.node == request.node), None)
        if row is None:
            raise NotFound(
                "no replication to this node is known",
                hint="known: " + (", ".join(row.node for row in volume.record.replicas) or "none"),
                node=request.node,
            )
        if row.address in volume.replicating:
            raise Busy("a replication to this node is running", hint="wait until it has ended", node=request.node)
        await volume.update(
            lambda record: {"replicas": tuple(row for row in record.replicas if row.node != request.node)}
        )
        return Ok()

    async def _ts_delta(self, _conn: Connection, _request: c.GetTsDelta) -> c.TsDeltas:
        rows = []
        for name, volume in sorted(self._volumes.items()):
            if not volume.is_active:
                continue
            latest = volume.latest
            for replica in volume.record.replicas:
                rows.append(
                    c.TsDelta(
                        volume=name,
                        dest=replica.node,
                        gid=latest.begin.gid_b,
                        timestamp=latest.timestamp,
                        dest_gid=replica.gid,
                        dest_timestamp=replica.timestamp,
                        delta_s=latest.timestamp - replica.timestamp,
                    )
                )
        return c.TsDeltas(rows=rows)
