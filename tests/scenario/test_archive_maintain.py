"""Merge, protected snapshots, resize and repair by hand at an archive, over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import NOW, ArchiveRig, FakeClock, Feed
from tests.kit.gate import gated
from walbd.archive import opening
from walbd.archive.merge import plan_merge, run_merge
from walbd.archive.volume import Volume
from walbd.daemon.jobs import Job
from walbd.daemon.tasks import Signal
from walbd.errors import RemoteError
from walbd.format.meta import BaseState, Diff, Snapshot, diff_name
from walbd.format.wdiff_merge import verify
from walbd.format.wdiff_read import open_wdiff
from walbd.fs import OsFileSystem, failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobState
from walbd.units import LB, MIB

VOL = "vol0"


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 6; 3 is protected."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=3)
        await feed.step(1, mergeable=False)
        await feed.step(2)
        yield feed


async def refused(feed: Feed, request: Any) -> RemoteError:
    """Make a request that must be refused; it leaves the files as they are."""
    before = files(feed)
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(request)
    assert files(feed) == before
    return caught.value


def files(feed: Feed) -> list[str]:
    return sorted(path.name for path in (feed.rig.base / VOL).iterdir())


def wdiffs(feed: Feed) -> list[str]:
    return [str(diff) for diff in volume_of(feed).diffs]


def volume_of(feed: Feed) -> Volume:
    return feed.rig.volume(VOL)


# --- merge


async def test_merge_joins_what_lies_between_protected_snapshots(feed: Feed) -> None:
    volume = volume_of(feed)
    latest = volume.latest
    newest_uuid = feed.uuid
    info = await feed.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
    assert (info.result["diff"], info.result["diffs"]) == ("|0|-->|3|", 3)
    assert wdiffs(feed) == ["|0|-->|3|", "|3|-->|4|", "|4|-->|5|", "|5|-->|6|"]
    assert volume.latest == latest
    (merged,) = volume.diffs.get_range(0, 1)
    path = feed.rig.base / VOL / diff_name(merged)
    assert path.stat().st_size == merged.size_b == info.result["size_b"]
    assert merged.timestamp == NOW + 3
    with OsFileSystem().open(path) as file:
        reader = open_wdiff(file)
        assert reader.header.uuid == newest_uuid
        assert verify(reader) == info.result["records"]
    assert [p.gid for p in (await feed.rig.call(c.GetRestorable(volume=VOL))).points] == [0, 3, 6]
    assert await feed.check() == [0, 3, 4, 5, 6]
    await feed.rig.restart()
    assert await feed.check() == [0, 3, 4, 5, 6]
    assert ("vol0", "Merge", 0, NOW) in (await feed.rig.call(c.GetActions())).rows


async def test_merge_up_to_a_generation_or_a_size(feed: Feed) -> None:
    sizes = [diff.size_b for diff in volume_of(feed).diffs]
    await feed.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=2))
    assert wdiffs(feed)[:2] == ["|0|-->|2|", "|2|-->|3|"]
    await feed.rig.done(m.Merge(volume=VOL, gid_b=3, size_max_b=sum(sizes[3:5])))
    assert wdiffs(feed)[2:] == ["|3|-->|5|", "|5|-->|6|"]
    await feed.step()
    assert await feed.check() == [0, 2, 3, 5, 6, 7]


@pytest.mark.parametrize(
    ("ask", "code"),
    [
        ({"gid_b": 0}, "usage"),
        ({"gid_b": 0, "gid_e": 5, "size_max_b": 5}, "usage"),
        ({"gid_b": 3, "gid_e": 3}, "usage"),
        ({"gid_b": 0, "gid_e": 1}, "not-mergeable"),
        ({"gid_b": 0, "size_max_b": 1}, "not-mergeable"),
        ({"gid_b": 2, "gid_e": 99}, "not-mergeable"),  # 3 is protected
        ({"gid_b": 99, "gid_e": 100}, "not-mergeable"),
    ],
)
async def test_merge_that_cannot_be(feed: Feed, ask: dict[str, int], code: str) -> None:
    error = await refused(feed, m.Merge(volume=VOL, **ask))
    assert error.remote_code == code
    assert (await feed.rig.call(GetJobs())).jobs == []


async def test_held_snapshots_and_replicas_are_never_merged_away(feed: Feed) -> None:
    hold = m.Hold(gid=1, reason="audit", created=NOW)
    replica = m.ReplicaPosition(node="a1", address="h:1", gid=5, timestamp=0, seen=0)
    await volume_of(feed).save(holds=(hold,), replicas=(replica,))
    for ask, gid, why in ((0, 1, "hold: audit"), (3, 5, "replica at a1")):
        error = await refused(feed, m.Merge(volume=VOL, gid_b=ask, gid_e=99))
        assert error.remote_code == "refused"
        assert (error.facts["gid"], error.facts["kept_for"]) == (gid, why)
        assert error.hint
    await feed.rig.done(m.Merge(volume=VOL, gid_b=1, gid_e=99))  # from it on
    await feed.rig.done(m.Merge(volume=VOL, gid_b=3, gid_e=5))  # and up to it
    assert wdiffs(feed) == ["|0|-->|1|", "|1|-->|3|", "|3|-->|5|", "|5|-->|6|"]
    newest = volume_of(feed).latest.timestamp
    ahead = m.Hold(gid=1, reason="audit", created=0, until=newest + 1)
    await volume_of(feed).save(holds=(ahead,), replicas=())
    clock = feed.rig.env.clock
    assert isinstance(clock, FakeClock)
    clock.time_s = newest + 1000  # a clock that is ahead of the snapshots ends no hold
    assert (await refused(feed, m.Merge(volume=VOL, gid_b=0, gid_e=3))).remote_code == "refused"
    await volume_of(feed).save(holds=(m.Hold(gid=1, reason="audit", created=0, until=newest),))
    await feed.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=3))  # the hold has ended
    assert await feed.check() == [0, 3, 5, 6]


async def test_hold_that_comes_while_a_merge_runs_wins(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    volume = volume_of(feed)
    before = files(feed)
    with gated(monkeypatch, "archive.merge.mid_write") as gate:
        job = (await feed.rig.call(m.Merge(volume=VOL, gid_b=0, gid_e=99))).job
        await gate.wait()
        await volume.save(holds=(m.Hold(gid=2, reason="r", created=0),))
        gate.open.set()
        info = await feed.rig.ended(job)
    assert (info.state, info.error_code) == (JobState.FAILED, "refused")
    assert files(feed) == before


async def test_merge_is_refused_while_an_apply_is_unfinished(feed: Feed) -> None:
    volume = volume_of(feed)
    await volume.save(base=volume.base.begin_applying(volume.diffs.to_apply(volume.base, 2)))
    error = await refused(feed, m.Merge(volume=VOL, gid_b=0, gid_e=99))
    assert (error.remote_code, "apply" in error.hint) == ("refused", True)
    await feed.rig.done(c.Apply(volume=VOL, gid=2))
    await feed.rig.done(m.Merge(volume=VOL, gid_b=3, gid_e=99))
    assert await feed.check() == [2, 3, 6]


async def test_damaged_part_fails_the_merge_and_changes_nothing(feed: Feed) -> None:
    path = feed.rig.base / VOL / diff_name(list(volume_of(feed).diffs)[1])
    data = bytearray(path.read_bytes())
    data[-4097] ^= 1  # in the data
    path.write_bytes(data)
    before = files(feed)
    info = await feed.rig.job(m.Merge(volume=VOL, gid_b=0, gid_e=99))
    assert (info.state, info.error_code) == (JobState.FAILED, "corrupt-data")
    assert path.name in info.error
    assert files(feed) == before
    assert len(volume_of(feed).diffs) == 6


async def test_merge_with_too_little_room(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(2)
        before = files(feed)
        rig.server.place.config = type(rig.server.place.config)(
            base_dir=str(tmp_path), **rig.settings | {"free_reserve_b": 1 << 60}
        )
        info = await rig.job(m.Merge(volume=VOL, gid_b=0, gid_e=99))
        assert (info.state, info.error_code) == (JobState.FAILED, "disk-full")
        assert files(feed) == before


async def test_merge_opens_a_limited_number_of_files(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, scan_files_max=3) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(5)
        error = await refused(feed, m.Merge(volume=VOL, gid_b=0, gid_e=99))
        assert (error.remote_code, error.facts["diffs"], error.facts["n_max"]) == ("refused", 5, 3)
        await rig.done(m.Merge(volume=VOL, gid_b=0, size_max_b=1 << 40))
        assert wdiffs(feed) == ["|0|-->|3|", "|3|-->|4|", "|4|-->|5|"]
        await rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
        assert await feed.check() == [0, 5]


async def test_forced_stop_ends_a_merge(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    before = files(feed)
    with gated(monkeypatch, "archive.merge.mid_write") as gate:
        job = (await feed.rig.call(m.Merge(volume=VOL, gid_b=0, gid_e=99))).job
        await gate.wait()
        for request in (c.Apply(volume=VOL, gid=3), m.EnableSnapshot(volume=VOL, gids=[1]), c.GcDiff(volume=VOL)):
            assert (await refused_code(feed, request)) == "busy"
        stop = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
        gate.open.set()
        assert (await feed.rig.ended(job)).error_code == "force-stopped"
        assert (await feed.rig.ended(stop)).state is JobState.DONE
    assert files(feed) == before


async def refused_code(feed: Feed, request: Any) -> str:
    with pytest.raises(RemoteError) as caught:
        await feed.rig.call(request)
    return caught.value.remote_code


async def test_parts_that_could_not_be_removed_are_removed_by_gc(feed: Feed) -> None:
    failpoints.arm("archive.merge.before_erase=eio")
    await feed.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
    assert len([name for name in files(feed) if name.endswith(".wdiff")]) == 7
    assert (await feed.rig.call(c.GcDiff(volume=VOL))).tasks == 3
    assert len([name for name in files(feed) if name.endswith(".wdiff")]) == 4
    assert await feed.check() == [0, 3, 4, 5, 6]


async def test_merge_and_restore_at_the_same_time(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restore has chosen its diffs and not opened them when a merge takes them away."""
    with gated(monkeypatch, "archive.restore.after_clone") as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=6))).job
        await gate.wait()
        await feed.rig.done(m.Merge(volume=VOL, gid_b=0, gid_e=99))
        await feed.rig.done(m.Merge(volume=VOL, gid_b=3, gid_e=99))
        gate.open.set()
        assert (await feed.rig.ended(job)).state is JobState.DONE
    assert (feed.rig.base / VOL / "restored" / "6.img").read_bytes() == feed.images[6]
    assert wdiffs(feed) == ["|0|-->|3|", "|3|-->|6|"]


async def test_merge_that_ends_between_choosing_and_opening(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restore chooses again; when the collection still has what is gone, it is lost, and said so."""
    volume = volume_of(feed)
    real, asked = opening._open, []
    loop = asyncio.get_running_loop()

    def open_late(volume: Volume, diffs: Any, files: Any) -> Any:
        asked.append([str(diff) for diff in diffs])
        if len(diffs) == 6:
            plan = plan_merge(volume, 0)
            job = Job(99, "merge", VOL, 0, Signal())
            asyncio.run_coroutine_threadsafe(run_merge(volume, plan, job), loop).result(120)
        return real(volume, diffs, files)

    with monkeypatch.context() as patch:
        patch.setattr(opening, "_open", open_late)
        await feed.rig.done(c.Restore(volume=VOL, gid=6))
    assert [len(names) for names in asked] == [6, 3, 4]  # the second is the merge itself
    assert asked[2][0] == "|0|-->|3|"
    assert (volume.directory / "restored" / "6.img").read_bytes() == feed.images[6]
    (volume.directory / diff_name(volume.diffs.get_range(4)[0])).unlink()
    assert (await feed.rig.job(c.Restore(volume=VOL, gid=5))).error_code == "not-found"


@pytest.mark.parametrize("n_max", [1, 2, 3])
async def test_rounds_are_never_below_what_finishes_an_apply(tmp_path: Path, n_max: int) -> None:
    async with ArchiveRig(tmp_path, open_files_max=n_max) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(6)
        volume = rig.volume(VOL)
        on_its_way = volume.base.begin_applying([*volume.diffs.chain_to_gid(volume.base.begin, 4)])
        await volume.save(base=on_its_way)
        assert len(volume.diffs.to_restore(volume.base, 5, n_max=n_max)) == 4
        assert await feed.check() == [4, 5, 6]
        await rig.done(c.Apply(volume=VOL, gid=1))
        assert str(volume.base) == "<|4|>"
        assert await feed.check() == [4, 5, 6]


# --- snapshots


async def test_protect_and_give_up_snapshots(feed: Feed) -> None:
    await feed.rig.call(m.EnableSnapshot(volume=VOL, gids=[1, 5, 5]))
    points = (await feed.rig.call(c.GetRestorable(volume=VOL))).points
    assert [(p.gid, p.explicit) for p in points] == [(0, False), (1, True), (3, True), (5, True), (6, True)]
    await feed.rig.call(m.DisableSnapshot(volume=VOL, gids=[3]))
    await feed.rig.done(m.Merge(volume=VOL, gid_b=1, gid_e=99))
    assert wdiffs(feed) == ["|0|-->|1|", "|1|-->|5|", "|5|-->|6|"]
    await feed.rig.restart()
    points = (await feed.rig.call(c.GetRestorable(volume=VOL))).points
    assert [p.gid for p in points] == [0, 1, 5, 6]
    assert (await feed.rig.status(VOL)).error == ""
    await feed.check()


@pytest.mark.parametrize(("gids", "code"), [([], "usage"), ([1, 6], "not-found"), ([99, 77], "not-found")])
async def test_snapshots_are_changed_all_or_none(feed: Feed, gids: list[int], code: str) -> None:
    before = [diff.describe() for diff in volume_of(feed).diffs]
    for kind in (m.EnableSnapshot, m.DisableSnapshot):
        error = await refused(feed, kind(volume=VOL, gids=gids))
        assert error.remote_code == code
    if code == "not-found":
        assert "77, 99" in str(error.facts) or "6" in str(error.facts)
    assert [diff.describe() for diff in volume_of(feed).diffs] == before


async def test_failing_disk_changes_no_snapshot(feed: Feed) -> None:
    before = [diff.describe() for diff in volume_of(feed).diffs]
    failpoints.arm("archive.snapshot.before_link=eio@1")  # at the second
    error = await refused(feed, m.EnableSnapshot(volume=VOL, gids=[1, 2]))
    assert error.remote_code == "disk-failed"
    assert [diff.describe() for diff in volume_of(feed).diffs] == before
    await feed.rig.restart()
    assert [diff.describe() for diff in volume_of(feed).diffs] == before


@pytest.mark.parametrize("enable", [True, False])
async def test_start_after_a_crash_with_two_names(feed: Feed, enable: bool) -> None:
    """One file with two names is one diff, and the name that protects is kept; nothing is put aside."""
    gid = 2 if enable else 3
    command = m.EnableSnapshot if enable else m.DisableSnapshot
    failpoints.arm("archive.snapshot.before_unlink=eio")
    assert await refused_code(feed, command(volume=VOL, gids=[gid])) == "disk-failed"
    assert len([name for name in files(feed) if name.endswith(".wdiff")]) == 7
    await feed.rig.restart()
    assert len([name for name in files(feed) if name.endswith(".wdiff")]) == 6
    assert (await feed.rig.status(VOL)).error == ""
    explicit = [p.gid for p in (await feed.rig.call(c.GetRestorable(volume=VOL))).points]
    assert gid in explicit
    assert await feed.check() == list(range(7))


# --- resize


@pytest.mark.parametrize("zero", [False, True])
async def test_resize_grows_with_zeros(feed: Feed, zero: bool) -> None:
    await feed.rig.call(c.Resize(volume=VOL, size_b=64 * LB))  # as it is
    error = await refused(feed, c.Resize(volume=VOL, size_b=63 * LB))
    assert (error.remote_code, bool(error.hint)) == ("refused", True)
    size_b = 2 * MIB
    await feed.rig.call(c.Resize(volume=VOL, size_b=size_b + 100, zero=zero))
    assert (await feed.rig.call(c.GetVolSize(volume=VOL))).value == size_b // LB
    assert (await feed.rig.status(VOL)).size_lb == size_b // LB
    image = feed.rig.base / VOL / "base.img"
    assert image.stat().st_size == size_b
    assert (image.stat().st_blocks * 512 > MIB) is zero
    assert not any(image.read_bytes()[64 * LB :])
    assert await feed.check() == list(range(7))
    assert len(await feed.rig.restored_image(VOL, 3)) == size_b
    await feed.rig.restart()
    feed.image += bytes(size_b - len(feed.image))
    feed.size_lb = size_b // LB
    feed.write(feed.size_lb - 3, 3)
    feed.snapshot()
    await feed.send()
    assert (await feed.check())[-1] == 7


async def test_resize_where_there_is_nothing(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.init()
        assert (await refused(feed, c.Resize(volume=VOL, size_b=MIB))).remote_code == "not-found"
        await feed.full_backup()
        await rig.stopped(VOL)
        await rig.call(c.Resize(volume=VOL, size_b=MIB))
        assert (await rig.status(VOL)).size_lb == MIB // LB
        await rig.call(c.ResetVol(volume=VOL))
        assert (await refused(feed, c.Resize(volume=VOL, size_b=MIB))).remote_code == "not-found"


async def test_resize_keeps_restore_and_apply_out(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(monkeypatch, "archive.restore.after_clone") as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=3))).job
        await gate.wait()
        assert await refused_code(feed, c.Resize(volume=VOL, size_b=MIB)) == "busy"
        gate.open.set()
        await feed.rig.ended(job)


# --- repair by hand


async def test_repair_needs_a_stopped_volume(feed: Feed) -> None:
    requests = [
        m.DbgReloadMetadata(volume=VOL),
        m.DbgSetUuid(volume=VOL, uuid=b"u" * 16),
        m.DbgSetState(volume=VOL, state="Archived"),
        m.DbgSetBase(volume=VOL, base=BaseState(Snapshot.clean(1))),
    ]
    for request in requests:
        assert (await refused(feed, request)).remote_code == "bad-state"
    await feed.rig.stopped(VOL)
    with volume_of(feed).machine.action("Scrub", 0):
        for request in requests:
            assert (await refused(feed, request)).remote_code == "busy"


async def test_reload_metadata(feed: Feed) -> None:
    await feed.rig.stopped(VOL)
    volume = volume_of(feed)
    last = list(volume.diffs)[-1]
    path = volume.directory / diff_name(last)
    path.rename(volume.directory / "elsewhere")
    assert (await feed.rig.status(VOL)).latest_gid == 6
    await feed.rig.call(m.DbgReloadMetadata(volume=VOL))
    assert ((await feed.rig.status(VOL)).latest_gid, len(volume.diffs)) == (5, 5)
    (volume.directory / "elsewhere").rename(path)
    await feed.rig.call(m.DbgReloadMetadata(volume=VOL))
    record = (volume.directory / "volume.json").read_bytes()
    (volume.directory / "volume.json").write_bytes(record[:-9])
    assert await refused_code(feed, m.DbgReloadMetadata(volume=VOL)) == "corrupt-data"
    assert await feed.rig.state(VOL) == "Stopped"
    (volume.directory / "volume.json").write_bytes(record)
    await feed.rig.call(c.Start(volume=VOL))
    assert await feed.check() == list(range(7))


async def test_set_uuid(feed: Feed) -> None:
    await feed.rig.stopped(VOL)
    assert await refused_code(feed, m.DbgSetUuid(volume=VOL, uuid=bytes(16))) == "usage"
    await feed.rig.call(m.DbgSetUuid(volume=VOL, uuid=b"u" * 16))
    await feed.rig.restart()
    await feed.rig.call(c.Start(volume=VOL))
    assert (await feed.rig.call(c.GetUuid(volume=VOL))).value == b"u" * 16


async def test_set_base(feed: Feed) -> None:
    """The base is declared to be of generation 2, then again of 0: what can be reached follows."""
    await feed.rig.stopped(VOL)
    none = BaseState(Snapshot((1 << 64) - 1, (1 << 64) - 1))  # type: ignore[arg-type]
    assert await refused_code(feed, m.DbgSetBase(volume=VOL, base=none)) == "usage"
    broken = BaseState(Snapshot.clean(50), Snapshot.clean(60))
    assert await refused_code(feed, m.DbgSetBase(volume=VOL, base=broken)) == "history-broken"
    for gid in (2, 0):
        await feed.rig.call(m.DbgSetBase(volume=VOL, base=BaseState(Snapshot.clean(gid))))
        assert volume_of(feed).base.timestamp == NOW
        assert (await feed.rig.call(c.GetLatestSnap(volume=VOL))).rows[0][2] == 6
        status = await feed.rig.status(VOL)
        assert status.restorable == 7 - gid
    await feed.rig.call(m.DbgSetBase(volume=VOL, base=BaseState(Snapshot.clean(9))))
    assert (await feed.rig.status(VOL)).latest_gid == 9
    await feed.rig.call(m.DbgSetBase(volume=VOL, base=BaseState(Snapshot.clean(0))))
    await feed.rig.call(c.Start(volume=VOL))
    assert await feed.check() == list(range(7))


async def test_set_state(feed: Feed) -> None:
    await feed.rig.stopped(VOL)
    for state in ("Clear", "Broken", "WdiffRecv", "nonsense", ""):
        assert await refused_code(feed, m.DbgSetState(volume=VOL, state=state)) == "usage"
    error = await refused(feed, m.DbgSetState(volume=VOL, state="SyncReady"))
    assert (error.remote_code, "reset" in error.hint) == ("refused", True)
    await feed.rig.call(m.DbgSetState(volume=VOL, state="Archived"))
    assert await feed.check() == list(range(7))
    await feed.rig.done(c.Apply(volume=VOL, gid=99))
    await feed.rig.stopped(VOL)
    image = volume_of(feed).directory / "base.img"
    image.rename(image.with_name("away"))
    assert await refused_code(feed, m.DbgSetState(volume=VOL, state="Archived")) == "not-found"
    image.with_name("away").rename(image)
    await feed.rig.call(m.DbgSetState(volume=VOL, state="SyncReady"))
    await feed.rig.restart()
    assert await feed.rig.state(VOL) == "SyncReady"
    await feed.full_backup()
    await feed.step()
    assert await feed.check() == [0, 1]


# --- questions


async def test_questions_about_diffs(feed: Feed) -> None:
    rig = feed.rig
    sizes = [diff.size_b for diff in volume_of(feed).diffs]
    assert (await rig.call(m.GetNumDiff(volume=VOL))).value == 6
    assert (await rig.call(m.GetNumDiff(volume=VOL, gid_b=1, gid_e=3))).value == 2
    assert (await rig.call(m.GetTotalDiffSize(volume=VOL))).value == sum(sizes)
    assert (await rig.call(m.GetTotalDiffSize(volume=VOL, gid_b=1, gid_e=3))).value == sum(sizes[1:3])
    assert await refused_code(feed, m.GetNumDiff(volume=VOL, gid_b=3, gid_e=3)) == "usage"
    for end, there in ((1, True), (2, False)):
        diff = Diff(Snapshot.clean(0), Snapshot.clean(end))
        assert (await rig.call(m.GetExistsDiff(volume=VOL, diff=diff))).value is there
    assert (await rig.call(m.GetCold(volume=VOL))).gids == []
    rows = (await rig.call(m.GetBaseAll())).rows
    assert [(name, str(base)) for name, base in rows] == [(VOL, "<|0|>")]
    assert (await rig.call(m.GetVolumeGroup())).value == (await rig.call(m.GetThinpool())).value == ""
    assert (await rig.call(m.GetNumDiff(volume="nobody"))).value == 0
    assert (await rig.call(m.GetTotalDiffSize(volume="nobody"))).value == 0
    for request in (m.GetExistsDiff(volume="nobody", diff=diff), m.GetCold(volume="nobody")):
        assert await refused_code(feed, request) == "bad-state"
    assert list(rig.server.volumes) == [VOL]
    await rig.stopped(VOL)
    assert (await rig.call(m.GetBaseAll())).rows == []
