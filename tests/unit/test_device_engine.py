"""The engine of the userspace device on a simulated disk and virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.kit.device import (
    DDEV,
    LDEV,
    Client,
    Op,
    block,
    make_disk,
    on_device,
    overflowed,
    serving,
    write_op,
)
from tests.kit.simdisk import SimDisk
from tests.kit.virtual import run
from walbd.errors import Busy, DiskFailed, HistoryBroken, ReadOnlyDevice, WalbError
from walbd.format.superblock import read_superblock
from walbd.protocol.nbd import Command, CommandFlag, Error, ExportFlag
from walbd.storage.device import log_stage
from walbd.storage.device.engine import Engine, Tuning
from walbd.units import LB


@pytest.mark.parametrize("pbs", [512, 4096])
def test_a_read_sees_every_acknowledged_write(pbs: int) -> None:
    async def body(engine: Engine, client: Client) -> None:
        assert await client.read(0, 4096) == bytes(4096)
        assert await client.write(1, block(7, 3)) == 0
        assert engine.core.lsids.written == 0, "the data device is not written before the log is permanent"
        assert await client.read(LB - 1, 3 * LB + 2) == b"\0" + block(7, 3) + b"\0"
        assert await client.trim(2, 1) == 0
        assert await client.read(LB, 3 * LB) == block(7) + block(0) + block(7)
        assert disk.files[DDEV].now == bytes(256 * LB)
        await engine.drain()
        assert len(engine.data.overlay) == 0
        assert await client.read(LB, 3 * LB) == block(7) + block(0) + block(7)
        assert bytes(disk.files[DDEV].now[LB : 4 * LB]) == block(7) + block(0) + block(7)

    disk = make_disk(pbs=pbs)
    on_device(body, disk)


def test_a_flush_is_answered_when_the_log_is_durable() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        assert engine.core.lsids.permanent == 0
        assert await client.flush() == 0
        assert engine.core.lsids.permanent == engine.core.lsids.latest > 0
        before = engine.log.syncs_begun
        assert await client.flush() == 0
        assert engine.log.syncs_begun == before, "nothing new: no sync"

    on_device(body)


def test_a_flush_covers_the_writes_received_before_it() -> None:
    async def body(engine: Engine, client: Client) -> None:
        op = write_op(0, block(1))
        client.submit(op)
        assert await client.flush() == 0
        assert op.result == 0
        assert engine.core.lsids.permanent == engine.core.lsids.latest > 0

    on_device(body)


def test_fua_is_answered_after_a_sync_and_the_others_before() -> None:
    async def body(engine: Engine, client: Client) -> None:
        plain, fua = write_op(0, block(1)), write_op(8, block(2), CommandFlag.FUA)
        trim = Op(Command.TRIM, 16, 8, flags=CommandFlag.FUA)
        client.submit(plain, fua, trim)
        await client.answered(plain)
        if engine.core.lsids.permanent == 0:
            assert {fua.result, trim.result} == {None}
        assert await client.answered(fua) == 0
        assert await client.answered(trim) == 0
        assert engine.core.lsids.permanent == engine.core.lsids.latest

    for seed in range(5):
        on_device(body, seed=seed)


def test_the_memory_of_requests_is_given_back_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when the last answer of a batch comes before that of an earlier one, which waits for a sync."""
    monkeypatch.setattr(log_stage, "BATCH_MAX_B", 4096)

    async def body(engine: Engine, client: Client) -> None:
        ops = [write_op(0, block(1, 8), CommandFlag.FUA), write_op(8, block(2, 8)), write_op(16, block(3, 8))]
        client.submit(*ops)
        for op in ops:
            assert await client.answered(op) == 0
        await engine.drain()
        assert client.returned_b == 3 * 8 * LB

    on_device(body)


def test_one_sync_serves_many() -> None:
    async def body(engine: Engine, client: Client) -> None:
        ops = [write_op(i, block(i), CommandFlag.FUA) for i in range(50)]
        for op in ops:
            client.submit(op)
        await asyncio.gather(*[client.answered(op) for op in ops])
        assert engine.log.syncs_begun <= 3

    on_device(body)


def test_log_becomes_permanent_by_itself() -> None:
    async def body(engine: Engine, client: Client) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        await client.write(0, block(1))
        lsids = engine.core.lsids
        await engine.core.log_advanced.wait_for(lambda: lsids.permanent == lsids.latest)
        assert loop.time() - began == pytest.approx(0.1, abs=0.01)

    on_device(body)


def test_log_becomes_permanent_by_size() -> None:
    async def body(engine: Engine, client: Client) -> None:
        for i in range(8):
            await client.write(i * 4, block(i, 4))
        lsids = engine.core.lsids
        await engine.core.log_advanced.wait_for(lambda: lsids.permanent > 0)
        assert asyncio.get_running_loop().time() < 0.1

    on_device(body, tuning=Tuning(flush_interval_b=8192, flush_interval_s=50.0))


def test_no_hole_zeros_are_written_and_other_zeros_discarded() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(9, 16))
        kept = Op(Command.WRITE_ZEROES, 0, 8, flags=CommandFlag.NO_HOLE)
        hole = Op(Command.WRITE_ZEROES, 8, 8)
        client.submit(kept, hole)
        await client.answered(hole)
        assert await client.read(0, 16 * LB) == bytes(16 * LB)
        assert engine.data.overlay.extents(0, 16 * LB) == [(0, 8 * LB, False), (8 * LB, 16 * LB, True)]
        await engine.drain()
        assert await client.read(0, 16 * LB) == bytes(16 * LB)

    on_device(body)


def test_large_writes_are_split_and_answered_once() -> None:
    async def body(engine: Engine, client: Client) -> None:
        data = random.Random(3).randbytes(200 * LB)  # larger than the ring holds at once
        op = write_op(5, data)
        client.submit(op, write_op(0, block(1)))
        assert await client.answered(op) == 0
        assert await client.read(5 * LB, len(data)) == data
        assert engine.core.lsids.latest > 128

    on_device(body, make_disk(ring_pb=64))


def test_a_full_ring_waits_for_a_checkpoint_and_overflows_the_consumer() -> None:
    async def body(engine: Engine, client: Client) -> None:
        core = engine.core
        for i in range(40):
            assert await client.write(i, block(i, 10)) == 0
            assert core.lsids.latest - core.lsids.prev_written <= 64
        assert core.overflow
        assert engine.usage_pb > 64
        assert await client.read(39 * LB, 10 * LB) == block(39, 10)
        await engine.stop()

    disk = on_device(body, make_disk(ring_pb=64))

    async def again(engine: Engine, client: Client) -> None:
        assert overflowed(engine), "derived anew"
        await engine.reset_wal()
        assert not overflowed(engine)
        assert engine.core.lsids.latest == engine.core.lsids.oldest == 0
        assert await client.read(39 * LB, 10 * LB) == block(39, 10)
        await client.write(0, block(1))

    on_device(again, disk)


def test_overflow_is_derived_when_oldest_was_overwritten() -> None:
    async def body(engine: Engine, client: Client) -> None:
        for i in range(10):
            await client.write(i, block(i))
        await engine.stop()

    disk = on_device(body)
    sb = read_superblock(disk.open(LDEV))
    disk.open(LDEV, write=True).pwrite(bytes(512), sb.offset_b(0))

    async def again(engine: Engine, _: Client) -> None:
        assert engine.core.overflow

    on_device(again, disk)


def test_a_consumer_that_keeps_up_sees_no_overflow() -> None:
    async def body(engine: Engine, client: Client) -> None:
        for i in range(200):
            assert await client.write(i % 200, block(i % 251)) == 0
            if i % 10 == 9:
                await engine.drain()
                await engine.take_checkpoint()
                await engine.set_oldest(engine.core.lsids.prev_written)
        assert engine.core.lsids.latest > 64 * 5
        assert not engine.core.overflow

    on_device(body, make_disk(ring_pb=64))


def test_writes_wait_while_the_data_stage_is_behind() -> None:
    async def body(engine: Engine, client: Client) -> None:
        ops = [write_op(i * 8, block(i + 1, 8)) for i in range(20)]
        for op in ops:
            client.submit(op)
            assert engine.data.pending_b < 16384 + 8192
            await asyncio.sleep(0)
        for op in ops:
            assert await client.answered(op) == 0
        assert await client.read(19 * 8 * LB, LB) == block(20)

    on_device(body, tuning=Tuning(pending_max_b=16384, flush_interval_b=1 << 20, flush_interval_s=3600))


def test_writes_wait_when_too_much_log_is_not_permanent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A start after a crash looks through so much above the end, and no more."""
    monkeypatch.setattr(log_stage, "UNSYNCED_MAX_B", 8 * LB)
    monkeypatch.setattr(log_stage, "BATCH_MAX_B", 2 * LB)

    async def body(engine: Engine, client: Client) -> None:
        lsids = engine.core.lsids
        ops = [write_op(i, block(i)) for i in range(40)]
        for op in ops:
            client.submit(op)
        for op in ops:
            assert await client.answered(op) == 0
            assert lsids.latest - lsids.permanent <= 8 + 2

    rare = Tuning(flush_interval_s=3600, flush_interval_b=1 << 40)
    on_device(body, tuning=rare)


def test_exports() -> None:
    async def body(engine: Engine, _: Client) -> None:
        for name in ("", "sim"):
            export = engine.find(name)
            assert export is not None
            assert ExportFlag.CAN_MULTI_CONN in export.flags
            assert ExportFlag.READ_ONLY not in export.flags
        assert engine.find("other") is None
        assert engine.names() == ["sim"]

    on_device(body)


def test_extents_merge_overlay_and_disk() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1, 8))
        await client.write(64, block(1, 8))
        await engine.drain()
        await client.write(16, block(2, 8))
        await client.trim(64, 8)
        assert await engine.extents(0, 256 * LB, 100) == [
            (8 * LB, 0),
            (8 * LB, 3),
            (8 * LB, 0),
            (232 * LB, 3),
        ]
        assert await engine.extents(4 * LB, 100 * LB, 1) == [(4 * LB, 0)]
        assert await engine.extents(4 * LB, 2 * LB, 9) == [(2 * LB, 0)]
        assert await engine.extents(20 * LB, 30 * LB, 2) == [(4 * LB, 0), (26 * LB, 3)]

    on_device(body)


def failing(during: str) -> SimDisk:
    """Return a disk on which the first operation of a kind after the start fails."""
    disk = make_disk()
    original = disk.step
    state = {"armed": False}

    def step(what: str) -> str:
        fate = original(what)
        if state["armed"] and what.startswith(during) and fate == "ok":
            state["armed"] = False
            return "fail"
        return fate

    disk.step = step  # type: ignore[method-assign]
    disk.arm = lambda: state.update(armed=True)  # type: ignore[attr-defined]
    return disk


@pytest.mark.parametrize("during", ["write", "sync ldev", "sync ddev", "zero"])
def test_any_failure_makes_the_device_read_only(during: str) -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await engine.drain()
        disk.arm()  # type: ignore[attr-defined]
        op = write_op(0, block(2), CommandFlag.FUA)
        client.submit(op, Op(Command.TRIM, 100, 8), write_op(8, block(3)))
        await client.answered(op)
        try:
            await engine.drain()
            await engine.take_checkpoint()
        except ReadOnlyDevice:
            pass
        assert isinstance(engine.core.failed, DiskFailed)
        assert await client.write(0, block(9)) == Error.IO
        assert await client.flush() == Error.IO
        assert await client.trim(0, 1) == Error.IO
        for call in (engine.take_checkpoint, engine.drain, engine.reset_wal):
            with pytest.raises(ReadOnlyDevice):
                await call()
        with pytest.raises(ReadOnlyDevice):
            await engine.freeze(0)
        with pytest.raises(ReadOnlyDevice):
            await engine.set_oldest(0)
        export = engine.find("")
        assert export is not None
        assert ExportFlag.READ_ONLY in export.flags
        expected = block(2) if op.result == 0 else await client.read(0, LB)
        assert await client.read(0, LB) == expected in (block(1), block(2))
        lsids = engine.core.lsids
        sample = (lsids.completed, lsids.permanent, lsids.written, lsids.prev_written)
        await asyncio.sleep(60)
        assert sample == (lsids.completed, lsids.permanent, lsids.written, lsids.prev_written)
        await engine.stop()

    disk = failing(during)
    on_device(body, disk)
    assert not disk.files[LDEV].locked


def test_nothing_is_acknowledged_after_a_failed_log_write() -> None:
    async def body(engine: Engine, client: Client) -> None:
        disk.arm()  # type: ignore[attr-defined]
        ops = [write_op(i, block(i)) for i in range(10)]
        for op in ops:
            client.submit(op)
        for op in ops:
            assert await client.answered(op) == Error.IO
        assert client.returned_b == 10 * LB
        assert await client.read(0, 10 * LB) == bytes(10 * LB)

    disk = failing("write")
    on_device(body, disk)


def test_starting_needs_the_devices_for_itself() -> None:
    disk = make_disk()

    async def main() -> None:
        async with serving(disk, random.Random(0)):
            with pytest.raises(Busy):
                async with serving(disk, random.Random(0)):
                    pass

    run(main())


def test_lying_flushes_are_noticed() -> None:
    disk = make_disk()

    async def main(lsid: int) -> None:
        async with serving(disk, random.Random(0), expect_lsid=lsid) as engine:
            await Client(engine).write(0, block(1), fua=True)

    run(main(0))
    disk = disk.restart()
    run(main(2))
    disk = disk.restart()
    with pytest.raises(HistoryBroken):
        run(main(100))
    assert not disk.files[LDEV].locked


def test_bad_devices_are_refused() -> None:
    def refused(disk: SimDisk) -> WalbError:
        with pytest.raises(WalbError) as caught:
            on_device(never, disk)
        return caught.value

    async def never(engine: Engine, client: Client) -> None:
        raise AssertionError("it started")

    small = make_disk(size_lb=256)
    small.make(DDEV, 255 * LB)
    assert refused(small).code == "refused"
    blank = make_disk()
    blank.make(LDEV, 1 << 20)
    assert refused(blank).code == "corrupt-data"
    assert refused(make_disk(ring_pb=8)).code == "refused"
    gone = make_disk()
    del gone.files[DDEV]
    assert refused(gone).code == "not-found"
    assert not gone.files[LDEV].locked


def test_superblock_1_is_used_when_0_is_damaged() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await engine.stop()

    disk = on_device(body)
    raw = disk.files[LDEV].now
    raw[4096 + 100] ^= 1

    async def again(engine: Engine, client: Client) -> None:
        assert await client.read(0, LB) == block(1)

    on_device(again, disk)
    assert read_superblock(disk.open(LDEV)).written_lsid == 2
