"""A proxy that dies at any step: no acknowledged diff is lost, and what comes twice does no harm.

An armed failpoint fails the step with a disk error; the proxy is then dropped as it stands, and a new one begins
on the same directory. (tests/fault kills real processes at the same places.)
"""

from pathlib import Path

import pytest

import walbd.proxy.server
from tests.kit.fake_archive import FakeArchive, clean
from tests.kit.logs import image_of
from tests.kit.proxy_rig import STORAGE, ProxyRig, StorageSide, proxy, write
from walbd.daemon.conn import dial
from walbd.errors import ConnectError, DiskFull, RemoteError
from walbd.fs import OsFileSystem, failpoints
from walbd.protocol.control import AddArchiveInfo, ArchiveInfo, ClearVol, DeleteArchiveInfo, ListArchiveInfo, Start
from walbd.protocol.transfer import Verdict, WlogEnd

assert walbd.proxy.server  # all failpoints of the proxy are registered now

RECEIVING = [
    "proxy.record.before_save",
    "proxy.wdiff.before_commit",
    "proxy.wdiff.after_commit",
    "proxy.wdiff.before_link",
    "proxy.wdiff.after_link",
    "proxy.wdiff.before_unlink_received",
    "proxy.wdiff.before_ack",
]
DAMAGE = ["proxy.wdiff.before_aside", "proxy.wdiff.after_aside"]  # test_proxy_damage.py
OTHERS = ["proxy.send.before_delete", "proxy.archive.before_remove", "proxy.volume.before_remove"]
PACKS = [write(0), write(50, 16, 2)]


def test_every_failpoint_of_the_proxy_is_tried_here() -> None:
    names = {name for name in failpoints.registered() if name.startswith("proxy.")}
    assert names == {*RECEIVING, *OTHERS, *DAMAGE}


@pytest.mark.parametrize(
    ("name", "skip"), [*((name, 0) for name in RECEIVING), ("proxy.wdiff.before_link", 1)], ids=str
)
@pytest.mark.parametrize("crash", [True, False])
async def test_reception_that_fails_at_any_step(tmp_path: Path, name: str, skip: int, crash: bool) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        for archive in (a0, a1):
            archive.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send([write(300)])
        storage.size_lb = 4096  # so that the record has to be saved
        failpoints.arm(f"{name}=eio@{skip}")
        with pytest.raises(RemoteError):
            await storage.send(PACKS)
        if crash:
            await rig.restart()
        await storage.send(PACKS)
        assert rig.files("received") == []
        for archive in (a0, a1):
            assert await rig.waiting(archive.name) == ["|0|-->|1|", "|1|-->|2|"]
            assert len(rig.files(f"sendto/{archive.name}")) == 2
            archive.size_b = 4096 * 512
            archive.image = bytes(archive.size_b)
            archive.refuse_all(None)
        rig.server.sends.hurry(rig.volume)
        await rig.drained()
        for archive in (a0, a1):
            assert archive.image == image_of(bytes(archive.size_b), [write(300), *PACKS])
        assert rig.files() == ["volume.json"]


@pytest.mark.parametrize("name", RECEIVING[3:])
async def test_what_was_received_is_linked_by_the_next_start(tmp_path: Path, name: str) -> None:
    """The storage may have sent it elsewhere, or have died: the wdiff is not lost, and is sent."""
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        failpoints.arm(f"{name}=eio")
        with pytest.raises(RemoteError):
            await StorageSide(rig).send(PACKS)
        await rig.restart()
        await rig.drained()
        assert a0.diffs == a1.diffs == ["|0|-->|1|"]
        assert rig.files() == ["volume.json"]


async def test_what_was_received_is_linked_by_the_next_send(tmp_path: Path) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        failpoints.arm("proxy.wdiff.before_link=eio@1")  # linked to the first archive only
        with pytest.raises(RemoteError):
            await StorageSide(rig).send(PACKS)
        await rig.emptied()
        assert a0.diffs == a1.diffs == ["|0|-->|1|"]
        assert rig.files() == ["volume.json"]


class NoLinks(OsFileSystem):
    """A disk on which links cannot be made for a while."""

    def __init__(self) -> None:
        self.full = False

    def link(self, path: Path, new: Path) -> None:
        if self.full:
            raise DiskFull("cannot link: no space left", path=str(new))
        super().link(path, new)


async def test_link_that_keeps_failing_does_not_stop_the_sending(tmp_path: Path) -> None:
    """Sending is what makes room on a full disk."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.crash()
        disk = rig.env.fs = NoLinks()
        await rig.up()
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send([write(0)])
        disk.full = True
        with pytest.raises(RemoteError) as caught:
            await storage.send([write(50)])
        assert caught.value.remote_code == "disk-full"
        a0.refuse_all(None)
        await rig.until(lambda: a0.latest.gid_b == 1)
        assert await rig.waiting() == ["|1|-->|2|"]
        disk.full = False
        await rig.emptied()
        assert a0.diffs == ["|0|-->|1|", "|1|-->|2|"]


async def test_process_start_goes_on_when_a_link_fails(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        failpoints.arm("proxy.wdiff.before_link=eio")
        with pytest.raises(RemoteError):
            await StorageSide(rig).send(PACKS)
        await rig.crash()
        failpoints.arm("proxy.wdiff.before_link=eio")
        await rig.up()
        assert await rig.state() == "Started"
        await rig.emptied()
        assert a0.diffs == ["|0|-->|1|"]


async def test_acknowledged_by_the_archive_and_not_deleted(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        a0.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        await storage.send(PACKS)
        failpoints.arm("proxy.send.before_delete=eio")
        a0.refuse_all(None)
        await rig.drained()
        assert len(rig.files("sendto/a0")) == 1
        await rig.restart()
        await rig.drained()
        assert a0.answers[-1] == Verdict.TOO_OLD
        assert rig.files() == ["volume.json"]
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


@pytest.mark.parametrize("chunks", [0, 1, 2])
async def test_crash_in_the_middle_of_a_reception(tmp_path: Path, chunks: int) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        storage = StorageSide(rig)
        async with dial(rig.env, STORAGE, rig.address) as conn:
            lsid = await storage.stream(conn, PACKS[:chunks])
            (tmp_path / "vol0" / "received" / "tmpleftover").write_bytes(b"x")
            await rig.restart()
            with pytest.raises(ConnectError):
                await conn.call(WlogEnd(lsid=lsid, diff=clean(0, 1)))
        assert rig.files() == ["volume.json"]
        await storage.send(PACKS)
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), PACKS)


async def make_two(rig: ProxyRig, a0: FakeArchive, a1: FakeArchive) -> None:
    """Two archives with one unsent wdiff each; Stopped."""
    await rig.begin(a0, a1)
    for archive in (a0, a1):
        archive.refuse_all(Verdict.SYNCING)
    await StorageSide(rig).send(PACKS)
    await rig.stop_volume()


@pytest.mark.parametrize("name", ["proxy.record.before_save", "proxy.archive.before_remove"])
@pytest.mark.parametrize("crash", [True, False])
async def test_archive_that_is_half_deleted(tmp_path: Path, name: str, crash: bool) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path, start_stopped=True) as rig:
        await make_two(rig, a0, a1)
        failpoints.arm(f"{name}=eio")
        with pytest.raises(RemoteError):
            await rig.call(DeleteArchiveInfo(volume="vol0", archive="a0"))
        if crash:
            await rig.restart()
        names = (await rig.call(ListArchiveInfo(volume="vol0"))).names
        if name == "proxy.record.before_save":
            assert names == ["a0", "a1"]
            assert len(rig.files("sendto/a0")) == 1
        else:
            assert names == ["a1"]
            assert (tmp_path / "vol0" / "sendto" / "a0").exists() is not crash
            await rig.add(a0)  # again, from nothing
            assert await rig.waiting("a0") == []
        assert await rig.waiting("a1") == ["|0|-->|1|"]


@pytest.mark.parametrize(
    ("by", "name"),
    [
        ("clear-vol", "proxy.record.before_save"),
        ("clear-vol", "proxy.volume.before_remove"),
        ("delete", "proxy.record.before_save"),
        ("delete", "proxy.archive.before_remove"),
        ("delete", "proxy.volume.before_remove"),
    ],
)
@pytest.mark.parametrize("again", [False, True])
async def test_volume_that_is_half_cleared(tmp_path: Path, name: str, by: str, again: bool) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path, start_stopped=True) as rig:
        await make_two(rig, a0, a1)
        if by == "delete":
            await rig.call(DeleteArchiveInfo(volume="vol0", archive="a1"))
        failpoints.arm(f"{name}=eio")
        with pytest.raises(RemoteError):
            await rig.call(
                ClearVol(volume="vol0") if by == "clear-vol" else DeleteArchiveInfo(volume="vol0", archive="a0")
            )
        assert await rig.state() == "Stopped"
        if again:  # the operator thinks better of it
            await rig.call(Start(volume="vol0"))
            await rig.stop_volume()
        await rig.restart()
        if again:
            assert await rig.state() == "Stopped"
            await rig.call(Start(volume="vol0"))
            assert await rig.state() == "Started"
        elif name == "proxy.record.before_save":
            assert await rig.state() == "Stopped"
            assert await rig.waiting("a0") == ["|0|-->|1|"]
        else:
            assert await rig.state() == "Clear"
            assert not (tmp_path / "vol0").exists()


async def test_volume_that_is_half_made(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        info = ArchiveInfo(archive="a0", address=str(a0.address))
        failpoints.arm("proxy.record.before_save=eio")
        with pytest.raises(RemoteError):
            await rig.call(AddArchiveInfo(volume="vol0", info=info))
        assert await rig.state() == "Clear"
        assert not (tmp_path / "vol0").exists()
        # what a crash there leaves behind
        for name in ("received", "sendto", "sendto/a0"):
            (tmp_path / "vol0" / name).mkdir(parents=True)
        await rig.restart()
        assert not (tmp_path / "vol0").exists()
        await rig.begin(a0)
        await StorageSide(rig).send(PACKS)
        await rig.drained()


async def test_second_archive_that_is_half_added(tmp_path: Path) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path, start_stopped=True) as rig:
        await rig.add(a0)
        failpoints.arm("proxy.record.before_save=eio")
        with pytest.raises(RemoteError):
            await rig.add(a1)
        assert (await rig.call(ListArchiveInfo(volume="vol0"))).names == ["a0"]
        await rig.restart()
        assert (await rig.call(ListArchiveInfo(volume="vol0"))).names == ["a0"]
        await rig.add(a1)
        await rig.call(Start(volume="vol0"))
        await StorageSide(rig).send(PACKS)
        await rig.drained()
        assert a1.diffs == ["|0|-->|1|"]
