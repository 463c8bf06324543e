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
from walbd.daemon.tasks import Signal
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
        self._changed = Signal()
        self._hurried = False

    def follow(self, *, compare_now: bool) -> None:
        """Take over changed settings; with another archive its rows are asked for at once."""
        if compare_now:
            self.rows, self._hurried, self._failed = [], True, False
        self._changed.set()

    async def run(self) -> None:
        """Compare for ever."""
        loop = asyncio.get_running_loop()
        last = loop.time() - self._interval_s + min(FIRST_S, self._interval_s)
        while True:
            self._hurried = False
            while not self._hurried and (wait_s := last + self._interval_s - loop.time()) > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._changed.next()
                except TimeoutError:
                    pass
            last = loop.time()
            try:
                await self.compare()
                self._failed = False
            except WalbError as exc:
                if not self._failed:  # once, not every minute of an outage
                    log.warning("lag.not_compared", **error_fields(exc))
                self._failed = True

    @property
    def _interval_s(self) -> float:
        return self._shared.config.ts_delta_interval_s

    async def compare(self) -> None:
        """Ask the archive once. Raises WalbError, and then the last rows stay."""
        shared = self._shared
        targets = {v.name: v.record.newest for v in self._volumes() if v.machine.state is State.TARGET}
        if not targets:
            self.rows = []
            return
        archive = shared.config.archive_address()
        async with dial(shared.env, shared.me, archive) as conn:
            answer = await conn.call(GatherLatest(volumes=list(targets)))
            dest = conn.peer.node
        if [row.volume for row in answer.rows] != list(targets):
            raise RemoteProtocolError("the archive answered for other volumes than asked", peer=dest)
        if shared.config.archive_address() != archive:
            return  # that was another archive's answer
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
