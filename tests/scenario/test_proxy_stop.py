"""Stopping a volume in every way while something is going on, and ending the daemon."""

import asyncio
import socket
from pathlib import Path

import pytest

from tests.kit.fake_archive import FakeArchive, clean
from tests.kit.logs import image_of
from tests.kit.proxy_rig import STORAGE, ProxyRig, StorageSide, proxy, write
from walbd.daemon.conn import dial
from walbd.daemon.main import ShutdownMode
from walbd.daemon.net import Address
from walbd.errors import Busy, ConnectError, RemoteError
from walbd.protocol.base import JobInfo, JobState, WaitJob
from walbd.protocol.control import Kick, Shutdown, ShutdownHow, Stop, StopHow
from walbd.protocol.transfer import Verdict, WlogEnd

NEVER = {"retry_delay_min_s": 3600.0, "retry_delay_max_s": 3600.0}
PACKS = [write(0), write(20, 8, 2)]


async def begin_stop(rig: ProxyRig, how: StopHow) -> int:
    return (await rig.call(Stop(volume="vol0", how=how))).job


async def end_of(rig: ProxyRig, job: int) -> JobInfo:
    return await rig.call(WaitJob(job=job, wait_s=20))


async def test_graceful_stop_waits_for_a_reception(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await storage.stream(conn, PACKS)
            job = await begin_stop(rig, StopHow.GRACEFUL)
            assert (await rig.call(WaitJob(job=job))).state is JobState.RUNNING
            assert await rig.state() == "WlogRecv"
            assert (await rig.status()).stopping == "graceful"
            await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        info = await end_of(rig, job)
        assert (info.state, info.result) == (JobState.DONE, {"mode": "graceful", "unsent": 1})
        assert await rig.state() == "Stopped"
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        assert rig.server.scheduler.waiting() == []
        await rig.begin()
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


async def test_graceful_stop_waits_for_a_send(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        hold = a0.hold = asyncio.Event()
        await StorageSide(rig).send(PACKS)
        await rig.until(lambda: a0.streaming)
        job = await begin_stop(rig, StopHow.GRACEFUL)
        assert (await rig.call(WaitJob(job=job))).state is JobState.RUNNING
        hold.set()
        assert (await end_of(rig, job)).result["unsent"] == 0
        assert a0.diffs == ["|0|-->|1|"]


async def test_forced_stop_ends_a_reception(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await storage.stream(conn, PACKS)
            assert (await rig.stop_volume(StopHow.FORCE)).state is JobState.DONE
            with pytest.raises(RemoteError) as caught:
                await conn.receive()
            assert caught.value.remote_code == "force-stopped"
        assert rig.files() == ["volume.json"]
        await rig.begin()
        await storage.send(PACKS)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


async def test_forced_stop_ends_a_send_and_deletes_nothing(tmp_path: Path) -> None:
    packs = [write(2000 * i, 2000, i + 1) for i in range(32)]  # more than all buffers on the way hold
    async with FakeArchive(size_b=32 << 20) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        hold = a0.hold = asyncio.Event()
        await StorageSide(rig, size_lb=1 << 16).send(packs)
        await rig.until(lambda: a0.streaming)
        assert (await rig.stop_volume(StopHow.FORCE)).state is JobState.DONE
        assert await rig.state() == "Stopped"
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        hold.set()
        await rig.until(lambda: a0.broken)
        assert a0.got == []
        await rig.begin()
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), packs)


async def test_forced_stop_ends_an_attempt_to_connect(tmp_path: Path) -> None:
    """An archive that hangs keeps an attempt waiting for its time limit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        a0 = FakeArchive(address=Address("127.0.0.1", silent.getsockname()[1]))
        async with proxy(tmp_path) as rig:
            await rig.begin(a0)
            await StorageSide(rig).send(PACKS)
            await rig.until(lambda: rig.hop().sending)
            assert (await rig.stop_volume(StopHow.FORCE)).state is JobState.DONE


async def test_stopped_volume_sends_nothing(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, start_stopped=True) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send(PACKS)
        await rig.stop_volume()
        offers = len(a0.offers)
        a0.refuse_all(None)
        rig.server.sends.push(rig.volume)  # a task that slips past the end of the stop
        await rig.until(lambda: not rig.server.scheduler.waiting())
        await rig.restart()
        assert await rig.state() == "Stopped"
        assert len(a0.offers) == offers
        await rig.begin()
        await rig.drained()


@pytest.mark.parametrize("waiting", [0, 3])
async def test_stop_empty_sends_everything_first(tmp_path: Path, waiting: int) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        a1.refuse_all(Verdict.STOPPED)
        storage = StorageSide(rig)
        for i in range(waiting):
            await storage.send([write(i)], mergeable=False)
        job = await begin_stop(rig, StopHow.EMPTY)
        if waiting:
            await rig.drained("a0")
            info = await rig.call(WaitJob(job=job))
            assert (info.state, info.unit) == (JobState.RUNNING, "wdiffs")
            assert await rig.state() == "WaitForEmpty"
            with pytest.raises(RemoteError) as caught:
                await storage.send([write(9)])  # new wlogs go elsewhere
            assert caught.value.remote_code == "stopping"
            a1.refuse_all(None)
        assert (await end_of(rig, job)).state is JobState.DONE
        assert await rig.state() == "Stopped"
        assert a0.latest.gid_b == a1.latest.gid_b == waiting
        assert rig.files() == ["volume.json"]


async def test_stop_empty_waits_for_a_reception_and_sends_it(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await storage.stream(conn, PACKS)
            job = await begin_stop(rig, StopHow.EMPTY)
            await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        assert (await end_of(rig, job)).state is JobState.DONE
        assert a0.diffs == ["|0|-->|1|"]


async def test_stop_empty_is_hurried_by_kick_and_by_the_return_of_the_archive(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **NEVER) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.STOPPED)
        await StorageSide(rig).send(PACKS, mergeable=False)
        await rig.until(lambda: rig.server.scheduler.waiting())
        await a0.down()
        job = await begin_stop(rig, StopHow.EMPTY)
        await rig.until(lambda: rig.server.prober.is_down(str(a0.address)))
        await a0.up()
        await rig.until(lambda: len(a0.offers) == 2)
        a0.refuse_all(None)
        await rig.until(lambda: rig.server.scheduler.waiting())
        await rig.call(Kick(volume="vol0"))
        assert (await end_of(rig, job)).state is JobState.DONE


@pytest.mark.parametrize("first", [StopHow.EMPTY, StopHow.GRACEFUL])
async def test_forced_stop_hurries_another_stop(tmp_path: Path, first: StopHow) -> None:
    """`stop empty` would wait for ever for an archive that does not come back."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        hold = a0.hold = asyncio.Event()
        await StorageSide(rig).send(PACKS)
        await rig.until(lambda: a0.streaming)
        job = await begin_stop(rig, first)
        await rig.until(lambda: rig.volume.machine.stopping)
        with pytest.raises(RemoteError) as caught:
            await begin_stop(rig, first)
        assert caught.value.remote_code == "stopping"
        assert await begin_stop(rig, StopHow.FORCE) == job
        assert (await end_of(rig, job)).state is JobState.DONE
        assert await rig.state() == "Stopped"
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        hold.set()


async def test_forced_stop_while_a_stop_empty_waits_for_a_reception(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await StorageSide(rig).stream(conn, PACKS)
            job = await begin_stop(rig, StopHow.EMPTY)
            assert await begin_stop(rig, StopHow.FORCE) == job
            assert (await end_of(rig, job)).state is JobState.DONE
            with pytest.raises(RemoteError):
                await conn.receive()
        assert await rig.state() == "Stopped"


async def test_graceful_end_of_the_daemon(tmp_path: Path) -> None:
    """Running transfers end, a stop that would wait for more to be sent gives up, nothing new begins."""
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        hold = a0.hold = asyncio.Event()
        a1.refuse_all(Verdict.STOPPED)
        storage = StorageSide(rig)
        await storage.send(PACKS)
        await rig.until(lambda: a0.streaming)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await storage.stream(conn, PACKS)
            job = await begin_stop(rig, StopHow.EMPTY)
            address = rig.address
            conversations = rig.server.server._streams
            await rig.until(lambda: len(conversations) == 1)
            waiter = asyncio.create_task(end_of(rig, job))
            await rig.until(lambda: sum(conversations.values()) == 2)
            ending = asyncio.create_task(rig.stop(ShutdownMode.GRACEFUL))
            await waiter  # a client that waits for a job does not keep the daemon from ending
            with pytest.raises(ConnectError):
                async with dial(rig.env, STORAGE, address):
                    pass
            await conn.call(WlogEnd(lsid=lsid, diff=clean(1, 2)))
            assert not ending.done()
            hold.set()
        await ending
        assert a0.diffs == ["|0|-->|1|"]
        assert rig.server.jobs.get(job).info().error_code == "stopping"
        await rig.restart()
        a1.refuse_all(None)
        await rig.drained()
        assert a0.latest.gid_b == a1.latest.gid_b == 2


async def test_forced_end_of_the_daemon(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        hold = a0.hold = asyncio.Event()
        storage = StorageSide(rig)
        await storage.send(PACKS)
        await rig.until(lambda: a0.streaming)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await storage.stream(conn, PACKS)
            graceful = asyncio.create_task(rig.stop(ShutdownMode.GRACEFUL))
            await rig.until(lambda: rig.server.server._closing)
            await rig.stop(ShutdownMode.FORCE)
            await graceful
            with pytest.raises(ConnectError):
                await conn.receive()
        hold.set()
        a0.hold = None
        await rig.restart()
        assert rig.files("received") == []
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


@pytest.mark.parametrize("how", ShutdownHow)
async def test_shutdown_is_answered(tmp_path: Path, how: ShutdownHow) -> None:
    async with proxy(tmp_path) as rig:
        await rig.call(Shutdown(how=how))
        async with asyncio.timeout(60):  # it ends after the answer
            assert await rig.shutdown.requested() == how.value


async def test_directory_belongs_to_one_process(tmp_path: Path) -> None:
    async with proxy(tmp_path):
        other = ProxyRig(tmp_path)
        with pytest.raises(Busy):
            await other.up()
        other.env.pools.close()
