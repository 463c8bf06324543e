"""The compressions of wdiffs and of the wire: each payload on its own, in one call, without any framing of ours.

    id  name    bytes                                        level
    0   none    raw
    1   gzip    a zlib stream (RFC 1950), not gzip           1..9, 0 means 6
    2   snappy  a raw snappy block
    3   lzma    one .xz stream                               1..6, 0 means 6
    4   lz4     a raw LZ4 block without a size
    5   zstd    one frame with its content size              1..19, 0 means 1

The decompressed size is never stored: the reader knows it, and any other size is an error. What does not become
strictly smaller is stored raw as `none`. The libraries release the GIL; contexts are kept per thread.

Source: docs/formats.md, "Compressed payloads".
"""

from __future__ import annotations

import enum
import lzma
import struct
import threading
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

import cramjam

from walbd.errors import CorruptData, UsageError
from walbd.ext.buffers import Buf

_LZMA_MEMORY_MAX_B: Final = 128 << 20  # enough for every preset; a hostile header cannot ask for more

RANGE_IN: Final = struct.Struct("<QQQ")  # memory area, place, size [byte]: a range to compress
_JOB: Final = struct.Struct("<QQIIII")  # wdiff_job of ext/src/wdiff.h


class Kind(enum.IntEnum):
    """How a payload is compressed; the values are on disk."""

    NONE = 0
    GZIP = 1
    SNAPPY = 2
    LZMA = 3
    LZ4 = 4
    ZSTD = 5

    @property
    def text(self) -> str:
        return self.name.lower()


KIND_BY_NAME: Final = {kind.text: kind for kind in Kind}
_LEVEL_MAX: Final = {Kind.GZIP: 9, Kind.LZMA: 6, Kind.ZSTD: 19}
_LEVEL_DEFAULT: Final = {Kind.GZIP: 6, Kind.LZMA: 6, Kind.ZSTD: 1}


@dataclass(frozen=True, slots=True)
class CompressOpt:
    """How to compress; level 0 is the default of the kind."""

    kind: Kind = Kind.ZSTD
    level: int = 0

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read KIND[:LEVEL], such as `lz4` or `zstd:3`; raises UsageError."""
        name, colon, level_text = text.partition(":")
        kind = KIND_BY_NAME.get(name)
        if kind is None:
            raise UsageError("unknown compression", hint=f"use one of {', '.join(KIND_BY_NAME)}", compress=text)
        if not colon:
            return cls(kind)
        level_max = _LEVEL_MAX.get(kind, 9)
        if not (level_text.isascii() and level_text.isdigit() and int(level_text) <= level_max):
            raise UsageError(
                "bad compression level",
                hint=f"{name} takes levels 0 (the default) to {level_max}"
                + ("; readers of old wdiffs cannot decode higher ones" if kind is Kind.LZMA else ""),
                compress=text,
            )
        return cls(kind, int(level_text))

    def __str__(self) -> str:
        return f"{self.kind.text}:{self.level}" if self.level else self.kind.text


class BadPayload(Exception):
    """A payload of a batch does not decompress; whoever knows its file turns this into CorruptData."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(reason)
        self.number = number  # of the image in the batch
        self.reason = reason


def compress(opt: CompressOpt, data: Buf) -> tuple[Kind, Buf]:
    """Compress one payload; returns (NONE, data itself) when that does not make it smaller."""
    if opt.kind is not Kind.NONE and len(data):
        packed = _compressor(opt)(data)
        if len(packed) < len(data):
            return opt.kind, packed
    return Kind.NONE, data


def decompress(kind: int, data: Buf, size_b: int, *, source: str = "payload", offset: int = 0) -> bytes:
    """Decompress one payload that has to give exactly `size_b` bytes; raises CorruptData (with these facts)."""
    out = bytearray(size_b)
    try:
        _decompress_into(kind, memoryview(data), memoryview(out), 0)
    except BadPayload as exc:
        raise CorruptData(exc.reason, source=source, offset=offset) from exc
    return bytes(out)


def compress_ranges(opt: CompressOpt, areas: Sequence[memoryview], todo: bytes, out: memoryview) -> bytes:
    """Compress many ranges of some buffers, one payload each, into `out`, one behind the other.

    `todo` holds RANGE_IN structs. `out` must have `room_for` bytes. Returns two u64 for each range: place in `out`
    and size, or size 0 where the range did not shrink. Kind none has no results at all: everything stays as it is.
    """
    if opt.kind is Kind.NONE:
        return b""
    results: list[int] = []
    at = 0
    if opt.kind is Kind.SNAPPY:
        compress_into = cramjam.snappy.compress_raw_into
        for area, begin, size in RANGE_IN.iter_unpack(todo):
            n = compress_into(areas[area][begin : begin + size], out[at:])
            if n < size:
                results += (at, n)
                at += n
            else:
                results += (0, 0)
    else:
        compressor = _compressor(opt)
        for area, begin, size in RANGE_IN.iter_unpack(todo):
            packed = compressor(areas[area][begin : begin + size])
            n = len(packed)
            if n < size:
                out[at : at + n] = packed
                results += (at, n)
                at += n
            else:
                results += (0, 0)
    return struct.pack(f"<{len(results)}Q", *results)


def room_for(todo: bytes) -> int:
    """Return how large the output of `compress_ranges` must be for these ranges [byte]."""
    sizes = memoryview(todo).cast("Q")[2::3].tolist()
    return sum(sizes) + max(sizes, default=0) // 6 + 64  # what does not shrink needs room only while it is tried


def decompress_jobs(jobs: bytes, stored: memoryview, raw: memoryview) -> None:
    """Decompress each payload of `stored` to its place in `raw`; `jobs` holds wdiff_job structs.

    Raises BadPayload with the number of the image when a payload is damaged or has another size than expected.
    """
    for stored_at, raw_at, stored_b, raw_b, kind, image in _JOB.iter_unpack(jobs):
        _decompress_into(kind, stored[stored_at : stored_at + stored_b], raw[raw_at : raw_at + raw_b], image)


def _decompress_into(kind: int, data: memoryview, out: memoryview, number: int) -> None:
    decompressor = _DECOMPRESSORS.get(kind)
    if decompressor is None:
        raise BadPayload(number, "unknown compression of a payload")
    try:
        n = decompressor(data, out)
    except _decode_errors() as exc:
        raise BadPayload(number, f"a payload does not decompress as {Kind(kind).text}") from exc
    if n != len(out):
        raise BadPayload(number, "a payload has a wrong decompressed size")


def _decode_errors() -> tuple[type[Exception], ...]:
    """Return what the libraries raise for bad input; looked at only when something was raised."""
    import zstandard

    return (
        ValueError,
        MemoryError,
        zlib.error,
        lzma.LZMAError,
        cramjam.DecompressionError,
        zstandard.ZstdError,
    )


def _none_into(data: memoryview, out: memoryview) -> int:
    if len(data) == len(out):
        out[:] = data
    return len(data)


def _gzip_into(data: memoryview, out: memoryview) -> int:
    stream = zlib.decompressobj()
    raw = stream.decompress(data, len(out) + 1)  # one more, so that the end of the stream is looked at
    if len(raw) != len(out):
        return len(raw)
    if not stream.eof or stream.unused_data:
        raise ValueError("not one whole zlib stream")
    out[:] = raw
    return len(raw)


def _snappy_into(data: memoryview, out: memoryview) -> int:
    return int(cramjam.snappy.decompress_raw_into(data, out))


def _lz4_into(data: memoryview, out: memoryview) -> int:
    return int(cramjam.lz4.decompress_block_into(data, out, len(out)))


def _lzma_into(data: memoryview, out: memoryview) -> int:
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY_MAX_B)
    raw = stream.decompress(data, len(out) + 1)
    if len(raw) != len(out):
        return len(raw)
    if not stream.eof or stream.unused_data:
        raise ValueError("not one whole xz stream")
    out[:] = raw
    return len(raw)


def _zstd_into(data: memoryview, out: memoryview) -> int:
    import zstandard  # late: slow to import, and not every command needs it

    size = zstandard.frame_content_size(data)
    if size not in (-1, len(out)):  # before anything is allocated for what the frame claims
        return int(size)
    context = getattr(_contexts, "zstd_decompressor", None)
    if context is None:
        context = _contexts.zstd_decompressor = zstandard.ZstdDecompressor()
    raw = context.decompress(data, max_output_size=len(out), allow_extra_data=False)
    if len(raw) == len(out):
        out[:] = raw
    return len(raw)


_contexts = threading.local()

_DECOMPRESSORS: Final[dict[int, Callable[[memoryview, memoryview], int]]] = {
    Kind.NONE: _none_into,
    Kind.GZIP: _gzip_into,
    Kind.SNAPPY: _snappy_into,
    Kind.LZMA: _lzma_into,
    Kind.LZ4: _lz4_into,
    Kind.ZSTD: _zstd_into,
}


def _compressor(opt: CompressOpt) -> Callable[[Buf], Buf]:
    """Return a function that compresses one payload; it belongs to this thread."""
    level = opt.level or _LEVEL_DEFAULT.get(opt.kind, 0)
    match opt.kind:
        case Kind.GZIP:
            return lambda data: zlib.compress(data, level)
        case Kind.SNAPPY:
            return lambda data: bytes(cramjam.snappy.compress_raw(data))
        case Kind.LZMA:
            return lambda data: lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC64, level)
        case Kind.LZ4:
            from lz4 import block

            lz4_compress = block.compress
            return lambda data: lz4_compress(data, store_size=False)
        case Kind.ZSTD:
            import zstandard

            contexts: dict[int, Any] | None = getattr(_contexts, "zstd_compressors", None)
            if contexts is None:
                contexts = _contexts.zstd_compressors = {}
            if level not in contexts:
                contexts[level] = zstandard.ZstdCompressor(level=level)
            return contexts[level].compress  # type: ignore[no-any-return]
    raise AssertionError(opt)
