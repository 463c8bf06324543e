"""What the formats need of an open file.

The formats stand below `walbd.fs` and never open, rename or sync anything. These protocols are the part of
`walbd.fs.File` that they use, so any File can be passed in as it is.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Protocol


class ReadFile(Protocol):
    """An open file or device that can be read. Offsets and sizes are bytes."""

    path: Path

    def pread(self, size_b: int, offset_b: int) -> bytes:
        """Read `size_b` bytes; shorter only at the end of the file."""

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        """Fill `buffer`; return how much was read, short only at the end of the file."""

    def size(self) -> int:
        """Return the size in bytes."""


def aligned_buffer(size_b: int) -> memoryview:
    """Return a zeroed buffer of `size_b` bytes at a page boundary, as direct IO wants it."""
    return memoryview(mmap.mmap(-1, max(size_b, 1)))[:size_b]


def read_aligned(file: ReadFile, size_b: int, offset_b: int) -> memoryview:
    """Read `size_b` bytes into a new aligned buffer: for small reads of files that may be open for direct IO.

    Offset and size are multiples of 4096 then. Shorter only at the end of the file.
    """
    buffer = aligned_buffer(size_b)
    return buffer[: file.pread_into(buffer, offset_b)]
