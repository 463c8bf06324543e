"""Random histories of one volume: writes, snapshots, stops, crashes and faults on every side, on virtual time.

At the end, and at each quiet point on the way, the archive must hold what the device holds, and every snapshot
that was ever answered must be the end of a piece and restore to what the volume was at that moment.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest

from tests.kit.fake_device import FakeDevice
from tests.kit.mem_net import MemNetwork
from tests.kit.storage_rig import DEVICE, VOL, Killed, Rig
from tests.kit.virtual import InlinePools, run
from walbd.errors import Refused, WalbError
from walbd.fs import failpoints
from walbd.protocol.control import StopHow, TakeSnapshot

SEEDS = 40


class Model:
    """Chooses what happens next, and knows what must come of it."""

    def __init__(self, rig: Rig, rng: random.Random) -> None:
        self.rig = rig
        self.rng = rng
        self.answered: dict[int, bytes] = {}
        self.kill_in = 0  # failpoint hits until the daemon is killed; 0: never

    def hit(self, name: str) -> None:
        """Stands in for `failpoints.hit`."""
        if self.kill_in and not self.rig.dead:
            self.kill_in -= 1
            if not self.kill_in:
                self.rig.mark_dead()
        if self.rig.dead:
            raise OSError(5, "killed", name)

    async def step(self) -> None:
        """Do one thing; whatever is refused or cut by a crash is tried no further."""
        choices: list[tuple[int, Callable[[], Awaitable[None]]]] = [
            (10, self.write),
            (6, self.snapshot),
            (5, self.wait),
            (2, self.stop_or_start),
            (2, self.crash_daemon),
            (1, self.crash_device),
            (2, self.device_outage),
            (2, self.lose_acks),
            (2, self.proxy_outage),
            (2, self.refuse),
            (1, self.break_in_the_middle),
            (2, self.sync),
            (1, self.quiet),
        ]
        (do,) = self.rng.choices([c[1] for c in choices], [c[0] for c in choices])
        try:
            await do()
        except (WalbError, Killed):
            pass
        if self.rig.dead:
            await self.rig.restart()

    async def write(self) -> None:
        device = self.rig.device
        if device.latest - device.oldest > 0.6 * 1024:
            return  # no overflow here
        for _ in range(self.rng.randint(1, 4)):
            size_lb = self.rng.randint(1, 20)
            offset_lb = self.rng.randrange(len(device.data) // 512 - size_lb)
            device.write(offset_lb, self.rng.randbytes(4) * (128 * size_lb))

    async def sync(self) -> None:
        self.rig.device.permanent_at_once = self.rng.random() < 0.6
        self.rig.device.written_at_once = self.rng.random() < 0.6
        self.rig.device.sync()

    async def snapshot(self) -> None:
        if not self.rig.device.permanent_at_once:
            asyncio.get_running_loop().call_later(self.rng.random() / 10, self.rig.device.sync)
        image = bytes(self.rig.device.data)
        gid = (await self.rig.call(TakeSnapshot(volume=VOL))).gid
        assert gid not in self.answered
        self.answered[gid] = image

    async def wait(self) -> None:
        await self.rig.until(self.rng_turns(self.rng.randint(1, 30)))

    def rng_turns(self, n: int) -> Callable[[], bool]:
        left = [n]

        def over() -> bool:
            left[0] -= 1
            return left[0] < 0

        return over

    async def stop_or_start(self) -> None:
        if await self.rig.state() == "Target":
            await self.rig.stop_volume(self.rng.choice([StopHow.GRACEFUL, StopHow.FORCE]))
        else:
            await self.rig.start_volume()

    async def crash_daemon(self) -> None:
        if self.rng.random() < 0.3:
            await self.rig.restart()
        else:
            self.kill_in = self.rng.randint(1, 20)

    async def crash_device(self) -> None:
        self.rig.device.go_down()
        self.rig.device.crash()
        self.rig.device.come_up()

    async def device_outage(self) -> None:
        self.rig.device.go_down()
        await self.wait()
        self.rig.device.come_up()

    async def lose_acks(self) -> None:
        self.rng.choice(self.rig.proxies).lose_acks = self.rng.randint(1, 3)

    async def proxy_outage(self) -> None:
        proxy = self.rng.choice(self.rig.proxies)
        if proxy.server is not None:
            await proxy.stop()
        else:
            await self.rig.restart_proxy(proxy)

    async def refuse(self) -> None:
        proxy = self.rng.choice(self.rig.proxies)
        proxy.refusal = None if proxy.refusal else Refused("not now")

    async def break_in_the_middle(self) -> None:
        self.rng.choice(self.rig.proxies).abort_after_chunks = 1

    async def quiet(self) -> None:
        """End all trouble, and compare."""
        rig = self.rig
        self.kill_in = 0
        if rig.dead:
            await rig.restart()
        rig.device.come_up()
        rig.device.permanent_at_once = rig.device.written_at_once = True
        rig.device.sync()
        for proxy in rig.proxies:
            proxy.refusal = proxy.abort_after_chunks = None
            proxy.lose_acks = 0
            if proxy.server is None:
                await rig.restart_proxy(proxy)
        if await rig.state() == "Stopped":
            await rig.start_volume()
        await rig.until_delivered()
        await rig.until(lambda: rig.device.oldest == rig.device.latest, "erasing")
        chain = rig.archive.history()
        for before, after in pairwise(chain):
            assert after.diff.begin.gid_b <= before.diff.end.gid_b < after.diff.end.gid_b
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        begins: dict[int, bool] = {piece.diff.begin.gid_b: piece.diff.mergeable for piece in chain}
        for gid, image in self.answered.items():
            assert rig.archive.restore(gid) == image
            assert not begins.get(gid, False), "the diff after an explicit snapshot must not be merged onto it"


@pytest.mark.parametrize("seed", range(SEEDS))
def test_random_histories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    rng = random.Random(seed)

    async def main() -> None:
        pbs = rng.choice([512, 512, 4096])
        rig = Rig(
            tmp_path / "s",
            n_proxies=2,
            net=MemNetwork(),
            pools=InlinePools(rng),
            options={"wlog_send_size_max": rng.choice([25, 60, 1000]) * pbs},
            deadline_s=200,
            poll_s=0.01,
        )
        rig.devices[DEVICE] = FakeDevice(size_lb=512, pbs=pbs, ring_pb=1024, seed=seed)
        model = Model(rig, rng)
        monkeypatch.setattr(failpoints, "hit", model.hit)
        async with rig.running():
            await rig.target()
            base = rig.archive.bases[VOL]
            for _ in range(60):
                await model.step()
                rig.clock.time += rng.randint(0, 2)
            await model.quiet()
            assert rig.archive.bases[VOL] is base
            assert await rig.state() == "Target"
            assert len({piece.offer.uuid for piece in rig.pieces}) == 1

    run(main())
