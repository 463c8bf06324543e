"""What a proxy makes of the directories that it finds at its start."""

import json
from pathlib import Path

import pytest

from tests.kit.fake_archive import FakeArchive
from tests.kit.logs import image_of
from tests.kit.proxy_rig import ProxyRig, StorageSide, proxy, write
from walbd.errors import DiskFailed
from walbd.fs import OsFileSystem
from walbd.protocol.control import ClearVol, GetStatus, GetVolumes, ListArchiveInfo, Start
from walbd.protocol.transfer import Verdict


async def stopped_with_one(rig: ProxyRig, a0: FakeArchive) -> Path:
    """Let one wdiff wait for a0, and end the proxy; return its file."""
    await rig.begin(a0)
    a0.refuse_all(Verdict.SYNCING)
    await StorageSide(rig).send([write(0)])
    await rig.crash()
    (name,) = rig.files("sendto/a0")
    return rig.base / "vol0" / "sendto" / "a0" / name


async def test_sets_are_rebuilt_and_sending_goes_on(tmp_path: Path) -> None:
    async with FakeArchive("a0") as a0, FakeArchive("a1") as a1, proxy(tmp_path) as rig:
        await rig.begin(a0, a1)
        for archive in (a0, a1):
            archive.refuse_all(Verdict.SYNCING)
        storage = StorageSide(rig)
        for i in range(3):
            await storage.send([write(i)])
        before = await rig.status()
        await rig.restart()
        after = await rig.status()
        assert [(hop.dest, hop.diffs, hop.size_b, hop.gid_b, hop.gid_e, hop.oldest) for hop in after.hops] == [
            (hop.dest, hop.diffs, hop.size_b, hop.gid_b, hop.gid_e, hop.oldest) for hop in before.hops
        ]
        assert (after.state, after.size_lb) == ("Started", before.size_lb)
        for archive in (a0, a1):
            archive.refuse_all(None)
        await rig.drained()
        assert a0.image == a1.image == image_of(bytes(a0.size_b), [write(i) for i in range(3)])


async def test_start_stopped(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path, start_stopped=True) as rig:
        await stopped_with_one(rig, a0)
        a0.refuse_all(None)
        await rig.up()
        assert await rig.state() == "Stopped"
        assert await rig.waiting("a0") == ["|0|-->|1|"]
        await rig.call(Start(volume="vol0"))
        await rig.drained()


async def test_broken_volume_is_isolated(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0, volume="good")
        path = await stopped_with_one(rig, a0)
        record = tmp_path / "vol0" / "volume.json"
        good = record.read_bytes()
        record.write_bytes(good.replace(b"127.0.0.1", b"127.0.0.2"))
        await rig.up()
        assert [await rig.state("vol0"), await rig.state("good")] == ["Broken", "Started"]
        assert (await rig.call(GetVolumes())).names == ["good", "vol0"]
        status = await rig.status()
        assert status.state == "Broken"
        assert "checksum" in status.error
        assert path.exists()
        await StorageSide(rig, volume="good").send([write(0)])
        record.write_bytes(good)  # repaired
        a0.refuse_all(None)
        await rig.restart()
        await rig.drained()
        assert await rig.state() == "Started"


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\xff", b'{"format": 9, "record": {}}'])
async def test_damaged_records(tmp_path: Path, content: bytes) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.add(a0)
        (tmp_path / "vol0" / "volume.json").write_bytes(content)
        await rig.restart()
        assert await rig.state() == "Broken"
        await rig.call(ClearVol(volume="vol0"))
        assert await rig.state() == "Clear"
        assert not (tmp_path / "vol0").exists()
        await rig.begin(a0)  # it can be made anew


async def test_record_edited_by_a_person(tmp_path: Path) -> None:
    """Without its checksum a record is taken as it is."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await stopped_with_one(rig, a0)
        path = tmp_path / "vol0" / "volume.json"
        whole = json.loads(path.read_text())
        del whole["checksum"]
        whole["record"]["archives"]["a0"]["compress"] = "snappy"
        path.write_text(json.dumps(whole))
        a0.refuse_all(None)
        await rig.up()
        await rig.drained()


async def test_missing_record_with_wdiffs_is_broken_not_garbage(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        path = await stopped_with_one(rig, a0)
        (tmp_path / "vol0" / "volume.json").unlink()
        await rig.up()
        assert await rig.state() == "Broken"
        assert path.exists()


async def test_temporary_files_are_removed_and_foreign_ones_reported(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        path = await stopped_with_one(rig, a0)
        volume = tmp_path / "vol0"
        garbage = [volume / "tmpa", volume / "received" / "tmpb", volume / "sendto" / "a0" / "tmpc"]
        foreign = [volume / "received" / "notes.txt", volume / "sendto" / "a0" / "bad-name.wdiff"]
        other = volume / "sendto" / "gone" / path.name
        other.parent.mkdir()
        for file in [*garbage, *foreign, other]:
            file.write_bytes(b"x")
        (tmp_path / "not_a_volume").mkdir()
        (tmp_path / "file").write_bytes(b"x")
        await rig.up()
        assert not any(file.exists() for file in garbage)
        assert all(file.exists() for file in [*foreign, other])
        error = (await rig.status()).error
        assert all(text in error for text in ("notes.txt", "bad-name.wdiff", "gone"))
        assert (await rig.call(GetVolumes())).names == ["vol0"]
        assert await rig.waiting("a0") == ["|0|-->|1|"]


async def test_missing_directories_are_made(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0)
        await rig.crash()
        (tmp_path / "vol0" / "sendto" / "a0").rmdir()
        (tmp_path / "vol0" / "received").rmdir()
        await rig.up()
        await StorageSide(rig).send([write(0)])
        await rig.drained()


async def test_two_wdiffs_of_the_same_snapshots(tmp_path: Path) -> None:
    """The newer is kept, the other put aside."""
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        path = await stopped_with_one(rig, a0)
        older = path.with_name("20200101000000" + path.name[14:].replace("M-", "--"))
        older.write_bytes(b"not even a wdiff")
        a0.refuse_all(None)
        await rig.up()
        assert not older.exists()
        assert older.with_name(older.name + ".quarantined").read_bytes() == b"not even a wdiff"
        await rig.drained()
        assert a0.image == image_of(bytes(a0.size_b), [write(0)])
        assert rig.files("sendto/a0") == [older.name + ".quarantined"]


async def test_directory_that_cannot_be_listed(tmp_path: Path) -> None:
    class BadDisk(OsFileSystem):
        def list_names(self, directory: Path) -> list[str]:
            if directory.name == "received":
                raise DiskFailed("cannot list: Input/output error", path=str(directory))
            return super().list_names(directory)

    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        await rig.begin(a0, volume="good")
        await rig.crash()
        rig.env.fs = BadDisk()
        await rig.up()
        reply = await rig.call(GetStatus())
        assert [(row.volume, row.state) for row in reply.volumes] == [("good", "Broken")]
        assert "Input/output" in reply.volumes[0].error


async def test_many_volumes(tmp_path: Path) -> None:
    async with FakeArchive() as a0, proxy(tmp_path) as rig:
        names = [f"v{i:02}" for i in range(12)]
        for name in names:
            await rig.begin(a0, volume=name)
        await rig.restart()
        assert (await rig.call(GetVolumes())).names == names
        for name in names:
            assert (await rig.call(ListArchiveInfo(volume=name))).names == ["a0"]
            assert await rig.state(name) == "Started"
