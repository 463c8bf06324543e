"""A proxy between a storage and archives: logs come in, wdiffs go out, and the bytes are the same."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.kit.fake_archive import FakeArchive, clean, overlay
from tests.kit.golden import GOLDEN
from tests.kit.logs import Io, image_of
from tests.kit.proxy_rig import STORAGE, UUID, StorageSide, proxy, write
from walbd.daemon.conn import dial
from walbd.format.wdiff import WdiffType
from walbd.format.wdiff_read import open_wdiff
from walbd.format.wlog import WlogReader
from walbd.fs import OsFileSystem
from walbd.protocol.control import GetLatestSnap, Start
from walbd.protocol.transfer import Packing, Verdict, WlogAccepted, WlogEnd

SIZE_LB = 2048


def random_packs(rng: random.Random) -> list[list[Io]]:
    packs = []
    for _ in range(rng.randint(0, 3)):
        pack = []
        for _ in range(rng.randint(1, 6)):
            size = rng.choice([1, 2, 8, 8, 17, 40])
            kind = rng.choice(["write", "write", "write", "discard"])
            pack.append(Io(kind, rng.randrange(0, SIZE_LB - size), size, rng.randrange(0, 5)))
        if rng.random() < 0.3:
            pack.insert(rng.randrange(len(pack) + 1), Io("padding", 0, rng.choice([0, 8, 16])))
        packs.append(pack)
    return packs


@pytest.mark.parametrize(("pbs", "packing"), [(512, Packing.LZ4), (4096, Packing.NONE)])
@pytest.mark.parametrize("compress", ["none", "lz4", "zstd:1"])
async def test_archives_end_up_with_what_was_written(
    tmp_path: Path, pbs: int, packing: Packing, compress: str
) -> None:
    rng = random.Random(f"{pbs} {compress}")
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1, compress=compress)
        storage = StorageSide(rig, pbs=pbs)
        image = bytes(SIZE_LB * 512)
        a1.refuse_all(Verdict.STOPPED)
        for _ in range(8):
            packs = random_packs(rng)
            await storage.send(packs, packing=packing)
            image = image_of(image, packs)
        await rig.drained("a0")
        assert len(rig.hop("a1").diffs) == 8
        await rig.until(lambda: a1.offers)
        a1.refuse_all(None)
        await rig.drained()
        assert a0.image == a1.image == image
        assert a1.diffs == ["|0|-->|1|", "|1|-->|8|"]  # it was asked with one; the others that waited went as one
        assert rig.files() == ["volume.json"]


@pytest.mark.parametrize(
    "name",
    ["tiny.wlog", "overlap.wlog", "mix512.wlog", "mix4096.wlog", "gen512.wlog", "gen4096.wlog", "ok_tail.wlog"],
)
async def test_logs_of_the_original(tmp_path: Path, name: str) -> None:
    with OsFileSystem().open(GOLDEN / name) as file:
        reader = WlogReader(file)
        header = reader.header
        batches = [(batch.lsid, bytes(batch.data)) for batch in reader.batches()]
    size_lb = 1 << 16
    async with FakeArchive(size_b=size_lb * 512) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig, uuid=header.uuid, pbs=header.pbs, size_lb=size_lb)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            await conn.send(storage.offer(salt=header.salt, lsid=header.begin_lsid, log_max_pb=1 << 20))
            await conn.expect(WlogAccepted)
            lsid = int(header.begin_lsid)
            for begin, data in batches:
                message, payload = storage.chunk(begin, data)
                await conn.send(message, payload)
                lsid = begin + len(data) // header.pbs
            await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        await rig.drained()
        sorted_by_original = GOLDEN / f"{name}.s.wdiff"
        if sorted_by_original.exists():
            assert a0.image == overlay(bytes(len(a0.image)), [sorted_by_original.read_bytes()])
        assert any(a0.image)


async def test_what_is_stored_is_indexed_and_what_is_sent_is_sorted(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0, compress="snappy")
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0, 64, 0), write(64, 64, 3)])
        (name,) = rig.files("sendto/a0")
        with OsFileSystem().open(tmp_path / "vol0" / "sendto" / "a0" / name) as file:
            stored = open_wdiff(file).header
        assert (stored.type, stored.uuid) == (WdiffType.INDEXED, UUID)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.got[0].data[6] == WdiffType.SORTED
        assert a0.got[0].offer.size_lb == SIZE_LB
        assert a0.got[0].offer.uuid == UUID


async def test_many_packs_go_as_several_messages(tmp_path: Path) -> None:
    async with FakeArchive(size_b=16 << 20) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        packs = [[Io("write", 8 * (i + 15 * k), 8, 1 + i + k) for i in range(15)] for k in range(130)]
        await StorageSide(rig, size_lb=1 << 15).send(packs)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), packs)
        assert a0.got[0].chunks > 4
        assert max(len(got.data) for got in a0.got) > 4 << 20


async def test_empty_transfer_is_a_diff_like_any_other(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        await storage.send([])
        await storage.send([write(3)])
        await storage.send([], mergeable=False)
        await rig.drained()
        assert a0.latest.gid_b == 3
        assert a0.image == image_of(bytes(a0.size_b), [write(3)])


async def test_explicit_snapshots_are_not_merged_over(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        for i in range(6):
            await storage.send([write(i)], mergeable=i != 3)
        await rig.until(lambda: a0.offers)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|3|", "|3|-->|6|"]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"wdiff_send_count_max": 2}, ["|0|-->|1|", "|1|-->|3|", "|3|-->|5|"]),
        ({"wdiff_send_size_max": 1}, [f"|{i}|-->|{i + 1}|" for i in range(5)]),
    ],
)
async def test_limits_of_one_transfer(tmp_path: Path, settings: dict[str, int], expected: list[str]) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **settings) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        for i in range(5):
            await storage.send([write(i)])
        await rig.until(lambda: a0.offers)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == expected


async def test_diffs_of_two_histories_never_go_together(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        old, new = StorageSide(rig), StorageSide(rig, uuid=b"n" * 16)
        for i in range(2):
            await old.send([write(i)])
        new.gid = 2
        for i in range(2):
            await new.send([write(100 + i)])
        await rig.until(lambda: a0.offers)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|2|"]  # of the history that the archive knows
        assert a0.answers[-2:] == [Verdict.ACCEPT, Verdict.DIFFERENT_UUID]
        assert [offer.uuid for offer in a0.offers[-2:]] == [UUID, b"n" * 16]


async def test_lost_acknowledgement_is_sent_again_and_is_harmless(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.lose_acks = 1
        await StorageSide(rig).send([write(0)])
        await rig.drained()
        assert a0.answers == [Verdict.ACCEPT, Verdict.TOO_OLD]
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])


async def test_log_that_comes_again_replaces_what_waits(tmp_path: Path) -> None:
    """A storage whose acknowledgement was lost may send more log under the same label: the last one counts."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        before = rig.files("sendto/a0")
        storage.lsid, storage.gid = 1000, 0
        await storage.send([write(0), write(50, 8, 7)])
        assert rig.files("sendto/a0") == before
        assert rig.files("received") == []
        a0.refuse_all(None)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(0), write(50, 8, 7)])


async def test_replaced_while_it_is_being_sent_is_sent_again(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.hold = asyncio.Event()
        storage = StorageSide(rig)
        await storage.send([write(0)])
        await rig.until(lambda: a0.streaming)
        storage.lsid, storage.gid = 1000, 0
        await storage.send([write(0), write(50)])
        a0.hold.set()
        await rig.until(lambda: len(a0.offers) == 2)
        await rig.drained()
        assert a0.answers == [Verdict.ACCEPT, Verdict.TOO_OLD]  # the second was not deleted with the first


async def test_same_snapshots_under_another_name_put_the_older_aside(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        (old,) = rig.files("sendto/a0")
        storage.gid = 0
        await storage.send([write(9)], diff=clean(0, 1, mergeable=False, timestamp=1_800_000_000))
        assert old + ".quarantined" in rig.files("sendto/a0")
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        a0.refuse_all(None)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(9)])
        await rig.restart()
        assert "put aside" in (await rig.status()).error
        assert not rig.hop().diffs


async def test_delay_of_an_archive_gathers_what_comes_meanwhile(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.add(a0, delay_s=3600)
        await rig.call(Start(volume="vol0"))
        storage = StorageSide(rig)
        await storage.send([write(0)])
        await storage.send([write(1)])
        (task,) = rig.server.scheduler.waiting()
        assert task.due_in_s > 3500
        rig.server.sends.hurry(rig.volume)
        await rig.drained()
        assert a0.diffs == ["|0|-->|2|"]


async def test_latest_snap_tells_what_waits(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        assert (await rig.call(GetLatestSnap())).rows == [("vol0", "a0", 2**64 - 1, 0, 0)]
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        for i in range(3):
            await storage.send([write(i)])
        assert (await rig.call(GetLatestSnap(volume="vol0"))).rows == [("vol0", "a0", 3, 0, clean(2, 3).timestamp)]


async def test_status_shows_each_hop(tmp_path: Path) -> None:
    async with FakeArchive() as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        a1.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        for i in range(3):
            await storage.send([write(i)])
        await rig.drained("a0")
        await rig.until(lambda: rig.hop("a1").error_text)
        status = await rig.status()
        first, second = status.hops
        assert (first.dest, first.diffs, first.error, first.error_text) == ("a0", 0, False, "")
        assert first.last_sent > 0
        assert (second.dest, second.diffs, second.gid_b, second.gid_e) == ("a1", 3, 0, 3)
        assert second.oldest == clean(0, 1).timestamp
        assert "syncing" in second.error_text
        assert second.last_sent == 0
        assert (status.state, status.size_lb, status.latest_gid) == ("Started", SIZE_LB, 3)
        assert status.diffs == 3
        assert status.diffs_b == second.size_b > 0
        assert status.received > 0


async def test_size_of_the_volume_only_grows_and_is_announced(tmp_path: Path) -> None:
    async with FakeArchive(size_b=4096 * 512) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        for size_lb in (2048, 4096, 1024):
            storage.size_lb = size_lb
            await storage.send([write(0)])
            await rig.drained()
        assert [offer.size_lb for offer in a0.offers] == [2048, 4096, 4096]
        await rig.restart()
        assert (await rig.status()).size_lb == 4096
