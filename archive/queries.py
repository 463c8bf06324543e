"""What can be asked about volumes, without changing anything (docs/archive.md, "Information").

Asking never makes a volume known: one that is not is `Clear` here.
"""

from __future__ import annotations

from typing import Any

from walbd.archive.gaps import within
from walbd.archive.states import ACTIONS, TABLE, Command, State
from walbd.archive.status import latest_row
from walbd.archive.volume import Place, Volume
from walbd.daemon.conn import Connection
from walbd.daemon.env import Pool
from walbd.daemon.server import Handler
from walbd.daemon.states import Machine
from walbd.errors import InternalError, NotFound, UsageError
from walbd.format.meta import NO_BASE, BaseState, Diff
from walbd.ids import parse_uuid
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.codec import Request
from walbd.protocol.maintenance import Gaps, GetGaps
from walbd.protocol.transfer import GatheredLatest, GatherLatest
from walbd.units import LB


def known(volumes: dict[str, Volume], name: str, command: Command) -> Volume:
    """Return a volume for which `command` is allowed now; raises as `Volume.check` does."""
    volume = volumes.get(name)
    if volume is None:
        Machine(TABLE, State.CLEAR).check(command)
        raise InternalError("a command is allowed in Clear and needs a volume", command=str(command))
    volume.check(command)
    return volume


class Queries:
    """The handlers of the questions."""

    def __init__(self, volumes: dict[str, Volume], place: Place) -> None:
        self._volumes = volumes
        self._place = place

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            c.GetVolumes: self._names,
            c.GetNumAction: self._num_action,
            c.GetActions: self._actions,
            c.GetLatestSnap: self._latest_snap,
            c.GetUuid: self._uuid,
            c.GetArchiveUuid: self._archive_uuid,
            c.GetDiff: self._diff,
            c.GetApplicableDiff: self._applicable_diff,
            c.GetExistsBaseImage: self._exists_base_image,
            c.GetVolSize: self._vol_size,
            c.GetProgress: self._progress,
            c.GetRestored: self._restored,
            c.GetRestoredPath: self._restored_path,
            c.GetRestorable: self._restorable,
            c.GetBase: self._base,
            c.GetMetaState: self._meta_state,
            c.GetMetaSnap: self._meta_snap,
            GetGaps: self._gaps,
            m.GetNumDiff: self._num_diff,
            m.GetTotalDiffSize: self._total_diff_size,
            m.GetExistsDiff: self._exists_diff,
            m.GetCold: self._cold,
            m.GetBaseAll: self._base_all,
            m.GetVolumeGroup: self._volume_group,
            m.GetThinpool: self._thinpool,
            GatherLatest: self._gather_latest,
        }

    # --- in any state

    async def _names(self, _conn: Connection, _request: c.GetVolumes) -> c.Names:
        return c.Names(names=sorted(self._volumes))

    async def _actions(self, _conn: Connection, _request: c.GetActions) -> c.Actions:
        rows = []
        for name, volume in sorted(self._volumes.items()):
            if volume.is_active:
                for action in ACTIONS:
                    info = volume.machine.actions.get(action)
                    rows.append((name, action, info.count if info else 0, info.began if info else 0))
        return c.Actions(rows=rows)

    async def _diff(self, _conn: Connection, request: c.GetDiff) -> c.Diffs:
        return c.Diffs(diffs=self._range(request.volume, request.gid_b, request.gid_e))

    async def _num_diff(self, _conn: Connection, request: m.GetNumDiff) -> c.IntValue:
        return c.IntValue(value=len(self._range(request.volume, request.gid_b, request.gid_e)))

    async def _total_diff_size(self, _conn: Connection, request: m.GetTotalDiffSize) -> c.IntValue:
        diffs = self._range(request.volume, request.gid_b, request.gid_e)
        return c.IntValue(value=sum(diff.size_b for diff in diffs))

    async def _applicable_diff(self, _conn: Connection, request: c.GetApplicableDiff) -> c.Diffs:
        volume = self._volumes.get(request.volume)
        if volume is None:
            return c.Diffs(diffs=[])
        return c.Diffs(diffs=volume.diffs.chain_to_gid(volume.base.begin, request.gid))

    async def _meta_state(self, _conn: Connection, request: c.GetMetaState) -> c.BaseValue:
        return c.BaseValue(base=self._state_at(request.volume, request.gid, applying=request.applying))

    async def _meta_snap(self, _conn: Connection, request: c.GetMetaSnap) -> c.SnapshotValue:
        return c.SnapshotValue(snapshot=self._state_at(request.volume, request.gid, applying=False).begin)

    async def _exists_base_image(self, _conn: Connection, request: c.GetExistsBaseImage) -> c.BoolValue:
        return c.BoolValue(value=await self._base_size(request.volume) is not None)

    async def _vol_size(self, _conn: Connection, request: c.GetVolSize) -> c.IntValue:
        size_b = await self._base_size(request.volume)
        if size_b is None:
            raise NotFound("there is no base image", hint="run a full backup", volume=request.volume)
        return c.IntValue(value=size_b // LB)

    async def _progress(self, _conn: Connection, request: c.GetProgress) -> c.IntValue:
        volume = self._volumes.get(request.volume)
        return c.IntValue(value=volume.progress_lb if volume is not None else 0)

    async def _restorable(self, _conn: Connection, request: c.GetRestorable) -> c.RestorePoints:
        volume = self._volumes.get(request.volume)
        if volume is None or not volume.is_active or volume.machine.stopping is not None:
            return c.RestorePoints(points=[])
        return c.RestorePoints(points=volume.restorable(all_points=request.all_points))

    async def _gather_latest(self, _conn: Connection, request: GatherLatest) -> GatheredLatest:
        return GatheredLatest(rows=[latest_row(name, self._volumes.get(name)) for name in request.volumes])

    async def _base_all(self, _conn: Connection, _request: m.GetBaseAll) -> m.BaseStates:
        rows = [(name, volume.base) for name, volume in sorted(self._volumes.items()) if volume.is_active]
        return m.BaseStates(rows=rows)

    async def _volume_group(self, _conn: Connection, _request: m.GetVolumeGroup) -> c.TextValue:
        return c.TextValue(value="")  # images are files

    async def _thinpool(self, _conn: Connection, _request: m.GetThinpool) -> c.TextValue:
        return c.TextValue(value="")

    # --- in some states

    async def _exists_diff(self, _conn: Connection, request: m.GetExistsDiff) -> c.BoolValue:
        volume = known(self._volumes, request.volume, Command.GET_LATEST_SNAP)
        return c.BoolValue(value=request.diff in volume.diffs)

    async def _cold(self, _conn: Connection, request: m.GetCold) -> c.Gids:
        volume = known(self._volumes, request.volume, Command.GET_RESTORED)
        return c.Gids(gids=sorted(map(int, volume.record.colds)))

    async def _num_action(self, _conn: Connection, request: c.GetNumAction) -> c.IntValue:
        if request.action not in ACTIONS:
            raise UsageError("unknown action", hint="known: " + ", ".join(ACTIONS), action=request.action)
        volume = known(self._volumes, request.volume, Command.GET_ACTIONS)
        return c.IntValue(value=volume.machine.running(request.action))

    async def _latest_snap(self, _conn: Connection, request: c.GetLatestSnap) -> c.Latest:
        if request.volume:
            volumes = [known(self._volumes, request.volume, Command.GET_LATEST_SNAP)]
        else:
            volumes = [volume for _, volume in sorted(self._volumes.items()) if volume.is_holding]
        rows = [latest_row(volume.name, volume) for volume in volumes]
        return c.Latest(rows=[(row.volume, "", row.gid, 0, row.timestamp) for row in rows])

    async def _uuid(self, _conn: Connection, request: c.GetUuid) -> c.UuidValue:
        return c.UuidValue(value=parse_uuid(known(self._volumes, request.volume, Command.GET_UUID).record.uuid))

    async def _archive_uuid(self, _conn: Connection, request: c.GetArchiveUuid) -> c.UuidValue:
        volume = known(self._volumes, request.volume, Command.GET_UUID)
        return c.UuidValue(value=parse_uuid(volume.record.archive_uuid))

    async def _base(self, _conn: Connection, request: c.GetBase) -> c.BaseValue:
        return c.BaseValue(base=known(self._volumes, request.volume, Command.GET_BASE).base)

    async def _gaps(self, _conn: Connection, request: GetGaps) -> Gaps:
        volume = known(self._volumes, request.volume, Command.GET_LATEST_SNAP)
        return Gaps(gaps=list(within(volume.record.gaps, volume.restorable(all_points=True))))

    async def _restored(self, _conn: Connection, request: c.GetRestored) -> c.Gids:
        return c.Gids(gids=sorted(known(self._volumes, request.volume, Command.GET_RESTORED).restored))

    async def _restored_path(self, _conn: Connection, request: c.GetRestoredPath) -> c.TextValue:
        volume = known(self._volumes, request.volume, Command.GET_RESTORED)
        if request.gid not in volume.restored:
            raise NotFound("this generation is not restored", hint="restore it first", gid=request.gid)
        return c.TextValue(value=str(self._place.images.restored_path(volume.name, request.gid)))

    # --- help

    def _range(self, name: str, gid_b: int, gid_e: int) -> list[Diff]:
        """Return the diffs that begin there; none of a volume that is not known."""
        if gid_b >= gid_e:
            raise UsageError("an empty range of generations", gid_b=gid_b, gid_e=gid_e)
        volume = self._volumes.get(name)
        return volume.diffs.get_range(gid_b, gid_e) if volume is not None else []

    def _state_at(self, name: str, gid: int, *, applying: bool) -> BaseState:
        """Return the base's state after, or during, an apply up to `gid`."""
        volume = self._volumes.get(name)
        if volume is None:
            return NO_BASE
        diffs = volume.diffs.to_apply(volume.base, gid)
        return volume.base.begin_applying(diffs) if applying else volume.base.end_applying(diffs)

    async def _base_size(self, name: str) -> int | None:
        if name not in self._volumes:
            return None
        return await self._place.env.pools.run(Pool.QUERY, self._place.images.base_size, name)
