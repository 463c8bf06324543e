"""Driving a device engine without sockets: requests as operations with a model of what they must leave."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, cast

from tests.kit.simdisk import SimDisk
from tests.kit.virtual import InlinePools, run
from walbd.daemon.env import Env
from walbd.daemon.nbd_server import Writes
from walbd.daemon.tasks import Signal
from walbd.ext.nbd import Chunk
from walbd.format.superblock import Superblock, read_superblock, ring_size_pb
from walbd.fs import FileSystem
from walbd.ids import Lsid
from walbd.protocol.nbd import RANGE_TABLE, REQUEST_TABLE, Command, CommandFlag
from walbd.storage.device.engine import Engine, Tuning
from walbd.storage.device.start import open_device
from walbd.storage.device.superblocks import write_superblocks
from walbd.units import LB

LDEV: Final = Path("/sim/ldev")
DDEV: Final = Path("/sim/ddev")


def sim_env(disk: SimDisk, rng: random.Random) -> Env:
    """Return an Env on a simulated disk, without threads."""
    return Env(fs=cast(FileSystem, disk), rng=rng, pools=InlinePools(rng))


def make_disk(
    *, pbs: int = 512, ring_pb: int = 256, size_lb: int = 256, ddev_lb: int | None = None, piece_b: int = 512
) -> SimDisk:
    """Return a disk with a freshly formatted device, all zeros."""
    disk = SimDisk(piece_b)
    ldev_b = (ring_pb + 4096 // pbs + 2) * pbs
    disk.make(LDEV, ldev_b)
    disk.make(DDEV, (ddev_lb or size_lb) * LB)
    assert ring_size_pb(ldev_b, pbs) == ring_pb
    file = disk.open(LDEV, write=True)
    write_superblocks(
        file,
        Superblock(
            pbs=pbs,
            salt=0xBEEF,
            uuid=b"u" * 16,
            ring_size_pb=ring_pb,
            oldest_lsid=Lsid(0),
            written_lsid=Lsid(0),
            device_size_lb=size_lb,
        ),
    )
    return disk


@dataclass
class Op:
    """One request; `result` is None until it was answered."""

    kind: Command
    offset_lb: int
    size_lb: int
    data: bytes = b""
    flags: int = 0
    result: int | None = None

    def apply(self, image: bytearray) -> None:
        """Do to a model what the device must do."""
        data = self.data if self.kind is Command.WRITE else bytes(self.size_lb * LB)
        image[self.offset_lb * LB : self.offset_lb * LB + len(data)] = data


@dataclass
class Client:
    """Submits operations to an engine and notes the answers (a WriteSink)."""

    engine: Engine
    ops: list[Op] = field(default_factory=list)
    returned_b: int = 0
    changed: Signal = field(default_factory=Signal)

    def submit(self, *ops: Op) -> None:
        """Submit operations as one batch, as one wake-up of a connection would."""
        table, data = b"", b""
        n_fua = size_b = 0
        for op in ops:
            cookie = len(self.ops)
            self.ops.append(op)
            table += REQUEST_TABLE.pack(
                cookie, op.offset_lb * LB, len(data), op.size_lb * LB, 0, op.kind, op.flags, 0
            )
            n_fua += bool(op.flags & CommandFlag.FUA)
            data += op.data
            size_b += len(op.data)
        self.engine.write(Writes(self, table, data, n_fua, size_b))

    def send_simple(self, table: bytes, begin: int, end: int, error: int, fua: int) -> int:
        n = 0
        for cookie, _, _, _, _, _, flags, _ in list(REQUEST_TABLE.iter_unpack(table))[begin:end]:
            if fua >= 0 and (flags & 1) != fua:
                continue
            assert self.ops[cookie].result is None, "answered twice"
            self.ops[cookie].result = error
            n += 1
        self.changed.set()
        return n

    def give(self, size_b: int) -> None:
        self.returned_b += size_b

    async def write(self, offset_lb: int, data: bytes, *, fua: bool = False) -> int:
        """Write and wait for the answer."""
        op = Op(Command.WRITE, offset_lb, len(data) // LB, data, CommandFlag.FUA if fua else 0)
        self.submit(op)
        return await self.answered(op)

    async def trim(self, offset_lb: int, size_lb: int) -> int:
        """Discard and wait for the answer."""
        op = Op(Command.TRIM, offset_lb, size_lb)
        self.submit(op)
        return await self.answered(op)

    async def answered(self, op: Op) -> int:
        """Return the error number of an operation once it is there."""
        await self.changed.wait_for(lambda: op.result is not None)
        assert op.result is not None
        return op.result

    async def flush(self) -> int:
        """Flush; return the error number."""
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.engine.flush(done.set_result)
        return await done

    async def read(self, offset_b: int, size_b: int) -> bytes:
        """Read bytes."""
        out = Chunk(size_b)
        memoryview(out)[:] = b"\xee" * size_b
        missing = self.engine.read_cached(RANGE_TABLE.pack(offset_b, size_b, 0, 0), out)
        if missing:
            await self.engine.read(missing, out)
        return bytes(memoryview(out))

    async def read_all(self) -> bytes:
        """Read the whole volume."""
        return await self.read(0, self.engine.size_b())


@asynccontextmanager
async def serving(
    disk: SimDisk, rng: random.Random, tuning: Tuning = Tuning(), *, expect_lsid: int | None = None
) -> AsyncIterator[Engine]:
    """Open a device on a simulated disk; at the end its tasks are cut off, as by kill -9."""
    env = sim_env(disk, rng)
    opened = open_device(env.fs, LDEV, DDEV, expect_lsid=expect_lsid)
    tasks = asyncio.TaskGroup()
    async with tasks:
        engine = Engine(env, opened, tasks, name="sim", tuning=tuning)
        try:
            yield engine
        finally:
            if engine._melt_timer is not None:
                engine._melt_timer.cancel()
            for worker in engine._workers:
                worker.cancel()


Body = Callable[[Engine, Client], Awaitable[None]]


def on_device(body: Body, disk: SimDisk | None = None, *, tuning: Tuning = Tuning(), seed: int = 1) -> SimDisk:
    """Run `body` with an engine on `disk`; return the disk."""
    disk = disk or make_disk()

    async def main() -> None:
        async with serving(disk, random.Random(seed), tuning) as engine:
            await body(engine, Client(engine))

    run(main())
    return disk


def block(tag: int, n_lb: int = 1) -> bytes:
    return bytes([tag]) * (n_lb * LB)


def write_op(offset_lb: int, data: bytes, flags: int = 0) -> Op:
    return Op(Command.WRITE, offset_lb, len(data) // LB, data, flags)


def overflowed(engine: Engine) -> bool:
    return engine.core.overflow


def result(op: Op) -> int | None:
    return op.result


def superblock_of(disk: SimDisk) -> tuple[int, int, int]:
    sb = read_superblock(disk.open(LDEV))
    return sb.oldest_lsid, sb.written_lsid, sb.device_size_lb
