"""Something that serves in a task of its own, and can be ended as a power failure does it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class _Crash(BaseException):
    """Ends what runs, at whatever place it is."""


class Running:
    """One task group with what serves; begun by `up`, ended by `crash`, any number of times."""

    def __init__(self) -> None:
        self._task: asyncio.Task[None] | None = None
        self._end = asyncio.Event()

    async def up(
        self, start: Callable[[asyncio.TaskGroup], Awaitable[None]], drop: Callable[[], None] | None = None
    ) -> None:
        """Begin; return when `start` has, or raise its error. `drop` comes before tasks are cancelled."""
        self._end = asyncio.Event()
        started = asyncio.Event()

        async def run() -> None:
            try:
                async with asyncio.TaskGroup() as tasks:
                    await start(tasks)
                    started.set()
                    await self._end.wait()
                    if drop is not None:
                        drop()
                    raise _Crash
            except* _Crash:
                pass

        self._task = asyncio.create_task(run())
        waiter = asyncio.ensure_future(started.wait())
        await asyncio.wait({self._task, waiter}, return_when=asyncio.FIRST_COMPLETED)
        waiter.cancel()
        if self._task.done():
            failed, self._task = self._task, None
            try:
                failed.result()
            except ExceptionGroup as group:
                raise group.exceptions[0] from None

    async def crash(self) -> None:
        """Cancel everything; nothing if nothing runs."""
        self._end.set()
        if self._task is not None:
            await self._task
            self._task = None
