"""Jobs: results, errors, waiting."""

import asyncio

import pytest

from walbd.daemon.env import SystemClock
from walbd.daemon.jobs import Job, Jobs
from walbd.errors import BadState, NotFound
from walbd.protocol.base import Fact, JobState


async def test_result_progress_and_waiting() -> None:
    jobs, proceed = Jobs(SystemClock()), asyncio.Event()

    async def work(job: Job) -> dict[str, Fact]:
        job.begin("copy", total=10)
        job.progress(4)
        await proceed.wait()
        return {"gid": 3}

    async with asyncio.TaskGroup() as tasks:
        job = jobs.start(tasks, "full-backup", "v", work)
        info = await jobs.wait(job.number, 0)
        assert (info.state, info.ended) == (JobState.RUNNING, 0)
        waiting = asyncio.ensure_future(jobs.wait(job.number, 60))
        await asyncio.sleep(0)
        info = job.info()
        assert (info.phase, info.done, info.total) == ("copy", 4, 10)
        proceed.set()
        info = await waiting
        assert (info.state, info.result) == (JobState.DONE, {"gid": 3})
        await jobs.idle()
    assert [job.number for job in jobs.of("v")] == [1]
    assert jobs.of("w") == []
    with pytest.raises(NotFound):
        jobs.get(2)


async def test_a_failed_job_tells_why_and_harms_nobody() -> None:
    jobs = Jobs(SystemClock())

    async def refuse(_job: Job) -> None:
        raise BadState("no", hint="h", volume="v")

    async def crash(_job: Job) -> None:
        raise KeyError("secret")

    async with asyncio.TaskGroup() as tasks:
        refused = jobs.start(tasks, "a", "v", refuse)
        crashed = jobs.start(tasks, "b", "v", crash)
    info = refused.info()
    assert (info.state, info.error_code, info.error, info.hint) == (
        JobState.FAILED,
        "bad-state",
        "no (volume=v)",
        "h",
    )
    assert crashed.info().error_code == "internal"
    assert "secret" not in crashed.info().error


async def test_history_is_bounded_and_keeps_running_jobs() -> None:
    jobs, proceed = Jobs(SystemClock()), asyncio.Event()

    async def wait(_job: Job) -> None:
        await proceed.wait()

    async def nothing(_job: Job) -> None:
        pass

    async with asyncio.TaskGroup() as tasks:
        first = jobs.start(tasks, "long", "v", wait)
        for _ in range(1100):
            jobs.start(tasks, "short", "v", nothing)
            await asyncio.sleep(0)
        assert len(jobs.of()) <= 1000
        assert jobs.get(first.number).running
        proceed.set()


async def test_work_done_within_a_conversation_is_a_job_too() -> None:
    jobs = Jobs(SystemClock())

    async def work(job: Job) -> dict[str, Fact]:
        assert [other.number for other in jobs.of("v")] == [job.number]
        return {"n": 1}

    async def refuse(_job: Job) -> None:
        raise BadState("no", volume="v")

    async def crash(_job: Job) -> None:
        raise KeyError("secret")

    await jobs.within("scan", "v", work)
    with pytest.raises(BadState, match="no"):
        await jobs.within("scan", "v", refuse)
    with pytest.raises(KeyError):
        await jobs.within("scan", "v", crash)
    assert [job.info().state for job in jobs.of("v")] == [JobState.DONE, JobState.FAILED, JobState.FAILED]
    assert [job.info().error_code for job in jobs.of("v")] == ["", "bad-state", "internal"]
