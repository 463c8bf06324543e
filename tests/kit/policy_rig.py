"""Archives on virtual time, on disks and a network in memory, whose policies are at work."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

from tests.kit.feeder import ArchiveRig, Feed
from tests.kit.mem_net import MemNetwork
from tests.kit.memfs import MemoryFileSystem
from tests.kit.virtual import InlinePools, LoopClock
from walbd.daemon.env import Env
from walbd.format.meta import Diff


class TimedClock(LoopClock):
    """The loop's time, and as much more as a test says."""

    shift_s = 0

    def now(self) -> int:
        return super().now() + self.shift_s


class VirtualArchive(ArchiveRig):
    """An archive whose hours pass as quickly as it can work."""

    def __init__(
        self, node: str = "a0", *, net: MemNetwork | None = None, port: int = 10200, **settings: Any
    ) -> None:
        fs = MemoryFileSystem()
        base = Path("/archive")
        fs.make_dir(base)
        super().__init__(
            base, fs=fs, node_id=node, port=port, **{"policy": True, "policy_rest_percent": 0} | settings
        )
        self.clock = TimedClock()
        rng = random.Random(node)
        self.env.pools.close()
        self.env = Env(
            fs=fs, net=net or MemNetwork(), clock=self.clock, rng=rng, pools=InlinePools(rng, turns_max=2)
        )
        self.server = self._make()


class TimedFeed(Feed):
    """Snapshots at the time of the archive."""

    times: dict[int, int]

    def snapshot(self, *, mergeable: bool = True) -> Diff:
        self.times = getattr(self, "times", {})
        self.now = self.rig.env.clock.now() - 1
        diff = super().snapshot(mergeable=mergeable)
        self.times[self.gid] = self.now
        return diff

    async def live(self, seconds: int, *, interval_s: int = 10, explicit: int = 0) -> None:
        """Snapshots come regularly; each `explicit`th is explicit."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while loop.time() < end:
            await asyncio.sleep(interval_s)
            # A diff's flag is that of the snapshot where it begins.
            await self.step(mergeable=not (explicit and self.gid % explicit == 0))
