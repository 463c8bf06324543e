"""Policies as text, and which restore points stay."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Sequence

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference.prune import FORMATS, prune
from walbd.errors import UsageError
from walbd.format.meta import RestorePoint
from walbd.format.policy import (
    DEFAULT_KEEP,
    DEFAULT_LEVELS,
    Grid,
    Policy,
    Replication,
    format_levels,
    format_span,
    parse_levels,
    parse_span,
)
from walbd.format.retention import Verdict, explain, grid_rules
from walbd.ids import Gid
from walbd.protocol.maintenance import Hold, ReplicaPosition

NO_LEVELS = Policy(levels=())


def at(text: str) -> int:
    return int(dt.datetime.fromisoformat(text).replace(tzinfo=dt.UTC).timestamp())


def points_at(times: Sequence[int], explicit: Sequence[int] = ()) -> list[RestorePoint]:
    return [RestorePoint(Gid(gid), time, gid in explicit) for gid, time in enumerate(times, 1)]


def kept(verdicts: Sequence[Verdict]) -> list[int]:
    return [verdict.gid for verdict in verdicts if verdict.kept]


# --- as text


@pytest.mark.parametrize(
    ("text", "span_s"),
    [("0", 0), ("90", 90), ("90s", 90), ("5m", 300), ("48h", 172_800), ("2d", 172_800), ("1w", 604_800)],
)
def test_spans(text: str, span_s: int) -> None:
    assert parse_span(text) == span_s
    assert parse_span(format_span(span_s)) == span_s


@pytest.mark.parametrize("text", ["", "h", "-1", "1.5h", "1 h", "5M", "99999999999", "9999999999w", "1y"])
def test_bad_spans(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_span(text)
    assert caught.value.hint


@given(st.integers(0, 1 << 33))
def test_spans_are_written_exactly(span_s: int) -> None:
    assert parse_span(format_span(span_s)) == span_s


def test_the_default_is_as_documented() -> None:
    assert str(Policy().keep) == DEFAULT_KEEP == "all=48h hourly=72 daily=31 weekly=8 monthly=12 yearly=3"
    assert format_levels(Policy().levels) == DEFAULT_LEVELS
    assert Policy().raw_s == 300


@given(st.builds(Grid, last=st.integers(0, 9), all_s=st.integers(0, 10**6), hourly=st.integers(0, 9)))
def test_grids_are_written_as_read(grid: Grid) -> None:
    assert Grid.parse(str(grid)) == grid


@pytest.mark.parametrize(
    "text",
    ["", "  ", "all", "all=", "daily", "daily=x", "daily=-1", "days=3", "daily=1 daily=2", "daily=0", "all=0",
     "daily=1000001", "everything daily=1", "last=1.5", "=3", "daily==3"],
)  # fmt: skip
def test_bad_grids(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Grid.parse(text)
    assert caught.value.hint


def test_a_grid_that_keeps_everything() -> None:
    assert Grid.parse(" everything ").is_everything
    assert str(Grid()) == "everything"


def test_levels() -> None:
    levels = parse_levels("5m:30s, 30m:5m 4h:1h")
    assert [(level.older_than_s, level.interval_s) for level in levels] == [(300, 30), (1800, 300), (14400, 3600)]
    assert parse_levels("none") == () == parse_levels("")
    assert format_levels(()) == "none"
    assert len(parse_levels(" ".join(f"{2**i}h:{2**i}s" for i in range(16)))) == 16


@pytest.mark.parametrize(
    "text",
    ["5m", "5m:", ":30s", "0:30s", "5m:0", "5m:30s 30m:45s", "5m:30s 30m:30s", "30m:5m 5m:30s", "5m:30s 5m:1m",
     " ".join(f"{2**i}h:{2**i}s" for i in range(17))],
)  # fmt: skip
def test_bad_levels(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_levels(text)
    assert caught.value.hint


def test_replications() -> None:
    replication = Replication.parse("a1=[::1]:12000,90m,lz4")
    assert replication == Replication(name="a1", dest="[::1]:12000", interval_s=5400, compress="lz4")
    assert Replication.parse("a1=host:1").interval_s == 3600
    assert str(replication) == "a1=[::1]:12000,90m,lz4"
    assert Replication.parse("a1=host:65535").dest == "host:65535"


@pytest.mark.parametrize("text", ["", "a1", "a1=host", "a1=:5", "a1=host:0", "a1=host:65536", "a1=h:1,x",
                                  "a1=h:1,1h,lz4,more", "=h:1", "a b=h:1", "a1=h:1,0"])  # fmt: skip
def test_bad_replications(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Replication.parse(text)
    assert caught.value.hint


def test_a_policy_is_checked() -> None:
    Policy().check()
    twice = Replication(name="a1", dest="h:1")
    Policy(replications=(twice, Replication(name="a2", dest="h:1"))).check()
    many = tuple(Replication(name=f"a{i}", dest="h:1") for i in range(65))
    Policy(replications=many[:64]).check()
    with pytest.raises(UsageError, match="too many"):
        Policy(replications=many).check()
    with pytest.raises(UsageError, match="same name"):
        Policy(replications=(twice, twice)).check()
    with pytest.raises(UsageError, match="no multiple"):
        Policy(levels=tuple(reversed(parse_levels(DEFAULT_LEVELS)))).check()
    plain = msgspec.to_builtins(Policy(replications=(twice,)))
    assert msgspec.convert(plain, Policy, strict=True) == Policy(replications=(twice,))


# --- the grid, as Proxmox Backup Server decides


COUNTS = st.dictionaries(st.sampled_from(["last", *FORMATS]), st.integers(1, 6), min_size=1)
TIMES = st.lists(
    st.integers(at("2019-12-20"), at("2024-03-02")) | st.integers(0, 400_000), min_size=1, max_size=60
)


@settings(max_examples=300)
@given(COUNTS, TIMES, st.sampled_from([1, 60, 3600, 21_600, 86_400]))
def test_the_grid_equals_the_reference(keep: dict[str, int], raw: list[int], scale: int) -> None:
    times = sorted({time // scale * scale for time in raw})
    points = points_at(times)
    rules = grid_rules(points, Grid(**keep), times[-1])
    assert {points[gid - 1].timestamp: rule for gid, rule in rules.items()} == prune(times, keep)


def rules_by_time(times: list[str], keep: str) -> dict[str, str]:
    verdicts = explain(
        points_at([at(t) for t in times]),
        [],
        [],
        msgspec.structs.replace(NO_LEVELS, keep=Grid.parse(keep)),
        1 << 40,
    )
    return {times[v.gid - 1]: v.rules[-1] for v in verdicts if v.kept}


def test_a_covered_period_does_not_count() -> None:
    days = [f"2024-05-{day:02}T12:00" for day in range(1, 11)]
    assert rules_by_time(days, "last=2 daily=3") == {
        days[9]: "last",
        days[8]: "last",
        days[7]: "daily",
        days[6]: "daily",
        days[5]: "daily",
    }


def test_a_period_keeps_its_newest_point_and_an_empty_one_does_not_count() -> None:
    times = ["2024-05-01T08:00", "2024-05-01T20:00", "2024-05-04T08:00", "2024-05-04T09:00", "2024-05-06T01:00"]
    assert rules_by_time(times, "daily=3") == {times[1]: "daily", times[3]: "daily", times[4]: "daily"}


def test_weeks_begin_on_monday_also_over_the_year() -> None:
    # 2019-12-30 to 2020-01-05 is one week; 2020-01-06 is a Monday.
    times = ["2019-12-29T23:59", "2019-12-30T00:00", "2020-01-01T00:00", "2020-01-05T23:59", "2020-01-06T00:00"]
    assert rules_by_time(times, "weekly=9") == {times[0]: "weekly", times[3]: "weekly", times[4]: "weekly"}


def test_what_a_week_has_dropped_no_month_takes() -> None:
    # Friday 31 January and Sunday 2 February 2020 are of one week.
    times = ["2020-01-20T00:00", "2020-01-31T00:00", "2020-02-02T00:00", "2020-02-09T00:00"]
    assert rules_by_time(times, "weekly=2 monthly=2") == {
        times[3]: "weekly",
        times[2]: "weekly",
        times[0]: "monthly",
    }


def test_the_whole_grid() -> None:
    times = [at("2020-01-01") + 3600 * hour for hour in range(24 * 1900)]
    points = points_at(times)
    rules = grid_rules(points, Grid.parse(DEFAULT_KEEP), times[-1])
    counts = {rule: list(rules.values()).count(rule) for rule in set(rules.values())}
    assert counts == {"all": 49, "hourly": 72, "daily": 31, "weekly": 8, "monthly": 12, "yearly": 3}


# --- verdicts


def test_levels_keep_the_newest_of_each_interval() -> None:
    times = list(range(0, 1200, 10))
    policy = Policy(levels=parse_levels("5m:30s 10m:5m"), keep=Grid())
    verdicts = explain(points_at(times), [], [], policy, 5000)
    left = [verdict.timestamp for verdict in verdicts if verdict.kept]
    assert left == [290, *range(320, 870, 30), *range(870, 1200, 10)]
    assert [v.rules for v in verdicts if v.timestamp in (0, 290, 300, 600, 860, 900, 1190)] == [
        ("thinned 5m",),
        ("everything", "each 5m"),
        ("thinned 30s",),
        ("thinned 30s",),
        ("everything", "each 30s"),
        ("everything", "raw"),
        ("newest", "everything", "raw"),
    ]


def test_explicit_points_pass_the_levels_and_obey_the_grid() -> None:
    times = [at("2024-05-01") + 600 * i for i in range(6 * 24 * 4)]
    asked = [100, 500]
    policy = Policy(levels=parse_levels("1m:1h"), keep=Grid.parse("all=1d daily=9"))
    verdicts = {v.gid: v for v in explain(points_at(times, asked), [], [], policy, 1 << 40)}
    assert verdicts[500].rules == ("all",)
    assert verdicts[100].rules == ("no rule",)
    assert verdicts[99].rules == ("thinned 1h",)


def test_holds_replicas_and_the_newest_stay() -> None:
    times = [1000 * i for i in range(10)]
    policy = Policy(levels=parse_levels("1s:100000s"), keep=Grid.parse("last=1"))
    holds = [
        Hold(gid=2, reason="audit", created=0),
        Hold(gid=3, reason="short", created=0, until=20_000),
        Hold(gid=4, reason="over", created=0, until=9_000),
    ]
    replicas = [ReplicaPosition(node="a1", address="h:1", gid=6, timestamp=0, seen=0)]
    verdicts = {v.gid: v for v in explain(points_at(times), holds, replicas, policy, 10_000)}
    assert kept(list(verdicts.values())) == [2, 3, 6, 10]
    assert verdicts[2].rules == ("hold: audit",)
    assert (verdicts[2].until, verdicts[3].until) == (0, 20_000)
    assert verdicts[6].rules == ("replica: a1",)
    assert verdicts[10].rules == ("newest", "last", "raw")


def test_an_end_of_a_hold_is_no_end_of_what_stays_for_another_reason() -> None:
    hold = Hold(gid=3, reason="short", created=0, until=20_000)
    replicas = [ReplicaPosition(node="a1", address="h:1", gid=2, timestamp=0, seen=0)]
    holds = [hold, Hold(gid=2, reason="short", created=0, until=20_000)]
    policy = msgspec.structs.replace(NO_LEVELS, keep=Grid.parse("last=1"))
    verdicts = explain(points_at([0, 1000, 2000]), holds, replicas, policy, 10_000)
    assert [(v.rules, v.until) for v in verdicts[1:]] == [
        (("hold: short", "replica: a1"), 0),
        (("newest", "hold: short"), 0),
    ]


def test_the_rules_are_asked_in_their_order() -> None:
    times = [f"2024-05-{day:02}T12:00" for day in range(1, 6)]
    assert rules_by_time(times, "last=1 all=1d daily=1") == {times[4]: "last", times[3]: "all", times[2]: "daily"}


def test_held_points_count_for_no_rule() -> None:
    times = [at(f"2024-05-0{day}T12:00") + shift for day in (1, 2, 3) for shift in (0, 60)]
    policy = Policy(levels=(), keep=Grid.parse("daily=2"))
    assert kept(explain(points_at(times), [], [], policy, 1 << 40)) == [4, 6]
    holds = [Hold(gid=4, reason="x", created=0)]
    assert kept(explain(points_at(times), holds, [], policy, 1 << 40)) == [3, 4, 6]


def test_future_points_stay_and_count_for_nothing() -> None:
    times = [at("2024-05-01T12:00"), at("2024-05-02T12:00"), at("2090-01-01"), at("2024-05-03T12:00")]
    policy = Policy(levels=(), keep=Grid.parse("daily=2"))
    verdicts = explain(points_at(times), [], [], policy, 1 << 40)
    assert [v.rules for v in verdicts] == [("no rule",), ("daily",), ("future",), ("newest", "daily")]
    only_future = explain(points_at([at("2024-05-01"), at("2090-01-01")]), [], [], policy, at("2024-05-02"))
    assert [v.rules for v in only_future] == [("daily",), ("newest", "future")]


def test_a_clock_that_jumps_ahead_drops_nothing() -> None:
    times = [at("2024-05-01") + 3600 * i for i in range(48)]
    policy = Policy(keep=Grid.parse("all=3d"))
    now = explain(points_at(times), [], [], policy, times[-1])
    assert kept(now) == list(range(1, 49))
    assert [v.kept for v in explain(points_at(times), [], [], policy, at("2060-01-01"))] == [v.kept for v in now]


def test_a_policy_that_is_off_drops_nothing() -> None:
    policy = Policy(enabled=False, keep=Grid.parse("last=1"))
    verdicts = explain(points_at([0, 1, 2]), [], [], policy, 10)
    assert [v.rules for v in verdicts] == [("policy off",), ("policy off",), ("newest", "last", "raw")]
    assert all(v.kept for v in verdicts)


def test_the_base_is_not_thinned() -> None:
    policy = Policy(levels=parse_levels("1s:1h"), keep=Grid())
    verdicts = explain(points_at([0, 10, 20, 30]), [], [], policy, 1 << 40, base_gid=1)
    assert kept(verdicts)[0] == 1
    assert explain([], [], [], policy, 5) == []


@st.composite
def situations(draw: st.DrawFn) -> tuple[list[RestorePoint], Policy, int]:
    rng = random.Random(draw(st.integers(0, 1 << 32)))
    step = draw(st.sampled_from([2, 30, 600, 3600, 40_000]))
    time, times = at("2023-12-28"), []
    for _ in range(draw(st.integers(1, 120))):
        time += rng.randrange(1, 2 * step)
        if rng.random() < 0.02:
            time += rng.choice([-1, 1]) * 50 * step  # a clock is set
        times.append(max(time, 1))
    explicit = [gid for gid in range(1, len(times) + 1) if rng.random() < 0.1]
    grid = Grid(
        last=rng.choice([0, 0, 3]),
        all_s=rng.choice([0, 10 * step]),
        hourly=rng.choice([0, 5]),
        daily=rng.choice([0, 4]),
        weekly=rng.choice([0, 2]),
        monthly=rng.choice([0, 2]),
    )
    levels = rng.choice(["none", "5m:30s 30m:5m 4h:1h", "1s:1m", "1h:7m 2h:70m"])
    now = times[-1] + rng.choice([-20 * step, 0, 0, 5, 1000 * step])
    return points_at(times, explicit), Policy(levels=parse_levels(levels), keep=grid), max(now, 0)


@given(situations())
def test_what_is_dropped_once_is_never_needed_again(situation: tuple[list[RestorePoint], Policy, int]) -> None:
    """Dropping and asking again changes nothing: else points would crumble away while the clock stands still."""
    points, policy, now = situation
    verdicts = explain(points, [], [], policy, now)
    left = [point for point, verdict in zip(points, verdicts, strict=True) if verdict.kept]
    again = explain(left, [], [], policy, now)
    assert [v.gid for v in again if v.kept] == [point.gid for point in left]


@given(situations())
def test_every_verdict_has_a_reason(situation: tuple[list[RestorePoint], Policy, int]) -> None:
    points, policy, now = situation
    verdicts = explain(points, [], [], policy, now)
    assert [verdict.gid for verdict in verdicts] == [point.gid for point in points]
    assert all(verdict.rules and (verdict.kept or not verdict.until) for verdict in verdicts)
    assert verdicts[-1].kept
    assert verdicts[-1].rules[0] == "newest"
    assert all(verdict.kept for verdict in verdicts if verdict.timestamp > now)


def test_how_long_a_point_is_kept() -> None:
    """Rule after rule: a point is handed on to the next, the first rule spends one on the period of today."""
    times = [at("2024-05-01") + 6 * 3600 * i for i in range(41)]

    def days(keep: str, gid: int) -> float:
        policy = Policy(levels=(), keep=Grid.parse(keep))
        verdict = explain(points_at(times), [], [], policy, 1 << 40)[gid - 1]
        assert verdict.kept
        return (verdict.until - verdict.timestamp) / 86_400

    assert days("all=2d", 40) == 2
    assert days("all=2d daily=3", 40) == 5  # the last of its day
    assert days("all=2d daily=3", 39) == 2
    assert days("daily=3", 40) == 2
    assert days("all=2d daily=3 weekly=2", 40) == 5  # not the last of its week
    assert days("all=2d daily=3 weekly=2", 20) == 5 + 14  # a Sunday


@pytest.mark.parametrize("levels", ["none", "1h:30m 5h:2h"])
@pytest.mark.parametrize("keep", ["all=6h hourly=5 daily=3", "all=1d", "daily=3 weekly=1", "hourly=30 monthly=1"])
def test_until_then_a_point_is_kept_while_backups_go_on(levels: str, keep: str) -> None:
    policy = Policy(levels=parse_levels(levels), keep=Grid.parse(keep))
    first = at("2024-04-26")
    times = [first + 600 * i for i in range(1, 6 * 24 * 80)]
    seen = 6 * 24 * 9
    verdicts = explain(points_at(times[:seen]), [], [], policy, 1 << 40)
    promised = [verdict for verdict in verdicts if verdict.until]
    assert len(promised) >= 3
    ends = sorted({verdict.until for verdict in promised})
    for until in ends[:: max(1, len(ends) // 12)]:
        so_far = [time for time in times if time < until] or times[:seen]
        later = {verdict.gid for verdict in explain(points_at(so_far), [], [], policy, until - 1) if verdict.kept}
        assert {verdict.gid for verdict in promised if verdict.until >= until} <= later
