"""wdiff files as a whole: whatever is done with them must show the image that a plain array shows."""

from __future__ import annotations

import random
import struct
from collections.abc import Sequence
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.logs import Io, build_wlog, image_of
from tests.kit.wdiffs import (
    UUID,
    MemoryFile,
    Wdiff,
    WritableImage,
    kinds,
    log_of,
    make_indexed,
    make_sorted,
    wdiffs,
)
from walbd.errors import CorruptData, HistoryBroken, UsageError
from walbd.ext.checksum import checksum
from walbd.format import virtual as virtual_module
from walbd.format.compress import CompressOpt, Kind
from walbd.format.extents import FLAG_ALLZERO, FLAG_DISCARD, Extent, unpack_extents
from walbd.format.logpack import LOG_RECORD
from walbd.format.virtual import VirtualImage, virtual_chunks
from walbd.format.wdiff import (
    END_PACK,
    HEADER_B,
    PACK_B,
    WdiffHeader,
    WdiffType,
    flags_text,
    parse_header,
)
from walbd.format.wdiff_log import sorted_from_wlogs, wlog_batches
from walbd.format.wdiff_merge import merge, verify
from walbd.format.wdiff_read import IndexedReader, WdiffReader, open_wdiff
from walbd.format.wdiff_stream import PackVerifier
from walbd.format.wdiff_write import IndexedWdiffWriter, PackMaker, SortedWdiffWriter
from walbd.format.wlog import WlogReader
from walbd.fs import OsFileSystem
from walbd.fs.wdiff_apply import apply

DEVICE_LB = 150
DEVICE_B = DEVICE_LB * 512
BASE = random.Random(0).randbytes(DEVICE_B)
NONE, SNAPPY, LZ4 = CompressOpt(Kind.NONE), CompressOpt(Kind.SNAPPY), CompressOpt(Kind.LZ4)
SETS = st.lists(wdiffs(DEVICE_LB), min_size=1, max_size=4)


def readers(drawn: Sequence[Wdiff]) -> list[WdiffReader]:
    return [wdiff.reader() for wdiff in drawn]


def expected_image(drawn: Sequence[Wdiff], base: bytes = BASE) -> bytes:
    return image_of(base, [wdiff.ios for wdiff in drawn])


def read_all(found: Sequence[WdiffReader], base: bytes = BASE) -> bytes:
    return VirtualImage(MemoryFile(base), found, len(base)).read(0, len(base))


# What files show.


@given(wdiffs(DEVICE_LB, 30))
@settings(max_examples=60)
def test_conversion(wdiff: Wdiff) -> None:
    reader = wdiff.reader()
    assert reader.header.uuid == UUID
    assert read_all([reader]) == expected_image([wdiff])
    found = [e for batch in reader.extents() for e in unpack_extents(batch)]
    assert verify(reader) == len(found)
    covered = {b for io in wdiff.ios for b in range(io.offset_lb, io.offset_lb + io.size_lb)}
    assert {b for e in found for b in range(e.address_lb, e.address_lb + e.blocks_lb)} == covered


@given(SETS, kinds())
@settings(max_examples=60)
def test_merging(drawn: list[Wdiff], opt: CompressOpt) -> None:
    pieces = list(merge(readers(drawn), opt))
    merged = MemoryFile(b"".join(pieces))
    assert pieces[0] == WdiffHeader(WdiffType.SORTED, UUID).pack()
    assert pieces[-1] == END_PACK
    reader = open_wdiff(merged)
    verify(reader, size_lb=DEVICE_LB)
    assert read_all([reader]) == expected_image(drawn)
    verifier = PackVerifier(size_lb=DEVICE_LB)
    for pack in pieces[1:]:
        verifier.feed(pack)
    verifier.finish()
    assert verifier.n_records == verify(reader)
    used = {e.kind for batch in reader.extents() for e in unpack_extents(batch)}
    assert used <= {Kind.NONE, opt.kind}


@given(SETS, st.sampled_from(["zero", "ignore"]))
@settings(max_examples=60)
def test_applying(drawn: list[Wdiff], discard: str) -> None:
    image = WritableImage(BASE)
    told: list[int] = []
    count = apply(readers(drawn), image, discard=discard, progress=told.append)  # type: ignore[arg-type]
    owner = expected_image(drawn)
    if discard == "ignore":
        discarded = bytearray(DEVICE_LB)
        for io in (io for wdiff in drawn for io in wdiff.ios):
            for block in range(io.offset_lb, io.offset_lb + io.size_lb):
                discarded[block] = io.kind == "discard"
        owner = b"".join((BASE if discarded[b] else owner)[b * 512 : b * 512 + 512] for b in range(DEVICE_LB))
    assert image.data == owner
    assert told == sorted(told)
    assert bool(told) == bool(count)


@given(SETS)
@settings(max_examples=30)
def test_applying_to_real_files(drawn: list[Wdiff]) -> None:
    fs = OsFileSystem()
    with fs.temp_file(Path("/tmp")) as image:
        image.pwrite(BASE, 0)
        apply(readers(drawn), image)
        assert image.pread(DEVICE_B, 0) == expected_image(drawn)


@given(SETS, st.integers(0, DEVICE_B), st.integers(0, DEVICE_B), st.integers(1, 40), st.integers(0, DEVICE_B))
@settings(max_examples=60)
def test_virtual_images(drawn: list[Wdiff], offset: int, size: int, bulk_lb: int, base_b: int) -> None:
    base = BASE[:base_b] + bytes(DEVICE_B - base_b)
    virtual = VirtualImage(MemoryFile(BASE[:base_b]), readers(drawn), DEVICE_B)
    expected = expected_image(drawn, base)
    assert virtual.read(offset, size) == expected[offset : offset + size]
    bulk_b = bulk_lb * 512
    bulks = [expected[i : i + bulk_b] for i in range(0, DEVICE_B, bulk_b)]
    assert [bytes(piece) for piece in virtual.chunks(bulk_b)] == bulks
    once = virtual_chunks(MemoryFile(BASE[:base_b]), readers(drawn), DEVICE_B, bulk_b)
    assert [bytes(piece) for piece in once] == bulks
    nothing = VirtualImage(None, readers(drawn), DEVICE_B)
    assert nothing.read(0, DEVICE_B) == expected_image(drawn, bytes(DEVICE_B))
    virtual.check_inside()


@given(SETS, st.integers(1, 20))
@settings(max_examples=40)
def test_virtual_images_in_small_windows(drawn: list[Wdiff], bulk_lb: int) -> None:
    expected = expected_image(drawn)
    with mock.patch.object(virtual_module, "WINDOW_B", 4096), mock.patch.object(virtual_module, "_INDEX_BATCH", 2):
        virtual = VirtualImage(MemoryFile(BASE), readers(drawn), DEVICE_B)
        assert virtual.read(5, DEVICE_B) == expected[5:]
        assert b"".join(virtual.chunks(bulk_lb * 512)) == expected
        assert b"".join(virtual_chunks(MemoryFile(BASE), readers(drawn), DEVICE_B, bulk_lb * 512)) == expected


def test_virtual_images_of_large_records() -> None:
    """Parts of images above the cache's threshold: read in small pieces, repeatedly, decoded once."""
    rng = random.Random(5)
    ios = [Io("write", at, 300, seed=1 + at) for at in range(0, 3000, 300)] + [Io("write", 1000, 3, seed=9)]
    for opt in (NONE, LZ4):
        file = make_indexed(ios, opt)
        base = bytes(3100 * 512)
        expected = image_of(base, [ios])
        virtual = VirtualImage(MemoryFile(base), [open_wdiff(file)], len(base))
        for _ in range(200):
            at, size = rng.randrange(len(base)), rng.randrange(10_000)
            assert virtual.read(at, size) == expected[at : at + size]
        assert b"".join(virtual.chunks(4096)) == expected
        assert b"".join(virtual_chunks(MemoryFile(base), [open_wdiff(file)], len(base), 4096)) == expected


def test_virtual_images_refuse_odd_sizes() -> None:
    with pytest.raises(UsageError):
        VirtualImage(None, [], 513)
    with pytest.raises(UsageError):
        next(virtual_chunks(None, [], 513, 512))
    with pytest.raises(UsageError):
        next(virtual_chunks(None, [], 512, 100))
    virtual = VirtualImage(None, [], 1024)
    with pytest.raises(UsageError):
        next(virtual.chunks(513))
    with pytest.raises(ValueError, match="negative"):
        virtual.read(-1, 5)
    assert virtual.read(1024, 1) == b""
    assert virtual.n_extents == 0


@given(SETS, st.integers(1, 100))
@settings(max_examples=30)
def test_records_beyond_the_end_are_refused(drawn: list[Wdiff], size_lb: int) -> None:
    end_lb = max((io.offset_lb + io.size_lb for w in drawn for io in w.ios), default=0)
    image = WritableImage(bytes(size_lb * 512))
    virtual = VirtualImage(None, readers(drawn), size_lb * 512)
    if end_lb <= size_lb:
        apply(readers(drawn), image)
        virtual.check_inside()
        return
    with pytest.raises(CorruptData, match="beyond the end"):
        apply(readers(drawn), image)
    assert image.n_writes == 0  # small enough for one batch
    with pytest.raises(CorruptData, match="beyond the end"):
        virtual.check_inside()
    with pytest.raises(CorruptData, match="beyond the end"):
        list(virtual_chunks(None, readers(drawn), size_lb * 512, 512))
    assert virtual.read(0, 1 << 30) == expected_image(drawn, bytes(DEVICE_B))[: size_lb * 512]
    for wdiff in drawn:
        if max((io.offset_lb + io.size_lb for io in wdiff.ios), default=0) > size_lb:
            with pytest.raises(CorruptData, match="beyond the end"):
                verify(wdiff.reader(), size_lb=size_lb)


# Headers.


def test_headers() -> None:
    header = WdiffHeader(WdiffType.INDEXED, UUID)
    assert parse_header(header.pack(), "x") == header
    assert len(header.pack()) == HEADER_B
    assert checksum(header.pack()) == 0
    assert [flags_text(f) for f in (0, 1, 2, 4)] == ["--", "--", "Z-", "-D"]


def resealed(header: bytes) -> bytes:
    return checksum(bytes(4) + header[4:]).to_bytes(4, "little") + header[4:]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "ends within its header"),
        (bytes(31), "ends within its header"),
        (bytes(32), "version"),
        (resealed(struct.pack("<IHB25x", 0, 1, 0)), "version"),
        (resealed(struct.pack("<IHB25x", 0, 2, 2)), "unknown type"),
        (WdiffHeader(WdiffType.SORTED, UUID).pack()[:-1] + b"\xff", "checksum"),
    ],
)
def test_bad_headers(header: bytes, message: str) -> None:
    with pytest.raises(CorruptData, match=message) as caught:
        open_wdiff(MemoryFile(header))
    assert caught.value.hint
    assert {"path", "offset"} <= set(caught.value.facts)


# Writers.


def test_sorted_writer() -> None:
    file = MemoryFile()
    writer = SortedWdiffWriter(file, UUID, SNAPPY)
    writer.add_data(3, b"a" * 1024)
    writer.add_data(5, bytes(512))
    writer.add_zero(6, 100)
    writer.add_discard(1000, 2**32 - 1)
    with pytest.raises(ValueError, match="ascend"):
        writer.add_data(1005, b"a" * 512)
    for bad in (b"", b"a" * 513, bytes(65536 * 512)):
        with pytest.raises(ValueError, match="whole blocks"):
            writer.add_data(2**40, bad)
    writer.finish()
    assert writer.size_b == len(file.data)
    (batch,) = open_wdiff(file).extents()
    found = [(e.address_lb, e.blocks_lb, e.flags, e.kind) for e in unpack_extents(batch)]
    zero = FLAG_ALLZERO
    assert found == [(3, 2, 0, 2), (5, 1, zero, 0), (6, 100, zero, 0), (1000, 2**32 - 1, FLAG_DISCARD, 0)]


def test_packs_are_closed_when_they_are_full() -> None:
    maker = PackMaker(NONE)
    packs = [maker.add_zero(i, 1) for i in range(127 * 2 + 1)]
    assert [i for i, pack in enumerate(packs) if pack] == [126, 253]
    assert maker.finish() == maker_pack([Extent(254, 0, 1, 0, 0, 0, 0, 0, 2, 0)]) + END_PACK
    maker, large = PackMaker(NONE), b"x" * (8 << 20)
    sizes = [len(maker.add_data(i * 20000, large)) for i in range(3)]
    assert sizes == [0, 0, PACK_B + (16 << 20)]
    assert maker.finish()[PACK_B:] == large + END_PACK
    assert PackMaker(NONE).finish() == END_PACK


def maker_pack(extents: list[Extent]) -> bytes:
    maker = PackMaker(NONE)
    for e in extents:
        maker.add_zero(e.address_lb, e.blocks_lb)
    return maker.flush()


def test_a_record_may_be_as_large_as_a_log_io() -> None:
    data = random.Random(1).randbytes(1 << 20) * 31 + b"x" * (65535 * 512 - (31 << 20))
    file = MemoryFile()
    writer = SortedWdiffWriter(file, UUID, LZ4)
    writer.add_data(0, data)
    writer.add_data(65535, b"y" * 512)
    writer.finish()
    out = b"".join(merge([open_wdiff(file)], SNAPPY))
    virtual = VirtualImage(None, [open_wdiff(MemoryFile(out))], 65536 * 512)
    assert virtual.read(0, 1 << 40) == data + b"y" * 512


def test_files_without_changes() -> None:
    for file in (make_sorted([], LZ4), make_indexed([], LZ4)):
        reader = open_wdiff(file)
        assert list(reader.extents()) == []
        assert verify(reader) == 0
        assert b"".join(merge([reader], LZ4)) == WdiffHeader(WdiffType.SORTED, UUID).pack() + END_PACK
    assert len(make_sorted([], LZ4).data) == 4128


def test_indexed_writer_limits_its_records() -> None:
    ios = [Io("write", 3, 37, seed=1), Io("discard", 100, 33)]
    file = log_of(ios)
    for limit_lb, largest in ((1, 1), (7, 4), (2048, 16)):
        out = MemoryFile()
        writer = IndexedWdiffWriter(out, UUID, LZ4, index_limit_lb=limit_lb)
        for _, _, batch in wlog_batches([file]):
            writer.add_log(batch.data, batch.records)
        writer.finish()
        reader = open_wdiff(out)
        assert isinstance(reader, IndexedReader)
        assert reader.n_data == 2
        found = [e for batch in reader.extents() for e in unpack_extents(batch)]
        assert max(e.blocks_lb for e in found) == largest
        assert read_all([reader]) == image_of(BASE, [ios])
    with pytest.raises(ValueError, match="positive"):
        IndexedWdiffWriter(MemoryFile(), UUID, LZ4, index_limit_lb=0)


def test_merging_an_indexed_file_puts_its_records_together_again() -> None:
    ios = [Io("write", 3, 37, seed=1), Io("discard", 100, 33)]
    merged = open_wdiff(MemoryFile(b"".join(merge([open_wdiff(make_indexed(ios, SNAPPY))], SNAPPY))))
    found = [(e.address_lb, e.blocks_lb) for batch in merged.extents() for e in unpack_extents(batch)]
    assert found == [(3, 37), (100, 33)]


def test_what_is_stored_as_wanted_goes_through() -> None:
    """A record that is not cut is neither decompressed nor compressed again."""
    text = b"all work and no play " * 500
    one, two = MemoryFile(), MemoryFile()
    for file, address in ((one, 0), (two, 15)):
        writer = SortedWdiffWriter(file, UUID, SNAPPY)
        writer.add_data(address, text[address:][:10240])
        writer.finish()
    stored = bytes(two.data[HEADER_B + PACK_B : -PACK_B])
    merged = b"".join(merge([open_wdiff(one), open_wdiff(two)], SNAPPY))
    assert stored in merged
    assert bytes(one.data[HEADER_B + PACK_B : -PACK_B]) not in merged  # cut at block 15
    again = b"".join(merge([open_wdiff(one), open_wdiff(two)], LZ4))
    assert stored not in again


def test_the_uuid_of_a_merge() -> None:
    named, nameless = make_sorted([], LZ4), MemoryFile(WdiffHeader(WdiffType.SORTED, bytes(16)).pack() + END_PACK)
    other = MemoryFile(WdiffHeader(WdiffType.SORTED, b"o" * 16).pack() + END_PACK)

    def uuid(*files: MemoryFile, given: bytes | None = None) -> bytes:
        pieces = merge([open_wdiff(file) for file in files], LZ4, uuid=given)
        return parse_header(next(pieces), "x").uuid

    assert uuid(other, named) == UUID
    assert uuid(named, other) == b"o" * 16
    assert uuid(named, nameless) == UUID
    assert uuid(nameless) == bytes(16)
    assert uuid(named, given=b"g" * 16) == b"g" * 16


# Conversion of several logs.


def wlogs(*parts: list[Io]) -> list[MemoryFile]:
    files: list[MemoryFile] = []
    lsid = 100
    for part in parts:
        file = MemoryFile(build_wlog(lsid, 512, 9, [part] if part else [], uuid=UUID), f"wlog{len(files)}")
        reader = WlogReader(file)
        for _ in reader.batches():
            pass
        lsid = reader.lsid
        files.append(file)
    return files


def test_logs_that_continue_each_other() -> None:
    parts = [[Io("write", 0, 8, 1)], [], [Io("write", 4, 8, 2)], [Io("discard", 6, 1)]]
    file = MemoryFile(b"".join(sorted_from_wlogs(wlogs(*parts), LZ4)))
    assert read_all([open_wdiff(file)]) == image_of(BASE, parts)
    first, _, third, _ = wlogs(*parts)
    with pytest.raises(HistoryBroken, match="does not continue") as caught:
        list(sorted_from_wlogs([third, first], LZ4))
    assert caught.value.facts["path"] == "wlog0"
    other = MemoryFile(bytes(third.data), "other")
    other.data[24:40] = b"u" * 16
    other.data[8:12] = bytes(4)
    other.data[8:12] = checksum(other.data[:4096]).to_bytes(4, "little")
    with pytest.raises(HistoryBroken):
        list(sorted_from_wlogs([first, other], LZ4))


def test_impossible_addresses_in_a_log() -> None:
    out = MemoryFile()
    writer = IndexedWdiffWriter(out, UUID, LZ4)
    records = LOG_RECORD.pack(1, 0, 0, 1, 1, 0, 1) + LOG_RECORD.pack(2, 2**60, 0, 1, 5, 0, 2)
    with pytest.raises(CorruptData, match="no volume has") as caught:
        writer.add_log(bytes(512), records, source="wlog of v0")
    assert caught.value.facts["path"] == "wlog of v0"
    assert caught.value.facts["offset_lb"] == 2**60
    assert len(out.data) == HEADER_B


# Work that is abandoned.


class Enough(Exception):
    pass


@pytest.mark.parametrize("limit", [0, 1, 2])
def test_long_work_can_be_abandoned(limit: int) -> None:
    file = MemoryFile()
    writer = SortedWdiffWriter(file, UUID, LZ4)
    for i in range(127 * 20):
        writer.add_data(i * 2, b"%512d" % i)
    writer.finish()

    def work() -> list[int]:
        calls = [0]

        def check() -> None:
            if calls[0] >= limit:
                raise Enough
            calls[0] += 1

        image = WritableImage(bytes(127 * 40 * 512))
        for action in (
            lambda: list(merge([open_wdiff(file)], SNAPPY, check=check)),
            lambda: verify(open_wdiff(file), check=check),
            lambda: apply([open_wdiff(file)], image, check=check),
            lambda: list(VirtualImage(image, [], len(image.data)).chunks(512, check=check)),
            lambda: list(sorted_from_wlogs([log_of([Io("write", 0, 1, 1)] * 9000)], LZ4, check=check)),
        ):
            calls[0] = 0
            with pytest.raises(Enough):
                action()
        return calls

    assert work() == [limit]
