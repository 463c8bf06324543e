"""Scenario files (tests/scenario_files): what a group of real processes says to commands and faults."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.kit.script import difference, run_script

FILES = sorted((Path(__file__).parent.parent / "scenario_files").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_scenario(path: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    expected = path.read_text()
    got = run_script(expected, tmp_path)
    if request.config.getoption("--rewrite"):
        path.write_text(got)
        return
    if diff := difference(expected, got, path.name):
        pytest.fail(diff, pytrace=False)


def test_there_are_scenarios() -> None:
    assert len(FILES) > 4
