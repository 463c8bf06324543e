"""The controller: all operations of a backup group as plain methods. Source: docs/controller.md."""

from __future__ import annotations

from walbd.controller.policy import Policies
from walbd.controller.replication import Replication
from walbd.controller.settings import Settings


class Controller(Replication, Settings, Policies):
    """Operations on a backup group.

    ``Controller(controllerPath, sLayout, isDebug=False, timeoutS=0)``: `controllerPath` is accepted for scripts
    that pass one and is not used, as no program is run; `timeoutS` [s] bounds each silence of a server (0: 10 s).
    By keyword: `group` (name of the backup group), `tls` (certificate, key, authority: PEM files), `progress`
    (called with a `Progress` while something is waited for), `calls` (how servers are reached).

    Arguments of a wrong type raise TypeError; everything else that fails raises a `walbd.errors.WalbError`:
    ConnectError and TimedOut when a server cannot be asked or something takes too long, BadState and other
    kinds of Refused when a server (or a check before anything was changed) says no, NotSupported when a server
    does not know a request, RemoteError for what failed at a server.

    Every method takes a ServerConnectionParam or a ServerStartupParam as a server. Safe to use from one thread
    at a time. `close` (or a `with` block) ends its thread.
    """
