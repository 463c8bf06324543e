"""Both halves of the handshake: who fits, who does not, and what the other side is told."""

from __future__ import annotations

from typing import Any, cast

import pytest

from walbd.daemon.conn import LIMITS, Me, greet, welcome
from walbd.daemon.net import FrameStream
from walbd.errors import Refused, RemoteError, RemoteProtocolError, WalbError
from walbd.protocol.base import VERSION_MAX, VERSION_MIN, ErrorReply, Filler, Hello, Kind, Ok, Welcome, error_reply
from walbd.protocol.codec import Message, decode, encode
from walbd.protocol.frame import Frame

ME = Me(node="s0", kind=Kind.STORAGE, group="g")
FITS = Welcome(version=VERSION_MAX, node="p0", kind=Kind.PROXY, group="g")


class Line:
    """A connection whose other end says what it is told to say."""

    def __init__(self, *says: Message) -> None:
        self.peer = "1.2.3.4:5"
        self.limits: Any = None
        self.says = list(says)
        self.heard: list[Message] = []

    async def send(self, header: bytes, _payload: Any) -> None:
        self.heard.append(decode(header))

    async def receive(self) -> Frame | None:
        return Frame(encode(self.says.pop(0)), memoryview(b"")) if self.says else None

    def abort(self) -> None:
        self.says = []


def stream(line: Line) -> FrameStream:
    return cast(FrameStream, line)


async def test_a_client_takes_a_server_that_fits() -> None:
    line = Line(Filler(), FITS)
    conn = await greet(stream(line), ME, "p:1")
    assert line.heard == [Hello(node="s0", kind=Kind.STORAGE, group="g")]
    assert (conn.peer.node, conn.peer.kind, conn.peer.address) == ("p0", Kind.PROXY, "p:1")
    assert line.limits is LIMITS


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (Welcome(version=VERSION_MAX, node="p0", kind=Kind.PROXY, group="h"), Refused),
        (Welcome(version=VERSION_MAX + 1, node="p0", kind=Kind.PROXY, group="g"), RemoteProtocolError),
        (Welcome(version=VERSION_MIN - 1, node="p0", kind=Kind.PROXY, group="g"), RemoteProtocolError),
        (Ok(), RemoteProtocolError),
        (error_reply(Refused("no")), RemoteError),
    ],
    ids=["group", "too new", "too old", "no welcome", "refusal"],
)
async def test_a_client_refuses_a_server_that_does_not_fit(answer: Message, error: type[WalbError]) -> None:
    line = Line(answer)
    with pytest.raises(error):
        await greet(stream(line), ME, "p:1")
    assert line.limits is None  # nothing large is taken from a stranger


@pytest.mark.parametrize("newest", [VERSION_MAX, VERSION_MAX + 3])
async def test_a_server_takes_a_client_that_fits(newest: int) -> None:
    line = Line(Hello(node="p0", kind=Kind.PROXY, group="g", version_min=VERSION_MIN, version_max=newest))
    conn = await welcome(stream(line), ME)
    assert line.heard == [Welcome(version=VERSION_MAX, node="s0", kind=Kind.STORAGE, group="g")]
    assert (conn.peer.node, conn.peer.kind, conn.peer.address) == ("p0", Kind.PROXY, line.peer)
    assert line.limits is LIMITS


@pytest.mark.parametrize(
    ("hello", "hint"),
    [
        ({"group": "h"}, 'group = "g"'),
        ({"version_min": VERSION_MAX + 1, "version_max": VERSION_MAX + 2}, "update the older side"),
        ({"version_min": 0, "version_max": VERSION_MIN - 1}, "update the older side"),
    ],
    ids=["group", "too new", "too old"],
)
async def test_a_client_that_does_not_fit_is_told_why(hello: dict[str, Any], hint: str) -> None:
    line = Line(Hello(**({"node": "p0", "kind": Kind.PROXY, "group": "g"} | hello)))
    with pytest.raises(Refused):
        await welcome(stream(line), ME)
    (told,) = line.heard
    assert isinstance(told, ErrorReply)
    assert (told.code, hint in told.hint) == ("refused", True)
    assert line.limits is None
