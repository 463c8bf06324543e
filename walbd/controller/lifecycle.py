"""Making volumes known, starting, stopping and forgetting them. Source: docs/controller.md, "Life of a volume"."""

from __future__ import annotations

from collections.abc import Sequence

from walbd.controller import constants as k
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE, SHORT_TIMEOUT_SEC, TIMEOUT_SEC
from walbd.controller.queries import Queries
from walbd.controller.servers import Server, verify_server_kind
from walbd.controller.verify import (
    verify_shutdown_mode,
    verify_size_unit,
    verify_stop_mode,
    verify_timeout,
    verify_type,
)
from walbd.errors import BadState, TimedOut, UsageError, WalbError
from walbd.protocol import control as c
from walbd.units import parse_size

_BACKUPS = (k.stFullSync, k.stHashSync)


class Lifecycle(Queries):
    """Life of a volume; see `Controller`."""

    def init_storage(self, sx: Server, vol: str, wdevPath: str) -> None:
        """Take over a device under a volume name, and stand by. Needs Clear; then the volume is Standby."""
        self._check(sx, vol, K_STORAGE)
        verify_type(wdevPath, str)
        if not wdevPath:
            raise UsageError("a device is missing", hint="give the directory of a device made with `walbd device`")
        self._verify_state_in(sx, vol, [k.sClear], f"the volume is known there already: walbc status {vol}")
        self.ask(sx, c.StorageInitVol(volume=vol, device=wdevPath))
        self._start_standby(sx, vol)

    def clear(self, s: Server, vol: str) -> None:
        """Forget a volume at a server and remove its files there, stopping it first; nothing if it is Clear."""
        self._check(s, vol)
        state = self.get_state(s, vol)
        if state == k.sClear:
            return
        if state == k.BROKEN:
            pass  # nothing can be stopped there; the server decides
        elif s.kind == K_STORAGE:
            if state in (k.sTarget, k.sStandby):
                self.stop(s, vol, "force")
            if self.get_state(s, vol) == k.sStopped:
                self.reset(s, vol)
            self._verify_state_in(s, vol, [k.sSyncReady])
        elif s.kind == K_PROXY:
            if state in k.pActive:
                self.stop(s, vol, "force")
            self._verify_state_in(s, vol, [k.pStopped])
        else:
            if state in k.aActive:
                self.stop(s, vol, "force")
            self._verify_state_in(s, vol, k.aAcceptForClearVol)
        self.ask(s, c.ClearVol(volume=vol))
        self._verify_state_in(s, vol, [k.sClear])

    def reset(self, s: Server, vol: str, timeoutS: float = SHORT_TIMEOUT_SEC) -> None:
        """Bring a volume back to SyncReady: a storage wipes its log, an archive removes all its data."""
        self._check(s, vol, K_STORAGE, K_ARCHIVE)
        verify_timeout(timeoutS)
        states = [k.sStopped] if s.kind == K_STORAGE else list(k.aAcceptForClearVol)
        self._verify_state_in(s, vol, states, f"stop it first: walbc stop {s.name} {vol}")
        self.ask(s, c.ResetVol(volume=vol), timeoutS)
        self._verify_state_in(s, vol, [k.sSyncReady])

    def start(self, s: Server, vol: str) -> None:
        """Start a stopped volume; at a storage it becomes the target."""
        self._check(s, vol)
        if s.kind == K_STORAGE:
            self.ask(s, c.Start(volume=vol, role=c.Role.TARGET), k.STEP_TIMEOUT_SEC)
            self.wait_for_state(s, vol, [k.stStartTarget], [k.sTarget])
            return
        self.ask(s, c.Start(volume=vol), k.STEP_TIMEOUT_SEC)
        if s.kind == K_PROXY:
            self.wait_for_state(s, vol, [k.ptStart], k.pActive)
        else:
            self.wait_for_state(s, vol, [k.atStart], k.aActive)

    def stop_nbk(self, s: Server, vol: str, mode: str = "graceful") -> str:
        """Tell a volume to stop and return the state it was in; `wait_for_stopped` waits for the end.

        Mode graceful lets running work end, force ends it early, empty (proxies) first sends everything. A
        volume that is Stopped already is left alone.
        """
        self._check(s, vol)
        verify_stop_mode(mode, empty=s.kind == K_PROXY)
        state = self.get_state(s, vol)
        self._stops.pop((s.name, vol), None)
        if state == k.sStopped:
            return state
        try:
            job = self.ask(s, c.Stop(volume=vol, how=c.StopHow(mode))).job
        except BadState:
            if self.get_state(s, vol) != k.sStopped:  # it may have stopped by itself in between
                raise
            return k.sStopped
        self._stops[s.name, vol] = job
        return state

    def wait_for_stopped(
        self, s: Server, vol: str, prevSt: str | None = None, timeoutS: float = TIMEOUT_SEC
    ) -> None:
        """Wait until a volume has stopped; `prevSt` is what `stop_nbk` returned, and needed at storages.

        Raises the error of a stop that failed.
        """
        self._check(s, vol)
        verify_timeout(timeoutS)
        if prevSt is not None:
            verify_type(prevSt, str)
        elif s.kind == K_STORAGE:
            raise UsageError("a storage needs the state before the stop", hint="pass what stop_nbk returned")
        goal, during = _goal_of_stop(s, prevSt)
        job = self._stops.pop((s.name, vol), None)
        failed: WalbError | None = None
        if job is not None:
            try:
                self.wait_for_job(s, job, timeoutS, vol=vol, what="stop")
            except TimedOut:
                raise
            except WalbError as exc:
                failed = exc  # a forced stop of a backup "fails", as the volume is SyncReady then
        if failed is not None and self.get_state(s, vol) not in goal:
            raise failed
        self.wait_for_state(s, vol, during, goal, timeoutS)

    def stop(self, s: Server, vol: str, mode: str = "graceful") -> None:
        """Stop a volume and wait until it has stopped; nothing if it is Stopped already.

        A backup that is running is waited for (graceful) or given up (force).
        """
        self.wait_for_stopped(s, vol, self.stop_nbk(s, vol, mode))

    def shutdown(self, s: Server, mode: str = "graceful") -> None:
        """Tell a daemon to end; graceful: after its running work."""
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        verify_shutdown_mode(mode, "bad shutdown mode")
        self.ask(s, c.Shutdown(how=c.ShutdownHow(mode)))

    def shutdown_list(self, sL: Sequence[Server], mode: str = "graceful") -> None:
        """Tell several daemons to end; one that cannot be told is printed, and does not keep the others alive."""
        verify_shutdown_mode(mode, "bad shutdown mode")
        for s in self._servers(sL):
            try:
                self.shutdown(s, mode)
            except WalbError as exc:
                self.say(f"{s.name}: {exc}")

    def shutdown_all(self, mode: str = "graceful") -> None:
        """Tell all daemons of the layout to end."""
        self.shutdown_list(self.sLayout.get_all(), mode)

    def set_full_scan_bps(self, sx: Server, throughputU: str) -> None:
        """Limit the speed of full scans at a storage, running ones included [byte/s]; '0': no limit."""
        verify_server_kind(sx, (K_STORAGE,))
        verify_size_unit(throughputU)
        self.ask(sx, c.SetFullScanBps(bytes_per_s=parse_size(throughputU)))

    def _start_standby(self, sx: Server, vol: str) -> None:
        self.ask(sx, c.Start(volume=vol, role=c.Role.STANDBY), k.STEP_TIMEOUT_SEC)
        self.wait_for_state(sx, vol, [k.stStartStandby], [k.sStandby])


def _goal_of_stop(s: Server, prevSt: str | None) -> tuple[list[str], list[str]]:
    """Return the states in which a stop has ended, and those in which it goes on."""
    if s.kind == K_PROXY:
        return [k.pStopped], list(k.pDuringStop)
    if s.kind == K_ARCHIVE:
        return [k.aStopped], list(k.aDuringStop)
    if prevSt in (k.sStandby, k.stStopStandby):
        return [k.sSyncReady], list(k.sDuringStopForStandby)
    if prevSt in _BACKUPS:  # given up: SyncReady; finished, and the fresh target stopped: Stopped
        return [k.sSyncReady, k.sStopped], [*_BACKUPS, k.stStartTarget, *k.sDuringStopForTarget]
    return [k.sStopped], list(k.sDuringStopForTarget)
