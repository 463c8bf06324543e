"""Which archives the proxies feed. Source: docs/controller.md, "Synchronisation"."""

from __future__ import annotations

from walbd.controller import constants as k
from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.data import SyncOpt
from walbd.controller.lifecycle import Lifecycle
from walbd.controller.queries import require_state
from walbd.controller.servers import Server, get_server, verify_server_kind
from walbd.controller.verify import verify_type, verify_volume
from walbd.errors import NotFound, WalbError
from walbd.protocol import control as c


class Feeding(Lifecycle):
    """Synchronisation; see `Controller`."""

    def add_archive_to_proxy(
        self, px: Server, vol: str, ax: Server, doStart: bool = True, syncOpt: SyncOpt | None = None
    ) -> None:
        """Make a proxy send a volume to an archive, or change how: it is stopped by force for that, then started.

        Without `syncOpt` an entry that exists keeps its way of sending.
        """
        self._check(px, vol, K_PROXY)
        verify_server_kind(ax, (K_ARCHIVE,))
        verify_type(doStart, bool)
        _verify_sync_opt(syncOpt)
        was_active = self.get_state(px, vol) in k.pActive
        if was_active:
            self.stop(px, vol, "force")
        try:
            self._put_archive_info(px, vol, ax, syncOpt)
        except WalbError:
            if was_active:
                self._try_start(px, vol)
            raise
        if doStart and self.get_state(px, vol) == k.pStopped:
            self.start(px, vol)

    def del_archive_from_proxy(self, px: Server, vol: str, ax: Server, stopEmpty: bool = False) -> None:
        """Make a proxy send a volume to an archive no more. What is unsent is lost, unless `stopEmpty`: then it
        is sent first. With its last archive the proxy forgets the volume.
        """
        self._check(px, vol, K_PROXY)
        verify_server_kind(ax, (K_ARCHIVE,))
        verify_type(stopEmpty, bool)
        was_active = self.get_state(px, vol) in k.pActive
        if was_active:
            self.stop(px, vol, "empty" if stopEmpty else "force")
        try:
            if ax.name in self.get_archive_info_list(px, vol):
                self.ask(px, c.DeleteArchiveInfo(volume=vol, archive=ax.name))
        except WalbError:
            if was_active:
                self._try_start(px, vol)
            raise
        if self.get_state(px, vol) == k.pStopped:
            self.start(px, vol)

    def update_archive_info(self, px: Server, vol: str, ax: Server, syncOpt: SyncOpt) -> None:
        """Change how a stopped proxy will send to an archive that it knows."""
        self._check(px, vol, K_PROXY)
        verify_server_kind(ax, (K_ARCHIVE,))
        verify_type(syncOpt, SyncOpt)
        self._verify_state_in(px, vol, [k.pStopped], f"stop it first: walbc stop {px.name} {vol}")
        if ax.name not in self.get_archive_info_list(px, vol):
            raise NotFound(
                "the proxy does not send to this archive",
                hint="use start_synchronizing",
                server=px.name,
                volume=vol,
                archive=ax.name,
            )
        self.ask(px, c.UpdateArchiveInfo(volume=vol, info=_archive_info(ax, syncOpt)))

    def copy_archive_info(self, pSrc: Server, vol: str, pDst: Server) -> None:
        """Make one proxy send a volume wherever another one does, and start it."""
        self._check(pSrc, vol, K_PROXY)
        self._check(pDst, vol, K_PROXY)
        names = self.get_archive_info_list(pSrc, vol)
        if not names:
            raise NotFound("there is nothing to copy", server=pSrc.name, volume=vol)
        archives = [get_server(name, self.sLayout.archiveL) for name in names]  # all, before anything is changed
        for ax in archives:
            _, syncOpt = self.get_archive_info(pSrc, vol, ax)
            self.add_archive_to_proxy(pDst, vol, ax, doStart=False, syncOpt=syncOpt)
        self.start(pDst, vol)

    def start_synchronizing(self, ax: Server, vol: str, syncOpt: SyncOpt | None = None) -> None:
        """Make all proxies of the layout send a volume to an archive, then hurry the storages.

        This also repairs a proxy that has lost its data. Nothing is changed unless all proxies answer.
        """
        self._check(ax, vol, K_ARCHIVE)
        _verify_sync_opt(syncOpt)
        self.sLayout.verify(0, 1, 0)
        self._states(self.sLayout.proxyL, vol)
        for px in self.sLayout.proxyL:
            self.add_archive_to_proxy(px, vol, ax, syncOpt=syncOpt)
        self._try_kick_storages()

    def stop_synchronizing(self, ax: Server, vol: str) -> None:
        """Make all proxies of the layout send a volume to an archive no more, then hurry the storages.

        What is unsent is dropped, so the archive has a gap afterwards. Nothing is changed unless all proxies
        answer.
        """
        self._check(ax, vol, K_ARCHIVE)
        self._states(self.sLayout.proxyL, vol)
        for px in self.sLayout.proxyL:
            self.del_archive_from_proxy(px, vol, ax)
        self._try_kick_storages()

    def kick_all(self, sL: list[Server]) -> None:
        """Hurry what waits at storages and proxies. All are tried; raises when one cannot be asked."""
        verify_type(sL, (list, tuple))
        for s in sL:
            verify_server_kind(s, (K_STORAGE, K_PROXY))
        self.ask_all(sL, c.Kick())

    def kick_storage_all(self) -> None:
        """Hurry what waits at all storages of the layout."""
        self.kick_all(self.sLayout.storageL)

    def kick_proxy(self, vol: str, ax: Server) -> None:
        """Hurry what waits for an archive at all proxies; raises when one does not answer or is not started."""
        verify_volume(vol)
        verify_server_kind(ax, (K_ARCHIVE,))
        self.ask_all(self.sLayout.proxyL, c.Kick(volume=vol, archive=ax.name))

    def go_standby(self, sx: Server, vol: str) -> None:
        """Make a volume Standby: nothing is sent from here any more, and the log is thrown away.

        What was not sent yet is lost to the archives, so a backup from another storage has to follow.
        """
        self._check(sx, vol, K_STORAGE)
        state = self.get_state(sx, vol)
        hint = f"bring it to SyncReady first: walbc reset {sx.name} {vol}" if state == k.sStopped else ""
        require_state(sx, vol, state, [k.sStandby, k.sSyncReady, k.sTarget], hint)
        if state == k.sStandby:
            return
        if state == k.sTarget:
            primary = self.sLayout.get_primary_archive()
            self._states(self.sLayout.proxyL, vol)  # all must answer before anything is changed
            self.stop(sx, vol, "force")
            self.stop_synchronizing(primary, vol)
            self.reset(sx, vol)
        self._start_standby(sx, vol)

    # Inner parts

    def _put_archive_info(self, px: Server, vol: str, ax: Server, syncOpt: SyncOpt | None) -> None:
        if ax.name not in self.get_archive_info_list(px, vol):
            self.ask(px, c.AddArchiveInfo(volume=vol, info=_archive_info(ax, syncOpt)))
            return
        info = _archive_info(ax, syncOpt)
        if syncOpt is None:
            known = self.ask(px, c.GetArchiveInfo(volume=vol, archive=ax.name))
            info = c.ArchiveInfo(
                archive=ax.name, address=ax.get_host_port(), compress=known.compress, delay_s=known.delay_s
            )
        self.ask(px, c.UpdateArchiveInfo(volume=vol, info=info))

    def _try_start(self, px: Server, vol: str) -> None:
        """Start a proxy again that was stopped for a change which failed."""
        try:
            self.start(px, vol)
        except WalbError as exc:
            self.say(f"warning: {px.name} {vol} stays stopped: {exc}")

    def _try_kick_storages(self) -> None:
        """Hurry the storages; what cannot be hurried comes by itself, only later."""
        for s, reply in self.ask_each(self.sLayout.storageL, c.Kick()).items():
            if isinstance(reply, WalbError):
                self.say(f"warning: cannot kick {s.name}: {reply}")


def _archive_info(ax: Server, syncOpt: SyncOpt | None) -> c.ArchiveInfo:
    if syncOpt is None:
        return c.ArchiveInfo(archive=ax.name, address=ax.get_host_port())
    return c.ArchiveInfo(
        archive=ax.name, address=ax.get_host_port(), compress=syncOpt.cmprOpt.wire, delay_s=syncOpt.delayS
    )


def _verify_sync_opt(syncOpt: SyncOpt | None) -> None:
    if syncOpt is not None:
        verify_type(syncOpt, SyncOpt)
