"""Calls to servers from ordinary, synchronous code: the one place where the library meets asyncio.

A `Client` has a thread of its own with an event loop; each call makes a connection (`walbd.daemon.conn`), and
several calls can go out at the same time. `Calls` is what the rest of the library sees, so that a test or a
simulation can put something else in its place.
"""

from __future__ import annotations

import asyncio
import socket
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final, Protocol, TypeVar

from walbd.controller.constants import KIND_OF
from walbd.controller.servers import Server, ServerConnectionParam, str_to_server_kind
from walbd.daemon.conn import Connection, Me, dial
from walbd.daemon.env import Env, Pool
from walbd.daemon.net import Address
from walbd.errors import (
    ConnectError,
    ForceStopped,
    NotSupported,
    Refused,
    RemoteError,
    TimedOut,
    UsageError,
    WalbError,
)
from walbd.ids import node_name
from walbd.protocol.base import End, JobInfo, JobState, Kind, WaitJob
from walbd.protocol.codec import Message, Request
from walbd.protocol.control import ClearVol, FullBackup, GcDiff, GetHostType, HashBackup, ResetVol
from walbd.protocol.maintenance import Replicate

T = TypeVar("T")
R = TypeVar("R", bound=Message)

Take = Callable[[Message, memoryview], None]  # one message of a stream, and its payload

DEFAULT_TIMEOUT_S: Final = 10.0
_AGREE_S: Final = 50.0  # for a server that must first agree with another one
_REMOVE_S: Final = 90.0  # for one that removes many files
_MORE_S: Final[dict[type[Request[Any]], float]] = {
    FullBackup: _AGREE_S,
    HashBackup: _AGREE_S,
    Replicate: _AGREE_S,
    ClearVol: _REMOVE_S,
    ResetVol: _REMOVE_S,
    GcDiff: _REMOVE_S,
}
_OWN_NAMES: Final = frozenset({"self", "message", "hint", "remote_code"})  # cannot be facts


START_HINT: Final = "start the daemon, or correct the address"


class Calls(Protocol):
    """How the library reaches servers, and what time is for it."""

    def call(self, s: Server, request: Request[R], timeoutS: float = 0) -> R:
        """Make one request; `timeoutS` [s] bounds each silence of the server, 0: the default.

        Raises ConnectError, TimedOut, or the server's refusal.
        """

    def call_each(
        self, calls: Sequence[tuple[Server, Request[Any]]], timeoutS: float = 0
    ) -> list[Message | WalbError]:
        """Make all requests at the same time; return each reply, or the error in its place."""

    def stream(self, s: Server, request: Request[R], take: Take, timeoutS: float = 0) -> R:
        """Make a request that a stream follows; `take` gets the reply, then each message up to End.

        It is called in a thread of its own, one call at a time. Returns the reply when the stream is complete;
        raises as `call` does, also in the middle of the stream.
        """

    def sleep(self, seconds: float) -> None:
        """Wait."""

    def now(self) -> float:
        """Return the time for deadlines [s], from any origin."""

    def close(self) -> None:
        """End what runs for this object."""


class Client:
    """Calls over the real network. Safe to use from several threads; `close` is called at exit if not before."""

    def __init__(self, me: Me | None = None, env: Env | None = None) -> None:
        self._me = me if me is not None else identity()
        self._env = env if env is not None else Env()
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._end: weakref.finalize[Any, Client] | None = None

    def call(self, s: Server, request: Request[R], timeoutS: float = 0) -> R:
        return self._run(self._call(s, request, timeoutS))

    def call_each(
        self, calls: Sequence[tuple[Server, Request[Any]]], timeoutS: float = 0
    ) -> list[Message | WalbError]:
        async def one(s: Server, request: Request[Any]) -> Message | WalbError:
            try:
                reply: Message = await self._call(s, request, timeoutS)
            except WalbError as exc:
                return exc
            return reply

        async def all_of_them() -> list[Message | WalbError]:
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(one(s, request)) for s, request in calls]
            return [task.result() for task in running]

        return self._run(all_of_them())

    def stream(self, s: Server, request: Request[R], take: Take, timeoutS: float = 0) -> R:
        async def follow() -> R:
            async with self._connected(s) as conn:
                with _about(request):
                    reply = await conn.call(request, timeout_s=self._limit(request, timeoutS))
                await self._env.pools.run(Pool.QUERY, take, reply, memoryview(b""))
                while True:
                    message, payload = await conn.receive(timeout_s=self._limit(request, timeoutS))
                    if isinstance(message, End):
                        return reply
                    await self._env.pools.run(Pool.QUERY, take, message, payload)

        return self._run(follow())

    def sleep(self, seconds: float) -> None:
        self._run(asyncio.sleep(seconds))

    def now(self) -> float:
        return self._running_loop().time()

    def close(self) -> None:
        """End the thread; the next call starts a new one."""
        with self._lock:
            if self._end is not None:
                self._end()
            self._loop = self._end = None

    def find_out(self, host: str, port: int) -> ServerConnectionParam:
        """Ask the daemon at an address who it is."""

        async def ask() -> ServerConnectionParam:
            async with dial(self._env, self._me, Address(host=host, port=port)) as conn:
                reply = await conn.call(GetHostType())
                return ServerConnectionParam(conn.peer.node, host, port, str_to_server_kind(str(reply.kind)))

        try:
            return self._run(ask())
        except RemoteError as exc:
            raise local_error(exc, f"{host}:{port}") from None
        except ConnectError as exc:
            raise ConnectError(exc.message, hint=exc.hint or START_HINT, **exc.facts) from exc

    async def _call(self, s: Server, request: Request[R], timeoutS: float) -> R:
        async with self._connected(s) as conn:
            with _about(request):
                return await conn.call(request, timeout_s=self._limit(request, timeoutS))

    def _limit(self, request: Request[Any], timeoutS: float) -> float:
        return timeoutS or patience_s(request, self._me.io_timeout_s)

    @asynccontextmanager
    async def _connected(self, s: Server) -> AsyncIterator[Connection]:
        """Connect to a server; errors name it, and those that it told of are those of their code."""
        try:
            async with dial(self._env, self._me, Address(host=s.address, port=s.port)) as conn:
                if conn.peer.kind is not KIND_OF[s.kind]:
                    raise Refused(
                        "another kind of server answers at this address",
                        hint="correct the address in the group file",
                        server=s.name,
                        address=s.get_host_port(),
                        expected=str(KIND_OF[s.kind]),
                        kind=str(conn.peer.kind),
                    )
                yield conn
        except RemoteError as exc:
            raise local_error(exc, s.name) from None
        except ConnectError as exc:
            raise ConnectError(
                exc.message,
                hint=exc.hint or START_HINT,
                server=s.name,
                **{"address": s.get_host_port()} | exc.facts,
            ) from exc
        except TimedOut as exc:
            raise TimedOut(exc.message, hint=exc.hint, server=s.name, **exc.facts) from exc

    def _run(self, step: Coroutine[Any, Any, T]) -> T:
        """Run a step on the loop and wait for it; an interrupt (Ctrl-C) cancels it."""
        future = asyncio.run_coroutine_threadsafe(step, self._running_loop())
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                thread = threading.Thread(target=self._loop.run_forever, name="walbc", daemon=True)
                thread.start()
                self._end = weakref.finalize(self, _end_loop, self._loop, thread, self._env)
            return self._loop


@contextmanager
def _about(request: Request[Any]) -> Iterator[None]:
    """Have errors of a request name its volume, where the server did not."""
    try:
        yield
    except WalbError as exc:
        volume = getattr(request, "volume", "")
        if volume and "volume" not in exc.facts:
            exc.facts = {"volume": volume} | exc.facts
        raise


def _end_loop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, env: Env) -> None:
    async def cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    if thread is threading.current_thread():  # collected inside the loop: nothing can wait for it here
        loop.call_soon(loop.stop)
        return
    asyncio.run_coroutine_threadsafe(cancel_all(), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()
    env.pools.close()


def patience_s(request: Request[Any], timeout_s: float = DEFAULT_TIMEOUT_S) -> float:
    """Return how long the answer to a request may take [s], where other answers may take `timeout_s`.

    A server that is asked to wait answers later by that, and some things take their time.
    """
    if isinstance(request, WaitJob):
        return timeout_s + request.wait_s
    return timeout_s + _MORE_S.get(type(request), 0.0)


def identity(
    *, group: str = "default", node: str = "", timeoutS: float = 0, tls: tuple[str, str, str] | None = None
) -> Me:
    """Return who the controller is in handshakes; `tls` names certificate, key and authority (PEM files)."""
    context = None
    if tls is not None:
        from walbd.daemon.tls import mutual_tls

        context = mutual_tls(*tls, server=False)
    limit_s = timeoutS or DEFAULT_TIMEOUT_S
    return Me(
        node=node_name(node or default_node()),
        kind=Kind.CONTROL,
        group=node_name(group),
        io_timeout_s=limit_s,
        connect_timeout_s=min(limit_s, DEFAULT_TIMEOUT_S),
        tls=context,
    )


def default_node() -> str:
    """Return the host's name, or `walbc` where it is no legal name of a node."""
    try:
        return node_name(socket.gethostname())
    except UsageError:
        return "walbc"


def local_error(error: RemoteError, server: str) -> WalbError:
    """Turn what a server told us into the class that its code stands for.

    Refusals and bad arguments become their own classes. What failed *at* the server (a lost connection to its
    peer, a full disk) stays a RemoteError, so that it is not taken for a failure on the way to the server.
    """
    facts = {"server": server} | {k: v for k, v in error.facts.items() if k not in _OWN_NAMES}
    if error.remote_code == "remote-protocol" and "request" in facts:
        return NotSupported(
            "the server does not know this request", hint="compare the versions with `walbc version`", **facts
        )
    for root in (Refused, UsageError):
        cls = _class_of(error.remote_code, root)
        if cls is not None:
            return cls(error.message, hint=error.hint, **facts)
    return RemoteError(error.remote_code, error.message, hint=error.hint, **facts)


def ended_job(s: Server, job: JobInfo) -> JobInfo:
    """Return a job that is done; raise the error of any other that has ended."""
    if job.state is JobState.DONE:
        return job
    facts: dict[str, Any] = {"server": s.name, "volume": job.volume, "job": job.job, "name": job.name}
    if job.state is JobState.CANCELLED:
        raise ForceStopped("the work was given up, as the daemon ended", **facts)
    error = RemoteError(job.error_code or "internal", job.error or "the job failed", hint=job.hint, **facts)
    raise local_error(error, s.name)


def _class_of(code: str, root: type[WalbError]) -> type[WalbError] | None:
    if root.code == code and root.__init__ is WalbError.__init__:
        return root
    for sub in root.__subclasses__():
        found = _class_of(code, sub)
        if found is not None:
            return found
    return None
