"""Blocking writes that run while the next data is received: bounded, and at rest when the block is left."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Self


class Pipeline:
    """Work that has been handed over and not awaited yet, at most `window_b` bytes of it.

    With window 0 each piece of work begins after the one before has ended. An error of the work ends the block at
    once, wherever it waits, and comes out of it. Leaving the block waits for the work that runs.
    """

    def __init__(self, window_b: int) -> None:
        self._window_b = window_b
        self._queue: deque[tuple[asyncio.Task[None], int]] = deque()
        self._in_flight_b = 0
        self._tasks = asyncio.TaskGroup()

    async def push(self, work: Coroutine[Any, Any, None], size_b: int) -> None:
        """Start `work` as soon as there is room for `size_b` more."""
        try:
            while self._queue and (self._in_flight_b + size_b > self._window_b or self._queue[0][0].done()):
                await self._take_oldest()
        except BaseException:
            work.close()
            raise
        self._queue.append((self._tasks.create_task(work), size_b))
        self._in_flight_b += size_b

    async def drain(self) -> None:
        """Return when all work has ended well."""
        while self._queue:
            await self._take_oldest()

    async def _take_oldest(self) -> None:
        task, size_b = self._queue[0]
        await asyncio.wait({task})
        self._queue.popleft()
        self._in_flight_b -= size_b
        task.result()

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        try:
            await self._tasks.__aexit__(exc_type, exc, tb)
        except BaseExceptionGroup as group:
            if any(error is exc for error in group.exceptions):
                return  # the block's own error goes on
            raise group.exceptions[0] from None


class SyncTimer:
    """Tells when a long copy should sync: after so many bytes, or so much time, whatever comes first."""

    def __init__(self, interval_b: int, interval_s: float) -> None:
        self._interval_b = interval_b
        self._interval_s = interval_s
        self._written_b = 0
        self._since = asyncio.get_running_loop().time()

    def is_due(self, written_b: int) -> bool:
        """Count bytes, and start anew when it is time."""
        self._written_b += written_b
        now = asyncio.get_running_loop().time()
        if self._written_b < self._interval_b and now - self._since < self._interval_s:
            return False
        self._written_b, self._since = 0, now
        return True
