"""One volume at a proxy: the owner of all its mutable state.

`machine` says what may be done; `lock` guards the pairs (set in memory, directory on disk). Lock order: the lock
of one volume and nothing else; it is held over disk work, never over the network. Commands move the machine, so
they exclude each other; receptions are a step, too; sends run beside them and take the lock for short moments.
Source: docs/proxy.md.
"""

from __future__ import annotations

import asyncio
import dataclasses
import errno
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import structlog

from walbd.daemon.env import Env, Pool
from walbd.daemon.flow import unless
from walbd.daemon.logs import error_fields
from walbd.daemon.states import Machine, StopMode
from walbd.daemon.tasks import uninterrupted
from walbd.errors import AlreadyExists, BadState, CorruptData, DiskFailed, NotFound, WalbError
from walbd.format.meta import BadLabel, Diff, Snapshot, diff_name, merge_all, parse_diff_name
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import WdiffReader, open_wdiff
from walbd.fs import File, FileSystem
from walbd.protocol.control import ArchiveInfo
from walbd.proxy.convert import WlogConverter
from walbd.proxy.diffs import DiffSet
from walbd.proxy.states import TABLE, Command, State, nothing_to_save
from walbd.proxy.store import ArchiveEntry, Others, VolumeRecord, VolumeStore

log = structlog.get_logger()

T = TypeVar("T")

MENDS: Final = "only a hash backup of the volume continues it"

_NO_MORE_FILES: Final = (errno.EMFILE, errno.ENFILE)
_NAMES_MAX: Final = 3  # of damaged wdiffs in a text


@dataclass
class Hop:
    """One archive of a volume, and what it has still to get."""

    archive: str
    entry: ArchiveEntry
    diffs: DiffSet = field(default_factory=DiffSet)
    others: Others = field(default_factory=dict)  # of other histories, with the same snapshots as one in `diffs`
    damaged: list[Diff] = field(default_factory=list)  # put aside, and not known to be with the archive
    needs_person: bool = False  # the error flag: something that does not go away by waiting
    error_text: str = ""  # why the last attempt did not succeed; empty when it did
    refused: bool = False  # the last offer was not taken: the next one asks with a single wdiff
    last_sent: int = 0  # [unix s], 0: never since the start
    sending: bool = False

    def flag(self, text: str) -> None:
        """Set the error flag."""
        self.needs_person, self.error_text = True, text

    def clear_flag(self) -> None:
        """Forget that the last attempt failed."""
        self.needs_person, self.error_text, self.refused = False, "", False

    def learn(self, latest: Snapshot | None) -> None:
        """The archive has told its newest snapshot: what led below it was lost for nothing, or is not missed."""
        if latest is not None and not latest.is_none:
            self.damaged = [diff for diff in self.damaged if diff.end.gid_b > latest.gid_b]

    @property
    def is_wrong(self) -> bool:
        """Waiting alone does not help."""
        return self.needs_person or bool(self.damaged)

    @property
    def problem(self) -> str:
        """Why what waits is not at the archive, as far as that is known; empty when nothing is wrong."""
        if not self.damaged:
            return self.error_text
        names = ", ".join(map(str, self.damaged[:_NAMES_MAX]))
        more = f" and {len(self.damaged) - _NAMES_MAX} more" if len(self.damaged) > _NAMES_MAX else ""
        text = f"damaged here and put aside: {names}{more}: unless the archive gets that from elsewhere, {MENDS}"
        return f"{text}; {self.error_text}" if self.error_text else text


@dataclass(frozen=True, slots=True)
class Selection:
    """Open wdiffs of one history, oldest first, that go as one."""

    taken: list[tuple[Diff, int]]  # with the numbers of their receipts
    readers: list[WdiffReader]
    merged: Diff
    uuid: bytes
    size_lb: int  # of the volume


class Volume:
    """One volume. Lives on one loop."""

    def __init__(self, env: Env, name: str, path: Path) -> None:
        self.name = name
        self.machine: Machine[State, Command] = Machine(TABLE, State.CLEAR)
        self.record = VolumeRecord()
        self.received = DiffSet()
        self.hops: dict[str, Hop] = {}
        self.last_received = 0  # [unix s], 0: never since the start
        self.troubles: list[str] = []  # files that a person should look at
        self.broken: WalbError | None = None
        self.stop_job = 0  # number of the job that stops the volume, 0: none
        self._env = env
        self._store = VolumeStore(env.fs, path)
        self._lock = asyncio.Lock()
        self._receipts = 0
        self._gave_up = False  # the daemon ends by force

    # --- looking

    @property
    def state_text(self) -> str:
        """The state as operators see it."""
        return self.machine.shown

    @property
    def received_path(self) -> Path:
        """Where received wdiffs and their temporary files are."""
        return self._store.received

    @property
    def unsent(self) -> bool:
        """Some wdiff has still to reach some archive."""
        return bool(self.received) or any(hop.diffs for hop in self.hops.values())

    @property
    def forced(self) -> bool:
        """Running work has to give up."""
        return self._gave_up or self.machine.stopping is StopMode.FORCE

    @property
    def may_send(self) -> bool:
        """Sending may begin: the volume is Started, and not stopping (or stopping once everything is sent)."""
        if self._gave_up or self.machine.stopping not in (None, StopMode.EMPTY):
            return False
        try:
            self.machine.check(Command.SEND)
        except WalbError:
            return False
        return True

    def check(self, command: Command) -> None:
        """Raise BadState, Stopping or Busy unless the command is allowed now."""
        if self.broken is not None and command is not Command.CLEAR_VOL:
            raise BadState(
                "the volume is broken",
                hint="see the reason; repair its directory and restart the proxy, or clear-vol and begin anew",
                command=str(command),
                state=self.state_text,
                reason=str(self.broken),
            )
        self.machine.check(command)

    def hop(self, archive: str) -> Hop:
        """Return an archive's hop; raises NotFound."""
        hop = self.hops.get(archive)
        if hop is None:
            raise NotFound(
                "the volume is not sent to that archive",
                hint="archives: " + (", ".join(sorted(self.hops)) or "none"),
                volume=self.name,
                archive=archive,
            )
        return hop

    # --- life

    async def load(self) -> None:
        """Read the directory. A volume that cannot be read becomes Broken; one that is gone stays Clear."""
        try:
            record = await self._env.pools.run(Pool.RECORD, self._store.load)
            if record is not None:
                self.record = record
                await self._relist()
                self.machine.state = State.STOPPED
        except WalbError as exc:
            log.error("volume.broken", volume=self.name, **error_fields(exc))
            self.broken = exc
            self.machine.state = State.BROKEN

    async def start(self, *, at_start_up: bool = False) -> None:
        """Stopped to Started: look at the directory again, link what was received. The caller queues the sends.

        At the start of the process a link that fails does not keep the volume from starting: each send tries
        again, and wlogs must be taken in.
        """
        async with self.machine.transition(Command.START, nothing_to_save):
            if not at_start_up:
                if self.record.clearing:  # a clear-vol that failed: what is left is wanted after all
                    await self._save(self.record)
                await self._relist()
            try:
                await self.link_received()
            except DiskFailed as exc:
                if not at_start_up:
                    raise
                log.error("volume.link_failed", volume=self.name, **error_fields(exc))

    async def clear(self) -> None:
        """To Clear: remove everything, unsent wdiffs included."""
        async with self.machine.transition(Command.CLEAR_VOL, nothing_to_save), self._lock:
            await self._save(self.record, clearing=True)
            await self._env.pools.run(Pool.RECORD, self._store.remove)
            self._forget()
        self.broken = None

    async def resize(self, size_lb: int) -> None:
        """Set the size that is announced to archives, until a storage announces a larger one."""
        self.check(Command.RESIZE)
        async with self._lock:
            await self._save(msgspec.structs.replace(self.record, size_lb=size_lb))

    def give_up(self) -> None:
        """The daemon ends by force: running work gives up, nothing new begins."""
        self._gave_up = True
        self.machine.changed.set()

    async def unless_forced(self, work: Awaitable[T]) -> T:
        """Await `work`, or cancel it and raise ForceStopped when running work has to give up."""
        return await unless(lambda: self.machine.changed.wait_for(lambda: self.forced), work, volume=self.name)

    # --- archives

    async def add_archive(self, info: ArchiveInfo) -> None:
        """Add an archive; the first one makes the volume known. Raises AlreadyExists."""
        if info.archive in self.hops:
            raise AlreadyExists(
                "the volume is sent to that archive already",
                hint="use archive-info update to change the entry",
                volume=self.name,
                archive=info.archive,
            )
        new = self.machine.state is State.CLEAR
        async with self.machine.transition(Command.ADD_ARCHIVE, nothing_to_save), self._lock:
            try:
                if new:
                    await self._env.pools.run(Pool.RECORD, self._store.create)
                if info.archive in self.record.removing:
                    await self._env.pools.run(Pool.RECORD, self._store.remove_archive, info.archive)
                await self._env.pools.run(Pool.RECORD, self._store.add_archive, info.archive)
                await self._save_archives(info.archive, _entry(info))
            except BaseException:
                if new:
                    await self._env.pools.run(Pool.RECORD, self._store.discard)
                    self._forget()
                raise
            self.hops[info.archive] = Hop(info.archive, _entry(info))

    async def update_archive(self, info: ArchiveInfo) -> None:
        """Change an archive's entry; raises NotFound if it is not there."""
        self.check(Command.UPDATE_ARCHIVE)
        hop = self.hop(info.archive)
        async with self.machine.transition(Command.UPDATE_ARCHIVE, nothing_to_save), self._lock:
            await self._save_archives(info.archive, _entry(info))
            hop.entry = _entry(info)

    async def delete_archive(self, archive: str) -> None:
        """Remove an archive and what it has still to get; the last one clears the volume. Raises NotFound."""
        self.hop(archive)
        last = len(self.hops) == 1
        command = Command.DELETE_LAST_ARCHIVE if last else Command.DELETE_ARCHIVE
        async with self.machine.transition(command, nothing_to_save), self._lock:
            if last:
                await self._save(self.record, clearing=True)
            else:
                await self._save_archives(archive, None)
                del self.hops[archive]
            await self._env.pools.run(Pool.RECORD, self._store.remove_archive, archive)
            if last:
                await self._env.pools.run(Pool.RECORD, self._store.remove)
                self._forget()

    # --- wdiffs

    async def commit_receipt(self, converter: WlogConverter, diff: Diff, size_lb: int) -> Diff:
        """Make a finished wdiff durable under its name and link it to all archives; return it with its size.

        Not cut by a cancellation. When this returns, the log may be acknowledged. When it raises after the
        wdiff got its name, the wdiff stays in received/ and is linked later.
        """

        async def steps() -> Diff:
            async with self._lock:
                if size_lb > self.record.size_lb:
                    # Before the wdiff: an archive must never be offered a size that its records exceed.
                    await self._save(msgspec.structs.replace(self.record, size_lb=size_lb))
                pools, store = self._env.pools, self._store
                await pools.run(Pool.RECEIVE, converter.commit, store.received / diff_name(diff))
                known = self.received.find(diff)
                if known is not None and diff_name(known) != diff_name(diff):
                    await pools.run(Pool.RECORD, store.set_aside_received, known)
                self._receipts += 1
                stored = dataclasses.replace(diff, size_b=converter.wdiff_b)
                self.received.put(stored, self._receipts)
                self.last_received = self._env.clock.now()
                await self._link_received()
                return stored

        return await uninterrupted(steps())

    async def link_received(self) -> None:
        """Link everything received to every archive, then remove it from received/. Raises DiskFailed.

        After an error what is still in received/ is linked by the next call; to link twice is harmless.
        """
        async with self._lock:
            await uninterrupted(self._link_received())

    @asynccontextmanager
    async def select(self, hop: Hop, *, size_max_b: int, n_max: int) -> AsyncIterator[Selection | None]:
        """Open what goes to an archive next, for the body; None: nothing is left.

        Ends before the first wdiff of another history, and before one that cannot be opened (which is an error
        only when it is the first). Raises DiskFailed or CorruptData.
        """
        files: list[File] = []
        try:
            async with self._lock:
                taken = hop.diffs.to_send(size_max_b=size_max_b, n_max=n_max)
                readers = await self._env.pools.run(
                    Pool.SEND, open_wdiffs, self._env.fs, self._store.sendto(hop.archive), taken, files
                )
            if not taken:
                yield None
                return
            taken = taken[: len(readers)]
            yield Selection(
                taken=taken,
                readers=readers,
                merged=merge_all([diff for diff, _ in taken]),
                uuid=readers[0].header.uuid,
                size_lb=self.record.size_lb,
            )
        finally:
            for file in files:
                file.close()

    async def drop(self, hop: Hop, taken: Sequence[tuple[Diff, int]], *, other_history: bool = False) -> int:
        """Delete wdiffs that an archive does not need any more (memory first, then disk); return how many.

        One that was replaced meanwhile by a newer receipt stays. A file that cannot be removed is found again at
        the next start, and refused by the archive as too old. `other_history`: the archive's history is not that
        of these, so those that had to make way for them are sent next; else those are not needed either.
        """
        run, store = self._env.pools.run, self._store
        async with self._lock:
            removed = hop.diffs.remove(taken)
            self.machine.changed.set()
            again = [diff for diff in removed if diff in hop.others] if other_history else []
            others = [] if other_history else [name for diff in removed for name in hop.others.pop(diff, ())]
            try:
                for diff in again:  # first: it takes the name of the one that goes, whatever else fails
                    await self._bring_back(hop, diff)
                gone = [diff for diff in removed if hop.diffs.same(diff) is None]
                await run(Pool.SEND, store.unlink_sent, hop.archive, gone, others)
            except DiskFailed as exc:
                log.warning("wdiff.unlink_failed", volume=self.name, archive=hop.archive, **error_fields(exc))
        return len(removed)

    async def put_aside(self, hop: Hop, error: CorruptData) -> Diff | None:
        """Take the wdiff that an error speaks of out of what an archive is to get, if it is really damaged.

        It is read again, all of it. Returns its label; None when it is no wdiff of this archive, was replaced
        meanwhile, or is good now. Raises DiskFailed when it cannot be told. Nothing is deleted, and nothing may be
        appended to what is before it any more: the archive refuses what follows as too new.
        """
        path = Path(str(error.facts.get("path", "")))
        try:
            diff = hop.diffs.same(parse_diff_name(path.name, size_b=0))
        except BadLabel:
            return None
        if diff is None or path != self._store.sendto(hop.archive) / diff_name(diff):
            return None
        receipt = hop.diffs.receipt(diff)
        if await self._env.pools.run(Pool.SEND, is_good, self._env.fs, path):
            return None

        async def steps() -> Diff | None:
            async with self._lock:
                if hop.diffs.same(diff) is None or hop.diffs.receipt(diff) != receipt:
                    return None
                await self._env.pools.run(Pool.RECORD, self._store.put_aside_damaged, hop.archive, diff)
                hop.diffs.remove([(diff, receipt)])
                hop.damaged = [*(each for each in hop.damaged if each != diff), diff]
                self.machine.changed.set()
                if diff in hop.others:  # which history the damaged one was of cannot be known
                    await self._bring_back(hop, diff)
                return diff

        return await uninterrupted(steps())

    # --- inside

    async def _bring_back(self, hop: Hop, diff: Diff) -> None:
        """Have the wdiff of another history that made way last for `diff` take part again."""
        back = await self._env.pools.run(Pool.SEND, self._store.bring_back, hop.archive, hop.others[diff][-1])
        hop.others[diff].pop()
        if not hop.others[diff]:
            del hop.others[diff]
        self._receipts += 1
        hop.diffs.put(back, self._receipts)

    async def _relist(self) -> None:
        """Build all sets anew from the directory."""
        async with self._lock:
            listing = await self._env.pools.run(Pool.RECORD, self._store.look, list(self.record.archives))
            self._receipts += 1
            self.received = DiffSet(listing.received, receipt=self._receipts)
            self.troubles = listing.troubles
            for archive, entry in self.record.archives.items():
                hop = self.hops.setdefault(archive, Hop(archive, entry))
                hop.diffs = DiffSet(listing.sendto[archive])
                hop.others = listing.others[archive]
                hop.damaged = listing.damaged[archive]

    async def _link_received(self) -> None:
        """As `link_received`, for callers that hold the lock."""
        diffs = list(self.received)
        if not diffs or not self.hops:
            return
        pools, store = self._env.pools, self._store
        for hop in self.hops.values():
            known = [(diff, hop.diffs.find(diff)) for diff in diffs]
            others = await pools.run(Pool.RECORD, store.link, hop.archive, known)
            for diff, name in others:
                hop.others.setdefault(diff, []).append(name)
            for diff in diffs:
                hop.diffs.put(diff, self.received.receipt(diff))
        await pools.run(Pool.RECORD, store.unlink_received, diffs)
        self.received = DiffSet()
        self.machine.changed.set()

    async def _save(self, record: VolumeRecord, *, clearing: bool = False) -> None:
        """Replace the record, on disk and then here; commands and receptions exclude each other."""
        record = msgspec.structs.replace(record, clearing=clearing)
        await self._env.pools.run(Pool.RECORD, self._store.save, record)
        self.record = record

    async def _save_archives(self, archive: str, entry: ArchiveEntry | None) -> None:
        """Set an archive's entry in the record, or (None) have it removed."""
        archives = {name: old for name, old in self.record.archives.items() if name != archive}
        removing = [name for name in self.record.removing if name != archive]
        if entry is None:
            removing.append(archive)
        else:
            archives[archive] = entry
        await self._save(msgspec.structs.replace(self.record, archives=archives, removing=removing))

    def _forget(self) -> None:
        self.record, self.received, self.hops, self.troubles = VolumeRecord(), DiffSet(), {}, []


def is_good(fs: FileSystem, path: Path) -> bool:
    """Read a wdiff completely; tell whether its bytes are what they should be. Blocking. Raises DiskFailed."""
    try:
        with fs.open(path) as file:
            verify(open_wdiff(file))
    except CorruptData:
        return False
    except NotFound:
        return True  # whoever removed it knows
    return True


def open_wdiffs(
    fs: FileSystem, directory: Path, taken: Sequence[tuple[Diff, int]], files: list[File]
) -> list[WdiffReader]:
    """Open wdiffs in order and read their headers, as far as they belong to one history and can be opened.

    The first one must be good. What was opened is in `files`, to be closed by the caller, also after an error.
    """
    readers: list[WdiffReader] = []
    for diff, _ in taken:
        try:
            file = fs.open(directory / diff_name(diff))
        except NotFound as exc:
            if readers:
                break
            raise DiskFailed(
                "a wdiff has vanished from the disk",
                hint="stop and start the volume; if it is really lost, a hash backup must continue",
                path=str(directory / diff_name(diff)),
            ) from exc
        except DiskFailed as exc:
            if readers and exc.facts.get("errno") in _NO_MORE_FILES:
                break
            raise
        files.append(file)
        try:
            reader = open_wdiff(file)
        except CorruptData:
            if readers:
                break
            raise
        if readers and reader.header.uuid != readers[0].header.uuid:
            break
        readers.append(reader)
    return readers


def _entry(info: ArchiveInfo) -> ArchiveEntry:
    return ArchiveEntry(address=info.address, compress=info.compress, delay_s=info.delay_s)
