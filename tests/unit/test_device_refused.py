"""Devices that must not be made or started, and a log that must not be emptied: refused, and left as they are."""

from __future__ import annotations

import random
from pathlib import Path
from typing import cast

import pytest

from tests.kit.device import DDEV, LDEV, Client, make_disk, serving
from tests.kit.simdisk import SimDisk, SimFile
from walbd.errors import DiskFailed, Refused, UsageError
from walbd.format.superblock import SUPERBLOCK_OFFSET_B
from walbd.fs import Buf, File, FileSystem, OsFileSystem
from walbd.storage.device.config import DeviceConfig
from walbd.storage.device.create import create_device
from walbd.storage.device.offline import format_ldev
from walbd.storage.device.start import open_device, open_files
from walbd.units import LB, MIB

RNG = random.Random(1)


def files_of(disk: SimDisk) -> dict[Path, bytes]:
    return {path: bytes(contents.now) for path, contents in disk.files.items()}


def test_a_log_device_that_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its writes succeed and do nothing, as those of a failed controller's cache may."""
    disk = make_disk()
    disk.files[LDEV].now[SUPERBLOCK_OFFSET_B + 500] ^= 1  # so that a written superblock would differ
    pwrite = SimFile.pwrite

    def forget(self: SimFile, data: Buf, offset_b: int) -> None:
        if self.path != LDEV:
            pwrite(self, data, offset_b)

    good = open_device(cast(FileSystem, disk), LDEV, DDEV)
    good.ldev.close()
    good.ddev.close()
    monkeypatch.setattr(SimFile, "pwrite", forget)
    disk.files[LDEV].now[SUPERBLOCK_OFFSET_B + 500] ^= 1
    before = files_of(disk)
    with pytest.raises(DiskFailed, match="does not keep what is written"):
        open_device(cast(FileSystem, disk), LDEV, DDEV)
    assert files_of(disk) == before
    assert not disk.files[LDEV].locked
    assert not disk.files[DDEV].locked


def test_one_device_is_not_both(tmp_path: Path) -> None:
    """Also under two names: the log would overwrite the data."""
    (tmp_path / "dev").write_bytes(bytes(MIB))
    (tmp_path / "alias").symlink_to(tmp_path / "dev")
    for other in ("dev", "alias"):
        with pytest.raises(Refused, match="are the same"):
            open_files(OsFileSystem(), tmp_path / "dev", tmp_path / other)


async def test_a_log_device_that_has_shrunk_is_not_emptied() -> None:
    """What lies beyond its end now may be back after a repair."""
    disk = make_disk()
    async with serving(disk, random.Random(0)) as engine:
        client = Client(engine)
        assert await client.write(0, b"x" * LB, fua=True) == 0
        uuid, ldev = engine.core.superblock.uuid, disk.files[LDEV]
        cut = ldev.now[-4096:]
        del ldev.now[-4096:]
        log = bytes(ldev.now)
        with pytest.raises(Refused, match="has shrunk"):
            await engine.reset_wal()
        assert engine.core.superblock.uuid == uuid
        assert bytes(ldev.now) == log
        ldev.now += cut
        await engine.reset_wal()
        assert engine.core.superblock.uuid != uuid


async def test_a_volume_does_not_outgrow_a_block_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file grows along; a block device is grown by hand first."""
    disk = make_disk(size_lb=256)
    async with serving(disk, random.Random(0)) as engine:
        await engine.resize(300)
        assert (engine.core.superblock.device_size_lb, len(disk.files[DDEV].now)) == (300, 300 * LB)
        monkeypatch.setattr(SimFile, "fileno", lambda _self: 0)
        monkeypatch.setattr("walbd.storage.device.engine.physical_block_size", lambda _file: 512)
        with pytest.raises(Refused, match="data device is too small"):
            await engine.resize(400)
        with pytest.raises(Refused, match="cannot shrink"):
            await engine.resize(299)
        assert (engine.core.superblock.device_size_lb, len(disk.files[DDEV].now)) == (300, 300 * LB)
        await engine.resize(300)


def create(base: Path, **sizes: int | None) -> None:
    config = DeviceConfig(ldev=str(base / "ldev"), ddev=str(base / "ddev"))
    values: dict[str, int | None] = {"size_b": MIB, "ldev_size_b": 2 * MIB, "pbs": None} | sizes
    create_device(
        OsFileSystem(), base / "dev", "vol0", config, force=False, rng=RNG, **values
    )  # fmt: skip


def test_an_empty_data_device_is_refused(tmp_path: Path) -> None:
    (tmp_path / "ddev").write_bytes(bytes(LB - 1))
    with pytest.raises(UsageError, match="data device is empty"):
        create(tmp_path, size_b=None)
    assert [path.name for path in tmp_path.iterdir()] == ["ddev"]
    (tmp_path / "ddev").write_bytes(bytes(LB))
    create(tmp_path, size_b=None)


@pytest.mark.parametrize("pbs", [1024, 513, 8192])
def test_odd_sizes_of_blocks_are_refused(tmp_path: Path, pbs: int) -> None:
    with pytest.raises(UsageError, match="only physical blocks"):
        create(tmp_path, pbs=pbs)
    assert list(tmp_path.iterdir()) == []


def test_two_devices_that_disagree_about_their_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pack that is whole on one would be torn on the other."""
    fs = OsFileSystem()
    for name in ("ldev", "ddev"):
        (tmp_path / name).write_bytes(bytes(2 * MIB))
    sizes = {"ldev": 512, "ddev": 4096}
    monkeypatch.setattr("walbd.storage.device.offline.physical_block_size", lambda file: sizes[file.path.name])
    with fs.open(tmp_path / "ldev", write=True) as ldev, fs.open(tmp_path / "ddev", write=True) as ddev:

        def make(pbs: int | None) -> None:
            format_ldev(cast(File, ldev), cast(File, ddev), pbs=pbs, name="v", force=False, rng=RNG)

        for pbs in (None, 512, 4096):
            with pytest.raises(UsageError, match="do not agree"):
                make(pbs)
        assert not any((tmp_path / "ldev").read_bytes())
        sizes["ldev"] = 4096
        with pytest.raises(UsageError, match="do not agree"):
            make(512)
        make(None)
    assert any((tmp_path / "ldev").read_bytes())
