"""Commands of operators at a proxy: what changes, hurries or stops a volume (docs/proxy.md, Commands)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Final

from walbd.daemon.conn import Connection
from walbd.daemon.jobs import Job, Jobs
from walbd.daemon.net import parse_address
from walbd.daemon.server import Handler
from walbd.daemon.states import StopMode
from walbd.errors import Stopping, UsageError, WalbError
from walbd.format.compress import CompressOpt
from walbd.protocol.base import Fact, JobAccepted, Ok
from walbd.protocol.codec import Request
from walbd.protocol.control import (
    AddArchiveInfo,
    ArchiveInfo,
    ClearVol,
    DeleteArchiveInfo,
    Kick,
    Kicked,
    Resize,
    Start,
    Stop,
    UpdateArchiveInfo,
)
from walbd.proxy.queue import SendQueue
from walbd.proxy.states import WDIFF_SEND, Command, State, nothing_to_save
from walbd.proxy.volume import Volume
from walbd.units import size_lb

_SENDING: Final = "sending what waits"
_PHASE_LEN_MAX: Final = 500


class Commands:
    """Handlers of all requests that change something."""

    def __init__(
        self,
        volumes: dict[str, Volume],
        find: Callable[[str], Volume],
        sends: SendQueue,
        jobs: Jobs,
    ) -> None:
        """`find(name)` returns a volume, a Clear one for an unknown name, which is not in `volumes`."""
        self.tasks: asyncio.TaskGroup | None = None  # where jobs are born, once the daemon has started
        self._volumes = volumes
        self._find = find
        self._sends = sends
        self._jobs = jobs
        self._closing = False

    def handlers(self) -> dict[type[Request[Any]], Handler]:
        """Return the handlers by request."""
        return {
            AddArchiveInfo: self.add_archive,
            UpdateArchiveInfo: self.update_archive,
            DeleteArchiveInfo: self.delete_archive,
            ClearVol: self.clear,
            Resize: self.resize,
            Start: self.start,
            Stop: self.stop,
            Kick: self.kick,
        }

    def close(self) -> None:
        """The daemon ends: jobs that would wait for more work to be done give up."""
        self._closing = True
        for volume in self._volumes.values():
            volume.machine.changed.set()

    # --- archives

    async def add_archive(self, _conn: Connection, request: AddArchiveInfo) -> Ok:
        check_info(request.info)
        volume = self._find(request.volume)
        volume.check(Command.ADD_ARCHIVE)
        self._volumes[volume.name] = volume
        try:
            await volume.add_archive(request.info)
        finally:
            self._forget_if_clear(volume)
        return Ok()

    async def update_archive(self, _conn: Connection, request: UpdateArchiveInfo) -> Ok:
        check_info(request.info)
        volume = self._find(request.volume)
        volume.check(Command.UPDATE_ARCHIVE)
        await volume.update_archive(request.info)
        return Ok()

    async def delete_archive(self, _conn: Connection, request: DeleteArchiveInfo) -> Ok:
        volume = self._find(request.volume)
        volume.check(Command.DELETE_ARCHIVE)
        if request.archive in volume.hops:
            try:
                await volume.delete_archive(request.archive)
            finally:
                self._forget_if_clear(volume)
        return Ok()

    # --- life

    async def clear(self, _conn: Connection, request: ClearVol) -> Ok:
        volume = self._find(request.volume)
        volume.check(Command.CLEAR_VOL)
        try:
            await volume.clear()
        finally:
            self._forget_if_clear(volume)
        return Ok()

    async def resize(self, _conn: Connection, request: Resize) -> Ok:
        if request.zero or request.size_b == 0:
            raise UsageError("a proxy only notes the size of a volume", hint="give a size above 0, without zero")
        await self._find(request.volume).resize(size_lb(request.size_b))
        return Ok()

    async def start(self, _conn: Connection, request: Start) -> Ok:
        if request.role is not None:
            raise UsageError("a volume has no role at a proxy", role=str(request.role))
        volume = self._find(request.volume)
        volume.check(Command.START)
        await volume.start()
        self._sends.hurry(volume)
        return Ok()

    async def stop(self, _conn: Connection, request: Stop) -> JobAccepted:
        mode = StopMode(request.how.value)
        volume = self._find(request.volume)
        volume.check(Command.STOP_EMPTY if mode is StopMode.EMPTY else Command.STOP)
        if mode is StopMode.FORCE and volume.machine.stopping in (StopMode.GRACEFUL, StopMode.EMPTY):
            # The other stop may have to wait for ever, for an archive that does not come back: let it end now.
            volume.machine.stopping = StopMode.FORCE
            volume.machine.changed.set()
            return JobAccepted(job=volume.stop_job)
        flag = ExitStack()
        flag.enter_context(volume.machine.stop_flag(mode))
        assert self.tasks is not None
        job = self._jobs.start(self.tasks, "stop", volume.name, lambda job: self._stop(volume, mode, flag, job))
        volume.stop_job = job.number
        return JobAccepted(job=job.number)

    async def _stop(self, volume: Volume, mode: StopMode, flag: ExitStack, job: Job) -> dict[str, Fact]:
        machine = volume.machine
        with flag:
            try:
                if mode is StopMode.EMPTY:
                    await machine.changed.wait_for(lambda: machine.during is None or volume.forced)
                if mode is StopMode.EMPTY and not volume.forced:
                    await self._stop_empty(volume, job)
                else:
                    job.begin("waiting for running transfers")
                    await machine.changed.wait_for(lambda: machine.at_rest)
                    async with machine.transition(Command.STOP, nothing_to_save):
                        pass
            except BaseException:
                self._sends.push(volume)  # it goes on as if nobody had tried to stop it
                raise
            finally:
                volume.stop_job = 0
            self._sends.forget(volume)
        unsent = sum(len(hop.diffs) for hop in volume.hops.values())
        damaged = sum(len(hop.damaged) for hop in volume.hops.values())
        result: dict[str, Fact] = {"mode": str(mode), "unsent": unsent}
        return result | {"damaged": damaged} if damaged else result

    async def _stop_empty(self, volume: Volume, job: Job) -> None:
        """Send everything, then stop; the caller has set the stop flag, so that no more wlogs come in."""
        machine = volume.machine
        step = machine.enter(Command.STOP_EMPTY)
        try:
            self._sends.hurry(volume)
            total = unsent_count(volume)
            job.begin(_SENDING, total, "wdiffs")
            while volume.unsent and not volume.forced and not self._closing:
                await machine.changed.next()
                job.progress(max(total - unsent_count(volume), 0))
                job.explain(why_unsent(volume))
            job.explain("waiting for running transfers")
            await machine.changed.wait_for(lambda: not machine.running(WDIFF_SEND))
            if volume.unsent and not volume.forced:
                raise Stopping("the daemon ends before everything was sent", hint="repeat it after the start")
            await machine.commit_step(step, nothing_to_save)
        finally:
            machine.leave()

    # --- others

    async def kick(self, _conn: Connection, request: Kick) -> Kicked:
        if request.archive and not request.volume:
            raise UsageError("an archive is named without a volume", hint="name the volume, too")
        if request.volume:
            volume = self._find(request.volume)
            volume.check(Command.KICK)
            hops = [volume.hop(request.archive)] if request.archive else list(volume.hops.values())
            return Kicked(tasks=self._sends.kick(volume, hops))
        tasks = 0
        for volume in self._volumes.values():
            try:
                volume.check(Command.KICK)
            except WalbError:
                continue
            tasks += self._sends.kick(volume, list(volume.hops.values()))
        return Kicked(tasks=tasks)

    def _forget_if_clear(self, volume: Volume) -> None:
        if volume.machine.state is State.CLEAR and volume.machine.during is None:
            self._volumes.pop(volume.name, None)
            self._sends.forget(volume)


def check_info(info: ArchiveInfo) -> None:
    """Raise UsageError unless the address and the compression of an archive can be used."""
    if (address := parse_address(info.address)).port == 0 and not address.path:
        raise UsageError("an archive has no port 0", address=info.address)
    CompressOpt.parse(info.compress)


def why_unsent(volume: Volume) -> str:
    """Return what a stop that sends everything first does now, with what hinders it."""
    why = [f"{hop.archive}: {hop.problem}" for hop in volume.hops.values() if hop.diffs and hop.problem]
    return f"{_SENDING} ({'; '.join(sorted(why))})"[:_PHASE_LEN_MAX] if why else _SENDING


def unsent_count(volume: Volume) -> int:
    """Return how many wdiffs wait, for each archive on its own."""
    return len(volume.received) * len(volume.hops) + sum(len(hop.diffs) for hop in volume.hops.values())
