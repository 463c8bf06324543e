"""Operations on a served device: freeze, checkpoints, reset, resize, stop. Simulated disk, virtual time."""

from __future__ import annotations

import asyncio
import random

import pytest

from tests.kit.device import (
    DDEV,
    LDEV,
    Client,
    block,
    make_disk,
    on_device,
    result,
    superblock_of,
    write_op,
)
from tests.kit.virtual import InlinePools
from walbd.errors import BadState, DiskFailed, Refused, Stopping
from walbd.format.superblock import read_superblock
from walbd.protocol.nbd import Error
from walbd.storage.device.engine import Engine, Tuning
from walbd.units import LB


def test_freeze_holds_writes_and_drains() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await engine.freeze(0)
        lsids = engine.core.lsids
        assert lsids.latest == lsids.completed == lsids.written
        op = write_op(0, block(2))
        client.submit(op)
        assert await client.flush() == 0, "nothing that was answered is missing"
        await asyncio.sleep(100)
        assert op.result is None
        assert await client.read(0, LB) == block(1), "reads go on"
        await engine.freeze(5)  # again: now with a timeout
        with pytest.raises(BadState):
            await engine.reset_wal()
        engine.melt()
        assert await client.answered(op) == 0
        assert await client.read(0, LB) == block(2)
        engine.melt()  # harmless

    on_device(body)


def test_freeze_times_out() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await engine.freeze(30)
        op = write_op(0, block(2))
        client.submit(op)
        await asyncio.sleep(29)
        assert result(op) is None
        await asyncio.sleep(2)
        assert result(op) == 0
        for bad in (-1, 86401):
            with pytest.raises(Refused):
                await engine.freeze(bad)

    on_device(body)


def test_order_is_kept_over_a_freeze() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await engine.freeze(0)
        for i in range(30):
            client.submit(write_op(0, block(i)))
        engine.melt()
        await client.answered(client.ops[-1])
        assert await client.read(0, LB) == block(29)

    on_device(body)


def test_no_periodic_checkpoint_while_frozen() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await engine.freeze(0)
        await asyncio.sleep(60)
        assert engine.core.lsids.prev_written == 0
        engine.melt()
        await asyncio.sleep(11)
        assert engine.core.lsids.prev_written == engine.core.lsids.latest

    on_device(body)


def test_checkpoint_and_set_oldest() -> None:
    async def body(engine: Engine, client: Client) -> None:
        lsids = engine.core.lsids
        ends = []
        for i in range(4):
            await client.write(i, block(i, 2))
            ends.append(lsids.latest)
        with pytest.raises(Refused):
            await engine.set_oldest(ends[0])  # not permanent
        await engine.drain()
        await engine.take_checkpoint()
        assert lsids.prev_written == ends[-1]
        assert superblock_of(disk)[:2] == (0, ends[-1])
        for bad in (ends[0] + 1, ends[-1] + 1):
            with pytest.raises(Refused):
                await engine.set_oldest(bad)
        await engine.set_oldest(ends[1])
        with pytest.raises(Refused):
            await engine.set_oldest(ends[0])  # backwards
        assert superblock_of(disk)[:2] == (ends[1], ends[-1])
        await engine.set_oldest(ends[-1])  # the end needs no pack
        assert engine.usage_pb == 0

    disk = make_disk()
    on_device(body, disk)


def test_log_that_nobody_needs_goes_with_the_checkpoint() -> None:
    """What a consumer has taken is not on the data device for good yet: it is given up as soon as it is."""

    async def body(engine: Engine, client: Client) -> None:
        lsids = engine.core.lsids
        for i in range(3):
            await client.write(i, block(i))
        end = lsids.latest
        await client.flush()
        await engine.set_oldest(end)
        await client.write(3, block(3))
        assert (lsids.oldest, superblock_of(disk)[0]) == (0, 0), "redo needs it"
        await engine.drain()
        await engine.take_checkpoint()
        assert lsids.oldest == superblock_of(disk)[0] == end
        assert lsids.prev_written == lsids.latest > end
        await engine.set_oldest(end)  # again, and nothing happens
        await engine.reset_wal()
        for i in range(10):
            await client.write(i, block(i))
        await engine.drain()
        await engine.take_checkpoint()
        assert lsids.oldest == superblock_of(disk)[0] == 0, "of the new log nobody has taken anything"

    disk = make_disk()
    on_device(body, disk)


@pytest.mark.parametrize("seed", range(4))
def test_a_burst_waits_for_a_checkpoint_instead_of_overflowing(seed: int) -> None:
    """The consumer keeps up; only the data device and its checkpoints are behind."""

    async def body(engine: Engine, client: Client) -> None:
        lsids = engine.core.lsids
        for i in range(150):
            assert await client.write(i, block(i % 251)) == 0
            if i % 8 == 7:
                await client.flush()
                await engine.set_oldest(lsids.permanent)
        assert lsids.latest > 4 * engine.core.ring_pb
        assert not engine.core.overflow

    lazy = Tuning(checkpoint_interval_s=3600, data_delay_s=0.2)
    on_device(body, make_disk(ring_pb=64), tuning=lazy, seed=seed)


def test_periodic_checkpoints() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await asyncio.sleep(9)
        assert engine.core.lsids.prev_written == 0
        await asyncio.sleep(2)
        assert engine.core.lsids.prev_written == engine.core.lsids.latest
        ops = engine_disk.ops
        await asyncio.sleep(100)
        assert engine_disk.ops == ops, "nothing to do, nothing done"

    engine_disk = make_disk()
    on_device(body, engine_disk)


def test_reset_wal_starts_a_new_log() -> None:
    async def body(engine: Engine, client: Client) -> None:
        for i in range(20):
            await client.write(i, block(i + 1))
        before = engine.core.superblock
        op = write_op(50, block(99))

        async def meanwhile() -> None:
            await asyncio.sleep(0)
            client.submit(op)

        await asyncio.gather(engine.reset_wal(), meanwhile())
        after = engine.core.superblock
        assert after.uuid != before.uuid
        assert after.salt not in (before.salt, 0)
        assert after.ring_size_pb == before.ring_size_pb + 8, "the log device has grown"
        assert await client.answered(op) == 0
        assert engine.core.lsids.latest < 10
        assert await client.read(0, 20 * LB) == b"".join(block(i + 1) for i in range(20))
        await engine.drain()
        assert await client.read(50 * LB, LB) == block(99)

    disk = make_disk()
    ldev = disk.files[LDEV]
    disk.files[LDEV] = type(ldev)(ldev.now + bytes(8 * 512))
    on_device(body, disk)

    async def after_restart(engine: Engine, client: Client) -> None:
        assert await client.read(50 * LB, LB) == block(99)

    on_device(after_restart, disk.restart())


@pytest.mark.parametrize("seed", range(10))
def test_a_sync_from_before_a_reset_says_nothing_about_the_new_log(seed: int) -> None:
    async def body(engine: Engine, client: Client) -> None:
        for i in range(20):
            await client.write(i, block(i + 1))
        await engine.drain()
        engine.log.want_sync()  # it may still be running when the lsids go back to 0
        await engine.reset_wal()
        await asyncio.sleep(0.01)
        assert engine.core.lsids.permanent == 0
        await client.write(0, block(1))
        assert engine.core.lsids.in_order()

    on_device(body, seed=seed)


async def resetting(engine: Engine, client: Client, turns: int) -> asyncio.Future[None]:
    """Write something, and begin to reset the log; return after so many turns of the loop."""
    for i in range(20):
        await client.write(i, block(i + 1))
    await engine.drain()
    reset = asyncio.ensure_future(engine.reset_wal())
    for _ in range(turns):
        await asyncio.sleep(0)
    return reset


async def unharmed(engine: Engine, client: Client) -> None:
    """The tests below write these before and after the moment in question."""
    assert await client.read(0, 20 * LB) == b"".join(block(i + 1) for i in range(20))
    assert await client.read(50 * LB, LB) == block(99)


@pytest.mark.parametrize("seed", range(3))
def test_a_reset_that_is_cancelled_loses_nothing(seed: int) -> None:
    """Whoever asked for the reset leaves at some moment: log on disk and log in memory are one all the same."""
    for turns in range(30):
        disk = make_disk()

        async def body(engine: Engine, client: Client, turns: int = turns) -> None:
            reset = await resetting(engine, client, turns)
            reset.cancel()
            await asyncio.wait({reset})
            assert await client.write(50, block(99)) == 0
            assert await client.flush() == 0

        on_device(body, disk, seed=seed)
        on_device(unharmed, disk.restart())


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_during_a_reset_loses_nothing(seed: int) -> None:
    for turns in range(30):
        disk = make_disk()

        async def body(engine: Engine, client: Client, turns: int = turns) -> None:
            reset = await resetting(engine, client, turns)
            op = write_op(50, block(99))
            client.submit(op)
            await engine.stop()
            await asyncio.wait({reset})
            assert op.result == 0, "what was taken before the stop is still done"

        on_device(body, disk, seed=seed)
        on_device(unharmed, disk.restart())


def test_no_operation_begins_while_the_device_is_stopped() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        engine.refuse_writes()
        for operation in (
            engine.reset_wal(),
            engine.freeze(0),
            engine.take_checkpoint(),
            engine.set_oldest(0),
            engine.resize(0),
        ):
            with pytest.raises(Stopping):
                await operation
        await engine.stop()

    on_device(body)


def test_freeze_during_reset_is_refused() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        reset = asyncio.ensure_future(engine.reset_wal())
        await asyncio.sleep(0)
        with pytest.raises(BadState):
            await engine.freeze(0)
        with pytest.raises(BadState):
            engine.melt()
        with pytest.raises(BadState):
            await engine.reset_wal()
        await reset
        await engine.freeze(0)

    on_device(body)


def test_resize() -> None:
    async def body(engine: Engine, client: Client) -> None:
        with pytest.raises(Refused):
            await engine.resize(255)
        await engine.resize(256)
        await engine.resize(0)  # the size of the data device
        assert engine.size_b() == 300 * LB
        await engine.resize(400)  # a file grows along
        assert engine.size_b() == 400 * LB
        export = engine.find("")
        assert export is not None
        assert export.size_b == 400 * LB
        assert await client.write(399, block(4)) == 0
        await engine.stop()

    disk = make_disk(ddev_lb=300)
    on_device(body, disk)
    assert superblock_of(disk)[2] == 400
    assert bytes(disk.files[DDEV].now[399 * LB :]) == block(4)


def test_stop_leaves_nothing_to_redo() -> None:
    async def body(engine: Engine, client: Client) -> None:
        await engine.freeze(0)
        op = write_op(3, block(5))
        client.submit(op)
        await asyncio.gather(engine.stop(), client.answered(op))
        assert op.result == 0
        late = write_op(3, block(6))
        client.submit(late)
        assert late.result == Error.SHUTDOWN

    disk = on_device(body)
    sb = read_superblock(disk.open(LDEV))
    assert sb.written_lsid == 2
    assert not disk.files[LDEV].versions
    assert not disk.files[DDEV].versions
    assert bytes(disk.files[DDEV].durable[3 * LB : 4 * LB]) == block(5)
    assert not disk.files[LDEV].locked


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("what", ["write", "superblock"])
def test_nothing_is_written_to_a_closed_file(what: str, seed: int) -> None:
    """A device that has failed is stopped while a thread still writes to its log."""
    disk = make_disk()

    async def body(engine: Engine, client: Client) -> None:
        await client.write(0, block(1))
        await engine.drain()
        engine.core.env.pools = InlinePools(random.Random(seed), turns_max=40)  # slow threads
        other: asyncio.Future[None] = asyncio.ensure_future(asyncio.sleep(0))
        if what == "write":
            client.submit(write_op(1, block(2)))
        else:
            other = asyncio.ensure_future(engine.take_checkpoint())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        engine.core.fail(DiskFailed("simulated"), "a test")
        await engine.stop()
        ops = disk.ops
        await asyncio.sleep(1)
        await asyncio.gather(other, return_exceptions=True)
        assert disk.ops == ops, disk.log[-3:]

    on_device(body, disk, tuning=Tuning(inline_max_b=0), seed=seed)
