"""Replacing a server: what must be right before anything is done, and the last look before data are removed."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.kit.fake_group import FakeGroup
from walbd.controller import replace
from walbd.controller.doctor import observe
from walbd.controller.doctor.observation import Observation
from walbd.controller.layout import GroupLayout, parse_layout
from walbd.controller.replace import ArchiveReplacement, Move, ProxyReplacement, Replacement, StorageReplacement
from walbd.controller.servers import Server, ServerConnectionParam
from walbd.errors import BadState, ConnectError, Refused, UsageError


def layout(*servers: Server) -> GroupLayout:
    """Return the group file of these servers."""
    text = ""
    for s in servers:
        kind = ("storage", "proxy", "archive")[s.kind]
        text += f'[[{kind}]]\nname = "{s.name}"\nhost = "{s.address}"\nport = {s.port}\n'
    return parse_layout(text + "[volumes.vol0]\n", Path("group.toml"))


def renamed(s: Server, name: str) -> Server:
    return ServerConnectionParam(name, s.address, s.port, s.kind)


@pytest.fixture
def backed(big: FakeGroup) -> FakeGroup:
    """vol0 is backed up from s0 by both proxies to a0; s1 and a1 know nothing."""
    big.ctl.init_storage(big.s[0], "vol0", "/dev/x")
    big.ctl.full_backup(big.s[0], "vol0")
    big.requests.clear()
    return big


def everybody(group: FakeGroup) -> GroupLayout:
    return layout(*group.s, *group.p, *group.a)


@pytest.mark.parametrize("kind", [StorageReplacement, ProxyReplacement, ArchiveReplacement])
def test_both_must_be_of_the_kind_and_two(backed: FakeGroup, kind: type[Replacement]) -> None:
    group = everybody(backed)
    of = {StorageReplacement: backed.s, ProxyReplacement: backed.p, ArchiveReplacement: backed.a}[kind]
    (old, new), others = of, [s for s in (*backed.s, *backed.p, *backed.a) if s not in of]
    for pair in ((old, others[0]), (others[0], new)):
        with pytest.raises(UsageError, match="of the same kind"):
            kind(backed.ctl, group, *pair)
    for same in (old, renamed(old, "other"), ServerConnectionParam(old.name, "127.0.0.1", 1, old.kind)):
        with pytest.raises(UsageError, match="cannot replace itself"):
            kind(backed.ctl, group, old, same)
    assert backed.changes() == []


def test_who_must_answer(backed: FakeGroup) -> None:
    group = everybody(backed)
    old, new = backed.p
    with pytest.raises(BadState, match="said to be gone answers"):
        ProxyReplacement(backed.ctl, group, old, new, gone=True)
    backed.kill("p0")
    with pytest.raises(ConnectError, match="do not answer") as caught:
        ProxyReplacement(backed.ctl, group, old, new)
    assert (caught.value.facts["servers"], "--gone" in caught.value.hint) == ("p0", True)
    backed.kill("a1")
    with pytest.raises(ConnectError, match="do not answer") as caught:
        ProxyReplacement(backed.ctl, group, old, new, gone=True)
    assert (caught.value.facts["servers"], "--gone" in caught.value.hint) == ("a1", False)
    assert backed.changes() == []


def test_storages_and_the_group_file_must_agree_on_the_primary(
    backed: FakeGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the storages would be told of an archive that they have left."""
    primary = [""]  # what s1 uses

    def look(*args: Any) -> Observation:
        o = observe(*args)
        seen = {}
        for name, each in o.seen.items():
            assert each.status is not None
            status = dataclasses.replace(each.status, server=each.status.server | {"archive": primary[0]})
            seen[name] = dataclasses.replace(each, status=status if name == "s1" else each.status)
        return dataclasses.replace(o, seen=seen)

    monkeypatch.setattr(replace, "observe", look)
    for primary[0] in ("", backed.a[0].get_host_port()):
        ProxyReplacement(backed.ctl, everybody(backed), *backed.p)
    primary[0] = backed.a[1].get_host_port()
    with pytest.raises(BadState, match="another primary archive") as caught:
        ProxyReplacement(backed.ctl, everybody(backed), *backed.p)
    assert (caught.value.facts["storage"], caught.value.facts["archive"]) == ("s1", primary[0])
    ArchiveReplacement(backed.ctl, everybody(backed), *backed.a)  # it was begun, and cut off after the retargeting
    assert backed.changes() == []


def test_the_device_of_a_new_storage_must_be_known(backed: FakeGroup) -> None:
    with pytest.raises(UsageError, match="device of the new storage is not known") as caught:
        StorageReplacement(backed.ctl, everybody(backed), *backed.s)
    assert "--device vol0=PATH" in caught.value.hint
    known = StorageReplacement(backed.ctl, everybody(backed), *backed.s, devices={"vol0": "/dev/y"})
    assert known.plan()[0].text == "walbc init-storage vol0 /dev/y --storage s1"
    assert backed.changes() == []


def test_nothing_is_removed_before_the_new_archive_has_everything(backed: FakeGroup) -> None:
    """Asked once more right before: it may have been cut off since the copy."""
    replacement = ArchiveReplacement(backed.ctl, everybody(backed), *backed.a)
    points = list(backed.volume("a0").points)
    with pytest.raises(BadState, match="nothing is removed"):
        replacement._clear("vol0", Move("walbc replicate", lambda: False, lambda: None))
    assert backed.volume("a0").points == points
    assert backed.changes() == []
    assert replacement._is_fed_whole("a1", "vol0") is False


def test_a_step_that_ends_without_its_effect(backed: FakeGroup) -> None:
    replacement = ProxyReplacement(backed.ctl, everybody(backed), *backed.p)
    called: list[str] = []
    told: list[str] = []
    replacement.moves = [
        Move("one", lambda: True, lambda: called.append("one")),
        Move("two", lambda: "two" in called, lambda: called.append("two")),
        Move("three", lambda: False, lambda: called.append("three")),
        Move("four", lambda: False, lambda: called.append("four")),
    ]
    with pytest.raises(Refused, match="without its effect") as caught:
        replacement.run(told.append)
    assert caught.value.facts["step"] == "three"
    assert called == ["two", "three"]
    assert told == ["1/4 one: done already", "2/4 two", "3/4 three"]


def test_a_hold_needs_a_reason(backed: FakeGroup) -> None:
    for reason in ("", "x" * 1025):
        with pytest.raises(UsageError, match="needs a reason"):
            backed.ctl.add_hold(backed.a[0], "vol0", 1, reason)
    assert backed.changes() == []
