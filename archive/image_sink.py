"""Writing what differs into the base image itself: the destination of a resync (docs/archive.md, "Replication").

The packs that come are verified like those of any wdiff, and then applied. The image is compared and written at
the same time; what is written somewhere was compared there before (walbd.daemon.hash_sync).
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from walbd.format.extents import Check, no_check
from walbd.format.wdiff import END_PACK, HEADER_B, WdiffHeader, WdiffType
from walbd.format.wdiff_read import open_wdiff
from walbd.format.wdiff_stream import PackVerifier, check_stream_header
from walbd.fs import File, failpoints
from walbd.fs.disk import disk_errors
from walbd.fs.wdiff_apply import apply
from walbd.ids import NIL_UUID

FP_MID_WRITE: Final = failpoints.register(
    "archive.repl_resync.mid_write", "SyncReady; the image is a mixture of what it was and what it shall be"
)


class ImageSink:
    """A base image into which a stream of packs is written (`walbd.daemon.hash_sync.DiffSink`).

    It owns `file`. Records beyond `size_lb` are refused.
    """

    def __init__(self, file: File, *, size_lb: int, source: str, check: Check = no_check) -> None:
        self.written_b = 0  # received
        self._file = file
        self._size_lb = size_lb
        self._source = source
        self._check = check
        self._verifier = PackVerifier(size_lb=size_lb, source=source)

    @property
    def size_b(self) -> int:
        """Size of the image [byte]."""
        return self._file.size()

    def read(self, offset_b: int, size_b: int) -> bytes:
        """Read from the image, for comparing."""
        return self._file.pread(size_b, offset_b)

    def feed(self, piece: memoryview) -> None:
        """Verify whole packs, the first of them behind the file header, and write them. Raises CorruptData."""
        if self.written_b == 0:
            check_stream_header(piece, self._source)
            piece = piece[HEADER_B:]
        self._verifier.feed_all(piece)
        end = b"" if self._verifier.ended else END_PACK
        wdiff = open_wdiff(_Bytes(b"".join((_HEADER, piece, end)), self._source))
        apply([wdiff], self._file, size_lb=self._size_lb, check=self._check)
        self.written_b += HEADER_B + len(piece)
        with disk_errors(self._file.path, "write"):
            failpoints.hit(FP_MID_WRITE)

    def sync(self) -> None:
        """Make what was written durable."""
        self._file.sync()

    def finish(self) -> None:
        """Check that the stream was complete, and make all of it durable."""
        self._verifier.finish()
        self._file.sync()

    def close(self) -> None:
        """Close the image."""
        self._file.close()


_HEADER: Final = WdiffHeader(WdiffType.SORTED, NIL_UUID).pack()


class _Bytes:
    """A wdiff in memory (`walbd.format.files.ReadFile`)."""

    def __init__(self, data: bytes, source: str) -> None:
        self.path = Path(source)
        self._data = memoryview(data)

    def pread(self, size_b: int, offset_b: int) -> bytes:
        return bytes(self._data[offset_b : offset_b + size_b])

    def pread_into(self, buffer: bytearray | memoryview, offset_b: int) -> int:
        part = self._data[offset_b : offset_b + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def size(self) -> int:
        return len(self._data)
