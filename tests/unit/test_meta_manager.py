"""The diff collection against linear search, and the properties of docs/metadata.md on random histories."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.kit.labels import LabelHistory, apply_each, diffs, label_history, snapshots
from tests.reference.meta import LinearDiffs
from walbd.errors import AlreadyExists, HistoryBroken, NotFound
from walbd.format.meta import (
    NO_BASE,
    BaseState,
    Diff,
    DiffManager,
    NotApplicable,
    NotMergeable,
    NotReachable,
    Snapshot,
    apply_all,
    can_apply,
    can_merge,
    can_merge_all,
    contains,
    merge,
    merge_all,
    trim,
)
from walbd.format.meta.index import _Entry
from walbd.ids import Gid

SETS = st.lists(diffs(), max_size=14, unique_by=lambda diff: (diff.begin, diff.end))
GIDS = st.integers(0, 13)
SEEDS = st.integers(0, 2**32)


def dump(found: list[Diff]) -> list[str]:
    return [diff.describe() for diff in found]


# --- against linear search


@given(SETS, snapshots(12), GIDS, GIDS)
def test_queries_equal_linear_search(found: list[Diff], start: Snapshot, gid: int, gid2: int) -> None:
    manager, linear = DiffManager(found), LinearDiffs(found)
    assert len(manager) == len(found)
    assert manager.size_b == sum(diff.size_b for diff in found)
    assert dump(list(manager)) == dump(linear.listing())
    assert dump(manager.get_range(gid, gid2)) == dump(linear.get_range(gid, gid2))
    assert dump(manager.get_range(gid)) == dump(linear.get_range(gid, 99))
    assert set(manager.over(gid)) == linear.over(gid)
    assert len(manager.over(gid)) == len(linear.over(gid))
    assert dump(manager.chain(start)) == dump(linear.chain(start))
    assert dump(manager.chain_to_gid(start, gid)) == dump(linear.chain(start, gid_max=gid))
    assert dump(manager.chain_to_time(start, gid)) == dump(linear.chain(start, time_max=gid))
    assert dump(manager.applicable_and_mergeable(start)) == dump(linear.applicable_and_mergeable(start))
    assert dump(manager.merge_candidates(gid)) == dump(linear.merge_candidates(gid))
    for diff in found:
        assert manager.find(diff.begin, diff.end) is diff


@given(SETS, GIDS, GIDS, st.integers(0, 30), st.integers(1, 5))
def test_merge_candidates_are_cut(found: list[Diff], gid: int, gid_end: int, size_b: int, n: int) -> None:
    manager = DiffManager(found)
    run = manager.merge_candidates(gid)
    by_size = manager.merge_candidates(gid, size_max_b=size_b)
    assert dump(by_size) == dump(run[: max(1, longest(run, lambda part: sum(d.size_b for d in part) <= size_b))])
    assert dump(manager.merge_candidates(gid, n_max=n)) == dump(run[:n])
    in_range = manager.merge_candidates(gid, gid_end=gid_end)
    assert dump(in_range) == dump(run[: longest(run, lambda part: all(d.begin.gid_b < gid_end for d in part))])
    first = manager.merge_candidates(0)
    assert dump(manager.to_send(size_max_b=size_b, n_max=n)) == dump(
        first[: max(1, min(n, longest(first, lambda part: sum(d.size_b for d in part) <= size_b)))]
    )


def longest(run: list[Diff], fits: Callable[[list[Diff]], bool]) -> int:
    return max(n for n in range(len(run) + 1) if all(fits(run[:m]) for m in range(n + 1)))


@given(SETS, GIDS, GIDS, snapshots(12), st.data())
def test_removal_equals_linear_search(
    found: list[Diff], gid: int, gid2: int, start: Snapshot, data: st.DataObject
) -> None:
    removals: list[tuple[Callable[[DiffManager], list[Diff]], list[Diff]]] = [
        (lambda m: m.gc_range(gid, gid2), LinearDiffs(found).inside(gid, gid2)),
        (lambda m: m.erase_before(gid), LinearDiffs(found).before(gid)),
        (
            lambda m: m.gc(BaseState(start)),
            [d for d in LinearDiffs(found).listing() if d not in LinearDiffs(found).chain(start)],
        ),
    ]
    for remove, expected in removals:
        manager = DiffManager(found)
        assert dump(remove(manager)) == dump(expected)
        assert_same(manager, [d for d in found if d not in expected])
    manager = DiffManager(found)
    left = list(found)
    for diff in data.draw(st.permutations(found)):
        assert manager.erase(diff)
        assert not manager.erase(diff)
        left.remove(diff)
        assert_same(manager, left)


def assert_same(manager: DiffManager, expected: list[Diff]) -> None:
    """The index must be as if it had been built from `expected`."""
    linear = LinearDiffs(expected)
    assert dump(list(manager)) == dump(linear.listing())
    assert manager.size_b == sum(diff.size_b for diff in expected)
    for gid in range(14):
        assert set(manager.over(gid)) == linear.over(gid)
        assert dump(manager.chain(Snapshot.clean(gid))) == dump(linear.chain(Snapshot.clean(gid)))


@given(SETS, GIDS, st.booleans())
def test_change_snapshot(found: list[Diff], gid: int, enable: bool) -> None:
    manager = DiffManager(found)
    there = [diff for diff in found if diff.begin.gid_b == gid]
    planned = manager.snapshot_change(gid, enable=enable)
    assert dump(list(manager)) == dump(list(DiffManager(found)))
    assert manager.change_snapshot(gid, enable=enable) == planned
    assert planned.found == bool(there)
    assert {old for old, _ in planned.changed} == {diff for diff in there if diff.mergeable == enable}
    assert all(new.mergeable is not enable for _, new in planned.changed)
    flags = {new: new for _, new in planned.changed}
    assert_same(manager, [flags.get(diff, diff) for diff in found])
    assert manager.change_snapshot(gid, enable=enable) == (bool(there), [])


# --- identity


def test_one_identity_once() -> None:
    kept = Diff(Snapshot.clean(1), Snapshot.clean(2), mergeable=True, timestamp=5)
    other = Diff(Snapshot.clean(1), Snapshot.clean(2), mergeable=False, timestamp=4)
    manager = DiffManager([kept])
    with pytest.raises(AlreadyExists) as caught:
        manager.add(other)
    assert caught.value.facts == {"diff": other.describe(), "known": kept.describe()}
    assert list(manager) == [kept]
    assert manager.find(kept.begin, kept.end) is kept


@pytest.mark.parametrize("turned", [False, True])
def test_load_keeps_the_newer_and_reports_the_other(turned: bool) -> None:
    def load(*found: Diff) -> tuple[list[str], list[str]]:
        manager, duplicates = DiffManager.load(reversed(found) if turned else found)
        return dump(list(manager)), dump(duplicates)

    old = Diff(Snapshot.clean(1), Snapshot.clean(2), timestamp=4)
    new = Diff(Snapshot.clean(1), Snapshot.clean(2), mergeable=True, timestamp=5)
    protects = Diff(Snapshot.clean(1), Snapshot.clean(2), timestamp=5)
    other = Diff(Snapshot.clean(1), Snapshot.clean(3))
    assert load(old, new, other) == (dump([new, other] if not turned else [other, new]), dump([old]))
    assert load(new, protects) == (dump([protects]), dump([new]))


def test_erase_and_replace_what_is_not_there() -> None:
    diff = Diff(Snapshot.clean(1), Snapshot.clean(2))
    manager = DiffManager()
    manager.erase(diff)
    with pytest.raises(NotFound):
        manager.erase(diff, must_exist=True)
    with pytest.raises(NotFound):
        manager.replace(diff)
    assert manager.find(diff.begin, diff.end) is None
    assert manager.to_send(size_max_b=1, n_max=1) == []


def test_compared_stays_compared() -> None:
    manager = DiffManager([Diff(Snapshot.clean(1), Snapshot.clean(2))])
    with pytest.raises(ValueError, match="compared"):
        manager.replace(Diff(Snapshot.clean(1), Snapshot.clean(2), comp=True))


# --- properties of histories


@given(SEEDS)
def test_merging_is_associative_and_applies_like_its_parts(seed: int) -> None:
    history = label_history(seed)
    chain = history.manager.chain(history.base.begin)
    for begin in range(len(chain)):
        for end in range(begin + 2, len(chain) + 1):
            run = chain[begin:end]
            if not all(can_merge(merge_all(run[:n]), run[n]) for n in range(1, len(run))):
                break
            whole = merge_all(run)
            start = apply_all(history.base.begin, chain[:begin])
            assert apply_all(start, run) == apply_all(start, [whole])
            assert all(contains(whole, part) for part in run)
            for middle in range(1, len(run)):
                two = merge_all(run[middle:])
                assert merge(merge_all(run[:middle]), two).describe() == whole.describe()


@given(SEEDS)
def test_merges_and_gc_keep_every_snapshot_continued(seed: int) -> None:
    history = label_history(seed)
    manager, base = history.manager, history.base
    chain = manager.chain(base.begin)
    passed = apply_each(base.begin, chain)
    applying = [BaseState(passed[i], passed[j]) for i in range(len(passed)) for j in range(i + 1, len(passed))]
    latest = manager.latest(base)
    explicit = manager.restorable(base)
    everything = manager.restorable(base, all_points=True)
    for _ in range(5):
        history.merge_some(keep_parts=history.rng.random() < 0.5)
        if history.rng.random() < 0.3:
            manager.gc(base)
    assert manager.latest(base) == latest
    assert manager.restorable(base) == explicit
    left = manager.restorable(base, all_points=True)
    assert set(left) <= set(everything)
    # Diffs before the base were not gone over by gc only if it ran; from every point passed the way goes on.
    for start in passed[:-1]:
        assert apply_all(start, manager.chain(start)) == latest.begin
    for state in applying:
        assert manager.latest(state) == latest
        assert state.can_apply(manager.minimum(state))


@given(SEEDS)
def test_latest_is_the_same_from_any_interrupted_apply(seed: int) -> None:
    history = label_history(seed)
    manager, base = history.manager, history.base
    chain = manager.chain(base.begin)
    latest = manager.latest(base)
    assert latest.begin == apply_all(base.begin, chain)
    for n in range(1, len(chain) + 1):
        state = base.begin_applying(chain[:n])
        assert manager.latest(state) == latest
        assert manager.latest(state).timestamp == latest.timestamp
        assert dump(manager.minimum(state)) == dump(chain[:n])
        assert manager.gc(state) == [] or manager.latest(state) == latest
        again = state.begin_applying(chain)
        assert again.begin == base.begin
        assert state.end_applying(chain[:n]).begin == apply_all(base.begin, chain[:n])


@given(SEEDS, st.integers(0, 12), st.integers(1, 4))
def test_work_lists(seed: int, n_applied: int, n_max: int) -> None:
    """Lists hold together: everything offered can be had, in rounds too, and nothing stops short."""
    history = label_history(seed)
    manager, base = history.manager, history.base
    chain = manager.chain(base.begin)
    state = base.begin_applying(chain[:n_applied])
    needed = manager.minimum(state)
    points = manager.restorable(state, all_points=True)
    gids = [point.gid for point in points]
    assert gids == sorted(set(gids))
    base_row = [point for point in points[:1] if apply_all(base.begin, needed) == Snapshot.clean(point.gid)]
    assert manager.restorable(state) == base_row + [point for point in points if point.explicit]
    top = manager.latest(state).begin
    for gid in range(top.gid_b + 3):
        if gid in gids:
            now, rounds = state, 0
            while now.begin != Snapshot.clean(gid) or now.is_applying:
                part = manager.to_restore(now, gid, n_max=n_max)
                assert part
                assert len(part) <= max(n_max, len(manager.minimum(now)))
                now = now.end_applying(part)
                rounds += 1
            assert rounds <= len(chain)
            assert dump(manager.to_materialise(state, gid, clean=True)) == dump(manager.to_scan(state, gid))
        else:
            with pytest.raises(NotReachable):
                manager.to_restore(state, gid)
        now, last = state, -1
        while part := manager.to_apply(now, gid, n_max=n_max):
            assert now.begin.gid_b > last
            last = now.begin.gid_b
            now = now.end_applying(part)
        assert not now.is_applying
        assert now.begin == apply_all(
            base.begin, chain[: max(len(needed), len(manager.chain_to_gid(base.begin, gid)))]
        )


@given(SEEDS)
def test_oldest_clean_is_the_first_restorable(seed: int) -> None:
    history = label_history(seed)
    points = history.manager.restorable(history.base, all_points=True)
    if points:
        found = history.manager.oldest_clean(history.base)
        assert (found.begin, found.timestamp) == (Snapshot.clean(points[0].gid), points[0].timestamp)
    else:
        with pytest.raises(NotReachable):
            history.manager.oldest_clean(history.base)


# --- the traps


def at(text: str, **flags: bool) -> Diff:
    begin, end = (int(gid) for gid in text.split(">"))
    return Diff(Snapshot.clean(begin), Snapshot.clean(end), **flags)


def test_minimum_when_the_chain_jumps_over_the_target() -> None:
    """A merged diff that overlaps may lead past the target from below; the target is then reached without it."""
    manager = DiffManager([at("0>2"), at("2>4"), at("2>9", mergeable=True)])
    state = BaseState.parse("<|0|-->|4|>")
    assert manager.minimum(state) == [at("0>2"), at("2>4")]
    assert manager.to_apply(state, 1) == [at("0>2"), at("2>4")]
    assert [point.gid for point in manager.restorable(state)] == [4, 9]
    assert manager.to_restore(state, 4) == [at("0>2"), at("2>4")]
    assert manager.to_restore(state, 9) == [at("0>2"), at("2>4"), at("2>9")]
    assert manager.gc(state) == []


def test_minimum_when_only_a_larger_diff_is_left() -> None:
    manager = DiffManager([at("0>7")])
    state = BaseState.parse("<|0|-->|4|>")
    assert manager.minimum(state) == [at("0>7")]
    assert manager.to_apply(state, 1, n_max=1) == [at("0>7")]
    assert [point.gid for point in manager.restorable(state)] == [7]
    with pytest.raises(NotReachable):
        manager.to_restore(state, 4)


@pytest.mark.parametrize("left", [[], [at("0>2")], [at("2>4")], [at("1>4")]])
def test_an_apply_that_cannot_be_finished_is_reported(left: list[Diff]) -> None:
    manager = DiffManager(left)
    state = BaseState.parse("<|0|-->|4|>")
    for ask in (
        lambda: manager.minimum(state),
        lambda: manager.to_apply(state, 4),
        lambda: manager.to_restore(state, 4),
        lambda: manager.restorable(state),
        lambda: manager.latest(state),
        lambda: manager.oldest_clean(state),
        lambda: manager.gc(state),
    ):
        with pytest.raises(HistoryBroken):
            ask()
    assert list(manager) == left


def test_no_base_has_nothing() -> None:
    manager = DiffManager([at("0>7")])
    assert manager.restorable(NO_BASE, all_points=True) == []
    assert manager.latest(NO_BASE) == NO_BASE
    assert manager.to_apply(NO_BASE, 7) == []
    with pytest.raises(NotReachable):
        manager.oldest_clean(NO_BASE)
    with pytest.raises(NotReachable):
        manager.to_restore(NO_BASE, NO_BASE.begin.gid_b)


def test_compared_diffs_are_taken_only_from_their_own_image() -> None:
    manager = DiffManager([at("1>9", comp=True), at("0>2"), at("2>3")])
    assert manager.chain(Snapshot.clean(0)) == [at("0>2"), at("2>3")]
    assert manager.chain(Snapshot.clean(1)) == [at("1>9")]
    assert manager.merge_candidates(1) == [at("1>9")]
    manager.add(at("1>5", comp=True))
    manager.erase(at("1>9"))
    assert manager.chain(Snapshot.clean(1)) == [at("1>5")]  # the other one of the same image is still there
    manager.erase(at("1>5"))
    assert manager.chain(Snapshot.clean(1)) == [at("0>2"), at("2>3")]


def test_a_scan_may_open_as_many_files_as_allowed() -> None:
    manager = DiffManager([at("0>1"), at("1>2"), at("2>3")])
    state = BaseState.parse("<|0|>")
    assert manager.to_scan(state, 3, n_max=3) == list(manager)
    with pytest.raises(NotReachable, match="too many diffs"):
        manager.to_scan(state, 3, n_max=2)
    with pytest.raises(NotReachable, match="no diff ends"):
        DiffManager([at("1>2")]).to_scan(BaseState.parse("<|1|>"), 0)


def test_many_diffs_are_walked_in_one_sweep() -> None:
    """43,000 diffs are a day of snapshots every 2 seconds; nothing may look at all of them for each step."""
    manager = CountingManager(at(f"{gid}>{gid + 1}", mergeable=True) for gid in range(2000))
    manager.add(at("0>2000", mergeable=True))
    manager.looked = 0
    assert len(manager.chain_to_gid(Snapshot.clean(500), 1900)) == 0  # the long one is best
    assert manager.looked < 10
    manager.erase(at("0>2000"))
    manager.looked = 0
    assert len(manager.chain_to_gid(Snapshot.clean(500), 600)) == 100
    assert len(manager.over(1500)) == 1
    assert len(manager.to_send(size_max_b=1, n_max=10)) == 10
    assert manager.looked < 300


class CountingManager(DiffManager):
    looked = 0

    def _between(self, gid_begin: int, gid_end: int | None) -> Iterator[_Entry]:
        for entry in super()._between(gid_begin, gid_end):
            self.looked += 1
            yield entry

    def _over(self, gid: int) -> Iterator[_Entry]:
        for entry in super()._over(gid):
            self.looked += 1
            yield entry


@given(st.lists(diffs(gid_max=6), max_size=12))
def test_can_merge_tells_what_merge_does(found: list[Diff]) -> None:
    for first, second in itertools.permutations(found, 2):
        if not can_merge(first, second):
            with pytest.raises(NotMergeable):
                merge(first, second)
            assert not can_merge_all([first, second])
            continue
        merged = merge(first, second)
        assert can_merge_all([first, second])
        assert merge_all([first, second]).describe() == merged.describe()
        assert (merged.mergeable, merged.comp) == (first.mergeable, False)
        assert (merged.timestamp, merged.size_b) == (second.timestamp, 0)
        assert contains(merged, first)
        assert contains(merged, second)


def test_merging_none_and_one() -> None:
    assert not can_merge_all([])
    with pytest.raises(NotMergeable):
        merge_all([])
    alone = Diff(Snapshot.clean(0), Snapshot.clean(1), comp=True, size_b=5)
    assert can_merge_all([alone])
    assert merge_all([alone]) is alone


def test_a_merge_that_would_lead_backward_is_refused() -> None:
    first = Diff(Snapshot(Gid(0), Gid(9)), Snapshot(Gid(3), Gid(9)))
    second = Diff(Snapshot.clean(3), Snapshot(Gid(4), Gid(8)), mergeable=True)
    assert not can_merge(first, second)
    with pytest.raises(NotMergeable):
        merge(first, second)


@given(diffs(gid_max=6), snapshots(8))
def test_trim(diff: Diff, start: Snapshot) -> None:
    if not can_apply(start, [diff]):
        with pytest.raises(NotApplicable):
            trim(diff, start)
        return
    trimmed = trim(diff, start)
    assert apply_all(start, [trimmed]) == apply_all(start, [diff])
    assert contains(diff, trimmed)
    assert (trimmed.end, trimmed.comp, trimmed.timestamp, trimmed.size_b) == (
        diff.end,
        diff.comp,
        diff.timestamp,
        diff.size_b,
    )
    begin = Snapshot.clean(start.gid_b) if diff.is_clean else start
    leads_on = begin.gid_e <= diff.end.gid_e  # a label must not lead backward
    if diff.begin.gid_b < start.gid_b and not diff.comp and leads_on:
        assert trimmed.begin == begin
        assert trimmed.mergeable
    else:
        assert trimmed is diff


def test_trimmed_diffs_do_not_lead_past_a_protected_snapshot() -> None:
    """As documented: 2 was protected here while the sender, which had no acknowledgement, merged over it."""
    base = BaseState(Snapshot.clean(1))
    arrived = at("1>5", mergeable=True)
    for stored, gids in ((arrived, [1, 5]), (trim(arrived, Snapshot.clean(3)), [1, 2, 5])):
        manager = DiffManager([at("1>2", mergeable=True), at("2>3", mergeable=False), stored])
        assert [point.gid for point in manager.restorable(base)] == gids


def test_history_makes_what_it_says() -> None:
    history: LabelHistory = label_history(random.Random(7).randrange(1000), 30)
    assert any(not diff.is_clean for diff in history.manager)
    assert history.latest.gid_b > Gid(5)
