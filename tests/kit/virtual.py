"""Virtual time, and blocking calls without threads: one seed gives one run.

`run(main)` runs a coroutine on a loop whose clock stands still while something is ready and jumps to the next
timer when nothing is: no test waits. There are no real sockets or threads on such a loop.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from walbd.daemon.env import Pool

P = ParamSpec("P")
T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            if timeout is None:
                raise AssertionError("deadlock: everybody waits, and no timer is set")
            self.now += timeout
        return ready


class _Task(asyncio.Task[Any]):
    """A task whose hash is its number: groups cancel their tasks in an order that memory has no part in."""

    def __init__(self, coro: Coroutine[Any, Any, Any], *, number: int, **options: Any) -> None:
        self._number = number  # first: it is hashed in there
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop on virtual time."""

    virtual = True

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)
        numbers = itertools.count()
        self.set_task_factory(
            lambda loop, coro, **options: _Task(coro, number=next(numbers), loop=loop, **options)
        )

    def time(self) -> float:
        return self._virtual.now


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


class LoopClock:
    """Wall-clock time that goes with the loop (`walbd.daemon.env.Clock`)."""

    def now(self) -> int:
        return 1_700_000_000 + int(asyncio.get_running_loop().time())


class InlinePools:
    """`walbd.daemon.env.Pools` without threads: calls run on the loop, after a random number of its turns, so that
    concurrent ones come in any order."""

    def __init__(self, rng: random.Random, *, turns_max: int = 4) -> None:
        self._rng = rng
        self._turns_max = turns_max

    async def run(self, pool: Pool, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        for _ in range(self._rng.randrange(self._turns_max)):
            await asyncio.sleep(0)
        result = call(*args, **kwargs)
        for _ in range(self._rng.randrange(self._turns_max)):
            await asyncio.sleep(0)
        return result

    def close(self) -> None:
        pass
