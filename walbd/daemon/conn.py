"""A connection after its handshake: typed messages with a deadline on every read and write."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar, cast

from walbd.daemon.env import Env
from walbd.daemon.flow import cancel_all
from walbd.daemon.net import TLS_HINT, Address, FrameStream
from walbd.errors import ConnectError, Refused, RemoteError, RemoteProtocolError, TimedOut, WalbError
from walbd.fs import Buf
from walbd.protocol.base import (
    VERSION_MAX,
    VERSION_MIN,
    ErrorReply,
    Filler,
    Hello,
    Kind,
    Welcome,
    error_reply,
    remote_error,
)
from walbd.protocol.codec import Message, Request, decode, encode
from walbd.protocol.frame import FrameLimits

M = TypeVar("M", bound=Message)
R = TypeVar("R", bound=Message)
T = TypeVar("T")

LIMITS = FrameLimits()


class Incoming(NamedTuple):
    """One received message; the payload is empty for most."""

    message: Message
    payload: memoryview


@dataclass(slots=True)
class Me:
    """Who we are in a handshake, and how patient. One object for all of a daemon: its patience may be changed."""

    node: str
    kind: Kind
    group: str = "default"
    io_timeout_s: float = 10.0  # for each read and each write
    connect_timeout_s: float = 10.0  # until we are connected, and until the peer has answered our greeting
    tls: ssl.SSLContext | None = None  # for connections that we open


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end."""

    node: str
    kind: Kind
    address: str


class Connection:
    """Typed messages over a frame stream. One task at a time receives, one at a time sends."""

    def __init__(self, stream: FrameStream, peer: Peer, io_timeout_s: float) -> None:
        self.peer = peer
        self.io_timeout_s = io_timeout_s
        self.sent: type[Message] | None = None  # of what kind the last message is that was given out
        self._stream = stream

    async def send(self, message: Message, *payload: Buf) -> None:
        """Send a message and its payload. Raises TimedOut or ConnectError."""
        self.sent = type(message)
        await self._within(self._stream.send(encode(message), payload), "take what was sent")

    async def receive(self, *, timeout_s: float | None = None) -> Incoming:
        """Return the next message; fillers are skipped, each starting the deadline anew.

        Raises RemoteError for an ErrorReply, ConnectError at the end of the connection, TimedOut, and
        RemoteProtocolError for bytes that are no message.
        """
        incoming = await self.receive_or_end(timeout_s=timeout_s)
        if incoming is None:
            raise ConnectError("the peer closed the connection", peer=self._name)
        if isinstance(incoming.message, ErrorReply):
            raise remote_error(incoming.message)
        return incoming

    async def receive_or_end(self, *, timeout_s: float | None = None) -> Incoming | None:
        """Like `receive`, but an orderly end is None and an ErrorReply is handed out."""
        while True:
            frame = await self._within(self._stream.receive(), "say anything", timeout_s)
            if frame is None:
                return None
            message = decode(frame.header)
            if not isinstance(message, Filler):
                return Incoming(message, frame.payload)

    async def expect(self, cls: type[M], *, timeout_s: float | None = None) -> M:
        """Return the next message, which must be a `cls` without payload."""
        message, payload = await self.receive(timeout_s=timeout_s)
        if not isinstance(message, cls) or payload:
            raise self.unexpected(message, cls)
        return message

    async def call(self, request: Request[R], *payload: Buf, timeout_s: float | None = None) -> R:
        """Send a request and return its reply. Raises RemoteError when the peer refuses it."""
        await self.send(request, *payload)
        return cast(R, await self.expect(request.REPLY, timeout_s=timeout_s))

    async def send_error(self, error: BaseException) -> None:
        """Tell the peer of an error, if it can still be told."""
        try:
            await self.send(error_reply(error))
        except (ConnectError, TimedOut):
            pass  # the peer is gone: nothing is left to tell

    def unexpected(self, message: Message, *wanted: type[Message]) -> RemoteProtocolError:
        """Make the error for a message that must not come now."""
        return RemoteProtocolError(
            "unexpected message",
            peer=self._name,
            got=message.TAG,
            wanted=" or ".join(cls.TAG for cls in wanted),
        )

    async def close(self) -> None:
        """Send what is left and close."""
        try:
            async with asyncio.timeout(self.io_timeout_s):
                await self._stream.close()
        except TimeoutError:
            self._stream.abort()

    def abort(self) -> None:
        """Drop the connection at once, so that the peer cannot take a broken stream for a complete one."""
        self._stream.abort()

    @property
    def _name(self) -> str:
        return f"{self.peer.node}@{self.peer.address}"

    async def _within(self, step: Coroutine[Any, Any, T], what: str, timeout_s: float | None = None) -> T:
        limit = self.io_timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit):
                return await step
        except TimeoutError as exc:
            raise TimedOut(f"the peer did not {what} in time", peer=self._name, timeout_s=limit) from exc


async def greet(stream: FrameStream, me: Me, address: str) -> Connection:
    """Do the client's half of the handshake."""
    conn = Connection(stream, Peer("?", Kind.CONTROL, address), min(me.connect_timeout_s, me.io_timeout_s))
    await conn.send(Hello(node=me.node, kind=me.kind, group=me.group))
    welcome = await conn.expect(Welcome)
    if welcome.group != me.group:
        raise Refused(
            "the peer belongs to another backup group",
            hint=_group_hint(welcome.group),
            peer=welcome.node,
            group=welcome.group,
        )
    if not VERSION_MIN <= welcome.version <= VERSION_MAX:
        raise RemoteProtocolError("the peer chose an unknown protocol version", version=welcome.version)
    stream.limits = LIMITS
    conn.io_timeout_s = me.io_timeout_s
    conn.peer = Peer(welcome.node, welcome.kind, address)
    return conn


async def welcome(stream: FrameStream, me: Me) -> Connection:
    """Do the server's half of the handshake; a peer that does not fit is told why. Raises WalbError."""
    conn = Connection(stream, Peer("?", Kind.CONTROL, stream.peer), me.io_timeout_s)
    try:
        hello = await conn.expect(Hello)
        version = min(hello.version_max, VERSION_MAX)
        if version < max(hello.version_min, VERSION_MIN):
            raise Refused(
                "no protocol version in common",
                hint="update the older side",
                ours=f"{VERSION_MIN}..{VERSION_MAX}",
                theirs=f"{hello.version_min}..{hello.version_max}",
            )
        if hello.group != me.group:
            raise Refused("you belong to another backup group", hint=_group_hint(me.group), group=me.group)
    except (ConnectError, RemoteError):
        raise
    except WalbError as exc:
        await conn.send_error(exc)
        raise
    stream.limits = LIMITS  # first: what the client says next may be here before our send returns
    await conn.send(Welcome(version=version, node=me.node, kind=me.kind, group=me.group))
    conn.peer = Peer(hello.node, hello.kind, stream.peer)
    return conn


def _group_hint(group: str) -> str:
    return f'say group = "{group}" in your settings, or correct the address'


@asynccontextmanager
async def dial(env: Env, me: Me, address: Address) -> AsyncIterator[Connection]:
    """Connect and shake hands; the connection is closed at the end of the block, dropped on an error."""
    stream: FrameStream | None = None
    try:
        try:
            async with asyncio.timeout(me.connect_timeout_s):
                stream = await env.net.connect(address, me.tls)
        except TimeoutError as exc:
            raise ConnectError(
                "cannot connect in time", address=str(address), timeout_s=me.connect_timeout_s
            ) from exc
        try:
            conn = await greet(stream, me, str(address))
        except ConnectError as exc:
            exc.hint = exc.hint or TLS_HINT
            raise
        yield conn
        await conn.close()
    finally:
        if stream is not None:
            stream.abort()


async def call(env: Env, me: Me, address: Address, request: Request[R], *, timeout_s: float | None = None) -> R:
    """Connect, make one call and close."""
    async with dial(env, me, address) as conn:
        return await conn.call(request, timeout_s=timeout_s)


async def with_filler(conn: Connection, work: Coroutine[Any, Any, T], *, every_s: float | None = None) -> T:
    """Await `work` while telling the peer now and then that it goes on, so that its deadline does not pass."""
    task = asyncio.ensure_future(work)
    every_s = conn.io_timeout_s / 4 if every_s is None else every_s
    try:
        while True:
            done, _ = await asyncio.wait({task}, timeout=every_s)
            if done:
                return task.result()
            await conn.send(Filler())
    finally:
        await cancel_all([task])
