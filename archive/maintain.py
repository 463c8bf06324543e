"""The requests with which operators work on the data of a volume (docs/archive.md, "Commands").

Reception, backups and replication are not here, nor are questions (archive/queries.py).
"""

from __future__ import annotations

from typing import Any

from walbd.archive import repair
from walbd.archive.colds import delete_cold
from walbd.archive.merge import plan_merge, run_merge
from walbd.archive.queries import known
from walbd.archive.resize import resize
from walbd.archive.scan import plan_hash, run_hash, send_scan
from walbd.archive.scrub import run_scrub
from walbd.archive.snapshots import change_snapshots
from walbd.archive.states import MERGE, SCAN, SCRUB, Command
from walbd.archive.volume import Volume
from walbd.archive.work import Starter, accepted
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.server import Handler
from walbd.daemon.tasks import uninterrupted
from walbd.errors import UsageError
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import JobAccepted, Ok
from walbd.protocol.codec import Request


class Maintenance:
    """The handlers; `starter` starts what changes data, `scanner` what only reads images."""

    def __init__(self, volumes: dict[str, Volume], starter: Starter, scanner: Starter) -> None:
        self._volumes = volumes
        self._starter = starter
        self._scanner = scanner

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            c.Resize: self._resize,
            m.Merge: self._merge,
            m.EnableSnapshot: self._enable_snapshot,
            m.DisableSnapshot: self._disable_snapshot,
            m.DelCold: self._del_cold,
            m.BlockHash: self._block_hash,
            m.VirtFullScan: self._virt_full_scan,
            m.Scrub: self._scrub,
            m.DbgReloadMetadata: self._reload_metadata,
            m.DbgSetUuid: self._set_uuid,
            m.DbgSetState: self._set_state,
            m.DbgSetBase: self._set_base,
        }

    async def _merge(self, _conn: Connection, request: m.Merge) -> JobAccepted:
        if (request.gid_e is None) == (request.size_max_b is None):
            raise UsageError("merge takes a generation to merge up to, or a size", hint="give exactly one of them")
        volume = known(self._volumes, request.volume, Command.MERGE)
        plan = plan_merge(volume, request.gid_b, request.gid_e, request.size_max_b)
        return accepted(
            self._starter.under_action("merge", volume, MERGE, lambda job: run_merge(volume, plan, job))
        )

    async def _enable_snapshot(self, _conn: Connection, request: m.EnableSnapshot) -> Ok:
        volume = known(self._volumes, request.volume, Command.ENABLE_SNAPSHOT)
        await change_snapshots(volume, request.gids, Command.ENABLE_SNAPSHOT)
        return Ok()

    async def _disable_snapshot(self, _conn: Connection, request: m.DisableSnapshot) -> Ok:
        volume = known(self._volumes, request.volume, Command.DISABLE_SNAPSHOT)
        await change_snapshots(volume, request.gids, Command.DISABLE_SNAPSHOT)
        return Ok()

    async def _del_cold(self, _conn: Connection, request: m.DelCold) -> Ok:
        await uninterrupted(delete_cold(known(self._volumes, request.volume, Command.DEL_COLD), request.gid))
        return Ok()

    async def _resize(self, conn: Connection, request: c.Resize) -> Ok:
        volume = known(self._volumes, request.volume, Command.RESIZE)
        await with_filler(conn, resize(volume, request.size_b, zero=request.zero))
        return Ok()

    async def _block_hash(self, _conn: Connection, request: m.BlockHash) -> JobAccepted:
        volume = known(self._volumes, request.volume, Command.BHASH)
        size_b = plan_hash(volume, request)
        return accepted(
            self._scanner.under_action(
                "block-hash", volume, SCAN, lambda job: run_hash(volume, request, size_b, job)
            )
        )

    async def _virt_full_scan(self, conn: Connection, request: m.VirtFullScan) -> None:
        volume = known(self._volumes, request.volume, Command.VIRT_FULL_SCAN)
        await send_scan(volume, self._scanner, conn, request)

    async def _scrub(self, _conn: Connection, request: m.Scrub) -> JobAccepted:
        volume = known(self._volumes, request.volume, Command.SCRUB)
        return accepted(self._starter.under_action("scrub", volume, SCRUB, lambda job: run_scrub(volume, job)))

    # --- repair by hand

    async def _reload_metadata(self, _conn: Connection, request: m.DbgReloadMetadata) -> Ok:
        volume = known(self._volumes, request.volume, Command.DBG_RELOAD_METADATA)
        await uninterrupted(repair.reload_metadata(volume))
        return Ok()

    async def _set_uuid(self, _conn: Connection, request: m.DbgSetUuid) -> Ok:
        volume = known(self._volumes, request.volume, Command.DBG_SET_UUID)
        await uninterrupted(repair.set_uuid(volume, request.uuid))
        return Ok()

    async def _set_state(self, _conn: Connection, request: m.DbgSetState) -> Ok:
        volume = known(self._volumes, request.volume, Command.DBG_SET_STATE)
        await uninterrupted(repair.set_state(volume, request.state))
        return Ok()

    async def _set_base(self, _conn: Connection, request: m.DbgSetBase) -> Ok:
        volume = known(self._volumes, request.volume, Command.DBG_SET_BASE)
        await uninterrupted(repair.set_base(volume, request.base))
        return Ok()
