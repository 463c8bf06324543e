"""One volume at an archive: the owner of everything that is known of it.

All of it lives on the event loop; methods that are not async are one step of it. There are two locks per volume,
never held while waiting for a peer: `naming`, while files of diffs get other names or go, and the one inside
`save`, while the record is replaced. `naming` comes first. Long work holds a step or an action of the machine
instead (archive/states.py), and that keeps out what must not run beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from walbd.archive.config import ArchiveConfig
from walbd.archive.dating import Dating
from walbd.archive.images.store import ImageStore
from walbd.archive.record import Pending, VolumeRecord
from walbd.archive.recover import Loaded
from walbd.archive.states import ADDING, TABLE, Command, State
from walbd.daemon.env import Env, Pool
from walbd.daemon.pipeline import SyncTimer
from walbd.daemon.record import RECORD_NAME, save_record
from walbd.daemon.states import ActionInfo, Machine, Step, StopMode
from walbd.daemon.tasks import uninterrupted
from walbd.errors import BadState, DiskFull, ForceStopped, WalbError
from walbd.format.meta import BaseState, Diff, DiffManager, RestorePoint, apply
from walbd.fs import FileSystem, failpoints
from walbd.fs.disk import disk_errors

FP_BEFORE_SAVE: Final = failpoints.register(
    "archive.record.before_save", "the old record; what the new one would have named is an orphan"
)
FP_AFTER_SAVE: Final = failpoints.register(
    "archive.record.after_save", "the new record; nobody has been told, and what it makes useless is still there"
)


@dataclass
class Place:
    """What all volumes of one archive share."""

    env: Env
    config: ArchiveConfig  # what counts now: a reload replaces it
    images: ImageStore
    is_forced: Callable[[], bool] = lambda: False  # the daemon is being ended by force

    @property
    def base_dir(self) -> Path:
        return Path(self.config.base_dir)


class Volume:
    """One volume; `record`, `diffs`, `latest` and `restored` always tell what is durable."""

    def __init__(self, name: str, place: Place) -> None:
        self.name = name
        self.place = place
        self.directory = place.base_dir / name
        self.machine: Machine[State, Command] = Machine(TABLE, State.CLEAR)
        self.record = VolumeRecord(state=State.SYNC_READY)
        self.diffs = DiffManager()
        self.latest = self.record.base  # the newest state that can be reached: always diffs.latest(base)
        self.restored: set[int] = set()
        self.remarks: list[str] = []  # for the operator
        self.damage: list[str] = []  # what the last scrub found, for the operator
        self.error: WalbError | None = None  # why it is Broken
        self.progress_lb = 0  # of a copy that is being received
        self.received = 0  # when data came last [unix s]
        self._dating = Dating()
        self.naming = asyncio.Lock()  # held while files of diffs are renamed or removed, with the collection
        self.replicating: set[str] = set()  # addresses of destinations to which a replication runs
        self.replications = 0  # that come: each may bring another log history
        self._lock = asyncio.Lock()
        self._unsure = False  # a save failed: the disk may hold either record
        self._points: dict[bool, list[RestorePoint]] = {}

    # --- what it is

    @property
    def base(self) -> BaseState:
        """What the base image is."""
        return self.record.base

    @property
    def size_lb(self) -> int:
        """Size of the base image [logical block]; 0 when there is none to use."""
        return self.record.size_lb

    def replica_gids(self) -> list[int]:
        """Where the destinations of replications stand: what leads on from there must not be merged away."""
        return [replica.gid for replica in self.record.replicas]

    @property
    def is_active(self) -> bool:
        """Archived, also while data is being added."""
        during = self.machine.during
        return self.machine.state is State.ARCHIVED and (during is None or during in ADDING)

    @property
    def is_holding(self) -> bool:
        """Active or Stopped: there is data."""
        return self.is_active or (self.machine.state is State.STOPPED and self.machine.during is None)

    def check(self, command: Command) -> None:
        """Raise BadState, Stopping or Busy unless `command` is allowed now."""
        if self.error is not None and command is not Command.CLEAR_VOL:
            raise BadState(
                f"the volume is broken: {self.error.message}",
                hint=self.error.hint or "repair its files and restart the archive, or clear it",
                volume=self.name,
                state=str(State.BROKEN),
                **{key: value for key, value in self.error.facts.items() if key not in ("volume", "state")},
            )
        self.machine.check(command)

    def enter(self, command: Command) -> Step:
        """Begin a step; end it with `machine.leave`. Raises as `check` does."""
        self.check(command)
        return self.machine.enter(command)

    def restorable(self, *, all_points: bool = False) -> list[RestorePoint]:
        """Return what can be restored, ascending by gid; it is the caller's only until something is awaited."""
        if not self.is_holding:
            return []
        points = self._points.get(all_points)
        if points is None:
            points = self._points[all_points] = self.diffs.restorable(self.base, all_points=all_points)
        return points

    # --- loading

    def adopt(self, loaded: Loaded) -> None:
        """Take over what `load_volume` found."""
        self.record = loaded.record
        self.machine.state = loaded.record.state
        self.diffs = loaded.diffs
        self.restored = loaded.restored
        self.remarks = loaded.remarks
        self.latest = self.diffs.latest(self.base)
        for name, began in loaded.record.began.items():
            if name in TABLE.actions:
                self.machine.actions[name] = ActionInfo(0, began)

    def set_broken(self, error: WalbError) -> None:
        """Isolate the volume: it is shown with its error, and nothing but clear-vol is allowed."""
        self.machine.state = State.BROKEN
        self.error = error

    # --- changing

    async def save(self, **changes: Any) -> None:
        """Replace fields of the record, durably and as one step; no cancellation comes in between.

        Raises DiskFailed or DiskFull, and then the old record counts here, whatever the disk holds.
        """
        await uninterrupted(self._save(lambda _: changes))

    async def update(self, change: Callable[[VolumeRecord], dict[str, Any]]) -> None:
        """Like `save`, where the new values depend on the old: `change(record)` is called under the lock."""
        await uninterrupted(self._save(change))

    async def begin_action(self, name: str) -> None:
        """Remember durably that an action begins now, so that a policy does not begin anew after a restart."""
        now = self.place.env.clock.now()
        await self.update(lambda record: {"began": record.began | {name: now}})

    async def grown(self, size_lb: int) -> None:
        """Record that the image has at least this size; it never becomes smaller."""
        await self.update(lambda record: {"size_lb": max(record.size_lb, size_lb)})

    async def commit(self, step: Step, **changes: Any) -> None:
        """End a step well: its target state, with other fields of the record, durable and then visible."""
        await self.machine.commit_step(step, lambda to: self.save(state=to, **changes))

    async def fulfil(self, pending: Pending, diff: Diff) -> None:
        """Take a diff whose name makes true what is pending: it is so here at once, also when the save fails.

        For then the disk still says what is pending, and a start finds the same. Raises as `save` does.
        """

        async def both() -> None:
            async with self._lock:  # a save that is at work knows nothing of it, and must not have the last word
                self.record = pending.applied(self.record)
                self.add_diff(diff)
                await self._write(self.record)

        await uninterrupted(both())

    async def settle(self) -> None:
        """Make sure that the disk holds this record, if an earlier save failed."""
        if self._unsure:
            await self.save()

    async def _save(self, change: Callable[[VolumeRecord], dict[str, Any]]) -> None:
        async with self._lock:
            await self._write(msgspec.structs.replace(self.record, **change(self.record)))

    async def _write(self, record: VolumeRecord) -> None:
        """Make a record durable, and then visible; the caller holds the lock."""
        env = self.place.env
        try:
            await env.pools.run(Pool.RECORD, _write_record, env.fs, self.directory / RECORD_NAME, record)
        except WalbError:
            self._unsure = True
            raise
        if record.base is not self.record.base:
            self._points.clear()
        self.record = record
        self._unsure = False

    def dated(self, diff: Diff) -> Diff:
        """Return a diff that is about to continue `latest`, with a time that retention can go by."""
        return self._dating.dated(diff, self.base, self.diffs, self.place.env.clock.now())

    def add_diff(self, diff: Diff) -> None:
        """Take a diff whose file is durable; it continues `latest`."""
        before = self.latest.begin
        after = apply(before, diff)
        self.diffs.add(diff)
        self.latest = BaseState(after, timestamp=diff.timestamp)
        if diff.begin.gid_b != before.gid_b or self.base.is_applying:
            self._points.clear()
        for all_points, points in self._points.items():
            # The chain only grows at its end: what is known of it stays, but the newest snapshot is another one.
            if before.is_clean and before != self.base.begin:
                point = points.pop()
                if all_points or not diff.mergeable:
                    points.append(replace(point, explicit=not diff.mergeable))
            if after.is_clean:
                points.append(RestorePoint(after.gid_b, diff.timestamp, explicit=True))

    def replace_diffs(self, parts: Sequence[Diff], merged: Diff) -> None:
        """Take a merged diff, whose file is durable, for its parts; their files are to be removed afterwards."""
        self.diffs.add(merged)
        self.diffs.erase_all(parts)
        self._points.clear()

    def relabel_diff(self, diff: Diff) -> None:
        """Take new flags of a diff, whose file bears them already."""
        self.diffs.replace(diff)
        self._points.clear()

    def drop_before(self, gid: int) -> list[Diff]:
        """Forget the diffs that the base holds, up to `gid`; their files are to be removed afterwards."""
        self._points.clear()
        return self.diffs.erase_before(gid)

    def drop_useless(self) -> list[Diff]:
        """Forget the diffs that lead nowhere; their files are to be removed afterwards."""
        self._points.clear()
        return self.diffs.gc(self.base)

    def reset_memory(self) -> None:
        """Forget diffs and restored images: the volume begins anew from its record."""
        self.diffs = DiffManager()
        self.restored = set()
        self.remarks = []
        self.damage = []
        self.latest = self.base
        self._dating = Dating()
        self._points.clear()

    # --- giving up

    def sync_timer(self) -> SyncTimer:
        """Return what tells a reception that begins now when to sync."""
        config = self.place.config
        return SyncTimer(config.fsync_interval_b, config.fsync_interval_s)

    @property
    def is_forced(self) -> bool:
        """Running work has to give up: the volume, or the whole daemon, is stopped by force."""
        return self.machine.stopping is StopMode.FORCE or self.place.is_forced()

    def check_force(self) -> None:
        """Raise ForceStopped when running work has to give up; safe to call from any thread."""
        self.machine.check_force()
        if self.place.is_forced():
            raise ForceStopped("given up because the daemon is being ended")

    @asynccontextmanager
    async def giving_up(self) -> AsyncIterator[None]:
        """End the body with ForceStopped as soon as running work has to give up, even in a wait for a peer."""
        self.check_force()
        task = asyncio.current_task()
        assert task is not None
        forced = False

        async def watch() -> None:
            nonlocal forced
            await self.machine.changed.wait_for(lambda: self.is_forced)
            forced = True
            task.cancel()

        watcher = asyncio.create_task(watch())
        try:
            try:
                yield
            finally:
                watcher.cancel()
                await asyncio.wait({watcher})  # where a cancellation that came last arrives
        except asyncio.CancelledError:
            if forced and task.uncancel() == 0:
                raise ForceStopped("given up because of a forced stop") from None
            raise


def check_room(place: Place, *, need_b: int = 0) -> None:
    """Raise DiskFull when the free space, less what is needed, is below the reserve. Blocks."""
    free_b = place.env.fs.free_b(place.base_dir)
    if free_b - need_b < place.config.free_reserve_b:
        raise DiskFull(
            "the archive is short of space",
            hint="free space on its disk: apply old diffs, or delete restored images",
            path=str(place.base_dir),
            free_b=free_b,
            need_b=need_b,
            reserve_b=place.config.free_reserve_b,
        )


def _write_record(fs: FileSystem, path: Path, record: VolumeRecord) -> None:
    with disk_errors(path, "save the record"):
        failpoints.hit(FP_BEFORE_SAVE)
        save_record(fs, path, record)
        failpoints.hit(FP_AFTER_SAVE)
