"""The policy at work in a real archive daemon, on virtual time: real wdiffs, every point that stays compared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import structlog

from tests.kit.feeder import NOW
from tests.kit.hash_feed import HashFeed
from tests.kit.mem_net import MemNetwork
from tests.kit.policy_rig import TimedFeed, VirtualArchive
from tests.kit.virtual import run
from walbd.archive.config import ArchiveConfig
from walbd.archive.merge import run_merge
from walbd.archive.volume import Volume
from walbd.daemon.main import ShutdownMode
from walbd.errors import ConfigError, CorruptData, DiskFull, RemoteError
from walbd.format.meta import NotMergeable, RestorePoint, diff_name
from walbd.format.planning import Merge
from walbd.format.policy import Grid, Policy, Replication, parse_levels
from walbd.format.retention import explain, thin
from walbd.fs import failpoints
from walbd.protocol import control as c
from walbd.protocol import maintenance as m
from walbd.protocol.base import GetJobs, JobState
from walbd.protocol.policy import ExplainPolicy, GetPolicy, SetPolicy

VOL = "vol0"
HOUR = 3600
QUICK = Policy(levels=parse_levels("2m:1m 20m:10m"), keep=Grid.parse("all=1h hourly=2"), apply_interval_s=HOUR)


async def fed(rig: VirtualArchive, policy: Policy | None = QUICK, *, name: str = VOL, dirty: int = 0) -> TimedFeed:
    """Return a volume with a base, and a policy of its own."""
    feed = TimedFeed(rig, name)
    await feed.init()
    if policy is not None:
        await rig.call(SetPolicy(volume=name, policy=policy))
    await feed.full_backup(dirty=dirty)
    return feed


async def quiet(rig: VirtualArchive) -> None:
    """Return when the policy has nothing to do, also at a look at everything."""
    rig.server.policy.reset(VOL)
    for _ in range(1000):
        await asyncio.sleep(1)
        view = await rig.call(GetPolicy(volume=VOL))
        if view.next == "nothing is due":
            return
    raise AssertionError(view.next)


def on_virtual_time(test: Callable[[VirtualArchive], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """Run a test with one archive."""

    async def main() -> None:
        async with VirtualArchive() as rig:
            await test(rig)

    def wrapped() -> None:
        run(main())

    wrapped.__name__, wrapped.__doc__ = test.__name__, test.__doc__
    return wrapped


def log_events(captured: list[Any], event: str) -> list[Any]:
    return [entry for entry in captured if entry["event"] == event]


@on_virtual_time
async def test_hours_of_life(rig: VirtualArchive) -> None:
    feed = await fed(rig)
    held = 0
    for hour in range(6):
        await feed.live(HOUR, interval_s=15, explicit=97)
        if hour == 1:
            held = feed.gid - 3  # raw yet; no rule would keep it
            await rig.call(m.AddHold(volume=VOL, gid=held, reason="audit"))
        await quiet(rig)
        points = await feed.check()
        assert held in points or not held
        assert points[-1] == feed.gid
        assert len(rig.volume(VOL).diffs) < 60
    # What is there is what the rules say of all points that ever were; dropped ones may wait for their hour.
    asked = {gid for gid in feed.times if gid % 97 == 0}
    ever = [RestorePoint(gid, time, gid in asked) for gid, time in feed.times.items()]  # type: ignore[arg-type]
    now = rig.clock.now()
    dropped = thin(ever, QUICK.levels, ever[-1].timestamp, None)
    left = [point for point, level in zip(ever, dropped, strict=True) if level is None]
    expected = {v.gid for v in explain(left, [], [], QUICK, now) if v.kept} | {held}
    assert expected <= set(points)
    assert len(points) - len(expected) < 12
    assert rig.volume(VOL).base.begin.gid_b == min(points) <= held  # nothing is applied past a hold
    await rig.call(m.DeleteHold(volume=VOL, gid=held))
    await feed.live(2 * HOUR, interval_s=60)
    await quiet(rig)
    assert rig.volume(VOL).base.begin.gid_b > held
    await feed.check()


@on_virtual_time
async def test_a_crash_at_any_time_is_only_a_pause(rig: VirtualArchive) -> None:
    feed = await fed(rig)
    await rig.call(m.AddHold(volume=VOL, gid=0, reason="the beginning", until=NOW + 3 * HOUR))
    for _ in range(4):
        await feed.live(HOUR + 700, interval_s=30)
        await rig.restart()
    await rig.restart()
    await quiet(rig)
    await feed.check()
    volume = rig.volume(VOL)
    assert volume.record.policy == QUICK
    assert volume.record.holds[0].reason == "the beginning"
    assert volume.base.begin.gid_b > 0  # the hold is over
    assert len(volume.diffs) < 60


@on_virtual_time
async def test_an_interrupted_apply_is_finished_first(rig: VirtualArchive) -> None:
    feed = await fed(rig, Policy(enabled=False))
    await feed.live(HOUR, interval_s=60)
    failpoints.arm("archive.apply.before_done=eio")
    assert (await rig.job(c.Apply(volume=VOL, gid=20))).state is JobState.FAILED
    failpoints.disarm()
    assert rig.volume(VOL).base.is_applying
    await rig.restart()
    await rig.call(SetPolicy(volume=VOL, policy=Policy(apply=False)))
    await quiet(rig)
    assert str(rig.volume(VOL).base) == "<|20|>"
    await feed.check()


@on_virtual_time
async def test_a_base_that_is_dirty_at_first(rig: VirtualArchive) -> None:
    """The diffs that make it clean may be merged, and it is applied like any other."""
    feed = await fed(rig, dirty=30)
    await feed.send()
    await feed.live(1000, interval_s=10)
    await quiet(rig)
    first = (await feed.check())[0]
    assert 30 <= first < 60
    assert not rig.volume(VOL).base.begin.is_clean
    await feed.live(4 * HOUR, interval_s=60)
    await quiet(rig)
    await feed.check()
    assert rig.volume(VOL).base.begin.is_clean


class GapFeed(TimedFeed, HashFeed):
    """A volume that loses its log now and then."""


@on_virtual_time
async def test_histories_with_gaps(rig: VirtualArchive) -> None:
    feed = GapFeed(rig, VOL)
    await feed.init()
    await rig.call(SetPolicy(volume=VOL, policy=QUICK))
    await feed.full_backup()
    for dirty in (0, 3, 1):
        await feed.live(HOUR, interval_s=40, explicit=30)
        feed.scribble()
        await feed.hash_backup(dirty=dirty)
        await feed.send()
        await quiet(rig)
        await feed.check()
    await feed.live(2 * HOUR, interval_s=60)
    await quiet(rig)
    points = await feed.check()
    assert len(rig.volume(VOL).diffs) < 60
    assert points[-1] == feed.gid


@on_virtual_time
async def test_the_default_policy_leaves_young_points_alone(rig: VirtualArchive) -> None:
    feed = await fed(rig, None)
    await feed.live(300, interval_s=2)
    assert len(rig.volume(VOL).diffs) == 150
    view = await rig.call(GetPolicy(volume=VOL))
    assert (view.is_default, view.enabled, view.policy) == (True, True, Policy())
    await feed.live(600, interval_s=2)
    assert 100 < len(rig.volume(VOL).diffs) < 200
    await feed.check()


@on_virtual_time
async def test_requests(rig: VirtualArchive) -> None:
    feed = await fed(rig, None)
    await feed.live(600, interval_s=20)
    explained = await rig.call(ExplainPolicy(volume=VOL))
    assert [v.gid for v in explained.points] == await rig.points(VOL)
    assert explained.points[-1].rules[0] == "newest"
    strict = Policy(levels=(), keep=Grid.parse("last=2"))
    simulated = await rig.call(ExplainPolicy(volume=VOL, policy=strict))
    assert [v.gid for v in simulated.points if v.kept] == [feed.gid - 1, feed.gid]
    assert simulated.next.startswith("apply up to")
    assert (await rig.call(GetPolicy(volume=VOL))).policy == Policy()  # nothing was changed
    await rig.call(SetPolicy(volume=VOL, policy=strict))
    await quiet(rig)
    assert await rig.points(VOL) == [feed.gid - 1, feed.gid]
    view = await rig.call(GetPolicy(volume=VOL))
    assert (view.is_default, view.policy) == (False, strict)
    assert view.applied > 0
    await rig.restart()
    assert (await rig.call(GetPolicy(volume=VOL))).policy == strict
    await rig.call(SetPolicy(volume=VOL))
    assert (await rig.call(GetPolicy(volume=VOL))).is_default


@on_virtual_time
async def test_refusals(rig: VirtualArchive) -> None:
    feed = await fed(rig)
    await feed.step(3)
    requests = [GetPolicy(volume="nope"), SetPolicy(volume="nope"), ExplainPolicy(volume="nope")]
    for request in [*requests, m.AddHold(volume="nope", gid=1, reason="x"), m.GetHolds(volume="nope")]:
        with pytest.raises(RemoteError, match="not allowed"):
            await rig.call(request)  # type: ignore[arg-type]
    twice = Replication(name="a1", dest="h:1")
    with pytest.raises(RemoteError, match="same name"):
        await rig.call(SetPolicy(volume=VOL, policy=Policy(replications=(twice, twice))))
    with pytest.raises(RemoteError, match="cannot be held"):
        await rig.call(m.AddHold(volume=VOL, gid=77, reason="x"))
    with pytest.raises(RemoteError, match="over already"):
        await rig.call(m.AddHold(volume=VOL, gid=2, reason="x", until=5))
    with pytest.raises(RemoteError, match="no hold"):
        await rig.call(m.DeleteHold(volume=VOL, gid=2))
    assert rig.volume(VOL).record.policy == QUICK
    assert (await rig.call(m.GetHolds(volume=VOL))).holds == []
    await rig.call(m.AddHold(volume=VOL, gid=2, reason="x"))
    await rig.call(m.AddHold(volume=VOL, gid=2, reason="y"))
    assert [hold.reason for hold in (await rig.call(m.GetHolds(volume=VOL))).holds] == ["y"]


@on_virtual_time
async def test_a_reset_keeps_the_policy_and_forgets_the_holds(rig: VirtualArchive) -> None:
    feed = await fed(rig)
    await feed.step(3)
    await rig.call(m.AddHold(volume=VOL, gid=2, reason="x"))
    await rig.stopped(VOL)
    await rig.call(c.ResetVol(volume=VOL))
    record = rig.volume(VOL).record
    assert (record.policy, record.holds) == (QUICK, ())


# --- trouble


@on_virtual_time
async def test_a_damaged_wdiff_holds_up_its_own_merge_only(rig: VirtualArchive) -> None:
    feed = await fed(rig, Policy(levels=parse_levels("2m:1m"), keep=Grid()))
    await feed.live(60, interval_s=10)
    volume = rig.volume(VOL)
    victim = volume.directory / diff_name(next(iter(volume.diffs)))
    with rig.env.fs.open(victim, write=True) as file:
        file.pwrite(b"\xff" * 64, 4200)
    with structlog.testing.capture_logs() as captured:
        await feed.live(2 * HOUR, interval_s=20)
        failed = log_events(captured, "policy.failed")
        assert len(failed) == 1
        view = await rig.call(GetPolicy(volume=VOL))
    (trouble,) = view.troubles
    assert trouble.error_code == CorruptData.code
    assert 4 <= trouble.failures <= 14  # later and later
    assert trouble.what.startswith("merge")
    assert trouble.retry > rig.clock.now()
    assert 120 <= len(volume.diffs) < 150  # one a minute: the others were merged
    status = await rig.call(c.GetStatus())
    assert status.server["policy_failing"] == 1


def test_a_full_disk_passes() -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:

            async def merge(volume: Any, plan: Any, job: Any) -> Any:
                if rig.clock.now() < NOW + 1500:
                    raise DiskFull("no room", path="/archive")
                return await run_merge(volume, plan, job)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("walbd.archive.policy.run_merge", merge)
                feed = await fed(rig, Policy(levels=parse_levels("2m:1m"), keep=Grid()))
                await feed.live(900, interval_s=10)
                view = await rig.call(GetPolicy(volume=VOL))
                assert {trouble.error_code for trouble in view.troubles} == {DiskFull.code}
                await feed.live(2 * HOUR, interval_s=60)
                assert (await rig.call(GetPolicy(volume=VOL))).troubles == []
            await feed.check()

    run(main())


def test_a_destination_that_is_away_stops_nothing_else() -> None:
    async def main() -> None:
        net = MemNetwork()
        async with VirtualArchive(net=net) as rig, VirtualArchive("a1", net=net, port=10201) as other:
            replication = Replication(name="a1", dest=f"127.0.0.1:{other.address.port}", interval_s=600)
            policy = Policy(
                levels=QUICK.levels, keep=QUICK.keep, apply_interval_s=HOUR, replications=(replication,)
            )
            feed = await fed(rig, policy)
            await other.call(c.ArchiveInitVol(volume=VOL))
            await feed.live(1500, interval_s=15)
            (position,) = rig.volume(VOL).record.replicas
            assert feed.gid - position.gid < 80
            view = await rig.call(GetPolicy(volume=VOL))
            assert view.troubles == []
            assert rig.clock.now() < view.replications[0].next <= rig.clock.now() + 600

            await other.crash()
            with structlog.testing.capture_logs() as captured:
                await feed.live(3 * HOUR, interval_s=15)
                assert len(log_events(captured, "policy.failed")) == 1
            view = await rig.call(GetPolicy(volume=VOL))
            assert [trouble.what for trouble in view.troubles] == ["replicate to a1"]
            volume = rig.volume(VOL)
            (position,) = volume.record.replicas
            # merging went on, up to where the destination stands and from there on; nothing was applied past it
            assert len(volume.diffs) < 60
            assert volume.base.begin.gid_b <= position.gid
            assert position.gid in await rig.points(VOL)

            await other.up()
            await feed.live(60, interval_s=15)
            (position,) = volume.record.replicas
            assert feed.gid - position.gid < 10
            assert (await rig.call(GetPolicy(volume=VOL))).troubles == []
            theirs = await other.points(VOL)
            assert max(theirs) == position.gid
            await feed.live(2 * HOUR, interval_s=30)
            await quiet(rig)
            assert volume.base.begin.gid_b > 110
            await feed.check()
            assert await other.restored_image(VOL, max(theirs)) == feed.images[max(theirs)]

    run(main())


# --- getting on with others


class Gate:
    """Merges stand still until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, duration_s: float | None = None) -> None:
        self.began: list[float] = []
        self.opened = asyncio.Event()
        self.reached = asyncio.Event()

        async def slow(volume: Any, plan: Any, job: Any) -> Any:
            self.began.append(asyncio.get_running_loop().time())
            self.reached.set()
            if duration_s is None:
                async with volume.giving_up():
                    await self.opened.wait()
            else:
                await asyncio.sleep(duration_s)
            return await run_merge(volume, plan, job)

        monkeypatch.setattr("walbd.archive.policy.run_merge", slow)


def test_an_operator_waits_for_a_step_that_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:
            gate = Gate(monkeypatch, 2.0)
            feed = await fed(rig)
            life = asyncio.ensure_future(feed.live(300, interval_s=10))
            await gate.reached.wait()
            assert rig.server.policy.acting
            await rig.call(m.EnableSnapshot(volume=VOL, gids=[feed.gid - 2]))
            assert not rig.server.policy.acting
            await life

    run(main())


@on_virtual_time
async def test_requests_that_never_cease_hold_up_nothing_for_ever(rig: VirtualArchive) -> None:
    """As those of an archive that replicates to this one each second."""
    feed = await fed(rig)

    async def ask() -> None:
        while True:
            await rig.server.policy.stand_aside(VOL, (Merge,))
            await asyncio.sleep(1)

    asking = asyncio.ensure_future(ask())
    await feed.live(HOUR // 2, interval_s=10)
    asking.cancel()
    await asyncio.wait({asking})
    assert len(rig.volume(VOL).diffs) < 60
    await feed.check()


def test_merges_keep_to_all_limits_on_files() -> None:
    """Those for scans count for merges, too."""

    async def main() -> None:
        async with VirtualArchive(open_files_max=256, scan_files_max=4) as rig:
            feed = await fed(rig)
            await feed.live(HOUR // 2, interval_s=5)
            await quiet(rig)
            assert len(rig.volume(VOL).diffs) < 100
            assert not (await rig.call(GetPolicy(volume=VOL))).troubles

    run(main())


@on_virtual_time
async def test_a_clock_that_jumps_ahead_ends_no_hold(rig: VirtualArchive) -> None:
    feed = await fed(rig)
    await feed.live(HOUR // 4, interval_s=10)
    held = feed.gid - 3
    await rig.call(m.AddHold(volume=VOL, gid=held, reason="x", until=rig.clock.now() + 10 * HOUR))
    last = feed.times[feed.gid]
    rig.clock.shift_s = 100 * HOUR
    await rig.call(m.AddHold(volume=VOL, gid=feed.gid, reason="another"))
    assert [hold.gid for hold in rig.volume(VOL).record.holds] == [held, feed.gid]
    rig.clock.shift_s = 0
    await feed.live(4 * HOUR, interval_s=60)
    rig.clock.shift_s = 100 * HOUR
    await quiet(rig)
    assert held in await rig.points(VOL)
    assert last < feed.times[feed.gid]
    rig.clock.shift_s = 0
    await feed.live(10 * HOUR, interval_s=60)
    await quiet(rig)
    assert held not in await rig.points(VOL)
    await feed.check()


@on_virtual_time
async def test_a_step_that_never_fits_is_put_off_for_longer_and_longer(rig: VirtualArchive) -> None:
    feed = await fed(rig, Policy(enabled=False))
    await feed.live(HOUR // 2, interval_s=10)
    runner = rig.server.policy
    first = runner._watch(rig.volume(VOL)).planner
    tried = 0
    try_merge = runner._merge

    async def misfit(volume: Volume, action: Merge) -> None:
        nonlocal tried
        if action.gid_b == 0:
            tried += 1
            raise NotMergeable("it does not fit")
        await try_merge(volume, action)

    runner._merge = misfit  # type: ignore[method-assign]
    await rig.call(SetPolicy(volume=VOL, policy=QUICK))
    await asyncio.sleep(HOUR)
    assert first is runner._watch(rig.volume(VOL)).planner
    assert tried < 100
    assert len(rig.volume(VOL).diffs) < 60  # the others go on
    assert [trouble.error_code for trouble in (await rig.call(GetPolicy(volume=VOL))).troubles]
    runner._merge = try_merge  # type: ignore[method-assign]
    await asyncio.sleep(2 * HOUR)
    await quiet(rig)
    assert not (await rig.call(GetPolicy(volume=VOL))).troubles
    await feed.check()


def test_an_operator_is_told_of_a_step_that_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:
            gate = Gate(monkeypatch)
            feed = await fed(rig)
            await feed.live(200, interval_s=10)
            await gate.reached.wait()
            assert (await rig.call(GetPolicy(volume=VOL))).next.startswith("at work: merge")
            with pytest.raises(RemoteError, match="excludes this"):
                await rig.call(m.AddHold(volume=VOL, gid=2, reason="x"))
            jobs = (await rig.call(GetJobs(volume=VOL))).jobs
            assert [(job.name, job.state) for job in jobs] == [("policy-merge", JobState.RUNNING)]
            await feed.step(5)  # reception goes on
            gate.opened.set()
            await asyncio.sleep(1)
            await rig.call(m.AddHold(volume=VOL, gid=feed.gid, reason="x"))

    run(main())


def test_a_graceful_stop_waits_for_the_step_and_a_forced_one_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with VirtualArchive() as rig:
            gate = Gate(monkeypatch)
            feed = await fed(rig)
            await feed.live(200, interval_s=10)
            await gate.reached.wait()
            stopping = asyncio.ensure_future(rig.server.stop(ShutdownMode.GRACEFUL))
            await asyncio.sleep(10)
            assert not stopping.done()
            gate.opened.set()
            await stopping
            await rig.crash()
            await rig.up()
            gate.opened.clear()
            gate.reached.clear()
            await feed.live(100, interval_s=10)
            await gate.reached.wait()
            await rig.server.stop(ShutdownMode.FORCE)

    run(main())


def test_a_long_apply_holds_up_no_other_volume(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        applying = asyncio.Event()

        async def for_ever(volume: Any, gid: int, job: Any) -> None:
            applying.set()
            async with volume.giving_up():
                await asyncio.sleep(1e9)

        monkeypatch.setattr("walbd.archive.policy.run_apply", for_ever)
        async with VirtualArchive() as rig:
            first = await fed(rig)
            other = await fed(rig, name="vol1")
            await first.live(4 * HOUR, interval_s=120)
            await asyncio.wait_for(applying.wait(), HOUR)
            await other.live(2 * HOUR, interval_s=20)
            assert len(rig.volume("vol1").diffs) < 60
            await first.step(3)  # reception goes on for both
            await rig.server.stop(ShutdownMode.FORCE)

    run(main())


def test_lanes_rest_for_their_share(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        async with VirtualArchive(policy_rest_percent=75) as rig:
            gate = Gate(monkeypatch, 5.0)
            feed = await fed(rig, Policy(enabled=False))
            await feed.live(900, interval_s=10)
            await rig.call(SetPolicy(volume=VOL, policy=QUICK))
            await feed.live(120, interval_s=10)
            gaps = [b - a for a, b in zip(gate.began, gate.began[1:], strict=False)]
            assert len(gaps) >= 3
            assert all(gap >= 20 for gap in gaps)

    run(main())


@on_virtual_time
async def test_it_can_be_switched_off_for_the_archive(rig: VirtualArchive) -> None:
    rig.settings["policy"] = False
    await rig.restart()
    feed = await fed(rig)
    await feed.live(HOUR, interval_s=30)
    assert len(rig.volume(VOL).diffs) == 120
    view = await rig.call(GetPolicy(volume=VOL))
    assert not view.enabled
    assert "switched off" in view.next
    old = rig.server.place.config
    rig.server._follow(old, type(old)(base_dir=old.base_dir, policy=True))
    await quiet(rig)
    assert len(rig.volume(VOL).diffs) < 50
    await feed.check()


@on_virtual_time
async def test_a_hold_that_comes_while_a_snapshot_is_released_wins(rig: VirtualArchive) -> None:
    """Between releasing an explicit snapshot and the merge, the merge is judged anew."""
    feed = await fed(rig, Policy(enabled=False))
    await feed.live(7 * HOUR, interval_s=300, explicit=10)
    volume, runner = rig.volume(VOL), rig.server.policy
    policy = Policy(levels=(), keep=Grid.parse("hourly=5"), apply=False)
    await rig.call(SetPolicy(volume=VOL, policy=policy))
    facts = runner.facts(volume)
    action = runner._watch(volume).planner.next(facts)
    assert isinstance(action, Merge)
    hold = m.Hold(gid=action.diffs[1].begin.gid_b, reason="x", created=0)
    await volume.save(holds=(hold,))
    before = len(volume.diffs)
    assert await runner._try(runner._watch(volume), action) > 0
    assert len(volume.diffs) == before
    await quiet(rig)
    assert hold.gid in await rig.points(VOL)
    await feed.check()


@pytest.mark.parametrize("settings", [{"keep": "daily"}, {"levels": "5m:7s 10m:8s"}, {"keep": ""}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        ArchiveConfig(base_dir="/x", **settings).check()
    assert caught.value.hint
