"""Crashes of the device: power failures at any disk operation, over and over on the same disk.

After each: redo finds a state that some prefix of the requests leaves (in the order in which they were
submitted), the prefix has everything that was made durable, and a second redo changes nothing.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

import pytest

from tests.kit.device import DDEV, LDEV, Client, Op, make_disk, serving
from tests.kit.simdisk import SimDisk
from tests.kit.virtual import run
from walbd.errors import CorruptData, DiskFailed, WalbError
from walbd.format.superblock import read_superblock
from walbd.protocol.nbd import Command, CommandFlag
from walbd.storage.device.engine import Engine, Tuning
from walbd.storage.device.redo import redo
from walbd.units import LB

TUNING = Tuning(
    checkpoint_interval_s=0.05,
    flush_interval_s=0.004,
    flush_interval_b=32 << 10,
    data_delay_s=0.001,
    pending_max_b=64 << 10,
)


@dataclass
class Promises:
    """What the device has promised since the last start."""

    base: bytearray  # the volume's contents at that start
    ops: list[Op] = field(default_factory=list)  # submitted since
    durable: int = 0  # so many of them must survive
    permanent: int = 0  # highest lsid seen permanent, of the log `uuid`
    uuid: bytes = b""
    size_lb: int = 0
    oldest: int = 0

    def prefixes(self, record_max_lb: int) -> list[tuple[int, bytes]]:
        """Return (n, state) after each record, in order: so many requests are complete, this is the volume.

        A request is applied record by record; only discards are one record whatever their size.
        """
        size_b = max([len(self.base), *((op.offset_lb + op.size_lb) * LB for op in self.ops)])
        image = bytearray(self.base.ljust(size_b, b"\0"))
        states = [(0, bytes(image))]
        for n, op in enumerate(self.ops):
            is_discard = op.kind is Command.TRIM or not (op.data or op.flags & CommandFlag.NO_HOLE)
            step = op.size_lb if is_discard else record_max_lb
            for at in range(0, op.size_lb, step):
                size_lb = min(step, op.size_lb - at)
                piece = Op(op.kind, op.offset_lb + at, size_lb, op.data[at * LB : (at + size_lb) * LB])
                piece.apply(image)
                states.append((n + (at + size_lb == op.size_lb), bytes(image)))
        return states


def random_op(rng: random.Random, size_lb: int, record_max_lb: int) -> Op:
    n = rng.choice([1, 1, 2, 7, 8, 8, 9, 16, rng.randint(1, 3 * record_max_lb)])  # some are several records
    n = min(n, size_lb)
    offset = rng.randrange(size_lb - n + 1)
    flags = CommandFlag.FUA if rng.random() < 0.1 else 0
    kind = rng.random()
    if kind < 0.15:
        return Op(Command.TRIM, offset, n, flags=flags)
    if kind < 0.2:
        return Op(Command.WRITE_ZEROES, offset, n, flags=flags | CommandFlag.NO_HOLE)
    return Op(Command.WRITE, offset, n, rng.randbytes(n * LB), flags)


async def work(engine: Engine, client: Client, promises: Promises, rng: random.Random, record_max_lb: int) -> None:
    """Submit requests and control operations until the disk dies."""
    core = engine.core

    def note() -> None:
        lsids = core.lsids
        assert lsids.in_order(), lsids
        if core.superblock.uuid == promises.uuid:
            promises.permanent = max(promises.permanent, lsids.permanent)
            promises.oldest = max(promises.oldest, lsids.oldest)
        else:
            promises.uuid, promises.permanent, promises.oldest = core.superblock.uuid, lsids.permanent, 0
        for i, op in enumerate(promises.ops):
            if op.result == 0 and op.flags & CommandFlag.FUA:
                promises.durable = max(promises.durable, i + 1)

    while not core.has_failed():
        choice = rng.random()
        try:
            if choice < 0.7:
                ops = [random_op(rng, promises.size_lb, record_max_lb) for _ in range(rng.randint(1, 20))]
                promises.ops += ops
                client.submit(*ops)
                if rng.random() < 0.5:
                    await client.answered(ops[-1])
            elif choice < 0.8:
                answered = 0
                while answered < len(promises.ops) and promises.ops[answered].result == 0:
                    answered += 1
                if await client.flush() == 0:
                    promises.durable = max(promises.durable, answered)
            elif choice < 0.85:
                await engine.take_checkpoint()
            elif choice < 0.9:
                if rng.random() < 0.5:
                    await engine.drain()
                await engine.set_oldest(core.lsids.permanent)
            elif choice < 0.92:
                await engine.reset_wal()
            elif choice < 0.94:
                await engine.freeze(0)
                engine.melt()
            elif choice < 0.96:
                grown = promises.size_lb + rng.randint(0, 3)
                await engine.resize(grown)
                promises.size_lb = grown
            elif choice < 0.97:
                await asyncio.sleep(rng.choice([0.001, 0.01, 0.1]))
            else:
                at = rng.randrange(promises.size_lb) * LB
                await client.read(at, min(4096, promises.size_lb * LB - at))
        except WalbError:
            if not core.has_failed():
                raise
        note()
        await asyncio.sleep(0)
    note()


async def life(disk: SimDisk, promises: Promises, rng: random.Random, record_max_lb: int) -> None:
    """Serve the device until the disk dies, at start or at work."""
    async with serving(disk, rng, TUNING) as engine:
        note_uuid = engine.core.superblock.uuid
        if note_uuid != promises.uuid:
            promises.uuid, promises.permanent, promises.oldest = note_uuid, 0, 0
        promises.size_lb = engine.core.superblock.device_size_lb
        await work(engine, Client(engine), promises, rng, record_max_lb)


def check(disk: SimDisk, promises: Promises, rng: random.Random, record_max_lb: int) -> Promises:
    """Redo on the disk, without crashes, and compare with what was promised; return the new state of affairs."""
    image: list[bytes] = []
    ends: list[tuple[bytes, int, int]] = []

    async def look() -> None:
        async with serving(disk, rng, TUNING) as engine:
            image.append(await Client(engine).read_all())
            lsids = engine.core.lsids
            ends.append((engine.core.superblock.uuid, lsids.latest, lsids.oldest))

    for _ in range(2):
        run(look())
        disk = disk.restart()
    assert image[0] == image[1], "a second redo changes something"
    assert ends[0] == ends[1]
    uuid, end, oldest = ends[0]
    if uuid == promises.uuid:
        assert end >= promises.permanent, "permanent log was lost"
        assert oldest >= promises.oldest, "set-oldest was not durable"
    size_b = len(image[0])
    states = promises.prefixes(record_max_lb)
    survivors = [n for n, state in states if state.ljust(size_b, b"\0")[:size_b] == image[0]]
    assert survivors, "the volume is in a state that no prefix of the requests leaves"
    assert survivors[-1] >= promises.durable, "a durable request was lost"
    return Promises(bytearray(image[0]), uuid=uuid, permanent=end, oldest=oldest, size_lb=size_b // LB)


@pytest.mark.parametrize("pbs", [512, 4096])
@pytest.mark.parametrize("piece_b", [512, 4096])
@pytest.mark.parametrize("seed", range(6))
def test_crashes_lose_nothing_that_was_promised(pbs: int, piece_b: int, seed: int) -> None:
    rng = random.Random(f"{seed} {pbs} {piece_b}")
    ring_pb = rng.choice([32, 64, 200])
    record_max_lb = ring_pb // 4 * pbs // LB
    size_lb = 96
    # The promise of half a superblock is not kept by any disk that tears its own blocks.
    disk = make_disk(pbs=pbs, ring_pb=ring_pb, size_lb=size_lb, piece_b=piece_b)
    promises = Promises(bytearray(size_lb * LB), size_lb=size_lb, uuid=b"u" * 16)
    for cycle in range(6):
        disk.crash_at = disk.ops + rng.choice([rng.randint(1, 12), rng.randint(1, 60), rng.randint(1, 300)])
        try:
            run(life(disk, promises, rng, record_max_lb))
        except* DiskFailed:
            pass  # it died at the start
        assert disk.crashed, f"cycle {cycle} ended without a crash"
        disk = disk.crash(rng)
        while rng.random() < 0.4:
            disk = crash_at_start(disk, rng)
        promises = check(disk, promises, rng, record_max_lb)
        disk = disk.restart()


def crash_at_start(disk: SimDisk, rng: random.Random) -> SimDisk:
    """Start the device and crash it somewhere in redo, or right after; return the disk then."""

    async def start() -> None:
        async with serving(disk, rng, TUNING):
            pass

    disk.crash_at = disk.ops + rng.randint(1, 12)
    try:
        run(start())
    except DiskFailed:
        pass
    return disk.crash(rng)


@pytest.mark.parametrize("seed", range(4))
def test_an_error_without_a_crash_loses_nothing_that_was_answered(seed: int) -> None:
    """The n-th operation fails; the process is restarted on the same machine, whose page cache has survived."""
    rng = random.Random(seed)
    for _ in range(12):
        disk = make_disk(ring_pb=64, size_lb=96)
        promises = Promises(bytearray(96 * LB), size_lb=96, uuid=b"u" * 16)
        disk.fail_at = disk.ops + rng.randint(1, 80)
        try:
            run(life(disk, promises, rng, 16))
        except* DiskFailed:
            pass
        answered = [i + 1 for i, op in enumerate(promises.ops) if op.result == 0]
        refused = [i for i, op in enumerate(promises.ops) if op.result is not None and op.result != 0]
        if answered and refused:
            assert answered[-1] <= refused[0] or any(promises.ops[i].flags & 1 for i in refused)
        plain = [i + 1 for i, op in enumerate(promises.ops) if op.result == 0 and not op.flags & 1]
        promises.durable = max([promises.durable, *plain])
        check(disk.restart(), promises, rng, 16)


def test_no_write_from_before_a_crash_comes_back() -> None:
    """docs/device.md, "Forget the future": pack N is lost, N+1 is not; a new N must not bring N+1 back."""
    rng = random.Random(7)

    def write(disk: SimDisk, *blocks: tuple[int, int]) -> SimDisk:
        async def main() -> None:
            async with serving(disk, rng, TUNING) as engine:
                client = Client(engine)
                for at, tag in blocks:
                    assert await client.write(at, bytes([tag]) * LB) == 0
                    await asyncio.sleep(0)

        run(main())
        return disk

    disk = write(make_disk(), (0, 1))
    ldev = disk.files[LDEV]
    before = bytes(ldev.now)
    write(disk.restart(), (1, 2), (2, 3))  # packs N and N+1, of one block each
    sb = read_superblock(disk.open(LDEV))
    first = sb.offset_b(2)
    ldev.now[first : first + 1024] = before[first : first + 1024]  # N is lost
    disk.files[DDEV].now[LB : 3 * LB] = bytes(2 * LB)
    disk = write(disk.restart(), (1, 4))  # a new N of the same size
    image = bytearray()

    async def look() -> None:
        async with serving(disk.restart(), rng, TUNING) as engine:
            image.extend(await Client(engine).read_all())

    run(look())
    assert image[: 3 * LB] == b"\1" * LB + b"\4" * LB + bytes(LB), "N+1 has come back"


def test_half_a_header_from_before_a_crash_does_not_come_back() -> None:
    """A block of 4096 bytes may be torn twice: the first sector of an old header, the others of a new one."""
    rng = random.Random(8)

    def serve(disk: SimDisk, *ops: Op) -> bytes:
        """Start the device after a crash of the process, do `ops`, return the first block."""

        async def main() -> bytes:
            async with serving(disk, rng, TUNING) as engine:
                client = Client(engine)
                for op in ops:
                    client.submit(op)
                    await client.answered(op)
                return await client.read(0, LB)

        return run(main())

    disk = make_disk(pbs=4096, ring_pb=32)
    serve(disk, Op(Command.WRITE, 0, 1, b"b" * LB, CommandFlag.FUA))
    at = read_superblock(disk.open(LDEV)).offset_b(2)  # of the next header
    ldev = disk.files[LDEV].now
    lap = rng.randbytes(4096 - LB)
    serve(disk := disk.restart(), Op(Command.TRIM, 0, 8))
    old_header = bytes(ldev[at : at + 4096])
    ldev[at + LB : at + 4096] = lap  # the other sectors are still those of an earlier lap
    serve(disk := disk.restart())
    first_sector = bytes(ldev[at : at + LB])
    serve(disk := disk.restart(), Op(Command.WRITE, 8, 1, b"n" * LB))
    ldev[at : at + LB] = first_sector  # the first sector of the new header did not make it
    assert ldev[at : at + 4096] != old_header
    assert serve(disk.restart()) == b"b" * LB, "the trim has come back"


def test_damage_in_the_log_is_not_an_end_of_it() -> None:
    """A header whose checksum is good and whose fields contradict each other is refused."""
    rng = random.Random(1)
    disk = make_disk()

    async def fill() -> None:
        async with serving(disk, rng, Tuning(checkpoint_interval_s=3600)) as engine:
            client = Client(engine)
            for i in range(3):
                await client.write(i, bytes([i + 1]) * LB, fua=True)

    run(fill())
    sb = read_superblock(disk.open(LDEV))
    at = sb.offset_b(2)
    raw = disk.files[LDEV].now
    raw[at + 6] += 1  # total_io_size; the checksum is made good again
    words = [int.from_bytes(raw[at + i : at + i + 4], "little") for i in range(4, 512, 4)]
    raw[at : at + 4] = (-(sum(words) + sb.salt) % 2**32).to_bytes(4, "little")
    disk = disk.restart()
    before = bytes(raw)
    with pytest.raises(CorruptData):
        run(fill())
    assert bytes(disk.files[LDEV].now) == before


def test_redo_applies_nothing_that_the_log_can_still_lose() -> None:
    """A killed process leaves log in memory only; the power may fail while redo works on it.

    What is on the data device then must be in the log: consumers of the log would never get to know of it.
    """
    rng = random.Random(3)

    async def write() -> None:
        async with serving(disk, rng, Tuning(flush_interval_s=3600)) as engine:
            for i in range(4):
                assert await Client(engine).write(i, bytes([i + 1]) * LB) == 0

    for n in range(1, 20):
        disk = make_disk()
        run(write())
        disk = disk.restart()
        disk.crash_at = disk.ops + n
        try:
            with disk.open(LDEV, write=True) as ldev, disk.open(DDEV, write=True) as ddev:
                redo(ldev, ddev, read_superblock(ldev))
        except DiskFailed:
            pass
        ldev_contents, ddev_contents = disk.files[LDEV], disk.files[DDEV]
        found = bytes(ddev_contents.now)  # the worst case: all of the data survives, and
        ldev_contents.now[:] = ldev_contents.durable  # of the log only what was synced
        disk = disk.restart()
        ddev_contents.now[:] = bytes(len(found))
        with disk.open(LDEV, write=True) as ldev, disk.open(DDEV, write=True) as ddev:
            first = read_superblock(ldev)
            redo(ldev, ddev, replace(first, written_lsid=first.oldest_lsid))
        in_the_log = bytes(ddev_contents.now)
        for at in range(0, len(found), LB):
            assert found[at : at + LB] in (bytes(LB), in_the_log[at : at + LB]), f"crash at operation {n}"
