"""Full and hash backups: everything is checked before the first change. Source: docs/controller.md, "Backup"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from walbd.controller import constants as k
from walbd.controller.constants import K_PROXY, K_STORAGE, TIMEOUT_SEC
from walbd.controller.data import SyncOpt
from walbd.controller.queries import require_state
from walbd.controller.servers import Server
from walbd.controller.targets import Targets
from walbd.controller.verify import verify_size_unit, verify_timeout, verify_type
from walbd.controller.words import check_bulk
from walbd.errors import Busy, TimedOut, WalbError
from walbd.protocol import control as c
from walbd.protocol.base import JobAccepted
from walbd.protocol.codec import Request
from walbd.units import parse_size

_FULL_BULK_B: Final = c.FullBackup(volume="x").bulk_b
_HASH_BULK_B: Final = c.HashBackup(volume="x").bulk_b
_EMPTY: Final = (k.aClear, k.aSyncReady)  # states in which an archive holds nothing of a volume
_BUSY_S: Final = 10.0  # for what excludes a backup and ends by itself: the receipt of a diff
_DRAIN_S: Final = 60.0  # for proxies to deliver what they still hold, before it is dropped
_STUCK_S: Final = 5.0  # without any progress: nothing more will come


class Backup(Targets):
    """Backup; see `Controller`."""

    def full_backup(
        self,
        sx: Server,
        vol: str,
        timeoutS: float = TIMEOUT_SEC,
        block: bool = True,
        bulkSizeU: str | None = None,
        syncOpt: SyncOpt | None = None,
    ) -> int | None:
        """Copy a whole volume to the primary archive, and back it up continuously from then on.

        The volume must not be Target, unless no archive to which it is sent holds anything of it any more: stop
        it first. Every other storage of the layout must be Standby or Clear, the primary archive Clear or
        SyncReady, and all storages and proxies of the layout must answer; all this is checked before anything is
        changed. Then a Stopped volume is reset and a Standby one stopped, no archive
        but the primary is fed any more, and the copy begins.

        Returns the generation that can be restored, once it can; None at once with `block=False`, when the
        storage and the archive have agreed to begin. `timeoutS` bounds the copy, and again the time until it
        can be restored. Raises BadState and other refusals, ConnectError, TimedOut, or why the copy failed.
        """
        bulk_b = self._backup_args(sx, vol, timeoutS, block, bulkSizeU, syncOpt) or _FULL_BULK_B
        primary, states = self._verify_group(sx, vol)
        self._require_source(sx, vol, states[sx], [k.sTarget] if states[primary] in _EMPTY else [])
        hint = f"its old data must go first: walbc stop {primary.name} {vol}, walbc reset {primary.name} {vol}"
        require_state(primary, vol, states[primary], _EMPTY, hint)
        if states[sx] == k.sTarget:
            self._stop_target_without_archive(sx, vol, primary)
        self._prepare_backup(sx, vol, primary, syncOpt)
        job = self._begin_backup(sx, c.FullBackup(volume=vol, bulk_b=bulk_b))
        if not block:
            return None
        return self._wait_for_backup(sx, vol, primary, job, timeoutS, ("full-backup", k.sDuringFullSync, -1))

    def hash_backup(
        self,
        sx: Server,
        vol: str,
        timeoutS: float = TIMEOUT_SEC,
        block: bool = True,
        bulkSizeU: str | None = None,
        syncOpt: SyncOpt | None = None,
    ) -> int | None:
        """Send what differs from the primary archive's latest image, and back the volume up from then on.

        That continues a history whose log was lost: after an overflow, after lost metadata or diffs, or from
        another storage. The volume must not be Target: stop it first. But one whose log is lost stops by itself,
        which is waited for; and one is stopped for you when diffs were lost on their way, which is proved from
        what the proxies and the archive hold. The primary archive must be active, with a base image; everything
        else is as for `full_backup`. Diffs that proxies still hold are delivered first, where that is possible.
        New generations are above all that the storages of the layout ever gave out; if the one that gave out what
        the archive has is not among them, that is said.

        Returns the new generation that can be restored, or None at once with `block=False`.
        """
        bulk_b = self._backup_args(sx, vol, timeoutS, block, bulkSizeU, syncOpt) or _HASH_BULK_B
        primary, states = self._verify_group(sx, vol)
        self._require_source(sx, vol, states[sx], k.sDuringStopForTarget)
        hint = {
            k.aStopped: f"start it first: walbc start {primary.name} {vol}",
            k.aClear: f"it holds nothing to compare with: walbc full-backup {vol} --storage {sx.name}",
            k.aSyncReady: f"it holds nothing to compare with: walbc full-backup {vol} --storage {sx.name}",
        }.get(states[primary], "")
        require_state(primary, vol, states[primary], k.aActive, hint)
        if states[sx] in k.sDuringStopForTarget:
            self._stop_broken_target(sx, vol, primary)
        gid_past = self._gid_past(vol, primary)
        self._drain_proxies(vol, primary)
        self._prepare_backup(sx, vol, primary, syncOpt)
        known = max(self.get_restorable_gid(primary, vol, "all"), default=-1)
        job = self._begin_backup(sx, c.HashBackup(volume=vol, bulk_b=bulk_b, gid_past=gid_past))
        if not block:
            return None
        return self._wait_for_backup(sx, vol, primary, job, timeoutS, ("hash-backup", k.sDuringHashSync, known))

    # Inner parts

    def _backup_args(
        self, sx: Server, vol: str, timeoutS: float, block: bool, bulkSizeU: str | None, syncOpt: SyncOpt | None
    ) -> int:
        """Check the arguments of a backup, and return the size of its bulks [byte]; 0: the default."""
        self._check(sx, vol, K_STORAGE)
        verify_timeout(timeoutS)
        verify_type(block, bool)
        if syncOpt is not None:
            verify_type(syncOpt, SyncOpt)
        if bulkSizeU is None:
            return 0
        verify_size_unit(bulkSizeU)
        check_bulk(parse_size(bulkSizeU))
        return parse_size(bulkSizeU)

    def _verify_group(self, sx: Server, vol: str) -> tuple[Server, dict[Server, str]]:
        """Check all servers beside the source and the primary archive; return that, and the states. No changes."""
        layout = self.sLayout
        layout.verify(1, 1, 1)
        primary = layout.get_primary_archive()
        others = [s for s in layout.storageL if s != sx]
        states = self._states([sx, *others, *layout.proxyL, primary], vol)
        for s in others:
            hint = f"walbc go-standby {vol} --storage {s.name}, or take that storage out of the layout"
            require_state(s, vol, states[s], [k.sStandby, k.sClear], hint)
        for px in layout.proxyL:
            require_state(px, vol, states[px], [k.pClear, k.pStopped, *k.pActive])
        return primary, states

    @staticmethod
    def _require_source(sx: Server, vol: str, state: str, more: Sequence[str] = ()) -> None:
        hint = {
            k.sTarget: f"stop it first: walbc stop {sx.name} {vol}",
            k.sClear: f"make it known first: walbc init-storage {vol} DEVICE --storage {sx.name}",
        }.get(state, "")
        require_state(sx, vol, state, [k.sSyncReady, k.sStandby, k.sStopped, *more], hint)

    def _gid_past(self, vol: str, primary: Server) -> int:
        """Return the greatest generation that anybody has given out or holds; 0: none above the primary archive's.

        A snapshot that another storage answered and never delivered must not come back with other contents. When
        the storage that gave out what the archive has cannot be asked, nobody knows which those are: that is said.
        """
        given, held, head = 0, 0, 0
        for s, reply in self.ask_each(self.sLayout.get_all(), c.GetStatus(volume=vol)).items():
            if isinstance(reply, WalbError):  # not known there; who must answer has answered before
                continue
            (v,) = reply.volumes
            if s.kind == K_STORAGE:
                given = max(given, v.gid_greatest)
            elif s.kind == K_PROXY:
                held = max([held, *(hop.gid_e for hop in v.hops)])
            else:
                held = max(held, v.latest_gid)
            if s == primary:
                head = v.latest_gid
        if given < head:
            self.say(
                f"warning: {primary.name} has generation {head} of {vol}, and no storage of the layout has given "
                "it out: what the former one answered and never delivered may come back with other contents"
            )
        past = max(given, held)
        return past if past > head else 0

    def _drain_proxies(self, vol: str, ax: Server) -> None:
        """Let the proxies deliver what they hold for an archive, as long as that goes on: it is dropped then."""
        active = [px for px, state in self._states(self.sLayout.proxyL, vol).items() if state in k.pActive]
        feeding = [px for px in self._feeding(ax, vol)[0] if px in active]
        if not feeding:
            return
        request = c.GetStatus(volume=vol)
        least, since = -1, self.calls.now()
        kick = c.Kick(volume=vol, archive=ax.name)
        self.ask_each(feeding, kick)  # only to hurry

        def look() -> int | None:
            nonlocal least, since
            replies = self.ask_all(feeding, request).values()
            hops = [hop for reply in replies for v in reply.volumes for hop in v.hops]
            left = sum(hop.diffs for hop in hops if hop.dest == ax.name)
            if left < least or least < 0:
                least, since = left, self.calls.now()
            stuck = self.calls.now() - since >= _STUCK_S
            return left if not left or stuck else None

        try:
            left = self.wait_until(f"proxies to send what they hold to {ax.name}", look, _DRAIN_S, s=ax, vol=vol)
        except TimedOut:
            left = least
        if left:
            self.say(f"warning: {left} diffs that proxies hold for {ax.name} cannot be delivered and are dropped")

    def _prepare_backup(self, sx: Server, vol: str, primary: Server, syncOpt: SyncOpt | None) -> None:
        """Bring all servers to where a backup can begin."""
        state = self.get_state(sx, vol)
        if state == k.sStandby:
            self.stop(sx, vol)
        elif state == k.sStopped:
            self.reset(sx, vol)
        self._verify_state_in(sx, vol, [k.sSyncReady])
        for ax in self.sLayout.archiveL:
            feeding, _ = self._feeding(ax, vol)
            if feeding:
                self.stop_synchronizing(ax, vol)
        if self.get_state(primary, vol) == k.aClear:
            self.ask(primary, c.ArchiveInitVol(volume=vol))
        self.start_synchronizing(primary, vol, syncOpt)

    def _begin_backup(self, sx: Server, request: Request[JobAccepted]) -> int:
        """Have a backup accepted, and return its job; what excludes it for a moment is waited for."""
        began = self.calls.now()
        while True:
            try:
                return self.ask(sx, request).job
            except Busy:
                if self.calls.now() - began >= _BUSY_S:
                    raise
                self.calls.sleep(0.2)

    def _wait_for_backup(
        self,
        sx: Server,
        vol: str,
        primary: Server,
        job: int,
        timeoutS: float,
        kind: tuple[str, tuple[str, ...], int],  # name, states at work, greatest restorable gid before
    ) -> int:
        """Wait for the end of a backup, then until a newer generation than before can be restored."""
        what, during, known = kind
        self.wait_for_job(sx, job, timeoutS, vol=vol, what=what)
        self.wait_for_state(sx, vol, during, [k.sTarget], timeoutS)
        self.wait_for_state(primary, vol, [], k.aActive, timeoutS)
        self._try_kick_proxies(vol, primary)

        def last_point() -> int | None:
            gids = self.get_restorable_gid(primary, vol)
            return gids[-1] if gids and gids[-1] > known else None

        return self.wait_until(
            f"the backup to be restorable at {primary.name}", last_point, timeoutS, s=primary, vol=vol
        )

    def _try_kick_proxies(self, vol: str, ax: Server) -> None:
        """Hurry the proxies; the backup is safe whether that succeeds or not."""
        try:
            self.kick_proxy(vol, ax)
        except WalbError as exc:
            self.say(f"warning: cannot kick the proxies: {exc}")
