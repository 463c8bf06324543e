"""Groups of fake servers for tests of the controller."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kit.fake_group import FakeGroup


@pytest.fixture
def group() -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        yield made


@pytest.fixture
def big() -> Iterator[FakeGroup]:
    with FakeGroup(storages=2, proxies=2, archives=2) as made:
        yield made


@pytest.fixture
def ready(group: FakeGroup) -> FakeGroup:
    """One volume that is backed up, with snapshots 1, 2 and 3 at the archive."""
    backed_up(group)
    group.ctl.snapshot(group.s[0], "vol0", group.a)
    group.ctl.snapshot(group.s[0], "vol0", group.a)
    group.requests.clear()
    return group


def backed_up(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    assert group.ctl.full_backup(group.s[0], "vol0") == 1
