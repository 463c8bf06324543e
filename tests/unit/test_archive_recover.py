"""Start-up: what is loaded, repaired, put aside, or isolated as broken."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.kit.feeder import ArchiveRig, Feed
from tests.kit.memfs import MemoryFileSystem
from walbd.archive.diffs import ASIDE_DUPLICATE, ASIDE_GAP, find_diffs
from walbd.archive.images.file_store import FileStore
from walbd.archive.record import VolumeRecord
from walbd.archive.recover import load_volume
from walbd.archive.states import State
from walbd.daemon.record import RECORD_NAME, load_record, save_record
from walbd.errors import NotFound, RemoteError
from walbd.format.meta import BaseState, Diff, Snapshot, diff_name
from walbd.fs import OsFileSystem
from walbd.ids import Gid
from walbd.protocol import control as c

VOL = "vol0"


def clean(begin: int, end: int, **kwargs: Any) -> Diff:
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), **kwargs)


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 3, whose archive has been killed."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=3)
        await rig.crash()
        yield feed


def record_of(base: Path) -> VolumeRecord:
    return load_record(OsFileSystem(), base / VOL / RECORD_NAME, VolumeRecord)


def change_record(base_dir: Path, **changes: Any) -> None:
    record = msgspec.structs.replace(record_of(base_dir), **changes)
    save_record(OsFileSystem(), base_dir / VOL / RECORD_NAME, record)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_record_goes_to_json_and_back(tmp_path: Path) -> None:
    record = VolumeRecord(
        state=State.STOPPED,
        size_lb=1 << 40,
        base=BaseState(Snapshot.clean(3), Snapshot(Gid(7), Gid((1 << 64) - 2)), timestamp=5),
        uuid="ab" * 16,
        began={"Apply": 7},
    )
    for each in (record, VolumeRecord(state=State.SYNC_READY)):
        save_record(OsFileSystem(), tmp_path / RECORD_NAME, each)
        loaded = load_record(OsFileSystem(), tmp_path / RECORD_NAME, VolumeRecord)
        assert loaded == each
        assert loaded.base.timestamp == each.base.timestamp


# --- repaired


async def test_unfinished_files_are_removed(feed: Feed, tmp_path: Path) -> None:
    (tmp_path / VOL / "tmpabc").write_bytes(b"x")
    (tmp_path / VOL / "restored").mkdir()
    (tmp_path / VOL / "restored" / "tmp_2.img").write_bytes(b"x")
    (tmp_path / "cleared_old").mkdir()
    (tmp_path / "cleared_old" / "base.img").write_bytes(b"x")
    (tmp_path / "half-made").mkdir()
    (tmp_path / "half-made" / "tmpxyz").write_bytes(b"x")
    await feed.rig.up()
    assert sorted(os.listdir(tmp_path)) == [".lock", VOL]
    assert not [name for name in contents(tmp_path / VOL) if "tmp" in name]
    assert await feed.check() == [0, 1, 2, 3]


@pytest.mark.parametrize("state", [State.ARCHIVED, State.STOPPED])
async def test_diffs_that_the_base_holds_are_removed(feed: Feed, tmp_path: Path, state: State) -> None:
    """A crash between the record of a finished apply and the removal; in Stopped, too."""
    await feed.rig.up()
    await feed.rig.done(c.Restore(volume=VOL, gid=2))
    await feed.rig.crash()
    os.replace(tmp_path / VOL / "restored" / "2.img", tmp_path / VOL / "base.img")  # noqa: TID251
    change_record(tmp_path, base=BaseState(Snapshot.clean(2), timestamp=3), state=state)
    await feed.rig.up()
    assert len(list((tmp_path / VOL).glob("*.wdiff"))) == 1
    if state is State.STOPPED:
        await feed.rig.call(c.Start(volume=VOL))
    assert await feed.check() == [2, 3]


async def test_parts_of_a_merged_diff_are_removed(feed: Feed, tmp_path: Path) -> None:
    """A crash of a merge between the new file and the removal of the old ones."""
    from tests.kit.feeder import make_wdiff

    blocks: dict[int, bytes | str] = {at: feed.images[2][at * 512 : at * 512 + 512] for at in range(64)}
    merged = clean(0, 2, timestamp=feed.now - 1)
    (tmp_path / VOL / diff_name(merged)).write_bytes(make_wdiff(blocks, feed.uuid))
    await feed.rig.up()
    assert [str(d) for d in (await feed.rig.call(c.GetDiff(volume=VOL))).diffs] == ["|0|-->|2|", "|2|-->|3|"]
    assert len(list((tmp_path / VOL).glob("*.wdiff"))) == 2
    assert await feed.check() == [0, 2, 3]


async def test_same_range_twice(feed: Feed, tmp_path: Path) -> None:
    """The newer one is kept, the other is put aside and reported, now and at later starts."""
    diff = next(d for d in find_diffs(OsFileSystem(), tmp_path / VOL).diffs if d.begin.gid_b == 1)
    older = clean(1, 2, timestamp=diff.timestamp - 100, mergeable=False)
    (tmp_path / VOL / diff_name(older)).write_bytes(b"rubbish")
    for _ in range(2):
        await feed.rig.up()
        assert (tmp_path / VOL / (diff_name(older) + ASIDE_DUPLICATE)).read_bytes() == b"rubbish"
        status = await feed.rig.status(VOL)
        assert "put aside" in status.error
        assert (status.state, status.diffs) == ("Archived", 3)
        assert await feed.check() == [0, 1, 2, 3]
        await feed.rig.crash()


async def test_diffs_beyond_a_gap_are_put_aside(feed: Feed, tmp_path: Path) -> None:
    """A file was lost: what comes after it is not deleted, as the lost one may turn up again."""
    names = sorted(p.name for p in (tmp_path / VOL).glob("*.wdiff"))
    lost = (tmp_path / VOL / names[1]).read_bytes()
    (tmp_path / VOL / names[1]).unlink()
    await feed.rig.up()
    assert await feed.check() == [0, 1]
    assert "missing" in (await feed.rig.status(VOL)).error
    assert (tmp_path / VOL / (names[2] + ASIDE_GAP)).exists()
    await feed.rig.crash()
    (tmp_path / VOL / names[1]).write_bytes(lost)
    os.rename(tmp_path / VOL / (names[2] + ASIDE_GAP), tmp_path / VOL / names[2])  # noqa: TID251
    await feed.rig.up()
    assert await feed.check() == [0, 1, 2, 3]
    assert (await feed.rig.status(VOL)).error == ""


async def test_files_that_only_look_like_diffs(feed: Feed, tmp_path: Path) -> None:
    for name in ("x.wdiff", "20240101000000-M--9-7.wdiff", "20240101000000-M--07-9.wdiff"):
        (tmp_path / VOL / name).write_bytes(b"x")
    (tmp_path / VOL / "README").write_bytes(b"x")
    await feed.rig.up()
    assert "3 files end in .wdiff" in (await feed.rig.status(VOL)).error
    assert (tmp_path / VOL / "x.wdiff").exists()
    assert await feed.check() == [0, 1, 2, 3]


async def test_image_that_was_grown_just_before_the_crash(feed: Feed, tmp_path: Path) -> None:
    with (tmp_path / VOL / "base.img").open("r+b") as file:
        file.truncate(96 * 512)
    await feed.rig.up()
    assert (await feed.rig.status(VOL)).size_lb == 96
    await feed.rig.restart()
    assert record_of(tmp_path).size_lb == 96


async def test_interrupted_full_backup(feed: Feed, tmp_path: Path) -> None:
    change_record(tmp_path, state=State.SYNC_READY)
    (tmp_path / VOL / "restored").mkdir()
    (tmp_path / VOL / "restored" / "1.img").write_bytes(b"x")
    await feed.rig.up()
    assert await feed.rig.state(VOL) == "SyncReady"
    assert sorted(contents(tmp_path / VOL)) == ["base.img", RECORD_NAME]
    await feed.full_backup()
    await feed.step()
    assert await feed.check() == [0, 1]


def test_removal_at_start_is_durable() -> None:
    """Old diffs must not come back after a power failure and meet a new history."""
    base = Path("/a")
    fs = MemoryFileSystem()
    fs.make_dir(base)
    fs.make_dir(base / VOL)
    save_record(fs, base / VOL / RECORD_NAME, VolumeRecord(state=State.SYNC_READY))
    with fs.temp_file(base / VOL) as file:
        file.commit(base / VOL / diff_name(clean(0, 5)))
    load_volume(fs, FileStore(fs, base), base / VOL)
    for seed in range(10):
        after = fs.after_crash(random.Random(seed))
        assert after.list_names(base / VOL) == [RECORD_NAME]


# --- broken


def truncate_record(base: Path) -> None:
    path = base / VOL / RECORD_NAME
    path.write_bytes(path.read_bytes()[:-20])


def flip_record(base: Path) -> None:
    path = base / VOL / RECORD_NAME
    path.write_bytes(path.read_bytes().replace(b'"size_lb": 64', b'"size_lb": 65'))


def shrink_image(base: Path) -> None:
    with (base / VOL / "base.img").open("r+b") as file:
        file.truncate(63 * 512)


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no-record": (lambda base: (base / VOL / RECORD_NAME).unlink(), "no such file"),
    "cut-record": (truncate_record, "the record of the volume is damaged"),
    "flipped-record": (flip_record, "the record of the volume is damaged"),
    "no-image": (lambda base: (base / VOL / "base.img").unlink(), "the base image is missing"),
    "small-image": (shrink_image, "the base image is smaller"),
    "broken-state": (lambda base: change_record(base, state=State.BROKEN), "contradicts itself"),
    "no-base": (lambda base: change_record(base, base=VolumeRecord(state=State.CLEAR).base), "contradicts itself"),
    "no-size": (lambda base: change_record(base, size_lb=0), "contradicts itself"),
    "bad-uuid": (lambda base: change_record(base, uuid="xyz"), "contradicts itself"),
    "apply-without-diffs": (
        lambda base: change_record(base, base=BaseState(Snapshot.clean(0), Snapshot.clean(9))),
        "diffs that finish the interrupted apply are missing",
    ),
}


@pytest.mark.parametrize("name", BREAKS)
async def test_broken_volume_is_isolated_and_left_alone(feed: Feed, tmp_path: Path, name: str) -> None:
    break_it, text = BREAKS[name]
    rig = feed.rig
    await rig.up()
    other = Feed(rig, "other", seed=2)
    await other.init()
    await other.full_backup()
    await rig.crash()
    break_it(tmp_path)
    (tmp_path / VOL / "tmpjunk").write_bytes(b"x")
    before = contents(tmp_path / VOL)
    await rig.up()
    status = await rig.status(VOL)
    assert (status.state, text in status.error) == ("Broken", True), status.error
    assert await rig.state(VOL) == "Broken"
    assert VOL in (await rig.call(c.GetVolumes())).names
    refused: list[Any] = [
        c.Start(volume=VOL),
        c.Restore(volume=VOL, gid=1),
        c.ResetVol(volume=VOL),
        c.GetBase(volume=VOL),
    ]
    for request in refused:
        with pytest.raises(RemoteError, match="the volume is broken") as caught:
            await rig.call(request)
        assert caught.value.hint
        assert caught.value.remote_code == "bad-state"
    assert await rig.points(VOL) == []
    assert contents(tmp_path / VOL) == before
    await other.step(2)
    assert await other.check() == [0, 1, 2]  # the others live on
    await rig.call(c.ClearVol(volume=VOL))
    assert not (tmp_path / VOL).exists()
    await feed.init()
    await feed.full_backup()
    assert await feed.check() == [0]


async def test_record_without_checksum_is_taken(feed: Feed, tmp_path: Path) -> None:
    """Somebody has mended it by hand."""
    path = tmp_path / VOL / RECORD_NAME
    whole = json.loads(path.read_text())
    del whole["checksum"]
    whole["record"]["state"] = "Stopped"
    path.write_text(json.dumps(whole))
    await feed.rig.up()
    assert await feed.rig.state(VOL) == "Stopped"


async def test_strangers_in_the_base_directory(feed: Feed, tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "notes.txt").write_bytes(b"x")
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"x")
    await feed.rig.up()
    assert (await feed.rig.call(c.GetVolumes())).names == ["photos", VOL]
    assert await feed.rig.state("photos") == "Broken"
    assert (tmp_path / "photos" / "a.jpg").exists()
    assert (tmp_path / "lost+found").is_dir()


async def test_many_volumes(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        for number in range(20):
            await rig.call(c.ArchiveInitVol(volume=f"v{number}"))
        await rig.restart()
        assert len((await rig.call(c.GetVolumes())).names) == 20


def test_missing_record_is_not_found(tmp_path: Path) -> None:
    (tmp_path / VOL).mkdir()
    with pytest.raises(NotFound):
        load_volume(OsFileSystem(), FileStore(OsFileSystem(), tmp_path), tmp_path / VOL)
