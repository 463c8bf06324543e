"""wdiff transfer: every verdict in its order, and streams that must be refused without a trace."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.kit.feeder import CONTROL, NOW, PROXY, STORAGE, ArchiveRig, Feed, make_wdiff, offer_wdiff
from tests.kit.wdiffs import damage
from walbd.archive.slots import Slots
from walbd.archive.states import State
from walbd.daemon.conn import Connection, Me
from walbd.daemon.states import StopMode
from walbd.errors import RemoteError
from walbd.format.compress import CompressOpt
from walbd.format.meta import Diff, Snapshot, diff_name
from walbd.format.wdiff import WdiffHeader, WdiffType
from walbd.ids import NIL_UUID, Gid
from walbd.protocol import control as c
from walbd.protocol.base import End, Kind, Ok
from walbd.protocol.transfer import Verdict, WdiffChunk, WdiffOffer, WdiffVerdict

VOL = "vol0"
ARCHIVE = Me(node="a1", kind=Kind.ARCHIVE, io_timeout_s=20)


def contents(base: Path) -> dict[str, bytes]:
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


def clean(begin: int, end: int, **kwargs: Any) -> Diff:
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), timestamp=NOW + end, **kwargs)


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 3."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=3)
        yield feed


async def ask(
    feed: Feed, diff: Diff, *, uuid: bytes | None = None, size_lb: int | None = None, me: Me = PROXY
) -> Any:
    """Offer, and return the verdict, or the code of the error."""
    try:
        answer = await feed.rig.call(
            WdiffOffer(
                volume=feed.name,
                sender=me.kind,
                uuid=uuid or feed.uuid,
                size_lb=size_lb or feed.size_lb,
                diff=diff,
            ),
            me,
        )
    except RemoteError as exc:
        return exc.remote_code
    assert isinstance(answer, WdiffVerdict)
    return answer.verdict


# Everything that is wrong at once: the answer must follow the order of the table.
ALL_WRONG: dict[str, Any] = {"uuid": b"x" * 16, "size_lb": 1 << 20, "diff": clean(0, 1)}


@pytest.mark.parametrize(
    ("state", "during", "expected"),
    [
        (State.STOPPED, None, Verdict.STOPPED),
        (State.STOPPED, "Start", Verdict.STOPPED),
        (State.SYNC_READY, "FullSync", Verdict.SYNCING),
        (State.ARCHIVED, "HashSync", Verdict.SYNCING),
        (State.ARCHIVED, "WdiffRecv", Verdict.BUSY),
        (State.SYNC_READY, None, Verdict.NOT_READY),
        (State.ARCHIVED, "ReplSyncAsServer", Verdict.NOT_READY),
        (State.SYNC_READY, "Resync", Verdict.NOT_READY),
        (State.CLEAR, "InitVol", Verdict.NOT_READY),
        (State.SYNC_READY, "ClearVol", Verdict.NOT_READY),
        (State.STOPPED, "ClearVol", Verdict.NOT_READY),
        (State.STOPPED, "ResetVol", Verdict.NOT_READY),
        (State.BROKEN, None, "bad-state"),
        (State.ARCHIVED, None, Verdict.DIFFERENT_UUID),
    ],
)
async def test_state_decides_before_uuid_size_and_relation(
    feed: Feed, state: State, during: str | None, expected: Any
) -> None:
    machine = feed.rig.volume(VOL).machine
    machine.state, machine.during = state, during
    assert await ask(feed, **ALL_WRONG) == expected
    machine.during = None


async def test_verdicts_of_an_archived_volume_in_order(feed: Feed) -> None:
    assert await ask(feed, **ALL_WRONG, me=STORAGE) == "refused"
    assert await ask(feed, **ALL_WRONG, me=CONTROL) == "refused"
    with feed.rig.volume(VOL).machine.stop_flag(StopMode.GRACEFUL):
        assert await ask(feed, **ALL_WRONG) == "stopping"
    assert await ask(feed, **ALL_WRONG) is Verdict.DIFFERENT_UUID
    volume = feed.rig.volume(VOL)
    record = volume.record
    volume.record = msgspec.structs.replace(record, uuid=NIL_UUID.hex())  # a replication has not told it yet
    assert await ask(feed, **ALL_WRONG) is Verdict.NOT_READY
    volume.record = record
    assert await ask(feed, **(ALL_WRONG | {"uuid": feed.uuid})) is Verdict.SMALLER
    assert await ask(feed, clean(0, 1)) is Verdict.TOO_OLD
    assert await ask(feed, clean(1, 3)) is Verdict.TOO_OLD
    assert await ask(feed, clean(4, 5)) is Verdict.TOO_NEW
    assert await ask(feed, clean(2, 4, comp=True)) is Verdict.NOT_APPLICABLE
    unknown = Feed(feed.rig, "nobody")
    assert await ask(unknown, clean(0, 1), uuid=feed.uuid) is Verdict.NOT_FOUND
    assert "nobody" not in feed.rig.server.volumes


async def test_sender_must_be_a_proxy(feed: Feed) -> None:
    """Archives replicate, which tells of histories."""
    for me, sender in ((STORAGE, Kind.PROXY), (ARCHIVE, Kind.PROXY), (ARCHIVE, Kind.ARCHIVE)):
        with pytest.raises(RemoteError, match="by proxies only"):
            await feed.rig.call(
                WdiffOffer(volume=VOL, sender=sender, uuid=feed.uuid, size_lb=64, diff=clean(3, 4)), me
            )


async def test_vanished_image_is_not_found(feed: Feed, tmp_path: Path) -> None:
    (tmp_path / VOL / "base.img").unlink()
    assert await ask(feed, clean(3, 4)) is Verdict.NOT_FOUND
    assert await feed.rig.state(VOL) == "Archived"


async def test_verdict_names_what_the_archive_has(feed: Feed) -> None:
    async with feed.rig.dial(PROXY) as conn:
        answer = await conn.call(
            WdiffOffer(volume=VOL, sender=Kind.PROXY, uuid=feed.uuid, size_lb=64, diff=clean(7, 8))
        )
    assert answer.latest == Snapshot.clean(3)
    assert "hash backup" in answer.hint


async def test_lost_acknowledgement(feed: Feed) -> None:
    """The resend is too old; a merged resend that overlaps is taken and labelled from what is there."""
    feed.scribble()
    first = feed.snapshot()
    first_data = feed._unsent[0][1]
    await feed.send()
    async with feed.rig.dial(PROXY) as conn:
        again = await offer_wdiff(conn, VOL, first, first_data, uuid=feed.uuid, size_lb=64)
    assert again is Verdict.TOO_OLD
    blocks = {at: bytes(feed.image[at * 512 : at * 512 + 512]) for at in range(64)}
    feed.write(10, 3)
    feed.snapshot()
    blocks.update({at: bytes(feed.image[at * 512 : at * 512 + 512]) for at in (10, 11, 12)})
    async with feed.rig.dial(PROXY) as conn:
        word = await offer_wdiff(
            conn, VOL, clean(3, 5), make_wdiff(dict(blocks), feed.uuid), uuid=feed.uuid, size_lb=64
        )
    assert word == Ok()
    diffs = (await feed.rig.call(c.GetDiff(volume=VOL))).diffs
    assert [str(diff) for diff in diffs][-2:] == ["|3|-->|4|", "|4|-->|5|"]
    assert diffs[-1].mergeable
    assert await feed.check() == [0, 1, 2, 3, 4, 5]


async def test_larger_device_with_auto_resize(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, auto_resize=True) as rig:
        feed = Feed(rig)
        await feed.begin(steps=1)
        feed.size_lb = 96
        feed.image += bytes(32 * 512)
        feed.write(60, 20)
        feed.snapshot()
        assert await feed.send() == [Ok()]
        assert (await rig.call(c.GetVolSize(volume=VOL))).value == 96
        assert (await rig.status(VOL)).size_lb == 96
        await rig.restart()
        feed.images = {gid: image.ljust(96 * 512, b"\0") for gid, image in feed.images.items()}
        assert await feed.check() == [0, 1, 2]  # the added part reads as zeros in older generations


async def test_smaller_device_is_taken(feed: Feed) -> None:
    assert await ask(feed, clean(3, 4), size_lb=1) is Verdict.ACCEPT  # and drops the connection
    await feed.rig.settled()
    assert await feed.check() == [0, 1, 2, 3]


async def test_wdiffs_of_every_compression_are_stored_as_sent(feed: Feed, tmp_path: Path) -> None:
    for kind in ("none", "gzip", "snappy", "lzma", "lz4", "zstd:3"):
        feed.scribble()
        diff = feed.snapshot()
        data = make_wdiff(dict(feed_blocks(feed)), feed.uuid, CompressOpt.parse(kind))
        feed._unsent = []
        async with feed.rig.dial(PROXY) as conn:
            assert await offer_wdiff(conn, VOL, diff, data, uuid=feed.uuid, size_lb=64, pieces=3) == Ok()
        assert (tmp_path / VOL / diff_name(diff)).read_bytes() == data
    assert (await feed.check())[-1] == 9
    assert {d.size_b for d in (await feed.rig.call(c.GetDiff(volume=VOL))).diffs} >= {len(data)}


def feed_blocks(feed: Feed) -> dict[int, bytes]:
    return {at: bytes(feed.image[at * 512 : at * 512 + 512]) for at in range(feed.size_lb)}


async def test_header_without_uuid_gets_the_right_one(feed: Feed, tmp_path: Path) -> None:
    feed.scribble()
    diff = feed.snapshot()
    data = feed._unsent.pop()[1]
    async with feed.rig.dial(PROXY) as conn:
        bare = WdiffHeader(WdiffType.SORTED, NIL_UUID).pack() + data[32:]
        assert await offer_wdiff(conn, VOL, diff, bare, uuid=feed.uuid, size_lb=64) == Ok()
    assert (tmp_path / VOL / diff_name(diff)).read_bytes() == data


async def test_gather_latest(feed: Feed) -> None:
    from walbd.protocol.transfer import GatherLatest

    await feed.rig.call(c.ArchiveInitVol(volume="new"))
    rows = (await feed.rig.call(GatherLatest(volumes=["nobody", VOL, "new"]), STORAGE)).rows
    none = (1 << 64) - 1
    assert [(row.volume, row.gid) for row in rows] == [("nobody", none), (VOL, 3), ("new", none)]
    assert rows[1].timestamp == feed.now


# --- streams that must be refused


def with_uuid(data: bytes, _feed: Feed) -> bytes:
    return WdiffHeader(WdiffType.SORTED, b"z" * 16).pack() + data[32:]


def flipped_payload(data: bytes, _feed: Feed) -> bytes:
    return data[:4300] + bytes([data[4300] ^ 1]) + data[4301:]


def undecodable(_data: bytes, feed: Feed) -> bytes:
    """Good checksums over bytes that do not decompress."""
    import struct

    from walbd.ext.checksum import checksum

    good = make_wdiff({0: b"a" * 512, 1: b"b" * 512}, feed.uuid, CompressOpt.parse("zstd:1"))
    pack = bytearray(good[32:])
    address, blocks, flags, kind, _, offset, size, _, _ = struct.unpack_from("<QIBBHIIII", pack, 16)
    pack[4096 : 4096 + size] = b"\xee" * size
    record = struct.pack("<QIBBHIIII", address, blocks, flags, kind, 0, offset, size, checksum(b"\xee" * size), 0)
    pack[16:48] = record
    pack[:4] = bytes(4)
    pack[:4] = checksum(pack[:4096]).to_bytes(4, "little")
    return good[:32] + bytes(pack)


BAD_STREAMS: dict[str, tuple[Callable[[bytes, Feed], bytes], str, str]] = {
    "no-header": (lambda data, _: data[:20], "corrupt-data", "ends within its header"),
    "bad-header": (lambda data, _: b"\xff" + data[1:], "corrupt-data", "wdiff header does not match"),
    "other-uuid": (with_uuid, "corrupt-data", "another uuid"),
    "indexed": (
        lambda data, feed: WdiffHeader(WdiffType.INDEXED, feed.uuid).pack() + data[32:],
        "corrupt-data",
        "only sorted",
    ),
    "pack-header": (lambda data, _: data[:60] + b"\xff" + data[61:], "corrupt-data", "pack header does not match"),
    "payload": (flipped_payload, "corrupt-data", "stored data does not match"),
    "no-end-pack": (lambda data, _: data[:-4096], "corrupt-data", "without an end pack"),
    "cut-pack": (lambda data, _: data[: 32 + 4096 + 100], "corrupt-data", "another size than its header says"),
    "cut-pack-header": (lambda data, _: data[:-100], "corrupt-data", "shorter than its header"),
    "only-header": (lambda data, _: data[:32], "corrupt-data", "without an end pack"),
    "after-the-end": (lambda data, _: data + data[32:], "corrupt-data", "follows the end pack"),
    "beyond-the-volume": (
        lambda _, feed: make_wdiff({62: b"a" * 512, 63: b"b" * 512, 64: b"c" * 512}, feed.uuid),
        "corrupt-data",
        "beyond the end of the volume",
    ),
    "undecodable": (undecodable, "corrupt-data", "does not decompress"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
async def test_bad_stream_is_refused_and_leaves_nothing(feed: Feed, tmp_path: Path, name: str) -> None:
    make, code, text = BAD_STREAMS[name]
    before = contents(tmp_path)
    feed.scribble(20)
    diff = feed.snapshot()
    data = make(feed._unsent[0][1], feed)
    with pytest.raises(RemoteError) as caught:
        async with feed.rig.dial(PROXY) as conn:
            await offer_wdiff(conn, VOL, diff, data, uuid=feed.uuid, size_lb=64)
    assert (caught.value.remote_code, text in caught.value.message) == (code, True), caught.value
    assert caught.value.hint
    assert "offset" in caught.value.facts
    await feed.rig.settled()
    assert contents(tmp_path) == before
    assert await feed.send() == [Ok()]  # the good one is still welcome
    assert await feed.check() == [0, 1, 2, 3, 4]


async def test_random_damage_never_gets_in(feed: Feed, tmp_path: Path) -> None:
    rng = random.Random(5)
    feed.scribble(20)
    diff = feed.snapshot()
    good = feed._unsent[0][1]
    before = contents(tmp_path)
    refused = 0
    for _ in range(40):
        bad = damage(good, rng)
        if bad == good:
            continue
        with pytest.raises(RemoteError) as caught:
            async with feed.rig.dial(PROXY) as conn:
                await offer_wdiff(conn, VOL, diff, bad, uuid=feed.uuid, size_lb=64)
        assert caught.value.remote_code in ("corrupt-data", "remote-protocol")
        refused += 1
    assert refused > 30
    await feed.rig.settled()
    assert contents(tmp_path) == before
    assert await feed.send() == [Ok()]


@pytest.mark.parametrize("message", [Ok(), c.GetPid(), WdiffChunk()], ids=["ok", "request", "empty-chunk"])
async def test_other_messages_in_the_stream(feed: Feed, tmp_path: Path, message: Any) -> None:
    before = contents(tmp_path)
    async with feed.rig.dial(PROXY) as conn:
        offer = WdiffOffer(volume=VOL, sender=Kind.PROXY, uuid=feed.uuid, size_lb=64, diff=clean(3, 4))
        await conn.call(offer)
        await conn.send(message)
        with pytest.raises(RemoteError) as caught:
            await conn.expect(Ok)
    assert caught.value.remote_code == "remote-protocol"
    await feed.rig.settled()
    assert contents(tmp_path) == before


async def begin(conn: Connection, feed: Feed) -> bytes:
    """Send the first half of a wdiff; return the second."""
    feed.scribble(20)
    diff = feed.snapshot()
    data = feed._unsent[0][1]
    await conn.call(WdiffOffer(volume=VOL, sender=Kind.PROXY, uuid=feed.uuid, size_lb=64, diff=diff))
    await conn.send(WdiffChunk(), data[:-4096])
    return data[-4096:]


async def test_proxy_that_vanishes_leaves_nothing(feed: Feed, tmp_path: Path) -> None:
    before = contents(tmp_path)
    async with feed.rig.dial(PROXY) as conn:
        await begin(conn, feed)
        conn.abort()
    await feed.rig.settled()
    assert contents(tmp_path) == before
    assert await feed.send() == [Ok()]


async def test_graceful_stop_waits_for_the_transfer(feed: Feed) -> None:
    async with feed.rig.dial(PROXY) as conn:
        rest = await begin(conn, feed)
        job = (await feed.rig.call(c.Stop(volume=VOL))).job
        assert (await feed.rig.status(VOL)).stopping == "graceful"
        assert await ask(feed, clean(4, 5)) == "stopping"
        await conn.send(WdiffChunk(), rest)
        await conn.send(End())
        assert await conn.expect(Ok) == Ok()
    assert (await feed.rig.ended(job)).state == "done"
    assert await feed.rig.state(VOL) == "Stopped"
    await feed.rig.call(c.Start(volume=VOL))
    assert await feed.check() == [0, 1, 2, 3, 4]


async def test_forced_stop_ends_the_transfer_at_once(feed: Feed, tmp_path: Path) -> None:
    before = contents(tmp_path)
    async with feed.rig.dial(PROXY) as conn:
        await begin(conn, feed)
        assert len(list((tmp_path / VOL).glob("tmp*"))) == 1
        job = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
        with pytest.raises(RemoteError) as caught:
            await conn.expect(Ok)
        assert caught.value.remote_code == "force-stopped"
    assert (await feed.rig.ended(job)).state == "done"
    after = contents(tmp_path)
    assert after.keys() == before.keys()
    await feed.rig.call(c.Start(volume=VOL))
    assert contents(tmp_path) == before
    assert await feed.send() == [Ok()]


async def test_receptions_beyond_the_limit_wait_their_turn(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, wdiffs_max=1) as rig:
        first, second = Feed(rig, "v1"), Feed(rig, "v2")
        for feed in (first, second):
            await feed.init()
            await feed.full_backup()
            feed.scribble()
            feed.snapshot()
        diff, data = first._unsent[0]
        async with rig.dial(PROXY) as conn:
            await conn.call(WdiffOffer(volume="v1", sender=Kind.PROXY, uuid=first.uuid, size_lb=64, diff=diff))
            waiting = asyncio.ensure_future(second.send())
            slots: Slots = rig.server._wdiffs
            await slots.changed.wait_for(lambda: slots.waiting > 0)
            assert (await rig.call(c.GetStatus())).server["wdiffs_waiting"] == 1
            await conn.send(WdiffChunk(), data)
            await conn.send(End())
            assert await conn.expect(Ok) == Ok()
        assert await waiting == [Ok()]


async def test_no_room_is_an_error_that_can_be_retried(feed: Feed) -> None:
    free = feed.rig.env.fs.free_b(feed.rig.base)
    feed.rig.settings["free_reserve_b"] = free * 2
    await feed.rig.restart()
    assert await ask(feed, clean(3, 4)) == "disk-full"
    assert await feed.rig.state(VOL) == "Archived"
    feed.rig.settings["free_reserve_b"] = 0
    await feed.rig.restart()
    await feed.step()


async def test_dirty_diff_is_taken_and_named(feed: Feed, tmp_path: Path) -> None:
    """A hash backup's label, as a replica would send it."""
    diff = Diff(Snapshot.clean(3), Snapshot(Gid(4), Gid(6)), timestamp=NOW)
    data = make_wdiff({1: b"q" * 512}, feed.uuid)
    async with feed.rig.dial(PROXY) as conn:
        assert await offer_wdiff(conn, VOL, diff, data, uuid=feed.uuid, size_lb=64) == Ok()
    assert (tmp_path / VOL / diff_name(diff)).exists()
    assert await feed.rig.points(VOL) == [0, 1, 2, 3]
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(c.Restore(volume=VOL, gid=4))
    assert caught.value.remote_code == "not-reachable"
