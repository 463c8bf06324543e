"""Settings at run time: the configuration that counts now, and reading it again without a restart.

`Settings` owns it. Whoever needs a setting that may change asks `current` each time; what has to keep a value of
its own (a limit, a level) follows. Which settings may change is said where they are declared (`LIVE`).
Source: docs/operations.md, "Changing settings".
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import msgspec
import structlog

from walbd.daemon.config import DaemonConfig, settings
from walbd.daemon.conn import Me
from walbd.daemon.logs import error_fields, set_level
from walbd.daemon.scheduler import RetryPolicy
from walbd.daemon.sd_notify import sd_notify
from walbd.daemon.server import Server
from walbd.errors import WalbError
from walbd.protocol.maintenance import Reloaded

log = structlog.get_logger()

C = TypeVar("C", bound=DaemonConfig)

Read = Callable[[], Awaitable[C]]
Follow = Callable[[C, C], None]  # called with the old and the new configuration; must not fail


class Settings(Generic[C]):
    """The configuration of a daemon, from its start to its end."""

    def __init__(self, config: C, read: Read[C] | None = None) -> None:
        """`read()` loads file and options again, as at the start, and raises ConfigError."""
        self._configured = config
        self._current = config
        self._read = read
        self._followers: list[Follow[C]] = []
        self._lock = asyncio.Lock()  # one change at a time
        self._live = {setting.name for setting in settings(type(config)) if setting.live}

    @property
    def current(self) -> C:
        """What counts now; ask again each time."""
        return self._current

    @property
    def configured(self) -> C:
        """What file and options say; settings that need a restart are those of the start."""
        return self._configured

    def follow(self, step: Follow[C]) -> None:
        """Call `step(old, new)` after each change."""
        self._followers.append(step)

    async def reload(self) -> Reloaded:
        """Read the configuration again and use all of it that can be used at once.

        Raises ConfigError, or DiskFailed when the change cannot be made durable; then nothing has changed.
        systemd is told, if it supervises the process.
        """
        sd_notify(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
        try:
            async with self._lock:
                done = await self._reload()
        except WalbError as exc:
            log.error("settings.reload_failed", **error_fields(exc))
            raise
        finally:
            sd_notify("READY=1")
        log.info("settings.reloaded", applied=done.applied, needs_restart=done.needs_restart)
        return done

    async def _reload(self) -> Reloaded:
        new = self._configured if self._read is None else await self._read()
        changed = changed_names(self._configured, new)
        live = {name: getattr(new, name) for name in changed if name in self._live}
        configured = msgspec.structs.replace(self._configured, **live)
        configured.check()
        return Reloaded(
            applied=await self._adopt(configured),
            needs_restart=[name for name in changed if name not in self._live],
        )

    async def _adopt(self, configured: C) -> list[str]:
        """Take over a checked configuration; return the names of the settings that count otherwise now.

        The caller holds the lock. Those who override something do that here.
        """
        return self._use(configured, configured)

    def _use(self, configured: C, current: C) -> list[str]:
        """Make a change visible, in one step of the loop."""
        old, self._configured, self._current = self._current, configured, current
        for step in self._followers:
            step(old, current)
        return changed_names(old, current)


def changed_names(old: DaemonConfig, new: DaemonConfig) -> list[str]:
    """Return the names of the settings that differ, in the order of their declaration."""
    return [name for name in old.__struct_fields__ if getattr(old, name) != getattr(new, name)]


def retry_policy(config: DaemonConfig) -> RetryPolicy:
    """Return the delays after failures."""
    return RetryPolicy(config.retry_delay_min_s, config.retry_delay_max_s)


def follow_common(settings: Settings[C], me: Me, server: Server) -> None:
    """Have what all daemons have follow the settings: log level, patience, number of connections."""

    def step(old: C, new: C) -> None:
        if new.log_level != old.log_level:
            set_level(new.log_level)
        me.io_timeout_s, me.connect_timeout_s = new.io_timeout_s, new.connect_timeout_s
        server.connections_max = new.connections_max

    settings.follow(step)
