"""A wdiff that is damaged on a proxy's disk is put aside, loudly, and nothing is ever sent over the hole."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

import walbd.proxy.volume as volume_module
from tests.kit.fake_archive import FakeArchive, clean
from tests.kit.logs import image_of
from tests.kit.proxy_rig import ProxyRig, StorageSide, proxy, write
from walbd.errors import DiskFailed
from walbd.format.meta import Snapshot
from walbd.fs import File, FileSystem, OsFileSystem, failpoints
from walbd.protocol.control import GetIsWdiffSendError, StopHow
from walbd.protocol.transfer import Verdict

HOW: dict[str, Callable[[bytes], bytes]] = {
    "header": lambda data: b"?" * 100 + data[100:],
    "data": lambda data: data[:100] + bytes([data[100] ^ 1]) + data[101:],
    "index": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "cut off": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
}


def files(rig: ProxyRig, archive: str = "a0") -> list[Path]:
    """What an archive has still to get, in order."""
    return sorted((rig.base / "vol0" / "sendto" / archive).glob("*.wdiff"))


def aside(rig: ProxyRig, archive: str = "a0") -> list[str]:
    return [path.name for path in sorted((rig.base / "vol0" / "sendto" / archive).glob("*.damaged"))]


def damage(path: Path, how: str = "data") -> bytes:
    """Damage a file where it lies, for all archives that it is linked to; return what it was."""
    good = path.read_bytes()
    path.write_bytes(HOW[how](good))
    return good


async def three(rig: ProxyRig, *archives: FakeArchive) -> StorageSide:
    """Let three wdiffs wait."""
    for archive in archives:
        archive.refuse_all(Verdict.SYNCING)
    storage = StorageSide(rig)
    for i in range(3):
        await storage.send([write(8 * i)])
    return storage


async def is_send_error(rig: ProxyRig) -> bool:
    return (await rig.call(GetIsWdiffSendError(volume="vol0", archive="a0"))).value


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("at", [0, 1, 2])
async def test_damaged_wdiff_is_put_aside_and_nothing_is_sent_over_the_hole(
    tmp_path: Path, how: str, at: int
) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = await three(rig, a0)
        path = files(rig)[at]
        damage(path, how)
        bad = path.read_bytes()
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().damaged and a0.latest.gid_b == at and len(rig.hop().diffs) == 2 - at)
        assert aside(rig) == [path.name + ".damaged"]
        assert path.with_name(path.name + ".damaged").read_bytes() == bad  # nothing is deleted
        asked = len(a0.offers)
        await storage.send([write(100)])
        await rig.until(lambda: len(a0.offers) >= asked + 3)  # it goes on asking
        assert a0.answers[-1] is Verdict.TOO_NEW
        assert a0.image == image_of(bytes(a0.size_b), [write(8 * i) for i in range(at)])
        (hop,) = (await rig.status()).hops
        assert hop.error
        assert hop.damaged == [(at, at + 1)]
        assert f"put aside: |{at}|-->|{at + 1}|" in hop.error_text
        assert "hash backup" in hop.error_text
        assert "too-new" in hop.error_text
        assert hop.diffs == 3 - at
        assert await is_send_error(rig)


async def test_it_is_still_known_after_a_restart_and_forgotten_when_the_archive_has_it(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await three(rig, a0)
        damage(files(rig)[1])
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().damaged)
        for _ in range(2):
            await rig.restart()
            assert rig.hop().damaged == [clean(1, 2)]
            assert await rig.waiting("a0") == ["|2|-->|3|"]
            assert (await rig.status()).error == ""  # said at the archive that lacks it
        await rig.stop_volume()
        await rig.begin()
        assert rig.hop().damaged == [clean(1, 2)]
        a0.latest = Snapshot.clean(2)  # another archive gave it what it lacks
        await rig.drained()
        await rig.until(lambda: not rig.hop().is_wrong)
        assert a0.diffs[-1] == "|2|-->|3|"
        assert len(aside(rig)) == 1
        assert not await is_send_error(rig)
        assert (await rig.status()).hops[0].error_text == ""


async def test_of_two_archives_each_finds_it(tmp_path: Path) -> None:
    """They share the bytes. One that got it before is not touched by it."""
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        await three(rig, a0, a1)
        a1.refuse_all(None)
        await rig.drained("a1")
        damage(files(rig)[0])
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().damaged)
        assert (rig.hop("a1").damaged, rig.hop("a1").is_wrong) == ([], False)
        assert (aside(rig, "a1"), a1.latest) == ([], Snapshot.clean(3))


async def one_damaged(rig: ProxyRig, a0: FakeArchive) -> tuple[StorageSide, tuple[int, int]]:
    """Have one wdiff wait and be damaged; return the storage, and where it stood before."""
    await rig.begin(a0)
    a0.refuse_all(Verdict.SYNCING)
    storage = StorageSide(rig)
    before = (storage.lsid, storage.gid)
    await storage.send([write(0)])
    damage(files(rig)[0])
    return storage, before


async def test_the_same_stretch_once_more_fills_the_hole(tmp_path: Path) -> None:
    """The storage did not hear the acknowledgement, and sends again."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        storage, before = await one_damaged(rig, a0)
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().damaged)
        storage.lsid, storage.gid = before
        await storage.send([write(0)])
        await rig.drained()
        await rig.until(lambda: not rig.hop().is_wrong)
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])


async def test_what_is_good_at_the_second_look_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await three(rig, a0)
        path = files(rig)[0]
        good = damage(path)

        def mended(fs: FileSystem, path: Path) -> bool:
            path.write_bytes(good)
            return is_good(fs, path)

        is_good = volume_module.is_good
        monkeypatch.setattr(volume_module, "is_good", mended)
        a0.refuse_all(None)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(8 * i) for i in range(3)])
        assert aside(rig) == []


async def test_what_was_replaced_during_the_second_look_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        storage, before = await one_damaged(rig, a0)
        looking, go_on = threading.Event(), threading.Event()

        def slow(fs: FileSystem, path: Path) -> bool:
            found = is_good(fs, path)
            looking.set()
            assert go_on.wait(120)
            return found

        is_good = volume_module.is_good
        monkeypatch.setattr(volume_module, "is_good", slow)
        a0.refuse_all(None)
        await rig.until(looking.is_set)
        storage.lsid, storage.gid = before
        await storage.send([write(0)])
        go_on.set()
        await rig.drained()
        assert aside(rig) == []
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])


async def test_one_of_another_history_takes_part_again(tmp_path: Path) -> None:
    """Which history the damaged one was of cannot be read any more: the archive decides on the other."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0)])
        await StorageSide(rig, uuid=bytes(range(16))).send([write(50)])
        assert len(rig.hop().others) == 1
        damage(files(rig)[0], "header")
        a0.refuse_all(None)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])
        assert rig.hop().others == {}
        assert len(aside(rig)) == 1


@pytest.mark.parametrize("name", ["proxy.wdiff.before_aside", "proxy.wdiff.after_aside"])
async def test_a_disk_that_fails_meanwhile(tmp_path: Path, name: str) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await three(rig, a0)
        damage(files(rig)[1])
        failpoints.arm(f"{name}=eio")
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().damaged)
        await rig.until(lambda: a0.answers[-1:] == [Verdict.TOO_NEW])
        assert await rig.waiting("a0") == ["|2|-->|3|"]
        await rig.restart()
        assert (await rig.waiting("a0"), rig.hop().damaged) == (["|2|-->|3|"], [clean(1, 2)])


async def test_stop_that_empties_tells_what_was_not_sent(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        await StorageSide(rig).send([write(0)])
        damage(files(rig)[0])
        a0.refuse_all(None)
        job = await rig.stop_volume(StopHow.EMPTY)
        assert job.result == {"mode": "empty", "unsent": 0, "damaged": 1}


class DeadDisk(OsFileSystem):
    """A disk from which wdiffs cannot be read for a while."""

    dead = False

    def open(self, path: Path, **how: bool) -> File:  # type: ignore[override]
        if self.dead and path.suffix == ".wdiff":
            raise DiskFailed("cannot read", path=str(path), errno=errno.EIO)
        return super().open(path, **how)


async def test_what_cannot_be_read_needs_a_person_and_stays(tmp_path: Path) -> None:
    """A disk may come back: only bytes that were read and are wrong are put aside."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.crash()
        disk = rig.env.fs = DeadDisk()
        await rig.up()
        await rig.begin(a0)
        await three(rig, a0)
        disk.dead = True
        a0.refuse_all(None)
        await rig.until(lambda: rig.hop().needs_person)
        assert "cannot read" in (await rig.status()).hops[0].error_text
        assert len(files(rig)) == 3
        disk.dead = False
        await rig.drained()
        assert not await is_send_error(rig)
        assert a0.latest == Snapshot.clean(3)
