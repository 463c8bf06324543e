"""Everything at once at several archives, on virtual time: every promise is kept, every image is exact."""

from __future__ import annotations

from collections import Counter

from tests.kit.storm_life import live

SEEDS = range(6)
MET = {
    "accept",
    "all checked",
    "AddHold",
    "Apply",
    "BlockHash",
    "EnableSnapshot",
    "Merge",
    "Restore",
    "comparing",
    "copy: full",
    "copy: rounds",
    "crash",
    "disk failed",
    "gap",
    "too-old-diff",
}


def test_storms() -> None:
    events: Counter[str] = Counter()
    for seed in SEEDS:
        events += live(seed)
    assert events["compared"] > 300
    assert events.keys() >= MET, MET - events.keys()
