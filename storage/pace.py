"""Holding a scan to a speed that may change while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

_SLICE_S: Final = 0.1
_LEAST_S: Final = 0.001  # below it, rounding could make a wait for nothing
_BURST_S: Final = 1.0


@dataclass(slots=True)
class SpeedLimit:
    """The limit of all scans of a daemon [byte/s]; 0: none."""

    bytes_per_s: int = 0


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
