"""ext.nbd against its twin: requests cut out of a stream, and replies."""

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import nbd as reference
from walbd.errors import RemoteProtocolError
from walbd.ext.nbd import CHUNK_B, Chunk, parse_requests, read_replies, simple_replies
from walbd.protocol.nbd import RANGE_TABLE, REQUEST_TABLE

SIZE_B = 1 << 20
MAX_B = 4096

SOME = st.one_of(st.sampled_from([0, 512, 1024, SIZE_B - 512, SIZE_B, 2**64 - 512]), st.integers(0, 2**64 - 1))
LENGTHS = st.one_of(st.sampled_from([0, 1, 512, 1024, 4096, 4608]), st.integers(0, 5000))


@st.composite
def streams(draw: st.DrawFn) -> bytes:
    out = b""
    for _ in range(draw(st.integers(0, 12))):
        kind = draw(st.sampled_from([0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 65535]))
        length = draw(LENGTHS)
        flags = draw(st.sampled_from([0, 0, 1, 2, 3, 4, 8, 16, 18, 32]))
        magic = draw(st.sampled_from([reference.MAGIC] * 30 + [0]))
        out += reference.REQUEST.pack(magic, flags, kind, draw(st.integers(0, 2**64 - 1)), draw(SOME), length)
        if kind == 1:
            out += draw(st.binary(min_size=1, max_size=1)) * length
    return out


@settings(max_examples=150, deadline=None)
@given(
    streams(), st.integers(0, 40), st.integers(0, 600), st.booleans(), st.sampled_from([0, 1, 3000, 9000, 1 << 63])
)
def test_parse_equals_reference(stream: bytes, before: int, cut: int, read_only: bool, room_b: int) -> None:
    data = b"x" * before + stream
    end = max(before, len(data) - cut)
    args = {"size_b": SIZE_B, "max_b": MAX_B, "read_only": read_only, "room_b": room_b}
    try:
        consumed, need, requests = reference.parse(data, before, end, **args)  # type: ignore[arg-type]
    except reference.Broken:
        with pytest.raises(RemoteProtocolError):
            parse_requests(data, before, end, SIZE_B, MAX_B, read_only, room_b)
        return
    got = parse_requests(data, before, end, SIZE_B, MAX_B, read_only, room_b)
    writes = [r for r in requests if not r.error and r.kind in (1, 4, 6)]
    reads = [r for r in requests if not r.error and r.kind == 0]
    others = [r for r in requests if r.error or r.kind not in (0, 1, 4, 6)]

    def rows(found: list[reference.Request]) -> bytes:
        return b"".join(
            REQUEST_TABLE.pack(r.cookie, r.offset_b, r.at, r.length_b, r.error, r.kind, r.flags, 0) for r in found
        )

    assert got == (
        consumed,
        need,
        rows(writes),
        sum(r.flags & 1 for r in writes),
        sum(r.length_b for r in writes if r.kind == 1),
        rows(reads),
        sum(r.length_b for r in reads),
        rows(others),
    )


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_incomplete(data: bytes) -> None:
    try:
        consumed, need, *_ = parse_requests(data, 0, len(data), SIZE_B, MAX_B)
    except RemoteProtocolError:
        return
    assert consumed <= len(data)
    assert need > len(data) - consumed


def test_bad_places_are_refused() -> None:
    for begin, end in ((-1, 2), (3, 2), (0, 11)):
        with pytest.raises(ValueError, match="range"):
            parse_requests(b"x" * 10, begin, end, SIZE_B, MAX_B)
    for begin, end in ((-1, 0), (1, 0), (0, 1)):
        with pytest.raises(ValueError, match="range"):
            simple_replies(b"", begin, end)
    with pytest.raises(ValueError, match="no requests"):
        read_replies(b"", False)


def row(cookie: int, *, flags: int = 0, offset: int = 0, length: int = 512) -> bytes:
    return REQUEST_TABLE.pack(cookie, offset, 0, length, 0, 1, flags, 0)


def test_simple_replies() -> None:
    table = b"".join(row(i, flags=i % 2) for i in range(5))

    def expected(cookies: list[int], error: int = 0) -> bytes:
        return b"".join(struct.pack(">II", 0x67446698, error) + i.to_bytes(8, "little") for i in cookies)

    assert simple_replies(table, 0, 5) == expected([0, 1, 2, 3, 4])
    assert simple_replies(table, 1, 4, 5) == expected([1, 2, 3], 5)
    assert simple_replies(table, 0, 5, 0, 0) == expected([0, 2, 4])
    assert simple_replies(table, 0, 5, 0, 1) == expected([1, 3])
    assert simple_replies(table, 2, 2) == b""


@pytest.mark.parametrize("structured", [False, True])
def test_read_replies(structured: bool) -> None:
    table = row(1, offset=77, length=100) + row(2, offset=5, length=3)
    out, ranges = read_replies(table, structured)
    places = list(RANGE_TABLE.iter_unpack(ranges))
    view = memoryview(out)
    for cookie, (offset_b, size_b, out_b, index) in enumerate(places, 1):
        assert index == cookie - 1
        raw = cookie.to_bytes(8, "little")
        if structured:
            head = struct.pack(">IHH", 0x668E33EF, 1, 1) + raw + struct.pack(">IQ", 8 + size_b, offset_b)
        else:
            head = struct.pack(">II", 0x67446698, 0) + raw
        assert view[out_b - len(head) : out_b] == head
    assert [(o, s) for o, s, _, _ in places] == [(77, 100), (5, 3)]
    assert places[-1][2] + places[-1][1] == len(out)


def test_chunks_are_buffers_of_their_own() -> None:
    first = memoryview(Chunk(CHUNK_B))
    second = memoryview(Chunk(CHUNK_B))
    first[:4] = b"abcd"
    second[:4] = b"efgh"
    assert bytes(first[:4]) == b"abcd"
    del second
    again = Chunk(CHUNK_B)
    assert len(again) == len(memoryview(again)) == CHUNK_B
    memoryview(again)[:4] = b"ijkl"
    assert bytes(first[:4]) == b"abcd"
    with pytest.raises(ValueError, match="size"):
        Chunk(0)
