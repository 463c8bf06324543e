"""The world as a daemon sees it: disk, network, clock, chance and threads, handed in and never global.

Replacing the parts lets a whole group run in one process on virtual time, simulated disks and links.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum
from typing import ParamSpec, Protocol, TypeVar

from walbd.daemon.net import Network, OsNetwork
from walbd.daemon.tasks import uninterrupted
from walbd.fs import FileSystem, OsFileSystem

P = ParamSpec("P")
T = TypeVar("T")


class Pool(StrEnum):
    """What a blocking call is for; each kind has its own few threads, so that none starves another."""

    RECORD = "record"  # small durable records and directory work: short, and many wait for them
    RECEIVE = "receive"  # taking in wlogs, wdiffs and backups: always has room
    SEND = "send"  # reading logs and wdiffs for transfers
    MAINTAIN = "maintain"  # apply, merge, restore: long; bounded by the limits on such jobs
    QUERY = "query"  # scans and hashes that an operator asked for


class Clock(Protocol):
    """Wall-clock time. For intervals use `asyncio.get_running_loop().time()`."""

    def now(self) -> int:
        """Return the unix time [s]."""


class SystemClock:
    """The clock of this machine."""

    def now(self) -> int:
        return int(time.time())


class Pools(Protocol):
    """Where blocking calls run."""

    async def run(self, pool: Pool, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run `call` in a thread of `pool` and return its result.

        A thread cannot be cancelled: a cancelled caller waits for the call to end first, so whatever the
        call works on is at rest when the caller cleans up.
        """

    def close(self) -> None:
        """Wait for running calls and end the threads."""


class ThreadPools:
    """Bounded thread pools, one for each kind."""

    def __init__(self, sizes: dict[Pool, int] | None = None) -> None:
        sizes = {Pool.RECORD: 4, Pool.RECEIVE: 4, Pool.SEND: 4, Pool.MAINTAIN: 64, Pool.QUERY: 2} | (sizes or {})
        self._pools = {
            pool: ThreadPoolExecutor(size, thread_name_prefix=f"walbd-{pool}") for pool, size in sizes.items()
        }

    async def run(self, pool: Pool, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()

        async def step() -> T:
            return await loop.run_in_executor(self._pools[pool], lambda: call(*args, **kwargs))

        return await uninterrupted(step())

    def close(self) -> None:
        for pool in self._pools.values():
            pool.shutdown(wait=True)


@dataclass
class Env:
    """All seams of one process."""

    fs: FileSystem = field(default_factory=OsFileSystem)
    net: Network = field(default_factory=OsNetwork)
    clock: Clock = field(default_factory=SystemClock)
    rng: random.Random = field(default_factory=random.SystemRandom)
    pools: Pools = field(default_factory=ThreadPools)
