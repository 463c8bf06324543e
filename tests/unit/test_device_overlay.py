"""ext.overlay against its twin, and reading and writing of ranges."""

import os
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.overlay import DISCARD, PADDING, RANGE, RECORD, ZEROS
from tests.reference.overlay import Overlay as Reference
from walbd.ext.nbd import Chunk
from walbd.ext.overlay import Overlay, read_ranges
from walbd.units import LB

VOLUME_LB = 200

# (offset, size, kind): few blocks and many records, so that they overlap in every way.
RECORDS = st.lists(
    st.tuples(
        st.integers(0, VOLUME_LB - 1), st.integers(1, 30), st.sampled_from([1, 1, 1, 1 | DISCARD, 1 | ZEROS])
    ),
    min_size=1,
    max_size=12,
)
BATCHES = st.lists(RECORDS, min_size=1, max_size=8)


def table(items: list[tuple[int, int, int]], lsid: int) -> tuple[bytes, int]:
    """Make the record table of one pack; return it and the size of its data."""
    rows, at = b"", 0
    for i, (offset, size, flags) in enumerate(items):
        rows += RECORD.pack(lsid + 1 + i, offset, at, size, flags, 0, 1 + i)
        at += size * LB if flags == 1 else 0
    return rows, at


def blocks_of(writes: list[tuple[int, bytes]]) -> dict[int, bytes]:
    found = {}
    for offset_b, data in writes:
        for i in range(0, len(data), LB):
            assert (offset_b + i) // LB not in found
            found[(offset_b + i) // LB] = data[i : i + LB]
    return found


def filled(overlay: Overlay, offset_b: int, size_b: int) -> tuple[bytearray, set[int]]:
    out = bytearray(b"\xee" * size_b)
    gaps = overlay.fill(RANGE.pack(offset_b, size_b, 0, 7), out)
    missing = set()
    for gap_b, length_b, out_b, index in RANGE.iter_unpack(gaps):
        assert gap_b - offset_b == out_b
        assert index == 7
        assert length_b > 0
        missing |= set(range(out_b, out_b + length_b))
    return out, missing


@settings(max_examples=80, deadline=None)
@given(BATCHES, st.integers(0, 2**32))
def test_overlay_equals_reference(batches: list[list[tuple[int, int, int]]], seed: int) -> None:
    rng = random.Random(seed)
    overlay, reference = Overlay(), Reference()
    pending = []
    lsid = 100
    for items in batches:
        records, size_b = table(items, lsid)
        data = rng.randbytes(size_b)
        overlay.insert(records, data)
        reference.insert(records, data)
        lsid += 1 + len(items)
        pending.append((lsid, records))
        if rng.random() < 0.3:
            end, records = pending[0]
            overlay.retire(records, end)
            overlay.release(end)
            reference.retire(end)
            del pending[0]
        offset_b = rng.randrange(VOLUME_LB * LB)
        out, missing = filled(overlay, offset_b, rng.randrange(1, 40 * LB))
        expected = bytearray(b"\xee" * len(out))
        assert missing == reference.fill(RANGE.pack(offset_b, len(out), 0, 0), expected)
        assert out == expected
    assert blocks_of(overlay.writes()) == reference.written()
    zeroed = {at for offset, size in overlay.zeros() for at in range(offset // LB, (offset + size) // LB)}
    assert zeroed == reference.zeroed()
    while pending:
        end, records = pending.pop(0)
        overlay.retire(records, end)
        overlay.release(end)
    assert len(overlay) == 0


def test_a_discard_at_the_end_of_a_pack_is_retired_with_its_pack() -> None:
    # Such a discard has the lsid of the next pack.
    overlay = Overlay()
    records = RECORD.pack(101, 5, 0, 1, 1, 0, 1) + RECORD.pack(102, 9, 0, 4, 1 | DISCARD, 0, 2)
    overlay.insert(records, bytes(LB))
    overlay.retire(records, 102)
    assert len(overlay) == 0


def test_many_entries_in_any_order(tmp_path: Path) -> None:
    rng = random.Random(5)
    overlay, expected = Overlay(), {}
    data = rng.randbytes(4000 * LB)
    for i, block in enumerate(rng.sample(range(10000), 4000)):
        overlay.insert(RECORD.pack(i + 1, block, i * LB, 1, 1, 0, 1), data)
        expected[block] = data[i * LB : (i + 1) * LB]
    assert len(overlay) == 4000
    assert blocks_of(overlay.writes()) == expected
    path = tmp_path / "data"
    path.write_bytes(b"\x11" * 10000 * LB)
    with path.open("r+b") as file:
        overlay.write(file.fileno())
    image = path.read_bytes()
    assert all(image[at * LB : (at + 1) * LB] == expected.get(at, b"\x11" * LB) for at in range(10000))
    assert overlay.extents(0, 10000 * LB)[0][0] == min(expected) * LB


def test_paddings_are_no_data() -> None:
    overlay = Overlay()
    overlay.insert(RECORD.pack(1, 0, 0, 8, 1 | PADDING, 0, 1), b"")
    assert len(overlay) == 0


@pytest.mark.parametrize(
    "record",
    [
        RECORD.pack(1, 0, 0, 2, 1, 0, 1),  # more than there is
        RECORD.pack(1, 0, LB, 1, 1, 0, 1),  # behind the end
        RECORD.pack(1, 0, 2**63, 1, 1, 0, 1),
        RECORD.pack(1, 0, 0, 0, 1, 0, 1),  # empty
        RECORD.pack(1, 2**60, 0, 1, 1, 0, 1),
        RECORD.pack(1, 0, 0, 4096, 1 | ZEROS, 0, 1),
        b"x" * 39,
    ],
)
def test_bad_records_change_nothing(record: bytes) -> None:
    overlay = Overlay()
    with pytest.raises(ValueError, match=r"record|table"):
        overlay.insert(record, bytes(LB))
    assert len(overlay) == 0


def test_ranges_outside_the_buffer_are_refused(tmp_path: Path) -> None:
    overlay = Overlay()
    overlay.insert(RECORD.pack(1, 0, 0, 1, 1, 0, 1), bytes(LB))
    path = tmp_path / "f"
    path.write_bytes(bytes(LB))
    fd = os.open(path, os.O_RDONLY)
    try:
        for bad in (RANGE.pack(0, 11, 0, 0), RANGE.pack(0, 1, 10, 0), RANGE.pack(0, 1, 2**63, 0), b"xyz"):
            with pytest.raises(ValueError, match=r"range|table"):
                overlay.fill(bad, bytearray(10))
            with pytest.raises(ValueError, match=r"range|table"):
                read_ranges(fd, bad, bytearray(10))
    finally:
        os.close(fd)


def test_read_ranges_reads_zeros_behind_the_end(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"ab" * 500)
    out = Chunk(3000)
    with path.open("rb") as file:
        assert read_ranges(file.fileno(), RANGE.pack(10, 2000, 0, 0) + RANGE.pack(0, 4, 2500, 1), out) == b""
        assert memoryview(out)[:990] == b"ab" * 495
        assert memoryview(out)[990:2000] == bytes(1010)
        assert bytes(memoryview(out)[2500:2504]) == b"abab"
        # What was just read is in memory.
        ranges = RANGE.pack(0, 100, 0, 0)
        assert read_ranges(file.fileno(), ranges, out, nowait=True) in (b"", ranges)


def test_read_and_write_errors_are_oserrors(tmp_path: Path) -> None:
    overlay = Overlay()
    overlay.insert(RECORD.pack(1, 0, 0, 1, 1, 0, 1), bytes(LB))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="directory"):
            read_ranges(fd, RANGE.pack(0, 10, 0, 0), bytearray(10))
        with pytest.raises(OSError, match="Bad file descriptor"):
            overlay.write(fd)
    finally:
        os.close(fd)
