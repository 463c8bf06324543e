"""Small parts of the archive: places in a queue, writes in flight, giving up, configuration."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from walbd.archive.config import ArchiveConfig
from walbd.archive.images.file_store import FileStore
from walbd.archive.slots import Slots
from walbd.archive.volume import Place, Volume
from walbd.daemon.config import load
from walbd.daemon.env import Env
from walbd.daemon.pipeline import Pipeline, SyncTimer
from walbd.daemon.states import StopMode
from walbd.errors import ConfigError, DiskFailed, ForceStopped
from walbd.units import GIB, MIB

# --- slots


async def test_slots_are_given_in_order() -> None:
    slots = Slots(2)
    order: list[int] = []
    leave = [asyncio.Event() for _ in range(5)]

    async def work(number: int) -> None:
        with slots.turn() as turn:
            await turn.comes()
            order.append(number)
            await leave[number].wait()

    tasks = [asyncio.create_task(work(number)) for number in range(5)]
    await slots.changed.wait_for(lambda: slots.waiting == 3)
    assert (slots.running, slots.is_full, order) == (2, True, [0, 1])
    leave[1].set()
    await slots.changed.wait_for(lambda: order == [0, 1, 2] or slots.waiting == 2)
    tasks[3].cancel()  # gives its place in the queue up
    await asyncio.wait({tasks[3]})
    for event in leave:
        event.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert order == [0, 1, 2, 4]
    assert (slots.running, slots.waiting, slots.is_full) == (0, 0, False)


async def test_cancelled_in_its_turn_gives_the_slot_back() -> None:
    slots = Slots(1)

    async def work() -> None:
        with slots.turn() as turn:
            await turn.comes()
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        await work()
    assert slots.running == 0


# --- pipeline


async def test_pipeline_bounds_what_is_in_flight() -> None:
    running = most = 0
    go = asyncio.Event()

    async def work() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await go.wait()
        running -= 1

    async def feed() -> None:
        async with Pipeline(100) as pipeline:
            for _ in range(10):
                await pipeline.push(work(), 40)
            await pipeline.drain()
            assert running == 0

    task = asyncio.create_task(feed())
    for _ in range(20):
        await asyncio.sleep(0)
    assert running == 2
    go.set()
    await task
    assert most == 2


async def test_pipeline_with_no_window_goes_one_by_one() -> None:
    order: list[int] = []

    async def work(number: int) -> None:
        order.append(number)
        await asyncio.sleep(0)
        order.append(-number)

    async with Pipeline(0) as pipeline:
        for number in range(1, 5):
            await pipeline.push(work(number), 10)
        await pipeline.drain()
    assert order == [1, -1, 2, -2, 3, -3, 4, -4]


async def test_error_of_the_work_ends_a_block_that_waits() -> None:
    ended: list[str] = []

    async def fail() -> None:
        raise DiskFailed("broken")

    async def slow() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("slow")

    async def receive() -> None:
        async with Pipeline(100) as pipeline:
            await pipeline.push(slow(), 1)
            await pipeline.push(fail(), 1)
            await asyncio.Event().wait()  # for a peer that says nothing

    with pytest.raises(DiskFailed, match="broken"):
        await receive()
    assert ended == ["slow"]
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0


async def test_error_of_the_block_wins() -> None:
    async def slow() -> None:
        await asyncio.Event().wait()

    async def receive() -> None:
        async with Pipeline(100) as pipeline:
            await pipeline.push(slow(), 1)
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        await receive()


async def test_error_comes_out_of_drain() -> None:
    async def fail() -> None:
        raise DiskFailed("broken")

    async def receive() -> None:
        async with Pipeline(100) as pipeline:
            await pipeline.push(fail(), 1)
            await pipeline.drain()

    with pytest.raises(DiskFailed):
        await receive()


async def test_sync_timer() -> None:
    timer = SyncTimer(100, 1000.0)
    assert [timer.is_due(40) for _ in range(6)] == [False, False, True, False, False, True]
    assert SyncTimer(1 << 60, 0.0).is_due(0)


# --- giving up


@pytest.fixture
def volume(tmp_path: Path) -> Volume:
    env = Env()
    config = ArchiveConfig(base_dir=str(tmp_path))
    return Volume("vol0", Place(env, config, FileStore(env.fs, tmp_path)))


async def test_forced_stop_ends_a_wait(volume: Volume) -> None:
    async def work() -> None:
        async with volume.giving_up():
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    with volume.machine.stop_flag(StopMode.FORCE):
        with pytest.raises(ForceStopped):
            await task
        with pytest.raises(ForceStopped):
            async with volume.giving_up():
                raise AssertionError("never entered")


async def test_graceful_stop_does_not(volume: Volume) -> None:
    with volume.machine.stop_flag(StopMode.GRACEFUL):
        async with volume.giving_up():
            await asyncio.sleep(0)


async def test_real_cancellation_stays_one(volume: Volume) -> None:
    async def work() -> None:
        async with volume.giving_up():
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_force_in_the_last_moment(volume: Volume) -> None:
    """The body ends by itself in the same turn of the loop: it counts as given up, and nothing is left over."""

    async def work() -> str:
        async with volume.giving_up():
            with volume.machine.stop_flag(StopMode.FORCE):
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        return "done"

    task = asyncio.create_task(work())
    await asyncio.wait({task})
    assert not task.cancelled()
    assert isinstance(task.exception(), ForceStopped)


# --- configuration


def test_defaults_and_units(tmp_path: Path) -> None:
    path = tmp_path / "archive.toml"
    path.write_text('base_dir = "/a"\nfsync_interval_b = "256MiB"\nauto_resize = true\n')
    config = load(ArchiveConfig, path, {"maintain_max": "5", "free_reserve_b": "1g"})
    assert (config.fsync_interval_b, config.free_reserve_b, config.maintain_max) == (256 * MIB, GIB, 5)
    assert (config.auto_resize, config.open_files_max, config.wdiffs_max) == (True, 256, 16)


@pytest.mark.parametrize(
    "text",
    ["fsync_interval_b = 0", "maintain_max = 0", "open_files_max = -1", "wdiffs_max = 1.5", "discard = 'ignore'"],
)
def test_bad_settings(tmp_path: Path, text: str) -> None:
    path = tmp_path / "archive.toml"
    path.write_text(f'base_dir = "/a"\n{text}\n')
    with pytest.raises(ConfigError):
        load(ArchiveConfig, path, {})
