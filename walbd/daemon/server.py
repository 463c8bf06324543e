"""The server side of every daemon: connections, the handshake, and requests handed to their handlers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import structlog

from walbd.daemon.conn import Connection, Me, Peer, welcome
from walbd.daemon.env import Env
from walbd.daemon.logs import error_fields
from walbd.daemon.net import Address, FrameStream, Listener
from walbd.daemon.tasks import Signal, spawn
from walbd.errors import Busy, ConnectError, RemoteProtocolError, Stopping, TimedOut, WalbError
from walbd.protocol.base import Kind
from walbd.protocol.codec import Message, Request

log = structlog.get_logger()

# A handler returns the reply, or None when it has conducted the whole conversation itself.
Handler = Callable[[Connection, Any], Awaitable[Message | None]]


@dataclass(slots=True)
class RequestStat:
    """How often a request came, and how long it took in all [s]."""

    count: int = 0
    elapsed_s: float = 0.0


class Server:
    """Accept connections and serve requests until it is stopped."""

    def __init__(
        self,
        env: Env,
        me: Me,
        handlers: Mapping[type[Request[Any]], Handler],
        *,
        connections_max: int = 100,
        idle_timeout_s: float = 300.0,
    ) -> None:
        self.addresses: list[Address] = []
        self.stats: dict[tuple[str, str], RequestStat] = {}  # by (request tag, client node)
        self._env = env
        self._me = me
        self._handlers = handlers
        self.connections_max = connections_max  # may be changed at any time
        self._idle_timeout_s = idle_timeout_s
        self._listeners: list[Listener] = []
        self._streams: dict[FrameStream, bool] = {}  # every connection: is it in a conversation now?
        self._closing = False
        self._changed = Signal()
        self._tasks: asyncio.TaskGroup | None = None

    async def listen(self, tasks: asyncio.TaskGroup, addresses: list[Address], tls: Any = None) -> None:
        """Begin to accept on all addresses; connections are served by tasks of `tasks`. Raises ConnectError."""
        self._tasks = tasks
        for address in addresses:
            listener = await self._env.net.listen(address, self._accept, None if address.path else tls)
            self._listeners.append(listener)
            self.addresses.append(listener.address)

    async def stop(self, *, force: bool) -> None:
        """Accept no more; end idle connections now and the others after their conversation, or all at once."""
        self._closing = True
        for listener in self._listeners:
            listener.close()
        for stream, in_conversation in list(self._streams.items()):
            if force or not in_conversation:
                stream.abort()
        await self._changed.wait_for(lambda: not self._streams)

    def _accept(self, stream: FrameStream) -> None:
        assert self._tasks is not None
        if self._closing:
            stream.abort()
            return
        try:
            task = spawn(self._tasks, self._serve(stream), f"serve:{stream.peer}")
        except Stopping:
            stream.abort()
            return
        self._streams[stream] = False
        # Not in the task itself: one that is cancelled before its first step never runs.
        task.add_done_callback(lambda _: self._forget(stream))

    def _forget(self, stream: FrameStream) -> None:
        stream.abort()
        del self._streams[stream]
        self._changed.set()

    async def _serve(self, stream: FrameStream) -> None:
        try:
            conn = await welcome(stream, self._me)
            if len(self._streams) > self.connections_max:
                raise Busy("too many connections", hint="try again later", connections_max=self.connections_max)
            with structlog.contextvars.bound_contextvars(peer=conn.peer.node):
                while await self._conversation(stream, conn):
                    pass
            await conn.close()
        except (ConnectError, TimedOut) as exc:
            log.debug("connection.lost", **error_fields(exc))
        except WalbError as exc:
            log.warning("connection.refused", **error_fields(exc))
            await self._last_words(stream, exc)

    async def _conversation(self, stream: FrameStream, conn: Connection) -> bool:
        """Serve one request; False when the client has left or the connection must not be used any more."""
        self._streams[stream] = False
        if self._closing:
            return False
        try:
            incoming = await conn.receive_or_end(timeout_s=self._idle_timeout_s)
        except TimedOut:
            return False
        if incoming is None:
            return False
        request = incoming.message
        handler = self._handlers.get(type(request))  # type: ignore[arg-type]
        if handler is None:
            raise RemoteProtocolError("this daemon does not serve that request", request=request.TAG)
        self._streams[stream] = True
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            try:
                reply = await handler(conn, request)
            finally:
                # Before the reply: who has it finds the request counted.
                stat = self.stats.setdefault((request.TAG, conn.peer.node), RequestStat())
                stat.count += 1
                stat.elapsed_s += loop.time() - started
            if reply is not None:
                await conn.send(reply)
        except WalbError as exc:
            # Also one that says that somebody is gone: it may be somebody else than our client. If it is the
            # client, it does not hear it.
            log.info("request.failed", request=request.TAG, **error_fields(exc))
            await self._last_words(stream, exc)
            return False
        except Exception as exc:
            log.exception("request.crashed", request=request.TAG)
            await self._last_words(stream, exc)
            return False
        return True

    async def _last_words(self, stream: FrameStream, error: BaseException) -> None:
        """Send an error as the last message of a connection, and wait until the peer has closed it.

        Closing at once, with data of the peer unread, would reset the connection, and the reset could
        overtake the error.
        """
        conn = Connection(stream, Peer("?", Kind.CONTROL, stream.peer), self._me.io_timeout_s)
        try:
            async with asyncio.timeout(self._me.io_timeout_s):
                await conn.send_error(error)
                while await stream.receive() is not None:
                    pass
        except (TimeoutError, WalbError):
            pass  # the peer does not listen: nothing more can be done for it
