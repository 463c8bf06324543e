"""Damaged wdiffs, and files and streams that lie: always the typed error, never invented data or lost memory."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import Io, image_of
from tests.kit.wdiffs import (
    UUID,
    MemoryFile,
    Wdiff,
    WritableImage,
    damage,
    make_sorted,
    wdiffs,
)
from tests.reference.extent import visible
from walbd.errors import CorruptData
from walbd.ext.checksum import checksum
from walbd.format.compress import CompressOpt, Kind
from walbd.format.extents import Extent
from walbd.format.virtual import VirtualImage
from walbd.format.wdiff import END_PACK, INDEX_RECORD, PACK_B, RECORD, WdiffHeader, WdiffType
from walbd.format.wdiff_merge import merge, verify
from walbd.format.wdiff_read import SortedReader, WdiffReader, open_wdiff
from walbd.format.wdiff_stream import PackVerifier
from walbd.fs.wdiff_apply import apply

DEVICE_LB = 150
BASE = random.Random(0).randbytes(DEVICE_LB * 512)
NONE, LZ4 = CompressOpt(Kind.NONE), CompressOpt(Kind.LZ4)


def expected_image(wdiff: Wdiff) -> bytes:
    return image_of(BASE, [wdiff.ios])


def read_all(reader: WdiffReader) -> bytes:
    return VirtualImage(MemoryFile(BASE), [reader], len(BASE)).read(0, len(BASE))


def outcomes(data: bytes, expected: bytes) -> None:
    """Whatever the bytes are: CorruptData with its facts, or the right result."""
    file = MemoryFile(data)
    image = WritableImage(BASE)
    for action in (
        lambda: verify(open_wdiff(file)),
        lambda: b"".join(merge([open_wdiff(file)], NONE)),
        lambda: read_all(open_wdiff(file)) == expected or pytest.fail("invented data"),
        lambda: apply([open_wdiff(file)], image) >= 0 and (image.data == expected or pytest.fail("invented data")),
    ):
        error: CorruptData | None = None
        try:
            action()
        except CorruptData as exc:
            error = exc
        if error is not None:
            assert {"path", "offset"} <= set(error.facts)
            assert error.hint
            assert error.facts["path"] == str(file.path)


@given(wdiffs(DEVICE_LB), st.integers(0, 2**32))
@settings(max_examples=150)
def test_damaged_files(wdiff: Wdiff, seed: int) -> None:
    outcomes(damage(bytes(wdiff.file.data), random.Random(seed)), expected_image(wdiff))


def test_every_flipped_bit_is_found() -> None:
    ios = [Io("write", 3, 2, seed=1), Io("write", 9, 1, seed=0), Io("discard", 20, 3)]
    for opt in (NONE, LZ4):
        good = bytes(make_sorted(ios, opt).data)
        for at in [*range(0, 160), *range(PACK_B, len(good), 97)]:
            bad = bytearray(good)
            bad[at] ^= 1 << at % 8
            with pytest.raises(CorruptData):
                verify(open_wdiff(MemoryFile(bytes(bad))))
        for end in [0, 31, 32, 33, 4127, 4128, 4129, len(good) - 4096, len(good) - 1]:
            with pytest.raises(CorruptData):
                verify(open_wdiff(MemoryFile(good[:end])))
        with pytest.raises(CorruptData, match="follows the end pack"):
            verify(open_wdiff(MemoryFile(good + b"\0")))


def test_random_bytes_are_no_wdiff() -> None:
    rng = random.Random(1)
    for _ in range(50):
        with pytest.raises(CorruptData):
            open_wdiff(MemoryFile(rng.randbytes(rng.randrange(10_000))))


def resealed_pack(pack: bytearray) -> bytes:
    pack[:4] = bytes(4)
    pack[:4] = checksum(pack).to_bytes(4, "little")
    return bytes(pack)


def test_lies_with_good_checksums_do_not_cost_memory() -> None:
    """Sizes are compared with the file before anything is allocated for them."""
    header = WdiffHeader(WdiffType.SORTED, UUID).pack()
    pack = bytearray(PACK_B)
    struct.pack_into("<HBxI", pack, 4, 1, 0, 65535 * 512)
    RECORD.pack_into(pack, 16, 0, 65535, 0, 0, 0, 0, 65535 * 512, 0, 0)
    with pytest.raises(CorruptData, match="ends within the data"):
        verify(open_wdiff(MemoryFile(header + resealed_pack(pack) + bytes(100))))
    RECORD.pack_into(pack, 16, 0, 2**32 - 1, 0, 5, 0, 0, 2**32 - 1, 0, 0)
    struct.pack_into("<I", pack, 8, 2**32 - 1)
    with pytest.raises(CorruptData, match="larger than any IO"):
        verify(open_wdiff(MemoryFile(header + resealed_pack(pack) + END_PACK)))


def indexed_file(data: bytes, *records: bytes, **fields: int) -> MemoryFile:
    body = WdiffHeader(WdiffType.INDEXED, UUID).pack() + data
    body += bytes(-len(body) % 8)
    index = b"".join(r[:44] + checksum(r[:44] + bytes(4)).to_bytes(4, "little") for r in records)
    block = struct.pack(
        "<QIIII",
        fields.get("index_b", len(body)),
        fields.get("n_records", len(records)),
        fields.get("n_data", 0),
        0,
        0,
    )
    block = block[:20] + checksum(block).to_bytes(4, "little")
    return MemoryFile(body + index + block)


def record(address_lb: int = 8, blocks_lb: int = 4, **fields: int) -> bytes:
    values = {
        "flags": 0,
        "kind": 0,
        "data_b": 32,
        "size_b": 2048,
        "offset_lb": 0,
        "orig_lb": 4,
        "csum": 0,
    } | fields
    return INDEX_RECORD.pack(
        address_lb,
        blocks_lb,
        values["flags"],
        values["kind"],
        0,
        values["data_b"],
        values["size_b"],
        values["offset_lb"],
        values["orig_lb"],
        0,
        values["csum"],
        0,
    )


DATA = random.Random(7).randbytes(2048)


def test_an_index_made_by_hand() -> None:
    good = record(csum=checksum(DATA))
    reader = open_wdiff(indexed_file(DATA, good))
    assert verify(reader) == 1
    expected = BASE[: 8 * 512] + DATA + BASE[12 * 512 :]
    assert read_all(reader) == expected


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (indexed_file(DATA, record(blocks_lb=0)), "no blocks"),
        (indexed_file(DATA, record(blocks_lb=3)), "power of two"),
        (indexed_file(DATA, record(address_lb=2)), "power of two"),
        (indexed_file(DATA, record(offset_lb=1)), "outside its image"),
        (indexed_file(DATA, record(offset_lb=2**32 - 4)), "outside its image"),
        (indexed_file(DATA, record(data_b=31)), "where it must be"),
        (indexed_file(DATA, record(data_b=33)), "where it must be"),
        (indexed_file(DATA, record(data_b=2**64 - 1)), "where it must be"),
        (indexed_file(DATA, record(size_b=2047)), "data size"),
        (indexed_file(DATA, record(orig_lb=70000, size_b=70000 * 512)), "larger than any IO"),
        (indexed_file(DATA, record(kind=6)), "unknown compression"),
        (indexed_file(DATA, record(flags=2)), "data size"),
        (indexed_file(DATA, record(flags=6)), "flags"),
        (indexed_file(DATA, record(flags=8)), "flags"),
        (indexed_file(DATA, record(address_lb=2**63)), "no volume has"),
        (indexed_file(DATA, record(), record()), "overlaps its predecessor"),
        (indexed_file(DATA, record(), record(address_lb=4)), "overlaps its predecessor"),
        (indexed_file(DATA, record(csum=1)), "stored data"),
        (indexed_file(DATA, record(kind=2, csum=checksum(DATA))), "decompress as snappy"),
        (indexed_file(DATA, record(), n_records=2), "where it must"),
        (indexed_file(DATA, record(), n_records=2**32 - 1), "where it must"),
        (indexed_file(DATA, record(), index_b=33), "impossible offset"),
        (indexed_file(DATA, record(), index_b=0), "impossible offset"),
        (indexed_file(DATA, record(), index_b=2**64 - 8), "where it must"),
        (MemoryFile(WdiffHeader(WdiffType.INDEXED, UUID).pack()), "before its index"),
        (MemoryFile(WdiffHeader(WdiffType.INDEXED, UUID).pack() + bytes(23)), "before its index"),
        (MemoryFile(WdiffHeader(WdiffType.INDEXED, UUID).pack() + bytes(24)), "impossible offset"),
    ],
)
def test_bad_indexes(file: MemoryFile, message: str) -> None:
    with pytest.raises(CorruptData, match=message) as caught:
        verify(open_wdiff(file))
    assert {"path", "offset"} <= set(caught.value.facts)
    assert caught.value.hint


def test_images_that_overlap_are_no_problem() -> None:
    """Nothing forbids it, and a reader must not be led astray by it."""
    file = indexed_file(
        DATA,
        record(address_lb=0, blocks_lb=1, data_b=32, size_b=512, orig_lb=1, csum=checksum(DATA[:512])),
        record(address_lb=1, blocks_lb=1, data_b=32, size_b=1024, orig_lb=2, csum=checksum(DATA[:1024])),
        record(address_lb=2, blocks_lb=1, data_b=544, size_b=512, orig_lb=1, csum=checksum(DATA[512:1024])),
        record(address_lb=4, blocks_lb=4, csum=checksum(DATA)),
    )
    expected = DATA[:512] + DATA[:512] + DATA[512:1024] + BASE[1536:2048] + DATA + BASE[4096:]
    assert read_all(open_wdiff(file)) == expected
    assert read_all(open_wdiff(MemoryFile(b"".join(merge([open_wdiff(file)], LZ4))))) == expected


# Streams.


def packs_of(ios: list[Io]) -> list[bytes]:
    reader = open_wdiff(make_sorted(ios, LZ4))
    assert isinstance(reader, SortedReader)
    data = bytes(reader.file.pread(1 << 30, 0))
    return [data[p.offset_b : p.offset_b + PACK_B + p.data_size_b] for p in reader.packs()]


def test_streams_are_verified() -> None:
    (pack,) = packs_of([Io("write", 3, 2, seed=1), Io("write", 9, 1, seed=2)])
    cases: list[tuple[list[bytes], str, int]] = [
        ([pack[:-1]], "another size", 0),
        ([pack + b"x"], "another size", 0),
        ([pack[:100]], "shorter than its header", 0),
        ([pack, pack], "overlaps its predecessor", len(pack)),
        ([END_PACK, pack], "follows the end pack", PACK_B),
        ([END_PACK, END_PACK], "follows the end pack", PACK_B),
        ([bytes(4096)], "no records", 0),
        ([pack[:-1] + bytes([pack[-1] ^ 1])], "stored data", 0),
        ([pack[:20] + b"\xff" + pack[21:]], "pack header", 0),
    ]
    for packs, message, offset in cases:
        verifier = PackVerifier(source="proxy p0")
        for one in packs[:-1]:
            verifier.feed(one)
        with pytest.raises(CorruptData, match=message) as caught:
            verifier.feed(packs[-1])
        assert caught.value.facts["source"] == "proxy p0"
        assert int(str(caught.value.facts["offset"])) >= offset
        assert caught.value.hint
    with pytest.raises(CorruptData, match="without an end pack"):
        PackVerifier().finish()
    verifier = PackVerifier(size_lb=9)
    with pytest.raises(CorruptData, match="beyond the end") as caught:
        verifier.feed(pack)
    assert caught.value.facts["address_lb"] == 9
    verifier = PackVerifier(size_lb=10)
    verifier.feed(memoryview(pack))
    assert (verifier.n_records, verifier.end_lb, verifier.data_size_b) == (2, 10, len(pack) - PACK_B)
    assert not verifier.ended


@given(st.binary(max_size=5000), st.integers(0, 2**32))
@settings(max_examples=60)
def test_any_bytes_as_a_pack(data: bytes, seed: int) -> None:
    (pack,) = packs_of([Io("write", 3, 2, seed=1)])
    for bad in (data, damage(pack, random.Random(seed))):
        if bad != pack:
            with pytest.raises(CorruptData):
                PackVerifier().feed(bad)


def test_visible_is_what_the_model_says() -> None:
    """The reference of the extents agrees with the image made straight from the IOs."""
    ios = [Io("write", 0, 5, 1), Io("write", 2, 5, 2), Io("discard", 1, 2)]
    laid = [Extent(io.offset_lb, i, io.size_lb, 0, io.size_lb, 1, 0, 0, 0, 0) for i, io in enumerate(ios)]
    assert [(e.address_lb, e.blocks_lb, e.data_b) for e in visible(laid)] == [(0, 1, 0), (1, 2, 2), (3, 4, 1)]
