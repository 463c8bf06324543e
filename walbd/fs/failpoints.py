"""Named places in real code at which a test can kill the process or make the disk fail.

A failpoint is registered at import, beside the code that hits it, so that a test can list all of them and
show that none is left out. Unused, a hit is one dictionary look-up. `WALBD_FAILPOINTS` arms them:
`name=action[@skip]`, comma separated, where action is `crash` (SIGKILL to ourselves: nothing is flushed),
`eio` or `enospc` (an OSError), and the first `skip` hits pass. An armed failpoint acts once.
"""

from __future__ import annotations

import errno
import os
import signal
from typing import Final

ENV: Final = "WALBD_FAILPOINTS"
_ACTIONS: Final = {"crash": 0, "eio": errno.EIO, "enospc": errno.ENOSPC}

_registered: dict[str, str] = {}
_armed: dict[str, tuple[str, int]] = {}


def register(name: str, meaning: str) -> str:
    """Declare a failpoint (`daemon.thing.before_step`) and what a crash there leaves behind; return its name."""
    if name in _registered:
        raise AssertionError(f"failpoint {name} is registered twice")
    _registered[name] = meaning
    return name


def registered() -> dict[str, str]:
    """Return every registered failpoint of the modules imported so far, with its meaning."""
    return dict(_registered)


def arm(spec: str) -> None:
    """Arm failpoints from `name=action[@skip],...`; raises ValueError on an unknown action."""
    for item in filter(None, spec.split(",")):
        name, _, action = item.partition("=")
        action, _, skip = action.partition("@")
        if action not in _ACTIONS:
            raise ValueError(f"unknown failpoint action {action!r} in {item!r}")
        _armed[name] = (action, int(skip or 0))


def disarm() -> None:
    """Disarm all failpoints."""
    _armed.clear()


def hit(name: str) -> None:
    """Act if `name` is armed: crash the process, or raise OSError; otherwise do nothing."""
    if not _armed:
        return
    assert name in _registered, name
    armed = _armed.get(name)
    if armed is None:
        return
    action, skip = armed
    if skip > 0:
        _armed[name] = (action, skip - 1)
        return
    del _armed[name]
    if action == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    raise OSError(_ACTIONS[action], os.strerror(_ACTIONS[action]), name)


arm(os.environ.get(ENV, ""))
