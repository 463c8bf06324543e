"""The exchange of a comparing copy, both halves over a network in memory and on virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.copies import CopyPair, images
from tests.kit.virtual import run
from walbd.daemon import hash_sync
from walbd.daemon.conn import Connection
from walbd.daemon.hash_sync import Differences, differing_runs
from walbd.errors import (
    ConnectError,
    CorruptData,
    DiskFailed,
    DiskFull,
    ForceStopped,
    RemoteError,
    RemoteProtocolError,
    TimedOut,
    WalbError,
)
from walbd.format.hashes import hash_bulks, xxh3
from walbd.protocol.base import End, Ok
from walbd.protocol.sync import HashRun, HashWanted
from walbd.protocol.transfer import WdiffChunk
from walbd.units import KIB, LB, MIB

BULK_B = 4 * KIB


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**32))
def test_the_destination_becomes_the_source(data: st.DataObject, seed: int) -> None:
    """Whatever the images, bulks and ranges, and whatever order the work comes in."""
    rng = random.Random(seed)
    bulk_b = data.draw(st.sampled_from([LB, 1536, 4 * KIB, 64 * KIB, 300 * KIB]))
    source, dest = images(rng, size_max_lb=data.draw(st.sampled_from([1, 9, 300, 1500])), bulk_b=bulk_b)
    pair = CopyPair(
        rng,
        source,
        dest,
        bulk_b=bulk_b,
        latency_s=data.draw(st.sampled_from([0, 0.01, 100])),
        frames_max=data.draw(st.sampled_from([1, 2, 1000])),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hash_sync, "RANGE_B", data.draw(st.sampled_from([4 * KIB, 16 * KIB, 128 * KIB, 4 * MIB])))
        patch.setattr(hash_sync, "PACK_B", data.draw(st.sampled_from([1, 64 * KIB, 4 * MIB])))
        patch.setattr(hash_sync, "PACK_SPAN_B", data.draw(st.sampled_from([64 * KIB, 256 * MIB])))
        patch.setattr(hash_sync, "RECORD_B", data.draw(st.sampled_from([LB, 16 * KIB, 256 * KIB])))
        found = run(pair.run())
    assert pair.sink.finished
    assert pair.sink.laid_over(dest, len(source)) == source
    assert found.size_b == len(source)
    padded = dest[: len(source)] + bytes(max(len(source) - len(dest), 0))
    bulks = range(0, len(source), bulk_b)
    assert found.differing_b == sum(
        len(source[at : at + bulk_b]) for at in bulks if source[at : at + bulk_b] != padded[at : at + bulk_b]
    )
    assert pair.ticks_source[-1:] == pair.ticks_dest[-1:] == [len(source)]


def small_pair(**kwargs: Any) -> CopyPair:
    """Return a pair of images of 40 bulks, which differ in every other one."""
    rng = random.Random(5)
    source = b"".join(rng.randbytes(BULK_B) for _ in range(40))
    dest = bytearray(source)
    for at in range(0, len(dest), 2 * BULK_B):
        dest[at] ^= 1
    return CopyPair(rng, source, bytes(dest), bulk_b=BULK_B, **kwargs)


@pytest.fixture(autouse=True)
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten ranges in the small pair."""
    monkeypatch.setattr(hash_sync, "RANGE_B", 4 * BULK_B)


def test_equal_images_make_an_empty_wdiff() -> None:
    pair = small_pair()
    pair.dest = pair.source
    found = run(pair.run())
    assert pair.sink.finished
    assert found.differing_b == 0
    assert len(pair.sink.data) == found.wire_b == 32 + 4096  # the file header and the end pack
    assert pair.sink.laid_over(pair.dest, len(pair.dest)) == pair.source


def test_an_empty_image_is_compared() -> None:
    pair = CopyPair(random.Random(1), b"", b"x" * LB, bulk_b=BULK_B)
    assert run(pair.run()) == Differences(0, 0, 32 + 4096)
    assert pair.sink.finished


def test_only_what_differs_is_sent() -> None:
    """Incompressible bulks, every other of which differs: about half of the image is on the wire."""
    pair = small_pair()
    found = run(pair.run())
    assert found.differing_b == len(pair.source) // 2
    assert found.differing_b < found.wire_b < found.differing_b * 1.3
    assert pair.sink.syncs > 0  # in between


def test_work_is_limited() -> None:
    """What is read ahead does not grow with the image, however slow the peer is."""
    pair = small_pair(latency_s=50, frames_max=1)
    wanted = [0]
    answered = [0]
    dest_send, source_send = pair.dest_conn.send, pair.conn.send

    async def send(message: Any, *payload: Any) -> None:
        wanted[0] += isinstance(message, HashWanted)
        await source_send(message, *payload)

    async def answer(message: Any, *payload: Any) -> None:
        answered[0] += isinstance(message, HashRun)
        assert wanted[0] - answered[0] <= hash_sync.RANGES_AHEAD + 2
        await dest_send(message, *payload)

    pair.conn.send, pair.dest_conn.send = send, answer  # type: ignore[method-assign]
    run(pair.run())
    assert pair.reading_max <= hash_sync.READS_AHEAD
    assert wanted[0] == answered[0] == 10


def test_a_held_back_source_stays_alive() -> None:
    """The limit of speed holds it for minutes; neither side gives up."""

    async def spend(size_b: int, keep_alive: Callable[[], Awaitable[None]]) -> None:
        assert size_b > 0
        for _ in range(600):
            await asyncio.sleep(0.1)
            await keep_alive()

    pair = small_pair(spend=spend)
    run(pair.run())
    assert pair.sink.laid_over(pair.dest, len(pair.dest)) == pair.source


@pytest.mark.parametrize("at", range(0, 40 * BULK_B, 8 * BULK_B))
@pytest.mark.parametrize("who", ["source-read", "source-short", "source-tick", "dest-read", "dest-tick"])
def test_an_error_ends_both(who: str, at: int) -> None:
    """It comes out where it happened, and at the other side as what the peer said."""
    pair = small_pair(latency_s=0.01)
    error: WalbError = DiskFailed("broken", offset=at)

    def fail(done_b: int) -> None:
        if done_b > at:
            raise error

    if who in ("source-read", "source-short"):
        read = pair.read_source

        async def read_or_fail(offset_b: int, size_b: int) -> bytes:
            if offset_b >= at and who == "source-read":
                raise error
            data = await read(offset_b, size_b)
            return data if offset_b < at else data[:-LB]

        pair.read_source = read_or_fail  # type: ignore[method-assign]
    elif who == "source-tick":
        error = ForceStopped("stopped")
        pair.on_source_tick = fail
    elif who == "dest-read":

        def read_dest(offset_b: int, size_b: int) -> bytes:
            fail(offset_b + 1)
            return pair.dest[offset_b : offset_b + size_b]

        pair.read_dest = read_dest
    else:
        pair.on_dest_tick = fail
    with pytest.raises(WalbError) as caught:
        run(pair.run())
    code = "force-stopped" if who == "source-tick" else "disk-failed"
    if who.startswith("source"):
        assert caught.value.code == code
        assert isinstance(pair.dest_error, RemoteError)
        assert pair.dest_error.remote_code == code
    else:
        assert pair.dest_error is error
        assert isinstance(caught.value, RemoteError)
        assert caught.value.remote_code == code
    assert not pair.sink.finished


@pytest.mark.parametrize("frames_max", [1, 1000])
@pytest.mark.parametrize("at", range(4))
def test_a_full_disk_is_told(at: int, frames_max: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The source hears the reason although it is sending, and however little the connection holds."""
    monkeypatch.setattr(hash_sync, "PACK_B", BULK_B)
    pair = small_pair(frames_max=frames_max)
    pair.sink.fail_at, pair.sink.error = at, DiskFull("no room")
    with pytest.raises(RemoteError) as caught:
        run(pair.run())
    assert caught.value.remote_code == "disk-full"
    assert isinstance(pair.dest_error, DiskFull)


@pytest.mark.parametrize("side", ["source", "dest"])
def test_the_connection_breaks_at_every_frame(side: str) -> None:
    whole = small_pair()
    run(whole.run())
    stream = cast(Any, whole.conn if side == "source" else whole.dest_conn)._stream
    assert stream.sent > 10
    for at in range(stream.sent):
        pair = small_pair()
        cast(Any, pair.conn if side == "source" else pair.dest_conn)._stream.break_at = at
        with pytest.raises(ConnectError):
            run(pair.run())
        assert isinstance(pair.dest_error, ConnectError)


def test_a_silent_peer_is_given_up() -> None:
    pair = small_pair()
    with pytest.raises(TimedOut):
        run(pair.send())
    with pytest.raises(TimedOut):
        run(pair.serve())


# --- peers that do not keep to the exchange


def wanted(offset_bulks: int, bulks: int, extra_b: int = 0) -> HashWanted:
    return HashWanted(offset_b=offset_bulks * BULK_B, size_b=bulks * BULK_B + extra_b)


async def until_error(conn: Connection) -> None:
    while True:
        await conn.receive()


@pytest.mark.parametrize(
    "messages",
    [
        [wanted(1, 1)],  # not the first
        [wanted(0, 1), wanted(0, 1)],  # twice
        [wanted(0, 4), wanted(5, 1)],  # a hole
        [wanted(0, 41)],  # beyond the end
        [wanted(0, 1, LB)],  # no whole bulk
        [wanted(0, 1)] * 1 + [HashRun(offset_b=0)],
        [Ok()],
        [End()],  # nothing was compared
        [wanted(0, 40), End()],  # the hashes cannot have come yet
        [WdiffChunk()],  # without payload
    ],
)
def test_a_wrong_source_is_refused(messages: list[Any]) -> None:
    pair = small_pair(latency_s=1)

    async def play() -> None:
        serving = asyncio.ensure_future(pair.serve())
        for message in messages:
            await pair.conn.send(message)
        with pytest.raises(RemoteError) as caught:
            await until_error(pair.conn)
        assert caught.value.remote_code == "remote-protocol"
        with pytest.raises(RemoteProtocolError):
            await serving

    run(play())
    assert not pair.sink.finished


def test_too_many_wanted_ranges_are_refused() -> None:
    pair = CopyPair(random.Random(1), bytes(200 * LB), bytes(200 * LB), bulk_b=LB, latency_s=1)

    async def play() -> None:
        serving = asyncio.ensure_future(pair.serve())
        for number in range(hash_sync.RANGES_MAX + 3):
            await pair.conn.send(HashWanted(offset_b=number * LB, size_b=LB))
        with pytest.raises(RemoteProtocolError, match="too many"):
            await serving

    run(play())


def test_payload_where_none_belongs_is_refused() -> None:
    pair = small_pair()

    async def play() -> None:
        serving = asyncio.ensure_future(pair.serve())
        await pair.conn.send(wanted(0, 4), b"more")
        with pytest.raises(RemoteProtocolError):
            await serving

    run(play())


def test_damaged_packs_are_refused() -> None:
    pair = small_pair()
    send = pair.conn.send

    async def damage(message: Any, *payload: Any) -> None:
        if isinstance(message, WdiffChunk):
            data = bytearray(b"".join(payload))
            data[HEADER_AND_SOME] ^= 1
            payload = (data,)
        await send(message, *payload)

    pair.conn.send = damage  # type: ignore[method-assign]
    with pytest.raises(RemoteError) as caught:
        run(pair.run())
    assert caught.value.remote_code == "corrupt-data"
    assert isinstance(pair.dest_error, CorruptData)


HEADER_AND_SOME = 32 + 12


def hashes(pair: CopyPair, offset_bulks: int, bulks: int) -> bytes:
    data = pair.dest[offset_bulks * BULK_B : (offset_bulks + bulks) * BULK_B]
    return hash_bulks(xxh3, data, BULK_B, pair.seed)


@pytest.mark.parametrize("why", ["offset", "short", "long", "empty", "message", "early-ok", "not-asked-for"])
def test_a_wrong_destination_is_refused(why: str) -> None:
    pair = small_pair(latency_s=1)
    conn = pair.dest_conn

    async def play() -> None:
        sending = asyncio.ensure_future(pair.send())
        await conn.expect(HashWanted)
        good = hashes(pair, 0, 4)
        match why:
            case "offset":
                await conn.send(HashRun(offset_b=BULK_B), good)
            case "short":
                await conn.send(HashRun(offset_b=0), good[:-16])
            case "long":
                await conn.send(HashRun(offset_b=0), good + bytes(16))
            case "empty":
                await conn.send(HashRun(offset_b=0))
            case "message":
                await conn.send(End())
            case "early-ok":
                await conn.send(Ok())
            case _:
                for number in range(hash_sync.RANGES_AHEAD + 2):
                    await conn.send(HashRun(offset_b=4 * number * BULK_B), hashes(pair, 4 * number, 4))
        with pytest.raises(RemoteProtocolError):
            await sending

    run(play())


def test_an_ok_before_the_end_is_refused() -> None:
    """All hashes came, but not everything has been sent yet."""
    pair = small_pair(latency_s=2)
    conn = pair.dest_conn

    async def play() -> None:
        sending = asyncio.ensure_future(pair.send())
        asked = 0
        while asked < 10:
            message, _ = await conn.receive()
            if isinstance(message, HashWanted):
                await conn.send(HashRun(offset_b=message.offset_b), hashes(pair, 4 * asked, 4))
                asked += 1
        await conn.send(Ok())
        with pytest.raises(RemoteProtocolError):
            await sending

    run(play())


# --- what differs


def test_runs() -> None:
    """Zeros and data apart, neighbours together, records not too large."""
    rng = random.Random(1)
    bulk = rng.randbytes(BULK_B)
    zero = bytes(BULK_B)
    data = bulk + bulk + zero + zero + bulk + bulk[: 3 * LB]
    ours = hash_bulks(xxh3, data, BULK_B, 0)
    other = bytes(len(ours))
    end = 5 * BULK_B + 3 * LB
    assert differing_runs(memoryview(data), ours, ours, BULK_B) == []
    assert differing_runs(memoryview(data), ours, other, BULK_B) == [
        (0, 2 * BULK_B, False),
        (2 * BULK_B, 4 * BULK_B, True),
        (4 * BULK_B, end, False),
    ]
    mixed = other[:16] + ours[16:80] + other[:16]  # the first and the last differ
    assert differing_runs(memoryview(data), ours, mixed, BULK_B) == [
        (0, BULK_B, False),
        (5 * BULK_B, end, False),
    ]


def test_records_have_a_largest_size() -> None:
    data = memoryview(b"x" * MIB)
    ours = hash_bulks(xxh3, data, 64 * KIB, 0)
    runs = differing_runs(data, ours, bytes(len(ours)), 64 * KIB)
    assert runs == [(at, at + 256 * KIB, False) for at in range(0, MIB, 256 * KIB)]
    ours = hash_bulks(xxh3, data, MIB, 0)
    assert differing_runs(data, ours, bytes(16), MIB) == [(0, MIB, False)]
