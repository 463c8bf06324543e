"""Settings of daemons that run. Source: docs/controller.md, "Settings"."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

from walbd.controller.constants import K_ARCHIVE, K_PROXY, K_STORAGE
from walbd.controller.queries import Queries
from walbd.controller.servers import Server, ServerParams, verify_server_kind
from walbd.controller.verify import verify_type, verify_u64
from walbd.errors import NotSupported
from walbd.protocol import maintenance as m
from walbd.protocol.control import GetHostType


class Settings(Queries):
    """Settings; see `Controller`."""

    def reload(self, s: Server) -> m.Reloaded:
        """Make a daemon read its configuration again; tells what counts now and what needs a restart.

        An error in the configuration changes nothing.
        """
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        return self.ask(s, m.Reload())

    def reload_all(self, sL: Sequence[Server] | None = None) -> dict[str, m.Reloaded]:
        """Make several daemons (None: all of the layout) read their configuration again; by name.

        All are asked; raises when one has refused or does not answer.
        """
        return {s.name: reply for s, reply in self.ask_all(self._servers(sL), m.Reload()).items()}

    def retarget(self, sx: Server, ax: Server | None = None, pxL: Sequence[Server] | None = None) -> m.Reloaded:
        """Make a storage use another primary archive, or other proxies, from now on; None: those of the layout.

        Durable, until the storage's configuration itself names others.
        """
        verify_server_kind(sx, (K_STORAGE,))
        if ax is None:
            ax = self.sLayout.get_primary_archive()
        if pxL is None:
            self.sLayout.verify(0, 1, 0)
            pxL = self.sLayout.proxyL
        verify_server_kind(ax, (K_ARCHIVE,))
        verify_type(pxL, (list, tuple), ServerParams)
        for px in pxL:
            verify_server_kind(px, (K_PROXY,))
        addresses = [px.get_host_port() for px in pxL]
        return self.ask(sx, m.Retarget(archive=ax.get_host_port(), proxies=addresses))

    def retarget_all(self) -> dict[str, m.Reloaded]:
        """Make all storages use the primary archive and the proxies of the layout. All must answer."""
        self.ask_all(self.sLayout.storageL, GetHostType())
        return {sx.name: self.retarget(sx) for sx in self.sLayout.storageL}

    def dump_log_header(self, sx: Server, vol: str, lsid: int) -> None:
        """Make a storage keep the block at an lsid of the log as a file in the volume's directory, to look at."""
        self._check(sx, vol, K_STORAGE)
        verify_u64(lsid)
        self.ask(sx, m.DumpLogHeader(volume=vol, lsid=lsid))

    # What walb-tools had and walbd refuses

    def run_remote_command(
        self, s: Server, args: Sequence[str], putMsg: bool = False, timeoutS: float = 0
    ) -> NoReturn:
        """Raise NotSupported: no daemon runs programs for others. Use ssh."""
        del args, putMsg, timeoutS
        verify_server_kind(s, (K_STORAGE, K_PROXY, K_ARCHIVE))
        raise NotSupported("daemons run no programs for others", hint="use ssh", server=s.name)

    def get_run_remote_command(self, s: Server) -> Callable[..., NoReturn]:
        """Raise NotSupported: no daemon runs programs for others. Use ssh."""
        self.run_remote_command(s, [])
