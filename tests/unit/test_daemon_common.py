"""What all daemons share: the base directory, and the requests that they answer alike."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from walbd.daemon.basedir import LOCK_NAME, lock_base, volume_names
from walbd.daemon.common import CommonRequests, begun_actions, free_space, status_reply
from walbd.daemon.config import DaemonConfig
from walbd.daemon.conn import Connection, Me, call
from walbd.daemon.env import Env, SystemClock
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.main import Shutdown, ShutdownMode
from walbd.daemon.net import Address, OsNetwork
from walbd.daemon.reload import Settings
from walbd.daemon.server import Server
from walbd.errors import AlreadyExists, Busy, ConnectError, NotFound
from walbd.fs import OsFileSystem
from walbd.protocol.base import JobState, Kind
from walbd.protocol.control import GetHandlerStat, GetHostType, GetPid, GetState, GetVersion, ShutdownHow
from walbd.protocol.control import Shutdown as ShutdownRequest

FS = OsFileSystem()
ME = Me(node="a0", kind=Kind.ARCHIVE, io_timeout_s=10)


def test_one_process_holds_the_directory(tmp_path: Path) -> None:
    with lock_base(FS, tmp_path, create=False):
        with pytest.raises(Busy) as caught:
            lock_base(FS, tmp_path, create=True)
        assert caught.value.hint
    lock_base(FS, tmp_path, create=False).close()
    assert os.listdir(tmp_path) == [LOCK_NAME]


def test_a_missing_directory_is_made_only_if_wanted(tmp_path: Path) -> None:
    base = tmp_path / "a" / "b"
    with pytest.raises(NotFound, match="base directory"):
        lock_base(FS, base, create=False)
    assert os.listdir(tmp_path) == []
    lock_base(FS, base, create=True).close()
    assert os.listdir(base) == [LOCK_NAME]


def test_a_file_is_no_base_directory(tmp_path: Path) -> None:
    (tmp_path / "base").write_bytes(b"x")
    with pytest.raises(AlreadyExists):
        lock_base(FS, tmp_path / "base", create=True)
    assert (tmp_path / "base").read_bytes() == b"x"


def test_only_directories_with_good_names_can_be_volumes(tmp_path: Path) -> None:
    for name in ("vol0", "lost+found", "cleared_vol1", ".hidden"):
        (tmp_path / name).mkdir()
    (tmp_path / "vol2").write_bytes(b"")
    assert volume_names(FS, tmp_path) == ["vol0"]


async def test_requests_that_all_daemons_answer() -> None:
    env, shutdown = Env(), Shutdown()
    settings = Settings(DaemonConfig(base_dir="/x"))
    common = CommonRequests(ME, Jobs(env.clock), {}, shutdown, lambda: server.stats, settings)
    server = Server(env, ME, common.handlers())
    async with asyncio.TaskGroup() as tasks:
        await server.listen(tasks, [Address("127.0.0.1", 0)])

        async def ask(request: Any) -> Any:
            return await call(env, Me(node="c0", kind=Kind.CONTROL), server.addresses[0], request)

        assert (await ask(GetHostType())).kind is Kind.ARCHIVE
        assert (await ask(GetPid())).value == os.getpid()
        assert (await ask(GetVersion())).log_format == 2
        assert (await ask(GetState(volume="nobody"))).value == "Clear"
        rows = (await ask(GetHandlerStat())).rows
        assert [row[:3] for row in rows] == [
            (tag, "c0", 1) for tag in ("get-host-type", "get-pid", "get-state", "get-version")
        ]
        await ask(ShutdownRequest(how=ShutdownHow.FORCE))
        async with asyncio.timeout(60):  # it ends after the answer
            assert await shutdown.requested() is ShutdownMode.FORCE
        await server.stop(force=True)
    env.pools.close()


async def test_shutdown_of_a_client_that_has_left() -> None:
    class Gone(Connection):
        def __init__(self) -> None:
            pass

        async def send(self, *_args: Any) -> None:
            raise ConnectError("the peer has left")

    shutdown = Shutdown()
    settings = Settings(DaemonConfig(base_dir="/x"))
    handlers = CommonRequests(ME, Jobs(SystemClock()), {}, shutdown, lambda: {}, settings).handlers()
    with pytest.raises(ConnectError):
        await handlers[ShutdownRequest](Gone(), ShutdownRequest())
    assert shutdown.mode is ShutdownMode.GRACEFUL


async def test_nobody_waits_for_a_job_of_a_daemon_that_ends() -> None:
    jobs, proceed = Jobs(SystemClock()), asyncio.Event()

    async def work(_job: Job) -> None:
        await proceed.wait()

    async with asyncio.TaskGroup() as tasks:
        job = jobs.start(tasks, "stop", "v", work)
        waiting = asyncio.create_task(jobs.wait(job.number, 60))
        await asyncio.sleep(0)
        assert not waiting.done()
        jobs.close()
        assert (await waiting).state is JobState.RUNNING
        proceed.set()
        await jobs.idle()


async def test_status_and_free_space(tmp_path: Path) -> None:
    env = Env()
    facts = await free_space(env, tmp_path)
    assert int(facts["free_b"] or 0) > 0
    assert list(await free_space(env, tmp_path / "gone")) == ["disk_error"]
    reply = status_reply(ME, env.clock, facts, [], errors=["x" * 5000])
    assert (reply.node, reply.kind, reply.pid, len(reply.errors[0])) == ("a0", Kind.ARCHIVE, os.getpid(), 4096)
    assert begun_actions({}).rows == []
    env.pools.close()


@pytest.mark.parametrize("host", ["a..b", "x" * 70 + ".example", "\u00e9" * 80])
async def test_what_can_be_no_host_name_cannot_be_reached(host: str) -> None:
    """It must not end a task that looks for a peer, and with it the daemon."""
    with pytest.raises(ConnectError):
        await OsNetwork().connect(Address(host=host, port=1))
    with pytest.raises(ConnectError):
        await OsNetwork().listen(Address(host=host, port=1), lambda stream: stream.abort())
