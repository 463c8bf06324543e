"""2,000 random histories: what an archive restores is what the volume held (docs/metadata.md)."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.kit.history import History

N_HISTORIES = 2000
CHUNK = 100


@pytest.mark.parametrize("first", range(0, N_HISTORIES, CHUNK))
def test_labels(first: int) -> None:
    """Every restorable generation equals the plain array, and every protected one is restorable."""
    for seed in range(first, first + CHUNK):
        try:
            History(seed).run()
        except Exception as exc:
            raise AssertionError(f"history {seed}: {exc}") from exc


def test_histories_meet_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        history = History(seed)
        history.run()
        seen += history.archive.events
    for event, count in {
        "overlapping diff received": 20,
        "merged diff received": 100,
        "restart": 100,
        "restart in progress": 20,
        "garbage at restart": 10,
        "apply finished later": 20,
        "merge": 50,
        "check in progress": 10,
        "check of a dirty latest": 20,
        "failed backup": 20,
        "hash backup": 100,
        "hash backup in progress": 5,
        "hash backup of a dirty latest": 10,
    }.items():
        assert seen[event] >= count, (event, seen)
