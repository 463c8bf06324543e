"""The policy over months of a volume, on labels alone; docs/policy.md says what is promised here."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.policy_sim import SimVolume
from walbd.format.meta import RestorePoint
from walbd.format.planning import Action, Apply, Merge, look_at_everything
from walbd.format.policy import DAY_S, Grid, Policy, parse_levels
from walbd.format.retention import explain, thin
from walbd.protocol.maintenance import Hold, ReplicaPosition

START = 1_714_521_600  # a Wednesday, 2024-05-01, midnight


def only_what_is_dropped(sim: SimVolume, action: Action) -> None:
    """A merge destroys no point that stays, an apply none from the oldest that stays on."""
    gone: set[int] = {diff.begin.gid_b for diff in action.diffs[1:]} if isinstance(action, Merge) else set()
    if isinstance(action, Merge):
        assert action.diffs[-1].end.gid_b < sim.gid  # the newest diff is never touched
        assert set(action.release) <= gone
    points = sim.diffs.restorable(sim.base, all_points=True)
    base_gid = sim.base.begin.gid_b
    verdicts = explain(points, sim.holds, sim.replicas, sim.policy, sim.now, base_gid=base_gid)
    if isinstance(action, Apply):
        gone = {verdict.gid for verdict in verdicts if verdict.gid < action.gid}
    lost = [verdict for verdict in verdicts if verdict.gid in gone and verdict.kept]
    assert not lost


def test_thirty_days_of_a_snapshot_every_two_seconds() -> None:
    sim = SimVolume(Policy(), START)
    explicit: list[RestorePoint] = []
    held = 0
    for _ in range(30 * DAY_S // 2):
        sim.now += 2
        is_explicit = sim.now % DAY_S == 41_000  # once a day
        gid = sim.snapshot(sim.now, explicit=is_explicit)
        if is_explicit:
            explicit.append(RestorePoint(gid, sim.now, explicit=True))  # type: ignore[arg-type]
            if len(explicit) == 3:
                held = gid - 7  # between intervals: no rule would keep it
                sim.holds.append(Hold(gid=held, reason="audit", created=sim.now))
        sim.work()
    assert sim.chain_max < 500
    assert len(sim.diffs) < 500
    # retention as promised: what the rules say of all points that ever were is what is there, and no more
    times = range(START + 2, sim.now + 1, 2)
    asked = {point.gid for point in explicit}
    ever = [RestorePoint(gid, time, gid in asked) for gid, time in enumerate(times, 1)]  # type: ignore[arg-type]
    dropped = thin(ever, sim.policy.levels, sim.now, None)
    left = [point for point, level in zip(ever, dropped, strict=True) if level is None or point.gid == held]
    expected = {v.gid for v in explain(left, sim.holds, [], sim.policy, sim.now) if v.kept}
    there = set(sim.gids())
    assert expected <= there
    assert held in there
    assert {point.gid for point in explicit if point.timestamp > sim.now - 2 * DAY_S} <= there
    assert len(there - expected) < 60  # dropped ones wait until the day, or the interval, is complete
    # what it costs: the three levels rewrite all that came, retention rewrites hours to days
    assert sim.merged_b < 4.5 * sim.came_b
    assert sim.applied_b <= sim.came_b
    assert sim.applies <= 30


@pytest.mark.parametrize(
    ("keep", "levels", "chain_max"),
    [
        ("all=3h", "5m:1m", 330),
        ("last=10", "1m:5m", 120),
        ("all=1h hourly=24 daily=3 weekly=2", "5m:1m 1h:10m", 160),
        ("everything", "5m:1m 1h:1h", 290),
        ("daily=3", "none", 160),
    ],
)
def test_other_grids(keep: str, levels: str, chain_max: int) -> None:
    sim = SimVolume(Policy(keep=Grid.parse(keep), levels=parse_levels(levels)), START)
    for _ in range(6 * DAY_S // 60):
        sim.now += 60
        sim.snapshot(sim.now)
        sim.work()
    assert sim.chain_max < chain_max
    assert sim.merged_b < 4 * sim.came_b


def test_a_backlog_is_worked_off_step_by_step() -> None:
    sim = SimVolume(Policy(), START)
    for _ in range(20_000):  # the policy was off
        sim.now += 2
        sim.snapshot(sim.now)
    sim.work()
    assert len(sim.diffs) < 300
    assert sim.merged_b < 4 * sim.came_b
    assert sim.planner.next(sim.facts()) is None


def test_a_replica_that_is_away_keeps_its_place_and_all_above_the_base() -> None:
    sim = SimVolume(Policy(keep=Grid.parse("all=2h"), apply_interval_s=3600), START)
    for i in range(3 * DAY_S // 60):
        sim.now += 60
        sim.snapshot(sim.now)
        if i == 333:
            sim.replicas.append(ReplicaPosition(node="a1", address="h:1", gid=sim.gid, timestamp=sim.now, seen=0))
        sim.work()
        if sim.replicas:
            assert sim.base.begin.gid_b <= 334
    assert 334 in sim.gids()
    assert len(sim.diffs) < 250  # merging goes on
    sim.replicas.clear()
    sim.planner.reset()
    sim.work()
    assert sim.base.begin.gid_b > 334


def test_clocks_that_jump_drop_nothing() -> None:
    sim = SimVolume(Policy(keep=Grid.parse("all=1d")), START)
    for _ in range(DAY_S // 60):
        sim.now += 60
        sim.snapshot(sim.now)
        sim.work()
    before = sim.gids()
    sim.now += 3650 * DAY_S  # the archive's clock is wrong
    sim.work()
    assert sim.gids() == before
    sim.now = 0
    sim.work()
    assert sim.gids() == before
    sim.now = sim.time
    far = sim.snapshot(sim.time + 3650 * DAY_S)  # a snapshot from the far future
    sim.work()
    assert sim.gids() == [*before, sim.gid]
    time = sim.now
    for _ in range(3 * DAY_S // 60):  # and the storage's clock is right again
        time += 60
        sim.now = time
        sim.snapshot(time)
        sim.work()
    assert len(sim.diffs) < 900
    assert far in sim.gids()


def test_a_storage_whose_clock_goes_back_a_day() -> None:
    sim = SimVolume(Policy(), START)
    time = START
    for i in range(2 * DAY_S // 60):
        time += 60
        if i == DAY_S // 60:
            time -= DAY_S
        sim.now += 60
        sim.snapshot(time)
        sim.work()
    assert sim.chain_max < 1500
    assert len(sim.diffs) < 500


def test_nothing_is_done_when_it_is_off_or_there_is_no_base() -> None:
    sim = SimVolume(Policy(enabled=False), START)
    for _ in range(3000):
        sim.now += 60
        sim.snapshot(sim.now)
        sim.work()
    assert len(sim.diffs) == 3000
    sim.policy = Policy()
    sim.planner.reset()
    sim.work()
    assert len(sim.diffs) < 300


def test_an_interrupted_apply_comes_first() -> None:
    sim = SimVolume(Policy(apply=False), START)
    for _ in range(500):
        sim.now += 60
        sim.snapshot(sim.now)
    sim.base = sim.base.begin_applying(sim.diffs.to_apply(sim.base, 3))
    assert sim.planner.next(sim.facts()) == Apply(3, finish=True)
    assert sim.planner.next(sim.facts(), avoid=lambda _: True) is None
    sim.work()
    assert sim.base.begin.gid_b == 3


def test_merges_have_limits() -> None:
    sim = SimVolume(Policy(levels=parse_levels("1m:1h"), keep=Grid(), merge_max_b=4 << 20), START)
    sizes = []

    def look(_sim: SimVolume, action: Action) -> None:
        assert isinstance(action, Merge)
        sizes.append(action.size_b)

    sim.check = look
    for _ in range(1900):
        sim.now += 2
        sim.snapshot(sim.now)
        sim.work()
    assert sizes
    assert max(sizes) <= 4 << 20


@settings(max_examples=40)
@given(st.integers(0, 1 << 32))
def test_random_lives(seed: int) -> None:
    """Nothing that stays is ever lost, whatever comes; and nothing is left that a fresh look would find."""
    rng = random.Random(seed)
    levels = rng.choice(["5m:30s 30m:5m 4h:1h", "1m:2m", "none", "1h:7m 2h:70m"])
    keep = rng.choice(["everything", "all=2h", "last=3", "all=1h hourly=3 daily=2", "hourly=5 weekly=1"])
    policy = Policy(
        levels=parse_levels(levels),
        keep=Grid.parse(keep),
        apply=rng.random() < 0.8,
        apply_interval_s=rng.choice([0, 3600, DAY_S]),
        merge_max_b=rng.choice([0, 0, 5 << 20]),
    )
    sim = SimVolume(policy, START, seed=seed, check=only_what_is_dropped)
    step = rng.choice([2, 20, 300, 2000])
    latest = sim.now
    for _ in range(rng.randrange(10, 400)):
        sim.now += rng.randrange(1, 2 * step)
        if rng.random() < 0.01:
            sim.now = max(1, sim.now + rng.choice([-1, 1]) * 100 * step)
        latest = max(latest, sim.now)
        sim.snapshot(max(1, sim.now + rng.choice([0, 0, 0, -5])), explicit=rng.random() < 0.1)
        if rng.random() < 0.03:
            until = rng.choice([0, sim.now + 20 * step])
            sim.holds.append(Hold(gid=rng.choice(sim.gids()), reason="x", created=0, until=until))
        if rng.random() < 0.02:
            gid = rng.choice(sim.gids())
            sim.replicas = [ReplicaPosition(node="a1", address="h:1", gid=gid, timestamp=0, seen=0)]
        if rng.random() < 0.02 and sim.holds:
            sim.holds.pop(rng.randrange(len(sim.holds)))
            sim.planner.reset()
        if rng.random() < 0.5:
            sim.work()
    sim.planner.reset()
    sim.work()
    assert not list(look_at_everything(sim.facts()))
    for hold in sim.holds:
        assert hold.gid in sim.gids() or 0 < hold.until <= latest
