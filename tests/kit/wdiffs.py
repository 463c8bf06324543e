"""Making wdiffs for tests: random changes, files in memory, and the plain image they stand for."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import strategies as st

from tests.kit.logs import Io, build_wlog
from walbd.errors import DiskFailed
from walbd.format.compress import CompressOpt, Kind
from walbd.format.extents import Extent
from walbd.format.wdiff_log import indexed_from_wlogs, sorted_from_wlogs
from walbd.format.wdiff_read import WdiffReader, open_wdiff

UUID = bytes(range(16))


class MemoryFile:
    """A file in memory, for reading and writing."""

    def __init__(self, data: bytes = b"", name: str = "memory") -> None:
        self.path = Path(name)
        self.data = bytearray(data)

    def pread(self, size_b: int, offset_b: int) -> bytes:
        assert size_b >= 0
        assert offset_b >= 0
        return bytes(self.data[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        part = self.pread(len(buffer), offset_b)
        buffer[: len(part)] = part
        return len(part)

    def pwrite(self, data: bytes | bytearray | memoryview, offset_b: int) -> None:
        if offset_b > len(self.data):
            raise DiskFailed("this file has no holes", path=str(self.path))
        self.data[offset_b : offset_b + len(data)] = data

    def size(self) -> int:
        return len(self.data)


class WritableImage(MemoryFile):
    """An image in memory; counts what is written."""

    n_writes = 0

    def pwrite(self, data: bytes | bytearray | memoryview, offset_b: int) -> None:
        assert offset_b + len(data) <= len(self.data)
        self.n_writes += 1
        super().pwrite(data, offset_b)

    def zero(self, offset_b: int, size_b: int) -> None:
        self.pwrite(bytes(size_b), offset_b)


def kinds() -> st.SearchStrategy[CompressOpt]:
    """Draw a quick compression."""
    return st.sampled_from([CompressOpt(kind) for kind in (Kind.NONE, Kind.SNAPPY, Kind.LZ4, Kind.ZSTD)])


def log_of(ios: Iterable[Io]) -> MemoryFile:
    """Return a wlog holding these IOs, a few in each pack."""
    ios = list(ios)
    return MemoryFile(
        build_wlog(7, 512, 0x1234, [ios[i : i + 5] for i in range(0, len(ios), 5)], uuid=UUID), "wlog"
    )


def make_sorted(ios: Iterable[Io], opt: CompressOpt, record_max_lb: int = 2048) -> MemoryFile:
    """Return a sorted wdiff with what these IOs leave behind."""
    return MemoryFile(b"".join(sorted_from_wlogs([log_of(ios)], opt, record_max_lb=record_max_lb)), "sorted.wdiff")


def make_indexed(ios: Iterable[Io], opt: CompressOpt) -> MemoryFile:
    """Return an indexed wdiff with what these IOs leave behind."""
    out = MemoryFile(name="indexed.wdiff")
    indexed_from_wlogs([log_of(ios)], out, opt)
    return out


@dataclass(frozen=True)
class Wdiff:
    """A wdiff and what it stands for."""

    ios: list[Io]
    file: MemoryFile

    def reader(self) -> WdiffReader:
        return open_wdiff(self.file)


def wdiffs(device_lb: int, max_ios: int = 12) -> st.SearchStrategy[Wdiff]:
    """Draw a wdiff of either container."""
    kind = st.sampled_from(["write", "write", "discard"])
    sizes = st.integers(1, 20)

    def place(args: tuple[str, int, int, int]) -> Io:
        kind, size, at, seed = args
        return Io(kind, at % (device_lb - size + 1), size, seed)

    ios = st.lists(
        st.tuples(kind, sizes, st.integers(0, device_lb), st.integers(0, 3)).map(place), max_size=max_ios
    )

    def make(args: tuple[list[Io], bool, CompressOpt, int]) -> Wdiff:
        found, indexed, opt, record_max_lb = args
        return Wdiff(found, make_indexed(found, opt) if indexed else make_sorted(found, opt, record_max_lb))

    return st.tuples(ios, st.booleans(), kinds(), st.sampled_from([0, 4, 2048])).map(make)


def extents(address_max_lb: int = 120, *, sources: int = 1) -> st.SearchStrategy[Extent]:
    """Draw one extent; images are told apart by their place, and a few are wanted in part only."""

    def make(args: tuple[int, int, int, int, int, int, int]) -> Extent:
        address_lb, blocks_lb, flags, data_b, before, behind, source = args
        if flags:
            return Extent(address_lb, 0, blocks_lb, 0, 0, 0, 0, 0, flags, 0)
        orig_lb = before + blocks_lb + behind
        return Extent(address_lb, data_b, blocks_lb, before, orig_lb, orig_lb * 512, data_b, source, 0, 0)

    return st.tuples(
        st.integers(0, address_max_lb),
        st.integers(1, 40),
        st.sampled_from([0, 0, 0, 2, 4]),
        st.integers(0, 5).map(lambda n: n * 100_000),
        st.integers(0, 3),
        st.integers(0, 3),
        st.integers(0, sources - 1),
    ).map(make)


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return the bytes with one kind of damage."""
    out = bytearray(data)
    match rng.randrange(5):
        case 0:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        case 1:
            del out[rng.randrange(len(out)) :]
        case 2:
            at = rng.randrange(len(out))
            out[at : at + rng.randrange(1, 64)] = rng.randbytes(rng.randrange(64))
        case 3:
            out += rng.randbytes(rng.randrange(1, 5000))
        case _:
            begin = rng.randrange(len(out))
            out[begin : begin + rng.randrange(1, 5000)] = bytes(rng.randrange(1, 5000))
    return bytes(out)
