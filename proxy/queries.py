"""What a proxy answers when asked: status, states, lists. Nothing here changes anything."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from walbd.daemon.common import begun_actions, free_space, status_reply
from walbd.daemon.conn import Connection, Me
from walbd.daemon.env import Env
from walbd.daemon.scheduler import Scheduler
from walbd.daemon.server import Handler
from walbd.errors import NotFound
from walbd.format.meta import Diff
from walbd.ids import NO_GID
from walbd.protocol.base import Fact
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    DAMAGED_MAX,
    Actions,
    ArchiveInfo,
    BoolValue,
    Diffs,
    GetActions,
    GetArchiveInfo,
    GetIsWdiffSendError,
    GetLatestSnap,
    GetNumAction,
    GetProxyDiff,
    GetStatus,
    GetVolumes,
    HopStatus,
    IntValue,
    Latest,
    ListArchiveInfo,
    Names,
    StatusReply,
    VolumeStatus,
)
from walbd.proxy.config import ProxyConfig
from walbd.proxy.receive import Receiver
from walbd.proxy.send import SendKey
from walbd.proxy.states import WDIFF_SEND, Command
from walbd.proxy.volume import Hop, Volume

PAGE_MAX: Final = 4000  # diffs in one message: a frame holds ten times as many, but the loop must go on


class Queries:
    """Handlers of all requests that only ask."""

    def __init__(
        self,
        env: Env,
        me: Me,
        config: Callable[[], ProxyConfig],
        volumes: Mapping[str, Volume],
        find: Callable[[str], Volume],
        scheduler: Scheduler[SendKey],
        receiver: Receiver,
    ) -> None:
        """`config()` is what counts now; `find(name)` returns a volume, a Clear one for an unknown name."""
        self._env = env
        self._me = me
        self._config = config
        self._volumes = volumes
        self._find = find
        self._scheduler = scheduler
        self._receiver = receiver

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            GetVolumes: self.list_volumes,
            GetNumAction: self.num_action,
            GetActions: self.actions,
            GetStatus: self.status,
            GetLatestSnap: self.latest_snap,
            GetIsWdiffSendError: self.is_wdiff_send_error,
            GetProxyDiff: self.proxy_diff,
            ListArchiveInfo: self.list_archives,
            GetArchiveInfo: self.archive_info,
        }

    async def list_volumes(self, _conn: Connection, _request: GetVolumes) -> Names:
        return Names(names=sorted(self._volumes))

    async def num_action(self, _conn: Connection, request: GetNumAction) -> IntValue:
        volume = self._find(request.volume)
        if request.action == WDIFF_SEND:
            return IntValue(value=volume.machine.running(WDIFF_SEND))
        if request.action in volume.hops:
            return IntValue(value=int(volume.hops[request.action].sending))
        raise NotFound(
            "unknown action",
            hint=f"actions of a proxy are {WDIFF_SEND}, or the name of an archive for the sending to it",
            action=request.action,
        )

    async def actions(self, _conn: Connection, _request: GetActions) -> Actions:
        return begun_actions(self._volumes)

    async def latest_snap(self, _conn: Connection, request: GetLatestSnap) -> Latest:
        volumes = [self._find(request.volume)] if request.volume else self._sorted()
        if request.volume:
            volumes[0].check(Command.GET_LATEST_SNAP)
        rows = []
        for volume in volumes:
            for archive, hop in sorted(volume.hops.items()):
                newest = hop.diffs.newest()
                gid, time = (newest.end.gid_b, newest.timestamp) if newest is not None else (NO_GID, 0)
                rows.append((volume.name, archive, int(gid), 0, time))
        return Latest(rows=rows)

    async def is_wdiff_send_error(self, _conn: Connection, request: GetIsWdiffSendError) -> BoolValue:
        volume = self._find(request.volume)
        volume.check(Command.GET_SEND_ERROR)
        return BoolValue(value=volume.hop(request.archive).is_wrong)

    async def proxy_diff(self, _conn: Connection, request: GetProxyDiff) -> Diffs:
        volume = self._find(request.volume)
        diffs = volume.hop(request.archive).diffs if request.archive else volume.received
        return page_of(diffs, request.gid_b)

    async def list_archives(self, _conn: Connection, request: ListArchiveInfo) -> Names:
        return Names(names=sorted(self._find(request.volume).hops))

    async def archive_info(self, _conn: Connection, request: GetArchiveInfo) -> ArchiveInfo:
        entry = self._find(request.volume).hop(request.archive).entry
        return ArchiveInfo(
            archive=request.archive, address=entry.address, compress=entry.compress, delay_s=entry.delay_s
        )

    async def status(self, _conn: Connection, request: GetStatus) -> StatusReply:
        volumes = [self._find(request.volume)] if request.volume else self._sorted()
        rows = []
        for volume in volumes:
            rows.append(volume_status(volume))
            await asyncio.sleep(0)  # with all that may wait, one volume is enough for a turn of the loop
        return status_reply(
            self._me,
            self._env.clock,
            await self._server_facts(),
            rows,
            waiting=[row for row in self._scheduler.waiting() if request.volume in ("", row.key.volume)],
        )

    def _sorted(self) -> list[Volume]:
        return [volume for _, volume in sorted(self._volumes.items())]

    async def _server_facts(self) -> dict[str, Fact]:
        config, wdiffs_b = self._config(), 0
        for volume in self._sorted():
            wdiffs_b += waiting(volume)[1]
            await asyncio.sleep(0)
        return {
            "base_dir": config.base_dir,
            "wdiff_send_size_max": config.wdiff_send_size_max,
            "wdiff_send_count_max": config.wdiff_send_count_max,
            "receives_max": config.receives_max,
            "sends_max": config.sends_max,
            "connections_max": config.connections_max,
            "free_reserve_b": config.free_reserve_b,
            "receiving": self._receiver.running,
            "sending": sum(volume.machine.running(WDIFF_SEND) for volume in self._volumes.values()),
            "wdiffs_b": wdiffs_b,
            **await free_space(self._env, Path(config.base_dir)),
        }


def page_of(diffs: Iterable[Diff], gid_b: int) -> Diffs:
    """Return the diffs from a begin on that one message holds; those of one begin are never divided."""
    page: list[Diff] = []
    for diff in diffs:
        if diff.begin.gid_b < gid_b:
            continue
        if len(page) >= PAGE_MAX and diff.begin.gid_b != page[-1].begin.gid_b:
            return Diffs(diffs=page, more=True)
        page.append(diff)
    return Diffs(diffs=page)


def volume_status(volume: Volume) -> VolumeStatus:
    """Return what a proxy tells of a volume."""
    count, size_b = waiting(volume)
    newest = max(
        (diff for hop in volume.hops.values() if (diff := hop.diffs.newest()) is not None),
        key=lambda diff: diff.end.gid_b,
        default=None,
    )
    error = str(volume.broken) if volume.broken is not None else "; ".join(volume.troubles)
    stopping = volume.machine.stopping
    return VolumeStatus(
        volume=volume.name,
        state=volume.state_text,
        stopping=str(stopping) if stopping is not None else "",
        actions={name: info.count for name, info in volume.machine.actions.items() if info.count},
        size_lb=volume.record.size_lb,
        latest_gid=newest.end.gid_b if newest is not None else 0,
        latest_time=newest.timestamp if newest is not None else 0,
        received=volume.last_received,
        diffs=count,
        diffs_b=size_b,
        hops=[hop_status(hop) for _, hop in sorted(volume.hops.items())],
        error=error,
    )


def hop_status(hop: Hop) -> HopStatus:
    """Return what waits for one archive."""
    first = hop.diffs.first
    return HopStatus(
        dest=hop.archive,
        address=hop.entry.address,
        sending=hop.sending,
        diffs=len(hop.diffs),
        size_b=hop.diffs.size_b,
        gid_b=first.begin.gid_b if first is not None else 0,
        gid_e=hop.diffs.gid_e,
        oldest=first.timestamp if first is not None else 0,
        last_sent=hop.last_sent,
        error=hop.is_wrong,
        error_text=hop.problem,
        damaged=[(int(diff.begin.gid_b), int(diff.end.gid_b)) for diff in hop.damaged[:DAMAGED_MAX]],
    )


def waiting(volume: Volume) -> tuple[int, int]:
    """Return how many wdiffs a volume holds, and their size [byte]; one for several archives counts once."""
    sets = sorted((volume.received, *(hop.diffs for hop in volume.hops.values())), key=len, reverse=True)
    count, size_b = len(sets[0]), sets[0].size_b  # of an archive that is away it may be very many
    for i, diffs in enumerate(sets[1:], 1):
        for diff in diffs:
            if not any(other.find(diff) is not None for other in sets[:i]):
                count, size_b = count + 1, size_b + diff.size_b
    return count, size_b
