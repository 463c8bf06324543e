"""The one family of errors.

Subclass by what the *caller* does next (retry, resync, refuse, stop the volume, stop the daemon), not by
what went wrong. The message is a short sentence without the facts; facts are keyword fields, which become
log fields, travel on the wire and are printed after the message. A hint says what to do next.
"""

from __future__ import annotations

from typing import ClassVar


class WalbError(Exception):
    """Root of everything walbd raises on purpose."""

    code: ClassVar[str] = "internal"  # stable: on the wire, in logs and in --json output
    retryable: ClassVar[bool] = False  # the same call may succeed later with nothing changed by the caller
    exit_code: ClassVar[int] = 1  # of the command-line tools; docs/controller.md has the table
    retry_max_s: float | None = (
        None  # the most that a daemon waits before it tries again; None: as its settings say
    )

    def __init__(self, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.facts = facts

    def __str__(self) -> str:
        facts = " ".join(f"{key}={value}" for key, value in self.facts.items())
        return f"{self.message} ({facts})" if facts else self.message


class InternalError(WalbError):
    """A broken invariant of our own: never retried, always a defect to report."""

    code = "internal"
    exit_code = 70


class UsageError(WalbError):
    """The caller's arguments are wrong; nothing was tried."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or option is wrong; the daemon does not start."""

    code = "config"


class CorruptData(WalbError):
    """Bytes on disk or in a stream are not what their format promises.

    `path` (or `source`) and `offset` [byte] are always among the facts.
    """

    code = "corrupt-data"


class DiskFailed(WalbError):
    """The operating system refused or failed a read, write or sync."""

    code = "disk-failed"


class DiskFull(DiskFailed):
    """No space is left where something had to be written; freeing space makes a retry succeed."""

    code = "disk-full"
    retryable = True


class RemoteProtocolError(WalbError):
    """The peer broke the protocol; the connection is closed."""

    code = "remote-protocol"


class LocalProtocolError(WalbError):
    """Our own code used the protocol wrongly."""

    code = "local-protocol"


class ConnectError(WalbError):
    """The peer cannot be reached, or the connection to it was lost."""

    code = "connect"
    retryable = True
    exit_code = 3


class TimedOut(WalbError):
    """A deadline passed."""

    code = "timed-out"
    retryable = True
    exit_code = 4


class Refused(WalbError):
    """The request is well-formed, but must not be carried out now; nothing was changed."""

    code = "refused"
    exit_code = 5


class BadState(Refused):
    """The volume is not in a state in which this command is allowed."""

    code = "bad-state"


class Busy(Refused):
    """Something else is at work that excludes this; it will end by itself."""

    code = "busy"
    retryable = True


class Stopping(Refused):
    """The volume, or the whole daemon, is being stopped."""

    code = "stopping"
    retryable = True


class NotFound(Refused):
    """The thing that was named does not exist."""

    code = "not-found"


class AlreadyExists(Refused):
    """The thing that should be made exists."""

    code = "already-exists"


class WlogOverflow(Refused):
    """The log ring has overwritten wlogs that were not sent yet: only a hash or full backup can continue."""

    code = "wlog-overflow"


class NotSupported(Refused):
    """The peer does not know this request: it is older or newer than we are, or of another kind."""

    code = "not-supported"


class HistoryBroken(Refused):
    """What we have does not continue what the other side has (foreign uuid, lost log): a resync is due."""

    code = "history-broken"


class ForceStopped(WalbError):
    """Work was given up on an operator's `stop force` or a forced shutdown."""

    code = "force-stopped"


class ReadOnlyDevice(WalbError):
    """The device failed a log or data write and takes no more writes until it is restarted."""

    code = "read-only-device"


class RemoteError(WalbError):
    """The peer answered with an error; `code` is the peer's.

    Instances carry the peer's code in `remote_code`; `code_of` reads it from any error.
    """

    code = "remote"

    def __init__(self, remote_code: str, message: str, *, hint: str = "", **facts: object) -> None:
        super().__init__(message, hint=hint, **facts)
        self.remote_code = remote_code


def code_of(error: BaseException) -> str:
    """Return the stable code of any error; errors that are not ours are `internal`."""
    if isinstance(error, RemoteError):
        return error.remote_code
    return error.code if isinstance(error, WalbError) else "internal"


def exit_code_of(error: WalbError) -> int:
    """Return the exit status for an error; a remote error exits as its code would here."""
    if isinstance(error, RemoteError):
        for cls in _subclasses(WalbError)[1:]:  # the root has the code of InternalError, which says more
            if cls.code == error.remote_code:
                return cls.exit_code
    return error.exit_code


def is_retryable(error: BaseException) -> bool:
    """Say whether the same call may succeed later with nothing changed by the caller."""
    if isinstance(error, RemoteError):
        return any(cls.code == error.remote_code and cls.retryable for cls in _subclasses(WalbError))
    return isinstance(error, WalbError) and error.retryable


def _subclasses(cls: type[WalbError]) -> list[type[WalbError]]:
    found = [cls]
    for sub in cls.__subclasses__():
        found += _subclasses(sub)
    return found
