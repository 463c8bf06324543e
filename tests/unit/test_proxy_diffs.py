"""Sets of wdiffs in memory."""

import dataclasses
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kit.fake_archive import clean
from walbd.daemon.env import Env
from walbd.format.meta import DiffIndex
from walbd.proxy.diffs import DiffSet
from walbd.proxy.queries import waiting
from walbd.proxy.store import ArchiveEntry
from walbd.proxy.volume import Hop, Volume


def test_empty() -> None:
    diffs = DiffSet()
    assert not diffs
    assert (diffs.first, diffs.newest(), diffs.gid_e, diffs.size_b) == (None, None, 0, 0)
    assert diffs.to_send(size_max_b=1, n_max=1) == []
    assert diffs.remove([(clean(0, 1), 0)]) == []


def test_replacing_keeps_the_last_and_its_receipt() -> None:
    diffs = DiffSet(DiffIndex([clean(0, 1)]), receipt=3)
    old = diffs.to_send(size_max_b=1, n_max=1)
    newer = clean(0, 1, mergeable=False, timestamp=5)
    diffs.put(newer, 4)
    assert len(diffs) == 1
    found = diffs.find(clean(0, 1))
    assert found is not None
    assert (found.timestamp, found.mergeable) == (newer.timestamp, False)
    assert diffs.remove(old) == []  # that was the one before
    assert diffs.remove([(newer, 4)]) == [newer]
    assert not diffs


@settings(max_examples=60)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(1, 4)), max_size=30))
def test_like_a_dictionary(steps: list[tuple[bool, int, int]]) -> None:
    diffs, model = DiffSet(), {}
    for receipt, (is_put, begin, length) in enumerate(steps, 1):
        diff = clean(begin, begin + length)
        if is_put:
            diffs.put(diff, receipt)
            model[diff] = receipt
        else:
            known = model.pop(diff, None)
            assert diffs.remove([(diff, -1 if known is None else known)]) == ([] if known is None else [diff])
        assert set(diffs) == set(model)
        assert {diff: diffs.receipt(diff) for diff in diffs} == model
        assert diffs.gid_e == max((diff.end.gid_b for diff in model), default=0)
        assert diffs.newest() == max(model, key=lambda diff: (diff.end.gid_b, diff.begin.gid_b), default=None)
        first = diffs.first
        assert (None if first is None else first.begin.gid_b) == min((d.begin.gid_b for d in model), default=None)


@settings(max_examples=40)
@given(st.lists(st.frozensets(st.integers(0, 9)), min_size=1, max_size=4))
def test_what_waits_for_several_archives_counts_once(gids: list[frozenset[int]]) -> None:
    env = Env()
    volume = Volume(env, "vol0", Path("/nowhere"))
    sizes = {gid: 100 + gid for gid in range(10)}
    sets = [
        DiffSet(DiffIndex([dataclasses.replace(clean(g, g + 1), size_b=sizes[g]) for g in each])) for each in gids
    ]
    volume.received = sets[0]
    entry = ArchiveEntry(address="127.0.0.1:1", compress="none")
    volume.hops = {f"a{i}": Hop(f"a{i}", entry, diffs) for i, diffs in enumerate(sets[1:])}
    union = frozenset[int]().union(*gids)
    assert waiting(volume) == (len(union), sum(sizes[gid] for gid in union))
    env.pools.close()
