"""Holding scans to a speed and to a number, both of which may change while they run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from walbd.daemon.tasks import Signal

_SLICE_S: Final = 0.1
_LEAST_S: Final = 0.001  # below it, rounding could make a wait for nothing
_BURST_S: Final = 1.0


@dataclass(slots=True)
class SpeedLimit:
    """The limit of all scans of a daemon [byte/s]; 0: none."""

    bytes_per_s: int = 0


class Slots:
    """Lets so many scans run at the same time; the others wait. Fewer slots than running scans cut none short.

    with slots.turn() as comes:
        await comes()
    """

    def __init__(self, n_max: int) -> None:
        self._n_max = n_max
        self._running = 0
        self._changed = Signal()

    def set_max(self, n_max: int) -> None:
        """Change the number."""
        self._n_max = n_max
        self._changed.set()

    @contextmanager
    def turn(self) -> Iterator[Callable[[], Coroutine[Any, Any, None]]]:
        """Give what waits for a slot and takes it; the end of the block gives it back, however the wait ended."""
        taken = False

        async def comes() -> None:
            nonlocal taken
            await self._changed.wait_for(lambda: self._running < self._n_max)
            self._running += 1
            taken = True

        try:
            yield comes
        finally:
            if taken:
                self._running -= 1
                self._changed.set()


class Pace:
    """One scan's account: credit grows with time, up to a second's worth, and is spent by what was read."""

    def __init__(self, limit: SpeedLimit) -> None:
        self._limit = limit
        self._loop = asyncio.get_running_loop()
        self._credit_b = 0.0
        self._at = self._loop.time()

    async def spend(self, size_b: int, tick: Callable[[], Awaitable[None]]) -> None:
        """Return when `size_b` more may have been read; `tick` is awaited now and then during the wait."""
        self._earn()
        self._credit_b -= size_b
        while (speed := self._earn()) and self._credit_b < 0:
            await asyncio.sleep(min(max(-self._credit_b / speed, _LEAST_S), _SLICE_S))
            await tick()

    def _earn(self) -> int:
        """Add the credit of the time since the last call; return the speed, 0 for no limit."""
        speed, now = self._limit.bytes_per_s, self._loop.time()
        if speed:
            self._credit_b = min(self._credit_b + (now - self._at) * speed, speed * _BURST_S)
        else:
            self._credit_b = 0.0
        self._at = now
        return speed
