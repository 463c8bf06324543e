"""Targets whose history cannot go on: when a backup may stop them by itself. Source: docs/controller.md, "Backup".

A Target is backed up continuously, and a backup would throw its unsent log away. So it is refused unless it is
proved that nothing of that log can ever be used.
"""

from __future__ import annotations

from walbd.controller import constants as k
from walbd.controller.constants import SHORT_TIMEOUT_SEC
from walbd.controller.feeding import Feeding
from walbd.controller.servers import Server
from walbd.errors import BadState, WalbError
from walbd.ids import NO_GID
from walbd.protocol import control as c


class Targets(Feeding):
    """Stopping Targets whose history is broken; see `Controller`."""

    def _stop_broken_target(self, sx: Server, vol: str, primary: Server) -> None:
        """Stop a Target whose log, or whose diffs, are lost, so that a hash backup can continue the history.

        One whose log is lost stops by itself, which is waited for. Raises BadState when nothing is proved to be
        lost.
        """
        mine = self.ask(sx, c.GetStatus(volume=vol)).volumes[0]
        if mine.overflow or mine.lost or self.is_overflow(sx, vol):
            self.wait_for_state(sx, vol, k.sDuringStopForTarget, [k.sStopped], SHORT_TIMEOUT_SEC)
            return
        head = self._missing_from(vol, primary, mine.done_gid)
        if head is None:
            raise BadState(
                "the volume is Target, and the archive misses nothing that could not still come",
                hint=f"to take a backup all the same, stop it first: walbc stop {sx.name} {vol}",
                server=sx.name,
                volume=vol,
                state=mine.state,
            )
        self.say(f"note: diffs after generation {head} are lost before {primary.name}: {vol} is stopped")
        self.stop(sx, vol)

    def _stop_target_without_archive(self, sx: Server, vol: str, primary: Server) -> None:
        """Stop a Target whose archive data is gone, so that a full backup can begin a new history.

        The primary archive is known to hold nothing. Raises BadState unless no other archive that the volume is
        sent to can hold anything either.
        """
        fed = {
            name
            for reply in self.ask_all(self.sLayout.proxyL, c.ListArchiveInfo(volume=vol)).values()
            for name in reply.names
        }
        archives = {ax.name: ax for ax in self.sLayout.archiveL}
        states = self.ask_each(self.sLayout.archiveL, c.GetState(volume=vol))
        for name in sorted(fed - {primary.name}):
            reply = states.get(archives[name]) if name in archives else None
            empty = isinstance(reply, c.TextValue) and reply.value in (k.aClear, k.aSyncReady)
            if not empty:
                why = "does not answer" if isinstance(reply, WalbError) else "may hold its history"
                raise BadState(
                    f"the volume is Target, and {name}, to which it is sent, {why}",
                    hint=f"make it the primary archive, or stop the volume first: walbc stop {sx.name} {vol}",
                    server=sx.name,
                    volume=vol,
                    archive=name,
                )
        self.say(f"note: no archive holds anything of {vol}: it is stopped first")
        self.stop(sx, vol)

    def _missing_from(self, vol: str, primary: Server, done_gid: int) -> int | None:
        """Return the last generation that an archive has, if what follows exists nowhere any more.

        `done_gid` was delivered to the proxies; it was asked for before. Whatever the proxies had then, they have
        still, or the archive has it: so the proxies are asked before the archive. All of them must answer.
        """
        known = [px for px, state in self._states(self.sLayout.proxyL, vol).items() if state != k.pClear]
        waiting = []
        for archive in ("", primary.name):  # diffs go from what was received to the archives: in that order
            fed = [px for px in known if not archive or archive in self.get_archive_info_list(px, vol)]
            waiting += [diff for diffs in self._list_waiting(fed, vol, archive).values() for diff in diffs]
        rows = self.ask(primary, c.GetLatestSnap(volume=vol)).rows
        head = rows[0][2] if rows else NO_GID
        if head == NO_GID or head >= done_gid:
            return None
        if any(diff.begin.gid_b <= head < diff.end.gid_b for diff in waiting):
            return None
        return head
