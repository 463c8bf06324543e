"""FileStore: sparse files, clones by sharing or copying, and what a crash leaves."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from walbd.archive.images.file_store import FileStore
from walbd.archive.images.store import ImageStore
from walbd.errors import AlreadyExists, DiskFull, ForceStopped, NotFound
from walbd.fs import File, OsFileSystem
from walbd.units import MIB

VOL = "vol0"


class SharingFileSystem(OsFileSystem):
    """As on XFS: a clone shares the contents (here: has a copy of them), and costs nothing."""

    def __init__(self) -> None:
        self.clones = 0

    def clone(self, source: Path, target: File) -> bool:
        target.pwrite(self.read_bytes(source), 0)
        self.clones += 1
        return True

    def free_b(self, path: Path) -> int:
        return 0


class CopyingFileSystem(OsFileSystem):
    """As on ext4, with as much free space as the test says."""

    free = 1 << 40

    def clone(self, source: Path, target: File) -> bool:
        return False

    def free_b(self, path: Path) -> int:
        return self.free


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / VOL).mkdir()
    return tmp_path


def make_base(store: ImageStore, size_b: int, *writes: tuple[int, bytes]) -> None:
    with store.prepare_base(VOL, size_b).file as file:
        for offset_b, data in writes:
            file.pwrite(data, offset_b)
        file.sync()


def clone(store: ImageStore, gid: int) -> bytes:
    with store.clone_base(VOL, gid, lambda _: None) as file:
        data = file.pread(file.size(), 0)
        file.sync()
    store.finish_clone(VOL, gid)
    assert store.restored_path(VOL, gid).read_bytes() == data
    return data


def test_fresh_image_reads_zero_and_a_used_one_is_not_trusted(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    assert store.base_size(VOL) is None
    image = store.prepare_base(VOL, MIB)
    assert image.reads_zero
    image.file.pwrite(b"x" * 512, 512)
    image.file.close()
    again = store.prepare_base(VOL, 2 * MIB)
    assert not again.reads_zero
    assert again.file.size() == store.base_size(VOL) == 2 * MIB
    again.file.close()
    with store.prepare_base(VOL, 1024).file as smaller:
        assert smaller.pread(2048, 0) == bytes(512) + b"x" * 512


def test_grow_never_shrinks(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    make_base(store, MIB, (0, b"abc"))
    store.grow_base(VOL, 3 * MIB)
    assert store.base_size(VOL) == 3 * MIB
    store.grow_base(VOL, MIB)
    with store.open_base(VOL) as file:
        assert file.pread(3 * MIB, 0) == b"abc" + bytes(3 * MIB - 3)


def test_missing_images(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    with pytest.raises(NotFound):
        store.open_base(VOL)
    with pytest.raises(NotFound):
        store.clone_base(VOL, 1, lambda _: None)
    assert store.restored(VOL) == []
    store.remove_base(VOL)
    store.remove_restored(VOL, 1)
    store.abandon_clone(VOL, 1)
    store.remove_unfinished(VOL)


def test_copy_keeps_holes(base: Path) -> None:
    store = FileStore(CopyingFileSystem(), base)
    size_b = 64 * MIB + 512
    make_base(store, size_b, (5 * MIB, b"a" * 4096), (40 * MIB, b"b" * (9 * MIB)), (size_b - 512, b"c" * 512))
    ticks: list[int] = []
    with store.clone_base(VOL, 7, ticks.append) as file:
        assert file.size() == size_b
        data = file.pread(size_b, 0)
    assert data == (base / VOL / "base.img").read_bytes()
    assert os.stat(file.path).st_blocks * 512 < 12 * MIB
    assert ticks == sorted(ticks)
    assert ticks[-1] < 12 * MIB
    assert store.restored(VOL) == []
    store.finish_clone(VOL, 7)
    assert store.restored(VOL) == [7]


def test_clone_by_sharing_needs_no_room(base: Path) -> None:
    fs = SharingFileSystem()
    store = FileStore(fs, base, free_reserve_b=MIB)
    make_base(store, MIB, (0, b"x" * MIB))
    assert clone(store, 3) == b"x" * MIB
    assert fs.clones == 1


def test_real_clone_where_this_disk_can(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    make_base(store, MIB, (4096, b"y" * 8192))
    assert clone(store, 3) == bytes(4096) + b"y" * 8192 + bytes(MIB - 12288)


def test_copy_that_would_take_the_reserve_is_refused(base: Path) -> None:
    fs = CopyingFileSystem()
    store = FileStore(fs, base, free_reserve_b=10 * MIB)
    make_base(store, MIB, (0, b"x" * MIB))
    fs.free = 10 * MIB + MIB // 2
    with pytest.raises(DiskFull, match="no room") as caught:
        store.clone_base(VOL, 1, lambda _: None)
    assert caught.value.hint
    assert os.listdir(base / VOL / "restored") == []


def test_copy_can_be_given_up(base: Path) -> None:
    store = FileStore(CopyingFileSystem(), base)
    make_base(store, 16 * MIB, (0, b"x" * (16 * MIB)))

    def tick(done_b: int) -> None:
        if done_b >= 8 * MIB:
            raise ForceStopped("enough")

    with pytest.raises(ForceStopped):
        store.clone_base(VOL, 1, tick)
    assert os.listdir(base / VOL / "restored") == []


def test_stale_unfinished_clone_is_replaced(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    make_base(store, MIB, (0, b"new"))
    (base / VOL / "restored").mkdir()
    (base / VOL / "restored" / "tmp_1.img").write_bytes(b"old" * MIB)
    assert clone(store, 1)[:3] == b"new"


def test_cold_images_where_blocks_are_shared(base: Path) -> None:
    store = FileStore(SharingFileSystem(), base)
    make_base(store, MIB, (0, b"base"))
    assert not store.make_cold(VOL, 3)  # nothing was cloned yet, so nobody knows
    with store.clone_base(VOL, 3, lambda _: None) as file:
        file.pwrite(b"cold", 0)
        file.sync()
    assert store.make_cold(VOL, 3)
    with store.clone_base(VOL, 3, lambda _: None):
        store.abandon_clone(VOL, 3)
    assert store.colds(VOL) == [3]
    assert store.restored(VOL) == []
    with store.open_cold(VOL, 3) as file:
        assert file.pread(4, 0) == b"cold"
    store.grow_base(VOL, 2 * MIB)
    with store.clone_base(VOL, 4, lambda _: None, cold=3) as file:
        assert file.pread(3 * MIB, 0) == b"cold" + bytes(2 * MIB - 4)
    with pytest.raises(NotFound):
        store.open_cold(VOL, 4)
    with pytest.raises(NotFound):
        store.clone_base(VOL, 5, lambda _: None, cold=4)
    (base / VOL / "cold" / "tmp_x").write_bytes(b"")
    (base / VOL / "cold" / "note.txt").write_bytes(b"")
    store.remove_unfinished(VOL)
    assert sorted(os.listdir(base / VOL / "cold")) == ["3.img", "note.txt"]
    store.remove_cold(VOL, 3)
    store.remove_cold(VOL, 3)
    assert store.colds(VOL) == []


def test_no_cold_images_where_they_would_be_copies(base: Path) -> None:
    store = FileStore(CopyingFileSystem(), base)
    make_base(store, MIB)
    with store.clone_base(VOL, 3, lambda _: None):
        assert not store.make_cold(VOL, 3)
    assert store.colds(VOL) == []
    assert not (base / VOL / "cold").exists()


def test_leftovers_and_strangers(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    make_base(store, MIB)
    clone(store, 2)
    clone(store, 10)
    directory = base / VOL / "restored"
    for name in ("tmp_5.img", "05.img", "note.txt", "5.img.bak", str(1 << 70) + ".img"):
        (directory / name).write_bytes(b"")
    store.remove_unfinished(VOL)
    assert store.restored(VOL) == [2, 10]
    assert not (directory / "tmp_5.img").exists()
    assert (directory / "note.txt").exists()
    store.remove_restored(VOL, 2)
    assert store.restored(VOL) == [10]


def test_clone_is_independent_of_its_source(base: Path) -> None:
    store = FileStore(OsFileSystem(), base)
    make_base(store, MIB, (0, b"one"))
    clone(store, 1)
    with store.open_base(VOL, write=True) as file:
        file.pwrite(b"two", 0)
    assert store.restored_path(VOL, 1).read_bytes()[:3] == b"one"
    with pytest.raises(AlreadyExists):
        OsFileSystem().open(store.restored_path(VOL, 1), create=True)
