"""Pipelines of a few concurrent steps whose results stay in order."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

from walbd.errors import ForceStopped

T = TypeVar("T")
R = TypeVar("R")


@asynccontextmanager
async def in_order(
    items: Iterable[T], step: Callable[[T], Awaitable[R]], *, depth: int
) -> AsyncIterator[AsyncIterator[R]]:
    """Give an iterator over `step(item)` for all items, in their order, with up to `depth` steps under way.

    The first error comes out in its place. At the end of the block what is still under way is cancelled and
    waited for, so that nothing outlives the block.
    """
    source = iter(items)
    running: deque[asyncio.Future[R]] = deque()

    def begin_more() -> None:
        while len(running) < depth:
            for item in source:
                running.append(asyncio.ensure_future(step(item)))
                break
            else:
                return

    async def results() -> AsyncGenerator[R, None]:
        begin_more()
        while running:
            await asyncio.wait({running[0]})
            done = running.popleft()
            begin_more()
            yield done.result()

    produced = results()
    try:
        yield produced
    finally:
        await produced.aclose()
        await cancel_all(running)


@asynccontextmanager
async def ahead(source: AsyncGenerator[T, None], *, depth: int) -> AsyncIterator[AsyncIterator[T]]:
    """Give an iterator over `source` that is run up to `depth` items ahead of its consumer.

    `source` is closed at the end of the block.
    """
    queue: asyncio.Queue[T | BaseException | None] = asyncio.Queue(depth)

    async def produce() -> None:
        try:
            async with aclosing(source):
                async for item in source:
                    await queue.put(item)
            await queue.put(None)
        except asyncio.CancelledError:
            raise
        except BaseException as exc:  # noqa: BLE001 - it comes out at the consumer
            await queue.put(exc)

    async def results() -> AsyncGenerator[T, None]:
        while (item := await queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    producer = asyncio.ensure_future(produce())
    produced = results()
    try:
        yield produced
    finally:
        await produced.aclose()
        await cancel_all([producer])


async def cancel_all(tasks: Iterable[asyncio.Future[Any]]) -> None:
    """Cancel tasks and return when they have ended; their errors are dropped."""
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    for task in tasks:
        while not task.done():
            await asyncio.wait({task})
        if not task.cancelled():
            task.exception()  # seen: nobody is left to whom it matters


async def unless(stop: Callable[[], Awaitable[object]], work: Awaitable[T], *, volume: str) -> T:
    """Return the result of `work`; if `stop()` returns first, cancel it, wait for its end and raise ForceStopped.

    What `work` returns or raises when it ends in spite of that goes before. `volume` is whose work it is.
    """
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop())
    try:
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait({working})
            if working.cancelled():
                raise ForceStopped("given up because of a forced stop", volume=volume)
        return working.result()
    finally:
        await cancel_all([working, stopping])
