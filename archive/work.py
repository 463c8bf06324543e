"""Starting long work of an archive: as a job, under an action, in its turn."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

from walbd.archive.slots import Slots
from walbd.archive.volume import Volume
from walbd.daemon.conn import Connection, with_filler
from walbd.daemon.env import Clock
from walbd.daemon.jobs import Job, Jobs
from walbd.protocol.base import Fact, JobAccepted

Work = Callable[[Job], Awaitable[dict[str, Fact] | None]]


class Starter:
    """Starts the jobs of one archive. `slots` bounds how many run at the same time; more wait in order."""

    def __init__(self, jobs: Jobs, slots: Slots, clock: Clock) -> None:
        self.jobs = jobs
        self.slots = slots
        self.tasks: asyncio.TaskGroup | None = None  # while the daemon runs
        self._clock = clock

    def under_action(self, name: str, volume: Volume, action: str, work: Work) -> Job:
        """Begin work under an action, which excludes others from now on, even while the work waits.

        The caller has checked that the action is allowed, and awaited nothing since.
        """
        stack = ExitStack()
        stack.enter_context(volume.machine.action(action, self._clock.now()))
        return self.holding(name, volume, stack, lambda job: self._in_turn(volume, job, work))

    async def within(self, name: str, volume: Volume, action: str, conn: Connection, work: Work) -> None:
        """Like `under_action`, for work that is a conversation: it is done here, and its error comes out.

        While it waits for its turn the peer is told that we are still there.
        """
        with volume.machine.action(action, self._clock.now()):
            await self.jobs.within(name, volume.name, lambda job: self._in_turn(volume, job, work, conn))

    async def _in_turn(
        self, volume: Volume, job: Job, work: Work, conn: Connection | None = None
    ) -> dict[str, Fact] | None:
        with self.slots.turn() as turn:
            job.begin("waiting")
            async with volume.giving_up():
                await (turn.comes() if conn is None else with_filler(conn, turn.comes()))
            return await work(job)

    def holding(self, name: str, volume: Volume, held: ExitStack, work: Work) -> Job:
        """Begin work that lets go of `held` at its end."""
        assert self.tasks is not None

        async def run(job: Job) -> dict[str, Fact] | None:
            with held:
                return await work(job)

        return self.jobs.start(self.tasks, name, volume.name, run)


def accepted(job: Job) -> JobAccepted:
    """Tell of a job that was started."""
    return JobAccepted(job=job.number)
