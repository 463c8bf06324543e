"""Framing: the byte stream of every connection, cut into frames. No IO here.

    frame = u32 header size | u32 payload size | header | payload        (both sizes little-endian, bytes)

The header is one msgpack message (`walbd.protocol.codec`); the payload is raw bytes that never pass through
msgpack. Sizes are bounded before anything is allocated. Source: docs/protocol.md, "Frames".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

from walbd.errors import LocalProtocolError, RemoteProtocolError

PREFIX: Final = struct.Struct("<II")
_SCRATCH_B: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class FrameLimits:
    """What a peer may send in one frame [byte]."""

    header_max_b: int = 4 << 20
    payload_max_b: int = 64 << 20


HELLO_LIMITS: Final = FrameLimits(header_max_b=4096, payload_max_b=0)  # until we know who is there


class Frame(NamedTuple):
    """One frame; the payload's buffer belongs to whoever holds the frame."""

    header: bytes
    payload: memoryview


def encode_prefix(header_b: int, payload_b: int, limits: FrameLimits) -> bytes:
    """Return the 8 bytes before a header; raises LocalProtocolError when the peer would refuse the frame."""
    if header_b > limits.header_max_b or payload_b > limits.payload_max_b:
        raise LocalProtocolError("frame is too large to send", header_b=header_b, payload_b=payload_b)
    return PREFIX.pack(header_b, payload_b)


class FrameDecoder:
    """Cut received bytes into frames, receiving large payloads straight into their own buffers.

    The owner asks for `buffer()`, receives into it, and tells `received(n)`. Raises RemoteProtocolError on
    a frame over the limits; the decoder must not be used after that.
    """

    def __init__(self, limits: FrameLimits) -> None:
        self.limits = limits
        self._scratch = bytearray(_SCRATCH_B)
        self._begin = 0  # of unread bytes in the scratch buffer
        self._end = 0
        self._header: bytes | None = None  # of the frame whose payload is being received
        self._payload = bytearray()
        self._payload_got = 0

    @property
    def in_frame(self) -> bool:
        """True when the stream stands inside a frame: its end now would be a truncation."""
        return self._header is not None or self._end > self._begin

    def buffer(self) -> memoryview:
        """Return where the next bytes are wanted; never empty."""
        if self._header is not None:
            return memoryview(self._payload)[self._payload_got :]
        return memoryview(self._scratch)[self._end :]

    def received(self, n: int) -> list[Frame]:
        """Take note of `n` bytes placed at the beginning of `buffer()`; return the frames now complete."""
        frames: list[Frame] = []
        if self._header is not None:
            self._payload_got += n
            if self._payload_got < len(self._payload):
                return frames
            frames.append(self._take_payload())
        else:
            self._end += n
        while (header_b := self._begin_frame()) is not None:
            if not self._fill_header(header_b):
                break
            if self._payload_got < len(self._payload):
                break
            frames.append(self._take_payload())
        if self._header is None:
            self._make_room()
        return frames

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """Take bytes from a caller that has its own buffer (tests, in-memory streams)."""
        frames: list[Frame] = []
        view = memoryview(data)
        while view:
            room = self.buffer()
            n = min(len(room), len(view))
            room[:n] = view[:n]
            room.release()
            frames += self.received(n)
            view = view[n:]
        return frames

    def _begin_frame(self) -> int | None:
        """Check the sizes of the next frame; return its header size, or None while they are incomplete."""
        if self._end - self._begin < PREFIX.size:
            return None
        header_b, payload_b = PREFIX.unpack_from(self._scratch, self._begin)
        if header_b > self.limits.header_max_b or payload_b > self.limits.payload_max_b:
            raise RemoteProtocolError("frame is too large", header_b=header_b, payload_b=payload_b)
        return int(header_b)

    def _fill_header(self, header_b: int) -> bool:
        """Take the header and what has come of the payload out of the scratch; False while incomplete."""
        need = PREFIX.size + header_b
        if self._end - self._begin < need:
            return False
        _, payload_b = PREFIX.unpack_from(self._scratch, self._begin)
        at = self._begin + PREFIX.size
        self._header = bytes(memoryview(self._scratch)[at : at + header_b])
        self._begin += need
        self._payload = bytearray(payload_b)
        self._payload_got = min(payload_b, self._end - self._begin)
        self._payload[: self._payload_got] = memoryview(self._scratch)[
            self._begin : self._begin + self._payload_got
        ]
        self._begin += self._payload_got
        return True

    def _take_payload(self) -> Frame:
        assert self._header is not None
        frame = Frame(self._header, memoryview(self._payload))
        self._header, self._payload, self._payload_got = None, bytearray(), 0
        return frame

    def _make_room(self) -> None:
        """Move what is unread to the front, and grow the scratch when a header is larger than it."""
        unread = self._end - self._begin
        need = PREFIX.size
        if unread >= PREFIX.size:
            need += PREFIX.unpack_from(self._scratch, self._begin)[0]
        size = max(_SCRATCH_B, need) if need > _SCRATCH_B else _SCRATCH_B
        if size != len(self._scratch):
            grown = bytearray(size)
            grown[:unread] = memoryview(self._scratch)[self._begin : self._end]
            self._scratch = grown
        elif self._begin:
            self._scratch[:unread] = self._scratch[self._begin : self._end]
        self._begin, self._end = 0, unread
