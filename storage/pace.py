"""Holding a scan to a speed that may change while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

_SLICE_S: Final = 0.1
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
        self._credit_b -= size_b
        while True:
            speed = self._limit.bytes_per_s
            now = self._loop.time()
            if not speed:
                self._credit_b, self._at = 0.0, now
                return
            self._credit_b = min(self._credit_b + (now - self._at) * speed, speed * _BURST_S)
            self._at = now
            if self._credit_b >= 0:
                return
            await asyncio.sleep(min(_SLICE_S, -self._credit_b / speed))
            await tick()
