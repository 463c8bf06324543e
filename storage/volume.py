"""One volume at a storage daemon: the owner of everything that changes about it.

What is durable is one record; `update` replaces it, one change at a time, under the only lock there is here. The
lock is held for the replacement alone, never while anything else is awaited. Long work holds a step of the state
machine or an action, not the lock. Sending log is in `worker` and `transfer`, the full backup in `backup`.

Source: docs/storage.md.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog

from walbd.daemon.env import Pool
from walbd.daemon.flow import cancel_all, unless
from walbd.daemon.jobs import Job
from walbd.daemon.logs import error_fields
from walbd.daemon.states import Machine, StopMode
from walbd.daemon.tasks import uninterrupted
from walbd.errors import (
    BadState,
    ConnectError,
    HistoryBroken,
    ReadOnlyDevice,
    Refused,
    TimedOut,
    UsageError,
    WalbError,
    WlogOverflow,
)
from walbd.format.meta import LogPoint, new_point
from walbd.fs import failpoints
from walbd.ids import NO_GID
from walbd.protocol.base import Fact
from walbd.storage.backlog import Backlog
from walbd.storage.device.interface import Device, DeviceInfo, LsidSample
from walbd.storage.directory import create_directory, remove_directory, remove_leftover
from walbd.storage.history import check_history
from walbd.storage.record import BAD_HEADER_PREFIX, VolumeRecord, load, save
from walbd.storage.shared import Shared, hit
from walbd.storage.states import BEGINNINGS, SYNCS, TABLE, WLOG_REMOVE, WLOG_SEND, Command, State
from walbd.units import LB, size_lb

log = structlog.get_logger()

T = TypeVar("T")
Change = Callable[[VolumeRecord], VolumeRecord]

QUEUE_MAX: Final = 1000  # of snapshots that wait: from here on no implicit ones are taken
EXPLICIT_MAX: Final = 10_000  # and from here on no explicit ones, so that the record stays of a fair size

FP_RECORD_BEFORE_SAVE: Final = failpoints.register(
    "storage.record.before_save", "the old record: the change was not answered and did not happen"
)
FP_RECORD_AFTER_SAVE: Final = failpoints.register(
    "storage.record.after_save", "the new record: the change has happened and was not answered"
)
FP_RESET_BEFORE_WAL: Final = failpoints.register("storage.reset.before_wal", "log and record as they were")
FP_RESET_AFTER_WAL: Final = failpoints.register(
    "storage.reset.after_wal", "a new log and the record of the old one: told by the uuid, repaired by a reset"
)
FP_SNAPSHOT_BEFORE_SAVE: Final = failpoints.register(
    "storage.queue.before_save", "no snapshot was taken and none was answered"
)
FP_SNAPSHOT_AFTER_SAVE: Final = failpoints.register(
    "storage.queue.after_save", "a snapshot that nobody was told of; it will be delivered"
)
FP_SET_OLDEST: Final = failpoints.register(
    "storage.set_oldest.before", "delivered log in the ring: erased after the next start"
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An implicit snapshot that is taken as soon as the log up to it is permanent."""

    lsid: int
    timestamp: int

    def is_ready(self, sample: LsidSample) -> bool:
        """Say whether the log is permanent up to here, and whether a pack begins here can be told."""
        return self.lsid < sample.permanent or self.lsid == sample.permanent == sample.latest


class Volume:
    """A volume, known or not (then its state is Clear and it has no record)."""

    def __init__(self, name: str, shared: Shared) -> None:
        self.name = name
        self.shared = shared
        self.machine: Machine[State, Command] = Machine(TABLE, State.CLEAR)
        self.broken: WalbError | None = None  # why the record cannot be used
        self.device_path = ""  # of the device that it has, or is about to take
        self.device_error = ""  # why the device cannot be reached, as last seen
        self.send_error = ""  # why the last transfer failed
        self.lost: WalbError | None = None  # why the log cannot continue the history, as seen by the last run
        self.candidate: Candidate | None = None
        self.backlog = Backlog()
        self.more = False  # the device told of new log while a transfer was running
        self._record: VolumeRecord | None = None
        self._device: Device | None = None
        self._lock = asyncio.Lock()
        self._monitor: asyncio.Task[None] | None = None
        self._stop_job: Job | None = None  # the last one
        self._later: asyncio.TimerHandle | None = None
        self.pbs = LB  # of the device, as last seen
        self._log = log.bind(volume=name)

    # what is known

    @property
    def record(self) -> VolumeRecord:
        """The durable state; the state table sees to it that there is one."""
        assert self._record is not None, self.name
        return self._record

    @property
    def known(self) -> bool:
        """There is something on disk."""
        return self._record is not None or self.broken is not None

    @property
    def has_record(self) -> bool:
        return self._record is not None

    @property
    def device(self) -> Device:
        assert self._device is not None, self.name
        return self._device

    @property
    def directory(self) -> Path:
        return self.shared.directory(self.name)

    @property
    def monitored(self) -> bool:
        """The device is being watched, and its log sent or erased."""
        return self._monitor is not None

    def check(self, command: Command) -> None:
        """Raise a Refused unless `command` is allowed now."""
        if self.broken is not None and command is not Command.CLEAR_VOL:
            raise BadState(
                "the volume is broken",
                hint=self.broken.hint or "clear the volume and initialise it again",
                volume=self.name,
                reason=str(self.broken),
            )
        self.machine.check(command)

    async def info(self) -> DeviceInfo:
        """Ask the device; remembers when it cannot be reached. Raises WalbError."""
        try:
            found = await self.device.info()
        except WalbError as exc:
            self.device_error = str(exc)
            raise
        self.device_error, self.pbs = "", found.pbs
        self.backlog.see(found.lsids, self.shared.now())
        return found

    # start-up

    async def load(self) -> bool:
        """Take over what is on disk; False when that was only a leftover, which is removed then."""
        fs, pools = self.shared.env.fs, self.shared.env.pools
        try:
            if await pools.run(Pool.RECORD, remove_leftover, fs, self.directory):
                self._log.info("volume.leftover_removed")
                return False
            self._adopt(await pools.run(Pool.RECORD, load, fs, self.directory))
        except WalbError as exc:
            self.broken = exc
            self.machine.state = State.BROKEN
            self._log.error("volume.broken", **error_fields(exc))
        return True

    def _adopt(self, record: VolumeRecord) -> None:
        self._record = record
        self.device_path = record.device
        self._device = self.shared.open_device(record.device)
        self.machine.state = record.state
        self.backlog.restore(record.uuid, record.queue)

    def resume(self) -> None:
        """Begin the work of the state that was found on disk."""
        if self.machine.state in (State.TARGET, State.STANDBY):
            self.begin_monitoring()

    # the record

    async def update(self, change: Change) -> VolumeRecord:
        """Replace the record by `change(record)`, durably, and return it; not cut by a cancellation.

        Raises DiskFailed, and then the record is the old one.
        """

        async def step() -> VolumeRecord:
            async with self._lock:
                new = change(self.record)
                if new != self._record:
                    hit(FP_RECORD_BEFORE_SAVE, self.directory)
                    await self.shared.env.pools.run(Pool.RECORD, save, self.shared.env.fs, self.directory, new)
                    hit(FP_RECORD_AFTER_SAVE, self.directory)
                    self._record = new
                return new

        return await uninterrupted(step())

    async def commit(self, to: State) -> None:
        """Make a state durable; used by all steps that change nothing else."""
        await self.update(lambda record: record.with_state(to))

    # commands

    async def init(
        self, device_path: str, check_unbound: Callable[[Volume, str, DeviceInfo], Awaitable[None]]
    ) -> None:
        """Take over a device: its log is not touched.

        `check_unbound` refuses a device that belongs to another volume. Raises also what the device answers.
        """
        if not device_path.startswith("/"):
            raise UsageError("the device is no absolute path", hint="write /...", device=device_path)
        self.check(Command.INIT_VOL)
        record = VolumeRecord(state=State.SYNC_READY, device=device_path)

        async def create(_to: State) -> None:
            await self.shared.env.pools.run(
                Pool.RECORD, create_directory, self.shared.env.fs, self.directory, record
            )
            self._adopt(record)

        async with self.machine.transition(Command.INIT_VOL, create):
            self.device_path = device_path  # from here on, so that two volumes cannot take it at the same time
            try:
                info = await self.shared.open_device(device_path).info()
                await check_unbound(self, device_path, info)
            except BaseException:
                self.device_path = ""
                raise
        self._log.info("volume.initialised", device=device_path)

    async def clear(self) -> None:
        """Forget the volume. The device keeps its log, which nobody erases any more."""
        self.check(Command.CLEAR_VOL)

        async def remove(_to: State) -> None:
            await self.shared.env.pools.run(Pool.RECORD, remove_directory, self.shared.env.fs, self.directory)
            self._record, self._device, self.broken, self.device_path = None, None, None, ""

        async with self.machine.transition(Command.CLEAR_VOL, remove):
            pass
        self._log.info("volume.cleared")

    async def reset(self, gid: int) -> None:
        """Wipe the log; the next diff will begin at `gid`."""
        if gid >= NO_GID >> 1:
            raise UsageError("that generation leaves no room for more", hint="use a smaller one", gid=gid)
        self.check(Command.RESET_VOL)

        async def wipe(_to: State) -> None:
            await self.reset_log(gid)

        async with self.machine.transition(Command.RESET_VOL, wipe):
            pass

    async def reset_log(self, gid: int) -> DeviceInfo:
        """Empty the log of the device and begin a new history at `gid`, durably; the caller holds a step.

        A crash in between leaves a log that the record does not know: `check_history` tells, another reset
        repairs.
        """
        info = await self._wipe()
        now = self.shared.now()
        await self.update(lambda record: record.after_reset(info.uuid, gid, now))
        self.candidate = None
        self._log.info("log.reset", uuid=info.uuid.hex(), gid=gid)
        return info

    async def _wipe(self) -> DeviceInfo:
        hit(FP_RESET_BEFORE_WAL, self.directory)
        info = await self.device.reset_wal()
        hit(FP_RESET_AFTER_WAL, self.directory)
        return info

    async def start_target(self) -> None:
        """Begin to send the log. Raises WlogOverflow or HistoryBroken when it does not continue the history."""
        self.check(Command.START_TARGET)
        async with self.machine.transition(Command.START_TARGET, self.commit):
            check_history(self.record, (await self.info()).lsids)
        self.begin_monitoring()

    async def start_standby(self) -> None:
        """Begin to erase the log unsent; an overflowed log is reset first."""
        self.check(Command.START_STANDBY)
        async with self.machine.transition(Command.START_STANDBY, self.commit):
            if (await self.info()).lsids.overflow:
                await self.reset_log(0)
        self.begin_monitoring()

    def stop(self, mode: StopMode) -> Job:
        """Begin to stop, as a job; what can be refused is refused here.

        A forced stop after a graceful one makes that one forced: it may be waiting for a backup of hours.
        """
        if mode is StopMode.EMPTY:
            raise UsageError("a storage cannot be emptied", hint="stop graceful or force")
        during = self.machine.during
        self.check(Command.STOP_BEGINNING if during in BEGINNINGS else Command.STOP)
        if mode is StopMode.FORCE and self.machine.stopping is StopMode.GRACEFUL:
            assert self._stop_job is not None
            self.machine.stopping = StopMode.FORCE
            self.machine.changed.set()
            return self._stop_job
        with ExitStack() as stack:
            stack.enter_context(self.machine.stop_flag(mode))
            flag = stack.pop_all()
        try:
            self._stop_job = self.shared.start_job("stop", self.name, lambda job: self._stop(job, flag))
        except BaseException:
            flag.close()
            raise
        return self._stop_job

    async def _stop(self, job: Job, flag: ExitStack) -> dict[str, Fact]:
        try:
            with flag:
                job.begin("waiting")
                await self.machine.wait_for(lambda: self.machine.at_rest, timeout_s=None, what="running work")
                job.begin("stopping")
                async with self.machine.transition(Command.STOP, self.commit):
                    pass
                await self.end_monitoring()
        finally:
            self.wake()  # a task that met the stop was dropped; it comes back if the volume is still active
        return {"state": str(self.machine.state)}

    async def reset_standby(self) -> None:
        """Standby: begin a new log after an overflow. Nothing is lost by it, as this log is not wanted.

        The caller runs the action that erases, so no step is at work meanwhile. A crash in between leaves a log
        that the record does not know, which does not matter to a Standby volume either.
        """
        self._log.warning("log.overflowed", state=str(self.machine.state))
        info = await self._wipe()
        now = self.shared.now()
        await self.update(lambda record: record.after_reset(info.uuid, 0, now).with_state(record.state))
        self._log.info("log.reset", uuid=info.uuid.hex(), gid=0)

    def note_lost(self, lost: WalbError) -> None:
        """Remember, and log once, that the log cannot continue the history."""
        if self.lost is None:
            self._log.error("log.lost", state=self.machine.shown, **error_fields(lost))
        self.lost = lost

    async def give_up(self) -> None:
        """Stop sending, because the log does not continue what was delivered; only a backup can go on."""
        async with self.machine.transition(Command.GIVE_UP, self.commit):
            pass
        await self.end_monitoring()
        self._log.error("volume.gave_up", state=str(self.machine.state), reason=str(self.lost))

    async def resize(self, size_b: int) -> None:
        """Grow the volume; 0: to the size of the data device. An equal size is accepted."""
        wanted_lb = size_lb(size_b)
        self.check(Command.RESIZE)
        info = await self.info()
        if wanted_lb and wanted_lb < info.size_lb:
            raise Refused(
                "a volume cannot shrink", hint="give a larger size", size_b=size_b, size_now_b=info.size_lb * LB
            )
        after = await self.device.resize(wanted_lb)
        self._log.info("volume.resized", size_lb=after.size_lb)

    async def snapshot(self) -> int:
        """Take an explicit snapshot and return its gid; it is durable then, and so is all log before it."""
        self.check(Command.SNAPSHOT)
        point = await self.take_point(lambda: self.check(Command.SNAPSHOT))
        if self.machine.state is State.TARGET:
            self.shared.scheduler.hurry(self.name)
        self._log.info("snapshot.taken", gid=point.gid, lsid=point.lsid)
        return point.gid

    async def take_point(self, check: Callable[[], None] = lambda: None) -> LogPoint:
        """Push an explicit snapshot at the newest log, once that is permanent.

        Log that is not permanent could be gone after a crash of the device, and the snapshot with it. `check`
        is called again when the waiting is over. Raises WlogOverflow, HistoryBroken, TimedOut, ReadOnlyDevice.
        """
        while True:
            sample = await self._permanent_end()
            check()
            point = await self.push_point(sample.latest, uuid=sample.uuid, explicit=True, now=self.shared.now())
            if point is not None:
                return point

    async def _permanent_end(self) -> LsidSample:
        """Return a sample of now, once the log is permanent up to its `latest`.

        Asked on one connection: after a restart of the device that lsid could lie within a pack.
        """
        first: LsidSample | None = None
        limit_s = self.shared.config.io_timeout_s
        await self.info()  # for the size of a block
        try:
            async with asyncio.timeout(limit_s), self.device.watch() as samples:
                async for sample in samples:
                    check_history(self.record, sample)
                    first = first or sample
                    if sample.permanent >= first.latest:
                        return first
                    if sample.read_only:
                        raise ReadOnlyDevice("the device has failed: its log will not become permanent")
        except TimeoutError as exc:
            raise TimedOut("the log did not become permanent in time", timeout_s=limit_s) from exc
        raise ConnectError("the device has ended the watch")

    async def is_pack_begin(self, lsid: int, sample: LsidSample) -> bool:
        """Say whether a pack begins at `lsid`, or the log ends there: only there may a snapshot be.

        A device that was restarted may have lost the log of which `lsid` was the end, and gone on differently.
        """
        if lsid == sample.latest:
            return True
        log_reader = await self.device.open_log()
        try:
            return await self.shared.env.pools.run(Pool.SEND, log_reader.ring.has_pack, lsid)
        finally:
            log_reader.close()

    async def push_point(self, lsid: int, *, uuid: bytes, explicit: bool, now: int) -> LogPoint | None:
        """Push a snapshot at `lsid` of the log `uuid`, durably; None when a later one was pushed meanwhile.

        None, too, for an implicit one when many wait: once those are delivered, the next one is taken. None that
        was pushed is ever taken back, as a piece that ends there may have been delivered, and its generation could
        then come again with other contents. Raises HistoryBroken when the log was reset meanwhile, Refused for an
        explicit one when far too many wait.
        """
        made: list[LogPoint] = []

        def push(record: VolumeRecord) -> VolumeRecord:
            if record.uuid != uuid:
                raise HistoryBroken("the log was reset meanwhile", hint="try again")
            if lsid < record.newest.lsid or (not explicit and len(record.queue) >= QUEUE_MAX):
                return record
            if len(record.queue) >= EXPLICIT_MAX:
                raise Refused(
                    "too many snapshots wait to be delivered",
                    hint="see the error of the volume in the status: its log is not sent",
                    volume=self.name,
                    waiting=len(record.queue),
                )
            point = new_point(
                record.done,
                record.queue,
                lsid,
                explicit=explicit,
                now=now,
                size_max_pb=self.size_max_pb,
            )
            made.append(point)
            return msgspec.structs.replace(record, queue=(*record.queue, point))

        hit(FP_SNAPSHOT_BEFORE_SAVE, self.directory)
        await self.update(push)
        hit(FP_SNAPSHOT_AFTER_SAVE, self.directory)
        return made[0] if made else None

    # the log in the device

    async def dump_log_header(self, lsid: int) -> None:
        """Keep the block at `lsid` of the log as a file in the volume's directory, for analysis.

        Raises Refused for one that the ring does not hold.
        """
        self.check(Command.DUMP_HEADER)
        info = await self.info()
        begin, end = max(info.lsids.latest - info.capacity_pb, 0), info.lsids.permanent
        if not begin <= lsid < end:
            raise Refused(
                "the ring does not hold that log",
                hint="give an lsid that it holds",
                lsid=lsid,
                lsid_begin=begin,
                lsid_end=end,
            )
        reader = await self.device.open_log()
        try:
            block = await reader.read(lsid, 1)
        finally:
            reader.close()
        self.check(Command.DUMP_HEADER)  # the volume may have been cleared meanwhile
        await self.keep_block(lsid, bytes(block))
        self._log.info("block.kept", lsid=lsid)

    async def keep_block(self, lsid: int, block: bytes) -> None:
        """Write a block of the log to a file, one for each place. Raises DiskFailed."""
        path = self.directory / f"{BAD_HEADER_PREFIX}{lsid}"
        await self.shared.env.pools.run(Pool.RECORD, self.shared.env.fs.replace_durably, path, block)

    @property
    def size_max_pb(self) -> int:
        """The largest stretch of log sent at once."""
        return max(self.shared.config.wlog_send_size_max // self.pbs, 1)

    async def erase_log(self, info: DeviceInfo, lsid: int) -> int:
        """Give up the log below `lsid` as far as the device allows; return what is the oldest then.

        Log that is not yet on the data device for good has to stay. The device sees to that in its own time, and
        then gives up what it was told of; if the ring is half full, it is asked to do it now.
        """
        sample = info.lsids
        if sample.oldest >= lsid:
            return sample.oldest
        hit(FP_SET_OLDEST, self.directory)
        await self.device.set_oldest(lsid)
        if sample.prev_written < lsid and 2 * (sample.latest - sample.oldest) > info.capacity_pb:
            await self.device.take_checkpoint()
            return lsid
        return min(lsid, sample.prev_written)

    # watching the device

    def begin_monitoring(self) -> None:
        """Watch the device and run the volume's task whenever there is new log, beginning now.

        Raises Stopping when the daemon ends; what was committed before is then resumed by its next start.
        """
        assert self._monitor is None
        self._monitor = self.shared.spawn(self._watch(), f"watch:{self.name}")
        self.lost, self.send_error = None, ""
        self.shared.scheduler.hurry(self.name)

    async def end_monitoring(self) -> None:
        """Undo `begin_monitoring`, and return when no transfer is running any more."""
        monitor, self._monitor = self._monitor, None
        self.shared.scheduler.remove(lambda name: name == self.name)
        self.machine.changed.set()  # transfers see that they are not wanted any more
        self.look_again(None)
        if monitor is not None:
            await cancel_all([monitor])
        await self.machine.changed.wait_for(
            lambda: not self.machine.running(WLOG_SEND) and not self.machine.running(WLOG_REMOVE)
        )
        self.candidate = None

    async def _watch(self) -> None:
        """Follow the device for ever; while it is away it is looked for once a second."""
        lost = False  # not `device_error`: whoever asks the device changes that, too
        while True:
            problem = "the device has ended the watch"
            try:
                async with self.device.watch() as samples:
                    async for sample in samples:
                        self._on_sample(sample, returned=lost or self.device_error != "")
                        lost = False
            except (WalbError, OSError) as exc:
                problem = str(exc)
            except Exception as exc:  # noqa: BLE001 - a defect here must not end the daemon
                problem = str(exc)
                self._log.exception("device.watch_crashed")
            if not lost:
                self._log.warning("device.lost", device=self.record.device, error=problem)
            lost, self.device_error = True, problem
            await asyncio.sleep(self.shared.config.probe_interval_s)

    def _on_sample(self, sample: LsidSample, *, returned: bool) -> None:
        scheduler = self.shared.scheduler
        self.backlog.see(sample, self.shared.now())
        if returned:
            self._log.info("device.returned", device=self.record.device)
            self.device_error = ""
            scheduler.hurry(self.name)
            return
        waited_for = self.candidate is not None and self.candidate.is_ready(sample)
        if scheduler.is_running(self.name):
            self.more = True  # pushed now, it would replace the delay after a failure of that run
        elif waited_for and not scheduler.failures(self.name):
            scheduler.hurry(self.name)
        else:
            scheduler.push(self.name, self.shared.config.gather_delay_s)

    def look_again(self, delay_s: float | None) -> None:
        """Run the task after a delay at the latest (None: not). Unlike a delayed push, this holds up nothing."""
        if self._later is not None:
            self._later.cancel()
        loop = asyncio.get_running_loop()
        self._later = loop.call_later(delay_s, self.wake) if delay_s is not None else None

    def wake(self) -> None:
        """Run the volume's task soon if the volume is active."""
        if self._monitor is not None:
            self.shared.scheduler.push(self.name)

    async def unless_forced(self, work: Awaitable[T], *, also: Callable[[], bool] = lambda: False) -> T:
        """Await `work`; a forced stop, or `also()`, cuts it short with ForceStopped."""

        def is_cut() -> bool:
            return self.machine.stopping is StopMode.FORCE or also()

        return await unless(lambda: self.machine.changed.wait_for(is_cut), work, volume=self.name)

    @property
    def sends(self) -> bool:
        """The log of the volume is to be sent now."""
        machine = self.machine
        return self._monitor is not None and (
            machine.during in SYNCS or (machine.during is None and machine.state is State.TARGET)
        )

    @property
    def erases(self) -> bool:
        """The log of the volume is to be erased unsent now."""
        machine = self.machine
        return self._monitor is not None and machine.during is None and machine.state is State.STANDBY


def is_lost(error: WalbError) -> bool:
    """Say whether an error means that the log cannot continue the history."""
    return isinstance(error, WlogOverflow | HistoryBroken)
