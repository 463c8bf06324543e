"""How far the primary archive is behind: asked for all targets at once, now and then.

Source: docs/storage.md, "Lag".
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Final

import structlog

from walbd.daemon.conn import dial
from walbd.daemon.logs import error_fields
from walbd.errors import RemoteProtocolError, WalbError
from walbd.ids import NO_GID
from walbd.protocol.control import TsDelta
from walbd.protocol.transfer import GatherLatest
from walbd.storage.shared import Shared
from walbd.storage.states import State
from walbd.storage.volume import Volume

log = structlog.get_logger()

FIRST_S: Final = 5.0


class Lag:
    """The last comparison that succeeded."""

    def __init__(self, shared: Shared, volumes: Callable[[], Iterable[Volume]]) -> None:
        self.rows: list[TsDelta] = []
        self._shared = shared
        self._volumes = volumes
        self._failed = False

    async def run(self) -> None:
        """Compare for ever."""
        interval_s = self._shared.config.ts_delta_interval_s
        await asyncio.sleep(min(FIRST_S, interval_s))
        while True:
            try:
                await self.compare()
                self._failed = False
            except WalbError as exc:
                if not self._failed:  # once, not every minute of an outage
                    log.warning("lag.not_compared", **error_fields(exc))
                self._failed = True
            await asyncio.sleep(interval_s)

    async def compare(self) -> None:
        """Ask the archive once. Raises WalbError, and then the last rows stay."""
        shared = self._shared
        targets = {v.name: v.record.newest for v in self._volumes() if v.machine.state is State.TARGET}
        if not targets:
            self.rows = []
            return
        async with dial(shared.env, shared.me, shared.config.archive_address()) as conn:
            answer = await conn.call(GatherLatest(volumes=list(targets)))
            dest = conn.peer.node
        if [row.volume for row in answer.rows] != list(targets):
            raise RemoteProtocolError("the archive answered for other volumes than asked", peer=dest)
        self.rows = [
            TsDelta(
                volume=row.volume,
                dest=dest,
                gid=targets[row.volume].gid,
                timestamp=targets[row.volume].timestamp,
                dest_gid=row.gid,
                dest_timestamp=row.timestamp,
                delta_s=targets[row.volume].timestamp - row.timestamp,
            )
            for row in answer.rows
            if row.gid != NO_GID
        ]
