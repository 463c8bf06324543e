"""Settings of daemons that run; what walbd refuses that walb-tools had."""

from __future__ import annotations

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.errors import BadState, ConfigError, ConnectError, NotSupported, UsageError
from walbd.protocol import maintenance as m


def test_reload(big: FakeGroup) -> None:
    assert big.ctl.reload(big.p[0]) == m.Reloaded(applied=["log_level"], needs_restart=["port"])
    assert list(big.ctl.reload_all()) == ["s0", "s1", "p0", "p1", "a0", "a1"]
    big.fail("s0", m.Reload, ConfigError("bad value", hint="write a number"))
    with pytest.raises(ConfigError, match="bad value"):
        big.ctl.reload_all()
    big.kill("a1")
    with pytest.raises(ConnectError):
        big.ctl.reload_all(big.a)
    assert big.ctl.run_ctl(big.p[0], ["reload"]) == "applied log_level\nneeds-restart port"


def test_retarget(big: FakeGroup) -> None:
    big.ctl.retarget(big.s[0])
    proxies = [p.get_host_port() for p in big.p]
    request = m.Retarget(archive=big.a[0].get_host_port(), proxies=proxies)
    assert big.requests[-1] == ("s0", request)
    big.ctl.retarget(big.s[1], big.a[1], [big.p[1]])
    assert big.requests[-1] == ("s1", m.Retarget(archive=big.a[1].get_host_port(), proxies=proxies[1:]))
    assert list(big.ctl.retarget_all()) == ["s0", "s1"]
    with pytest.raises(UsageError):
        big.ctl.retarget(big.s[0], big.p[0])
    with pytest.raises(UsageError):
        big.ctl.retarget(big.a[0])
    with pytest.raises(TypeError):
        big.ctl.retarget(big.s[0], pxL=["p0"])  # type: ignore[list-item]


def test_retarget_all_changes_nothing_unless_all_storages_answer(big: FakeGroup) -> None:
    big.kill("s1")
    with pytest.raises(ConnectError):
        big.ctl.retarget_all()
    assert big.changes() == []


def test_dump_log_header(ready: FakeGroup) -> None:
    ready.ctl.dump_log_header(ready.s[0], "vol0", 77)
    assert ready.requests[-1] == ("s0", m.DumpLogHeader(volume="vol0", lsid=77))
    with pytest.raises(BadState):
        ready.ctl.dump_log_header(ready.s[0], "vol9", 77)
    with pytest.raises(UsageError):
        ready.ctl.dump_log_header(ready.a[0], "vol0", 77)


def test_daemons_run_no_programs(group: FakeGroup) -> None:
    for call in (
        lambda: group.ctl.run_remote_command(group.s[0], ["/bin/true"]),
        lambda: group.ctl.get_run_remote_command(group.s[0]),
        lambda: group.ctl.run_ctl(group.s[0], ["exec", "/bin/true", "x"]),
        lambda: group.ctl.run_ctl(group.s[0], ["sleep", "3"]),
    ):
        with pytest.raises(NotSupported):
            call()
    assert group.requests == []
