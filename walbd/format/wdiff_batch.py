"""Fetching, decoding and packing the data of a batch of extents.

A batch works in three memory areas: 0 the stored images as read, 1 decoded data, 2 newly compressed data. They
are kept from batch to batch, so a `Batcher` belongs to one thread at a time, and what it returns is valid until
its next call unless it says otherwise. Plans come from walbd.ext.wdiff.

Source: docs/formats.md, "wdiff" and "Compressed payloads".
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final, Protocol, runtime_checkable

from walbd.errors import CorruptData
from walbd.ext import wdiff as ext
from walbd.ext.checksum import checksum
from walbd.ext.extent import cut_batch
from walbd.format.compress import BadPayload, CompressOpt, compress_ranges, decompress_jobs, room_for
from walbd.format.extents import EXTENT_B
from walbd.format.files import ReadFile
from walbd.format.wdiff import corrupt

READ_GAP_B: Final = 8 << 10  # bytes not wanted that are read rather than skipped: a pack header fits

FIND_BAD_MAX_LB: Final = 8 << 11  # decoded size of the images that are looked at at a time
NO_IMAGE: Final = 0xFFFFFFFF

_IMAGE: Final = struct.Struct("<QQQIIIIHBxI")  # wdiff_image of ext/src/wdiff.h
_PIECE: Final = struct.Struct("<QQQ")
_NOTHING: Final = memoryview(b"")


@runtime_checkable
class ManyReader(Protocol):
    """A file that can read many pieces in one call; real files can."""

    def pread_many(self, pieces: bytes, buffer: memoryview) -> int:
        """Read pieces (offset, size, place: u64 each) to their places in the buffer.

        Returns the number of the first one that ends beyond the end of the file, or -1.
        """


def read_pieces(file: ReadFile, pieces: bytes, buffer: memoryview) -> int:
    """Do what ManyReader.pread_many does with any file."""
    if isinstance(file, ManyReader):
        return file.pread_many(pieces, buffer)
    for i, (offset_b, size_b, at) in enumerate(_PIECE.iter_unpack(pieces)):
        if file.pread_into(buffer[at : at + size_b], offset_b) != size_b:
            return i
    return -1


class Area:
    """A buffer that grows when it must and is used again."""

    def __init__(self) -> None:
        self._view = memoryview(bytearray())

    def view(self, size_b: int) -> memoryview:
        """Return `size_b` writable bytes, whatever is in them; the view before is then no longer valid."""
        if len(self._view) < size_b:
            self._view = memoryview(bytearray(size_b + size_b // 4))
        return self._view[:size_b]


class Batcher:
    """Handles batches of extents whose sources are the numbers of `files`."""

    def __init__(self, files: Sequence[ReadFile]) -> None:
        self._files = files
        self._stored_area = Area()
        self._raw_area = Area()
        self._packed_area = Area()
        self._images = bytearray()
        self._refs = b""
        self._jobs = b""
        self._copies = b""
        self._stored = _NOTHING

    def load(self, extents: bytes) -> None:
        """Read the images that the extents need and verify their checksums; raises CorruptData."""
        self._read(extents)
        bad = ext.check_images(self._images, self._stored)
        if bad >= 0:
            raise self._bad_image(bad, "the checksum of stored data does not match")

    def find_bad(self, extents: bytes) -> dict[int, tuple[int, int]]:
        """Return, by number, the extents whose stored data is damaged: its place in the file, and its checksum."""
        found: dict[int, tuple[int, int]] = {}
        n, first = len(extents) // EXTENT_B, 0
        while first < n:
            last = cut_batch(extents, first, n, FIND_BAD_MAX_LB)
            self._read(extents[first * EXTENT_B : last * EXTENT_B])
            if ext.check_images(self._images, self._stored) >= 0:
                for i, image in enumerate(memoryview(self._refs).cast("I")):
                    if image == NO_IMAGE:
                        continue
                    data_b, at, _, size_b, _, expected = _IMAGE.unpack_from(self._images, image * _IMAGE.size)[:6]
                    computed = checksum(self._stored[at : at + size_b])
                    if computed != expected:
                        found[first + i] = data_b, computed
            first = last
        return found

    def _read(self, extents: bytes) -> None:
        self._images, self._refs, reads, size_b = ext.plan_images(extents, READ_GAP_B)
        self._stored = stored = self._stored_area.view(size_b)
        for source, pieces in reads:
            short = read_pieces(self._files[source], pieces, stored)
            if short >= 0:
                offset_b = _PIECE.unpack_from(pieces, short * _PIECE.size)[0]
                raise corrupt("the file ends within stored data", self._files[source].path, offset_b)

    def load_in_place(self, extents: bytes, data: memoryview, base_b: int) -> None:
        """Take the images from memory: `data` is what lies at `base_b` of their file.

        Checksums are not verified; those of raw images must be right, as they may go into a pack."""
        self._images, self._refs = ext.plan_images_in_place(extents, base_b, len(data))
        self._stored = data

    def plan_decode(self, extents: bytes, targets: bytes, size_b: int) -> int:
        """Plan to put the decoded data of each loaded extent at its target (u64 each; all ones for nowhere) in a
        buffer whose first `size_b` bytes hold all targets; return how large the buffer must be in all."""
        self._jobs, self._copies, raw_b = ext.plan_flat(extents, self._refs, self._images, targets, size_b)
        return raw_b

    def raw(self, size_b: int) -> memoryview:
        """Return a buffer for `decode`, valid until the next batch."""
        return self._raw_area.view(size_b)

    def decode(self, raw: memoryview, fills: bytes) -> None:
        """Carry the plan out, and write zeros where `fills` says; raises CorruptData."""
        self._decompress(self._jobs, raw)
        if self._copies or fills:
            ext.copy_all(self._copies + fills, self._stored, raw)

    def decode_all(self, extents: bytes) -> None:
        """Decode every loaded extent to see whether it can be done; raises CorruptData."""
        targets, _, _, _, size_b = ext.plan_runs(extents, True, 1)
        self.decode(self.raw(self.plan_decode(extents, targets, size_b)), b"")

    def pack(self, extents: bytes, opt: CompressOpt, *, header: bool = True) -> tuple[bytes, bytes]:
        """Return the loaded extents as a pack stored as `opt` wants, or only its data area; and the items.

        Records that are not cut and stored that way already go through as they are. The result is new memory.
        """
        items, jobs, raw_b, todo = ext.plan_pack(extents, self._refs, self._images, opt.kind)
        raw = self._raw_area.view(raw_b)
        self._decompress(jobs, raw)
        packed = self._packed_area.view(room_for(todo) if todo else 0)
        results = compress_ranges(opt, (self._stored, raw), todo, packed)
        ext.settle(items, results, opt.kind, self._stored, raw, packed)
        return ext.gather(items, self._stored, raw, packed, header), bytes(items)

    def _decompress(self, jobs: bytes, raw: memoryview) -> None:
        try:
            decompress_jobs(jobs, self._stored, raw)
        except BadPayload as exc:
            raise self._bad_image(exc.number, exc.reason) from exc

    def _bad_image(self, number: int, message: str) -> CorruptData:
        data_b, _, _, size_b, _, _, _, source, _, _ = _IMAGE.unpack_from(self._images, number * _IMAGE.size)
        return corrupt(message, self._files[source].path, data_b, size_b=size_b)
