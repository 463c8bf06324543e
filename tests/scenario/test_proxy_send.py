"""What a proxy does with each answer of an archive, and when the archive is away or wrong."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_archive import FakeArchive, clean
from tests.kit.logs import image_of
from tests.kit.mem_net import MemNetwork
from tests.kit.proxy_rig import ProxyRig, StorageSide, play_proxy, proxy, write
from walbd.errors import Busy, DiskFull, WalbError
from walbd.format.meta import Snapshot
from walbd.protocol.base import Kind
from walbd.protocol.control import GetIsWdiffSendError, Kick
from walbd.protocol.transfer import Verdict
from walbd.proxy.send import SendKey

KEPT = [Verdict.STOPPED, Verdict.SYNCING, Verdict.BUSY, Verdict.NOT_READY, Verdict.TOO_NEW, Verdict.NOT_APPLICABLE]
NEVER = {"retry_delay_min_s": 3600.0, "retry_delay_max_s": 3600.0}  # no retry by itself within a test


async def is_send_error(rig: ProxyRig, archive: str = "a0") -> bool:
    return (await rig.call(GetIsWdiffSendError(volume="vol0", archive=archive))).value


@pytest.mark.parametrize("verdict", KEPT)
async def test_not_yet_is_tried_again_for_ever(tmp_path: Path, verdict: Verdict) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(verdict)
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: len(a0.offers) >= 5)
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        assert not await is_send_error(rig)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|"]


async def test_delays_grow_up_to_the_cap(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, retry_delay_min_s=0.001, retry_delay_max_s=0.004) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: len(a0.offers) >= 6)
        assert rig.server.scheduler.failures(SendKey("vol0", "a0")) >= 5


@pytest.mark.parametrize("verdict", [Verdict.DIFFERENT_UUID, Verdict.TOO_OLD])
async def test_never_needed_is_deleted_and_the_next_goes_at_once(tmp_path: Path, verdict: Verdict) -> None:
    async with FakeArchive() as a0, FakeArchive("a1") as a1, proxy(tmp_path, **NEVER) as rig:
        for archive in (a0, a1):
            await rig.add(archive)
        storage = StorageSide(rig)
        a0.script.append(verdict)
        a0.latest = Snapshot.clean(1)
        await rig.begin()
        hold = a0.hold = asyncio.Event()
        a1.hold = hold
        await storage.send([write(0)], mergeable=False)
        await storage.send([write(50)], mergeable=False)
        hold.set()
        await rig.drained()
        assert a0.answers == [verdict, Verdict.ACCEPT]
        assert a0.diffs == ["|1|-->|2|"]
        assert a1.diffs == ["|0|-->|1|", "|1|-->|2|"]  # the other archive's set is its own
        assert not await is_send_error(rig)


@pytest.mark.parametrize("verdict", [Verdict.SMALLER, Verdict.NOT_FOUND])
async def test_what_needs_a_person_raises_the_flag_and_is_tried_slowly(tmp_path: Path, verdict: Verdict) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(verdict)
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: len(a0.offers) >= 3)
        assert await is_send_error(rig)
        hop = (await rig.status()).hops[0]
        assert hop.error
        assert str(verdict) in hop.error_text
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        a0.refuse_all(None)  # a person has done something at the archive
        await rig.drained()
        assert not await is_send_error(rig)


@pytest.mark.parametrize("how", ["kick", "kick archive", "start"])
async def test_flag_is_cleared(tmp_path: Path, how: str) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **NEVER) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SMALLER)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        await rig.until(lambda: rig.hop().needs_person and not rig.hop().sending)
        await storage.send([write(1)])
        assert await is_send_error(rig)  # new log does not make it true that nothing is wrong
        a0.refuse_all(None)
        if how == "start":
            await rig.stop_volume()
            await rig.begin()
        else:
            archive = "a0" if how == "kick archive" else ""
            assert (await rig.call(Kick(volume="vol0", archive=archive))).tasks == 1
        await rig.drained()
        assert not await is_send_error(rig)


async def test_kick_hurries_a_retry_and_a_new_wlog_does_not(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **NEVER) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.STOPPED)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        await rig.until(lambda: rig.server.scheduler.waiting())
        await storage.send([write(1)])
        (task,) = rig.server.scheduler.waiting()
        assert task.due_in_s > 3000
        assert (await rig.call(Kick())).tasks == 1
        await rig.until(lambda: len(a0.offers) == 2)
        a0.refuse_all(None)
        await rig.until(lambda: rig.server.scheduler.waiting())
        await rig.call(Kick(volume="vol0"))
        await rig.drained()
        assert a0.diffs == ["|0|-->|2|"]
        assert (await rig.call(Kick())).tasks == 0  # nothing waits any more


async def test_error_instead_of_a_verdict(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.script.extend([Busy("too many receptions"), WalbError("what is this")])
        await StorageSide(rig).send([write(0)])
        await rig.drained()
        assert a0.answers == [Verdict.ACCEPT]


async def test_error_in_the_middle_of_a_stream(tmp_path: Path) -> None:
    async with FakeArchive(size_b=16 << 20) as a0, proxy(tmp_path, wdiff_send_count_max=1) as rig:
        await rig.begin(a0)
        a0.fail_in_stream = DiskFull("no space at the archive")
        packs = [write(1024 * i, 1000, i + 1) for i in range(30)]
        await StorageSide(rig, size_lb=1 << 15).send(packs)
        await rig.until(lambda: a0.broken)
        await rig.drained()
        assert a0.answers == [Verdict.ACCEPT, Verdict.ACCEPT]
        assert a0.image == image_of(bytes(a0.size_b), packs)


async def test_archive_that_comes_back_is_noticed_without_a_kick(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **NEVER) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        await rig.drained()
        await a0.down()
        await storage.send([write(50)])
        await rig.until(lambda: rig.server.prober.is_down(str(a0.address)) and rig.hop().error_text)
        assert "connect" in (await rig.status()).hops[0].error_text
        await a0.up()
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|2|"]
        assert (await rig.status()).hops[0].error_text == ""


def test_a_kick_of_one_volume_does_not_keep_the_others_waiting(tmp_path: Path) -> None:
    async def scenario(rig: ProxyRig, a0: FakeArchive, storage: StorageSide, _net: MemNetwork) -> None:
        await rig.begin(a0, volume="vol1")
        await a0.down()
        await storage.send([write(0)])
        await StorageSide(rig, volume="vol1").send([write(0)])
        keys = [SendKey("vol0", "a0"), SendKey("vol1", "a0")]
        await rig.until(lambda: all(rig.server.scheduler.failures(key) for key in keys))
        await a0.up()
        assert (await rig.call(Kick(volume="vol0"))).tasks == 1
        await rig.until(lambda: {offer.volume for offer in a0.offers} == {"vol0", "vol1"})

    play_proxy(tmp_path, scenario, **NEVER)


async def test_archive_that_dies_in_the_middle_of_a_transfer(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.hold = asyncio.Event()
        await StorageSide(rig).send([write(0)])
        await rig.until(lambda: a0.streaming)
        await a0.down()
        await rig.until(lambda: not rig.hop().sending)
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        a0.hold = None
        await a0.up()
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|"]


async def test_nothing_is_probed_when_nothing_waits(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await a0.down()
        await StorageSide(rig).send([write(0)])
        address = str(a0.address)
        await rig.until(lambda: rig.server.prober.is_down(address))
        await rig.stop_volume()
        await rig.until(lambda: not rig.server.prober.is_down(address))


async def test_one_dead_archive_does_not_occupy_the_workers(tmp_path: Path) -> None:
    async with FakeArchive() as a0, FakeArchive("a1") as a1, proxy(tmp_path, sends_max=1) as rig:
        await rig.begin(a0, a1)
        await a0.down()
        storage = StorageSide(rig)
        for i in range(5):
            await storage.send([write(i)])
            await rig.drained("a1")
        assert a1.latest.gid_b == 5
        assert len(rig.hop("a0").diffs) == 5


@pytest.mark.parametrize("wrong", [{"name": "a7"}, {"kind": Kind.PROXY}])
async def test_another_server_at_the_address_is_not_believed(tmp_path: Path, wrong: dict[str, Any]) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await a0.down()
        other = FakeArchive(**wrong)
        other.address = a0.address
        other.refuse_all(Verdict.TOO_OLD)
        async with other:
            await StorageSide(rig).send([write(0)])
            await rig.until(lambda: rig.hop().needs_person)
            assert "another server" in rig.hop().error_text
            assert other.offers == []
            assert await rig.waiting("a0") == ["|0|-->|1|"]


async def test_vanished_wdiff_is_reported_until_the_volume_is_started_again(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0)])
        (tmp_path / "vol0" / "sendto" / "a0" / rig.files("sendto/a0")[0]).unlink()
        a0.refuse_all(None)
        await rig.until(lambda: "vanished" in rig.hop().error_text)
        assert a0.got == []
        await rig.stop_volume()
        await rig.begin()
        assert await rig.waiting("a0") == []


async def test_an_archive_that_refuses_is_asked_with_one_wdiff(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, **NEVER) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.STOPPED)
        storage = StorageSide(rig)
        key = SendKey("vol0", "a0")
        for i in range(5):
            await storage.send([write(i)])
        await rig.until(lambda: bool(rig.server.scheduler.failures(key)))
        await rig.call(Kick(volume="vol0"))  # asks as if it were for the first time
        await rig.until(lambda: str(a0.offers[-1].diff) == "|0|-->|5|")
        await rig.until(lambda: bool(rig.server.scheduler.failures(key)))
        rig.server.scheduler.hurry(key)
        await rig.until(lambda: str(a0.offers[-1].diff) == "|0|-->|1|")
        await rig.until(lambda: bool(rig.server.scheduler.failures(key)))
        a0.refuse_all(None)
        rig.server.scheduler.hurry(key)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|5|"]


async def test_diffs_gather_during_a_backup_and_are_all_delivered_afterwards(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        packs = [write(16 * i, 8, i + 1) for i in range(12)]
        for pack in packs:
            await storage.send([pack], mergeable=False)
        assert len(await rig.waiting("a0")) == 12
        assert a0.got == []
        a0.refuse_all(None)
        await rig.drained()
        assert a0.latest == Snapshot.clean(12)
        assert a0.image == image_of(bytes(a0.size_b), packs)


async def test_orphans_of_a_failed_backup_are_drained(tmp_path: Path) -> None:
    """The archive keeps its old uuid when a backup fails: what was logged meanwhile can never be used."""
    async with FakeArchive(uuid=b"o" * 16) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig, uuid=b"x" * 16)
        for i in range(4):
            await storage.send([write(i)])
        a0.refuse_all(None)
        await rig.drained()
        assert a0.got == []
        assert rig.files() == ["volume.json"]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("later_s", [0, 5])
async def test_what_waits_of_the_history_before_a_failed_backup_still_arrives(
    tmp_path: Path, restart: bool, later_s: int
) -> None:
    """A hash backup goes on above what the archive has: its log can have generations that what waits has, too."""
    async with FakeArchive(uuid=b"o" * 16) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        before, during = StorageSide(rig, uuid=b"o" * 16), StorageSide(rig, uuid=b"x" * 16)
        packs = [write(16 * i, 8, i + 1) for i in range(4)]
        for pack in packs:
            await before.send([pack], mergeable=False)
        during.gid = 1
        for i in range(5):
            label = clean(during.gid, during.gid + 1, timestamp=1_700_000_000 + later_s)
            await during.send([write(500 + i)], diff=label)
        if restart:
            await rig.restart()
            assert (await rig.status()).error == ""
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|2|", "|2|-->|3|", "|3|-->|4|"]
        assert a0.image == image_of(bytes(a0.size_b), packs)
        assert rig.files() == ["volume.json"]


async def test_what_waits_of_the_history_before_a_backup_goes_once_that_has_succeeded(tmp_path: Path) -> None:
    async with FakeArchive(uuid=b"o" * 16) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        before, during = StorageSide(rig, uuid=b"o" * 16), StorageSide(rig, uuid=b"x" * 16)
        for i in range(4):
            await before.send([write(i)], mergeable=False)
        during.gid = 1
        for i in range(5):
            await during.send([write(500 + i)], mergeable=False)
        a0.uuid, a0.latest = b"x" * 16, Snapshot.clean(1)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|1|-->|2|", "|2|-->|3|", "|3|-->|4|", "|4|-->|5|", "|5|-->|6|"]
        assert rig.files() == ["volume.json"]


async def test_three_histories_with_the_same_generations(tmp_path: Path) -> None:
    """And a crash between the end of one wdiff and the return of that before it."""
    async with FakeArchive(uuid=b"o" * 16) as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        for uuid in (b"o", b"x", b"y"):
            await StorageSide(rig, uuid=uuid * 16).send([write(0, 8, uuid[0])])
        path = rig.volume._store.sendto("a0")
        assert len(list(path.iterdir())) == 3
        newest = next(file for file in path.iterdir() if file.name.endswith(".wdiff"))
        await rig.crash()
        newest.unlink()
        await rig.up()
        assert len(list(path.iterdir())) == 2
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        a0.refuse_all(None)
        await rig.drained()
        assert a0.diffs == ["|0|-->|1|"]
        assert a0.image == image_of(bytes(a0.size_b), [write(0, 8, ord("o"))])
        assert rig.files() == ["volume.json"]
