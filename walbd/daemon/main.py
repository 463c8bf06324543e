"""The life of a daemon process: start, readiness, signals, orderly end."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import Any, Final, Protocol, runtime_checkable

import structlog
import uvloop

from walbd.daemon.config import DaemonConfig
from walbd.daemon.conn import Me
from walbd.daemon.env import Env
from walbd.daemon.logs import LogFormat, LogLevel, configure, error_fields
from walbd.daemon.sd_notify import sd_notify
from walbd.daemon.tasks import Signal
from walbd.daemon.tls import mutual_tls
from walbd.errors import InternalError, WalbError
from walbd.protocol.base import Kind
from walbd.protocol.maintenance import Reloaded

log = structlog.get_logger()

_DEFECT_GRACE_S: Final = 10.0
_FILES_MAX: Final = 1 << 20


class ShutdownMode(StrEnum):
    """Let started work finish, or have it give up at the next record. Both are safe, as is kill -9."""

    GRACEFUL = "graceful"
    FORCE = "force"


class Daemon(Protocol):
    """What `run_daemon` runs."""

    async def start(self, tasks: asyncio.TaskGroup) -> None:
        """Recover what a crash left, listen, and start the background tasks in `tasks`."""

    async def stop(self, mode: ShutdownMode) -> None:
        """Take no new work and return when the running work has ended (graceful) or given up (force)."""


@runtime_checkable
class Reloadable(Protocol):
    """A daemon whose settings can be read again while it runs."""

    async def reload(self) -> Reloaded:
        """Use the configuration as it is now. Raises WalbError, and then nothing has changed."""


@dataclass
class Shutdown:
    """The request to end the process; a second, forced one overrides a graceful one that is going on."""

    mode: ShutdownMode | None = None
    defect: BaseException | None = None  # what ended the process, when nobody asked for its end

    def __post_init__(self) -> None:
        self.changed = Signal()

    def request(self, mode: ShutdownMode) -> None:
        """Ask the process to end."""
        if self.mode is not ShutdownMode.FORCE:
            self.mode = mode
        self.changed.set()

    async def requested(self) -> ShutdownMode:
        """Wait for the first request."""
        await self.changed.wait_for(lambda: self.mode is not None)
        assert self.mode is not None
        return self.mode

    async def forced(self) -> None:
        """Wait until the end is to be forced."""
        await self.changed.wait_for(lambda: self.mode is ShutdownMode.FORCE)


class _Done(Exception):
    """Ends the background tasks of a daemon that has stopped."""


async def supervise(daemon: Daemon, shutdown: Shutdown, ready: Callable[[], None] = lambda: None) -> None:
    """Run a daemon until `shutdown` is requested; the first failed background task ends it with its error."""

    async def control() -> None:
        mode = await shutdown.requested()
        sd_notify("STOPPING=1")
        log.info("daemon.stopping", mode=str(mode))
        stop = asyncio.ensure_future(daemon.stop(mode))
        if mode is ShutdownMode.GRACEFUL:
            forced = asyncio.ensure_future(shutdown.forced())
            await asyncio.wait({stop, forced}, return_when=asyncio.FIRST_COMPLETED)
            forced.cancel()
            if not stop.done():  # it may wait for somebody who never answers
                stop.cancel()
                await asyncio.wait({stop})
                stop = asyncio.ensure_future(daemon.stop(ShutdownMode.FORCE))
        await stop
        raise _Done

    try:
        async with asyncio.TaskGroup() as tasks:
            await daemon.start(tasks)
            sd_notify("READY=1")
            ready()
            tasks.create_task(control(), name="control")
    except* _Done:
        pass


def run_daemon(
    kind: str,
    make: Callable[[Env, Shutdown], Daemon],
    *,
    log_level: LogLevel,
    log_format: LogFormat,
    ready: Callable[[Daemon], None] = lambda _: None,
) -> None:
    """Run a daemon in this process until it is told to end. Raises WalbError when it cannot start.

    SIGTERM and SIGINT force the end (running work is given up where it can be resumed). SIGHUP has the settings
    read again, and is ignored by a daemon that cannot do so. As many files may be open as the system allows.
    """
    configure(log_level, log_format)
    raise_file_limit()

    async def main() -> None:
        env = Env()
        shutdown = Shutdown()
        loop = asyncio.get_running_loop()
        for signum in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(signum, shutdown.request, ShutdownMode.FORCE)
        loop.set_exception_handler(partial(_callback_failed, shutdown))
        structlog.contextvars.bind_contextvars(daemon=kind)
        daemon = make(env, shutdown)
        reloads: set[asyncio.Task[None]] = set()
        started = False

        def begun() -> None:
            nonlocal started
            started = True
            ready(daemon)

        def hang_up() -> None:
            if not isinstance(daemon, Reloadable) or not started:
                log.info("daemon.sighup_ignored")
                return
            task = loop.create_task(_reload(daemon), name="reload")
            reloads.add(task)
            task.add_done_callback(reloads.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        try:
            await supervise(daemon, shutdown, begun)
            if shutdown.defect is not None:
                raise InternalError("a defect ended the daemon", hint="see its log") from shutdown.defect
        except* WalbError as group:
            error = first_error(group)
            log.error("daemon.failed", **error_fields(error))
            raise error from group
        finally:
            if reloads:
                await asyncio.wait(reloads)  # each is one look at a file
            env.pools.close()
        log.info("daemon.stopped")

    uvloop.run(main())


async def _reload(daemon: Reloadable) -> None:
    """Reload on a signal: nobody waits for the outcome, it is in the log."""
    try:
        await daemon.reload()
    except WalbError:
        pass  # logged where it failed; the settings are as before
    except Exception:
        log.exception("settings.reload_crashed")


def raise_file_limit() -> None:
    """Let this process open as many files as the system allows it; they are needed for merging wdiffs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES_MAX if hard == resource.RLIM_INFINITY else min(hard, _FILES_MAX)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _callback_failed(shutdown: Shutdown, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """End the process when a callback of ours has failed: whatever it should have done would never happen.

    Other things that reach the loop's handler, such as a connection that broke, are only logged.
    """
    error = context.get("exception")
    fields = {"what": context.get("message", ""), "error": repr(error)}
    if "handle" not in context or error is None or isinstance(error, OSError):
        log.warning("loop.complained", **fields)
        return
    log.error("loop.callback_failed", **fields, exc_info=error)
    shutdown.defect = error
    shutdown.request(ShutdownMode.FORCE)
    loop.call_later(_DEFECT_GRACE_S, os._exit, InternalError.exit_code)  # if the orderly end hangs


def first_error(group: BaseExceptionGroup[WalbError]) -> WalbError:
    """Return the first plain error in nested groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, WalbError)
    return error


def identity(config: DaemonConfig, kind: Kind) -> Me:
    """Return who a daemon is towards its peers."""
    return Me(
        node=config.name,
        kind=kind,
        group=config.group,
        io_timeout_s=config.io_timeout_s,
        connect_timeout_s=config.connect_timeout_s,
        tls=tls_context(config, server=False),
    )


def tls_context(config: DaemonConfig, *, server: bool) -> ssl.SSLContext | None:
    """Make the TLS 1.3 context with mutual authentication, or None when TLS is not configured."""
    if not config.tls_cert:
        return None
    return mutual_tls(config.tls_cert, config.tls_key, config.tls_ca, server=server)
