"""A wdiff that brings a new history: its name and the new uuid are true together, whatever fails."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.memfs import MemoryFileSystem
from tests.kit.replicas import VOL, Group, TwoFeeds
from walbd.archive.record import Pending
from walbd.errors import DiskFailed, RemoteError
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol.base import Ok
from walbd.protocol.transfer import Verdict

BASE = Path("/")


@pytest.fixture
async def pair() -> AsyncIterator[tuple[Group, TwoFeeds]]:
    """One archive with generations 0 to 2, on a disk in memory; a proxy still has 3, which leads on from there."""
    disk = MemoryFileSystem()
    disk.make_dir(BASE / "a0")
    async with Group(BASE, 1, fs=[disk]) as group:
        feed = await group.feed()
        await feed.step(2)
        feed.scribble()
        feed.snapshot()
        feed.write(0, 3)
        yield group, feed


def on_disk(group: Group) -> dict[str, Any]:
    data = group[0].env.fs.read_bytes(BASE / "a0" / VOL / "volume.json")
    record: dict[str, Any] = json.loads(data)["record"]
    return record


async def old_history_goes_on(group: Group, feed: TwoFeeds, old: bytes) -> None:
    assert group.volume(0).record.uuid == on_disk(group)["uuid"] == old.hex()
    assert await feed.send_to(group[0], 2, 3) == [Ok()]
    assert await group[0].points(VOL) == [0, 1, 2, 3]


async def new_history_counts(group: Group, feed: TwoFeeds) -> None:
    assert group.volume(0).record.uuid == feed.uuid.hex()
    assert await feed.send_to(group[0], 2, 3) == [Verdict.DIFFERENT_UUID]
    assert await feed.send_to(group[0], 3) == [Ok()]
    assert await group[0].restored_image(VOL, feed.gid) == bytes(feed.image)


@pytest.mark.parametrize(
    "name", ["archive.record.before_save", "archive.wdiff.before_commit", "archive.wdiff.after_commit"]
)
async def test_nothing_has_happened(pair: tuple[Group, TwoFeeds], name: str) -> None:
    """Also when the file has its name already: that is taken away again."""
    group, feed = pair
    old = feed.uuid
    failpoints.arm(f"{name}=eio")
    with pytest.raises(RemoteError, match="Input/output error"):
        await feed.hash_backup()
    volume = group.volume(0)
    await group[0].settled()
    assert len(volume.diffs) == 2
    await group[0].restart()
    assert on_disk(group)["pending"] is None
    await old_history_goes_on(group, feed, old)


async def test_all_has_happened_though_it_cannot_be_saved(pair: tuple[Group, TwoFeeds]) -> None:
    group, feed = pair
    failpoints.arm("archive.record.before_save=eio@1")
    with pytest.raises(RemoteError, match="Input/output error"):
        await feed.hash_backup()
    volume = group.volume(0)
    await group[0].settled()
    assert on_disk(group)["pending"] is not None
    assert volume.record.uuid == feed.uuid.hex()
    await group[0].restart()
    assert on_disk(group)["pending"] is None
    assert on_disk(group)["gaps"]
    await new_history_counts(group, feed)


async def test_the_next_save_makes_up_for_it(pair: tuple[Group, TwoFeeds]) -> None:
    group, feed = pair
    failpoints.arm("archive.record.before_save=eio@1")
    with pytest.raises(RemoteError):
        await feed.hash_backup()
    await new_history_counts(group, feed)
    await group[0].stopped(VOL)
    assert on_disk(group)["pending"] is None
    await group[0].call(c.Start(volume=VOL))
    await group[0].restart()
    assert group.volume(0).record.uuid == feed.uuid.hex()


async def test_broken_until_a_start_has_looked(
    pair: tuple[Group, TwoFeeds], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has its name, and that cannot be taken away."""
    group, feed = pair
    disk = group[0].env.fs

    def unlink(_path: Path) -> None:
        raise DiskFailed("the disk is gone")

    failpoints.arm("archive.wdiff.after_commit=eio")
    monkeypatch.setattr(disk, "unlink", unlink)
    with pytest.raises(RemoteError, match="Input/output error"):
        await feed.hash_backup()
    monkeypatch.undo()
    assert await group[0].state(VOL) == "Broken"
    with pytest.raises(RemoteError):
        await feed.send_to(group[0], 2, 3)
    await group[0].restart()
    assert await group[0].state(VOL) == "Archived"
    await new_history_counts(group, feed)


async def test_a_file_of_another_history_is_not_the_one(pair: tuple[Group, TwoFeeds]) -> None:
    """A wdiff of a proxy has the same label by chance: what was pending has not happened."""
    group, feed = pair
    volume, old = group.volume(0), feed.uuid
    diff = feed.log[2][1]
    await volume.save(pending=Pending(diff=diff, uuid="0f" * 16, gaps=()))
    assert await feed.send_to(group[0], 2, 3) == [Ok()]
    await volume.save(pending=Pending(diff=diff, uuid="0f" * 16, gaps=()))
    await group[0].restart()
    assert on_disk(group)["pending"] is None
    assert group.volume(0).record.uuid == old.hex()
    assert await group[0].points(VOL) == [0, 1, 2, 3]
