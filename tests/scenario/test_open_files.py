"""Nothing is left open: after many transfers and failures a daemon has as many files open as after few."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from tests.kit.fake_archive import FakeArchive
from tests.kit.proxy_rig import ProxyRig, StorageSide, proxy, write
from tests.kit.storage_rig import VOL, Rig
from walbd.daemon.conn import Me, dial
from walbd.errors import Busy, Refused, WalbError
from walbd.format.meta import Diff, Snapshot
from walbd.ids import Gid
from walbd.protocol.base import Kind
from walbd.protocol.control import GetStatus, StopHow, TakeSnapshot
from walbd.protocol.maintenance import DumpLogHeader
from walbd.protocol.transfer import Verdict

ROUNDS = 12


def open_files() -> list[str]:
    """What this process has open; sockets without their numbers."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}").partition(":[")[0])
        except FileNotFoundError:
            pass  # that was the listing itself
    return sorted(found)


async def stays(round_: Callable[[], Awaitable[None]]) -> None:
    await round_()
    first = Counter(open_files())  # with what is just being closed, which is less than each round would leave
    for _ in range(ROUNDS):
        await round_()
    try:
        async with asyncio.timeout(60):
            while Counter(open_files()) - first:  # noqa: ASYNC110 - nobody tells of it
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"left open: {Counter(open_files()) - first}") from None


async def test_storage(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2)

    async def failures_and_transfers() -> None:
        rig.proxies[0].abort_after_chunks = 1
        rig.proxies[1].lose_acks = 1
        rig.device.scribble(3)
        await rig.until_delivered()
        rig.proxies[0].refusal = Refused("no")
        rig.device.scribble(3)
        await rig.until_delivered()
        rig.proxies[0].refusal = None
        await rig.proxies[0].stop()
        rig.device.go_down()
        with pytest.raises(WalbError):
            await rig.call(TakeSnapshot(volume=VOL))
        rig.device.come_up()
        await rig.call(TakeSnapshot(volume=VOL))
        await rig.until_delivered()
        await rig.restart_proxy(rig.proxies[0])
        await rig.stop_volume(StopHow.FORCE)
        await rig.start_volume()
        with pytest.raises(WalbError):
            await rig.call(DumpLogHeader(volume=VOL, lsid=1 << 40))
        await rig.call(GetStatus())

    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await stays(failures_and_transfers)


async def test_proxy(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        await stays(lambda: proxy_round(rig, a0, storage))


async def proxy_round(rig: ProxyRig, a0: FakeArchive, storage: StorageSide) -> None:
    a0.lose_acks = 1
    a0.fail_in_stream = Busy("in the middle")
    a0.script.extend([Verdict.SYNCING, Busy("no"), Verdict.SMALLER])
    await storage.send([write(0)])
    await rig.drained()
    await a0.down()
    await storage.send([write(1)])
    await rig.until(lambda: rig.hop().error_text)
    with pytest.raises(WalbError):
        await storage.send([write(1)], diff=Diff(Snapshot.clean(storage.gid), Snapshot(Gid(1000), Gid(1001))))
    me = Me(node="s0", kind=Kind.STORAGE, io_timeout_s=20)
    async with dial(rig.env, me, rig.address) as conn:  # a storage that dies in the middle
        await storage.stream(conn, [write(0)])
        conn.abort()
    await rig.until(lambda: rig.volume.machine.during is None)
    await a0.up()
    await rig.drained()
