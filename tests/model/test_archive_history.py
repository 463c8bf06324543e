"""Random histories against the archive's own code, on a disk that loses what was not synced."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.kit.real_archive import RealHistory

CHUNK = 50


def live(seed: int) -> Counter[str]:
    """Run one history; return what happened in it."""
    history = RealHistory(seed)
    try:
        history.run(35)
    except Exception as exc:
        raise AssertionError(f"history {seed}: {exc!r}") from exc
    finally:
        history.close()
    return history.real.events


@pytest.mark.parametrize("first", range(0, 200, CHUNK))
def test_restored_by_a_real_archive(first: int) -> None:
    seen: Counter[str] = Counter()
    for seed in range(first, first + CHUNK):
        seen += live(seed)
    assert seen["restart"] > 5
    assert seen["merge"] > 0
    assert seen["hash backup"] > 0
