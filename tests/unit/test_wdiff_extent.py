"""ext.extent against its twin, and the map of extents in memory and on scratch files."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.wdiffs import MemoryFile, extents
from tests.reference import extent as reference
from tests.reference.extent import pack
from walbd.errors import UsageError
from walbd.ext.extent import Merger, clip, cut_batch, from_log, overlay, resolve
from walbd.format.extents import (
    EXTENT,
    Extent,
    ExtentMap,
    last_end_lb,
    merge_extents,
    unpack_extents,
)
from walbd.format.logpack import LOG_RECORD

ARRIVED = st.lists(extents(), max_size=25)
SORTED = ARRIVED.map(reference.visible)


@given(ARRIVED)
def test_resolve(arrived: list[Extent]) -> None:
    assert unpack_extents(resolve(pack(arrived))) == reference.visible(arrived)


@given(SORTED, SORTED)
def test_overlay(under: list[Extent], over: list[Extent]) -> None:
    assert unpack_extents(overlay(pack(under), pack(over))) == reference.visible([*under, *over])


@given(SORTED, st.integers(0, 170), st.integers(0, 170))
def test_clip(visible: list[Extent], begin_lb: int, end_lb: int) -> None:
    assert unpack_extents(clip(pack(visible), begin_lb, end_lb)) == reference.clip(visible, begin_lb, end_lb)


@given(SORTED, st.integers(0, 25), st.integers(1, 5), st.integers(0, 100))
def test_cut_batch(visible: list[Extent], first: int, n_max: int, lb_max: int) -> None:
    expected = reference.cut_batch(visible, first, n_max, lb_max)
    assert cut_batch(pack(visible), first, n_max, lb_max) == max(expected, first)


def in_batches(stream: list[Extent], size: int) -> list[bytes]:
    return [pack(stream[i : i + size]) for i in range(0, len(stream), size)]


@given(st.lists(SORTED, max_size=5), st.integers(1, 7), st.integers(1, 9), st.integers(1, 60), st.booleans())
def test_merge(streams: list[list[Extent]], size: int, n_max: int, lb_max: int, join: bool) -> None:
    batches = list(merge_extents([in_batches(s, size) for s in streams], n_max=n_max, lb_max=lb_max, join=join))
    merged = [extent for batch in batches for extent in unpack_extents(batch)]
    flat = [extent for stream in streams for extent in stream]
    expected = reference.visible(flat)
    assert reference.joined(merged) == reference.joined(expected)
    if not join:
        assert merged == expected
    for batch in batches:
        found = unpack_extents(batch)
        assert 1 <= len(found) <= n_max
        assert reference.cut_batch(found, 0, n_max, lb_max) == len(found)
        assert not join or reference.joined(found) == found


def test_merging_nothing() -> None:
    assert list(merge_extents([], n_max=10, lb_max=10)) == []
    assert list(merge_extents([[], iter([])], n_max=10, lb_max=10)) == []


def test_too_many_streams_are_refused() -> None:
    with pytest.raises(UsageError, match="too many"):
        list(merge_extents([[]] * 65537, n_max=1, lb_max=1))


def test_joined_ranges_stay_within_their_type() -> None:
    huge = [Extent(i << 31, 0, 1 << 31, 0, 0, 0, 0, 0, 4, 0) for i in range(5)]
    (batch,) = merge_extents([[pack(huge)]], n_max=100, lb_max=1)
    assert unpack_extents(batch) == huge


def test_the_merger_refuses_misuse() -> None:
    one = pack([Extent(5, 0, 5, 0, 0, 0, 0, 0, 2, 0)])
    merger = Merger(2)
    assert merger.run(10, 10) == 0
    merger.feed(0, one)
    with pytest.raises(ValueError, match="not asked for"):
        merger.feed(0, one)
    with pytest.raises(ValueError, match="no such input"):
        merger.feed(2, one)
    with pytest.raises(ValueError, match="n_max"):
        merger.run(0, 1)
    with pytest.raises(ValueError, match="whole structs"):
        merger.feed(1, one[:-1])
    with pytest.raises(ValueError, match="aligned"):
        merger.feed(1, memoryview(b"x" + one)[1:])
    merger.finish(1)
    assert merger.run(10, 10) == 0
    with pytest.raises(ValueError, match="out of order"):
        merger.feed(0, one)
    merger.finish(0)
    assert merger.run(10, 10) == -2
    assert merger.take() == one
    with pytest.raises(ValueError, match="not asked for"):
        merger.finish(0)


RECORDS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 12), st.sampled_from([1, 1, 1, 3, 5]), st.integers(0, 20)),
    max_size=12,
)


@given(RECORDS, st.sampled_from([0, 1, 4, 2048]), st.integers(0, 3), st.data())
def test_from_log(drawn: list[tuple[int, int, int, int]], max_lb: int, source: int, data: st.DataObject) -> None:
    blocks = data.draw(st.lists(st.sampled_from([bytes(512), b"\x00" * 511 + b"\x01", b"ab" * 256]), max_size=30))
    buf = b"".join(blocks)
    records = b"".join(
        LOG_RECORD.pack(i, offset, at * 512, size, flags, 0, 1)
        for i, (offset, size, flags, at) in enumerate(drawn)
    )
    expected, bad = reference.from_log(records, buf, 8192, source, max_lb)
    found, found_bad = from_log(records, buf, 8192, source, max_lb)
    assert found_bad == bad
    assert unpack_extents(found) == expected


@pytest.mark.parametrize(
    ("offset_lb", "data_b", "size_lb", "flags"),
    [
        (1 << 54, 0, 1, 1),
        ((1 << 54) - 1, 0, 2, 5),
        ((1 << 64) - 1, 0, 1, 5),
        (0, 513, 1, 1),
        (0, (1 << 64) - 1, 1, 1),
        (0, 0, 65536, 1),
        (0, 0, 2**32 - 1, 1),
    ],
)
def test_from_log_refuses_impossible_records(offset_lb: int, data_b: int, size_lb: int, flags: int) -> None:
    good = LOG_RECORD.pack(0, 0, 0, 2, 1, 0, 1)
    bad = LOG_RECORD.pack(0, offset_lb, data_b, size_lb, flags, 0, 1)
    assert from_log(good + bad, bytes(1024), 0, 0) == (b"", 1)


@given(st.lists(st.lists(extents(), max_size=6), max_size=12), st.integers(1, 20))
@settings(max_examples=50)
def test_extent_map(parts: list[list[Extent]], visible_max: int) -> None:
    files: list[MemoryFile] = []

    def scratch() -> MemoryFile:
        files.append(MemoryFile())
        return files[-1]

    in_memory, spilling = ExtentMap(), ExtentMap(scratch, visible_max=visible_max)
    for part in parts:
        in_memory.add(pack(part))
        spilling.add(pack(part))
        spilling.streams()  # sorts in, and spills what is too much
    expected = reference.visible([extent for part in parts for extent in part])
    for found in (in_memory, spilling):
        merged = b"".join(merge_extents(found.streams(), n_max=1000, lb_max=1 << 40, join=False))
        assert unpack_extents(merged) == expected
    assert len(files) <= 1
    assert len(files) == 1 or len(expected) <= visible_max


def test_extent_map_sorts_in_as_it_grows() -> None:
    part = [Extent(i * 2 % 1000, 0, 1, 0, 0, 0, 0, 0, 2, 0) for i in range(3000)]
    found = ExtentMap()
    for _ in range(60):
        found.add(pack(part))
    merged = b"".join(merge_extents(found.streams(), n_max=1000, lb_max=1, join=False))
    assert len(merged) == 500 * EXTENT.size
    assert last_end_lb(merged) == 999
