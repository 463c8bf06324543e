"""ext.wdiff against its twin: headers, records, and plans carried out on real bytes."""

from __future__ import annotations

import random
import struct

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.kit.wdiffs import extents
from tests.reference import extent as reference_extent
from tests.reference import wdiff as reference
from tests.reference.extent import pack
from walbd.ext import wdiff as ext
from walbd.ext.checksum import checksum
from walbd.format.extents import Extent, unpack_extents
from walbd.format.wdiff import END_PACK, INDEX_RECORD, REASONS, RECORD

SORTED = st.lists(extents(sources=3), max_size=25).map(reference_extent.visible)
PIECE = struct.Struct("<QQQ")


def sealed(data: bytes, at: int = 0) -> bytes:
    """Set the checksum so that the bytes add up to nothing."""
    data = data[:at] + bytes(4) + data[at + 4 :]
    return data[:at] + checksum(data).to_bytes(4, "little") + data[at + 4 :]


NUMBERS = st.one_of(
    st.integers(0, 5),
    st.sampled_from([511, 512, 1024, 2048, 65535 * 512, 65536, 2**31, 2**32 - 1, 2**54, 2**64 - 1]),
)


@given(
    st.lists(st.tuples(NUMBERS, NUMBERS, st.integers(0, 9), st.integers(0, 7), NUMBERS, NUMBERS), max_size=3),
    st.one_of(st.none(), st.integers(0, 200)),
    st.integers(0, 1),
    st.one_of(st.none(), NUMBERS),
    st.integers(0, 4),
    st.booleans(),
)
@settings(max_examples=300)
def test_parse_pack_of_anything(
    records: list[tuple[int, ...]], n: int | None, flags: int, total: int | None, end_lb: int, good_sum: bool
) -> None:
    """Headers made of plausible and absurd numbers, with right checksums and running sums where it matters."""
    header = bytearray(4096)
    at = 0
    for i, (address_lb, blocks_lb, rflags, kind, offset, size_b) in enumerate(records):
        offset_b = at if offset < 5 else offset
        RECORD.pack_into(
            header,
            16 + 32 * i,
            address_lb,
            blocks_lb & 0xFFFFFFFF,
            rflags,
            kind,
            0,
            offset_b & 0xFFFFFFFF,
            size_b & 0xFFFFFFFF,
            77,
            0,
        )
        at += size_b
    struct.pack_into(
        "<HBxI", header, 4, len(records) if n is None else n, flags, (at if total is None else total) & 0xFFFFFFFF
    )
    block = sealed(bytes(header)) if good_sum else bytes(header)
    code, record, is_end, total_b, found_end, found = ext.parse_pack(block, 5000, 3, end_lb)
    expected = reference.attempt(lambda: reference.parse_pack(block, 5000, 3, end_lb))
    if isinstance(expected, reference.Refused):
        assert (code, record, found) == (expected.code, expected.record, b""), REASONS[code]
        return
    assert (code, record) == (0, -1)
    assert (is_end, total_b, found_end, unpack_extents(found)) == expected


def test_the_end_pack() -> None:
    assert ext.parse_pack(END_PACK, 0, 0, 9) == (0, -1, True, 0, 9, b"")
    assert sealed(END_PACK) == END_PACK


def test_a_block_of_zeros_is_no_pack() -> None:
    assert REASONS[ext.parse_pack(bytes(4096), 0, 0, 0)[0]] == "a {part} has no records and is no end"


@given(
    st.lists(
        st.tuples(
            st.integers(0, 20),
            st.one_of(st.sampled_from([1, 1, 2, 4]), NUMBERS),
            st.sampled_from([0, 0, 0, 1, 2, 4, 6, 8]),
            st.integers(0, 6),
            st.one_of(st.integers(30, 4000), NUMBERS),
            st.one_of(st.integers(1, 600), NUMBERS),
            st.integers(0, 4),
            NUMBERS,
        ),
        max_size=4,
    ),
    st.booleans(),
)
@settings(max_examples=300)
def test_parse_index_of_anything(records: list[tuple[int, ...]], good_sum: bool) -> None:
    data, at = b"", 0
    for step, blocks_lb, flags, kind, data_b, size_b, offset_lb, orig_lb in records:
        blocks_lb &= 0xFFFFFFFF
        address_lb = -(-at // max(blocks_lb, 1)) * blocks_lb if step else 3
        at = address_lb + blocks_lb
        fields = (address_lb, blocks_lb, flags, kind, 0, data_b, size_b & 0xFFFFFFFF, offset_lb)
        record = INDEX_RECORD.pack(*fields, orig_lb & 0xFFFFFFFF, 0, 7, 0)
        data += sealed(record, 44) if good_sum else record
    code, bad, end_lb, found = ext.parse_index(data, 4000, 3, 0)
    expected = reference.attempt(lambda: reference.parse_index(data, 4000, 3, 0))
    if isinstance(expected, reference.Refused):
        assert (code, bad, found) == (expected.code, expected.record, b""), REASONS[code]
        return
    assert (code, bad) == (0, -1)
    assert (end_lb, unpack_extents(found)) == expected


@given(SORTED, st.sampled_from([1, 2, 8, 2048, 1 << 31]), st.integers(1, 9))
def test_build_index(visible: list[Extent], limit_lb: int, room: int) -> None:
    data, at, done_lb, out = pack(visible), 0, 0, b""
    while at < len(visible):
        part, at, done_lb = ext.build_index(data, limit_lb, at, done_lb, room)
        assert 0 < len(part) <= room * 48
        out += part
    assert out == reference.build_index(visible, limit_lb)


def test_build_index_of_the_largest_discard() -> None:
    data = pack([Extent(0, 0, 2**32 - 1, 0, 0, 0, 0, 0, 4, 0)])
    out, at, _ = ext.build_index(data, 1 << 31, 0, 0, 100)
    assert at == 1
    assert [struct.unpack_from("<QI", out, i) for i in range(0, len(out), 48)] == reference_extent.aligned_pieces(
        0, 2**32 - 1, 1 << 31
    )


@given(SORTED, st.sampled_from([0, 8192, 1 << 30]))
def test_plan_images(visible: list[Extent], gap_b: int) -> None:
    images, refs, reads, size_b = ext.plan_images(pack(visible), gap_b)
    expected, expected_refs = reference.images(visible)
    assert list(memoryview(refs).cast("I")) == expected_refs
    assert len(images) == 48 * len(expected)
    found = [(source, list(PIECE.iter_unpack(pieces))) for source, pieces in reads]
    assert (found, size_b) == reference.reads(expected, gap_b)


class Images:
    """Real bytes for the images of extents, all raw."""

    def __init__(self, visible: list[Extent], seed: int) -> None:
        self.rng = random.Random(seed)
        self.data = bytearray(self.rng.randbytes(600_000))

    def fix(self, extent: Extent) -> Extent:
        """Give an extent the checksum of its image."""
        if extent.flags:
            return extent
        stored = self.data[extent.data_b : extent.data_b + extent.data_size_b]
        return extent._replace(source=0, checksum=checksum(stored))

    def of(self, extent: Extent) -> bytes:
        """The data of an extent."""
        at = extent.data_b + extent.offset_lb * 512
        return bytes(self.data[at : at + extent.blocks_lb * 512])


@given(SORTED, st.integers(0, 9))
@settings(max_examples=40)
def test_plans_carried_out(visible: list[Extent], seed: int) -> None:
    images = Images(visible, seed)
    visible = [images.fix(extent) for extent in visible]
    extents = pack(visible)
    found, refs = ext.plan_images_in_place(extents, 0, len(images.data))
    assert ext.check_images(found, images.data) == -1
    assert ext.check_extents(extents, images.data, 0) == -1

    # into a window
    begin_lb = min((e.address_lb for e in visible), default=0)
    end_lb = max((e.address_lb + e.blocks_lb for e in visible), default=0)
    targets, fills = ext.plan_window(extents, begin_lb)
    size_b = (end_lb - begin_lb) * 512
    jobs, copies, raw_b = ext.plan_flat(extents, refs, found, targets, size_b)
    assert (jobs, raw_b) == (b"", size_b)  # raw images need no decoding
    window = bytearray(b"\xee" * size_b)
    ext.copy_all(copies + fills, images.data, window)
    expected = bytearray(b"\xee" * size_b)
    for extent in visible:
        at = (extent.address_lb - begin_lb) * 512
        expected[at : at + extent.blocks_lb * 512] = (
            bytes(extent.blocks_lb * 512) if extent.flags else images.of(extent)
        )
    assert window == expected

    # into a pack, stored raw
    for first in range(0, len(visible), 127):
        part = visible[first : first + 127]
        found, refs = ext.plan_images_in_place(pack(part), 0, len(images.data))
        items, jobs, raw_b, _ = ext.plan_pack(pack(part), refs, found, 0)
        assert (jobs, raw_b) == (b"", 0)
        ext.settle(items, b"", 0, images.data, b"", b"")
        made = ext.gather(items, images.data, b"", b"", True)
        assert made == reference.build_pack([reference.Stored(e, 0, images.of(e)) for e in part])
        assert ext.parse_pack(made[:4096], 0, 0, 0)[0] == 0


@given(SORTED, st.booleans(), st.sampled_from([1, 8, 30, 1000]))
def test_plan_runs(visible: list[Extent], ignore: bool, zero_min_lb: int) -> None:
    targets, runs, zeros, fills, size_b = ext.plan_runs(pack(visible), ignore, zero_min_lb)
    expected_runs, expected_zeros = reference.runs(visible, ignore, zero_min_lb)
    assert [(offset, size) for offset, size, _ in PIECE.iter_unpack(zeros)] == expected_zeros
    # Where a long range of nothing lies between, or runs touch it, the same bytes may be in one piece or two.
    places = [(offset, size, at) for offset, size, at in PIECE.iter_unpack(runs)]
    assert sum(size for _, size, _ in places) == size_b == sum(size for _, size in expected_runs)
    assert [(offset, size) for offset, size, _ in places] == expected_runs
    for extent, target in zip(visible, memoryview(targets).cast("Q"), strict=True):
        if extent.flags:
            assert target == reference.NOWHERE
        else:
            offset, _, at = next(p for p in reversed(places) if p[0] <= extent.address_lb * 512)
            assert target == at + extent.address_lb * 512 - offset
    assert all(area == 3 for area, _, _, _ in struct.iter_unpack("<QQQQ", fills))


def one(size_lb: int = 2, **fields: int) -> bytes:
    return pack([Extent(0, 0, size_lb, 0, size_lb, size_lb * 512, 0, 0, 0, 0)._replace(**fields)])


def test_bad_calls_are_refused() -> None:
    extents = one()
    images, refs = ext.plan_images_in_place(extents, 0, 1024)
    items, _, _, todo = ext.plan_pack(extents, refs, images, 5)
    assert len(todo) == 24
    with pytest.raises(ValueError, match="outside the area"):
        ext.plan_images_in_place(extents, 0, 1023)
    with pytest.raises(ValueError, match="outside the area"):
        ext.plan_images_in_place(extents, 1, 4096)
    with pytest.raises(ValueError, match="outside the area"):
        ext.check_images(images, bytes(1023))
    with pytest.raises(ValueError, match="outside the data"):
        ext.check_extents(extents, bytes(1023), 0)
    with pytest.raises(ValueError, match="one target"):
        ext.plan_flat(extents, refs, images, b"", 1024)
    with pytest.raises(ValueError, match="one reference"):
        ext.plan_flat(extents, b"", images, bytes(8), 1024)
    with pytest.raises(ValueError, match="no such image"):
        ext.plan_pack(extents, bytes([9, 0, 0, 0]), images, 0)
    with pytest.raises(ValueError, match="goes outside"):
        ext.copy_all(struct.pack("<4Q", 0, 0, 1, 1024), bytes(1024), bytearray(1024))
    with pytest.raises(ValueError, match="comes from outside"):
        ext.copy_all(struct.pack("<4Q", 0, 1, 0, 1024), bytes(1024), bytearray(1024))
    with pytest.raises(ValueError, match="outside its area"):
        ext.settle(items, b"", 5, bytes(1023), b"", b"")
    flagged = bytearray(items)
    flagged[28] = 2  # a range of nothing has no data, and yet is to be compressed
    with pytest.raises(ValueError, match="outside its area"):
        ext.settle(flagged, b"", 5, bytes(1023), b"", b"")
    with pytest.raises(ValueError, match="one result"):
        ext.settle(items, bytes(32), 5, bytes(1024), b"", b"")
    with pytest.raises(ValueError, match="outside area 2"):
        ext.settle(items, struct.pack("<2Q", 0, 5), 5, bytes(1024), b"", bytes(4))
    with pytest.raises(ValueError, match="1 to 127"):
        ext.gather(b"", b"", b"", b"", True)
    with pytest.raises(ValueError, match="not a whole image"):
        ext.relocate(one(offset_lb=0, blocks_lb=1), items, 0, 0)
    with pytest.raises(ValueError, match="before the window"):
        ext.plan_window(extents, 1)
    with pytest.raises(ValueError, match="4096"):
        ext.parse_pack(bytes(4095), 0, 0, 0)
    with pytest.raises(ValueError, match="48"):
        ext.parse_index(bytes(47), 0, 0, 0)
    with pytest.raises(ValueError, match="power of two"):
        ext.build_index(extents, 3, 0, 0, 1)


@given(st.binary(max_size=100))
def test_arrays_of_structs_must_be_whole(data: bytes) -> None:
    assume(len(data) % 40)
    for call in (lambda: ext.plan_images(data, 0), lambda: ext.plan_runs(data, False, 1)):
        with pytest.raises(ValueError, match="whole structs"):
            call()


def test_an_empty_extent_has_no_index_record() -> None:
    extents = one()
    whole = ext.build_index(extents, 1 << 31, 0, 0, 9)
    assert ext.build_index(one(blocks_lb=0) + extents, 1 << 31, 0, 0, 9) == (whole[0], 2, 0)
