"""Random lives of a proxy: steps that fail, crashes, archives that refuse, vanish and lose acknowledgements.

Whatever happens, in the end both archives hold exactly what was written, and nothing is left at the proxy.
"""

import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import uvloop

from tests.kit.fake_archive import FakeArchive
from tests.kit.logs import Io, image_of
from tests.kit.proxy_rig import ProxyRig, StorageSide, proxy
from walbd.errors import ConnectError, RemoteError
from walbd.fs import failpoints
from walbd.protocol.control import Kick, Start, StopHow
from walbd.protocol.transfer import Verdict

SIZE_LB = 64
HELD = [Verdict.SYNCING, Verdict.STOPPED, Verdict.TOO_NEW, Verdict.SMALLER, None, None]


class Life:
    """One random life."""

    def __init__(self, seed: int, rig: ProxyRig, archives: list[FakeArchive]) -> None:
        self.rng = random.Random(seed)
        self.rig = rig
        self.archives = archives
        self.storage = StorageSide(rig, size_lb=SIZE_LB)
        self.image = bytes(SIZE_LB * 512)
        self.names = sorted(name for name in failpoints.registered() if name.startswith("proxy."))

    async def live(self, steps: int) -> None:
        actions: list[tuple[int, Callable[[], Awaitable[object]]]] = [
            (10, self.send),
            (4, self.arm),
            (2, self.crash),
            (4, self.answer),
            (2, self.lose_ack),
            (2, self.bounce),
            (1, self.kick),
            (1, self.stop_and_start),
        ]
        weights, choices = zip(*actions, strict=True)
        for action in self.rng.choices(choices, weights, k=steps):
            await action()
        failpoints.disarm()
        for archive in self.archives:
            archive.refuse_all(None)
        await self.rig.call(Kick())
        await self.rig.emptied()

    async def send(self) -> None:
        """Send a stretch of log as a storage does: until it is acknowledged."""
        packs = [[self.io() for _ in range(self.rng.randint(1, 4))] for _ in range(self.rng.randint(0, 2))]
        mergeable = self.rng.random() < 0.8
        while True:
            try:
                await self.storage.send(packs, mergeable=mergeable)
            except (RemoteError, ConnectError):
                if self.rng.random() < 0.3:
                    await self.crash()
            else:
                break
        self.image = image_of(self.image, packs)

    def io(self) -> Io:
        size = self.rng.randint(1, 8)
        kind = self.rng.choice(["write", "write", "discard"])
        return Io(kind, self.rng.randrange(0, SIZE_LB - size + 1), size, self.rng.randrange(0, 100))

    async def arm(self) -> None:
        name = self.rng.choice(self.names)
        failpoints.arm(f"{name}={self.rng.choice(['eio', 'enospc'])}@{self.rng.randint(0, 1)}")

    async def crash(self) -> None:
        await self.rig.restart()

    async def answer(self) -> None:
        self.rng.choice(self.archives).refuse_all(self.rng.choice(HELD))

    async def lose_ack(self) -> None:
        self.rng.choice(self.archives).lose_acks = self.rng.randint(0, 2)

    async def bounce(self) -> None:
        archive = self.rng.choice(self.archives)
        await archive.down()
        if self.rng.random() < 0.5:
            await self.send()
        await archive.up()

    async def kick(self) -> None:
        await self.rig.call(Kick())

    async def stop_and_start(self) -> None:
        await self.rig.stop_volume(self.rng.choice([StopHow.GRACEFUL, StopHow.FORCE]))
        while await self.rig.state() == "Stopped":
            try:
                await self.rig.call(Start(volume="vol0"))
            except RemoteError:  # an armed failpoint
                continue


@pytest.mark.parametrize("seed", range(8))
def test_random_life(tmp_path: Path, seed: int) -> None:
    # On the loop of the daemons; that of Python 3.11 forgets a socket accepted while the listener is closed.
    uvloop.run(random_life(tmp_path, seed))


async def random_life(tmp_path: Path, seed: int) -> None:
    size_b = SIZE_LB * 512
    async with (
        FakeArchive("a0", size_b=size_b) as a0,
        FakeArchive("a1", size_b=size_b) as a1,
        proxy(tmp_path, wdiff_send_count_max=3) as rig,
    ):
        await rig.begin(a0, a1, compress="lz4")
        life = Life(seed, rig, [a0, a1])
        await life.live(40)
        for archive in (a0, a1):
            assert archive.image == life.image
            assert archive.latest.gid_b == life.storage.gid
        await rig.restart()
        await rig.emptied()  # what came back was refused as too old
        assert rig.files() == ["volume.json"]
