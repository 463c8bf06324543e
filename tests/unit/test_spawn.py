"""Work that begins while everything ends: refused in an orderly way, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from tests.kit.storage_rig import VOL, Rig
from walbd.daemon.conn import Me
from walbd.daemon.env import Env, SystemClock
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.net import Address, FrameStream
from walbd.daemon.server import Server
from walbd.daemon.tasks import spawn
from walbd.errors import Stopping
from walbd.protocol.base import Kind

ME = Me(node="s0", kind=Kind.STORAGE)


class End(Exception):
    """Ends a task group."""


@asynccontextmanager
async def ending_group() -> AsyncIterator[asyncio.TaskGroup]:
    """A task group that takes no more tasks, as one of them has failed."""
    try:
        async with asyncio.TaskGroup() as tasks:

            async def fail() -> None:
                raise End

            async def hold() -> None:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    ending.set()
                    await go_on.wait()

            ending, go_on = asyncio.Event(), asyncio.Event()
            tasks.create_task(hold())
            tasks.create_task(fail())
            try:
                await ending.wait()
            except asyncio.CancelledError:  # the group ends its body, too
                cast(asyncio.Task[Any], asyncio.current_task()).uncancel()
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # a coroutine that was never awaited
                yield tasks
                gc.collect()
            go_on.set()
    except* End:
        pass


class Stream:
    """Half a connection."""

    peer = "x"

    def __init__(self) -> None:
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    async def receive(self) -> None:
        return None


async def test_spawn() -> None:
    begun: list[int] = []

    async def work() -> None:
        begun.append(1)

    async with ending_group() as tasks:
        with pytest.raises(Stopping):
            spawn(tasks, work(), "work")
    async with asyncio.TaskGroup() as tasks:
        task = spawn(tasks, work(), "work")
        assert task.get_name() == "work"
    assert begun == [1]


async def test_job() -> None:
    jobs = Jobs(SystemClock())

    async def work(_job: Job) -> None:
        raise AssertionError

    async with ending_group() as tasks:
        with pytest.raises(Stopping):
            jobs.start(tasks, "work", "vol0", work)
    assert jobs.of() == []
    await jobs.idle()


async def test_connection_that_comes_at_the_end() -> None:
    env = Env()
    server = Server(env, ME, {})
    async with ending_group() as tasks:
        server._tasks = tasks
        stream = Stream()
        server._accept(cast(FrameStream, stream))
        assert stream.aborted
    await server.stop(force=False)  # waits for nobody
    env.pools.close()


async def test_connection_whose_task_is_cancelled_before_it_begins() -> None:
    env = Env()
    server = Server(env, ME, {})
    stream = Stream()
    try:
        async with asyncio.TaskGroup() as tasks:
            await server.listen(tasks, [Address("127.0.0.1", 0)])
            server._accept(cast(FrameStream, stream))
            raise End
    except* End:
        pass
    assert stream.aborted
    await server.stop(force=False)
    env.pools.close()


async def test_watch_of_a_device(tmp_path: Path) -> None:
    """`start` at the very end of the daemon is refused; what was committed is resumed by the next start."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.stop_volume()
        volume, shared = rig.server.volumes[VOL], rig.server.shared
        tasks, shared.tasks = shared.tasks, None
        try:
            with pytest.raises(Stopping):
                await volume.start_target()
        finally:
            shared.tasks = tasks
        async with ending_group() as ending:
            shared.tasks = ending
            with pytest.raises(Stopping):
                volume.begin_monitoring()
        shared.tasks = tasks
        assert not volume.monitored
        await rig.restart()
        rig.device.scribble(1)
        await rig.until_delivered()
