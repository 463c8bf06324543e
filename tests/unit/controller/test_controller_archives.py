"""Diffs, sizes and contents of volumes at archives."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.kit.fake_group import NOW, FakeGroup, FakeVolume
from walbd.controller import Diff, MetaState, Snapshot
from walbd.errors import (
    BadState,
    ConnectError,
    CorruptData,
    NotFound,
    Refused,
    RemoteProtocolError,
    UsageError,
    WalbError,
)
from walbd.format import meta
from walbd.protocol import control as c
from walbd.protocol import maintenance as m


def test_apply(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    with pytest.raises(UsageError) as caught:
        ctl.apply(a0, "vol0", 9)
    assert caught.value.hint == "ends: 1, 2, 3"
    ctl.apply(a0, "vol0", 2)
    assert ctl.get_base(a0, "vol0") == MetaState(Snapshot(2, 2))
    assert ctl.get_restorable_gid(a0, "vol0") == [2, 3]
    ready.fail_job("apply", Refused("no"))
    with pytest.raises(Refused, match="no"):
        ctl.apply(a0, "vol0", 3)
    assert ctl.gc_diff(a0, "vol0") == 2


def test_apply_that_ends_before_its_goal(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    monkeypatch.setattr(ctl, "get_base", lambda *_: MetaState(Snapshot(0, 0), Snapshot(2, 2)))
    with pytest.raises(Refused, match="before its goal"):
        ctl.apply(a0, "vol0", 2)


def test_diff_objects_are_usable(ready: FakeGroup) -> None:
    diff = ready.ctl.get_diff_list(ready.a[0], "vol0")[0]
    assert isinstance(diff, Diff)
    diff.verify()
    assert diff.isMergeable


# Merging


def test_merge(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ctl.merge(a0, "vol0", 1, 3)
    assert ready.requests[-1] == ("a0", m.GetExistsDiff(volume="vol0", diff=clean_diff_between(1, 3)))
    assert ctl.exists_diff(a0, "vol0", 1, 3)
    assert ctl.get_restorable_gid(a0, "vol0") == [1, 3]
    assert ready.changes() == ["a0 merge vol0"]


def clean_diff_between(begin: int, end: int) -> meta.Diff:
    return Diff(Snapshot(begin, begin), Snapshot(end, end)).to_meta()


@pytest.mark.parametrize(("gid_b", "gid_e"), [(1, 9), (9, 10), (2, 2), (0, 7)])
def test_merge_needs_ends_of_diffs(gid_b: int, gid_e: int, ready: FakeGroup) -> None:
    with pytest.raises(UsageError) as caught:
        ready.ctl.merge(ready.a[0], "vol0", gid_b, gid_e)
    assert caught.value.hint == "ends: 0, 1, 2, 3"
    assert ready.changes() == []


def test_merge_needs_diffs_that_can_be_merged(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ready.volume("a0").protected = [2]
    with pytest.raises(Refused, match="protected") as caught:
        ctl.merge(a0, "vol0", 1, 3)
    assert caught.value.hint == "walbc disable-snapshot vol0 2 --archive a0"
    ready.volume("a0").protected = [1]  # the first one may begin at a protected snapshot
    ctl.merge(a0, "vol0", 1, 3)
    ready.volume("a0").compared = [3]
    with pytest.raises(Refused, match="comparison"):
        ctl.merge(a0, "vol0", 0, 3)
    assert ready.changes() == ["a0 merge vol0"]


def test_a_lost_connection_is_no_failed_merge(ready: FakeGroup) -> None:
    ready.fail("a0", m.GetExistsDiff, None, times=2)
    ready.ctl.merge(ready.a[0], "vol0", 1, 3)
    ready.fail("a0", c.GetBase, None)
    ready.fail("a0", c.GetRestorable, None)
    ready.ctl.apply(ready.a[0], "vol0", 3)


def test_merge_that_ends_before_its_goal(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ready.ctl, "exists_diff", lambda *_: False)
    with pytest.raises(Refused, match="before its goal"):
        ready.ctl.merge(ready.a[0], "vol0", 1, 3)
    ready.fail_job("merge", Refused("no room"))
    with pytest.raises(Refused, match="no room"):
        ready.ctl.merge(ready.a[0], "vol0", 0, 3)


def test_enable_and_disable_snapshots(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ctl.enable_snapshot(a0, "vol0", [1, 2])
    assert ready.volume("a0").protected == [1, 2]
    ctl.disable_snapshot(a0, "vol0", [1])
    assert ready.volume("a0").protected == [2]
    assert ready.changes() == ["a0 enable-snapshot vol0", "a0 disable-snapshot vol0"]
    with pytest.raises(UsageError):
        ctl.disable_snapshot(a0, "vol0", [])
    with pytest.raises(TypeError):
        ctl.disable_snapshot(a0, "vol0", 1)  # type: ignore[arg-type]


# Sizes


def test_resize_archive(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ctl.resize_archive(a0, "vol0", 16, False)  # it has this size
    assert ready.changes() == []
    ctl.resize_archive(a0, "vol0", 20, True)
    assert ready.requests[-3] == ("a0", c.Resize(volume="vol0", size_b=20 << 20, zero=True))
    assert ctl.get_vol_size_lb(a0, "vol0") == 20 << 11
    with pytest.raises(UsageError, match="smaller"):
        ctl.resize_archive(a0, "vol0", 16, False)
    ready.fail("a0", c.Resize, None)  # the connection is lost: the archive may or may not have done it
    with pytest.raises(Refused, match="new size"):
        ctl.resize_archive(a0, "vol0", 21, False)
    ready.frozen = True
    with pytest.raises(Refused, match="new size"):
        ctl.resize_archive(a0, "vol0", 21, False)
    ready.volume("a0").state = "FullSync"
    with pytest.raises(BadState):
        ctl.resize_archive(a0, "vol0", 22, False)
    ctl.resize_archive(a0, "vol9", 22, False)  # is not known there


def test_resize_goes_from_archives_to_storages(big: FakeGroup) -> None:
    big.ctl.init_storage(big.s[0], "vol0", "/dev/x")
    big.ctl.full_backup(big.s[0], "vol0")
    big.servers["a1"].volumes["vol0"] = FakeVolume("SyncReady")  # has no image yet
    big.requests.clear()
    big.ctl.resize("vol0", 17, False)
    assert big.changes() == ["a0 resize vol0", "s0 resize vol0"]
    big.ctl.resize_storage(big.s[0], "vol0", 0)
    assert big.requests[-1] == ("s0", c.Resize(volume="vol0", size_b=0))
    big.requests.clear()
    big.ctl.resize_storage(big.s[1], "vol0", 17)  # is not known there
    for size in (0, -1, 16):
        with pytest.raises(UsageError):
            big.ctl.resize("vol0", size, False)
    with pytest.raises(UsageError):
        big.ctl.resize_storage(big.s[0], "vol0", -1)
    big.volume("a1").state = "FullSync"
    with pytest.raises(BadState):
        big.ctl.resize("vol0", 18, False)
    big.kill("s1")
    with pytest.raises(ConnectError):
        big.ctl.resize("vol0", 18, False)
    assert big.changes() == []


# Contents


def test_block_hash(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    assert ctl.get_block_hash(a0, "vol0", 2, "32k", "1m", sleepPct=7) == f"{2:032x}"
    request = m.BlockHash(volume="vol0", gid=2, bulk_b=32 << 10, size_lb=2048, sleep_percent=7)
    assert ("a0", request) in ready.requests
    with pytest.raises(UsageError):
        ctl.get_block_hash(a0, "vol0", 2, sleepPct=100)
    assert ctl.run_ctl(a0, ["bhash", "vol0", "3"]) == f"{3:032x}"
    for bulk, size in (("100", None), ("64k", "0"), ("64k", "100"), ("64k", "x")):
        with pytest.raises(UsageError):
            ctl.get_block_hash(a0, "vol0", 2, bulk, size)
    ready.fail_job("block-hash", Refused("no"))
    with pytest.raises(Refused):
        ctl.run_ctl(a0, ["bhash", "vol0", "3"])


def test_block_hash_is_asked_for_again_after_a_restart(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([None, None])
    real = ready.ctl.wait_for_job
    monkeypatch.setattr(ready.ctl, "wait_for_job", lambda *a, **kw: next(found, ...) and real(*a, **kw))
    assert ready.ctl.get_block_hash(ready.a[0], "vol0", 2) == f"{2:032x}"
    assert ready.changes() == ["a0 block-hash vol0"] * 3
    monkeypatch.setattr(ready.ctl, "wait_for_job", lambda *_, **__: None)
    with pytest.raises(Refused, match="restarts"):
        ready.ctl.get_block_hash(ready.a[0], "vol0", 2)


IMAGE = bytes(70000 // 512 * 512) + bytes(range(256)) * 600 + bytes(1 << 20)


@pytest.fixture
def scanned(ready: FakeGroup) -> FakeGroup:
    ready.volume("a0").image = IMAGE
    return ready


def test_virt_full_scan(scanned: FakeGroup, tmp_path: Path) -> None:
    ctl, a0, path = scanned.ctl, scanned.a[0], tmp_path / "image"
    assert ctl.virt_full_scan(a0, "vol0", 2, str(path)) == len(IMAGE)
    assert path.read_bytes() == IMAGE
    path.write_bytes(b"old")
    assert ctl.virt_full_scan(a0, "vol0", 2, path, bulkSizeU="512", scanSizeU="128k", sleepPct=9) == 128 << 10
    assert path.read_bytes() == IMAGE[: 128 << 10]
    request = m.VirtFullScan(volume="vol0", gid=2, bulk_b=512, size_lb=256, sleep_percent=9)
    assert scanned.requests[-1] == ("a0", request)
    stream = io.BytesIO()
    ctl.virt_full_scan(a0, "vol0", 2, stream)
    assert stream.getvalue() == IMAGE
    assert any(p.what == "scan" and p.done == p.total == len(IMAGE) for p in scanned.progress)
    assert scanned.progress[-1].ended


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ("bytes", CorruptData),
        ("packing", CorruptData),
        ("place", RemoteProtocolError),
        ("size", RemoteProtocolError),
        ("early", RemoteProtocolError),
        ("message", RemoteProtocolError),
        ("cut", ConnectError),
    ],
)
def test_a_damaged_scan_leaves_nothing(
    damage: str, error: type[WalbError], scanned: FakeGroup, tmp_path: Path
) -> None:
    scanned.volume("a0").damage = damage
    with pytest.raises(error):
        scanned.ctl.virt_full_scan(scanned.a[0], "vol0", 2, tmp_path / "image")
    assert list(tmp_path.iterdir()) == []


def test_destinations_of_scans(scanned: FakeGroup, tmp_path: Path) -> None:
    ctl, a0 = scanned.ctl, scanned.a[0]
    with pytest.raises(NotFound):
        ctl.virt_full_scan(a0, "vol0", 2, tmp_path / "no" / "image")
    with pytest.raises(Refused):
        ctl.virt_full_scan(a0, "vol0", 2, tmp_path)
    with pytest.raises(UsageError):
        ctl.virt_full_scan(a0, "vol0", 2, tmp_path / "image", sleepPct=100)
    with pytest.raises(BadState):
        ctl.virt_full_scan(a0, "vol9", 2, tmp_path / "image")
    with pytest.raises(UsageError, match="no text"):
        ctl.run_ctl(a0, ["virt-full-scan", "stdout", "vol0", "2"])


def test_a_scan_to_a_device_overwrites_it(
    scanned: FakeGroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = tmp_path / "device"
    device.write_bytes(b"x" * (len(IMAGE) + 512))
    monkeypatch.setattr(Path, "is_block_device", lambda self: self == device)
    scanned.ctl.virt_full_scan(scanned.a[0], "vol0", 2, device)
    assert device.read_bytes() == IMAGE + b"x" * 512
    device.write_bytes(b"x" * 512)
    with pytest.raises(Refused, match="too small"):
        scanned.ctl.virt_full_scan(scanned.a[0], "vol0", 2, device)
    assert device.read_bytes() == b"x" * 512


def test_scrub(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    assert ctl.scrub(a0, "vol0") == {"wdiffs": 3, "damaged": 0, "damaged_files": ""}
    ready.fail_job("scrub", Refused("no"))
    with pytest.raises(Refused):
        ctl.scrub(a0, "vol0")


# Cold images and gaps


def test_cold_images(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ready.volume("a0").colds = [1, 2]
    assert ctl.get_cold(a0, "vol0") == [1, 2]
    ctl.del_cold(a0, "vol0", 1)
    assert ctl.get_cold(a0, "vol0") == [2]
    with pytest.raises(NotFound):
        ctl.del_cold(a0, "vol0", 1)
    assert ready.changes() == ["a0 del-cold vol0"]


def test_gaps(ready: FakeGroup) -> None:
    gaps = [
        m.Gap(begin=NOW, end=NOW + 9, gid_b=1, gid_e=4, cause="hash-backup"),
        m.Gap(begin=NOW + 20, end=0, gid_b=6, gid_e=0, cause="resync"),
    ]
    ready.volume("a0").gaps = gaps
    assert ready.ctl.get_gaps(ready.a[0], "vol0") == gaps
    assert ready.ctl.run_ctl(ready.a[0], ["get", "gaps", "vol0"]).splitlines() == [
        "1 2027-01-15T08:00:00 4 2027-01-15T08:00:09 hash-backup",
        "6 2027-01-15T08:00:20 --- --- resync",
    ]
