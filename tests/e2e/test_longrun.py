"""Short versions of the long runs (tests/longrun)."""

from __future__ import annotations

from pathlib import Path

from tests.longrun.kills import run_kills
from tests.longrun.mixed import MixedRun


def test_everything_is_killed_again_and_again(tmp_path: Path) -> None:
    run_kills(tmp_path, seed=1, seconds=30, implicit_max=20)


def test_operations_and_faults_mixed(tmp_path: Path) -> None:
    MixedRun(tmp_path, seed=2).run(60)
