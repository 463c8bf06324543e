"""Virtual images: a base image seen through wdiffs that are not applied.

Where a wdiff has a record, its data is shown; discarded and all-zero ranges read as zeros; the rest comes from the
base, and reads as zeros beyond its end or without one. `VirtualImage` reads anywhere and keeps only the index of
what is visible in memory (40 bytes for each extent); `virtual_chunks` goes through the image once, in memory that
does not depend on the wdiffs. Data is fetched as it is read.

Source: docs/formats.md, "wdiff: virtual images".
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Final

from walbd.errors import UsageError
from walbd.ext.extent import clip
from walbd.ext.wdiff import plan_window
from walbd.format.extents import EXTENT, EXTENT_B, Check, last_end_lb, merge_extents, no_check
from walbd.format.files import ReadFile
from walbd.format.wdiff_batch import Batcher
from walbd.format.wdiff_merge import check_inside
from walbd.format.wdiff_read import WdiffReader
from walbd.units import LB, MIB, UINT64_MAX

WINDOW_B: Final = 1 * MIB  # of the image put together at a time
_INDEX_BATCH: Final = 4096
_LARGE_LB: Final = 128  # images from this size on are cached when only a part of them is wanted
_CACHE_B: Final = 16 * MIB


class VirtualImage:
    """Reads a base image through wdiffs, oldest first. Reading is safe from several threads at once.

    The files must stay open and unchanged. Records beyond `size_b` are not shown.
    """

    def __init__(
        self, base: ReadFile | None, readers: Sequence[WdiffReader], size_b: int, *, check: Check = no_check
    ) -> None:
        """Read the indexes of all wdiffs; raises CorruptData."""
        _check_size(size_b)
        self.size_b = size_b
        self._files = [reader.file for reader in readers]
        self._windows = _Windows(base, self._files)
        self._extents = bytearray()
        for part in _merged(readers):
            check()
            self._extents += part

    @property
    def n_extents(self) -> int:
        """Return how many extents the wdiffs show; each takes 40 bytes of memory."""
        return len(self._extents) // EXTENT_B

    def check_inside(self) -> None:
        """Raise CorruptData if a wdiff has a record that ends beyond the image."""
        if self._extents:
            check_inside(bytes(self._extents[-EXTENT_B:]), self.size_b // LB, self._files)

    def read(self, offset_b: int, size_b: int) -> bytes:
        """Return `size_b` bytes from `offset_b` on, fewer only at the end of the image; raises CorruptData."""
        if offset_b < 0 or size_b < 0:
            raise ValueError("negative offset or size")
        end_b = min(offset_b + size_b, self.size_b)
        if offset_b >= end_b:
            return b""
        begin_lb, end_lb = offset_b // LB, -(-end_b // LB)
        window_lb = WINDOW_B // LB
        parts = [bytes(self._window(at, min(at + window_lb, end_lb))) for at in range(begin_lb, end_lb, window_lb)]
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        skip = offset_b - begin_lb * LB
        return data if len(data) == end_b - offset_b else data[skip : skip + end_b - offset_b]

    def chunks(self, bulk_b: int, *, check: Check = no_check) -> Iterator[memoryview]:
        """Yield the whole image in order, in pieces of `bulk_b` bytes, the last of which may be shorter.

        Each piece is memory of its own. Raises CorruptData.
        """
        _check_bulk(bulk_b)
        for begin_lb, end_lb in _window_ranges(self.size_b, bulk_b):
            check()
            yield from _pieces(self._window(begin_lb, end_lb), bulk_b)

    def _window(self, begin_lb: int, end_lb: int) -> memoryview:
        return self._windows.read(begin_lb, end_lb, clip(self._extents, begin_lb, end_lb))


def virtual_chunks(
    base: ReadFile | None,
    readers: Sequence[WdiffReader],
    size_b: int,
    bulk_b: int,
    *,
    check: Check = no_check,
) -> Iterator[memoryview]:
    """Yield a virtual image in order, in pieces of `bulk_b` bytes, the last of which may be shorter.

    All files are gone through once. Each piece is memory of its own. Raises CorruptData, also when a record ends
    beyond `size_b`.
    """
    _check_size(size_b)
    _check_bulk(bulk_b)
    files = [reader.file for reader in readers]
    windows = _Windows(base, files)
    batches = _merged(readers)
    pending = b""  # extents that end behind the windows so far
    more = True
    for begin_lb, end_lb in _window_ranges(size_b, bulk_b):
        check()
        while more and (not pending or last_end_lb(pending) < end_lb):
            batch = next(batches, None)
            if batch is None:
                more = False
            else:
                check_inside(batch, size_b // LB, files)
                pending += batch
        yield from _pieces(windows.read(begin_lb, end_lb, clip(pending, begin_lb, end_lb)), bulk_b)
        pending = clip(pending, end_lb, UINT64_MAX)
    for batch in batches:
        check_inside(batch, size_b // LB, files)


def _check_size(size_b: int) -> None:
    if size_b % LB:
        raise UsageError("the size of an image is a multiple of 512 bytes", size_b=size_b)


def _check_bulk(bulk_b: int) -> None:
    if bulk_b <= 0 or bulk_b % LB:
        raise UsageError("the piece size is a multiple of 512 bytes", bulk_b=bulk_b)


def _merged(readers: Sequence[WdiffReader]) -> Iterator[bytes]:
    streams = [reader.extents(i) for i, reader in enumerate(readers)]
    return merge_extents(streams, n_max=_INDEX_BATCH, lb_max=1 << 62)


def _window_ranges(size_b: int, bulk_b: int) -> Iterator[tuple[int, int]]:
    """Yield [begin, end) [logical block] of windows that hold whole pieces."""
    window_b = max(WINDOW_B // bulk_b, 1) * bulk_b
    for at in range(0, size_b, window_b):
        yield at // LB, min(at + window_b, size_b) // LB


def _pieces(window: memoryview, bulk_b: int) -> Iterator[memoryview]:
    for at in range(0, len(window), bulk_b):
        yield window[at : at + bulk_b]


class _Windows:
    """Puts ranges of the image together from the base and the data of extents. Safe from several threads."""

    def __init__(self, base: ReadFile | None, files: Sequence[ReadFile]) -> None:
        self._base = base
        self._files = files
        self._local = threading.local()
        self._lock = threading.Lock()  # of the cache
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()  # decoded images, least recently used first
        self._cache_b = 0

    def read(self, begin_lb: int, end_lb: int, extents: bytes) -> memoryview:
        """Return the blocks [begin_lb, end_lb); `extents` are what is visible there, clipped."""
        size_b = (end_lb - begin_lb) * LB
        if not extents:
            window = memoryview(bytearray(size_b))
            self._read_base(window, begin_lb)
            return window
        targets, fills = plan_window(extents, begin_lb)
        cached = self._large_images(extents)
        if cached:
            extents, targets = _without(extents, targets, cached)
        batcher = self._batcher()
        batcher.load(extents)
        raw = memoryview(bytearray(batcher.plan_decode(extents, targets, size_b)))
        self._read_base(raw[:size_b], begin_lb)
        batcher.decode(raw, fills)
        for extent, data in cached.values():
            address_lb, _, blocks_lb, offset_lb = extent[:4]
            at = (address_lb - begin_lb) * LB
            raw[at : at + blocks_lb * LB] = memoryview(data)[offset_lb * LB : (offset_lb + blocks_lb) * LB]
        return raw[:size_b]

    def _read_base(self, window: memoryview, begin_lb: int) -> None:
        """Fill a window of zeros with the base, as far as that goes."""
        if self._base is not None:
            self._base.pread_into(window, begin_lb * LB)

    def _large_images(self, extents: bytes) -> dict[int, tuple[tuple[int, ...], bytes]]:
        """Return, by number, the extents that need a small part of a large image, with the decoded image."""
        found: dict[int, tuple[tuple[int, ...], bytes]] = {}
        for i, extent in enumerate(EXTENT.iter_unpack(extents)):
            blocks_lb, orig_lb = extent[2], extent[4]
            if orig_lb >= _LARGE_LB and blocks_lb * 4 <= orig_lb:
                found[i] = (extent, self._image(extent))
        return found

    def _image(self, extent: tuple[int, ...]) -> bytes:
        """Return the whole decoded image that an extent belongs to, from the cache if it is there."""
        _, data_b, _, _, orig_lb, data_size_b, checksum, source, flags, kind = extent
        key = EXTENT.pack(0, data_b, orig_lb, 0, orig_lb, data_size_b, checksum, source, flags, kind)
        with self._lock:
            data = self._cache.get(key)
            if data is not None:
                self._cache.move_to_end(key)
                return data
        batcher = self._batcher()
        batcher.load(key)
        raw = batcher.raw(batcher.plan_decode(key, bytes(8), orig_lb * LB))
        batcher.decode(raw, b"")
        data = bytes(raw[: orig_lb * LB])
        with self._lock:
            if key not in self._cache:
                self._cache[key] = data
                self._cache_b += len(data)
                while self._cache_b > _CACHE_B and len(self._cache) > 1:
                    self._cache_b -= len(self._cache.popitem(last=False)[1])
        return data

    def _batcher(self) -> Batcher:
        batcher: Batcher | None = getattr(self._local, "batcher", None)
        if batcher is None:
            batcher = self._local.batcher = Batcher(self._files)
        return batcher


def _without(
    extents: bytes, targets: bytes, left_out: dict[int, tuple[tuple[int, ...], bytes]]
) -> tuple[bytes, bytes]:
    kept = [i for i in range(len(extents) // EXTENT_B) if i not in left_out]
    return (
        b"".join(extents[i * EXTENT_B : (i + 1) * EXTENT_B] for i in kept),
        b"".join(targets[i * 8 : (i + 1) * 8] for i in kept),
    )
