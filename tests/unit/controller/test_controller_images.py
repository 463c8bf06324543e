"""Snapshots, and restoring them."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.errors import (
    AlreadyExists,
    BadState,
    ConnectError,
    NotFound,
    Refused,
    TimedOut,
)
from walbd.protocol import control as c


def test_snapshot(ready: FakeGroup) -> None:
    ctl, s0, a0 = ready.ctl, ready.s[0], ready.a[0]
    assert ctl.snapshot_nbk(s0, "vol0") == 4
    assert ctl.snapshot(s0, "vol0", [a0]) == 5
    assert ctl.snapshot(s0, "vol0", []) == 6
    ready.frozen = True
    with pytest.raises(TimedOut):
        ctl.snapshot(s0, "vol0", [a0], timeoutS=0.05)


def test_snapshot_is_refused_before_it_is_taken(ready: FakeGroup) -> None:
    ctl, s0, a0 = ready.ctl, ready.s[0], ready.a[0]
    ready.volume("a0").state = "Stopped"
    with pytest.raises(BadState):
        ctl.snapshot(s0, "vol0", [a0])
    ready.volume("a0").state = "Archived"
    ready.volume("s0").state = "Stopped"
    with pytest.raises(BadState):
        ctl.snapshot(s0, "vol0", [a0])
    ready.kill("a0")
    with pytest.raises(ConnectError):
        ctl.snapshot(s0, "vol0", [a0])
    assert ready.changes() == []


def test_wait_for_restorable(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ctl.wait_for_restorable(a0, "vol0", 3, 0)
    with pytest.raises(TimedOut):
        ctl.wait_for_restorable(a0, "vol0", 4, 0.01)
    ctl.verify_not_restorable(a0, "vol0", 4, 0.01, "x")
    with pytest.raises(Refused, match="must not be there"):
        ctl.verify_not_restorable(a0, "vol0", 3, 0.01, "must not be there")
    ready.kill("a0")
    ctl.verify_not_restorable(a0, "vol0", 3, 0, "x")


def test_restore(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ctl.restore(a0, "vol0", 2)
    assert ctl.get_restored(a0, "vol0") == [2]
    assert ctl.get_restored_path(a0, "vol0", 2) == "/images/vol0/2"
    with pytest.raises(AlreadyExists) as caught:
        ctl.restore(a0, "vol0", 2)
    assert "del-restored vol0 2" in caught.value.hint
    with pytest.raises(NotFound):
        ctl.restore(a0, "vol0", 9)
    ctl.del_restored(a0, "vol0", 2)
    assert ctl.get_restored(a0, "vol0") == []
    with pytest.raises(NotFound):
        ctl.del_restored(a0, "vol0", 2)
    assert ready.changes().count("a0 del-restored vol0") == 1


def test_restore_that_fails(ready: FakeGroup) -> None:
    ready.fail_job("restore", Refused("no space"))
    with pytest.raises(Refused, match="no space"):
        ready.ctl.restore(ready.a[0], "vol0", 2)
    with pytest.raises(NotFound, match="without an image"):
        ready.ctl.wait_for_restored(ready.a[0], "vol0", 2, 1)


def test_restore_in_two_halves(ready: FakeGroup) -> None:
    ready.hold("restore")
    ready.ctl.run_ctl(ready.a[0], ["restore", "vol0", "2"])
    with pytest.raises(TimedOut):
        ready.ctl.wait_for_restored(ready.a[0], "vol0", 2, 0.05)
    ready.release("restore")
    ready.ctl.wait_for_restored(ready.a[0], "vol0", 2)


def test_del_restored_tries_again(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    slept: list[float] = []
    monkeypatch.setattr(ctl.calls, "sleep", slept.append)
    ctl.restore(a0, "vol0", 2)
    ready.fail("a0", c.DelRestored, Refused("in use"), times=2)
    ctl.del_restored(a0, "vol0", 2)
    assert slept == [1, 1]
    ctl.restore(a0, "vol0", 2)
    ready.fail("a0", c.DelRestored, Refused("in use"), times=3)
    with pytest.raises(Refused, match="in use"):
        ctl.del_restored(a0, "vol0", 2)
    assert ctl.get_restored(a0, "vol0") == [2]
