"""Virtual images: a base image seen through wdiffs that are not applied.

Where a wdiff has a record, its data is shown; discarded and all-zero ranges read as zeros; the rest comes from the
base, and reads as zeros beyond its end or without one. Only the index of what is visible is kept in memory
(40 bytes for each extent); data is fetched as it is read.

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
from walbd.format.extents import EXTENT, EXTENT_B, Check, merge_extents, no_check
from walbd.format.files import ReadFile
from walbd.format.wdiff_batch import Batcher
from walbd.format.wdiff_merge import check_inside
from walbd.format.wdiff_read import WdiffReader
from walbd.units import LB, MIB

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
        if size_b % LB:
            raise UsageError("the size of an image is a multiple of 512 bytes", size_b=size_b)
        self.size_b = size_b
        self._base = base
        self._files = [reader.file for reader in readers]
        parts = []
        for part in merge_extents(
            [reader.extents(i) for i, reader in enumerate(readers)], n_max=_INDEX_BATCH, lb_max=1 << 62
        ):
            check()
            parts.append(part)
        self._extents = b"".join(parts)
        self._local = threading.local()
        self._cache: OrderedDict[bytes, bytes] = OrderedDict()
        self._cache_b = 0
        self._lock = threading.Lock()

    @property
    def n_extents(self) -> int:
        """Return how many extents the wdiffs show; each takes 40 bytes of memory."""
        return len(self._extents) // EXTENT_B

    def check_inside(self) -> None:
        """Raise CorruptData if a wdiff has a record that ends beyond the image."""
        if self._extents:
            check_inside(self._extents, self.size_b // LB, self._files)

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
        return data if skip == 0 and len(data) == end_b - offset_b else data[skip : skip + end_b - offset_b]

    def chunks(self, bulk_b: int, *, check: Check = no_check) -> Iterator[memoryview]:
        """Yield the whole image in order, in pieces of `bulk_b` bytes, the last of which may be shorter.

        Each piece is memory of its own. Raises CorruptData.
        """
        if bulk_b <= 0 or bulk_b % LB:
            raise UsageError("the piece size is a multiple of 512 bytes", bulk_b=bulk_b)
        window_b = max(WINDOW_B // bulk_b, 1) * bulk_b
        for at in range(0, self.size_b, window_b):
            check()
            end_b = min(at + window_b, self.size_b)
            window = self._window(at // LB, end_b // LB)
            for piece in range(0, end_b - at, bulk_b):
                yield window[piece : piece + bulk_b]

    def _window(self, begin_lb: int, end_lb: int) -> memoryview:
        """Return the blocks [begin_lb, end_lb)."""
        size_b = (end_lb - begin_lb) * LB
        extents = clip(self._extents, begin_lb, end_lb)
        if not extents:
            window = memoryview(bytearray(size_b))
            self._read_base(window, begin_lb * LB)
            return window
        batcher = self._batcher()
        cached = self._take_large(extents)
        targets, fills = plan_window(extents, begin_lb)
        if cached:
            # Nowhere in the plan: they are put in from the cache below.
            extents, targets = _without(extents, targets, cached)
        batcher.load(extents)
        raw = memoryview(bytearray(batcher.plan_decode(extents, targets, size_b)))
        self._read_base(raw[:size_b], begin_lb * LB)
        batcher.decode(raw, fills)
        for extent, data in cached.values():
            address_lb, _, blocks_lb, offset_lb = extent[:4]
            at = (address_lb - begin_lb) * LB
            raw[at : at + blocks_lb * LB] = memoryview(data)[offset_lb * LB : (offset_lb + blocks_lb) * LB]
        return raw[:size_b]

    def _read_base(self, window: memoryview, offset_b: int) -> None:
        """Fill a window of zeros with the base, as far as that goes."""
        if self._base is not None:
            self._base.pread_into(window, offset_b)

    def _take_large(self, extents: bytes) -> dict[int, tuple[tuple[int, ...], bytes]]:
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
