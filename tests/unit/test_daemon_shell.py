"""The daemon shell over real sockets: handshake, calls, errors, streams, shutdown."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import trustme

from walbd.daemon.conn import Connection, Me, call, dial
from walbd.daemon.env import Env
from walbd.daemon.net import TLS_HINT, Address, SocketStream
from walbd.daemon.server import Handler, Server
from walbd.daemon.tls import mutual_tls
from walbd.errors import BadState, ConnectError, Refused, RemoteError, RemoteProtocolError, TimedOut
from walbd.protocol.base import End, GetJobs, JobList, Kind, WaitJob, Welcome

ME = Me(node="a", kind=Kind.CONTROL, io_timeout_s=10)


@asynccontextmanager
async def serving(
    handlers: dict[Any, Handler], address: Address | None = None, **kwargs: Any
) -> AsyncIterator[tuple[Env, Server, Address]]:
    env = Env()
    server = Server(env, Me(node="s", kind=Kind.PROXY, io_timeout_s=10), handlers, **kwargs)
    async with asyncio.TaskGroup() as tasks:
        await server.listen(tasks, [address or Address("127.0.0.1", 0)])
        try:
            yield env, server, server.addresses[0]
        finally:
            await server.stop(force=True)
    env.pools.close()


async def no_jobs(_conn: Connection, _request: GetJobs) -> JobList:
    return JobList(jobs=[])


async def test_calls_one_after_the_other() -> None:
    async with serving({GetJobs: no_jobs}) as (env, server, address), dial(env, ME, address) as conn:
        assert conn.peer.node == "s"
        for _ in range(3):
            assert await conn.call(GetJobs()) == JobList(jobs=[])
        assert server.stats["get-jobs", "a"].count == 3


async def test_unix_socket(tmp_path: Path) -> None:
    async with serving({GetJobs: no_jobs}, Address(path=str(tmp_path / "s"))) as (env, _, address):
        assert await call(env, ME, address, GetJobs()) == JobList(jobs=[])


async def test_error_reaches_the_caller_with_code_hint_and_facts() -> None:
    async def refuse(_conn: Connection, _request: GetJobs) -> None:
        raise BadState("no", hint="stop it", volume="v")

    async with serving({GetJobs: refuse}) as (env, _, address):
        with pytest.raises(RemoteError) as caught:
            await call(env, ME, address, GetJobs())
    assert (caught.value.remote_code, caught.value.message, caught.value.hint) == ("bad-state", "no", "stop it")
    assert caught.value.facts == {"volume": "v"}


async def test_foreign_bug_is_internal_and_tells_no_details() -> None:
    async def crash(_conn: Connection, _request: GetJobs) -> None:
        raise KeyError("secret")

    async with serving({GetJobs: crash}) as (env, _, address):
        with pytest.raises(RemoteError) as caught:
            await call(env, ME, address, GetJobs())
    assert caught.value.remote_code == "internal"
    assert "secret" not in str(caught.value)


async def test_error_arrives_while_the_client_streams() -> None:
    async def refuse_late(conn: Connection, _request: GetJobs) -> None:
        await conn.receive()
        raise BadState("enough")

    async def stream(conn: Connection) -> None:
        await conn.send(GetJobs())
        data = bytes(1 << 20)
        for _ in range(64):
            await conn.send(End(), data)
        await conn.expect(JobList)

    async with serving({GetJobs: refuse_late}) as (env, _, address), dial(env, ME, address) as conn:
        with pytest.raises(RemoteError, match="enough"):
            await stream(conn)


async def test_payload_goes_through_unchanged() -> None:
    async def mirror(conn: Connection, _request: GetJobs) -> None:
        while not isinstance((incoming := await conn.receive()).message, JobList):
            await conn.send(End(), incoming.payload[:100], incoming.payload[100:])

    async with serving({GetJobs: mirror}) as (env, _, address), dial(env, ME, address) as conn:
        await conn.send(GetJobs())
        for size in (0, 1, 99, 100, 101, 65536, 65537, 3 << 20):
            data = bytes(range(256)) * (size // 256) + bytes(size % 256)
            await conn.send(End(), data)
            assert (await conn.receive()).payload == data
        await conn.send(JobList(jobs=[]))


async def test_what_follows_the_handshake_may_be_there_before_the_welcome_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Large frames are allowed from the moment on when the client is welcome."""
    go_on, send = asyncio.Event(), Connection.send

    async def slow(conn: Connection, message: Any, *payload: Any) -> None:
        await send(conn, message, *payload)
        if isinstance(message, Welcome):
            await go_on.wait()

    monkeypatch.setattr(Connection, "send", slow)
    async with serving({GetJobs: no_jobs}) as (env, server, address), dial(env, ME, address) as conn:
        reply = asyncio.ensure_future(conn.call(GetJobs(), bytes(1 << 20)))
        (stream,) = cast(list[SocketStream], list(server._streams))
        async with asyncio.timeout(60):
            while not stream._frames and stream._end is None:  # noqa: ASYNC110 - nobody is told of it
                await asyncio.sleep(0.001)
        go_on.set()
        assert await reply == JobList(jobs=[])


async def test_other_group_is_refused() -> None:
    async with serving({GetJobs: no_jobs}) as (env, _, address):
        with pytest.raises(RemoteError) as caught:
            await call(env, Me(node="a", kind=Kind.CONTROL, group="other"), address, GetJobs())
    assert caught.value.remote_code == Refused.code


async def test_request_that_is_not_served() -> None:
    async with serving({GetJobs: no_jobs}) as (env, _, address):
        with pytest.raises(RemoteError) as caught:
            await call(env, ME, address, WaitJob(job=1))
    assert caught.value.remote_code == RemoteProtocolError.code


async def test_silent_server_is_a_timeout() -> None:
    forever = asyncio.Event()

    async def silent(_conn: Connection, _request: GetJobs) -> None:
        await forever.wait()

    async with serving({GetJobs: silent}) as (env, _, address):
        with pytest.raises(TimedOut, match="did not say anything in time"):
            await call(env, ME, address, GetJobs(), timeout_s=0.01)
        forever.set()


async def test_nobody_there() -> None:
    env = Env()
    async with serving({}) as (_, _, address):
        pass
    with pytest.raises(ConnectError):
        await call(env, ME, address, GetJobs())
    env.pools.close()


@pytest.mark.parametrize(
    "junk",
    [b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 100, b"\x01\0\0\0\0\0\0\0\xc1", b"\x05\0\0\0\0\0\0\0\x92"],
    ids=["http", "huge", "no-msgpack", "cut"],
)
async def test_junk_instead_of_a_handshake_ends_only_that_connection(junk: bytes) -> None:
    async with serving({GetJobs: no_jobs}) as (env, _, address):
        reader, writer = await asyncio.open_connection(address.host, address.port)
        writer.write(junk)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 10)
        writer.close()
        await writer.wait_closed()
        assert await call(env, ME, address, GetJobs()) == JobList(jobs=[])


async def test_more_connections_than_allowed_are_told_so() -> None:
    async with (
        serving({GetJobs: no_jobs}, connections_max=1) as (env, _, address),
        dial(env, ME, address) as first,
    ):
        await first.call(GetJobs())
        with pytest.raises(RemoteError) as caught:
            await call(env, ME, address, GetJobs())
        assert caught.value.remote_code == "busy"
        assert await first.call(GetJobs()) == JobList(jobs=[])


async def test_graceful_stop_lets_a_conversation_end() -> None:
    entered, proceed = asyncio.Event(), asyncio.Event()

    async def slow(_conn: Connection, _request: GetJobs) -> JobList:
        entered.set()
        await proceed.wait()
        return JobList(jobs=[])

    async with serving({GetJobs: slow}) as (env, server, address):
        reply = asyncio.ensure_future(call(env, ME, address, GetJobs()))
        await entered.wait()
        stopping = asyncio.ensure_future(server.stop(force=False))
        with pytest.raises(ConnectError):
            await call(env, ME, address, GetJobs())
        assert not stopping.done()
        proceed.set()
        assert await reply == JobList(jobs=[])
        await stopping


async def test_mutual_tls(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    for name, ca in (("good", authority), ("bad", stranger)):
        cert = ca.issue_cert("127.0.0.1")
        cert.private_key_pem.write_to_path(tmp_path / f"{name}.key")
        cert.cert_chain_pems[0].write_to_path(tmp_path / f"{name}.crt")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")

    def context(name: str, *, server: bool) -> Any:
        return mutual_tls(
            str(tmp_path / f"{name}.crt"), str(tmp_path / f"{name}.key"), str(tmp_path / "ca.pem"), server=server
        )

    env = Env()
    server = Server(env, Me(node="s", kind=Kind.PROXY), {GetJobs: no_jobs})
    async with asyncio.TaskGroup() as tasks:
        await server.listen(tasks, [Address("127.0.0.1", 0)], context("good", server=True))
        (address,) = server.addresses
        me = Me(node="a", kind=Kind.CONTROL, tls=context("good", server=False))
        assert await call(env, me, address, GetJobs()) == JobList(jobs=[])
        data = bytes(5 << 20)
        for other in (
            Me(node="a", kind=Kind.CONTROL),
            Me(node="a", kind=Kind.CONTROL, tls=context("bad", server=False)),
        ):
            with pytest.raises(ConnectError) as caught:
                await call(env, replace(other, io_timeout_s=60), address, GetJobs())
            assert caught.value.hint == TLS_HINT
        async with dial(env, me, address) as conn:
            await conn.send(End(), data)  # no request: refused, after five mebibytes came through
            with pytest.raises(RemoteError):
                await conn.expect(JobList)
        await server.stop(force=True)
    env.pools.close()
