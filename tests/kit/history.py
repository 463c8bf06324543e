"""Random histories of a small volume, and the plain array that every restored image must equal.

A `History` is one storage, one or two proxies and one archive, reduced to what decides about data: the rules of
docs/metadata.md and the order of updates. Writes, zeros and discards go to a small device; its log is cut,
sent, merged on the way, lost in overflows; backups copy the device while it is written; the archive applies,
merges, collects garbage, and crashes at any point, which here means: memory is gone and everything is built
again from file names and the stored base state. Files live in a `DiffStore`, so the same histories run on
dictionaries and on real wdiff files.

The truth is kept apart: `Truth` maps (history uuid, gid) to the volume's bytes at that snapshot.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Protocol

from walbd.format.meta import (
    NO_BASE,
    BaseState,
    Diff,
    DiffManager,
    LogPoint,
    Relation,
    Snapshot,
    apply,
    diff_name,
    drop_delivered,
    full_backup_state,
    hash_backup_diff,
    hash_backup_gid,
    is_implicit_due,
    merge_all,
    new_point,
    parse_diff_name,
    plan_transfer,
    point_after,
    relation,
    reset_point,
    transfer_diff,
    trim,
)
from walbd.ids import NIL_UUID, Gid
from walbd.units import LB

SIZE_LB: Final = 16
RECORD_MAX_LB: Final = 4
INTERVAL_S: Final = 3


class Kind(Enum):
    """What a record does to its blocks."""

    DATA = "data"
    ZERO = "zero"
    DISCARD = "discard"  # reads as zeros from then on


@dataclass(frozen=True, slots=True)
class Record:
    """One write of `n_lb` blocks at `begin_lb`; `data` is empty unless the kind is DATA."""

    kind: Kind
    begin_lb: int
    n_lb: int
    data: bytes = b""

    def contents(self) -> bytes:
        """What the blocks read as afterwards."""
        return self.data if self.kind is Kind.DATA else bytes(self.n_lb * LB)


class DiffStore(Protocol):
    """A directory of diff files."""

    def put(self, diff: Diff, records: Sequence[Record], uuid: bytes) -> Diff:
        """Make the file of `diff` from records in the order they were written; return it with its size."""

    def put_merged(self, diff: Diff, source: DiffStore, parts: Sequence[Diff], uuid: bytes) -> Diff:
        """Make the file of `diff` from files of `source` (this store or another of its kind), oldest first."""

    def uuid_of(self, diff: Diff) -> bytes:
        """The uuid in the file."""

    def rename(self, old: Diff, new: Diff) -> None:
        """Give the file the name of `new`."""

    def erase(self, diff: Diff) -> None:
        """Remove the file."""

    def load(self) -> list[Diff]:
        """Read the directory: every diff by its name and size."""

    def overlay(self, image: bytes, diffs: Sequence[Diff]) -> bytes:
        """Return `image` with the files of `diffs`, oldest first, laid over it."""

    def close(self) -> None:
        """Release what the store holds; it is not used any more."""


class MemoryStore:
    """Files as dictionaries from block to contents, by name."""

    def __init__(self) -> None:
        self._files: dict[str, tuple[bytes, dict[int, bytes]]] = {}

    def put(self, diff: Diff, records: Sequence[Record], uuid: bytes) -> Diff:
        """See DiffStore."""
        blocks: dict[int, bytes] = {}
        for record in records:
            contents = record.contents()
            for i in range(record.n_lb):
                blocks[record.begin_lb + i] = contents[i * LB : (i + 1) * LB]
        return self._put(diff, uuid, blocks)

    def put_merged(self, diff: Diff, source: DiffStore, parts: Sequence[Diff], uuid: bytes) -> Diff:
        """See DiffStore."""
        assert isinstance(source, MemoryStore)
        blocks: dict[int, bytes] = {}
        for part in parts:
            blocks.update(source._files[diff_name(part)][1])
        return self._put(diff, uuid, blocks)

    def _put(self, diff: Diff, uuid: bytes, blocks: dict[int, bytes]) -> Diff:
        self._files[diff_name(diff)] = (uuid, blocks)
        return parse_diff_name(diff_name(diff), size_b=LB * len(blocks))

    def uuid_of(self, diff: Diff) -> bytes:
        """See DiffStore."""
        return self._files[diff_name(diff)][0]

    def rename(self, old: Diff, new: Diff) -> None:
        """See DiffStore."""
        self._files[diff_name(new)] = self._files.pop(diff_name(old))

    def erase(self, diff: Diff) -> None:
        """See DiffStore."""
        del self._files[diff_name(diff)]

    def load(self) -> list[Diff]:
        """See DiffStore."""
        return [parse_diff_name(name, size_b=LB * len(blocks)) for name, (_, blocks) in self._files.items()]

    def overlay(self, image: bytes, diffs: Sequence[Diff]) -> bytes:
        """See DiffStore."""
        result = bytearray(image)
        for diff in diffs:
            for block, contents in self._files[diff_name(diff)][1].items():
                result[block * LB : (block + 1) * LB] = contents
        return bytes(result)

    def close(self) -> None:
        """See DiffStore."""
        self._files.clear()


class Truth:
    """What the volume held at each snapshot of each log history, and which snapshots were asked for."""

    def __init__(self) -> None:
        self.images: dict[tuple[bytes, int], bytes] = {}
        self.explicit: set[tuple[bytes, int]] = set()


class Storage:
    """The device, its log since the last reset, and the records that plan its transfers."""

    def __init__(self, rng: random.Random, truth: Truth) -> None:
        self._rng = rng
        self._truth = truth
        self.image = bytearray(SIZE_LB * LB)
        self.size_max_pb = rng.randint(RECORD_MAX_LB + 1, 30)
        self.is_active = False  # logs are sent; not so before the first backup and after an overflow
        self.reset(0, 0)
        self.is_active = False

    def reset(self, gid: int, now: int) -> None:
        """Wipe the log: a new history begins at `gid`."""
        self.uuid = self._rng.randbytes(16)
        self.done = reset_point(gid, now)
        self.queue: tuple[LogPoint, ...] = ()
        self.log: list[tuple[int, Record]] = []  # (lsid, record), ascending
        self.latest = 0
        self._boundaries: dict[int, bytes] = {0: bytes(self.image)}  # lsid -> the volume there
        self.is_active = True

    def write(self) -> None:
        """One random write, with its pack in the log."""
        n_lb = self._rng.randint(1, RECORD_MAX_LB)
        begin_lb = self._rng.randint(0, SIZE_LB - n_lb)
        kind = self._rng.choice((Kind.DATA, Kind.DATA, Kind.DATA, Kind.ZERO, Kind.DISCARD))
        data = b"".join(self._rng.randbytes(4) * (LB // 4) for _ in range(n_lb)) if kind is Kind.DATA else b""
        record = Record(kind, begin_lb, n_lb, data)
        self.image[begin_lb * LB : (begin_lb + n_lb) * LB] = record.contents()
        self.log.append((self.latest, record))
        self.latest += 1 + (0 if kind is Kind.DISCARD else n_lb)
        self._boundaries[self.latest] = bytes(self.image)

    def snapshot(self, now: int, *, explicit: bool) -> Gid:
        """Plan a snapshot of what the device holds."""
        point = new_point(
            self.done, self.queue, self.latest, explicit=explicit, now=now, size_max_pb=self.size_max_pb
        )
        self.queue = (*self.queue, point)
        self._truth.images[self.uuid, point.gid] = bytes(self.image)
        if explicit:
            self._truth.explicit.add((self.uuid, point.gid))
        return point.gid

    def transfer(self, proxy: Proxy, now: int, *, permanent: int | None = None) -> bool:
        """Send one stretch of log; sometimes the acknowledgement is lost. False: nothing to send now."""
        if permanent is None:
            permanent = self.latest if self._rng.random() < 0.7 else self._some_boundary()
        self.queue = drop_delivered(self.done, self.queue)
        if not self.queue and self.done.lsid >= permanent:
            return False
        if is_implicit_due(self.queue, self.latest, now, INTERVAL_S):
            self.snapshot(now, explicit=False)
        plan = plan_transfer(self.done, self.queue, permanent, size_max_pb=self.size_max_pb)
        if plan is None:
            return False
        lsid_end = max(lsid for lsid in self._boundaries if lsid <= plan.limit)
        records = [record for lsid, record in self.log if self.done.lsid <= lsid < lsid_end]
        diff = transfer_diff(plan, lsid_end)
        image = self._boundaries[lsid_end]
        assert self._truth.images.setdefault((self.uuid, diff.end.gid_b), image) == image
        proxy.receive(diff, records, self.uuid)
        if self._rng.random() < 0.7:
            self.done = point_after(plan, lsid_end)
            self.queue = drop_delivered(self.done, self.queue)
        return True

    def _some_boundary(self) -> int:
        return self._rng.choice([lsid for lsid in self._boundaries if lsid >= self.done.lsid])


class Proxy:
    """What waits for the archive."""

    def __init__(self, rng: random.Random, store: DiffStore) -> None:
        self._rng = rng
        self.store = store
        self.diffs = DiffManager()

    def receive(self, diff: Diff, records: Sequence[Record], uuid: bytes) -> None:
        """Take one stretch of log; the same one may come again."""
        known = self.diffs.find(diff.begin, diff.end)
        if known is not None and self.store.uuid_of(known) == uuid:
            return
        if known is not None:  # left from an abandoned history that used the same gids
            self.erase([known])
        self.diffs.add(self.store.put(diff, records, uuid))

    def send(self, archive: Archive) -> bool:
        """Send the oldest as one diff; false: nothing left, or the archive cannot take it yet."""
        parts = self.diffs.to_send(size_max_b=self._rng.randint(0, 30) * LB, n_max=self._rng.choice((1, 1, 3, 6)))
        if not parts:
            return False
        uuid = self.store.uuid_of(parts[0])
        same = [self.store.uuid_of(part) == uuid for part in parts]
        parts = parts[: same.index(False)] if False in same else parts
        answer = archive.receive(merge_all(parts), self.store, parts, uuid)
        if answer == "too-new-diff":
            return False
        if answer != "accept" or self._rng.random() < 0.7:  # else the acknowledgement was lost
            self.erase(parts)
        return True

    def erase(self, diffs: Iterable[Diff]) -> None:
        """Memory first, then the files."""
        for diff in list(diffs):
            self.diffs.erase(diff, must_exist=True)
            self.store.erase(diff)

    def restart(self) -> None:
        """Rebuild from the directory."""
        self.diffs, duplicates = DiffManager.load(self.store.load())
        assert not duplicates


class Crashed(Exception):
    """The archive's memory is gone from here on."""


class Archive:
    """A base image, its stored state, diffs; and `protected`: what it must be able to restore, by gid.

    `events` counts what happened, so that a test can show that histories meet what they are for.
    """

    def __init__(self, rng: random.Random, store: DiffStore, truth: Truth) -> None:
        self._rng = rng
        self._truth = truth
        self.store = store
        self.events: Counter[str] = Counter()
        self._init()

    def _init(self) -> None:
        self.image = bytes(SIZE_LB * LB)
        self.base_text = NO_BASE.describe()  # as stored
        self.uuid = NIL_UUID
        self.diffs = DiffManager()
        self.latest = NO_BASE.begin
        self.images: dict[int, bytes] = {}  # gid -> the truth, for what has arrived
        self.protected: set[int] = set()

    @property
    def base(self) -> BaseState:
        """The stored state."""
        return BaseState.parse(self.base_text)

    @property
    def is_empty(self) -> bool:
        """No backup yet."""
        return self.base.begin.is_none

    def receive(self, diff: Diff, source: DiffStore, parts: Sequence[Diff], uuid: bytes) -> str:
        """Answer a proxy, and take the diff if it continues what is here."""
        if uuid != self.uuid:
            return "different-uuid"
        where = relation(self.latest, diff)
        if where is not Relation.APPLICABLE:
            return f"{where}-diff"
        for history, gid in self._truth.explicit:
            if history == uuid and diff.begin.gid_b < gid < diff.end.gid_b:
                raise AssertionError(f"explicit snapshot {gid} is inside {diff}")
        self.events["overlapping diff received"] += diff.begin.gid_b < self.latest.gid_b
        self.events["merged diff received"] += len(parts) > 1
        diff = self.store.put_merged(trim(diff, self.latest), source, parts, uuid)
        self.crash_sometimes(0.03)
        self.diffs.add(diff)
        self.latest = apply(self.latest, diff)
        self._learn(self.latest, uuid)
        return "accept"

    def _learn(self, after: Snapshot, uuid: bytes) -> None:
        """Note what must be restorable from now on."""
        gid = after.gid_b
        if after.is_clean and gid not in self.images:
            self.images[gid] = self._truth.images[uuid, gid]
            if (uuid, gid) in self._truth.explicit:
                self.protected.add(gid)

    def crash_sometimes(self, chance: float) -> None:
        """Lose all memory, with this chance."""
        if self._rng.random() < chance:
            raise Crashed

    def restart(self) -> None:
        """Rebuild from names and the stored state, as at start-up."""
        self.diffs, duplicates = DiffManager.load(self.store.load())
        assert not duplicates
        self.events["restart"] += 1
        if self.is_empty:
            assert not self.diffs
            return
        self.events["restart in progress"] += self.base.is_applying
        for diff in self.diffs.gc(self.base):
            self.events["garbage at restart"] += 1
            self.store.erase(diff)
        self.latest = self.diffs.latest(self.base).begin
        finished = self.base.end_applying(self.diffs.minimum(self.base)).begin
        for diff, after in self.diffs.steps(finished):
            self._learn(after, self.store.uuid_of(diff))

    def apply(self, now: int) -> None:
        """Apply up to a random gid, in rounds; a crash leaves any mixture of old and new blocks."""
        if self.is_empty:
            return
        gid = min(self._rng.randint(self.base.begin.gid_b, self.latest.gid_b + 1) for _ in range(2))
        n_max = self._rng.randint(0, 3)
        while diffs := self.diffs.to_apply(self.base, gid, n_max=n_max):
            self.events["apply finished later"] += self.base.is_applying
            done = self.base.end_applying(diffs)
            self.base_text = self.base.begin_applying(diffs).describe()
            self._forget_below(done.begin.gid_b)
            wanted = self.store.overlay(self.image, diffs)
            if self._rng.random() < 0.2:
                self.image = b"".join(
                    self._rng.choice((self.image, wanted))[at : at + LB] for at in range(0, SIZE_LB * LB, LB)
                )
                raise Crashed
            self.image = wanted
            self.crash_sometimes(0.05)
            self.base_text = done.describe()
            self.crash_sometimes(0.05)
            self._erase_files(self.diffs.erase_before(done.begin.gid_b))

    def _forget_below(self, gid: int) -> None:
        self.protected = {g for g in self.protected if g >= gid}

    def _erase_files(self, diffs: Iterable[Diff]) -> None:
        for diff in diffs:
            self.store.erase(diff)

    def merge(self) -> None:
        """Merge some diffs; refused while an apply is in progress."""
        if self.is_empty or self.base.is_applying:
            return
        begin = self._rng.randint(self.base.begin.gid_b, self.latest.gid_b)
        if self._rng.random() < 0.5:
            parts = self.diffs.merge_candidates(begin, gid_end=begin + self._rng.randint(1, 8))
        else:
            parts = self.diffs.merge_candidates(begin, size_max_b=self._rng.randint(0, 40) * LB)
        if len(parts) < 2:
            return
        self.events["merge"] += 1
        merged = self.store.put_merged(merge_all(parts), self.store, parts, self.store.uuid_of(parts[-1]))
        self.crash_sometimes(0.1)
        self.diffs.add(merged)
        self.diffs.erase_all(parts)
        for part in parts:
            self.crash_sometimes(0.05)
            self.store.erase(part)

    def gc(self) -> None:
        """Remove what leads nowhere."""
        if not self.is_empty:
            self._erase_files(self.diffs.gc(self.base))

    def change_snapshot(self) -> None:
        """Protect or release a snapshot."""
        gids = [gid for gid in self.images if gid >= self.base.begin.gid_b]
        if self.is_empty or not gids:
            return
        gid, enable = self._rng.choice(gids[-4:-1] or gids), self._rng.random() < 0.7
        can_restore = gid in [p.gid for p in self.diffs.restorable(self.base, all_points=True)]
        found, changed = self.diffs.change_snapshot(gid, enable=enable)
        for old, new in changed:
            self.store.rename(old, new)
        if found and not enable:
            self.protected.discard(gid)
        elif found and can_restore:
            self.protected.add(gid)

    def check(self) -> int:
        """Restore everything there is to restore; return how many points that were."""
        if self.is_empty:
            return 0
        points = self.diffs.restorable(self.base, all_points=True)
        self.events["check in progress"] += self.base.is_applying
        self.events["check of a dirty latest"] += not self.latest.is_clean
        gids = [point.gid for point in points]
        assert gids == sorted(set(gids))
        kept = {point.gid for point in self.diffs.restorable(self.base)}
        assert self.protected <= kept, f"{self.protected - kept} cannot be restored"
        assert self.latest == self.diffs.latest(self.base).begin
        if self.latest.is_clean:
            assert gids[-1] == self.latest.gid_b
        for gid in gids:
            assert self.restore(gid) == self.images[gid], f"restore({gid}) differs"
        return len(gids)

    def restore(self, gid: int) -> bytes:
        """Make the image of `gid`, in rounds as if few files could be open at once."""
        n_max = self._rng.choice((0, 0, 1, 3))
        state, image = self.base, self.image
        while diffs := self.diffs.to_restore(state, gid, n_max=n_max):
            image = self.store.overlay(image, diffs)
            state = state.end_applying(diffs)
        assert state.begin == Snapshot.clean(gid)
        return image

    def read_latest(self) -> bytes:
        """The virtual image of the latest snapshot, clean or not."""
        return self.store.overlay(self.image, self.diffs.to_scan(self.base, self.latest.gid_b))

    def clear(self) -> None:
        """Forget everything: a full backup will follow."""
        self._erase_files(self.diffs)
        self._init()


@dataclass
class History:
    """One volume's life. `run` lives it; it raises AssertionError where data were lost or invented."""

    seed: int
    make_store: Callable[[str], DiffStore] = field(default=lambda name: MemoryStore())
    now: int = 1_000_000_000
    n_restored: int = 0

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)
        self.truth = Truth()
        self.storage = Storage(self.rng, self.truth)
        self.archive = Archive(self.rng, self.make_store("archive"), self.truth)
        self.proxies = [
            Proxy(self.rng, self.make_store(f"proxy{number}")) for number in range(self.rng.choice((1, 2, 2)))
        ]

    def run(self, n_steps: int = 50) -> None:
        """Live `n_steps` random events, then let everything arrive and check it all."""
        events: list[tuple[int, Callable[[], object]]] = [
            (30, self._write),
            (7, self._snapshot),
            (26, self._transfer),
            (20, self._send),
            (5, lambda: self._archive(lambda: self.archive.apply(self.now))),
            (12, lambda: self._archive(self.archive.merge)),
            (2, lambda: self._archive(self.archive.gc)),
            (6, lambda: self._archive(self.archive.change_snapshot)),
            (2, lambda: self._archive(lambda: self.archive.crash_sometimes(1.0))),
            (2, lambda: self.rng.choice(self.proxies).restart()),
            (1, self._overflow),
            (1, self._full_backup),
            (2, self._hash_backup),
            (3, self._check),
        ]
        weights, actions = zip(*events, strict=True)
        while not self._full_backup():
            pass
        for action in self.rng.choices(actions, weights, k=n_steps):
            self.now += self.rng.randint(0, 4)
            action()
        self._settle()

    def close(self) -> None:
        """Release the stores."""
        for store in (self.archive.store, *(proxy.store for proxy in self.proxies)):
            store.close()

    # --- events

    def _write(self) -> None:
        for _ in range(self.rng.randint(1, 3)):
            self.storage.write()

    def _snapshot(self) -> None:
        if self.storage.is_active:
            self.storage.snapshot(self.now, explicit=True)

    def _transfer(self) -> None:
        if self.storage.is_active:
            self.storage.transfer(self.rng.choice(self.proxies), self.now)

    def _send(self) -> None:
        proxy = self.rng.choice(self.proxies)
        for _ in range(self.rng.randint(1, 3)):
            self._archive(lambda: proxy.send(self.archive))

    def _archive(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Crashed:
            self.archive.restart()

    def _overflow(self) -> None:
        """The log ring was overwritten: what was not sent is lost, and only a backup can continue."""
        self.storage.is_active = False

    def _full_backup(self) -> bool:
        self.archive.clear()
        self.storage.reset(0, self.now)
        started = self.now
        copy = self._read_device(lambda block, now: now)
        if copy is None:
            return False
        gid = self.storage.snapshot(self.now, explicit=True)
        self.archive.image = b"".join(data for data in copy if data is not None)
        self.archive.base_text = full_backup_state(gid, started).describe()
        self.archive.latest = self.archive.base.begin
        self.archive.uuid = self.storage.uuid
        return True

    def _hash_backup(self) -> None:
        if self.archive.is_empty:
            return
        archive = self.archive
        archive.events["hash backup in progress"] += archive.base.is_applying
        archive.events["hash backup of a dirty latest"] += not archive.latest.is_clean
        latest, started = archive.latest, self.now
        gid_begin = hash_backup_gid(latest)
        theirs = archive.read_latest()
        self.storage.reset(gid_begin, self.now)
        copy = self._read_device(lambda block, now: None if now == theirs[block * LB : (block + 1) * LB] else now)
        if copy is None:
            return
        gid_end = self.storage.snapshot(self.now, explicit=True)
        diff = hash_backup_diff(latest, Snapshot(gid_begin, gid_end), started)
        records = [
            Record(Kind.DATA if any(data) else Kind.ZERO, block, 1, data if any(data) else b"")
            for block, data in enumerate(copy)
            if data is not None
        ]
        archive.diffs.add(archive.store.put(diff, records, self.storage.uuid))
        archive.latest = apply(latest, diff)
        archive.events["hash backup"] += 1
        archive.uuid = self.storage.uuid
        if latest.is_clean:
            archive.protected.add(latest.gid_b)

    def _read_device(self, take: Callable[[int, bytes], bytes | None]) -> list[bytes | None] | None:
        """Read block by block while writing and sending go on; None: the backup failed halfway."""
        taken: list[bytes | None] = []
        fails_at = self.rng.randint(0, SIZE_LB - 1) if self.rng.random() < 0.15 else None
        for block in range(SIZE_LB):
            if block == fails_at:
                self.storage.is_active = False
                self.archive.events["failed backup"] += 1
                return None
            if self.rng.random() < 0.15:
                self.now += 1
                self._write()
            if self.rng.random() < 0.1:
                self._transfer()  # waits at the proxy: the archive says it is syncing
            taken.append(take(block, bytes(self.storage.image[block * LB : (block + 1) * LB])))
        return taken

    def _check(self) -> None:
        self.n_restored += self.archive.check()

    def _settle(self) -> None:
        """Everything written must arrive, and be restorable as it is on the device now."""
        self._check()
        while self.archive.is_empty or not self.storage.is_active:
            if self.archive.is_empty:
                self._full_backup()
            else:
                self._hash_backup()
        gid = self.storage.snapshot(self.now, explicit=True)
        for _ in range(500):
            if self.archive.latest == Snapshot.clean(gid):
                break
            self.storage.transfer(self.rng.choice(self.proxies), self.now, permanent=self.storage.latest)
            for proxy in self.proxies:
                self._archive(lambda proxy=proxy: proxy.send(self.archive))  # type: ignore[misc]
        assert self.archive.latest == Snapshot.clean(gid), "not everything arrives"
        self._check()
        assert self.archive.restore(gid) == bytes(self.storage.image)
