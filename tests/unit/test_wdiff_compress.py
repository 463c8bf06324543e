"""Compression: options, round trips, batches, and payloads that lie."""

from __future__ import annotations

import random
import struct
import threading
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from walbd.errors import CorruptData, UsageError
from walbd.format.compress import (
    RANGE_IN,
    CompressOpt,
    Kind,
    compress,
    compress_ranges,
    decompress,
    decompress_jobs,
    room_for,
)

TEXT = b"".join(b"%d bottles of beer on the wall; " % i for i in range(500))
OPTS = [
    CompressOpt.parse(text)
    for text in ("none", "gzip", "gzip:1", "snappy", "lzma", "lzma:1", "lz4", "zstd", "zstd:3", "zstd:19")
]


@pytest.mark.parametrize("opt", OPTS, ids=str)
def test_round_trip(opt: CompressOpt) -> None:
    kind, packed = compress(opt, TEXT)
    assert kind is opt.kind
    assert kind is Kind.NONE or len(packed) < len(TEXT)
    assert decompress(kind, packed, len(TEXT)) == TEXT
    assert CompressOpt.parse(str(opt)) == opt


@pytest.mark.parametrize("opt", OPTS, ids=str)
@pytest.mark.parametrize("size_b", [0, 1, 512])
def test_what_does_not_shrink_is_stored_raw(opt: CompressOpt, size_b: int) -> None:
    data = random.Random(1).randbytes(size_b)
    assert compress(opt, data) == (Kind.NONE, data)
    assert decompress(Kind.NONE, data, size_b) == data


def test_framing() -> None:
    """The bytes are what other readers expect."""
    magic = {kind: bytes(compress(CompressOpt(kind), TEXT)[1]) for kind in Kind}
    assert zlib.decompress(magic[Kind.GZIP]) == TEXT
    assert magic[Kind.LZMA].startswith(b"\xfd7zXZ\x00\x00\x04")  # xz with CRC64
    assert magic[Kind.ZSTD].startswith(b"\x28\xb5\x2f\xfd")
    size, shift = 0, 0
    for byte in magic[Kind.SNAPPY]:  # a varint of the size
        size |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            break
    assert size == len(TEXT)


@pytest.mark.parametrize("kind", [k for k in Kind if k is not Kind.NONE])
def test_another_size_is_an_error(kind: Kind) -> None:
    _, packed = compress(CompressOpt(kind), TEXT)
    for size_b in (0, 1, len(TEXT) - 1, len(TEXT) + 1, 10 * len(TEXT)):
        with pytest.raises(CorruptData) as caught:
            decompress(kind, packed, size_b, source="file", offset=99)
        assert (caught.value.facts["source"], caught.value.facts["offset"]) == ("file", 99)


def test_unknown_kinds_are_an_error() -> None:
    with pytest.raises(CorruptData, match="unknown compression"):
        decompress(6, b"x", 512)


@given(st.sampled_from(list(Kind)), st.integers(0, 2**32), st.integers(0, 3), st.sampled_from([0, -1, 1, 9999]))
@settings(max_examples=300)
def test_damaged_payloads(kind: Kind, seed: int, how: int, off: int) -> None:
    rng = random.Random(seed)
    data = bytearray(compress(CompressOpt(kind), TEXT[:2048])[1])
    match how:
        case 0:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:
            del data[rng.randrange(len(data)) :]
        case 2:
            data += rng.randbytes(rng.randrange(1, 20))
        case _:
            data = bytearray(rng.randbytes(rng.randrange(100)))
    size_b = max(2048 + off, 0)
    try:
        assert len(decompress(kind, data, size_b)) == size_b
    except CorruptData:
        pass


def test_a_frame_that_claims_terabytes_is_refused_at_once() -> None:
    frame = b"\x28\xb5\x2f\xfd\xe0" + (1 << 42).to_bytes(8, "little") + b"\x01\x00\x00"
    with pytest.raises(CorruptData):
        decompress(Kind.ZSTD, frame, 512)
    with pytest.raises(CorruptData):
        decompress(Kind.SNAPPY, b"\xff\xff\xff\xff\x0f" + TEXT, 512)


@pytest.mark.parametrize("opt", OPTS, ids=str)
def test_batches(opt: CompressOpt) -> None:
    rng = random.Random(3)
    areas = (memoryview(TEXT), memoryview(rng.randbytes(8192)))
    ranges = [(rng.randrange(2), rng.randrange(4096), 512 * rng.randrange(1, 8)) for _ in range(40)]
    todo = b"".join(RANGE_IN.pack(*r) for r in ranges)
    out = memoryview(bytearray(room_for(todo)))
    results = list(struct.iter_unpack("<QQ", compress_ranges(opt, areas, todo, out)))
    if opt.kind is Kind.NONE:
        assert results == []
        return
    jobs, raw, expected = b"", bytearray(), b""
    for number, ((area, begin, size), (at, packed_b)) in enumerate(zip(ranges, results, strict=True)):
        data = areas[area][begin : begin + size]
        assert packed_b < size
        if packed_b:
            jobs += struct.pack("<QQIIII", at, len(raw), packed_b, size, opt.kind, number)
            raw += bytes(size)
            expected += data
        else:
            assert compress(opt, data)[0] is Kind.NONE
    assert len(jobs) > 32 * 5
    decompress_jobs(jobs, out, memoryview(raw))
    assert raw == expected


def test_contexts_are_per_thread() -> None:
    failures: list[object] = []

    def work() -> None:
        for opt in OPTS * 3:
            kind, packed = compress(opt, TEXT)
            if decompress(kind, packed, len(TEXT)) != TEXT:
                failures.append(opt)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


@pytest.mark.parametrize(
    "text", ["", "zip", "zstd:", "zstd:20", "zstd:-1", "zstd:1:2", "lzma:7", "gzip:10", "LZ4", "zstd:²"]
)
def test_bad_options(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        CompressOpt.parse(text)
    assert caught.value.hint


def test_options() -> None:
    assert CompressOpt.parse("zstd:1") == CompressOpt(Kind.ZSTD, 1)
    assert CompressOpt.parse("snappy:0") == CompressOpt(Kind.SNAPPY)
    assert str(CompressOpt(Kind.LZ4)) == "lz4"
