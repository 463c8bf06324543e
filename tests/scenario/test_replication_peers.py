"""Sources that break the protocol, or whose streams are damaged: typed errors, and nothing has changed."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import make_wdiff, send_chunk
from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.daemon.conn import Connection
from walbd.errors import RemoteError
from walbd.format.meta import BaseState, Diff, Snapshot
from walbd.format.wdiff import HEADER_B, WdiffHeader, WdiffType
from walbd.ids import Gid
from walbd.protocol.base import End, Ok
from walbd.protocol.sync import (
    HashWanted,
    ReplicateDiff,
    ReplicateDone,
    ReplicateFull,
    ReplicateHash,
    ReplicateLatest,
    ReplicateOffer,
    ReplicateResync,
    ReplicateState,
    ReplicationKind,
)
from walbd.protocol.transfer import FullChunk, WdiffChunk
from walbd.units import LB

UUID = b"\x01" * 16
LINEAGE = b"\x02" * 16
OFFER = ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=LINEAGE)
FULL = ReplicateFull(size_lb=64, base=BaseState(Snapshot.clean(5), timestamp=9), uuid=UUID, bulk_b=4096)
SIZE_B = 64 * LB

Bad = Callable[[Connection], Awaitable[Any]]


@pytest.fixture
async def group(tmp_path: Path) -> AsyncIterator[Group]:
    """Archive 0 is empty, archive 1 SyncReady."""
    async with Group(tmp_path) as group:
        await group.init(1)
        yield group


async def refused(conn: Connection, act: Bad) -> str:
    """Do something wrong, and return the code of the destination's error."""

    async def until_it_ends() -> None:
        await act(conn)
        while True:
            await conn.receive()

    with pytest.raises(RemoteError) as caught:
        await until_it_ends()
    return caught.value.remote_code


def sends(*messages: Any) -> Bad:
    async def act(conn: Connection) -> None:
        for message in messages:
            await conn.send(*message if isinstance(message, tuple) else (message,))

    return act


def full_with(**fields: Any) -> ReplicateFull:
    whole: dict[str, Any] = {"size_lb": 64, "base": FULL.base, "uuid": UUID, "bulk_b": 4096} | fields
    return ReplicateFull(**whole)


def full_then(*messages: Any) -> Bad:
    return sends(FULL, *messages)


async def bad_checksum(conn: Connection) -> None:
    await conn.call(FULL)
    await send_chunk(conn, 0, b"x" * SIZE_B, lz4_packed=False, xxh=1)
    await conn.send(End())


BAD_FULL: list[tuple[str, Bad]] = [
    ("remote-protocol", sends(ReplicateLatest())),
    ("remote-protocol", sends(ReplicateDone())),
    ("remote-protocol", sends(End())),
    ("remote-protocol", sends((FULL, b"payload"))),
    ("remote-protocol", sends(full_with(size_lb=32))),
    ("remote-protocol", sends(full_with(base=BaseState(Snapshot.clean(5), Snapshot.clean(6))))),
    ("remote-protocol", sends(full_with(base=BaseState(Snapshot.clean((1 << 64) - 1))))),
    ("remote-protocol", full_then(FullChunk(offset_b=512, size_b=512))),
    ("remote-protocol", full_then(FullChunk(offset_b=0, size_b=SIZE_B + LB))),
    ("remote-protocol", full_then(FullChunk(offset_b=0, size_b=100))),
    ("remote-protocol", full_then(FullChunk(offset_b=0, size_b=512), End())),
    ("remote-protocol", full_then(WdiffChunk())),
    ("remote-protocol", full_then(FULL)),
    ("corrupt-data", bad_checksum),
]


async def test_full(group: Group) -> None:
    for number, (code, act) in enumerate(BAD_FULL):
        async with group.as_source(1) as conn:
            assert (await conn.call(OFFER)).kind is ReplicationKind.FULL
            assert await refused(conn, act) == code, number
        await group[1].settled()
        assert await group[1].state(VOL) == "SyncReady"
    feed = await group.feed()
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [0]


# --- rounds: archive 1 has generations 0 to 2


@pytest.fixture
async def pair(group: Group) -> tuple[Group, TwoFeeds]:
    feed = await group.feed()
    await feed.step(2)
    await group.replicate(0, 1, dont_merge=True)
    return group, feed


def label(begin: int, end: int, **fields: Any) -> Diff:
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), mergeable=True, timestamp=5, **fields)


WDIFF = make_wdiff({3: b"\x33" * LB}, UUID)


def diff_round(state: ReplicateState, diff: Diff, **fields: Any) -> ReplicateDiff:
    whole: dict[str, Any] = {
        "latest": state.latest,
        "latest_uuid": state.uuid,
        "size_lb": 64,
        "diff": diff,
        "uuid": UUID,
    }
    return ReplicateDiff(**(whole | fields))


def hash_round(state: ReplicateState, diff: Diff, **fields: Any) -> ReplicateHash:
    whole: dict[str, Any] = {
        "latest": state.latest,
        "latest_uuid": state.uuid,
        "size_lb": 64,
        "diff": diff,
        "uuid": UUID,
    }
    return ReplicateHash(**(whole | {"bulk_b": 512, "seed": 1} | fields))


def wdiff_then(*messages: Any) -> Callable[[ReplicateState], Bad]:
    """Begin a round that is accepted, and then send this."""
    return lambda state: sends(diff_round(state, label(2, 3)), *messages)


def comparing_then(*messages: Any) -> Callable[[ReplicateState], Bad]:
    return lambda state: sends(hash_round(state, label(2, 3, comp=True)), *messages)


def one(make: Callable[[ReplicateState], Any]) -> Callable[[ReplicateState], Bad]:
    return lambda state: sends(make(state))


DIRTY = Diff(Snapshot.clean(2), Snapshot(Gid(3), Gid(5)), comp=True)
BEYOND = make_wdiff({64: b"\x33" * LB}, UUID)
UNSORTED = WdiffHeader(WdiffType.INDEXED, UUID).pack() + WDIFF[HEADER_B:]
FLIPPED = WDIFF[:-5000] + bytes([WDIFF[-5000] ^ 1]) + WDIFF[-4999:]

BAD_ROUNDS: list[tuple[str, Callable[[ReplicateState], Bad]]] = [
    ("remote-protocol", one(lambda state: FULL)),
    ("remote-protocol", one(lambda state: End())),
    ("not-applicable", one(lambda state: diff_round(state, label(3, 4)))),
    ("not-applicable", one(lambda state: diff_round(state, label(0, 2)))),
    ("not-applicable", one(lambda state: diff_round(state, label(1, 3, comp=True)))),
    ("refused", one(lambda state: diff_round(state, label(2, 3), size_lb=65))),
    ("remote-protocol", one(lambda state: hash_round(state, label(2, 3)))),
    ("remote-protocol", one(lambda state: hash_round(state, label(1, 3, comp=True)))),
    ("remote-protocol", one(lambda state: hash_round(state, DIRTY))),
    ("remote-protocol", wdiff_then(WdiffChunk(), End())),
    ("remote-protocol", wdiff_then(FullChunk(offset_b=0, size_b=512))),
    ("corrupt-data", wdiff_then(End())),
    ("corrupt-data", wdiff_then((WdiffChunk(), WDIFF[:-4096]), End())),
    ("corrupt-data", wdiff_then((WdiffChunk(), FLIPPED), End())),
    ("corrupt-data", wdiff_then((WdiffChunk(), BEYOND), End())),
    ("corrupt-data", wdiff_then((WdiffChunk(), make_wdiff({}, LINEAGE)), End())),
    ("corrupt-data", wdiff_then((WdiffChunk(), UNSORTED), End())),
    ("remote-protocol", comparing_then(HashWanted(offset_b=512, size_b=512))),
    ("remote-protocol", comparing_then(HashWanted(offset_b=0, size_b=SIZE_B + 512))),
    ("remote-protocol", comparing_then(End())),
    ("remote-protocol", comparing_then(ReplicateLatest())),
    ("corrupt-data", comparing_then(HashWanted(offset_b=0, size_b=SIZE_B), (WdiffChunk(), FLIPPED))),
]


async def test_round(pair: tuple[Group, TwoFeeds]) -> None:
    group, feed = pair
    before = group.volume(1).record
    offer = ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=bytes.fromhex(before.archive_uuid))
    for number, (code, make) in enumerate(BAD_ROUNDS):
        async with group.as_source(1) as conn:
            assert (await conn.call(offer)).kind is ReplicationKind.ROUNDS
            state = await conn.call(ReplicateLatest())
            assert state.latest == Snapshot.clean(2)
            assert await refused(conn, make(state)) == code, number
        await group[1].settled()
        assert group.volume(1).record == before
        names = [path.name for path in (group[1].base / VOL).iterdir()]
        assert not [name for name in names if name.startswith("tmp")]
    assert await group.check(feed, 1) == [0, 1, 2]
    await feed.step()
    await group.replicate(0, 1)
    assert await group.check(feed, 1) == [0, 1, 2, 3]


@pytest.mark.parametrize("wrong", [{"latest_uuid": LINEAGE}, {"latest": Snapshot.clean(1)}])
async def test_a_round_that_continues_something_else(pair: tuple[Group, TwoFeeds], wrong: dict[str, Any]) -> None:
    """The destination has moved on: it says so, and the conversation goes on."""
    group, feed = pair
    lineage = bytes.fromhex(group.volume(1).record.archive_uuid)
    async with group.as_source(1) as conn:
        await conn.call(ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=lineage))
        state = await conn.call(ReplicateLatest())
        assert not (await conn.call(diff_round(state, label(2, 3), **wrong))).accepted
        assert not (await conn.call(hash_round(state, label(2, 3, comp=True), **wrong))).accepted
        assert await conn.call(ReplicateLatest()) == state
        assert await conn.call(ReplicateDone()) == Ok()
    assert await group.check(feed, 1) == [0, 1, 2]


# --- resync: the old history is given up, so only another copy can follow


RESYNC = ReplicateResync(size_lb=64, base=FULL.base, uuid=UUID, bulk_b=512, seed=1)
BAD_RESYNC: list[tuple[str, Bad]] = [
    ("remote-protocol", sends(RESYNC, ReplicateLatest())),
    ("remote-protocol", sends(RESYNC, End())),
    ("corrupt-data", sends(RESYNC, HashWanted(offset_b=0, size_b=SIZE_B), (WdiffChunk(), FLIPPED))),
    ("corrupt-data", sends(RESYNC, HashWanted(offset_b=0, size_b=SIZE_B), (WdiffChunk(), BEYOND))),
    ("corrupt-data", sends(RESYNC, HashWanted(offset_b=0, size_b=SIZE_B), (WdiffChunk(), UNSORTED))),
]


@pytest.mark.parametrize(("code", "act"), BAD_RESYNC)
async def test_resync(pair: tuple[Group, TwoFeeds], code: str, act: Bad) -> None:
    group, feed = pair
    async with group.as_source(1) as conn:
        offer = ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=LINEAGE, resync=True)
        assert (await conn.call(offer)).kind is ReplicationKind.RESYNC
        assert await refused(conn, act) == code
    await group[1].settled()
    assert await group[1].state(VOL) == "SyncReady"
    await group.replicate(0, 1, resync=True)
    assert await group.check(feed, 1) == [0, 2]


async def test_resync_that_is_not_begun_changes_nothing(pair: tuple[Group, TwoFeeds]) -> None:
    group, feed = pair
    offer = ReplicateOffer(volume=VOL, size_lb=64, archive_uuid=LINEAGE, resync=True)
    bad = ReplicateResync(size_lb=8, base=FULL.base, uuid=UUID, bulk_b=512, seed=1)
    for message in (FULL, ReplicateLatest(), bad):
        async with group.as_source(1) as conn:
            await conn.call(offer)
            assert await refused(conn, sends(message)) == "remote-protocol"
    async with group.as_source(1) as conn:
        await conn.call(offer)
        conn.abort()
    await group[1].settled()
    assert await group.check(feed, 1) == [0, 1, 2]
