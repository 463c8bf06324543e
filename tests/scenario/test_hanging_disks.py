"""Peers whose disk hangs: they answer, and say for ever that they are at work. Others must not wait for them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tests.kit.fake_archive import FakeArchive
from tests.kit.mem_net import MemNetwork
from tests.kit.proxy_rig import StorageSide, proxy, write
from tests.kit.storage_rig import VOL, Rig
from tests.scenario.test_storage_time import REAL_DELAYS, play
from walbd.errors import Refused
from walbd.format.meta import Snapshot
from walbd.protocol.control import GetStatus
from walbd.protocol.transfer import Verdict
from walbd.storage.proxies import AVOID_S
from walbd.storage.transfer import END_PATIENCE

LIMIT_S = END_PATIENCE * REAL_DELAYS["io_timeout_s"]


def test_storage_leaves_a_proxy_whose_disk_hangs(tmp_path: Path) -> None:
    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop, (p0, p1) = asyncio.get_running_loop(), rig.proxies
        p0.hold, p0.says_it_works = asyncio.Event(), True
        n, began = len(rig.pieces), loop.time()
        rig.device.scribble(3)
        await rig.until(lambda: len(rig.pieces) > n)
        assert rig.pieces[-1].proxy == p1.name
        assert LIMIT_S <= loop.time() - began < LIMIT_S + 5
        offers, began = p0.offers, loop.time()
        while loop.time() < began + AVOID_S / 2:  # the next ones go there at once
            rig.device.scribble(1)
            await rig.until_delivered()
            await asyncio.sleep(1)
        assert p0.offers == offers
        assert all(row.available for row in (await rig.call(GetStatus())).proxies)
        await asyncio.sleep(AVOID_S)
        p0.hold.set()
        rig.device.scribble(1)  # it is tried again
        await rig.until_delivered()
        assert rig.pieces[-1].proxy == p0.name

    play(tmp_path, scenario, n_proxies=2)


def test_storage_waits_for_a_slow_proxy_when_no_other_takes_the_log(tmp_path: Path) -> None:
    """Else it would send the same to it again and again."""

    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        loop, (p0, p1) = asyncio.get_running_loop(), rig.proxies
        p0.hold, p0.says_it_works = asyncio.Event(), True
        p1.refusal = Refused("the disk is full")
        n, offers = len(rig.pieces), p0.offers
        rig.device.scribble(3)
        await rig.until(lambda: p0.offers == offers + 2)
        loop.call_later(3 * LIMIT_S, p0.hold.set)
        await asyncio.sleep(4 * LIMIT_S)
        assert p0.offers == offers + 2
        assert len(rig.pieces) > n
        assert rig.server.volumes[VOL].record.done.lsid == rig.device.latest

    play(tmp_path, scenario, n_proxies=2)


def test_storage_waits_for_its_only_proxy(tmp_path: Path) -> None:
    """To send it all again would not help."""

    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        offers = rig.proxy.offers
        rig.proxy.hold, rig.proxy.says_it_works = asyncio.Event(), True
        rig.device.scribble(3)
        await asyncio.sleep(5 * LIMIT_S)
        assert rig.proxy.offers == offers + 1
        assert rig.server.volumes[VOL].machine.running("WlogSend") == 1
        rig.proxy.hold.set()
        await rig.until_delivered()
        assert rig.proxy.offers == offers + 1

    play(tmp_path, scenario)


async def test_an_archive_that_hangs_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    """Three volumes to two archives with two workers: the second archive gets everything."""
    volumes = ["vol0", "vol1", "vol2"]
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path, sends_max=2) as rig:
        a0.hold = asyncio.Event()
        a0.script.extend([Verdict.ACCEPT] * 3)  # whatever comes first: it would hang with all of it
        for volume in volumes:
            await rig.begin(a0, a1, volume=volume)
        storages = [StorageSide(rig, volume=volume) for volume in volumes]
        for n in range(9):
            storage = storages[n % 3]
            storage.gid = n  # the archives of the kit follow one history, of all volumes
            await storage.send([write(8 * n)])
            await rig.drained("a1", volume=storage.volume)
        assert [got.offer.volume for got in a1.got] == 3 * volumes
        assert (a0.streaming, a0.got) == (1, [])
        a0.hold.set()
        for volume in volumes:
            await rig.drained("a0", volume=volume)
        assert a0.latest == a1.latest == Snapshot.clean(9)
