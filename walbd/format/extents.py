"""Extents: which input holds the newest data of each range of a volume.

Readers turn files into streams of extents, sorted by address and free of overlaps; everything that combines files
(merge, apply, virtual images, conversion) works on extents and fetches data afterwards, so hidden data is never
read. Batches of extents are arrays of the struct `EXTENT`, whose layout is walb_extent in ext/src/extent.h.

Source: docs/formats.md, "wdiff: overlaps and merging".
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, Protocol

from walbd.errors import CorruptData, UsageError
from walbd.ext.extent import Merger, overlay, resolve
from walbd.format.files import ReadFile

FLAG_ALLZERO: Final = 2
FLAG_DISCARD: Final = 4
IO_MAX_LB: Final = 65535  # of a record with data: as large as a log IO can be
SOURCES_MAX: Final = 65536

EXTENT: Final = struct.Struct("<QQIIIIIHBB")
EXTENT_B: Final = EXTENT.size

PENDING_MIN: Final = 1 << 15  # extents that an ExtentMap gathers before it sorts them in
VISIBLE_MAX: Final = 1 << 19  # extents that an ExtentMap keeps in memory when it may spill: 20 MiB
_SPILL_READ_B: Final = 4096 * EXTENT_B

Check = Callable[[], None]
"""Called once per batch by long loops; it may raise to abandon the work."""


def no_check() -> None:
    """Never abandon the work."""


class Extent(NamedTuple):
    """One extent, for people and tests; the code works on arrays."""

    address_lb: int
    data_b: int  # of the stored image in its file
    blocks_lb: int
    offset_lb: int  # of this extent's data in the decompressed image
    orig_lb: int  # of the decompressed image
    data_size_b: int  # of the stored image
    checksum: int  # of the stored image
    source: int  # number of the file
    flags: int
    kind: int  # compression


def unpack_extents(extents: bytes) -> list[Extent]:
    """Return an array of extents as tuples."""
    return [Extent._make(fields) for fields in EXTENT.iter_unpack(extents)]


def last_end_lb(extents: bytes) -> int:
    """Return where the last of some extents ends."""
    address_lb, _, blocks_lb = EXTENT.unpack_from(extents, len(extents) - EXTENT_B)[:3]
    return int(address_lb + blocks_lb)


class ScratchFile(ReadFile, Protocol):
    """A file that its owner removes when it is closed."""

    def pwrite(self, data: bytes, offset_b: int) -> None: ...


def merge_extents(
    streams: Sequence[Iterable[bytes]], *, n_max: int, lb_max: int, join: bool = True
) -> Iterator[bytes]:
    """Merge sorted streams of extents, oldest first, into batches of what is visible.

    A batch has at most `n_max` extents, and the images it needs come to at most `lb_max` blocks when decompressed
    (but one image is always taken). With `join`, pieces of one image, and neighbouring ranges of the same nothing,
    come out as one. The streams are read as needed.
    """
    if len(streams) > SOURCES_MAX:
        raise UsageError("too many wdiffs at once", hint="merge them in groups", n=len(streams), n_max=SOURCES_MAX)
    merger = Merger(len(streams), join)
    iterators = [iter(stream) for stream in streams]
    while True:
        wanted = merger.run(n_max, lb_max)
        if wanted >= 0:
            extents = next(iterators[wanted], None)
            if extents is None:
                merger.finish(wanted)
            else:
                merger.feed(wanted, extents)
            continue
        batch = merger.take()
        if batch:
            yield batch
        if wanted == -2:
            return


class ExtentMap:
    """Collects extents in order of arrival and tells which parts of them are visible; later ones lie on top.

    Memory is that of the visible extents, 40 bytes each; with `scratch` (a function that makes a temporary file)
    it is bounded by `visible_max`: sorted runs are then written there and merged when they are asked for.
    """

    def __init__(
        self, scratch: Callable[[], ScratchFile] | None = None, *, visible_max: int = VISIBLE_MAX
    ) -> None:
        self._scratch = scratch
        self._visible_max = visible_max
        self._pending: list[bytes] = []  # arrived, not sorted in yet
        self._pending_b = 0
        self._visible = b""  # sorted
        self._file: ScratchFile | None = None
        self._file_b = 0
        self._runs: list[tuple[int, int]] = []  # (offset, size) in the file, oldest first

    def add(self, arrived: bytes) -> None:
        """Add extents in order of arrival."""
        self._pending.append(arrived)
        self._pending_b += len(arrived)
        if self._pending_b >= max(PENDING_MIN * EXTENT_B, len(self._visible) // 4):
            self._sort_in()

    def streams(self) -> list[Iterator[bytes]]:
        """Return sorted streams, oldest first, whose merge is what is visible now."""
        self._sort_in()
        runs = [self._read_run(offset_b, size_b) for offset_b, size_b in self._runs]
        return [*runs, iter([self._visible] if self._visible else [])]

    def _sort_in(self) -> None:
        if not self._pending:
            return
        arrived = resolve(b"".join(self._pending))
        self._pending, self._pending_b = [], 0
        self._visible = overlay(self._visible, arrived) if self._visible else arrived
        if self._scratch is not None and len(self._visible) > self._visible_max * EXTENT_B:
            self._spill(self._scratch)

    def _spill(self, scratch: Callable[[], ScratchFile]) -> None:
        if self._file is None:
            self._file = scratch()
        self._file.pwrite(self._visible, self._file_b)
        self._runs.append((self._file_b, len(self._visible)))
        self._file_b += len(self._visible)
        self._visible = b""

    def _read_run(self, offset_b: int, size_b: int) -> Iterator[bytes]:
        assert self._file is not None
        for at in range(0, size_b, _SPILL_READ_B):
            wanted = min(_SPILL_READ_B, size_b - at)
            data = self._file.pread(wanted, offset_b + at)
            if len(data) != wanted:
                raise CorruptData("a scratch file is too short", path=str(self._file.path), offset=offset_b + at)
            yield data
