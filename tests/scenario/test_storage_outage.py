"""A storage whose log nobody takes for long: what it plans and answers meanwhile, and that nothing is lost."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

import walbd.storage.transfer as transfer_module
import walbd.storage.volume as volume_module
from tests.kit.mem_net import MemNetwork
from tests.kit.storage_rig import VOL, Rig
from tests.scenario.test_storage_time import play
from tests.scenario.test_storage_transfer import PB, check_chain, push
from walbd.errors import Refused, RemoteError
from walbd.protocol.control import GetLatestSnap, GetStatus, TakeSnapshot

HOUR_S = 3600


def test_an_hour_of_refusals_leave_few_snapshots_and_right_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(rig: Rig, _net: MemNetwork) -> None:
        volume, loop = rig.server.volumes[VOL], asyncio.get_running_loop()
        told: list[str] = []
        monkeypatch.setattr(transfer_module.log, "info", lambda event, **_: told.append(event))
        rig.proxy.refusal = Refused("the disk is full")
        began = loop.time()
        gid, truth = 0, b""
        while loop.time() < began + HOUR_S:
            rig.device.scribble(1)
            await asyncio.sleep(10)
            if not gid and loop.time() > began + HOUR_S // 2:
                gid, truth = (await rig.call(TakeSnapshot(volume=VOL))).gid, bytes(rig.device.data)
        assert told.count("wlog.refused") < 5
        assert rig.proxy.offers > 500  # it never gives up
        queue = volume.record.queue
        assert len(queue) < 300
        apart = [after.timestamp - before.timestamp for before, after in itertools.pairwise(queue)]
        assert max(apart) < HOUR_S // 32
        (row,) = (await rig.call(GetStatus(volume=VOL))).volumes
        assert "no proxy takes the log" in row.error
        assert row.lag_lb > 0
        assert rig.clock.now() - row.waiting_since >= HOUR_S - 10
        assert (row.latest_gid, row.latest_time) == (queue[-1].gid, queue[-1].timestamp)
        assert (await rig.call(GetLatestSnap(volume=VOL))).rows == [
            (VOL, "", queue[-1].gid, queue[-1].lsid, queue[-1].timestamp)
        ]
        rig.proxy.refusal = None
        await rig.until_delivered()
        check_chain(rig)
        assert rig.archive.restore(gid) == truth
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
        await rig.until_idle()
        assert (await rig.call(GetStatus(volume=VOL))).volumes[0].error == ""

    play(tmp_path, scenario)


async def test_a_generation_that_may_have_been_delivered_never_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest snapshot of a full queue is delivered, the acknowledgement lost; then much log is written."""
    monkeypatch.setattr(volume_module, "QUEUE_MAX", 2)
    rig = Rig(tmp_path / "s", options={"wlog_send_size_max": 100 * PB})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        for _ in range(2):
            rig.device.scribble(3)
            assert await push(rig, explicit=False)
        rig.options["retry_delay_min_s"] = rig.options["retry_delay_max_s"] = 3600
        await rig.restart()
        n = len(rig.pieces)
        rig.proxy.lose_acks = 1
        await rig.start_volume()
        await rig.until(lambda: len(rig.pieces) > n and rig.server.scheduler.failures(VOL))
        await rig.stop_volume()
        for _ in range(3):
            rig.device.scribble(60)
            await push(rig, explicit=False)
        truth = bytes(rig.device.data)
        await rig.start_volume()
        await rig.until_delivered()
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == truth


async def test_more_snapshots_than_a_record_can_hold_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(volume_module, "QUEUE_MAX", 2)
    monkeypatch.setattr(volume_module, "EXPLICIT_MAX", 4)
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        gids = []
        for _ in range(4):
            rig.device.scribble(1)
            gids.append((await rig.call(TakeSnapshot(volume=VOL))).gid)
        assert await push(rig, explicit=False) is None
        with pytest.raises(RemoteError) as caught:
            await rig.call(TakeSnapshot(volume=VOL))
        assert "too many snapshots" in caught.value.message
        await rig.start_volume()
        await rig.until_delivered()
        assert (await rig.call(TakeSnapshot(volume=VOL))).gid > max(gids)
        check_chain(rig)
        for gid in gids:
            rig.archive.restore(gid)
