"""Which archives the proxies feed, and kicks."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.controller import (
    CMPR_LZ4,
    CompressOpt,
    ServerConnectionParam,
    SyncOpt,
)
from walbd.errors import (
    BadState,
    ConnectError,
    NotFound,
    Refused,
    UsageError,
)
from walbd.protocol import control as c


def test_start_and_stop_synchronizing(big: FakeGroup) -> None:
    ctl, a0, a1 = big.ctl, big.a[0], big.a[1]
    opt = SyncOpt(CompressOpt(CMPR_LZ4, 3), delayS=7)
    ctl.start_synchronizing(a0, "vol0", opt)
    assert ctl.is_synchronizing(a0, "vol0")
    assert [big.volume(p).state for p in ("p0", "p1")] == ["Started", "Started"]
    assert big.changes()[-2:] == ["s0 kick", "s1 kick"]
    ctl.start_synchronizing(a1, "vol0")
    ctl.start_synchronizing(a0, "vol0")  # again, saying nothing of how: that stays
    for p in big.p:
        assert ctl.get_archive_info(p, "vol0", a0) == (a0.get_host_port(), opt)
    ctl.stop_synchronizing(a0, "vol0")
    assert not ctl.is_synchronizing(a0, "vol0")
    assert ctl.is_synchronizing(a1, "vol0")
    ctl.stop_synchronizing(a1, "vol0")
    assert [ctl.get_state(p, "vol0") for p in big.p] == ["Clear", "Clear"]
    ctl.stop_synchronizing(a1, "vol0")  # is not sent there anyway


def test_synchronizing_changes_nothing_unless_all_proxies_answer(big: FakeGroup) -> None:
    big.kill("p1")
    for call in (big.ctl.start_synchronizing, big.ctl.stop_synchronizing):
        with pytest.raises(ConnectError) as caught:
            call(big.a[0], "vol0")
        assert caught.value.facts["servers"] == "p1"
    assert big.changes() == []


def test_a_storage_that_cannot_be_kicked_is_only_told_of(
    big: FakeGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    big.kill("s1")
    big.ctl.start_synchronizing(big.a[0], "vol0")
    assert "warning: cannot kick s1" in capsys.readouterr().err


def test_proxy_is_started_again_when_a_change_fails(ready: FakeGroup) -> None:
    ready.fail("p0", c.UpdateArchiveInfo, Refused("no"))
    with pytest.raises(Refused):
        ready.ctl.add_archive_to_proxy(ready.p[0], "vol0", ready.a[0])
    assert ready.volume("p0").state == "Started"
    ready.fail("p0", c.DeleteArchiveInfo, Refused("no"))
    with pytest.raises(Refused):
        ready.ctl.del_archive_from_proxy(ready.p[0], "vol0", ready.a[0])
    assert ready.volume("p0").state == "Started"


def test_proxy_that_cannot_be_started_again_is_told_of(
    ready: FakeGroup, capsys: pytest.CaptureFixture[str]
) -> None:
    ready.fail("p0", c.DeleteArchiveInfo, Refused("no"))
    ready.fail("p0", c.Start, Refused("never"))
    with pytest.raises(Refused, match="no"):
        ready.ctl.del_archive_from_proxy(ready.p[0], "vol0", ready.a[0])
    assert "p0 vol0 stays stopped: never" in capsys.readouterr().err


def test_update_archive_info(ready: FakeGroup) -> None:
    ctl, p0, a0 = ready.ctl, ready.p[0], ready.a[0]
    opt = SyncOpt(CompressOpt(CMPR_LZ4, 0), delayS=9)
    with pytest.raises(BadState):
        ctl.update_archive_info(p0, "vol0", a0, opt)
    ctl.stop(p0, "vol0")
    other = ServerConnectionParam("a9", "127.0.0.1", 9, 2)
    with pytest.raises(NotFound):
        ctl.update_archive_info(p0, "vol0", other, opt)
    ctl.update_archive_info(p0, "vol0", a0, opt)
    assert ctl.get_archive_info(p0, "vol0", a0)[1] == opt
    assert ctl.get_state(p0, "vol0") == "Stopped"


def test_copy_archive_info(big: FakeGroup) -> None:
    ctl, p0, p1 = big.ctl, big.p[0], big.p[1]
    with pytest.raises(NotFound):
        ctl.copy_archive_info(p0, "vol0", p1)
    opt = SyncOpt(CompressOpt(CMPR_LZ4, 3), delayS=7)
    for ax in big.a:
        ctl.add_archive_to_proxy(p0, "vol0", ax, syncOpt=opt)
    ctl.copy_archive_info(p0, "vol0", p1)
    assert ctl.get_archive_info_list(p1, "vol0") == ["a0", "a1"]
    assert ctl.get_archive_info(p1, "vol0", big.a[1])[1] == opt
    assert big.volume("p1").state == "Started"
    ctl.set_server_layout(big.layout.replace(archiveL=big.a[:1]))
    big.requests.clear()
    with pytest.raises(UsageError):
        ctl.copy_archive_info(p0, "vol0", p1)  # a1 is not known here
    assert big.changes() == []


def test_kicks(ready: FakeGroup) -> None:
    ctl, s0, p0, a0 = ready.ctl, ready.s[0], ready.p[0], ready.a[0]
    ctl.kick_all([s0])
    ctl.kick_all([s0, p0])
    ctl.kick_storage_all()
    ready.volume("p0").send_error = True
    assert ctl.is_wdiff_send_error(p0, "vol0", a0)
    ctl.kick_proxy("vol0", a0)
    assert not ctl.is_wdiff_send_error(p0, "vol0", a0)
    ready.volume("p0").state = "Stopped"
    with pytest.raises(BadState):
        ctl.kick_proxy("vol0", a0)
    ready.kill("p0")
    ready.requests.clear()
    with pytest.raises(ConnectError):
        ctl.kick_all([p0, s0])
    assert ready.changes() == ["s0 kick"]  # the others are kicked all the same


def test_a_proxy_goes_on_sending_to_the_archives_that_are_left(big: FakeGroup) -> None:
    ctl, px = big.ctl, big.p[0]
    ctl.init_storage(big.s[0], "vol0", "/dev/x")
    ctl.full_backup(big.s[0], "vol0")
    ctl.add_archive_to_proxy(px, "vol0", big.a[1], doStart=True)
    assert sorted(ctl.get_archive_info_list(px, "vol0")) == ["a0", "a1"]
    ctl.del_archive_from_proxy(px, "vol0", big.a[1])
    assert ctl.get_archive_info_list(px, "vol0") == ["a0"]
    assert ctl.get_state(px, "vol0") == "Started"
    ctl.del_archive_from_proxy(px, "vol0", big.a[0])
    assert ctl.get_state(px, "vol0") == "Clear"
