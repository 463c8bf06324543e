"""What an archive refuses when its state changes under a request, or has come to an end; nothing changes then."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import ArchiveRig, Feed
from tests.kit.hash_feed import HashFeed
from walbd.archive import hash_backup
from walbd.archive.merge import check_merge, plan_merge, run_merge
from walbd.archive.volume import Volume
from walbd.daemon.jobs import Job
from walbd.daemon.tasks import Signal
from walbd.errors import AlreadyExists, Refused, RemoteError
from walbd.format.meta import Diff, Snapshot, diff_name
from walbd.ids import Gid
from walbd.protocol import maintenance as m

VOL = "vol0"


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 4."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=4)
        yield feed


def contents(feed: Feed) -> dict[str, bytes]:
    root = feed.rig.base / VOL
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


async def code_of(feed: Feed, request: Any) -> str:
    """Make a request that is refused and changes nothing; return the code."""
    before = contents(feed)
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(request)
    assert contents(feed) == before
    return caught.value.remote_code


async def test_a_replica_that_is_being_fed_is_not_forgotten(feed: Feed) -> None:
    volume = feed.rig.volume(VOL)
    row = m.ReplicaPosition(node="a1", address="h:1", gid=2, timestamp=0, seen=0)
    await volume.update(lambda _record: {"replicas": (row,)})
    volume.replicating.add("h:1")
    assert await code_of(feed, m.ForgetReplica(volume=VOL, node="a1")) == "busy"
    assert await code_of(feed, m.ForgetReplica(volume=VOL, node="a2")) == "not-found"
    volume.replicating.discard("h:1")
    await feed.rig.call(m.ForgetReplica(volume=VOL, node="a1"))
    assert volume.record.replicas == ()


async def test_a_point_that_goes_while_it_is_being_held(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A merge ends between the look and the hold: whoever holds hears of it, and no hold of nothing is left."""
    update = Volume.update

    async def merged_meanwhile(self: Volume, change: Any) -> None:
        await update(self, change)
        monkeypatch.undo()
        monkeypatch.setattr(Volume, "restorable", lambda *_args, **_more: [])

    monkeypatch.setattr(Volume, "update", merged_meanwhile)
    assert await code_of(feed, m.AddHold(volume=VOL, gid=2, reason="x")) == "not-found"
    assert feed.rig.volume(VOL).record.holds == ()
    monkeypatch.undo()
    await feed.rig.call(m.AddHold(volume=VOL, gid=2, reason="x"))
    assert [hold.gid for hold in feed.rig.volume(VOL).record.holds] == [2]


async def test_so_many_holds_and_no_more(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("walbd.archive.policy_requests.HOLDS_MAX", 2)
    for gid in (1, 2):
        await feed.rig.call(m.AddHold(volume=VOL, gid=gid, reason="x"))
    assert await code_of(feed, m.AddHold(volume=VOL, gid=3, reason="x")) == "usage"


async def test_a_plan_of_a_merge_that_is_out_of_date(feed: Feed) -> None:
    """Diffs went, or a snapshot between them was protected, after it was planned."""
    volume = feed.rig.volume(VOL)
    plan = plan_merge(volume, 1)
    assert len(plan) == 3
    job = Job(1, "merge", VOL, 0, Signal())
    before = contents(feed)
    change = volume.diffs.change_snapshot(2, enable=True)
    assert change.found
    with pytest.raises(Refused, match="changed meanwhile"):
        await run_merge(volume, plan, job)
    volume.diffs.change_snapshot(2, enable=False)
    gone = volume.diffs.find(plan[1].begin, plan[1].end)
    assert gone is not None
    volume.diffs.erase(gone)
    with pytest.raises(Refused, match="changed meanwhile"):
        await run_merge(volume, plan, job)
    volume.diffs.add(gone)
    assert contents(feed) == before
    await run_merge(volume, plan, job)
    assert await feed.check() == [0, 1, 4]


async def test_a_merge_into_a_diff_that_is_there(feed: Feed) -> None:
    """Its file would be replaced, which may hold what its parts do not."""
    volume = feed.rig.volume(VOL)
    parts = plan_merge(volume, 1, 3)
    volume.diffs.add(Diff(Snapshot.clean(1), Snapshot.clean(3), mergeable=True, timestamp=7))
    with pytest.raises(AlreadyExists):
        check_merge(volume, parts)


async def test_a_reload_of_a_record_of_another_state(feed: Feed) -> None:
    """Somebody has edited the file: a restart takes it as it is, a reload of a stopped volume does not."""
    await feed.rig.stopped(VOL)
    path = feed.rig.base / VOL / "volume.json"
    stopped = path.read_bytes()
    whole = json.loads(stopped)
    del whole["checksum"]
    whole["record"]["state"] = "Archived"
    path.write_text(json.dumps(whole))
    assert await code_of(feed, m.DbgReloadMetadata(volume=VOL)) == "refused"
    assert await feed.rig.state(VOL) == "Stopped"
    path.write_bytes(stopped)
    await feed.rig.call(m.DbgReloadMetadata(volume=VOL))


async def test_a_history_without_generations_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = HashFeed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(3)
        before, uuid = contents(feed), rig.volume(VOL).record.uuid
        monkeypatch.setattr(hash_backup, "_GID_MAX", Gid(3))
        with pytest.raises(RemoteError, match="no generation is left"):
            await feed.hash_backup()
        assert contents(feed) == before
        assert rig.volume(VOL).record.uuid == uuid
        assert await rig.state(VOL) == "Archived"


async def test_the_image_of_a_diff_that_is_there_already_is_not_replaced(feed: Feed) -> None:
    """The label of what comes is taken: two transfers, or a repair by hand, may do that."""
    volume = feed.rig.volume(VOL)
    feed.scribble()
    diff = feed.snapshot()
    volume.diffs.add(diff)
    path = feed.rig.base / VOL / diff_name(diff)
    path.write_bytes(b"kept")
    with pytest.raises(RemoteError) as caught:
        await feed.send()
    assert caught.value.remote_code == "already-exists"
    assert path.read_bytes() == b"kept"
    volume.diffs.erase(diff)
    assert await feed.rig.state(VOL) == "Archived"
