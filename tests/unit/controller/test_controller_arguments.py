"""Kinds of servers, types of arguments, how servers are reached."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.controller import (
    Controller,
    ServerConnectionParam,
    ServerStartupParam,
)
from walbd.controller.client import Client, identity, patience_s
from walbd.errors import (
    NotSupported,
    Refused,
    UsageError,
)
from walbd.protocol import control as c
from walbd.protocol.base import WaitJob


def test_wrong_types_raise_type_error(group: FakeGroup) -> None:
    ctl, s0, a0 = group.ctl, group.s[0], group.a[0]
    calls: list[Callable[[], Any]] = [
        lambda: ctl.get_state("s0", "vol0"),  # type: ignore[arg-type]
        lambda: ctl.get_state(s0, 7),  # type: ignore[arg-type]
        lambda: ctl.set_server_layout(3),  # type: ignore[arg-type]
        lambda: ctl.restore(a0, "vol0", "3"),  # type: ignore[arg-type]
        lambda: ctl.init_storage(s0, "vol0", None),  # type: ignore[arg-type]
        lambda: ctl.full_backup(s0, "vol0", block=1),  # type: ignore[arg-type]
        lambda: ctl.full_backup(s0, "vol0", syncOpt="zstd"),  # type: ignore[arg-type]
        lambda: ctl.snapshot(s0, "vol0", a0),  # type: ignore[arg-type]
        lambda: ctl.kick_all(s0),  # type: ignore[arg-type]
        lambda: ctl.get_restorable(a0, "vol0", 3),  # type: ignore[arg-type]
        lambda: ctl.run_ctl(s0, "get state vol0"),
        lambda: ctl.stop(s0, "vol0", 3),  # type: ignore[arg-type]
        lambda: Controller("", "layout"),  # type: ignore[arg-type]
        lambda: Controller(None, group.layout),  # type: ignore[arg-type]
    ]
    for call in calls:
        with pytest.raises(TypeError):
            call()
    assert group.requests == []


def test_wrong_kinds_and_values_raise_usage_error(group: FakeGroup) -> None:
    ctl, s0, p0, a0 = group.ctl, group.s[0], group.p[0], group.a[0]
    calls: list[Callable[[], Any]] = [
        lambda: ctl.is_overflow(a0, "vol0"),
        lambda: ctl.restore(s0, "vol0", 1),
        lambda: ctl.is_synchronizing(s0, "vol0"),
        lambda: ctl.full_backup(a0, "vol0"),
        lambda: ctl.snapshot(s0, "vol0", [p0]),
        lambda: ctl.kick_all([a0]),
        lambda: ctl.get_archive_info_list(s0, "vol0"),
        lambda: ctl.reset(p0, "vol0"),
        lambda: ctl.get_state(s0, "no such_name"),
        lambda: ctl.get_state(s0, ""),
        lambda: ctl.restore(a0, "vol0", -1),
        lambda: ctl.stop(s0, "vol0", "empty"),
        lambda: ctl.stop(p0, "vol0", "gently"),
        lambda: ctl.shutdown(s0, "empty"),
        lambda: ctl.shutdown_all("never"),
        lambda: ctl.set_full_scan_bps(s0, "fast"),
        lambda: ctl.full_backup(s0, "vol0", bulkSizeU="100"),
        lambda: ctl.full_backup(s0, "vol0", bulkSizeU="8M"),
        lambda: ctl.init_storage(s0, "vol0", ""),
        lambda: ctl.get_restorable(a0, "vol0", "some"),
        lambda: ctl.get_diff_list(a0, "vol0", 5, 3),
        lambda: ctl.wait_for_stopped(s0, "vol0"),
        lambda: ctl.wait_for_restored(a0, "vol0", 1, -3),
    ]
    for call in calls:
        with pytest.raises(UsageError):
            call()
    assert group.requests == []


def test_startup_params_are_servers_too(group: FakeGroup) -> None:
    s0 = ServerStartupParam(group.s[0], "/usr/bin", "/var/walb")
    assert group.ctl.get_host_type(s0) == "storage"


def test_layout_can_be_replaced(big: FakeGroup) -> None:
    assert big.ctl.get_alive_server() == ["s0", "s1", "p0", "p1", "a0", "a1"]
    big.ctl.set_server_layout(big.layout.replace(proxyL=big.p[:1]))
    assert big.ctl.get_alive_server() == ["s0", "s1", "p0", "a0", "a1"]


def test_server_of_another_kind_at_the_address(group: FakeGroup) -> None:
    wrong = ServerConnectionParam("a9", "127.0.0.1", group.s[0].port, 2)
    with pytest.raises(Refused, match="another kind"):
        group.ctl.get_base(wrong, "vol0")


def test_other_backup_group_is_refused(group: FakeGroup) -> None:
    with Controller("", group.layout, group="other") as ctl, pytest.raises(Refused, match="group"):
        ctl.get_host_type(group.s[0])


def test_unknown_request_is_not_supported(group: FakeGroup) -> None:
    with pytest.raises(NotSupported):
        group.ctl.ask(group.s[0], c.GetBase(volume="vol0"))


def test_client_ends_its_thread_and_can_go_on() -> None:
    with FakeGroup() as group:
        client = Client(identity())
        assert client.call(group.s[0], c.GetHostType()).kind == "storage"
        client.close()
        client.close()
        assert client.call(group.s[0], c.GetHostType()).kind == "storage"
        del client  # the thread ends with the last reference


def test_patience_depends_on_the_request() -> None:
    assert patience_s(c.GetPid()) == 10
    assert patience_s(c.GetPid(), 3) == 3
    assert patience_s(WaitJob(job=1, wait_s=40), 3) == 43
    assert patience_s(c.HashBackup(volume="v"), 10) == 60
    assert patience_s(c.ClearVol(volume="v")) == 100
