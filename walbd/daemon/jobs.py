"""Long work that outlives its request: it has an id, progress and a result that can be asked for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from typing import Final

import structlog

from walbd.daemon.env import Clock
from walbd.daemon.logs import error_fields
from walbd.daemon.tasks import Signal, spawn
from walbd.errors import NotFound, WalbError, code_of
from walbd.protocol.base import Fact, JobInfo, JobState, error_reply

log = structlog.get_logger()

_HISTORY_MAX: Final = 1000
_ROUTINE_MAX: Final = 200  # of these, what the daemon did by itself, so that it does not push out the others


class Job:
    """One piece of long work; the work itself calls `progress`, others look at `info()`."""

    def __init__(
        self, number: int, name: str, volume: str, started: int, changed: Signal, *, routine: bool = False
    ) -> None:
        self.number = number
        self.name = name
        self.volume = volume
        self.routine = routine
        self._started = started
        self._ended = 0
        self._state = JobState.RUNNING
        self._phase, self._unit, self._done, self._total = "", "B", 0, 0
        self._result: dict[str, Fact] = {}
        self.error: BaseException | None = None  # how it failed
        self._changed = changed

    @property
    def running(self) -> bool:
        return self._state is JobState.RUNNING

    async def ended(self) -> None:
        """Return when it does not run any more."""
        await self._changed.wait_for(lambda: not self.running)

    def begin(self, phase: str, total: int = 0, unit: str = "B") -> None:
        """Enter a phase of the work; `total` [unit] 0 means not known."""
        self._phase, self._total, self._done, self._unit = phase, total, 0, unit

    def explain(self, phase: str) -> None:
        """Say what the phase waits for, or does now; its progress stays."""
        self._phase = phase

    def progress(self, done: int) -> None:
        """Say how much of the phase is done [unit]."""
        self._done = done

    def info(self) -> JobInfo:
        """Return the job as the message that tells of it."""
        error = error_reply(self.error) if self.error is not None else None
        return JobInfo(
            job=self.number,
            name=self.name,
            volume=self.volume,
            state=self._state,
            started=self._started,
            ended=self._ended,
            phase=self._phase,
            unit=self._unit,
            done=self._done,
            total=self._total,
            result=self._result,
            error_code=error.code if error else "",
            error=str(self.error) if isinstance(self.error, WalbError) else (error.message if error else ""),
            hint=error.hint if error else "",
        )

    def _end(self, state: JobState, now: int, result: dict[str, Fact], error: BaseException | None) -> None:
        self._state, self._ended, self._result, self.error = state, now, result, error
        self._changed.set()


class Jobs:
    """All jobs of a daemon: running ones, and the ended ones that are still remembered."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._jobs: OrderedDict[int, Job] = OrderedDict()
        self._next = 1
        self._changed = Signal()
        self._closing = False

    def start(
        self,
        tasks: asyncio.TaskGroup,
        name: str,
        volume: str,
        work: Callable[[Job], Awaitable[dict[str, Fact] | None]],
    ) -> Job:
        """Begin `work(job)` as a task of `tasks`; its return value becomes the job's result.

        An error ends the job, is logged once, and does not reach the task group. Raises Stopping when `tasks`
        takes no more.
        """
        job = Job(self._next, name, volume, self._clock.now(), self._changed)
        spawn(tasks, self._run(job, work), f"job:{name}:{volume}")
        self._add(job)
        return job

    async def within(
        self,
        name: str,
        volume: str,
        work: Callable[[Job], Awaitable[dict[str, Fact] | None]],
        *,
        routine: bool = False,
    ) -> None:
        """Do `work(job)` here, as a job that others see: for conversations that last. Its error comes out too.

        `routine`: nobody asked for it. It is forgotten earlier, and its failure is for the caller to log.
        """
        job = Job(self._next, name, volume, self._clock.now(), self._changed, routine=routine)
        self._add(job)
        await self._run(job, work)
        if job.error is not None:
            raise job.error

    def _add(self, job: Job) -> None:
        self._next += 1
        self._jobs[job.number] = job
        if job.routine:
            routine = [n for n, old in self._jobs.items() if old.routine and not old.running]
            for number in routine[:-_ROUTINE_MAX]:
                del self._jobs[number]
        while len(self._jobs) > _HISTORY_MAX:
            oldest = next((n for n, old in self._jobs.items() if not old.running), None)
            if oldest is None:
                break
            del self._jobs[oldest]

    def get(self, number: int) -> Job:
        """Return a job; raises NotFound."""
        job = self._jobs.get(number)
        if job is None:
            raise NotFound("no such job", hint="jobs are forgotten when the daemon restarts", job=number)
        return job

    def of(self, volume: str = "") -> list[Job]:
        """Return the jobs of a volume (all when empty), oldest first."""
        return [job for job in self._jobs.values() if not volume or job.volume == volume]

    async def wait(self, number: int, wait_s: float) -> JobInfo:
        """Return a job's state when it has ended, after `wait_s`, or when the daemon ends (`close`)."""
        job = self.get(number)
        try:
            async with asyncio.timeout(wait_s):
                await self._changed.wait_for(lambda: self._closing or not job.running)
        except TimeoutError:
            pass
        return job.info()

    def close(self) -> None:
        """The daemon ends: nobody who waits for a job keeps it from that."""
        self._closing = True
        self._changed.set()

    async def idle(self) -> None:
        """Return when no job is running."""
        await self._changed.wait_for(lambda: not any(job.running for job in self._jobs.values()))

    async def _run(self, job: Job, work: Callable[[Job], Awaitable[dict[str, Fact] | None]]) -> None:
        with structlog.contextvars.bound_contextvars(job=job.number, volume=job.volume):
            try:
                result = await work(job)
            except asyncio.CancelledError:
                job._end(JobState.CANCELLED, self._clock.now(), {}, None)
                raise
            except WalbError as exc:
                (log.debug if job.routine else log.warning)("job.failed", name=job.name, **error_fields(exc))
                job._end(JobState.FAILED, self._clock.now(), {"code": code_of(exc)}, exc)
            except Exception as exc:
                log.exception("job.crashed", name=job.name)
                job._end(JobState.FAILED, self._clock.now(), {"code": "internal"}, exc)
            else:
                log.info("job.done", name=job.name, **(result or {}))
                job._end(JobState.DONE, self._clock.now(), result or {}, None)
