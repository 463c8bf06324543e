"""Tell systemd how far the daemon is (sd_notify(3)); without systemd this does nothing."""

from __future__ import annotations

import os
import socket


def sd_notify(state: str) -> None:
    """Send a notification such as `READY=1` to the socket that systemd named; errors are ignored."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    if path.startswith("@"):
        path = "\0" + path[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.connect(path)
            sock.sendall(state.encode())
    except OSError:
        pass  # supervision is an extra: a daemon without it still works
