"""Restore, apply, stop and their like: jobs, what keeps what out, giving up, and the end of the daemon."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.kit.feeder import PROXY, ArchiveRig, Feed
from walbd.archive import apply as apply_module
from walbd.archive import restore as restore_module
from walbd.daemon.main import ShutdownMode
from walbd.errors import Busy, ConnectError, NotFound, RemoteError
from walbd.format.meta import Diff, Snapshot, diff_name
from walbd.protocol import control as c
from walbd.protocol.base import GetJobs, JobState, Ok
from walbd.units import LB

VOL = "vol0"


class Gate:
    """Holds a thread of the archive at a place until it is opened."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.open = threading.Event()

    def pass_(self, *_args: Any) -> None:
        self.reached.set()
        assert self.open.wait(120)

    async def wait(self) -> None:
        """Return when a thread stands at the gate."""
        assert await asyncio.to_thread(self.reached.wait, 120)


@contextmanager
def gated(monkeypatch: pytest.MonkeyPatch, module: Any, failpoint: str) -> Iterator[Gate]:
    """Hold the work at a failpoint."""
    gate = Gate()
    real: Callable[[str], None] = module.failpoints.hit

    def hit(name: str) -> None:
        if name == failpoint:
            gate.pass_()
        real(name)

    with monkeypatch.context() as patch:
        patch.setattr(module.failpoints, "hit", hit)
        try:
            yield gate
        finally:
            gate.open.set()


@pytest.fixture
async def feed(tmp_path: Path) -> AsyncIterator[Feed]:
    """An Archived volume at generation 4; 2 is protected."""
    async with ArchiveRig(tmp_path) as rig:
        feed = Feed(rig)
        await feed.begin(steps=2)
        await feed.step(1, mergeable=False)
        await feed.step(1)
        yield feed


async def code_of(feed: Feed, request: Any) -> str:
    try:
        await feed.rig.call(request)
    except RemoteError as exc:
        return exc.remote_code
    return ""


# --- restore


async def test_restored_image_is_there_writable_and_as_large_as_the_volume(feed: Feed, tmp_path: Path) -> None:
    info = await feed.rig.done(c.Restore(volume=VOL, gid=3))
    path = (await feed.rig.call(c.GetRestoredPath(volume=VOL, gid=3))).value
    assert info.result == {"gid": 3, "path": path}
    assert path == str(tmp_path / VOL / "restored" / "3.img")
    assert Path(path).read_bytes() == feed.images[3]
    assert (await feed.rig.call(c.GetRestored(volume=VOL))).gids == [3]
    assert await code_of(feed, c.Restore(volume=VOL, gid=3)) == "already-exists"
    Path(path).write_bytes(b"mine")
    assert await feed.rig.restored_image(VOL, 4) == feed.images[4]
    await feed.rig.restart()
    assert (await feed.rig.call(c.GetRestored(volume=VOL))).gids == [3]
    await feed.rig.call(c.DelRestored(volume=VOL, gid=3))
    assert not Path(path).exists()
    assert await code_of(feed, c.DelRestored(volume=VOL, gid=3)) == "not-found"
    assert await code_of(feed, c.GetRestoredPath(volume=VOL, gid=3)) == "not-found"


@pytest.mark.parametrize("gid", [5, 99, (1 << 64) - 1])
async def test_unreachable_generations_are_refused_at_once(feed: Feed, gid: int) -> None:
    assert await code_of(feed, c.Restore(volume=VOL, gid=gid)) == "not-reachable"
    assert (await feed.rig.call(GetJobs())).jobs == []


async def test_restore_in_rounds_of_few_files(tmp_path: Path) -> None:
    async with ArchiveRig(tmp_path, open_files_max=2) as rig:
        feed = Feed(rig)
        await feed.init()
        await feed.full_backup()
        await feed.step(7)
        assert await feed.check() == list(range(8))
        await rig.done(c.Apply(volume=VOL, gid=5))
        assert await feed.check() == [5, 6, 7]


async def test_damaged_diff_fails_the_job_and_leaves_nothing(feed: Feed, tmp_path: Path) -> None:
    diff = (await feed.rig.call(c.GetDiff(volume=VOL))).diffs[2]
    path = tmp_path / VOL / diff_name(diff)
    data = bytearray(path.read_bytes())
    data[4200] ^= 1
    path.write_bytes(data)
    info = await feed.rig.job(c.Restore(volume=VOL, gid=4))
    assert (info.state, info.error_code) == (JobState.FAILED, "corrupt-data")
    assert path.name in info.error
    assert info.hint
    assert list((tmp_path / VOL / "restored").iterdir()) == []
    assert await feed.rig.restored_image(VOL, 2) == feed.images[2]  # what lies before is still good
    info = await feed.rig.job(c.Apply(volume=VOL, gid=4))
    assert (info.state, info.error_code) == (JobState.FAILED, "corrupt-data")
    assert str((await feed.rig.call(c.GetBase(volume=VOL))).base) == "<|0|>"  # seen before the base was touched
    assert await feed.rig.restored_image(VOL, 2) == feed.images[2]


async def test_vanished_diff(feed: Feed, tmp_path: Path) -> None:
    diff = (await feed.rig.call(c.GetDiff(volume=VOL))).diffs[0]
    (tmp_path / VOL / diff_name(diff)).unlink()
    for request in (c.Restore(volume=VOL, gid=4), c.Apply(volume=VOL, gid=4)):
        assert (await feed.rig.job(request)).error_code == NotFound.code


async def test_restore_follows_a_merge_that_takes_its_files_away(feed: Feed, tmp_path: Path) -> None:
    """A merge may run at the same time: when a file has gone, the collection is asked again."""
    from tests.kit.feeder import make_wdiff

    volume = feed.rig.volume(VOL)
    first, second = volume.diffs.get_range()[:2]
    blocks: dict[int, bytes | str] = {at: feed.images[2][at * LB : (at + 1) * LB] for at in range(64)}
    merged = Diff(first.begin, second.end, timestamp=second.timestamp)
    (tmp_path / VOL / diff_name(merged)).write_bytes(make_wdiff(blocks, feed.uuid))
    real = volume.diffs.to_restore
    for diff in (first, second):
        (tmp_path / VOL / diff_name(diff)).unlink()

    calls = 0

    def to_restore(*args: Any, **kwargs: Any) -> list[Diff]:
        nonlocal calls
        calls += 1
        if calls == 3:  # after the check and the first choice
            volume.diffs.add(merged)
            volume.diffs.erase_all([first, second])
        return real(*args, **kwargs)

    volume.diffs.to_restore = to_restore  # type: ignore[method-assign]
    await feed.rig.done(c.Restore(volume=VOL, gid=4))
    assert calls == 4
    assert (tmp_path / VOL / "restored" / "4.img").read_bytes() == feed.images[4]


# --- apply


async def test_apply_moves_the_base_and_removes_what_it_holds(feed: Feed, tmp_path: Path) -> None:
    info = await feed.rig.done(c.Apply(volume=VOL, gid=2))
    assert info.result == {"base": "<|2|>", "diffs": 2}
    assert len(list((tmp_path / VOL).glob("*.wdiff"))) == 2
    assert await feed.check() == [2, 3, 4]
    assert await code_of(feed, c.Apply(volume=VOL, gid=2)) == "not-reachable"
    assert await code_of(feed, c.Restore(volume=VOL, gid=1)) == "not-reachable"
    await feed.step()
    await feed.rig.done(c.Apply(volume=VOL, gid=99))
    assert await feed.check() == [5]
    assert not list((tmp_path / VOL).glob("*.wdiff"))
    await feed.step()
    assert await feed.check() == [5, 6]


async def test_apply_remembers_when_it_began(feed: Feed) -> None:
    await feed.rig.done(c.Apply(volume=VOL, gid=1))
    began = feed.rig.env.clock.now()
    await feed.rig.restart()
    rows = (await feed.rig.call(c.GetActions())).rows
    assert (VOL, "Apply", 0, began) in rows
    assert (VOL, "Restore", 0, 0) in rows


async def test_applied_discards_read_as_zeros(feed: Feed) -> None:
    feed.write(0, 64)
    feed.snapshot()
    feed.write(3, 50, "discard")
    feed.write(60, 2, "zero")
    feed.snapshot()
    await feed.send()
    assert await feed.rig.restored_image(VOL, 6) == feed.images[6]
    await feed.rig.done(c.Apply(volume=VOL, gid=6))
    assert await feed.rig.restored_image(VOL, 6) == feed.images[6]


async def test_interrupted_apply_is_finished_first(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forced stop leaves the base on its way; the next apply goes there first, whatever its target."""
    with gated(monkeypatch, apply_module, apply_module.FP_AFTER_BEGIN) as gate:
        job = (await feed.rig.call(c.Apply(volume=VOL, gid=3))).job
        await gate.wait()
        stop = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
        gate.open.set()
        assert (await feed.rig.ended(job)).error_code == "force-stopped"
    assert (await feed.rig.ended(stop)).state is JobState.DONE
    await feed.rig.call(c.Start(volume=VOL))
    assert str((await feed.rig.call(c.GetBase(volume=VOL))).base) == "<|0|-->|3|>"
    await feed.rig.done(c.Apply(volume=VOL, gid=1))
    assert str((await feed.rig.call(c.GetBase(volume=VOL))).base) == "<|3|>"
    assert await feed.check() == [3, 4]


async def test_apply_in_progress_hides_what_lies_below_its_target(feed: Feed) -> None:
    volume = feed.rig.volume(VOL)
    diffs = volume.diffs.to_apply(volume.base, 3)
    await volume.save(base=volume.base.begin_applying(diffs))  # as if it had stopped there
    await feed.rig.restart()
    assert str((await feed.rig.call(c.GetBase(volume=VOL))).base) == "<|0|-->|3|>"
    assert await code_of(feed, c.Restore(volume=VOL, gid=2)) == "not-reachable"
    assert await feed.check() == [3, 4]
    await feed.rig.done(c.Apply(volume=VOL, gid=1))
    assert str((await feed.rig.call(c.GetBase(volume=VOL))).base) == "<|3|>"
    assert await feed.check() == [3, 4]


async def test_restore_and_apply_keep_each_other_out(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=3))).job
        await gate.wait()
        assert (await feed.rig.call(c.GetNumAction(volume=VOL, action="Restore"))).value == 1
        for request in (c.Apply(volume=VOL, gid=3), c.Restore(volume=VOL, gid=4), c.GcDiff(volume=VOL)):
            assert await code_of(feed, request) == Busy.code
        await feed.step()  # reception goes on
        gate.open.set()
        assert (await feed.rig.ended(job)).state is JobState.DONE
    with gated(monkeypatch, apply_module, apply_module.FP_AFTER_BEGIN) as gate:
        job = (await feed.rig.call(c.Apply(volume=VOL, gid=3))).job
        await gate.wait()
        assert (await feed.rig.status(VOL)).actions == {"Apply": 1}
        assert await code_of(feed, c.Restore(volume=VOL, gid=4)) == Busy.code
        await feed.step()
        gate.open.set()
        assert (await feed.rig.ended(job)).state is JobState.DONE
    assert await code_of(feed, c.DelRestored(volume=VOL, gid=3)) == ""
    assert await feed.check() == [3, 4, 5, 6]


async def test_failed_unlink_after_apply_is_repaired(feed: Feed, tmp_path: Path, monkeypatch: Any) -> None:
    from walbd.fs import failpoints

    monkeypatch.setattr(failpoints, "_armed", {})
    failpoints.arm("archive.apply.before_erase=eio")
    await feed.rig.done(c.Apply(volume=VOL, gid=2))
    assert len(list((tmp_path / VOL).glob("*.wdiff"))) == 4
    assert (await feed.rig.call(c.GcDiff(volume=VOL))).tasks == 2
    assert len(list((tmp_path / VOL).glob("*.wdiff"))) == 2
    assert await feed.check() == [2, 3, 4]


async def test_gc_removes_what_leads_nowhere(feed: Feed, tmp_path: Path) -> None:
    volume = feed.rig.volume(VOL)
    stray = Diff(Snapshot.clean(7), Snapshot.clean(8), timestamp=5)
    (tmp_path / VOL / diff_name(stray)).write_bytes(b"")
    volume.diffs.add(stray)
    assert (await feed.rig.call(c.GcDiff(volume=VOL))).tasks == 1
    assert not (tmp_path / VOL / diff_name(stray)).exists()
    assert (await feed.rig.call(c.GcDiff(volume=VOL))).tasks == 0
    assert await feed.check() == [0, 1, 2, 3, 4]


# --- queue, stop, shutdown


async def test_jobs_beyond_the_limit_wait_their_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ArchiveRig(tmp_path, restores_max=1) as rig:
        feeds = [Feed(rig, f"v{i}", seed=i) for i in range(3)]
        for feed in feeds:
            await feed.init()
            await feed.full_backup()
            await feed.step(1)
        with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
            jobs = [(await rig.call(c.Restore(volume=feed.name, gid=1))).job for feed in feeds]
            await gate.wait()
            facts = (await rig.call(c.GetStatus())).server
            assert (facts["restores_running"], facts["restores_waiting"]) == (1, 2)
            assert facts["maintenance_running"] == 0  # restores wait for nothing but restores
            rows = (await rig.call(GetJobs(volume="v2"))).jobs
            assert [(row.name, row.state, row.phase) for row in rows] == [("restore", JobState.RUNNING, "waiting")]
            # A forced stop takes a waiting job out of the queue at once.
            stop = (await rig.call(c.Stop(volume="v1", how=c.StopHow.FORCE))).job
            assert (await rig.ended(jobs[1])).error_code == "force-stopped"
            assert (await rig.ended(stop)).state is JobState.DONE
            gate.open.set()
            assert [(await rig.ended(job)).state for job in (jobs[0], jobs[2])] == [JobState.DONE] * 2


async def test_stop_and_start(feed: Feed) -> None:
    await feed.rig.stopped(VOL)
    assert await feed.rig.state(VOL) == "Stopped"
    assert await feed.rig.points(VOL) == []
    assert (await feed.rig.call(c.GetLatestSnap())).rows == [(VOL, "", 4, 0, feed.now)]
    for request in (c.Restore(volume=VOL, gid=3), c.Apply(volume=VOL, gid=3), c.Stop(volume=VOL)):
        assert await code_of(feed, request) == "bad-state"
    await feed.rig.restart()
    assert await feed.rig.state(VOL) == "Stopped"
    await feed.rig.call(c.Start(volume=VOL))
    await feed.step()
    assert await feed.check() == [0, 1, 2, 3, 4, 5]


async def test_forced_stop_ends_a_restore(feed: Feed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=3))).job
        await gate.wait()
        stop = (await feed.rig.call(c.Stop(volume=VOL, how=c.StopHow.FORCE))).job
        assert await feed.rig.state(VOL) == "Archived"  # not before the work has ended
        assert await code_of(feed, c.Apply(volume=VOL, gid=3)) == "stopping"
        gate.open.set()
        assert (await feed.rig.ended(job)).error_code == "force-stopped"
    assert (await feed.rig.ended(stop)).state is JobState.DONE
    assert list((tmp_path / VOL / "restored").iterdir()) == []


async def test_graceful_stop_lets_a_restore_end(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=3))).job
        await gate.wait()
        stop = (await feed.rig.call(c.Stop(volume=VOL))).job
        gate.open.set()
        assert (await feed.rig.ended(job)).state is JobState.DONE
    assert (await feed.rig.ended(stop)).state is JobState.DONE
    assert (await feed.rig.call(c.GetRestored(volume=VOL))).gids == [3]


async def test_clear_and_reset(feed: Feed, tmp_path: Path) -> None:
    await feed.rig.done(c.Restore(volume=VOL, gid=3))
    await feed.rig.stopped(VOL)
    (tmp_path / VOL / "x.wdiff.duplicate").write_bytes(b"")
    await feed.rig.call(c.ResetVol(volume=VOL))
    assert await feed.rig.state(VOL) == "SyncReady"
    assert sorted(p.name for p in (tmp_path / VOL).iterdir()) == ["restored", "volume.json"]
    status = await feed.rig.status(VOL)
    assert (status.size_lb, status.base, status.diffs, status.restored) == (0, "", 0, [])
    await feed.full_backup()
    await feed.step(1)
    assert await feed.check() == [0, 1]
    await feed.rig.stopped(VOL)
    await feed.rig.call(c.ClearVol(volume=VOL))
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock"]
    assert await feed.rig.state(VOL) == "Clear"
    assert await code_of(feed, c.ClearVol(volume=VOL)) == "bad-state"
    await feed.init()
    await feed.full_backup()
    assert await feed.check() == [0]


async def test_init_refuses_a_foreign_directory(feed: Feed, tmp_path: Path) -> None:
    (tmp_path / "vol9").mkdir()
    assert await code_of(feed, c.ArchiveInitVol(volume="vol9")) == "already-exists"
    assert await feed.rig.state("vol9") == "Clear"
    assert (tmp_path / "vol9").is_dir()


async def test_graceful_shutdown_waits_for_jobs(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        await feed.rig.call(c.Restore(volume=VOL, gid=3))
        await gate.wait()
        stopping = asyncio.ensure_future(feed.rig.server.stop(ShutdownMode.GRACEFUL))
        await asyncio.sleep(0)  # it has closed its door
        with pytest.raises(ConnectError):
            await feed.rig.call(c.GetPid())
        assert not stopping.done()
        gate.open.set()
        await stopping
    await feed.rig.restart()
    assert (await feed.rig.call(c.GetRestored(volume=VOL))).gids == [3]


async def test_forced_shutdown_gives_up(feed: Feed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        await feed.rig.call(c.Restore(volume=VOL, gid=3))
        await gate.wait()
        stopping = asyncio.ensure_future(feed.rig.server.stop(ShutdownMode.FORCE))
        await asyncio.sleep(0)  # everybody has been told to give up
        gate.open.set()
        await stopping
    assert list((tmp_path / VOL / "restored").iterdir()) == []
    await feed.rig.restart()
    assert await feed.check() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("how", list(c.ShutdownHow))
async def test_shutdown_request_is_answered(feed: Feed, how: c.ShutdownHow) -> None:
    assert await feed.rig.call(c.Shutdown(how=how)) == Ok()
    async with asyncio.timeout(60):  # it ends after the answer
        assert str(await feed.rig.shutdown.requested()) == str(how)


async def test_directory_of_another_archive(feed: Feed, tmp_path: Path) -> None:
    other = ArchiveRig(tmp_path)
    with pytest.raises(Busy, match="another daemon"):
        await other.up()
    other.env.pools.close()
    missing = ArchiveRig(tmp_path / "nowhere")
    with pytest.raises(NotFound) as caught:
        await missing.up()
    assert "mount" in caught.value.hint
    missing.env.pools.close()


# --- questions


async def test_questions(feed: Feed) -> None:
    rig = feed.rig
    assert (await rig.call(c.GetHostType())).kind == "archive"
    assert (await rig.call(c.GetVolumes())).names == [VOL]
    assert (await rig.call(c.GetVersion())).protocol_max >= 1
    assert (await rig.call(c.GetPid())).value > 0
    assert ("get-pid", "ctl", 1) in [row[:3] for row in (await rig.call(c.GetHandlerStat())).rows]
    assert [str(d) for d in (await rig.call(c.GetDiff(volume=VOL, gid_b=1, gid_e=3))).diffs] == [
        "|1|-->|2|",
        "|2|-->|3|",
    ]
    assert len((await rig.call(c.GetApplicableDiff(volume=VOL, gid=2))).diffs) == 2
    assert (await rig.call(c.GetExistsBaseImage(volume=VOL))).value is True
    assert (await rig.call(c.GetVolSize(volume=VOL))).value == 64
    points = (await rig.call(c.GetRestorable(volume=VOL))).points
    assert [(p.gid, p.explicit) for p in points] == [(0, False), (2, True), (4, True)]
    assert (await rig.call(c.GetMetaSnap(volume=VOL, gid=3))).snapshot == Snapshot.clean(3)
    assert (await rig.call(c.GetMetaSnap(volume=VOL))).snapshot == Snapshot.clean(4)
    state = (await rig.call(c.GetMetaState(volume=VOL, applying=True, gid=2))).base
    assert str(state) == "<|0|-->|2|>"
    assert str((await rig.call(c.GetMetaState(volume=VOL, gid=2))).base) == "<|2|>"
    status = await rig.status(VOL)
    assert (status.state, status.latest_gid, status.restorable, status.diffs) == ("Archived", 4, 5, 4)
    assert status.base.startswith("<|0|>-")
    assert status.uuid == feed.uuid.hex()
    assert status.received == rig.env.clock.now()


async def test_questions_about_nobody(feed: Feed) -> None:
    rig = feed.rig
    assert await rig.state("nobody") == "Clear"
    assert (await rig.status("nobody")).state == "Clear"
    assert (await rig.call(c.GetDiff(volume="nobody"))).diffs == []
    assert (await rig.call(c.GetApplicableDiff(volume="nobody"))).diffs == []
    assert (await rig.call(c.GetExistsBaseImage(volume="nobody"))).value is False
    assert (await rig.call(c.GetProgress(volume="nobody"))).value == 0
    assert (await rig.call(c.GetRestorable(volume="nobody"))).points == []
    assert (await rig.call(c.GetMetaSnap(volume="nobody"))).snapshot.is_none
    assert (await rig.call(c.GetMetaState(volume="nobody"))).base.begin.is_none
    assert await code_of(feed, c.GetVolSize(volume="nobody")) == "not-found"
    assert list(rig.server.volumes) == [VOL]


async def test_wait_job_answers_in_time(feed: Feed, monkeypatch: pytest.MonkeyPatch) -> None:
    from walbd.protocol.base import WaitJob

    with gated(monkeypatch, restore_module, restore_module.FP_AFTER_CLONE) as gate:
        job = (await feed.rig.call(c.Restore(volume=VOL, gid=3))).job
        await gate.wait()
        assert (await feed.rig.call(WaitJob(job=job, wait_s=0.01))).state is JobState.RUNNING
        gate.open.set()
    assert (await feed.rig.ended(job)).state is JobState.DONE
    assert await code_of(feed, WaitJob(job=999)) == "not-found"
    assert PROXY
