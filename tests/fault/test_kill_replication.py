"""Either side of a replication is killed at each of its failpoints: given again, it brings all, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.fault.test_kill_at_failpoints import REPLICATION_POINTS, drive
from tests.kit.group import WAIT_S, Group


class Rig:
    """A volume at a primary archive, and its replica."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.volume = group.add_volume("vol0", size_b=2 << 20, log_b=8 << 20)
        self.volume.scribble()
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=WAIT_S)
        self.snapshot()
        self.replicate()

    def snapshot(self) -> int:
        self.volume.scribble(5)
        return self.group.snapshot(self.volume, archives=[0])

    def replicate(self, *, resync: bool = False) -> int:
        group = self.group
        return group.ctl.replicate_once(group.a[0], "vol0", group.a[1], timeoutS=WAIT_S, doResync=resync)

    def full(self) -> None:
        self.group.ctl.clear(self.group.a[1], "vol0")
        self.replicate()

    def resync(self) -> None:
        self.replicate(resync=True)

    def round(self) -> None:
        self.snapshot()
        self.replicate()


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Group(tmp_path_factory.mktemp("group"), archives=2) as group:
        yield Rig(group)


@pytest.mark.parametrize("name", REPLICATION_POINTS)
def test_replication(rig: Rig, name: str) -> None:
    group = rig.group
    process = group.processes["a0" if ".repl_source." in name else "a1"]
    kind = name.split(".")[1].removeprefix("repl_")
    work = {"full": rig.full, "resync": rig.resync}.get(kind, rig.round)
    process.restart(failpoints=f"{name}=crash")
    died, failed = drive(process, work)
    assert died, f"{process.name} never came to {name}"
    assert failed, "nobody was told"
    goal = rig.snapshot()
    if kind == "resync":
        rig.replicate(resync=True)
    assert rig.replicate() >= goal
    found = group.check_all(rig.volume, implicit_max=2)
    assert goal in found["a0"]
    assert goal in found["a1"]
