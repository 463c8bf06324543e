"""A group of fakes with its group file, and `walbc` to be run on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Cli
from tests.kit.fake_group import FakeGroup
from tests.kit.walbc_cli import Make, group_toml
from walbd.cli.walbc import root


@pytest.fixture
def group_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Writes the group file of a fake group, and names it in the environment."""

    def write(group: FakeGroup, more: str = "") -> None:
        path = tmp_path / "group.toml"
        path.write_text(group_toml(group) + more)
        monkeypatch.setenv("WALBD_GROUP", str(path))

    return write


@pytest.fixture
def group(group_file: Make) -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        group_file(made, "")
        yield made


@pytest.fixture
def ready(group: FakeGroup) -> FakeGroup:
    """vol0 is backed up; snapshots 1 and 2."""
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.ctl.full_backup(group.s[0], "vol0")
    group.ctl.snapshot(group.s[0], "vol0", group.a)
    group.requests.clear()
    return group


@pytest.fixture
def walbc(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    monkeypatch.setenv("COLUMNS", "100")
    return Cli(root, "walbc", capsys)
