"""Peers that hang: paused processes, half-open connections. Whoever waits for one recovers by itself.

On virtual time with the real delays: an hour passes in no time. No test gives a kick.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_archive import FakeArchive
from tests.kit.logs import image_of
from tests.kit.mem_net import MemNetwork
from tests.kit.proxy_rig import REAL_DELAYS, ProxyRig, StorageSide, play_proxy, write
from tests.kit.storage_rig import Rig
from tests.kit.virtual import InlinePools, LoopClock, run
from walbd.daemon.conn import Me, dial
from walbd.errors import ConnectError, WalbError
from walbd.protocol.base import JobState, Kind
from walbd.protocol.control import FullBackup, GetIsWdiffSendError, ResetVol, Stop, StopHow
from walbd.protocol.transfer import Verdict, WlogEnd

HOUR_S = 3600.0
STORAGE: dict[str, Any] = {
    **REAL_DELAYS,
    "gather_delay_s": 0.1,
    "settle_delay_max_s": 1.0,
    "proxy_check_interval_s": 10.0,
    "proxy_check_timeout_s": 3.0,
}


async def elapsed(work: Awaitable[Any]) -> float:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await work
    return loop.time() - began


# A storage and its peers


def play_storage(
    tmp_path: Path, scenario: Callable[[Rig, MemNetwork], Awaitable[None]], *, n_proxies: int = 1
) -> None:
    async def main() -> None:
        net = MemNetwork()
        pools = InlinePools(random.Random(1))
        rig = Rig(tmp_path / "s", n_proxies, STORAGE, net, pools, deadline_s=200, poll_s=0.01)
        rig.clock = LoopClock()  # type: ignore[assignment]
        async with rig.running():
            await rig.target()
            await rig.until_delivered()
            await scenario(rig, net)

    run(main())


def test_storage_goes_round_a_paused_proxy_and_back(tmp_path: Path) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        first = rig.proxies[0].address
        net.paused.add(first)
        rig.device.scribble(1)
        assert await elapsed(rig.until_delivered()) < 12
        assert rig.pieces[-1].proxy == "p1"
        await asyncio.sleep(HOUR_S)
        rig.device.scribble(1)
        assert await elapsed(rig.until_delivered()) < 1  # it is known to be away
        net.resume(first)
        assert await elapsed(rig.until(lambda: first in rig.server.proxies.available())) <= 10
        rig.device.scribble(1)
        await rig.until_delivered()
        assert rig.pieces[-1].proxy == "p0"

    play_storage(tmp_path, scenario, n_proxies=2)


@pytest.mark.parametrize("how", ["paused", "half open"])
def test_storage_leaves_a_proxy_that_hangs_in_the_middle(tmp_path: Path, how: str) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        first = rig.proxies[0]
        first.hold = hold = asyncio.Event()
        rig.device.scribble(1)
        chunks = first.chunks
        await rig.until(lambda: first.chunks > chunks)
        first.hold = None
        if how == "paused":
            net.paused.add(first.address)
        else:
            net.lose(first.address)
        assert await elapsed(rig.until_delivered()) < 45
        assert rig.pieces[-1].proxy == ("p1" if how == "paused" else "p0")
        hold.set()

    play_storage(tmp_path, scenario, n_proxies=2)


def test_storage_resumes_when_its_only_proxy_wakes_up(tmp_path: Path) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        net.paused.add(rig.proxy.address)
        for _ in range(10):
            rig.device.scribble(1)
            await asyncio.sleep(HOUR_S / 10)
        net.resume(rig.proxy.address)
        assert await elapsed(rig.until_delivered()) < 5
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)

    play_storage(tmp_path, scenario)


def test_a_backup_to_a_paused_archive_ends_and_can_be_repeated(tmp_path: Path) -> None:
    async def scenario(rig: Rig, net: MemNetwork) -> None:
        await rig.stop_volume()
        await rig.call(ResetVol(volume="vol0"))
        rig.archive.hold = asyncio.Event()
        job = (await rig.call(FullBackup(volume="vol0"))).job
        await rig.until(lambda: rig.archive.offers)
        net.paused.add(rig.archive.address)
        info = await rig.job(job)
        assert info.state is JobState.FAILED
        assert await rig.state() == "SyncReady"
        with pytest.raises(WalbError):
            await rig.full_backup()
        assert await rig.state() == "SyncReady"
        rig.archive.hold.set()
        rig.archive.hold = None
        net.resume(rig.archive.address)
        assert (await rig.full_backup()).state is JobState.DONE

    play_storage(tmp_path, scenario)


# A proxy and its peers


@pytest.mark.parametrize("how", ["paused", "cut off"])
def test_proxy_sends_as_soon_as_the_archive_wakes_up(tmp_path: Path, how: str) -> None:
    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, net: MemNetwork) -> None:
        (net.paused if how == "paused" else net.cut_off).add(a0.address)
        for _ in range(10):
            await storage.send([write(0)])
            await asyncio.sleep(HOUR_S / 10)
        assert len(await rig.waiting("a0")) == 10
        assert "down" in rig.hop().error_text
        net.cut_off.clear()
        net.resume(a0.address)
        assert await elapsed(rig.drained()) < 16  # an attempt that hangs in the switch ends, the next one succeeds
        assert a0.latest.gid_b == 10

    play_proxy(tmp_path, scenario)


@pytest.mark.parametrize("how", ["paused", "half open"])
def test_proxy_leaves_an_archive_that_hangs_in_the_middle(tmp_path: Path, how: str) -> None:
    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, net: MemNetwork) -> None:
        a0.hold = asyncio.Event()
        await storage.send([write(0)])
        await rig.until(lambda: a0.streaming)
        if how == "paused":
            net.paused.add(a0.address)
        else:
            net.lose(a0.address)
        a0.hold.set()
        a0.hold = None
        assert await elapsed(rig.until(lambda: not rig.hop().sending, limit_s=60)) < 33
        if how == "paused":
            await asyncio.sleep(HOUR_S)
            net.resume(a0.address)
        assert await elapsed(rig.drained()) < 5
        assert a0.latest.gid_b == 1

    play_proxy(tmp_path, scenario)


@pytest.mark.parametrize("verdict", [Verdict.SMALLER, Verdict.NOT_FOUND])
def test_proxy_goes_on_once_a_person_has_mended_the_archive(tmp_path: Path, verdict: Verdict) -> None:
    """The flag is raised as long as that is true, whatever comes in; nobody has to give a kick."""

    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, _net: MemNetwork) -> None:
        async def flag() -> bool:
            return (await rig.call(GetIsWdiffSendError(volume="vol0", archive="a0"))).value

        a0.refuse_all(verdict)
        await storage.send([write(0)])
        await rig.until(lambda: rig.hop().needs_person)
        for _ in range(20):
            await asyncio.sleep(HOUR_S / 20)
            await storage.send([write(0)])
            assert await flag()
        assert 100 < len(a0.offers) < 130  # slowly: every 30 s
        a0.refuse_all(None)
        assert await elapsed(rig.until(lambda: not rig.volume.unsent, limit_s=60)) <= 31
        assert not await flag()
        assert a0.latest.gid_b == 21

    play_proxy(tmp_path, scenario)


@pytest.mark.parametrize("how", ["silent", "half open"])
def test_proxy_does_not_wait_for_ever_for_a_storage(tmp_path: Path, how: str) -> None:
    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, net: MemNetwork) -> None:
        me = Me(node="s0", kind=Kind.STORAGE, io_timeout_s=200)
        async with dial(rig.env, me, rig.address) as conn:
            lsid = await storage.stream(conn, [write(0)])
            await rig.until(lambda: rig.volume.machine.during == "WlogRecv")
            if how == "half open":
                net.lose(rig.address)
            assert await elapsed(rig.until(lambda: rig.volume.machine.during is None, limit_s=60)) < 31
            with pytest.raises(WalbError):
                await conn.call(WlogEnd(lsid=lsid, diff=storage.label()))
        assert rig.files() == ["volume.json"]
        assert rig.server.receiver.running == 0
        await storage.send([write(0)])
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])

    play_proxy(tmp_path, scenario)


def test_stop_empty_tells_what_it_waits_for(tmp_path: Path) -> None:
    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, net: MemNetwork) -> None:
        net.cut_off.add(a0.address)
        await storage.send([write(0)])
        job = (await rig.call(Stop(volume="vol0", how=StopHow.EMPTY))).job
        await asyncio.sleep(HOUR_S)
        info = rig.server.jobs.get(job).info()
        assert info.state is JobState.RUNNING
        assert info.phase.startswith("sending what waits (a0: the archive is down")
        assert (info.done, info.total) == (0, 1)
        with pytest.raises(WalbError):  # meanwhile storages use another proxy
            await storage.send([write(1)])
        net.cut_off.clear()
        await rig.until(lambda: not rig.server.jobs.get(job).running)
        assert rig.server.jobs.get(job).info().state is JobState.DONE
        assert await rig.state() == "Stopped"

    play_proxy(tmp_path, scenario)


def test_a_client_that_says_nothing_is_dropped(tmp_path: Path) -> None:
    async def scenario(rig: ProxyRig, _a0: FakeArchive, _storage: StorageSide, net: MemNetwork) -> None:
        stream = await net.connect(rig.address)
        assert await elapsed(_until_closed(stream)) < 61
        async with dial(rig.env, Me(node="c", kind=Kind.CONTROL), rig.address) as conn:
            assert await elapsed(_until_end(conn)) < 301
        await rig.until(lambda: not rig.server.server._streams)

    play_proxy(tmp_path, scenario)


async def _until_closed(stream: Any) -> None:
    """Read until the server closes: it tells why first."""
    try:
        while await stream.receive() is not None:
            pass
    except ConnectError:
        pass


async def _until_end(conn: Any) -> None:
    assert await conn.receive_or_end(timeout_s=1000) is None
