"""The end of a stream: what the receiver's answer means, whenever it comes."""

from __future__ import annotations

import asyncio

import pytest

from tests.kit.copies import connected
from tests.kit.virtual import run
from walbd.daemon.wdiff_send import until_ok
from walbd.errors import DiskFull, RemoteError, RemoteProtocolError
from walbd.protocol.base import End, Ok
from walbd.protocol.transfer import WdiffChunk


def test_an_answer_may_overtake_the_end_of_the_sending() -> None:
    """The receiver answers End while the sender still cleans up."""

    async def main() -> str:
        here, there = connected()
        answered = asyncio.Event()

        async def sending() -> str:
            await here.send(End())
            await answered.wait()
            await asyncio.sleep(1)
            return "all"

        async def receiving() -> None:
            await there.expect(End)
            await there.send(Ok())
            answered.set()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(receiving())
            return await until_ok(here, sending())

    assert run(main()) == "all"


def test_an_ok_before_the_end_is_none() -> None:
    async def main() -> None:
        here, there = connected()

        async def sending() -> None:
            await here.send(WdiffChunk(), b"data")
            await asyncio.Event().wait()

        await there.send(Ok())
        await until_ok(here, sending())

    with pytest.raises(RemoteProtocolError, match="unexpected"):
        run(main())


def test_an_error_ends_the_sending_at_once() -> None:
    async def main() -> None:
        here, there = connected()

        async def sending() -> None:
            await here.send(WdiffChunk(), b"data")
            await asyncio.Event().wait()

        await there.send_error(DiskFull("no room"))
        await until_ok(here, sending())

    with pytest.raises(RemoteError, match="no room"):
        run(main())
