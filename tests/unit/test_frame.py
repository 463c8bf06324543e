"""Frames: any cut of the stream gives the same frames; any junk gives the typed error."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from walbd.errors import LocalProtocolError, RemoteProtocolError
from walbd.protocol.frame import PREFIX, Frame, FrameDecoder, FrameLimits, encode_prefix

LIMITS = FrameLimits(header_max_b=1 << 18, payload_max_b=1 << 18)
FRAMES = st.lists(
    st.tuples(
        st.one_of(st.binary(max_size=40), st.integers(0, 1 << 17).map(bytes)),
        st.one_of(st.binary(max_size=40), st.integers(0, 1 << 17).map(lambda n: b"\xa5" * n)),
    ),
    max_size=4,
)


def stream(frames: list[tuple[bytes, bytes]]) -> bytes:
    return b"".join(encode_prefix(len(h), len(p), LIMITS) + h + p for h, p in frames)


def pairs(frames: list[Frame]) -> list[tuple[bytes, bytes]]:
    return [(frame.header, bytes(frame.payload)) for frame in frames]


@given(FRAMES, st.lists(st.integers(1, 1 << 17), min_size=1, max_size=6))
def test_any_cut_gives_the_same_frames(frames: list[tuple[bytes, bytes]], sizes: list[int]) -> None:
    data = stream(frames)
    decoder = FrameDecoder(LIMITS)
    got: list[Frame] = []
    at = i = 0
    while at < len(data):
        size = sizes[i % len(sizes)]
        got += decoder.feed(data[at : at + size])
        at, i = at + size, i + 1
    assert pairs(got) == frames
    assert not decoder.in_frame


@given(st.lists(st.tuples(st.binary(max_size=20), st.binary(max_size=20)), max_size=5))
def test_one_byte_at_a_time(frames: list[tuple[bytes, bytes]]) -> None:
    decoder = FrameDecoder(LIMITS)
    got = [frame for byte in stream(frames) for frame in decoder.feed(bytes([byte]))]
    assert pairs(got) == frames


@given(FRAMES, st.data())
def test_a_truncated_stream_stands_inside_a_frame(frames: list[tuple[bytes, bytes]], data: st.DataObject) -> None:
    whole = stream(frames)
    cut = data.draw(st.integers(0, len(whole)))
    decoder = FrameDecoder(LIMITS)
    got = decoder.feed(whole[:cut])
    ends = [0]
    for header, payload in frames:
        ends.append(ends[-1] + PREFIX.size + len(header) + len(payload))
    assert pairs(got) == frames[: sum(end <= cut for end in ends[1:])]
    assert decoder.in_frame == (cut not in ends)


@given(st.binary(max_size=3000))
def test_random_bytes_are_frames_or_the_typed_error(data: bytes) -> None:
    decoder = FrameDecoder(FrameLimits(header_max_b=4096, payload_max_b=4096))
    try:
        for frame in decoder.feed(data):
            assert len(frame.header) <= 4096
            assert len(frame.payload) <= 4096
    except RemoteProtocolError:
        pass


@pytest.mark.parametrize(
    "sizes", [(LIMITS.header_max_b + 1, 0), (0, LIMITS.payload_max_b + 1), (2**32 - 1, 2**32 - 1)]
)
def test_sizes_are_bounded_before_anything_is_allocated(sizes: tuple[int, int]) -> None:
    with pytest.raises(RemoteProtocolError):
        FrameDecoder(LIMITS).feed(struct.pack("<II", *sizes))
    with pytest.raises(LocalProtocolError):
        encode_prefix(*sizes, LIMITS)


def test_limits_may_be_widened_between_frames() -> None:
    decoder = FrameDecoder(FrameLimits(header_max_b=10, payload_max_b=0))
    assert len(decoder.feed(encode_prefix(3, 0, LIMITS) + b"abc")) == 1
    decoder.limits = LIMITS
    assert pairs(decoder.feed(stream([(b"x" * 100, b"y" * 100)]))) == [(b"x" * 100, b"y" * 100)]
