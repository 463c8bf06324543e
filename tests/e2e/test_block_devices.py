"""A device whose log and data are block devices, as in production, and not files."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kit.disks import impossible_here, run
from tests.kit.group import Process
from tests.kit.nbd import NbdClient
from walbd.errors import Busy
from walbd.fs import OsFileSystem
from walbd.units import MIB

pytestmark = pytest.mark.root

SIZE_B = 8 * MIB
LDEV_SIZE_B = 4 * MIB


def walbd(*args: str | Path, code: int = 0) -> str:
    return run(sys.executable, "-m", "walbd.cli", *args, code=code)


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """A log device and a data device."""
    if reason := impossible_here(tmp_path, "ext4"):
        pytest.skip(f"impossible on this machine: {reason}")
    found = []
    with ExitStack() as undo:
        for name, size_b in (("l", LDEV_SIZE_B), ("d", SIZE_B)):
            with (tmp_path / name).open("wb") as file:
                file.truncate(size_b)
            disk = run("losetup", "--show", "-f", tmp_path / name)
            undo.callback(run, "losetup", "-d", disk)
            found.append(Path(disk))
        yield found[0], found[1]


def test_a_device_on_block_devices(disks: tuple[Path, Path], tmp_path: Path) -> None:
    ldev, ddev = disks
    base = ("--base-dir", tmp_path / "dev")
    walbd("device", "create", "vol0", *base, "--ldev", ldev, "--ddev", ddev)
    process = Process("dev", ["device", "vol0", "--base-dir", str(tmp_path / "dev")], tmp_path)
    rng, model = random.Random(6), bytearray(SIZE_B)
    process.start()
    try:
        socket = str(tmp_path / "dev" / "vol0" / "nbd.sock")
        for _ in range(2):
            with NbdClient(socket) as client:
                for _ in range(400):
                    size = rng.choice([512, 1024, 4096, 40960])
                    at = rng.randrange((SIZE_B - size) // 512) * 512
                    if rng.random() < 0.3:  # shorter than a page, and over the edges of pages
                        client.trim(at, size)
                        model[at : at + size] = bytes(size)
                    else:
                        client.write(at, data := rng.randbytes(size))
                        model[at : at + size] = data
                client.flush()
                assert client.read(0, SIZE_B) == model
            # Where the data are is asked by every tool that copies; block devices cannot tell.
            extents = json.loads(run("nbdinfo", "--map", "--json", f"nbd+unix:///?socket={socket}"))
            assert sum(extent["length"] for extent in extents) == SIZE_B
            process.kill()
            process.start()
        with NbdClient(socket) as client:
            assert client.read(0, SIZE_B) == model
        assert process.stop() == 0, process.tail()
        assert ddev.read_bytes() == model
    finally:
        process.kill()


def test_disks_that_are_in_use_are_refused(disks: tuple[Path, Path], tmp_path: Path) -> None:
    ldev, ddev = disks
    base = ("--base-dir", tmp_path / "dev")
    run("mkfs.ext4", "-q", ddev)
    (point := tmp_path / "mnt").mkdir()
    run("mount", ddev, point)
    try:
        said = walbd("device", "create", "vol0", *base, "--ldev", ldev, "--ddev", ddev, code=5)
        assert "in use" in said
        assert ldev.read_bytes() == bytes(LDEV_SIZE_B), "nothing was formatted"
    finally:
        run("umount", point)
    walbd("device", "create", "vol0", *base, "--ldev", ldev, "--ddev", ddev)
    fs = OsFileSystem()
    with fs.open(ddev, write=True, lock=True), pytest.raises(Busy):
        fs.open(ddev, write=True, lock=True)
