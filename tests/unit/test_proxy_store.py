"""The directory of a volume at a proxy, below the daemon."""

from pathlib import Path

import pytest

from tests.kit.fake_archive import clean
from walbd.errors import AlreadyExists, CorruptData, NotFound
from walbd.format.meta import Diff, diff_name
from walbd.fs import OsFileSystem
from walbd.proxy.store import ArchiveEntry, VolumeRecord, VolumeStore

ENTRY = ArchiveEntry(address="127.0.0.1:1", compress="lz4")


@pytest.fixture
def store(tmp_path: Path) -> VolumeStore:
    store = VolumeStore(OsFileSystem(), tmp_path / "vol0")
    store.create()
    store.add_archive("a0")
    store.save(VolumeRecord(archives={"a0": ENTRY}))
    return store


def put(store: VolumeStore, diff: Diff, content: bytes = b"new") -> Path:
    path = store.received / diff_name(diff)
    path.write_bytes(content)
    return path


def test_record_round_trip(store: VolumeStore) -> None:
    record = VolumeRecord(size_lb=7, archives={"a0": ENTRY, "b.x_1": ENTRY}, removing=["c"])
    store.save(record)
    assert store.load() == record


def test_link_replaces_and_syncs(store: VolumeStore) -> None:
    diff = clean(0, 1)
    target = store.sendto("a0") / diff_name(diff)
    target.write_bytes(b"old")
    put(store, diff)
    store.link("a0", [(diff, diff)])
    assert target.read_bytes() == b"new"
    store.link("a0", [(diff, diff)])  # again: the same file
    assert [path.name for path in store.sendto("a0").iterdir()] == [diff_name(diff)]
    store.unlink_received([diff])
    assert target.read_bytes() == b"new"
    assert list(store.received.iterdir()) == []


def test_link_of_what_an_earlier_attempt_has_moved(store: VolumeStore) -> None:
    """An attempt that was cut while it removed files from received/ is repeated with all of them."""
    first, second = clean(0, 1), clean(1, 2)
    for diff in (first, second):
        put(store, diff)
    store.link("a0", [(first, None), (second, None)])
    store.unlink_received([first])
    store.link("a0", [(first, None), (second, None)])
    store.unlink_received([first, second])
    assert len(list(store.sendto("a0").iterdir())) == 2


def test_link_of_what_is_nowhere_is_an_error(store: VolumeStore) -> None:
    with pytest.raises(NotFound):
        store.link("a0", [(clean(0, 1), None)])


def test_obsolete_is_put_aside(store: VolumeStore) -> None:
    old, new = clean(0, 1, timestamp=5), clean(0, 1)
    (store.sendto("a0") / diff_name(old)).write_bytes(b"old")
    put(store, new)
    store.link("a0", [(new, old)])
    names = sorted(path.name for path in store.sendto("a0").iterdir())
    assert names == sorted([diff_name(new), diff_name(old) + ".quarantined"])
    listing = store.look(["a0"])
    assert list(listing.sendto["a0"]) == [new]
    assert len(listing.troubles) == 1


def test_archive_directory_that_is_not_empty(store: VolumeStore) -> None:
    path = store.sendto("a1")
    path.mkdir()
    store.add_archive("a1")  # left by an attempt that a crash has cut
    (path / "something").write_bytes(b"")
    with pytest.raises(AlreadyExists):
        store.add_archive("a1")


def test_removal_of_an_archive_is_finished(store: VolumeStore) -> None:
    (store.sendto("a0") / diff_name(clean(0, 1))).write_bytes(b"x")
    store.add_archive("a1")
    store.save(VolumeRecord(archives={"a1": ENTRY}, removing=["a0", "a1"]))
    store.load()
    assert not store.sendto("a0").exists()
    assert store.sendto("a1").exists()  # was added again since


@pytest.mark.parametrize("left", ["received", "sendto", "all", "record"])
def test_clearing_is_finished(store: VolumeStore, left: str) -> None:
    put(store, clean(0, 1))
    store.save(VolumeRecord(archives={"a0": ENTRY}, clearing=True))
    if left != "all":
        store.fs.remove_tree(store.received)
    if left in ("record",):
        store.fs.remove_tree(store.path / "sendto")
    assert store.load() is None
    assert not store.path.exists()


@pytest.mark.parametrize("file", ["received/x.wdiff", "sendto/a0/x.wdiff", "something"])
def test_directory_without_record(store: VolumeStore, file: str) -> None:
    (store.path / "volume.json").unlink()
    (store.path / file).write_bytes(b"")
    with pytest.raises(CorruptData) as caught:
        store.load()
    assert caught.value.hint
    (store.path / file).rename((store.path / file).with_name("tmpx"))
    assert store.load() is None
    assert not store.path.exists()
