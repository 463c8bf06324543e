"""Life of a volume: make known, start, stop, reset, forget."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import FakeGroup, FakeVolume
from walbd.errors import (
    BadState,
    ConnectError,
    Refused,
    TimedOut,
)
from walbd.protocol import control as c


def test_init_storage(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    assert group.changes() == ["s0 storage-init-vol vol0", "s0 start vol0"]
    assert group.volume("s0").device == "/dev/x"
    assert group.volume("s0").state == "Standby"
    with pytest.raises(BadState):
        group.ctl.init_storage(group.s[0], "vol0", "/dev/y")
    assert group.volume("s0").device == "/dev/x"


def test_start_and_stop(ready: FakeGroup) -> None:
    ctl, s0, p0, a0 = ready.ctl, ready.s[0], ready.p[0], ready.a[0]
    for s, running in ((s0, "Target"), (p0, "Started"), (a0, "Archived")):
        with pytest.raises(BadState):
            ctl.start(s, "vol0")  # runs already
        ctl.stop(s, "vol0")
        assert ctl.get_state(s, "vol0") == "Stopped"
        ctl.stop(s, "vol0", "force")  # again: the goal holds
        ctl.start(s, "vol0")
        assert ctl.get_state(s, "vol0") == running
    ctl.stop(p0, "vol0", "empty")
    assert ready.changes()[-1] == "p0 stop vol0"


def test_stop_in_two_halves(ready: FakeGroup) -> None:
    ready.hold("stop")
    before = ready.ctl.stop_nbk(ready.s[0], "vol0")
    assert before == "Target"
    with pytest.raises(TimedOut) as caught:
        ready.ctl.wait_for_stopped(ready.s[0], "vol0", before, timeoutS=0.05)
    assert "walbc wait s0" in caught.value.hint
    ready.release("stop")
    ready.ctl.wait_for_stopped(ready.s[0], "vol0", before)
    ready.ctl.wait_for_stopped(ready.s[0], "vol0", before)  # it holds still
    assert ready.ctl.get_state(ready.s[0], "vol0") == "Stopped"


def test_stop_that_fails_raises_its_error(ready: FakeGroup) -> None:
    ready.frozen = True
    ready.volume("p0").waiting["a0"] = [9]
    with pytest.raises(Refused, match="not empty") as caught:
        ready.ctl.stop(ready.p[0], "vol0", "empty")
    assert caught.value.facts["name"] == "stop"
    assert ready.ctl.get_state(ready.p[0], "vol0") == "Started"


def test_stop_of_what_cannot_be_stopped(group: FakeGroup) -> None:
    with pytest.raises(BadState):
        group.ctl.stop(group.s[0], "vol0")
    group.servers["s0"].volumes["vol0"] = FakeVolume("SyncReady")
    with pytest.raises(BadState):
        group.ctl.stop(group.s[0], "vol0")


def test_stop_of_a_running_backup(group: FakeGroup) -> None:
    group.hold("full-backup")
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    assert group.ctl.full_backup(group.s[0], "vol0", block=False) is None
    group.fail_job("stop", BadState("the volume is SyncReady"))  # as a storage tells of a backup given up
    group.volume("s0").state = "FullSync"
    before = group.ctl.stop_nbk(group.s[0], "vol0", "force")
    assert before == "FullSync"
    group.volume("s0").state = "SyncReady"
    group.ctl.wait_for_stopped(group.s[0], "vol0", before)


def test_stop_standby_goes_to_sync_ready(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.ctl.stop(group.s[0], "vol0")
    assert group.ctl.get_state(group.s[0], "vol0") == "SyncReady"


def test_reset_and_clear(ready: FakeGroup) -> None:
    ctl = ready.ctl
    for s in (ready.s[0], ready.a[0]):
        with pytest.raises(BadState):
            ctl.reset(s, "vol0")
    for s in (ready.s[0], ready.a[0], ready.p[0]):
        ctl.clear(s, "vol0")
        assert ctl.get_vol_list(s) == []
        ctl.clear(s, "vol0")  # nothing is left to do
    assert ready.changes() == [
        "s0 stop vol0", "s0 reset-vol vol0", "s0 clear-vol vol0",
        "a0 stop vol0", "a0 clear-vol vol0",
        "p0 stop vol0", "p0 clear-vol vol0",
    ]  # fmt: skip


def test_clear_in_a_passing_state_is_refused(ready: FakeGroup) -> None:
    for name, s, state in (
        ("s0", ready.s[0], "FullSync"),
        ("p0", ready.p[0], "WaitForEmpty"),
        ("a0", ready.a[0], "FullSync"),
    ):
        ready.volume(name).state = state
        with pytest.raises(BadState):
            ready.ctl.clear(s, "vol0")
        assert ready.volume(name).state == state


def test_clear_of_a_broken_volume_is_the_servers_matter(ready: FakeGroup) -> None:
    ready.volume("a0").state = "Broken"
    with pytest.raises(BadState):
        ready.ctl.clear(ready.a[0], "vol0")
    assert ready.changes() == ["a0 clear-vol vol0"]


def test_go_standby(ready: FakeGroup) -> None:
    ctl, s0 = ready.ctl, ready.s[0]
    ctl.go_standby(s0, "vol0")
    assert ctl.get_state(s0, "vol0") == "Standby"
    assert not ctl.is_synchronizing(ready.a[0], "vol0")
    ready.requests.clear()
    ctl.go_standby(s0, "vol0")
    assert ready.changes() == []
    ctl.stop(s0, "vol0")
    ctl.go_standby(s0, "vol0")  # from SyncReady
    ready.volume("s0").state = "Stopped"
    with pytest.raises(BadState) as caught:
        ctl.go_standby(s0, "vol0")
    assert "reset" in caught.value.hint


def test_go_standby_changes_nothing_when_a_proxy_is_down(ready: FakeGroup) -> None:
    ready.kill("p0")
    with pytest.raises(ConnectError):
        ready.ctl.go_standby(ready.s[0], "vol0")
    assert ready.changes() == []


def test_shutdown(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.kill("s0")
    group.ctl.shutdown_all("force")
    assert "s0: cannot connect" in capsys.readouterr().err
    assert group.changes() == ["p0 shutdown", "a0 shutdown"]
    assert all(request.how == "force" for _, request in group.requests if isinstance(request, c.Shutdown))


def test_set_full_scan_bps(group: FakeGroup) -> None:
    group.ctl.set_full_scan_bps(group.s[0], "3M")
    assert group.requests == [("s0", c.SetFullScanBps(bytes_per_s=3 << 20))]


def test_a_stop_that_is_refused_is_no_stop(ready: FakeGroup) -> None:
    """Only a volume that has stopped by itself in between is as good as one that was told to."""
    px = ready.p[0]
    ready.fail("p0", c.Stop, BadState("not in this state"))
    with pytest.raises(BadState, match="not in this state"):
        ready.ctl.stop_nbk(px, "vol0")
    assert ready.ctl.get_state(px, "vol0") == "Started"
    assert ready.ctl.stop_nbk(px, "vol0") == "Started"
