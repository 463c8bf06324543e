"""A WalB device in memory for tests of the storage daemon: a real log device image, walb format included.

Writes go into packs made by `walbd.format.logpack`, in a ring as `walbd.format.ring` reads it. Whether a write is
permanent at once, and whether the data device follows at once, can be switched off to look at the states between.
A `FakeDevice` is the device itself, which outlives daemons; each daemon talks to it through a `FakeHandle`.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from walbd.daemon.tasks import Signal
from walbd.errors import ConnectError, Refused
from walbd.ext.checksum import checksum
from walbd.format.logpack import FLAG_DISCARD, FLAG_EXIST, FLAG_PADDING, make_header, pack_header
from walbd.format.ring import Ring
from walbd.format.superblock import SUPERBLOCK_OFFSET_B, Superblock
from walbd.ids import Lsid, new_uuid
from walbd.protocol.device import DeviceInfo, LsidSample
from walbd.units import LB


@dataclass
class MemFile:
    """An open file in memory (`walbd.format.files.ReadFile`)."""

    data: bytearray
    path: Path = Path("/fake/ldev")

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return bytes(self.data[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        part = self.data[offset_b : offset_b + len(buffer)]
        memoryview(buffer)[: len(part)] = part
        return len(part)

    def size(self) -> int:
        return len(self.data)


@dataclass(frozen=True)
class Write:
    """One write, discard (no data), and where it ends in the log."""

    lsid_end: int
    offset_lb: int
    size_lb: int
    data: bytes | None


class FakeDevice:
    """The device. Its methods that are not async are what an application or an accident does to it."""

    def __init__(self, *, size_lb: int = 2048, pbs: int = 512, ring_pb: int = 4096, seed: int = 0) -> None:
        self.rng = random.Random(seed)
        self.up = True
        self.permanent_at_once = True
        self.written_at_once = True
        self.read_only = ""
        self.overflow = False
        self.data = bytearray(size_lb * LB)
        self.latest = self.permanent = self.written = self.prev_written = self.oldest = self.given_up = 0
        self.writes: list[Write] = []
        self.changed = Signal()
        self.calls: list[str] = []
        self.checkpoints = 0
        self.before_set_oldest: Callable[[int], None] = lambda lsid: None
        self._superblock = Superblock(
            pbs=pbs,
            salt=self.rng.getrandbits(32) | 1,
            uuid=new_uuid(self.rng),
            ring_size_pb=ring_pb,
            oldest_lsid=Lsid(0),
            written_lsid=Lsid(0),
            device_size_lb=size_lb,
        )
        self.ldev = MemFile(bytearray(self._superblock.end_b))
        self._write_superblock()

    # what the application does

    def write(self, offset_lb: int, data: bytes) -> None:
        """Write whole logical blocks: one pack, and a padding pack before it where the ring ends."""
        self.data[offset_lb * LB : offset_lb * LB + len(data)] = data
        self._log(offset_lb, len(data) // LB, data)

    def discard(self, offset_lb: int, size_lb: int) -> None:
        self.data[offset_lb * LB : (offset_lb + size_lb) * LB] = bytes(size_lb * LB)
        self._log(offset_lb, size_lb, None)

    def scribble(self, count: int = 10, *, size_max_lb: int = 16) -> None:
        """Write random data to random places."""
        total_lb = len(self.data) // LB
        for _ in range(count):
            size_lb = self.rng.randint(1, size_max_lb)
            offset_lb = self.rng.randrange(total_lb - size_lb + 1)
            if self.rng.random() < 0.2:
                self.discard(offset_lb, size_lb)
            else:
                self.write(offset_lb, self.rng.randbytes(size_lb * LB))

    def sync(self) -> None:
        """Make all log permanent."""
        self.permanent = self.latest
        if self.written_at_once:
            self.checkpoint()
        self.changed.set()

    def checkpoint(self) -> None:
        """Bring the data device up to the permanent log, durably."""
        self.written = self.prev_written = self.permanent
        self.oldest = max(self.oldest, min(self.given_up, self.prev_written))
        self.checkpoints += 1

    # accidents

    def go_down(self) -> None:
        self.up = False
        self.changed.set()

    def come_up(self) -> None:
        self.up = True
        self.changed.set()

    def crash(self) -> None:
        """Lose what is not permanent, as a power failure may; the data device is redone from the log."""
        for write in self.writes:
            assert write.data is not None or write.lsid_end <= self.permanent, "lost discards are not modelled"
        kept = [write for write in self.writes if write.lsid_end <= self.permanent]
        self.latest = self.permanent
        self.data[:] = self.image_at(self.permanent)
        self.writes = kept
        self.written = self.prev_written = self.permanent
        self.given_up = 0
        self.changed.set()

    def image_at(self, lsid: int) -> bytes:
        """Return the volume as the log up to `lsid` makes it (since the last reset)."""
        image = bytearray(self._data_at_reset)
        image.extend(bytes(len(self.data) - len(image)))
        for write in self.writes:
            if write.lsid_end <= lsid:
                begin, size = write.offset_lb * LB, write.size_lb * LB
                image[begin : begin + size] = write.data if write.data is not None else bytes(size)
        return bytes(image)

    def damage(self, lsid: int) -> None:
        """Overwrite one block of the ring with noise."""
        at = self._superblock.offset_b(lsid)
        self.ldev.data[at : at + self.pbs] = self.rng.randbytes(self.pbs)

    def reset_behind(self) -> None:
        """Reset the log as somebody else might."""
        self._reset()

    # what a daemon sees

    @property
    def pbs(self) -> int:
        return self._superblock.pbs

    @property
    def uuid(self) -> bytes:
        return self._superblock.uuid

    @property
    def ring(self) -> Ring:
        return Ring(self.ldev, self._superblock)

    def sample(self) -> LsidSample:
        return LsidSample(
            uuid=self.uuid,
            latest=self.latest,
            completed=self.latest,
            flush=self.permanent,
            permanent=self.permanent,
            written=self.written,
            prev_written=self.prev_written,
            oldest=self.oldest,
            overflow=self.overflow,
            read_only=bool(self.read_only),
            frozen=False,
        )

    def info(self) -> DeviceInfo:
        sb = self._superblock
        return DeviceInfo(
            name="fake",
            uuid=sb.uuid,
            pbs=sb.pbs,
            salt=sb.salt,
            size_lb=len(self.data) // LB,
            capacity_pb=sb.ring_size_pb,
            ldev="/fake/ldev",
            ddev="/fake/ddev",
            read_only=self.read_only,
            lsids=self.sample(),
        )

    def set_oldest(self, lsid: int) -> None:
        self.before_set_oldest(lsid)
        if not self.oldest <= lsid <= self.permanent:
            raise Refused("cannot delete log up to there", lsid=lsid)
        if lsid < self.permanent and not self.ring.has_pack(lsid):
            raise Refused("no pack begins at that lsid", lsid=lsid)
        self.given_up = max(self.given_up, lsid)
        self.oldest = max(self.oldest, min(self.given_up, self.prev_written))

    def reset(self) -> DeviceInfo:
        self._reset()
        return self.info()

    def resize(self, size_lb: int) -> None:
        if size_lb * LB > len(self.data):
            self.data.extend(bytes(size_lb * LB - len(self.data)))

    # inside

    _data_at_reset: bytes = b""

    def _log(self, offset_lb: int, size_lb: int, data: bytes | None) -> None:
        pbs = self.pbs
        flags = FLAG_EXIST if data is not None else FLAG_EXIST | FLAG_DISCARD
        body = b"" if data is None else data + bytes(-len(data) % pbs)
        left_pb = self._superblock.ring_size_pb - self.latest % self._superblock.ring_size_pb
        if 1 + len(body) // pbs > left_pb:
            pad_lb = (left_pb - 1) * pbs // LB
            self._put([(0, pad_lb, FLAG_EXIST | FLAG_PADDING, 0)], bytes(pad_lb * LB))
        csum = 0 if data is None else checksum(data, self._superblock.salt)
        self._put([(offset_lb, size_lb, flags, csum)], body)
        self.writes.append(Write(self.latest, offset_lb, size_lb, data))
        if self.latest - self.oldest > self._superblock.ring_size_pb:
            self.overflow = True
        if self.permanent_at_once:
            self.sync()
        self.changed.set()

    def _put(self, items: list[tuple[int, int, int, int]], body: bytes) -> None:
        sb = self._superblock
        header = make_header(self.latest, sb.pbs, items)
        pack = pack_header(header, pbs=sb.pbs, salt=sb.salt) + body
        at = sb.offset_b(self.latest)
        assert at + len(pack) <= sb.end_b, "a pack must not cross the end of the ring"
        self.ldev.data[at : at + len(pack)] = pack
        self.latest += len(pack) // sb.pbs

    def _reset(self) -> None:
        old = self._superblock
        self._superblock = Superblock(
            pbs=old.pbs,
            salt=(old.salt + 2) & 0xFFFFFFFF,
            uuid=new_uuid(self.rng),
            ring_size_pb=old.ring_size_pb,
            oldest_lsid=Lsid(0),
            written_lsid=Lsid(0),
            device_size_lb=old.device_size_lb,
        )
        self._write_superblock()
        self.latest = self.permanent = self.written = self.prev_written = self.oldest = self.given_up = 0
        self.overflow = False
        self.writes.clear()
        self._data_at_reset = bytes(self.data)
        self.changed.set()

    def _write_superblock(self) -> None:
        block = self._superblock.pack()
        self.ldev.data[SUPERBLOCK_OFFSET_B : SUPERBLOCK_OFFSET_B + len(block)] = block
        self._data_at_reset = self._data_at_reset or bytes(self.data)


@dataclass
class FakeHandle:
    """One daemon's way to a device (`walbd.storage.device.interface.Device`)."""

    device: FakeDevice
    dead: Callable[[], bool] = field(
        default=lambda: False
    )  # the daemon has been killed: nothing reaches the device

    def _check(self, what: str) -> FakeDevice:
        if not self.device.up or self.dead():
            raise ConnectError("the fake device is down")
        self.device.calls.append(what)
        return self.device

    async def info(self) -> DeviceInfo:
        return self._check("info").info()

    async def lsids(self) -> LsidSample:
        return self._check("lsids").sample()

    async def set_oldest(self, lsid: int) -> None:
        self._check("set_oldest").set_oldest(lsid)

    async def take_checkpoint(self) -> None:
        self._check("take_checkpoint").checkpoint()

    async def reset_wal(self) -> DeviceInfo:
        return self._check("reset_wal").reset()

    async def freeze(self, timeout_s: float) -> None:
        self._check("freeze")

    async def melt(self) -> None:
        self._check("melt")

    async def resize(self, size_lb: int) -> DeviceInfo:
        self._check("resize").resize(size_lb)
        return self.device.info()

    @asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[LsidSample]]:
        self._check("watch")
        samples = self._samples()
        try:
            yield samples
        finally:
            await samples.aclose()

    async def _samples(self) -> AsyncGenerator[LsidSample, None]:
        seen: tuple[bytes, int, bool] | None = None
        while True:
            self._check("sample")
            sample = self.device.sample()
            key = (sample.uuid, sample.permanent, sample.overflow)
            if key != seen:
                seen = key
                yield sample
            else:
                await self.device.changed.next()

    async def open_log(self) -> FakeLogReader:
        self._check("open_log")
        return FakeLogReader(self)

    async def open_data(self) -> FakeDataReader:
        self._check("open_data")
        return FakeDataReader(self)


class FakeLogReader:
    def __init__(self, handle: FakeHandle) -> None:
        self.ring = handle.device.ring
        self._handle = handle

    async def read(self, lsid: int, n_pb: int) -> memoryview:
        self._handle._check("read_log")
        return self.ring.read(lsid, n_pb)

    def close(self) -> None:
        pass


class FakeDataReader:
    def __init__(self, handle: FakeHandle) -> None:
        self.size_b = len(handle.device.data)
        self._handle = handle

    async def read(self, offset_b: int, size_b: int) -> memoryview:
        device = self._handle._check("read_data")
        return memoryview(bytes(device.data[offset_b : offset_b + size_b]))

    async def close(self) -> None:
        pass
