"""What every conversation uses: the handshake, answers, errors, jobs. Source: docs/protocol.md.

A connection begins with Hello (client) and Welcome or ErrorReply (server), then carries one conversation
after the other: a request, its reply, and for some requests a stream of frames in between.
"""

from __future__ import annotations

from dataclasses import field
from enum import StrEnum
from typing import Annotated, Final

import msgspec

from walbd.errors import RemoteError, WalbError, code_of
from walbd.protocol.codec import Message, Request, message

VERSION_MIN: Final = 1
VERSION_MAX: Final = 1

U16 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 16)]
U32 = Annotated[int, msgspec.Meta(ge=0, lt=1 << 32)]
U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack itself ends at 2^64
Volume = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z-]{1,64}$")]
Node = Annotated[str, msgspec.Meta(pattern=r"^[0-9A-Za-z][0-9A-Za-z._-]{0,63}$")]
Uuid = Annotated[bytes, msgspec.Meta(min_length=16, max_length=16)]
Time = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]  # unix seconds
Text = Annotated[str, msgspec.Meta(max_length=4096)]
Fact = str | int | float | bool | None


class Kind(StrEnum):
    """What a peer is."""

    STORAGE = "storage"
    PROXY = "proxy"
    ARCHIVE = "archive"
    DEVICE = "device"
    CONTROL = "control"


@message("hello")
class Hello(Message):
    """The client's first message."""

    version_min: U16 = VERSION_MIN
    version_max: U16 = VERSION_MAX
    node: Node
    kind: Kind
    group: Node  # backup group: peers of another group are refused


@message("welcome")
class Welcome(Message):
    """The server's answer to Hello."""

    version: U16  # the highest both know
    node: Node
    kind: Kind
    group: Node


@message("error")
class ErrorReply(Message):
    """Instead of any expected message: the conversation failed. The connection stays usable after a reply
    to a request; in the middle of a stream it is closed."""

    code: Annotated[str, msgspec.Meta(max_length=64)]
    message: Text
    hint: Text = ""
    facts: dict[str, Fact] = field(default_factory=dict)


@message("ok")
class Ok(Message):
    """Done, and durable where durability is meant."""


@message("filler")
class Filler(Message):
    """Nothing; sent while long work goes on so that the peer's deadline does not pass. Receivers skip it."""


@message("end")
class End(Message):
    """The orderly end of a stream."""


@message("job-accepted")
class JobAccepted(Message):
    """The work goes on; ask for it by id."""

    job: U64


class JobState(StrEnum):
    """How far a job is."""

    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


@message("job")
class JobInfo(Message):
    """One job: what runs or ran. `done` and `total` are in `unit`; total 0 means not known."""

    job: U64
    name: str
    volume: str
    state: JobState
    started: Time
    ended: Time = 0
    phase: str = ""
    unit: str = "B"
    done: U64 = 0
    total: U64 = 0
    result: dict[str, Fact] = field(default_factory=dict)
    error_code: str = ""
    error: str = ""
    hint: str = ""


@message("jobs")
class JobList(Message):
    """Jobs, newest last."""

    jobs: list[JobInfo]


@message("get-jobs")
class GetJobs(Request[JobList]):
    """List the jobs of one volume, or all (volume empty)."""

    volume: str = ""


@message("wait-job")
class WaitJob(Request[JobInfo]):
    """Answer when the job has ended, or after `wait_s` with its state then."""

    job: U64
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=60)] = 0.0


def error_reply(error: BaseException) -> ErrorReply:
    """Make the message that tells a peer of an error; what is not ours becomes `internal` without details."""
    if not isinstance(error, WalbError):
        return ErrorReply(
            code="internal", message="internal error", hint="see the log of the daemon for the traceback"
        )
    facts: dict[str, Fact] = {}
    for key, value in error.facts.items():
        if isinstance(value, int) and not -(1 << 63) <= value < 1 << 64:
            facts[key] = str(value)  # no message has room for it
        else:
            facts[key] = value if isinstance(value, str | int | float | bool | None) else str(value)
    return ErrorReply(code=code_of(error), message=error.message[:4096], hint=error.hint[:4096], facts=facts)


def remote_error(reply: ErrorReply) -> RemoteError:
    """Make the exception for an error that a peer told us of."""
    facts = {key: value for key, value in reply.facts.items() if key not in ("message", "hint", "remote_code")}
    return RemoteError(reply.code, reply.message, hint=reply.hint, **facts)
