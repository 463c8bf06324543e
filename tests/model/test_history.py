"""2,000 random histories: what an archive restores is what the volume held (docs/metadata.md).

Every generation that can be restored must equal the plain array, and every snapshot that is protected must be
among them, after writes, discards, lost acknowledgements, overflows, backups, applies, merges and crashes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.history import DiffStore, History, MemoryStore
from tests.kit.wdiff_store import FilePool, WdiffStore

N_HISTORIES = 2000
CHUNK = 50


def live(seed: int, make_store: Callable[[str], DiffStore]) -> Counter[str]:
    """Run one history; return what happened in it. A failure names the seed, which makes it happen again."""
    history = History(seed, make_store)
    try:
        history.run()
    except Exception as exc:
        raise AssertionError(f"history {seed}: {exc!r}") from exc
    finally:
        history.close()
    return history.archive.events


@pytest.mark.parametrize("first", range(0, N_HISTORIES, CHUNK))
def test_restored_from_wdiff_files(first: int, tmp_path: Path) -> None:
    """Log packs, indexed and sorted wdiffs, merges, applies and virtual images, all real."""
    pool = FilePool(tmp_path)
    for seed in range(first, first + CHUNK):
        live(seed, lambda name, seed=seed: WdiffStore(tmp_path / str(seed) / name, pool))  # type: ignore[misc]
    pool.close()


@pytest.mark.parametrize("first", range(N_HISTORIES, N_HISTORIES + 300, CHUNK))
def test_restored_from_dictionaries(first: int) -> None:
    """The rules alone: a failure here is not the files' fault."""
    for seed in range(first, first + CHUNK):
        live(seed, lambda _: MemoryStore())


def test_histories_meet_what_they_are_for() -> None:
    seen: Counter[str] = Counter()
    for seed in range(200):
        seen += live(seed, lambda _: MemoryStore())
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
