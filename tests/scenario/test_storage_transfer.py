"""Sending log: pieces, labels, proxies that refuse or die, acknowledgements that get lost, damaged log."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import pytest

import walbd.storage.volume as volume_module
from tests.kit.fake_device import FakeDevice
from tests.kit.storage_rig import DEVICE, VOL, Piece, Rig
from walbd.errors import BadState, Busy, DiskFull, Refused, RemoteError, Stopping, WalbError
from walbd.format.meta import LogPoint
from walbd.protocol.base import JobState
from walbd.protocol.control import GetStatus, Kick, StopHow, TakeSnapshot
from walbd.protocol.transfer import Packing
from walbd.units import LB

PB = 512


def check_chain(rig: Rig) -> list[Piece]:
    """Check that the pieces follow one another without a gap, in log and in generations; return them."""
    chain = rig.archive.history()
    for before, after in itertools.pairwise(chain):
        assert after.diff.begin == before.diff.end
        assert after.offer.lsid == before.lsid_end
        assert before.diff.is_clean
    assert chain[0].diff.begin.gid_b == 0
    return chain


async def push(rig: Rig, *, explicit: bool) -> LogPoint | None:
    device, volume = rig.device, rig.server.volumes[VOL]
    return await volume.push_point(device.latest, uuid=device.uuid, explicit=explicit, now=rig.clock.now())


async def test_large_log_goes_in_pieces_with_reserved_generations(tmp_path: Path) -> None:
    """No piece exceeds the limit; only the first keeps the flag of where it begins, the rest begin implicitly."""
    rig = Rig(tmp_path / "s", options={"wlog_send_size_max": 100 * PB})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.scribble(60)
        before = rig.server.volumes[VOL].record.done
        gid = (await rig.call(TakeSnapshot(volume=VOL))).gid
        lsid = rig.device.latest
        assert gid == before.gid + 1 + (lsid - before.lsid) // 100
        truth = bytes(rig.device.data)
        await rig.start_volume()
        await rig.until_delivered()
        chain = [p for p in check_chain(rig) if p.diff.begin.gid_b >= before.gid]
        assert len(chain) > 3
        assert all(p.lsid_end - p.offer.lsid <= 100 for p in chain[:-1])
        assert chain[-1].diff.end.gid_b == gid
        assert [p.diff.mergeable for p in chain] == [False] + [True] * (len(chain) - 1)
        assert [p.diff.end.gid_b - p.diff.begin.gid_b for p in chain[:-1]] == [1] * (len(chain) - 1)
        assert rig.archive.restore(gid) == truth


async def test_explicit_snapshots_end_pieces_and_implicit_ones_do_not(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        taken = []
        for explicit in (True, False, False, True, True):
            rig.device.scribble(3)
            if explicit:
                taken.append((await rig.call(TakeSnapshot(volume=VOL))).gid)
            else:
                point = await push(rig, explicit=False)
                assert point is not None
        await rig.start_volume()
        await rig.until_delivered()
        ends = [p.diff.end.gid_b for p in check_chain(rig) if p.diff.begin.gid_b >= 1]
        assert ends == taken
        # The flag is that of the snapshot where a piece begins: all of these are explicit.
        assert not any(p.diff.mergeable for p in check_chain(rig))


async def test_snapshots_without_writes_are_empty_diffs(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        gids = [(await rig.call(TakeSnapshot(volume=VOL))).gid for _ in range(3)]
        assert gids == [2, 3, 4]
        await rig.until_delivered()
        assert [p.diff.end.gid_b for p in check_chain(rig)] == [1, 2, 3, 4]
        assert all(not p.ops for p in check_chain(rig))


async def test_lost_acknowledgements_repeat_the_piece(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        n = len(rig.pieces)
        rig.proxy.lose_acks = 3
        rig.device.scribble(10)
        await rig.until_delivered()
        assert len(rig.pieces) >= n + 4
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


@pytest.mark.parametrize("later_pb", [60, 150, 10_000])
async def test_repeated_partial_piece_ends_where_it_did_whatever_the_settings_are(
    tmp_path: Path, later_pb: int
) -> None:
    """Its generation does not depend on where it ends: two contents of one generation would lose log."""
    rig = Rig(tmp_path / "s", options={"wlog_send_size_max": 100 * PB})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.scribble(60)
        gid = (await rig.call(TakeSnapshot(volume=VOL))).gid
        n = len(rig.pieces)
        rig.proxy.lose_acks = 1
        rig.proxy.hold = asyncio.Event()
        await rig.start_volume()
        await rig.until(lambda: rig.proxy.chunks > 0 and rig.server.volumes[VOL].record.cut_lsid > 0)
        rig.proxy.hold.set()
        await rig.until(lambda: len(rig.pieces) > n)
        rig.options["wlog_send_size_max"] = later_pb * PB
        await rig.restart()
        await rig.until_delivered()
        assert rig.archive.restore(gid) == bytes(rig.device.data)
        ends: dict[object, int] = {}
        for piece in rig.pieces:
            assert ends.setdefault(str(piece.diff), piece.lsid_end) == piece.lsid_end


async def test_a_long_outage_does_not_fill_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(volume_module, "QUEUE_MAX", 5)
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        volume, gids = rig.server.volumes[VOL], []
        for i in range(20):
            rig.device.write(0, bytes([i]) * LB)
            point = await push(rig, explicit=i == 9)
            gids += [point.gid] if point is not None else []
        assert gids == sorted(set(gids))
        assert len(gids) == 6  # of the explicit ones none is left out
        assert [point.gid for point in volume.record.queue] == gids
        truth = bytes(rig.device.data)
        await rig.restart()
        await rig.start_volume()
        await rig.until_delivered()
        check_chain(rig)
        assert rig.archive.latest() > gids[-1]
        assert rig.archive.restore(rig.archive.latest()) == truth


async def test_repeated_piece_may_reach_further(tmp_path: Path) -> None:
    """Log written between the two attempts may go along; receivers drop the shorter one."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.proxy.lose_acks = 1
        rig.proxy.hold = asyncio.Event()
        rig.device.scribble(3)
        await rig.until(lambda: rig.proxy.chunks > 0)
        rig.device.scribble(3)
        rig.clock.time += 10  # the next implicit snapshot is due
        rig.proxy.hold.set()
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


REFUSALS: dict[str, WalbError] = {
    "busy": Busy("too many wlogs are being received"),
    "full disk": DiskFull("there is not enough space for the wlog"),
    "stopping": Stopping("the volume is being stopped"),
    "does not know the volume": BadState("not allowed in this state"),
}


@pytest.mark.parametrize("trouble", [*REFUSALS, "down", "no-proxy", "dies"])
async def test_second_proxy_takes_over_and_the_first_comes_back(tmp_path: Path, trouble: str) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2)
    first, second = rig.proxies
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        assert {p.proxy for p in rig.pieces} == {"p0"}
        if trouble == "down":
            await first.stop()
        elif trouble in REFUSALS:
            first.refusal = REFUSALS[trouble]
        elif trouble == "no-proxy":
            await first.stop()
            first.kind = type(first.kind).ARCHIVE
            await rig.restart_proxy(first)
            await rig.until(lambda: not rig.server.proxies.health()[0].available)
        else:
            first.abort_after_chunks = 1
            await asyncio.sleep(0)
        rig.device.scribble(3)
        await rig.until_delivered()
        if trouble != "dies":
            assert rig.pieces[-1].proxy == "p1"
        if trouble == "down":
            await rig.until(lambda: not rig.server.proxies.health()[0].available)
            await rig.restart_proxy(first)
        first.refusal, first.kind = None, type(first.kind).PROXY
        await rig.until(lambda: rig.server.proxies.health()[0].available)
        rig.device.scribble(3)
        await rig.until_delivered()
        assert rig.pieces[-1].proxy == "p0"
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)
    assert second.server is None


async def test_all_proxies_down_then_one_returns(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", n_proxies=2, options={"retry_delay_min_s": 1000.0, "retry_delay_max_s": 1000.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        for proxy in rig.proxies:
            await proxy.stop()
        rig.device.scribble(3)
        await rig.until(lambda: not rig.server.proxies.available())
        await rig.until(lambda: rig.server.volumes[VOL].send_error != "")
        status = await rig.call(GetStatus())
        assert [p.available for p in status.proxies] == [False, False]
        assert "no proxy" in " ".join(status.errors)
        await rig.restart_proxy(rig.proxies[1])
        await rig.until_delivered()  # although the next try would be far away
        assert rig.pieces[-1].proxy == "p1"
        await rig.until_idle()
        assert (await rig.call(GetStatus())).volumes[0].error == ""


async def test_no_kick_is_needed_but_it_hurries(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"retry_delay_min_s": 1000.0, "retry_delay_max_s": 1000.0})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.proxy.refusal = Refused("busy")
        rig.device.scribble(3)
        await rig.until(lambda: rig.server.scheduler.failures(VOL) == 1)
        rig.proxy.refusal = None
        offers = rig.proxy.offers
        looks = rig.device.calls.count("sample")
        rig.device.scribble(3)  # new log does not shorten the delay
        await rig.until(lambda: rig.device.calls.count("sample") > looks + 1)  # the watch has told of it
        (waiting,) = rig.server.scheduler.waiting()
        assert waiting.due_in_s > 900
        assert rig.proxy.offers == offers
        assert (await rig.call(Kick())).tasks == 1
        await rig.until_delivered()
        with pytest.raises(RemoteError):
            await rig.call(Kick(volume="other"))
        with pytest.raises(RemoteError):
            await rig.call(Kick(archive="a0"))


async def test_damaged_log_is_never_sent(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.write(0, bytes(range(256)) * 8)
        good = rig.device.latest
        rig.device.write(8, bytes(range(256)) * 8)
        rig.device.damage(good)
        n, done = len(rig.pieces), rig.server.volumes[VOL].record.done
        await rig.start_volume()
        await rig.until(lambda: rig.server.volumes[VOL].send_error != "")
        status = (await rig.call(GetStatus(volume=VOL))).volumes[0]
        assert status.state == "Target"
        assert "header" in status.error
        assert len(rig.pieces) == n
        assert rig.server.volumes[VOL].record.done == done
        kept = list((rig.base_dir / VOL).glob("logpackheader-*"))
        assert [path.name for path in kept] == [f"logpackheader-{good}"]
        assert len(kept[0].read_bytes()) == PB
        assert rig.device.oldest <= done.lsid
        rig.device.checkpoint()
        assert rig.device.oldest == done.lsid, "the device knows what it may give up"


async def test_pack_larger_than_a_transfer_is_told(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s", options={"wlog_send_size_max": 20 * PB})
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        await rig.stop_volume()
        rig.device.scribble(4, size_max_lb=2)
        rig.device.write(0, bytes(range(256)) * 2 * 30)
        rig.device.scribble(4, size_max_lb=2)
        await rig.start_volume()
        await rig.until(lambda: "larger than the largest transfer" in rig.server.volumes[VOL].send_error)
        await rig.stop_volume(StopHow.FORCE)
        rig.options["wlog_send_size_max"] = 40 * PB  # as the hint says
        await rig.restart()
        await rig.start_volume()
        await rig.until_delivered()
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


@pytest.mark.parametrize("pbs", [512, 4096])
@pytest.mark.parametrize("packing", list(Packing))
async def test_laps_of_the_ring_and_packings(tmp_path: Path, pbs: int, packing: Packing) -> None:
    rig = Rig(tmp_path / "s", options={"wlog_packing": str(packing)})
    rig.devices[DEVICE] = FakeDevice(pbs=pbs, ring_pb=64, size_lb=1024)
    async with rig.running():
        await rig.target()
        while rig.device.latest <= 2 * 64:
            rig.device.scribble(3, size_max_lb=9)
            await rig.until_delivered()
            await rig.until(lambda: rig.device.oldest == rig.device.latest, "room in the ring")
        assert not rig.device.overflow
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


async def test_the_snapshot_waits_for_permanent_log(tmp_path: Path) -> None:
    """What was answered survives a power failure of the device: log that may be lost is never part of a record."""
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.device.permanent_at_once = False
        rig.device.write(0, bytes([1]) * LB)
        truth = bytes(rig.device.data)
        taking = asyncio.create_task(rig.call(TakeSnapshot(volume=VOL)))
        await rig.until(lambda: rig.device.calls[-1] == "sample")
        assert not taking.done()
        assert rig.server.volumes[VOL].record.newest.lsid <= rig.device.permanent
        rig.device.sync()
        gid = (await taking).gid
        await rig.until_delivered()
        assert rig.archive.restore(gid) == truth


async def test_device_crash_loses_only_what_was_not_permanent(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        rig.device.write(0, bytes([1]) * LB)
        await rig.until_delivered()
        rig.device.permanent_at_once = False
        looks = rig.device.calls.count("sample")
        rig.device.write(1, bytes([2]) * LB)
        await rig.until(lambda: rig.device.calls.count("sample") > looks)  # the watch has seen the write
        rig.device.go_down()
        rig.device.crash()
        rig.device.come_up()
        rig.device.permanent_at_once = True
        rig.device.write(2, bytes([3]) * LB)
        await rig.until_delivered()
        assert await rig.state() == "Target"
        check_chain(rig)
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


async def test_force_stop_ends_a_transfer_and_graceful_waits(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "s")
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.proxy.hold = asyncio.Event()
        chunks = rig.proxy.chunks
        rig.device.scribble(3)
        await rig.until(lambda: rig.proxy.chunks > chunks)
        graceful = asyncio.create_task(rig.stop_volume())
        await rig.until(lambda: rig.server.volumes[VOL].machine.stopping is not None)
        with pytest.raises(RemoteError) as caught:
            await rig.stop_volume()
        assert caught.value.remote_code == "stopping"
        assert not graceful.done()
        rig.proxy.hold.set()
        assert (await graceful).state is JobState.DONE
        assert rig.delivered()

        await rig.start_volume()
        rig.proxy.hold = asyncio.Event()
        n = len(rig.pieces)
        chunks = rig.proxy.chunks
        rig.device.scribble(3)
        await rig.until(lambda: rig.proxy.chunks > chunks)
        assert (await rig.stop_volume(StopHow.FORCE)).state is JobState.DONE
        assert await rig.state() == "Stopped"
        assert not rig.delivered()
        assert len(rig.pieces) == n
        rig.proxy.hold.set()
        await rig.start_volume()
        await rig.until_delivered()
        assert rig.archive.restore(rig.archive.latest()) == bytes(rig.device.data)


async def test_log_is_erased_only_up_to_the_checkpoint(tmp_path: Path) -> None:
    """Delivered log that is not on the data device for good stays, until it fills half of the ring."""
    rig = Rig(tmp_path / "s")
    rig.devices[DEVICE] = FakeDevice(ring_pb=100)
    async with rig.running():
        await rig.target()
        await rig.until_delivered()
        rig.device.written_at_once = False
        rig.device.write(0, bytes(range(256)) * 2 * 10)
        await rig.until_delivered()
        assert rig.device.oldest == 0
        assert rig.device.checkpoints == 0
        for _ in range(20):
            rig.device.write(0, bytes(range(256)) * 2 * 10)
            await rig.until_delivered()
            await rig.until_idle()  # what it erases it has erased
        assert rig.device.checkpoints > 0
        assert not rig.device.overflow
        done: LogPoint = rig.server.volumes[VOL].record.done
        assert rig.device.oldest <= done.lsid
        rig.device.checkpoint()
        assert rig.device.oldest == done.lsid, "the device knows what it may give up"
