"""Questions change nothing, and understand what servers say."""

from __future__ import annotations

import datetime as dt

import pytest

from tests.kit.fake_group import NOW, FakeGroup
from walbd.controller import (
    MetaState,
    Snapshot,
    SyncOpt,
)
from walbd.errors import (
    BadState,
    ConnectError,
    NotFound,
    WlogOverflow,
)
from walbd.protocol import maintenance as m
from walbd.protocol.base import JobState


def test_queries(ready: FakeGroup) -> None:
    ctl, s0, p0, a0 = ready.ctl, ready.s[0], ready.p[0], ready.a[0]
    assert ctl.get_host_type(a0) == "archive"
    assert ctl.get_version(a0).python == "3.11.2"
    assert ctl.get_vol_list(s0) == ["vol0"]
    assert ctl.get_state(s0, "vol0") == "Target"
    assert ctl.get_state(s0, "unknown") == "Clear"
    assert ctl.get_vol_size_lb(a0, "vol0") == 1 << 15
    assert ctl.get_progress_lb(a0, "vol0") == 0
    assert ctl.get_base(a0, "vol0") == MetaState(Snapshot(0, 0))
    assert ctl.get_meta_state(a0, "vol0", True, 3).ts == dt.datetime.fromtimestamp(NOW, dt.UTC)
    assert ctl.get_meta_snap(a0, "vol0") == Snapshot(3, 3)
    assert [str(diff) for diff in ctl.get_diff_list(a0, "vol0")] == [
        f"|{gid}|-->|{gid + 1}| M- 2027-01-15T08:00:00 4096" for gid in range(3)
    ]
    assert ctl.get_applicable_diff_list(a0, "vol0", 3) == ctl.get_diff_list(a0, "vol0", 0, 9)
    assert (ctl.get_num_diff(a0, "vol0"), ctl.get_total_diff_size(a0, "vol0")) == (3, 12288)
    assert ctl.exists_diff(a0, "vol0", 1, 2)
    assert not ctl.exists_diff(a0, "vol0", 1, 3)
    assert ctl.get_num_action(a0, "vol0", "Apply") == 0
    assert (
        ctl.get_uuid(s0, "vol0")
        == ctl.get_uuid(a0, "vol0")
        == ctl.get_archive_uuid(a0, "vol0")
        == "00" * 15 + "07"
    )
    assert ctl.exists_base_image(a0, "vol0")
    assert ctl.get_restorable_gid(a0, "vol0") == ctl.get_restorable_gid(a0, "vol0", "all") == [1, 2, 3]
    assert [info.is_explicit for info in ctl.get_restorable(a0, "vol0")] == [False, True, True]
    assert ctl.get_latest_clean_snapshot(a0, "vol0") == 3
    assert ctl.get_latest_snapshot_info(a0) == ctl.get_latest_snapshot_info(a0, "vol0") == {"vol0": 3}
    assert ctl.get_restored(a0, "vol0") == []
    assert ctl.get_archive_info_list(p0, "vol0") == ["a0"]
    assert ctl.get_archive_info(p0, "vol0", a0) == (a0.get_host_port(), SyncOpt())
    assert ctl.get_proxy_diff_list(p0, "vol0", a0) == []
    assert ctl.is_synchronizing(a0, "vol0")
    assert not ctl.is_wdiff_send_error(p0, "vol0", a0)
    assert ctl.get_log_usage(s0, "vol0").capacity_pb == 1000
    assert ctl.get_ts_delta(s0)[0] == {
        "name": "vol0", "dest": "a0", "kind": "storage", "dest_kind": "archive", "gid": 9,
        "ts": "2027-01-15T08:00:00", "dest_gid": 7, "dest_ts": "2027-01-15T07:59:57", "ts_delta": 3,
    }  # fmt: skip
    row = m.ReplicaPosition(node="a1", address="h:1", gid=2, timestamp=NOW - 60, seen=NOW)
    ready.volume("a0").replicas = [row]
    assert [(row["dest"], row["kind"], row["ts_delta"]) for row in ctl.get_ts_delta(a0)] == [("a1", "archive", 60)]
    assert [(job.name, job.state) for job in ctl.get_jobs(s0)] == [
        ("stop", JobState.DONE),
        ("full-backup", JobState.DONE),
    ]
    assert ready.changes() == []


def test_actions(ready: FakeGroup) -> None:
    began = dt.datetime.fromtimestamp(NOW - 60, dt.UTC)
    actions = ready.ctl.get_all_actions(ready.a[0])
    assert actions["vol0"]["Apply"] == (0, began)
    assert actions["vol0"]["Merge"] == actions["vol0"]["never heard of"] == (0, None)
    idle = ready.ctl.get_vol_dict_without_running_actions(ready.a[0])
    assert idle["vol0"]["Apply"] == began


def test_printing(ready: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    ready.kill("p0")
    ctl.get_state_all("vol0")
    ctl.print_restorable(a0, "vol0")
    ctl.print_diff_list(a0, "vol0", 0, 1)
    ctl.print_applicable_diff_list(a0, "vol0")
    ctl.monitor_progress(a0, "vol0")
    out = capsys.readouterr().out.splitlines()
    s0, p0 = ready.s[0], ready.p[0]
    assert out[:3] == [
        f"s0 {s0.get_host_port()} storage Target",
        f"p0 {p0.get_host_port()} proxy err",
        f"a0 {a0.get_host_port()} archive Archived",
    ]
    assert "3 2027-01-15T08:00:03 1" in out
    assert "|0|-->|1| M- 2027-01-15T08:00:00 4096" in out


def test_verify_state(ready: FakeGroup) -> None:
    ready.ctl.verify_state(ready.s[0], "vol0", "Target")
    with pytest.raises(BadState) as caught:
        ready.ctl.verify_state(ready.s[0], "vol0", "Stopped")
    assert caught.value.facts["state"] == "Target"


def test_nothing_restorable(group: FakeGroup) -> None:
    with pytest.raises(NotFound):
        group.ctl.get_latest_clean_snapshot(group.a[0], "vol0")


def test_overflow(ready: FakeGroup) -> None:
    ready.ctl.verify_not_overflow(ready.s[0], "vol0")
    ready.volume("s0").overflow = True
    assert ready.ctl.is_overflow(ready.s[0], "vol0")
    with pytest.raises(WlogOverflow) as caught:
        ready.ctl.verify_not_overflow(ready.s[0], "vol0")
    assert "backup" in caught.value.hint


def test_is_synchronizing_mixed(big: FakeGroup) -> None:
    assert not big.ctl.is_synchronizing(big.a[0], "vol0")
    big.ctl.add_archive_to_proxy(big.p[1], "vol0", big.a[0])
    with pytest.raises(BadState, match="only some") as caught:
        big.ctl.is_synchronizing(big.a[0], "vol0")
    assert (caught.value.facts["sending"], caught.value.facts["others"]) == ("p1", "p0")
    big.kill("p0")
    with pytest.raises(ConnectError) as away:
        big.ctl.is_synchronizing(big.a[0], "vol0")
    assert away.value.facts["servers"] == "p0"
