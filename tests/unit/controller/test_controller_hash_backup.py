"""Hash backups: after a stop, an overflow, from another storage; what is refused, delivered first, waited for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.fake_group import FakeGroup, FakeVolume
from walbd.controller import SyncOpt, backup, targets
from walbd.errors import BadState, Busy, ConnectError, Refused, TimedOut, UsageError
from walbd.protocol import control as c
from walbd.protocol.codec import Request


@pytest.fixture
def stopped(ready: FakeGroup) -> FakeGroup:
    """vol0 has the generations 1 to 3 at a0, and is Stopped at s0."""
    ready.ctl.stop(ready.s[0], "vol0")
    ready.requests.clear()
    return ready


def test_hash_backup_of_a_stopped_volume(stopped: FakeGroup) -> None:
    ctl, s0, a0 = stopped.ctl, stopped.s[0], stopped.a[0]
    assert ctl.hash_backup(s0, "vol0", bulkSizeU="64K", syncOpt=SyncOpt(delayS=2)) == 4
    changes = stopped.changes()
    assert changes.index("s0 reset-vol vol0") < changes.index("s0 hash-backup vol0")
    assert "a0 archive-init-vol vol0" not in changes
    assert ("s0", c.HashBackup(volume="vol0", bulk_b=65536)) in stopped.requests
    assert ctl.get_state(s0, "vol0") == "Target"
    assert ctl.get_archive_info(stopped.p[0], "vol0", a0)[1].delayS == 2
    assert any(p.what == "hash-backup" and p.total == 1 << 24 for p in stopped.progress)


def test_hash_backup_from_another_storage(big: FakeGroup) -> None:
    ctl, (s0, s1) = big.ctl, big.s
    for s in big.s:
        ctl.init_storage(s, "vol0", "/dev/x")
    ctl.full_backup(s0, "vol0")
    ctl.start_synchronizing(big.a[1], "vol0")
    ctl.go_standby(s0, "vol0")
    assert ctl.hash_backup(s1, "vol0") == 2
    assert [ctl.get_state(s, "vol0") for s in big.s] == ["Standby", "Target"]
    assert not ctl.is_synchronizing(big.a[1], "vol0")  # no archive but the primary one is fed after a backup


def test_generations_that_another_storage_gave_out_never_come_again(
    big: FakeGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl, (s0, s1) = big.ctl, big.s
    for s in big.s:
        ctl.init_storage(s, "vol0", "/dev/x")
    ctl.full_backup(s0, "vol0")
    big.volume("s0").gid = 9  # answered, and lost with the log
    ctl.go_standby(s0, "vol0")
    assert ctl.hash_backup(s1, "vol0") == 10
    assert ("s1", c.HashBackup(volume="vol0", gid_past=9)) in big.requests
    assert capsys.readouterr().err == ""


def test_that_nobody_knows_what_was_given_out_is_said(big: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    """The former target is lost, and not in the layout any more. What proxies hold for others is above, too."""
    ctl, (s0, s1) = big.ctl, big.s
    for s in big.s:
        ctl.init_storage(s, "vol0", "/dev/x")
    ctl.full_backup(s0, "vol0")
    ctl.snapshot(s0, "vol0", big.a[:1])
    big.kill("s0")
    ctl.set_server_layout(big.layout.replace(storageL=[s1]))
    assert ctl.hash_backup(s1, "vol0") == 3
    told = capsys.readouterr().err
    assert "a0 has generation 2 of vol0, and no storage of the layout has given it out" in told


def test_hash_backup_without_waiting(stopped: FakeGroup) -> None:
    stopped.hold("hash-backup")
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0", block=False) is None
    assert stopped.ctl.get_state(stopped.s[0], "vol0") == "HashSync"


# Overflow


def test_hash_backup_after_an_overflow(stopped: FakeGroup) -> None:
    stopped.volume("s0").overflow = True
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0") == 4
    assert not stopped.ctl.is_overflow(stopped.s[0], "vol0")


def test_hash_backup_while_the_storage_stops_by_itself(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.volume("s0").overflow = True
    asked = 0

    async def before(name: str, request: Request[Any]) -> None:
        nonlocal asked
        if name == "s0" and isinstance(request, c.GetState):
            asked += 1
            state = {2: "StopTarget", 3: "Stopped"}.get(asked)
            if state is not None:
                ready.volume("s0").state = state

    monkeypatch.setattr(ready, "before", before)
    assert ready.ctl.hash_backup(ready.s[0], "vol0") == 4


def test_hash_backup_of_a_target_is_refused(ready: FakeGroup) -> None:
    with pytest.raises(BadState) as caught:
        ready.ctl.hash_backup(ready.s[0], "vol0")
    assert caught.value.hint == "to take a backup all the same, stop it first: walbc stop s0 vol0"
    assert ready.changes() == []


def test_a_target_is_stopped_when_diffs_are_lost_on_the_way(
    ready: FakeGroup, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup, "_STUCK_S", 0)
    ready.volume("s0").gid = 9  # delivered to a proxy that has lost its data
    ready.volume("p0").waiting["a0"] = [10]
    ready.frozen = True
    assert ready.ctl.hash_backup(ready.s[0], "vol0", block=False) is None
    assert "diffs after generation 3 are lost before a0" in capsys.readouterr().err
    assert ready.changes()[0] == "s0 stop vol0"


def test_a_target_whose_diffs_still_come_is_refused(ready: FakeGroup) -> None:
    ready.volume("s0").gid = 9
    ready.volume("p0").waiting["a0"] = [4, 9]
    ready.frozen = True
    with pytest.raises(BadState, match="misses nothing"):
        ready.ctl.hash_backup(ready.s[0], "vol0")
    ready.volume("p0").waiting = {"": [4, 9]}  # received just now
    with pytest.raises(BadState, match="misses nothing"):
        ready.ctl.hash_backup(ready.s[0], "vol0")
    ready.volume("p0").waiting = {}
    ready.kill("p0")  # it may have what is missing
    with pytest.raises(ConnectError):
        ready.ctl.hash_backup(ready.s[0], "vol0")
    assert ready.changes() == []


def test_overflow_that_does_not_stop_the_volume(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ready.volume("s0").overflow = True
    monkeypatch.setattr(targets, "SHORT_TIMEOUT_SEC", 0.05)
    with pytest.raises(TimedOut, match="Stopped at s0"):
        ready.ctl.hash_backup(ready.s[0], "vol0")
    assert ready.changes() == []


# Refusals


@pytest.mark.parametrize(
    ("server", "state", "words"),
    [
        ("s0", "Clear", "walbc init-storage vol0"),
        ("s0", "FullSync", "expected"),
        ("a0", "Clear", "walbc full-backup vol0 --storage s0"),
        ("a0", "SyncReady", "walbc full-backup vol0 --storage s0"),
        ("a0", "Stopped", "walbc start a0 vol0"),
        ("a0", "FullSync", "expected"),
        ("p1", "WaitForEmpty", "expected"),
        ("s1", "Target", "go-standby vol0 --storage s1"),
    ],
)
def test_states_in_which_nothing_is_compared(server: str, state: str, words: str, big: FakeGroup) -> None:
    for name, found in (("s0", "Stopped"), ("a0", "Archived")):
        big.servers[name].volumes["vol0"] = FakeVolume(found)
    big.servers[server].volumes["vol0"] = FakeVolume(state)
    with pytest.raises(BadState) as caught:
        big.ctl.hash_backup(big.s[0], "vol0")
    assert words in f"{caught.value} {caught.value.hint}"
    assert big.changes() == []


def test_all_servers_must_answer_before_anything_changes(big: FakeGroup) -> None:
    big.servers["s0"].volumes["vol0"] = FakeVolume("Stopped")
    big.servers["a0"].volumes["vol0"] = FakeVolume("Archived", points=[1])
    for name in ("s1", "p1", "a0"):
        big.kill(name)
        with pytest.raises(ConnectError) as caught:
            big.ctl.hash_backup(big.s[0], "vol0")
        assert caught.value.facts["servers"] == name
        big.revive(name)
    assert big.changes() == []
    big.kill("a1")  # a secondary archive is not needed
    assert big.ctl.hash_backup(big.s[0], "vol0") == 2


def test_wrong_arguments(stopped: FakeGroup) -> None:
    with pytest.raises(UsageError):
        stopped.ctl.hash_backup(stopped.a[0], "vol0")
    with pytest.raises(UsageError):
        stopped.ctl.hash_backup(stopped.s[0], "vol0", bulkSizeU="8m")
    with pytest.raises(TypeError):
        stopped.ctl.hash_backup(stopped.s[0], "vol0", syncOpt="x")  # type: ignore[arg-type]
    assert stopped.changes() == []


# What is in the way


def test_what_is_busy_for_a_moment_is_asked_again(stopped: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(stopped.ctl.calls, "sleep", slept.append)
    stopped.fail("s0", c.HashBackup, Busy("the archive receives a diff"), times=2)
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0") == 4
    assert slept[:2] == [0.2, 0.2]
    stopped.ctl.stop(stopped.s[0], "vol0")
    monkeypatch.setattr(backup, "_BUSY_S", 0)
    stopped.fail("s0", c.HashBackup, Busy("the archive receives a diff"))
    with pytest.raises(Busy):
        stopped.ctl.hash_backup(stopped.s[0], "vol0")


def test_diffs_at_proxies_are_delivered_first(stopped: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    stopped.volume("p0").waiting["a0"] = [4, 5]
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0") == 6
    assert stopped.ctl.get_restorable_gid(stopped.a[0], "vol0") == [1, 2, 3, 4, 5, 6]
    assert capsys.readouterr().err == ""


def test_diffs_that_cannot_be_delivered_are_told_of(
    stopped: FakeGroup, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(backup, "_STUCK_S", 0)
    stopped.volume("p0").waiting["a0"] = [4, 5]
    stopped.frozen = True

    async def before(_name: str, request: Request[Any]) -> None:
        if isinstance(request, c.HashBackup):
            stopped.frozen = False

    monkeypatch.setattr(stopped, "before", before)
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0") == 6  # above what they led to
    assert "2 diffs that proxies hold for a0 cannot be delivered" in capsys.readouterr().err


def test_the_new_generation_must_be_newer(stopped: FakeGroup) -> None:
    stopped.frozen = True
    with pytest.raises(TimedOut, match="restorable at a0"):
        stopped.ctl.hash_backup(stopped.s[0], "vol0", timeoutS=1)


def test_hash_backup_that_fails_tells_why(stopped: FakeGroup) -> None:
    stopped.fail_job("hash-backup", Refused("the archive is full"))
    with pytest.raises(Refused, match="the archive is full"):
        stopped.ctl.hash_backup(stopped.s[0], "vol0")
    assert stopped.ctl.get_state(stopped.s[0], "vol0") == "SyncReady"
    assert stopped.ctl.hash_backup(stopped.s[0], "vol0") == 4  # from SyncReady
