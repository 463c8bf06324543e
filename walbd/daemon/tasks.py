"""Small tools for tasks: steps that must not be cut, conditions to wait on."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from walbd.errors import Stopping

T = TypeVar("T")


async def uninterrupted(step: Coroutine[Any, Any, T]) -> T:
    """Run `step` to its end although the caller may be cancelled meanwhile; then pass that cancellation on.

    The step's own error wins over the cancellation, so that it cannot get lost.
    """
    task = asyncio.ensure_future(step)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as exc:
            cancelled = exc
    result = task.result()
    if cancelled is not None:
        raise cancelled
    return result


def spawn(tasks: asyncio.TaskGroup, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T]:
    """Begin `work` as a task of `tasks`. Raises Stopping when the group takes no more, as it is ending."""
    try:
        return tasks.create_task(work, name=name)
    except RuntimeError as exc:
        work.close()
        raise Stopping("the daemon is stopping") from exc


class Signal:
    """Something changed: wakes everybody who waits for a condition. Setting it is synchronous.

    There is no lost wake-up: a waiter checks its condition, and sleeps, in one step of the loop.
    """

    def __init__(self) -> None:
        self._waiters: dict[asyncio.Future[None], None] = {}  # in order, so that a test's seed gives one run

    def set(self) -> None:
        """Wake all waiters, so that they look at their conditions again."""
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    async def wait_for(self, condition: Callable[[], bool]) -> None:
        """Return once `condition()` is true; deadlines are the caller's (`asyncio.timeout`)."""
        while not condition():
            await self.next()

    async def next(self) -> None:
        """Return at the next `set`."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiters[waiter] = None
        try:
            await waiter
        finally:
            self._waiters.pop(waiter, None)
