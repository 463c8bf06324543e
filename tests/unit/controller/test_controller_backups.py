"""Full and hash backups: what is checked, asked and waited for."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import FakeGroup, FakeVolume
from walbd.controller import (
    ServerLayout,
    SyncOpt,
)
from walbd.errors import (
    BadState,
    ConnectError,
    Refused,
    TimedOut,
    UsageError,
    WlogOverflow,
)
from walbd.protocol import control as c


def test_full_backup(big: FakeGroup) -> None:
    ctl, s0 = big.ctl, big.s[0]
    ctl.init_storage(s0, "vol0", "/dev/x")
    ctl.init_storage(big.s[1], "vol0", "/dev/x")
    ctl.start_synchronizing(big.a[1], "vol0")
    big.requests.clear()
    assert ctl.full_backup(s0, "vol0", bulkSizeU="64K", syncOpt=SyncOpt(delayS=3)) == 1
    changes = big.changes()
    assert changes[0] == "s0 stop vol0"
    assert "p0 archive-info-delete vol0" in changes
    assert changes.index("p1 archive-info-delete vol0") < changes.index("a0 archive-init-vol vol0")
    assert changes.index("p1 archive-info-add vol0") < changes.index("s0 full-backup vol0")
    assert changes[-2:] == ["p0 kick vol0", "p1 kick vol0"]
    assert ("s0", c.FullBackup(volume="vol0", bulk_b=65536)) in big.requests
    assert ctl.get_state(s0, "vol0") == "Target"
    assert not ctl.is_synchronizing(big.a[1], "vol0")
    assert ctl.get_archive_info(big.p[1], "vol0", big.a[0])[1].delayS == 3
    assert any(p.what == "full-backup" and p.total == 1 << 24 for p in big.progress)
    assert any(p.ended for p in big.progress)


def test_full_backup_of_a_stopped_volume_resets_it(ready: FakeGroup) -> None:
    ctl, s0, a0 = ready.ctl, ready.s[0], ready.a[0]
    ctl.stop(s0, "vol0")
    ctl.stop(a0, "vol0")
    ctl.reset(a0, "vol0")
    ready.requests.clear()
    assert ctl.full_backup(s0, "vol0") == 1
    assert ready.changes()[0] == "s0 reset-vol vol0"


def refused_before_anything_changes(group: FakeGroup, error: type[Exception], words: str) -> None:
    group.requests.clear()
    with pytest.raises(error) as caught:
        group.ctl.full_backup(group.s[0], "vol0")
    assert words in f"{caught.value} {getattr(caught.value, 'hint', '')}"
    assert group.changes() == []


def test_full_backup_is_refused_before_anything_changes(big: FakeGroup) -> None:
    ctl = big.ctl
    refused_before_anything_changes(big, BadState, "walbc init-storage vol0")
    ctl.init_storage(big.s[0], "vol0", "/dev/x")
    for state in ("FullSync", "Broken"):
        big.volume("s0").state = state
        refused_before_anything_changes(big, BadState, "expected")
    big.volume("s0").state = "Standby"
    big.servers["s1"].volumes["vol0"] = FakeVolume("Target")
    refused_before_anything_changes(big, BadState, "go-standby vol0 --storage s1")
    del big.servers["s1"].volumes["vol0"]
    big.servers["a0"].volumes["vol0"] = FakeVolume("Archived")
    refused_before_anything_changes(big, BadState, "walbc reset a0 vol0")
    del big.servers["a0"].volumes["vol0"]
    big.servers["p1"].volumes["vol0"] = FakeVolume("WaitForEmpty")
    refused_before_anything_changes(big, BadState, "server=p1")
    del big.servers["p1"].volumes["vol0"]
    for name in ("s1", "p1", "a0"):
        big.kill(name)
        refused_before_anything_changes(big, ConnectError, name)
        big.revive(name)
    big.kill("a1")  # a secondary archive is not needed
    assert ctl.full_backup(big.s[0], "vol0") == 1


def test_full_backup_needs_all_kinds_of_servers(group: FakeGroup) -> None:
    group.ctl.set_server_layout(ServerLayout(group.s, [], group.a))
    with pytest.raises(UsageError, match="too few"):
        group.ctl.full_backup(group.s[0], "vol0")
    assert group.requests == []


def test_full_backup_that_fails_tells_why(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.fail_job("full-backup", WlogOverflow("the log overflowed during the backup", hint="a larger log"))
    with pytest.raises(WlogOverflow, match="overflowed") as caught:
        group.ctl.full_backup(group.s[0], "vol0")
    assert caught.value.hint == "a larger log"
    assert caught.value.facts["server"] == "s0"
    assert group.ctl.get_state(group.s[0], "vol0") == "SyncReady"


def test_full_backup_refused_by_the_storage(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.fail("s0", c.FullBackup, Refused("the archive said no"))
    with pytest.raises(Refused, match="the archive said no"):
        group.ctl.full_backup(group.s[0], "vol0")


def test_full_backup_without_waiting(group: FakeGroup) -> None:
    group.hold("full-backup")
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    assert group.ctl.full_backup(group.s[0], "vol0", block=False) is None
    assert group.ctl.get_state(group.s[0], "vol0") == "FullSync"


def test_full_backup_that_never_arrives_times_out(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.frozen = True
    with pytest.raises(TimedOut, match="restorable at a0"):
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=1)


def test_final_kick_that_fails_is_a_warning(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.fail("p0", c.Kick, Refused("no"))
    assert group.ctl.full_backup(group.s[0], "vol0") == 1
    assert "warning: cannot kick the proxies: no" in capsys.readouterr().err


# A Target: nothing but a lost archive is a reason to stop it


def test_full_backup_of_a_target_is_refused(big: FakeGroup) -> None:
    ctl = big.ctl
    ctl.init_storage(big.s[0], "vol0", "/dev/x")
    ctl.full_backup(big.s[0], "vol0")
    refused_before_anything_changes(big, BadState, "walbc stop s0 vol0")
    ctl.replicate(big.a[0], "vol0", big.a[1], True)
    ctl.clear(big.a[0], "vol0")  # a1 has everything
    refused_before_anything_changes(big, BadState, "a1, to which it is sent, may hold its history")
    big.kill("a1")
    refused_before_anything_changes(big, BadState, "a1, to which it is sent, does not answer")
    big.revive("a1")
    ctl.set_server_layout(big.layout.replace(archiveL=big.a[:1]))
    refused_before_anything_changes(big, BadState, "a1, to which it is sent, may hold its history")


def test_full_backup_of_a_target_whose_archive_lost_everything(
    big: FakeGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    ctl = big.ctl
    ctl.init_storage(big.s[0], "vol0", "/dev/x")
    ctl.full_backup(big.s[0], "vol0")
    ctl.start_synchronizing(big.a[1], "vol0")  # which holds nothing
    ctl.clear(big.a[0], "vol0")
    big.requests.clear()
    assert ctl.full_backup(big.s[0], "vol0") == 1
    assert big.changes()[0] == "s0 stop vol0"
    assert "no archive holds anything of vol0" in capsys.readouterr().err
