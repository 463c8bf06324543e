"""Copies of whole images: the sender, over a network in memory and on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import lz4.block
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.copies import SlowPools, connected, images
from tests.kit.virtual import run
from walbd.daemon.conn import Connection
from walbd.daemon.copying import ImageSource
from walbd.daemon.full_copy import send_full
from walbd.errors import ConnectError, DiskFailed, DiskFull, ForceStopped, RemoteError
from walbd.protocol.base import End
from walbd.protocol.transfer import FullChunk, Packing
from walbd.units import KIB, LB, MIB


class Sent:
    """What a receiver makes of a stream that begins at `begin_b`."""

    def __init__(self, begin_b: int = 0) -> None:
        self.image = bytearray(begin_b)
        self.chunks = 0
        self.wire_b = 0

    async def take(self, conn: Connection) -> None:
        while True:
            message, payload = await conn.receive()
            if isinstance(message, End):
                return
            assert isinstance(message, FullChunk)
            assert message.offset_b == len(self.image)
            data = bytes(payload) or bytes(message.size_b)
            if message.packing is Packing.LZ4:
                data = lz4.block.decompress(data, uncompressed_size=message.size_b)
            assert len(data) == message.size_b
            if payload:
                assert xxhash.xxh3_64_intdigest(data) == message.xxh
            self.image += data
            self.chunks += 1
            self.wire_b += len(payload)


async def copy(source: ImageSource, *, frames_max: int = 1000, latency_s: float = 0.0, begin_b: int = 0) -> Sent:
    """Send an image in memory."""
    here, there = connected(frames_max)
    sent = Sent(begin_b)
    taking = asyncio.ensure_future(sent.take(there))
    pools = SlowPools(random.Random(1), latency_s)
    wire_b = await send_full(here, pools, source, bulk_b=4 * KIB, packing=Packing.LZ4, begin_b=begin_b)
    await taking
    assert wire_b == sent.wire_b
    return sent


def reader(image: bytes, latency_s: float = 0.0) -> Callable[[int, int], Awaitable[bytes]]:
    async def read(offset_b: int, size_b: int) -> bytes:
        await asyncio.sleep(latency_s)
        return image[offset_b : offset_b + size_b]

    return read


@settings(max_examples=20, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_copy_is_exact(data: st.DataObject, seed: int) -> None:
    """From the beginning or from the middle; with a part behind the end of the data, which reads as zeros."""
    rng = random.Random(seed)
    image, _ = images(rng, size_max_lb=20_000, bulk_b=64 * KIB)
    begin_b = data.draw(st.sampled_from([0, 0, len(image) // LB // 2 * LB, len(image)]))
    size_b = len(image) + data.draw(st.sampled_from([0, 0, LB, 3 * MIB]))
    latency_s = data.draw(st.sampled_from([0, 0.1, 100]))
    ticks: list[int] = []
    source = ImageSource(read=reader(image, latency_s), size_b=size_b, data_b=len(image), tick=ticks.append)
    frames_max = data.draw(st.sampled_from([1, 1000]))
    sent = run(copy(source, begin_b=begin_b, latency_s=latency_s, frames_max=frames_max))
    assert sent.image[begin_b:] == (image + bytes(size_b - len(image)))[begin_b:]
    assert ticks == sorted(ticks)
    assert ticks[-1:] == ([size_b] if begin_b < size_b else [])


def test_a_large_empty_image_costs_few_messages() -> None:
    async def read(_offset_b: int, size_b: int) -> bytes:
        return bytes(size_b)

    sent = run(copy(ImageSource(read=read, size_b=256 * MIB)))
    assert sent.chunks == 8
    assert sent.wire_b == 0


def test_a_held_back_copy_stays_alive() -> None:
    """What is known of zeros goes out before long, too."""

    async def spend(_size_b: int, keep_alive: Callable[[], Awaitable[None]]) -> None:
        for _ in range(300):
            await asyncio.sleep(0.1)
            await keep_alive()

    sent = run(copy(ImageSource(read=reader(bytes(8 * MIB)), size_b=8 * MIB, spend=spend)))
    assert len(sent.image) == 8 * MIB


def test_an_image_that_ends_early_is_an_error() -> None:
    with pytest.raises(DiskFailed):
        run(copy(ImageSource(read=reader(bytes(MIB)), size_b=4 * MIB)))


def test_a_tick_can_give_up() -> None:
    def tick(_done_b: int) -> None:
        raise ForceStopped("enough")

    with pytest.raises(ForceStopped):
        run(copy(ImageSource(read=reader(bytes(4 * MIB)), size_b=4 * MIB, tick=tick)))


@pytest.mark.parametrize("says_why", [True, False])
def test_the_peer_says_why_it_ends(says_why: bool) -> None:
    """Its reason is what comes out, not that the connection was lost."""
    image = random.Random(1).randbytes(16 * MIB)

    async def play() -> None:
        here, there = connected(2)

        async def refuse() -> None:
            await there.receive()
            if says_why:
                await there.send_error(DiskFull("no room"))
            await there.close()

        refusing = asyncio.ensure_future(refuse())
        source = ImageSource(read=reader(image), size_b=len(image))
        try:
            await send_full(here, SlowPools(random.Random(1), 0), source, bulk_b=4 * KIB, packing=Packing.NONE)
        finally:
            await refusing

    with pytest.raises(RemoteError if says_why else ConnectError) as caught:
        run(play())
    if isinstance(caught.value, RemoteError):
        assert caught.value.remote_code == "disk-full"
