"""Full backups: everything is checked before the first change. Source: docs/controller.md, "Backup"."""

from __future__ import annotations

from typing import Final

from walbd.controller import constants as k
from walbd.controller.commands import check_bulk
from walbd.controller.constants import K_STORAGE, TIMEOUT_SEC
from walbd.controller.data import SyncOpt
from walbd.controller.feeding import Feeding
from walbd.controller.queries import require_state
from walbd.controller.servers import Server
from walbd.controller.verify import verify_size_unit, verify_timeout, verify_type
from walbd.errors import WalbError
from walbd.protocol import control as c
from walbd.units import parse_size

_DEFAULT_BULK_B: Final = c.FullBackup(volume="x").bulk_b
_AGREE_S: Final = 60.0  # until storage and archive have agreed to begin


class Backup(Feeding):
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

        The volume must not be Target: stop it first. Every other storage of the layout must be Standby or
        Clear, the primary archive Clear or SyncReady, and all servers of the layout must answer; all this is
        checked before anything is changed. Then a Stopped volume is reset and a Standby one stopped, no archive
        but the primary is fed any more, and the copy begins.

        Returns the generation that can be restored, once it can; None at once with `block=False`, when the
        storage and the archive have agreed to begin. `timeoutS` bounds the copy, and again the time until it
        can be restored. Raises BadState and other refusals, ConnectError, TimedOut, or why the copy failed.
        """
        self._check(sx, vol, K_STORAGE)
        verify_timeout(timeoutS)
        verify_type(block, bool)
        bulk_b = _bulk(bulkSizeU)
        if syncOpt is not None:
            verify_type(syncOpt, SyncOpt)
        primary = self._verify_before_backup(sx, vol)
        self._prepare_backup(sx, vol, primary, syncOpt)
        job = self.ask(sx, c.FullBackup(volume=vol, bulk_b=bulk_b), _AGREE_S).job
        if not block:
            return None
        self.wait_for_job(sx, job, timeoutS, vol=vol, what="full-backup")
        self.wait_for_state(sx, vol, k.sDuringFullSync, [k.sTarget], timeoutS)
        self._verify_state_in(primary, vol, k.aActive)
        self._try_kick_proxies(vol, primary)

        def last_point() -> int | None:
            gids = self.get_restorable_gid(primary, vol)
            return gids[-1] if gids else None

        return self.wait_until(
            f"the backup to be restorable at {primary.name}", last_point, timeoutS, s=primary, vol=vol
        )

    def _verify_before_backup(self, sx: Server, vol: str) -> Server:
        """Check all that a full backup needs, and return the primary archive. Changes nothing."""
        layout = self.sLayout
        layout.verify(1, 1, 1)
        primary = layout.get_primary_archive()
        others = [s for s in layout.storageL if s != sx]
        states = self._states([sx, *others, *layout.proxyL, primary], vol)
        hint = {
            k.sTarget: f"stop it first: walbc stop {sx.name} {vol}",
            k.sClear: f"make it known first: walbc init-storage {vol} DEVICE --storage {sx.name}",
        }.get(states[sx], "")
        require_state(sx, vol, states[sx], [k.sSyncReady, k.sStandby, k.sStopped], hint)
        for s in others:
            hint = f"walbc go-standby {vol} --storage {s.name}, or take that storage out of the layout"
            require_state(s, vol, states[s], [k.sStandby, k.sClear], hint)
        for px in layout.proxyL:
            require_state(px, vol, states[px], [k.pClear, k.pStopped, *k.pActive])
        hint = f"its old data must go first: walbc stop {primary.name} {vol}, walbc reset {primary.name} {vol}"
        require_state(primary, vol, states[primary], [k.aClear, k.aSyncReady], hint)
        return primary

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

    def _try_kick_proxies(self, vol: str, ax: Server) -> None:
        """Hurry the proxies; the backup is safe whether that succeeds or not."""
        try:
            self.kick_proxy(vol, ax)
        except WalbError as exc:
            self.say(f"warning: cannot kick the proxies: {exc}")


def _bulk(bulkSizeU: str | None) -> int:
    if bulkSizeU is None:
        return _DEFAULT_BULK_B
    verify_size_unit(bulkSizeU)
    check_bulk(parse_size(bulkSizeU))
    return parse_size(bulkSizeU)
