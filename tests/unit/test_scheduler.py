"""The scheduler on a loop whose clock the test moves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tests.kit.virtual import run as run_virtual
from walbd.daemon.scheduler import Again, Lanes, RetryPolicy, Scheduler
from walbd.errors import Refused

RETRY = RetryPolicy(delay_min_s=1, delay_max_s=8)


class Recorder:
    """Work that notes when it ran; what it does next is scripted per run."""

    def __init__(self, *script: Again | Exception | None) -> None:
        self.script = list(script)
        self.runs: list[tuple[str, float]] = []

    async def __call__(self, key: str) -> Again | None:
        self.runs.append((key, asyncio.get_running_loop().time()))
        step = self.script.pop(0) if self.script else None
        if isinstance(step, Exception):
            raise step
        return step

    @property
    def times(self) -> list[float]:
        return [round(at, 6) for _, at in self.runs]


@asynccontextmanager
async def running(scheduler: Scheduler[str]) -> AsyncIterator[None]:
    task = asyncio.ensure_future(scheduler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


def make(work: object, workers: int = 1) -> Scheduler[str]:
    return Scheduler(work, workers=workers, retry=RETRY, name="test")  # type: ignore[arg-type]


def test_retries_double_up_to_the_cap_and_never_end() -> None:
    async def main() -> None:
        work = Recorder(*[OSError("no")] * 6, None)
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(1000)
        assert work.times == [0, 1, 3, 7, 15, 23, 31]
        assert scheduler.failures("a") == 0

    run_virtual(main())


def test_push_keeps_an_earlier_entry_and_does_not_shorten_a_delay() -> None:
    async def main() -> None:
        work = Recorder(OSError("no"), OSError("no"), OSError("no"))
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(1.5)  # failed at 0 and 1, due at 3
            scheduler.push("a")
            await asyncio.sleep(0.5)
            assert len(work.runs) == 2
            scheduler.push("a", 100)
            await asyncio.sleep(2)
        assert work.times == [0, 1, 3]

    run_virtual(main())


def test_hurry_runs_now_and_forgets_failures() -> None:
    async def main() -> None:
        work = Recorder(OSError("no"), OSError("no"), OSError("no"), OSError("no"))
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(4)  # failed at 0, 1, 3; due at 7
            assert scheduler.hurry_waiting(lambda key: key == "b") == 0
            assert scheduler.hurry_waiting() == 1
            await asyncio.sleep(0.5)
            assert scheduler.failures("a") == 1
            await asyncio.sleep(0.6)
        assert work.times == [0, 1, 3, 4, 5]

    run_virtual(main())


def test_a_push_while_it_runs_and_fails_does_not_shorten_the_delay() -> None:
    async def main() -> None:
        runs: list[float] = []
        hurried = False

        async def work(key: str) -> None:
            runs.append(asyncio.get_running_loop().time())
            if not hurried:
                scheduler.push(key)
            elif len(runs) < 5:
                scheduler.hurry(key)
            if len(runs) < 4:
                raise OSError("no")

        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(1.5)
            assert runs == [0, 1]
            hurried = True
            await asyncio.sleep(1.6)
            assert runs == [0, 1, 3, 3, 3]

    run_virtual(main())


def test_again_and_delays() -> None:
    async def main() -> None:
        work = Recorder(Again(0.1), Again(), None)
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a", 2)
            await asyncio.sleep(10)
        assert work.times == [2, 2.1, 2.1]

    run_virtual(main())


def test_a_key_never_runs_twice_at_the_same_time_and_workers_are_bounded() -> None:
    async def main() -> None:
        running_now: list[str] = []
        most: list[int] = []

        async def work(key: str) -> None:
            assert key not in running_now
            running_now.append(key)
            most.append(len(running_now))
            await asyncio.sleep(1)
            running_now.remove(key)

        scheduler = make(work, workers=2)
        async with running(scheduler):
            for key in "aabbccdd":
                scheduler.push(key)
            await asyncio.sleep(0.5)
            assert [row.key for row in scheduler.waiting()] == ["c", "d"]
            scheduler.hurry("a")  # pushed again while it runs
            await asyncio.sleep(10)
        assert max(most) == 2
        assert len(most) == 5

    run_virtual(main())


def test_what_goes_on_is_not_held_up_by_a_push_with_a_delay() -> None:
    """A proxy with a send delay and more than one transfer can carry: the delay is for what comes afterwards."""

    async def main() -> None:
        runs: list[float] = []

        async def work(key: str) -> Again | None:
            runs.append(asyncio.get_running_loop().time())
            scheduler.push(key, 60)  # new log comes during the transfer
            return Again() if len(runs) < 3 else None

        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(10)
            assert runs == [0, 0, 0]

    run_virtual(main())


def test_a_peer_that_refuses_is_asked_again_soon() -> None:
    async def main() -> None:
        refused = Refused("not now")
        refused.retry_max_s = 3
        work = Recorder(*[refused] * 5, OSError("gone"))
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(21.5)
        assert work.times == [0, 1, 3, 6, 9, 12, 20]

    run_virtual(main())


def test_the_delay_is_never_below_the_least_one() -> None:
    assert RetryPolicy(10, 20).delay(1, 3) == 10
    assert RetryPolicy(1, 2).delay(9, 3) == 2


def test_what_comes_back_while_a_run_fails_is_tried_at_once() -> None:
    """The run has tried before the peer came back, and fails after: nobody would tell it again."""

    async def main() -> None:
        runs: list[float] = []

        async def work(_key: str) -> None:
            runs.append(asyncio.get_running_loop().time())
            await asyncio.sleep(5)
            if len(runs) < 3:
                raise OSError("no")

        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a")
            await asyncio.sleep(2)
            assert scheduler.hurry_waiting() == 0  # nothing waits
            await asyncio.sleep(20)
            assert runs == [0, 5, 11]  # at once, and then after a delay

    run_virtual(main())


def test_remove_and_drain() -> None:
    async def main() -> None:
        work = Recorder()
        scheduler = make(work)
        async with running(scheduler):
            scheduler.push("a", 1)
            scheduler.push("b", 1)
            scheduler.remove(lambda key: key == "a")
            await asyncio.sleep(2)
            assert [key for key, _ in work.runs] == ["b"]
            scheduler.push("c", 1)
            scheduler.drain()
            scheduler.push("d")
            scheduler.hurry("e")
            await asyncio.sleep(5)
            await scheduler.idle()
        assert [key for key, _ in work.runs] == ["b"]

    run_virtual(main())


def test_a_lane_that_hangs_leaves_a_worker_to_each_other_lane() -> None:
    async def scenario() -> None:
        hang, began = asyncio.Event(), list[str]()

        async def work(key: str) -> None:
            began.append(key)
            if key.startswith("a"):
                await hang.wait()

        lanes: Lanes[str] = Lanes(of=lambda key: key[0], all=lambda: {"a", "b", "c"})
        scheduler = Scheduler[str](work, workers=4, retry=RETRY, name="t", lanes=lanes)
        async with running(scheduler):
            for key in ("a1", "a2", "a3", "a4"):
                scheduler.push(key)
            await asyncio.sleep(1)
            assert began == ["a1", "a2"]
            assert len(scheduler.waiting()) == 2
            for key in ("b1", "b2", "c1", "c2"):
                scheduler.push(key, 1)
            await asyncio.sleep(2)
            assert began[2:] == ["b1", "c1", "b2", "c2"]
            hang.set()
            await asyncio.sleep(1)
            assert began[6:] == ["a3", "a4"]
            assert scheduler.waiting() == []

    run_virtual(scenario())


def test_more_lanes_than_workers() -> None:
    """Nobody waits for a worker that is kept for somebody else, when there are not enough of them anyway."""

    async def scenario() -> None:
        work = Recorder()
        lanes: Lanes[str] = Lanes(of=lambda key: key[0], all=lambda: {"a", "b", "c"})
        scheduler = Scheduler[str](work, workers=1, retry=RETRY, name="t", lanes=lanes)
        async with running(scheduler):
            for key in ("a1", "a2", "b1", "c1"):
                scheduler.push(key)
            await asyncio.sleep(1)
            assert [key for key, _ in work.runs] == ["a1", "a2", "b1", "c1"]

    run_virtual(scenario())
