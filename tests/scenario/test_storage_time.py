"""What the storage daemon does over time, on virtual time and a network in memory: retries, checks, intervals.

Hours pass in no time, so the settings are the real ones.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_device import FakeDevice
from tests.kit.mem_net import MemNetwork
from tests.kit.storage_rig import DEVICE, VOL, Rig
from tests.kit.virtual import InlinePools, LoopClock, run
from walbd.errors import Refused
from walbd.protocol.base import JobState
from walbd.protocol.control import GetStatus, Kick, SetFullScanBps, TakeSnapshot
from walbd.units import LB, MIB

REAL_DELAYS: dict[str, Any] = {
    "retry_delay_min_s": 1.0,
    "retry_delay_max_s": 30.0,
    "gather_delay_s": 0.1,
    "settle_delay_max_s": 1.0,
    "probe_interval_s": 1.0,
    "proxy_check_interval_s": 10.0,
    "proxy_check_timeout_s": 3.0,
    "io_timeout_s": 30.0,
    "connect_timeout_s": 10.0,
}


def play(tmp_path: Path, scenario: Callable[[Rig, MemNetwork], Awaitable[None]], **kwargs: Any) -> None:
    """Run a scenario with a volume in Target on virtual time."""

    async def main() -> None:
        net = MemNetwork()
        rig = Rig(
            tmp_path / "s", net=net, pools=InlinePools(random.Random(1)), deadline_s=100, poll_s=0.01, **kwargs
        )
        rig.options = REAL_DELAYS | rig.options
        rig.clock = LoopClock()  # type: ignore[assignment]
        async with rig.running():
            await rig.target()
            await rig.until_delivered()
            await scenario(rig, net)

    run(main())


@pytest.mark.parametrize(
    ("refusal", "cap_s", "expected"),
    [
        # It is there and refuses, which costs little to ask; or a whole transfer is tried in vain each time.
        (Refused("no"), 3, [1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]),
        (None, 30, [1, 2, 4, 8, 16, 30, 30, 30, 30, 30, 30]),
    ],
    ids=["refused", "broken"],
)
def test_retries_grow_to_a_cap_and_never_end(
    tmp_path: Path, refusal: Refused | None, cap_s: int, expected: list[int]
) -> None:
    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        rig.proxy.refusal = refusal
        rig.proxy.lose_acks = 0 if refusal else 1 << 30
        rig.device.scribble(1)
        times: list[float] = []
        offers = rig.proxy.offers
        while len(times) < 12:
            seen = rig.proxy.offers
            await rig.until(lambda: rig.proxy.offers > seen)  # noqa: B023 - waited for at once
            times.append(loop.time())
            rig.device.scribble(1)  # new log does not shorten the delay
        gaps = [round(b - a) for a, b in pairwise(times)]
        assert gaps == expected
        assert rig.proxy.offers == offers + 12

        await asyncio.sleep(cap_s - 1)
        assert rig.proxy.offers == offers + 12
        await rig.call(Kick())
        await rig.until(lambda: rig.proxy.offers == offers + 13)
        assert loop.time() - times[-1] < cap_s - 0.5
        await asyncio.sleep(0.9)
        assert rig.proxy.offers == offers + 13
        await asyncio.sleep(0.2)
        assert rig.proxy.offers == offers + 14  # the delays begin anew after a kick

        await asyncio.sleep(2 * 3600)
        assert rig.proxy.offers > offers + 200
        rig.proxy.refusal = None
        rig.proxy.lose_acks = 0
        await asyncio.sleep(cap_s + 1)
        assert rig.delivered()

    play(tmp_path, scenario)


def test_a_proxy_that_returns_is_used_within_one_check(tmp_path: Path) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        first = rig.proxies[0]
        net.cut_off.add(first.address)
        rig.device.scribble(1)
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 12  # one attempt to connect, and then the second proxy
        assert rig.pieces[-1].proxy == "p1"
        await asyncio.sleep(5)
        assert [proxy.available for proxy in rig.server.proxies.health()] == [False, True]
        rig.device.scribble(1)
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 1  # it is not tried any more
        net.cut_off.clear()
        began = loop.time()
        await rig.until(lambda: rig.server.proxies.health()[0].available)
        assert loop.time() - began <= 4.5  # an attempt that hangs is given up after 3 s, the next begins 1 s later
        rig.device.scribble(1)
        await rig.until_delivered()
        assert rig.pieces[-1].proxy == "p0"
        calls = first.host_type_calls
        await asyncio.sleep(100)
        assert 9 <= first.host_type_calls - calls <= 11

    play(tmp_path, scenario, n_proxies=2)


def test_while_no_proxy_is_there_each_is_looked_for_every_second(tmp_path: Path) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        addresses = {proxy.address for proxy in rig.proxies}
        for proxy in rig.proxies:
            await proxy.stop()
        rig.device.scribble(1)
        await asyncio.sleep(3600)
        assert rig.server.proxies.available() == []
        seen = len(net.connects)
        await asyncio.sleep(10)
        probes = [address for address in net.connects[seen:] if address in addresses]
        assert 18 <= len(probes) <= 22
        await rig.restart_proxy(rig.proxies[1])
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 1.5

    play(tmp_path, scenario, n_proxies=2)


def test_log_is_sent_within_about_a_second(tmp_path: Path) -> None:
    """A lone write, and a steady stream of writes of which some are not permanent yet."""

    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.sleep(60)
        rig.device.write(0, bytes([1]) * LB)
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 0.2
        rig.device.permanent_at_once = False
        rig.device.write(0, bytes([2]) * LB)
        await asyncio.sleep(0.05)
        rig.device.sync()
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 1.2
        n, began = len(rig.pieces), loop.time()
        while loop.time() - began < 60:
            rig.device.write(3, bytes([4]) * LB)
            await asyncio.sleep(0.05)
            if rig.device.rng.random() < 0.5:
                rig.device.sync()
            lag = rig.device.latest - rig.server.volumes[VOL].record.done.lsid
            assert lag <= 2 * 20 * 2
        assert 30 <= len(rig.pieces) - n <= 400

    play(tmp_path, scenario)


def test_implicit_snapshots_have_their_interval(tmp_path: Path) -> None:
    """While a transfer hangs, snapshots are planned at most every two seconds, not at every write."""

    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        rig.proxy.refusal = Refused("no")
        await rig.call(TakeSnapshot(volume=VOL))
        for _ in range(1000):
            rig.device.write(0, bytes([1]) * LB)
            await asyncio.sleep(0.1)
        queue = rig.server.volumes[VOL].record.queue
        gaps = [b.timestamp - a.timestamp for a, b in pairwise(queue)]
        assert len(gaps) >= 30  # in 100 s
        assert all(gap >= 2 for gap in gaps[1:])
        rig.proxy.refusal = None
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)

    play(tmp_path, scenario)


def test_checkpoints_are_waited_for_without_holding_up_new_log(tmp_path: Path) -> None:
    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        rig.device.written_at_once = False
        for _ in range(5):
            await asyncio.sleep(0.5)
            rig.device.write(0, bytes([1]) * LB)
            began = loop.time()
            await rig.until_delivered()
            assert loop.time() - began < 0.2
        assert rig.device.oldest < rig.device.latest
        rig.device.checkpoint()  # nobody tells of it
        began = loop.time()
        await rig.until(lambda: rig.device.oldest == rig.device.latest)
        assert loop.time() - began < 1.2
        calls = len(rig.device.calls)
        await asyncio.sleep(100)
        assert len(rig.device.calls) - calls < 100  # an idle volume is looked at now and then only

    play(tmp_path, scenario)


def test_a_dead_device_is_looked_for_every_second(tmp_path: Path) -> None:
    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop = asyncio.get_running_loop()
        rig.device.go_down()
        await asyncio.sleep(3600)
        assert rig.server.volumes[VOL].device_error
        rig.device.scribble(1)
        rig.device.come_up()
        began = loop.time()
        await rig.until_delivered()
        assert loop.time() - began < 1.5

    play(tmp_path, scenario)


@pytest.mark.parametrize("zero", [True, False])
def test_a_slow_scan_keeps_its_connection(tmp_path: Path, zero: bool) -> None:
    """An hour for a few MiB: the archive hears of us often enough, whatever the chunks are."""

    async def main() -> None:
        rig = Rig(tmp_path / "s", net=MemNetwork(), pools=InlinePools(random.Random(1)), options=REAL_DELAYS)
        device = rig.devices[DEVICE] = FakeDevice(size_lb=8 * MIB // LB)
        if not zero:
            for offset_lb in range(0, len(device.data) // LB, 64):
                device.data[offset_lb * LB] = 1
        loop = asyncio.get_running_loop()
        async with rig.running():
            await rig.init()
            await rig.call(SetFullScanBps(bytes_per_s=8 * MIB // 3600))
            began = loop.time()
            info = await rig.full_backup()
            assert info.state is JobState.DONE, info
            assert 3000 < loop.time() - began < 3700
            assert bytes(rig.archive.bases[VOL].image) == bytes(device.data)

    run(main())


def test_age_of_undelivered_log_is_exact(tmp_path: Path) -> None:
    """After hours without a write, log that was written a second ago is a second old."""

    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        async def waiting_since() -> int:
            return (await rig.call(GetStatus())).volumes[0].waiting_since

        assert await waiting_since() == 0
        await asyncio.sleep(5 * 3600)
        rig.proxy.refusal = Refused("no")
        written = rig.clock.now()
        rig.device.scribble(1)
        await asyncio.sleep(100)
        rig.device.scribble(1)
        assert await waiting_since() == written
        await rig.restart()
        await asyncio.sleep(1000)
        assert 0 <= await waiting_since() - written <= 1  # the snapshot that waits tells
        rig.proxy.refusal = None
        await asyncio.sleep(31)
        assert await waiting_since() == 0

    play(tmp_path, scenario)
