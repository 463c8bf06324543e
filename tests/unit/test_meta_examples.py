"""Every line of meta_examples.txt."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from walbd.format import meta
from walbd.format.meta import BaseState, Diff, DiffManager, NotApplicable, NotMergeable, NotReachable, Snapshot
from walbd.ids import Gid, Lsid

LINES = (Path(__file__).parent / "meta_examples.txt").read_text().splitlines()
EXAMPLES = [line for line in LINES if not line.startswith("#")]
SNAP = r"\|[0-9,]+\|"


def snap(text: str) -> Snapshot:
    return Snapshot.parse(text)


def diff(text: str) -> Diff:
    match = re.fullmatch(rf"({SNAP})-->({SNAP})(?: (M?C?))?", text)
    assert match is not None, text
    flags = match[3] or ""
    return Diff(snap(match[1]), snap(match[2]), mergeable="M" in flags, comp="C" in flags)


def diffs(text: str) -> list[Diff]:
    return [diff(part) for part in re.split(r", (?=\|)", text)]


SETS = {
    match[1]: diffs(match[2])
    for line in LINES
    if (match := re.fullmatch(r"# Set ([AF]): (.*)\.", line)) is not None
}


def a_set(text: str) -> list[Diff]:
    """`set A`, `set A plus merged D`, or the diffs themselves."""
    if match := re.fullmatch(r"set ([AF])(?: plus merged (.*))?", text):
        return SETS[match[1]] + (diffs(match[2]) if match[2] else [])
    return diffs(text)


def labels(found: list[Diff]) -> str:
    return ", ".join(str(one) for one in found)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"[0-9]+", text)]


def relation(given: str) -> str:
    left, right = given.split("; ")
    return meta.relation(snap(left.removeprefix("snap ")), diff(right.removeprefix("diff ")))


def apply(given: str) -> str:
    left, right = given.split("; ")
    start, steps = snap(left.removeprefix("snap ")), diffs(right)
    if not meta.can_apply(start, steps):
        with pytest.raises(NotApplicable):
            meta.apply_all(start, steps)
        return "error"
    return str(meta.apply_all(start, steps))


def merge(given: str) -> str:
    first, second = diffs(given)
    if not meta.can_merge(first, second):
        with pytest.raises(NotMergeable):
            meta.merge(first, second)
        return "not mergeable: refuse"
    merged = meta.merge(first, second)
    assert not merged.comp
    return f"{merged}, {'mergeable' if merged.mergeable else 'not mergeable'}"


def state_and_diffs(given: str) -> tuple[BaseState, list[Diff]]:
    left, right = given.split("; ")
    return BaseState.parse(left.removeprefix("state ")), diffs(right)


def can_apply_state(given: str) -> str:
    state, steps = state_and_diffs(given)
    return "yes" if state.can_apply(steps) else "no"


def begin_applying(given: str) -> str:
    state, steps = state_and_diffs(given)
    return str(state.begin_applying(steps))


def end_applying(given: str) -> str:
    state, steps = state_and_diffs(given)
    return str(state.end_applying(steps))


def chain(given: str) -> str:
    which, start = given.split("; ")
    return labels(DiffManager(a_set(which)).chain(snap(start.removeprefix("from "))))


def chain_to_gid(given: str) -> str:
    which, rest = given.split("; ")
    start, gid = rest.removeprefix("from ").split(", gid ")
    return labels(DiffManager(a_set(which)).chain_to_gid(snap(start), int(gid)))


def restorable(given: str, *, all_points: bool = False) -> str:
    which, base = given.split("; base ")
    points = DiffManager(a_set(which)).restorable(BaseState.parse(base), all_points=all_points)
    return "; ".join(f"{point.gid} ({'explicit' if point.explicit else 'implicit'})" for point in points)


def work(given: str) -> tuple[DiffManager, BaseState, int, int]:
    which, rest = given.split("; base ")
    base, *arguments = rest.split(", ")
    options = dict(argument.split(" ") for argument in arguments)
    return DiffManager(a_set(which)), BaseState.parse(base), int(options["gid"]), int(options.get("max", 0))


def to_apply(given: str) -> str:
    manager, base, gid, n_max = work(given)
    return labels(manager.to_apply(base, gid, n_max=n_max))


def to_restore(given: str) -> str:
    manager, base, gid, n_max = work(given)
    try:
        return labels(manager.to_restore(base, gid, n_max=n_max))
    except NotReachable:
        return "impossible"


def to_scan(given: str) -> str:
    manager, base, gid, n_max = work(given)
    try:
        return labels(manager.to_scan(base, gid, n_max=n_max))
    except NotReachable:
        return "impossible"


def merge_candidates(given: str) -> str:
    which, gid = given.split("; gid ")
    return labels(DiffManager(a_set(which)).merge_candidates(int(gid)))


def gc(given: str) -> str:
    which, start = given.split("; from ")
    return f"removes {labels(DiffManager(a_set(which)).gc(BaseState(snap(start))))}"


def erase_before(given: str) -> str:
    which, gid = given.split("; gid ")
    return f"removes {labels(DiffManager(a_set(which)).erase_before(int(gid)))}"


def gc_range(given: str) -> str:
    which, limits = given.split("; ")
    return f"removes {labels(DiffManager(a_set(which)).gc_range(*numbers(limits)))}"


def change_snapshot(given: str, *, enable: bool) -> str:
    which, gid = given.split("; gid ")
    manager = DiffManager(a_set(which))
    found, changed = manager.change_snapshot(int(gid), enable=enable)
    assert all(manager.find(new.begin, new.end) is new for _, new in changed)
    if not found:
        return "not found"
    return "; ".join(["found", *(f"{new} {new.flags.replace('-', '')} (new flags)" for _, new in changed)])


def oldest_clean(given: str) -> str:
    which, base = given.split("; base ")
    return str(DiffManager(a_set(which)).oldest_clean(BaseState.parse(base)))


def hash_backup(given: str) -> str:
    left, right = given.split(", storage takes end gid ")
    latest = snap(left.removeprefix("latest "))
    made = meta.hash_backup_diff(latest, Snapshot(meta.hash_backup_gid(latest), Gid(int(right))), 0)
    return (
        f"diff {made}, {'mergeable' if made.mergeable else 'not mergeable'},"
        f" {'compared' if made.comp else 'not compared'}"
    )


def take_snapshot(given: str) -> str:
    lsid, gid, now, *limit = numbers(given)
    newest = meta.LogPoint(Lsid(lsid), Gid(gid), mergeable=True, timestamp=0)
    done = meta.LogPoint(Lsid(0), Gid(0), mergeable=False, timestamp=0)
    point = meta.new_point(done, [newest], now, explicit=False, now=0, size_max_pb=limit[0] if limit else 10)
    return f"gid {point.gid}"


def partial_transfer(given: str) -> str:
    gid, timestamp, gid_end = numbers(given)
    done = meta.LogPoint(Lsid(100), Gid(gid), mergeable="explicit" not in given, timestamp=timestamp)
    end = meta.LogPoint(Lsid(130), Gid(gid_end), mergeable=False, timestamp=timestamp + 5)
    plan = meta.plan_transfer(done, [end], 130, size_max_pb=10)
    assert plan is not None
    sent, after = meta.transfer_diff(plan, 108), meta.point_after(plan, 108)
    assert sent.timestamp == end.timestamp
    return (
        f"diff {sent} {'mergeable' if sent.mergeable else 'not mergeable'}; done becomes gid {after.gid},"
        f" {'mergeable' if after.mergeable else 'not mergeable'}, ts {after.timestamp}"
    )


OPERATIONS: dict[str, Callable[[str], str]] = {
    "relation": relation,
    "apply": apply,
    "merge": merge,
    "canApply(state)": can_apply_state,
    "beginApplying": begin_applying,
    "endApplying": end_applying,
    "chain": chain,
    "chain to gid": chain_to_gid,
    "restorable": restorable,
    "restorable all": lambda given: restorable(given, all_points=True),
    "list to apply": to_apply,
    "list to restore": to_restore,
    "list to scan": to_scan,
    "merge candidates": merge_candidates,
    "gc": gc,
    "erase before": erase_before,
    "gc range": gc_range,
    "disable snapshot": lambda given: change_snapshot(given, enable=False),
    "enable snapshot": lambda given: change_snapshot(given, enable=True),
    "oldest clean": oldest_clean,
    "hash backup": hash_backup,
    "take snapshot": take_snapshot,
    "partial transfer": partial_transfer,
}


@pytest.mark.parametrize("line", EXAMPLES, ids=[line[:2] for line in EXAMPLES])
def test_example(line: str) -> None:
    _, operation, given, expected, *_ = line.split(" :: ")
    assert OPERATIONS[operation](given) == expected


def test_all_are_there() -> None:
    assert [line[:2] for line in EXAMPLES] == [f"{number:02}" for number in range(1, 66)]
