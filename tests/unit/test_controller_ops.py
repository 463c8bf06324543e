"""Every method of the controller against a group of fakes: what is asked, in which order, and what is refused."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kit.fake_group import NOW, FakeGroup, FakeVolume
from walbd.controller import (
    CMPR_LZ4,
    CompressOpt,
    Controller,
    Diff,
    MetaState,
    ServerConnectionParam,
    ServerLayout,
    ServerStartupParam,
    Snapshot,
    SyncOpt,
)
from walbd.controller.client import Client, identity
from walbd.errors import (
    AlreadyExists,
    BadState,
    ConnectError,
    NotFound,
    NotSupported,
    Refused,
    TimedOut,
    UsageError,
    WlogOverflow,
)
from walbd.protocol import control as c
from walbd.protocol.base import JobState


@pytest.fixture
def group() -> Iterator[FakeGroup]:
    with FakeGroup() as made:
        yield made


@pytest.fixture
def big() -> Iterator[FakeGroup]:
    with FakeGroup(storages=2, proxies=2, archives=2) as made:
        yield made


@pytest.fixture
def ready(group: FakeGroup) -> FakeGroup:
    """One volume that is backed up, with snapshots 1, 2 and 3 at the archive."""
    backed_up(group)
    group.ctl.snapshot(group.s[0], "vol0", group.a)
    group.ctl.snapshot(group.s[0], "vol0", group.a)
    group.requests.clear()
    return group


def backed_up(group: FakeGroup) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    assert group.ctl.full_backup(group.s[0], "vol0") == 1


# The kind of a server, the type of an argument


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


# Questions


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


# One server's commands as words


@pytest.mark.parametrize(
    ("server", "words", "text"),
    [
        ("s0", "get state vol0", "Target"),
        ("s0", "get host-type", "storage"),
        ("s0", "get vol", "vol0"),
        ("s0", "get is-overflow vol0", "0"),
        ("s0", "get log-usage vol0", "name:vol0\tusage_pb:10\tcapacity_pb:1000\tpbs:4096"),
        ("s0", "get uuid vol0", "00" * 15 + "07"),
        ("s0", "get latest-snap", "name:vol0\tkind:storage\tgid:3\tlsid:0\ttimestamp:2027-01-15T07:59:55"),
        ("s0", "get num-action vol0 WlogSend", "0"),
        ("s0", "get all-actions", "vol0 Apply 0 2027-01-15T07:59:00"),
        ("s0", "snapshot vol0", "4"),
        ("s0", "kick", "1"),
        ("s0", "set-full-scan-bps 1m", ""),
        ("s0", "version", "version:0.1.0\tlog_version:2\tprotocol:1-1\tpython:3.11.2"),
        ("p0", "archive-info list vol0", "a0"),
        ("p0", "get is-wdiff-send-error vol0 a0", "0"),
        ("p0", "kick vol0 a0", "1"),
        ("p0", "get proxy-diff vol0", ""),
        (
            "a0",
            "get restorable vol0 all",
            "1 2027-01-15T08:00:01 0\n2 2027-01-15T08:00:02 1\n3 2027-01-15T08:00:03 1",
        ),
        ("a0", "get num-diff vol0 0 2", "2"),
        ("a0", "get total-diff-size vol0", "12288"),
        ("a0", "get diff vol0", None),
        ("a0", "get base vol0", "<|0|>-20270115080000"),
        ("a0", "get meta-snap vol0 3", "|3|"),
        ("a0", "get meta-state vol0 1", "<|0|>-20270115080000"),
        ("a0", "get restored vol0", ""),
        ("a0", "get exists-base-image vol0", "1"),
        ("a0", "gc-diff vol0", "2"),
        ("a0", "get vol-size vol0", "32768"),
        ("a0", "restore vol0 2", "1"),
        ("a0", "status vol0", None),
        ("a0", "get jobs", ""),
    ],
)
def test_run_ctl(server: str, words: str, text: str | None, ready: FakeGroup) -> None:
    s = next(s for s in ready.layout.get_all() if s.name == server)
    found = ready.ctl.run_ctl(s, words.split())
    assert found == text if text is not None else found


@pytest.mark.parametrize(
    "words",
    ["", "get", "nonsense", "get nonsense", "get state", "get state vol0 more", "restore vol0 1", "init-vol vol0",
     "start vol0 nothing", "stop vol0 gently", "full-bkp vol0 1k1", "full-bkp vol0 100", "reset-vol vol0 x",
     "reset-vol vol0 99999999999999999999", "kick vol0", "set-full-scan-bps many", "get state vol_0", "wait-job x",
     "wait-job 1 99", "shutdown empty"],
)  # fmt: skip
def test_run_ctl_refuses_bad_words(words: str, group: FakeGroup) -> None:
    with pytest.raises(UsageError):
        group.ctl.run_ctl(group.s[0], words.split())
    assert group.requests == []


@pytest.mark.parametrize(
    "words",
    ["archive-info add vol0 a0", "archive-info add vol0 a0 host", "archive-info add vol0 a0 host:0",
     "archive-info add vol0 a0 h:1 zip", "archive-info add vol0 a0 h:1 zstd:1:1 -1",
     "archive-info add vol0 a_/0 h:1"],
)  # fmt: skip
def test_run_ctl_refuses_bad_archive_infos(words: str, group: FakeGroup) -> None:
    with pytest.raises(UsageError):
        group.ctl.run_ctl(group.p[0], words.split())
    assert group.requests == []


def test_run_ctl_archive_info(group: FakeGroup) -> None:
    run, p0 = group.ctl.run_ctl, group.p[0]
    assert run(p0, ["archive-info", "add", "vol0", "a0", "h:1", "lz4:2:3", "60"]) == ""
    assert run(p0, ["archive-info", "get", "vol0", "a0"]) == "h:1 lz4:2:1 60"
    assert run(p0, ["archive-info", "update", "vol0", "a0", "h:2"]) == ""
    assert run(p0, ["archive-info", "get", "vol0", "a0"]) == "h:2 zstd:1:1 0"
    assert run(p0, ["archive-info", "delete", "vol0", "a0"]) == ""
    assert run(p0, ["archive-info", "list", "vol0"]) == ""


def test_run_ctl_messages(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.ctl.run_ctl(group.s[0], ["get", "host-type"], putMsg=True)
    with pytest.raises(BadState):
        group.ctl.run_ctl(group.s[0], ["snapshot", "vol0"], putMsg=True)
    err = capsys.readouterr().err.splitlines()
    assert err[:2] == ["s0: get host-type", "storage"]
    assert err[-1].startswith("s0: not allowed in this state")
    with Controller("", group.layout, isDebug=True) as ctl:
        ctl.get_host_type(group.s[0])
        ctl.get_alive_server()
    assert "s0 <- GetHostType()" in capsys.readouterr().err


# Life of a volume


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


# Synchronisation


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


# Backup


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
    assert changes[-2:] == ["p0 kick vol0", "p1 kick vol0"] or changes[-2:] == ["p1 kick vol0", "p0 kick vol0"]
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
    for state, words in (("Target", "walbc stop s0 vol0"), ("FullSync", "expected"), ("Broken", "expected")):
        big.volume("s0").state = state
        refused_before_anything_changes(big, BadState, words)
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
        group.ctl.full_backup(group.s[0], "vol0", timeoutS=0.05)


def test_final_kick_that_fails_is_a_warning(group: FakeGroup, capsys: pytest.CaptureFixture[str]) -> None:
    group.ctl.init_storage(group.s[0], "vol0", "/dev/x")
    group.fail("p0", c.Kick, Refused("no"))
    assert group.ctl.full_backup(group.s[0], "vol0") == 1
    assert "warning: cannot kick the proxies: no" in capsys.readouterr().err


# Snapshots and images


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


def test_apply(ready: FakeGroup) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    with pytest.raises(UsageError) as caught:
        ctl.apply(a0, "vol0", 9)
    assert caught.value.hint == "ends: 1, 2, 3"
    ctl.apply(a0, "vol0", 2)
    assert ctl.get_base(a0, "vol0") == MetaState(Snapshot(2, 2))
    assert ctl.get_restorable_gid(a0, "vol0") == [2, 3]
    ready.fail_job("apply", Refused("no"))
    with pytest.raises(Refused, match="no"):
        ctl.apply(a0, "vol0", 3)
    assert ctl.gc_diff(a0, "vol0") == 2


def test_apply_that_ends_before_its_goal(ready: FakeGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    ctl, a0 = ready.ctl, ready.a[0]
    monkeypatch.setattr(ctl, "get_base", lambda *_: MetaState(Snapshot(0, 0), Snapshot(2, 2)))
    with pytest.raises(Refused, match="before its goal"):
        ctl.apply(a0, "vol0", 2)


def test_diff_objects_are_usable(ready: FakeGroup) -> None:
    diff = ready.ctl.get_diff_list(ready.a[0], "vol0")[0]
    assert isinstance(diff, Diff)
    diff.verify()
    assert diff.isMergeable
